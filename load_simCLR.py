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

Reading order: tasks · other people's checkpoints · loading · evaluation · figure · new images ·
the command line. The classifiers are in utils.py, training on labels in simclr.py.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import hashlib
import io
import itertools
import json
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from tqdm import tqdm

import simclr
import utils
from simclr import REPRESENTATIONS, Config, Data, Encoder, LabelTraining
from utils import ImageFiles, InputError, flag, setting

# ----------------------------------------------------------------------------------------- options

TASKS = {
    "knn": "k nearest neighbours by cosine: 10 with a vote each, and 200 weighted (tau 0.1)",
    "linear": "logistic regression on frozen features, l2 chosen within the training set",
    "linear-augmented": "a linear layer on frozen features of crops and flips, by SGD",
    "semi": "fine-tuning with few labels, against the same network from scratch (Appendix B.5)",
    "supervised": "the same network trained on all labels with crops, flips and colour",
}


@dataclass
class Options:
    """The command line of load_simCLR.py."""

    # what to measure
    tasks: tuple[str, ...] = setting(("knn", "linear"), "what to measure", tuple(TASKS))
    labels: tuple[str, ...] = setting(
        ("1%", "10%", "100%"),
        "label sets of 'semi': shares of each class (1%% or 0.01) or numbers per class (10)",
    )
    seeds: int = setting(3, "draws of the labels and initialisations, for 'semi' and 'supervised'")
    epochs: int = setting(
        0, "passes over the labels; 0: the paper's, 60 or 30 ('semi') and 90 (the others)"
    )
    dataset: str = setting("", "evaluate on this data set (default: the run's)", utils.DATASETS)
    data_dir: str = setting("", "where it is; with 'folder' your images (default: the run's)")
    image_size: int = setting(0, "side in px that the encoder sees; 0: as in training")
    predictions: str = setting("", "write the linear classifier's test predictions to this .csv")
    # use on new images
    embed: str = setting("", "write h of all images in this folder, and evaluate nothing")
    classify: str = setting("", "predict the classes of all images in this folder")
    out: str = setting("", "where --embed (.npz) and --classify (.csv) write")
    # other formats
    export: str = setting("", "write the encoder with torchvision's names to this file")
    normalize: str = setting(
        "auto",
        "what inputs in [0, 1] are normalised with; auto: what the checkpoint's origin used",
        ("auto", "none", "imagenet", "cifar10", "cifar10-per-image", "cifar100"),
    )
    # how it runs
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    precision: str = setting(
        "auto", "auto: the run's, where the hardware has it", ("auto", "bfloat16", "float32")
    )
    workers: int = setting(-1, "processes that decode streamed images; -1: one per core")
    checkpoints: str = setting("checkpoints", "folder of all runs' checkpoints")
    figures: str = setting("figures", "folder of all runs' figures")


OPTION_GROUPS = {
    "tasks": "evaluation",
    "embed": "use on new images",
    "export": "other formats",
    "device": "how it runs",
}


def check_options(options: Options) -> None:
    """Raise InputError for the first option that is out of range."""
    for text in options.labels:
        parse_amount(text)
    if options.seeds < 1:
        raise InputError(f"--seeds must be at least 1, got {options.seeds}")
    if options.epochs < 0:
        raise InputError(f"--epochs must be 0 or more, got {options.epochs}")
    if options.image_size and not simclr.MIN_SIZE <= options.image_size <= simclr.MAX_SIZE:
        raise InputError(f"--image-size must be 0 or 8 to 4096, got {options.image_size}")
    if options.workers < -1:
        raise InputError(f"--workers must be -1 or more, got {options.workers}")
    if options.predictions and "linear" not in options.tasks:
        raise InputError("--predictions are those of the linear classifier: add linear to --tasks")
    if options.out and not (options.embed or options.classify):
        raise InputError("--out goes with --embed or --classify")
    if options.embed and options.classify and options.out:
        raise InputError("--out names one file: give either --embed or --classify")
    for name in ("embed", "classify"):
        folder = getattr(options, name)
        if folder and not os.path.isdir(folder):
            raise InputError(f"{flag(name)} {folder} is not a folder")


def parse_amount(text: str) -> float | int:
    """How many labels: "1%", "0.01" and "1.0" -> a share (float), "10" -> a number per class."""
    try:
        if re.fullmatch(r"\d+", text):
            amount: float | int = int(text)
        else:
            amount = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        amount = 0
    if not amount > 0 or (isinstance(amount, float) and amount > 1):
        raise InputError(
            f"--labels {text}: give a share up to 100 % (1% or 0.01) or a number per class (10)"
        )
    return amount


# --------------------------------------------------------------------- other people's checkpoints
#
# A naming is where the encoder's tensors lie in a file. After the wrapper and "module." are taken
# off, it is a prefix and a layout: either torchvision's names, or the numbers that nn.Sequential
# gives to a ResNet's children. The mapped names are then loaded strictly.

MEANS = {  # mean and standard deviation of each channel, as published with the code that used them
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    # often copied: the mean over the images of the deviation within an image
    "cifar10-per-image": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}
WRAPPERS = ("state_dict", "model", "resnet", "net")  # keys under which files keep their tensors


@dataclass(frozen=True)
class Naming:
    """One project's way to name the tensors of an encoder.

    prefix: what the encoder's names begin with. beside: a pattern that some other name of the
    file begins with, which tells this project from others with the same prefix. normalize: what
    its training normalised images with, a key of MEANS or "none"; small_normalize and padding:
    the same and the first convolution's padding where that is 3x3, as for CIFAR.
    """

    origin: str
    prefix: str
    beside: str = ""
    normalize: str = "none"
    small_normalize: str = ""
    padding: int = 1


