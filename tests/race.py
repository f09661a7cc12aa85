"""A race: how good is the representation after so many minutes, by each way of training?

    python tests/race.py --dataset folder --data-dir data/cifar10_jpeg --recipe cifar10-fast \\
        --arch resnet10 --width 0.25                                        # ten minutes, our loop
    python tests/race.py --dataset folder … --recipe cifar10 --loop usual   # the usual loop
    python tests/race.py --dataset folder … --recipe cifar10-fast --loop usual \\
        --views 2 --batch-size 256 --lr 0.36                                # as many views a step
    python tests/race.py --draw figures/race.png                            # all of them, drawn

Trains by our loop or by the usual one (PIL in worker processes, two float32 passes; benchmark.py
measures its speed), with the same settings, network and images. The learning rate follows the
clock, so that each race ends as a whole run of that length. kNN accuracy is measured on the way,
with the clock stopped. A race is a line of JSON in tests/results/race.jsonl.

--steps N ends a race after N steps instead, however long they take: other seeds of a race that was
run by the clock, or settings to choose from, on a machine that does other work as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

import benchmark  # which also makes the scripts known
import simclr
import utils
from utils import InputError, setting


@dataclass
class Options:
    """What a race has beside the settings of a run."""

    loop: str = setting("ours", "who trains", ("ours", "usual"), group="the race")
    minutes: float = setting(10.0, "of training, without loading and measuring")
    steps: int = setting(0, "steps that stand for those minutes, however long they take; 0: none")
    points: int = setting(10, "how often kNN accuracy is measured, the last time at the end")
    results: str = setting("tests/results/race.jsonl", "a line is added to this file")
    draw: str = setting("", "no race, but a figure of all those in the results, to this file")


class Clock:
    """How much of a race is over, in [0, 1], by time or by steps, and how good it was then."""

    def __init__(self, options: Options, *arguments: Any) -> None:
        """arguments: of simclr.knn_accuracy(), with the device at the end."""
        self.options, self.accuracy = options, partial(simclr.knn_accuracy, *arguments)
        self.wait = benchmark.Stopwatch(arguments[-1], 0).wait
        self.steps, self.part = 0, 0  # part: how many measurements were due so far
        self.started, self.stopped = time.perf_counter(), 0.0
        self.curve: list[tuple[float, float]] = []  # progress and kNN accuracy, both in [0, 1]

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started - self.stopped

    @property
    def progress(self) -> float:
        if self.options.steps:
            return self.steps / self.options.steps
        return self.seconds / (60 * self.options.minutes)

    def after_step(self) -> bool:
        """Measure if it is time. Returns whether the race is over."""
        self.steps += 1
        progress = self.progress
        part = int(progress * self.options.points)
        if part > self.part:  # one step may make several due
            self.part = part
            with self.paused():
                self.curve.append((progress, self.accuracy()))
                print(f"{progress:4.0%}  kNN {self.curve[-1][1]:.1%}", flush=True)
        return part >= self.options.points

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self.wait()  # what a GPU has still to do of the steps is training
        started = time.perf_counter()
        yield
        self.stopped += time.perf_counter() - started


PARTS = 100_000  # of a race: the schedule counts steps


def rate(config: simclr.Config, progress: float) -> float:
    """The learning rate; the warm-up is the same share of a race as of the run's epochs."""
    parts = dataclasses.replace(
        config, epochs=PARTS, warmup_epochs=PARTS * config.warmup_epochs / config.epochs
    )
    step = min(PARTS - 1, int(PARTS * progress))
    return simclr.learning_rate(parts, step, config.batch_size, steps=1)


def ours(
    config: simclr.Config, data: simclr.Data, device: torch.device, options: Options
) -> tuple[Clock, nn.Module]:
    """Train in epochs as in a run of simclr.py. Returns the clock and the encoder."""
    model = utils.on_device(simclr.make_model(config), device)
    optimizer = simclr.make_optimizer(config, model)
    clock = Clock(options, model.encoder, data, config, device)  # compiling counts
    size, steps = simclr.batch_count(config, len(data.pretrain))
    now = simclr.TrainState(steps, torch.zeros(3, device=device))
    network = simclr.compiled(model, config, size, now)
    contrast = simclr.LOSSES[config.loss]
    for epoch in itertools.count():
        network.train()
        sized = config.at_epoch(int(clock.progress * config.epochs))  # views may grow
        augment = simclr.make_augment(sized)
        for views in simclr.view_batches(config, data.pretrain, device, epoch, 0, augment):
            simclr.set_rate(optimizer, rate(config, clock.progress))
            loss, z = simclr.training_step(network, views, contrast, config)
            optimizer.step()
            optimizer.zero_grad()
            accuracy = simclr.contrastive_accuracy(*z.chunk(config.views))
            now.add(loss, accuracy, simclr.mean_cosine(z))
            if clock.after_step():
                break
        if clock.part >= options.points:
            if config.view_sizes:  # not timed: a few seconds
                simclr.estimate_statistics(model, data.pretrain, config, device)
                clock.curve[-1] = clock.curve[-1][0], clock.accuracy()
            return clock, model.encoder


