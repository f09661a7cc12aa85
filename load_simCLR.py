"""What a SimCLR representation is worth, and how to use it: load, evaluate, export, import.

    python load_simCLR.py                            # the newest run: kNN and linear evaluation
    python load_simCLR.py RUN --tasks knn linear linear-augmented semi
    python load_simCLR.py RUN --dataset cifar10      # the same on another data set: transfer
    python load_simCLR.py RUN --embed PHOTOS         # h of any folder of images, as .npz
    python load_simCLR.py RUN --fine-tune            # a classifier of all labels, as classifier.pt
    python load_simCLR.py RUN --classify PHOTOS      # the classes of any images, as .csv
    python load_simCLR.py RUN --export encoder.pt    # torchvision's names
    python load_simCLR.py RUN --tasks detection      # as a detector's backbone; --data-dir BOXES
    python load_simCLR.py moco_v2.pth.tar --dataset cifar10    # another project's encoder

RUN is the name of a run, its folder or a checkpoint file. From Python:

    from load_simCLR import load_classifier, load_encoder
    encoder = load_encoder("checkpoints/cifar10_resnet18")  # frozen, in eval mode
    h = encoder(images)    # float (B, 3, S, S) in [0, 1] -> (B, encoder.feature_dim)
    classifier = load_classifier("checkpoints/cifar10_resnet18")  # that --fine-tune has written
    logits = classifier(images)    # (B, len(classifier.classes))

What makes the numbers trustworthy: the bytes of the encoder's parameters and buffers are compared
before and after every frozen evaluation; settings such as the l2 penalty are chosen on a part of
the training set; the test split is used only for the number that is reported (and for the kNN
accuracy during training: see --knn-split of simclr.py); a checkpoint is loaded strictly or not at
all.

Reading order: loading · export · evaluation · results · figure · classifiers · new images ·
detection · options · main. How other projects name their weights is in utils.py.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import matplotlib
import numpy as np
import torch
import torchvision
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from sklearn import metrics
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign, nms
from torchvision.transforms.v2 import functional as TF

import simclr
import utils
from simclr import IMAGENET_STEM_SIZE, Source, check_size, load_source
from utils import MEANS, Images, InputError, LabelTraining, flag, setting, shown

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
    """Forward pre-hook: InputError if the first batch is not float (B, 3, S, S) in [0, 1]."""
    if not torch.jit.is_scripting() and not getattr(encoder, "images_checked", False):
        if torch.compiler.is_compiling():  # compilers skip the check, as TorchScript does
            return
        images = inputs[0]
        if images.ndim != 4 or images.shape[1] != 3:
            raise InputError(f"give RGB images (B, 3, S, S), not {tuple(images.shape)}")
        if not images.is_floating_point():
            raise InputError(f"give float images in [0, 1], not {images.dtype}: images / 255")
        low, high = images.min().item(), images.max().item()
        if low < -TOLERANCE or high > 1 + TOLERANCE:
            remedy = "do not normalise them" if low < 0 else "images / 255"
            raise InputError(f"give images in [0, 1], not {low:.3g} to {high:.3g}: {remedy}")
        encoder.images_checked = True


# ------------------------------------------------------------------------------------------ export


def export_encoder(source: Source, file: Path) -> str:
    """Writes the encoder as a state dict with torchvision's names. Returns how to load it.

    Raises InputError if the file cannot be written, or if torchvision's ResNet cannot compute the
    same (lightly's own ResNet has no ReLU in its stem).
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
    arch = source.shape["arch"]
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
LABELS = ("1%", "10%", "100%")  # of 'semi'
ON_CROPS = LabelTraining(epochs=90, batch_size=256, min_steps=0)  # the paper's epochs
MANY_LABELS, MANY_EPOCHS, FEW_EPOCHS = 0.1, 30, 60  # Appendix B.5: from 10 % on, and below

# title of the column; key of REPRESENTATIONS; logits (M, K) or classes (M,) of the test images, or
# None where there are too few training images
Outputs = tuple[str, str, Tensor | None]


class Evaluation:
    """The measurements of one encoder on the images that the options name, by default its run's.

    Features are computed once, without augmentation. Raises InputError if the data cannot be had or
    have no labels, or do not suit the encoder.
    """

    def __init__(self, source: Source, options: Options, device: torch.device) -> None:
        self.source, self.options, self.device = source, options, device
        given = options.dataset, options.data_dir, options.image_size, options.range
        config = dataclasses.replace(source.config_for(*given), workers=options.workers)
        data = simclr.load_data(config, device)
        if not data.labelled:
            raise InputError(
                f"{config.dataset} in {config.data_dir} has no labels, or no labelled test images: "
                "there is nothing to evaluate by; give --data-dir LABELLED, a folder with "
                "train/<class>/ and test/<class>/ (--embed works without)"
            )
        self.config = config = simclr.resolve(config, data.pretrain, device)
        check_size(source, config.image_size)
        config.precision = source.precision(device, options.precision)
        self.data = data = simclr.readable_data(data, config)
        self.note = f", {options.epochs} epoch{'s' * (options.epochs > 1)}" * bool(options.epochs)
        self.given = {"epochs": options.epochs, "min_steps": 0} if options.epochs else {}
        untrained = source.untrained(config)  # where the run itself began
        self.encoders = simclr.encoders(source.encoder, untrained, device, source.projector)
        self.classes = len(data.train.classes)
        # by the keys of REPRESENTATIONS; fitted: by linear(), with the logits (M, K) of test images
        self.fitted: dict[str, tuple[nn.Linear, Tensor]] = {}
        self._features: dict[str, tuple[Tensor, Tensor]] = {}

    def features(self, name: str) -> tuple[Tensor, Tensor]:
        """Training (N, D) and test (M, D) features, float32."""
        if name not in self._features:
            self._features[name] = tuple(
                simclr.features(self.encoders[name], part, self.config, self.device)
                for part in (self.data.train, self.data.test)
            )
        return self._features[name]

    def knn(self) -> Iterator[Outputs]:
        """For each k; None where there are at most k training images."""
        labels = self.data.train.labels
        for name in self.encoders:
            similarity, rows = utils.nearest_neighbours(*self.features(name), KNN[-1][0])
            for k, temperature in KNN:
                near = similarity[:, :k], labels[rows[:, :k]]
                predicted = utils.knn_vote(*near, self.classes, temperature)
                title = f"kNN, k = {k}{', weighted' * bool(temperature)}"
                yield title, name, predicted if len(labels) > k else None

    def linear(self) -> Iterator[Outputs]:
        """Logistic regression on frozen features."""
        for name in self.encoders:
            (x, x_test), y = self.features(name), self.data.train.labels
            classifier = utils.fit_linear_classifier(x, y, self.classes, f"linear, {name}")
            self.fitted[name] = classifier, classifier(x_test)
            yield "linear", name, self.fitted[name][1]

    def linear_augmented(self) -> Iterator[Outputs]:
        """A linear layer on frozen features of augmented images.

        The loss is convex, so the learning rate is one over a bound of its curvature: half the
        largest eigenvalue of the features' covariance. Features are standardised by a first pass
        of crops.
        """
        training, n = dataclasses.replace(ON_CROPS, **self.given), len(self.data.train)
        steps, size = training.steps(n), training.batch(n)
        for name in self.encoders:
            first = self.augmented_features(name, size, math.ceil(n / size), stream=0)
            x = torch.cat([h for h, _ in first])
            mean, std = utils.standardization(x)
            x = (x - mean) / std
            curvature = torch.linalg.matrix_norm(x.mT @ x / len(x), ord=2).item() / 2
            rate = 1 / max(curvature, 1e-6)
            inputs = self.augmented_features(name, size, steps, stream=1)
            batches = (((h - mean) / std, labels) for h, labels in inputs)
            layer = utils.zero_classifier(x.shape[1], self.classes).to(self.device)
            title = f"linear, augmented, {name}"
            utils.train_on_labels(layer, batches, steps, rate, training, "float32", title)
            logits = layer((self.features(name)[1] - mean) / std).detach()
            yield f"linear, augmented{self.note}", name, logits

    def augmented_features(
        self, name: str, size: int, steps: int, stream: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of frozen features of crops and flips, float32 (B, D), and labels, int64 (B,)."""
        data, augment = self.data.train, simclr.geometric_augment(self.config)
        batches = simclr.labelled_batches(
            data, torch.arange(len(data)), augment, size, steps, (self.config.seed, stream),
            self.device, self.config.workers,
        )  # fmt: skip
        for images, labels in batches:
            with torch.no_grad(), utils.autocast(self.device, self.config.precision):
                h = self.encoders[name](images).float()
            yield h, labels

    def semi(self) -> Iterator[Outputs]:
        """Fine-tuning with few labels: of the encoder, and of the untrained one (from scratch).

        Beside them logistic regression on raw pixels. The head is not used, as in the paper.
        Of label sets of equal size only the first is used.
        """
        x, x_test = utils.standardize(*self.features("pixels"))
        amounts: dict[int, str] = {}  # by the number of labelled images
        for amount in self.options.labels or LABELS:
            amounts.setdefault(len(self.label_rows(amount, 0)), amount)
        for n, amount in amounts.items():
            title, training = self.label_training(amount, n)
            for seed in range(self.options.seeds):
                rows = self.label_rows(amount, seed)
                labels = self.data.train.labels[rows]
                fitted = utils.LogisticRegression(x[rows], labels, self.classes)
                weight, bias = fitted.fit(1 / len(rows))
                yield title, "pixels", x_test @ weight + bias
                for name in ("untrained", "simclr"):
                    yield title, name, self.fine_tune(title, name, rows, training, seed)[1]

    def label_training(self, amount: str, n: int) -> tuple[str, LabelTraining]:
        """The title of a label set of n images, and how to train on it."""
        wanted = parse_amount(amount)
        share = wanted if isinstance(wanted, float) else n / len(self.data.train)
        text = f"{wanted} a class" if isinstance(wanted, int) else f"{100 * wanted:g} %"
        epochs = MANY_EPOCHS if share >= MANY_LABELS else FEW_EPOCHS
        training = dataclasses.replace(LabelTraining(epochs), **self.given)
        return f"fine-tuned, {text} ({n:,}){self.note}", training

    def fine_tune(
        self, title: str, name: str, rows: Tensor, training: LabelTraining, seed: int
    ) -> tuple[nn.Sequential, Tensor]:
        """Trains a copy of an encoder on the labels of `rows`. Returns it and its test logits.

        name: "simclr" or "untrained".
        """
        start, augment = self.encoders["simclr"], simclr.geometric_augment(self.config)
        if name == "untrained":
            start = self.source.untrained(self.config, seed).to(memory_format=torch.channels_last)
        title = f"{title}, {simclr.row_names(self.source.config)[name]}, seed {seed}"
        network = simclr.fine_tune(
            start, self.data.train, rows, augment, training, self.config, self.device, seed, title
        )
        logits = simclr.features(network, self.data.test, self.config, self.device)
        accuracy = utils.accuracy(logits.argmax(1), self.data.test.labels)
        print(f"{title}: test accuracy {percent([accuracy], len(logits))}", flush=True)
        return network, logits

    def label_rows(self, amount: str, seed: int) -> Tensor:
        """Which training images have a label, the same share or number of each class: int64 (M,).

        Raises InputError if a class has fewer images than are asked for.
        """
        wanted, labels = parse_amount(amount), self.data.train.labels
        key = utils.derive_seed(self.config.seed, simclr.LABELS, seed)
        chosen = []
        for order in utils.class_balanced_order(labels, key):
            count = wanted if isinstance(wanted, int) else max(1, round(wanted * len(order)))
            if count > len(order):
                name = self.data.train.classes[labels[order[0]]]
                raise InputError(
                    f"--labels {amount}: class {name!r} has only {len(order)} training images"
                )
            chosen.append(order[:count])
        return torch.cat(chosen)


def evaluate(evaluation: Evaluation, results: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Runs the tasks of the options. After each, adds columns and seconds to results and yields it.

    A column is a measurement: accuracies in [0, 1] ("scores") and the other class_measures(), by
    the keys of REPRESENTATIONS, one a seed. Columns are in the order of TASKS; a new one replaces
    an earlier one of the same title. Raises RuntimeError if a task changed the encoder.
    """
    source, truth = evaluation.source, evaluation.data.test.labels
    judged = nn.ModuleList(m for m in (source.encoder, source.projector) if m is not None)
    for task, (method, _) in TASKS.items():
        if method is None or task not in evaluation.options.tasks:
            continue
        started = time.perf_counter()
        columns: dict[str, dict[str, Any]] = {}  # by their titles
        with utils.frozen(judged):
            for title, name, outputs in method(evaluation):
                new = {"task": task, "title": title, "scores": {}, "measures": {}, "l2": {}}
                column = columns.setdefault(title, new)
                if task == "linear":
                    column["l2"][name] = evaluation.fitted[name][0].l2
                if outputs is not None:
                    measured = class_measures(outputs, truth)
                    column["scores"].setdefault(name, []).append(measured.pop("accuracy"))
                    for key, value in measured.items():
                        column["measures"].setdefault(name, {}).setdefault(key, []).append(value)
        kept = [c for c in results["columns"] if c["title"] not in columns and c["task"] in TASKS]
        kept += columns.values()
        results["columns"] = sorted(kept, key=lambda c: list(TASKS).index(c["task"]))
        results["seconds"][task] = round(time.perf_counter() - started, 2)
        yield results
        print(f"{task:20} {results['seconds'][task]:8.1f} s", flush=True)


def class_measures(outputs: Tensor, truth: Tensor) -> dict[str, float]:
    """Accuracy, and measures for classes of uneven size, over the classes in `truth`, in [0, 1].

    outputs: logits (M, K), or classes int64 (M,). truth: int64 (M,). Of two classes logits give the
    area under the ROC curve, too.
    """
    predicted = outputs.argmax(1) if outputs.ndim == 2 else outputs
    y, guess = truth.cpu().numpy(), predicted.cpu().numpy()
    over = dict(labels=np.unique(y), average="macro", zero_division=0)
    _, recall, f1, _ = metrics.precision_recall_fscore_support(y, guess, **over)
    values = {"mean_per_class": float(recall), "macro_f1": float(f1)}
    if outputs.ndim == outputs.shape[-1] == len(over["labels"]) == 2:
        scores = (outputs[:, 1] - outputs[:, 0]).cpu().numpy()
        values["auroc"] = float(metrics.roc_auc_score(y, scores))
    return {"accuracy": utils.accuracy(predicted, truth), **values}


# ----------------------------------------------------------------------------------------- results

MEASURES = {  # of class_measures(), in the order in which they are printed
    "mean_per_class": "Mean accuracy of the classes",
    "macro_f1": "Macro F1",
    "auroc": "Area under the ROC curve",
}
ONE_SEED = " (one seed: not certain)"


def table(columns: Sequence[dict], names: dict[str, str], images: int = utils.FEW_IMAGES) -> str:
    """The results as text: a line for each measurement, as in the figure.

    images: of the test split, for the sampling errors of accuracies; by default without them.
    """
    present = [key for key in names if any(key in column["scores"] for column in columns)]
    lines = [["", *(names[key] for key in present)]]
    for column in columns:
        scores = [percent(column["scores"].get(key), images) for key in present]
        lines.append([column["title"], *scores])
    widths = [max(map(len, cells)) + 3 for cells in zip(*lines, strict=True)]
    return "\n".join("".join(map(str.rjust, line, widths)) for line in lines)


def percent(scores: Sequence[float] | None, images: int = utils.FEW_IMAGES) -> str:
    """Numbers in [0, 1], one for each seed, as their mean ± error. images: as in table()."""
    return utils.accuracy_text(*mean_and_spread(scores, images)) if scores else "–"


def mean_and_spread(scores: Sequence[float], images: int) -> tuple[float, int, float]:
    """The arguments of utils.accuracy_error(): mean, images, standard deviation over the seeds."""
    return statistics.fmean(scores), images, statistics.stdev(scores) if len(scores) > 1 else 0.0


def text_of(results: dict, names: dict[str, str]) -> str:
    """What is printed: for uneven classes other measures, then accuracies, then comparisons."""
    columns, parts = results["columns"], []
    if results["uneven_classes"]:
        largest = percent([results["majority"]])
        parts += [f"Classes are uneven: the largest has {largest} of the test images.\n"]
        for key, title in MEASURES.items():
            measured = [
                {**c, "scores": {name: m[key] for name, m in c["measures"].items() if key in m}}
                for c in columns
            ]
            if any(c["scores"] for c in measured):
                parts += [f"{title}:\n{table(measured, names)}\n"]
        parts += ["Accuracy:"]
    images = results["test_images"]
    parts += [table(columns, names, images)]
    if images < utils.FEW_IMAGES:
        parts += [f"±: the sampling error of {images:,} images, and the spread over seeds if any"]
    for title, scores in ((column["title"], column["scores"]) for column in columns):
        if not scores:
            parts += [f"{title}: too few training images ({results['train_images']})"]
        if title.startswith("fine-tuned"):
            gain = statistics.fmean(scores["simclr"]) - statistics.fmean(scores["untrained"])
            begun = names["untrained"] != simclr.REPRESENTATIONS["untrained"]  # with --init
            other = "fine-tuning the weights before it" if begun else "training from scratch"
            by = f"{abs(100 * gain):.1f} points {'better' if gain > 0 else 'worse'} than"
            parts += [f"{title}: pre-training is {by if gain else 'as good as'} {other}"
                      f"{ONE_SEED * (len(scores['simclr']) == 1)}"]  # fmt: skip
    return "\n".join(parts)


def write_predictions(
    file: Path, images: Sequence[str], classes: Sequence[str], confidence: Tensor,
    **labels: Tensor,
) -> None:  # fmt: skip
    """A CSV file: image, labels int64 (M,) by the names of their classes, confidence in [0, 1]."""
    named = [[classes[i] for i in column.tolist()] for column in labels.values()]
    numbers = [f"{value:.6f}" for value in confidence.tolist()]
    columns = ["image", *labels, "confidence"]
    utils.write_csv(file, columns, zip(images, *named, numbers, strict=True))


# ------------------------------------------------------------------------------------------ figure

MARKERS = {"pixels": "s", "untrained": "^", "simclr": "o", "projection": "D"}
TILES = 12  # mistakes that are shown
MANY_CLASSES = 20  # from here a confusion matrix has no numbers and no names


def draw_evaluation(
    results: dict, names: dict[str, str], mistakes: Sequence[tuple[np.ndarray, str]] = ()
) -> Any:
    """The results as a matplotlib Figure: accuracies, confusion matrix, the worst mistakes.

    results: as in evaluation.json. mistakes: images uint8 (H, W, 3) and their titles.
    """
    heights = [1.4 + 0.42 * len(results["columns"]), *[4.6] * ("confusion" in results)]
    figure = Figure(figsize=(9.5, sum(heights)), layout="constrained")
    upper, *lower = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    draw_accuracies(upper.subplots(), results, names)
    if lower:
        left, *right = lower[0].subfigures(1, 1 + bool(mistakes), squeeze=False)[0]
        draw_confusion(left.subplots(), np.asarray(results["confusion"]), results["classes"])
    if mistakes:
        right[0].suptitle("Most confident mistakes", fontsize=10)
        axes = right[0].subplots(3, TILES // 3).flat
        for axis, tile in itertools.zip_longest(axes, mistakes):
            axis.axis("off")
            if tile is not None:
                axis.imshow(tile[0], interpolation="nearest")
                axis.set_title(tile[1], fontsize=7)
    return figure


def draw_accuracies(axis: Any, results: dict, names: dict[str, str]) -> None:
    """A line for each measurement, a mark for each representation, with its error if known."""
    columns = [column for column in results["columns"] if column["scores"]]
    images = results["test_images"]
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
    note = "(bars, if any: sampling error and spread over seeds)"
    axis.set_xlabel(f"accuracy on {images:,} test images, % {note}")
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
    data, (_, logits) = evaluation.data.test, evaluation.fitted["simclr"]
    confidence, predicted = logits.softmax(1).max(1)
    wrong = (predicted != data.labels).nonzero()[:, 0]
    order = confidence[wrong].argsort(descending=True, stable=True)
    tiles = []
    for index in wrong[order][:TILES].tolist():
        image = data.image(index)[None]
        view = utils.to_uint8(utils.center_view(image, evaluation.config.image_size))[0]
        names = (utils.printable(classes[int(x[index])], 12) for x in (data.labels, predicted))
        title = "\n→ ".join(names) + f", {100 * confidence[index]:.0f} %"
        tiles.append((view.permute(1, 2, 0).cpu().numpy(), title))
    return tiles


# ------------------------------------------------------------------------------------- classifiers

FINE_TUNED, LINEAR = "classifier.pt", "linear_classifier.pt"


def load_classifier(where: str | Path = "", device: torch.device | str = "cpu") -> nn.Sequential:
    """A classifier that --fine-tune or --classify has written, frozen and in eval mode.

    where: its file, or the folder or name of a run that has been fine-tuned. Returns a module,
    `encoder` and `linear`: float (B, 3, S, S) in [0, 1] -> logits (B, K). Its `classes` are the
    names of the logits, `image_size` is the side in px that it was trained for, `facts` is what
    its file holds. Raises InputError if there is none, or it is damaged or of another version.
    """
    file = utils.find_checkpoint(str(where))
    if file.name == utils.CHECKPOINT:
        file = file.with_name(FINE_TUNED)
    source = load_source(file)
    facts = source.classifier
    if facts is None:
        raise InputError(f"{file} is no classifier; --fine-tune makes one of a run")
    with utils.errors_as_input_error(f"{file} is no classifier"):
        linear = nn.Linear(source.resnet.feature_dim, len(facts["classes"]))
        utils.load_weights(linear, facts["linear"], str(file))
        classifier = nn.Sequential(OrderedDict(encoder=source.encoder, linear=linear))
        classifier.classes, classifier.image_size = tuple(facts["classes"]), facts["image_size"]
    classifier.facts = facts
    classifier.register_forward_pre_hook(check_first_images)
    return classifier.eval().requires_grad_(False).to(device)


def network_of(source: Source) -> dict[str, Any]:
    """Shape and stem of its ResNet, by the names of utils.ForeignEncoder."""
    padding, relu = source.resnet.conv1.padding[0], source.resnet.relu
    return {**source.shape, "padding": padding, "stem_relu": isinstance(relu, nn.ReLU)}


def save_classifier(
    file: Path, evaluation: Evaluation, encoder: nn.Module, linear: nn.Linear, predicted: Tensor,
    origin: str,
) -> None:  # fmt: skip
    """Writes the source's encoder, or a copy that was trained further, and a linear layer on it.

    predicted: classes of the test images, int64 (M,). origin: what was trained on what.
    """
    source, data, config = evaluation.source, evaluation.data, evaluation.config
    state = {
        utils.CLASSIFIER_KEY: utils.CLASSIFIER_FORMAT,
        "network": {**network_of(source), "normalize": source.normalize, "origin": origin},
        "classes": list(data.train.classes), "image_size": config.image_size,
        "range": list(config.range), "accuracy": utils.accuracy(predicted, data.test.labels),
        "test_images": len(data.test), "checkpoint_sha256": utils.file_digest(source.file),
        "encoder": utils.without_normalization(encoder).state_dict(),
        "linear": linear.state_dict(),
    }  # fmt: skip
    utils.save_checkpoint(file, state)


def save_linear_classifier(evaluation: Evaluation) -> None:
    """Keeps the classifier that evaluation.linear() has fitted."""
    source, (linear, logits) = evaluation.source, evaluation.fitted["simclr"]
    file = source.output(LINEAR, evaluation.options.figures)
    origin = f"linear classifier on {len(evaluation.data.train):,} labelled images"
    save_classifier(file, evaluation, source.encoder, linear, logits.argmax(1), origin)


def fine_tune_classifier(source: Source, options: Options, device: torch.device) -> None:
    """--fine-tune: trains encoder and linear layer on labelled images once, and keeps them."""
    evaluation = Evaluation(source, options, device)
    (amount,) = options.labels or ("100%",)
    rows, n = evaluation.label_rows(amount, seed=0), len(evaluation.data.train)
    file = Path(options.out or source.output(FINE_TUNED, options.figures))
    check_targets(file)
    print(f"{source.file}: {source.description}")
    title, training = evaluation.label_training(amount, len(rows))
    print(f"fine-tuning on {len(rows):,} of {n:,} labelled images, "
          f"{training.steps(len(rows)):,} steps", flush=True)  # fmt: skip
    network, logits = evaluation.fine_tune(title, "simclr", rows, training, seed=0)
    origin = f"fine-tuned on {len(rows):,} labelled images"
    save_classifier(file, evaluation, *network, logits.argmax(1), origin)
    per_class = class_measures(logits, evaluation.data.test.labels)["mean_per_class"]
    print(f"mean accuracy of the classes {percent([per_class])}\nclassifier    {file}")


def find_classifier(source: Source, options: Options, device: torch.device) -> nn.Sequential:
    """The source if it is a classifier, the fine-tuned one beside it, or one fitted now to h."""
    if source.classifier:
        return load_classifier(source.file)
    file = source.output(FINE_TUNED, options.figures)
    if file.is_file():
        classifier = load_classifier(file)
        if classifier.facts["checkpoint_sha256"] == utils.file_digest(source.file):
            return classifier
        utils.log_warning(f"warning: {file} is of an earlier checkpoint, and is not used")
    evaluation = Evaluation(source, options, device)
    evaluation.encoders = {"simclr": source.encoder}
    with utils.frozen(source.encoder):
        list(evaluation.linear())  # fits the classifier of h
    utils.broadcast_from_rank0(save_linear_classifier, evaluation)  # all ranks read its file
    return load_classifier(source.output(LINEAR, options.figures))


# -------------------------------------------------------------------------------------- new images

EMBED_BATCH = 128  # images of up to 224 px in float32: 77 MB


def use_on_new_images(source: Source, options: Options, device: torch.device) -> None:
    """--embed and --classify: writes the .npz and the .csv."""
    check_targets(options.out)
    if options.embed:
        facts = dataclasses.asdict(source.config) if source.config else source.classifier or {}
        where = Path(options.embed)
        paths, h = embed_images(source.encoder, where, facts, source, options, device)
        out = Path(options.out or source.output("features.npz", options.figures))
        buffer = io.BytesIO()
        np.savez(buffer, paths=np.array(paths), h=h.cpu().numpy())
        utils.write_atomically(out, buffer.getbuffer())
        print(f"{len(paths):,} images, h of {h.shape[1]} dimensions each: {out}")
    if options.classify:
        classifier, where = find_classifier(source, options, device), Path(options.classify)
        facts, classes = classifier.facts, classifier.classes
        accuracy = percent([facts["accuracy"]], facts["test_images"])
        print(f"classifier: {facts['network']['origin']}, {len(classes)} classes, right for "
              f"{accuracy} of {facts['test_images']:,} test images")  # fmt: skip
        paths, logits = embed_images(classifier, where, facts, source, options, device)
        confidence, predicted = logits.softmax(1).max(1)
        name = "classified.csv"
        if not where.is_dir():
            name = f"classified-{where.stem}.csv"
            print(f"{where.name}: {classes[int(predicted)]} ({confidence.item():.0%})")
        out = Path(options.out or source.output(name, options.figures))
        write_predictions(out, paths, classes, confidence, predicted=predicted)
        print(f"images classified: {len(paths):,}, in {out}")


def embed_images(
    network: nn.Module, where: Path, facts: dict[str, Any], source: Source, options: Options,
    device: torch.device,
) -> tuple[list[str], Tensor]:  # fmt: skip
    """A network's outputs for one image, or for all images below a folder that can be read.

    facts: `image_size` and `range` of its training, if they are known. Returns the paths relative
    to the folder and float32 (N, D) in their order. Raises InputError if no image can be read.
    """
    default = IMAGENET_STEM_SIZE if source.resnet.conv1.stride[0] == 1 else simclr.STREAMED_SIZE
    size = options.image_size or facts.get("image_size") or default
    check_size(source, size)
    grey_range = options.range or tuple(facts.get("range", ()))
    images = utils.load_unlabelled(where, 1.0, grey_range)
    network = network.to(device, memory_format=torch.channels_last)
    h = utils.embed(
        network, images, size, device, source.precision(device, options.precision), EMBED_BATCH,
        options.workers, str(where),
    )  # fmt: skip
    read = ~h.isnan().any(1)
    return list(itertools.compress(utils.image_names(images), read.tolist())), h[read]


# ------------------------------------------------------------------------ detection: images, boxes

MAKE_SCENES, HEADS, SAMPLES = range(4, 7)  # streams of randomness, as those of simclr.py
RELATIVE = [1, 1]  # width and height of an image, in the units of YOLO's boxes
# What a file of annotations says of each image, by its number: its path, its width and height in px
# (None or 0 if unknown) or RELATIVE, and its objects: class, left, top, right, bottom, ignored.
# Then the names of the classes.
Annotations = tuple[dict[int, tuple[Path, list, list[tuple]]], dict[Any, str]]


@dataclass
class Boxes:
    """Images and the objects in them; each list has an item for each image.

    targets: as in torchvision's references `boxes`, float32 (K, 4), left, top, right and bottom
    edge in pixels of the image as displayed; `labels`, int64 (K,), from 1 on, as 0 is the
    background; `iscrowd`, int64 (K,), 1 for COCO's crowds and VOC's difficult objects: not trained
    on, and a detection of one is neither a hit nor a miss. image_ids, class_ids: for files in
    COCO's formats. dropped: how many boxes were left out, by the reason.
    """

    images: Images
    targets: list[dict[str, Tensor]]
    image_ids: list[int]
    classes: tuple[str, ...]
    class_ids: tuple[int, ...]
    dropped: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.targets)

    def subset(self, rows: Tensor) -> Boxes:
        """The images at `rows`, int64 (M,)."""
        images = utils.subset(self.images, rows)
        targets, ids = ([x[i] for i in rows.tolist()] for x in (self.targets, self.image_ids))
        return dataclasses.replace(self, images=images, targets=targets, image_ids=ids)


def find_coco(root: Path) -> dict[str, Path]:
    """The JSON file of each split; beside it or named after it lies the folder of the images."""
    named = {f.stem[len("instances_") :]: f for f in root.glob("annotations/instances_*.json")}
    beside = {f.parent.name: f for f in root.glob("*/_annotations.coco.json")}
    plain = {f.stem: f for f in root.glob("*.json") if f.stem in ("train", "val", "test")}
    return named or beside or plain


def read_coco(root: Path, split: str, file: Path) -> Annotations:
    """The images in order of their ids, and the names of classes by their ids."""
    content = json.loads(file.read_bytes())
    images = sorted(content["images"], key=lambda image: image["id"])
    name = images[0]["file_name"]
    places = (root / split, root / "images" / split, root / "images", root)
    folder = next((place for place in places if (place / name).is_file()), places[0])
    items = {
        x["id"]: (folder / x["file_name"], [x.get("width"), x.get("height")], []) for x in images
    }
    for thing in content["annotations"]:
        if (key := thing["image_id"]) not in items:
            raise ValueError(f"a box has image_id {key}, which is not among the images")
        x, y, width, height = map(float, thing["bbox"])
        crowd = bool(thing.get("iscrowd"))
        items[key][2].append((thing["category_id"], x, y, x + width, y + height, crowd))
    return items, {c["id"]: str(c["name"]) for c in content["categories"]}


def find_voc(root: Path) -> dict[str, list[Path]]:
    """The XML files of each split. The test images of some years have none, and are no split."""
    for base in (root, *sorted(root.glob("VOC*")), *sorted(root.glob("VOCdevkit/VOC*"))):
        splits = {}
        for name in ("train", "trainval", "val", "test"):
            if (file := base / f"ImageSets/Main/{name}.txt").is_file():
                stems = [line.split()[0] for line in file.read_text().splitlines() if line.strip()]
                splits[name] = [base / "Annotations" / f"{stem}.xml" for stem in stems]
        splits = {name: files for name, files in splits.items() if files and files[0].is_file()}
        if files := sorted(base.glob("Annotations/*.xml")):
            return splits or {"all": files}
    return {}


def read_voc(root: Path, split: str, files: list[Path]) -> Annotations:
    """Corners are pixels counted from 1, and inside the box."""
    items = {}
    for i, file in enumerate(files, 1):
        with utils.errors_as_input_error(f"cannot read {file}"):
            tree = ElementTree.parse(file).getroot()
            size = [int(float(tree.findtext(f"size/{k}") or 0)) for k in ("width", "height")]
            name = tree.findtext("filename") or f"{file.stem}.jpg"
            items[i] = (file.parents[1] / "JPEGImages" / name, size, [])
            for thing in tree.findall("object"):
                edges = (thing.findtext(f"bndbox/{k}") for k in ("xmin", "ymin", "xmax", "ymax"))
                left, top, right, bottom = map(float, edges)
                difficult = (thing.findtext("difficult") or "").strip() == "1"
                kind = thing.findtext("name").strip()
                items[i][2].append((kind, left - 1, top - 1, right, bottom, difficult))
    return items, {thing[0]: thing[0] for *_, objects in items.values() for thing in objects}


def find_yolo(root: Path) -> dict[str, tuple[Path, Path]]:
    """The folders of labels and of images of each split."""
    inside = {f.name: (f, root / "images" / f.name) for f in root.glob("labels/*") if f.is_dir()}
    beside = {f.parent.name: (f, f.with_name("images")) for f in root.glob("*/labels")}
    whole = {"all": (root / "labels", root / "images")} if (root / "labels").is_dir() else {}
    return inside or beside or whole


def read_yolo(root: Path, split: str, folders: tuple[Path, Path]) -> Annotations:
    """A text file for each image: class, centre, width and height, as shares of the sides."""
    items = {}
    for i, name in enumerate(utils.list_images(folders[1]), 1):
        items[i] = (folders[1] / name, RELATIVE, [])
        file = (folders[0] / name).with_suffix(".txt")
        with utils.errors_as_input_error(f"cannot read {file}"):
            text = file.read_text() if file.is_file() else ""
            for kind, *numbers in (line.split() for line in text.splitlines() if line.strip()):
                x, y, width, height = map(float, numbers)
                if not max(x, y, width, height) <= 1.01:  # some programs round up
                    raise ValueError(f"a box is not in shares of the image's sides: {numbers}")
                edges = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
                items[i][2].append((int(kind), *edges, False))
    return items, yolo_classes(root)


def yolo_classes(root: Path) -> dict[int, str]:
    """The names in data.yaml, as a list or with their numbers, or else in classes.txt."""
    for file in sorted(root.glob("*.y*ml")):
        text = re.sub(r"(^|\s)#.*", "", file.read_text(encoding="utf-8"))
        pattern = r"^names:\s*(?:[\[{]([^\]}]*)[\]}]|((?:^\s*(?:-|\d+\s*:).*\n?)+))"
        if names := re.search(pattern, text, re.MULTILINE):
            items = [x for x in re.split(r"[,\n]", names[1] or names[2]) if x.strip()]
            parts = [re.fullmatch(r"\s*(?:-|(\d+)\s*:)?\s*(.*?)\s*", item) for item in items]
            return {int(p[1] or i): p[2].strip("\"'") for i, p in enumerate(parts)}
    if (file := root / "classes.txt").is_file():
        return dict(enumerate(file.read_text(encoding="utf-8").splitlines()))
    raise InputError(f"{root} has no data.yaml with `names:`, and no classes.txt")


FORMATS: dict[str, tuple[Callable, Callable, str]] = {
    "COCO": (find_coco, read_coco, "annotations/instances_train*.json and train*/, or "
             "train/_annotations.coco.json, or train.json beside the images"),
    "Pascal VOC": (find_voc, read_voc, "Annotations/*.xml and JPEGImages/"),
    "YOLO": (find_yolo, read_yolo, "labels/train/ and images/train/, or train/labels/ and "
             "train/images/"),
}  # fmt: skip


def read_boxes(root: Path) -> tuple[Boxes, Boxes, str]:
    """Training images, test images, and a text that describes them. Raises InputError.

    The test split is "test", or else "val"; without one a fifth of the images is held out.
    """
    with utils.errors_as_input_error(f"cannot read the boxes of {root}"):
        known = {name: splits for name, (find, *_) in FORMATS.items() if (splits := find(root))}
        if not known:
            layouts = "; ".join(f"{name}: {layout}" for name, (*_, layout) in FORMATS.items())
            raise InputError(f"{root} has no boxes in a known layout ({layouts})")
        name, splits = next(iter(known.items()))
        test = [s for kind in ("test", "val") for s in sorted(splits) if s.startswith(kind)][:1]
        rest = [s for s in sorted(splits) if s not in test]
        train = [s for s in rest if s.startswith("train")] or rest
        final = test and test[0].startswith("test")  # then trainval may be trained on
        names = [train[-1 if final else 0], *test] if train else test
        parts = [FORMATS[name][1](root, split, splits[split]) for split in names]
        classes = {key: text for _, texts in parts for key, text in texts.items()}
        if any(classes[key] != text for key, text in parts[0][1].items()):
            raise InputError(f"{root}: {' and '.join(names)} number the classes differently")
        paths = [path for items, _ in parts for path, *_ in items.values()]
        if len({*paths}) < len(paths):
            raise InputError(f"{root}: an image is listed twice in {' and '.join(names)}")
        boxes = [assemble(root, items, classes) for items, _ in parts]
    if len(boxes) == 1:  # the same fifth in every comparison
        order = torch.randperm(len(boxes[0]), generator=torch.Generator().manual_seed(0))
        fifth, most = (boxes[0].subset(x.sort()[0]) for x in order.tensor_split([len(order) // 5]))
        boxes = [most, dataclasses.replace(fifth, dropped={})]
        names += ["a fifth of it, held out"]
    if not all(any(len(t["labels"]) for t in part.targets) for part in boxes):
        raise InputError(f"{root}: no boxes to train on, or none to test by")
    return *boxes, f"{root} ({name}: {names[0]} to train, {names[1]} to test)"


def assemble(root: Path, items: dict[int, tuple], classes: dict) -> Boxes:
    """Boxes in pixels of the images as displayed, and within them.

    items, classes: see Annotations. The size that is stated may be the file's before the quarter
    turn that EXIF asks for; then the boxes turn. Raises InputError that names an image and its
    fault.
    """
    keys, targets = sorted(classes), []
    dropped = {"under a pixel": 0, "outside the image": 0}
    for path, stated, objects in items.values():
        for key in {thing[0] for thing in objects} - set(keys):
            raise InputError(f"{path}: a box has class {shown(key)}, which has no name")
        with utils.Photo(path) as photo:
            width, height, turn = photo.width, photo.height, photo.orientation
        size = [width, height]
        edges = torch.tensor([thing[1:5] for thing in objects], dtype=torch.float64).view(-1, 4)
        if stated is RELATIVE:
            edges *= torch.tensor(size * 2)
        elif turn >= 5 and width != height and stated == size[::-1]:
            left, top, right, bottom = edges.unbind(1)
            if turn in (7, 8):
                left, right = height - right, height - left
            if turn in (6, 7):
                top, bottom = width - bottom, width - top
            edges = torch.stack([top, left, bottom, right], 1)
        elif all(stated) and stated != size:
            text = " × ".join(map(shown, stated))
            raise InputError(f"{path}: {width} × {height} px, but its annotation says {text}")
        if not edges.isfinite().all():
            raise InputError(f"{path}: a box has an edge that is not finite")
        inside = edges.clamp(min=0).minimum(torch.tensor(size * 2))
        tiny, cut = ((b[:, 2:] - b[:, :2] < 1).any(1) for b in (edges, inside))
        dropped["under a pixel"] += int(tiny.sum())
        dropped["outside the image"] += int((cut & ~tiny).sum())
        labels = torch.tensor([1 + keys.index(thing[0]) for thing in objects]).long()
        crowds = torch.tensor([thing[5] for thing in objects]).long()
        target = {"boxes": inside.float(), "labels": labels, "iscrowd": crowds}
        targets.append({name: x[~cut] for name, x in target.items()})  # the tiny ones are cut, too
    paths = np.array([os.fsencode(os.path.relpath(path, root)) for path, *_ in items.values()])
    names = tuple(classes[key] for key in keys)
    class_ids = tuple(k if isinstance(k, int) else i for i, k in enumerate(keys, 1))
    files = Images(None, paths=paths, root=root)
    return Boxes(files, targets, [*items], names, class_ids, dropped)


TRAIN_SCENES, TEST_SCENES = 1000, 200
CANVAS = 64  # px, the side of a scene
DIGITS, DIGIT_SIZE = (1, 4), (12, 28)  # in a scene; px, with their margins
FRAGMENTS, FRAGMENT_SIZE = 8, (3, 6)  # of digits, in a scene; px
INK = 40  # from this grey on; digits are white on black
PLACE_TRIES = 20  # places, before a digit is left out


def digit_scenes(split: str, count: int, seed: int) -> Boxes:
    """Scenes of scikit-learn's digits and fragments of digits; none overlap, boxes fit the ink."""
    (digits,) = utils.load_splits("digits", [split])
    random = np.random.default_rng(utils.derive_seed(seed, MAKE_SCENES, split == "test"))
    scenes, targets = np.zeros((count, CANVAS, CANVAS), np.uint8), []
    for scene in scenes:
        free, placed = np.ones_like(scene, bool), []
        wanted = random.integers(*DIGITS, endpoint=True)
        for part in range(wanted + FRAGMENTS):
            row, side = random.integers(len(digits)), random.integers(*DIGIT_SIZE, endpoint=True)
            piece = TF.resize(digits.image(row)[:1], [side, side])[0].numpy()
            if part < wanted:
                rows, columns = ((piece >= INK).any(axis).nonzero()[0] for axis in (1, 0))
                piece = piece[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            else:
                height, width = random.integers(*FRAGMENT_SIZE, 2, endpoint=True)
                top, left = random.integers((side - height, side - width), endpoint=True)
                piece = piece[top : top + height, left : left + width]
            height, width = piece.shape
            for _ in range(PLACE_TRIES):
                top, left = random.integers((CANVAS - height, CANVAS - width), endpoint=True)
                place = np.s_[top : top + height, left : left + width]
                if free[place].all():
                    scene[place], free[place] = piece, False
                    if part < wanted:
                        label = 1 + int(digits.labels[row])
                        placed.append((left, top, left + width, top + height, label))
                    break
        *edges, labels = torch.tensor(placed).T
        boxes, crowds = torch.stack(edges, 1).float(), torch.zeros_like(labels)
        targets.append({"boxes": boxes, "labels": labels, "iscrowd": crowds})
    images = Images(torch.from_numpy(scenes)[:, None].repeat(1, 3, 1, 1))
    ids, class_ids = list(range(1, count + 1)), tuple(range(1, 11))
    return Boxes(images, targets, ids, digits.classes, class_ids)


# ------------------------------------------------------------------- detection: average precision

IOUS = np.linspace(0.5, 0.95, 10)  # intersection over union from which a detection is a hit
RECALLS = np.linspace(0, 1, 101)
MOST_DETECTIONS = 100  # of a class in an image: the most confident ones


def precisions(truth: Boxes, found: Sequence[dict[str, Tensor]]) -> np.ndarray:
    """Precision for each IoU, class and recall by COCO's rules: float64 (10, C, 101).

    found: for each image `boxes` (D, 4), `labels` (D,) and `scores` (D,), as torchvision's
    detectors give them. Means are average precisions (AP). NaN for a class without objects.
    """
    result = np.full((len(IOUS), len(truth.classes), len(RECALLS)), np.nan)
    for label in range(1, len(truth.classes) + 1):
        scores, verdicts, objects = [], [], 0
        for target, image in zip(truth.targets, found, strict=True):
            own, theirs = target["labels"] == label, image["labels"] == label
            confidence = image["scores"][theirs].double().numpy()
            order = np.argsort(-confidence, kind="stable")[:MOST_DETECTIONS]
            boxes = (image["boxes"][theirs][order], target["boxes"][own])
            ignored = target["iscrowd"][own].bool().numpy()
            verdicts.append(match(*(x.double().numpy() for x in boxes), ignored))
            scores.append(confidence[order])
            objects += int((~ignored).sum())
        if objects:
            order = np.argsort(-np.concatenate(scores), kind="stable")
            verdict = np.concatenate(verdicts, axis=1)[:, order]  # (10, D)
            hits, misses = (verdict == 1).cumsum(1), (verdict == 0).cumsum(1)
            precision = hits / np.maximum(hits + misses, 1)
            precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
            for t, (row, recall) in enumerate(zip(precision, hits / objects, strict=True)):
                result[t, label - 1] = np.append(row, 0)[np.searchsorted(recall, RECALLS)]
    return result


def match(boxes: np.ndarray, truth: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    """What each detection is at each IoU: 1 a hit, 0 a miss, -1 neither; int (10, D).

    boxes: (D, 4) of one class in one image, most confident first. truth: (G, 4). ignored: (G,).
    A detection takes the free object that it overlaps most, or else an ignored one, which stays
    free and whose overlap is the share of the detection that lies inside.
    """
    verdicts = np.zeros((len(IOUS), len(boxes)), int)
    if not len(truth):
        return verdicts
    upper = np.maximum(boxes[:, None, :2], truth[:, :2])
    lower = np.minimum(boxes[:, None, 2:], truth[:, 2:])
    shared = (lower - upper).clip(min=0).prod(2)  # (D, G)
    area, own = ((b[:, 2:] - b[:, :2]).prod(1) for b in (boxes, truth))
    overlap = shared / np.where(ignored, area[:, None], area[:, None] + own - shared)
    free, every = np.ones((len(IOUS), len(truth)), bool), np.arange(len(IOUS))
    for d, row in enumerate(overlap):
        fits = free & (row >= IOUS[:, None])
        value = np.where(fits, row + 2 * ~ignored, -1)  # (10, G)
        best = len(truth) - 1 - value[:, ::-1].argmax(1)  # of equal ones the last, as COCO
        verdicts[:, d] = fits.any(1) * np.where(ignored[best], -1, 1)
        taken = verdicts[:, d] == 1
        free[every[taken], best[taken]] = False
    return verdicts


def summary(precision: np.ndarray) -> dict[str, float]:
    """AP, AP50 and AP75 of precisions(), in [0, 1], over the classes that have objects."""
    of_ious = precision[:, ~np.isnan(precision[0, :, 0])].mean((1, 2))
    return {"AP": of_ious.mean(), "AP50": of_ious[0], "AP75": of_ious[5]}


# ----------------------------------------------------------------------- detection: the detectors

DETECTION_LABELS = ("50", "200", "1000")
FEWEST = 5  # labelled images: a fifth of the largest set is held out to choose the learning rate
RATES = (1e-3, 3e-3)  # of AdamW, to choose from
LONGER = 3  # times the steps, in a further row
MOST_TRAINERS = 4  # processes that train detectors of small images
DETECTION_BATCH, WARM_SHARE = 8, 0.1  # images a step; share of the steps in which the rate rises
SCALES = (0.75, 0.875, 1)  # one is drawn for an image in training; the last is for testing
LONGEST = 5 / 3  # the longer side of an image, by the shorter; longer images are made smaller


class DetectorSizes(NamedTuple):
    """Settings of a Faster R-CNN that depend on the size of its images; torchvision's defaults."""

    stages: tuple[int, ...]  # of the ResNet, whose outputs enter the feature pyramid
    side: int  # px, the shorter side of an image by default
    anchors: tuple[float, ...]  # shares of that side, as many for each level as for the pooled one
    epochs: int  # passes over the labelled images
    steps: int  # at least
    channels: int = 256
    roi: int = 7  # values a side that RoIAlign computes for an object
    points: int = 2  # sampling points a side for each of these values
    head: int = 1024
    options: Mapping[str, Any] = {}  # other arguments of FasterRCNN


SMALL = dict(roi=5, points=1, head=256, options=dict(
    rpn_batch_size_per_image=64, box_batch_size_per_image=32,
    rpn_pre_nms_top_n_train=200, rpn_post_nms_top_n_train=100,
    rpn_pre_nms_top_n_test=200, rpn_post_nms_top_n_test=100,
    box_positive_fraction=0.5,  # few steps need many objects among the samples
))  # fmt: skip
DETECTORS = {
    "digits": DetectorSizes((3,), CANVAS, (0.19, 0.3, 0.45, 0.62), 0, 170, 128, **SMALL),
    "small": DetectorSizes((2, 3, 4), 128, (0.1, 0.2, 0.4, 0.7), 12, 500, 64, **SMALL),
    "imagenet": DetectorSizes((1, 2, 3, 4), 448, (0.04, 0.08, 0.16, 0.32, 0.64), 12, 500,
                              options={"box_batch_size_per_image": 128}),  # the images are few
}  # fmt: skip


class Levels(BackboneWithFPN):
    """A feature pyramid on a ResNet. Only the ResNet may run in bfloat16: roi_align cannot."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        with utils.autocast(x.device, self.precision):
            levels = self.body(x.contiguous(memory_format=torch.channels_last))  # faster on a CPU
        return self.fpn({name: level.float() for name, level in levels.items()})


def make_detector(
    resnet: simclr.Encoder, kind: str, normalize: str, classes: Sequence[str], side: int,
    precision: str, seed: int = 0,
) -> FasterRCNN:  # fmt: skip
    """A Faster R-CNN on the stages of `resnet`, all trainable, for images in [0, 1].

    kind: of DETECTORS. side: px, to which the shorter side is resized; in training times one of
    SCALES. The weights beside the ResNet's follow from the seed alone.
    """
    sizes = DETECTORS[kind]
    mean, std = map(list, MEANS.get(normalize, ([0.0] * 3, [1.0] * 3)))
    stages = {f"layer{stage}": str(i) for i, stage in enumerate(sizes.stages)}
    blocks = [getattr(resnet, name)[-1] for name in stages]
    channels = [getattr(block, "bn3", block.bn2).num_features for block in blocks]
    anchors = (side * torch.tensor(sizes.anchors)).round().view(len(stages) + 1, -1).tolist()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(utils.derive_seed(seed, HEADS))
        levels = Levels(resnet, stages, channels, sizes.channels, norm_layer=nn.BatchNorm2d)
        levels.precision = precision
        detector = FasterRCNN(
            levels, min_size=[round(x * side) for x in SCALES], max_size=round(side * LONGEST),
            rpn_anchor_generator=AnchorGenerator(anchors, ((0.5, 1.0, 2.0),) * len(anchors)),
            box_roi_pool=MultiScaleRoIAlign(list(stages.values()), sizes.roi, sizes.points),
            box_head=TwoMLPHead(sizes.channels * sizes.roi**2, sizes.head),
            box_predictor=FastRCNNPredictor(sizes.head, len(classes) + 1),
            image_mean=mean, image_std=std, **sizes.options,
        )  # fmt: skip
    detector.classes = tuple(classes)
    return detector.requires_grad_(True)


def load_detector(file: str | Path, device: torch.device | str = "cpu") -> FasterRCNN:
    """The detector that --tasks detection has written: torchvision's FasterRCNN, in eval mode.

    It takes a list of images, float (3, H, W) in [0, 1], and returns for each a dict of `boxes`
    (D, 4) in pixels, `scores` (D,) and `labels` (D,), of which 1 is `detector.classes[0]`. Raises
    InputError if the file is missing, damaged or something else.
    """
    state = utils.load_checkpoint(Path(file))
    if "detector" not in state:
        raise InputError(f"{file} is no detector; --tasks detection makes one")
    made = utils.ForeignEncoder({}, **state["encoder"])
    resnet = made.adapt(simclr.Encoder(made.arch, made.width, made.stem))
    detector = make_detector(resnet, **state["detector"])
    utils.load_weights(detector, state["model"], str(file))
    return detector.eval().to(device)


class Detection:
    """A comparison of detectors: what they begin with, learn from, and are measured on.

    Raises InputError if there are no boxes, or the options do not suit them.
    """

    def __init__(self, source: Source, options: Options, device: torch.device) -> None:
        self.source, self.options, self.device = source, options, device
        dataset = options.dataset or ("folder" if options.data_dir else "")
        config = source.config_for(dataset, options.data_dir, options.image_size, options.range)
        self.config, self.seed = config, config.seed
        self.precision = source.precision(device, options.precision)
        self.kind = "small" if source.resnet.conv1.stride[0] == 1 else "imagenet"  # of DETECTORS
        side = DETECTORS[self.kind].side
        if config.dataset == "digits":
            self.train = digit_scenes("train", TRAIN_SCENES, config.seed)
            self.test = digit_scenes("test", TEST_SCENES, config.seed)
            self.where, side = "scenes of digits", CANVAS  # what the images are, for people
            self.kind = "digits" if self.kind == "small" else self.kind
        elif config.dataset == "folder":
            self.train, self.test, self.where = read_boxes(Path(config.data_dir))
            files = self.train.images
            grey_range = utils.choose_range(files.root, utils.image_names(files), config.range)
            self.train.images.grey_range = self.test.images.grey_range = grey_range
        else:
            raise InputError(f"{config.dataset} has no boxes: give --data-dir, a folder that has")
        if len(self.train) < FEWEST:
            raise InputError(f"{self.where}: give at least {FEWEST} training images")
        self.side = options.image_size or side  # px
        self.amounts = sorted({*map(self.amount, options.labels or DETECTION_LABELS)})  # of images
        title = "SimCLR" if source.config else "pre-trained"
        self.titles = {"scratch": "from scratch", "simclr": title}  # of the rows of the table
        if options.freeze:
            self.titles["frozen"] = f"{title}, frozen"
        self.others: dict[str, Source] = {}
        for name in options.against:
            other = load_source(utils.find_checkpoint(name, options.checkpoints))
            if other.shape != source.shape:
                raise InputError(f"--against {name}: another architecture ({other.description})")
            self.titles[name], self.others[name] = other.name, other
        self.titles["longer"] = f"from scratch, {LONGER} × the steps"

    def amount(self, text: str) -> int:
        """How many labelled images an entry of --labels or DETECTION_LABELS stands for."""
        wanted, most = parse_amount(text), len(self.train)
        amount = wanted if isinstance(wanted, int) else max(1, round(wanted * most))
        if self.options.labels and not FEWEST <= amount <= most:
            raise InputError(f"--labels {text}: give {FEWEST} to {most:,} training images")
        return min(amount, most)

    def labelled(self, amount: int, seed: int) -> Boxes:
        """The images that the detectors of one seed learn from."""
        random = utils.generator("cpu", self.seed, simclr.LABELS, seed)
        return self.train.subset(torch.randperm(len(self.train), generator=random)[:amount])

    def fit(self, name: str, data: Boxes, rate: float, steps: int, seed: int) -> FasterRCNN:
        """Trains a detector by AdamW.

        The initial heads, the order of the images and torchvision's sampling of boxes depend only
        on the seed, not on the encoder.
        """
        source = self.others.get(name, self.source)
        resnet = copy.deepcopy(source.resnet)
        if name in ("scratch", "longer"):
            resnet = utils.without_normalization(source.untrained(self.config, seed))
        detector = make_detector(
            resnet, self.kind, source.normalize, data.classes, self.side, self.precision,
            utils.derive_seed(self.seed, seed),
        ).to(self.device).train()  # fmt: skip
        if name == "frozen":
            detector.backbone.body.requires_grad_(False).eval()
        optimizer = torch.optim.AdamW(detector.parameters(), fused=True)
        key, passes = (self.seed, SAMPLES, seed), math.ceil(steps * DETECTION_BATCH / len(data))
        random = utils.generator("cpu", *key)
        orders = torch.cat([torch.randperm(len(data), generator=random) for _ in range(passes)])
        title = f"{self.titles[name]}, {len(data)} images, seed {seed}"
        batches = utils.progress_bar(orders.split(DETECTION_BATCH)[:steps], title, steps)
        with utils.fork_rng(self.device):
            for step, rows in enumerate(batches):
                warm = min(1, (step + 1) / (WARM_SHARE * steps))
                simclr.set_rate(optimizer, rate * warm * (1 + math.cos(math.pi * step / steps)) / 2)
                torch.manual_seed(utils.derive_seed(*key, step))
                mirrored = (torch.rand(len(rows)) < 0.5) & (self.kind != "digits")
                pairs = zip(rows.tolist(), mirrored.tolist(), strict=True)
                images, targets = zip(*(self.example(data, *pair) for pair in pairs), strict=True)
                sum(detector(images, targets).values()).backward()
                optimizer.step()
                optimizer.zero_grad()
        return detector.eval()

    def example(self, data: Boxes, row: int, mirrored: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """An image in [0, 1], float32 (3, H, W), with its boxes and labels."""
        image, target = data.images.image(row).float() / 255, data.targets[row]
        target = {key: x[target["iscrowd"] == 0] for key, x in target.items()}
        if mirrored:
            boxes = target["boxes"]
            image, boxes[:, [0, 2]] = image.flip(2), image.shape[2] - boxes[:, [2, 0]]
        return image.to(self.device), {key: x.to(self.device) for key, x in target.items()}

    def measure(
        self, name: str, n: int, seed: int, rate: float, held_out: bool = False
    ) -> tuple[dict[str, Any], list[dict[str, Tensor]], np.ndarray, FasterRCNN]:
        """Trains a detector on n labelled images and applies it to others.

        name: a key of titles. held_out: it is measured on a fifth of these n images, from which it
        does not learn, instead of the test images. Returns its entry in evaluation-detection.json,
        detect(), precisions() and the detector.
        """
        data, test = self.labelled(n, seed), self.test
        if held_out:
            test, data = map(data.subset, torch.arange(len(data)).tensor_split([len(data) // 5]))
        sizes, passes = DETECTORS[self.kind], math.ceil(len(data) / DETECTION_BATCH)
        usual = self.options.epochs * passes or max(sizes.steps, sizes.epochs * passes)
        started, steps = time.perf_counter(), usual * (LONGER if name == "longer" else 1)
        detector = self.fit(name, data, rate, steps, seed)
        found = detect(detector, test.images)
        seconds, precision = time.perf_counter() - started, precisions(test, found)
        of_classes = zip(test.classes, precision.mean((0, 2)).tolist(), strict=True)
        record = {
            "row": name, "title": self.titles[name], "images": n, "seed": seed, "steps": steps,
            "seconds": round(seconds, 1), "learning_rate": rate, **summary(precision),
            "per_class": {key: None if math.isnan(ap) else ap for key, ap in of_classes},
        }  # fmt: skip
        return record, found, precision, detector


@torch.no_grad()
def detect(detector: FasterRCNN, images: Images) -> list[dict[str, Tensor]]:
    """In each image boxes (D, 4), labels (D,) and scores (D,), on the CPU."""
    device, found = next(detector.parameters()).device, []
    for rows in torch.arange(len(images)).split(DETECTION_BATCH):
        batch = [images.image(row).to(device).float() / 255 for row in rows.tolist()]
        found += [{key: x.cpu() for key, x in image.items()} for image in detector(batch)]
    return found


# ------------------------------------------------------------------------- detection: evaluation


def _measure(job: bytes, trial: tuple) -> bytes:
    """Detection.measure() in another process."""
    # pickled here: torch's own way of passing tensors needs shared memory, a file for each
    return pickle.dumps(pickle.loads(job).measure(*trial))


@contextlib.contextmanager
def trainers(job: Detection) -> Iterator[Callable[[Iterable[tuple]], Iterable[tuple]]]:
    """Context manager that gives a function: arguments of job.measure() -> its results, in order.

    Detectors of small images are made of tiny operations: on two busy cores a step took 0.3 s with
    one thread and 2.4 s with two. So there are as many processes of one thread as threads, which
    does not change the result. Raises InputError if one of them dies.
    """
    count = min(torch.get_num_threads(), MOST_TRAINERS)
    if job.device.type != "cpu" or job.side > simclr.SMALL_STEM_SIZE or count == 1:
        yield lambda trials: itertools.starmap(job.measure, trials)
        return
    spawn, jobs = multiprocessing.get_context("spawn"), itertools.repeat(pickle.dumps(job))
    with ProcessPoolExecutor(count, spawn, utils.start_worker) as pool:
        try:
            yield lambda trials: map(pickle.loads, pool.map(_measure, jobs, trials))
        except BrokenProcessPool as error:
            raise InputError("a process that trains a detector died: was there too little memory? "
                             "With OMP_NUM_THREADS=1 there is only one") from error  # fmt: skip
        except BaseException:  # as Ctrl-C: not to wait for the detectors under way
            for process in [*pool._processes.values()]:  # kill_workers() from Python 3.14 on
                process.kill()
            raise


def compare_detectors(job: Detection) -> tuple[dict, dict, FasterRCNN]:
    """Trains and measures every row with every number of labelled images.

    A row's learning rate is the one of RATES with the best AP50 on a fifth of the largest labelled
    set. Returns the numbers in evaluation-detection.json; for seed 0, by (row, number of images),
    the detections and precisions() on the test images; and SimCLR's detector of the largest set.
    """
    few, most, outputs, records = job.amounts[0], job.amounts[-1], {}, []
    rates: dict[str, dict[float, float]] = {name: {} for name in job.titles if name != "longer"}
    with trainers(job) as measure:
        for record, *_ in measure([(name, most, 0, r, True) for name in rates for r in RATES]):
            rates[record["row"]][record["learning_rate"]] = record["AP50"]
            print(f"{record['title']}, learning rate {record['learning_rate']:g}: AP50 "
                  f"{100 * record['AP50']:.1f} % on held-out images", flush=True)  # fmt: skip
        best = {name: max(values, key=values.get) for name, values in rates.items()}
        trials = [
            (name, n, seed, best[name]) for n in job.amounts
            for seed in range(job.options.seeds if n == few else 1) for name in best
        ]  # fmt: skip
        # the longest comes early, so that no process waits for it at the end
        trials.insert(len(best), ("longer", few, 0, best["scratch"]))
        for record, found, precision, detector in measure(trials):
            records.append(record)
            row, n, seed, seconds = (record[k] for k in ("row", "images", "seed", "seconds"))
            if seed == 0:
                outputs[row, n] = found, precision
            if (row, n, seed) == ("simclr", most, 0):
                kept = detector
            print(f"{record['title']}, {n:,} images, seed {seed}: AP50 "
                  f"{100 * record['AP50']:.1f} % ({seconds:.0f} s; detector {len(records)} of "
                  f"{len(trials)})", flush=True)  # fmt: skip
    return {"rates": rates, "detectors": records}, outputs, kept


def run_detection(job: Detection) -> dict:
    """Compares detectors, prints the table, writes the results, SimCLR's detector, the figure."""
    source, options, test, most = job.source, job.options, job.test, job.amounts[-1]
    names = ("evaluation-detection.json", "detections.json", "detections-truth.json", "detector.pt")
    files = [source.output(name, options.figures) for name in names]
    if options.out and set(options.tasks) == {DETECTION}:
        files[0] = Path(options.out)
    files.append(Path(options.figures) / source.name / "detection.png")
    check_targets(*files)
    print(f"{source.file}: {source.description}\ndetection in {job.where}: {len(job.train):,} "
          f"training and {len(test):,} test images of {len(test.classes)} classes, "
          f"{job.side} px, on {job.device}")  # fmt: skip
    for name, part in (("training", job.train), ("test", test)):
        if dropped := [f"{n:,} {reason}" for reason, n in part.dropped.items() if n]:
            print(f"boxes left out of the {name} images: {', '.join(dropped)}")
    started = time.perf_counter()
    with utils.frozen(source.encoder):
        measured, outputs, detector = compare_detectors(job)
    results = {
        "checkpoint": str(source.file), "encoder": source.description, "where": job.where,
        "train_images": len(job.train), "test_images": len(test), "image_size": job.side,
        "dropped_boxes": {"train": job.train.dropped, "test": test.dropped},
        "batch_size": DETECTION_BATCH, "precision": job.precision,
        "seconds": round(time.perf_counter() - started, 1), **measured,
    }  # fmt: skip
    utils.write_json(files[0], results)
    found, _ = outputs["simclr", most]
    utils.write_json(files[1], box_entries(found, test.image_ids, test.class_ids, "score", "_id"))
    utils.write_json(files[2], coco_truth(test))
    made = {"kind": job.kind, "normalize": source.normalize, "classes": list(detector.classes),
            "side": job.side, "precision": job.precision}  # fmt: skip
    state = {"encoder": network_of(source), "detector": made, "model": detector.state_dict()}
    utils.save_checkpoint(files[3], state)
    classes, style = utils.names_in_figures(test.classes)
    records = measured["detectors"]
    with matplotlib.rc_context(style):
        utils.save_figure(draw_detection(job, records, outputs, classes), files[4])
    print(f"\n{detection_text(job, records)}")
    print("files:", *files, sep="\n  ")
    print(f"{names[3]} began as {job.titles['simclr']}, and learned from {most:,} images; --detect "
          "PHOTOS uses it")  # fmt: skip
    return results


def scores_of(records: Sequence[dict], row: str, n: int, measure: str) -> list[float]:
    """One number a seed."""
    return [r[measure] for r in records if (r["row"], r["images"]) == (row, n)]


def detection_text(job: Detection, records: Sequence[dict]) -> str:
    """The table, and for each number of labelled images the gain by pre-training."""
    columns = [
        {"title": f"{measure}, {n:,} images",
         "scores": {row: scores_of(records, row, n, measure) for row in job.titles}}
        for measure in ("AP", "AP50", "AP75") for n in job.amounts
    ]  # fmt: skip
    lines = [table(columns, job.titles)]
    for column, row in itertools.product(columns, ("scratch", "longer")):
        if rival := column["scores"][row]:
            ours = column["scores"]["simclr"][: len(rival)]  # of the same seeds
            gain = 100 * (statistics.fmean(ours) - statistics.fmean(rival))
            lines.append(f"{column['title']}: {job.titles['simclr']} is {abs(gain):.1f} points "
                         f"{'better' if gain > 0 else 'worse'} than {job.titles[row]}"
                         f"{ONE_SEED * (len(rival) == 1)}")  # fmt: skip
    return "\n".join(lines)


def box_entries(
    found: Sequence[dict[str, Tensor]], images: Sequence, classes: Sequence, key: str,
    suffix: str = "",
) -> list[dict]:  # fmt: skip
    """Detected or true objects, a dict each, in COCO's form.

    images, classes: their names, or with suffix "_id" their ids. key: the name of the third value
    of each object, score or iscrowd.
    """
    return [
        {f"image{suffix}": name, f"category{suffix}": classes[label - 1],
         "bbox": [x1, y1, x2 - x1, y2 - y1], key: value}
        for name, image in zip(images, found, strict=True)
        for (x1, y1, x2, y2), label, value in zip(*map(Tensor.tolist, image.values()), strict=True)
    ]  # fmt: skip


def coco_truth(test: Boxes) -> dict:
    """The test images as an annotation file of COCO, for pycocotools."""
    objects = box_entries(test.targets, test.image_ids, test.class_ids, "iscrowd", "_id")
    for i, entry in enumerate(objects, 1):
        entry |= {"id": i, "area": entry["bbox"][2] * entry["bbox"][3]}
    names = zip(test.image_ids, utils.image_names(test.images), strict=True)
    kinds = zip(test.class_ids, test.classes, strict=True)
    return {"images": [{"id": key, "file_name": name} for key, name in names],
            "categories": [{"id": key, "name": name} for key, name in kinds],
            "annotations": objects}  # fmt: skip


SHOWN = 6  # images in a figure
CONFIDENT, APART = 0.5, 0.3  # least score of a box that is drawn, largest IoU of two of them
DRAWN = f"Boxes of {CONFIDENT:.0%} confidence or more; of overlapping ones the most confident"


def draw_detection(
    job: Detection, records: Sequence[dict], outputs: dict, classes: Sequence[str]
) -> Any:
    """A matplotlib Figure: AP50 by labelled images, precision by recall, and test images.

    records, outputs: of compare_detectors(). classes: their names in figures.
    """
    figure = Figure(figsize=(9.5, 7.4), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(3.3, 4))
    left, right = upper.subplots(1, 2)
    few, test = job.amounts[0], job.test
    for i, (row, title) in enumerate(job.titles.items()):
        style = dict(color=f"C{i}", label=title, linestyle=":" if row == "longer" else "-")
        there = [n for n in job.amounts if (row, n) in outputs]
        values = [np.multiply(100, scores_of(records, row, n, "AP50")) for n in there]
        bars = [x.std(ddof=1) if len(x) > 1 else 0 for x in values]
        left.errorbar(there, [x.mean() for x in values], bars, marker="o", capsize=3, **style)
        precision = 100 * np.nanmean(outputs[row, few][1][0], axis=0)
        right.plot(100 * RECALLS, precision, **style)
    left.set(xscale="log", xlabel="labelled images", ylabel="AP50, % (bars: spread over seeds)")
    left.set_xticks(job.amounts, [f"{n:,}" for n in job.amounts])
    left.minorticks_off()
    right.set(xlabel="recall, %", ylabel="precision, %", xlim=(0, 100), ylim=(0, 102))
    right.set_title(f"{few:,} labelled images, seed 0, IoU 0.5", fontsize=10)
    for axis in (left, right):
        axis.grid(color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
    left.legend(fontsize=8)
    lower.suptitle(f"The same detectors on test images. {DRAWN}; the truth is dashed", fontsize=10)
    for i, axes in enumerate(lower.subplots(2, SHOWN)):
        row = ("scratch", "simclr")[i]
        axes[0].set_ylabel(job.titles[row])
        draw_boxes(axes, test.images, outputs[row, few][0], classes, f"C{i}", test.targets)
    return figure


def draw_boxes(
    axes: Sequence, images: Images, found: Sequence[dict[str, Tensor]],
    classes: Sequence[str], color: str, truth: Sequence[dict[str, Tensor]] = (),
) -> None:  # fmt: skip
    """The first images with what was found in them, one on each axis; the truth is dashed."""
    back = dict(fc=color, lw=0, pad=0.6)
    for i, axis in enumerate(axes):
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        if i >= len(found):
            continue
        axis.imshow(images.image(i).permute(1, 2, 0).numpy(), interpolation="nearest")
        drawn = [(box, "w", "--", "") for box in (truth[i]["boxes"].tolist() if truth else ())]
        boxes, labels, scores = found[i].values()
        for k in nms(boxes, scores, APART).tolist():
            text = f"{classes[labels[k] - 1]} {scores[k]:.0%}"
            drawn += [(boxes[k].tolist(), color, "-", text)] if scores[k] >= CONFIDENT else []
        for (x1, y1, x2, y2), ec, ls, text in drawn:
            corner, size = (x1 - 0.5, y1 - 0.5), (x2 - x1, y2 - y1)
            axis.add_patch(Rectangle(corner, *size, fill=False, ec=ec, ls=ls))
            axis.text(x1, y1 - 1, text, color="w", fontsize=7, va="bottom", bbox=back)


def detect_photos(source: Source, options: Options, device: torch.device) -> None:
    """--detect: writes what the run's detector finds in new images, and draws some."""
    file = source.output("detector.pt", options.figures)
    if not file.exists():
        raise InputError(f"there is no {file} yet: --tasks detection trains it")
    detector, where = load_detector(file, device), Path(options.detect)
    out = Path(options.out or source.output("boxes.json", options.figures))
    figure_file = Path(options.figures) / source.name / f"{out.stem}.png"
    check_targets(out, figure_file)
    grey_range = options.range or (source.config.range if source.config else ())
    files = utils.only_readable(utils.load_unlabelled(where, 1.0, grey_range), options.workers)
    found = detect(detector, files)
    entries = box_entries(found, utils.image_names(files), detector.classes, "score")
    utils.write_json(out, entries)
    classes, style = utils.names_in_figures(detector.classes)
    with matplotlib.rc_context(style):
        rows, columns = math.ceil(min(len(files), SHOWN) / 3), min(len(files), 3)
        figure = Figure(figsize=(3.2 * columns, 0.4 + 3.4 * rows), layout="constrained")
        figure.suptitle(DRAWN, fontsize=10, wrap=True)
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        draw_boxes(axes, files, found, classes, "C1")
        for axis, name in zip(axes, utils.image_names(files), strict=False):
            axis.set_xlabel(utils.printable(name, 40), fontsize=8)
        utils.save_figure(figure, figure_file)
    print(f"images: {len(files):,}, boxes of any score: {len(entries):,}, {out}\n{figure_file}")


# ----------------------------------------------------------------------------------------- options

DETECTION = "detection"  # by run_detection(), as its data are boxes
TASKS: dict[str, tuple[Callable[[Evaluation], Iterator[Outputs]] | None, str]] = {  # method, help
    "knn": (Evaluation.knn, "k nearest neighbours by cosine: 10 with a vote each, 200 weighted"),
    "linear": (Evaluation.linear, "logistic regression on frozen features, l2 chosen by training"),
    "linear-augmented": (Evaluation.linear_augmented, "a linear layer on frozen crops and flips"),
    "semi": (Evaluation.semi, "fine-tuning with few labels, against training from scratch (B.5)"),
    DETECTION: (None, "a Faster R-CNN trained on few images, against training from scratch"),
}


# fmt: off
@dataclass
class Options:
    """The command line of load_simCLR.py."""

    tasks: tuple[str, ...] = setting(("knn", "linear"), "what to measure", TASKS,
                                     group="evaluation")
    labels: tuple[str, ...] = setting((), "label sets of 'semi', or the one of --fine-tune: shares "
        "of each class (1% or 0.01) or numbers per class (10); without it --fine-tune takes all; "
        "of 'detection': shares or numbers of images "
        f"[{' '.join(LABELS)}; {' '.join(DETECTION_LABELS)}]")
    seeds: int = setting(3, "draws of the labels and initialisations, for 'semi' and the smallest "
                         "label set of 'detection', whose others get one", low=1)
    epochs: int = setting(0, "passes over the labels; 0: the paper's, 60 or 30 ('semi', at least "
                          "200 steps) and 90 ('linear-augmented'); 'detection': a number of steps "
                          "on digits, 12 passes on photographs", low=0)
    freeze: bool = setting(False, "'detection': also with an encoder that is not trained further")
    against: tuple[str, ...] = setting((), "'detection': other encoders of the same architecture")
    dataset: str = setting("", "evaluate on this data set (default: the run's)", utils.DATASETS)
    data_dir: str = setting("", "where it is; with 'folder' your images (default: the run's)")
    image_size: int = setting(0, "side in px that the encoder sees; 0: as in training", low=0)
    range: tuple[float, float] = setting((), "values that are black and white in grey pictures of "
                                       "more than 8 bits (default: the run's)")
    predictions: str = setting("", "write the linear classifier's test predictions to this .csv")
    embed: str = setting("", "write h of this image, or of all in this folder; evaluate nothing",
                         group="use on new images")
    fine_tune: bool = setting(False, "train encoder and linear layer on the labelled images, and "
                              "keep this classifier")
    classify: str = setting("", "predict the class of this image, or of all in this folder, by the "
                            "fine-tuned classifier; without one by a linear classifier on h, which "
                            "is fitted to the labels now")
    detect: str = setting("", "find objects in this image, or in all in this folder")
    out: str = setting("", "file that --embed (.npz), --classify (.csv), --fine-tune (.pt), "
                       "--detect or the evaluation (.json) writes (default: beside the checkpoint, "
                       "or beside the figures where that folder is read-only)")
    export: str = setting("", "write the encoder with torchvision's names to this file",
                          group="other formats")
    normalize: str = setting("auto", "how images in [0, 1] are normalised before the encoder; "
                             "auto: as its origin did", ("auto", "none", *MEANS))
    prefix: str = setting("", "which encoder of another project's file, if it holds several")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps", group="how it runs")
    precision: str = setting("auto", "auto: the run's, where the hardware has it",
                             ("auto", "bfloat16", "float32"))
    workers: int = setting(-1, "processes that decode streamed images; -1: one per core", low=-1)
    checkpoints: str = setting("checkpoints", "folder of all runs' checkpoints")
    figures: str = setting("figures", "folder of all runs' figures")
    # fmt: on


def check_options(options: Options) -> None:
    """Raises InputError for the first option that is out of range or contradicts another."""
    utils.check_settings(options)
    if options.image_size and not simclr.MIN_SIZE <= options.image_size <= simclr.MAX_SIZE:
        raise InputError(f"--image-size must be 0 or 8 to 4096, got {options.image_size}")
    for text in options.labels:
        parse_amount(text)
    if options.predictions and "linear" not in options.tasks:
        raise InputError("--predictions are those of the linear classifier: add linear to --tasks")
    for name in ("embed", "classify", "detect"):
        folder = getattr(options, name)
        if folder and not os.path.exists(folder):
            raise InputError(f"{flag(name)} {folder} is not a folder or an image")
    if options.fine_tune and len(options.labels) > 1:
        raise InputError(f"--fine-tune takes one label set, got {' '.join(options.labels)}")
    suffixes = {"embed": ".npz", "classify": ".csv", "fine_tune": ".pt", "detect": ".json"}
    uses = [name for name in suffixes if getattr(options, name)]
    if options.out and len(uses) > 1:
        raise InputError(f"--out names one file: give one of {', '.join(map(flag, uses))}")
    suffix = suffixes[uses[0]] if uses else ".json"
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
    evaluation = Evaluation(source, options, device)
    config, data = evaluation.config, evaluation.data
    suffix = f"-{config.dataset}" * source.other_images(config)
    figure_file = Path(options.figures) / source.name / f"evaluation{suffix}.png"
    result_file = Path(options.out or source.output(f"evaluation{suffix}.json", options.figures))
    for amount in options.labels or LABELS if "semi" in options.tasks else ():
        evaluation.label_rows(amount, 0)  # too many labels are an error now, not after an hour
    check_targets(result_file, figure_file, options.predictions)
    print(
        f"{source.file}: {source.description}\nevaluated on {config.dataset}: "
        f"{len(data.train):,} training and {len(data.test):,} test images of "
        f"{len(data.train.classes)} classes, {config.image_size} px, on {device} in "
        f"{utils.describe_precision(config.precision, device)}\n"
    )
    for results in evaluate(evaluation, start_results(evaluation, result_file)):
        utils.write_json(result_file, results)
    tiles, rows = [], simclr.row_names(source.config)
    names, style = utils.names_in_figures(data.train.classes)
    if evaluation.fitted:
        if not suffix:  # of the run's own images
            save_linear_classifier(evaluation)
        confidence, predicted = evaluation.fitted["simclr"][1].softmax(1).max(1)
        truth = data.test.labels
        results["confusion"] = metrics.confusion_matrix(
            truth.tolist(), predicted.tolist(), labels=range(evaluation.classes)
        ).tolist()
        tiles = mistake_tiles(evaluation, names)
        if options.predictions:
            write_predictions(
                Path(options.predictions), utils.image_names(data.test), data.train.classes,
                confidence, true=truth, predicted=predicted,
            )  # fmt: skip
    utils.write_json(result_file, results)
    with matplotlib.rc_context(style):
        drawn = {**results, "classes": names}
        utils.save_figure(draw_evaluation(drawn, rows, tiles), figure_file)
    print(f"\n{text_of(results, rows)}")
    print(f"results       {result_file}\nfigure        {figure_file}")
    if options.predictions:
        print(f"predictions   {options.predictions}")
    return results


def start_results(evaluation: Evaluation, file: Path) -> dict[str, Any]:
    """Results without measurements, or what `file` holds of the same checkpoint and data."""
    source, config, data = evaluation.source, evaluation.config, evaluation.data
    header = {
        "checkpoint": str(source.file), "sha256": utils.file_digest(source.file),
        "encoder": source.description, "normalize": source.normalize,
        "dataset": config.dataset, "data_dir": config.data_dir,
        "image_size": config.image_size, "precision": config.precision,
        "train_images": len(data.train), "test_images": len(data.test),
        "classes": list(data.train.classes), "majority": data.majority,
        "uneven_classes": data.uneven,
    }  # fmt: skip
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        saved = json.loads(file.read_text(encoding="utf-8"))
        if all(saved[key] == value for key, value in header.items()):
            return saved
    return {**header, "columns": [], "seconds": {}}


def check_targets(*files: str | Path) -> None:
    """Makes the folders of files to be written; "" is none. InputError if one cannot be written."""
    for file in map(Path, filter(None, files)):
        if os.path.exists(file) and not os.path.isfile(file):
            raise InputError(f"cannot write {file}: it is a folder, or no file")
        utils.make_folder(file.absolute().parent)


def parse_command_line(argv: Sequence[str] | None = None) -> tuple[str, Options]:
    """Which run or file, and the options."""
    usage = "python load_simCLR.py [RUN|FILE] [--tasks TASK ...] [--flag value ...]"
    tasks = "\n".join(["tasks:", *(f"  {name:17} {text}" for name, (_, text) in TASKS.items())])
    parser = utils.OneLineParser(
        prog="load_simCLR.py", usage=usage, description=__doc__, epilog=tasks
    )
    which = "a run's name or folder, or a file (default: the newest)"
    parser.add_argument("run", nargs="?", default="", help=which)
    utils.add_flags(parser, Options)
    given = vars(parser.parse_args(argv))
    where = given.pop("run")
    options = Options(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
    check_options(options)
    return where, options


def run(where: str, options: Options) -> dict | None:
    """What `python load_simCLR.py` does. Returns the evaluation, if there was one."""
    device = utils.choose_device(options.device)
    alone = {*options.tasks} - {"knn", "linear"} | {*["fine-tune"] * options.fine_tune}
    if utils.rank_info().size > 1 and alone:
        raise InputError(f"{' '.join(sorted(alone))}: they train in one process: omit torchrun")
    with utils.process_group(device):
        file = utils.find_checkpoint(where, options.checkpoints)
        source = load_source(file, options.normalize, options.prefix)
        if options.export:
            lines = export_encoder(source, Path(options.export))
            print(f"{source.description}\nexported to {options.export}; {lines}")
        if options.fine_tune:
            fine_tune_classifier(source, options, device)
        if options.embed or options.classify:
            use_on_new_images(source, options, device)
        if options.detect:
            detect_photos(source, options, device)
        uses = (options.fine_tune, options.embed, options.classify, options.detect)
        if options.export or any(uses):
            return None
        detection = Detection(source, options, device) if DETECTION in options.tasks else None
        if set(options.tasks) != {DETECTION}:
            results = run_evaluation(source, options, device)
        return run_detection(detection) if detection else results


@utils.command("load_simCLR.py")
def main(argv: Sequence[str] | None = None) -> None:
    run(*parse_command_line(argv))


if __name__ == "__main__":
    main()