NAMINGS = (  # the first that matches; the general ones last
    Naming("MoCo", "encoder_q.net.", normalize="cifar10-per-image"),
    Naming("MoCo", "encoder_q.", normalize="imagenet"),
    Naming("lightly", "backbone.", r"projection_head", normalize="imagenet"),
    Naming("sthalles/SimCLR", "backbone.", r"backbone\.fc\.0\."),
    Naming("solo-learn", "backbone.", r"classifier\.", "imagenet", "cifar10", padding=2),
    Naming("dkobak/simclr-cifar10", "backbone.", r"projector\."),
    Naming("solo-learn", "encoder.", r"classifier\.", "imagenet", "cifar10", padding=2),
    Naming("SupContrast", "encoder.", r"head\.", "imagenet", "cifar10-per-image"),
    Naming("Spijkervet/SimCLR", "encoder.", r"projector\."),
    Naming("p3i0t/SimCLR-CIFAR10", "enc."),
    Naming("leftthomas/SimCLR", "f.", normalize="cifar10-per-image"),
    Naming("sthalles/SimCLR", "features."),
    Naming("SimCLRv2-Pytorch", "", r"net\.\d+\.blocks\."),
    Naming("a backbone", "backbone.", normalize="imagenet"),
    Naming("an encoder", "encoder.", normalize="imagenet"),
    Naming("torchvision", "", normalize="imagenet"),
)

STEM_KEYS = ("conv1.weight", "0.weight", "net.0.0.weight")  # of the layouts below
SEQUENTIAL = {  # where the first residual stage is -> index of each part among the children
    4: {0: "conv1", 1: "bn1", 4: "layer1", 5: "layer2", 6: "layer3", 7: "layer4"},
    3: {0: "conv1", 1: "bn1", 3: "layer1", 4: "layer2", 5: "layer3", 6: "layer4"},  # no max-pool
    2: {0: "conv1", 1: "bn1", 2: "layer1", 3: "layer2", 4: "layer3", 5: "layer4"},  # no ReLU either
}
NO_STEM_RELU = (
    2  # lightly's own ResNet in nn.Sequential: its stem's ReLU was a function and is lost
)
SIMCLR_V2 = (  # blocks of SimCLRv2-Pytorch: N.blocks.i.… -> torchvision's
    (r"^net\.0\.0\.", "conv1."),
    (r"^net\.0\.1\.0\.", "bn1."),
    (r"^net\.(\d)\.blocks\.(\d+)\.net\.0\.", r"layer\1.\2.conv1."),
    (r"^net\.(\d)\.blocks\.(\d+)\.net\.1\.0\.", r"layer\1.\2.bn1."),
    (r"^net\.(\d)\.blocks\.(\d+)\.net\.2\.", r"layer\1.\2.conv2."),
    (r"^net\.(\d)\.blocks\.(\d+)\.net\.3\.0\.", r"layer\1.\2.bn2."),
    (r"^net\.(\d)\.blocks\.(\d+)\.net\.4\.", r"layer\1.\2.conv3."),
    (r"^net\.(\d)\.blocks\.(\d+)\.net\.5\.0\.", r"layer\1.\2.bn3."),
    (r"^net\.(\d)\.blocks\.(\d+)\.projection\.shortcut\.", r"layer\1.\2.downsample.0."),
    (r"^net\.(\d)\.blocks\.(\d+)\.projection\.bn\.0\.", r"layer\1.\2.downsample.1."),
)
HEADS = re.compile(r"(fc|head|linear|projector|classifier)\.")  # beside an encoder of no prefix
MAX_LISTED = 5  # names in an error
MAX_WIDTH = 16  # as in simclr.py: a small file could claim a network of any size


@dataclass
class Imported:
    """An encoder from another project's file, in eval mode, and what was inferred of it."""

    encoder: Encoder
    arch: str
    width: float
    stem: str
    origin: str
    normalize: str  # a key of MEANS, or "none"


def import_encoder(state: dict, where: Path) -> Imported:
    """The encoder in a checkpoint of another project.

    Architecture, width and stem follow from the shapes. Raises InputError if the naming is
    unknown, the network is no plain ResNet, or any tensor is missing, surplus or of another shape.
    """
    tensors = unwrap(state)
    naming = next((n for n in NAMINGS if matches(n, tensors)), None)
    if naming is None:
        names = ", ".join(map(utils.shown, list(tensors)[:MAX_LISTED])) or "none"
        raise InputError(
            f"{where} is no checkpoint of a known naming (it has {len(tensors)} tensors: {names}"
            f"{', …' if len(tensors) > MAX_LISTED else ''})"
        )
    own = {
        name.removeprefix(naming.prefix): value
        for name, value in tensors.items()
        if name.startswith(naming.prefix)
    }
    named, first_stage = torchvision_names(own)
    arch, width, stem = infer_architecture(named, where)
    encoder = load_strictly(
        arch, width, stem, named, f"{where} (naming of {naming.origin}, {arch})"
    )
    normalize = naming.normalize
    if stem == "small":
        encoder.conv1.padding = (naming.padding,) * 2
        normalize = naming.small_normalize or normalize
    if first_stage == NO_STEM_RELU:
        encoder.relu = nn.Identity()
    return Imported(encoder.eval(), arch, width, stem, naming.origin, normalize)


