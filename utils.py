"""What the scripts share and what has no SimCLR in it.

Reading order: errors · command lines · randomness · files · signals · devices · several processes ·
data sets · embedding · classifiers on embeddings · pictures · progress. Everything takes tensors,
modules and paths; nothing here knows a configuration.
"""

from __future__ import annotations

import argparse
import atexit
import collections
import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import pickletools
import platform
import re
import shlex
import shutil
import signal
import stat
import sys
import tarfile
import threading
import time
import warnings
import weakref
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, BinaryIO, ClassVar, NoReturn

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets as tv_datasets
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # deprecated since torchvision 0.29; PIL does it, too, somewhat slower
    decode_jpeg = None

# ---------------------------------------------------------------------------------------- errors


class InputError(ValueError):
    """Something the user can put right: reported as one line on stderr with exit code 2."""


LONGEST_MESSAGE = 2000  # characters


def exit_with_error(program: str, error: BaseException) -> NoReturn:
    """Print `program: error: …` as a single line on stderr and leave with exit code 2.

    Of several processes (see Processes) only the first that fails says why.
    """
    if first_to_fail():
        message = one_line(str(error), LONGEST_MESSAGE)
        print(f"{program}: error: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(1)  # as soon as one ends, torchrun ends the others: let that one speak first
    raise SystemExit(2)


def one_line(text: str, most: int) -> str:
    """`text` in a line that no terminal takes for a command, of at most `most` characters."""
    text = " ".join(text[: 2 * most].split())
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text if len(text) <= most else text[: most - 1] + "…"


@contextlib.contextmanager
def errors_as_input_error(what: str, through: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turns whatever is raised inside into an InputError that begins with `what`, some apart.

    For what is made of a file from anywhere: there is no end to what a strange one can raise.
    """
    try:
        yield
    except through:
        raise
    except Exception as error:
        raise InputError(f"{what}: {shown(error)}") from error


def shown(value: Any) -> str:
    """Any value, of whatever size, for a message."""
    try:
        return one_line(str(value), 100)
    except (ValueError, RecursionError):  # an integer of a million digits, lists in lists in lists
        return f"a {type(value).__name__} too large to print"


@contextlib.contextmanager
def command(program: str) -> Iterator[None]:
    """How all commands end, and what they do about their output.

    An InputError, or too little memory, is one line on stderr and exit code 2; where they are
    stopped they say so, and leave with 128 + the signal, as shells do. They end as Unix tools do,
    without a word, when nobody reads on (`python simclr.py | head -1`). File names that are no text
    are printed escaped, and what PIL thinks of a file is not printed: it is decoded, or it is an
    error that names it.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        try:
            yield
        except InputError as error:
            exit_with_error(program, error)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            exit_with_error(program, InputError(f"there is too little memory: {error}"))
        except KeyboardInterrupt as stop:
            if rank_info().rank == 0:
                print("\nstopped; what had been saved before is kept", file=sys.stderr)
            raise SystemExit(128 + getattr(stop, "signal", signal.SIGINT)) from None
        finally:
            print(end="", flush=True)  # else it fails after the last line of Python
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + 13) from None  # as if by SIGPIPE


# ---------------------------------------------------------------------------------- command lines


def python_command(*arguments: str) -> str:
    """A line for the shell that runs this interpreter, written as one would type it here."""
    return shlex.join([from_here(sys.executable), *arguments])


def from_here(path: str | Path) -> str:
    """`path`, relative where it lies below the current folder."""
    path, here = Path(path), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def setting(default: Any, help: str, choices: Sequence[str] = (), identity: bool = True) -> Any:
    """A dataclass field that is also a command-line flag.

    identity: whether a run with another value is another run (False for where and how it runs).
    """
    metadata = {"help": help, "choices": tuple(choices), "identity": identity}
    return dataclasses.field(default=default, metadata=metadata)


def flag(name: str) -> str:
    """The command-line flag of a field."""
    return "--" + name.replace("_", "-")


PLAIN_TYPES = {"int": int, "float": (int, float), "bool": bool, "str": str}


def type_fault(options: Any) -> str:
    """The first field of a dataclass that has not the type it should have, and what it has, or "".

    Its fields are int (of 64 bits), float (finite; an int will do), bool or str.
    """
    for field in dataclasses.fields(options):
        value, kind = getattr(options, field.name), field.type
        fits = isinstance(value, PLAIN_TYPES[kind]) and isinstance(value, bool) == (kind == "bool")
        if not fits or (isinstance(value, int) and abs(value) >= 2**63):
            wanted = f"of type {kind}" + " (64 bits)" * (fits and kind == "int")
            return f"{flag(field.name)} must be {wanted}, got {shown(value)}"
        if isinstance(value, float) and not math.isfinite(value):
            return f"{flag(field.name)} must be a finite number, got {value}"
    return ""


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose help keeps the lines of its texts."""

    def __init__(self, **options: Any) -> None:
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=layout, allow_abbrev=False, **options)

    def print_help(self, file: IO[str] | None = None) -> None:
        print(self.format_help(), end="", file=file)  # argparse hides that nobody reads on

    def error(self, message: str) -> NoReturn:
        exit_with_error(self.prog, InputError(f"{message} (see --help)"))


def add_flags(parser: argparse.ArgumentParser, options: type, groups: dict[str, str]) -> None:
    """A flag for each field of the dataclass `options`, made by setting().

    Flags that are not given stay out of the namespace. groups: the first field of each group in
    --help -> its title.
    """
    group: Any = parser
    types = {"int": int, "float": float, "str": str, "tuple[str, ...]": str}
    for field in dataclasses.fields(options):
        if field.name in groups:
            group = parser.add_argument_group(groups[field.name])
        text, default = field.metadata["help"], field.default
        several = isinstance(default, tuple)
        if default not in ("", ()):
            text += f" [{' '.join(default) if several else default}]"
        common: dict[str, Any] = dict(default=argparse.SUPPRESS, help=text.replace("%", "%%"))
        choices = field.metadata["choices"]
        if field.type == "bool":
            common["action"] = argparse.BooleanOptionalAction
        elif choices:
            common["choices"] = choices
        else:
            kind = types[field.type]
            common |= dict(type=kind, metavar=kind.__name__.upper())
        if several:
            common["nargs"] = "+"
        group.add_argument(flag(field.name), **common)


# ------------------------------------------------------------------------------------ randomness


def derive_seed(seed: int, *keys: int) -> int:
    """A 63-bit seed for the stream named by `keys` (purpose, epoch, step, …), all >= 0.

    Streams of different keys are statistically independent (numpy's SeedSequence), so a run needs
    no saved generator state: whoever knows (seed, epoch, step) can draw the same numbers again.
    """
    words = np.random.SeedSequence((seed, *keys)).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))


def generator(device: torch.device | str, seed: int, *keys: int) -> torch.Generator:
    """A torch generator on `device` at the start of the stream (seed, *keys)."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, *keys))


# ----------------------------------------------------------------------------------------- files


def write_atomically(
    path: Path, content: bytes | memoryview, before: Callable[[], object] = lambda: None
) -> None:
    """Replace `path` by `content` so that a crash at any moment leaves the old or the new file.

    before: is called when `content` is safe on the disk, and next takes the place of `path`.
    Raises InputError when the folder cannot be written or the disk is full; `path` is untouched
    then. Of several processes the first writes; in the others this does nothing.
    """
    if not is_main_process():
        return
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError("it is not a file")  # root could replace /dev/null
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        before()
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        kept = "; the previous version is intact" if path.is_file() else ""
        raise InputError(f"cannot write {path}: {error.strerror or error}{kept}") from error
    finally:
        with contextlib.suppress(OSError):  # as a rule it has become `path`
            temporary.unlink()


def remove_leftovers(folder: Path, *names: str) -> None:
    """Delete what killed processes left in writing files of these names (or patterns) atomically.

    The caller knows that nobody is writing them now.
    """
    for name in names:
        for file in folder.glob(f".{name}.*.tmp"):
            with contextlib.suppress(OSError):  # it is in nobody's way
                file.unlink()


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable (a no-op where folders cannot be opened, as on Windows)."""
    with contextlib.suppress(OSError, AttributeError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_folders(*folders: Path) -> None:
    """Raise InputError if one of the folders is none that can be written to, or made."""
    for folder in folders:
        try:
            above = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
            if not above.is_dir():
                raise NotADirectoryError(f"{above} is not a folder")
            if not os.access(above, os.W_OK | os.X_OK):
                raise PermissionError(f"{above} is not writable")
        except OSError as error:
            raise InputError(f"cannot write to {folder}: {error.strerror or error}") from error


def make_folders(*folders: Path) -> list[Path]:
    """Make the folders and their parents. Returns those that are new, the deepest first.

    Raises InputError, having made none, if one cannot be. Of several processes the first does it.
    """
    if not is_main_process():
        return []
    check_folders(*folders)
    every = {path for folder in folders for path in (folder, *folder.parents)}
    new = sorted((path for path in every if not path.exists()), reverse=True)
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write to {folder}: {error.strerror or error}") from error
    return new


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[bool]:
    """Holds the lock that the file `path` stands for. Yields False if somebody else holds it.

    The lock ends with its holder, however that ends; the file stays. Where there are no such locks
    (Windows, some network folders) it is not exclusive. Raises InputError if there can be no file.
    """
    if os.name == "nt":
        yield True
        return
    try:
        file = open(path, "a", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    with file:
        free = _flock(file, alone=True)  # None: the file system has no locks
        if free:
            free = same_file(file.fileno(), path)  # else its last holder has just deleted it
        if free:
            os.register_at_fork(after_in_child=file.close)  # a worker may outlive a killed holder
        yield free is not False


def same_file(descriptor: int, path: Path) -> bool:
    """Whether `path` still names the file that is open."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def log_warning(line: str) -> None:
    """A line on stderr, above a progress bar if there is one, from one of several processes."""
    if is_main_process():
        tqdm.write(line, file=sys.stderr)


class WarnOnFailure:
    """Lets a long run go on where a file cannot be written, with one warning a reason.

    `forgiving(write, *arguments)` calls it and returns whether it went well.
    """

    def __init__(self) -> None:
        self._failing: dict[Any, str] = {}  # what is written -> why it could not be

    def __call__(self, write: Callable[..., Any], *arguments: Any) -> bool:
        try:
            write(*arguments)
        except InputError as error:
            reason = str(getattr(error.__cause__, "strerror", error))
            if reason not in self._failing.values():
                said = f"warning: {error}; the run goes on and tries again"
                log_warning(" ".join(said.split()))
            self._failing[write] = reason
            return False
        self._failing.pop(write, None)
        return True


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a JSON-lines file, up to a damaged or torn line; none if it does not exist."""
    rows: list[dict] = []
    try:
        lines = Path(path).read_bytes().splitlines()
    except FileNotFoundError:
        return rows
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # no JSON, or no text at all
            break
        if not isinstance(row, dict):
            break
        rows.append(row)
    return rows


SEAL = b"SHA-256 of all before: "  # then the digest in hex: the comment of a checkpoint's zip
_SEAL_BYTES = len(SEAL) + 2 * hashlib.sha256().digest_size
_ZIP_END, _ZIP_END_BYTES = b"PK\5\6", 22  # the record that ends a zip, but for its comment


def save_checkpoint(path: Path, state: dict, before: Callable[[], object] = lambda: None) -> None:
    """Write `state` (tensors and plain types only) atomically. Raises InputError if it cannot.

    The file is torch.save's, with a digest where torch.load does not look, so that any damage
    shows: the checksums inside say nothing of headers and padding. before: see write_atomically().
    """
    if not is_main_process():
        return
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(-2, os.SEEK_END)  # the length of the comment, 0 so far
    buffer.write(_SEAL_BYTES.to_bytes(2, "little") + SEAL)
    buffer.write(hashlib.sha256(buffer.getbuffer()).hexdigest().encode())
    write_atomically(path, buffer.getbuffer(), before)


def check_seal(path: Path) -> None:
    """Raise InputError if save_checkpoint() sealed the file and it is damaged.

    torch.save leaves no comment, so whatever is not a plain end of a zip is a seal, or was one.
    """
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 2 * _SEAL_BYTES))
        tail = file.read()
        end = tail.rfind(_ZIP_END)
        if end < 0 or (end + _ZIP_END_BYTES == len(tail) and tail.endswith(b"\0\0")):
            return
        file.seek(0)
        digest = hashlib.sha256()
        left = size - 2 * digest.digest_size
        while left > 0 and (piece := file.read(min(left, 2**20))):
            digest.update(piece)
            left -= len(piece)
    if tail[-_SEAL_BYTES:] != SEAL + digest.hexdigest().encode():
        raise InputError(f"{path} is damaged (it does not have the digest that it was saved with)")


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint onto the CPU without running any code that it may hold.

    Returns the dict that was saved. Raises InputError if the file is missing, damaged (its
    digest and the checksums inside the zip file are verified), or holds anything but tensors and
    plain types.
    Takes no more memory than a small multiple of the file's size.
    """
    path = Path(path)
    try:
        check_seal(path)
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about files that are then refused
            begins = file.read(4)
            file.seek(0)
            if begins == ZIP_BEGINS:
                checked: BinaryIO = checked_archive(file)
            else:  # of before torch 1.6: no checksums
                check_pickles(file, count=5)
                checked = file
            checked.seek(0)
            state = torch.load(checked, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"no checkpoint at {path}") from None
    except Exception as error:  # zipfile, pickle and torch raise many types for a bad file
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error)
        raise InputError(f"{path} is not a readable checkpoint ({reason})") from error
    if not isinstance(state, dict):
        raise InputError(f"{path} holds a {type(state).__name__}, not a checkpoint")
    return state


ZIP_BEGINS = b"PK\3\4"  # by which torch, too, tells its two formats apart
NAMED_IN_CHECKPOINTS = frozenset(
    [
        "argparse Namespace",
        "collections OrderedDict",
        "torch Size",
        "torch device",
        "torch._utils _rebuild_parameter",
        "torch._utils _rebuild_tensor",
        "torch._utils _rebuild_tensor_v2",
        *(f"torch {name}" for name, kind in vars(torch).items() if isinstance(kind, torch.dtype)),
        *(
            f"torch {kind}Storage"
            for kind in ("BFloat16", "Bool", "Byte", "Char", "Double", "Float", "Half", "Int",
                         "Long", "Short", "ComplexFloat", "ComplexDouble")
        ),
    ]
)  # fmt: skip


def checked_archive(file: BinaryIO) -> BinaryIO:
    """A copy of a zip file that is one that torch could have written. Else raises ValueError.

    torch stores the parts as they are, one behind another: else they could expand to any size. It
    is to read the copy, and not the file, where its own reader may find another directory than
    Python's, and so parts that were not looked at.
    """
    copy = io.BytesIO()
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(copy, "w") as whole:
        parts = archive.infolist()
        for part in parts:
            if part.filename.startswith("/") or ".." in part.filename.split("/"):
                raise ValueError(f"its part {shown(part.filename)} lies outside of it")
        if len({part.filename.lower() for part in parts}) < len(parts):
            raise ValueError("it has two parts of one name")
        if sum(part.file_size for part in parts) > file.seek(0, os.SEEK_END):
            raise ValueError("its parts are compressed, or lie over one another")
        for part in parts:
            content = archive.read(part)  # compares its checksum
            if part.filename.lower().endswith("data.pkl"):  # torch does not mind the case
                check_pickles(io.BytesIO(content), count=1)
            whole.writestr(part.filename, content)
    return copy


def check_pickles(file: IO[bytes], count: int) -> None:
    """Raise ValueError if one of the pickles in a row names what no checkpoint needs.

    Nothing is executed: neither here, nor by torch.load(weights_only=True). But that calls more
    than builds tensors, such as bytearray(10**10), which a file of 100 bytes can ask for.
    """
    for _ in range(count):
        for operation, argument, _ in pickletools.genops(file):
            if operation.name == "GLOBAL" and argument not in NAMED_IN_CHECKPOINTS:
                raise ValueError(f"it names {shown(argument.replace(' ', '.'))}")


def state_dict_mismatches(tensors: dict[str, Any], expected: dict[str, Tensor]) -> list[str]:
    """What keeps `tensors` from being a state dict of these names and shapes, a text each.

    expected: may be on the meta device. Several tensors may not be views of the same memory, nor
    one of less than it shows: a small file could claim a network of any size.
    """
    faults = [f"{shown(name)} is missing" for name in expected if name not in tensors]
    faults += [f"{shown(name)} is surplus" for name in tensors if name not in expected]
    for name, value in expected.items():
        own = tensors.get(name, value)
        if not isinstance(own, Tensor):
            faults.append(f"{name} is a {type(own).__name__}, not a tensor")
        elif own.shape != value.shape:
            faults.append(f"{name} has shape {tuple(own.shape)}, not {tuple(value.shape)}")
    if faults:
        return faults
    stores = [tensors[name].untyped_storage() for name in expected]
    held = sum({store.data_ptr(): store.nbytes() for store in stores}.values())
    if sum(tensors[name].nbytes for name in expected) > held:
        return ["its tensors are views of the same memory"]
    return [f"{name} {fault}" for name in expected if (fault := weight_fault(tensors[name]))]


def weight_fault(value: Tensor) -> str:
    """What is wrong with a tensor as a weight, or ""."""
    if value.ndim and not value.is_floating_point():
        return f"is of type {value.dtype}, not a float"
    return "" if value.isfinite().all() else "is not finite"


# --------------------------------------------------------------------------------------- signals


class StopSignals:
    """Turns SIGINT, SIGTERM and SIGUSR1 (SLURM's advance notice) into a flag that a loop can read.

    `with StopSignals() as stop:` — `stop.signal` is None until a signal arrives, then its number.
    SIGINT after that ends the program at once. Outside the main thread it does nothing.
    """

    _NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")

    def __init__(self) -> None:
        self.signal: int | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for name in self._NAMES:
            number = getattr(signal, name, None)
            if number is not None:
                with contextlib.suppress(ValueError):  # not in the main thread
                    self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT and self.signal is not None:
            raise KeyboardInterrupt
        self.signal = self.signal or number


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGUSR1 arrived where nothing is to be saved. signal: its number."""

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal


class InterruptedBySignals(StopSignals):
    """Inside, SIGTERM and SIGUSR1 end the program as Ctrl-C does, cleaning up: see Terminated."""

    _NAMES = ("SIGTERM", "SIGUSR1")

    def _note(self, number: int, _frame: object) -> None:
        raise Terminated(number)


# --------------------------------------------------------------------------------------- devices


def choose_device(name: str) -> torch.device:
    """`auto` (CUDA if there is one, else the CPU) or a torch device string; see make_fast().

    Of several processes each takes a GPU of its own. Raises InputError for a device that this
    machine or this build of torch does not have, or that several processes cannot share.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    place = rank_info()
    if place.size > 1 and name not in ("cpu", "cuda"):
        raise InputError(
            f"--device {name} is one device for {place.size} processes: say cuda, and each takes "
            "its own, or cpu"
        )
    if place.size > 1 and name == "cuda" and torch.cuda.is_available():
        if place.local_size > torch.cuda.device_count():
            raise InputError(
                f"{place.local_size} processes, but this machine has {torch.cuda.device_count()} "
                "GPUs: start torchrun with as many with --nproc_per_node, or say --device cpu"
            )
        name = f"cuda:{place.local_rank}"
    try:
        device = torch.device(name)
        torch.ones(1, device=device)  # by a kernel: for an old GPU this build may have none
    except Exception as error:  # RuntimeError, AssertionError, NotImplementedError by backend
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"--device {name} is not available here ({reason})") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"--device {name}: expected auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # so that nothing is put on the first GPU, or asked of it
    make_fast(device)
    return device


