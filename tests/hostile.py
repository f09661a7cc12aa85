"""Files and command lines that mean harm, or are merely strange: what must become of each.

    python tests/hostile.py                  # all of it, some minutes
    python tests/hostile.py --tries 100      # fewer fuzzed files and command lines

Whatever is given, the outcome is a run or one clear line, within seconds, in bounded memory, and
nothing is executed or written elsewhere. test_hostile.py does a sample of it.

Reading order: a trial · checkpoints · images · data sets · command lines · numbers.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import ctypes
import dataclasses
import io
import os
import pickle
import re
import resource
import shutil
import struct
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import conftest  # noqa: F401  makes the scripts importable

# isort: split
import ablation_SimCLR
import load_simCLR
import simclr
import tSNE
import utils
from outcome import Outcome
from test_data import make_cifar, md5
from utils import ImageSet, InputError

CPU = torch.device("cpu")
SECONDS = 20.0  # of computing: a trial that takes longer has failed; most take a tenth
MEMORY = 640 * 2**20  # bytes: what a trial may take beside what the process had
ADDRESSES = 24 * 2**30  # bytes of address space that a trial gets, so that a bomb harms no machine

# ---------------------------------------------------------------------------------------- a trial


def memory(name: str) -> int:
    """A line of /proc/self/status in bytes; 0 where there is no such file."""
    with contextlib.suppress(OSError):
        text = Path("/proc/self/status").read_text(encoding="utf-8")
        found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
        return 1024 * int(found[1]) if found else 0
    return 0


@contextlib.contextmanager
def bounded() -> Iterator[Callable[[], int]]:
    """Limits the address space inside. Yields what the process took more at most, in bytes."""
    with contextlib.suppress(OSError, TypeError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # give back what utils.make_fast() lets glibc keep
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak
    before, limits = memory("VmRSS"), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + ADDRESSES, limits[1]))
    try:
        yield lambda: memory("VmHWM") - before
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@dataclasses.dataclass
class Trial:
    """What became of a call. how: "run", "refused" or "broken". text: the line, or what broke."""

    how: str
    text: str
    value: Any = None


def attempt(call: Callable[[], Any]) -> Trial:
    """Calls it as a command or a function of the project, and judges what comes of it."""
    out, err = io.StringIO(), io.StringIO()
    started, how, text, value = time.process_time(), "run", "", None
    with warnings.catch_warnings(record=True) as warned, bounded() as taken:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # Python shows these to none
        warnings.filterwarnings("ignore", category=PendingDeprecationWarning)
        warnings.filterwarnings("ignore", category=ResourceWarning)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                value = call()
        except InputError as error:
            how, text = "refused", str(error)
        except SystemExit as left:
            said = err.getvalue()
            if left.code in (None, 0):
                how = "run"
            elif left.code == 2 and said.count("\n") == 1 and ": error: " in said:
                how, text = "refused", said.strip()
            else:
                how, text = "broken", f"exit code {left.code} and {said[-300:]!r}"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            how, text = "broken", f"{type(error).__name__}: {str(error)[:300]}"
        grown = taken()
    seconds = time.process_time() - started
    if how == "run" and err.getvalue():
        how, text = "broken", f"a run that says {err.getvalue()[:300]!r}"
    if how != "broken" and warned:
        how, text = "broken", f"a stray warning: {warned[0].message}"
    if how != "broken" and grown > MEMORY:
        how, text = "broken", f"took {grown / 2**20:.0f} MiB of memory"
    if how != "broken" and seconds > SECONDS:
        how, text = "broken", f"took {seconds:.0f} s"
    return Trial(how, text, value)


class Count:
    """Gathers an Outcome."""

    def __init__(self, name: str) -> None:
        self.name, self.tried, self.failures, self.seconds = name, 0, [], 0.0
        self.last = time.perf_counter()

    def add(self, case: str, fault: str) -> None:
        """fault: what was wrong with what became of the case, or ""."""
        self.tried += 1
        if fault:
            self.failures.append(f"{case}: {fault}")
        now = time.perf_counter()
        self.seconds, self.last = self.seconds + now - self.last, now

    def outcome(self) -> Outcome:
        failed = len(self.failures)
        return Outcome(
            self.name, self.tried, self.tried - failed, "nothing" if not failed else "see failures",
            self.seconds, self.failures,
        )  # fmt: skip


@contextlib.contextmanager
def temporary() -> Iterator[Path]:
    """A folder for a while, which is also the current one."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="hostile-") as name:
        os.chdir(name)
        try:
            yield Path(name)
        finally:
            os.chdir(here)


def fuzz(strategy: Any, tries: int, seed: int, check: Callable[[Any], None]) -> None:
    """Calls check() with `tries` examples of a hypothesis strategy; nothing is kept on disk."""
    import hypothesis

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=tries, deadline=None, database=None, phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(strategy)
    def run(example: Any) -> None:
        check(example)

    run()


# ------------------------------------------------------------------------------------ checkpoints


class Calls:
    """Would call function(*arguments) if it were unpickled."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple:
        return self.function, self.arguments


class Base:
    """A run of eight images that a checkpoint may be of, and the doors through which files come."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.canary = folder, folder / "canary"
        random = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8, generator=random)
        labels = torch.arange(8) % 2
        part = ImageSet(images, labels, ("a", "b"))
        self.data = simclr.Data(part, part, part)
        self.config = simclr.make_config(
            dataset="digits", arch="resnet10", width=0.0625, epochs=3, batch_size=4, device="cpu",
            image_size=8, stem="small", precision="float32", head_dim=8, knn_every=0, run="r",
            checkpoints=str(folder / "c"), figures=str(folder / "f"),
        )  # fmt: skip
        self.file = self.config.folder / "last.pt"
        self.file.parent.mkdir(parents=True)
        run = simclr.Pretraining(self.config, self.data, CPU)
        self.one_epoch(run)
        self.state = run.state()

    def one_epoch(self, run: simclr.Pretraining) -> None:
        simclr.train_epoch(
            run.model, run.optimizer, run.batches(), run.rate, run.loss, "float32", run.position,
            lambda: False,
        )  # fmt: skip
        run.finish_epoch()

    def resume(self) -> None:
        """As `python simclr.py` goes on, one epoch of it; its state is kept as it would be."""
        run = simclr.Pretraining(self.config, self.data, CPU)
        if run.resume() and not run.complete:
            self.one_epoch(run)
            torch.save(run.state(), io.BytesIO())

    def load_run(self) -> simclr.TrainedRun:
        """As an ablation, or a notebook, takes a run; its encoder is used once."""
        run = simclr.load_run(self.file)
        side = run.config.image_size
        run.model(torch.rand(2, 3, side, side))
        return run

    def load_encoder(self) -> None:
        load_simCLR.load_encoder(self.file)(torch.rand(1, 3, 32, 32))

    def command(self) -> None:
        load_simCLR.main([str(self.file), "--export", "out.pt", "--device", "cpu"])

    def drawing(self) -> None:
        tSNE.main([str(self.file), "--device", "cpu", "--figures", "f", "--images", "1"])

    @property
    def doors(self) -> dict[str, Callable[[], Any]]:
        return {
            "simclr.py": self.resume, "load_run": self.load_run, "load_encoder": self.load_encoder,
            "load_simCLR.py": self.command, "tSNE.py": self.drawing,
        }  # fmt: skip

    def judge(self, doors: tuple[str, ...], must: str) -> str:
        """What is wrong with what becomes of the file, or "".

        must: "refused" by the given doors ("" allows a run as well); the others do either.
        """
        before = {path for path in self.folder.rglob("*") if path.is_file()}
        for name, door in self.doors.items():
            trial = attempt(door)
            if trial.how == "broken":
                return f"{name} {trial.text}"
            if name in doors and must and trial.how != must:
                return f"{name} took it"
            if trial.how == "refused" and not trial.text.strip():
                return f"{name} gives no reason"
            if self.canary.exists():
                return f"{name} executed it"
            after = {path for path in self.folder.rglob("*") if path.is_file()}
            new = after - before - {self.folder / "out.pt"}
            new = {path for path in new if "tsne" not in path.name}
            if new:
                return f"{name} left {sorted(map(str, new))[0]} behind"
        return ""


ALL = ("simclr.py", "load_run", "load_encoder", "load_simCLR.py", "tSNE.py")
READERS = ALL[1:]  # do not look at what only training goes on from
RESUME = ALL[:1]