def unwrap(state: Any) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, without wrappers and "module."; counters left out."""
    for key in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    tensors = {}
    for key, value in state.items() if isinstance(state, dict) else ():
        if isinstance(key, str) and isinstance(value, Tensor):
            name = re.sub(r"(^|\.)module\.", r"\1", key)  # left by (Distributed)DataParallel
            if not re.search(r"(^|\.)total_(ops|params)$", name):  # left by a profiler
                tensors[name] = value
    return tensors


def matches(naming: Naming, tensors: dict[str, Tensor]) -> bool:
    stem = any(naming.prefix + key in tensors for key in STEM_KEYS)
    return stem and (not naming.beside or any(re.match(naming.beside, name) for name in tensors))


def torchvision_names(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], int | None]:
    """Tensors of an encoder (prefix taken off) by torchvision's names, without a head.

    Returns them, and where in an nn.Sequential the first stage was, if it was one.
    """
    first_stage = None
    if "0.weight" in tensors:
        stages = [i for i in SEQUENTIAL if f"{i}.0.conv1.weight" in tensors]
        first_stage = min(stages, default=None)
    named = {}
    for name, value in tensors.items():
        index, _, rest = name.partition(".")
        new = name
        if first_stage is not None and index.isdigit():
            part = SEQUENTIAL[first_stage].get(int(index))
            weight = tensors.get(f"{index}.weight")
            if part is None and weight is not None and weight.ndim <= 2:
                continue  # a head behind the pooling
            new = f"{part}.{rest}" if part else name
        elif first_stage is None:
            for pattern, replacement in SIMCLR_V2:
                new = re.sub(pattern, replacement, new)
        if not HEADS.match(new):
            named[new.replace(".shortcut.", ".downsample.")] = value
    return merge_split_statistics(named), first_stage


def merge_split_statistics(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """A BatchNorm that imitates k devices has k·C statistics; evaluating, it uses their mean."""
    merged = dict(named)
    for name, value in named.items():
        if name.endswith(("running_mean", "running_var")) and value.ndim == 1:
            scale = named.get(re.sub(r"running_\w+$", "weight", name), value)
            if scale.ndim == 1 and len(value) > len(scale) > 0 == len(value) % len(scale):
                merged[name] = value.view(-1, len(scale)).mean(0)
    return merged


def infer_architecture(named: dict[str, Tensor], where: Path) -> tuple[str, float, str]:
    """Architecture, width and stem, from the shapes. InputError if it is no plain ResNet."""
    conv1 = named.get("conv1.weight")
    if conv1 is None or conv1.ndim != 4 or conv1.shape[1] != 3:
        raise InputError(f"{where}: its first convolution is not that of a plain ResNet")
    stem = {3: "small", 7: "imagenet"}.get(conv1.shape[-1])
    if conv1.shape[0] > MAX_WIDTH * 64:
        raise InputError(f"{where}: an encoder {conv1.shape[0] / 64:g} times as wide is too large")
    bottleneck = "layer1.0.conv3.weight" in named
    pattern = re.compile(r"layer(\d)\.(\d+)\.conv1\.weight$")
    blocks = [0, 0, 0, 0]
    for name in named:
        found = pattern.match(name)
        if found and 1 <= int(found[1]) <= 4:
            blocks[int(found[1]) - 1] += 1
    for arch, (block, layers) in simclr.ARCHITECTURES.items():
        if stem and list(layers) == blocks and (block is simclr.Bottleneck) == bottleneck:
            return arch, conv1.shape[0] / 64, stem
    kind = "bottleneck" if bottleneck else "basic"
    raise InputError(
        f"{where} holds a network that is not supported: {kind} blocks {blocks}, first "
        f"convolution {tuple(conv1.shape)}"
    )


def load_strictly(
    arch: str, width: float, stem: str, named: dict[str, Tensor], what: str
) -> Encoder:
    """The encoder with all of these tensors, or InputError that lists the missing and misshapen."""
    with torch.device("meta"):  # shapes alone: a false file should not cost memory
        expected = Encoder(arch, width, stem).state_dict()
    for name in expected:
        if name.endswith("num_batches_tracked"):  # old files lack it, and it has no effect here
            named.setdefault(name, torch.tensor(0))
    if faults := utils.state_dict_mismatches(named, expected):
        more = f", and {len(faults) - MAX_LISTED} more" if len(faults) > MAX_LISTED else ""
        raise InputError(f"{what} does not fit: {'; '.join(faults[:MAX_LISTED])}{more}")
    encoder = Encoder(arch, width, stem)
    encoder.load_state_dict(named)
    return encoder


class Normalized(nn.Module):
    """An encoder behind the normalisation that it was trained with: (x - mean) / std."""

    def __init__(self, encoder: Encoder, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.encoder, self.feature_dim = encoder, encoder.feature_dim
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder((images - self.mean) / self.std)


# ----------------------------------------------------------------------------------------- loading


@dataclass
class Source:
    """An encoder to evaluate or use, and where it came from."""

    file: Path
    encoder: nn.Module  # images (B, 3, S, S) in [0, 1] -> h (B, feature_dim); frozen, eval mode
    plain: Encoder  # the encoder without normalisation
    normalize: str  # a key of MEANS, or "none"
    description: str
    config: Config | None = None  # of the run; None if the file is not simclr.py's, and so
    projector: nn.Module | None = None  # h -> z
    imported: Imported | None = None  # what was inferred, if the file is not simclr.py's

    @property
    def name(self) -> str:
        """Under which figures are kept: the run's, or the file's."""
        return self.config.run if self.config else self.file.name.split(".")[0]

    def beside(self, name: str) -> Path:
        """A file beside the checkpoint, named after it if the folder is not a run's."""
        own = self.file.name in (simclr.CHECKPOINT, simclr.PREVIOUS)
        return self.file.with_name(name if own else f"{self.file.name}.{name}")


def load_source(file: Path, normalize: str = "auto") -> Source:
    """Read a checkpoint of simclr.py, one written by --export, or another project's.

    normalize: a key of MEANS, "none", or "auto" for what its origin used. Raises InputError if the
    file is damaged, needs code to be executed, or is of an unknown naming or network.
    """
    with torch.serialization.safe_globals([argparse.Namespace]):  # options that others save beside
        state, file = simclr.load_newest(file)
    if "config" in state and "format" in state:
        run = simclr.trained_run(state, file)
        source = Source(file, run.model.encoder, run.model.encoder, "none", "", run.config)
        source.projector = run.model.projector
        source.description = f"{run.config.arch} at width {run.config.width:g}, epoch {run.epoch}"
    else:
        with utils.errors_as_input_error(f"{file} is not a checkpoint", through=(InputError,)):
            got = import_encoder(state, file)
            exported = exported_settings(state)
        if exported:
            got.encoder.conv1.padding = (int(exported["padding"]),) * 2
            got.normalize = exported["normalize"]
        source = Source(file, got.encoder, got.encoder, got.normalize, "", imported=got)
        origin = "written by --export" if exported else f"naming of {got.origin}"
        source.description = f"{got.arch} at width {got.width:g}, {got.stem} stem, {origin}"
    if normalize != "auto":
        source.normalize = normalize
    if source.normalize != "none":
        source.encoder = Normalized(source.plain, *MEANS[source.normalize])
    inputs = "in [0, 1]" if source.normalize == "none" else f"normalised for {source.normalize}"
    source.description += f", h of {source.plain.feature_dim} dimensions, inputs {inputs}"
    source.encoder.eval().requires_grad_(False)
    return source


def exported_settings(state: dict) -> dict:
    """What export_encoder() put into the metadata; {} if there is nothing that makes sense."""
    found: Any = getattr(state, "_metadata", None)
    for key in ("", EXPORTED):
        found = found.get(key) if isinstance(found, dict) else None
    sensible = isinstance(found, dict) and str(found.get("padding")) in ("1", "2", "3")
    return found if sensible and found.get("normalize") in ("none", *MEANS) else {}


