"""Functions that the scripts share: they take tensors, modules and paths, and know no Config.

Reading order: errors · command lines · randomness · files · checkpoints · signals · devices ·
several processes · weights of other projects · data sets · embedding · classifiers on embeddings ·
learning from labels · pictures · progress.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import dataclasses
import errno
import functools
import hashlib
import io
import itertools
import json
import math
import mmap
import multiprocessing
import os
import re
import shlex
import signal
import sys
import threading
import time
import unicodedata
import warnings
import zipfile
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock, Timeout
from PIL import ExifTags, Image
from torch import Tensor, nn
from torchvision import datasets as tv_datasets
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

# ---------------------------------------------------------------------------------------- errors

LONGEST_MESSAGE = 2000  # characters


class InputError(ValueError):
    """Something the user can put right: reported as one line on stderr with exit code 2."""


class RunInUse(InputError):
    """Another process works on the run."""


def exit_with_error(program: str, error: InputError | str) -> NoReturn:
    """Print `program: error: …` as a single line on stderr and leave with exit code 2."""
    if rank_info().rank:
        time.sleep(1)  # if rank 0 has the same error, it prints it, and torchrun ends this rank
    print(f"{program}: error: {one_line(str(error))}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def one_line(text: str, most: int = LONGEST_MESSAGE) -> str:
    """`text` as one line of at most `most` characters, control characters escaped."""
    text = " ".join(text[: 2 * most].split())
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text if len(text) <= most else text[: most - 1] + "…"


def shown(value: Any) -> str:
    """A value of any size as short text for a message."""
    try:
        text = f"{value:.9g}" if isinstance(value, float) else str(value)  # not 0.30000000000000004
        return one_line(text, 100)
    except (ValueError, RecursionError):  # an integer of a million digits, deeply nested lists
        return f"a {type(value).__name__} too large to print"


@contextlib.contextmanager
def errors_as_input_error(what: str, kind: type[InputError] = InputError) -> Iterator[None]:
    """Context manager that converts any exception to an InputError `what (…)`.

    For files of unknown origin, as reading them can raise anything. An InputError and a MemoryError
    stay as they are. kind: what the error becomes if it is the file's fault.
    """
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        kind = InputError if getattr(error, "errno", None) == errno.EMFILE else kind
        raise kind(f"{what} ({type(error).__name__}: {shown(error)})") from error


def until_error(items: Iterable, errors: list[InputError]) -> Iterator:
    """Iterates over `items`. An InputError ends it and is added to `errors`, to be raised later.

    With several ranks it is raised now, as the others wait in a step that cannot be completed.
    """
    try:
        yield from items
    except InputError as error:
        if world_size() > 1:
            raise InputError(f"{error}; continue from the last save by the same command") from error
        errors.append(error)


def warn_on_failure(write: Callable[..., Any], *arguments: Any) -> None:
    """Call write(*arguments). An InputError becomes a warning."""
    try:
        write(*arguments)
    except InputError as error:  # as of a full disk, which a long run should survive
        log_warning(f"warning: {error}; the program goes on")


@functools.cache
def log_warning(line: str) -> None:
    """Print a line once on stderr, above a progress bar. Only the main process does."""
    if is_main_process():
        tqdm.write(one_line(line), file=sys.stderr)


@contextlib.contextmanager
def command(program: str, less_memory: str = "") -> Iterator[None]:
    """Decorator of every main(): an expected failure becomes one line on stderr and an exit code.

    The code is 2 for an InputError or too little memory, and 128 + the signal, as in shells, for
    Ctrl-C, SIGTERM, SIGUSR1 and, without a message, SIGPIPE (`python simclr.py | head -1`).
    less_memory: how the program needs less, for the message.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names that are not text
    warnings.filterwarnings("ignore", module=r"PIL\.")  # the image is decoded, or named in an error
    try:
        with handling(STOP_SIGNALS[1:], raise_stopped):  # Python raises for SIGINT by itself
            try:
                yield
            finally:
                print(end="", flush=True)  # so that a broken pipe shows here, not after main()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + 13) from None  # SIGPIPE, which Windows does not define
    except InputError as error:
        exit_with_error(program, error)
    except (RuntimeError, MemoryError) as error:
        if "MPS_FALLBACK" in str(error):  # torch's text names what MPS lacks, and the remedy
            exit_with_error(program, str(error))
        if not is_out_of_memory(error):
            raise
        exit_with_error(program, f"there is too little memory{less_memory}: {error}")
    except KeyboardInterrupt as stop:
        text = "stopped; what had been saved before is kept"
        if isinstance(stop, Interrupted):
            again = "the same command, without --overwrite"
            if rank_info().size == 1:
                again = python_command(*(word for word in sys.argv if word != "--overwrite"))
            text = f"stopped and saved; continue with: {again}"
        if rank_info().rank == 0:
            print(f"\n{text}", file=sys.stderr)
        raise SystemExit(128 + (stop.args[0] if stop.args else signal.SIGINT)) from None


# ---------------------------------------------------------------------------------- command lines

LARGEST = 2**63 - 1  # int64: the limit of a setting without a range. Excludes infinity


def python_command(*arguments: str | Path) -> str:
    """A shell command that runs this interpreter, with paths as one would type them here."""
    return shlex.join([from_here(sys.executable), *map(str, arguments)])


def from_here(path: str | Path) -> str:
    """`path`, relative if it lies below the current folder."""
    path, here = Path(path), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def setting(
    default: Any, help: str, choices: Sequence[str] = (), identity: bool = True,
    low: float = -LARGEST, high: float = LARGEST, group: str = "",
) -> Any:  # fmt: skip
    """A dataclass field that is also a command-line flag.

    choices: the values it may take. identity: whether a run with another value is another run
    (False for where and how it runs). low, high: its range, ends included. group: the title, in
    --help, above this field and the next ones.
    """
    metadata = dict(help=help, choices=choices, identity=identity, low=low, high=high, group=group)
    return dataclasses.field(default=default, metadata=metadata)


def flag(name: str) -> str:
    """The command-line flag of a field."""
    return "--" + name.replace("_", "-")