def dangerous(canary: Path) -> dict[str, Any]:
    """Objects whose unpickling would run code, or build what no checkpoint needs."""
    touch, storage = f"touch {canary}", torch.zeros(4)._typed_storage()
    code, no_hooks = f"open({str(canary)!r}, 'w')", collections.OrderedDict()
    rebuild = torch._utils._rebuild_tensor_v2
    return {
        "os.system": Calls(os.system, touch),
        "eval": Calls(eval, code),
        "exec": Calls(exec, code),
        "open": Calls(open, str(canary), "w"),
        "getattr": Calls(getattr, Calls(__import__, "os"), "system"),
        "__import__": Calls(__import__, "antigravity"),
        "subprocess": Calls(__import__("subprocess").check_output, ["touch", str(canary)]),
        "torch.load": Calls(torch.load, str(canary)),
        "torch.hub": Calls(torch.hub.load, "a/b", "c"),
        "Path.touch": Calls(Path.touch, canary),
        "numpy scalar": Calls(__import__("numpy").float64, 1.0),
        "a class of ours": simclr.Position(),
        "functools.partial": Calls(__import__("functools").partial, os.system, touch),
        "rebuild_from_type": Calls(
            torch._tensor._rebuild_from_type_v2, os.system, torch.Tensor, (touch,), {}
        ),
        "parameter of a call": Calls(
            torch._utils._rebuild_parameter, Calls(os.system, touch), False, no_hooks
        ),
        "hooks that are calls": Calls(
            rebuild, storage, 0, (4,), (1,), True, Calls(os.system, touch)
        ),
        "ten gigabytes of zeros": Calls(bytearray, 10**10),
        "a tensor of a size alone": Calls(torch.Tensor, (10**12,)),
        "a storage of a size alone": Calls(torch.UntypedStorage, 10**11),
        "text that doubles": doubled(40),
        "a view beyond its storage": Calls(rebuild, storage, 0, (10**9,), (1,), False, no_hooks),
        "an offset beyond": Calls(rebuild, storage, 10**9, (1,), (1,), False, no_hooks),
        "a negative offset": Calls(rebuild, storage, -8, (1,), (1,), False, no_hooks),
        "a negative stride": Calls(rebuild, storage, 2, (2,), (-1,), False, no_hooks),
        "a size that overflows": Calls(rebuild, storage, 0, (2**62, 4), (0, 0), False, no_hooks),
        "a sparse tensor": torch.zeros(3, 3).to_sparse(),
        "a meta tensor": torch.empty(10**9, device="meta"),
        "a quantized tensor": Calls(
            torch._utils._rebuild_qtensor, storage, 0, (4,), (1,),
            (torch.per_tensor_affine, 0.1, 0), False, no_hooks,
        ),
        "a nested tensor": Calls(torch._utils._rebuild_nested_tensor, *[torch.zeros(1)] * 4),
    }  # fmt: skip


def doubled(times: int) -> Any:
    """Text that would be twice as long with each of the calls around it."""
    value: Any = "ab"
    for _ in range(times):
        value = Calls(__import__("_codecs").encode, value, "hex")
    return value


def hidden(value: Any, how: str) -> Any:
    """The value deep in harmless things."""
    if how == "list":
        return [[[value]]]
    if how == "key":
        return {(1, value) if how == "key" else 1: 2}
    return collections.OrderedDict(a=collections.OrderedDict(b=(value,)))


