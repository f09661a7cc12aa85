"""How fast a step is: against the limits of the machine, and against the usual loop, in one run.

    python tests/benchmark.py --quick                  # 3 minutes on 2 cores
    python tests/benchmark.py --arch resnet18 --width 1
    python tests/benchmark.py --device cuda --arch resnet18 --width 1 --batch-size 512

Prints a table and writes it as JSON. Every figure is the median of repeats, with half the distance
between the quartiles as its spread; what is compared is measured in turn, so that the ratio holds
while the machine's speed drifts. The images are noise: no time here depends on what they show.

Reading order: measuring · limits · parts of a step · decoding · the whole step · the reference
loops · the loss alone · several processes · many files · the table.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.datasets.folder import default_loader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import simclr
import utils
from utils import Images, InputError, setting


@dataclass
class Options:
    """What is measured, and for how long."""

    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    arch: str = setting("resnet10", "encoder", tuple(simclr.ARCHITECTURES))
    width: float = setting(0.25, "multiplies the encoder's channels")
    image_size: int = setting(32, "side of the images in px")
    batch_size: int = setting(256, "N, images per step")
    compile: str = setting("off", "torch.compile the network", ("on", "off"))
    micro_batch: int = setting(0, "images whose activations are held at a time; 0: all of a batch")
    photos: str = setting("", "folder of images to decode, too")
    quick: bool = setting(False, "fewer repeats, smaller sizes of what grows")
    seconds: float = setting(0.0, "time for each figure; 0: 2, or 0.5 with --quick")
    json: str = setting("checkpoints/benchmark.json", "file for the results")
    files: int = setting(0, "measure only a folder of so many small files, streamed")
    nt_xent: int = setting(0, "measure only the loss, for so many views, and print it as JSON")
    loop: str = setting("", "measure only one of the loops, and print it as JSON")
    threads: int = setting(0, "of each process that measures a loop; 0: torch's default")


# ------------------------------------------------------------------------------------- measuring


@dataclass
class Timing:
    """Seconds that something took, again and again."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        if len(self.seconds) < 3:
            return math.nan
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


class Stopwatch:
    """Times functions on a device, each for about `seconds`, at least three times."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds

    def wait(self) -> None:
        """Until the device has done what it was asked to."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def once(self, function: Callable[[], Any]) -> float:
        self.wait()
        started = time.perf_counter()
        function()
        self.wait()
        return time.perf_counter() - started

    def time(self, function: Callable[[], Any]) -> Timing:
        self.once(function)  # warms up
        seconds, started = [], time.perf_counter()
        while len(seconds) < 3 or time.perf_counter() - started <= self.seconds:
            seconds.append(self.once(function))
        return Timing(seconds)

    def in_turn(self, turns: int, *functions: Callable[[], Any]) -> list[Timing]:
        """Times functions one after the other, so that their ratio holds if the speed drifts."""
        seconds: list[list[float]] = [[] for _ in functions]
        for i in range(turns * len(functions)):
            seconds[i % len(functions)] += self.time(functions[i % len(functions)]).seconds
        return [Timing(times) for times in seconds]


@dataclass
class Row:
    """A line of the table. spread is a share of the value; NaN where it was measured once."""

    name: str
    value: float
    unit: str
    spread: float = math.nan
    note: str = ""


def rate(name: str, count: float, timing: Timing, unit: str = "views/s", note: str = "") -> Row:
    return Row(name, count / timing.median, unit, timing.spread, note)