def check_settings(options: Any) -> None:
    """Raise InputError for the first field, made by setting(), with a value that it cannot take."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        choices, low, high = (field.metadata[key] for key in ("choices", "low", "high"))
        several = value if isinstance(value, tuple) else (value,)
        valid, rule = True, "of its type"
        if choices:
            valid, rule = {*several} <= {*choices, field.default}, f"one of {', '.join(choices)}"
        elif field.type == "tuple[float, float]":
            valid = not value or -math.inf < value[0] < value[1] < math.inf  # False for nan
            rule = "two numbers, the smaller one first"
        elif field.type in ("int", "float", "tuple[float, ...]"):
            valid = all(low <= x <= high for x in several)  # False for nan
            rule = f"at least {low:g}" if high == LARGEST else f"{low:g} to {high:g}"
        if not valid:
            raise InputError(f"{flag(field.name)} must be {rule}, got {shown(value)}")


def differences(saved: dict, options: Any) -> list[str]:
    """A text with both values for each setting that makes two runs different runs.

    saved: fields of a dataclass like `options`, perhaps from JSON; a missing one had its default.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(options) if f.metadata["identity"]}
    saved = defaults | {key: tuple(x) if isinstance(x, list) else x for key, x in saved.items()}
    pairs = [(name, shown(saved[name]), shown(getattr(options, name))) for name in defaults]
    return [f"{flag(name)} ({a} there, {b} now)" for name, a, b in pairs if a != b]


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose help keeps the lines of its texts."""

    def __init__(self, **options: Any) -> None:
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=layout, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        exit_with_error(self.prog, f"{message} (see --help)")


def add_flags(parser: argparse.ArgumentParser, options: type) -> None:
    """Add to `parser` a flag for each field, made by setting(), of the dataclass `options`.

    Flags that are not given stay out of the namespace.
    """
    group: Any = parser
    for field in dataclasses.fields(options):
        if title := field.metadata["group"]:
            group = parser.add_argument_group(title)
        text, default, choices = field.metadata["help"], field.default, field.metadata["choices"]
        several = isinstance(default, tuple)
        pair = field.type == "tuple[float, float]"
        kind = str if field.type == "tuple[str, ...]" else float if several else type(default)
        if default not in ("", ()):
            text += f" [{' '.join(default) if several else default}]"
        details: dict[str, Any] = dict(default=argparse.SUPPRESS, help=text.replace("%", "%%"))
        if kind is bool:
            details["action"] = argparse.BooleanOptionalAction
        elif choices:
            details["choices"] = choices
        else:
            details |= dict(type=kind, metavar=kind.__name__.upper())
        if several:
            details |= dict(nargs=2, metavar=("LOW", "HIGH")) if pair else dict(nargs="+")
        group.add_argument(flag(field.name), **details)


# ------------------------------------------------------------------------------------ randomness


def derive_seed(seed: int, *keys: int) -> int:
    """A 63-bit seed for the stream named by `keys` (purpose, epoch, step, …), all >= 0.

    Streams of different keys are statistically independent (numpy's SeedSequence), so a run needs
    no saved generator state: (seed, epoch, step) give the same numbers again.
    """
    return int(np.random.SeedSequence((seed, *keys)).generate_state(1, np.uint64)[0]) >> 1


def generator(device: torch.device | str, seed: int, *keys: int) -> torch.Generator:
    """A torch generator on `device` at the start of the stream (seed, *keys)."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, *keys))


def fork_rng(device: torch.device) -> contextlib.AbstractContextManager:
    """Context manager that puts torch's generators back in their state at its end."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


# ----------------------------------------------------------------------------------------- files


def write_atomically(path: Path, content: bytes | memoryview, previous: Path | None = None) -> None:
    """Replace `path` by `content` so that a crash at any moment leaves the old or the new file.

    previous: what the old file is renamed to. Only the main process writes. Raises InputError,
    with `path` untouched, if it cannot be written.
    """
    if not is_main_process():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except OSError as error:
        kept = "; the previous version is intact" if os.path.isfile(path) else ""
        raise InputError(f"cannot write {path}: {error.strerror or error}{kept}") from error
    finally:
        with contextlib.suppress(OSError):  # normally it has become `path`
            temporary.unlink()


def make_folder(folder: Path) -> None:
    """Make a folder and its parents. Raises InputError if it cannot be made or written to."""
    with errors_as_input_error(f"cannot write to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError("it is not writable")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a JSON-lines file up to a torn line, [] if the file does not exist."""
    rows: list[dict] = []
    with contextlib.suppress(FileNotFoundError, ValueError):
        for line in path.read_bytes().splitlines():
            rows.append(json.loads(line))
    return rows


def write_csv(path: Path, columns: Iterable[str], rows: Iterable[Iterable]) -> None:
    """Write a table as CSV, atomically. File names that are not text keep their bytes."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    write_atomically(path, text.getvalue().encode("utf-8", "surrogateescape"))


# ----------------------------------------------------------------------------------- checkpoints

CHECKPOINT = "last.pt"
PREVIOUS = "previous.pt"  # the checkpoint before the last
LOG = "log.jsonl"
SUMMARY = "summary.json"
ABLATIONS = "ablation"  # the folder of ablation_SimCLR.py's runs
OWN_MODULE = "own module"  # the recorded architecture of an encoder that a user's program made


def save_checkpoint(path: Path, state: dict, previous: Path | None = None) -> None:
    """Write `state`, of tensors and plain types, by torch.save, like write_atomically()."""
    if not is_main_process():
        return
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getbuffer(), previous)


def load_checkpoint(path: Path) -> dict:
    """Read a dict written by torch.save, or safetensors, onto the CPU. No code in it is run.

    Raises InputError, which says what the file is and what to do where that is known, if it is
    missing, damaged, or holds anything but tensors and plain types.
    """
    if not path.exists():
        raise InputError(f"no checkpoint at {path}")
    try:
        with errors_as_input_error(f"{path} is not a readable checkpoint"):
            if path.suffix == ".safetensors":
                try:
                    from safetensors.torch import load_file
                except ImportError:
                    raise InputError(f"to read {path}, pip install safetensors") from None
                return load_file(path)
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    # torch.load compares no checksums, and reads nothing of what is marked a folder
                    marked = any(part.external_attr & 16 for part in archive.infolist())
                    if marked or archive.testzip():
                        raise ValueError("it is damaged")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # about files that are then refused
                state = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(state, dict):
                raise ValueError(f"it holds a {type(state).__name__}")
    except InputError as error:
        if kind := _describe_file(path):
            raise InputError(f"{path} is not a readable checkpoint but {kind}") from error
        raise
    return state


def check_format(what: str, number: Any, known: int) -> None:
    """Raise InputError, beginning with `what`, if this version does not read a file's format."""
    if number != known:
        raise InputError(f"{what} of format {shown(number)}; this version reads format {known}")


def load_newest(file: Path) -> tuple[dict, Path]:
    """A checkpoint and its file: `file`, or with a warning previous.pt if last.pt is damaged."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # others save their options
            return load_checkpoint(file), file
    except InputError as error:
        previous = file.with_name(PREVIOUS)
        if file.name != CHECKPOINT or not previous.exists():
            raise
        state = load_checkpoint(previous)
        log_warning(f"warning: {error}; using the checkpoint before it, {previous}")
        return state, previous


def load_weights(module: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Load a state dict into a module.

    Raises InputError, beginning with `what`, if names or shapes differ from the module's, or a
    value is not finite.
    """
    try:
        module.load_state_dict(state)
        for name, x in state.items():
            if not x.isfinite().all():
                raise ValueError(f"{name} is not finite")
    except Exception as error:  # a state of unknown origin can raise anything
        reason = str(error).split("\n\t", 1)[-1]  # without torch's heading
        raise InputError(f"{what} does not fit: {one_line(reason, 500)}") from error


def find_checkpoint(where: str, checkpoints: str | Path = "checkpoints") -> Path:
    """The checkpoint that `where` names: a file, or a run by its folder or its name.

    "" names the run below `checkpoints` that was saved last, without those of ablations and, if
    there are others, of one's own encoder module. Returns last.pt even if a killed process has
    left only previous.pt: load_newest() reads that. Raises InputError, naming the existing runs,
    if there is no such checkpoint.
    """
    root = Path(checkpoints)
    files = [*root.rglob(CHECKPOINT), *root.rglob(PREVIOUS)]
    files = [file for file in files if file.relative_to(root).parts[0] != ABLATIONS]
    if not where and not files:
        raise InputError(f"no run under {root} yet; python simclr.py makes one")
    if not where:
        records = [file.with_name("config.json") for file in files]
        own = {r.parent for r in records if r.exists() and f'"{OWN_MODULE}"' in r.read_text()}
        usable = [file for file in files if file.parent not in own] or files
        return max(usable, key=lambda file: file.stat().st_mtime).with_name(CHECKPOINT)
    for path in (Path(where), Path(where) / CHECKPOINT, root / where / CHECKPOINT):
        previous = path.with_name(PREVIOUS) if path.name == CHECKPOINT else path
        if os.path.isfile(path) or os.path.isfile(previous):
            return path
    names = ", ".join(sorted({str(file.parent.relative_to(root)) for file in files})) or "none"
    raise InputError(f"{where} is neither a checkpoint nor a run under {root} (there: {names})")


def kept_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run that --keep-every kept, by epoch."""
    return sorted(folder.glob("epoch[0-9]*.pt"))


@contextlib.contextmanager
def run_lock(folder: Path, overwrite: bool = False) -> Iterator[None]:
    """Context manager for exclusive use of a run's folder, which is made if it does not exist.

    overwrite: delete the run that it holds, so that a new one can begin. Rank 0 locks it for all
    ranks. Raises RunInUse if another process works on it, InputError if it cannot be written.
    """
    if not is_main_process():
        yield
        return
    make_folder(folder)
    try:
        lock = FileLock(folder / ".lock").acquire(timeout=0)  # ends with its process, at the latest
    except Timeout as error:
        raise RunInUse(
            f"another process is working on {folder}; wait for it, or choose another --run"
        ) from error
    except OSError as error:
        raise InputError(f"cannot lock {folder}: {error.strerror or error}") from error
    with lock:
        files = [*folder.glob(".*.tmp")]  # of processes that were killed while writing
        if overwrite:  # last.pt last: it names the run
            files += [folder / SUMMARY, folder / LOG, *kept_checkpoints(folder)]
            files += [*folder.glob("events.out.tfevents.*"), folder / PREVIOUS, folder / CHECKPOINT]
        for file in files:
            file.unlink(missing_ok=True)
        yield


@functools.cache
def event_writer(folder: Path) -> Any:
    """TensorBoard's writer of a folder."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))


class RunFolder:
    """The files of a run: last.pt, previous.pt, epochNNNN.pt, config.json and log.jsonl.

    minutes: between checkpoints inside an epoch, 0 for none. keep_every: epochs between the
    checkpoints epochNNNN.pt, 0 for none. Only the main process writes.
    """

    def __init__(self, folder: Path, minutes: float = 0, keep_every: int = 0) -> None:
        self.folder, self.minutes, self.keep_every = folder, minutes, keep_every
        self.last, self.previous = folder / CHECKPOINT, folder / PREVIOUS
        self._saved = time.monotonic()  # when the last checkpoint was begun

    def load(self) -> tuple[dict | None, Path]:
        """The newest readable checkpoint and its file; (None, last.pt) for a new run."""
        exists = self.last.exists() or self.previous.exists()
        return load_newest(self.last) if exists else (None, self.last)

    def save_due(self) -> bool:
        """Whether it is time for a checkpoint inside an epoch."""
        return 0 < 60 * self.minutes <= time.monotonic() - self._saved

    def save(self, state: dict, must: Any = False, due: Any = False) -> None:
        """Save a checkpoint if it must be saved, is due, or is to be kept.

        Otherwise the row of an epoch that ends is appended to log.jsonl. Raises InputError if the
        checkpoint must be saved and cannot be; if it is due or to be kept, that is a warning.
        """
        epoch, step = state["position"]["epoch"], state["position"]["step"]
        keep = bool(self.keep_every and epoch and not step and epoch % self.keep_every == 0)
        if must:
            self._write(state, keep)
        elif due or keep:
            warn_on_failure(self._write, state, keep)
        elif not step:
            warn_on_failure(self._append_to_log, state["log"][-1])

    def _write(self, state: dict, keep: bool) -> None:
        self._saved = time.monotonic()
        if keep:  # before last.pt: a run that is killed between the two saves it again
            save_checkpoint(self.folder / f"epoch{state['position']['epoch']:04d}.pt", state)
        save_checkpoint(self.last, state, self.previous)
        self.write_records(state)

    def write_records(self, state: dict) -> None:
        """Write config.json and log.jsonl, which people read, from a checkpoint."""
        write_json(self.folder / "config.json", state["config"])
        rows = "".join(json.dumps(row) + "\n" for row in state["log"])
        write_atomically(self.folder / LOG, rows.encode())

    def _append_to_log(self, row: dict) -> None:
        if is_main_process():
            file = self.folder / LOG
            with errors_as_input_error(f"cannot write {file}"), open(file, "a") as stream:
                stream.write(json.dumps(row) + "\n")


# --------------------------------------------------------------------------------------- signals

# SIGUSR1 is SLURM's advance notice
STOP_SIGNALS = [x for x in signal.Signals if x.name in ("SIGINT", "SIGTERM", "SIGUSR1")]
_noted_signals: list[int] = []  # inside stop_signals(), of which one is in use at a time


class Interrupted(KeyboardInterrupt):
    """A signal, whose number is the argument, asked a run to stop, and it has been saved."""


def raise_stopped(number: int, _frame: Any) -> NoReturn:
    """A signal handler, see handling()."""
    raise KeyboardInterrupt(number)


@contextlib.contextmanager
def handling(signals: Sequence[int], handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Context manager that sets a handler of signals; outside the main thread it does nothing."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    with contextlib.ExitStack() as stack:
        for number in signals if in_main_thread else ():
            stack.callback(signal.signal, number, signal.signal(number, handler))
        yield


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Context manager that yields a list, to which each stop signal adds its number.

    A loop reads it where it can stop. SIGINT after another signal ends the program at once. A
    signal after the loop has read the list for the last time raises KeyboardInterrupt at the end.
    """

    def note(number: int, _frame: Any) -> None:
        if number == signal.SIGINT and _noted_signals:
            raise KeyboardInterrupt
        _noted_signals.append(number)

    try:
        with handling(STOP_SIGNALS, note):
            yield _noted_signals
        if _noted_signals:
            raise_stopped(_noted_signals[0], None)
    finally:
        _noted_signals.clear()


# --------------------------------------------------------------------------------------- devices


def choose_device(name: str) -> torch.device:
    """The device of that name ("auto": CUDA, else MPS, else the CPU), fast for steps of one shape.

    Of several ranks each takes a GPU of its own. Raises InputError if this machine or this build
    of torch does not have the device, or not one for each rank.
    """
    info = rank_info()
    if name == "auto":
        mps = torch.backends.mps.is_available() and info.size == 1
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if info.size > 1 and name != "cpu":
        gpus = torch.cuda.device_count()
        if name != "cuda" or info.local_size > gpus:
            raise InputError(
                f"--device {name}: {info.local_size} processes need --device cuda and a GPU each, "
                f"but this machine has {gpus} (see --nproc_per_node); or choose --device cpu"
            )
        name = f"cuda:{info.local_rank}"
    with errors_as_input_error(f"--device {name} is not available here"):
        device = torch.device(name)
        torch.ones(1, device=device)  # by a kernel, which this build may lack for an old GPU
    if device.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"--device {name}: expected auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # so that nothing is put on the first GPU
    torch.backends.cudnn.benchmark = True  # on CUDA: try the kernels once
    if device.type == "cpu":
        # glibc keeps freed memory. Otherwise each step returns that of its activations to Linux and
        # gets new pages, filled with zeros, which takes a fifth of a ResNet-18's step of 512 views
        with contextlib.suppress(OSError, TypeError, AttributeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-4, 0)  # M_MMAP_MAX of <malloc.h>
            mallopt(-1, -1)  # M_TRIM_THRESHOLD
    return device


def cpu_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch, a library below it or numpy found too little memory, on a GPU or the CPU."""
    texts = ("t allocate memory", "out of memory", "STATUS_ALLOC_FAILED")
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or any(x in str(error) for x in texts)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether `device` computes in bfloat16 in hardware (Ampere GPUs on, AVX512-BF16 or AMX)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return able.get("avx512_bf16", False) or able.get("amx_tile", False)


def describe_precision(precision: str, device: torch.device) -> str:
    """The number format that a network computes in, in words."""
    if precision != "float32" or device.type != "cuda":
        return precision
    # TF32 is torch's default from Ampere on: three digits
    kind = "convolutions in TF32" if has_fast_bfloat16(device) else "this GPU has no bfloat16"
    return f"float32 ({kind})"


@contextlib.contextmanager
def temporarily(objects: Iterable[Any], name: str, value: Any) -> Iterator[None]:
    """Context manager that sets an attribute of each object, and puts it back at the end."""
    with contextlib.ExitStack() as stack:
        for each in objects:
            stack.callback(setattr, each, name, getattr(each, name))
            setattr(each, name, value)
        yield


def evaluating(encoder: Callable) -> contextlib.AbstractContextManager:
    """Context manager that puts a module in eval mode, and each of its parts back afterwards."""
    parts = encoder.modules() if isinstance(encoder, nn.Module) else ()
    return temporarily(parts, "training", False)


def at_least_float32(x: Tensor) -> Tensor:
    """float16 and bfloat16 as float32, in which sums keep their digits; float64 unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast region for `precision` "bfloat16", or a disabled one for "float32"."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


# ----------------------------------------------------------------------------- several processes
#
# torchrun starts W processes, the ranks. Inside process_group() they run as one job: each computes
# its part of a batch or of a data set, and rank 0, the main process, writes files and prints. With
# one process these functions do nothing.

RANK_TIMEOUT = timedelta(hours=1)  # for a rank that downloads or evaluates while the others wait
CONNECTION_ERRORS = ("gloo", "NCCL", "onnection closed", "onnection reset")  # of torch's texts
RankInfo = namedtuple("RankInfo", "rank size local_rank local_size")  # local: on this machine


def rank_info() -> RankInfo:
    """From torchrun's environment variables; without them there is one process."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if not {*names, "MASTER_ADDR"} <= os.environ.keys():
        return RankInfo(0, 1, 0, 1)
    return RankInfo(*(int(os.environ[name]) for name in names))


def rank() -> int:
    """The number of this process in the process group, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """W, the number of processes in the group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    """Whether this is rank 0, which writes files and prints."""
    return rank() == 0


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Context manager that lets torchrun's processes run as one job: by NCCL on GPUs, else Gloo.

    Only rank 0 prints. Raises InputError if the connection to another rank is lost.
    """
    info = rank_info()
    if info.size == 1:
        yield
        return
    store, *_ = next(dist.rendezvous("env://", timeout=RANK_TIMEOUT))
    # processes that torchrun restarts must not read the keys of those before
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt {attempt}", store)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=store, rank=info.rank, world_size=info.size, timeout=RANK_TIMEOUT,
        )  # fmt: skip
        with contextlib.redirect_stdout(None if info.rank else sys.stdout):  # None: no output
            yield
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or any(x in str(error) for x in CONNECTION_ERRORS)
        if not lost:
            raise
        raise InputError(
            f"rank {info.rank} lost the connection to another rank, which ended or cannot be "
            "reached (see the message of that rank); torchrun --max-restarts continues by itself"
        ) from error
    dist.destroy_process_group()  # not after an error: it would wait for the other ranks


def all_reduce_max(*numbers: int) -> list[int]:
    """The largest of each number over all ranks, in all of them."""
    if world_size() == 1:
        return [*numbers]
    tensor = torch.tensor(numbers, dtype=torch.int64)  # on the CPU: no rank waits for its GPU
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def broadcast_from_rank0(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns in rank 0, in all ranks. Only rank 0 calls it."""
    value = [function(*arguments) if is_main_process() else None]
    if world_size() > 1:
        dist.broadcast_object_list(value, device=torch.device("cpu"))
    return value[0]


def shard_indices(n: int) -> Tensor:
    """Which of n rows this rank computes: int64 (ceil(n / W),), row n - 1 repeated at the end."""
    size = math.ceil(n / world_size())
    return (torch.arange(size) + rank() * size).clamp(max=n - 1)


def all_gather_rows(part: Tensor, n: int) -> Tensor:
    """All n rows, in all ranks: (n, …). part: those at this rank's shard_indices(n)."""
    return part if world_size() == 1 else Gather.apply(part).flatten(0, 1)[:n]


class Gather(torch.autograd.Function):
    """The tensors of all W ranks, in all of them: (n, …) -> (W, n, …).

    The gradient of a rank's tensor is the sum of those that all ranks computed for it.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        whole = part.new_empty(world_size(), *part.shape)
        dist.all_gather([*whole.unbind()], part.contiguous())
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[rank()]


class SyncBatchNormCPU(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the whole batch, of which all ranks have equal parts (B, C) or (B, C, H, W).

    For the CPU, where torch has no SyncBatchNorm. The mean and the variance of the whole batch
    follow from those of the parts.
    """

    _check_input_dim = nn.SyncBatchNorm._check_input_dim

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        dims, shape = [0, *range(2, x.ndim)], [1, -1, *[1] * (x.ndim - 2)]
        part = torch.stack(torch.var_mean(at_least_float32(x), dims, correction=0))  # (2, C)
        variances, means = Gather.apply(part).unbind(1)  # (W, C)
        mean, variance = means.mean(0), variances.mean(0) + means.var(0, correction=0)
        if self.track_running_stats:
            n = world_size() * x.numel() / x.shape[1]
            with torch.no_grad():
                self.num_batches_tracked += 1
                share = self.momentum or 1 / self.num_batches_tracked.item()  # as torch's
                self.running_mean.lerp_(mean, share)
                self.running_var.lerp_(variance * (n / (n - 1)), share)
        scale = self.weight * (variance + self.eps).rsqrt()  # (C,)
        shift = self.bias - mean * scale
        return torch.addcmul(shift.to(x.dtype).view(shape), x, scale.to(x.dtype).view(shape))


def on_device(module: nn.Module, device: torch.device) -> nn.Module:
    """The module on `device`, channels last, with BatchNorm over all ranks, weights unchanged."""
    if world_size() > 1 and device.type == "cuda":
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    elif world_size() > 1:
        for norm in module.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                norm.__class__ = SyncBatchNormCPU  # with the same weights and statistics
    return module.to(device, memory_format=torch.channels_last)


def distributed(module: nn.Module) -> nn.Module:
    """The module, which averages its gradients over all ranks in each backward pass."""
    if world_size() == 1:
        return module
    network = nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)
    network.broadcast_buffers = False  # not needed: BatchNorm's are equal in all ranks
    return network


# ---------------------------------------------------------------------- weights of other projects
#
# A checkpoint of another project holds tensors by name, often in dicts of dicts. The encoder is
# found by its structure: a prefix below which the first convolution and the first block of a ResNet
# lie. The table ORIGINS only tells whose file it is, and how that project normalised its images.

MEANS = {  # mean and standard deviation of each channel, as published with the code that used them
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    # often copied: the mean over the images of the deviation within an image
    "cifar10-per-image": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}
ARCHITECTURES = {  # kind of block, and how many each stage has
    "resnet10": (BasicBlock, (1, 1, 1, 1)), "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)), "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)), "resnet152": (Bottleneck, (3, 8, 36, 3)),
}  # fmt: skip
NO_STEM_RELU = "2.0.conv1.weight"  # lightly's own ResNet: its function relu() is no child
_V2 = r"^net\.(\d)\.blocks\.(\d+)\."  # a block of SimCLRv2-Pytorch
LAYOUTS = {  # first convolution of the first block -> that of the stem, torchvision's names
    "layer1.0.conv1.weight": ("conv1.weight", ()),
    **{f"{first}.0.conv1.weight": ("0.weight", (  # children of an nn.Sequential, by number
        (r"^0\.", "conv1."), (r"^1\.", "bn1."),
        *((rf"^{first + i}\.", f"layer{i + 1}.") for i in range(4)),
    )) for first in (2, 3, 4)},  # of the first stage: 2 is NO_STEM_RELU, 3 without max-pool
    "net.1.blocks.0.net.0.weight": ("net.0.0.weight", (
        (r"^net\.0\.0\.", "conv1."), (r"^net\.0\.1\.0\.", "bn1."),
        (_V2 + r"net\.0\.", r"layer\1.\2.conv1."), (_V2 + r"net\.1\.0\.", r"layer\1.\2.bn1."),
        (_V2 + r"net\.2\.", r"layer\1.\2.conv2."), (_V2 + r"net\.3\.0\.", r"layer\1.\2.bn2."),
        (_V2 + r"net\.4\.", r"layer\1.\2.conv3."), (_V2 + r"net\.5\.0\.", r"layer\1.\2.bn3."),
        (_V2 + r"projection\.shortcut\.", r"layer\1.\2.downsample.0."),
        (_V2 + r"projection\.bn\.0\.", r"layer\1.\2.downsample.1."),
    )),
}  # fmt: skip
WRAPPERS = re.compile(r"(^|\.)((module|_orig_mod)\.)+")  # of DataParallel and torch.compile
COUNTERS = re.compile(r"(^|\.)total_(ops|params)$")  # of a profiler
TRUNK = re.compile(r"(conv|bn|norm|layer)\d+\.|(stem|maxpool|net)\.")  # parts of an encoder
# copies that help in training, in MoCo, BYOL and DINO, and are not what their projects evaluate
TRAINING_COPY = re.compile(r"momentum|encoder_k|target|student")
MOST_LISTED = 5  # names in a message
EXPORT_KEY = "simclr"  # of what --export writes into the metadata of the state dict
CLASSIFIER_KEY, CLASSIFIER_FORMAT = "classifier_format", 1  # of what --fine-tune writes

