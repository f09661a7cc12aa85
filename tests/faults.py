"""Faults on purpose: kills, full disks, damaged files, a second process, thousands of epochs.

    python tests/faults.py                              # all of it, and one table
    python tests/faults.py --kills 100 --only kills     # one group
    python tests/faults.py --quick                      # a few of each

Every fault is done to a real run of simclr.py or ablation_SimCLR.py on some tiny images. After it
the same command is given again, and must end bit for bit as a run to which nothing happened:
weights, optimiser, log and summary, but for times. Nothing is written outside a temporary folder.

A run is a forked process: importing torch, which takes seconds, is done once. So this process must
not compute anything with torch itself, which would start threads that do not survive a fork.

Reading order: runs · faults inside a run · what a run ended as · the groups · the table.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import gc
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib.backends.backend_agg  # noqa: F401  here and not in every run
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

import conftest  # noqa: F401  makes the scripts importable
import hostile
from outcome import Outcome

# isort: split
import ablation_SimCLR as ablation
import simclr
import utils
from utils import InputError

TIMES = (  # differ from run to run
    "seconds", "knn_seconds", "views_per_second", "training_seconds", "monitoring_seconds",
)  # fmt: skip
PATIENCE = 300.0  # seconds that a run may take: it takes one or two, on a busy machine some more

# ------------------------------------------------------------------------------------------- runs


@dataclasses.dataclass
class Place:
    """A folder for runs, and the images that they learn from.

    draws: the curves after each epoch, which takes most of such a run; False: an empty figure;
    None: when the run itself thinks fit.
    """

    root: Path
    photos: Path
    draws: bool | None = True

    @property
    def run(self) -> Path:
        return self.root / "c" / "folder_resnet10"

    @property
    def output(self) -> Path:
        return self.root / "output"

    def command(self, *argv: str) -> list[str]:
        """Flags of a run that takes a second: four epochs of three steps."""
        return [
            "--dataset", "folder", "--recipe", "digits", "--data-dir", str(self.photos),
            "--width", "0.02", "--head-dim", "8", "--head-hidden", "8", "--batch-size", "8",
            "--epochs", "4", "--device", "cpu", "--precision", "float32", "--knn-every", "2",
            "--keep-every", "2", "--checkpoints", str(self.root / "c"),
            "--figures", str(self.root / "f"), *argv,
        ]  # fmt: skip

    def said(self) -> str:
        return self.output.read_text(encoding="utf-8") if self.output.exists() else ""


def make_photos(folder: Path, train: int = 12, test: int = 5, side: int = 12) -> None:
    """Two classes of noise about two colours."""
    noise = np.random.default_rng(0)
    for split, n in (("train", train), ("test", test)):
        for name, colour in (("a", 90), ("b", 150)):
            (folder / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = noise.normal(colour, 40, (side, side, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")


def start(work: Callable[[], Any], output: Path) -> int:
    """Calls work() in another process; what it prints is added to a file. Returns its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    code: Any = 70  # as for a traceback
    try:
        with open(output, "ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a job of "&"
        work()
        code = 0
    except SystemExit as left:
        code = left.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def wait(process: int, seconds: float = PATIENCE) -> int:
    """The exit code, or -signal. A process that takes longer is killed."""
    deadline = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(process, signal.SIGKILL)
        time.sleep(0.002)


def pretraining(place: Place, *argv: str, hook: Hook | None = None) -> Callable[[], None]:
    """What a forked process does: `python simclr.py …`, with hook(kind, file) at each event."""

    def work() -> None:
        with events(hook or (lambda *_: None), place.draws), journal(place.root / "journal"):
            simclr.main(place.command(*argv))

    return work


def complete(work: Callable[[], None], place: Place) -> int:
    return wait(start(work, place.output))


# --------------------------------------------------------------------------- faults inside a run

Hook = Callable[[str, Path], None]  # (what is about to happen, to which file)


class Watched(io.FileIO):
    """A file whose contents are written in two halves, with an event before each."""

    def __init__(self, path: Path, hook: Hook) -> None:
        hook("open", path)
        super().__init__(path, "w")
        self.path, self.hook = path, hook

    def write(self, content: Any) -> int:
        half = len(content) // 2
        self.hook("write", self.path)
        super().write(content[:half])
        self.hook("write on", self.path)
        super().write(content[half:])
        return len(content)


@contextlib.contextmanager
def events(hook: Hook, draws: bool | None) -> Iterator[None]:
    """Inside, hook(kind, file) is called wherever a file is about to change, and before drawing."""
    sync, replace, unlink, draw = os.fsync, os.replace, Path.unlink, simclr.draw_training

    def opened(path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        return Watched(path, hook) if mode == "wb" else open(path, mode, *arguments, **options)

    def synced(descriptor: int) -> None:
        hook("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    def replaced(source: Path, target: Path) -> None:
        hook("replace", Path(target))
        replace(source, target)
        hook("replaced", Path(target))

    def unlinked(path: Path, missing_ok: bool = False) -> None:
        hook("unlink", path)
        unlink(path, missing_ok)

    def drawn(*arguments: Any, **options: Any) -> Any:
        hook("draw", Path(simclr.FIGURE))
        return Figure(figsize=(1, 1)) if draws is False else draw(*arguments, **options)

    due = simclr.FigureKeeper.due
    if draws is not None:  # by the clock, runs would have different numbers of events
        simclr.FigureKeeper.due = property(lambda _: True)
    utils.open = opened
    os.fsync, os.replace, Path.unlink, simclr.draw_training = synced, replaced, unlinked, drawn
    try:
        yield
    finally:
        del utils.open
        simclr.FigureKeeper.due = due
        os.fsync, os.replace, Path.unlink, simclr.draw_training = sync, replace, unlink, draw


@contextlib.contextmanager
def journal(file: Path) -> Iterator[None]:
    """Inside, each checkpoint that is said to be saved is noted: a line "epoch step"."""
    save = simclr.Pretraining.save

    def noted(self: simclr.Pretraining) -> None:
        save(self)
        with open(file, "a", encoding="utf-8") as lines:
            lines.write(f"{self.position.epoch} {self.position.step}\n")

    simclr.Pretraining.save = noted
    try:
        yield
    finally:
        simclr.Pretraining.save = save


def killer(n: int, kind: str = "") -> Hook:
    """Kills its process at event n, counted from 0; with a kind, of those of last.pt alone."""
    left = [n]

    def hook(what: str, file: Path) -> None:
        left[0] -= not kind or (what == kind and file.name == simclr.CHECKPOINT)
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


def owner(file: Path) -> str:
    """The file that a temporary one becomes: ".last.pt.123.tmp" -> "last.pt"."""
    return file.name[1:].rsplit(".", 2)[0] if file.suffix == ".tmp" else file.name


# ----------------------------------------------------------------------------- what a run ended as


def untimed(row: dict) -> dict:
    return {key: value for key, value in row.items() if key not in (*TIMES, "config")}


def ending(run: Path) -> dict[str, str]:
    """A digest of each part of what a run left: equal for runs that ended bit for bit alike."""
    state = utils.load_checkpoint(run / simclr.CHECKPOINT)
    parts = {part: canonical(state[part]) for part in ("model", "optimizer", "position")}
    rows = [untimed(row) for row in state["log"]]
    parts |= {"log": json.dumps(rows)}
    written = [untimed(row) for row in utils.read_jsonl(run / "log.jsonl")]
    parts |= {"log.jsonl": json.dumps(written)}
    parts |= {"summary": json.dumps(untimed(json.loads((run / simclr.SUMMARY).read_bytes())))}
    kept = [utils.load_checkpoint(file)["model"] for file in simclr.kept_checkpoints(run)]
    parts |= {"kept": "".join(map(canonical, kept))}
    return {part: hashlib.sha256(text.encode()).hexdigest() for part, text in parts.items()}


def canonical(value: Any) -> str:
    """Text that is the same for equal values, tensors bit for bit, and for no others."""
    if isinstance(value, torch.Tensor):
        content = value.contiguous().numpy().tobytes()
        return f"{value.dtype}{tuple(value.shape)}{hashlib.sha256(content).hexdigest()}"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k!r}:{canonical(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(canonical, value)) + "]"
    return repr(value)


def departures(place: Place, expected: dict[str, str]) -> list[str]:
    """In what a run that was continued is not as it should be."""
    try:
        found = ending(place.run)
    except (InputError, OSError, KeyError) as error:
        return [f"left no whole run: {error!r}"]
    wrong = [f"another {part}" for part in expected if found[part] != expected[part]]
    return wrong + [f"left {file.name}" for file in place.root.rglob("*.tmp")]


def lost(place: Place) -> str:
    """What is wrong with the checkpoint of a killed run: "" if it has all that was saved."""
    notes = place.root / "journal"
    lines = notes.read_text(encoding="utf-8").splitlines() if notes.exists() else []
    if not lines:
        return ""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            state, _ = simclr.load_newest(place.run / simclr.CHECKPOINT)
    except InputError as error:
        return f"lost the checkpoint: {error}"
    position = (state["position"]["epoch"], state["position"]["step"])
    saved = tuple(map(int, lines[-1].split()))
    return "" if position >= saved else f"went back from {saved} to {position}"


class Tally:
    """Counts the faults of a kind, and the time since whatever was noted before."""

    before = 0.0

    def __init__(self, name: str, nothing: str = "nothing") -> None:
        self.outcome = Outcome(name, 0, 0, nothing, 0.0, [])
        Tally.before = time.perf_counter()

    def note(self, what: str, wrong: list[str] | str) -> None:
        """A fault that was tried; `wrong` is empty if it was survived."""
        now = time.perf_counter()
        self.outcome.seconds += now - Tally.before
        Tally.before = now
        self.outcome.tried += 1
        self.outcome.survived += not wrong
        if wrong:
            text = wrong if isinstance(wrong, str) else ", ".join(wrong)
            self.outcome.failures.append(f"{self.outcome.name}: {what}: {text}")

    def done(self) -> Outcome:
        if self.outcome.failures:
            self.outcome.lost = "see below"
        return self.outcome


# ------------------------------------------------------------------------------------- the groups

DRAWN = 10  # one run in so many draws its curves
EVERY_STEP = ("--checkpoint-minutes", "1e-9")


class Suite:
    """The groups of faults on runs, in a temporary folder."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.photos = folder / "photos"
        make_photos(self.photos)
        self.places = 0
        self.events = {}  # flags -> how many events a whole run has
        self.seconds = {}
        for flags in ((), EVERY_STEP):
            place = self.place()
            count = place.root / "count"
            started = time.monotonic()
            code = complete(self.counted(place, flags, count), place)
            if code:
                raise RuntimeError(f"an undisturbed run fails:\n{place.said()}")
            self.seconds[flags] = time.monotonic() - started
            self.events[flags] = int(count.read_text())
            found = ending(place.run)
            if flags and found != self.expected:
                raise RuntimeError("runs that are not disturbed differ")
            self.expected = found

    def place(self) -> Place:
        self.places += 1
        root = self.folder / str(self.places)
        root.mkdir()
        return Place(root, self.photos, draws=self.places % DRAWN == 0)

    @staticmethod
    def counted(place: Place, flags: tuple[str, ...], file: Path) -> Callable[[], None]:
        def work() -> None:
            seen = []
            pretraining(place, *flags, hook=lambda kind, _: seen.append(kind))()
            file.write_text(str(len(seen)))

        return work

    # ----------------------------------------------------------------------------------- kills

    def kills(self, n: int) -> list[Outcome]:
        """Half of them at random times, half at events spread over the run."""
        anywhen, aimed = Tally("SIGKILL at random moments"), Tally("SIGKILL while writing, drawing")
        for i in range(n):
            flags = (EVERY_STEP, ())[i // 2 % 2]
            if i % 2:
                number = self.random.randrange(self.events[flags])
                self.kill(anywhen, f"{i}", flags, None)
            else:
                number = int((i + self.random.random()) * self.events[flags] / n)
                self.kill(aimed, f"{i}, event {number}", flags, number)
        return [anywhen.done(), aimed.done()]

    def kill(self, tally: Tally, what: str, flags: tuple[str, ...], event: int | None) -> None:
        """Kills a run, some of them twice, and continues it."""
        place = self.place()
        wrong = ""
        for _ in range(1 + (self.random.random() < 0.3)):
            if event is None:
                code = self.kill_sometime(place, flags)
            else:
                code = complete(pretraining(place, *flags, hook=killer(event)), place)
                event = None
            if code != -signal.SIGKILL:
                wrong = wrong or f"exit code {code} instead of a kill: {place.said()[-300:]}"
            wrong = wrong or lost(place)
        code = complete(pretraining(place, *flags), place)
        if code:
            wrong = wrong or f"cannot be continued, exit code {code}: {place.said()[-300:]}"
        tally.note(what, wrong or departures(place, self.expected))
        shutil.rmtree(place.root)

    def kill_sometime(self, place: Place, flags: tuple[str, ...]) -> int:
        """At a random moment. A run that was quicker is none that was killed: another try."""
        seconds = self.random.random() * self.seconds[flags]
        code = 0
        while code == 0:
            process = start(pretraining(place, *flags), place.output)
            time.sleep(seconds)
            os.kill(process, signal.SIGKILL)
            code = wait(process)
            if code == 0:
                shutil.rmtree(place.root)
                place.root.mkdir()
                seconds *= 0.7
        return code

    def grids(self, n: int) -> list[Outcome]:
        """A study of two settings is killed at random moments."""
        tally = Tally("SIGKILL of an ablation grid")
        whole = self.place()
        started = time.monotonic()
        if complete(self.study(whole), whole):
            raise RuntimeError(f"an undisturbed study fails:\n{whole.said()}")
        seconds = time.monotonic() - started
        for i in range(n):
            place = self.place()
            process = start(self.study(place), place.output)
            time.sleep((i + self.random.random()) / n * 0.9 * seconds)
            os.kill(process, signal.SIGKILL)
            wait(process)
            code = complete(self.study(place), place)
            wrong = [f"exit code {code}: {place.said()[-300:]}"] if code else []
            if not code and self.rows(place) != self.rows(whole):
                wrong.append("another table")
            wrong += [f"left {file.name}" for file in place.root.rglob("*.tmp")]
            tally.note(str(i), wrong)
        return [tally.done()]

    def study(self, place: Place) -> Callable[[], None]:
        def work() -> None:
            settings = ablation.grid(temperature=(0.1, 0.5))
            ablation.STUDIES["tiny"] = ablation.Study("?", "-", lambda base: settings)
            flags = place.command()
            del flags[flags.index("--keep-every") :][:2]
            ablation.main(["tiny", "--seeds", "1", *flags])

        return work

    @staticmethod
    def rows(place: Place) -> list[str]:
        """The table of the study, but for the time that each run took."""
        lines = (place.root / "f" / "ablation" / "tiny.csv").read_text().splitlines()
        header = lines[0].split(",").index("seconds") - len(lines[0].split(","))
        return [",".join(c for i, c in enumerate(x.split(","), -len(x.split(","))) if i != header)
                for x in lines]  # fmt: skip

    # ----------------------------------------------------------------------------------- signals

    def signals(self, n: int) -> list[Outcome]:
        """Asked to stop anywhere, the evaluation too; twice by Ctrl-C in the middle of saving."""
        tally = Tally("SIGTERM, SIGINT, SIGUSR1")
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        for i in range(n):
            place, number, flags = self.place(), numbers[i % 3], (EVERY_STEP, ())[i % 2]
            event = self.random.randrange(self.events[flags])
            times = 2 if i % 4 == 1 and number == signal.SIGINT else 1
            code = complete(pretraining(place, *flags, hook=sender(event, number, times)), place)
            wrong = [] if code == 128 + number else [f"exit code {code}: {place.said()[-300:]}"]
            wrong += ["a traceback"] if "Traceback" in place.said() else []
            wrong += [f"left {file.name}" for file in place.root.rglob("*.tmp")]
            wrong += [text] if (text := lost(place)) else []
            code = complete(pretraining(place, *flags), place)
            wrong += [f"then exit code {code}"] if code else departures(place, self.expected)
            tally.note(f"{number.name} at event {event}", wrong)
            shutil.rmtree(place.root)
        return [tally.done()]

    def locks(self, n: int) -> list[Outcome]:
        """A second process on a run that another one trains, which then is killed."""
        tally = Tally("a second process on a run")
        for i in range(n):
            place, reached = self.place(), self.random.randrange(1, 4)
            first = start(pretraining(place, hook=sleeper("replaced", reached)), place.root / "1")
            deadline = time.monotonic() + PATIENCE
            while not (place.root / "f" / "asleep").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            before = contents(place.root)
            code = complete(pretraining(place, *(["--overwrite"] * (i % 2))), place)
            said = place.said()
            wrong = [] if code == 2 else [f"exit code {code}"]
            errors = [line for line in said.splitlines() if "error: another process" in line]
            wrong += [] if len(errors) == 1 else [f"it says {said[-200:]!r}"]
            wrong += [] if contents(place.root) == before else ["files were changed"]
            os.kill(first, signal.SIGKILL)
            wait(first)
            code = complete(pretraining(place), place)
            wrong += [f"then exit code {code}"] if code else departures(place, self.expected)
            tally.note(str(i), wrong)
            shutil.rmtree(place.root)
        return [tally.done()]

    # ----------------------------------------------------------------------------------- storage

    def storage(self, n: int) -> list[Outcome]:
        """Writes that fail: at one place for a while, or from some moment to the end."""
        passing, lasting = Tally("writes fail for a while"), Tally("writes fail to the end")
        reasons = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
        files = (simclr.CHECKPOINT, "log.jsonl", "config.json", simclr.FIGURE, "epoch0002.pt", "")
        kinds = ("open", "write", "write on", "sync", "replace")
        for i in range(n):
            reason, file = reasons[i % len(reasons)], files[i // 2 % len(files)]
            kind = self.random.choice(kinds)
            what = f"{errno.errorcode[reason]} in {kind} of {file or 'all files'}"
            if i % 2:
                first = self.random.randrange(0, 6)
                self.failing(lasting, what, Failing(reason, kind, file, first, 10**9))
            else:
                hook = Failing(reason, kind, file, 1, self.random.randrange(1, 4))
                self.failing(passing, what, hook)
        size = Tally("a limit on the size of files")
        for number in range(max(1, n // 10)):
            self.limited(size, number % 3)
        return [passing.done(), lasting.done(), size.done()]

    def failing(self, tally: Tally, what: str, hook: Failing) -> None:
        """A run with failing writes warns once and goes on, or ends with a line; then continues."""
        place = self.place()
        code = complete(pretraining(place, hook=hook), place)
        wrong = self.after_failure(place, code)
        code = complete(pretraining(place), place)
        wrong += [f"then exit code {code}"] if code else departures(place, self.expected)
        if hook.file in ("epoch0002.pt", ""):  # which is not made up for
            wrong = [text for text in wrong if text != "another kept"]
        tally.note(what, wrong)
        shutil.rmtree(place.root)

    @staticmethod
    def after_failure(place: Place, code: int) -> list[str]:
        """What is wrong with how a run with failing writes ended."""
        said = place.said()
        warnings = [line for line in said.splitlines() if line.startswith("warning: ")]
        errors = [line for line in said.splitlines() if line.startswith("simclr.py: error: ")]
        wrong = [] if code in (0, 2) else [f"exit code {code}"]
        wrong += ["a traceback"] if "Traceback" in said else []
        wrong += [f"{len(warnings)} warnings"] if len(warnings) > 1 else []
        wrong += [f"{len(errors)} errors"] if len(errors) != (code == 2) else []
        wrong += ["no word"] if code == 0 and not warnings and "Errno" in said else []
        wrong += [text] if (text := lost(place)) else []
        if (place.run / simclr.CHECKPOINT).exists():
            try:
                utils.load_checkpoint(place.run / simclr.CHECKPOINT)
            except InputError as error:
                wrong.append(str(error))
        return wrong + [f"left {file.name}" for file in place.root.rglob("*.tmp")]

    def limited(self, tally: Tally, saves: int) -> None:
        """After so many checkpoints the system lets no file be larger than a part of one."""
        place, seen = self.place(), []

        def hook(kind: str, file: Path) -> None:
            seen.append(kind == "replaced" and file.name == simclr.CHECKPOINT)
            if sum(seen) == saves:
                limit = 20_000 if saves else 5_000  # bytes
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

        code = complete(pretraining(place, hook=hook), place)
        wrong = self.after_failure(place, code) + ([] if code == 2 else [f"exit code {code}"])
        code = complete(pretraining(place), place)
        wrong += [f"then exit code {code}"] if code else departures(place, self.expected)
        tally.note(f"after {saves} checkpoints", wrong)
        shutil.rmtree(place.root)

    # -------------------------------------------------------------------------------- corruption

    def corruptions(self, n: int) -> list[Outcome]:
        """One bit or byte of a checkpoint, or all from some byte on, spread over the file."""
        place = self.place()
        code = complete(pretraining(place, hook=killer(3, "replaced")), place)
        if code != -signal.SIGKILL:
            raise RuntimeError(place.said())
        good = (place.run / simclr.CHECKPOINT).read_bytes()
        tally = Tally("one byte flipped, or cut off")
        file = place.root / "damaged.pt"
        for i in range(n):
            position = int((i + self.random.random()) * len(good) / n)
            what, content = self.damaged(good, position)
            file.write_bytes(content)
            tally.note(f"{what} of {len(good)}", self.undetected(file))
        fallback = Tally("damaged, and continued from previous.pt")
        for _ in range(max(1, n // 100)):
            other = self.place()
            shutil.copytree(place.root, other.root, dirs_exist_ok=True)
            what, content = self.damaged(good, self.random.randrange(len(good)))
            (other.run / simclr.CHECKPOINT).write_bytes(content)
            code = complete(pretraining(other), other)
            wrong = [f"exit code {code}: {other.said()[-300:]}"] if code else []
            wrong += [] if "using the one before" in other.said() else ["no word of it"]
            fallback.note(what, wrong or departures(other, self.expected))
            shutil.rmtree(other.root)
        return [tally.done(), fallback.done()]

    def damaged(self, content: bytes, position: int) -> tuple[str, bytes]:
        kind = self.random.choice(("bit", "bit", "byte", "cut"))
        if kind == "cut":
            return f"cut at {position}", content[:position]
        change = 1 << self.random.randrange(8) if kind == "bit" else self.random.randrange(1, 256)
        changed = bytearray(content)
        changed[position] ^= change
        return f"byte {position} xor {change}", bytes(changed)

    @staticmethod
    def undetected(file: Path) -> str:
        try:
            utils.load_checkpoint(file)
        except InputError:
            return ""
        return "it was loaded"

    def each_byte(self) -> list[Outcome]:
        """Every byte of a small file, by one bit each; every length that it can be cut to."""
        tally, file = Tally("each byte of a small file, each cut"), self.folder / "small.pt"
        utils.save_checkpoint(file, {"format": 2, "weight": torch.zeros(3, 4), "rows": ["a", 1]})
        good = file.read_bytes()
        for i in range(len(good)):
            changed = bytearray(good)
            changed[i] ^= 1 << i % 8
            for content in (changed, good[:i]):
                file.write_bytes(content)
                tally.note(f"{'cut at' * (len(content) == i)} {i}", self.undetected(file))
        return [tally.done()]

    # -------------------------------------------------------------------------------------- soak

    def soak(self, epochs: int) -> list[Outcome]:
        """A long run is watched from outside: its memory, open files and threads; its pace."""
        place, tally = self.place(), Tally(f"{epochs:,} epochs")
        place.draws = None
        flags = ("--epochs", str(epochs), "--knn-every", "100", "--keep-every", "0",
                 "--batch-size", "24")  # fmt: skip
        process = start(pretraining(place, *flags), place.output)
        samples = []
        while True:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                break
            with contextlib.suppress(OSError, KeyError):  # not yet, or not any more
                samples.append(sample(process, place.run / "log.jsonl"))
            time.sleep(0.25)
        wrong = [] if os.waitstatus_to_exitcode(status) == 0 else [place.said()[-300:]]
        log = utils.read_jsonl(place.run / "log.jsonl")
        wrong += [] if [r["epoch"] for r in log] == [*range(1, epochs + 1)] else ["the log"]
        with Image.open(place.root / "f" / place.run.name / simclr.FIGURE) as picture:
            picture.verify()
        early = [s for s in samples if 0.1 * epochs <= s.epoch < 0.2 * epochs]
        late = [s for s in samples if 0.9 * epochs <= s.epoch < epochs]
        if not (early and late):
            raise RuntimeError(f"too few samples of {epochs} epochs: {len(samples)}")
        memory = statistics.median(s.memory for s in late) / statistics.median(
            s.memory for s in early
        )
        files, threads = (max(getattr(s, what) for s in late) - max(getattr(s, what) for s in early)
                          for what in ("files", "threads"))  # fmt: skip
        wrong += [f"memory grew by {memory - 1:.1%}"] if memory >= 1.01 else []
        wrong += [f"{files:+d} files, {threads:+d} threads"] if files > 0 or threads > 0 else []
        pace = [1000 * (s[-1].at - s[0].at) / max(1, s[-1].epoch - s[0].epoch)
                for s in (early, late)]  # fmt: skip
        tally.outcome.lost = (
            f"memory {memory - 1:+.2%}, files {files:+d}, threads {threads:+d}, "
            f"{pace[0]:.0f} then {pace[1]:.0f} ms an epoch"
        )
        tally.note("watched", wrong)
        return [tally.done()]


@dataclasses.dataclass
class Sample:
    """Of a running process: seconds, epoch that is logged, bytes of memory, open files, threads."""

    at: float
    epoch: int
    memory: int
    files: int
    threads: int


def sample(process: int, log: Path) -> Sample:
    status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return Sample(
        time.monotonic(),
        log.read_bytes().count(b"\n"),
        1024 * int(fields["VmRSS"].split()[0]),
        len(os.listdir(f"/proc/{process}/fd")),
        int(fields["Threads"]),
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of runs below a folder."""
    return {str(f): f.read_bytes() for part in ("c", "f") for f in (folder / part).rglob("*")
            if f.is_file()}  # fmt: skip


def sender(n: int, number: int, times: int) -> Hook:
    """Sends its process a signal at the n-th event, so many times."""
    left = [n]

    def hook(_kind: str, _file: Path) -> None:
        left[0] -= 1
        if left[0] == -1:
            for _ in range(times):
                os.kill(os.getpid(), number)

    return hook


def sleeper(kind: str, n: int) -> Hook:
    """Lets its process sleep, for good, after the n-th checkpoint, and leave a note of it."""
    left = [n]

    def hook(what: str, file: Path) -> None:
        left[0] -= what == kind and file.name == simclr.CHECKPOINT
        if left[0] == 0:
            (file.parents[2] / "f" / "asleep").touch()
            time.sleep(PATIENCE)

    return hook


@dataclasses.dataclass
class Failing:
    """Events of a kind fail, from the first-th on, so many of them. file: "" for any file."""

    reason: int
    kind: str
    file: str
    first: int
    count: int

    def __call__(self, kind: str, file: Path) -> None:
        if kind != self.kind or (self.file and owner(file) != self.file):
            return
        self.first -= 1
        if self.first < 0 < self.count:
            self.count -= 1
            raise OSError(self.reason, os.strerror(self.reason))


# -------------------------------------------------------------------------------------- the table


def groups(suite: Suite, options: argparse.Namespace) -> dict[str, Callable[[], list[Outcome]]]:
    """Every group of faults, by name; those on hostile files and input are of hostile.py."""
    quick = options.quick
    found = {
        "kills": lambda: suite.kills(options.kills),
        "grids": lambda: suite.grids(max(1, options.kills // 10)),
        "signals": lambda: suite.signals(2 if quick else 30),
        "locks": lambda: suite.locks(1 if quick else 6),
        "storage": lambda: suite.storage(2 if quick else 72),
        "corruptions": lambda: suite.corruptions(options.corruptions),
        "bytes": lambda: [] if quick else suite.each_byte(),
        "soak": lambda: suite.soak(options.soak) if options.soak else [],
    }
    tries = 100 if quick else 2000
    found |= {  # last, as they compute in this process, which is not to be copied after that
        "checkpoints": lambda: hostile.checkpoints(tries, options.seed),
        "images": hostile.images,
        "data_sets": hostile.data_sets,
        "commands": lambda: hostile.commands(tries, options.seed),
        "numbers": hostile.numbers,
    }
    return found


def row(o: Outcome) -> str:
    return f"| {o.name} | {o.tried:,} | {o.survived:,} | {o.lost} | {o.seconds:.0f} |"


def table(outcomes: list[Outcome]) -> str:
    lines = ["| fault | tried | survived | lost | seconds |", "| --- | --- | --- | --- | --- |"]
    lines += map(row, outcomes)
    return "\n".join(lines)


def parse_command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a few of each, in half a minute")
    add("--kills", type=int, metavar="N", help="runs that are killed [100; quick: 5]")
    add("--corruptions", type=int, metavar="N", help="damaged files [1000; quick: 100]")
    add("--soak", type=int, metavar="N", help="epochs of the long run [2000; quick: none]")
    add("--seed", type=int, default=0, metavar="N", help="of everything random [0]")
    add("--only", nargs="+", metavar="GROUP", help="some groups: kills, grids, signals, locks, "
        "storage, corruptions, bytes, soak, checkpoints, images, data_sets, commands, "
        "numbers")  # fmt: skip
    options = parser.parse_args()
    usual = dict(kills=5, corruptions=100, soak=0) if options.quick else (
        dict(kills=100, corruptions=1000, soak=2000))  # fmt: skip
    for name, value in usual.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main() -> None:
    options = parse_command_line()
    torch.set_num_threads(1)
    gc.freeze()  # else a collection in a fork writes to, and so copies, all that it shares
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        suite = Suite(Path(folder), options.seed)
        found = groups(suite, options)
        unknown = set(options.only or ()) - set(found)
        if unknown:
            raise SystemExit(f"unknown groups {unknown}; there are {', '.join(found)}")
        for name in [name for name in found if name in (options.only or found)]:
            print(f"{name} …", file=sys.stderr, flush=True)
            done = found[name]()
            for outcome in done:
                print(*outcome.failures, row(outcome), sep="\n", file=sys.stderr, flush=True)
            outcomes += done
    print(table(outcomes))
    raise SystemExit(any(outcome.failures for outcome in outcomes))


if __name__ == "__main__":
    main()
