"""Is it right and fast on this GPU? Five minutes of checks and measurements, in sections.

    python tests/gpu.py                    # everything, on the GPU
    python tests/gpu.py --minutes 2        # what is left out when the time is over says so
    python tests/gpu.py --tiny --device cpu    # a small form that also runs without a GPU

A section that fails prints its traceback, and the others go on. All numbers are in gpu.json in the
folder --out, which is written after each section, with the profile of ten steps in profile.txt.
Exit code 1 if a section failed.
"""

from __future__ import annotations

import copy
import math
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import benchmark
import simclr
import utils
from benchmark import Ours, Setup, Stopwatch, Usual
from utils import Images, setting

SIZES = (32, 24)  # px of the views whose speed is measured
STEPS = 6  # of the comparison of compiled and eager
LOSS_DIFFERS = 5e-3  # at most, after STEPS steps in float32 without TF32
STATISTICS_DIFFER = 1e-2  # at most, relative to the largest
FEATURES = (512, 2048)  # dimensions of h that end in an eigendecomposition
USUAL_SECONDS = 20.0


@dataclass
class Options:
    """What is measured, and for how long."""

    minutes: float = setting(5.0, "begin no section after so many", low=0.01)
    out: str = setting("checkpoints/gpu", "folder for gpu.json and profile.txt")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    tiny: bool = setting(False, "small sizes, to see that this program works")