# Project; pattern of the encoder's prefix; pattern of facts about the file, see find_encoder();
# normalisation of images with the 7x7 and with the 3x3 stem, "" if it has no such encoder.
# The first row that fits is taken; a row without a name is a guess.
ORIGINS = (
    ("MoCo", r"state_dict\.encoder_q\.net\.", "", "", "cifar10-per-image"),
    ("MoCo", r"state_dict\.(encoder_q|base_encoder)\.", "", "imagenet", ""),
    ("SimSiam", r"state_dict\.encoder\.", r"predictor\.", "imagenet", ""),
    ("SwAV", "", r"prototypes\.", "imagenet", ""),
    ("DINO", r"teacher\.backbone\.", r"head\.", "imagenet", ""),
    ("Barlow Twins or VICReg", r"model\.backbone\.", r"projector\.", "imagenet", ""),
    ("lightly", r"(state_dict\.)?(model\.)?backbone\.", r"projection_head\.", "imagenet",
     "imagenet"),
    ("sthalles/SimCLR", r"state_dict\.backbone\.", r"fc\.0\.", "none", ""),
    ("sthalles/SimCLR", r"features\.", "", "none", ""),
    ("solo-learn", r"state_dict\.(backbone|encoder)\.", r"classifier\.", "imagenet", "cifar10"),
    ("dkobak/simclr-cifar10", r"backbone\.", r"projector\.", "", "none"),
    ("p3i0t/SimCLR-CIFAR10", r"enc\.", r"projector\.", "", "none"),
    ("SupContrast", r"model\.encoder\.", r"head\.", "", "cifar10-per-image"),
    ("Spijkervet/SimCLR", r"encoder\.", r"projector\.", "none", ""),
    ("leftthomas/SimCLR", r"f\.", r"g\.", "", "cifar10-per-image"),
    ("SimCLRv2-Pytorch", r"resnet\.", "", "none", ""),
    ("Google's SimCLR v1", r"(state_dict\.)?", r"^width [24]$[\s\S]*fc\.weight \(1000,", "none",
     ""),
    ("timm or PyTorch's example", r"state_dict\.", r"^keys .*\barch\b", "imagenet", ""),
    ("", r"state_dict\.", r"^keys state_dict$[\s\S]*fc\.weight \(1000,", "none", ""),  # v1, 1x?
    ("torchvision", "", r"^width 1$[\s\S]*^fc\.weight \(1000,", "imagenet", ""),
)  # fmt: skip
FILE_KINDS = {  # how a file begins that is no checkpoint, in lower case -> what it is
    b"version https://git-lfs": "a pointer of git-lfs: fetch the file itself by git lfs pull",
    (b"<!doctype html", b"<html"): "a web page: download the file itself",
    b"\x89hdf": "HDF5, as Keras writes it: save the weights with torch.save",
    b"\x1f\x8b": "compressed by gzip: unpack it",
}


@dataclass
class ForeignEncoder:
    """The encoder in a file of another project, or of --export, and what is known about it."""

    tensors: dict[str, Tensor]  # float32, by torchvision's names, without a head
    arch: str
    width: float
    stem: str  # "small" or "imagenet"
    rest: Sequence[str] = ()  # what else the file holds: heads, other encoders
    stem_relu: bool = True  # whether a ReLU follows the first BatchNorm
    origin: str = ""  # a project; "" if it is unknown, and `normalize` a guess
    normalize: str = "none"  # what its inputs in [0, 1] are normalised with: a key of MEANS, "none"
    padding: int = 0  # of the first convolution; 0: as usual

    def adapt(self, encoder: nn.Module) -> nn.Module:
        """Gives a ResNet, in place, what is special about this one beside the weights."""
        if self.padding:
            encoder.conv1.padding = (self.padding, self.padding)
        if not self.stem_relu:
            encoder.relu = nn.Identity()
        return encoder


def listed(names: Sequence[str]) -> str:
    """The first names, for a message."""
    text = ", ".join(map(shown, names[:MOST_LISTED])) or "none"
    return text + (", …" if len(names) > MOST_LISTED else "")


def find_encoder(state: dict, where: str | Path, prefix: str = "") -> ForeignEncoder:
    """Finds the ResNet in a checkpoint, which may hold other networks and nested dicts.

    prefix: where it lies in the file, if there are several. Raises InputError if there is none, if
    several are as likely, or if it is no plain ResNet of three channels. Whether its tensors are
    complete is checked when a network loads them.
    """
    with errors_as_input_error(f"{where} is not a checkpoint"):
        if CLASSIFIER_KEY in state:
            check_format(f"{where} is a classifier", state[CLASSIFIER_KEY], CLASSIFIER_FORMAT)
            return ForeignEncoder(state["encoder"], rest=["linear"], **state["network"])
        tensors = {WRAPPERS.sub(r"\1", name): value for name, value in _tensors(state)}
        prefix, layout = _choose_encoder(tensors, where, prefix)
        named, others = _torchvision_names(tensors, prefix, layout)
        own = prefix.split(".")
        rest = {next((part for part in n.split(".") if part not in own), n): None for n in others}
        arch, width, stem = _infer_architecture(named, where)
        exported = (getattr(state, "_metadata", None) or {}).get("", {}).get(EXPORT_KEY)
        if exported and exported["normalize"] in ("none", *MEANS):
            origin, normalize = exported.get("origin", "--export"), exported["normalize"]
            padding = int(exported["padding"])
        else:
            facts = [f"width {width:g}", "keys " + ", ".join(map(shown, state))]
            facts += [f"{name} {tuple(tensors[name].shape)}" for name in others]
            origin, normalize = _origin_of(prefix, stem, "\n".join(facts))
            padding = 2 if (origin, stem) == ("solo-learn", "small") else 0
        return ForeignEncoder(
            named, arch, width, stem, list(rest), layout != NO_STEM_RELU, origin, normalize, padding
        )


