"""What a SimCLR representation is worth, and how to use it: load, evaluate, export, import.

    python load_simCLR.py                            # the newest run: kNN and linear evaluation
    python load_simCLR.py RUN --tasks knn linear linear-augmented semi supervised
    python load_simCLR.py RUN --dataset cifar10      # the same on another data set: transfer
    python load_simCLR.py RUN --embed PHOTOS         # h of any folder of images, as .npz
    python load_simCLR.py RUN --classify PHOTOS      # and its classes, as .csv
    python load_simCLR.py RUN --export encoder.pt    # torchvision's names
    python load_simCLR.py moco_v2.pth.tar --dataset cifar10    # somebody else's encoder

RUN is the name of a run, its folder or a checkpoint file. From Python:

    from load_simCLR import load_encoder
    encoder = load_encoder("checkpoints/cifar10_resnet18")  # frozen, in eval mode
    h = encoder(images)    # float (B, 3, S, S) in [0, 1] -> (B, encoder.feature_dim)

What makes the numbers trustworthy: the encoder's parameters and buffers are compared byte for
byte before and after every evaluation of it frozen; whatever is chosen (the l2 penalty) is chosen
on a part of the training set; the test split is used once, for the number that is reported; a
checkpoint is loaded strictly or not at all.

Reading order: loading · export · evaluation · results · figure · new images · options · main. How
other projects name their weights is in utils.py.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import io
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torchvision
from sklearn import metrics
from torch import Tensor, nn
from tqdm import tqdm

import simclr
import utils
from simclr import IMAGENET_STEM_SIZE, Config, Data, Source, check_size, load_source
from utils import MEANS, ImageFiles, InputError, LabelTraining, flag, setting

# ----------------------------------------------------------------------------------------- loading


def load_encoder(
    where: str | Path = "", normalize: str = "auto", device: torch.device | str = "cpu",
    prefix: str = "",
) -> nn.Module:  # fmt: skip
    """The pre-trained encoder f, frozen and in eval mode; `encoder.feature_dim` is the width of h.

    where: a checkpoint file, a run's folder or name, or "" for the newest run. Returns a module:
    float (B, 3, S, S) in [0, 1] -> h (B, feature_dim), which checks its first batch and raises
    InputError for images of another kind. To train it further, call .train() and
    .requires_grad_(True). Raises InputError as load_source().
    """
    encoder = load_source(utils.find_checkpoint(str(where)), normalize, prefix).encoder
    encoder.register_forward_pre_hook(check_first_images)
    return encoder.to(device)


TOLERANCE = 0.2  # by which resized images may leave [0, 1]: bicubic interpolation overshoots


def check_first_images(encoder: nn.Module, inputs: tuple[Tensor]) -> None:
    """Forward pre-hook: check_images() of the first batch. TorchScript and compilers skip it."""
    if not torch.jit.is_scripting() and not getattr(encoder, "images_checked", False):
        if torch.compiler.is_compiling():
            return
        check_images(inputs[0])
        encoder.images_checked = True


def check_images(images: Tensor) -> None:
    """Raises InputError if images are not float (B, 3, S, S) in [0, 1]."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise InputError(f"give RGB images (B, 3, S, S), not {tuple(images.shape)}")
    if not images.is_floating_point():
        raise InputError(f"give float images in [0, 1], not {images.dtype}: images / 255")
    low, high = images.min().item(), images.max().item()
    if low < -TOLERANCE or high > 1 + TOLERANCE:
        remedy = "do not normalise them" if low < 0 else "images / 255"
        raise InputError(f"give images in [0, 1], not {low:.3g} to {high:.3g}: {remedy}")


# ------------------------------------------------------------------------------------------ export


def export_encoder(source: Source, file: Path) -> str:
    """Writes the encoder as a state dict with torchvision's names. Returns how to load it.

    At width 1 torchvision.models.<arch>() takes it with only `fc` missing; a 3x3 stem needs two
    lines before, which the returned text gives. Raises InputError if the file cannot be written, or
    if torchvision's ResNet cannot compute the same (lightly's own ResNet has no ReLU in its stem).
    """
    encoder = source.resnet
    if isinstance(encoder.relu, nn.Identity):
        raise InputError(f"{source.file}: a stem without ReLU does not exist in torchvision")
    padding = encoder.conv1.padding[0]
    state = encoder.state_dict()  # an OrderedDict, saved with its metadata
    origin = source.foreign.origin if source.foreign else "simclr.py"
    settings = {"normalize": source.normalize, "padding": padding, "origin": origin}
    state._metadata[""][utils.EXPORT_KEY] = settings  # ignored by load_state_dict
    check_targets(file)
    utils.save_checkpoint(file, state)

    channels, _, kernel, _ = encoder.conv1.weight.shape
    arch = source.config.arch if source.config else source.foreign.arch
    if channels != 64 or not hasattr(torchvision.models, arch):
        return f"load it with load_simCLR.load_encoder({str(file)!r})"
    weights = f"torch.load({str(file)!r})"
    mean, std = map(list, MEANS.get(source.normalize, ((0, 0, 0), (1, 1, 1))))
    inputs = "" if source.normalize == "none" else f", normalised: mean {mean}, std {std}"
    lines = ["load it with", f"  model = torchvision.models.{arch}()"]
    if kernel == 3:
        lines += [f"  model.conv1 = nn.Conv2d(3, 64, 3, padding={padding}, bias=False)"]
        lines += ["  model.maxpool = nn.Identity()"]
    lines += [f"  model.load_state_dict({weights}, strict=False)  # fc is missing"]
    lines += [f"it takes RGB images in [0, 1]{inputs}"]
    if kernel == 7:
        lines += [
            "or into a detector, whose defaults are another normalisation and frozen layers:",
            f"  backbone = resnet_fpn_backbone(backbone_name={arch!r}, weights=None,",
            "      norm_layer=nn.BatchNorm2d, trainable_layers=5)",
            f"  backbone.body.load_state_dict({weights})",
            f"  model = FasterRCNN(backbone, num_classes=2, image_mean={mean}, image_std={std})",
        ]
    return "\n".join(lines)