def repacked(content: bytes, change: Callable[[zipfile.ZipFile, list], None]) -> bytes:
    """A torch file whose zip parts [(name, bytes)] were written anew by change()."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = [(part.filename, archive.read(part)) for part in archive.infolist()]
    made = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(made, "w") as archive:
        warnings.simplefilter("ignore")  # about names that are there twice
        change(archive, parts)
    return made.getvalue()


def write_all(archive: zipfile.ZipFile, parts: list, **options: Any) -> None:
    for name, content in parts:
        archive.writestr(name, content, **options)


def with_pickle(content: bytes, new: Callable[[bytes], bytes]) -> bytes:
    """A torch file whose pickle was replaced."""

    def change(archive: zipfile.ZipFile, parts: list) -> None:
        write_all(archive, [(n, new(c) if n.endswith("data.pkl") else c) for n, c in parts])

    return repacked(content, change)


class Zeros:
    """A compressor of nothing but zeros, always as many: does the work once."""

    def __init__(self, count: int) -> None:
        deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
        self.piece = deflate.compress(bytes(count)) + deflate.flush(zlib.Z_FULL_FLUSH)

    def compress(self, _: bytes) -> bytes:
        return self.piece

    def flush(self) -> bytes:
        return b"\3\0"  # an empty last block


def bomb(archive: zipfile.ZipFile, parts: list) -> None:
    """A gigabyte of zeros in a megabyte, under the name of a storage."""
    write_all(archive, [part for part in parts if part[0] != "archive/data/0"])
    info = zipfile.ZipInfo("archive/data/0", (2020, 1, 1, 0, 0, 0))
    zeros = bytes(2**26)
    with archive.open(info, "w", force_zip64=True) as part:
        part._compressor, info.compress_type = Zeros(len(zeros)), zipfile.ZIP_DEFLATED
        for _ in range(2**30 // len(zeros)):
            part.write(zeros)


def overlapping(content: bytes, times: int = 1000) -> bytes:
    """A torch file whose directory names its first part `times` more often."""
    at = content.rfind(b"PK\5\6")
    count, size, start = struct.unpack("<HII", content[at + 10 : at + 20])
    directory = content[start : start + size]
    name, extra, note = struct.unpack("<HHH", directory[28:34])
    entry = directory[: 46 + name + extra + note]
    entries = b""
    for i in range(times):
        entries += entry[:46] + f"{i:0{name}d}".encode() + entry[46 + name :]
    end = struct.pack("<HHHHIIH", 0, 0, count + times, count + times, size + len(entries), start, 0)
    return content[:start] + directory + entries + b"PK\5\6" + end


def two_directories(harmless: bytes, harmful: bytes) -> bytes:
    """A zip file with two directories: Python takes the one at the end, and moves what it names by
    as many bytes as that lies behind its place; torch takes the one that is where it should be.

    Both are torch files with equally long directories.
    """

    def split(content: bytes) -> tuple[bytes, bytearray]:
        size, start = struct.unpack("<II", content[-10:-2])
        return content[:start], bytearray(content[start : start + size])

    parts, directory = split(harmless)
    first, taken = split(harmful)
    first += bytes(len(parts))  # so that no place becomes negative
    at = 0
    while at < len(directory):
        lengths = struct.unpack("<HHH", directory[at + 28 : at + 34])
        place = struct.unpack("<I", directory[at + 42 : at + 46])[0]
        directory[at + 42 : at + 46] = struct.pack("<I", len(first) + place - len(parts))
        at += 46 + sum(lengths)
    end = harmless[-22:-6] + struct.pack("<IH", len(first), 0)
    return first + taken + parts + directory + end


def saved(state: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return buffer.getvalue()


def as_file_cases(base: Base) -> dict[str, bytes]:
    """Whole files that every door must refuse."""
    state, good = base.state, saved(base.state)
    cases = {}
    for name, value in dangerous(base.canary).items():
        with contextlib.suppress(AttributeError):  # what torch itself cannot save
            cases[f"{name}, in the state"] = saved({**state, "more": value})
    for how in ("list", "ordered"):
        cases[f"os.system in a {how}"] = saved(
            {**state, "log": hidden(Calls(os.system, f"touch {base.canary}"), how)}
        )
    many = saved({"x": Calls(bytearray, 2 * MEMORY)})  # bytes, asked for by a small file
    harmless = pickle.dumps({}, protocol=2)
    shell = f"cos\nsystem\n(S'touch {base.canary}'\ntR.".encode()
    imported = f"c__builtin__\neval\n(V__import__('os').system('touch {base.canary}')\ntR."
    stacked = pickle.dumps(Calls(os.system, f"touch {base.canary}"), protocol=4)
    cases |= {
        "GLOBAL os.system, in the zip": with_pickle(good, lambda _: shell),
        "GLOBAL eval, in the zip": with_pickle(good, lambda _: imported.encode()),
        "STACK_GLOBAL, in the zip": with_pickle(good, lambda _: stacked),
        "INST, in the zip": with_pickle(
            good, lambda _: f"(S'touch {base.canary}'\nios\nsystem\n.".encode()
        ),
        "a second pickle after the first": with_pickle(good, lambda p: shell + p),
        "a bare pickle": shell,
        "a bare pickle of protocol 5": pickle.dumps(Calls(os.system, f"touch {base.canary}")),
        "of before torch 1.6, with code": saved(
            {**state, "more": Calls(os.system, f"touch {base.canary}")},
            _use_new_zipfile_serialization=False,
        ),
        "of before torch 1.6, cut": saved(state, _use_new_zipfile_serialization=False)[:-40],
        "of before torch 1.6, of a storage of terabytes": saved(
            {"x": torch.zeros(5)}, _use_new_zipfile_serialization=False
        ).replace(b"K\x05N", b"\x8a\x06\0\0\0\0\0\1N"),
        "a storage of gigabytes": with_pickle(
            saved({**state, "x": torch.zeros(5)}),
            lambda p: p.replace(b"K\x05t", b"J\xff\xff\xff\x7ft"),
        ),
        "a zip bomb": repacked(good, bomb),
        "compressed parts": repacked(
            good, lambda a, p: write_all(a, p, compress_type=zipfile.ZIP_DEFLATED)
        ),
        "a thousand parts in one place": overlapping(good),
        "a pickle that torch alone finds": repacked(
            many, lambda a, p: write_all(a, [(n.replace("data.pkl", "DATA.PKL"), c) for n, c in p])
        ),
        "a directory that torch alone finds": two_directories(
            with_pickle(many, lambda _: harmless), with_pickle(many, lambda p: p)
        ),
        "a part of a name with ..": repacked(
            good, lambda a, p: write_all(a, [*p, ("archive/../../x", b"x")])
        ),
        "a part of an absolute name": repacked(
            good, lambda a, p: write_all(a, [*p, (str(base.canary), b"x")])
        ),
        "a part that is there twice": repacked(good, lambda a, p: write_all(a, [*p, p[0]])),
        "no parts": repacked(good, lambda _a, _p: None),
        "no pickle": repacked(
            good, lambda a, p: write_all(a, [x for x in p if not x[0].endswith("data.pkl")])
        ),
        "no storages": repacked(
            good, lambda a, p: write_all(a, [x for x in p if "/data/" not in x[0]])
        ),
        "an empty pickle": with_pickle(good, lambda _: b""),
        "a pickle of no end": with_pickle(good, lambda p: p[:-1]),
        "lists in lists, very deep": with_pickle(
            good, lambda _: b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"."
        ),
        "a format in many lists": with_pickle(
            good,
            lambda _: b"\x80\x02}(X\6\0\0\0format" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"u.",
        ),
        "a number of a million digits": with_pickle(
            good, lambda _: b"\x80\x02}(X\6\0\0\0format\x8b" + struct.pack("<I", 415_000)
            + b"\x7f" * 415_000 + b"u.",
        ),
        "a state that holds itself": with_pickle(
            good, lambda _: b"\x80\x02}q\0(X\6\0\0\0formath\0X\6\0\0\0configh\0u."
        ),
        "an operation that does not exist": with_pickle(good, lambda p: p[:2] + b"\xff" + p[2:]),
        "text": b"This is no checkpoint.\n" * 100,
        "nothing": b"",
        "zeros": bytes(10**6),
        "the first half": good[: len(good) // 2],
        "a tensor alone": saved(torch.zeros(3)),
        "a list": saved([state]),
    }  # fmt: skip
    return cases


def state_cases(base: Base) -> dict[str, tuple[dict, tuple[str, ...]]]:
    """States that are plain and wrong, and the doors that must refuse each."""
    state, cases = base.state, {}

    def put(name: str, doors: tuple[str, ...], part: str, key: Any, value: Any) -> None:
        inner = {**state[part], key: value} if isinstance(state[part], dict) else value
        cases[name] = {**state, part: inner}, doors

    for name, value in {
        "None": None, "a list": [], "text": "1", "minus one": -1, "nought": 0, "true": True,
        "a half": 1.0, "a tensor": torch.ones(1), "a huge number": 10**4000,
    }.items():  # fmt: skip
        cases[f"format {name}"] = {**state, "format": value}, ALL
    for part in ("config", "model", "position", "optimizer", "log", "images"):
        doors = RESUME if part in ("optimizer", "log", "images") else ALL
        without = {k: v for k, v in state.items() if k != part}
        if part == "config":  # which is an encoder in somebody else's format
            cases["no config"] = without, ("simclr.py", "load_run", "tSNE.py")
        elif part != "log":  # earlier versions kept it beside
            cases[f"no {part}"] = without, doors
        for value in (None, 7, "text", [1], [[]], [state["model"]], {"a": 1}, {}, torch.zeros(2)):
            cases[f"{part} is {utils.shown(value)}"] = {**state, part: value}, doors
    for config in (
        {"width": 1e9}, {"width": 16.0}, {"arch": "resnet152", "width": 16.0},
        {"width": float("nan")}, {"head_dim": 65536, "head_hidden": 65536}, {"image_size": 0},
        {"image_size": 10**9},
        {"arch": "vgg"}, {"stem": "large"}, {"dataset": "nowhere"}, {"epochs": 0}, {"seed": -1},
        {"run": "../../x"}, {"run": "/x"}, {"run": "a\0b"}, {"run": "x" * 10**6}, {"run": ""},
        {"temperature": "0.1"}, {"batch_size": 4.5}, {"head_bn": 1}, {"epochs": True},
        {"seed": 10**5000}, {"unknown": 1}, {"lr": float("inf")}, {"projection": ["none"]},
    ):  # fmt: skip
        key, value = next(iter(config.items()))
        changed = {**state["config"], **config}
        cases[f"config of {key} {utils.shown(value)}"] = {**state, "config": changed}, READERS
    for field in dataclasses.fields(simclr.Config):
        for value in (None, [], b"bytes", torch.zeros(1), {"a": {}}):
            put(
                f"config.{field.name} is {utils.shown(value)}", READERS, "config", field.name, value
            )
    for key, values in {
        "epoch": (-1, 99, 1.5, "1", True, None, 10**400), "step": (-1, "1", False),
        "loss_sum": (float("nan"), "x", None), "seconds": (float("inf"), [], 10**400),
        "surplus": (1,),
    }.items():  # fmt: skip
        for value in values:
            put(f"position.{key} is {utils.shown(value)}", ALL, "position", key, value)
    put("position.step of another run", RESUME, "position", "step", 10**9)
    first, weights = next(iter(state["model"])), state["model"]
    for name, value in {
        "missing": None, "of another shape": torch.zeros(3), "NaN": weights[first] * float("nan"),
        "integers": weights[first].long(), "a list": weights[first].tolist(),
        "one number spread": torch.zeros(1).expand(weights[first].shape),
        "a billion of one number": torch.zeros(1).expand(10**9),
        "complex": weights[first].to(torch.complex64),
    }.items():  # fmt: skip
        model = {**weights, first: value}
        if value is None:
            del model[first]
        cases[f"a weight {name}"] = {**state, "model": model}, ALL
    cases["a surplus weight"] = {**state, "model": {**weights, "x": torch.zeros(1)}}, ALL
    shared = torch.zeros(max(w.numel() for w in weights.values()))
    views = {k: shared[: w.numel()].view(w.shape) for k, w in weights.items()}
    cases["all weights the same memory"] = {**state, "model": views}, ALL
    moments = state["optimizer"]["state"]
    for name, value in {
        "of another shape": torch.zeros(3), "a list": [1.0], "None": None,
        "NaN": moments[0]["exp_avg"] * float("nan"), "of a billion": torch.zeros(1).expand(10**9),
        "one number spread": torch.zeros(1).expand(moments[0]["exp_avg"].shape),
    }.items():  # fmt: skip
        changed = {**moments, 0: {**moments[0], "exp_avg": value}}
        cases[f"a moment {name}"] = with_moments(state, changed), RESUME
    cases["a moment missing"] = with_moments(state, {**moments, 0: {}}), RESUME
    cases["a moment surplus"] = with_moments(state, {**moments, 0: {**moments[0], "x": 1}}), RESUME
    cases["moments of another weight"] = with_moments(state, {**moments, 999: moments[0]}), RESUME
    cases["moments in a list"] = with_moments(state, list(moments.values())), RESUME
    row = state["log"][0]
    for name, rows in {
        "of texts": [dict.fromkeys(row, "1")], "of lists": [{key: [] for key in row}],
        "of NaN": [{**row, "loss": float("nan")}], "of lists in a row": [list(row)],
        "with a row missing": [], "of another epoch": [{**row, "epoch": 2}],
        "with a huge number": [{**row, "seconds": 10**5000}], "without a loss": [{"epoch": 1}],
        "with a tensor": [{**row, "knn": torch.zeros(2)}], "in a dict": {0: row},
    }.items():  # fmt: skip
        cases[f"a log {name}"] = {**state, "log": rows}, RESUME
    return cases


def with_moments(state: dict, moments: Any) -> dict:
    return {**state, "optimizer": {**state["optimizer"], "state": moments}}


def elsewhere(base: Base, count: Count) -> None:
    """Folders that a checkpoint names are not written to, nor made."""
    for key in ("checkpoints", "figures", "data_dir"):
        target = base.folder / "elsewhere"
        config = {**base.state["config"], key: str(target)}
        base.file.write_bytes(saved({**base.state, "config": config}))
        fault = base.judge((), "")
        count.add(f"config.{key} elsewhere", fault or "written there" * target.exists())


def nasty() -> Any:
    """Values that a state's field should not have."""
    from hypothesis import strategies as st

    scalars = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20),
        st.binary(max_size=5),
        st.sampled_from([10**400, -(10**400), "x" * 10**5, 2**63, 0, -1, ""]),
    )  # fmt: skip
    tensors = st.sampled_from(
        [
            torch.zeros(0), torch.zeros(3), torch.zeros(1).expand(10**9), torch.ones(2).bool(),
            torch.full((2,), float("nan")), torch.zeros(2, 2).half(), torch.tensor(1),
            torch.zeros(1, 1, 1, 1, 1, 1), torch.nn.Parameter(torch.zeros(2)),
        ]
    )  # fmt: skip
    other = st.sampled_from([torch.Size([1]), torch.float32, torch.device("cpu")])
    leaves = scalars | tensors | other
    keys = st.text(max_size=5) | st.integers(-1, 5)
    return st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3)
        | st.tuples(inner),
        max_leaves=5,
    )  # fmt: skip