def _tensors(state: dict, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in dicts of dicts by their keys, joined with dots."""
    for key, value in state.items():
        name = f"{prefix}{key}"
        if not isinstance(key, str) or COUNTERS.search(name):  # as of an optimiser's state
            continue
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, dict):
            yield from _tensors(value, f"{name}.")


def _choose_encoder(tensors: dict, where: str | Path, wanted: str) -> tuple[str, str]:
    """Prefix and layout, a key of LAYOUTS, of the encoder in a file. See find_encoder()."""
    layouts: dict[str, str] = {}
    for layout, name in itertools.product(LAYOUTS, tensors):
        prefix = name.removesuffix(layout)
        if f".{name}".endswith(f".{layout}") and prefix + LAYOUTS[layout][0] in tensors:
            layouts.setdefault(prefix, layout)
    if not layouts:
        raise InputError(
            f"{where} has no encoder that is a plain ResNet: conv1.weight and layer1.0.conv1.weight"
            f" below one prefix (it has {len(tensors)} tensors: {listed(list(tensors))})"
        )
    likely = [prefix for prefix in layouts if not TRAINING_COPY.search(prefix)] or list(layouts)
    if wanted:  # "." means the empty prefix
        wanted = WRAPPERS.sub(r"\1", (wanted.strip(".") + ".").lstrip("."))
        likely = [p for p in layouts if p == wanted] or [p for p in layouts if p.startswith(wanted)]
    there = ", ".join(shown(prefix) or "." for prefix in layouts)
    if not likely:
        raise InputError(f"{where} has no encoder at --prefix {wanted} (there: {there})")
    one, *others = (_below(tensors, prefix) for prefix in likely)
    if any(x.keys() != one.keys() or not all(map(torch.equal, x.values(), one.values()))
           for x in others):  # fmt: skip
        raise InputError(f"{where} has several encoders; choose one by --prefix: {there}")
    return likely[0], layouts[likely[0]]


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}


def _torchvision_names(tensors: dict, prefix: str, layout: str) -> tuple[dict, list[str]]:
    """The encoder's tensors, float32, by torchvision's names; and the names of all others.

    What looks like a part of another kind of network stays in, so that loading refuses it.
    """
    named, others = {}, [name for name in tensors if not name.startswith(prefix)]
    for name, value in _below(tensors, prefix).items():
        new = name
        for pattern, replacement in LAYOUTS[layout][1]:
            new = re.sub(pattern, replacement, new)
        if TRUNK.match(new) or (new[0].isdigit() and value.ndim > 2):
            new = new.replace(".shortcut.", ".downsample.")
            named[new] = value.float() if value.is_floating_point() else value
        else:
            others.append(prefix + name)
    for name, value in list(named.items()):
        # a BatchNorm that imitates k devices has k·C statistics; in evaluation it uses their mean
        scale = named.get(re.sub(r"running_\w+$", "weight", name), value)
        if value.ndim == scale.ndim == 1 and len(value) > len(scale) > 0 == len(value) % len(scale):
            named[name] = value.view(-1, len(scale)).mean(0)
    return named, others


def _infer_architecture(named: dict[str, Tensor], where: str | Path) -> tuple[str, float, str]:
    """Architecture, width and stem, from shapes. Raises InputError if it is no plain ResNet."""
    channels, colours, *kernel = named["conv1.weight"].shape
    if colours != 3:
        raise InputError(f"{where} has an encoder of images of {colours} channels, not of RGB")
    convolutions = [name for name in named if name.endswith(".conv1.weight")]
    blocks = tuple(sum(n.startswith(f"layer{i}.") for n in convolutions) for i in (1, 2, 3, 4))
    block = Bottleneck if "layer1.0.conv3.weight" in named else BasicBlock
    arch = next((name for name, parts in ARCHITECTURES.items() if parts == (block, blocks)), None)
    stem = {3: "small", 7: "imagenet"}.get(kernel[-1])  # by the kernel's side, px
    if arch is None or stem is None:
        kind, shape = "basic" if block is BasicBlock else "bottleneck", (channels, colours, *kernel)
        raise InputError(
            f"{where} has an unknown network: {kind} blocks {blocks}, first convolution {shape}"
        )
    return arch, channels / 64, stem


def _origin_of(prefix: str, stem: str, facts: str) -> tuple[str, str]:
    """Origin, or "" if it is unknown, and normalisation. facts: what else is in the file."""
    similar = [x for x in ORIGINS if re.fullmatch(x[1], prefix) and re.search(x[2], facts, re.M)]
    for name, _, _, imagenet, small in similar:
        if normalize := imagenet if stem == "imagenet" else small:
            return name, normalize
    guess = stem == "imagenet" or any(x[3] == "imagenet" for x in similar)
    return "", "imagenet" if guess else "none"


class Normalized(nn.Module):
    """An encoder behind its normalisation, (x - mean) / std: images in [0, 1] -> h."""

    def __init__(self, encoder: nn.Module, normalize: str) -> None:
        super().__init__()
        self.encoder, self.feature_dim = encoder, getattr(encoder, "feature_dim", 0)
        for name, values in zip(("mean", "std"), MEANS[normalize], strict=True):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder((images - self.mean) / self.std)


def without_normalization(encoder: nn.Module) -> nn.Module:
    """The encoder of normalised images, which Normalized may hold."""
    return encoder.encoder if isinstance(encoder, Normalized) else encoder


def _describe_file(path: Path) -> str:
    """What a file is that is no readable checkpoint, and what to do; "" if that is unknown."""
    with contextlib.suppress(Exception):  # reading it as a checkpoint has said what is wrong
        with open(path, "rb") as file:
            begins = file.read(64).lstrip().lower()
        for beginning, kind in FILE_KINDS.items():
            if begins.startswith(beginning):
                return kind
        parts = zipfile.ZipFile(path).namelist()
        if any(name.endswith("constants.pkl") for name in parts):
            return "TorchScript: save torch.jit.load(FILE).state_dict() with torch.save"
        if all(name.endswith(".npy") for name in parts):
            return "NumPy's .npz: save {name: torch.from_numpy(array), …} with torch.save"
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if any(name.startswith("torch.nn.modules.") for name in names):
            return "a whole model: where its code is, save model.state_dict() with torch.save"
        if names:
            return (
                f"one that needs {listed(names)}: if you trust it, save its state dict alone, read "
                "by torch.load(FILE, weights_only=False)"
            )
    return ""


# ------------------------------------------------------------------------------------- data sets

TORCHVISION = {  # its class, and the files that it reads where there is no network
    "cifar10": (tv_datasets.CIFAR10, "cifar-10-python.tar.gz or the folder cifar-10-batches-py"),
    "cifar100": (tv_datasets.CIFAR100, "cifar-100-python.tar.gz or the folder cifar-100-python"),
    "svhn": (tv_datasets.SVHN, "train_32x32.mat and test_32x32.mat"),
    "fashion-mnist": (tv_datasets.FashionMNIST, "FashionMNIST/raw with its four ubyte files"),
    "stl10": (tv_datasets.STL10, "stl10_binary.tar.gz or the folder stl10_binary"),
}
DATASETS = ("digits", *TORCHVISION, "folder")
HELD_OUT = 0.2  # share of each class kept for testing where a data set has no split of its own
LONGEST_ASPECT = 4  # the ends of longer images are cut off before they are resized
UNEVEN = 1.5  # ratio of the largest and the smallest class from which on accuracy misleads
Range = tuple[float, ...]  # values that are black and white in grey pictures; see choose_range()


@dataclass
class Images:
    """Images of one size in memory, or of any size on disk, which are decoded when they are used.

    images: uint8 (N, 3, H, W), or None if they are on disk. labels: int64 (N,) or None. classes:
    name of each label. Of files: paths, a bytes array (N,) of names below the folder root;
    grey_range; max_bad, the share in [0, 1] that may be unreadable, see unreadable_error();
    unreadable, those known so far, index -> reason.
    """

    images: Tensor | None
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    paths: np.ndarray | None = None
    root: Path | None = None
    grey_range: Range = ()
    max_bad: float = 0.0
    unreadable: dict[int, str] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.paths if self.images is None else self.images)

    def image(self, index: int) -> Tensor:
        """One image: uint8 (3, H, W). Raises UnreadableImage if its file cannot be read."""
        if self.images is not None:
            return self.images[index]
        with Photo(self.root / os.fsdecode(self.paths[index]), self.grey_range) as photo:
            return photo.pixels().contiguous()

    def to(self, device: torch.device) -> Images:
        images, labels = (x if x is None else x.to(device) for x in (self.images, self.labels))
        return dataclasses.replace(self, images=images, labels=labels)

    def record_unreadable(self, reasons: dict[int, str]) -> None:
        """Records files that cannot be read, index -> reason, and warns of the first ones."""
        self.unreadable |= reasons
        for reason in [*self.unreadable.values()][:MOST_LISTED]:
            log_warning(f"warning: {reason}; it is left out")

    def batches(
        self, size: int, batch_size: int, device: torch.device, workers: int = 0,
        rows: Tensor | None = None,
    ) -> Iterator[Tensor]:  # fmt: skip
        """Without augmentation: float32 (B, 3, size, size) in [0, 1] on `device`.

        rows: int64 (M,), which images, in what order; None: all. An unreadable image is black, and
        `unreadable` records it.
        """
        rows = torch.arange(len(self)) if rows is None else rows
        if self.images is not None:
            for chunk in rows.to(self.images.device).split(batch_size):
                yield center_view(self.images[chunk].to(device), size)
            return
        requests = ((chunk, torch.empty(len(chunk), 1, 0)) for chunk in rows.split(batch_size))
        for crops, _ in decoded_batches(self, requests, size, None, workers, device):
            yield crops[:, 0].contiguous().float() / 255


def subset(data: Images, rows: Tensor) -> Images:
    """The images at `rows`, int64 (M,) on any device, in that order."""
    index = rows.cpu().numpy()
    images, labels = (x if x is None else x[rows.to(x.device)] for x in (data.images, data.labels))
    paths = None if data.paths is None else data.paths[index]
    bad = {i: data.unreadable[row] for i, row in enumerate(index) if row in data.unreadable}
    return dataclasses.replace(data, images=images, labels=labels, paths=paths, unreadable=bad)


def unreadable_error(data: Images) -> InputError | None:
    """An InputError if more images than data.max_bad allows, or all, cannot be read; else None.

    All ranks must call it; afterwards each knows the unreadable files of all ranks.
    """
    if world_size() > 1 and data.images is None:
        every: list[dict[int, str]] = [{}] * world_size()
        dist.all_gather_object(every, data.unreadable)
        for reasons in every:
            data.record_unreadable(reasons)
    count, size = len(data.unreadable), len(data)
    text = f"{count:,} of {size:,} images cannot be read"
    if count > MOST_LISTED:
        log_warning(f"warning: {text} and are left out")
    if not count or (count <= data.max_bad * size and count < size):
        return None
    first = data.unreadable[min(data.unreadable)]
    return InputError(f"{first}; {text}" + f" (--max-bad {data.max_bad:g})" * (data.max_bad < 1))


def only_readable(data: Images, workers: int) -> Images:
    """The images that can be read; decodes all streamed ones to find out. Raises as embed()."""
    if data.images is not None:
        return data
    pixels = embed(flat_pixels, data, 1, torch.device("cpu"), workers=workers, title="reading")
    return subset(data, (~pixels.isnan().any(1)).nonzero().flatten())


def image_names(data: Images) -> list[str]:
    """The name of each image in a list: its path, or its index if it has no path."""
    if data.paths is None:
        return [str(i) for i in range(len(data))]
    return [os.fsdecode(path) for path in data.paths]


def center_view(images: Tensor, size: int) -> Tensor:
    """Shorter side resized to `size` (antialiased bilinear), then the central square.

    images: uint8, or float in [0, 1], (N, 3, H, W). Returns float32 (N, 3, size, size) in [0, 1].
    """
    height, width = images.shape[-2:]
    longest = LONGEST_ASPECT * min(height, width)  # else a strip of pixels becomes gigabytes
    top, left = max(0, height - longest) // 2, max(0, width - longest) // 2
    images = images[..., top : height - top, left : width - left]
    images = images.float().div_(255) if images.dtype == torch.uint8 else images.float()
    if images.shape[-2:] == (size, size):
        return images
    return TF.center_crop(TF.resize(images, [size], antialias=True), [size, size]).clamp_(0, 1)


def to_uint8(images: Tensor) -> Tensor:
    """float in [0, 1] -> uint8 in [0, 255], rounded to the nearest."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def load_splits(
    dataset: str, splits: Sequence[str], data_dir: str | Path = "data", max_bad: float = 0.0,
    grey_range: Range = (),
) -> list[Images]:  # fmt: skip
    """Splits of a data set. Images of a folder are on disk if they are large or their sizes vary.

    dataset: one of DATASETS. splits: of "pretrain" (what is trained on without labels: the training
    images, on STL-10 with the unlabelled ones), "train" (the labelled training images; the same
    object where they have the same images) and "test" (empty for a folder without test images).
    data_dir: where downloads go and are looked for; for "folder" the user's own folder. max_bad:
    share in [0, 1] of a folder's images that may be unreadable; of the test images all may be,
    unless it is 0. Raises InputError for missing, empty or unreadable data.
    """
    if dataset == "folder":
        with errors_as_input_error(f"cannot read {data_dir}"):
            return _load_folder(Path(data_dir), splits, max_bad, grey_range)
    if grey_range:
        raise InputError(f"--range is for folders of pictures, not for {dataset}")
    download = partial(_load_torchvision, dataset, Path(data_dir))
    read = functools.cache(_load_digits if dataset == "digits" else download)
    same = dataset != "stl10"  # elsewhere all images to pre-train on have labels
    return [read("train" if same and split == "pretrain" else split) for split in splits]