def make_fast(device: torch.device) -> None:
    """Settings of the whole process that make equal steps, one after the other, fast on `device`.

    On a CPU under Linux glibc is told to keep the memory that is freed. Else each step gives its
    activations back and gets them as new pages, which the kernel fills with zeros first: half a
    million pages and a fifth of the time of a ResNet-18's step with 512 views.
    """
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # all steps have one shape: try the kernels once
    if device.type == "cpu":
        with contextlib.suppress(OSError, TypeError, AttributeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, -1)


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of <malloc.h>


def cpu_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_count(asked: int) -> int:
    """Processes that decode images: as many as asked for, but at most one a core; -1: that.

    Of several processes that torchrun started on this machine each gets its share of the cores.
    """
    cores = max(1, cpu_cores() // rank_info().local_size)
    return cores if asked < 0 else min(asked, cores)


def memory_of(device: torch.device) -> float:
    """Bytes that `device` has, or this process may use of them; infinite where it is not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limits = [math.inf]
    with contextlib.suppress(OSError, ValueError, AttributeError):  # Windows has no sysconf
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with contextlib.suppress(OSError, ValueError):  # of a container; the word "max" for none
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
    return min(limits) / rank_info().local_size


def free_memory() -> float:
    """Bytes of this machine's memory that programs can still take; infinite if it is not known."""
    limits = [memory_of(torch.device("cpu")) * rank_info().local_size]
    with contextlib.suppress(OSError, ValueError, KeyError):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        limits.append(1024 * int(dict(line.split()[:2] for line in lines)["MemAvailable:"]))
    return min(limits)


def gib(count: float) -> str:
    """Bytes, for people."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch, a library below it or numpy got no memory, of a GPU or of this machine."""
    texts = ("t allocate memory", "out of memory", "STATUS_ALLOC_FAILED")
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or any(x in str(error) for x in texts)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether `device` computes in bfloat16 in hardware (Ampere GPUs on, AVX512-BF16 or AMX)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, check, lambda: False)() for check in checks)
    return False


