"""Small things that several tests need. No test downloads anything."""

import csv
import dataclasses
import hashlib
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import simclr
import utils

ROOT = Path(simclr.__file__).parent
CPU = torch.device("cpu")
TIMES = ("seconds", "knn_seconds", "views_per_second", "wall_seconds")  # differ from run to run
TIMES += tuple(f"{part}_seconds" for part in simclr.TIMED)
TINY = dict(  # a run of seconds
    dataset="digits", width=0.125, epochs=4, batch_size=300, warmup_epochs=1.0, knn_every=2,
    device="cpu",
)  # fmt: skip


def flags_of(config):
    """The flags that give a configuration."""
    flags = []
    for name, value in dataclasses.asdict(config).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, tuple):
            flags += [flag, *map(str, value)] if value else []
        elif value != "":
            flags += [flag, str(value)]
    return flags


def error_of(capsys, main, *argv):
    """The one line with which a script's main() refuses these arguments, with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in argv])
    assert left.value.code == 2
    err = capsys.readouterr().err
    assert ".py: error: " in err
    assert err.count("\n") == 1
    return err


def load_images(dataset, split, data_dir="data", **options):
    """One split of a data set."""
    return utils.load_splits(dataset, [split], data_dir, **options)[0]


def read_image(path):
    """All pixels of an image file: uint8 (3, H, W)."""
    with utils.Photo(path) as photo:
        return photo.pixels().contiguous()


def log_of(config):
    """The rows of a run's log, without times."""
    rows = utils.read_jsonl(config.folder / "log.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def position(config, name="last.pt"):
    """Complete epochs, and steps of the next one, of a checkpoint."""
    where = utils.load_checkpoint(config.folder / name)["position"]
    return where["epoch"], where["step"]


def module_digest(module):
    """SHA-256 of all parameters and buffers, byte for byte, with names, types and shapes."""
    digest = hashlib.sha256()
    for name, value in itertools.chain(module.named_parameters(), module.named_buffers()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_run(file):
    """The model, frozen and in eval mode, config and complete epochs of a run's checkpoint."""
    source = simclr.load_source(file)
    model = simclr.SimCLR(source.config)
    model.encoder, model.projector = source.encoder, source.projector
    return SimpleNamespace(model=model.eval(), config=source.config, epoch=source.epoch)


def interrupt(call, steps):
    """Calls a run that gets SIGTERM after so many steps, and stops."""
    real, count = utils.Progress.update, itertools.count(1)

    def advance(bar):
        real(bar)
        if next(count) == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils.Progress, "update", advance)
        with pytest.raises(simclr.Interrupted) as stopped:
            call()
    assert stopped.value.args == (signal.SIGTERM,)


def pytest_configure(config):
    """Only `pytest -m cuda` sees a GPU: other tests, and what they start, compare with the CPU."""
    if config.option.markexpr != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)  # of tiny tensors, threads wait for each other longer than they work


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request, monkeypatch):
    """The CPU, and with `pytest -m cuda` the GPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device and pytest -m cuda")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # three digits of a convolution
    return torch.device(request.param)


@pytest.fixture
def images():
    """float32 (16, 3, 24, 20) in [0, 1]: noise on smooth colours, with pure black, white, grey."""
    random = torch.Generator().manual_seed(0)
    smooth = torch.rand(16, 3, 3, 3, generator=random)
    x = torch.nn.functional.interpolate(smooth, size=(24, 20), mode="bilinear")
    x = (x + 0.2 * torch.randn(x.shape, generator=random)).clamp(0, 1)
    x[0], x[1], x[2] = 0.0, 1.0, 0.5
    return x


@pytest.fixture
def tiny_config(tmp_path):
    """Makes a configuration whose files go to a temporary folder."""

    def make(**overrides):
        places = dict(checkpoints=str(tmp_path / "checkpoints"), figures=str(tmp_path / "figures"))
        return simclr.make_config(**{**TINY, **places, **overrides})

    return make


@pytest.fixture(autouse=True)
def own_workers():
    """Processes that decode images keep what a test has changed: the next one gets others."""
    yield
    utils._idle_pools.clear()


@pytest.fixture
def no_figure(monkeypatch):
    """Leaves the drawing of the curves out, which takes longer than a tiny run itself."""
    from matplotlib.figure import Figure

    monkeypatch.setattr(simclr, "draw_training", lambda *_, **__: Figure(figsize=(1, 1)))


@pytest.fixture
def unjudged(monkeypatch):
    """Leaves the final evaluation out, which takes as long as a small run itself."""
    monkeypatch.setattr(simclr, "evaluate", lambda *_: {})


@pytest.fixture
def few_digits(monkeypatch):
    """210 digits to learn from instead of 1,437, and 40 held out."""
    real = utils._load_digits

    def load_digits(split):
        return utils.subset(real(split), torch.arange(40 if split == "test" else 210))

    monkeypatch.setattr(utils, "_load_digits", load_digits)


@pytest.fixture
def small_config(tiny_config, few_digits, no_figure, monkeypatch):
    """tiny_config for a run of half a second: on few digits, of four steps an epoch."""
    monkeypatch.setattr(simclr, "LABEL_DRAWS", 2)

    def make(**overrides):
        return tiny_config(**{"batch_size": 50, **overrides})

    return make


@pytest.fixture
def photo_config(tiny_config, tmp_path, write_image):
    """Makes the configuration of a folder of n images, which are streamed: their sizes vary."""

    def make(n, size=None, **overrides):
        for i in range(n):
            write_image(tmp_path / "photos" / f"{i}.png", size=size or (20 + i, 24), seed=i)
        return tiny_config(
            dataset="folder", recipe="digits", data_dir=str(tmp_path / "photos"),
            **{**dict(image_size=16, epochs=2, batch_size=2, workers=0), **overrides},
        )  # fmt: skip

    return make


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A whole run of TINY by the real command, from another folder. Tests read it only.

    config: its configuration, not resolved. folder: of its checkpoints, an epoch each too.
    said: what it printed. where: the folder in which it was started.
    """
    root, where = tmp_path_factory.mktemp("finished"), tmp_path_factory.mktemp("elsewhere")
    places = dict(checkpoints=str(root / "c"), figures=str(root / "f"))
    config = simclr.make_config(**TINY, **places, keep_every=1)
    command = [sys.executable, str(ROOT / "simclr.py"), *flags_of(config)]
    threads = {**os.environ, "OMP_NUM_THREADS": "1"}  # as here: tests compare numbers exactly
    done = subprocess.run(
        command, cwd=where, env=threads, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(config=config, folder=config.folder, said=done.stdout, where=where)


@pytest.fixture
def write_image():
    """Writes a noisy image file of a given size and mode, making its folders."""

    def write(path, size=(12, 12), mode="RGB", seed=0, **options):
        path.parent.mkdir(parents=True, exist_ok=True)
        channels = {"L": (), "RGB": (3,), "RGBA": (4,), "CMYK": (4,)}[mode]
        random = np.random.default_rng(seed)
        pixels = random.integers(0, 256, (size[1], size[0], *channels), dtype=np.uint8)
        Image.fromarray(pixels, mode=mode if mode == "CMYK" else None).save(path, **options)
        return path

    return write


def rows_of(file):
    """The rows of a CSV file."""
    with open(file, newline="", encoding="utf-8") as text:
        return list(csv.DictReader(text))


def random_statistics(network, seed=0):
    """BatchNorm statistics and scales as if trained, so that a wrong mapping shows."""
    random = torch.Generator().manual_seed(seed)
    for value in network.state_dict().values():
        if value.ndim == 1:
            value.copy_(0.5 + torch.rand(value.shape, generator=random))
    return network.eval()