def class_balanced_order(labels: Tensor, seed: int = 0) -> list[Tensor]:
    """For each class, in order of its number, the shuffled rows of its images, on the CPU."""
    random, values = np.random.default_rng(seed), labels.cpu().numpy()
    orders = [random.permutation(np.flatnonzero(values == c)) for c in np.unique(values)]
    return [torch.from_numpy(order) for order in orders]


def stratified_split(labels: Tensor) -> tuple[Tensor, Tensor]:
    """A fixed split, the same share of every class: sorted rows for (training, testing)."""
    parts = [x.tensor_split([round(HELD_OUT * len(x))]) for x in class_balanced_order(labels)]
    test, train = (torch.cat(rows).sort().values for rows in zip(*parts, strict=True))
    return train, test


@dataclass
class Data:
    """What a run learns from and is evaluated on. Labels are never used in pre-training."""

    pretrain: Images
    train: Images
    test: Images
    held_out: Images | None = None  # unlabelled, not learned from: they show how a run learns

    @functools.cached_property
    def files(self) -> str:
        """SHA-256 of the names and labels of the images to learn from; "" if they have no files."""
        if self.pretrain.paths is None:
            return ""
        digest = hashlib.sha256(b"\0".join(self.pretrain.paths.tolist()))
        if self.pretrain.labels is not None:
            digest.update(self.pretrain.labels.cpu().numpy().astype("<i8"))
        return digest.hexdigest()

    @property
    def labelled(self) -> bool:
        """Whether the representation can be evaluated by a classifier."""
        labelled = self.train.labels is not None and self.test.labels is not None
        return labelled and len(self.test) > 0 and len(self.train.classes) > 1

    @property
    def class_sizes(self) -> Tensor:
        """Training images of each class: int64 (K,)."""
        return self.train.labels.bincount(minlength=len(self.train.classes))

    @property
    def uneven(self) -> bool:
        """Whether classes differ so much in size that accuracy misleads."""
        return bool(self.class_sizes.max() > UNEVEN * self.class_sizes.min())

    @property
    def majority(self) -> float:
        """Share of the test images that are of the largest class, in [0, 1]."""
        return accuracy(self.class_sizes.argmax(), self.test.labels)


def describe_data(data: Data) -> str:
    """How many images and classes there are and where, or why there are no labels."""
    parts = data.pretrain, data.train, data.test
    place, train_place, test_place = (f" in {from_here(x.root)}" if x.root else "" for x in parts)
    text = f"{len(data.pretrain):,} images to learn from{place}"
    if data.held_out is not None:
        text += f" ({len(data.held_out):,} more are held out, see --hold-out)"
    if data.train.labels is None:
        return f"{text}; no labels: {why_unlabelled(image_names(data.train))}"
    text = f"{len(data.train.classes)} classes ({listed(data.train.classes)}), {text}"
    if data.train is not data.pretrain:
        text += f", {len(data.train):,} with labels{train_place}"
    if len(data.test) and data.test.labels is None:
        why = why_unlabelled(image_names(data.test), data.train.classes)
        return f"{text}, but no labels for the evaluation{test_place}: {why}"
    if not len(data.test):
        return f"{text}, no test images"
    text += f", {len(data.test):,} test images{test_place}"
    counts = data.test.labels.bincount(minlength=len(data.train.classes)).tolist()
    missing = [name for name, n in zip(data.train.classes, counts, strict=True) if not n]
    return text + f"; no test images of {listed(missing)}" * bool(missing)


