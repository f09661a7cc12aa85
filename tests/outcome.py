"""What a suite of faults counts: one row of the table that tests/faults.py prints."""

from dataclasses import dataclass


@dataclass
class Outcome:
    """One kind of fault. lost: what was lost, or "nothing". failures: a line each."""

    name: str
    tried: int
    survived: int
    lost: str
    seconds: float
    failures: list[str]