class Setup:
    """The configuration that is measured, a batch of its images, its network and optimiser.

    fast: whether the process is set up as our scripts do it, which the other loops go without.
    """

    def __init__(self, options: Options, fast: bool = True) -> None:
        self.device = (utils.choose_device if fast else torch.device)(options.device)
        self.options = dataclasses.replace(options, device=str(self.device))
        n, side = options.batch_size, options.image_size
        config = simclr.make_config(
            dataset="cifar10", arch=options.arch, width=options.width, batch_size=n,
            image_size=side, lr=0.01, compile=options.compile, micro_batch=options.micro_batch,
        )  # fmt: skip
        random = torch.Generator().manual_seed(0)
        pixels = torch.randint(256, (n, 3, side, side), dtype=torch.uint8, generator=random)
        self.data = Images(pixels.to(self.device))
        self.watch = Stopwatch(self.device, options.seconds)
        self.peak: dict[str, float] = {}  # GFLOP/s of a matrix product, by number format
        self.use(simclr.resolve(config, self.data, self.device))

    def use(self, config: simclr.Config) -> None:
        """Make what is trained. config: resolved."""
        self.config = config
        self.model = utils.on_device(simclr.make_model(config), self.device).train()
        self.optimizer = simclr.make_optimizer(config, self.model)
        self.augment = simclr.make_augment(config)
        self.now = simclr.TrainState(1, torch.zeros(3, device=self.device))

    @property
    def views(self) -> int:
        return 2 * self.config.batch_size

    def channels_last(self) -> Tensor:
        """Views as the network gets them: float32 (2N, 3, S, S)."""
        pixels = torch.cat([self.data.images] * 2).float() / 255
        return pixels.contiguous(memory_format=torch.channels_last)

    def forward(self, views: Tensor, model: nn.Module | None = None) -> Tensor:
        with utils.autocast(self.device, self.config.precision):
            return (model or self.model)(views)[1]

    def network(self, views: Tensor, model: nn.Module | None = None) -> None:
        """Encoder and head, forward and backward. model: compiled, if it is to be."""
        self.forward(views, model).sum().backward()
        self.optimizer.zero_grad()


# ---------------------------------------------------------------------------------------- limits

MATMUL_SIZE = {"cuda": 8192}  # elsewhere 2048
COPY_BYTES = {"cuda": 2**31}  # elsewhere 2**28