def mutations() -> Any:
    """(where to go in, what to do there, with what): each list of floats picks keys on the way."""
    from hypothesis import strategies as st

    place = st.lists(st.floats(0, 0.999), min_size=1, max_size=5)
    how = st.sampled_from(["replace", "replace", "delete", "add", "wrap", "copy"])
    return st.lists(st.tuples(place, how, nasty()), min_size=1, max_size=3)


def mutated(state: dict, changes: list) -> dict:
    """A copy of a state with the changes made, in dicts and lists on the way."""
    state = copy.deepcopy(state)
    for place, how, value in changes:
        node: Any = state
        for share in place[:-1]:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            inner = node[keys[int(share * len(keys))]] if keys else None
            if not isinstance(inner, dict | list) or not inner:
                break
            node = inner
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            continue
        key = keys[int(place[-1] * len(keys))]
        if how == "delete":
            del node[key]
        elif how == "add" and isinstance(node, dict):
            node["surplus"] = value
        elif how == "copy":
            node[key] = node[keys[0]]
        else:
            node[key] = [node[key]] if how == "wrap" else value
    return state


def checkpoints(tries: int = 300, seed: int = 0, every: int = 1) -> list[Outcome]:
    """Files that mean harm, files that are merely wrong, and `tries` fuzzed states.

    every: of the hand-made files take each `every`-th.
    """
    with temporary() as folder:
        base = Base(folder)
        states = Count("wrong checkpoint states")
        base.file.write_bytes(saved(base.state))
        for name, door in base.doors.items():  # else a refusal would prove nothing
            trial = attempt(door)
            accepted = trial.how == "run" or (name == "tSNE.py" and "at least 2" in trial.text)
            accepted = accepted or (name == "tSNE.py" and "--images must be" in trial.text)
            states.add(f"a good one by {name}", "" if accepted else trial.text)
        files = Count("hostile checkpoint files")
        for name, content in list(as_file_cases(base).items())[::every]:
            base.file.write_bytes(content)
            files.add(name, base.judge(ALL, "refused"))
        states.last = time.perf_counter()
        for name, (state, doors) in list(state_cases(base).items())[::every]:
            base.file.write_bytes(saved(state))
            states.add(name, base.judge(doors, "refused"))
        elsewhere(base, states)
        fuzzed = Count("fuzzed checkpoint states")

        def check(changes: list) -> None:
            with contextlib.suppress(RuntimeError):  # what cannot be saved
                base.file.write_bytes(saved(mutated(base.state, changes)))
                shorter = [(place, how, utils.shown(value)) for place, how, value in changes]
                fuzzed.add(str(shorter), base.judge((), ""))

        if tries:
            fuzz(mutations(), tries, seed, check)
        return [count.outcome() for count in (files, states, fuzzed) if count.tried]


# ----------------------------------------------------------------------------------------- images


def grid(height: int = 6, width: int = 8, seed: int = 0) -> np.ndarray:
    """Pixels of no pattern: uint8 (H, W, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file of these chunks."""
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, content in (*chunks, (b"IEND", b"")):
        parts.append(struct.pack(">I", len(content)) + kind + content)
        parts.append(struct.pack(">I", zlib.crc32(kind + content)))
    return b"".join(parts)


def png_header(width: int, height: int, depth: int = 8, kind: int = 2) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)


