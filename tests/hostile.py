"""Strange images, data sets, command lines and numbers: what must become of each.

    python tests/hostile.py                  # all of it, some minutes

The outcome is always a run or one clear line with exit code 2, in seconds. test_hostile.py does a
sample.

Reading order: a trial · images · data sets · command lines · numbers · the table.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import os
import resource
import shutil
import struct
import sys
import tempfile
import time
import urllib.error
import urllib.request
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NoReturn
from unittest import mock

import numpy as np
import torch
from PIL import Image

import conftest  # makes the scripts importable

# isort: split
import ablation_SimCLR
import load_simCLR
import simclr
import tSNE
import utils
from utils import Images, InputError

CPU = torch.device("cpu")
SECONDS = 20.0  # of computing: a trial that takes longer has failed; most take a tenth
MEMORY = 8 * 2**30  # bytes of address space that a trial gets, to protect the machine

# ---------------------------------------------------------------------------------------- a trial


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Context manager that limits how much more memory this process can take."""
    pages, limits = Path("/proc/self/statm").read_text().split()[0], resource.RLIMIT_AS
    before = resource.getrlimit(limits)
    resource.setrlimit(limits, (int(pages) * resource.getpagesize() + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(limits, before)


@dataclasses.dataclass
class Trial:
    """What became of a call. how: "run", "refused" or "broken". text: the line, or what broke."""

    how: str
    text: str = ""
    value: Any = None


def attempt(call: Callable[[], Any]) -> Trial:
    """Call a command or a function of the project, and judge what becomes of it."""
    out, err = io.StringIO(), io.StringIO()
    started = time.process_time()
    with warnings.catch_warnings(record=True) as warned, bounded():
        warnings.simplefilter("always")
        for kind in (DeprecationWarning, PendingDeprecationWarning, ResourceWarning):
            warnings.filterwarnings("ignore", category=kind)  # Python does not show these
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            trial = call_and_catch(call, err)
    seconds = time.process_time() - started
    if trial.how == "run" and not only_warnings(err.getvalue().splitlines()):
        return Trial("broken", f"a run that says {err.getvalue()[:300]!r}")
    if trial.how != "broken" and warned:
        return Trial("broken", f"a stray warning: {warned[0].message}")
    if trial.how != "broken" and seconds > SECONDS:
        return Trial("broken", f"took {seconds:.0f} s")
    return trial


def call_and_catch(call: Callable[[], Any], err: io.StringIO) -> Trial:
    """The Trial of a call by how it ends. err: its stderr."""
    try:
        return Trial("run", value=call())
    except InputError as error:
        return Trial("refused", str(error))
    except SystemExit as end:
        if end.code in (None, 0):
            return Trial("run")
        *before, last = err.getvalue().splitlines() or [""]
        if end.code == 2 and ": error: " in last and only_warnings(before):
            return Trial("refused", last)
        return Trial("broken", f"exit code {end.code} and {err.getvalue()[-300:]!r}")
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return Trial("broken", f"{type(error).__name__}: {str(error)[:300]}")


def only_warnings(lines: list[str]) -> bool:
    return all(line.startswith(("warning: ", "photos: grey pictures")) for line in lines)


@dataclasses.dataclass
class Outcome:
    """One kind of fault. note: what is to be said of it. failures: a line each."""

    name: str
    tried: int = 0
    note: str = ""
    failures: list[str] = dataclasses.field(default_factory=list)

    def add(self, case: str, *faults: str) -> None:
        """Count a fault that was tried. faults: what was wrong with what became of it, or ""."""
        self.tried += 1
        if wrong := [fault for fault in faults if fault]:
            self.failures.append(f"{self.name}: {case}: {', '.join(wrong)}")

    def must_run(self, case: str, call: Callable[[], Any]) -> None:
        trial = attempt(call)
        self.add(case, "" if trial.how == "run" else trial.text)

    def must_be_refused(self, case: str, call: Callable[[], Any], text: str) -> None:
        """The call must be refused with a line that has `text`."""
        trial = attempt(call)
        fine = trial.how == "refused" and text in trial.text
        self.add(case, "" if fine else trial.text or "it was taken")


@contextlib.contextmanager
def temporary() -> Iterator[Path]:
    """Context manager: a temporary folder, which is also the current one."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="hostile-") as name:
        os.chdir(name)
        try:
            yield Path(name)
        finally:
            os.chdir(here)


def words(text: str, *others: str) -> list[str]:
    return [*text.split(), *others]


class Calls:
    """Would call function(*arguments) if it were unpickled: for tests of reading checkpoints."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple:
        return self.function, self.arguments


# ----------------------------------------------------------------------------------------- images


def noise(height: int = 6, width: int = 8, seed: int = 0) -> np.ndarray:
    """Pixels without a pattern: uint8 (H, W, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(width: int, height: int, pixels: bytes, depth: int = 8) -> bytes:
    """An RGB PNG file with these compressed rows, whatever its header says."""
    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, content in ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")):
        parts.append(struct.pack(">I", len(content)) + kind + content)
        parts.append(struct.pack(">I", zlib.crc32(kind + content)))
    return b"".join(parts)


def encoded(image: Image.Image | np.ndarray, kind: str = "png", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Colours (H, W, 3) with alpha (H, W) in [0, 255] before white, rounded."""
    share = alpha[..., None] / 255
    return np.round(colour * share + 255 * (1 - share)).astype(np.uint8)


Good = dict[str, tuple[bytes, np.ndarray, int]]  # name -> (content, its pixels, largest error)
ODD_NAMES = ("two  spaces .png", "new\nline.png", "emoji 🦎.png", "\udcff\udcfe.png", "-rf.png")


def good_images() -> Good:
    """Strange files that are images."""
    x, long = noise(), noise(1, 60_000)
    jpeg = encoded(x, "jpeg", quality=95)
    as_jpeg = np.asarray(Image.open(io.BytesIO(jpeg)))
    frames = [Image.new("RGB", (4, 3), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    files: Good = {
        "a 1x1 image.png": (encoded(x[:1, :1]), x[:1, :1], 0),
        "60,000 x 1.png": (encoded(long), long, 0),
        "one bit.png": (encoded(Image.new("1", (3, 2), 1)), np.full((2, 3, 3), 255), 0),
        "JPEG named.png": (jpeg, as_jpeg, 0),
        "PNG named.JPEG": (encoded(x), x, 0),
        "CMYK.jpg": (encoded(Image.new("CMYK", (8, 8)), "jpeg"), np.full((8, 8, 3), 255), 2),
        "odd EXIF.jpg": (encoded(x, "jpeg", quality=95, exif=b"Exif\0\0junk"), as_jpeg, 0),
        "a profile that is none.png": (encoded(x, icc_profile=bytes(1000)), x, 0),
    }  # fmt: skip
    for kind in ("gif", "png", "webp"):
        options = dict(save_all=True, append_images=frames[1:], lossless=True)
        files[f"animated.{kind}"] = encoded(frames[0], kind, **options), np.asarray(frames[0]), 0
    for orientation, turn in {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: np.rot90,
    }.items():  # fmt: skip
        exif = Image.Exif()
        exif[0x0112] = orientation
        as_turned = encoded(x, "jpeg", quality=95, exif=exif)
        files[f"turned {orientation}.png"] = encoded(x, exif=exif), turn(x), 0
        files[f"turned {orientation}.jpg"] = as_turned, turn(as_jpeg), 0
    return files | colours_and_alpha(x) | {name: (encoded(x), x, 0) for name in ODD_NAMES}


def colours_and_alpha(x: np.ndarray) -> Good:
    """Files with 16 bits, other colour spaces, palettes and transparency. x: uint8 (H, W, 3)."""
    random = np.random.default_rng(1)
    deep = random.integers(0, 65536, x.shape, dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    deep_png = png(*x.shape[1::-1], zlib.compress(rows), depth=16)
    shallow = np.round(deep / 257).astype(np.uint8)
    alpha = random.integers(0, 256, x.shape[:2], dtype=np.uint8)
    grey, shallow_grey = (a[..., :1].repeat(3, 2) for a in (x, shallow))
    key, keyed = tuple(map(int, x[0, 0])), np.where((x == x[0, 0]).all(2), 0, 255)
    palette, ink = Image.new("P", (2, 1)), Image.new("CMYK", (2, 1))
    palette.putpalette([200, 10, 30, 20, 90, 60])
    palette.putpixel((1, 0), 1)
    ink.putpixel((1, 0), (255, 0, 0, 0))
    two = np.array([[[200, 10, 30], [20, 90, 60]]], np.uint8)
    half, first = (on_white(two, np.array([[0, a]])) for a in (128, 255))
    return {
        "16-bit grey.png": (encoded(deep[..., 0]), shallow_grey, 1),
        "16-bit grey.tif": (encoded(deep[..., 0], "tiff"), shallow_grey, 1),
        "16-bit RGB.png": (deep_png, shallow, 1),
        "grey and alpha.png": (encoded(np.dstack([x[..., 0], alpha])), on_white(grey, alpha), 1),
        "RGB and alpha.png": (encoded(np.dstack([x, alpha])), on_white(x, alpha), 1),
        "colour key.png": (encoded(x, transparency=key), on_white(x, keyed), 0),
        "palette.png": (encoded(palette), two, 0),
        "palette of shares.png": (encoded(palette, transparency=bytes([0, 128])), half, 1),
        "palette, clear.png": (encoded(palette, transparency=0), first, 0),
        "CMYK.tif": (encoded(ink, "tiff"), np.array([[[255] * 3, [0, 255, 255]]]), 0),
    }


def bad_images() -> dict[str, bytes]:
    """File name -> content that is not an image."""
    image, pixels = noise(40, 40), zlib.compress(bytes(1000))
    jpeg, whole = encoded(image, "jpeg"), encoded(image)
    return {
        "nothing.jpg": b"", "text.jpg": b"This is no photograph.\n" * 50, "zeros.png": bytes(5000),
        "cut.jpg": jpeg[: len(jpeg) // 2], "cut.png": whole[: len(whole) // 2],
        "cut.gif": encoded(image, "gif")[:200], "cut.webp": encoded(image, "webp")[:300],
        "cut.tif": encoded(image, "tiff")[:2000], "wrong sum.png": whole[:20] + b"?" + whole[21:],
        # 10,000 megapixels, and 100: beyond both of PIL's limits, and beyond the lower one
        "bomb.png": png(100_000, 100_000, pixels), "small bomb.png": png(10_000, 10_000, pixels),
    }  # fmt: skip


def write_bytes(path: Path, content: bytes) -> Path:
    """A file of a name that need not be text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def judge_good(path: Path, pixels: np.ndarray, tolerance: int) -> str:
    """What is wrong with how an image is read, or ""."""
    size, read = (attempt(lambda f=f: f(path)) for f in (utils.image_size, conftest.read_image))
    if size.how != "run" or read.how != "run":
        return size.text or read.text
    if size.value != pixels.shape[:2]:
        return f"its size is said to be {size.value}"
    image = read.value.permute(1, 2, 0).numpy().astype(int)
    same = image.shape == pixels.shape and np.abs(image - pixels).max() <= tolerance
    return "" if same else f"other pixels than expected: {image.ravel()[:9]}"


def judge_bad(path: Path) -> str:
    """What is wrong with how a file that is not an image is read, or ""."""
    size, read = (attempt(lambda f=f: f(path)) for f in (utils.image_size, conftest.read_image))
    if read.how != "refused" or str(path) not in read.text:
        return read.text or "was taken for an image"
    return size.text if size.how == "broken" else ""


TINY = words(
    "--dataset folder --data-dir photos --arch resnet10 --width 0.0625 --epochs 2 --batch-size 8 "
    "--image-size 16 --head-dim 8 --blur-p 0 --device cpu --workers 0 --checkpoints c --figures f"
)


def train(*flags: str) -> None:
    simclr.main([*TINY, *flags])


def embed() -> None:
    load_simCLR.main(["photos_resnet10", "--embed", "photos", "--checkpoints", "c"])


def images() -> list[Outcome]:
    """Odd image files: each gives exactly its pixels, or an error that names it."""
    count, good, bad = Outcome("odd images"), good_images(), bad_images()
    with temporary() as folder:
        for name, (content, pixels, tolerance) in good.items():
            path = write_bytes(folder / name, content)
            count.add(repr(name)[:60], judge_good(path, pixels.astype(int), tolerance))
        for name, content in bad.items():
            count.add(name, judge_bad(write_bytes(folder / name, content)))
        os.symlink(folder / "nowhere", folder / "dangling.png")
        (folder / "folder.jpg").mkdir()
        for name in ("dangling.png", "folder.jpg", "gone.png"):
            count.add(name, judge_bad(folder / name))
    with temporary() as folder:  # whole runs
        for name, (content, *_) in good.items():
            write_bytes(folder / "photos" / name, content)
        count.must_run("a run on all the strange ones", train)
        count.must_run("their embedding", embed)
        other = functools.partial(train, "--run", "other", "--batch-size", "512")  # all of them
        for name in ("cut.jpg", "text.jpg", "bomb.png"):
            file = write_bytes(folder / "photos" / name, bad[name])
            count.must_be_refused(f"a run with {name}", other, name)
            shutil.rmtree(folder / "c" / "other")
            file.unlink()
    return [count]


# -------------------------------------------------------------------------------------- data sets


def lay(*classes: tuple[str, int]) -> None:
    """Write photos/<class>/ with so many images of noise each; no run remains."""
    for name in ("photos", "c"):
        shutil.rmtree(name, ignore_errors=True)
    for name, images in classes:
        (Path("photos") / name).mkdir(parents=True)
        for i in range(images):
            write_bytes(Path("photos") / name / f"{i}.png", encoded(noise(16, 16, i)))


def data_sets() -> list[Outcome]:
    """Folders of images with strange classes: whole runs."""
    count = Outcome("strange data sets")
    flags = words("photos_resnet10 --tasks knn linear --checkpoints c --figures f")
    with temporary():
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
            count.must_run(f"a folder of {name}", train)
            trial = attempt(lambda: load_simCLR.main(flags))
            unlabelled = trial.how == "refused" and "no labelled test images" in trial.text
            fine = trial.how == "run" or unlabelled
            count.add(f"its evaluation ({name})", "" if fine else trial.text)
        lay(("a", 4), ("b", 0))
        for i in range(3):
            write_bytes(Path(f"photos/b/{i}.png"), b"broken")
        count.must_be_refused("a class of broken images", train, "photos/b/")
        lay(("a", 0))
        count.must_be_refused("no images at all", train, "no images")
    return [count]


# ---------------------------------------------------------------------------------- command lines


VALUES = words(
    """0 1 2 8 16 65536 4096 2147483648 9223372036854775808 -1 --5 0x10 1_0 ５ 0.5 1e-3 1,5 nan inf
    -inf 1e308 1e-308 1e400 . a/b ../up nowhere photos photos/0.png /proc/x /dev/null/x views.png
    views.xyz new/views.pdf out.csv out.npz cpu cuda:99 cuda:-1 meta 1% 101% 1/2 2/1 1/0 digits
    many""", "", " ", "a\nb", "🦎", "\udcff", "\x1b[31m", "'; touch x; '", "x" * 5000, "9" * 5000,
)  # fmt: skip
WORDS = words("nowhere r c/r temperature all -- - --nonsense --epoch 3 --help --=x --lr= -h", "🦎")
NEEDED = {  # so that a line without faults is a run of little work
    "simclr.py": words("--arch resnet10 --width 0.0625 --epochs 1 --batch-size 8 --warmup-epochs 0 "
                       "--head-dim 8 --device cpu"),
    "load_simCLR.py": words("c/r --device cpu"),
    "tSNE.py": words("c/r --device cpu --method pca"),
    "ablation_SimCLR.py": words("temperature --width 0.0625 --device cpu --seeds 1"),
}  # fmt: skip
SCRIPTS = {
    "simclr.py": (simclr.main, (simclr.Config,)),
    "load_simCLR.py": (load_simCLR.main, (load_simCLR.Options,)),
    "tSNE.py": (tSNE.main, (tSNE.Options,)),
    "ablation_SimCLR.py": (ablation_SimCLR.main, (simclr.Config,)),
}
LARGE = 64, 2_000_000  # px of images and number of weights: such runs end where training begins


class Enough(SystemExit):
    """All checks are done, and only work is left."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__(0)


def enough(*_: Any, **__: Any) -> None:
    raise Enough


LOAD_SPLITS, MAKE_MODEL, EPOCH_ROW = utils.load_splits, simclr.make_model, simclr.epoch_row


def few_splits(dataset: str, splits: tuple[str, ...], *arguments: Any, **options: Any) -> list:
    """Forty images, and twenty for testing, in place of the digits; other data sets as they are."""
    if dataset != "digits":
        return LOAD_SPLITS(dataset, splits, *arguments, **options)
    counts = [20 if split == "test" else 40 for split in splits]
    pixels = [torch.arange(n * 192).mul(37).remainder(256).to(torch.uint8) for n in counts]
    return [
        Images(x.view(-1, 3, 8, 8), torch.arange(n) % 10, tuple("0123456789"))
        for x, n in zip(pixels, counts, strict=True)
    ]


def small_model(config: simclr.Config) -> simclr.SimCLR:
    with torch.device("meta"):
        weights = sum(p.numel() for p in simclr.SimCLR(config).parameters())
    if config.image_size > LARGE[0] or weights > LARGE[1]:
        raise Enough
    return MAKE_MODEL(config)


def two_epochs(*arguments: Any) -> dict:
    row = EPOCH_ROW(*arguments)
    if row["epoch"] > 1:
        raise Enough
    return row


@contextlib.contextmanager
def little_work(all_of_it: bool = False) -> Iterator[None]:
    """Context manager: commands see few digits, and stop where only work is left."""
    offline = mock.Mock(side_effect=urllib.error.URLError("no network here"))
    patches = [(utils, "load_splits", few_splits), (urllib.request, "urlopen", offline)]
    if not all_of_it:
        patches += [
            (simclr, "make_model", small_model), (simclr, "epoch_row", two_epochs),
            (simclr, "redraw", mock.Mock()), (simclr, "evaluate", enough),
            (load_simCLR, "evaluate", enough), (tSNE, "draw_panels", enough),
            (ablation_SimCLR, "run_job", enough), (ablation_SimCLR, "list_studies", enough),
        ]  # fmt: skip
    with contextlib.ExitStack() as stack:
        for where, name, new in patches:
            stack.enter_context(mock.patch.object(where, name, new))
        yield


def random_line(script: str, random: Random) -> list[str]:
    """A command line: what is needed, mostly, and up to four flags and words."""
    line = NEEDED[script] if random.random() < 0.9 else NEEDED[script][:1]
    fields = [field for options in SCRIPTS[script][1] for field in dataclasses.fields(options)]
    for _ in range(random.randrange(5)):
        flag = random_flag(random.choice(fields), random)
        line = line + random.choice([flag, flag, flag, flag, [random.choice(WORDS)]])
    return line


def random_flag(field: dataclasses.Field, random: Random) -> list[str]:
    """A flag with a value that is mostly bad."""
    name, choices = utils.flag(field.name), field.metadata["choices"]
    if field.type == "bool":
        return [random.choice([name, name.replace("--", "--no-"), f"{name}=1"])]
    values = [*choices, *VALUES[:12]] if choices else VALUES
    if isinstance(field.default, tuple):
        return [name, *random.choices(values, k=random.randrange(4))]
    value = random.choice(values)
    return random.choice([[f"{name}={value}"], [name, value], [name]])


WHOLE_LINES = [
    "simclr.py --batch-size 1000000000", "simclr.py --image-size 256", "simclr.py --batch-size 2",
    "simclr.py --arch resnet152 --width 16", "simclr.py --temperature 1e-30",
    "simclr.py --head-hidden 65536 --head-dim 65536 --width 4", "simclr.py --temperature 1e30",
    "simclr.py --lr 1e30", "simclr.py --color-strength 1e30", "simclr.py --weight-decay 1e30",
    "simclr.py --crop-min 1e-30", "simclr.py --projection none --seed 9223372036854775807",
    "simclr.py --dataset folder --data-dir photos --workers 10000 --image-size 8",
    "simclr.py --precision bfloat16 --blur-p 1 --flip 1 --keep-every 1 --optimizer lars",
    "simclr.py --show-views views.png --image-size 4096", "load_simCLR.py --tasks knn linear",
    "load_simCLR.py --embed photos --workers 10000 --image-size 2000",
    "load_simCLR.py --export x.pt --image-size 9",
    "load_simCLR.py --classify photos --out x.csv", "tSNE.py --thumbnails --images 2",
    "tSNE.py --method tsne --perplexity 1 --images 4", "tSNE.py --panels pixels --format svg",
]  # fmt: skip


def small_run(folder: Path) -> tuple[simclr.Config, simclr.Data]:
    """Make a run of eight images with one epoch. Returns its settings for two more, and data."""
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8, generator=random)
    part = Images(pixels, torch.arange(8) % 2, ("a", "b"))
    config = simclr.make_config(
        dataset="digits", arch="resnet10", width=0.0625, epochs=3, batch_size=4, device="cpu",
        image_size=8, stem="small", precision="float32", head_dim=8, knn_every=0, run="r",
        checkpoints=str(folder / "c"), figures=str(folder / "f"),
    )  # fmt: skip
    data = simclr.Data(part, part, part)
    with contextlib.redirect_stdout(io.StringIO()):
        simclr.train(dataclasses.replace(config, epochs=1), data, CPU)
    return config, data


def commands(tries: int = 2000) -> list[Outcome]:
    """Random command lines of all scripts, and some that are run to their end."""
    count, whole = Outcome("random command lines"), Outcome("command lines run to their end")
    with temporary() as folder:
        work = folder / "work"  # a line may write to "../up"
        small_run(work)
        os.chdir(work)
        for i in range(8):
            write_bytes(work / "photos" / "ab"[i % 2] / f"{i}.png", encoded(noise(8 + i % 2, 8, i)))
        random, ran = Random(0), 0
        with little_work():
            for script in [name for name in SCRIPTS for _ in range(tries // len(SCRIPTS))]:
                argv = random_line(script, random)
                trial = attempt(functools.partial(SCRIPTS[script][0], argv))
                broken = trial.how == "broken" or len(trial.text) > utils.LONGEST_MESSAGE + 50
                ran += trial.how == "run"
                line = " ".join(word[:60] for word in (script, *argv))
                count.add(line, trial.text if broken else "")
        count.note = f"{ran:,} ran, the others were refused in one line"
        with little_work(all_of_it=True):
            for line in WHOLE_LINES[:: 1 if tries >= 1000 else 10]:
                script, *argv = line.split()
                trial = attempt(functools.partial(SCRIPTS[script][0], [*NEEDED[script], *argv]))
                whole.add(line, trial.text if trial.how == "broken" else "")
    return [count, whole]


# ---------------------------------------------------------------------------------------- numbers

TEMPERATURES = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)


def embeddings() -> dict[str, torch.Tensor]:
    """Projections (2N, D) in float64 that float32 and bfloat16 hold exactly, by their kind."""
    random = torch.Generator().manual_seed(0)
    z = torch.randn(16, 12, generator=random).bfloat16().double()
    some_zero = z.clone()
    some_zero[3] = some_zero[8] = 0
    return {
        "random": z, "two images": z[:4].clone(), "wide": z.repeat(1, 40),
        "one dimension": z[:, :1].clone(), "all equal": z[:1].expand(16, -1).clone(),
        "partners equal": z[:8].repeat(2, 1), "opposite": torch.cat([z[:8], -z[:8]]),
        "zero": 0 * z, "some zero": some_zero, "one-hot": torch.eye(16, dtype=torch.float64),
        "huge": (z * 2.0**100).float().double(), "tiny": (z * 2.0**-100).float().double(),
        "of all sizes": z * 2.0 ** torch.arange(-60, 68, 8, dtype=torch.float64)[:, None],
    }  # fmt: skip


def losses() -> Outcome:
    """Value and gradient of each loss are finite, and the value is float64's."""
    count = Outcome("losses at extremes")
    for name in ablation_SimCLR.LOSSES:
        loss = ablation_SimCLR.Variant(loss_function=name, margin=0.5).loss(simclr.Config())
        for (kind, z), tau in itertools.product(embeddings().items(), TEMPERATURES):
            if name == "nt-xent-dot" and kind in ("huge", "of all sizes"):
                continue  # its value is beyond float32; check_finite() ends such a run
            size = z.norm(dim=1).max().item() ** 2 if name == "nt-xent-dot" else 1.0
            exact = loss(*z.chunk(2), tau).item()
            near = 1e-5 * abs(exact) + 4e-6 * size / tau  # float32 has 7 digits of a similarity
            for dtype in (torch.float32, torch.bfloat16):
                low = z.to(dtype).requires_grad_()
                if torch.equal(low.double(), z):
                    value = loss(*low.chunk(2), tau)
                    value.backward()
                    right = low.grad.isfinite().all() and abs(value.item() - exact) <= near
                    text = f"{value.item()} instead of {exact}, or the gradient is not finite"
                    count.add(f"{name}, {kind}, tau {tau}, {dtype}", "" if right else text)
    return count


def collapsed() -> Outcome:
    """A run whose views are all alike says so, once, and in its log; another does not."""
    count = Outcome("collapse, named in the log")
    with temporary() as folder:
        config, data = small_run(folder)
        pixels = data.train.images
        for name, factor, alike in (("black", 0, True), ("noise", 1, False)):
            shutil.rmtree(config.folder)
            part, printed = dataclasses.replace(data.train, images=factor * pixels), io.StringIO()
            with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
                simclr.train(config, simclr.Data(part, part, part), CPU)
            log = utils.read_jsonl(config.folder / utils.LOG)
            marked, text = [row.get("collapsed", False) for row in log], printed.getvalue()
            right = marked == [alike] * 3 and text.count("\n") == text.count("collapsed") == alike
            count.add(f"images of {name}", "" if right else f"{marked}, {text!r}")
    return count


def numbers() -> list[Outcome]:
    return [losses(), collapsed()]


# -------------------------------------------------------------------------------------- the table

Groups = dict[str, Callable[[], list[Outcome]]]
GROUPS: Groups = {
    "images": images, "data_sets": data_sets, "commands": commands, "numbers": numbers,
}  # fmt: skip


def report(groups: Groups) -> NoReturn:
    """Do all faults, and print what failed and a table. Exit code 1 if something failed."""
    table, failed = ["| fault | group | tried | survived | lost |", "| --- |" + 4 * " --- |"], False
    for group, do in groups.items():
        print(f"{group} …", file=sys.stderr, flush=True)
        for o in do():
            for text in o.failures:
                print(utils.one_line(text), file=sys.stderr, flush=True)
            note = "see above" if o.failures else o.note or "nothing"
            survived = o.tried - len(o.failures)
            table.append(f"| {o.name} | {group} | {o.tried:,} | {survived:,} | {note} |")
            failed |= bool(o.failures)
    print(*table, sep="\n")
    raise SystemExit(failed)


if __name__ == "__main__":
    report(GROUPS)