def random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Of torch's own generators, which dropout draws from."""
    cuda = device.type == "cuda"
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if cuda else None


def set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    """Back to a random_state()."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


@contextlib.contextmanager
def keep_running_statistics(module: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm in train mode normalises as ever, but its running statistics stay."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    tracking = [norm.track_running_stats for norm in norms]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm, value in zip(norms, tracking, strict=True):
            norm.track_running_stats = value


def at_least_float32(x: Tensor) -> Tensor:
    """float64 stays what it is; float16 and bfloat16 have too few digits to sum up in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast region for `precision` "bfloat16", or a disabled one for "float32"."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


# ----------------------------------------------------------------------------- several processes
#
# torchrun starts a script several times, and each copy, a process, finds its number (the rank) in
# the environment. Inside process_group() they work as one on torch.distributed: each computes its part
# of a batch or of a data set, and what they need of each other they exchange. The first of them,
# rank 0, is the one that writes files and speaks. Alone, all of this does nothing.


@dataclass(frozen=True)
class RankInfo:
    """Which of how many processes this is, on all machines and on this one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def rank_info() -> RankInfo:
    """What torchrun says of this process; alone if it was not started by it."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    found = [os.environ.get(name, "") for name in names]
    if not all(text.isdecimal() for text in found) or "MASTER_ADDR" not in os.environ:
        return RankInfo()
    return RankInfo(*map(int, found))


def rank() -> int:
    """The number of this process among those that work together, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    """Whether this is the process that writes files and speaks."""
    return rank() == 0


@functools.cache
def _store() -> dist.Store:
    """What the processes of torchrun can all read and write, also before they work together.

    It outlives them: what those wrote that torchrun has started again must not be read.
    """
    store, *_ = next(dist.rendezvous("env://", timeout=PATIENCE))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"attempt {attempt}", store)


PATIENCE = timedelta(hours=1)  # for a process that downloads, or evaluates, while others wait


def first_to_fail() -> bool:
    """Whether no other process of this run has asked this before."""
    if rank_info().size == 1:
        return True
    try:
        return _store().add("failed", 1) == 1
    except RuntimeError:  # whoever kept the store has ended
        return True


def wait_for_others() -> None:
    """Until all processes of this run have come here: torchrun ends the others when one fails."""
    size = rank_info().size
    if size > 1:
        here = _store().add("arrived", 1)
        while here < size:
            time.sleep(0.5)
            here = _store().add("arrived", 0)


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Inside, the processes that torchrun started work as one: NCCL for CUDA, Gloo for the CPU.

    Only the first prints. Raises InputError where this build of torch cannot, and when another
    process has ended: it has said why, or torchrun does.
    """
    place = rank_info()
    if place.size == 1:
        yield
        return
    backend = "gloo"
    if device.type == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        if not dist.is_nccl_available():
            raise InputError("several processes on GPUs need NCCL, which this torch has not")
    try:
        dist.init_process_group(
            backend, store=_store(), rank=place.rank, world_size=place.size, timeout=PATIENCE
        )
        with open(os.devnull, "w") as nowhere:
            with contextlib.redirect_stdout(nowhere if place.rank else sys.stdout):
                yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not any(x in str(error) for x in LOST):
            raise
        raise InputError(
            f"process {place.rank} lost another one of the run, which ended or cannot be reached; "
            f"torchrun --max-restarts continues by itself ({without_place(str(error))})"
        ) from error
    dist.destroy_process_group()  # not after an error: the others would be first to say something


LOST = ("gloo", "NCCL", "onnection closed", "onnection reset")  # of torch's texts


def without_place(message: str) -> str:
    """A message of torch's without the line of C++ that it begins with."""
    return one_line(re.sub(r"^\[[^\]]*:\d+\] *", "", message), 500)


def mark(name: str) -> None:
    """Note something for the processes that torchrun starts in place of these: see marked()."""
    if rank_info().size > 1:
        _store().underlying_store.set(name, "yes")


def marked(name: str) -> bool:
    """Whether mark() was called, also before torchrun started these processes again."""
    return rank_info().size > 1 and _store().underlying_store.check([name])


def error_on_any_rank(error: InputError | None) -> InputError:
    """The error of one process, in all. Some have one, the others give None."""
    if error and world_size() == 1:
        return error
    return InputError(next(iter(all_gather_dicts({rank(): str(error)} if error else {}).values())))


def check_same_on_all_ranks(facts: dict[str, Any]) -> None:
    """Raise InputError, in all processes, if they do not all have the same."""
    every = all_gather_dicts({rank(): facts})
    for other, theirs in every.items():
        if differ := [name for name, value in theirs.items() if value != every[0][name]]:
            raise InputError(f"process {other} has other {', '.join(differ)} than process 0")


def all_reduce_max(*numbers: int) -> list[int]:
    """The largest of each number over all processes, in all of them. They wait for each other."""
    if world_size() == 1:
        return [*numbers]
    found = torch.tensor(numbers)  # on the CPU: nobody waits for a GPU
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


def broadcast_from_rank0(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns in the first process, in all of them. The others do not call it."""
    value = [function(*arguments) if is_main_process() else None]
    if world_size() > 1:
        dist.broadcast_object_list(value, device=torch.device("cpu"))
    return value[0]


def shard_indices(n: int) -> Tensor:
    """Which of n rows this process computes, int64: as many as the others, the last row again."""
    size = math.ceil(n / world_size())
    return (torch.arange(size) + rank() * size).clamp(max=n - 1)


def all_gather_rows(part: Tensor, n: int) -> Tensor:
    """All n rows, in all processes, of which each has computed its shard_indices(): -> (n, …)."""
    if world_size() == 1:
        return part
    return Gather.apply(part).flatten(0, 1)[:n]


def all_gather_dicts(values: dict) -> dict:
    """The entries of all processes' dicts, in all."""
    every: list[dict] = [{}] * world_size()
    if world_size() == 1:
        return values
    dist.all_gather_object(every, values)
    return {key: value for each in every for key, value in sorted(each.items())}


class Gather(torch.autograd.Function):
    """What all W processes have computed of a batch: (n, …) in each -> (W, n, …) in all.

    For a loss of all of it, which every process then computes, and whose gradient is therefore
    whole in each: a process takes its part of that. DistributedDataParallel, at the end of the
    backward pass, takes the mean over the processes where the sum is the gradient: hence W times.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        whole = part.new_empty(world_size(), *part.shape)
        dist.all_gather([*whole.unbind()], part.contiguous())
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return world_size() * gradient[rank()]


class CommonNorm(torch.autograd.Function):
    """Normalises (B, C, …) by mean and variance over the batches of all processes, equally large.

    With them torch's BatchNorm in eval mode gives the output, and the gradient but for what passes
    through the statistics: for each channel, over all n numbers of it,
    weight / (n std) · (sum(g) + x̂ · sum(g · x̂)), where g is the gradient by the output and x̂ the
    normalised x. Returns the output, mean (C,) and variance (C,).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Any:
        dims = [0, *range(2, x.ndim)]
        own = torch.stack(torch.var_mean(at_least_float32(x), dims, correction=0))  # (2, C)
        variances, means = Gather.apply(own).unbind(1)  # (W, C)
        mean, variance = means.mean(0), variances.mean(0) + means.var(0, correction=0)
        ctx.eps = eps
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps), mean, variance

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, variance = ctx.saved_tensors
        by_x, by_weight, by_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )  # by_weight is sum(g · x̂) and by_bias sum(g) of this process
        sums = torch.stack([by_weight, by_bias])
        dist.all_reduce(sums)
        scale = (variance + ctx.eps).rsqrt()  # 1 / std
        factor = weight * scale / (world_size() * x.numel() / x.shape[1])
        slope = factor * scale * sums[0]
        offset = factor * sums[1] - slope * mean
        shape = [1, -1, *[1] * (x.ndim - 2)]
        by_x = by_x.addcmul_(x, slope.to(x.dtype).view(shape), value=-1)
        return by_x.sub_(offset.to(x.dtype).view(shape)), by_weight, by_bias, None