def plain_png(pixels: np.ndarray, depth: int, kind: int, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG of raw samples (H, W, …) as they are stored: kind 0 grey, 2 RGB, 4 grey and alpha."""
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2" if depth == 16 else "u1").tobytes() for row in pixels)
    return png(png_header(width, height, depth, kind), *extra, (b"IDAT", zlib.compress(rows)))


def written(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Colours (H, W, 3) with alpha (H, W) in [0, 255] before white, rounded."""
    share = alpha[..., None] / 255
    return np.round(colour * share + 255 * (1 - share)).astype(np.uint8)


def good_images() -> dict[str, tuple[bytes, np.ndarray, int]]:
    """Strange and sound: file name -> (content, the pixels it must give, by how much at most)."""
    x, made = grid(), {}
    image = Image.fromarray(x)
    deep = np.random.default_rng(1).integers(0, 65536, (6, 8), dtype=np.uint16)
    shallow = np.round(deep / 257).astype(np.uint8)[..., None].repeat(3, 2)
    alpha = np.random.default_rng(2).integers(0, 256, (6, 8), dtype=np.uint8)
    jpeg = written(image, "jpeg", quality=95)
    as_jpeg = np.asarray(Image.open(io.BytesIO(jpeg)))
    made["a 1x1 image.png"] = written(image.crop((0, 0, 1, 1)), "png"), x[:1, :1], 0
    long = grid(1, 60_000)
    made["60,000 x 1.png"] = written(Image.fromarray(long), "png"), long, 0
    made["1 x 60,000.png"] = (
        written(Image.fromarray(long.swapaxes(0, 1)), "png"),
        long.swapaxes(0, 1),
        0,
    )
    made["16-bit grey.png"] = plain_png(deep, 16, 0), shallow, 1
    made["16-bit grey.tif"] = written(Image.fromarray(deep), "tiff"), shallow, 1
    wide = np.random.default_rng(3).integers(0, 65536, (6, 8, 3), dtype=np.uint16)
    made["16-bit RGB.png"] = plain_png(wide, 16, 2), (wide / 257).astype(np.uint8), 1
    both = np.stack([x[..., 0], alpha], 2)
    grey = x[..., :1].repeat(3, 2)
    made["grey and alpha.png"] = plain_png(both, 8, 4), on_white(grey, alpha), 1
    made["RGB and alpha.png"] = (
        written(Image.fromarray(np.dstack([x, alpha])), "png"), on_white(x, alpha), 1,
    )  # fmt: skip
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 10, 30, 20, 90, 60])
    palette.putpixel((1, 0), 1)
    colours = np.array([[[200, 10, 30], [20, 90, 60]]], np.uint8)
    made["palette.png"] = written(palette, "png"), colours, 0
    shares = np.array([[0, 128]], np.uint8)
    made["palette, one colour clear.png"] = (
        written(palette, "png", transparency=0), on_white(colours, np.array([[0, 255]])), 0,
    )  # fmt: skip
    made["palette of shares.png"] = (
        written(palette, "png", transparency=bytes([0, 128])), on_white(colours, shares), 1,
    )  # fmt: skip
    made["palette, clear.gif"] = (
        written(palette, "gif", transparency=0), on_white(colours, np.array([[0, 255]])), 0,
    )  # fmt: skip
    made["colour key.png"] = (
        plain_png(x, 8, 2, (b"tRNS", struct.pack(">HHH", *map(int, x[0, 0])))),
        on_white(x, np.where((x == x[0, 0]).all(2), 0, 255)), 0,
    )  # fmt: skip
    ink = Image.new("CMYK", (3, 1))
    for i, value in enumerate([(0, 0, 0, 0), (255, 0, 0, 0), (0, 0, 0, 255)]):
        ink.putpixel((i, 0), value)
    paper = np.array([[[255, 255, 255], [0, 255, 255], [0, 0, 0]]], np.uint8)
    made["CMYK.tif"] = written(ink, "tiff"), paper, 0
    made["CMYK.jpg"] = (
        written(Image.new("CMYK", (8, 8)), "jpeg"),
        np.full((8, 8, 3), 255, np.uint8),
        2,
    )
    frames = [Image.new("RGB", (4, 3), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    first = np.asarray(frames[0])
    for kind in ("gif", "png", "webp"):
        options = dict(save_all=True, append_images=frames[1:], lossless=True)
        made[f"animated.{kind}"] = written(frames[0], kind, **options), first, 0
    made["one bit.png"] = written(Image.new("1", (3, 2), 1), "png"), np.full((2, 3, 3), 255), 0
    made["JPEG named.png"] = jpeg, as_jpeg, 0
    made["PNG named.JPEG"] = written(image, "png"), x, 0
    for orientation, turn in {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: np.rot90,
    }.items():  # fmt: skip
        exif = image.getexif()
        exif[0x0112] = orientation
        made[f"turned {orientation}.png"] = written(image, "png", exif=exif), turn(x), 0
        made[f"turned {orientation}.jpg"] = (
            written(image, "jpeg", quality=95, exif=exif),
            turn(as_jpeg),
            0,
        )
    png_file = written(image, "png")
    for name in ("two  spaces .png", "new\nline.png", "emoji 🦎.png", "\udcff\udcfe.png", "-rf.png",
                 "'quote\".png", "$(touch x).png", "\x1b[31m.png", "z" * 251 + ".png"):  # fmt: skip
        made[name] = png_file, x, 0
    made["odd EXIF.jpg"] = written(image, "jpeg", quality=95, exif=b"Exif\0\0junk"), as_jpeg, 0
    made["a profile that is none.png"] = (
        plain_png(x, 8, 2, (b"iCCP", b"x\0\0" + zlib.compress(bytes(1000)))), x, 0,
    )  # fmt: skip
    return made


def bad_images() -> dict[str, bytes]:
    """File name -> content that is no image: refused by name."""
    image = Image.fromarray(grid(40, 40))
    jpeg, whole = written(image, "jpeg"), written(image, "png")
    return {
        "nothing.jpg": b"", "text.jpg": b"This is no photograph.\n" * 50, "zeros.png": bytes(5000),
        "cut.jpg": jpeg[: len(jpeg) // 2], "cut.png": whole[: len(whole) // 2],
        "header alone.png": png(png_header(20, 20)), "cut.gif": written(image, "gif")[:200],
        "cut.webp": written(image, "webp")[:300], "cut.tif": written(image, "tiff")[:2000],
        "cut.bmp": written(image, "bmp")[:2000], "one byte.png": b"\x89",
        "of no pixels.png": png(png_header(0, 0), (b"IDAT", zlib.compress(b""))),
        "wrong sum.png": whole[:20] + b"\xff" + whole[21:],
        # ten thousand megapixels, and a hundred: beyond both of PIL's limits, and the lower one
        "bomb.png": png(png_header(100_000, 100_000), (b"IDAT", zlib.compress(bytes(1000)))),
        "small bomb.png": png(png_header(10_000, 10_000), (b"IDAT", zlib.compress(bytes(1000)))),
        "bomb.gif": b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\0\0\0;",
        "text bomb.png": png(
            png_header(4, 4), (b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8), 9)),
            (b"IDAT", zlib.compress(bytes(100))),
        ),
    }  # fmt: skip


def write_bytes(folder: Path, name: str, content: bytes) -> Path:
    """A file of a name that need not be text."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def strange_places(folder: Path) -> dict[str, Path]:
    """What is named as an image and is no file that can be read."""
    os.mkfifo(folder / "pipe.jpg")
    os.symlink(folder / "itself.jpg", folder / "itself.jpg")
    os.symlink(folder / "nowhere", folder / "dangling.png")
    (folder / "folder.jpg").mkdir()
    locked = write_bytes(folder, "locked.png", written(Image.fromarray(grid()), "png"))
    locked.chmod(0)
    names = ("pipe.jpg", "itself.jpg", "dangling.png", "folder.jpg", "locked.png", "gone.png")
    return {name: folder / name for name in names} | {"/dev/zero": Path("/dev/zero")}


@contextlib.contextmanager
def as_nobody(folder: Path) -> Iterator[None]:
    """Without the rights of root, for whom every file is readable."""
    folder.chmod(0o755)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def one_image(path: Path, pixels: np.ndarray | None, tolerance: int = 0) -> str:
    """What is wrong with how a file is read, or "". pixels: what it must give; None: an error."""
    for read in (utils.read_image, utils.image_size):
        trial = attempt(lambda read=read: read(path))
        if trial.how == "broken":
            return f"{read.__name__}: {trial.text}"
        if pixels is None:
            if trial.how == "run" and read is utils.read_image:
                return "was taken for an image"
            if trial.how == "refused" and str(path) not in trial.text:
                return f"the error does not name it: {trial.text}"
        elif trial.how == "refused":
            return trial.text
        elif read is utils.image_size and trial.value != pixels.shape[:2]:
            return f"its size is said to be {trial.value}"
        elif read is utils.read_image:
            found = trial.value.permute(1, 2, 0).numpy().astype(int)
            if found.shape != pixels.shape or np.abs(found - pixels).max() > tolerance:
                return f"other pixels than expected: {found.ravel()[:9]}"
    return ""


TINY = [
    "--dataset", "folder", "--data-dir", "photos", "--arch", "resnet10", "--width", "0.0625",
    "--epochs", "2", "--batch-size", "8", "--image-size", "16", "--head-dim", "8", "--blur-p", "0",
    "--device", "cpu", "--workers", "0", "--checkpoints", "c", "--figures", "f",
]  # fmt: skip


def train(*flags: str) -> Trial:
    return attempt(lambda: simclr.main([*TINY, *flags]))


def whole_runs(folder: Path, count: Count) -> None:
    """`simclr.py --dataset folder` and `load_simCLR.py --embed` on such files."""
    photos = folder / "photos"
    for name, (content, *_) in good_images().items():
        write_bytes(photos, name, content)
    trial = train()
    count.add("a run on all the strange ones", trial.text if trial.how != "run" else "")
    trial = attempt(
        lambda: load_simCLR.main(["folder_resnet10", "--embed", "photos", "--checkpoints", "c"])
    )
    count.add("their embedding", trial.text if trial.how != "run" else "")
    for name in ("cut.jpg", "text.jpg", "bomb.png", "small bomb.png"):
        file = write_bytes(photos, name, bad_images()[name])
        trial = train("--run", "other", "--batch-size", "512")  # none is left out
        named = trial.how == "refused" and name in trial.text
        count.add(f"a run with {name}", "" if named else trial.text or "it ran")
        file.unlink()
    os.mkfifo(photos / "pipe.jpg")
    trial = train("--run", "other", "--batch-size", "512")
    count.add("a run with a pipe", "" if "pipe.jpg" in trial.text else trial.text or "it ran")
    trial = attempt(
        lambda: load_simCLR.main(["folder_resnet10", "--embed", "photos", "--checkpoints", "c"])
    )
    count.add("an embedding with a pipe", trial.text if trial.how != "run" else "")
    (photos / "pipe.jpg").unlink()
    vanished(photos, count)


def vanished(photos: Path, count: Count) -> None:
    """The folder goes away after an epoch: an error, and the run goes on when it is back."""
    real = simclr.Pretraining.finish_epoch

    def finish(run: simclr.Pretraining) -> dict:
        row = real(run)
        if photos.exists():
            photos.rename("away")
        return row

    with mock.patch.object(simclr.Pretraining, "finish_epoch", finish):
        trial = train("--run", "vanished")
    named = trial.how == "refused" and "photos" in trial.text
    count.add("a folder that vanishes", "" if named else trial.text or "it ran")
    trial = train("--run", "vanished")
    named = trial.how == "refused" and "photos" in trial.text
    count.add("a folder that is not there", "" if named else trial.text or "it ran")
    Path("away").rename(photos)
    trial = train("--run", "vanished")
    count.add("a folder that comes back", trial.text if trial.how != "run" else "")


def images(every: int = 1) -> list[Outcome]:
    """Odd image files: each gives exactly its pixels, or an error that names it."""
    with temporary() as folder:
        count = Count("odd images")
        for name, (content, pixels, tolerance) in list(good_images().items())[::every]:
            path = write_bytes(folder, name, content)
            count.add(repr(name)[:60], one_image(path, pixels.astype(int), tolerance))
        for name, content in bad_images().items():
            count.add(name, one_image(write_bytes(folder, name, content), None))
        for name, path in strange_places(folder).items():
            with as_nobody(folder):
                count.add(name, one_image(path, None))
    with temporary() as folder:
        whole_runs(folder, count)
        return [count.outcome()]


# -------------------------------------------------------------------------------------- data sets


def refused_by(count: Count, case: str, call: Callable[[], Any], text: str) -> None:
    """The call must be refused with a line that has `text`."""
    trial = attempt(call)
    fault = "" if trial.how == "refused" and text in trial.text else trial.text or "it was taken"
    count.add(case, fault)


def archives(folder: Path, patch: pytest.MonkeyPatch, count: Count) -> None:
    """CIFAR's archive, whose checksum is right and whose members would be written elsewhere."""
    source, content = make_cifar(folder / "content", patch, "cifar10")
    patch.setattr(source, "url", "http://127.0.0.1:9/nothing")
    root, outside = folder / "root", folder / "outside"
    root.mkdir()
    link, through = tarfile.TarInfo("link"), tarfile.TarInfo("link/canary")
    link.type, link.linkname = tarfile.SYMTYPE, str(folder)
    hard, device = tarfile.TarInfo("hard"), tarfile.TarInfo("device")
    hard.type, hard.linkname = tarfile.LNKTYPE, "../../canary"
    device.type = tarfile.CHRTYPE
    for name, members in {
        "a member with ..": [tarfile.TarInfo("../canary")],
        "a member with .. inside": [tarfile.TarInfo("a/../../canary")],
        "an absolute member": [tarfile.TarInfo(str(folder / "canary"))],
        "a member through a link": [link, through],
        "a hard link outside": [hard],
        "a device": [device],
    }.items():
        archive = root / source.filename
        with tarfile.open(archive, "w:gz") as tar:
            for member in members:
                tar.addfile(member)
        patch.setattr(source, "tgz_md5", md5(archive))
        before = set(folder.iterdir())
        trial = attempt(lambda: utils.load_images("cifar10", "train", root))
        fault = "" if trial.how == "refused" else trial.text or "it was taken"
        if set(folder.iterdir()) != before or outside.exists():
            fault = "it was written outside"
        count.add(name, fault)
    archive = root / source.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(content, source.base_folder)
    whole = archive.read_bytes()
    patch.setattr(source, "tgz_md5", md5(archive))
    for name, cut in {
        "cut": whole[:-200],
        "of a wrong sum": whole[:-1] + b"!",
        "empty": b"",
    }.items():
        archive.write_bytes(cut)
        call = lambda: utils.load_images("cifar10", "train", root)  # noqa: E731
        refused_by(count, f"an archive that is {name}", call, "cifar10 could not be read")
    archive.write_bytes(whole)
    trial = attempt(lambda: utils.load_images("cifar10", "train", root))
    count.add("a good archive", trial.text if trial.how != "run" else "")


def make_fashion(root: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    """FashionMNIST's files, as torchvision looks for them."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for part in ("train", "t10k"):
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            shape = b"".join(n.to_bytes(4, "big") for n in array.shape)
            head = bytes([0, 0, 8, array.ndim]) + shape
            (raw / f"{part}-{kind}-ubyte").write_bytes(head + array.astype(np.uint8).tobytes())
    return raw


def damaged_sets(folder: Path, patch: pytest.MonkeyPatch, count: Count) -> None:
    """Files that are cut, changed, or whose labels are none."""
    source, content = make_cifar(folder, patch, "cifar10")
    patch.setattr(source, "url", "http://127.0.0.1:9/nothing")
    read = lambda: utils.load_images("cifar10", "train", folder)  # noqa: E731
    batch, canary = content / "data_batch_1", folder / "canary"
    whole = batch.read_bytes()
    for name, changed in {
        "cut": whole[: len(whole) // 2], "of a wrong sum": whole[:-3] + b"xx.",
        "that runs code": pickle.dumps(Calls(os.system, f"touch {canary}")),
    }.items():  # fmt: skip
        batch.write_bytes(changed)
        refused_by(count, f"a CIFAR batch {name}", read, "cifar10 could not be read")
        count.add(f"a CIFAR batch {name}, unexecuted", "it was executed" * canary.exists())
    for labels in ([10], [-1], [0, 1], []):
        entry = {"data": np.zeros((1, 3072), np.uint8), "labels": labels}
        batch.write_bytes(pickle.dumps(entry))
        files = [[n, md5(content / n)] for n, _ in source.train_list]
        patch.setattr(source, "train_list", files)
        refused_by(count, f"CIFAR labels {labels}", read, "labels")
    patch.setattr(torchvision.datasets.FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    fashion = lambda: utils.load_images("fashion-mnist", "train", folder)  # noqa: E731
    pixels = np.zeros((3, 28, 28))
    for name, images, labels in (
        ("labels of 200", pixels, np.full(3, 200)), ("fewer labels", pixels, np.zeros(2)),
        ("no images", pixels[:0], np.zeros(0)), ("flat images", pixels[:, 0], np.zeros(3)),
    ):  # fmt: skip
        make_fashion(folder, images, labels)
        refused_by(count, f"Fashion-MNIST of {name}", fashion, "fashion-mnist could not be read")
    raw = make_fashion(folder, pixels, np.zeros(3))
    for name, change in {
        "cut": lambda b: b[:-100], "empty": lambda b: b"",
        "of a strange kind": lambda b: b"\1" + b[1:],
        "of terabytes": lambda b: b[:4] + b"\x7f\xff\xff\xff" * 3 + b[16:],
    }.items():  # fmt: skip
        file = raw / "train-images-idx3-ubyte"
        whole = file.read_bytes()
        file.write_bytes(change(whole))
        refused_by(count, f"Fashion-MNIST {name}", fashion, "fashion-mnist could not be read")
        file.write_bytes(whole)


def odd_folders(folder: Path, count: Count) -> None:
    """Folders of images whose classes are strange: whole runs."""
    pixels = [written(Image.fromarray(grid(16, 16, seed)), "png") for seed in range(12)]

    def lay(*classes: tuple[str, int]) -> None:
        shutil.rmtree("photos", ignore_errors=True)
        shutil.rmtree("c", ignore_errors=True)
        for name, images in classes:
            (Path("photos") / name).mkdir(parents=True)
            for i in range(images):
                write_bytes(Path("photos") / name, f"{i}.png", pixels[i])

    for name, classes in {
        "one class": [("a", 4)], "a class of one image": [("a", 8), ("b", 1)],
        "classes of one image": [("a", 1), ("b", 1), ("c", 1)],
        "an empty class": [("a", 6), ("b", 6), ("c", 0)],
        "a test class that is empty": [
            ("train/a", 4), ("train/b", 4), ("test/a", 2), ("test/b", 0),
        ],
        "a class of one in the test": [("train/a", 1), ("train/b", 4), ("test/a", 1)],
    }.items():  # fmt: skip
        lay(*classes)
        trial = train()
        count.add(f"a folder of {name}", trial.text if trial.how != "run" else "")
        if trial.how == "run" and "one class" not in name:
            evaluate = ["--tasks", "knn", "linear", "--checkpoints", "c", "--figures", "f"]
            trial = attempt(lambda flags=evaluate: load_simCLR.main(["folder_resnet10", *flags]))
            none = "no labelled test images" in trial.text
            count.add(f"its evaluation ({name})", "" if trial.how == "run" or none else trial.text)
    lay(("train/a", 4), ("train/b", 4), ("test/zebra", 2))
    refused_by(count, "a test class that is new", lambda: simclr.main(TINY), "zebra")
    lay(("a", 4), ("b", 0))
    for i in range(3):
        write_bytes(Path("photos/b"), f"{i}.png", b"broken")
    refused_by(count, "a class of broken images", lambda: simclr.main(TINY), "photos/b/")
    lay(("a", 0))
    refused_by(count, "no images at all", lambda: simclr.main(TINY), "no images")
    lay(("a", 4), ("b", 4))
    for i in range(4):
        for name in "ab":
            write_bytes(
                Path("photos") / name, f"{i}.png", written(Image.new("RGB", (16, 16)), "png")
            )
    trial = train()
    count.add("images that are all black", "" if "collapsed" in trial.text else trial.text or "-")
    locked = Path("photos/b")
    locked.chmod(0)
    with as_nobody(folder):
        refused_by(
            count, "a class folder that cannot be read",
            lambda: utils.load_images("folder", "pretrain", "photos"), "photos/b",
        )  # fmt: skip
    locked.chmod(0o755)


def data_sets(runs: bool = True) -> list[Outcome]:
    """Downloads and folders that are damaged, dangerous or strange. runs: also whole ones."""
    count = Count("strange data sets")
    for build in (archives, damaged_sets):
        with temporary() as folder, pytest.MonkeyPatch.context() as patch:
            build(folder, patch, count)
    with temporary() as folder:
        if runs:
            odd_folders(folder, count)
    return [count.outcome()]


# ---------------------------------------------------------------------------------- command lines


def words(text: str, *more: str) -> list[str]:
    return [*text.split(), *more]


WHOLE = words(
    """0 1 2 3 7 8 16 64 -1 -5 1000 65536 4096 10000 1000000 2147483648 9223372036854775808 1e3
    0x10 1_0 ５ nan 1.5 -0 +3 --5 many""", "", " 5", "9" * 400, "9" * 5000,
)  # fmt: skip
REAL = words(
    """0 1 0.5 0.1 1e-3 100 -1 -0.0 nan inf -inf 1e308 -1e308 1e-308 1e400 1e-400 16 17 0.999 1,5 ½
    0x1p3 many""", "", "9" * 5000,
)  # fmt: skip
TEXT = words(
    """. .. nowhere a/b file file/x folder pipe empty photos /proc/x /proc/self/x/y /dev/null/x
    ../up ~ * $HOME views.png views.xyz folder.png new/views.pdf /proc/x.png out.csv out.npz cpu
    cuda:99 meta cpu:7 cuda:-1 mps 1% 101% 1e-9 3 0 1/2 2/1 1/0 ½/2 digits cifar10 None""",
    "", " ", "a\nb", "a\tb", "🦎", "\udcff", "\x1b[31m", "'; touch x; '", "x" * 300, "x" * 5000,
    "/".join("ab" * 3000),
)  # fmt: skip
WORDS = words(
    """nowhere r c/r c/r/last.pt file folder all temperature -- - --nonsense --epoch 3 --help --=x
    --lr= -h --overwrite --show-views""", "", "x" * 5000, "🦎", "\udcff", "a\nb",
)  # fmt: skip
NEEDED = {  # so that a line without faults is a run of little work
    "simclr.py": ["--arch", "resnet10", "--width", "0.0625", "--epochs", "1", "--batch-size", "8",
                  "--warmup-epochs", "0", "--head-dim", "8", "--device", "cpu"],
    "load_simCLR.py": ["c/r", "--device", "cpu"],
    "tSNE.py": ["c/r", "--device", "cpu", "--method", "pca"],
    "ablation_SimCLR.py": ["temperature", "--width", "0.0625", "--device", "cpu", "--seeds", "1"],
}  # fmt: skip
SCRIPTS = {
    "simclr.py": (simclr.main, (simclr.Config,)),
    "load_simCLR.py": (load_simCLR.main, (load_simCLR.Options,)),
    "tSNE.py": (tSNE.main, (tSNE.Options,)),
    "ablation_SimCLR.py": (ablation_SimCLR.main, (ablation_SimCLR.Options, simclr.Config)),
}
LARGE = 64, 2_000_000  # px of images and number of weights: such runs end where training begins


class Enough(SystemExit):
    """All is decided: what is left is work."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__(0)


def enough(*_: Any, **__: Any) -> None:
    raise Enough


def few_digits(dataset: str, split: str, data_dir: str | Path = "data") -> utils.Images:
    """Forty images in place of the digits; other data sets as they are."""
    if dataset != "digits":
        return LOAD_IMAGES(dataset, split, data_dir)
    n = 20 if split == "test" else 40
    images = torch.arange(n * 3 * 64).mul(37).remainder(256).view(n, 3, 8, 8).to(torch.uint8)
    return ImageSet(images, torch.arange(n) % 10, tuple("0123456789"))


def few_splits(
    dataset: str, splits: tuple[str, ...], data_dir: str | Path = "data"
) -> list[utils.Images]:
    if dataset != "digits":
        return LOAD_SPLITS(dataset, splits, data_dir)
    return [few_digits(dataset, split) for split in splits]


LOAD_IMAGES, LOAD_SPLITS, MAKE_MODEL = utils.load_images, utils.load_splits, simclr.make_model


def small_model(config: simclr.Config) -> simclr.SimCLR:
    with torch.device("meta"):
        weights = sum(p.numel() for p in simclr.SimCLR(config).parameters())
    if config.image_size > LARGE[0] or weights > LARGE[1]:
        raise Enough
    return MAKE_MODEL(config)


@contextlib.contextmanager
def little_work(all_of_it: bool = False) -> Iterator[None]:
    """Inside, commands see few digits, and stop where nothing but work is left."""

    def finish(run: simclr.Pretraining) -> dict:
        row = real(run)
        if len(run.log) > 1:
            raise Enough
        return row

    real = simclr.Pretraining.finish_epoch
    offline = mock.Mock(side_effect=urllib.error.URLError("no network here"))
    with contextlib.ExitStack() as stack:
        patches = [
            (utils, "load_images", few_digits),
            (utils, "load_splits", few_splits),
            (urllib.request, "urlopen", offline),
        ]
        if not all_of_it:
            patches += [
                (simclr, "make_model", small_model),
                (simclr.Pretraining, "finish_epoch", finish),
                (simclr.FigureKeeper, "draw", mock.Mock()), (simclr, "evaluate", enough),
                (load_simCLR, "evaluate", enough), (tSNE, "draw_panels", enough),
                (ablation_SimCLR, "do", enough), (ablation_SimCLR.Clock, "seconds", enough),
            ]  # fmt: skip
        for where, name, new in patches:
            stack.enter_context(mock.patch.object(where, name, new))
        yield


def furnish(folder: Path) -> None:
    """What the command lines find: a run, a file, a folder, a pipe, photographs."""
    (folder / "file").write_text("a file\n")
    (folder / "folder").mkdir()
    (folder / "folder.png").mkdir()
    (folder / "empty").touch()
    os.mkfifo(folder / "pipe")
    for i in range(8):
        content = written(Image.fromarray(grid(8 + i % 2, 8, i)), "png")
        write_bytes(folder / "photos" / "ab"[i % 2], f"{i}.png", content)
    Base(folder)
    base = Base(folder / "made")
    base.config.checkpoints, base.config.figures = "c", "f"
    config = dataclasses.asdict(base.config)
    utils.save_checkpoint(folder / "c" / "r" / "last.pt", {**base.state, "config": config})
    shutil.rmtree(folder / "made")


def content_of(folder: Path) -> dict[str, bytes | None]:
    """Names below a folder, and what is in the files."""
    found = {}
    for place, folders, files in os.walk(folder):
        found |= {os.path.join(place, name): None for name in folders}
        for name in files:
            path = os.path.join(place, name)
            found[path] = Path(path).read_bytes() if os.path.isfile(path) else None
    return found


def flags_of(options: type) -> Any:
    """A flag of a dataclass with a value that is mostly bad, as words."""
    from hypothesis import strategies as st

    def one(field: dataclasses.Field) -> Any:
        name, choices = utils.flag(field.name), field.metadata["choices"]
        if field.type == "bool":
            return st.sampled_from([[name], [name.replace("--", "--no-")], [f"{name}=1"]])
        values = {"int": WHOLE, "float": REAL}.get(field.type, TEXT)
        value = st.sampled_from([*choices, *TEXT[:12]] if choices else values)
        if isinstance(field.default, tuple):
            return st.lists(value, max_size=3).map(lambda words: [name, *words])
        joined = value.map(lambda text: [f"{name}={text}"])
        return joined | joined | value.map(lambda text: [name, text]) | st.just([name])

    return st.one_of([one(field) for field in dataclasses.fields(options)])


def lines_of(script: str) -> Any:
    """Command lines of a script, as lists of words."""
    from hypothesis import strategies as st

    words = st.sampled_from(WORDS).map(lambda word: [word])
    given = st.one_of([flags_of(options) for options in SCRIPTS[script][1]])
    parts = st.lists(st.one_of(given, given, given, given, words), max_size=4)
    needed = st.sampled_from([NEEDED[script]] * 9 + [NEEDED[script][:1]])
    return st.tuples(needed, parts).map(lambda x: [*x[0], *(w for part in x[1] for w in part)])


def command_line(script: str, argv: list[str], above: Path) -> tuple[Trial, str]:
    """What becomes of a command line, and what is wrong with that, or "". Tidies up."""
    before = content_of(above)
    trial = attempt(lambda: SCRIPTS[script][0](argv))
    after = content_of(above)
    fault = trial.text if trial.how == "broken" else ""
    if trial.how == "refused":
        changed = {path for path in after if path not in before or after[path] != before[path]}
        changed |= set(before) - set(after)
        if "not finite" in trial.text:  # it had begun: it leaves the folders that it made
            changed = {path for path in changed if not os.path.isdir(path)}
        if changed:
            fault = f"it leaves {sorted(changed)[0]!r} behind: {trial.text}"
        if len(trial.text) > utils.LONGEST_MESSAGE + 50:
            fault = f"a line of {len(trial.text):,} characters"
    if after != before:
        for path in above.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        prepare(above)
    return trial, fault


def prepare(above: Path) -> None:
    """A furnished folder below `above`, and go there."""
    work = above / "work"
    shutil.copytree(above.parent / "furnished", work, copy_function=copy_any)
    os.chdir(work)


def copy_any(source: str, target: str) -> str:
    if os.path.isfile(source):
        return shutil.copy(source, target)
    os.mkfifo(target)
    return target


def commands(tries: int = 2000, seed: int = 0) -> list[Outcome]:
    """Fuzzed command lines of all scripts, and some that are run to their end."""
    with temporary() as folder:
        (folder / "furnished").mkdir()
        furnish(folder / "furnished")
        above = folder / "above"
        above.mkdir()
        prepare(above)
        outcomes = []
        for script in SCRIPTS:
            count, how = Count(f"command lines of {script}"), collections.Counter()

            def check(argv: list[str], script: str = script, count: Count = count,
                      how: collections.Counter = how) -> None:  # fmt: skip
                trial, fault = command_line(script, argv, above)
                how[trial.how] += 1
                count.add(" ".join(word[:60] for word in argv), fault)

            with little_work():
                fuzz(lines_of(script), max(1, tries // len(SCRIPTS)), seed, check)
            count.name += f" ({how['run']} run, {how['refused']} refused)"
            outcomes.append(count.outcome())
        whole = Count("command lines run to their end")
        with little_work(all_of_it=True):
            for line in WHOLE_LINES[:: 1 if tries >= 1000 else 10]:
                script, *argv = line.split()
                _, fault = command_line(script, [*NEEDED[script], *argv], above)
                whole.add(line, fault)
        return [*outcomes, whole.outcome()]


WHOLE_LINES = [
    "simclr.py", "simclr.py --batch-size 1000000000", "simclr.py --image-size 256",
    "simclr.py --head-dim 65536", "simclr.py --arch resnet152 --width 16",
    "simclr.py --head-hidden 65536 --head-dim 65536 --width 4", "simclr.py --temperature 1e-30",
    "simclr.py --temperature 1e30", "simclr.py --lr 1e30", "simclr.py --color-strength 1e30",
    "simclr.py --seed 9223372036854775807", "simclr.py --weight-decay 1e30",
    "simclr.py --rotation 180",
    "simclr.py --dataset folder --data-dir photos --workers 10000 --image-size 8",
    "simclr.py --dataset folder --data-dir photos --workers 0 --image-size 300",
    "simclr.py --precision bfloat16 --blur-p 1 --flip 1", "simclr.py --projection none",
    "simclr.py --show-views views.png --image-size 4096", "simclr.py --crop-min 1e-30",
    "simclr.py --batch-size 2", "simclr.py --save-every 1000000 --keep-every 1 --optimizer lars",
    "load_simCLR.py --tasks knn linear", "load_simCLR.py --embed photos --workers 10000",
    "load_simCLR.py --embed photos --image-size 2000",
    "load_simCLR.py --export x.pt --image-size 9",
    "load_simCLR.py --classify photos --out x.csv", "tSNE.py", "tSNE.py --thumbnails --images 2",
    "tSNE.py --method tsne --perplexity 2", "tSNE.py --method tsne --perplexity 1 --images 4",
    "ablation_SimCLR.py --epochs 1 --batch-size 8 --dry-run",
    "tSNE.py --panels pixels --format svg",
]  # fmt: skip

# ---------------------------------------------------------------------------------------- numbers

TEMPERATURES = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)


def embeddings() -> dict[str, torch.Tensor]:
    """Projections (2N, D) in float64 that float32 and bfloat16 hold exactly, by their kind."""
    random = torch.Generator().manual_seed(0)
    z = torch.randn(16, 12, generator=random).bfloat16().double()
    one = z[:1].expand(16, -1).clone()
    some_zero = z.clone()
    some_zero[3] = some_zero[8] = 0
    return {
        "random": z, "two images": z[:4].clone(), "wide": z.repeat(1, 40),
        "one dimension": z[:, :1].clone(),
        "all equal": one, "partners equal": z[:8].repeat(2, 1),
        "opposite": torch.cat([z[:8], -z[:8]]),
        "zero": 0 * z, "some zero": some_zero, "one-hot": torch.eye(16, dtype=torch.float64),
        "huge": (z * 2.0**100).float().double(), "tiny": (z * 2.0**-100).float().double(),
        "of all sizes": z * 2.0 ** torch.arange(-60, 68, 8, dtype=torch.float64)[:, None],
    }  # fmt: skip


def value_and_gradient(
    loss: Callable, z: torch.Tensor, tau: float, autocast: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    z = z.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = loss(*z.chunk(2), tau, 0.5)
    value.backward()
    return value.detach(), z.grad


def losses(count: Count) -> None:
    """Value and gradient of each loss are finite, and those of float64."""
    for name, loss in ablation_SimCLR.LOSSES.items():
        for kind, z in embeddings().items():
            cosine = name != "nt-xent-dot"
            if not cosine and kind in ("huge", "of all sizes"):
                continue  # its value is beyond float32; check_finite() ends such a run
            for tau in TEMPERATURES:
                exact = value_and_gradient(loss, z, tau)
                if "semi-hard" in name:  # of equal negatives either may be taken
                    exact = exact[0], torch.full_like(z, torch.nan)
                for dtype in (torch.float32, torch.bfloat16):
                    low = z.to(dtype)
                    for autocast in (False, True) if torch.equal(low.double(), z) else ():
                        found = value_and_gradient(loss, low, tau, autocast)
                        fault = differs(found, exact, z, 1 if "margin" in name else tau, cosine)
                        case = f"{name}, {kind}, tau {tau}, {dtype}, autocast {autocast}"
                        count.add(case, fault)


def differs(
    found: tuple[torch.Tensor, torch.Tensor], exact: tuple[torch.Tensor, torch.Tensor],
    z: torch.Tensor, tau: float, cosine: bool,
) -> str:  # fmt: skip
    """Whether a value and a gradient (2N, D) are not float64's, as far as their dtype resolves.

    float32 has 7 digits of a similarity, which is divided by tau, and the gradient by it again. A
    gradient of cosines is inversely proportional to the length of z, and so is compared times it.
    """
    value, gradient = found[0].double(), found[1].double()
    if not (value.isfinite() and gradient.isfinite().all()):
        return f"not finite: {value.item()}, gradient {gradient.norm().item()}"
    lengths = z.norm(dim=1, keepdim=True)
    size = 1.0 if cosine else lengths.max().item()
    digits = 4e-6 * size**2 / tau
    if abs(value - exact[0]) > 1e-5 * abs(exact[0]) + digits:
        return f"{value.item()} instead of {exact[0].item()}"
    scale = lengths.clamp(min=1e-12) if cosine else 1.0
    error, right = ((gradient - exact[1]) * scale).norm(dim=1), (exact[1] * scale).norm(dim=1)
    share = 0.02 if found[1].dtype == torch.bfloat16 else 1e-4
    if (error > share * right + (digits + 1e-6) * size / tau).any():  # never where right is NaN
        return f"gradient off by {error.max().item()} of {right.max().item()}"
    return ""


def classifiers(count: Count) -> None:
    """Features and labels from which there is nothing to learn."""
    random = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    kinds = {
        "constant": torch.ones(12, 5), "zero": torch.zeros(12, 5), "random": random,
        "huge": random * 1e30, "tiny": random * 1e-30, "one feature": random[:, :1],
    }  # fmt: skip
    numbers = torch.arange(12)
    labellings = {
        "two": numbers % 2, "one class": 0 * numbers, "one image each": numbers,
        "one of one": (numbers == 0).long(),
    }  # fmt: skip
    for kind, x in kinds.items():
        for name, y in labellings.items():
            classes = int(y.max()) + 1
            trial = attempt(lambda x=x, y=y, k=classes: utils.knn_predict(x, y, x, k))
            fine = trial.how == "run" and trial.value.min() >= 0 and trial.value.max() < classes
            count.add(f"kNN of {kind} features, {name}", "" if fine else trial.text or "no class")
            trial = attempt(lambda x=x, y=y, k=classes: utils.fit_linear_classifier(x, y, k)(x))
            fine = trial.how == "run" and trial.value.isfinite().all()
            count.add(
                f"linear of {kind} features, {name}", "" if fine else trial.text or "not finite"
            )


def collapsed(count: Count) -> None:
    """A run whose views are all alike says so, once, and in its log; another does not."""
    with temporary() as folder:
        base = Base(folder)
        part = base.data.train
        for name, images, alike in (
            ("black images", torch.zeros_like(part.images), True), ("images", part.images, False),
        ):  # fmt: skip
            shown = dataclasses.replace(part, images=images)
            run, said = (
                simclr.Pretraining(base.config, simclr.Data(*[shown] * 3), CPU),
                io.StringIO(),
            )
            with contextlib.redirect_stderr(said):
                base.one_epoch(run)
                base.one_epoch(run)
            marked, text = [row.get("collapsed", False) for row in run.log], said.getvalue()
            right = marked == [alike] * 2 and text.count("\n") == text.count("collapsed") == alike
            count.add(f"collapse of {name}", "" if right else f"{marked}, {text!r}")


def numbers() -> list[Outcome]:
    """Losses at extremes, classifiers with nothing to learn, collapse."""
    outcomes = []
    for name, part in {
        "losses at extremes": losses, "classifiers at extremes": classifiers, "collapse": collapsed,
    }.items():  # fmt: skip
        count = Count(name)
        part(count)
        outcomes.append(count.outcome())
    return outcomes


def show(outcomes: list[Outcome]) -> None:
    for row in outcomes:
        print(f"{row.name:32}{row.survived:6}/{row.tried:<6}{row.seconds:8.1f} s")
        for failure in row.failures[:40]:
            print(f"    {utils.one_line(failure, 400)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tries", type=int, default=2000, help="command lines; a sixth: states")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("parts", nargs="*", help="checkpoints images data commands numbers")
    options = parser.parse_args()
    parts = {
        "checkpoints": lambda: checkpoints(options.tries // 6, options.seed),
        "images": images,
        "data": data_sets,
        "commands": lambda: commands(options.tries, options.seed),
        "numbers": numbers,
    }
    for name in options.parts or parts:
        show(parts[name]())


if __name__ == "__main__":
    main()