# -------------------------------------------------------------------------------------- evaluation

# neighbours and the temperature of their weights; the second as most codes report (Wu et al. 2018)
KNN = ((simclr.KNN_NEIGHBOURS, None), (200, 0.1))
LINEAR_EPOCHS, LINEAR_BATCH = 90, 256  # of 'linear-augmented'; the paper's number of epochs
MANY_LABELS, MANY_EPOCHS, FEW_EPOCHS = 0.1, 30, 60  # Appendix B.5: from 10 % on, and below
SUPERVISED = LabelTraining(epochs=90, batch_size=256, lr=0.1, weight_decay=1e-4)  # He et al. 2016


@dataclass
class Column:
    """One measurement of all representations: a column of the table.

    The keys are those of REPRESENTATIONS; each list has a number for each seed.
    """

    task: str
    title: str
    scores: dict[str, list[float]] = field(default_factory=dict)  # accuracies in [0, 1]
    # beyond accuracy, in [0, 1]: mean_per_class, macro_f1 and, of two classes, auroc
    measures: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    l2: dict[str, float] = field(default_factory=dict)  # strength that was chosen


class Evaluation:
    """The measurements of one encoder on one labelled data set.

    Features are computed once, without augmentation. evaluate() runs the tasks inside
    utils.frozen(), which raises if a single byte of the encoder moved.
    """

    def __init__(
        self, source: Source, config: Config, data: Data, device: torch.device, options: Options
    ) -> None:
        self.source, self.config, self.data, self.device = source, config, data, device
        self.options = options
        epochs = "1 epoch" if options.epochs == 1 else f"{options.epochs} epochs"
        self.note = f", {epochs}" if options.epochs else ""  # if it is not the paper's number
        self.encoders: dict[str, Any] = simclr.encoders(
            source.encoder, self.untrained(seed=0), device, source.projector
        )
        self.classes = len(data.train.classes)
        # of h, once linear() has run; with its classes (M,) and confidences (M,) of the test images
        self.classifier: utils.LinearClassifier | None = None
        self.predicted = self.confidence = torch.empty(0)
        self._features: dict[str, tuple[Tensor, Tensor]] = {}

    def untrained(self, seed: int) -> nn.Module:
        """The network at its random start; seed 0 is where the run itself began."""
        config = dataclasses.replace(self.config, seed=self.config.seed + seed)
        encoder = self.source.untrained(config)
        return encoder.to(self.device, memory_format=torch.channels_last)

    def features(self, name: str) -> tuple[Tensor, Tensor]:
        """Training (N, D) and test (M, D) features, float32."""
        if name not in self._features:
            self._features[name] = tuple(
                simclr.features(self.encoders[name], part, self.config, self.device)
                for part in (self.data.train, self.data.test)
            )
        return self._features[name]

    def record(self, column: Column, name: str, outputs: Tensor) -> None:
        """Adds the scores of logits (M, K), or of classes int64 (M,), of the test images."""
        predicted = outputs.argmax(1) if outputs.ndim == 2 else outputs
        truth = self.data.test.labels
        column.scores.setdefault(name, []).append(utils.accuracy(predicted, truth))
        two = outputs.ndim == outputs.shape[-1] == 2
        scores = class_measures(predicted, truth, outputs[:, 1] - outputs[:, 0] if two else None)
        for key, value in scores.items():
            column.measures.setdefault(name, {}).setdefault(key, []).append(value)

    def knn(self) -> list[Column]:
        """For each k, a column without scores where there are not more training images than k."""
        columns = [Column("knn", f"kNN, k = {k}{', weighted' * bool(t)}") for k, t in KNN]
        labels = self.data.train.labels
        for name in self.encoders:
            similarity, rows = utils.nearest_neighbours(*self.features(name), KNN[-1][0])
            for column, (k, temperature) in zip(columns, KNN, strict=True):
                if len(labels) > k:
                    near = similarity[:, :k], labels[rows[:, :k]]
                    self.record(column, name, utils.knn_vote(*near, self.classes, temperature))
        return columns

    def linear(self) -> list[Column]:
        """Logistic regression on frozen features."""
        column = Column("linear", "linear")
        for name in self.encoders:
            x, x_test = self.features(name)
            with steps_bar(len(utils.L2_STRENGTHS), f"linear, {name}") as after_fit:
                classifier = utils.fit_linear_classifier(
                    x, self.data.train.labels, self.classes, after_fit=after_fit
                )
            logits = classifier(x_test)
            self.record(column, name, logits)
            column.l2[name] = classifier.l2
            if name == "simclr":
                self.classifier = classifier
                self.confidence, self.predicted = logits.softmax(1).max(1)
        return [column]

    def linear_augmented(self) -> list[Column]:
        """A linear layer on frozen features of augmented images."""
        column = Column("linear-augmented", f"linear, augmented{self.note}")
        for name in self.encoders:
            self.record(column, name, self.fit_on_augmented(name)(self.features(name)[1]))
        return [column]

    def fit_on_augmented(self, name: str) -> Callable[[Tensor], Tensor]:
        """A linear layer trained by SGD on frozen features of crops and flips.

        The loss is convex, so the learning rate is one over a bound of its curvature: half the
        largest eigenvalue of the features' covariance. Features are standardised by a first pass
        of crops. Returns features (B, D) -> logits (B, K).
        """
        n = len(self.data.train)
        training = LabelTraining(self.options.epochs or LINEAR_EPOCHS, LINEAR_BATCH, min_steps=0)
        steps, size = training.steps(n), training.batch(n)
        x = torch.cat([h for h, _ in self.augmented_features(name, size, n // size, stream=0)])
        mean, std = utils.standardization(x)
        x = (x - mean) / std
        curvature = torch.linalg.matrix_norm(x.mT @ x / len(x), ord=2).item() / 2
        rate = 1 / max(curvature, 1e-6)
        batches = (
            ((h - mean) / std, labels)
            for h, labels in self.augmented_features(name, size, steps, stream=1)
        )
        layer = utils.zero_classifier(x.shape[1], self.classes).to(self.device)
        with steps_bar(steps, f"linear, augmented, {name}") as after_step:
            utils.train_on_labels(layer, batches, steps, rate, training, "float32", after_step)
        return lambda h: layer((h - mean) / std).detach()

    def augmented_features(
        self, name: str, size: int, steps: int, stream: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of frozen features of crops and flips, float32 (B, D), and labels, int64 (B,)."""
        batches = simclr.labelled_batches(
            self.data.train, torch.arange(len(self.data.train)),
            simclr.geometric_augment(self.config), size, steps, (self.config.seed, stream),
            self.device, utils.worker_count(self.config.workers),
        )  # fmt: skip
        for images, labels in batches:
            with torch.no_grad(), utils.autocast(self.device, self.config.precision):
                h = self.encoders[name](images).float()
            yield h, labels

    def semi(self) -> list[Column]:
        """A column for each label set; of sets of the same images only the first."""
        sizes = [len(self.label_rows(amount, 0)) for amount in self.options.labels]
        first = [i for i, size in enumerate(sizes) if size not in sizes[:i]]
        return [self.few_labels(self.options.labels[i], sizes[i]) for i in first]

    def few_labels(self, amount: str, n: int) -> Column:
        """Fine-tuned with n labels: the encoder and, from scratch, the untrained one.

        Beside them logistic regression on raw pixels. The head is thrown away, as in the paper.
        """
        wanted = parse_amount(amount)
        share = wanted if isinstance(wanted, float) else n / len(self.data.train)
        text = f"{wanted} a class" if isinstance(wanted, int) else f"{100 * wanted:g} %"
        epochs = self.options.epochs or (MANY_EPOCHS if share >= MANY_LABELS else FEW_EPOCHS)
        column = Column("semi", f"fine-tuned, {text} ({n:,}){self.note}")
        training, augment = LabelTraining(epochs), simclr.geometric_augment(self.config)
        x, x_test = utils.standardize(*self.features("pixels"))
        for seed in range(self.options.seeds):
            rows = self.label_rows(amount, seed)
            labels = self.data.train.labels[rows]
            weight, bias = utils.fit_logistic_regression(x[rows], labels, self.classes)
            self.record(column, "pixels", x_test @ weight + bias)
            self.fine_tune(column, self.untrained(seed), rows, augment, training, seed)
            self.fine_tune(column, self.encoders["simclr"], rows, augment, training, seed)
        return column

    def supervised(self) -> list[Column]:
        """All labels, crops, flips and colour, from scratch: what SimCLR does without."""
        training = dataclasses.replace(SUPERVISED, epochs=self.options.epochs or SUPERVISED.epochs)
        column = Column("supervised", f"supervised, all labels{self.note}")
        augment, rows = simclr.make_augment(self.config), torch.arange(len(self.data.train))
        for seed in range(self.options.seeds):
            self.fine_tune(column, self.untrained(seed), rows, augment, training, seed)
        return [column]

    def fine_tune(
        self, column: Column, start: nn.Module, rows: Tensor, augment: simclr.Augment,
        training: LabelTraining, seed: int,
    ) -> None:  # fmt: skip
        """Adds the scores of a copy of `start` that is trained on the labels of `rows`."""
        name = "simclr" if start is self.encoders["simclr"] else "untrained"
        title = f"{column.title}, {name}, seed {seed}"
        with steps_bar(training.steps(len(rows)), title) as after_step:
            network = simclr.fine_tune(
                start, self.data.train, rows, augment, training, self.config, self.device, seed,
                after_step,
            )  # fmt: skip
        logits = simclr.features(network, self.data.test, self.config, self.device)
        self.record(column, name, logits)

    def label_rows(self, amount: str, seed: int) -> Tensor:
        """Which training images have a label, the same share or number of each class: int64 (M,).

        Raises InputError if a class has fewer images than are asked for.
        """
        wanted, labels = parse_amount(amount), self.data.train.labels.cpu().numpy()
        key = utils.derive_seed(self.config.seed, simclr.LABELS, seed)
        chosen = []
        for order in utils.class_balanced_order(labels, key):
            count = wanted if isinstance(wanted, int) else max(1, round(wanted * len(order)))
            if count > len(order):
                name = self.data.train.classes[labels[order[0]]]
                raise InputError(
                    f"--labels {amount}: class {name!r} has only {len(order)} training images"
                )
            chosen.append(torch.from_numpy(order[:count]))
        return torch.cat(chosen)


def evaluate(
    evaluation: Evaluation, after_task: Callable[[dict], None] = lambda _: None
) -> dict[str, Any]:
    """Runs the tasks of the options. Returns the columns and the seconds of each task.

    after_task: is given them after each task, so that a long evaluation can be kept as it grows.
    Raises RuntimeError if an evaluation changed the encoder, which would make it void.
    """
    results: dict[str, Any] = {"columns": [], "seconds": {}}
    source = evaluation.source
    judged = nn.ModuleList(m for m in (source.encoder, source.projector) if m is not None)
    for task, (method, _) in TASKS.items():
        if task in evaluation.options.tasks:
            started = time.perf_counter()
            with utils.frozen(judged):
                columns = method(evaluation)
            results["columns"] += [dataclasses.asdict(column) for column in columns]
            results["seconds"][task] = round(time.perf_counter() - started, 2)
            after_task(results)
            print(f"{task:20} {results['seconds'][task]:8.1f} s", flush=True)
    return results


def class_measures(
    predicted: Tensor, truth: Tensor, scores: Tensor | None = None
) -> dict[str, float]:
    """Measures for classes of uneven size, over the classes in `truth`, in [0, 1].

    predicted, truth: int64 (M,). scores: (M,), of class 1 where there are two classes.
    """
    y, guess = truth.cpu().numpy(), predicted.cpu().numpy()
    over = dict(labels=np.unique(y), average="macro", zero_division=0)
    values = {
        "mean_per_class": float(metrics.recall_score(y, guess, **over)),
        "macro_f1": float(metrics.f1_score(y, guess, **over)),
    }
    if scores is not None and len(over["labels"]) == 2:
        values["auroc"] = float(metrics.roc_auc_score(y, scores.cpu().numpy()))
    return values


@contextlib.contextmanager
def steps_bar(total: int, title: str) -> Iterator[Callable[[], Any]]:
    """Context manager that shows a bar on a terminal. Yields what advances it by a step."""
    hidden = None if utils.is_main_process() else True
    with tqdm(total=total, desc=title, unit="step", leave=False, disable=hidden) as bar:
        yield bar.update


def evaluation_setup(source: Source, options: Options, device: torch.device) -> tuple[Config, Data]:
    """The configuration and the data that `source` is to be evaluated with.

    Raises InputError if the data cannot be had or have no labels, or do not suit the encoder.
    """
    config = source.config_for(options.dataset, options.data_dir, options.image_size, options.range)
    config = dataclasses.replace(config, workers=options.workers)
    data = simclr.load_data(config, device)
    if not data.labelled:
        raise InputError(
            f"{config.dataset} in {config.data_dir} has no labels, or no labelled test images: "
            "there is nothing to evaluate by (--embed works without)"
        )
    config = simclr.resolve(config, data.pretrain, device)
    check_size(source, config.image_size)
    config = dataclasses.replace(config, precision=choose_precision(source, options, device))
    return config, simclr.only_readable(data, config)


def choose_precision(source: Source, options: Options, device: torch.device) -> str:
    """As in training, where the hardware has it."""
    return source.precision(device) if options.precision == "auto" else options.precision


# ----------------------------------------------------------------------------------------- results

UNEVEN = 1.5  # ratio of the largest and the smallest class from which on accuracy misleads


def table(
    columns: Sequence[dict], names: dict[str, str], images: int = utils.FEW_IMAGES, width: int = 100
) -> str:
    """The results for people: a row a representation, a column a measurement, in lines of width.

    images: of the test split, for the sampling errors of accuracies; by default without them.
    """
    shown = [key for key in names if any(key in column["scores"] for column in columns)]
    labels = ["", *(names[key] for key in shown)]
    first = max(map(len, labels))
    blocks: list[list[str]] = []  # lines of text each, to which columns are added while they fit
    for column in columns:
        cells = [column["title"], *(percent(column["scores"].get(key), images) for key in shown)]
        wide = max(map(len, cells)) + 3
        if not blocks or len(blocks[-1][0]) + wide > width:
            blocks.append([f"{label:{first}}" for label in labels])
        blocks[-1] = [
            line + f"{cell:>{wide}}" for line, cell in zip(blocks[-1], cells, strict=True)
        ]
    return "\n\n".join("\n".join(block) for block in blocks)


def percent(scores: Sequence[float] | None, images: int = utils.FEW_IMAGES) -> str:
    """Numbers in [0, 1], one a seed, as their mean ± error. images: as in table()."""
    return utils.accuracy_text(*mean_and_spread(scores, images)) if scores else "–"


def mean_and_spread(scores: Sequence[float], images: int) -> tuple[float, int, float]:
    """The arguments of utils.accuracy_error(): mean, images, standard deviation over the seeds."""
    return statistics.fmean(scores), images, statistics.stdev(scores) if len(scores) > 1 else 0.0


def text_of(results: dict, names: dict[str, str]) -> str:
    """What is printed: accuracies, mean per-class accuracies if classes are uneven, comparisons."""
    columns, parts = results["columns"], []
    if results["uneven_classes"]:
        mean_per_class = [
            {**c, "scores": {name: m["mean_per_class"] for name, m in c["measures"].items()}}
            for c in columns
        ]
        parts += [
            f"Classes are uneven: the largest has {percent([results['majority']])} of the test "
            f"images.\n\nMean accuracy of the classes:\n{table(mean_per_class, names)}\n\nAccuracy:"
        ]
    images = results["test_images"]
    parts += [table(columns, names, images)]
    if images < utils.FEW_IMAGES:
        parts += [f"±: the sampling error of {images:,} images, and the spread over seeds if any"]
    for title, scores in ((column["title"], column["scores"]) for column in columns):
        if not scores:
            parts += [f"{title}: not with {results['train_images']} training images"]
        if title.startswith("fine-tuned"):
            gain = statistics.fmean(scores["simclr"]) - statistics.fmean(scores["untrained"])
            better, worse = ("pre-training", "training from scratch")[:: 1 if gain > 0 else -1]
            parts += [f"{title}: {better} is {abs(100 * gain):.1f} points better than {worse}"]
    return "\n".join(parts)


def write_predictions(
    file: Path, names: Sequence[str], predicted: Sequence[str], confidence: Sequence[float],
    truth: Sequence[str] | None = None,
) -> None:  # fmt: skip
    """A CSV file: image, true class (if known), predicted class, confidence in [0, 1]."""
    columns = {"image": names, "true": truth, "predicted": predicted,
               "confidence": [f"{value:.6f}" for value in confidence]}  # fmt: skip
    known = {head: values for head, values in columns.items() if values is not None}
    text = io.StringIO(newline="")
    csv.writer(text).writerows([list(known), *zip(*known.values(), strict=True)])
    utils.write_atomically(file, text.getvalue().encode("utf-8", "surrogateescape"))


# ------------------------------------------------------------------------------------------ figure

MARKERS = {"pixels": "s", "untrained": "^", "simclr": "o", "projection": "D"}
TILES = 12  # mistakes that are shown
MANY_CLASSES = 20  # from here a confusion matrix has no numbers and no names


def draw_evaluation(
    results: dict, names: dict[str, str], mistakes: Sequence[tuple[np.ndarray, str]] | None = None
) -> Any:
    """The results as a matplotlib Figure: accuracies, confusion matrix, the worst mistakes.

    results: as in evaluation.json. mistakes: images uint8 (H, W, 3) with what to write above them;
    None if they were not looked for.
    """
    from matplotlib.figure import Figure

    heights = [1.4 + 0.42 * len(results["columns"]), *[4.6] * ("confusion" in results)]
    figure = Figure(figsize=(9.5, sum(heights)), layout="constrained")
    upper, *lower = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    draw_accuracies(upper.subplots(), results, names)
    if not lower:
        return figure
    left, *right = lower[0].subfigures(1, 2 if mistakes is not None else 1, squeeze=False)[0]
    draw_confusion(left.subplots(), np.asarray(results["confusion"]), results["classes"])
    if not right:
        return figure
    right[0].suptitle("Most confident mistakes" if mistakes else "No mistakes", fontsize=10)
    for axis, tile in itertools.zip_longest(
        right[0].subplots(3, TILES // 3).flat, mistakes[:TILES]
    ):
        axis.axis("off")
        if tile is not None:
            axis.imshow(tile[0], interpolation="nearest")
            axis.set_title(tile[1], fontsize=7)
    return figure


def draw_accuracies(axis: Any, results: dict, names: dict[str, str]) -> None:
    """A line a measurement, a mark a representation, with its error where there is one."""
    columns, images = results["columns"], results["test_images"]
    present = [key for key in names if any(key in c["scores"] for c in columns)]
    for i, key in enumerate(present):
        rows = [(y, c["scores"][key]) for y, c in enumerate(columns) if key in c["scores"]]
        means = [100 * statistics.fmean(scores) for _, scores in rows]
        bars = [100 * utils.accuracy_error(*mean_and_spread(s, images)) for _, s in rows]
        offset = 0.1 * (i - (len(present) - 1) / 2)  # so that equal marks do not hide each other
        solid = key == "simclr"
        axis.errorbar(
            means, [y + offset for y, _ in rows], xerr=bars if any(bars) else None,
            fmt=MARKERS[key], color=f"C{i}", mfc=f"C{i}" if solid else "white",
            markersize=7 if solid else 6, capsize=3, label=names[key], zorder=3 if solid else 2,
        )  # fmt: skip
    if results.get("uneven_classes"):
        axis.axvline(100 * results["majority"], color="0.4", ls="--", lw=1, label="largest class")
    axis.set_yticks(range(len(columns)), [column["title"] for column in columns])
    axis.set_ylim(len(columns) - 0.5, -0.5)
    left, right = axis.get_xlim()
    axis.set_xlim(max(left, -1), min(right, 101))  # a deviation may go beyond
    over = ["spread over seeds"] * any(len(s) > 1 for c in columns for s in c["scores"].values())
    over += [f"sampling error of {images:,} images"] * (images < utils.FEW_IMAGES)
    note = f" (bars: {' and '.join(over)})" if over else ""
    axis.set_xlabel(f"accuracy on the test images, %{note}")
    axis.grid(axis="x", color="0.9")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)


def draw_confusion(axis: Any, counts: np.ndarray, classes: Sequence[str]) -> None:
    """Shares of each true class, with the counts written in if they can be read."""
    share = counts / counts.sum(1, keepdims=True).clip(min=1)
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axis.set_title("Linear classifier on h: images of each class (row)", fontsize=10)
    axis.set(xlabel="predicted class", ylabel="true class")
    if len(classes) > MANY_CLASSES:
        return
    short = [utils.printable(name, 14) for name in classes]
    rotation = 0 if max(len(name) for name in short) <= 2 else 60
    alignment = dict(ha="right", rotation_mode="anchor") if rotation else {}
    axis.set_xticks(range(len(short)), short, rotation=rotation, fontsize=8, **alignment)
    axis.set_yticks(range(len(short)), short, fontsize=8)
    for (i, j), count in np.ndenumerate(counts):
        if count:
            color = "white" if share[i, j] > 0.5 else "black"
            axis.text(j, i, str(count), ha="center", va="center", fontsize=7, color=color)


def mistake_tiles(evaluation: Evaluation, classes: Sequence[str]) -> list[tuple[np.ndarray, str]]:
    """The most confident mistakes on the test split: uint8 (S, S, 3), "true → predicted, 99 %".

    classes: their names in figures.
    """
    data, predicted, confidence = evaluation.data.test, evaluation.predicted, evaluation.confidence
    wrong = (predicted != data.labels).nonzero()[:, 0]
    order = confidence[wrong].argsort(descending=True, stable=True)
    tiles = []
    for index in wrong[order][:TILES].tolist():
        image = data.image(index)[None]
        view = utils.to_uint8(utils.center_view(image, evaluation.config.image_size))[0]
        names = (utils.printable(classes[int(x[index])], 12) for x in (data.labels, predicted))
        title = f"{' → '.join(names)}\n{100 * confidence[index]:.0f} %"
        tiles.append((view.permute(1, 2, 0).cpu().numpy(), title))
    return tiles


# -------------------------------------------------------------------------------------- new images

EMBED_BATCH = 128  # images of up to 224 px in float32: 77 MB


def use_on_new_images(source: Source, options: Options, device: torch.device) -> None:
    """--embed and --classify: writes the .npz and the .csv."""
    check_targets(options.out)
    small_stem = source.resnet.conv1.stride[0] == 1
    size = options.image_size or (source.config.image_size if source.config else 0)
    size = size or (IMAGENET_STEM_SIZE if small_stem else simclr.STREAMED_SIZE)
    if options.classify:  # by logistic regression on the labelled images
        config, data = evaluation_setup(source, options, device)
        evaluation = Evaluation(source, config, data, device, options)
        evaluation.encoders = {"simclr": source.encoder}
        with utils.frozen(source.encoder):
            evaluation.linear()
        size = config.image_size
    check_size(source, size)
    for folder in dict.fromkeys(f for f in (options.embed, options.classify) if f):
        paths, h = embed_folder(source, Path(folder), size, options, device)
        if folder == options.embed:
            out = Path(options.out or source.output("features.npz", options.figures))
            buffer = io.BytesIO()
            np.savez(buffer, paths=np.array(paths), h=h.cpu().numpy())
            utils.write_atomically(out, buffer.getbuffer())
            print(f"{len(paths):,} images, h of {h.shape[1]} dimensions each: {out}")
        if folder == options.classify:
            out = Path(options.out or source.output("classified.csv", options.figures))
            confidence, predicted = evaluation.classifier(h).softmax(1).max(1)
            names = [data.train.classes[i] for i in predicted.tolist()]
            write_predictions(out, paths, names, confidence.tolist())
            print(f"{len(paths):,} images classified: {out}")


def embed_folder(
    source: Source, folder: Path, size: int, options: Options, device: torch.device
) -> tuple[list[str], Tensor]:
    """h of every image below a folder, streamed from disk; prints which could not be read.

    Returns the paths relative to the folder and float32 (N, D) in their order. Raises InputError
    if there is no image that can be read.
    """
    paths = utils.list_images(folder)
    if not paths:
        raise InputError(f"no images in {folder}")
    names = np.array([os.fsencode(path) for path in paths])
    grey_range = options.range or (source.config.range if source.config else ())
    grey_range = utils.choose_range(folder, paths, grey_range)
    files = ImageFiles(folder, names, max_bad=1.0, grey_range=grey_range)
    precision = choose_precision(source, options, device)
    workers = utils.worker_count(options.workers)
    encoder = source.encoder.to(device, memory_format=torch.channels_last)
    with utils.frozen(encoder):
        h = utils.embed(encoder, files, size, device, precision, EMBED_BATCH, workers, str(folder))
    if files.unreadable:
        print(f"{len(files.unreadable):,} of {len(paths):,} images could not be read:")
        for reason in files.unreadable.values():
            print(f"  {utils.one_line(reason, 500)}")
    read = utils.rows_read(h)
    return [path for path, is_read in zip(paths, read.tolist(), strict=True) if is_read], h[read]


# ----------------------------------------------------------------------------------------- options

TASKS: dict[str, tuple[Callable[[Evaluation], list[Column]], str]] = {  # method, help
    "knn": (Evaluation.knn, "k nearest neighbours by cosine: 10 with a vote each, 200 weighted"),
    "linear": (Evaluation.linear, "logistic regression on frozen features, l2 chosen by training"),
    "linear-augmented": (Evaluation.linear_augmented, "a linear layer on frozen crops and flips"),
    "semi": (Evaluation.semi, "fine-tuning with few labels, against training from scratch (B.5)"),
    "supervised": (Evaluation.supervised, "the same network trained on all labels, from scratch"),
}
SHARED_TASKS = {"knn", "linear"}  # in several processes, which share the embedding


@dataclass
class Options:
    """The command line of load_simCLR.py."""

    # what to measure
    tasks: tuple[str, ...] = setting(("knn", "linear"), "what to measure", tuple(TASKS))
    labels: tuple[str, ...] = setting(
        ("1%", "10%", "100%"),
        "label sets of 'semi': shares of each class (1% or 0.01) or numbers per class (10)",
    )
    seeds: int = setting(
        3, "draws of the labels and initialisations, for 'semi' and 'supervised'", low=1
    )
    epochs: int = setting(
        0, "passes over the labels; 0: the paper's, 60 or 30 ('semi') and 90 (the others)", low=0
    )
    dataset: str = setting("", "evaluate on this data set (default: the run's)", utils.DATASETS)
    data_dir: str = setting("", "where it is; with 'folder' your images (default: the run's)")
    image_size: int = setting(0, "side in px that the encoder sees; 0: as in training", low=0)
    range: tuple[float, ...] = setting((), "values that are black and white in grey pictures of "
                                       "more than 8 bits (default: the run's)")  # fmt: skip
    predictions: str = setting("", "write the linear classifier's test predictions to this .csv")
    # use on new images
    embed: str = setting("", "write h of all images in this folder, and evaluate nothing")
    classify: str = setting("", "predict the classes of all images in this folder")
    out: str = setting(
        "", "file that --embed (.npz), --classify (.csv) or the evaluation (.json) writes "
        "(default: beside the checkpoint, or beside the figures where that folder is read-only)"
    )  # fmt: skip
    # other formats
    export: str = setting("", "write the encoder with torchvision's names to this file")
    normalize: str = setting(
        "auto",
        "how images in [0, 1] are normalised before the encoder; auto: as its origin did",
        ("auto", "none", *MEANS),
    )
    prefix: str = setting("", "which encoder of another project's file, if it holds several")
    # how it runs
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    precision: str = setting(
        "auto", "auto: the run's, where the hardware has it", ("auto", "bfloat16", "float32")
    )
    workers: int = setting(-1, "processes that decode streamed images; -1: one per core", low=-1)
    checkpoints: str = setting("checkpoints", "folder of all runs' checkpoints")
    figures: str = setting("figures", "folder of all runs' figures")


OPTION_GROUPS = {
    "tasks": "evaluation",
    "embed": "use on new images",
    "export": "other formats",
    "device": "how it runs",
}


def check_options(options: Options) -> None:
    """Raises InputError for the first option that is out of range or contradicts another."""
    utils.check_settings(options)
    if options.image_size and not simclr.MIN_SIZE <= options.image_size <= simclr.MAX_SIZE:
        raise InputError(f"--image-size must be 0 or 8 to 4096, got {options.image_size}")
    for text in options.labels:
        parse_amount(text)
    if options.predictions and "linear" not in options.tasks:
        raise InputError("--predictions are those of the linear classifier: add linear to --tasks")
    for name in ("embed", "classify"):
        folder = getattr(options, name)
        if folder and not os.path.isdir(folder):
            raise InputError(f"{flag(name)} {folder} is not a folder")
    if options.out and options.embed and options.classify:
        raise InputError("--out names one file: give either --embed or --classify")
    suffix = ".npz" if options.embed else ".csv" if options.classify else ".json"
    if options.out and Path(options.out).suffix != suffix:
        raise InputError(f"--out {options.out}: it must end in {suffix}")


def parse_amount(text: str) -> float | int:
    """How many labels: "1%", "0.01" and "1.0" -> a share (float), "10" -> a number per class."""
    with contextlib.suppress(ValueError):
        amount = float(text[:-1]) / 100 if text.endswith("%") else float(text)
        if text.isdecimal() and amount > 0:
            return int(text)
        if 0 < amount <= 1:
            return amount
    raise InputError(
        f"--labels {text}: give a share up to 100 % (1% or 0.01) or a number per class (10)"
    )


# -------------------------------------------------------------------------------- the command line


def run_evaluation(source: Source, options: Options, device: torch.device) -> dict:
    """Evaluates, prints the table, writes evaluation.json, the figure and the predictions."""
    config, data = evaluation_setup(source, options, device)
    own = source.config or config
    other_folder = config.dataset == "folder" and config.data_dir != own.data_dir
    suffix = f"-{config.dataset}" if config.dataset != own.dataset or other_folder else ""
    figure_file = Path(options.figures) / source.name / f"evaluation{suffix}.png"
    default = source.output(f"evaluation{suffix}.json", options.figures)
    result_file = Path(options.out or default)
    evaluation = Evaluation(source, config, data, device, options)
    for amount in options.labels if "semi" in options.tasks else ():
        evaluation.label_rows(amount, 0)  # too many labels are an error now, not after an hour
    check_targets(result_file, figure_file, options.predictions)
    print(
        f"{source.file}: {source.description}\nevaluated on {config.dataset}: "
        f"{len(data.train):,} training and {len(data.test):,} test images of "
        f"{len(data.train.classes)} classes, {config.image_size} px, on {device} in "
        f"{utils.describe_precision(config.precision, device)}\n"
    )
    header = header_of(evaluation)

    def keep(measured: dict) -> dict:
        results = with_earlier(result_file, header, measured)
        utils.write_json(result_file, results)
        return results

    results = keep(evaluate(evaluation, keep))
    tiles, (names, style) = None, utils.names_in_figures(data.train.classes)
    if evaluation.classifier is not None:
        truth, predicted = data.test.labels.tolist(), evaluation.predicted.tolist()
        labels = range(evaluation.classes)
        results["confusion"] = metrics.confusion_matrix(truth, predicted, labels=labels).tolist()
        tiles = mistake_tiles(evaluation, names)
        if options.predictions:
            named = [[data.train.classes[i] for i in rows] for rows in (predicted, truth)]
            confidence, images = evaluation.confidence.tolist(), utils.image_names(data.test)
            write_predictions(Path(options.predictions), images, named[0], confidence, named[1])
    utils.write_json(result_file, results)
    with matplotlib.rc_context(style):
        drawn = {**results, "classes": names}
        utils.save_figure(draw_evaluation(drawn, source.row_names, tiles), figure_file)
    print(f"\n{text_of(results, source.row_names)}")
    print(f"results       {result_file}\nfigure        {figure_file}")
    if options.predictions:
        print(f"predictions   {options.predictions}")
    return results


SETTINGS = ("dataset", "data_dir", "image_size", "precision")  # of the configuration


def header_of(evaluation: Evaluation) -> dict[str, Any]:
    """What evaluation.json says beside the measurements; where it differs, so do they."""
    source, config, data = evaluation.source, evaluation.config, evaluation.data
    counts = data.train.labels.bincount(minlength=evaluation.classes)
    return {
        "checkpoint": str(source.file),
        "sha256": hashlib.sha256(source.file.read_bytes()).hexdigest(),
        "encoder": source.description,
        "normalize": source.normalize,
        **{name: getattr(config, name) for name in SETTINGS},
        "train_images": len(data.train),
        "test_images": len(data.test),
        "classes": list(data.train.classes),
        "majority": utils.accuracy(counts.argmax(), data.test.labels),
        "uneven_classes": bool(counts.max() > UNEVEN * counts.min()),
    }


def check_targets(*files: str | Path) -> None:
    """Makes the folders of files to be written; "" is none. InputError if one cannot be written."""
    wanted = [Path(file) for file in files if file]
    for file in wanted:
        if os.path.exists(file) and not os.path.isfile(file):
            raise InputError(f"cannot write {file}: it is a folder, or no file")
        utils.make_folder(file.absolute().parent)


def with_earlier(file: Path, header: dict, measured: dict) -> dict:
    """The results to write: also what `file` holds of the same checkpoint on the same data.

    Columns are in the order of TASKS; of two with one title the new one is kept.
    """
    before: dict = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        saved = json.loads(file.read_text(encoding="utf-8"))
        if all(saved[key] == value for key, value in header.items()):
            before = saved
    titles = {column["title"] for column in measured["columns"]}
    columns = [c for c in before.get("columns", ()) if c["title"] not in titles]
    columns = sorted(columns + measured["columns"], key=lambda c: list(TASKS).index(c["task"]))
    seconds = {**before.get("seconds", {}), **measured["seconds"]}
    return {**before, **header, **measured, "columns": columns, "seconds": seconds}


def parse_command_line(argv: Sequence[str] | None = None) -> tuple[str, Options]:
    """Which run or file, and the options."""
    parser = utils.OneLineParser(
        prog="load_simCLR.py",
        usage="python load_simCLR.py [RUN|FILE] [--tasks TASK ...] [--flag value ...]",
        description=__doc__,
        epilog="tasks:\n" + "\n".join(f"  {name:17} {text}" for name, (_, text) in TASKS.items()),
    )
    parser.add_argument(
        "run", nargs="?", default="", help="a run's name or folder, or a file (default: the newest)"
    )
    utils.add_flags(parser, Options, OPTION_GROUPS)
    given = vars(parser.parse_args(argv))
    where = given.pop("run")
    options = Options(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
    check_options(options)
    return where, options


def run(where: str, options: Options) -> dict | None:
    """What `python load_simCLR.py` does. Returns the evaluation, if there was one."""
    device = utils.choose_device(options.device)
    if utils.rank_info().size > 1 and (alone := set(options.tasks) - SHARED_TASKS):
        raise InputError(
            f"--tasks {' '.join(sorted(alone))}: they train in one process; without torchrun"
        )
    with utils.process_group(device):
        file = utils.find_checkpoint(where, options.checkpoints)
        source = load_source(file, options.normalize, options.prefix)
        if options.export:
            lines = export_encoder(source, Path(options.export))
            print(f"{source.description}\nexported to {options.export}; {lines}")
        if options.embed or options.classify:
            use_on_new_images(source, options, device)
        if options.export or options.embed or options.classify:
            return None
        return run_evaluation(source, options, device)


@utils.command("load_simCLR.py")
def main(argv: Sequence[str] | None = None) -> None:
    run(*parse_command_line(argv))


if __name__ == "__main__":
    main()