def load_encoder(
    where: str | Path = "", normalize: str = "auto", device: torch.device | str = "cpu"
) -> nn.Module:
    """The pre-trained encoder f, frozen and in eval mode; `encoder.feature_dim` is the width of h.

    where: a checkpoint file, a run's folder or name, or "" for the newest run. Returns a module:
    float (B, 3, S, S) in [0, 1] -> h (B, feature_dim). To train it further, call .train() and
    .requires_grad_(True). Raises InputError as load_source().
    """
    source = load_source(simclr.find_checkpoint(str(where)), normalize)
    return source.encoder.to(device)


EXPORTED = "simclr"  # what load_state_dict ignores and load_source() reads, in the metadata


def export_encoder(source: Source, file: Path) -> str:
    """Write the encoder as a state dict with torchvision's names. Returns how to load it.

    At width 1 torchvision.models.<arch>() takes it with only `fc` missing; a 3x3 stem needs two
    lines before, which the returned text gives. Raises InputError if the file cannot be written, or
    if torchvision's ResNet cannot compute the same (lightly's own ResNet has no ReLU in its stem).
    """
    encoder = source.plain
    if isinstance(encoder.relu, nn.Identity):
        raise InputError(f"{source.file}: a stem without ReLU does not exist in torchvision")
    padding = encoder.conv1.padding
    state = encoder.state_dict()  # an OrderedDict, saved with its metadata
    state._metadata[""][EXPORTED] = {"normalize": source.normalize, "padding": padding[0]}
    check_targets(file)
    utils.save_checkpoint(file, state)

    channels, _, kernel, _ = encoder.conv1.weight.shape
    arch = source.config.arch if source.config else source.imported.arch
    if channels != 64 or not hasattr(torchvision.models, arch):
        return f"load it with load_simCLR.load_encoder({str(file)!r})"
    lines = [f"model = torchvision.models.{arch}()"]
    if kernel == 3:
        lines += [
            f"model.conv1 = nn.Conv2d(3, 64, 3, padding={padding[0]}, bias=False)",
            "model.maxpool = nn.Identity()",
        ]
    lines += [f"model.load_state_dict(torch.load({str(file)!r}), strict=False)  # fc is missing"]
    return "load it with\n  " + "\n  ".join(lines)


# -------------------------------------------------------------------------------------- evaluation

KNN_WEIGHTED = dict(k=200, temperature=0.1)  # as most codes report it (Wu et al. 2018)
LINEAR_EPOCHS, LINEAR_BATCH = 90, 256  # of 'linear-augmented'; the paper's number of epochs
MANY_LABELS, MANY_EPOCHS, FEW_EPOCHS = 0.1, 30, 60  # Appendix B.5: from 10 % on, and below
SUPERVISED = LabelTraining(epochs=90, batch_size=256, lr=0.1, weight_decay=1e-4)  # He et al. 2016


@dataclass
class Column:
    """One measurement of all representations: a column of the table."""

    task: str
    title: str
    scores: dict[str, list[float]]  # key of REPRESENTATIONS -> accuracies in [0, 1], one a seed
    l2: dict[str, float] = field(default_factory=dict)  # strength that was chosen