class Checks:
    """The sections. Each returns its numbers by name, and raises if something is not right."""

    def __init__(self, options: Options) -> None:
        self.options, self.out = options, Path(options.out)
        self.device = utils.choose_device(options.device)
        self.cuda = self.device.type == "cuda"
        self.watch = Stopwatch(self.device, 0.1 if options.tiny else 1.0)
        # the CPU's compiler takes minutes
        self.compiler = simclr.COMPILE if self.cuda else {"backend": "aot_eager"}

    def setup(self, size: int = 32, compile: str = "off", **changes: Any) -> Setup:
        """A ResNet-18 with the recipe for CIFAR-10 and N = 512, on images of noise."""
        given = dict(arch="resnet18", width=1.0, batch_size=512, image_size=size, compile=compile)
        if self.options.tiny:
            given |= dict(arch="resnet10", width=0.125, batch_size=8, image_size=16)
        given |= changes
        simclr.COMPILE = self.compiler
        return Setup(benchmark.Options(device=str(self.device), seconds=0.5, **given))

    def machine(self) -> dict[str, Any]:
        """Versions, and the limits of matrix products and copies."""
        rows = benchmark.limits(self.setup())
        found = {f"{row.name}, {row.unit}": round(row.value, 1) for row in rows}
        return {"machine": benchmark.machine(self.device), **found}

    def compiled_equals_eager(self) -> dict[str, Any]:
        """Losses and BatchNorm's statistics of some steps in float32."""
        torch.backends.cudnn.allow_tf32 = False
        losses, states = [], []
        for compile in ("off", "on"):
            setup = self.setup(16, compile, arch="resnet10", width=0.25, batch_size=64)
            setup.config.precision = "float32"
            ours = Ours(setup)
            losses.append([])
            for _ in range(STEPS):
                before = setup.now.sums[0].item()
                ours.steps(1)
                losses[-1].append(setup.now.sums[0].item() - before)
            states.append(copy.deepcopy(setup.model.state_dict()))
        torch.backends.cudnn.allow_tf32 = True
        differs = max(abs(a - b) for a, b in zip(*losses, strict=True))
        names = [name for name in states[0] if "running" in name]
        moved = max(
            ((states[0][n] - states[1][n]).abs().max() / states[0][n].abs().max()).item()
            for n in names
        )
        counts = {int(x) for s in states for n, x in s.items() if n.endswith("batches_tracked")}
        found = {"losses": losses, "loss differs by": differs, "statistics differ by": moved}
        if differs > LOSS_DIFFERS or moved > STATISTICS_DIFFER or counts != {STEPS}:
            raise AssertionError(f"compiled is not eager: {found}, batches counted {counts}")
        return found

    def linear_algebra(self) -> dict[str, Any]:
        """What ends every run: the linear classifier on pixels, and principal axes."""
        splits = utils.load_splits("digits", ["train", "test"])
        train, test = (split.to(self.device) for split in splits)
        x, x_test = (utils.flat_pixels(part.images.float() / 255) for part in (train, test))
        classifier = utils.fit_linear_classifier(x, train.labels, 10)
        accuracy = utils.accuracy(classifier(x_test).argmax(1), test.labels)
        found: dict[str, Any] = {"linear on the digits' pixels (0.96 to 0.98)": accuracy}
        for dim in FEATURES[: 1 if self.options.tiny else None]:
            h = torch.rand(10_000, dim, device=self.device)
            started = time.perf_counter()
            _, axes = utils.principal_axes(h - h.mean(0))
            found[f"axes of {dim} features, s"] = round(time.perf_counter() - started, 2)
            error = (axes.mT @ axes - torch.eye(dim, device=self.device)).abs().max().item()
            found[f"axes of {dim} features, |QtQ - 1|"] = error
            if not error < 1e-3:
                raise AssertionError(found)
        if not 0.95 < accuracy < 0.99:
            raise AssertionError(found)
        return found

    def save_and_resume(self) -> dict[str, Any]:
        """A checkpoint of a ResNet-18: time, size, and the same weights and moments after it."""
        setup, again = self.setup(), self.setup()
        Ours(setup).steps(1)
        data = simclr.Data(setup.data, setup.data, setup.data)
        with tempfile.TemporaryDirectory() as folder:
            run = utils.RunFolder(Path(folder))
            now = simclr.TrainState(1, torch.zeros(3, device=self.device), epoch=1)
            state = simclr.snapshot(setup.config, data, setup.model, setup.optimizer, now)
            seconds = [self.watch.once(lambda: run.save(state, must=True)) for _ in range(3)]
            size = run.last.stat().st_size / 1e6
            now = simclr.TrainState(1, torch.zeros(3, device=self.device))
            simclr.restore(run, setup.config, data, again.model, again.optimizer, now)
        pairs = zip(
            setup.model.state_dict().values(), again.model.state_dict().values(), strict=True
        )
        if not all(torch.equal(a, b) for a, b in pairs):
            raise AssertionError("the weights that are read are not those that were saved")
        Ours(again).steps(1)  # the optimiser takes the moments that were read
        return {"save, s": [round(s, 3) for s in seconds], "checkpoint, MB": round(size, 1)}

    def knn(self) -> dict[str, Any]:
        """The monitor on 50,000 training and 10,000 test images."""
        setup = self.setup()
        count = (50_000, 10_000) if not self.options.tiny else (50, 20)
        parts = [
            Images(
                setup.data.images.repeat(math.ceil(n / len(setup.data)), 1, 1, 1)[:n],
                torch.arange(n, device=self.device) % 10, tuple("0123456789"),
            )
            for n in count
        ]  # fmt: skip
        data = simclr.Data(parts[0], *parts)
        seconds = [
            self.watch.once(
                lambda: simclr.knn_accuracy(setup.model.encoder, data, setup.config, self.device)
            )
            for _ in range(3)
        ]
        return {"kNN, s": [round(s, 2) for s in seconds]}

    def augmentation(self) -> dict[str, Any]:
        """Of a step's views, as it is and compiled."""
        found = {}
        for size in SIZES:
            setup = self.setup(size)
            images = setup.data.images.repeat(2, 1, 1, 1)
            u = setup.augment.draw(len(images), torch.Generator(self.device))
            for name, augment in {
                "eager": setup.augment,
                "compiled": torch.compile(setup.augment, **({} if self.cuda else self.compiler)),
            }.items():
                timing = self.watch.time(lambda: augment(images, u))  # noqa: B023
                found[f"{size} px, {name}, ms"] = round(1e3 * timing.median, 2)
        return found

    def speed(self, size: int, compile: str) -> dict[str, Any]:
        """Views per second of whole steps that do not wait for each other, and peak memory."""
        setup = self.setup(size, compile)
        ours, count = Ours(setup), 4 if self.options.tiny else 150
        ours.steps(10)
        setup.watch.wait, wait = lambda: None, setup.watch.wait
        started = time.perf_counter()
        ours.steps(count)
        enqueued = time.perf_counter() - started
        wait()
        seconds = time.perf_counter() - started
        found = {
            "views/s": round(setup.views * count / seconds),
            "ms a step": round(1e3 * seconds / count, 2),
            "of these until enqueued": round(1e3 * enqueued / count, 2),
        }
        if self.cuda:
            found["peak memory, GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
            torch.cuda.reset_peak_memory_stats()
        return found

    def profile(self) -> dict[str, Any]:
        """Ten steps by kernel, in profile.txt."""
        from torch.profiler import profile

        ours = Ours(self.setup(SIZES[-1]))
        ours.steps(3)
        with profile() as profiler:
            ours.steps(1 if self.options.tiny else 10)
        order = "self_cuda_time_total" if self.cuda else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=30)
        (self.out / "profile.txt").write_text(table)
        print(table[:4000])
        return {"file": str(self.out / "profile.txt")}

    def usual_loop(self) -> dict[str, Any]:
        """The loop of public implementations (see benchmark.py), in the same process."""
        setup, seconds = self.setup(), []
        loop, started = Usual(setup), time.perf_counter()
        while not seconds or time.perf_counter() - started < USUAL_SECONDS:
            seconds += loop.steps(2 if self.options.tiny else 10)
            if self.options.tiny:
                break
        return {"views/s": round(setup.views / statistics.median(seconds))}

    def sections(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """In the order of what one wants to know first."""
        speeds = {
            f"speed at {size} px, compile {compile}": lambda size=size, compile=compile: self.speed(
                size, compile
            )
            for compile in ("off", "on")
            for size in SIZES
        }
        return {
            "machine": self.machine,
            "compiled equals eager": self.compiled_equals_eager,
            "linear algebra": self.linear_algebra,
            "save and resume": self.save_and_resume,
            "kNN": self.knn,
            "augmentation": self.augmentation,
            **speeds,
            "profile": self.profile,
            "the usual loop": self.usual_loop,
        }


def main(argv: list[str] | None = None) -> None:
    parser = utils.OneLineParser(prog="gpu.py", description=__doc__)
    utils.add_flags(parser, Options)
    options = Options(**vars(parser.parse_args(argv)))
    utils.check_settings(options)
    checks, started, results = Checks(options), time.perf_counter(), {}
    if not checks.cuda and options.device == "auto":
        parser.error("there is no GPU; --tiny --device cpu only shows that this program works")
    for name, section in checks.sections().items():
        began = time.perf_counter()
        if began - started > 60 * options.minutes:
            results[name] = {"left out": "the time was over"}
            continue
        try:
            results[name] = section()
        except Exception as error:  # the other sections go on
            traceback.print_exc()
            results[name] = {"FAILED": utils.one_line(repr(error), 1000)}
        seconds = time.perf_counter() - began
        print(f"\n{name} ({seconds:.1f} s)", flush=True)
        for key, value in results[name].items():
            print(f"  {key:42} {value}", flush=True)
        utils.write_json(checks.out / "gpu.json", results)
    failed = [name for name, result in results.items() if "FAILED" in result]
    print(f"\nfailed on {checks.device}: {', '.join(failed) or 'none'}")
    print(f"written to {checks.out / 'gpu.json'}")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