class SyncBatchNormCPU(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the batches of all processes, exactly, on any device.

    For the CPU, where torch has no SyncBatchNorm. Takes (B, C) or (B, C, H, W).
    """

    def _check_input_dim(self, x: Tensor) -> None:
        if x.ndim < 2:
            raise ValueError(f"need (B, C, ...), got {tuple(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        y, mean, variance = CommonNorm.apply(x, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            n = world_size() * x.numel() / x.shape[1]
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * (n / (n - 1)), self.momentum)
        return y


def distributed(module: nn.Module) -> nn.Module:
    """The module with its gradients averaged over all processes in each backward pass."""
    if world_size() == 1:
        return module
    kind = nn.parallel.DistributedDataParallel
    new = "forward_sync_buffers"  # and from torch 2.14 on the old name warns
    name = new if new in inspect.signature(kind).parameters else "broadcast_buffers"
    # BatchNorm's buffers are the same everywhere: no need to send them in each pass
    return kind(module, **{name: False}, gradient_as_bucket_view=True)


def exchange_gradients(network: nn.Module, now: bool) -> contextlib.AbstractContextManager:
    """Inside, backward passes of a distributed() network sum up here, until one with now=True."""
    return contextlib.nullcontext() if now or world_size() == 1 else network.no_sync()


def convert_sync_batchnorm(module: nn.Module, device: torch.device) -> nn.Module:
    """The module with each BatchNorm replaced by one over all processes, of the same state dict."""
    if world_size() == 1:
        return module
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            common = SyncBatchNormCPU(child.num_features, child.eps, child.momentum)
            common.load_state_dict(child.state_dict())
            setattr(module, name, common)
        else:
            convert_sync_batchnorm(child, device)
    return module


# ------------------------------------------------------------------------------------- data sets

DATASETS = ("digits", "cifar10", "cifar100", "svhn", "fashion-mnist", "stl10", "folder")
SPLITS = ("pretrain", "train", "test")

IMAGE_SUFFIXES = frozenset([
    ".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp",
    ".ppm", ".pgm", ".pbm", ".jp2",
])  # fmt: skip
HELD_OUT = 0.2  # share of each class kept for testing where a data set has no split of its own
MEMORY_SIDE = 128  # px: larger images are streamed from disk
MEMORY_BYTES = 8 * 2**30  # bytes: sets that are larger as uint8 are streamed from disk


@dataclass
class ImageSet:
    """Images of one size in memory.

    images: uint8 (N, 3, H, W). labels: int64 (N,) or None. classes: name of each label. paths:
    bytes array (N,) of the file names where the images came from files.
    """

    images: Tensor
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    paths: np.ndarray | None = None
    unreadable: ClassVar[dict[int, str]] = {}  # what is in memory has been read

    def __len__(self) -> int:
        return len(self.images)

    @property
    def labels_read(self) -> Tensor | None:
        """Labels of the images that batches() gives: here all."""
        return self.labels

    def image(self, index: int) -> Tensor:
        """One image: uint8 (3, H, W)."""
        return self.images[index]

    def to(self, device: torch.device) -> ImageSet:
        labels = None if self.labels is None else self.labels.to(device)
        return ImageSet(self.images.to(device), labels, self.classes, self.paths)

    def batches(
        self, size: int, batch_size: int, device: torch.device, workers: int = 0
    ) -> Iterator[Tensor]:
        """In order, without augmentation: float32 (B, 3, size, size) in [0, 1] on `device`."""
        del workers  # nothing to decode
        for images in self.images.split(batch_size):
            yield center_view(images.to(device), size)


MOST_NAMED = 10  # unreadable files, in warnings


@dataclass
class ImageFiles:
    """Images of any size on disk, decoded when they are used.

    root: the folder. paths: bytes array (N,) of file names below it, one flat block. labels: int64
    (N,) or None. classes: name of each label. max_bad: share of the files in [0, 1] that may turn
    out to be unreadable; with 0 the first is an error. unreadable: those found, index -> reason.
    cache: where what has been decoded is kept, see cache_pixels().
    """

    root: Path
    paths: np.ndarray
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    max_bad: float = 0.0
    unreadable: dict[int, str] = dataclasses.field(default_factory=dict)
    cache: PixelCache | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def to(self, device: torch.device) -> ImageFiles:
        labels = None if self.labels is None else self.labels.to(device)
        return dataclasses.replace(self, labels=labels)

    def path(self, index: int) -> Path:
        return self.root / os.fsdecode(self.paths[index])

    def image(self, index: int) -> Tensor:
        """One image, decoded now: uint8 (3, H, W). Raises InputError if it cannot be read."""
        return read_image(self.path(index))

    def readable_rows(self) -> np.ndarray:
        """Which images are not known to be unreadable: int64 (M,), in order."""
        return np.setdiff1d(np.arange(len(self)), [*self.unreadable])

    @property
    def labels_read(self) -> Tensor | None:
        """Labels of the images that batches() gives, all but the unreadable ones: int64 (M,)."""
        if self.labels is None or not self.unreadable:
            return self.labels
        return self.labels[torch.from_numpy(self.readable_rows()).to(self.labels.device)]

    def record_unreadable(self, bad: dict[int, str], most: float) -> None:
        """Take note of files that cannot be read, index -> reason, and name them once.

        Raises InputError, and forgets the new ones, if they make more than the share `most` of all.
        """
        new = {index: why for index, why in bad.items() if index not in self.unreadable}
        count = len(self.unreadable) + len(new)
        if new and count > most * len(self):
            why = next(iter(new.values()))
            if not self.max_bad:
                raise InputError(why)
            names = [shown(os.fsdecode(self.paths[i])) for i in [*self.unreadable, *new][:3]]
            raise InputError(
                f"{why}; with it {count:,} of {len(self):,} images cannot be read, more than "
                f"{flag('max_bad')} {self.max_bad:g} allows: {', '.join(names)}"
                f"{', …' * (count > len(names))}"
            )
        before, self.unreadable = len(self.unreadable), self.unreadable | new
        if self.max_bad < 1:  # who takes any number of them reports them at the end
            for why in [*new.values()][: max(0, MOST_NAMED - before)]:
                log_warning(one_line(f"warning: {why}; it is left out", LONGEST_MESSAGE))
            if before < MOST_NAMED <= count:
                log_warning("warning: more images that cannot be read are only counted")

    def batches(
        self, size: int, batch_size: int, device: torch.device, workers: int = 0
    ) -> Iterator[Tensor]:
        """In order, without augmentation: float32 (B, 3, size, size) in [0, 1] on `device`.

        Unreadable images are left out, those that are known from before without another try, so
        that afterwards labels_read are the labels. Raises InputError if max_bad is 0.
        """
        rows = torch.from_numpy(self.readable_rows())
        batches = ((chunk, None) for chunk in rows.split(batch_size))
        for views in decoded_batches(self, batches, size, None, workers, device):
            yield views[:, 0].contiguous().float() / 255


Images = ImageSet | ImageFiles


def subset(data: Images, rows: Tensor) -> Images:
    """The images that rows, int64 (M,) on any device, choose, in their order."""
    labels = None if data.labels is None else data.labels[rows.to(data.labels.device)]
    if isinstance(data, ImageSet):
        return ImageSet(data.images[rows.to(data.images.device)], labels, data.classes)
    at = rows.cpu().numpy()
    cache = data.cache and data.cache.part(at)
    return ImageFiles(data.root, data.paths[at], labels, data.classes, cache=cache)


def only_readable(data: Images, workers: int) -> Images:
    """The images that can be read. Decodes all, where they are streamed, and names the others."""
    if isinstance(data, ImageSet):
        return data
    part = shard(data)
    batches = part.batches(1, REQUEST_IMAGES, torch.device("cpu"), workers)
    for _ in progress_bar(batches, "reading", math.ceil(len(part) / REQUEST_IMAGES)):
        pass
    record_unreadable_of_shard(part, data)
    return subset(data, torch.from_numpy(data.readable_rows()))


def agree_on_unreadable(data: Images) -> None:
    """Of several processes each takes note of what the others could not read."""
    if world_size() > 1 and isinstance(data, ImageFiles):
        data.record_unreadable(all_gather_dicts(data.unreadable), data.max_bad)


def files_digest(data: Images) -> str:
    """SHA-256 of the names of the images' files and their labels; "" where they have no files."""
    if data.paths is None:
        return ""
    found = hashlib.sha256(b"\0".join(data.paths.tolist()))
    if data.labels is not None:
        found.update(data.labels.cpu().numpy().astype("<i8"))
    return found.hexdigest()


def image_names(data: Images) -> list[str]:
    """How an image is named in a list: by its path, or where there is none by its index."""
    if data.paths is None:
        return [str(i) for i in range(len(data))]
    return [os.fsdecode(path) for path in data.paths]


LONGEST_ASPECT = 4  # the ends of longer images are cut off before they are resized


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


def load_images(dataset: str, split: str, data_dir: str | Path = "data") -> Images:
    """One split of a data set.

    dataset: one of DATASETS. split: "pretrain" (what is trained on without labels: the training
    images, on STL-10 with the unlabelled ones), "train" (the labelled training images) or "test".
    data_dir: where downloads go and are looked for; for "folder" the user's own folder.

    Returns an ImageSet, or for folders of large or mixed sizes an ImageFiles. A folder without
    test images gives an empty one for "test". Raises InputError for an unknown name, files that
    are missing and cannot be downloaded, an empty or missing folder, or an unreadable image.
    """
    return load_splits(dataset, (split,), data_dir)[0]


def load_splits(dataset: str, splits: Sequence[str], data_dir: str | Path = "data") -> list[Images]:
    """Several splits of a data set, see load_images(); a folder is gone through once for all."""
    if dataset not in DATASETS:
        raise InputError(f"unknown data set {dataset!r}; there are {', '.join(DATASETS)}")
    for split in splits:
        if split not in SPLITS:
            raise InputError(f"unknown split {split!r}; there are {', '.join(SPLITS)}")
    if dataset == "digits":
        return [_load_digits(split) for split in splits]
    if dataset == "folder":
        with errors_as_input_error(f"cannot read {data_dir}", through=(InputError,)):
            return _load_folder(Path(data_dir), splits)
    return [_load_torchvision(dataset, split, Path(data_dir)) for split in splits]


def class_balanced_order(labels: np.ndarray, seed: int = 0) -> list[np.ndarray]:
    """For each class, in order of its number, the shuffled indices of its images."""
    random = np.random.default_rng(seed)
    return [random.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]


def split_held_out(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A fixed split, the same share of every class: sorted indices for (training, testing)."""
    test = np.concatenate(
        [rows[: round(HELD_OUT * len(rows))] for rows in class_balanced_order(labels)]
    )
    return np.setdiff1d(np.arange(len(labels)), test), np.sort(test)


def _load_digits(split: str) -> ImageSet:
    """scikit-learn's 1,797 real scans of handwritten digits, 8 x 8 in 17 greys, to 16 px RGB."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    indices = np.arange(len(digits.target))
    train, test = train_test_split(
        indices, test_size=HELD_OUT, stratify=digits.target, random_state=0
    )
    rows = np.sort(test if split == "test" else train)
    grey = torch.from_numpy(digits.images[rows]).float()[:, None] / digits.images.max()
    grey = F.interpolate(grey, size=16, mode="bilinear")  # (N, 1, 16, 16)
    labels = torch.from_numpy(digits.target[rows]).long()
    return ImageSet(to_uint8(grey).repeat(1, 3, 1, 1), labels, tuple("0123456789"))


def _load_torchvision(dataset: str, split: str, root: Path) -> ImageSet:
    train = split != "test"
    part = {"pretrain": "train+unlabeled", "train": "train", "test": "test"}[split]
    makers: dict[str, Callable[[], Any]] = {
        "cifar10": lambda: tv_datasets.CIFAR10(root, train=train, download=True),
        "cifar100": lambda: tv_datasets.CIFAR100(root, train=train, download=True),
        "svhn": lambda: tv_datasets.SVHN(root, "train" if train else "test", download=True),
        "fashion-mnist": lambda: tv_datasets.FashionMNIST(root, train=train, download=True),
        "stl10": lambda: tv_datasets.STL10(root, split=part, download=True),
    }
    new = not os.path.exists(root)
    try:
        with one_at_a_time(root), contextlib.redirect_stdout(sys.stderr), safe_extraction():
            return _image_set(dataset, makers[dataset]())
    except Exception as error:  # there is no end to what damaged files raise
        if new:  # leave no empty folders behind
            for folder, _, _ in os.walk(root, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(folder)
        reason = " ".join(str(error).split())
        raise InputError(
            f"{dataset} could not be read from or downloaded to {root.absolute()} ({reason}). "
            f"Without a network, put {_expected_files(dataset)} there"
        ) from error


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Inside, no other process downloads to the folder: whoever comes waits. It is made if need be.

    Where it cannot be written, or there are no such locks, nobody waits, nor downloads.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, ImportError):
            import fcntl

            folder.mkdir(parents=True, exist_ok=True)
            path = folder / ".lock"
            while True:
                lock = stack.enter_context(open(path, "a", encoding="utf-8"))
                fcntl.flock(lock, fcntl.LOCK_EX)
                if same_file(lock.fileno(), path):  # else whoever had it has just deleted it
                    break
            stack.callback(_remove, path)
        yield


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


@contextlib.contextmanager
def safe_extraction() -> Iterator[None]:
    """Inside, a tar archive cannot write outside of its folder, which Python allows before 3.14."""
    before = vars(tarfile.TarFile).get("extraction_filter")
    safe = getattr(tarfile, "data_filter", None)  # early releases of Python 3.11 have none
    tarfile.TarFile.extraction_filter = safe and staticmethod(safe)
    try:
        yield
    finally:
        tarfile.TarFile.extraction_filter = before


def _image_set(dataset: str, source: Any) -> ImageSet:
    """What torchvision read. Raises ValueError if the labels are not those of the images."""
    images = torch.as_tensor(source.data)
    if dataset in ("cifar10", "cifar100"):
        images = images.permute(0, 3, 1, 2)  # (N, H, W, 3) -> (N, 3, H, W)
    if dataset == "fashion-mnist":
        images = images[:, None].repeat(1, 3, 1, 1)  # grey -> RGB
    labels = torch.as_tensor(getattr(source, "targets", getattr(source, "labels", None))).long()
    classes = tuple(getattr(source, "classes", None) or "0123456789")
    if labels.shape != (len(images),) or not len(images):
        raise ValueError(f"it has {len(images)} images and labels of shape {tuple(labels.shape)}")
    if dataset == "stl10" and (labels < 0).any():  # it marks unlabelled images by -1
        return ImageSet(images.contiguous(), None, classes)
    if labels.min() < 0 or labels.max() >= len(classes):
        raise ValueError(
            f"its labels are {labels.min()} to {labels.max()} of {len(classes)} classes"
        )
    return ImageSet(images.contiguous(), labels, classes)


def _expected_files(dataset: str) -> str:
    return {
        "cifar10": f"{tv_datasets.CIFAR10.filename} or the folder cifar-10-batches-py",
        "cifar100": f"{tv_datasets.CIFAR100.filename} or the folder cifar-100-python",
        "svhn": "train_32x32.mat and test_32x32.mat",
        "fashion-mnist": "FashionMNIST/raw with its four ubyte files",
        "stl10": f"{tv_datasets.STL10.filename} or the folder stl10_binary",
    }[dataset]


# ---------------------------------------------------------------------- data sets: one's own images


def list_images(root: Path) -> list[str]:
    """Names, relative to `root` and sorted, of all image files below it, by their ending.

    Long lists are kept in the user's cache and are read from there as long as no folder below
    `root` has changed: adding, removing or renaming a file changes the time of its folder.
    """
    if (known := _known_list(root)) is not None:
        return known
    started, folders = time.time_ns(), {}
    names = sorted(_walk_images(root, folders))
    if len(names) >= LONG_LIST:
        _keep_list(root, names, folders, started)
    return names


LONG_LIST = 10_000  # files: from here on their names are kept
SETTLED = 2 * 10**9  # ns: within them a folder could change twice without another time


def _list_file(root: Path) -> Path:
    """Where the names below `root` are kept: in $XDG_CACHE_HOME/simclr, or ~/.cache/simclr."""
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    home = home if home.is_absolute() else Path.home() / ".cache"
    key = os.fsencode(os.path.realpath(root)) + _suffixes().encode()
    name = hashlib.sha256(key).hexdigest()[:32]
    return home / "simclr" / f"{name}.npz"


def _stamp(folder: str | Path) -> tuple[int, int]:
    """By which a folder that was changed, or another in its place, is known."""
    status = os.stat(folder)
    return status.st_mtime_ns, status.st_ino


def _keep_list(
    root: Path, names: list[str], folders: dict[str, tuple[int, int]], started: int
) -> None:
    """Keep the names for the next run, if they can be kept. folders: each with its stamp."""
    if max(changed for changed, _ in folders.values()) > started - SETTLED:
        return
    buffer = io.BytesIO()
    np.savez(
        buffer,
        names=np.array([os.fsencode(name) for name in names]),
        folders=np.array([os.fsencode(folder) for folder in folders]),
        stamps=np.array([b"%d %d" % stamp for stamp in folders.values()]),
    )
    with contextlib.suppress(InputError, RuntimeError):  # no home, no room: it is walked again
        write_atomically(_list_file(root), buffer.getbuffer())


def _known_list(root: Path) -> list[str] | None:
    """The names that were kept, if all folders are as they were."""
    try:
        with np.load(_list_file(root), allow_pickle=False) as kept:
            folders = [os.fsdecode(folder) for folder in kept["folders"]]
            stamps = np.array([b"%d %d" % _stamp(root / folder) for folder in folders])
            if np.array_equal(stamps, kept["stamps"]):
                return [os.fsdecode(name) for name in kept["names"]]
    except Exception:  # there is none, it is damaged, or a folder is gone
        return None
    return None


def _walk_images(root: Path, stamps: dict[str, tuple[int, int]] | None = None) -> Iterator[str]:
    """Linked folders are followed, each real folder once, so that a loop of links ends.

    stamps: takes each folder's, by its name relative to `root`. Raises InputError for a folder
    that cannot be read: its images would be missed in silence.
    """

    def refuse(error: OSError) -> NoReturn:
        raise InputError(f"cannot read the folder {error.filename} ({error.strerror})") from error

    seen: set[tuple[int, int]] = set()
    for folder, subfolders, files in os.walk(root, onerror=refuse, followlinks=True):
        try:
            status = os.stat(folder)
        except OSError as error:
            refuse(error)
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        place = os.path.relpath(folder, root)
        if stamps is not None:
            stamps[place] = (status.st_mtime_ns, status.st_ino)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        below = "" if place == os.curdir else place + os.sep
        for name in files:
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith("."):
                yield below + name


def why_unlabelled(paths: Sequence[str], classes: Sequence[str] = ()) -> str:
    """What keeps files from being labelled by the layout `<class>/<file>`; "" if nothing does.

    paths: file names relative to the folder. classes: those there are, if they are known; without,
    there must be at least two.
    """
    outside = [path for path in paths if path.count(os.sep) != 1]
    if len(outside) == len(paths):
        return "the images do not lie in class folders"
    if outside:
        more = f", and {len(outside) - 1:,} more" if len(outside) > 1 else ""
        return f"{outside[0]} lies outside the class folders{more}"
    if not classes and len({path.split(os.sep)[0] for path in paths}) < 2:
        return "there is only one folder of images"
    return ""


def folder_labels(
    paths: Sequence[str], classes: Sequence[str] = ()
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Labels from the layout `<class>/<file>`, or None where the files are not laid out so.

    paths and classes: as in why_unlabelled(). Returns (int64 (N,) or None, the classes, in whose
    order they are numbered). Raises InputError for a class that is not one of those known.
    """
    if why_unlabelled(paths, classes):
        return None, ()
    names = [path.split(os.sep)[0] for path in paths]
    found = sorted(set(names))
    unknown = sorted(set(found) - set(classes or found))
    if unknown:
        raise InputError(f"has classes that are not among those to learn from: {unknown}")
    number = {name: i for i, name in enumerate(classes or found)}
    return np.array([number[name] for name in names]), tuple(number)


def split_folders(root: Path) -> tuple[Path, Path | None]:
    """Where the images to learn from and those for testing lie; the root if there are no splits.

    train/ is a split if test/ or val/ lies beside it or folders inside it; else it is a class. Of
    test/ and val/ the first is taken that has images.
    """
    train, tests = root / "train", [root / name for name in ("test", "val")]
    has_folders = train.is_dir() and any(entry.is_dir() for entry in os.scandir(train))
    if not train.is_dir() or not (has_folders or any(test.is_dir() for test in tests)):
        return root, None
    return train, next((t for t in tests if t.is_dir() and any(_walk_images(t))), None)


def _load_folder(root: Path, splits: Sequence[str]) -> list[Images]:
    """`root/train/…` with `root/test` or `root/val`, `root/<class>/…`, or any tree of images."""
    if not os.path.isdir(root):
        raise InputError(f"--data-dir {root} is not a folder")
    folder, test = split_folders(root)
    paths = list_images(folder)
    if not paths:
        raise InputError(f"no images in {folder} (looked for {_suffixes()})")
    labels, classes = folder_labels(paths)
    if folder == root:  # no splits: hold some images of each class out
        train_rows, test_rows = np.arange(len(paths)), np.arange(0)
        if labels is not None:
            train_rows, test_rows = split_held_out(labels)
        found = []
        for split in splits:
            rows = test_rows if split == "test" else train_rows
            own = None if labels is None else labels[rows]
            found.append(_read_folder(folder, [paths[i] for i in rows], own, classes))
        return found
    return [
        _load_test(test, root, classes)
        if split == "test"
        else _read_folder(folder, paths, labels, classes)
        for split in splits
    ]


def _load_test(folder: Path | None, root: Path, classes: tuple[str, ...]) -> Images:
    """The split for testing. classes: those of the training images, if they have any."""
    paths = list_images(folder) if folder else []
    try:
        labels, classes = folder_labels(paths, classes)
    except InputError as error:
        raise InputError(f"{folder} {error}") from None
    return _read_folder(folder or root, paths, labels, classes)


def _suffixes() -> str:
    return " ".join(sorted(IMAGE_SUFFIXES))


def _read_folder(
    root: Path, paths: list[str], labels: np.ndarray | None, classes: tuple[str, ...]
) -> Images:
    """In memory if all images are small and of one size, otherwise to be streamed."""
    targets = None if labels is None else torch.from_numpy(labels)
    if not paths:
        return ImageSet(torch.empty(0, 3, 1, 1, dtype=torch.uint8), None, classes)
    names = np.array([os.fsencode(path) for path in paths])
    if not _fits_in_memory(root, paths):
        return ImageFiles(root, names, targets, classes)
    with ThreadPoolExecutor() as pool:  # PIL decodes without holding Python's lock
        decoded = pool.map(lambda path: read_image(root / path), paths)
        bar = progress_bar(decoded, f"reading {root}", len(paths))
        images = torch.stack(list(bar))
    return ImageSet(images, targets, classes, names)


def _fits_in_memory(root: Path, paths: list[str]) -> bool:
    """Whether all images have one small size: reads headers, and stops at the first that differs.

    The size is the stored one; an EXIF rotation of square images does not change it, and others
    that are rotated make the set one of mixed sizes.
    """
    common = None
    for path in paths:
        try:
            size = image_size(root / path)
        except InputError:  # streaming can do without it, and reading all of them names it
            continue
        common = common or size
        if size != common or max(size) > MEMORY_SIDE:
            return False
        if 3 * common[0] * common[1] * len(paths) > MEMORY_BYTES:
            return False
    return True


_IMAGE_WIDTH, _IMAGE_LENGTH, _ORIENTATION = 0x0100, 0x0101, 0x0112  # TIFF and EXIF tags
_TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_UPRIGHT = {  # EXIF orientation -> what makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8. What cannot be read, or is no orientation, counts as 1: upright."""
    try:
        value = image.getexif().get(_ORIENTATION)
    except Exception:  # badly written EXIF makes PIL raise nearly anything
        return 1
    return value if isinstance(value, int) and value in _UPRIGHT else 1


_OPENING = threading.Lock()  # warnings.catch_warnings() is not for several threads


@contextlib.contextmanager
def _errors_naming_file(path: str | Path) -> Iterator[None]:
    """What PIL raises of a file, nearly any type, becomes an InputError that names it."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise InputError(f"cannot read the image {path} ({reason})") from error


class Photo:
    """An image file whose header has been read, and no more. Raises InputError if it cannot be.

    height, width: in pixels as displayed. Use it in a `with`, which closes the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        with _errors_naming_file(path):
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
                raise OSError("it is not a file")
            self.bytes = status.st_size
            with _OPENING, warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                self.image = Image.open(path)
            tags = getattr(self.image, "tag_v2", {})  # of a TIFF, whose size PIL may have turned
            self.width = tags.get(_IMAGE_WIDTH, self.image.width)
            self.height = tags.get(_IMAGE_LENGTH, self.image.height)
            self.orientation = _orientation(self.image)
            if self.orientation in _TRANSPOSED:
                self.width, self.height = self.height, self.width

    def __enter__(self) -> Photo:
        return self

    def __exit__(self, *_: object) -> None:
        self.image.close()

    def pixels(self, least: float = 1) -> Tensor:
        """Decode it, once: uint8 RGB (3, H, W), with the channels last in memory.

        least: the share of the size that is enough. A JPEG is decoded at 1/8, 1/4 or 1/2 if that
        is as much: the decoder then averages blocks of pixels and saves most of its arithmetic.
        """
        image = self.image
        with _errors_naming_file(self.path):
            shrink = next((s for s in (8, 4, 2) if s * least <= 1), 1)
            if shrink > 1:  # other formats than JPEG take no notice
                image.draft(image.mode, (image.width // shrink, image.height // shrink))
            elif (pixels := self._plain_jpeg()) is not None:
                return pixels
            image.load()  # some formats turn the image, and drop the tag, while decoding
            orientation = _orientation(image)
            if orientation != 1:
                image = image.transpose(_UPRIGHT[orientation])
            if image.mode.startswith("I"):  # 16 bits in one channel; convert() cuts off at 255
                grey = np.asarray(image, dtype=np.float32) * (255 / 65535)
                image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
            if image.has_transparency_data:
                rgba = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
            pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def _plain_jpeg(self) -> Tensor | None:
        """What PIL would decode of a JPEG that needs no more, in four fifths of the time.

        None for other files, and those that torchvision's decoder does not take.
        """
        image = self.image
        plain = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")
        alone = threading.current_thread() is threading.main_thread()  # as _silent() needs it
        if (
            not (decode_jpeg and plain and alone)
            or self.orientation != 1
            or self.bytes > JPEG_BYTES
        ):
            return None
        content = torch.empty(self.bytes, dtype=torch.uint8)
        image.fp.seek(0)
        image.fp.readinto(content.numpy())
        try:
            with _silent():
                pixels = decode_jpeg(content, ImageReadMode.RGB)  # (3, H, W)
        except RuntimeError:
            return None
        return pixels if pixels.shape[1:] == (self.height, self.width) else None

    def center(self, out: Tensor) -> None:
        """center_view() of it. out: uint8 (1, size, size, 3), takes it."""
        size = out.shape[1]
        pixels = self.pixels(size / min(self.height, self.width))
        out.copy_(to_uint8(center_view(pixels[None], size)).permute(0, 2, 3, 1))

    def crops(self, out: Tensor, boxes: np.ndarray) -> None:
        """Parts of it, resized, from one decoding. out: uint8 (V, size, size, 3), takes them.

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


JPEG_BYTES = 2**26  # in memory at once; PIL reads a larger file piece by piece


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Inside, stderr leads nowhere: libjpeg writes there what it thinks of a damaged file.

    Not for several threads: there is one stderr.
    """
    try:
        kept = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) in pixels as displayed, from the header alone. InputError if unreadable."""
    with Photo(path) as photo:
        return photo.height, photo.width


def read_image(path: Path) -> Tensor:
    """Decode any image file to uint8 RGB (3, H, W).

    EXIF orientation is applied, transparency is put on white, 16-bit grey is scaled to 8 bits,
    of an animation the first frame is taken. Raises InputError naming the file if it cannot be
    read or has more than PIL's Image.MAX_IMAGE_PIXELS, 89 million: a small file may claim any size.
    """
    with Photo(path) as photo:
        return photo.pixels().contiguous()


# ------------------------------------------------------------------- data sets: decoding only once

CACHES = ("none", "memory", "file")
SHARED_MEMORY = Path("/dev/shm")  # a folder in memory, where there is one (Linux)


@dataclass
class PixelCache:
    """Decoded images, kept in one file that all processes of a machine map into their memory.

    path: the file. sizes: int64 (N, 2) height and width in pixels as displayed, 0 of files that
    cannot be read. starts: int64 (N,) where in the file the (H, W, 3) bytes of each lie. marks:
    int64 (N,) where its one byte lies that is 1 when they are there.

    Where the file is gone (logging out may clear /dev/shm) each image is decoded as if for the
    first time: a run is slower without its cache, and otherwise the same.
    """

    path: Path
    sizes: np.ndarray
    starts: np.ndarray
    marks: np.ndarray

    def part(self, rows: np.ndarray) -> PixelCache:
        """The same for some of the images: a Job brings the numbers of its own, not of millions."""
        return PixelCache(self.path, self.sizes[rows], self.starts[rows], self.marks[rows])

    def has(self, index: int) -> bool:
        content = _mapped(self.path)
        return content is not None and content[self.marks[index]] == 1

    def pixels(self, index: int) -> Tensor:
        """The image that it has: uint8 (3, H, W), a view of the file, with the channels last."""
        height, width = self.sizes[index].tolist()
        start = int(self.starts[index])
        flat = _mapped(self.path)[start : start + 3 * height * width]
        return torch.from_numpy(flat).view(height, width, 3).permute(2, 0, 1)

    def keep(self, index: int, pixels: Tensor) -> None:
        """Take uint8 (3, H, W), unless the file has become one of another size."""
        if _mapped(self.path) is not None and [*pixels.shape[1:]] == self.sizes[index].tolist():
            self.pixels(index).copy_(pixels)
            _mapped(self.path)[self.marks[index]] = 1  # last: a process may be killed before


@functools.lru_cache(maxsize=4)
def _mapped(path: Path) -> np.ndarray | None:
    """The bytes of the file, uint8, or None if it is gone."""
    try:
        return np.memmap(path, np.uint8, "r+").view(np.ndarray)
    except OSError:
        return None


def cache_pixels(data: Images, kind: str) -> None:
    """From now on decode each file of `data` once, and keep the whole image. Not of an ImageSet.

    kind: one of CACHES, "memory" for SHARED_MEMORY, "file" for the folder of the lists of files.
    What is kept there ends with the run. Raises InputError where there is not the room for all,
    and on Windows, where a file that is mapped cannot be deleted, so it would stay.
    """
    if kind == "none" or isinstance(data, ImageSet):
        return
    if os.name == "nt":
        raise InputError(f"--cache {kind} is not for Windows; say --cache none")
    if kind == "memory" and not SHARED_MEMORY.is_dir():
        raise InputError(f"--cache memory needs {SHARED_MEMORY}, which is not here; --cache file?")
    with errors_as_input_error(
        f"--cache {kind}: cannot keep decoded images", through=(InputError,)
    ):
        place = SHARED_MEMORY if kind == "memory" else _list_file(data.root).parent
        sizes = _measured(data)
        starts = np.cumsum(3 * sizes.prod(1))  # where each ends
        end = int(starts[-1])
        starts -= 3 * sizes.prod(1)
        # of this run alone, also where machines share the folder and count processes alike
        known = [platform.node(), os.path.realpath(data.root), files_digest(data)]
        digest = hashlib.sha256("\n".join(known).encode(errors="surrogateescape") + sizes.tobytes())
        run = os.getppid() if rank_info().size > 1 else os.getpid()
        path = place / f"pixels-{run}-{digest.hexdigest()[:32]}"
        place.mkdir(parents=True, exist_ok=True)
        _remove_unused(place, but=path)
        while not _reserved(path, end + len(data), kind):
            pass
    data.cache = PixelCache(path, sizes, starts, end + np.arange(len(data)))


def _measured(files: ImageFiles) -> np.ndarray:
    """The size of each image, from its header: int64 (N, 2) height and width, 0 if unreadable."""

    def measure(rows: Tensor) -> list[tuple[int, int]]:
        sizes = []
        for row in rows.tolist():
            try:
                sizes.append(image_size(files.path(row)))
            except InputError:  # whoever needs its pixels says so
                sizes.append((0, 0))
        return sizes

    parts = shard_indices(len(files)).split(256)
    with ThreadPoolExecutor() as pool:  # they wait for the disk
        found = [*progress_bar(pool.map(measure, parts), "measuring", len(parts))]
    return all_gather_rows(torch.tensor([*itertools.chain(*found)]), len(files)).numpy()


def _reserved(path: Path, size: int, kind: str) -> bool:
    """Make a file of so many bytes, unless another process of this run has; hold it to the end.

    Returns False if somebody has removed it meanwhile. Raises InputError where there is no room:
    at once for all, as a process ends without a word when a mapped file finds none later.
    """
    file = open(path, "a+b", opener=functools.partial(os.open, mode=0o600))  # noqa: SIM115
    try:
        alone = _flock(file, alone=True) is not False
        if alone and same_file(file.fileno(), path) and os.path.getsize(path) != size:
            _check_room(path.parent, size, kind)
            tqdm.write(f"keeping {gib(size)} of decoded images in {path.parent}", file=sys.stderr)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            file.truncate(size)
        _flock(file, alone=False)  # waits for the process that is making it
        if same_file(file.fileno(), path) and os.path.getsize(path) == size:
            atexit.register(_let_go, file, path)
            os.register_at_fork(after_in_child=file.close)  # a worker may outlive a killed run
            return True
    except BaseException:
        _let_go(file, path)
        raise
    file.close()
    return False


def _let_go(file: IO, path: Path) -> None:
    """Close the file; the last process that holds it deletes it."""
    with contextlib.suppress(OSError), file:
        if _flock(file, alone=True) is not False and same_file(file.fileno(), path):
            path.unlink()


def _remove_unused(place: Path, but: Path) -> None:
    """Delete what killed runs have left. Not their process ids tell: they may be another host's."""
    for path in {*place.glob("pixels-*")} - {but}:
        with contextlib.suppress(OSError), open(path, "r+b") as file:
            if _flock(file, alone=True):
                path.unlink()


def _flock(file: IO, alone: bool) -> bool | None:
    """Hold the file together with others, waiting for one that is alone; or alone, if possible.

    Returns whether it is held; None where the file system has no such locks.
    """
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _check_room(place: Path, size: int, kind: str) -> None:
    """Raise InputError if the folder, or the memory, has no room for `size` bytes."""
    free = shutil.disk_usage(place).free
    hint = "make room there, name another place in XDG_CACHE_HOME, or say --cache none"
    if kind == "memory":
        free = min(free, MEMORY_SHARE * free_memory())
        hint = "--cache file keeps them on the disk"
    if size > free:
        raise InputError(
            f"--cache {kind}: the decoded images take {gib(size)}, but {place} has room for "
            f"{gib(free)}; {hint}"
        )


MEMORY_SHARE = 0.8  # of the memory that is free: a run needs some itself


class CachedPhoto(Photo):
    """A Photo that is decoded in whole, the first time; after that no file is opened.

    The first time is as any other: views must not depend on what happens to be there already.
    """

    def __init__(self, path: str | Path, cache: PixelCache, index: int) -> None:
        self.cache, self.index = cache, index
        self.opened = not cache.has(index)
        if self.opened:
            super().__init__(path)
        else:
            self.path = path
            self.height, self.width = cache.sizes[index].tolist()

    def __exit__(self, *_: object) -> None:
        if self.opened:
            super().__exit__()

    def pixels(self, least: float = 1) -> Tensor:
        del least  # a smaller decoding would serve these boxes, and not the next ones
        if not self.cache.has(self.index):
            pixels = super().pixels()
            self.cache.keep(self.index, pixels)
            return pixels
        return self.cache.pixels(self.index)


# ------------------------------------------------------------------ data sets: decoding in parallel

# (sizes int64 (N, 2) height and width, argument of each image (N, …)) -> boxes int (N, V, 4)
Boxes = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass
class DecodeRequest:
    """Some files to decode. boxes: what to crop of each, None: its center_view(), one view."""

    root: Path
    paths: np.ndarray  # bytes (N,)
    size: int
    boxes: Boxes | None
    arguments: np.ndarray | None  # (N, …) for boxes
    cache: PixelCache | None = None

    def __call__(self) -> tuple[Tensor, dict[int, str]]:
        """uint8 (M, V, size, size, 3) of the files that can be read; position -> why not."""
        photos, bad = {}, {}
        with contextlib.ExitStack() as stack:
            for i in range(len(self.paths)):
                try:
                    photos[i] = stack.enter_context(self.photo(i))
                except InputError as error:  # raised, it would arrive wrapped in a traceback
                    bad[i] = str(error)
            boxes = np.empty((len(photos), 1, 0))
            if self.boxes and photos:  # of all at once: those of one image take as long
                sizes = np.array([(photo.height, photo.width) for photo in photos.values()])
                boxes = self.boxes(sizes, self.arguments[[*photos]])
            views = torch.empty(*boxes.shape[:2], self.size, self.size, 3, dtype=torch.uint8)
            done = 0
            for (i, photo), parts in zip(photos.items(), boxes, strict=True):
                try:
                    with photo, _errors_naming_file(photo.path):
                        photo.crops(views[done], parts) if self.boxes else photo.center(views[done])
                    done += 1
                except InputError as error:
                    bad[i] = str(error)
        return views[:done], bad

    def photo(self, i: int) -> Photo:
        path = os.path.join(str(self.root), os.fsdecode(self.paths[i]))
        return CachedPhoto(path, self.cache, i) if self.cache else Photo(path)


REQUEST_IMAGES = (
    64  # that a worker decodes at a time: so a batch of thousands is not one's in whole
)


class _Jobs(Dataset):
    """The DataLoader's data set, of which every job is an item, and its sampler, which names them.

    So its processes live on from epoch to epoch, know of no list of files, and each job brings all
    that it needs.
    """

    def __init__(self) -> None:
        self.jobs: Iterator[DecodeRequest] = iter(())

    def __getstate__(self) -> dict:
        return {}  # processes that are not forked get a copy: the jobs stay here

    def __iter__(self) -> Iterator[DecodeRequest]:
        return self.jobs

    def __getitem__(self, job: DecodeRequest) -> tuple[Tensor, dict[int, str]]:
        return job()


def _become_worker(_: int) -> None:
    """Signals to all processes of a run are for the main one, which ends the others."""
    for name in StopSignals._NAMES:
        if number := getattr(signal, name, None):
            signal.signal(number, signal.SIG_IGN)


_idle: dict[tuple[int, bool], DataLoader] = {}  # with their processes, which wait for work
_iterators: weakref.WeakSet[Any] = weakref.WeakSet()  # of all that have processes


def in_workers(
    jobs: Iterator[DecodeRequest], workers: int, pin: bool
) -> Iterator[tuple[Tensor, dict[int, str]]]:
    """What the jobs give, in order, done by as many processes; by this one for 0.

    The processes are kept for the next call. pin: into page-locked memory, for copies to a GPU.
    Raises InputError if a process dies.
    """
    if not workers:
        yield from (job() for job in jobs)
        return
    kind = (workers, pin)
    loader = _idle.pop(kind, None)
    if loader is None:
        items = _Jobs()
        loader = DataLoader(
            items, batch_size=None, sampler=items, num_workers=workers, pin_memory=pin,
            worker_init_fn=_become_worker, persistent_workers=True,
        )  # fmt: skip
    loader.sampler.jobs = jobs
    iterator = iter(loader)
    _iterators.add(iterator)
    atexit.unregister(_end_workers)
    atexit.register(_end_workers)  # the last that is registered is called first: before torch's own
    try:
        yield from iterator
    except GeneratorExit:  # left early, as where a run is saved: the next call drops what is left
        _idle[kind] = loader
        raise
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        reason = one_line(str(error), 300)
        raise InputError(f"a process that decodes images died: {reason}") from error
    _idle[kind] = loader


def _end_workers() -> None:
    """Those, too, that an exception on its way out still holds: they would be waited for."""
    for iterator in [*_iterators]:
        iterator._shutdown_workers()


def decoded_batches(
    files: ImageFiles,
    batches: Iterable[tuple[Tensor, np.ndarray | None]],
    size: int,
    boxes: Boxes | None,
    workers: int,
    device: torch.device,
) -> Iterator[Tensor]:
    """Decode and crop files in worker processes, in order.

    Yields uint8 (N, V, 3, size, size) a batch, on `device`, with the channels last in memory.
    batches: for each batch rows of `files`, int64 (N,), and arguments (N, …) for `boxes`, see DecodeRequest.
    workers: processes, 0 for none; the result does not depend on them. A file that cannot be read
    is noted in files.unreadable. With boxes, where each batch needs all its images, the next
    readable file takes its place, with the same argument; without, it is left out. Raises
    InputError where the files do not allow for (more of) them.
    """
    waiting: collections.deque[tuple[Tensor, np.ndarray | None]] = collections.deque()
    root = files.root.absolute()  # the workers may have begun in another folder

    def job(rows: Tensor, arguments: np.ndarray | None) -> DecodeRequest:
        at = rows.numpy()
        cache = files.cache and files.cache.part(at)
        return DecodeRequest(root, files.paths[at], size, boxes, arguments, cache)

    def parts(rows: Tensor, arguments: np.ndarray | None) -> Iterator[Any]:
        for i in range(0, len(rows), REQUEST_IMAGES):
            part = slice(i, i + REQUEST_IMAGES)
            yield rows[part], None if arguments is None else arguments[part]

    def jobs() -> Iterator[DecodeRequest]:
        for batch in batches:
            waiting.append(batch)
            yield from (job(*part) for part in parts(*batch))

    def another(row: int, argument: np.ndarray) -> Tensor:
        for other in itertools.chain(range(row + 1, len(files)), range(row)):
            if other in files.unreadable:
                continue
            views, bad = job(torch.tensor([other]), argument[None])()
            if not bad:
                return views[0]
            files.record_unreadable({other: bad[0]}, files.max_bad)
        raise InputError("none of the images can be read")

    def mended(part: tuple[Tensor, Any], result: tuple[Tensor, dict[int, str]]) -> Tensor:
        (rows, arguments), (views, bad) = part, result
        if bad:
            most = files.max_bad if boxes else math.ceil(files.max_bad)  # all, but for 0
            files.record_unreadable({int(rows[i]): why for i, why in bad.items()}, most)
        if bad and boxes:
            read = iter(views)
            whole = [another(int(rows[i]), arguments[i]) if i in bad else next(read)
                     for i in range(len(rows))]  # fmt: skip
            views = torch.stack(whole)
        return views.to(device, non_blocking=True)  # as bytes, and with the channels last

    with contextlib.closing(in_workers(jobs(), workers, pin=device.type == "cuda")) as done:
        for first in done:
            results = zip(parts(*waiting.popleft()), itertools.chain([first], done), strict=False)
            pieces = [piece for piece in itertools.starmap(mended, results) if len(piece)]
            if pieces:
                yield torch.cat(pieces).permute(0, 1, 4, 2, 3)


# ------------------------------------------------------------------------------------- embedding


@torch.no_grad()
def embed(
    encoder: Callable[[Tensor], Tensor],
    data: Images,
    size: int,
    device: torch.device,
    precision: str = "float32",
    batch_size: int = 512,
    workers: int = 0,
    title: str = "",
) -> Tensor:
    """Features of every image, in order, without augmentation: float32 (N, D) on `device`.

    encoder: float (B, 3, size, size) in [0, 1] -> (B, D). A module is put in eval mode (BatchNorm
    uses its running statistics and does not move) and back. batch_size: of images of 224 px;
    larger ones go in smaller batches. title: of a progress bar, if any. Several processes embed a
    share each, and all get all features. Raises InputError if no image can be read.
    """
    features, part = [], shard(data)
    batch_size = max(1, min(batch_size, batch_size * 224**2 // size**2))
    with evaluating(encoder):
        batches = part.batches(size, batch_size, device, workers)
        steps = math.ceil(len(part) / batch_size)
        for images in progress_bar(batches, title, steps):
            images = images.contiguous(memory_format=torch.channels_last)  # noqa: PLW2901
            with autocast(device, precision):
                features.append(encoder(images).float())
    found = torch.cat(features) if features else torch.empty(0, 0, device=device)
    return gather_features(found, part, data)


def shard(data: Images) -> Images:
    """This process's shard_indices() of the images. Which cannot be read is judged when all are done."""
    if world_size() == 1:
        return data
    mine = shard_indices(len(data))
    part = subset(data, mine)
    if isinstance(part, ImageFiles):
        known = {
            i: data.unreadable[row] for i, row in enumerate(mine.tolist()) if row in data.unreadable
        }
        part = dataclasses.replace(part, max_bad=1.0, unreadable=known)
    return part


def record_unreadable_of_shard(part: ImageFiles, data: ImageFiles) -> None:
    """Note for the data which files cannot be read, as found in the part that each process has."""
    if part is not data:
        rows = shard_indices(len(data)).tolist()
        bad = all_gather_dicts({rows[i]: why for i, why in part.unreadable.items()})
        data.record_unreadable(
            bad, math.ceil(data.max_bad)
        )  # as one process does, see decoded_batches()


def gather_features(features: Tensor, part: Images, data: Images) -> Tensor:
    """What each process computed of its part, for all of the data: (M, D) -> (N, D).

    Where none of its images could be read, a process has (0, 0). Raises InputError if all have.
    """
    dim = all_reduce_max(features.shape[1])[0]
    if not dim:
        raise InputError("none of the images can be read")
    if isinstance(part, ImageSet) or part is data:
        return all_gather_rows(features, len(data))
    record_unreadable_of_shard(part, data)
    padded = torch.zeros(len(part), dim, device=features.device)
    padded[torch.from_numpy(part.readable_rows()).to(features.device)] = features
    return all_gather_rows(padded, len(data))[
        torch.from_numpy(data.readable_rows()).to(features.device)
    ]


@contextlib.contextmanager
def evaluating(encoder: Callable) -> Iterator[None]:
    """Inside, a module is in eval mode; afterwards each of its parts is in the mode it was in."""
    modes = [(m, m.training) for m in encoder.modules()] if isinstance(encoder, nn.Module) else []
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def flat_pixels(images: Tensor, side: int = 32) -> Tensor:
    """Raw pixels as features: (B, 3, S, S) -> (B, 3·min(S, side)²), averaged down if larger."""
    if images.shape[-1] > side:
        images = F.interpolate(images, size=side, mode="bilinear", antialias=True)
    return images.flatten(1)


# ------------------------------------------------------------------- classifiers on embeddings

_KNN_BYTES = 256 * 2**20  # bytes: the block of similarities that is held at a time


@torch.no_grad()
def nearest_neighbours(
    train_features: Tensor, test_features: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """The k training rows of largest cosine similarity to each test row, the nearest first.

    train_features (N, D), test_features (M, D), any float dtype. k is cut to N. Returns similarity
    float32 (M, k) in [-1, 1] and rows int64 (M, k). Beside the features it holds their normalised
    copies and a block of similarities of 256 MiB.
    """
    bank = F.normalize(train_features.float(), dim=1)
    queries = F.normalize(test_features.float(), dim=1)
    rows = max(1, _KNN_BYTES // (4 * len(bank)))
    blocks = [(q @ bank.T).topk(min(k, len(bank)), dim=1) for q in queries.split(rows)]
    return torch.cat([b.values for b in blocks]), torch.cat([b.indices for b in blocks])


def knn_vote(
    similarity: Tensor, neighbour_labels: Tensor, num_classes: int, temperature: float | None = None
) -> Tensor:
    """The class that most neighbours have: int64 (M,). A tie goes to the smaller class number.

    similarity (M, k), the largest first; neighbour_labels int64 (M, k). Each neighbour has one
    vote; with a temperature, exp(similarity / temperature) votes (Wu et al. 2018).
    """
    weights = torch.ones_like(similarity)
    if temperature is not None:  # the largest is subtracted so that exp cannot overflow
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
    votes = weights.new_zeros(len(similarity), num_classes)
    return votes.scatter_add_(1, neighbour_labels, weights).argmax(1)


def knn_predict(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    num_classes: int,
    k: int = 10,
    temperature: float | None = None,
) -> Tensor:
    """k-nearest-neighbour classes by cosine similarity: int64 (M,).

    train_features (N, D), train_labels int64 (N,), test_features (M, D). See nearest_neighbours()
    and knn_vote().
    """
    similarity, neighbours = nearest_neighbours(train_features, test_features, k)
    return knn_vote(similarity, train_labels[neighbours], num_classes, temperature)


class LogisticRegression:
    """Multinomial logistic regression on fixed features, for any strength of the l2 penalty.

    Minimises  mean cross-entropy + ½·l2·‖W‖²  over weight (D, K) and bias (K,), which is not
    penalised, by L-BFGS on the features' device and in their dtype. scikit-learn's C is
    1 / (l2·N). features: float (N, D). labels: int64 (N,) in [0, K).

    The solver works along the principal axes of the features, each scaled by the curvature that
    the objective has there at W = 0. That changes the path and not the minimum, and saves most of
    the steps: on 50,000 CIFAR-10 images 62 instead of 146 for a trained encoder's h, 34 instead of
    588 for an untrained one's.
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
        largest one at W = 0, or what the dtype resolves. Starts from the last solution, so going
        through many strengths costs little more than one.
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


def fit_logistic_regression(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    inverse_strength: float = 1.0,
    tolerance: float = 1e-4,
) -> tuple[Tensor, Tensor]:
    """LogisticRegression for one strength, given as scikit-learn's C: weight (D, K), bias (K,)."""
    l2 = 1 / (inverse_strength * len(features))
    return LogisticRegression(features, labels, num_classes).fit(l2, tolerance)


def principal_axes(centred: Tensor) -> tuple[Tensor, Tensor]:
    """Variances (R,) and orthonormal axes (D, R) of rows (N, D) of mean 0, R = min(N, D)."""
    n, dim = centred.shape
    if n < dim:
        _, singular, axes = torch.linalg.svd(centred, full_matrices=False)
        return singular.square() / n, axes.mT
    variances, axes = torch.linalg.eigh(centred.mT @ centred / n)
    return variances.clamp(min=0), axes


# 45 strengths from 1e-6 to 1e5 in equal ratios, as in the paper (Appendix B.8), the largest first
L2_STRENGTHS = tuple(10 ** (5 - 11 * i / 44) for i in range(45))


@dataclass
class LinearClassifier:
    """Logits of a representation: features (B, D) -> (B, K). l2: the strength that was chosen."""

    weight: Tensor  # (D, K)
    bias: Tensor  # (K,)
    l2: float

    def __call__(self, features: Tensor) -> Tensor:
        return features @ self.weight + self.bias


def fit_linear_classifier(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    strengths: Sequence[float] = L2_STRENGTHS,
    after_fit: Callable[[], Any] = lambda: None,
) -> LinearClassifier:
    """The linear evaluation: logistic regression on frozen features, its penalty chosen fairly.

    features: float (N, D), standardised here. labels: int64 (N,). strengths: from strong to weak;
    the one that is most accurate on a class-balanced fifth of these rows, held out, is used to fit
    all of them; of equals the strongest. Nothing else is looked at. after_fit: called after each.
    """
    mean, std = standardization(features)
    x = (features - mean) / std
    fit_rows, held_out = (
        torch.from_numpy(rows).to(x.device) for rows in split_held_out(labels.cpu().numpy())
    )
    # where no class has enough images to hold one out: scikit-learn's C = 1
    best, chosen = -1.0, strengths[0] if len(strengths) == 1 else 1 / len(x)
    if len(held_out) and len(strengths) > 1:
        search = LogisticRegression(x[fit_rows], labels[fit_rows], num_classes)
        for l2 in strengths:
            weight, bias = search.fit(l2, SEARCH_TOLERANCE)
            score = accuracy((x[held_out] @ weight + bias).argmax(1), labels[held_out])
            if score > best:
                best, chosen = score, l2
            after_fit()
    weight, bias = LogisticRegression(x, labels, num_classes).fit(chosen)
    weight = weight / std[:, None]
    return LinearClassifier(weight, bias - mean @ weight, chosen)


SEARCH_TOLERANCE = 1e-3  # where a tenth of a point decides nothing


def linear_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    num_classes: int,
) -> float:
    """Test accuracy in [0, 1] of logistic regression on frozen features."""
    weight, bias = fit_logistic_regression(train_features, train_labels, num_classes)
    return accuracy((test_features @ weight + bias).argmax(1), test_labels)


def standardization(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and standard deviation (D,) of rows (N, D); infinite where a feature is constant.

    So that a classifier's l2 penalty means the same for representations of different scale:
    (x - mean) / std has variance 1, and is 0 where there is nothing to learn from.
    """
    std = features.std(0, correction=0)
    return features.mean(0), torch.where(std > 1e-6 * std.max(), std, torch.inf)


def standardize(train_features: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Each feature to mean 0 and variance 1 over the training rows; the others alike."""
    mean, std = standardization(train_features)
    return tuple((x - mean) / std for x in (train_features, *others))


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Share of equal entries, in [0, 1]."""
    return (predicted == labels).float().mean().item()


def module_digest(module: nn.Module) -> str:
    """SHA-256 of all parameters and buffers, byte for byte, with names, types and shapes."""
    found = hashlib.sha256()
    for name, value in itertools.chain(module.named_parameters(), module.named_buffers()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Inside, `module` is in eval mode and must not change.

    Raises RuntimeError at the end if any parameter or buffer is not byte for byte what it was: an
    evaluation that moves what it evaluates is void.
    """
    before = module_digest(module)
    with evaluating(module):
        yield
    if module_digest(module) != before:
        raise RuntimeError("the evaluation changed the encoder that it evaluates")


# -------------------------------------------------------------------------------------- pictures


def mosaic(tiles: Tensor, gap: int = 0) -> np.ndarray:
    """Images side by side on white: uint8 (R, C, 3, S, S) -> uint8 (R·(S+gap), C·(S+gap), 3)."""
    before, after = gap // 2, gap - gap // 2
    padded = F.pad(tiles, (before, after, before, after), value=255)  # (R, C, 3, S+gap, S+gap)
    return padded.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).cpu().numpy()


def save_figure(figure: Any, path: Path, dpi: int = 150) -> None:
    """Write a matplotlib Figure atomically, in the format that the file's ending names.

    Raises InputError for an unknown ending, or if the file cannot be written.
    """
    kind, known = path.suffix[1:].lower(), figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise InputError(f"{path}: the file's ending must be one of {', '.join(sorted(known))}")
    picture = io.BytesIO()
    figure.savefig(picture, format=kind, dpi=dpi)
    write_atomically(path, picture.getbuffer())


# -------------------------------------------------------------------------------------- progress


def progress_bar(items: Iterable, title: str, total: int) -> Iterable:
    """The items, with a bar on a terminal that vanishes; none without a title."""
    hidden = None if title and is_main_process() else True
    return tqdm(items, title, total, leave=False, disable=hidden)


class Progress:
    """A tqdm bar on a terminal; elsewhere plain lines, at most one every few seconds.

    `total` counts steps, `done` of which lie behind already.
    """

    SECONDS_BETWEEN_LINES = 5.0

    def __init__(self, total: int, done: int, unit: str) -> None:
        self.on_terminal = sys.stderr.isatty() and is_main_process()
        self.bar = tqdm(total=total, initial=done, unit=unit, disable=not self.on_terminal)
        self._next_line = 0.0

    def advance(self) -> None:
        self.bar.update()

    def show(self, values: dict[str, str], line: str, last: bool = False) -> None:
        """Show `values` beside the bar, or print `line` where there is no terminal."""
        if self.on_terminal:
            self.bar.set_postfix(values, refresh=False)
        elif last or time.monotonic() >= self._next_line:
            print(line, flush=True)
            self._next_line = time.monotonic() + self.SECONDS_BETWEEN_LINES

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