class Evaluation:
    """The measurements of one encoder on one labelled data set.

    Features are computed once, without augmentation. Everything that says "frozen" runs inside
    utils.frozen(), which raises if a single byte of the encoder moved.
    """

    def __init__(
        self, source: Source, config: Config, data: Data, device: torch.device, epochs: int = 0
    ) -> None:
        self.source, self.config, self.data, self.device = source, config, data, device
        self.epochs = epochs
        encoder = source.encoder.to(device, memory_format=torch.channels_last)
        self.encoders: dict[str, Any] = {
            "pixels": utils.flat_pixels,
            "untrained": self.untrained(seed=0),
            "simclr": encoder,
        }
        if source.projector is not None:
            self.encoders["projection"] = nn.Sequential(encoder, source.projector.to(device)).eval()
        self.classes = len(data.train.classes)
        self.classifier: utils.LinearClassifier | None = None  # of h, once linear() has run
        self._features: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def note(self) -> str:
        """What titles say of a number of epochs that is not the paper's."""
        return f", {self.epochs} epochs" if self.epochs else ""

    def untrained(self, seed: int) -> nn.Module:
        """The network at its random start; seed 0 is where the run itself began."""
        config = dataclasses.replace(self.config, seed=self.config.seed + seed)
        encoder: nn.Module = simclr.make_model(config).encoder
        encoder.conv1.padding = self.source.plain.conv1.padding  # another project's may differ
        if isinstance(self.source.plain.relu, nn.Identity):
            encoder.relu = nn.Identity()
        if self.source.normalize != "none":
            encoder = Normalized(encoder, *MEANS[self.source.normalize])
        return encoder.eval().to(self.device, memory_format=torch.channels_last)

    def features(self, name: str) -> tuple[Tensor, Tensor]:
        """Training (N, D) and test (M, D) features, float32."""
        if name not in self._features:
            encoder = self.encoders[name]
            self._features[name] = tuple(
                simclr.features(encoder, part, self.config, self.device)
                for part in (self.data.train, self.data.test)
            )
        return self._features[name]

    def score(self, logits: Tensor) -> float:
        return utils.accuracy(logits.argmax(1), self.data.test.labels)

    def knn(self) -> list[Column]:
        ten = Column("knn", f"kNN, k = {simclr.KNN_NEIGHBOURS}", {})
        weighted = Column("knn", "kNN, k = 200, weighted", {})
        labels, truth = self.data.train.labels, self.data.test.labels
        for name in self.encoders:
            similarity, rows = utils.nearest_neighbours(*self.features(name), KNN_WEIGHTED["k"])
            near, k = labels[rows], simclr.KNN_NEIGHBOURS
            votes = utils.knn_vote(similarity[:, :k], near[:, :k], self.classes)
            ten.scores[name] = [utils.accuracy(votes, truth)]
            votes = utils.knn_vote(similarity, near, self.classes, KNN_WEIGHTED["temperature"])
            weighted.scores[name] = [utils.accuracy(votes, truth)]
        return [ten, weighted]

    def linear(self) -> list[Column]:
        column = Column("linear", "linear", {})
        for name in self.encoders:
            x, x_test = self.features(name)
            with steps_bar(len(utils.L2_STRENGTHS), f"linear, {name}") as after_fit:
                fitted = utils.fit_linear_classifier(
                    x, self.data.train.labels, self.classes, after_fit=after_fit
                )
            column.scores[name], column.l2[name] = [self.score(fitted(x_test))], fitted.l2
            if name == "simclr":
                self.classifier = fitted
        return [column]

    def linear_augmented(self) -> list[Column]:
        column = Column("linear-augmented", f"linear, augmented{self.note}", {})
        for name in self.encoders:
            column.scores[name] = [self.score(self.fit_on_augmented(name)(self.features(name)[1]))]
        return [column]

    def fit_on_augmented(self, name: str) -> Callable[[Tensor], Tensor]:
        """A linear layer trained by SGD on frozen features of crops and flips.

        The loss is convex, so the learning rate is one over a bound of its curvature: half the
        largest eigenvalue of the features' covariance. Features are standardised by a first pass
        of crops. Returns features (B, D) -> logits (B, K).
        """
        n = len(self.data.train)
        how = LabelTraining(self.epochs or LINEAR_EPOCHS, LINEAR_BATCH, min_steps=0)
        steps, size = how.steps(n), how.batch(n)
        x = torch.cat([h for h, _ in self.augmented_features(name, size, n // size, stream=0)])
        mean, std = utils.standardization(x)
        x = (x - mean) / std
        curvature = torch.linalg.matrix_norm(x.mT @ x / len(x), ord=2).item() / 2
        batches = (
            ((h - mean) / std, labels)
            for h, labels in self.augmented_features(name, size, steps, stream=1)
        )
        layer = simclr.zero_classifier(x.shape[1], self.classes).to(self.device)
        with steps_bar(steps, f"linear, augmented, {name}") as after_step:
            simclr.train_on_labels(
                layer, batches, steps, 1 / max(curvature, 1e-6), how, "float32", after_step
            )
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

    def semi(self, amount: str, seeds: int) -> list[Column]:
        """Fine-tuned with few labels: the encoder and, from scratch, the untrained one.

        Beside them logistic regression on raw pixels. The head is thrown away, as in the paper.
        """
        n, wanted = len(self.label_rows(amount, 0)), parse_amount(amount)
        share = wanted if isinstance(wanted, float) else n / len(self.data.train)
        epochs = self.epochs or (MANY_EPOCHS if share >= MANY_LABELS else FEW_EPOCHS)
        how = LabelTraining(epochs)
        column = Column("semi", f"fine-tuned, {describe_amount(amount)} ({n:,}){self.note}", {})
        for name in ("pixels", "untrained", "simclr"):
            column.scores[name] = []
        for seed in range(seeds):
            rows = self.label_rows(amount, seed)
            x, x_test = utils.standardize(*self.features("pixels"))
            weight, bias = utils.fit_logistic_regression(
                x[rows], self.data.train.labels[rows], self.classes
            )
            column.scores["pixels"].append(self.score(x_test @ weight + bias))
            for name in ("untrained", "simclr"):
                start = self.untrained(seed) if name == "untrained" else self.encoders[name]
                augment = simclr.geometric_augment(self.config)
                title = f"fine-tuning, {amount}, {name}, seed {seed}"
                column.scores[name].append(self.fine_tuned(start, rows, augment, how, seed, title))
        return [column]

    def supervised(self, seeds: int) -> list[Column]:
        """All labels, crops, flips and colour, from scratch: what SimCLR does without."""
        how = dataclasses.replace(SUPERVISED, epochs=self.epochs or SUPERVISED.epochs)
        augment, rows = simclr.make_augment(self.config), torch.arange(len(self.data.train))
        scores = [
            self.fine_tuned(self.untrained(seed), rows, augment, how, seed, f"supervised {seed}")
            for seed in range(seeds)
        ]
        return [Column("supervised", f"supervised, all labels{self.note}", {"untrained": scores})]

    def fine_tuned(
        self, start: nn.Module, rows: Tensor, augment: simclr.Augment, how: LabelTraining,
        seed: int, title: str,
    ) -> float:  # fmt: skip
        """Test accuracy in [0, 1] of a copy of `start` trained on the labels of `rows`."""
        with steps_bar(how.steps(len(rows)), title) as after_step:
            network = simclr.fine_tune(
                start, self.data.train, rows, augment, how, self.config, self.device, seed,
                after_step,
            )  # fmt: skip
        return self.score(simclr.features(network, self.data.test, self.config, self.device))

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


def describe_amount(amount: str) -> str:
    wanted = parse_amount(amount)
    return f"{wanted} a class" if isinstance(wanted, int) else f"{100 * wanted:g} %"


@contextlib.contextmanager
def steps_bar(total: int, title: str) -> Iterator[Callable[[], Any]]:
    """A progress bar, on a terminal only. Yields what advances it by a step."""
    hidden = None if utils.is_main_process() else True
    with tqdm(total=total, desc=title, unit="step", leave=False, disable=hidden) as bar:
        yield bar.update


def evaluate(
    source: Source,
    evaluation: Evaluation,
    options: Options,
    after_task: Callable[[dict], None] = lambda _: None,
) -> dict:
    """Run the tasks. Returns the columns that were measured and the seconds of each task.

    after_task: is given them after each task, so that a long evaluation can be kept as it grows.
    Raises RuntimeError if an evaluation changed the encoder, which would make it void.
    """
    results: dict[str, Any] = {"columns": [], "seconds": {}}
    judged = nn.ModuleList(m for m in (source.encoder, source.projector) if m is not None)
    for task in (name for name in TASKS if name in options.tasks):
        started = time.perf_counter()
        with utils.frozen(judged):
            if task == "knn":
                columns = evaluation.knn()
            elif task == "linear":
                columns = evaluation.linear()
            elif task == "linear-augmented":
                columns = evaluation.linear_augmented()
            elif task == "semi":
                columns = [c for a in options.labels for c in evaluation.semi(a, options.seeds)]
            else:
                columns = evaluation.supervised(options.seeds)
        results["columns"] += [dataclasses.asdict(column) for column in columns]
        results["seconds"][task] = round(time.perf_counter() - started, 2)
        after_task(results)
        print(f"{task:20} {results['seconds'][task]:8.1f} s", flush=True)
    return results


def evaluation_setup(source: Source, options: Options, device: torch.device) -> tuple[Config, Data]:
    """The configuration and the data that `source` is to be evaluated with.

    Raises InputError if the data cannot be had or have no labels, or do not suit the encoder.
    """
    own_folder = source.config is not None and source.config.dataset == "folder"
    if options.dataset == "folder" and not options.data_dir and not own_folder:
        raise InputError("--dataset folder needs --data-dir, the folder of the images")
    if source.config is not None:
        config = source.config
        if options.dataset and options.dataset != config.dataset:
            config = dataclasses.replace(config, dataset=options.dataset, data_dir="data")
    else:
        if not options.dataset:
            raise InputError(f"{source.file} does not say what to evaluate it on: give --dataset")
        got = source.imported
        config = simclr.make_config(
            dataset=options.dataset, arch=got.arch, width=got.width, stem=got.stem, run=source.name
        )
    config = dataclasses.replace(
        config,
        data_dir=options.data_dir or config.data_dir,
        image_size=options.image_size or config.image_size,
        view_size=0,  # a setting of pre-training
        workers=options.workers,
    )
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


def is_transfer(source: Source, config: Config) -> bool:
    """Whether the data are others than those of the run."""
    own = source.config
    if own is None:
        return False
    elsewhere = config.dataset == "folder" and config.data_dir != own.data_dir
    return config.dataset != own.dataset or elsewhere


def choose_precision(source: Source, options: Options, device: torch.device) -> str:
    """As in training, where the hardware has it."""
    if options.precision != "auto":
        return options.precision
    trained = source.config.precision if source.config else "float32"
    return trained if utils.has_fast_bfloat16(device) else "float32"


IMAGENET_STEM_SIZE = 32  # px: from here the ImageNet stem and its four stages leave a pixel


def check_size(source: Source, size: int) -> None:
    """Raise InputError if images of `size` px do not suit the encoder's stem."""
    as_trained = source.config is not None and size == source.config.image_size
    if source.plain.conv1.stride[0] == 2 and size < IMAGENET_STEM_SIZE and not as_trained:
        raise InputError(
            f"images of {size} px are too small for the encoder's ImageNet stem; choose "
            f"--image-size {IMAGENET_STEM_SIZE} or more"
        )


def names_of(source: Source) -> dict[str, str]:
    """What the rows of the table are called."""
    if source.config is not None:
        return REPRESENTATIONS
    return {**REPRESENTATIONS, "simclr": "pre-trained encoder"}


def table(columns: Sequence[dict], names: dict[str, str], width: int = 100) -> str:
    """The results for people: a row a representation, a column a measurement, in lines of width."""
    shown = [key for key in names if any(key in column["scores"] for column in columns)]
    labels = ["", *(names[key] for key in shown)]
    first = max(map(len, labels))
    blocks: list[list[str]] = []  # lines of text each, to which columns are added while they fit
    for column in columns:
        cells = [column["title"], *(percent(column["scores"].get(key)) for key in shown)]
        wide = max(map(len, cells)) + 3
        if not blocks or len(blocks[-1][0]) + wide > width:
            blocks.append([f"{label:{first}}" for label in labels])
        blocks[-1] = [
            line + f"{cell:>{wide}}" for line, cell in zip(blocks[-1], cells, strict=True)
        ]
    return "\n\n".join("\n".join(block) for block in blocks)


def percent(scores: Sequence[float] | None) -> str:
    """Accuracies in [0, 1], one a seed, as mean ± standard deviation."""
    if not scores:
        return "–"
    mean = f"{100 * statistics.fmean(scores):.1f}"
    spread = f" ± {100 * statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    return f"{mean}{spread} %"


def margins(columns: Sequence[dict]) -> list[str]:
    """For each label set, by how much fine-tuning beats training from scratch."""
    lines = []
    for column in columns:
        if column["task"] == "semi":
            scores = column["scores"]
            gain = statistics.fmean(scores["simclr"]) - statistics.fmean(scores["untrained"])
            verb = "beats" if gain > 0 else "does not beat"
            lines.append(
                f"{column['title']}: pre-training {verb} training from scratch by "
                f"{abs(100 * gain):.1f} points"
            )
    return lines


def predict(evaluation: Evaluation) -> tuple[Tensor, Tensor]:
    """The linear classifier's classes int64 (M,) and confidences (M,) of the test images."""
    probability = evaluation.classifier(evaluation.features("simclr")[1]).softmax(1)
    confidence, predicted = probability.max(1)
    return predicted, confidence


def confusion_matrix(truth: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """int64 (K, K): how often class i (row) was called j (column)."""
    return torch.bincount(truth * classes + predicted, minlength=classes**2).view(classes, classes)


def most_confident_mistakes(truth: Tensor, predicted: Tensor, confidence: Tensor) -> list[int]:
    """Indices of the wrong predictions, the most confident first."""
    wrong = torch.where(predicted != truth, confidence, -1.0)
    order = wrong.argsort(descending=True, stable=True)
    return order[: int((predicted != truth).sum())].tolist()


def write_predictions(
    file: Path, names: Sequence[str], predicted: Sequence[str], confidence: Sequence[float],
    truth: Sequence[str] | None = None,
) -> None:  # fmt: skip
    """A CSV file: image, true class (if known), predicted class, confidence in [0, 1]."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    head = ["image", "true", "predicted", "confidence"]
    columns = [names, truth, predicted, [f"{value:.6f}" for value in confidence]]
    kept = [(h, c) for h, c in zip(head, columns, strict=True) if c is not None]
    writer.writerow([h for h, _ in kept])
    writer.writerows(zip(*(c for _, c in kept), strict=True))
    utils.write_atomically(file, text.getvalue().encode("utf-8", "surrogateescape"))


# ------------------------------------------------------------------------------------------ figure

MARKERS = {"pixels": "s", "untrained": "^", "simclr": "o", "projection": "D"}
TILES = 12  # mistakes that are shown
MANY_CLASSES = 20  # from here a confusion matrix has no numbers and no names


def draw_evaluation(
    columns: Sequence[dict],
    names: dict[str, str],
    confusion: Sequence[Sequence[int]] | None = None,
    classes: Sequence[str] = (),
    mistakes: Sequence[tuple[np.ndarray, str]] | None = None,
) -> Any:
    """The results as a matplotlib Figure: accuracies, confusion matrix, the worst mistakes.

    columns: as in evaluation.json. confusion: (K, K) counts, rows are true classes. mistakes:
    images uint8 (H, W, 3) with what to write above them; None if they were not looked for.
    """
    from matplotlib.figure import Figure

    height = 1.4 + 0.42 * len(columns)
    lower = 4.6 if confusion is not None else 0
    figure = Figure(figsize=(9.5, height + lower), layout="constrained")
    if confusion is None:
        draw_accuracies(figure.subplots(), columns, names)
        return figure
    upper_part, lower_part = figure.subfigures(2, 1, height_ratios=[height, lower])
    draw_accuracies(upper_part.subplots(), columns, names)
    left, right = lower_part.subfigures(1, 2, width_ratios=[1.15, 1])
    draw_confusion(left.subplots(), np.asarray(confusion), classes)
    if mistakes is None:
        return figure
    right.suptitle("Most confident mistakes" if mistakes else "No mistakes", fontsize=10)
    for axis, tile in itertools.zip_longest(right.subplots(3, TILES // 3).flat, mistakes[:TILES]):
        axis.axis("off")
        if tile is not None:
            axis.imshow(tile[0], interpolation="nearest")
            axis.set_title(tile[1], fontsize=7)
    return figure


def draw_accuracies(axis: Any, columns: Sequence[dict], names: dict[str, str]) -> None:
    """A line a measurement, a mark a representation, with the spread over the seeds."""
    present = [key for key in names if any(key in c["scores"] for c in columns)]
    for i, key in enumerate(present):
        rows = [(y, c["scores"][key]) for y, c in enumerate(columns) if key in c["scores"]]
        means = [100 * statistics.fmean(scores) for _, scores in rows]
        spreads = [100 * statistics.stdev(s) if len(s) > 1 else 0 for _, s in rows]
        bars = spreads if any(spreads) else None
        offset = 0.1 * (i - (len(present) - 1) / 2)  # so that equal marks do not hide each other
        solid = key == "simclr"
        axis.errorbar(
            means, [y + offset for y, _ in rows], xerr=bars, fmt=MARKERS[key], color=f"C{i}",
            mfc=f"C{i}" if solid else "white", markersize=7 if solid else 6, capsize=3,
            label=names[key], zorder=3 if solid else 2,
        )  # fmt: skip
    axis.set_yticks(range(len(columns)), [column["title"] for column in columns])
    axis.set_ylim(len(columns) - 0.5, -0.5)
    axis.set_xlabel("accuracy on the test images, % (bars: standard deviation over seeds)")
    axis.grid(axis="x", color="0.9")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)


def draw_confusion(axis: Any, counts: np.ndarray, classes: Sequence[str]) -> None:
    """Shares of each true class, with the counts written in if they can be read."""
    share = counts / counts.sum(1, keepdims=True).clip(min=1)
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axis.set_title("Linear classifier on h: images of each class (row)", fontsize=10)
    axis.set(xlabel="predicted class", ylabel="true class")
    if len(classes) > MANY_CLASSES:
        return
    short = [drawable(name, 14) for name in classes]
    rotation = 0 if max(len(name) for name in short) <= 2 else 60
    alignment = dict(ha="right", rotation_mode="anchor") if rotation else {}
    axis.set_xticks(range(len(short)), short, rotation=rotation, fontsize=8, **alignment)
    axis.set_yticks(range(len(short)), short, fontsize=8)
    for (i, j), count in np.ndenumerate(counts):
        if count:
            color = "white" if share[i, j] > 0.5 else "black"
            axis.text(j, i, str(count), ha="center", va="center", fontsize=7, color=color)


def printable(name: str) -> str:
    """A name that any terminal and font takes: what is no valid Unicode is escaped."""
    return name.encode("utf-8", "backslashreplace").decode()


def drawable(name: str, length: int) -> str:
    """A class's name for a figure: short, and without mathematics."""
    name = printable(name)
    return (name if len(name) <= length else name[: length - 1] + "…").replace("$", r"\$")


def mistake_tiles(evaluation: Evaluation) -> list[tuple[np.ndarray, str]]:
    """The most confident mistakes on the test split: uint8 (S, S, 3), "true → predicted, 99 %"."""
    data, classes = evaluation.data.test, evaluation.data.test.classes
    predicted, confidence = predict(evaluation)
    chosen = most_confident_mistakes(data.labels, predicted, confidence)[:TILES]
    tiles = []
    for index in chosen:
        image = data.image(index)[None]
        view = utils.to_uint8(utils.center_view(image, evaluation.config.image_size))[0]
        true, wrong = (drawable(classes[int(x[index])], 12) for x in (data.labels, predicted))
        title = f"{true} → {wrong}\n{100 * confidence[index]:.0f} %"
        tiles.append((view.permute(1, 2, 0).cpu().numpy(), title))
    return tiles


# -------------------------------------------------------------------------------------- new images


def embed_folder(
    source: Source, folder: Path, size: int, device: torch.device, precision: str, workers: int
) -> tuple[list[str], Tensor, dict[str, str]]:
    """h of every image below a folder, streamed from disk.

    Returns the paths relative to the folder, float32 (N, D) in their order, and for each file that
    could not be read the reason. Raises InputError if there is no image that can be read.
    """
    paths = utils.list_images(folder)
    if not paths:
        raise InputError(f"no images in {folder}")
    files = ImageFiles(folder, np.array([os.fsencode(path) for path in paths]), max_bad=1.0)
    encoder = source.encoder.to(device, memory_format=torch.channels_last)
    with utils.frozen(encoder):
        h = utils.embed(encoder, files, size, device, precision, EMBED_BATCH, workers, str(folder))
    if not h.isfinite().all():
        raise InputError(f"{source.file}: the encoder computes values that are not finite")
    bad = {paths[index]: reason for index, reason in files.unreadable.items()}
    return [path for path in paths if path not in bad], h, bad


EMBED_BATCH = 128  # images of up to 224 px in float32: 77 MB


def use_on_new_images(source: Source, options: Options, device: torch.device) -> None:
    """--embed and --classify: writes the .npz and the .csv."""
    check_targets(options.out)
    precision = choose_precision(source, options, device)
    workers = utils.worker_count(options.workers)
    size = options.image_size or (source.config.image_size if source.config else 0)
    classifier = classes = None
    if options.classify:
        config, data = evaluation_setup(source, options, device)
        evaluation = Evaluation(source, config, data, device)
        evaluation.encoders = {"simclr": evaluation.encoders["simclr"]}
        with utils.frozen(source.encoder):
            evaluation.linear()
        classifier, classes, size = evaluation.classifier, data.train.classes, config.image_size
    if not size:
        size = simclr.STREAMED_SIZE if source.plain.conv1.stride[0] == 2 else IMAGENET_STEM_SIZE
    check_size(source, size)

    for folder in dict.fromkeys(f for f in (options.embed, options.classify) if f):
        paths, h, bad = embed_folder(source, Path(folder), size, device, precision, workers)
        if folder == options.embed:
            out = Path(options.out or source.beside("features.npz"))
            buffer = io.BytesIO()
            np.savez(buffer, paths=np.array(paths), h=h.cpu().numpy())
            utils.write_atomically(out, buffer.getbuffer())
            print(f"{len(paths):,} images, h of {h.shape[1]} dimensions each: {out}")
        if folder == options.classify:
            out = Path(options.out or source.beside("classified.csv"))
            confidence, predicted = classifier(h).softmax(1).max(1)
            names = [classes[i] for i in predicted.tolist()]
            write_predictions(out, paths, names, confidence.tolist())
            print(f"{len(paths):,} images classified: {out}")
        if bad:
            print(f"{len(bad):,} of {len(bad) + len(paths):,} images could not be read:")
            for reason in bad.values():
                print(f"  {utils.one_line(reason, 500)}")


# -------------------------------------------------------------------------------- the command line


def run_evaluation(source: Source, options: Options, device: torch.device) -> dict:
    """Evaluate, print the table, write evaluation.json, the figure and the predictions."""
    config, data = evaluation_setup(source, options, device)
    suffix = f"-{config.dataset}" if is_transfer(source, config) else ""
    figure_file = Path(options.figures) / source.name / f"evaluation{suffix}.png"
    result_file = source.beside(f"evaluation{suffix}.json")
    evaluation = Evaluation(source, config, data, device, options.epochs)
    for amount in options.labels if "semi" in options.tasks else ():
        evaluation.label_rows(amount, 0)  # too many labels are an error now, not after an hour
    check_targets(result_file, figure_file, options.predictions)
    print(
        f"{source.file}: {source.description}\nevaluated on {config.dataset}: "
        f"{len(data.train):,} training and {len(data.test):,} test images of "
        f"{len(data.train.classes)} classes, {config.image_size} px, on {device} in "
        f"{config.precision}\n"
    )
    header = {
        "checkpoint": str(source.file),
        "sha256": hashlib.sha256(source.file.read_bytes()).hexdigest(),
        "normalize": source.normalize,
        "dataset": config.dataset,
        "data_dir": config.data_dir,
        "image_size": config.image_size,
        "precision": config.precision,
        "train_images": len(data.train),
        "test_images": len(data.test),
        "classes": list(data.train.classes),
    }
    before = earlier(result_file, header)

    def keep(measured: dict) -> None:
        utils.write_json(result_file, {**header, **merge(before, measured)})

    results = {**header, **merge(before, evaluate(source, evaluation, options, keep))}
    tiles = None
    if evaluation.classifier is not None:
        predicted, confidence = predict(evaluation)
        truth = data.test.labels
        counts = confusion_matrix(truth, predicted, evaluation.classes)
        results["confusion"] = counts.tolist()
        tiles = mistake_tiles(evaluation)
    utils.write_json(result_file, results)
    if options.predictions:
        class_names = [[data.train.classes[i] for i in x.tolist()] for x in (predicted, truth)]
        write_predictions(
            Path(options.predictions), utils.image_names(data.test), class_names[0],
            confidence.tolist(), class_names[1],
        )  # fmt: skip
    names, shown = names_of(source), results.get("confusion")
    figure = draw_evaluation(results["columns"], names, shown, data.train.classes, tiles)
    utils.save_figure(figure, figure_file)

    print("\n" + table(results["columns"], names))
    print("".join(f"\n{line}" for line in margins(results["columns"])))
    print(f"results       {result_file}\nfigure        {figure_file}")
    if options.predictions:
        print(f"predictions   {options.predictions}")
    return results


def check_targets(*files: str | Path) -> None:
    """Make the folders of files to be written, "" apart. What cannot be written is an error now."""
    wanted = [Path(file) for file in files if file]
    for file in wanted:
        if os.path.exists(file) and not os.path.isfile(file):
            raise InputError(f"cannot write {file}: it is a folder, or no file")
    utils.make_folders(*(file.absolute().parent for file in wanted))


def earlier(file: Path, header: dict) -> dict:
    """What an earlier call measured of the same checkpoint on the same data; {} if nothing."""
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        same = all(before[key] == value for key, value in header.items())
        columns = [c for c in before["columns"] if set(Column.__annotations__) <= set(c)]
        return {**before, "columns": columns} if same else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def merge(before: dict, now: dict) -> dict:
    """The columns of both in the order of TASKS; where both have a title, the new one."""
    titles = {column["title"] for column in now["columns"]}
    columns = [c for c in before.get("columns", ()) if c["title"] not in titles] + now["columns"]
    order = list(TASKS)
    columns.sort(key=lambda column: order.index(column["task"]))
    seconds = {**before.get("seconds", {}), **now["seconds"]}
    kept = {"confusion": before["confusion"]} if "confusion" in before else {}
    return {**now, "columns": columns, "seconds": seconds, **kept}


def parse_command_line(argv: Sequence[str] | None = None) -> tuple[str, Options]:
    """Which run or file, and the options."""
    parser = utils.OneLineParser(
        prog="load_simCLR.py",
        usage="python load_simCLR.py [RUN|FILE] [--tasks TASK ...] [--flag value ...]",
        description=__doc__,
        epilog="tasks:\n" + "\n".join(f"  {name:17} {text}" for name, text in TASKS.items()),
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
    if utils.rank_info().size > 1 and (training := set(options.tasks) - {"knn", "linear"}):
        raise InputError(
            f"--tasks {' '.join(sorted(training))}: they train in one process; without torchrun"
        )
    with utils.process_group(device):
        return run_on(where, options, device)


def run_on(where: str, options: Options, device: torch.device) -> dict | None:
    """run() on a device, in one process or in several that share the embedding."""
    source = load_source(simclr.find_checkpoint(where, options.checkpoints), options.normalize)
    if options.export:
        how = export_encoder(source, Path(options.export))
        print(f"{source.description}\nexported to {options.export}; {how}")
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