def usual(
    config: simclr.Config, data: simclr.Data, device: torch.device, options: Options
) -> tuple[Clock, nn.Module]:
    """Train as public single-file implementations do. Returns the clock and the encoder."""
    if config.blur_p or config.rotation or config.views > 2:
        raise InputError("the usual loop has two views, no blur and no rotation here")
    torch.manual_seed(config.seed)  # of its views
    model = simclr.make_model(config).to(device)
    optimizer = simclr.make_optimizer(config, model)
    augment = partial(benchmark.twice, benchmark.pil_pipeline(config))
    images = data.pretrain.images
    loader = DataLoader(
        benchmark.Views(images, augment, len(images)), config.batch_size, shuffle=True,
        drop_last=True, num_workers=utils.cpu_cores(), pin_memory=device.type == "cuda",
        persistent_workers=True,
    )  # fmt: skip
    clock = Clock(options, model.encoder, data, config, device)
    while True:
        for views in loader:
            model.train()
            z1, z2 = (model(x.to(device, non_blocking=True))[1] for x in views)
            loss = benchmark.plain_nt_xent(z1, z2, config.temperature)
            simclr.set_rate(optimizer, rate(config, clock.progress))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if clock.after_step():
                return clock, model.encoder


def linear_accuracy(
    encoder: nn.Module, data: simclr.Data, config: simclr.Config, device: torch.device
) -> float:
    """Of logistic regression on all labels: linear_all of simclr.evaluate()."""
    h, y = simclr.labelled_features(encoder, data.train, config, device)
    h_test, y_test = simclr.labelled_features(encoder, data.test, config, device)
    classifier = utils.fit_linear_classifier(h, y, len(data.train.classes))
    return utils.accuracy(classifier(h_test).argmax(1), y_test)


def hold(options: Options, given: dict[str, Any]) -> dict[str, Any]:
    """A race from the settings that were given. Returns its line of the results."""
    config = simclr.make_config(**given)
    device = utils.choose_device(config.device)
    data = simclr.load_data(config, device)
    if not data.labelled or data.pretrain.images is None:
        raise InputError("a race needs labelled images that are held in memory")
    config = simclr.resolve(config, data.pretrain, device)
    if options.loop == "usual":
        config = dataclasses.replace(config, precision="float32")
    clock, encoder = (ours if options.loop == "ours" else usual)(config, data, device, options)
    seconds = clock.seconds
    settings = {k: v for k, v in given.items() if k not in ("data_dir", "device", "seed", "recipe")}
    return {
        "loop": options.loop,
        "recipe": config.recipe,
        "seed": config.seed,
        "settings": settings,  # beside the recipe's
        "precision": config.precision,
        "minutes": options.minutes,
        "by_clock": not options.steps,
        "steps": clock.steps,
        "seconds": round(seconds, 1),
        "views_per_second": round(config.views * config.batch_size * clock.steps / seconds),
        "knn": round(clock.curve[-1][1], 4),
        "linear": round(linear_accuracy(encoder, data, config, device), 4),
        "curve": [[round(x, 4) for x in point] for point in clock.curve],
        "machine": benchmark.machine(device),
    }


def name_of(row: dict, rows: list[dict]) -> str:
    """What a line of the figure is called: all in which the rows differ, but for the seed."""
    settings = [
        f"{key} {value}" for key, value in row["settings"].items()
        if any(other["settings"].get(key) != value for other in rows)
    ]  # fmt: skip
    loop = {"ours": "our loop", "usual": "the usual loop"}[row["loop"]]
    return ", ".join([loop, row["recipe"], *settings])


def draw(rows: list[dict]) -> Any:
    """kNN accuracy against the minutes of training, a line a race: a matplotlib Figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(name_of(row, rows), []).append(row)
    best_first = sorted(groups.items(), key=lambda g: -statistics.mean(r["knn"] for r in g[1]))
    for i, (name, races) in enumerate(best_first):
        ends = [100 * race["knn"] for race in races]
        spread = f" ± {statistics.stdev(ends):.1f}" if len(ends) > 1 else ""
        label = f"{name}: {statistics.mean(ends):.1f}{spread} %"
        for race in races:
            progress, knn = zip(*race["curve"], strict=True)
            minutes = [race["minutes"] * p for p in progress]
            percent = [100 * a for a in knn]
            axes.plot(minutes, percent, "o-", color=f"C{i}", markersize=3, linewidth=1, label=label)
            label = None  # one entry a group
    axes.set(xlabel="minutes of training", ylabel="kNN accuracy (k = 10), %", xlim=(0, None))
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=9, loc="outside upper left")
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = utils.OneLineParser(
        prog="race.py", usage="python tests/race.py [--flag value ...]", description=__doc__
    )
    utils.add_flags(parser, Options)
    utils.add_flags(parser, simclr.Config)
    given = vars(parser.parse_args(argv))
    names = [f.name for f in dataclasses.fields(Options)]
    options = Options(**{name: given.pop(name) for name in names if name in given})
    file = Path(options.results)
    try:
        if options.minutes <= 0 or options.points < 1 or options.steps < 0:
            raise InputError("--minutes must be positive, --points 1 or more, --steps 0 or more")
        if options.draw:
            rows = utils.read_jsonl(file)
            if not rows:
                raise InputError(f"no race in {file} yet")
            utils.save_figure(draw(rows), Path(options.draw))
            print(f"{len(rows)} races: {options.draw}")
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a", encoding="utf-8") as results:  # fails now, if it cannot be written
            row = hold(options, given)
            print(json.dumps(row), flush=True)
            results.write(json.dumps(row) + "\n")
    except (InputError, OSError) as error:
        utils.exit_with_error("race.py", error)


if __name__ == "__main__":
    main()
