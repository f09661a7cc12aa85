"""What a suite of faults counts: one row of the table that tests/faults.py prints."""

import time
from dataclasses import dataclass, field
from typing import ClassVar


@dataclass
class Outcome:
    """One kind of fault. note: what is to be said of it. failures: a line each."""

    name: str
    tried: int = 0
    note: str = ""
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)
    before: ClassVar[float] = 0.0  # when the fault before this was noted, of any kind

    def __post_init__(self) -> None:
        Outcome.before = time.perf_counter()

    @property
    def survived(self) -> int:
        return self.tried - len(self.failures)

    def add(self, case: str, *faults: str) -> None:
        """Count a fault that was tried. faults: what was wrong with what became of it, or ""."""
        now = time.perf_counter()
        self.seconds, Outcome.before = self.seconds + now - Outcome.before, now
        self.tried += 1
        if wrong := [fault for fault in faults if fault]:
            self.failures.append(f"{self.name}: {case}: {', '.join(wrong)}")
