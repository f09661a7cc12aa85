"""Faults on purpose: kills, signals, full disks and strange input.

    python tests/faults.py                              # all groups, and one table
    python tests/faults.py --only kills --times 3       # one group, three times as many
    python tests/faults.py --quick                      # a few of each

Each fault is done to a real run of simclr.py on some tiny images. Then the same command is given
again, and must end bit for bit as a run without a fault: weights, optimiser, log and summary, but
for times. Nothing is written outside a temporary folder.

A run is a forked process, so that torch, which takes seconds, is imported once. Therefore this
process must not compute with torch itself: that would start threads that do not survive a fork.

Reading order: runs · faults inside a run · how a run ended · the groups.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import functools
import gc
import hashlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import matplotlib.backends.backend_agg  # noqa: F401  here and not in every run
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

import hostile
from conftest import TIMES
from hostile import Outcome

# isort: split
import simclr
import utils
from utils import InputError

PATIENCE = 300.0  # seconds that a run may take; it takes one or two, on a busy machine some more

# ------------------------------------------------------------------------------------------- runs


@dataclasses.dataclass(frozen=True)
class Mode:
    """When a run saves and draws. due: after each epoch, or after none."""

    due: bool
    flags: tuple[str, ...] = ()


MODES = (Mode(True, ("--checkpoint-minutes", "1e-9")), Mode(True), Mode(False))


@dataclasses.dataclass
class Place:
    """A folder for a run, and the images that it learns from."""

    root: Path
    photos: Path
    mode: Mode

    @property
    def run(self) -> Path:
        return self.root / "c" / "photos_resnet10"

    @property
    def last(self) -> Path:
        return self.run / utils.CHECKPOINT

    @property
    def command(self) -> list[str]:
        """Flags of a run that takes a second: four epochs of three steps."""
        return [
            "--dataset", "folder", "--recipe", "digits", "--data-dir", str(self.photos),
            "--width", "0.02", "--head-dim", "8", "--head-hidden", "8", "--batch-size", "8",
            "--epochs", "4", "--device", "cpu", "--precision", "float32", "--knn-every", "2",
            "--keep-every", "2", "--checkpoints", str(self.root / "c"),
            "--figures", str(self.root / "f"), *self.mode.flags,
        ]  # fmt: skip

    def printed(self) -> str:
        file = self.root / "output"
        return file.read_text(encoding="utf-8") if file.exists() else ""


def make_photos(folder: Path) -> None:
    """Two classes of noise about two colours."""
    noise = np.random.default_rng(0)
    for split, n in (("train", 12), ("test", 5)):
        for name, colour in (("a", 90), ("b", 150)):
            (folder / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = noise.normal(colour, 40, (12, 12, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")


def start(place: Place, hook: Hook | None = None) -> int:
    """Start `python simclr.py …` in another process, with hook(kind, file) at each event.

    What it prints is added to a file. Returns its id.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    code: Any = 70  # as for a traceback
    try:
        with open(place.root / "output", "ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a job of "&"
        with events(hook or (lambda *_: None), place):
            simclr.main(place.command)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def wait(process: int) -> int:
    """The exit code, or -signal. A process that takes longer than PATIENCE is killed."""
    deadline = time.monotonic() + PATIENCE
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(process, signal.SIGKILL)
        time.sleep(0.002)


def pretrain(place: Place, hook: Hook | None = None) -> int:
    """Run it in another process. Returns the exit code, or -signal."""
    return wait(start(place, hook))


# --------------------------------------------------------------------------- faults inside a run

Hook = Callable[[str, Path], None]  # (what is about to happen, to which file)


class Watched(io.FileIO):
    """A file whose content is written in two halves, with an event before each."""

    def __init__(self, path: Path, mode: str, hook: Hook) -> None:
        hook("open", path)
        super().__init__(path, mode)
        self.path, self.hook = path, hook

    def write(self, content: Any) -> int:
        half = len(content) // 2
        self.hook("write", self.path)
        super().write(content[:half])
        self.hook("write on", self.path)
        super().write(content[half:])
        return len(content)


def note(file: Path, text: str) -> None:
    with open(file, "a", encoding="utf-8") as notes:
        notes.write(text)


@contextlib.contextmanager
def events(hook: Hook, place: Place) -> Iterator[None]:
    """Context manager: calls hook(kind, file) before a file changes and before a figure is drawn.

    Runs save, and draw, as often as place.mode says. Each last.pt that has been saved is noted in
    the file `journal`, as a line "epoch step".
    """
    sync, replace, unlink, save = os.fsync, os.replace, Path.unlink, utils.save_checkpoint

    def opened(path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if mode == "wb":
            return Watched(path, "w", hook)
        if mode == "a":
            return io.TextIOWrapper(io.BufferedWriter(Watched(path, "a", hook)), **options)
        return open(path, mode, *arguments, **options)

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

    def drawn(*_: Any, **__: Any) -> Any:
        hook("draw", Path(simclr.FIGURE))  # the curves take most of the time of such a run
        return Figure(figsize=(1, 1))

    def saved(path: Path, state: dict, *arguments: Any, **options: Any) -> None:
        save(path, state, *arguments, **options)
        if path.name == utils.CHECKPOINT:
            position = state["position"]
            note(place.root / "journal", f"{position['epoch']} {position['step']}\n")

    patches = [
        (utils, "open", opened), (os, "fsync", synced), (os, "replace", replaced),
        (Path, "unlink", unlinked), (simclr, "draw_training", drawn),
        (utils, "save_checkpoint", saved),
        (utils.Clock, "within", lambda *_: place.mode.due),  # by the clock, events would differ
    ]  # fmt: skip
    with contextlib.ExitStack() as stack:
        for where, name, new in patches:
            stack.enter_context(mock.patch.object(where, name, new, create=name == "open"))
        yield


def at_event(n: int, number: int, times: int = 1) -> Hook:
    """Sends this process a signal, `times` times, at event n, counted from 0."""
    count = itertools.count()

    def hook(*_: Any) -> None:
        for _ in range(times if next(count) == n else 0):
            os.kill(os.getpid(), number)

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
        name = file.name[1:].rsplit(".", 2)[0] if file.suffix == ".tmp" else file.name
        if kind != self.kind or self.file not in ("", name):
            return
        self.first -= 1
        if self.first < 0 < self.count:
            self.count -= 1
            raise OSError(self.reason, os.strerror(self.reason))


# -------------------------------------------------------------------------------- how a run ended


def untimed(row: dict) -> dict:
    return {key: value for key, value in row.items() if key not in (*TIMES, "config")}


def ending(run: Path) -> dict[str, str]:
    """Each part of what a run left as text: equal for runs that ended bit for bit alike."""
    state = utils.load_checkpoint(run / utils.CHECKPOINT)
    kept = [utils.load_checkpoint(file)["model"] for file in utils.kept_checkpoints(run)]
    return {
        "model": canonical(state["model"]),
        "moments": canonical(state["optimizer"]["state"]),  # rates are set before each step
        "position": canonical(state["position"]),
        "log": canonical([untimed(row) for row in state["log"]]),
        "log.jsonl": canonical([untimed(row) for row in utils.read_jsonl(run / utils.LOG)]),
        "summary": canonical(untimed(json.loads((run / utils.SUMMARY).read_bytes()))),
        "kept": canonical(kept),
    }


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
    """How a run that was continued differs from one without a fault."""
    try:
        ended = ending(place.run)
    except (InputError, OSError, KeyError) as error:
        return [f"left no whole run: {error!r}"]
    wrong = [f"another {part}" for part in expected if ended[part] != expected[part]]
    return wrong + leftovers(place)


def leftovers(place: Place) -> list[str]:
    return [f"left {file.name}" for file in place.run.glob("*.tmp")]


def lost(place: Place) -> list[str]:
    """What is wrong with the checkpoint of a killed run: nothing if it has all that was saved."""
    notes = place.root / "journal"
    lines = notes.read_text(encoding="utf-8").splitlines() if notes.exists() else []
    if not lines:
        return []
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            state, _ = utils.load_newest(place.last)
    except InputError as error:
        return [f"lost the checkpoint: {error}"]
    position = (state["position"]["epoch"], state["position"]["step"])
    saved = tuple(map(int, lines[-1].split()))
    return [] if position >= saved else [f"went back from {saved} to {position}"]


def said_wrong(place: Place, code: int, *expected: int) -> list[str]:
    """What is wrong with how a process ended, beside "" for what is not."""
    text = place.printed()
    return [
        f"exit code {code}: {text[-300:]}" * (code not in expected),
        "a traceback" * ("Traceback" in text),
    ]


# ------------------------------------------------------------------------------------- the groups


class Suite:
    """The groups of faults on runs, in a temporary folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.random, self.places = folder, random.Random(0), 0
        self.photos = folder / "photos"
        make_photos(self.photos)
        self.events: dict[Mode, int] = {}  # of a whole run
        self.seconds: dict[Mode, float] = {}
        endings = []
        for mode in MODES:
            place, started = self.place(mode), time.monotonic()
            if pretrain(place, lambda *_, file=place.root / "events": note(file, ".")):
                raise RuntimeError(f"a run without a fault fails:\n{place.printed()}")
            self.seconds[mode] = time.monotonic() - started
            self.events[mode] = (place.root / "events").stat().st_size
            endings.append(ending(place.run))
        self.expected = endings[0]
        if any(other != self.expected for other in endings):
            raise RuntimeError("runs without a fault differ")

    def place(self, mode: Mode) -> Place:
        self.places += 1
        root = self.folder / str(self.places)
        root.mkdir()
        return Place(root, self.photos, mode)

    def continued(self, place: Place) -> list[str]:
        """What is wrong with the run when the same command has been given again. Tidies up."""
        code = pretrain(place)
        end = place.printed()[-300:]
        wrong = [f"then exit code {code}: {end}"] if code else departures(place, self.expected)
        shutil.rmtree(place.root)
        return wrong

    def kills(self, n: int) -> list[Outcome]:
        """Half of them at random times, half at events spread over the run."""
        at_times, at_events = Outcome("SIGKILL at random moments"), Outcome("SIGKILL while writing")
        for i in range(n):
            mode = MODES[i // 2 % len(MODES)]
            if i % 2:
                self.kill(at_times, f"{i}", mode, None)
            else:
                event = int((i + self.random.random()) * self.events[mode] / n)
                self.kill(at_events, f"{i}, event {event} of {mode}", mode, event)
        return [at_times, at_events]

    def kill(self, tally: Outcome, what: str, mode: Mode, event: int | None) -> None:
        """Kill a run, some of them twice, and continue it."""
        place, wrong = self.place(mode), []
        for _ in range(1 + (self.random.random() < 0.3)):
            if event is None:
                code = self.kill_sometime(place)
            else:
                code = pretrain(place, at_event(event, signal.SIGKILL))
                event = None
            if code != -signal.SIGKILL:
                wrong.append(f"exit code {code} instead of a kill: {place.printed()[-300:]}")
            wrong += lost(place)
        tally.add(what, *wrong, *self.continued(place))

    def kill_sometime(self, place: Place) -> int:
        """Kill at a random moment. A run that ends before is not a fault, and is tried again."""
        seconds = self.random.random() * self.seconds[place.mode]
        code = 0
        while code == 0:
            process = start(place)
            time.sleep(seconds)
            os.kill(process, signal.SIGKILL)
            code = wait(process)
            if code == 0:
                shutil.rmtree(place.root)
                place.root.mkdir()
                seconds *= 0.7
        return code

    def signals(self, n: int) -> list[Outcome]:
        """Asked to stop anywhere, the evaluation too; twice by Ctrl-C in the middle of saving."""
        tally = Outcome("SIGTERM, SIGINT, SIGUSR1")
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        for i in range(n):
            mode, number = MODES[i // 3 % len(MODES)], numbers[i % 3]
            place, event = self.place(mode), self.random.randrange(self.events[mode])
            times = 2 if i % 4 == 1 and number == signal.SIGINT else 1
            code = pretrain(place, at_event(event, number, times))
            wrong = said_wrong(place, code, 128 + number) + leftovers(place) + lost(place)
            what = f"{times} × {number.name} at event {event} of {mode}"
            tally.add(what, *wrong, *self.continued(place))
        return [tally]

    def storage(self, n: int) -> list[Outcome]:
        """Writes that fail: at one place for a while, or from some moment to the end."""
        passing, lasting = Outcome("writes fail for a while"), Outcome("writes fail to the end")
        reasons = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
        files = (utils.CHECKPOINT, utils.LOG, "config.json", simclr.FIGURE, "epoch0002.pt", "")
        kinds = ("open", "write", "write on", "sync", "replace")
        for i in range(n):
            reason, file = reasons[i % len(reasons)], files[i // 2 % len(files)]
            mode, kind = self.random.choice(MODES), self.random.choice(kinds)
            what = f"{errno.errorcode[reason]} in {kind} of {file or 'all files'}, {mode}"
            if i % 2:
                first = self.random.randrange(0, 6)
                self.fail(lasting, what, mode, Failing(reason, kind, file, first, 10**9))
            else:
                count = self.random.randrange(1, 4)
                self.fail(passing, what, mode, Failing(reason, kind, file, 1, count))
        return [passing, lasting]

    def fail(self, tally: Outcome, what: str, mode: Mode, hook: Failing) -> None:
        """A run with failing writes warns and goes on, or ends with a line; then it continues."""
        place = self.place(mode)
        code = pretrain(place, hook)
        lines = place.printed().splitlines()
        warnings = [line for line in lines if line.startswith("warning: ")]
        errors = [line for line in lines if line.startswith("simclr.py: error: ")]
        wrong = said_wrong(place, code, 0, 2) + lost(place) + leftovers(place)
        wrong.append("the same warning twice" * (len(warnings) != len(set(warnings))))
        wrong.append(f"{len(errors)} errors" * (len(errors) != (code == 2)))
        if place.last.exists():
            try:
                utils.load_checkpoint(place.last)
            except InputError as error:
                wrong.append(str(error))
        wrong += self.continued(place)
        if hook.file in ("epoch0002.pt", ""):  # a run does not go back to write it
            wrong = [text for text in wrong if text != "another kept"]
        tally.add(what, *wrong)


COUNTS = {  # of faults in a group, usually and with --quick
    "kills": (100, 4), "signals": (36, 3), "storage": (72, 2), "commands": (2000, 100),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ["kills", "signals", "storage", *hostile.GROUPS]
    parser.add_argument("--quick", action="store_true", help="fewer kills, signals, full disks")
    parser.add_argument("--times", type=int, default=1, metavar="N", help="N times as many")
    parser.add_argument("--only", nargs="+", default=names, choices=names, help="these groups")
    options = parser.parse_args()
    torch.set_num_threads(1)
    gc.freeze()  # else a collection in a fork writes to, and so copies, all that it shares
    with tempfile.TemporaryDirectory() as folder:
        suite = Suite(Path(folder))
        # in this order: hostile.py's compute here, and no process may be forked after that
        runs = {"kills": suite.kills, "signals": suite.signals, "storage": suite.storage}
        groups = {**runs, **hostile.GROUPS}
        for name, counts in COUNTS.items():
            groups[name] = functools.partial(groups[name], options.times * counts[options.quick])
        hostile.report({name: groups[name] for name in groups if name in options.only})


if __name__ == "__main__":
    main()