def _load_digits(split: str) -> Images:
    """scikit-learn's 1,797 real scans of handwritten digits, 8 x 8 in 17 greys, to 16 px RGB."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    rows = np.arange(len(digits.target))
    parts = train_test_split(rows, test_size=HELD_OUT, stratify=digits.target, random_state=0)
    rows = np.sort(parts[split == "test"])  # (training, testing)
    grey = torch.from_numpy(digits.images[rows]).float()[:, None] / digits.images.max()
    grey = F.interpolate(grey, size=16, mode="bilinear")  # (N, 1, 16, 16)
    labels = torch.from_numpy(digits.target[rows]).long()
    return Images(to_uint8(grey).repeat(1, 3, 1, 1), labels, tuple("0123456789"))


def _load_torchvision(dataset: str, root: Path, split: str) -> Images:
    kind, files = TORCHVISION[dataset]
    options: dict[str, Any] = {"train": split == "train"}
    if dataset in ("svhn", "stl10"):
        options = {"split": "train+unlabeled" if split == "pretrain" else split}
    with contextlib.suppress(OSError):  # it may exist, and be for reading only
        root.mkdir(parents=True, exist_ok=True)
    one_process = FileLock(root / ".lock") if os.access(root, os.W_OK) else contextlib.nullcontext()
    what = f"{dataset} could not be read from or downloaded to {root.absolute()}"
    with errors_as_input_error(f"{what}; without a network, put {files} there"):
        with one_process:  # at a time downloads to the folder
            source = kind(root, download=True, **options)
    images = torch.as_tensor(source.data)
    if dataset in ("cifar10", "cifar100"):
        images = images.permute(0, 3, 1, 2)  # (N, H, W, 3) -> (N, 3, H, W)
    if dataset == "fashion-mnist":
        images = images[:, None].repeat(1, 3, 1, 1)  # grey -> RGB
    labels = torch.as_tensor(getattr(source, "targets", getattr(source, "labels", None))).long()
    classes = tuple(getattr(source, "classes", None) or "0123456789")
    unlabelled = (labels < 0).any()  # marked by -1 in STL-10
    return Images(images.contiguous(), None if unlabelled else labels, classes)


# ---------------------------------------------------------------------- data sets: one's own images

# what PIL can name but not decode, or only with another program
NOT_DECODED = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
MOST_PIXELS = 2**28  # 0.8 GB as RGB: a panorama, or a scan of A3 at 1,000 dots an inch
MEMORY_SIDE = 128  # px: larger images are streamed from disk
MEMORY_BYTES = 8 * 2**30  # bytes: sets that are larger as uint8 are streamed from disk
TRAIN_FOLDERS = ("train", "training")
TEST_FOLDERS = ("test", "testing", "val", "valid", "validation")
UNLABELLED_FOLDERS = ("unlabelled", "unlabeled")
SAMPLE = 64  # files that show whether a folder's pictures are grey, and their range
GREY_LEVELS = 2  # of 255: how far rounding in a JPEG moves equal channels apart
RANGES = {"I": (0.0, 65535.0), "F": (0.0, 1.0)}  # of grey modes of PIL: I, I;16, … and F
USED_SHARE = 0.1  # of a range: pictures that use less of it would be nearly black or flat
_UPRIGHT = {  # EXIF orientation -> what makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def list_images(root: Path) -> list[str]:
    """Names, relative to `root` and sorted, of all images below it.

    Images are known by their endings, and by their content where they have none. Hidden files are
    left out; a warning names others that are left out. Linked folders are followed, each once.
    Raises InputError for a folder that cannot be read, as its images would be missing unnoticed.
    """

    def refuse(error: OSError) -> NoReturn:
        raise InputError(f"cannot read the folder {error.filename} ({error.strerror})") from error

    kinds = Image.registered_extensions()  # of ".jpg", …
    decoded = ({*Image.OPEN} | {"MPO"}) - {*NOT_DECODED}
    names, others, seen = [], [], set()
    for folder, subfolders, files in os.walk(root, onerror=refuse, followlinks=True):
        known = (real := os.path.realpath(folder)) in seen  # in a loop of links
        seen.add(real)
        subfolders[:] = [name for name in subfolders if not known and not name.startswith(".")]
        below = os.path.relpath(folder, root)
        for name in files:
            if not known and not name.startswith("."):
                path = os.path.normpath(os.path.join(below, name))
                suffix = os.path.splitext(name)[1].lower()
                image = kinds.get(suffix) in decoded if suffix else image_size(root / path)
                (names if image else others).append(path)
    if others:
        files = listed(sorted(others))
        log_warning(f"left out of {root}: {len(others):,} files without an image's ending, {files}")
    return sorted(names)


def _class_of(path: str) -> str:
    """The first folder of a path, composed (NFC), as systems differ in how they write an umlaut."""
    return unicodedata.normalize("NFC", path.split(os.sep, maxsplit=1)[0])


def why_unlabelled(paths: Sequence[str], classes: Sequence[str] = ()) -> str:
    """What keeps files from being labelled by the layout `<class>/…/<file>`; "" if nothing does.

    paths: file names relative to the folder. classes: those there are, if they are known; without,
    there must be at least two.
    """
    outside = [path for path in paths if os.sep not in path]
    if outside:
        return f"{len(outside):,} images lie outside class folders: {listed(outside)}"
    names = {_class_of(path) for path in paths}
    one = len(names) == 1 and names.isdisjoint(classes)
    return "there is only one folder of images" if one else ""


def folder_labels(
    root: Path, paths: Sequence[str], classes: Sequence[str] = ()
) -> tuple[Tensor | None, tuple[str, ...]]:
    """Labels from the layout `<class>/…/<file>`, or None where the files are not laid out so.

    paths and classes: as in why_unlabelled(). Returns (int64 (N,) or None, the classes, in whose
    order they are numbered). Raises InputError for a class that is not one of those known.
    """
    if why_unlabelled(paths, classes):
        return None, ()
    names = [_class_of(path) for path in paths]
    classes = tuple(classes or sorted(set(names)))
    if unknown := sorted(set(names) - set(classes)):
        raise InputError(
            f"{root} has classes that are not among those to learn from: {unknown[:MOST_LISTED]!a} "
            f"(there: {[*classes[:MOST_LISTED]]!a})"
        )
    number = {name: i for i, name in enumerate(classes)}
    return torch.tensor([number[name] for name in names]), classes


def split_folders(root: Path) -> tuple[Path, list[Path], list[Path]]:
    """The labelled folder, those that may be for testing, and unlabelled ones beside them.

    train/ is a split if one of the others lies beside it or folders inside it; else it is a class,
    and the root is the labelled folder. The names may be in capitals.
    """
    folders = {path.name.lower(): path for path in sorted(root.iterdir()) if path.is_dir()}
    train, tests, unlabelled = (
        [folders[name] for name in names if name in folders]
        for names in (TRAIN_FOLDERS, TEST_FOLDERS, UNLABELLED_FOLDERS)
    )
    if train and (tests or unlabelled or any(path.is_dir() for path in train[0].iterdir())):
        return train[0], tests, unlabelled
    return root, [], []


def _choose_test(folders: Sequence[Path], classes: Sequence[str]) -> tuple | None:
    """The first folder that these classes label, else the first with images, or None.

    Returns (folder, names of its images, labels int64 (N,) or None). Raises InputError for
    classes that are not among these, if no folder is labelled.
    """
    chosen, fault = None, None
    for folder in folders:
        paths = list_images(folder)
        try:
            labels, _ = folder_labels(folder, paths, classes)
        except InputError as error:
            fault = fault or error
            continue
        if paths and classes and labels is not None:
            return folder, paths, labels
        if paths and not chosen:
            chosen = folder, paths, None
    if fault:
        raise fault
    return chosen


def _load_folder(root: Path, splits: Sequence[str], max_bad: float, given: Range) -> list[Images]:
    """`root/train/…` with `root/test/…`, `root/<class>/…`, or any tree of images.

    Images in unlabelled/, beside train/ or beside classes, are learned from without labels.
    """
    folder, tests, beside = split_folders(root)
    every, split_name = list_images(folder), "" if folder == root else folder.name
    if not every:
        raise InputError(f"no images in {folder}")
    # if all are in unlabelled/, it is a folder like any other
    paths = [p for p in every if _class_of(p).lower() not in UNLABELLED_FOLDERS] or every
    unlabelled = [os.path.join(split_name, path) for path in sorted({*every} - {*paths})]
    unlabelled += [os.path.join(part.name, path) for part in beside for path in list_images(part)]
    labels, classes = folder_labels(folder, paths)
    train, test = (folder, paths, labels), (folder, [], None)
    if folder == root and labels is not None:  # no splits: hold some images of each class out
        halves = stratified_split(labels)
        train, test = ((folder, [paths[i] for i in x.tolist()], labels[x]) for x in halves)
    parts: dict[str, tuple] = {"train": train, "test": _choose_test(tests, classes) or test}
    if unlabelled:
        labelled = [os.path.join(split_name, path) for path in train[1]]
        parts["pretrain"] = (root, labelled + unlabelled, None)
    if folder != root:
        _name_unused(root, {folder, *beside, parts["test"][0]})
    grey_range = choose_range(*parts.get("pretrain", (folder, paths))[:2], given)
    limits = {"test": float(max_bad > 0)}  # share that may be unreadable
    read = functools.cache(
        lambda part: _read_folder(*parts[part], classes, limits.get(part, max_bad), grey_range)
    )
    return [read(split if split in parts else "train") for split in splits]


def _name_unused(root: Path, used: set[Path]) -> None:
    """Prints a line that counts and names what lies beside the folders of the splits."""
    others = [p for p in sorted(root.iterdir()) if p not in used and not p.name.startswith(".")]
    counts = {p.name: sum(len(files) for *_, files in os.walk(p)) for p in others}  # 0: a file
    names = [f"{shown(name)}/ ({count:,})" for name, count in counts.items() if count]
    files = [p.name for p in others if not p.is_dir()]
    names += [f"beside the folders {len(files):,} ({listed(files)})"] * bool(files)
    if names:
        hint = f"Images without labels belong in {UNLABELLED_FOLDERS[0]}/"
        log_warning(f"files not used in {root}: {', '.join(names)}. {hint}")


def load_unlabelled(where: Path, max_bad: float = 0.0, grey_range: Range = ()) -> Images:
    """One image, or all below a folder of any layout, without labels. See load_splits()."""
    root, paths = (where, list_images(where)) if where.is_dir() else (where.parent, [where.name])
    if not paths:
        raise InputError(f"no images in {root}")
    return _read_folder(root, paths, None, (), max_bad, choose_range(root, paths, grey_range))


def _read_folder(
    root: Path, paths: list[str], labels: Tensor | None, classes: Sequence[str], max_bad: float,
    grey_range: Range,
) -> Images:  # fmt: skip
    """In memory if all images are small and of one size, otherwise to be streamed.

    Of those in memory the unreadable ones are left out. Raises what unreadable_error() returns.
    """
    if not paths:
        return Images(torch.empty(0, 3, 1, 1, dtype=torch.uint8), None, classes)
    names = np.array([os.fsencode(path) for path in paths])
    files = Images(None, labels, classes, names, root, grey_range, max_bad)
    common = None
    for path in paths:  # by their headers
        if size := image_size(root / path):  # a bad file is reported when it is decoded
            common = common or size
            large = max(size) > MEMORY_SIDE or 3 * math.prod(size) * len(paths) > MEMORY_BYTES
            if large or size != common:
                return files

    def read(index: int) -> Tensor | str:
        try:
            return files.image(index)
        except UnreadableImage as error:
            return str(error)

    with ThreadPoolExecutor() as pool:  # PIL decodes without holding Python's lock
        decoded = pool.map(read, range(len(paths)))
        images = [*progress_bar(decoded, f"reading {root}", len(paths))]
    good = [i for i, image in enumerate(images) if isinstance(image, Tensor)]
    files.record_unreadable({i: x for i, x in enumerate(images) if isinstance(x, str)})
    if error := unreadable_error(files):
        raise error
    kept = subset(files, torch.tensor(good))
    return dataclasses.replace(kept, images=torch.stack([images[i] for i in good]))


def choose_range(root: Path, paths: Sequence[str], given: Range = ()) -> Range:
    """Which values are black and white in a folder's grey pictures of more than 8 bits.

    given: by the user, or of a run. Else those of the pictures' type; where a sample of the files
    leaves that range or uses under a tenth of it, the smallest and the largest value of the sample.
    A line says so. Without such pictures in the sample returns what is given.
    """
    modes, values = set(), []
    for path in paths[:: math.ceil(len(paths) / SAMPLE)]:
        with contextlib.suppress(Exception), Photo(root / path) as photo:  # is reported later
            if photo.image.mode[0] in RANGES:
                grey = np.asarray(photo.image, dtype=np.float32)
                grey = grey[np.isfinite(grey)]
                modes.add(photo.image.mode)
                values += [grey.min(), grey.max()] if grey.size else []
    if not values:
        if given:
            log_warning(f"{root}: --range is for grey pictures of more than 8 bits: none found")
        return given
    low, high = float(min(values)), float(max(values))
    black, white = chosen = given or RANGES[max(modes)[0]]  # integers and floats: of integers
    narrow = min(high, white) - max(low, black) < USED_SHARE * (white - black)
    if not given and (narrow or low < black or high > white):
        chosen = (low, max(high, low + 1e-6))
    text = (
        f"{root}: grey pictures of PIL's mode {', '.join(sorted(modes))}, values {low:g} to "
        f"{high:g} in a sample; {chosen[0]:g} is taken as black, {chosen[1]:g} as white"
    )
    if narrow or chosen != (black, white):
        use = "under a tenth of" if narrow else "more than"
        whose = "this range" if given else f"the range of their type, {black:g} to {white:g}"
        text = f"warning: {text}; they use {use} {whose}"
    log_warning(f"{text}; --range LOW HIGH sets another range")
    return chosen


def all_grey(data: Images) -> bool:
    """Whether all images of a sample that can be read are without colour."""
    for row in range(0, len(data), math.ceil(len(data) / SAMPLE)):
        with contextlib.suppress(UnreadableImage):
            image = data.image(row).int()
            if (image.amax(0) - image.amin(0)).max() > GREY_LEVELS:
                return False
    return True


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8. What cannot be read, or is no orientation, counts as 1: upright."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # badly written EXIF: nearly any type, from ImageOps.exif_transpose() as well
        return 1
    return value if isinstance(value, int) and value in _UPRIGHT else 1


class UnreadableImage(InputError):
    """An image file that is missing, damaged, or too large."""


def _errors_naming_file(path: str | Path) -> contextlib.AbstractContextManager:
    """Context manager that converts what PIL raises, nearly any type, to an UnreadableImage."""
    return errors_as_input_error(f"cannot read the image {path}", UnreadableImage)


class Photo(contextlib.AbstractContextManager):
    """An image file whose header has been read, and no more; if not, raises UnreadableImage.

    height, width: in pixels as displayed. orientation: by EXIF, 1 to 8. grey_range: () for the
    type's. Use it in a `with`, which closes the file.
    """

    def __init__(self, path: str | Path, grey_range: Range = ()) -> None:
        self.path, self.grey_range = path, grey_range
        with _errors_naming_file(path):
            if not os.path.isfile(path):  # a pipe would be waited for
                raise OSError("it is not a file")
            Image.MAX_IMAGE_PIXELS = MOST_PIXELS // 2  # PIL refuses twice as many
            self.image = Image.open(path)
            self.width, self.height = self.image.size
            self.orientation = _orientation(self.image)
            if self.orientation >= 5 and self.image.format != "TIFF":  # which PIL turns by itself
                self.width, self.height = self.height, self.width

    def __exit__(self, *_: object) -> None:
        self.image.close()

    def pixels(self, least: float = 1) -> Tensor:
        """Decodes it, once: uint8 RGB (3, H, W), with the channels last in memory.

        EXIF orientation is applied, transparency is put on white, grey of more than 8 bits is
        scaled from grey_range, of an animation the first frame is taken. least: the smallest share
        of the size that is enough. A JPEG is decoded at 1/8, 1/4 or 1/2 if it may be: the decoder
        then averages blocks of pixels and saves most of its arithmetic.
        """
        image = self.image
        with _errors_naming_file(self.path):
            shrink = next((s for s in (8, 4, 2) if s * least <= 1), 1)
            if shrink > 1:  # other formats than JPEG take no notice
                image.draft(image.mode, (image.width // shrink, image.height // shrink))
            image.load()  # some formats turn the image, and drop the tag, while decoding
            if (orientation := _orientation(image)) != 1:
                image = image.transpose(_UPRIGHT[orientation])
            if image.mode[0] in RANGES:  # one channel; convert() cuts off at 255
                low, high = self.grey_range or RANGES[image.mode[0]]
                grey = (np.asarray(image, dtype=np.float32) - low) * (255 / (high - low))
                grey = np.nan_to_num(grey.round().clip(0, 255))  # NaN is black
                image = Image.fromarray(grey.astype(np.uint8))
            if image.has_transparency_data:
                rgba = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
            pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def center(self, out: Tensor) -> None:
        """Writes its center_view() to `out`, uint8 (1, size, size, 3)."""
        size = out.shape[1]
        pixels = self.pixels(size / min(self.height, self.width))
        out.copy_(to_uint8(center_view(pixels[None], size)).permute(0, 2, 3, 1))

    def crops(self, out: Tensor, boxes: np.ndarray) -> None:
        """Writes parts of it, resized, to `out`, uint8 (V, size, size, 3), from one decoding.

        boxes: int (V, 4), top, left, height, width in pixels as displayed. Where all of them are
        large, a smaller image is decoded, in which they have at least `size` pixels a side and
        their edges are rounded to whole ones.
        """
        size = out.shape[1]
        pixels = self.pixels((size + 1) / boxes[:, 2:].min())  # rounding takes up to a pixel
        pixels = pixels.permute(1, 2, 0)[None]  # (1, H, W, 3)
        y, x = pixels.shape[1] / self.height, pixels.shape[2] / self.width
        for view, (top, left, height, width) in zip(out, boxes.tolist(), strict=True):
            rows = slice(round(top * y), round((top + height) * y))
            columns = slice(round(left * x), round((left + width) * x))
            part = pixels[:, rows, columns].permute(0, 3, 1, 2)
            part = F.interpolate(part, (size, size), mode="bilinear", antialias=True)
            view.copy_(part[0].permute(1, 2, 0))


def image_size(path: Path) -> tuple[int, int] | None:
    """(height, width) in pixels as displayed, from the header alone; None if that is unreadable."""
    with contextlib.suppress(UnreadableImage), Photo(path) as photo:
        return photo.height, photo.width
    return None


# ------------------------------------------------------------------ data sets: decoding in parallel

REQUEST_IMAGES = 64  # files a worker decodes at a time: all workers share a large batch
REQUEST_BYTES = 2**24  # of their views
SLOTS = 2  # requests under way for each worker
PATIENCE_S = 10.0  # seconds that a stopped run waits for a process that hangs, as on a lost disk
# (sizes int64 (N, 2) height and width, u float32 (N, V, draws)) -> int (N, V, 4), all numpy arrays
Boxes = Callable[[np.ndarray, np.ndarray], np.ndarray]
_slots = [torch.empty(REQUEST_BYTES, dtype=torch.uint8)]  # in a worker: those of start_pool()
# number of workers -> what start_pool() returned, waiting for requests
_idle_pools: dict[int, tuple[ProcessPoolExecutor, Tensor]] = {}


@dataclass
class DecodeRequest:
    """Some files to decode. boxes: what to crop of each; None: its center_view(), one view."""

    root: Path
    paths: np.ndarray  # bytes (N,)
    size: int
    boxes: Boxes | None
    u: np.ndarray  # (N, V, draws) for boxes
    grey_range: Range = ()

    def views_in(self, memory: Tensor) -> Tensor:
        """The part of uint8 (bytes,) that its views take: (N, V, size, size, 3)."""
        shape = (*self.u.shape[:2], self.size, self.size, 3)
        return memory[: math.prod(shape)].view(shape)

    def __call__(self, slot: int = 0) -> dict[int, str]:
        """Decodes into a slot of this process. Returns position -> reason of unreadable files."""
        views, photos, bad = self.views_in(_slots[slot]), {}, {}
        for i, name in enumerate(self.paths.tolist()):
            try:
                photos[i] = Photo(self.root / os.fsdecode(name), self.grey_range)
            except UnreadableImage as error:
                bad[i] = str(error)
        boxes = None
        if self.boxes and photos:  # for all at once: for one image it takes as long
            sizes = np.array([(photo.height, photo.width) for photo in photos.values()])
            boxes = self.boxes(sizes, self.u[[*photos]])
        for k, (i, photo) in enumerate(photos.items()):
            try:
                with photo, _errors_naming_file(photo.path):
                    photo.center(views[i]) if boxes is None else photo.crops(views[i], boxes[k])
            except UnreadableImage as error:
                bad[i] = str(error)
        return bad


def start_worker(slots: Iterable[Tensor] = _slots) -> None:
    """The initializer of a worker process: one thread, and it ends with the main process."""
    _slots[:] = slots
    for number in STOP_SIGNALS:  # the main process ends its workers
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    main_process = multiprocessing.parent_process()  # may be killed
    threading.Thread(target=lambda: (main_process.join(), os._exit(1)), daemon=True).start()


def start_pool(workers: int) -> tuple[ProcessPoolExecutor, Tensor]:
    """Worker processes, and slots of memory that they share: uint8 (slots, REQUEST_BYTES).

    On Linux they are forked, and the memory has no name and needs no room in /dev/shm.
    """
    start = multiprocessing.get_start_method(allow_none=True)
    start = start or ("fork" if sys.platform == "linux" else "spawn")
    size = SLOTS * workers * REQUEST_BYTES
    if start == "fork":
        slots = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
    else:
        slots = torch.empty(size, dtype=torch.uint8).share_memory_()
    slots, context = slots.view(-1, REQUEST_BYTES), multiprocessing.get_context(start)
    pool = ProcessPoolExecutor(workers, context, start_worker, (slots,))
    pool.submit(int).result()  # now they have started
    return pool, slots


def _decode(
    requests: Iterator[DecodeRequest], workers: int
) -> Iterator[tuple[Tensor, dict[int, str]]]:
    """Yields the views of each request and its unreadable files, in order.

    workers: processes that decode, at most one a core; -1: one a core; 0: this process decodes.
    They wait for the next call, but end if requests are left under way. Views are overwritten when
    the next are asked for. Raises InputError if a worker has died, or does not answer when the run
    is to stop.
    """
    cores = max(1, cpu_cores() // rank_info().local_size)  # ranks on one machine share its cores
    workers = cores if workers < 0 else min(workers, cores)
    if not workers:
        for request in requests:
            bad = request()  # fills slot 0, which the next request overwrites
            yield request.views_in(_slots[0]), bad
        return
    with errors_as_input_error(
        f"cannot start {workers} processes that decode images; --workers 0 needs none, and in a "
        "container a larger --shm-size may help"
    ):
        pool, slots = _idle_pools.pop(workers, None) or start_pool(workers)
    under_way: dict[int, tuple[Tensor, Future]] = {}  # by slot
    last = [None] * len(slots)  # no requests: to wait for those that are under way
    try:
        for i, request in enumerate(itertools.chain(requests, last)):
            slot = i % len(slots)
            if slot in under_way:
                views, bad = under_way[slot]
                while not wait([bad], PATIENCE_S).done:
                    if _noted_signals:
                        raise InputError("stopped while a process decoding images did not answer")
                yield views, bad.result()
                del under_way[slot]
            if request:
                views = request.views_in(slots[slot])
                under_way[slot] = views, pool.submit(request, slot)
    except BrokenProcessPool as error:
        raise InputError(
            "a process that decodes images died: if memory was short, try fewer --workers"
        ) from error
    finally:
        if under_way:  # left early: Python would wait for them when it exits
            for process in [*pool._processes.values()]:  # kill_workers() from Python 3.14 on
                process.kill()
    _idle_pools[workers] = pool, slots


def _split(
    files: Images, rows: Tensor, u: Tensor, size: int, boxes: Boxes | None
) -> Iterator[DecodeRequest]:
    """The requests for a batch, see decoded_batches()."""
    image_bytes = 3 * size**2 * u.shape[1]
    if image_bytes > REQUEST_BYTES:
        raise InputError(f"{u.shape[1]} views of {size} px are too large")
    count = min(REQUEST_IMAGES, REQUEST_BYTES // image_bytes)
    root = files.root.absolute()  # a worker may have been started in another folder
    for start in range(0, len(rows), count):
        index, numbers = (x[start : start + count].numpy() for x in (rows, u))
        yield DecodeRequest(root, files.paths[index], size, boxes, numbers, files.grey_range)


def decoded_batches(
    files: Images, requests: Iterable[tuple[Tensor, Tensor]], size: int, boxes: Boxes | None,
    workers: int, device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Decodes and crops files in worker processes, in order.

    requests: for each batch rows of `files`, int64 (N,), and u, float32 (N, V, draws) on the CPU,
    random numbers for `boxes`; (N, 1, 0) with boxes None, for the center_view(). workers: see
    _decode(); the result does not depend on them. Yields for each batch uint8
    (N, V, 3, size, size) on `device`, with the channels last in memory, and u as it was given.

    A file that cannot be read is recorded in files.unreadable. With boxes the next readable file
    takes its place, with the same u; without, it is black. Raises InputError if no file can be
    read or a worker dies.
    """
    batches, ahead = itertools.tee(requests)  # the workers are some batches ahead
    parts = itertools.chain.from_iterable(_split(files, rows, u, size, boxes) for rows, u in ahead)
    with contextlib.closing(_decode(parts, workers)) as answers:
        for rows, u in batches:
            shape = (*u.shape[:2], size, size, 3)
            crops = torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
            done, bad = 0, {}
            while done < len(rows):
                views, reasons = next(answers)
                crops[done : done + len(views)] = views
                bad |= {done + i: reason for i, reason in reasons.items()}
                done += len(views)
            files.record_unreadable({int(rows[i]): reason for i, reason in bad.items()})
            for i in bad:
                row = int(rows[i])
                crops[i] = _next_readable(files, row, u[i, None], size, boxes) if boxes else 0
            yield crops.to(device, non_blocking=True).permute(0, 1, 4, 2, 3), u
        next(answers, None)  # at its end the generator keeps the workers for the next call