def limits(setup: Setup) -> list[Row]:
    """What the machine can do at best, and what a view asks of it."""
    size, rows = MATMUL_SIZE.get(setup.device.type, 2048), []
    # without hardware for it a product in bfloat16 takes minutes
    fast = [torch.bfloat16] if utils.has_fast_bfloat16(setup.device) else []
    for dtype in (torch.float32, *fast):
        a = torch.randn(size, size, device=setup.device).to(dtype)
        name = str(dtype).removeprefix("torch.")
        timing = setup.watch.time(lambda a=a: a @ a)
        rows.append(rate(f"matmul {name}", 2 * size**3 / 1e9, timing, "GFLOP/s"))
        setup.peak[name] = rows[-1].value
    source = torch.ones(COPY_BYTES.get(setup.device.type, 2**28) // 4, device=setup.device)
    target = torch.empty_like(source)
    timing = setup.watch.time(lambda: target.copy_(source))
    rows.append(rate("copy, read and written", 8 * len(source) / 1e9, timing, "GB/s"))
    rows.append(Row("a view, forward and backward", cost_of_a_view(setup) / 1e6, "MFLOP"))
    return rows


def cost_of_a_view(setup: Setup) -> float:
    """FLOPs of forward and backward for one view."""
    views = setup.channels_last()
    with FlopCounterMode(display=False) as counter:
        setup.network(views)
    return counter.get_total_flops() / setup.views


# ------------------------------------------------------------------------------- parts of a step


def pil_pipeline(config: simclr.Config) -> transforms.Compose:
    """The recipe's augmentation by torchvision: a PIL image -> a view, float32 (3, S, S)."""
    s = config.color_strength
    jitter = (s * config.brightness, s * config.contrast, s * config.saturation, s * config.hue)
    steps = [
        transforms.RandomResizedCrop(config.view_side, (config.crop_min, 1.0)),
        transforms.RandomHorizontalFlip(config.flip),
        transforms.RandomApply([transforms.ColorJitter(*jitter)], config.jitter_p),
        transforms.RandomGrayscale(config.gray_p),
        transforms.ToTensor(),
    ]
    return transforms.Compose(steps)


def augmentation(setup: Setup) -> list[Row]:
    """The augmentation of a batch, whole and by step, and torchvision's, image by image.

    On a CPU everything on one core.
    """
    images, watch = torch.cat([setup.data.images] * 2), setup.watch
    with one_thread():
        pil = [transforms.functional.to_pil_image(x) for x in setup.data.images.cpu()[:64]]
        by_pil = pil_pipeline(setup.config)
        u = setup.augment.draw(setup.views, torch.Generator(setup.device))
        a, b = watch.in_turn(3, lambda: setup.augment(images, u), lambda: [*map(by_pil, pil)])
        where = "on one core" if setup.device.type == "cpu" else "on the device"
        rows = [
            rate("augmentation", setup.views, a, note=where),
            rate("torchvision, PIL", len(pil), b, note="one core"),
            Row("augmentation ÷ PIL", setup.views / a.median / (len(pil) / b.median), "×"),
        ]
        floats = images.float() / 255
        for i, step in enumerate(setup.augment.steps, 1):  # in the order of make_augment()
            u = torch.rand(setup.views, step.draws, device=setup.device)
            timing = watch.time(lambda step=step, u=u: step(floats, u))
            rows.append(rate(f"  {i}. {type(step).__name__}", setup.views, timing))
    return rows


DECODED = 224  # px of a view of a photograph; of smaller images it is their own side
SAMPLES = 48  # files that are decoded in turn
CROP_MIN = simclr.RECIPES["folder"]["crop_min"]


def decoding(setup: Setup) -> list[Row]:
    """Two crops of each of the --photos from one decoding, by us and torchvision, on one core."""
    folder = Path(setup.options.photos)
    if not setup.options.photos:
        return []
    names = utils.list_images(folder)
    names = names[:: max(1, len(names) // SAMPLES)][:SAMPLES]
    if not names:
        raise InputError(f"no images in {folder}")
    size = min(DECODED, *(max(utils.image_size(folder / name)) for name in names))
    theirs = transforms.RandomResizedCrop(size, (CROP_MIN, 1.0))
    crop = simclr.RandomResizedCrop(size, (CROP_MIN, 1.0))
    paths = np.array([os.fsencode(name) for name in names])
    to_tensor = transforms.PILToTensor()

    def usual() -> None:
        for name in names:
            image = default_loader(folder / name)
            for _ in range(2):
                to_tensor(theirs(image))

    def ours() -> None:
        u = torch.rand(len(names), 2, crop.draws).numpy()
        bad = utils.DecodeRequest(folder, paths, size, partial(simclr.crop_boxes, crop), u)()
        if bad:
            raise InputError(next(iter(bad.values())))

    with one_thread():
        seconds = setup.options.seconds
        watch = Stopwatch(torch.device("cpu"), seconds)
        a, b = watch.in_turn(1 if seconds < BRIEF else 5, ours, usual)
    return [
        rate(f"{len(names)} files", len(names), a, "images/s", f"two crops of {size} px"),
        rate("  torchvision, PIL", len(names), b, "images/s"),
        Row("decoding ÷ PIL", b.median / a.median, "×"),
    ]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def plain_nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """NT-Xent as most projects write it, by the whole matrix of similarities."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)  # (2N, D)
    logits = (z @ z.T / temperature).fill_diagonal_(float("-inf"))  # (2N, 2N)
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z1)))


def loss_and_gradient(z: Tensor, temperature: float) -> None:
    simclr.nt_xent(*z.chunk(2), temperature).backward()


def parts(setup: Setup) -> dict[str, Timing]:
    """Seconds a batch of each part of a step, encoder and head apart."""
    watch = setup.watch
    images = torch.cat([setup.data.images] * 2)
    u = setup.augment.draw(setup.views, torch.Generator(setup.device))
    z = setup.forward(setup.channels_last()).detach().float().requires_grad_()
    for p in setup.model.parameters():
        p.grad = torch.zeros_like(p)
    found = {
        "augmentation": watch.time(lambda: setup.augment(images, u)),
        "NT-Xent": watch.time(lambda: loss_and_gradient(z, setup.config.temperature)),
        "contrastive accuracy": watch.time(lambda: simclr.contrastive_accuracy(*z.chunk(2))),
        "optimiser": watch.time(setup.optimizer.step),
    }
    setup.optimizer.zero_grad()
    return found


# -------------------------------------------------------------------------------- the whole step


def train_steps(setup: Setup, network: nn.Module, data: utils.Images, epoch: int) -> list[float]:
    """Train for an epoch of `data` by the steps of simclr.train(). Returns the seconds of each."""
    config, optimizer = setup.config, setup.optimizer
    network.train()
    setup.watch.wait()
    times = [time.perf_counter()]
    for views in simclr.view_batches(config, data, setup.device, epoch, 0, setup.augment):
        simclr.set_rate(optimizer, 0.01)
        value, z = simclr.training_step(network, views, simclr.nt_xent, config)
        optimizer.step()
        optimizer.zero_grad()
        setup.now.add(value, simclr.contrastive_accuracy(*z.chunk(2)), simclr.mean_cosine(z))
        setup.watch.wait()
        times.append(time.perf_counter())
    return [b - a for a, b in itertools.pairwise(times)]


class Ours:
    """The loop of simclr.train(), but waiting after each step. Each call of steps() goes on."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.epoch = setup, 0
        size = setup.config.batch_size
        self.network = simclr.compiled(setup.model, setup.config, size, setup.now)

    def steps(self, count: int) -> list[float]:
        """Seconds of each of `count` more steps."""
        self.epoch += 1
        data = Images(self.setup.data.images.repeat(count, 1, 1, 1))
        return train_steps(self.setup, self.network, data, self.epoch)


class Views(Dataset):
    """Items are the views of an image that `augment` makes of it, from a PIL image."""

    def __init__(self, images: Tensor, augment: Callable[[Any], list[Tensor]], length: int) -> None:
        self.images = [transforms.functional.to_pil_image(x) for x in images.cpu()]
        self.augment, self.length = augment, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.augment(self.images[index % len(self.images)])


def twice(augment: Callable[[Any], Tensor], image: Any) -> list[Tensor]:
    return [augment(image), augment(image)]


class Usual:
    """What public single-file implementations do: PIL in worker processes, as many as cores, two
    forward passes, float32, contiguous layout, eager; the loss by its plain formula."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.model = simclr.make_model(setup.config).to(setup.device).train()
        weights = self.model.parameters()
        self.optimizer = torch.optim.SGD(weights, 0.01, momentum=0.9, weight_decay=5e-4)

    def augment(self) -> Callable[[Any], list[Tensor]]:
        """A PIL image -> two views of it, float32 (3, S, S)."""
        return partial(twice, pil_pipeline(self.setup.config))

    def batches(self, count: int) -> Iterator[list[Tensor]]:
        """Pairs of views (N, 3, S, S), on the CPU."""
        n, on_gpu = self.setup.config.batch_size, self.setup.device.type == "cuda"
        data = Views(self.setup.data.images, self.augment(), count * n)
        workers = utils.cpu_cores()
        yield from DataLoader(
            data, n, shuffle=True, drop_last=True, num_workers=workers, pin_memory=on_gpu
        )

    def loss(self, z1: Tensor, z2: Tensor) -> Tensor:
        return plain_nt_xent(z1, z2, self.setup.config.temperature)

    def steps(self, count: int) -> list[float]:
        ahead = 2 * utils.cpu_cores()  # batches that the workers had ready when the clock started
        watch, times = self.setup.watch, []
        for x1, x2 in self.batches(count + ahead):
            views = [x.to(self.setup.device, non_blocking=True) for x in (x1, x2)]
            z1, z2 = (self.model(x)[1] for x in views)
            loss = self.loss(z1, z2)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            watch.wait()
            times.append(time.perf_counter())
        return [b - a for a, b in itertools.pairwise(times[ahead - 1 :])]


class Lightly(Usual):
    """The documented loop of the package `lightly`: its transform, collation and loss."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        from lightly.loss import NTXentLoss

        self.loss = NTXentLoss(temperature=setup.config.temperature)

    def augment(self) -> Callable[[Any], list[Tensor]]:
        from lightly.transforms import SimCLRTransform

        config = self.setup.config
        return SimCLRTransform(
            config.image_size, config.jitter_p, config.color_strength, min_scale=config.crop_min,
            random_gray_scale=config.gray_p, gaussian_blur=config.blur_p, normalize=None,
        )  # fmt: skip


LOOPS = {"whole step": Ours, "the usual loop": Usual, "lightly's loop": Lightly}
WARMUP, MOST_STEPS = 3, 20
BRIEF = 0.1  # seconds for a figure: with less it is only seen that all of this works
LARGE_BATCH = 1024  # images: a step takes long enough to be measured as it is


def measure_loop(options: Options) -> None:
    """What --loop prints: the seconds of some steps, and the peak of the memory in bytes."""
    if options.threads:
        torch.set_num_threads(options.threads)
    with utils.process_group(utils.choose_device(options.device)):
        setup = Setup(options, fast=options.loop == "whole step")
        loop = LOOPS[options.loop](setup)
        warmup = loop.steps(1 if options.batch_size > LARGE_BATCH else WARMUP)
        once = statistics.median(warmup)
        count = max(2, min(MOST_STEPS, round(options.seconds / once)))
        seconds = loop.steps(utils.all_reduce_max(count)[0])
        print(json.dumps({"seconds": seconds, "bytes": peak_memory(setup.device)}))


def in_a_process(options: Options, *flags: str, processes: int = 1) -> Any:
    """What this program prints with other flags, from JSON; in several processes by torchrun."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += ["--"]
    command += [__file__, *flags, "--seconds", str(options.seconds)]
    for name in (
        "device", "arch", "width", "image_size", "batch_size", "compile", "micro_batch", "threads",
    ):  # fmt: skip
        command += [utils.flag(name), str(getattr(options, name))]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{' '.join(flags)} failed: {done.stderr.strip()[-200:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(setup: Setup) -> list[Row]:
    """Views a second of our loop and of the others, and the ratios.

    Each in a process of its own, in turn, so that none has what another has set up.
    """
    options = setup.options
    names = [n for n in LOOPS if n != "lightly's loop" or importlib.util.find_spec("lightly")]
    turns = 1 if options.seconds < BRIEF else 2 if options.quick else 3
    runs = [{name: in_a_process(options, "--loop", name) for name in names} for _ in range(turns)]
    rows = []
    for name in names:
        seconds = [s for run in runs for s in run[name]["seconds"]]
        note = f"{runs[-1][name]['bytes'] / 1e6:,.0f} MB at most"
        rows.append(rate(name, setup.views, Timing(seconds), note=note))
    for name in names[1:]:
        medians = [[statistics.median(run[n]["seconds"]) for run in runs] for n in (name, names[0])]
        ratios = [theirs / ours for theirs, ours in zip(*medians, strict=True)]
        note = f"{min(ratios):.2f} to {max(ratios):.2f}"
        rows.append(Row(f"whole step ÷ {name}", statistics.median(ratios), "×", note=note))
    return rows


TURNS = 5


def step_and_network(setup: Setup) -> tuple[Timing, Timing]:
    """A whole step, and encoder and head alone, in turn."""
    ours, views = Ours(setup), setup.channels_last()
    steps, network = [], []
    for turn in range(TURNS + 1):
        seconds = ours.steps(2)
        alone = [setup.watch.once(lambda: setup.network(views, ours.network)) for _ in range(2)]
        if turn:  # the first warms up
            steps += seconds
            network += alone
    return Timing(steps), Timing(network)


def shares(setup: Setup) -> list[Row]:
    """What a step is made of, and how far its arithmetic is from the machine's limit."""
    found, (step, network) = parts(setup), step_and_network(setup)
    rows = [Row("step", 1e3 * step.median, "ms", step.spread)]
    rows += [
        Row(f"  {name}", 1e3 * t.median, "ms", t.spread, f"{t.median / step.median:.1%} of step")
        for name, t in {"encoder and head": network, **found}.items()
    ]
    inside = network.median + found["optimiser"].median
    note = "what is not encoder, head and optimiser"
    rows.append(Row("overhead", 100 * max(0.0, 1 - inside / step.median), "% of step", note=note))
    alone = setup.views * cost_of_a_view(setup) / network.median / 1e9
    precision = setup.config.precision
    note = f"{alone / setup.peak[precision]:.0%} of matmul {precision}"
    return [*rows, Row("FLOP/s of encoder and head", alone, "GFLOP/s", note=note)]


def peak_memory(device: torch.device) -> float:
    """Bytes: of the device, on a CPU of this process."""
    on_gpu = device.type == "cuda"
    return float(torch.cuda.max_memory_allocated(device)) if on_gpu else process_memory("VmHWM")


def process_memory(key: str, process: str = "self") -> float:
    """Bytes that a process has (VmRSS) or had at most (VmHWM); NaN where Linux does not say it."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        return 1024.0 * next(int(x.split()[1]) for x in lines if x.startswith(key))
    return math.nan


# --------------------------------------------------------------------------------- the loss alone


def losses(setup: Setup) -> list[Row]:
    """NT-Xent against 2N, each in its own process, so that the peak of memory is the loss's."""
    rows = []
    for views in (512, 2_048) if setup.options.quick else (512, 2_048, 8_192, 32_768, 65_536):
        found = in_a_process(setup.options, "--nt-xent", str(views))
        whole = 4 * views**2 / 2**20
        note = f"{found['bytes'] / 2**20:,.0f} MiB; a matrix (2N, 2N) has {whole:,.0f}"
        rows.append(Row(f"NT-Xent, 2N = {views:,}", 1e3 * found["seconds"], "ms", note=note))
    return rows


def measure_nt_xent(options: Options) -> None:
    """What --nt-xent prints: seconds and bytes of loss and gradient, D = 128."""
    device = utils.choose_device(options.device)
    watch = Stopwatch(device, 0.5)
    loss_and_gradient(torch.randn(64, 128, device=device, requires_grad=True), 0.5)
    before = peak_memory(device)
    z = torch.randn(options.nt_xent, 128, device=device, requires_grad=True)
    first = watch.once(lambda: loss_and_gradient(z, 0.5))
    taken, found = peak_memory(device) - before, [first]  # later ones may lie elsewhere in memory
    if first < 2 and options.seconds >= BRIEF:
        found = watch.time(lambda: loss_and_gradient(z, 0.5)).seconds
    print(json.dumps({"seconds": statistics.median(found), "bytes": taken}))


# ------------------------------------------------------------------ several processes, many files


def several_processes(setup: Setup) -> list[Row]:
    """The same batch by one process and by two, and what they exchange.

    On a CPU each process has one thread, so that two of them have two cores.
    """
    kind, on_cpu = setup.device.type, setup.device.type == "cpu"
    one, rows = dataclasses.replace(setup.options, device=kind, threads=int(on_cpu)), []
    for processes in (1, 2) if on_cpu or torch.cuda.device_count() > 1 else (1,):
        found = in_a_process(one, "--loop", "whole step", processes=processes)
        rows.append(rate(f"{processes} processes", setup.views, Timing(found["seconds"])))
    rows.append(Row("speedup", rows[-1].value / rows[0].value, "×"))

    norms = [m for m in setup.model.modules() if isinstance(m, nn.BatchNorm2d)]
    exchanged = {
        "gradients": 4 * sum(p.numel() for p in setup.model.parameters()),
        "z": 4 * setup.views * setup.config.head_dim,
        "BatchNorm's statistics": 4 * 4 * sum(m.num_features for m in norms),
    }
    return rows + [Row(f"{name} a step", size / 1e6, "MB") for name, size in exchanged.items()]


def many_files(options: Options) -> list[Row]:
    """Time to list a folder of many files, and memory while it is streamed and trained on."""
    with tempfile.TemporaryDirectory() as place:
        make_many(Path(place) / "images", options.files)
        setup = Setup(options)
        config = simclr.make_config(
            dataset="folder", data_dir=f"{place}/images", arch="resnet10", width=0.0625,
            image_size=16, batch_size=options.batch_size, views=2, view_sizes=(),
        )  # fmt: skip
        started = time.perf_counter()
        data = simclr.load_data(config, setup.device).pretrain
        rows = [Row("listed and labelled", time.perf_counter() - started, "s")]
        setup.use(simclr.resolve(config, data, setup.device))
        for epoch in range(1 if options.quick else 3):
            seconds = sum(train_steps(setup, setup.model, data, epoch))
            workers = Path("/proc/self/task", str(os.getpid()), "children").read_text().split()
            largest = max((process_memory("VmRSS", worker) for worker in workers), default=0)
            note = f"workers {largest / 2**20:,.0f} MiB each at most"
            count = setup.views * (len(data) // config.batch_size) / seconds
            rows.append(Row(f"epoch {epoch + 1}", count, "views/s", note=note))
            rows.append(Row("  resident, this process", process_memory("VmRSS") / 2**20, "MiB"))
        return rows


def make_many(folder: Path, count: int) -> None:
    """`count` names, in a hundred classes, of a hundred small JPEGs of several sizes."""
    random = np.random.default_rng(0)
    for i in range(count):
        file = folder / f"class_{i % 100:02}" / f"image_{i:08}.jpg"
        if i < 100:
            file.parent.mkdir(parents=True)
            pixels = random.integers(0, 256, (16 + i % 9, 24, 3), dtype=np.uint8)
            transforms.functional.to_pil_image(pixels).save(file)
        else:
            os.link(folder / f"class_{i % 100:02}" / f"image_{i % 100:08}.jpg", file)


# ------------------------------------------------------------------------------------- the table


def machine(device: torch.device) -> str:
    """What it ran on, in words."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    text = f"{utils.cpu_cores()} cores of {name}"
    if device.type == "cuda":
        text = f"{torch.cuda.get_device_name(device)}, {text}"
    return f"{text}, torch {torch.__version__}"


def show(group: str, rows: list[Row]) -> None:
    print(f"\n{group}")
    for row in rows:
        digits = 0 if abs(row.value) >= 100 else 2
        spread = "" if math.isnan(row.spread) else f"± {100 * row.spread:.0f} %"
        value = f"{row.value:,.{digits}f}"
        print(f"  {row.name:30} {value:>10} {row.unit:9} {spread:>7}  {row.note}".rstrip())


GROUPS = {
    "limits": limits, "augmentation": augmentation, "decoding": decoding, "whole step": compare,
    "share of the step": shares, "loss": losses, "several processes": several_processes,
}  # fmt: skip


def benchmark(options: Options) -> None:
    """All groups of the table, printed as they are measured, and written as JSON."""
    setup, table = Setup(options), {}
    print(
        f"{options.arch} at width {options.width:g}, {options.image_size} px, N = "
        f"{options.batch_size}, {setup.config.precision}; {machine(setup.device)}"
    )
    for group, measure in GROUPS.items():
        rows = measure(setup)
        table[group] = [dataclasses.asdict(row) for row in rows]
        show(group, rows)
    about = {"machine": machine(setup.device), "options": dataclasses.asdict(options)}
    utils.write_json(Path(options.json), {**about, "table": table})
    print(f"\nwritten to {options.json}")


def main(argv: list[str] | None = None) -> None:
    parser = utils.OneLineParser(prog="benchmark.py", description=__doc__)
    utils.add_flags(parser, Options)
    options = Options(**vars(parser.parse_args(argv)))
    options.seconds = options.seconds or (0.5 if options.quick else 2.0)
    try:
        if options.loop not in ("", *LOOPS):
            raise InputError(f"unknown loop {options.loop!r}; there are {', '.join(LOOPS)}")
        if options.nt_xent or options.loop:
            (measure_nt_xent if options.nt_xent else measure_loop)(options)
        elif options.files:
            show(f"{options.files:,} files; {machine(torch.device('cpu'))}", many_files(options))
        else:
            benchmark(options)
    except InputError as error:
        utils.exit_with_error("benchmark.py", error)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of worker processes, about their number
    main()