def _next_readable(files: Images, row: int, u: Tensor, size: int, boxes: Boxes) -> Tensor:
    """Views (V, size, size, 3) of the first readable file after `row`. u: (1, V, draws)."""
    for other in itertools.chain(range(row + 1, len(files)), range(row)):
        if other not in files.unreadable:
            (request,) = _split(files, torch.tensor([other]), u, size, boxes)
            bad = request()
            if not bad:
                return request.views_in(_slots[0])[0]
            files.record_unreadable({other: bad[0]})
    raise InputError(f"none of the images can be read: {files.unreadable[row]}")


# ------------------------------------------------------------------------------------- embedding


@torch.no_grad()
def embed(
    encoder: Callable[[Tensor], Tensor], data: Images, size: int, device: torch.device,
    precision: str = "float32", batch_size: int = 512, workers: int = 0, title: str = "",
) -> Tensor:  # fmt: skip
    """Features of every image, in order, without augmentation: float32 (N, D) on `device`.

    encoder: float (B, 3, size, size) in [0, 1] -> (B, D). A module is in eval mode meanwhile:
    BatchNorm uses its running statistics and does not move. batch_size: for images of 224 px;
    larger images get smaller batches. title: of a progress bar, if any. Each rank embeds a shard,
    and all ranks get all features. An image that cannot be read has a row of NaN.

    Raises InputError, in all ranks, as unreadable_error(), and if any other row is not finite.
    """
    rows = shard_indices(len(data))
    batch_size = max(1, min(batch_size, batch_size * 224**2 // size**2))
    count = math.ceil(len(rows) / batch_size)
    batch_size = math.ceil(len(rows) / count)
    # equal batches, the last row repeated: cuDNN tries its kernels for each size that it meets
    padded = torch.cat([rows, rows[-1:].expand(count * batch_size - len(rows))])
    parts = []
    with evaluating(encoder):
        batches = data.batches(size, batch_size, device, workers, padded)
        for images in progress_bar(batches, title, count):
            with autocast(device, precision):
                parts.append(encoder(images.contiguous(memory_format=torch.channels_last)).float())
    features = all_gather_rows(torch.cat(parts)[: len(rows)], len(data))
    if error := unreadable_error(data):
        raise error
    features[[*data.unreadable]] = 0
    if not features.isfinite().all():
        raise InputError("what the network computes is not finite for all images")
    features[[*data.unreadable]] = math.nan
    return features


def flat_pixels(images: Tensor, side: int = 32) -> Tensor:
    """Raw pixels as features: (B, 3, S, S) -> (B, 3·min(S, side)²), averaged down if larger."""
    if images.shape[-1] > side:
        images = F.interpolate(images, size=side, mode="bilinear", antialias=True)
    return images.flatten(1)


# ------------------------------------------------------------------- classifiers on embeddings

_KNN_BYTES = 256 * 2**20  # of a block of similarities
FEW_IMAGES = 2000  # test images: with fewer, chance moves an accuracy by more than a point
# every fourth of the paper's 45 from 1e-6 to 1e5 (Appendix B.8), the largest first
L2_STRENGTHS = tuple(10.0**exponent for exponent in range(5, -7, -1))
SEARCH_TOLERANCE = 1e-3  # of fit(), to choose among them: 0.1 % of accuracy decides nothing


@torch.no_grad()
def nearest_neighbours(x: Tensor, x_test: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k training rows of largest cosine similarity to each test row, the nearest first.

    x (N, D), x_test (M, D): features, of any float dtype. k is cut to N. Returns similarity float32
    (M, k) in [-1, 1] and rows int64 (M, k).
    """
    bank, queries = (F.normalize(features.float(), dim=1) for features in (x, x_test))
    rows = max(1, _KNN_BYTES // (4 * len(bank)))
    blocks = [(q @ bank.T).topk(min(k, len(bank)), dim=1) for q in queries.split(rows)]
    return torch.cat([b.values for b in blocks]), torch.cat([b.indices for b in blocks])


def knn_vote(
    similarity: Tensor, neighbour_labels: Tensor, num_classes: int, temperature: float | None = None
) -> Tensor:
    """The class that most neighbours have: int64 (M,). A tie goes to the smaller class number.

    similarity (M, k), the largest first; neighbour_labels int64 (M, k). A neighbour has one vote;
    with a temperature, exp(similarity / temperature) votes (Wu et al. 2018).
    """
    weights = torch.ones_like(similarity)
    if temperature is not None:  # the largest is subtracted so that exp cannot overflow
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
    votes = weights.new_zeros(len(similarity), num_classes)
    return votes.scatter_add_(1, neighbour_labels, weights).argmax(1)


class LogisticRegression:
    """Multinomial logistic regression on fixed features, for any strength of the l2 penalty.

    Minimises  mean cross-entropy + ½·l2·‖W‖²  over weight (D, K) and bias (K,), which is not
    penalised, by L-BFGS on the features' device and in their dtype. scikit-learn's C is
    1 / (l2·N). features: float (N, D). labels: int64 (N,) in [0, K).

    The solver works along the principal axes of the features, each scaled by the curvature that
    the objective has there at W = 0. That changes the path, not the minimum, and saves most of the
    steps: on 50,000 CIFAR-10 images it takes 62 instead of 146 for a trained encoder's h, 34
    instead of 588 for an untrained one's.
    """

    def __init__(self, features: Tensor, labels: Tensor, num_classes: int) -> None:
        self.labels = labels
        self.mean = features.mean(0)
        centred = features - self.mean
        self.variances, self.axes = principal_axes(centred)  # (R,), (D, R)
        self.inputs = centred @ self.axes  # (N, R)
        # (K, R) as in nn.Linear: with (R, K) the gradient is a product that takes ten times as long
        self.weight: Tensor | None = None
        self.bias = features.new_zeros(num_classes)
        error = 1 / num_classes - F.one_hot(labels, num_classes).to(features.dtype)  # (N, K)
        self.gradient = error.mT @ self.inputs / len(labels)  # (K, R), at W = 0

    def fit(self, l2: float, tolerance: float = 1e-4) -> tuple[Tensor, Tensor]:
        """Weight (D, K) and bias (K,) at the minimum, where features @ weight + bias are logits.

        Ends when no entry of the gradient, in the solver's scale, exceeds the tolerance times the
        largest one at W = 0, or what the dtype resolves. Starts from the last solution, so that
        many strengths cost little more than one.
        """
        scale = (self.variances / len(self.bias) + l2).rsqrt()  # (R,)
        # below the floor the loss cannot tell better from worse, and a line search breaks
        floor = 16 * torch.finfo(self.inputs.dtype).eps
        tolerance = max(tolerance * (self.gradient * scale).abs().max().item(), floor)
        # the first time a Newton step from W = 0, where the curvature is scale^-2
        start = -self.gradient * scale if self.weight is None else self.weight / scale
        coordinates = start.requires_grad_()  # (K, R)
        bias = self.bias.clone().requires_grad_()
        solver = torch.optim.LBFGS(
            [coordinates, bias], max_iter=2000, tolerance_grad=tolerance, tolerance_change=0,
            history_size=20, line_search_fn="strong_wolfe",
        )  # fmt: skip

        def objective() -> Tensor:
            solver.zero_grad()
            with torch.enable_grad():
                weight = scale * coordinates
                loss = F.cross_entropy(F.linear(self.inputs, weight, bias), self.labels)
                loss = loss + 0.5 * l2 * weight.square().sum()
                loss.backward()
            return loss

        solver.step(objective)
        self.weight, self.bias = scale * coordinates.detach(), bias.detach()
        weight = self.axes @ self.weight.mT
        return weight, self.bias - self.mean @ weight


def principal_axes(centred: Tensor) -> tuple[Tensor, Tensor]:
    """Variances (R,) and orthonormal axes (D, R) of rows (N, D) of mean 0, R = min(N, D).

    Decomposed on the CPU: MPS has no eigh before torch 2.13, and a silent fault is reported of
    CUDA's from 2.12 on. 2,048 features take 0.6 s.
    """
    n, dim = centred.shape
    if n < dim:
        _, singular, axes = torch.linalg.svd(centred.cpu(), full_matrices=False)
        variances, axes = singular.square() / n, axes.mT
    else:
        variances, axes = torch.linalg.eigh((centred.mT @ centred / n).cpu())
    return variances.clamp(min=0).to(centred.device), axes.to(centred.device)


def fit_linear_classifier(features: Tensor, y: Tensor, classes: int, title: str = "") -> nn.Linear:
    """The linear evaluation: logistic regression on frozen features, its penalty chosen fairly.

    features: float (N, D), standardised here. y: labels int64 (N,). A class-balanced fifth of the
    rows is held out to choose the most accurate of L2_STRENGTHS, of equal ones the strongest. All
    rows are then fitted with it: `l2` of the returned layer. title: of a progress bar, if any.
    """
    mean, std = standardization(features)
    x = (features - mean) / std
    fit_rows, held_out = (rows.to(x.device) for rows in stratified_split(y))
    scores = {}
    if len(held_out):
        search = LogisticRegression(x[fit_rows], y[fit_rows], classes)
        for l2 in progress_bar(L2_STRENGTHS, title, len(L2_STRENGTHS)):
            weight, bias = search.fit(l2, SEARCH_TOLERANCE)
            scores[l2] = accuracy((x[held_out] @ weight + bias).argmax(1), y[held_out])
    # scikit-learn's C = 1 where no class has enough images to hold one out
    chosen = max(scores, key=scores.__getitem__, default=1 / len(x))
    weight, bias = LogisticRegression(x, y, classes).fit(chosen)
    weight = weight / std[:, None]
    layer = zero_classifier(*weight.shape).to(x).requires_grad_(False)
    layer.weight.copy_(weight.mT)
    layer.bias.copy_(bias - mean @ weight)
    layer.l2 = chosen
    return layer


def standardization(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and standard deviation (D,) of rows (N, D); infinite where a feature is constant.

    (x - mean) / std has variance 1, or is 0 for a constant feature. A classifier's l2 penalty then
    means the same for representations of different scale.
    """
    std = features.std(0, correction=0)
    return features.mean(0), torch.where(std > 1e-6 * std.max(), std, torch.inf)


def standardize(train_features: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Scale each feature to mean 0 and variance 1 over the training rows; `others` likewise."""
    mean, std = standardization(train_features)
    return tuple((x - mean) / std for x in (train_features, *others))


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Share of equal entries, in [0, 1]."""
    return (predicted == labels).float().mean().item()


def accuracy_error(value: float, images: int, spread: float = 0.0) -> float:
    """Standard error of an accuracy in [0, 1]: √(p(1 - p)/n) of n images, 0 if they are many.

    spread: a standard deviation over seeds, which is added in quadrature.
    """
    sampling = math.sqrt(value * (1 - value) / images) if 0 < images < FEW_IMAGES else 0.0
    return math.hypot(sampling, spread)


def accuracy_text(value: float, images: int, spread: float = 0.0) -> str:
    """An accuracy in [0, 1] and its accuracy_error(), if it has one: "98.6 ± 0.6 %"."""
    error = accuracy_error(value, images, spread)
    return f"{100 * value:.1f}" + f" ± {100 * error:.1f}" * (error > 0) + " %"


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content. Raises InputError if it cannot be read."""
    with errors_as_input_error(f"cannot read {path}"):
        return hashlib.sha256(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Context manager: eval mode, and RuntimeError at the end if a byte of the module changed."""

    def content() -> list[Tensor]:
        tensors = (x.detach().cpu().flatten() for x in (*module.parameters(), *module.buffers()))
        return [x.clone().view(torch.uint8) for x in tensors]

    before = content()
    with evaluating(module):
        yield
    if not all(map(torch.equal, content(), before)):
        raise RuntimeError("the evaluation changed the encoder that it evaluates")


# ------------------------------------------------------------- learning from labels (Appendix B.5)


@dataclass
class LabelTraining:
    """How a network is trained on labels; the defaults are those of the paper's Appendix B.5.

    The paper's smallest label set, 1 % of ImageNet, gives a dozen steps an epoch and 750 in all.
    Much smaller sets would hardly be trained by as many epochs of a step or two. Their batches are
    a twelfth of the set, but at least 64 images, and they get at least min_steps.
    """

    epochs: int = 60
    batch_size: int = 1024
    lr: float = 0.05  # of a batch of 256
    weight_decay: float = 0.0
    min_steps: int = 200

    def batch(self, n: int) -> int:
        """Images a step for n labelled images."""
        return min(n, self.batch_size, max(64, n // 12))

    def steps(self, n: int) -> int:
        """Steps in all for n labelled images."""
        return max(self.min_steps, self.epochs * math.ceil(n / self.batch(n)))


def train_on_labels(
    network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], steps: int, peak: float,
    training: LabelTraining, precision: str, title: str = "",
) -> None:  # fmt: skip
    """Train all of `network` by SGD with Nesterov momentum 0.9 on the cross-entropy, cosine decay.

    network: (B, …) -> logits (B, K); its mode is not changed. batches: `steps` pairs of inputs and
    labels int64 (B,). peak: the first learning rate. title: of a progress bar, if any.
    """
    device = next(network.parameters()).device
    optimizer = torch.optim.SGD(
        network.parameters(), peak, 0.9, weight_decay=training.weight_decay, nesterov=True
    )
    for step, (inputs, labels) in enumerate(progress_bar(batches, title, steps)):
        for group in optimizer.param_groups:
            group["lr"] = peak * (1 + math.cos(math.pi * step / steps)) / 2
        with autocast(device, precision):
            logits = network(inputs)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()


def zero_classifier(dim: int, classes: int) -> nn.Linear:
    """A linear layer of zeros: at first all classes are equally likely, for any seed."""
    layer = nn.Linear(dim, classes)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


# -------------------------------------------------------------------------------------- pictures


def text_width(name: str) -> int:
    """Width in Latin characters; Chinese, Japanese and Korean ones are twice as wide."""
    return sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in name)


def printable(name: str, width: int = 24) -> str:
    """A class's name, which may be any folder's, on one line of this text_width() at most."""
    name = "".join(c if c.isprintable() else "?" for c in name)
    while text_width(name) > width:
        name = name.removesuffix("…")[:-1] + "…"
    return name


def names_in_figures(classes: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The names of classes as figures show them, and matplotlib's settings to draw them.

    Installed fonts add what the default font lacks. A name that none can draw becomes "class 3",
    and a warning says so.
    """
    from matplotlib import font_manager

    names, families = [printable(name) for name in classes], ["sans-serif"]
    lacking = set("".join(names))
    default = font_manager.findfont(font_manager.FontProperties())
    known = {font.fname for font in font_manager.fontManager.ttflist}
    for file in (default, *sorted(known.union(font_manager.findSystemFonts()))):
        if not lacking:
            break
        # RuntimeError, NotImplementedError: a damaged font, or one of bitmaps, as for emoji
        with contextlib.suppress(RuntimeError, OSError):
            font = font_manager.get_font(file)
            useful = lacking.intersection(map(chr, font.get_charmap()))
            if useful and not font.family_name.startswith("Last Resort"):  # which draws boxes
                font_manager.fontManager.addfont(file)
                families.append(font.family_name)
                lacking -= useful
    numbers = {i: f"class {i}" for i, name in enumerate(names) if lacking.intersection(name)}
    if numbers:
        listing = shown(", ".join(f"{number} is {names[i]}" for i, number in numbers.items()))
        log_warning(f"warning: no installed font has all class names; in figures {listing}")
    names = [numbers.get(i, name) for i, name in enumerate(names)]
    return names, {"font.family": families, "text.parse_math": False}


def save_figure(figure: Any, path: Path, dpi: int = 150) -> None:
    """Write a matplotlib Figure atomically, in the format that the file's ending names."""
    kind, known = path.suffix[1:].lower(), figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise InputError(f"{path}: the file's ending must be one of {', '.join(sorted(known))}")
    picture = io.BytesIO()
    figure.savefig(picture, format=kind, dpi=dpi)
    write_atomically(path, picture.getbuffer())


# -------------------------------------------------------------------------------------- progress


class Clock:
    """Wall time by what it was spent on. Each moment counts for one part: the parts add up."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}  # seconds; those of earlier processes may be added
        self._last = time.perf_counter()

    def lap(self, part: str) -> float:
        """Count the time since the last call, or since the start, for `part`, and return it."""
        before, self._last = self._last, time.perf_counter()
        self.parts[part] = self.parts.get(part, 0.0) + self._last - before
        return self._last - before

    def within(self, part: str, share: float) -> bool:
        """Whether `part` has taken at most this share of the time."""
        return self.parts.get(part, 0.0) <= share * sum(self.parts.values())

    def seconds(self) -> dict[str, float]:
        """For a log: `wall_seconds`, and those of the parts, as in `saving_seconds`."""
        parts = {"wall": sum(self.parts.values()), **self.parts}
        return {f"{part}_seconds": round(value, 3) for part, value in parts.items()}


def progress_bar(items: Iterable, title: str, total: int) -> Iterable:
    """The items, with a bar on a terminal until they end; without a title there is no bar."""
    if not title or not is_main_process() or multiprocessing.parent_process():
        return items
    return tqdm(items, title, total, leave=False, disable=None)


class Progress(tqdm):
    """A bar on a terminal; elsewhere a line for each epoch."""

    def __init__(self, total: int, done: int) -> None:
        self.on_terminal = sys.stderr.isatty() and is_main_process()
        self.values: dict[str, str] = {}  # kNN and others are not measured after each epoch
        super().__init__(total=total, initial=done, unit="step", disable=not self.on_terminal)

    def show(self, values: dict[str, str], line: str) -> None:
        """Show `values` beside the bar, or print `line` where there is no terminal."""
        if self.on_terminal:
            self.values |= values
            self.set_postfix(self.values, refresh=False)
        else:
            print(line, flush=True)
