"""SimCLR: a simple framework for contrastive learning of visual representations, in PyTorch.

Chen, Kornblith, Norouzi and Hinton, ICML 2020, https://arxiv.org/abs/2002.05709.

    python simclr.py                                      # embedded digits, a minute on a laptop
    python simclr.py --dataset cifar10                    # ResNet-18, on a GPU
    python simclr.py --dataset folder --data-dir photos   # one's own images, labelled or not
    python simclr.py --show-views views.png               # see the augmentation before training
    torchrun --nproc_per_node=8 simclr.py --dataset cifar10    # on eight GPUs, the same result

The idea, and the notation of the paper, which the code keeps inside formulas:

    x      one of the N images of a batch
    t(x)   a random augmentation of it; every image gives two views, a batch 2N
    h      f(view), the encoder's output after average pooling: the representation, kept
    z      g(h), the projection head's output: what the loss sees, thrown away after training
    tau    the temperature of NT-Xent, the loss that asks of each view: which of the other
           2N - 1 is the second view of the same image? (Eq. 1)

Reading order, which is the paper's: configuration · augmentation (Section 3) · encoder and
projection head (Section 4) · NT-Xent (Section 2.1) · optimiser and schedule (Section 2.2) ·
training, Algorithm 1 · what was learned · the command line. The first half, up to the end of
train_epoch(), is the paper; the second keeps runs safe, judges and draws them. Data sets, files
and classifiers are in utils.py.

A run keeps everything in checkpoints/<run>/ and draws figures/<run>/loss_plot.png. The same
command again continues an interrupted run, killed ones too, and on the CPU, with as many threads,
ends bit for bit as if it had not been interrupted: all randomness derives from (seed, epoch, step).
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import itertools
import json
import math
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

import utils
from utils import Images, ImageSet, InputError, flag, setting

# --------------------------------------------------------------------------------- configuration


@dataclass
class Config:
    """One run: the command line, the checkpoint's record and the functions' argument in one.

    The defaults are the paper's for ImageNet, but for the batch size (4096 there) and the blur
    (p = 0.5 there, none for CIFAR-10). A recipe (RECIPES) overrides some for a data set, and flags
    override the recipe; make_config() does that and checks.
    """

    recipe: str = setting("", "named settings (default: the one for the data set)")
    # data
    dataset: str = setting("digits", "what to pre-train on", utils.DATASETS)
    data_dir: str = setting(
        "data", "where data sets are kept and downloaded to; with 'folder' your images",
        identity=False,
    )  # fmt: skip
    image_size: int = setting(
        0, "side in px that the encoder sees; 0: the images' own, or 224 if they vary"
    )
    view_size: int = setting(
        0, "side in px of the views in pre-training; 0: image_size. Smaller ones are faster, and "
        "enlarge objects less, as test images do not (Touvron et al. 2019, arXiv 1906.06423)"
    )  # fmt: skip
    # augmentation (Section 3 and Appendix A)
    crop_min: float = setting(0.08, "smallest area of a random crop, as a share of the image")
    flip: float = setting(0.5, "probability of a horizontal flip")
    rotation: float = setting(0.0, "largest random rotation, in degrees")
    jitter_p: float = setting(0.8, "probability of colour jitter")
    color_strength: float = setting(1.0, "s: multiplies the four strengths below")
    brightness: float = setting(0.8, "strength of brightness jitter at s = 1")
    contrast: float = setting(0.8, "strength of contrast jitter at s = 1")
    saturation: float = setting(0.8, "strength of saturation jitter at s = 1")
    hue: float = setting(0.2, "strength of hue jitter at s = 1, in turns of the colour circle")
    gray_p: float = setting(0.2, "probability of dropping the colour")
    blur_p: float = setting(0.0, "probability of Gaussian blur, sigma 0.1 to 2 px")
    # model (Section 4)
    arch: str = setting(
        "resnet50",
        "encoder",
        ("resnet10", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    )
    width: float = setting(1.0, "multiplies the encoder's channels (the paper's 1x, 2x, 4x)")
    stem: str = setting(
        "auto", "small: 3x3 without max-pool, for images up to 64 px; imagenet: 7x7 and max-pool",
        ("auto", "small", "imagenet"),
    )  # fmt: skip
    projection: str = setting("nonlinear", "projection head g", ("nonlinear", "linear", "none"))
    head_hidden: int = setting(0, "width of the head's hidden layer; 0: as wide as h")
    head_dim: int = setting(128, "width of z")
    head_bn: bool = setting(False, "BatchNorm in the head's hidden layer")
    # loss and optimiser (Section 2)
    temperature: float = setting(0.1, "tau of NT-Xent")
    batch_size: int = setting(
        256, "N, images per step of all processes together; each gives two views"
    )
    micro_batch: int = setting(
        0, "images, of all processes, whose activations are held at a time; BatchNorm sees these; "
        "0: the whole batch"
    )  # fmt: skip
    epochs: int = setting(100, "passes over the data")
    optimizer: str = setting("lars", "update rule", ("lars", "sgd", "adamw"))
    lr: float = setting(0.3, "learning rate before scaling with the batch size")
    lr_scaling: str = setting(
        "linear", "peak rate: lr*N/256, lr*sqrt(N), or lr itself", ("linear", "sqrt", "none")
    )
    warmup_epochs: float = setting(10.0, "epochs of linear warm-up before the cosine decay")
    momentum: float = setting(0.9, "momentum of LARS and SGD")
    weight_decay: float = setting(1e-6, "weight decay")
    decay_all: bool = setting(False, "decay biases and BatchNorm as well")
    # the run
    seed: int = setting(0, "seed of everything random")
    precision: str = setting(
        "auto", "auto: bfloat16 where the hardware has it", ("auto", "bfloat16", "float32")
    )
    compile: str = setting(
        "auto", "torch.compile the network; auto: on CUDA, in runs long enough to pay for it",
        ("auto", "on", "off"), identity=False,
    )  # fmt: skip
    knn_every: int = setting(10, "epochs between measurements of kNN accuracy; 0: only at the end")
    stop_at_knn: float = setting(
        0.0, "kNN accuracy in [0, 1], on the test images, at which the run ends early; 0: none"
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps", identity=False)
    workers: int = setting(
        -1, "processes that decode streamed images; -1: one per core", identity=False
    )
    max_bad: float = setting(
        0.01, "share of the streamed images that may be unreadable, and are replaced by others",
        identity=False,
    )  # fmt: skip
    cache: str = setting(
        "none", "decode each streamed training image once and keep it, in /dev/shm or on the disk "
        "($XDG_CACHE_HOME); large JPEGs are then decoded in full, so views differ a little",
        utils.CACHES,
    )  # fmt: skip
    changed_files: bool = setting(
        False, "continue a run although files were added, removed or renamed", identity=False
    )
    save_every: int = setting(1, "epochs between checkpoints", identity=False)
    checkpoint_minutes: float = setting(
        10.0, "minutes after the last checkpoint that one is saved inside an epoch; 0: never",
        identity=False,
    )  # fmt: skip
    keep_every: int = setting(
        0, "epochs between checkpoints that are kept, as epoch0010.pt, beside the last; 0: none",
        identity=False,
    )  # fmt: skip
    run: str = setting("", "name of the run (default: <dataset>_<arch>)", identity=False)
    checkpoints: str = setting("checkpoints", "folder of all runs' checkpoints", identity=False)
    figures: str = setting("figures", "folder of all runs' figures", identity=False)

    @property
    def view_side(self) -> int:
        """Side in px of the views that are trained on; of a resolved configuration."""
        return self.view_size or self.image_size

    @property
    def folder(self) -> Path:
        """Where the run keeps its checkpoint, log and summary."""
        return Path(self.checkpoints) / self.run

    @property
    def figure_folder(self) -> Path:
        return Path(self.figures) / self.run


# Overrides of Config's defaults. The sources are in the comments; --recipe NAME chooses one.
RECIPES: dict[str, dict[str, Any]] = {
    # 1,437 scans of digits: no flip (another glyph), no hue or grey (they have no colour)
    "digits": dict(
        arch="resnet10", width=0.25, batch_size=256, epochs=90, temperature=0.3,
        crop_min=0.1, flip=0.0, rotation=15.0, color_strength=0.5, saturation=0.0, hue=0.0,
        gray_p=0.0, optimizer="adamw", lr=4e-3, lr_scaling="none", warmup_epochs=5.0,
        weight_decay=1e-4,
    ),
    # the strongest public recipe for CIFAR-10 with a ResNet-18 (dkobak/simclr-cifar10)
    "cifar10": dict(
        arch="resnet18", batch_size=512, epochs=1000, temperature=0.5, crop_min=0.2,
        color_strength=0.5, gray_p=0.1, optimizer="sgd", lr=0.03, warmup_epochs=0.0,
        weight_decay=5e-4, decay_all=True, head_hidden=1024,
    ),
    # much accuracy in little time, by smaller views; tuned with a small network on a CPU (README)
    "cifar10-fast": dict(
        arch="resnet18", batch_size=256, epochs=200, view_size=20, temperature=0.2, crop_min=0.2,
        color_strength=0.5, gray_p=0.1, optimizer="sgd", lr=0.24, warmup_epochs=20.0,
        weight_decay=5e-4, decay_all=True, head_hidden=1024,
    ),
    # the paper's own (Appendix B.9): 94.0 % with a linear classifier
    "cifar10-paper": dict(
        arch="resnet50", batch_size=1024, epochs=1000, temperature=0.5, color_strength=0.5, lr=1.0
    ),
    # 96 px: the paper's augmentation with blur, the optimiser of the CIFAR-10 recipe
    "stl10": dict(
        arch="resnet18", batch_size=512, epochs=200, temperature=0.2, color_strength=1.0,
        crop_min=0.2, blur_p=0.5, optimizer="sgd", lr=0.06, weight_decay=5e-4, decay_all=True,
    ),
    # one's own images: a batch that one GPU holds at 224 px, the paper's augmentation
    "folder": dict(
        arch="resnet18", batch_size=256, epochs=200, temperature=0.2, blur_p=0.5, crop_min=0.2,
        optimizer="sgd", lr=0.06, weight_decay=1e-4, decay_all=True,
    ),
    # the paper's main setting (Section 2.2): batch 4096, LARS
    "imagenet-paper": dict(
        batch_size=4096, epochs=100, blur_p=0.5, image_size=224, head_hidden=2048
    ),
}  # fmt: skip
RECIPES["svhn"] = {**RECIPES["cifar10"], "flip": 0.0}  # house numbers: no flip, as for the digits

# what fits the other data sets of load_images()
DATASET_RECIPE = {name: name if name in RECIPES else "cifar10" for name in utils.DATASETS}


SHORT_WARMUP = 0.1  # a recipe's warm-up is cut to this share of a run that is made shorter


def make_config(**overrides: Any) -> Config:
    """Config of the recipe for the data set (or of recipe=…) with `overrides` on top, checked.

    Raises InputError naming the field, its range and the value.
    """
    dataset = overrides.get("dataset", "digits")
    if dataset not in utils.DATASETS:
        raise InputError(f"unknown data set {dataset!r}; there are {', '.join(utils.DATASETS)}")
    recipe = overrides.get("recipe") or DATASET_RECIPE[dataset]
    if recipe not in RECIPES:
        raise InputError(f"unknown recipe {recipe!r}; there are {', '.join(RECIPES)}")
    config = Config(**{**RECIPES[recipe], **overrides, "recipe": recipe})
    if "warmup_epochs" not in overrides:
        config.warmup_epochs = min(config.warmup_epochs, SHORT_WARMUP * config.epochs)
    config.run = config.run or f"{config.dataset}_{config.arch}"
    check_config(config)
    return config


def check_config(config: Config) -> None:
    """Raise InputError for the first field that is of another type or out of range."""
    if fault := utils.type_fault(config):
        raise InputError(fault)
    for field in dataclasses.fields(config):
        value, choices = getattr(config, field.name), field.metadata["choices"]
        if choices and value not in choices:
            text = utils.shown(value)
            raise InputError(f"{flag(field.name)} {text!r}: choose from {', '.join(choices)}")

    def need(holds: bool, name: str, range_text: str) -> None:
        if not holds:
            raise InputError(f"{flag(name)} must be {range_text}, got {getattr(config, name)}")

    for name in ("flip", "jitter_p", "gray_p", "blur_p"):
        need(0 <= getattr(config, name) <= 1, name, "a probability in [0, 1]")
    need(0 <= config.max_bad <= 1, "max_bad", "a share in [0, 1]")
    for name in ("color_strength", "brightness", "contrast", "saturation", "weight_decay"):
        need(getattr(config, name) >= 0, name, "0 or more")
    for name in ("warmup_epochs", "knn_every", "keep_every", "checkpoint_minutes", "seed"):
        need(getattr(config, name) >= 0, name, "0 or more")
    for name in ("image_size", "view_size"):
        side = getattr(config, name)
        need(side == 0 or MIN_SIZE <= side <= MAX_SIZE, name, f"0 or {MIN_SIZE} to {MAX_SIZE}")
    need(0 < config.crop_min <= 1, "crop_min", "in (0, 1]")
    need(0 <= config.rotation <= 180, "rotation", "in [0, 180] degrees")
    need(0 <= config.hue * config.color_strength <= 0.5, "hue", "0 to 0.5 turns after scaling by s")
    need(0 < config.width <= 16, "width", "in (0, 16]")
    need(1 <= config.head_dim <= MAX_HEAD, "head_dim", f"1 to {MAX_HEAD}")
    need(0 <= config.head_hidden <= MAX_HEAD, "head_hidden", f"0 to {MAX_HEAD}")
    need(config.temperature >= 1e-6, "temperature", "positive, 1e-6 or more")
    need(config.batch_size >= 2, "batch_size", "at least 2 (NT-Xent needs negatives)")
    need(config.micro_batch >= 0, "micro_batch", "0 or more")
    need(config.epochs >= 1, "epochs", "at least 1")
    need(0 < config.lr <= 1e30, "lr", "positive, at most 1e30")
    need(config.warmup_epochs <= config.epochs, "warmup_epochs", f"at most epochs={config.epochs}")
    need(0 <= config.momentum < 1, "momentum", "in [0, 1)")
    need(0 <= config.stop_at_knn <= 1, "stop_at_knn", "an accuracy in [0, 1]")
    need(config.knn_every > 0 or not config.stop_at_knn, "knn_every", "at least 1 to stop at a kNN")
    need(config.save_every >= 1, "save_every", "at least 1")
    need(config.workers >= -1, "workers", "-1 or more")
    parts = Path(config.run).parts
    plain = parts and not Path(config.run).is_absolute() and ".." not in parts
    need(bool(plain) and "\0" not in config.run, "run", "a plain name, below the folder of runs")
    short = all(len(os.fsencode(part)) <= MAX_NAME for part in parts)
    need(short, "run", f"a name of at most {MAX_NAME} bytes")


def resolve(config: Config, data: Images, device: torch.device) -> Config:
    """Replace what was left to be chosen (0, "auto") by what fits the data and the device."""
    config = dataclasses.replace(config)  # a copy
    if not config.image_size:
        held = isinstance(data, ImageSet)
        config.image_size = min(data.images.shape[-2:]) if held else STREAMED_SIZE
        if config.image_size < MIN_SIZE:
            raise InputError(
                f"the images are only {config.image_size} px; choose {flag('image_size')} "
                f"{MIN_SIZE} or more"
            )
    if config.view_size == config.image_size:
        config.view_size = 0
    if config.precision == "auto":
        config.precision = "bfloat16" if utils.has_fast_bfloat16(device) else "float32"
    if config.stem == "auto":
        config.stem = "small" if config.image_size <= SMALL_STEM_SIZE else "imagenet"
    alone = utils.world_size() == 1
    if config.compile == "auto":
        long = config.epochs * batch_count(config, len(data))[1] >= COMPILE_STEPS
        worth = device.type == "cuda" and long and alone and not config.micro_batch
        config.compile = "on" if worth else "off"
    if config.compile == "on" and not alone:
        raise InputError(f"{flag('compile')} on: not with several processes")
    if config.dataset == "folder":
        config.data_dir = str(Path(config.data_dir).resolve())
    return config


STREAMED_SIZE = 224  # px: what images of varying sizes are cropped to
COMPILE_STEPS = 5000  # of a run: compiling takes a minute, and saves milliseconds a step
SMALL_STEM_SIZE = 64  # px: up to here the 3x3 stem (Appendix B.9 has 32)
MIN_SIZE, MAX_SIZE = 8, 4096  # px
MAX_HEAD = 65_536  # width of the head's layers: more is a slip of the keyboard
MAX_NAME = 255  # bytes: what file systems take as the name of a folder

# What each stream of random numbers is for: utils.derive_seed(config.seed, PURPOSE, …)
WEIGHTS, SHUFFLE, VIEWS, LABELS = range(4)

# ---------------------------------------------------------------------------------- augmentation
#
# Each step is a pure function of images and of u, uniform numbers in [0, 1): one row an image,
# as many columns as the step declares in `draws`. So every image has its own parameters, nothing
# loops over images, nothing waits for the device, and whoever holds u can repeat the views.

RATIO = (3 / 4, 4 / 3)  # aspect ratios of crops, width : height
CROP_TRIES = 10  # as torchvision: crops that stick out are drawn again, at last the image is taken
BLUR_SIGMA = (0.1, 2.0)  # px
BLUR_KERNEL = 0.1  # kernel size as a share of the image's side
LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601, as torchvision
# bytes of float32 images that are augmented together: a CPU's cache, a small part of a GPU's memory
PIECE_BYTES = {"cpu": 2**21, "gpu": 2**28}


def lerp(low: float, high: float, u: Tensor) -> Tensor:
    """[0, 1) -> [low, high)."""
    return low + (high - low) * u


def per_image(values: Tensor) -> Tensor:
    """(N,) -> (N, 1, 1, 1), to multiply images with."""
    return values.view(-1, 1, 1, 1)


def where_chosen(chosen: Tensor, new: Tensor, images: Tensor) -> Tensor:
    """`new` for the images that are chosen, bool (N,), and `images` for the others, exactly.

    new: (N, 3 or 1, H, W). lerp with weights 0 and 1 is exact, and on a CPU several times as fast
    as torch.where with a mask.
    """
    return images.lerp(new, per_image(chosen).to(images.dtype))


class RandomResizedCrop:
    """A random part of the image, resized to a square (paper: area 8-100 %, aspect 3/4-4/3)."""

    draws = 2 * CROP_TRIES + 2

    def __init__(self, size: int, scale: tuple[float, float]) -> None:
        self.size, self.scale = size, scale

    def boxes(self, u: Tensor, height: int | Tensor, width: int | Tensor) -> Tensor:
        """Crop boxes int64 (N, 4): top, left, height, width, distributed as torchvision's.

        height, width: of all images, or of each (N,).
        """
        height, width = (  # float (N, 1)
            (x.to(u) if isinstance(x, Tensor) else u.new_full((len(u),), x))[:, None]
            for x in (height, width)
        )
        area = height * width * lerp(*self.scale, u[:, :CROP_TRIES])  # (N, tries)
        log_ratio = lerp(math.log(RATIO[0]), math.log(RATIO[1]), u[:, CROP_TRIES : 2 * CROP_TRIES])
        w = (area * log_ratio.exp()).sqrt().round()  # (N, tries)
        h = (area / log_ratio.exp()).sqrt().round()
        fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)

        # the last resort: the largest central box of an allowed aspect ratio
        w = torch.cat([w, torch.minimum(width, (height * RATIO[1]).round())], 1)  # (N, tries + 1)
        h = torch.cat([h, torch.minimum(height, (width / RATIO[0]).round())], 1)
        first = F.pad(fits, (0, 1), value=True).int().argmax(1, keepdim=True)  # (N, 1)
        w, h = w.gather(1, first), h.gather(1, first)  # (N, 1)

        top = torch.minimum((u[:, -2:-1] * (height - h + 1)).floor(), height - h)
        left = torch.minimum((u[:, -1:] * (width - w + 1)).floor(), width - w)
        central = first == CROP_TRIES
        top = torch.where(central, ((height - h) / 2).floor(), top)
        left = torch.where(central, ((width - w) / 2).floor(), left)
        return torch.cat([top, left, h, w], dim=1).long()

    def __call__(self, images: Tensor, u: Tensor) -> Tensor:
        return resized_crop(images, self.boxes(u, *images.shape[-2:]), self.size)


def resized_crop(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Crop each image to its box and resize it: float (N, C, H, W) -> (N, C, size, size).

    boxes: (N, 4) top, left, height, width in px. Equals torchvision's resized_crop (bilinear,
    antialiased). Resizing is linear and separable, so it is one matrix for the rows and one for
    the columns of each image, and a batch is two batched matrix products.
    """
    top, left, height, width = boxes.float().unbind(1)
    rows = interpolation_matrix(top, height, images.shape[-2], size)  # (N, size, H)
    columns = interpolation_matrix(left, width, images.shape[-1], size)  # (N, size, W)
    wide = images.flatten(1, 2) @ columns.mT  # (N, C·H, size)
    return rows[:, None] @ wide.unflatten(1, images.shape[1:3])  # (N, C, size, size)


def interpolation_matrix(start: Tensor, length: Tensor, pixels: int, size: int) -> Tensor:
    """Weights (N, size, pixels) that resize the range [start, start + length) to `size` px.

    Row i is a triangle around where output pixel i lies in the input: one input pixel wide when
    enlarging (bilinear), one output pixel wide when reducing (antialiased), cut off at the box
    and normalised.
    """
    steps = torch.arange(size, device=start.device) + 0.5
    inputs = torch.arange(pixels, device=start.device) + 0.5
    scale = (length / size)[:, None]  # (N, 1) input px per output px
    centre = start[:, None] + scale * steps  # (N, size)
    distance = (inputs - centre[..., None]).abs_().div_(scale.clamp(min=1)[..., None])
    inside = (inputs > start[:, None]) & (inputs < (start + length)[:, None])  # (N, pixels)
    weights = (1 - distance).clamp_(min=0).mul_(inside[:, None])  # (N, size, pixels)
    return weights.div_(weights.sum(-1, keepdim=True))


class RandomFlip:
    """Mirrors left and right with probability p."""

    draws = 1

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, images: Tensor, u: Tensor) -> Tensor:
        return where_chosen(u[:, 0] < self.p, images.flip(-1), images)


class RandomRotation:
    """Rotates by an angle from [-degrees, degrees]; what comes in from outside is black."""

    draws = 1

    def __init__(self, degrees: float) -> None:
        self.degrees = degrees

    def __call__(self, images: Tensor, u: Tensor) -> Tensor:
        return rotate(images, lerp(-self.degrees, self.degrees, u[:, 0]))


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Rotate (N, C, H, W) counter-clockwise about the centre, bilinear. degrees: (N,)."""
    angle = torch.deg2rad(degrees)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    ratio = images.shape[-2] / images.shape[-1]  # the grid's units are half sides
    matrix = torch.stack([cos, -sin * ratio, zero, sin / ratio, cos, zero], 1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


class ColorJitter:
    """Brightness, contrast and saturation in random order, then hue, each by a random factor.

    Hue has a random place in the order, too, where others jitter; it comes last here because its
    place changes next to nothing. A shift of the hue keeps the largest and the smallest channel of
    each pixel, so it commutes with brightness exactly (clamping apart), and with contrast and
    saturation up to the change of the pixel's luma. Being the dearest of the four, it is computed
    once for all images and not once for each place.
    """

    draws = 8  # coin, three factors, hue, three for the order

    def __init__(
        self, p: float, brightness: float, contrast: float, saturation: float, hue: float
    ) -> None:
        self.p, self.hue = p, hue
        self.strengths = (brightness, contrast, saturation)

    def __call__(self, images: Tensor, u: Tensor) -> Tensor:
        jittered = u[:, :1] < self.p  # (N, 1)
        factors = torch.stack(
            [lerp(max(0, 1 - s), 1 + s, u[:, 1 + i]) for i, s in enumerate(self.strengths)], 1
        )
        factors = torch.where(jittered, factors, 1.0)  # (N, 3); 1 changes nothing
        images = color_jitter(images, factors, order=u[:, 5:8].argsort(1))
        if self.hue:
            turns = torch.where(jittered[:, 0], lerp(-self.hue, self.hue, u[:, 4]), 0.0)  # (N,)
            images = adjust_hue(images, turns)
        return images


def color_jitter(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """torchvision's adjust_brightness, -contrast and -saturation in a given order.

    images: float (N, 3, H, W) in [0, 1]. factors: (N, 3), >= 0, of the three. order: int64 (N, 3),
    a permutation of 0 1 2 a row, in which the image gets them.

    All three blend the image with a grey one: out = f·x + (1 - f)·reference, clamped, where the
    reference is black, the image's mean luma, or each pixel's luma.
    """
    contrast, saturation = 1, 2
    for which in order.unbind(1):  # (N,)
        factor = factors.gather(1, which[:, None])[:, 0]  # (N,)
        reference = luma(images)  # (N, 1, H, W)
        mean = reference.mean((-3, -2, -1))  # (N,)
        reference *= per_image((1 - factor) * (which == saturation))
        reference += per_image((1 - factor) * (which == contrast) * mean)
        images = torch.addcmul(reference, images, per_image(factor)).clamp_(0, 1)
    return images


def luma(images: Tensor) -> Tensor:
    """Brightness as the eye weighs the colours: (N, 3, H, W) -> (N, 1, H, W)."""
    red, green, blue = images.split(1, dim=1)
    return (LUMA[0] * red).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def adjust_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Shift the hue of (N, 3, H, W) in [0, 1] by (N,) turns of the colour circle, through HSV.

    In HSV each channel is  min + (max - min)·clamp(|6·frac(hue + n/6) - 2| - 1, 0, 1)  with
    n = 5, 3, 1 for red, green, blue; saturation and value stay, so max and min do too.
    """
    red, green, blue = images.split(1, dim=1)  # (N, 1, H, W)
    high, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    chroma = high - low
    # Which channel is the largest decides the formula. A choice by lerp with weights 0 and 1 is
    # exact, and on a CPU ten times as fast as torch.where with a mask of pixels.
    red_is_not, green_is_not = (high - red).sign_(), (high - green).sign_()  # 0 or 1
    largest_is_red = green - blue
    largest_is_green = (blue - red).add_(chroma, alpha=2)
    largest_is_blue = (red - green).add_(chroma, alpha=4)
    sixths = largest_is_green.lerp_(largest_is_blue, green_is_not)
    sixths = largest_is_red.lerp_(sixths, red_is_not)
    hue = sixths.div_((6 * chroma).clamp_(min=1e-12)) + per_image(turns)  # (N, 1, H, W) in turns
    n = 5 - 2 * torch.arange(3, device=images.device).view(1, 3, 1, 1)
    k = hue + (n / 6 + 1)  # (N, 3, H, W), positive, so that frac() is what lies above the floor
    k = k.frac_().mul_(6).sub_(2).abs_().sub_(1).clamp_(0, 1)
    return torch.addcmul(low, chroma, k)


class RandomGrayscale:
    """Drops the colour with probability p."""

    draws = 1

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, images: Tensor, u: Tensor) -> Tensor:
        return where_chosen(u[:, 0] < self.p, luma(images), images)


class RandomBlur:
    """Gaussian blur with probability p; sigma 0.1 to 2 px, kernel 10 % of the side (App. A)."""

    draws = 2

    def __init__(self, p: float, size: int) -> None:
        self.p = p
        self.kernel = max(3, 2 * round((BLUR_KERNEL * size - 1) / 2) + 1)  # odd

    def __call__(self, images: Tensor, u: Tensor) -> Tensor:
        blurred = gaussian_blur(images, lerp(*BLUR_SIGMA, u[:, 1]), self.kernel)
        return where_chosen(u[:, 0] < self.p, blurred, images)


def gaussian_blur(images: Tensor, sigma: Tensor, kernel: int) -> Tensor:
    """Blur (N, C, H, W) with sigma (N,) px, mirrored at the edges as torchvision's gaussian_blur.

    kernel: odd, at most 2·min(H, W) - 1. Blurring is linear and separable: a matrix for the rows
    and one for the columns of each image.
    """
    offset = torch.arange(kernel, device=images.device) - kernel // 2
    weights = (-0.5 * (offset / sigma[:, None]).square()).exp()  # (N, kernel)
    weights = weights / weights.sum(1, keepdim=True)

    def matrix(pixels: int) -> Tensor:
        source = torch.arange(pixels, device=images.device)[:, None] + offset  # (pixels, kernel)
        source = (pixels - 1) - ((pixels - 1) - source.abs()).abs()  # mirrored, edge not repeated
        taps = F.one_hot(source, pixels).float()  # (pixels, kernel, pixels)
        return torch.einsum("nk,ikj->nij", weights, taps)  # (N, pixels, pixels)

    rows, columns = matrix(images.shape[-2]), matrix(images.shape[-1])
    return rows[:, None] @ images @ columns[:, None].mT


class Augment:
    """The random augmentation t: a list of steps (Section 3), each image with its own parameters.

    `augment(images)` -> float32 (N, 3, size, size) in [0, 1], on the images' device.
    images: uint8 (N, 3, H, W), or float in [0, 1].
    u: float (N, augment.draws) in [0, 1), the randomness; by default it is drawn.
    first: the step to start with (1 where the crop was made while decoding).
    """

    def __init__(self, size: int, steps: list[Any]) -> None:
        self.size, self.steps = size, steps

    @property
    def draws(self) -> int:
        """Random numbers an image needs."""
        return sum(step.draws for step in self.steps)

    def draw(
        self, n: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """The randomness of n views: float32 (n, draws), on the generator's device if given."""
        device = generator.device if generator is not None else device
        return torch.rand(n, self.draws, generator=generator, device=device)

    def __call__(self, images: Tensor, u: Tensor | None = None, first: int = 0) -> Tensor:
        if u is None:
            u = self.draw(len(images), device=images.device)
        limit = PIECE_BYTES["cpu" if images.device.type == "cpu" else "gpu"]
        piece = max(8, limit // (12 * self.size**2))
        out = torch.empty(len(images), 3, self.size, self.size, device=images.device)
        for x, v, result in zip(*(y.split(piece) for y in (images, u, out)), strict=True):
            torch.clamp(self._apply(x, v, first), 0, 1, out=result)
        return out

    def _apply(self, images: Tensor, u: Tensor, first: int) -> Tensor:
        images = images.float().div_(255) if images.dtype == torch.uint8 else images
        columns = u.split([step.draws for step in self.steps], dim=1)
        for step, v in zip(self.steps[first:], columns[first:], strict=True):
            images = step(images, v)
        return images


def make_augment(config: Config) -> Augment:
    """The augmentation that a (resolved) configuration describes."""
    size, s = config.view_side, config.color_strength
    jitter = [s * x for x in (config.brightness, config.contrast, config.saturation, config.hue)]
    steps: list[Any] = [RandomResizedCrop(size, (config.crop_min, 1.0))]
    if config.flip:
        steps.append(RandomFlip(config.flip))
    if config.rotation:
        steps.append(RandomRotation(config.rotation))
    if config.jitter_p and any(jitter):
        steps.append(ColorJitter(config.jitter_p, *jitter))
    if config.gray_p:
        steps.append(RandomGrayscale(config.gray_p))
    if config.blur_p:
        steps.append(RandomBlur(config.blur_p, size))
    return Augment(size, steps)


# -------------------------------------------------------------------- encoder and projection head

ARCHITECTURES: dict[str, tuple[type[BasicBlock | Bottleneck], tuple[int, ...]]] = {
    "resnet10": (BasicBlock, (1, 1, 1, 1)),
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}


class Encoder(torchvision.models.ResNet):
    """f: images (B, 3, S, S) -> h (B, feature_dim), after average pooling (Section 2.1).

    torchvision's ResNet without its last layer, so that at width 1 names, shapes and outputs are
    torchvision's. width multiplies every channel count (the paper's 2x and 4x). stem "small" is a
    3x3 convolution of stride 1 without max-pool, for small images (Appendix B.9).
    """

    def __init__(self, arch: str, width: float = 1.0, stem: str = "imagenet") -> None:
        block, layers = ARCHITECTURES[arch]
        self._width = width  # read by _make_layer, which the parent's constructor calls
        super().__init__(block, list(layers))
        channels = self._scaled(64)
        self.feature_dim = self.inplanes
        self.fc = nn.Identity()
        if stem == "small":
            self.conv1 = nn.Conv2d(3, channels, 3, stride=1, padding=1, bias=False)
            self.maxpool = nn.Identity()
        elif width != 1:
            self.conv1 = nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False)
        if width != 1:
            self.bn1 = nn.BatchNorm2d(channels)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")

    def _scaled(self, channels: int) -> int:
        return max(1, round(channels * self._width))

    def _make_layer(self, block, planes, blocks, stride=1, dilate=False):
        if planes == 64:  # the first stage: the stem's width is fixed at 64 in the parent
            self.inplanes = self._scaled(64)
        stage = super()._make_layer(block, self._scaled(planes), blocks, stride, dilate)
        shortcut = stage[0].downsample[0] if stride > 1 else None
        if shortcut is not None and shortcut.in_channels < CONV_BUG_CHANNELS:
            shortcut.stride = (1, 1)
            shortcut.register_forward_pre_hook(partial(subsample_input, stride))
        return stage


# channels: with fewer, the gradient of a 1x1 convolution of stride 2 writes outside of its memory
# on CPUs (torch 2.14, channels last, from 64 px on)
CONV_BUG_CHANNELS = 16


def subsample_input(stride: int, _: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """Every stride-th pixel of a module's input: what a 1x1 convolution of that stride sees."""
    return inputs[0][..., ::stride, ::stride]


class SimCLR(nn.Module):
    """Encoder f and projection head g: views (B, 3, S, S) -> h (B, feature_dim), z (B, D).

    After training only the encoder is kept; z is for the loss (Section 4.2: h is better by more
    than 10 points).
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        stem = config.stem
        if stem == "auto":
            stem = "small" if config.image_size <= SMALL_STEM_SIZE else "imagenet"
        self.encoder = Encoder(config.arch, config.width, stem)
        dim = self.encoder.feature_dim
        self.projector = make_projector(
            config.projection, dim, config.head_hidden or dim, config.head_dim, config.head_bn
        )

    def forward(self, views: Tensor) -> tuple[Tensor, Tensor]:
        h = self.encoder(views)
        return h, self.projector(h)


def make_projector(kind: str, dim: int, hidden: int, out: int, batch_norm: bool) -> nn.Module:
    """g: an MLP with one hidden layer (the paper's), a linear map, or nothing (Figure 8)."""
    if kind == "none":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(dim, out, bias=False)
    layers: list[nn.Module] = [nn.Linear(dim, hidden, bias=not batch_norm)]
    layers += [nn.BatchNorm1d(hidden)] if batch_norm else []
    return nn.Sequential(*layers, nn.ReLU(inplace=True), nn.Linear(hidden, out))


def make_model(config: Config) -> SimCLR:
    """A fresh model whose weights depend on config.seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(utils.derive_seed(config.seed, WEIGHTS))
        return SimCLR(config)


# --------------------------------------------------------------------------------------- NT-Xent

BLOCK_BYTES = 2**28  # of similarities held at a time: all of them up to 2N = 8,192 views in float32
HUGE = 1e15  # from here the sum of squares could overflow float32


def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """The normalised temperature-scaled cross entropy loss (Eq. 1), a scalar.

    z1, z2: (N, D), the projections of the two views of N >= 2 images, of any length: they are
    normalised here. The mean over all 2N views of -log softmax(cos / tau) at the partner, with the
    2N - 2 views of other images as negatives. Equal rows give ln(2N - 1). That is

        F.cross_entropy(*contrastive_logits(z1, z2, temperature))

    but with one (2N, 2N) matrix in memory instead of four, and blocks of its rows where it is
    large. Raises ValueError if the shapes differ or are not (N, D).
    """
    if z1.ndim != 2 or z1.shape != z2.shape:
        raise ValueError(f"need two (N, D) of one shape, got {(*z1.shape,)} and {(*z2.shape,)}")
    with full_precision(z1):
        return NTXent.apply(normalize_rows(torch.cat([z1, z2])), temperature)


def normalize_rows(z: Tensor) -> Tensor:
    """Rows (N, D) scaled to length 1, in at least float32; shorter than 1e-12: divided by that."""
    z = utils.at_least_float32(z)
    largest = z.detach().abs().amax(1, keepdim=True)  # (N, 1)
    return F.normalize(z / torch.where(largest > HUGE, largest, 1.0), dim=1)


def full_precision(z: Tensor) -> torch.autocast:
    """Inside, autocast does not make a product of z bfloat16: 3 digits are too few for a loss."""
    return torch.autocast(z.device.type, enabled=False)


def contrastive_logits(z1: Tensor, z2: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Cosine similarity of each view to every other, over tau: the logits of Eq. 1.

    z1, z2: (N, D), the two views; row i of both comes from image i. Returns logits float32
    (2N, 2N), -inf where a view meets itself, and int64 (2N,) the column of each view's partner.
    """
    with full_precision(z1):
        z = normalize_rows(torch.cat([z1, z2]))  # (2N, D)
        logits = z @ z.T / temperature  # (2N, 2N)
    logits.fill_diagonal_(float("-inf"))  # k != i
    partner = torch.arange(len(z), device=z.device).roll(len(z1))  # (2N,) the other view
    return logits, partner


def logit_blocks(z: Tensor, temperature: float) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """contrastive_logits() in blocks of R rows: which rows, logits (R, 2N), partners (R,).

    z: (2N, D) of length 1. The logits may be changed, and the next block takes their memory.
    """
    rows = min(len(z), max(1, BLOCK_BYTES // (len(z) * z.element_size())))
    memory = z.new_empty(rows, len(z))
    for start in range(0, len(z), rows):
        block = slice(start, min(start + rows, len(z)))
        here = torch.arange(block.start, block.stop, device=z.device)  # (R,)
        logits = torch.mm(z[block] / temperature, z.T, out=memory[: len(here)])  # (R, 2N)
        logits.scatter_(1, here[:, None], float("-inf"))  # k != i
        yield block, logits, (here + len(z) // 2) % len(z)


class NTXent(torch.autograd.Function):
    """NT-Xent of z (2N, D) of length 1, with its gradient computed on the way, block by block.

    With S = z zᵀ / tau, P the softmax of its rows and Y one-hot at the partners, the derivative
    by S is (P - Y) / 2N. S holds each z as a row and as a column, so the gradient by z is
    (G + Gᵀ) z / tau with G = (P - Y) / 2N. Computing it together with the loss lets each block of
    logits turn into P and G in its own memory. It can be differentiated once.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, temperature: float) -> Tensor:
        loss, gradient = z.new_zeros(()), torch.zeros_like(z)
        for block, logits, partner in logit_blocks(z, temperature):
            logits.sub_(logits.amax(1, keepdim=True))  # so that exp cannot overflow
            positive = logits.gather(1, partner[:, None])  # (R, 1)
            total = logits.exp_().sum(1, keepdim=True)  # (R, 1)
            loss += (total.log() - positive).sum()
            if ctx.needs_input_grad[0]:
                g = logits.div_(total)  # (R, 2N), P
                g.scatter_add_(1, partner[:, None], -torch.ones_like(total))  # P - Y
                gradient[block].addmm_(g, z)
                gradient.addmm_(g.T, z[block])
        ctx.save_for_backward(gradient / (len(z) * temperature))
        return loss / len(z)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors  # (2N, D)
        return outer * gradient, None


@torch.no_grad()
def contrastive_accuracy(z1: Tensor, z2: Tensor) -> Tensor:
    """Share of the 2N views whose nearest other view is their partner: scalar in [0, 1]."""
    with full_precision(z1):
        blocks = logit_blocks(normalize_rows(torch.cat([z1, z2])), temperature=1.0)
        hits = [(logits.argmax(1) == partner).sum() for _, logits, partner in blocks]
    return torch.stack(hits).sum() / (2 * len(z1))


@torch.no_grad()
def mean_cosine(z: Tensor) -> Tensor:
    """Over all pairs of the rows (2N, D): scalar in [-1, 1]. 1: they are all the same."""
    n = len(z)
    return (normalize_rows(z).sum(0).square().sum() - n) / (n * (n - 1))


# ------------------------------------------------------------------------ optimiser and schedule


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017), as the paper trains (Section 2.2).

    For each weight: g ← gradient + decay·w, v ← momentum·v + lr·(trust·‖w‖ / ‖g‖)·g, w ← w - v.
    A group with adapt=False (biases and BatchNorm, as in the paper) has the ratio 1; so has a
    weight whose norm or gradient is zero.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
        adapt: bool = True,
    ) -> None:
        defaults = dict(
            lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust, adapt=adapt
        )
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if weights:
                self._update(weights, group)

    def _update(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        """All weights of a group at once, with one launch a weight on a GPU instead of six."""
        for p in weights:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        velocities = [self.state[p]["momentum_buffer"] for p in weights]
        gradients = [p.grad for p in weights]
        if group["weight_decay"]:
            gradients = torch._foreach_add(gradients, weights, alpha=group["weight_decay"])
        if group["adapt"]:
            w_norms = torch.stack(torch._foreach_norm(weights))
            g_norms = torch.stack(torch._foreach_norm(gradients))
            usable = (w_norms > 0) & (g_norms > 0)
            ratios = torch.where(usable, group["trust"] * w_norms / g_norms, 1.0)
            gradients = torch._foreach_mul(gradients, list(ratios.unbind()))
        torch._foreach_mul_(velocities, group["momentum"])
        torch._foreach_add_(velocities, gradients, alpha=group["lr"])
        torch._foreach_sub_(weights, velocities)


def make_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """LARS, SGD or AdamW over two groups: weights, and biases and BatchNorm.

    The second group is not decayed (unless config.decay_all) and not adapted by LARS.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    weights, others = [p for p in params if p.ndim > 1], [p for p in params if p.ndim <= 1]
    decay = config.weight_decay
    groups = [
        {"params": weights, "weight_decay": decay},
        {"params": others, "weight_decay": decay if config.decay_all else 0.0},
    ]
    if config.optimizer == "lars":
        groups[1]["adapt"] = False
        return LARS(groups, lr=config.lr, momentum=config.momentum)
    fused = True if params[0].is_cuda else None  # one kernel for all weights
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=fused)
    return torch.optim.AdamW(groups, lr=config.lr, fused=fused)


def peak_learning_rate(config: Config, batch_size: int) -> float:
    """lr·N/256 ("linear"), lr·√N ("sqrt": Appendix B.1 has 0.075·√N), or lr ("none").

    batch_size: the N of a step, which is less than config.batch_size if there are fewer images.
    """
    scale = {"linear": batch_size / 256, "sqrt": math.sqrt(batch_size), "none": 1.0}
    return config.lr * scale[config.lr_scaling]


def learning_rate(step: int, total_steps: int, warmup_steps: int, peak: float) -> float:
    """The rate of step 0 … total_steps - 1: linear up to the peak, then half a cosine to zero.

    Section 2.2: linear warm-up for the first 10 epochs, cosine decay without restarts.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * (1 + math.cos(math.pi * progress)) / 2


# ----------------------------------------------------------------------- training (Algorithm 1)


@dataclass
class Position:
    """How far a run has come; with the weights, all that resuming needs."""

    epoch: int = 0  # epochs that are complete
    step: int = 0  # steps that are complete in the epoch under way
    loss_sum: float = 0.0  # over those steps
    accuracy_sum: float = 0.0
    seconds: float = 0.0  # of training in the epoch under way
    cosine: float = 0.0  # mean over all pairs of views of the last step


def batch_count(config: Config, n: int) -> tuple[int, int]:
    """(images per step, steps per epoch) for n images.

    The last, smaller batch is left out, unless it is the only one: then all images are a batch.
    """
    size = min(config.batch_size, n)
    return size, n // size


def check_memory(config: Config, n: int, device: torch.device) -> None:
    """Raise InputError if training on n images cannot fit into the device's memory.

    Counted from below: weights, gradients and moments, the views of a batch, and what the first
    convolution makes of them. Else the system would end the program, without a word.
    """
    with torch.device("meta"):
        model = SimCLR(config)
    conv1, side = model.encoder.conv1, config.view_side
    outputs = conv1.out_channels * (side // conv1.stride[0]) ** 2  # of a view
    width = 2 if config.precision == "bfloat16" else 4  # bytes of each
    batch = batch_count(config, n)[0]
    views, held = (2 * size / utils.world_size() for size in (batch, config.micro_batch or batch))
    copies = 4 if config.optimizer == "adamw" else 3
    needed = copies * sum(p.nbytes for p in model.parameters())
    needed += views * 4 * 3 * side**2 + held * width * outputs
    if needed > utils.memory_of(device):
        raise InputError(
            f"this needs more than {needed / 2**30:,.0f} GiB of memory, and {device} has "
            f"{utils.memory_of(device) / 2**30:,.0f}: choose a smaller {flag('micro_batch')}, "
            f"{flag('batch_size')}, {flag('view_size')} or {flag('width')}"
        )


def check_parts(config: Config, n: int) -> None:
    """Raise InputError if the batch of n images or fewer is not made of equal parts.

    Each process gets the same number of images, and each of them computes as many at a time.
    """
    processes, batch = utils.world_size(), batch_count(config, n)[0]
    if batch < processes:
        raise InputError(f"a batch of {batch} images is too small for {processes} processes")
    micro = config.micro_batch or batch
    if micro > batch:
        raise InputError(f"{flag('micro_batch')} {micro} is larger than the batch of {batch}")
    if micro % processes:
        name = flag("micro_batch" if config.micro_batch else "batch_size")
        above = max(1, micro // processes) * processes
        raise InputError(f"{name} {micro} is not divisible by {processes} processes; {above} is")
    if batch % micro:
        fitting = [m for m in range(processes, batch + 1, processes) if batch % m == 0]
        nearest = min(fitting, key=lambda m: abs(m - micro), default=0)
        more = f"; {nearest} does" if nearest else ""
        raise InputError(
            f"{flag('micro_batch')} {micro} does not divide the batch of {batch}{more}"
        )


def view_batches(
    config: Config, data: Images, augment: Augment, device: torch.device, epoch: int, start: int
) -> Iterator[Tensor]:
    """The epoch's batches from step `start` on: two views of N images, float32 (2N, 3, S, S).

    Row i and row N + i are the views of one image. Order and views follow from (seed, epoch,
    step) alone, whatever was drawn before and however many workers decode. Of W processes each
    gets its N / W images of a batch, every W-th, with the views that they have with one process.
    """
    size, steps = batch_count(config, len(data))
    order = torch.randperm(len(data), generator=utils.generator("cpu", config.seed, SHUFFLE, epoch))
    batches = order[: size * steps].view(steps, size)[start:]
    keys = ((config.seed, VIEWS, epoch, step) for step in range(start, steps))
    mine = slice(utils.rank(), None, utils.world_size())
    workers = utils.worker_count(config.workers)
    yield from augmented_batches(data, batches, keys, augment, 2, device, workers, mine)


def augmented_batches(
    data: Images,
    batches: Tensor,
    keys: Iterable[tuple[int, ...]],
    augment: Augment,
    views: int,
    device: torch.device,
    workers: int,
    mine: slice = slice(None),
) -> Iterator[Tensor]:
    """Augmented views of given images: float32 (views·N, 3, S, S) on `device`, a batch each.

    batches: int64 (steps, N), rows of `data`. keys: for each batch the stream of randomness that
    its views follow from (utils.generator). Rows i, N + i, 2N + i … are the views of one image.
    workers: processes that decode, where `data` is streamed. mine: which images of each batch are
    made, with the views that they have in the whole of it.
    """

    def draw(key: tuple[int, ...], where: torch.device | str) -> Tensor:
        u = augment.draw(views * batches.shape[1], utils.generator(where, *key))
        return u.unflatten(0, (views, -1))[:, mine].flatten(0, 1)  # (views·N, draws of a view)

    if isinstance(data, ImageSet):
        for rows, key in zip(batches[:, mine].to(device), keys, strict=True):
            images = data.images[rows]
            yield augment(torch.cat([images] * views), draw(key, device))
        return

    crop: RandomResizedCrop = augment.steps[0]  # made by the workers, the rest on the device
    randomness: collections.deque[Tensor] = collections.deque()  # of the batches under way

    def batches_with_crops() -> Iterator[tuple[Tensor, np.ndarray]]:
        for rows, key in zip(batches[:, mine], keys, strict=True):
            u = draw(key, "cpu")
            randomness.append(u.pin_memory() if device.type == "cuda" else u)
            u = u[:, : crop.draws].unflatten(0, (views, -1)).transpose(0, 1)  # (N, views, draws)
            yield rows, u.contiguous().numpy()

    for crops in utils.decoded_batches(
        data, batches_with_crops(), crop.size, partial(crop_boxes, crop), workers, device
    ):  # uint8 (N, views, 3, S, S)
        images = crops.transpose(0, 1).contiguous().flatten(0, 1)
        yield augment(images, randomness.popleft().to(device, non_blocking=True), first=1)


def crop_boxes(crop: RandomResizedCrop, sizes: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Boxes (N, V, 4) of V crops of each image; sizes (N, 2) height, width; u (N, V, draws)."""
    height, width = torch.from_numpy(sizes).repeat_interleave(u.shape[1], 0).unbind(1)
    boxes = crop.boxes(torch.from_numpy(u).flatten(0, 1), height, width)
    return boxes.unflatten(0, u.shape[:2]).numpy()


def train_epoch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Tensor],
    rate: Callable[[int], float],
    loss_function: Callable[[Tensor, Tensor], Tensor],
    precision: str,
    position: Position,
    after_step: Callable[[], bool],
    pieces: int = 1,
) -> None:
    """Algorithm 1 over the batches of an epoch. Updates network, optimizer and position.

    batches: float32 (2N, 3, S, S), both views of N images. rate: learning rate of a step of this
    epoch. loss_function: (z1, z2), each (N, D) -> scalar. after_step: is called after each step;
    True asks to leave the epoch, which position then lets another call go on with. pieces: see
    cached_gradients(). With several processes, `batches` has this one's part of each.
    """
    network.train()
    started = time.perf_counter()
    device = next(network.parameters()).device
    sums = torch.tensor([position.loss_sum, position.accuracy_sum], device=device)
    z = torch.eye(2, device=device)  # of no step

    def project(views: Tensor) -> Tensor:
        with utils.autocast(device, precision):
            return network(views.contiguous(memory_format=torch.channels_last))[1]

    def contrast(z: Tensor) -> tuple[Tensor, Tensor]:
        z = gather_views(z)  # (2N, D)
        return loss_function(*z.chunk(2)), z.detach()

    for views in batches:  # (2N, 3, S, S)
        for group in optimizer.param_groups:
            group["lr"] = rate(position.step)
        if pieces == 1:
            loss, z = contrast(project(views))  # both views in one pass: BatchNorm sees all 2N
            loss.backward()
        else:
            loss, z = cached_gradients(network, project, views, contrast, pieces)
        optimizer.step()
        optimizer.zero_grad()

        sums += torch.stack([loss.detach(), contrastive_accuracy(*z.chunk(2))])
        position.step += 1
        if after_step():
            break
    numbers = [*sums, mean_cosine(z)]
    # the only wait for the device, but for SyncBatchNorm's
    position.loss_sum, position.accuracy_sum, position.cosine = torch.stack(numbers).tolist()
    position.seconds += time.perf_counter() - started


def cached_gradients(
    network: nn.Module,
    project: Callable[[Tensor], Tensor],
    views: Tensor,
    contrast: Callable[[Tensor], tuple[Tensor, Tensor]],
    pieces: int,
) -> tuple[Tensor, Any]:
    """A step's gradients with the activations of one piece of the batch in memory at a time.

    The loss needs all z at once, but z is small. So: compute z without activations, take the
    gradient of the loss by z, then compute each piece again and push its part of that gradient
    into the weights (Gao et al. 2021, https://arxiv.org/abs/2101.06983). That is the whole batch's
    gradient, for a third more time, but for BatchNorm, whose statistics are those of a piece, both
    views of its images (a "ghost batch"). The running statistics move in the second pass alone.

    network: of which project(views (B, 3, S, S)) -> z (B, D) is a pass. views: (2N, 3, S, S).
    contrast: (2N, D) -> loss and more. Returns what it returns; the gradients are in the weights.
    """

    def projected(part: Tensor) -> Tensor:  # (2, M, 3, S, S) -> (2, M, D)
        return utils.at_least_float32(project(part.flatten(0, 1)).unflatten(0, (2, -1)))

    parts = views.unflatten(0, (2, -1)).chunk(pieces, dim=1)  # (2, M, 3, S, S): both views
    states, projections = [], []  # states: so that dropout is the same in both passes
    with torch.no_grad(), utils.keep_running_statistics(network):
        for part in parts:
            states.append(utils.random_state(views.device))
            projections.append(projected(part))
    z = torch.cat(projections, 1).flatten(0, 1).requires_grad_()  # (2N, D)
    loss, more = contrast(z)
    loss.backward()
    gradients = z.grad.unflatten(0, (2, -1)).chunk(pieces, dim=1)  # (2, M, D)
    for i, (part, state, gradient) in enumerate(zip(parts, states, gradients, strict=True)):
        utils.set_random_state(state, views.device)
        with utils.exchange_gradients(network, i == pieces - 1):
            projected(part).backward(gradient)
    return loss, more


def gather_views(z: Tensor) -> Tensor:
    """z of the whole batch from each process's part of it, with gradient: (2N / W, D) -> (2N, D).

    In the order of the batch, of which a process has every W-th image.
    """
    if utils.world_size() == 1:
        return z
    whole = utils.Gather.apply(utils.at_least_float32(z).unflatten(0, (2, -1)))  # (W, 2, N / W, D)
    return whole.permute(1, 2, 0, 3).flatten(1, 2).flatten(0, 1)


class Interrupted(Exception):
    """A signal asked the run to stop, and it has been saved. signal: its number."""

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal


@dataclass
class Data:
    """What a run learns from and is judged by. Labels are never used in training."""

    pretrain: Images
    train: Images
    test: Images

    @property
    def labelled(self) -> bool:
        """Whether the representation can be judged by a classifier."""
        train, test = self.train, self.test
        enough = train.labels is not None and test.labels is not None and len(test) > 0
        return enough and len(train.classes) > 1


def load_data(config: Config, device: torch.device) -> Data:
    """All splits of config.dataset; images that are held in memory are moved to `device`."""
    pretrain, test = utils.load_splits(config.dataset, ("pretrain", "test"), config.data_dir)
    if len(pretrain) < 2:
        raise InputError(f"need at least 2 images to contrast, got {len(pretrain)}")
    pretrain = tolerant(pretrain, config).to(device)
    train = pretrain
    if config.dataset == "stl10":  # the one whose labelled training images are fewer
        train = utils.load_images(config.dataset, "train", config.data_dir).to(device)
    return Data(pretrain, train, tolerant(test, config).to(device))


def tolerant(data: Images, config: Config) -> Images:
    """Streamed images of which some may be unreadable: see utils.ImageFiles."""
    if isinstance(data, ImageSet):
        return data
    return dataclasses.replace(data, max_bad=config.max_bad)


def only_readable(data: Data, config: Config) -> Data:
    """Without the labelled images that cannot be read: an evaluation meets each many times."""
    workers = utils.worker_count(config.workers)
    train, test = (utils.only_readable(part, workers) for part in (data.train, data.test))
    return Data(data.pretrain, train, test)


def describe_data(data: Data) -> str:
    """What was found: how many images and classes, or why there are no labels."""
    text = f"{len(data.pretrain):,} images to learn from"
    if data.train.labels is None:
        return f"{text}; no labels: {utils.why_unlabelled(utils.image_names(data.train))}"
    text = f"{len(data.train.classes)} classes, {text}"
    if len(data.test) and data.test.labels is None:
        why = utils.why_unlabelled(utils.image_names(data.test), data.train.classes)
        return f"{text}, but no labels for the evaluation: {why}"
    held_out = f"{len(data.test):,}" if len(data.test) else "none"
    return f"{text}, {held_out} held out for the evaluation"


class Pretraining:
    """One run: model, optimiser, how far they have come, and the files that keep them.

    An ablation that changes the loss or the views overrides `loss` or `batches`.
    """

    def __init__(self, config: Config, data: Data, device: torch.device) -> None:
        self.config, self.data, self.device = config, data, device
        if config.stop_at_knn and not data.labelled:
            raise InputError(f"{flag('stop_at_knn')}: there are no labels to measure it by")
        check_parts(config, len(data.pretrain))
        check_memory(config, len(data.pretrain), device)
        model = utils.convert_sync_batchnorm(make_model(config), device)
        self.model = model.to(device, memory_format=torch.channels_last)
        self.optimizer = make_optimizer(config, self.model)
        self.augment = make_augment(config)
        self.position = Position()
        self.log: list[dict] = []
        self.lines: list[str] = []  # of it, as written: encoding thousands takes time every epoch
        self.batch_size, self.steps = batch_count(config, len(data.pretrain))  # steps per epoch
        self.pieces = self.batch_size // config.micro_batch if config.micro_batch else 1
        self.files = utils.files_digest(data.pretrain)
        self.checkpoint = config.folder / CHECKPOINT
        self.log_file = config.folder / "log.jsonl"
        self.saved = False  # whether the files there are this run's
        self.intact = False  # whether the checkpoint is, and worth keeping as the previous one
        self.next_save = self.save_time()
        self.forgiving = utils.WarnOnFailure()
        self.probe = torch.full((1, 3, config.image_size, config.image_size), 0.5, device=device)

    def loss(self, z1: Tensor, z2: Tensor) -> Tensor:
        return nt_xent(z1, z2, self.config.temperature)

    def batches(self) -> Iterator[Tensor]:
        """What is left of the epoch under way: float32 (2N, 3, S, S) each."""
        epoch, step = self.position.epoch, self.position.step
        data = self.data.pretrain
        return view_batches(self.config, data, self.augment, self.device, epoch, step)

    def rate(self, step: int) -> float:
        """Learning rate of a step of the epoch under way."""
        total = self.config.epochs * self.steps
        warmup = round(self.config.warmup_epochs * self.steps)
        step += self.position.epoch * self.steps
        peak = peak_learning_rate(self.config, self.batch_size)
        return learning_rate(step, total, warmup, peak)

    @property
    def complete(self) -> bool:
        """After the last epoch, or that whose kNN accuracy is the one to end at."""
        accuracy = self.log[-1].get("knn", 0) if self.log else 0
        return self.position.epoch >= self.config.epochs or 0 < self.config.stop_at_knn <= accuracy

    def resume(self) -> bool:
        """Take up the run's checkpoint, or the previous one. Returns whether there is one.

        Raises InputError if both are damaged or one is of another configuration, naming what
        differs.
        """
        found = utils.broadcast_from_rank0(self.read_checkpoint)
        if found is None:
            return False
        state, file = found
        check_format(state, file)
        with utils.errors_as_input_error(
            f"{file} is not a checkpoint of this run", through=(InputError,)
        ):
            images = len(self.data.pretrain)
            changed = check_same_run(state, self.config, images, self.files)
            if faults := utils.state_dict_mismatches(state["model"], self.model.state_dict()):
                raise ValueError(faults[0])
            self.model.load_state_dict(state["model"])
            self.load_optimizer(dict(state["optimizer"])["state"])
            self.position = read_position(
                state, self.config.epochs, math.inf if changed else self.steps
            )
            if changed:  # the epoch under way has another order now: all of it, once more
                self.position = Position(self.position.epoch)
            elif isinstance(self.data.pretrain, utils.ImageFiles):
                self.data.pretrain.unreadable = read_unreadable(state, images)
            self.log = self.logged(state)
        self.saved, self.intact = True, file == self.checkpoint
        return True

    def read_checkpoint(self) -> tuple[dict, Path] | None:
        """What load_newest() returns; None if there is nothing to read."""
        files = (self.checkpoint, self.checkpoint.with_name(PREVIOUS))
        return load_newest(self.checkpoint) if any(file.exists() for file in files) else None

    def load_optimizer(self, saved: dict) -> None:
        """Take up the moments of each weight; the settings beside them follow from the config.

        Raises ValueError if they are not those of these weights: torch would find out in a step.
        """
        groups = self.optimizer.state_dict()["param_groups"]
        weights = [p for group in self.optimizer.param_groups for p in group["params"]]
        if not set(saved) <= set(range(len(weights))):
            raise ValueError("its optimizer had other weights")
        names = MOMENTS[self.config.optimizer]
        expected = {
            f"{name} of weight {i}": torch.empty(()) if name == "step" else weights[i]
            for i in saved
            for name in names
        }
        there = {f"{name} of weight {i}": x for i in saved for name, x in saved[i].items()}
        if faults := utils.state_dict_mismatches(there, expected):
            raise ValueError(faults[0])
        self.optimizer.load_state_dict({"state": saved, "param_groups": groups})

    def logged(self, state: dict) -> list[dict]:
        """The log up to the checkpoint `state`, which holds it; earlier versions' did not."""
        rows = state["log"] if "log" in state else utils.read_jsonl(self.log_file)
        rows = rows[: self.position.epoch]  # the file may be ahead: those epochs are done again
        values = [value for row in rows for value in row.values()]
        plain = all(isinstance(value, int | float) and abs(value) < 2**63 for value in values)
        whole = plain and all(row.keys() >= LOGGED for row in rows)
        if not whole or [row["epoch"] for row in rows] != [*range(1, self.position.epoch + 1)]:
            raise InputError(
                f"{self.log_file} does not have the {self.position.epoch} epochs of the "
                "checkpoint; choose another name with --run, or --overwrite the run"
            )
        return rows

    def state(self) -> dict:
        """Plain types and tensors only, so that torch.load(weights_only=True) can read them."""
        return {
            "format": CHECKPOINT_FORMAT,
            "config": dataclasses.asdict(self.config),
            "position": dataclasses.asdict(self.position),
            "log": self.log,
            "images": len(self.data.pretrain),
            "files": self.files,
            "unreadable": [*self.data.pretrain.unreadable],
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def save(self) -> None:
        """Write the checkpoint. A run that is overwritten is whole until here, and then gone.

        Raises InputError if it cannot be written; all files are as they were then.
        """
        self.next_save = self.save_time()
        utils.save_checkpoint(self.checkpoint, self.state(), before=self.make_way)
        self.saved = self.intact = True
        self.bring_up_to_date()

    def make_way(self) -> None:
        """Keep the last checkpoint until there is another, or remove the run that is overwritten.

        Nothing else remains of that one: its summary beside a new checkpoint would be believed.
        """
        folder, previous = self.config.folder, self.checkpoint.with_name(PREVIOUS)
        if self.intact:
            with contextlib.suppress(FileNotFoundError):  # somebody deleted it
                os.replace(self.checkpoint, previous)
        elif not self.saved:
            utils.mark(OVERWRITTEN)
            for file in (folder / SUMMARY, *kept_checkpoints(folder), previous):
                file.unlink(missing_ok=True)

    def save_time(self) -> float:
        """When the next checkpoint is due inside an epoch, by time.monotonic()."""
        minutes = self.config.checkpoint_minutes
        return time.monotonic() + 60 * minutes if minutes else math.inf

    def try_to_save(self) -> None:
        """Raise InputError now if checkpoints cannot be written, and not after hours."""
        trial = self.config.folder / TRIAL
        utils.save_checkpoint(trial, self.state())
        if utils.is_main_process():
            trial.unlink(missing_ok=True)

    def keep(self) -> None:
        """Write the checkpoint that later ones do not replace, if one is due and not there."""
        epoch, every = self.position.epoch, self.config.keep_every
        file = self.config.folder / KEPT_CHECKPOINT.format(epoch)
        due = every and epoch and epoch % every == 0 and not self.position.step
        if due and not file.exists():
            utils.save_checkpoint(file, self.state())

    def bring_up_to_date(self) -> None:
        """Write what belongs to the checkpoint, also if a kill came between.

        Where the records cannot be written, only the end of a run, which reads them, fails.
        """
        self.forgiving(self.keep)
        if self.complete:
            self.write_records()
        else:
            self.forgiving(self.write_records)

    def write_records(self) -> None:
        """What people read, config.json and log.jsonl: it follows from the checkpoint."""
        utils.write_json(self.config.folder / "config.json", dataclasses.asdict(self.config))
        self.lines += [json.dumps(row) + "\n" for row in self.log[len(self.lines) :]]
        utils.write_atomically(self.log_file, "".join(self.lines).encode())

    def train(self) -> None:
        """To the last epoch, writing config.json, last.pt, log.jsonl and the figure on the way.

        A file that cannot be written is a warning, and tried again when it is due. Raises
        InputError if the last checkpoint cannot be written, too many images cannot be read or the
        loss is not finite, Interrupted if a signal asked to stop, after saving.
        """
        figure = FigureKeeper(self.config, self.batch_size)
        network = self.network()
        total, done = self.config.epochs * self.steps, self.position.epoch * self.steps
        with (
            utils.StopSignals() as stop,
            utils.Progress(total, done + self.position.step, unit="step") as progress,
        ):

            def ask(problem: InputError | None = None, steps: int = 1) -> bool:
                """Whether to leave the epoch, and why; of several processes each gets the same."""
                nonlocal signal, save, error
                signal, save, failed = utils.all_reduce_max(
                    stop.signal or 0,
                    steps > 0 and time.monotonic() >= self.next_save,  # else it would never go on
                    problem is not None,
                )
                error = utils.error_on_any_rank(problem) if failed else None
                return bool(signal or save or failed)

            signal, save, error = 0, 0, None
            while not self.complete:
                train_epoch(
                    network, self.optimizer, until(ask, self.batches()), self.rate, self.loss,
                    self.config.precision, self.position, progress.advance, self.pieces,
                )  # fmt: skip
                self.check_finite()
                if self.position.step < self.steps:
                    if signal or error:
                        self.stop_inside_epoch(error, signal)
                    self.forgiving(self.save)
                    continue
                row = self.finish_epoch()
                ask()
                due = save or not self.saved or self.position.epoch % self.config.save_every == 0
                if self.complete or signal:
                    self.save()
                elif not (due and self.forgiving(self.save)) and self.saved:
                    self.bring_up_to_date()
                if figure.due or (self.complete and utils.is_main_process()):
                    self.forgiving(figure.draw, self.log)
                progress.show(*describe(row, self.log, self.config), last=self.complete)
                if signal:
                    raise Interrupted(signal)

    def network(self) -> nn.Module:
        """What is trained: the model, or what runs it in several processes, or compiled."""
        network = utils.distributed(self.model)
        return self.compiled(network) if self.config.compile == "on" else network

    def compiled(self, network: nn.Module) -> nn.Module:
        """`network`, of the same weights, made by torch.compile.

        Where it cannot be, as without a C compiler, a line says so and it is what it was.
        """
        torch.compiler.reset()  # else torch leaves a process's ninth network as it is
        weights = copy.deepcopy(self.model.state_dict())
        size = self.config.view_side
        count = 2 * self.batch_size // self.pieces // utils.world_size()
        views = torch.zeros(count, 3, size, size, device=self.device)
        graphs = {} if self.config.micro_batch else COMPILE  # which write over a piece's z
        plain, network = network, torch.compile(network.train(), **graphs)
        started = time.perf_counter()
        try:
            for _ in range(COMPILE_WARMUP):
                with utils.autocast(self.device, self.config.precision):
                    _, z = network(views.contiguous(memory_format=torch.channels_last))
                z.sum().backward()
                self.optimizer.zero_grad()
        except Exception as error:  # compilers raise nearly anything
            reason = " ".join(str(error).split())[:200]
            utils.log_warning(f"torch.compile cannot be used here, so it is not ({reason})")
            return plain
        finally:
            self.optimizer.zero_grad()
            self.model.load_state_dict(weights)  # BatchNorm's statistics have moved
        print(f"compiled in {time.perf_counter() - started:.0f} s")
        return network

    def stop_inside_epoch(self, error: InputError | None, signal: int) -> NoReturn:
        """Save what has been done of the epoch, and raise why it ends here."""
        if self.position.step or self.position.epoch:
            self.save()
        if error is None:
            raise Interrupted(signal)
        raise InputError(f"{error}; mend the file, and the run continues here") from error

    @torch.no_grad()
    def check_finite(self) -> None:
        """Raise InputError if the loss, a weight or what the network computes is not finite.

        Weights can be finite and useless: so large that what comes out is not.
        """
        h, z = self.model.eval()(self.probe)
        loss = torch.tensor(self.position.loss_sum, device=self.device)
        values = [loss, h, z, *self.model.state_dict().values()]
        if not torch.stack([x.isfinite().all() for x in values]).all():  # one wait for the device
            raise InputError(
                f"the loss or the network is not finite in epoch {self.position.epoch + 1} (of "
                f"{self.config.epochs}); the last good checkpoint, if any, is kept. {REMEDIES}"
            )

    def finish_epoch(self) -> dict:
        """Move to the next epoch; measure kNN if it is due. Returns the row that was logged.

        Raises InputError, after saving, if several processes together met too many bad files.
        """
        try:
            utils.agree_on_unreadable(self.data.pretrain)
        except InputError as error:
            self.stop_inside_epoch(error, 0)
        position, views = self.position, 2 * self.batch_size * self.steps
        if max((row.get("knn_seconds", 0) for row in self.log), default=0) > LONG:
            self.forgiving(self.save)  # whoever asks to stop now may not wait until it is measured
        row = {
            "epoch": position.epoch + 1,
            "loss": position.loss_sum / self.steps,
            "contrastive_accuracy": position.accuracy_sum / self.steps,
            "lr": self.rate(self.steps - 1),
            "views_per_second": round(views / position.seconds, 1),
            "seconds": round(position.seconds, 3),
        }
        if position.cosine > COLLAPSED:
            row["collapsed"] = True
            if not any("collapsed" in earlier for earlier in self.log):
                utils.log_warning(f"after epoch {row['epoch']} {COLLAPSE}. {REMEDIES}")
        self.position = Position(position.epoch + 1)
        every = self.config.knn_every
        due = self.complete or (every and self.position.epoch % every == 0)
        if due and self.data.labelled:
            started = time.perf_counter()
            row["knn"] = knn_accuracy(self.model.encoder, self.data, self.config, self.device)
            row["knn_seconds"] = round(time.perf_counter() - started, 3)
        if bad := len(self.data.pretrain.unreadable):
            row["unreadable"] = bad
        self.log.append(row)
        return row


COMPILE = {"mode": "reduce-overhead"}  # of torch.compile: on CUDA with CUDA graphs
COMPILE_WARMUP = 3  # steps: the first compiles, CUDA graphs are recorded in the second


def until(
    ask: Callable[[InputError | None, int], bool], batches: Iterator[Tensor]
) -> Iterator[Tensor]:
    """The batches, up to where ask() says to leave.

    It is told why a batch cannot be made, if so, and how many steps there have been.
    """
    for steps in itertools.count():
        batch = error = None
        try:
            batch = next(batches, None)
        except InputError as problem:
            error = problem
        if ask(error, steps) or batch is None:
            return
        yield batch


OVERWRITTEN = "overwritten"  # what torchrun's processes, started again, must not do once more
LONG = 10.0  # seconds of measuring kNN: torchrun and SLURM wait for half a minute after SIGTERM
COLLAPSED = 0.9999  # mean cosine
COLLAPSE = "all views have the same z: the network has collapsed, or the images are all alike"
SUMMARY = "summary.json"
LOGGED = {"epoch", "loss", "contrastive_accuracy", "lr", "views_per_second", "seconds"}
MOMENTS = {  # what the optimisers keep of each weight
    "lars": ("momentum_buffer",),
    "sgd": ("momentum_buffer",),
    "adamw": ("step", "exp_avg", "exp_avg_sq"),
}
REMEDIES = (
    f"Try a lower {flag('lr')}, a longer {flag('warmup_epochs')}, a higher {flag('temperature')}, "
    f"or {flag('precision')} float32"
)


def pretrain(
    config: Config,
    data: Data,
    device: torch.device,
    make_run: type[Pretraining] = Pretraining,
    overwrite: bool = False,
) -> SimCLR:
    """Train, or continue, the run that `config` (resolved) describes. Returns the trained model.

    make_run: Pretraining or a variant of it. overwrite: start anew; an earlier run of the name
    stays as it is until the first checkpoint replaces it.
    """
    run = make_run(config, data, device)
    resumed = not overwrite and run.resume()
    utils.make_folders(config.folder, config.figure_folder)
    if not resumed:
        run.try_to_save()
    else:
        run.bring_up_to_date()  # whatever has become of the files
        if not run.complete:
            done = f"{run.position.epoch} of {config.epochs} epochs"
            print(f"continuing {config.folder} after {done}")
    if not run.complete:
        try:
            run.train()
        except RuntimeError as error:
            if not utils.is_out_of_memory(error):
                raise
            raise InputError(too_large(config, run.batch_size, device)) from error
    return run.model


def too_large(config: Config, batch: int, device: torch.device) -> str:
    """What to do where a step needs more memory than there is."""
    held, processes = config.micro_batch or batch, utils.world_size()
    smaller = [m for m in range(processes, held // 2 + 1, processes) if batch % m == 0]
    remedy = f"a smaller {flag('batch_size')}, {flag('view_size')} or {flag('width')}"
    if smaller:
        remedy = f"{flag('micro_batch')} {smaller[-1]}, or {remedy}"
    return f"{device} has too little memory for the activations of {held} images: try {remedy}"


def describe(row: dict, log: list[dict], config: Config) -> tuple[dict[str, str], str]:
    """An epoch's numbers for the bar, and as a line."""
    knn = next((r["knn"] for r in reversed(log) if "knn" in r), None)
    values = {
        "loss": f"{row['loss']:.3f}",
        "kNN": "–" if knn is None else f"{knn:.1%}",
        "views/s": f"{row['views_per_second']:,.0f}",
    }
    left = (config.epochs - row["epoch"]) * row["seconds"]
    line = f"epoch {row['epoch']:4d}/{config.epochs}  loss {row['loss']:.3f}"
    line += f"  found its partner {row['contrastive_accuracy']:5.1%}"
    line += f"  kNN {values['kNN']}  {values['views/s']} views/s  {left:.0f} s left"
    return values, line


CHECKPOINT = "last.pt"
PREVIOUS = "previous.pt"  # the checkpoint before
CHECKPOINT_FORMAT = 3
# format 1 has no checkpoint_minutes in its configuration, and no digest; 2 no micro_batch, no files
READABLE_FORMATS = (1, 2, 3)
KEPT_CHECKPOINT = "epoch{:04d}.pt"  # --keep-every
TRIAL = "trial.pt"  # whether there is room for checkpoints
LOCK = ".lock"


def kept_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that --keep-every kept of a run, the earliest first."""
    return sorted(folder.glob(KEPT_CHECKPOINT.format(0).replace("0000", "[0-9]*")))


@contextlib.contextmanager
def run_lock(config: Config) -> Iterator[None]:
    """Inside, no other process works on the run. Raises InputError if one does.

    Where nothing has been saved at the end, no folder is left behind either. Processes that work
    together are one: the first of them holds it.
    """
    if not utils.is_main_process():
        yield
        return
    new = utils.make_folders(config.folder, config.figure_folder)
    lock = config.folder / LOCK
    try:
        with utils.file_lock(lock) as free:
            if not free:
                raise InputError(
                    f"another process is working on {config.folder}; wait for it, or choose "
                    f"another name with {flag('run')}"
                )
            own = (CHECKPOINT, KEPT_CHECKPOINT.format(0).replace("0000", "*"), TRIAL, SUMMARY)
            utils.remove_leftovers(config.folder, *own, "config.json", "log.jsonl")
            utils.remove_leftovers(config.figure_folder, FIGURE)
            (config.folder / TRIAL).unlink(missing_ok=True)
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    if list(config.folder.iterdir()) == [lock]:
                        lock.unlink()
    finally:
        for folder in new:
            with contextlib.suppress(OSError):  # it is in use
                folder.rmdir()


def load_newest(file: Path) -> tuple[dict, Path]:
    """A checkpoint and its file: `file`, or the previous one where a last.pt is damaged or gone.

    Says so on stderr. Raises InputError if neither can be read.
    """
    try:
        state = utils.load_checkpoint(file)
    except InputError as error:
        previous = file.with_name(PREVIOUS)
        if file.name != CHECKPOINT or not previous.exists():
            raise
        try:
            state = utils.load_checkpoint(previous)
        except InputError as also:
            raise InputError(f"{error}, and {also}") from also
        print(f"warning: {error}; using the one before, {previous}", file=sys.stderr)
        file = previous
    return state, file


def check_format(state: dict, where: Path) -> None:
    """Raise InputError if this version does not read the checkpoint."""
    found = dict(state).get("format")
    if type(found) is not int or found not in READABLE_FORMATS:
        raise InputError(
            f"{where} has a checkpoint of format {utils.shown(found)}; this version reads "
            f"formats {READABLE_FORMATS[0]} to {READABLE_FORMATS[-1]}"
        )


def check_same_run(record: dict, config: Config, images: int, files: str) -> bool:
    """Raise InputError if a run's saved configuration or its images are not the ones given.

    record: has the configuration, the number of images and, since there is one, the digest of
    their files. Returns whether these are others, as config.changed_files allows.
    """
    differ, changed = differences(record["config"], config), ""
    if record["images"] != images:
        changed = f"number of images ({utils.shown(record['images'])} there, {images} now)"
    elif record.get("files", files) != files:
        changed = f"files (as many, {images}, by other names or in other folders)"
    if changed and not (files and config.changed_files):
        differ.append(changed)
    if differ:
        hint = f" ({flag('changed_files')} continues with them)" if changed and files else ""
        raise InputError(
            f"{config.folder} holds a run with another configuration: {', '.join(differ)}{hint}. "
            "Choose another name with --run, or --overwrite it"
        )
    return bool(changed)


def read_unreadable(state: dict, images: int) -> dict[int, str]:
    """The files that a checkpoint notes as unreadable. Raises ValueError if they cannot be."""
    rows = state.get("unreadable", [])
    if any(type(row) is not int or not 0 <= row < images for row in rows):
        raise ValueError("the files that it says are unreadable are not among these")
    return dict.fromkeys(rows, "could not be read before")


def differences(saved: dict, config: Config) -> list[str]:
    """The identity fields in which two configurations differ, with both values.

    A setting that there was not when `saved` was written had the default.
    """
    saved = {**{f.name: f.default for f in dataclasses.fields(config)}, **saved}
    names = [f.name for f in dataclasses.fields(config) if f.metadata["identity"]]
    if config.dataset == "folder":
        names.append("data_dir")
    return [
        f"{flag(name)} ({utils.shown(saved[name])} there, {getattr(config, name)} now)"
        for name in names
        if saved[name] != getattr(config, name)
    ]


def find_checkpoint(where: str, checkpoints: str | Path = "checkpoints") -> Path:
    """The checkpoint file that `where` names: a file, a run's folder, a run's name, or "".

    "" is the run under `checkpoints` that was saved last, those of ablations apart. Raises
    InputError, naming the runs that there are, if there is none.
    """
    root = Path(checkpoints)
    saved = [
        file
        for name in (CHECKPOINT, PREVIOUS)  # alone where a process was killed between its renames
        for file in root.rglob(name)
        if file.relative_to(root).parts[0] != ABLATIONS
    ]
    if not where:
        if not saved:
            raise InputError(f"no run under {root} yet; python simclr.py makes one")
        return max(saved, key=lambda file: file.stat().st_mtime).with_name(CHECKPOINT)
    for path in (Path(where), Path(where) / CHECKPOINT, root / where / CHECKPOINT):
        with contextlib.suppress(OSError):  # a name that is too long for a file
            if path.is_file() or (path.name == CHECKPOINT and path.with_name(PREVIOUS).is_file()):
                return path
    names = sorted({str(file.parent.relative_to(root)) for file in saved})
    raise InputError(
        f"{where} is neither a checkpoint nor a run under {root} (there: "
        f"{', '.join(names) or 'none'})"
    )


ABLATIONS = "ablation"  # the folder of ablation_SimCLR.py's runs


@dataclass
class TrainedRun:
    """What a checkpoint of a run holds: the model is frozen and in eval mode, on the CPU."""

    config: Config
    model: SimCLR
    epoch: int  # epochs that are complete
    file: Path


def load_run(file: Path) -> TrainedRun:
    """Read a checkpoint that simclr.py wrote. No code in it is executed.

    Where a run's last.pt is damaged, the previous one is read, with a warning. Raises InputError if
    there is none, it is of another format, or its weights are not exactly those of the model that
    its configuration describes. That is compared by shapes before the model is made, so that a
    small file cannot claim a network that fills the memory.
    """
    return trained_run(*load_newest(file))


def trained_run(state: dict, file: Path) -> TrainedRun:
    """load_run() of what has been read of `file`."""
    check_format(state, file)
    with utils.errors_as_input_error(f"{file} is not a checkpoint of a run"):
        config = Config(**state["config"])
        check_config(config)
        if not config.image_size:
            raise ValueError("its configuration has no size of images")
        with torch.device("meta"):
            expected = SimCLR(config).state_dict()
        if faults := utils.state_dict_mismatches(state["model"], expected):
            raise ValueError(faults[0])
        model = make_model(config)
        model.load_state_dict(state["model"])
        position = read_position(state, config.epochs)
    return TrainedRun(config, model.eval().requires_grad_(False), position.epoch, file)


def read_position(state: dict, epochs: int, steps: float = math.inf) -> Position:
    """How far a checkpoint is. Raises ValueError if that is not within the epochs and steps."""
    position = Position(**state["position"])
    if not {"epoch", "step"} <= set(state["position"]):
        raise ValueError("it does not say how far it is")
    if fault := utils.type_fault(position):
        raise ValueError(fault)
    if not (0 <= position.epoch <= epochs and 0 <= position.step <= steps):
        raise ValueError(f"its epoch {position.epoch} or step {position.step} is out of range")
    return position


# ------------------------------------------------------------------------------ what was learned

KNN_NEIGHBOURS = 10
LABELS_PER_CLASS = 10
LABEL_DRAWS = 5
FINAL_TABLE = ("pixels", "untrained", "simclr")
REPRESENTATIONS = {
    "pixels": "raw pixels",
    "untrained": "untrained encoder",
    "simclr": "SimCLR h",
    "projection": "SimCLR z",
}


def encoders(
    model: SimCLR, config: Config, device: torch.device
) -> dict[str, Callable[[Tensor], Tensor]]:
    """What is compared, by the keys of REPRESENTATIONS: (B, 3, S, S) in [0, 1] -> (B, D) each.

    model: is on `device`. The untrained encoder is the one that the run began with.
    """
    untrained = make_model(config).to(device, memory_format=torch.channels_last)
    return {
        "pixels": utils.flat_pixels,
        "untrained": untrained.encoder,
        "simclr": model.encoder,
        "projection": nn.Sequential(model.encoder, model.projector),
    }


def features(
    encoder: Callable[[Tensor], Tensor], data: Images, config: Config, device: torch.device
) -> Tensor:
    """h of every image, or whatever `encoder` computes: float32 (N, D), labelled by labels_read.

    Raises InputError if it is not finite, as after a training that diverged.
    """
    workers = utils.worker_count(config.workers)
    found = utils.embed(encoder, data, config.image_size, device, config.precision, workers=workers)
    if not found.isfinite().all():
        raise InputError(f"what the network computes of some images is not finite. {REMEDIES}")
    return found


def knn_accuracy(
    encoder: Callable[[Tensor], Tensor], data: Data, config: Config, device: torch.device
) -> float:
    """Test accuracy in [0, 1] of k = 10 nearest neighbours by cosine among the training images."""
    return knn_of(
        *(features(encoder, part, config, device) for part in (data.train, data.test)), data
    )


def knn_of(train: Tensor, test: Tensor, data: Data) -> float:
    """knn_accuracy() of features (N, D), (M, D). Several processes classify a share each."""
    mine, classes = utils.shard_indices(len(test)).to(test.device), len(data.train.classes)
    labels = data.train.labels_read
    predicted = utils.knn_predict(train, labels, test[mine], classes, KNN_NEIGHBOURS)
    return utils.accuracy(utils.all_gather_rows(predicted, len(test)), data.test.labels_read)


def evaluate(model: SimCLR, data: Data, config: Config, device: torch.device) -> dict[str, dict]:
    """Raw pixels, the same encoder untrained, and h, on the test split; accuracies in [0, 1].

    Returns knn, linear_10 (mean over draws of 10 labels per class), linear_10_std and linear_all,
    each with keys pixels, untrained, simclr.
    """
    results: dict[str, dict] = {
        key: {} for key in ("knn", "linear_10", "linear_10_std", "linear_all")
    }
    classes = len(data.train.classes)
    compared = encoders(model, config, device)
    for name in FINAL_TABLE:
        encoder = compared[name]
        x, x_test = (features(encoder, part, config, device) for part in (data.train, data.test))
        y, y_test = data.train.labels_read, data.test.labels_read
        results["knn"][name] = knn_of(x, x_test, data)
        x, x_test = utils.standardize(x, x_test)  # the l2 penalty means the same for all three
        few = []
        for draw in range(LABEL_DRAWS):
            seed = utils.derive_seed(config.seed, LABELS, draw)
            per_class = utils.class_balanced_order(y.cpu().numpy(), seed)
            rows = torch.cat([torch.from_numpy(r[:LABELS_PER_CLASS]) for r in per_class]).to(device)
            few.append(utils.linear_accuracy(x[rows], y[rows], x_test, y_test, classes))
        spread = torch.tensor(few, dtype=torch.float64)
        results["linear_10"][name] = spread.mean().item()
        results["linear_10_std"][name] = spread.std().item()
        results["linear_all"][name] = utils.linear_accuracy(x, y, x_test, y_test, classes)
    return results


def results_table(results: dict[str, dict], images: int) -> str:
    """What evaluate() found, for people."""
    lines = [
        f"{f'{images:,} test images':22} {'kNN (k=10)':>11} "
        f"{'10 labels a class':>19} {'all labels':>11}"
    ]
    for key in FINAL_TABLE:
        name = REPRESENTATIONS[key]
        few = f"{100 * results['linear_10'][key]:.1f} ± {100 * results['linear_10_std'][key]:.1f} %"
        lines.append(
            f"{name:22} {100 * results['knn'][key]:9.1f} % {few:>19} "
            f"{100 * results['linear_all'][key]:9.1f} %"
        )
    return "\n".join(lines)


def draw_training(
    log: Sequence[dict], chance: float, baselines: dict[str, float] | None = None
) -> Any:
    """The training curves as a matplotlib Figure: loss, contrastive accuracy, kNN, learning rate.

    log: rows of log.jsonl. chance: ln(2N - 1), the loss when all projections are equal.
    baselines: kNN accuracy in [0, 1] of "pixels" and "untrained", when they have been measured.
    """
    from matplotlib.figure import Figure  # late: half a second that not every import needs
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    epochs = [row["epoch"] for row in log]
    marker = "." if len(log) < 20 else ""

    loss, guess, knn, rate = axes.flat
    loss.plot(epochs, [row["loss"] for row in log], color="C0", marker=marker)
    loss.axhline(chance, color="0.4", linestyle="--", linewidth=1)
    loss.annotate(
        f"chance, ln(2N − 1) = {chance:.2f}", (0.98, chance), (0, -3), color="0.3", fontsize=8,
        xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", va="top",
    )  # fmt: skip
    top = max([chance, *(row["loss"] for row in log)])  # a bad start may lie above chance
    loss.set(title="NT-Xent loss", ylabel="nats", ylim=(0, top * 1.05))

    guess.plot(epochs, [100 * r["contrastive_accuracy"] for r in log], color="C1", marker=marker)
    guess.axhline(100 / math.exp(chance), color="0.4", linestyle="--", linewidth=1)
    guess.set(title="Views that find their partner", ylabel="%", ylim=(0, 100))

    measured = [row for row in log if "knn" in row]
    knn.plot(
        [row["epoch"] for row in measured], [100 * row["knn"] for row in measured],
        color="C2", marker="o", markersize=3,
    )  # fmt: skip
    knn.set(title="kNN accuracy of h (k = 10, cosine)", ylabel="% of test images", xlabel="epoch")
    for (key, value), style in zip((baselines or {}).items(), ("--", ":"), strict=False):
        knn.axhline(100 * value, color="0.4", linestyle=style, label=REPRESENTATIONS[key])
    if baselines:
        knn.legend(fontsize=8, loc="best")
    if not measured:
        knn.text(0.5, 0.5, "not measured", ha="center", transform=knn.transAxes, color="0.4")

    rate.plot(epochs, [row["lr"] for row in log], color="C3", marker=marker)
    rate.set(title="Learning rate", xlabel="epoch", ylim=(0, None))
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    for axis in axes.flat:
        axis.grid(color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    return figure


FIGURE = "loss_plot.png"


class FigureKeeper:
    """Redraws loss_plot.png as a run trains, spending a small share of the time on it."""

    SHARE = 0.01  # of the run's time, at most

    def __init__(self, config: Config, batch_size: int) -> None:
        self.path = config.figure_folder / FIGURE
        self.chance = math.log(2 * batch_size - 1)
        self._next = time.perf_counter()

    @property
    def due(self) -> bool:
        return utils.is_main_process() and time.perf_counter() >= self._next

    def draw(self, log: Sequence[dict], baselines: dict[str, float] | None = None) -> None:
        started = time.perf_counter()
        try:
            utils.save_figure(draw_training(log, self.chance, baselines), self.path)
        finally:  # where it cannot be written it takes no larger share
            now = time.perf_counter()
            self._next = now + (now - started) / self.SHARE


# ------------------------------------------------------------- learning from labels (Appendix B.5)


def geometric_augment(config: Config) -> Augment:
    """Crops, flips and rotations of the recipe without its colours (B.5: crops and flips).

    A classifier learns from views of the size that it is tested on.
    """
    plain = dataclasses.replace(config, view_size=0, jitter_p=0.0, gray_p=0.0, blur_p=0.0)
    return make_augment(plain)


def labelled_batches(
    data: Images,
    rows: Tensor,
    augment: Augment,
    batch_size: int,
    steps: int,
    key: tuple[int, ...],
    device: torch.device,
    workers: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """`steps` batches of augmented images, float32 (B, 3, S, S), and their labels, int64 (B,).

    rows: int64 (M,), which images of `data`; they are gone through in a new order each time, in
    equal batches of at most batch_size. key: the stream that order and views follow from.
    """
    parts = math.ceil(len(rows) / batch_size)  # batches a pass
    size = len(rows) // parts
    orders = [
        torch.randperm(len(rows), generator=utils.generator("cpu", *key, SHUFFLE, i))
        for i in range(math.ceil(steps / parts))
    ]
    chosen = torch.stack([rows.cpu()[order[: size * parts]] for order in orders])
    batches = chosen.view(-1, size)[:steps]  # (steps, B)
    keys = ((*key, VIEWS, step) for step in range(steps))
    images = augmented_batches(data, batches, keys, augment, 1, device, workers)
    for x, chosen_rows in zip(images, batches.to(device), strict=True):
        yield x.contiguous(memory_format=torch.channels_last), data.labels[chosen_rows]


@dataclass
class LabelTraining:
    """How a network is trained on labels; the defaults are Appendix B.5's.

    The paper's smallest label set, 1 % of ImageNet, gives a dozen steps an epoch and 750 in all.
    Sets that are much smaller would be left untrained after so many epochs of a step or two: their
    batches are cut to a twelfth of them, but not below 64, and they get at least min_steps.
    """

    epochs: int = 60
    batch_size: int = 1024
    lr: float = 0.05  # of a batch of 256
    momentum: float = 0.9  # Nesterov's
    weight_decay: float = 0.0
    min_steps: int = 200

    def batch(self, n: int) -> int:
        """Images a step for n labelled images."""
        return min(n, self.batch_size, max(64, n // 12))

    def steps(self, n: int) -> int:
        """Steps in all for n labelled images."""
        return max(self.min_steps, self.epochs * math.ceil(n / self.batch(n)))


def train_on_labels(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    steps: int,
    peak: float,
    how: LabelTraining,
    precision: str,
    after_step: Callable[[], Any] = lambda: None,
) -> None:
    """SGD with Nesterov momentum on the cross-entropy of all of `network`, cosine decay.

    network: (B, …) -> logits (B, K), in the mode in which it is given. batches: as many as steps
    of (input, int64 labels (B,)). peak: the first learning rate.
    """
    device = next(network.parameters()).device
    optimizer = torch.optim.SGD(
        network.parameters(), peak, how.momentum, weight_decay=how.weight_decay, nesterov=True
    )
    for step, (inputs, labels) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 0, peak)
        with utils.autocast(device, precision):
            logits = network(inputs)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        after_step()


def fine_tune(
    encoder: nn.Module,
    data: Images,
    rows: Tensor,
    augment: Augment,
    how: LabelTraining,
    config: Config,
    device: torch.device,
    seed: int = 0,
    after_step: Callable[[], Any] = lambda: None,
) -> nn.Sequential:
    """A copy of the encoder with a linear classifier on it, trained as a whole (Appendix B.5).

    encoder: images -> features (B, encoder.feature_dim), in any state; it is left as it is, and an
    untrained one makes this training from scratch. data: labelled; rows: int64 (M,), which of its
    images to learn from. Returns images -> logits, in eval mode.
    """
    classifier = zero_classifier(encoder.feature_dim, len(data.classes))
    network = nn.Sequential(copy.deepcopy(encoder), classifier).to(device)
    network.requires_grad_(True).train()
    steps = how.steps(len(rows))
    key = (config.seed, LABELS, seed)
    size = how.batch(len(rows))
    workers = utils.worker_count(config.workers)
    batches = labelled_batches(data, rows, augment, size, steps, key, device, workers)
    train_on_labels(network, batches, steps, how.lr * size / 256, how, config.precision, after_step)
    return network.eval()


def zero_classifier(dim: int, classes: int) -> nn.Linear:
    """A linear layer of zeros: all classes alike at first, and no dependence on a seed."""
    layer = nn.Linear(dim, classes)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


# ------------------------------------------------------------------------------ the command line

FIELD_GROUPS = {  # the first field of each group in --help
    "recipe": "data",
    "crop_min": "augmentation (Section 3, Appendix A)",
    "arch": "encoder and projection head (Section 4)",
    "temperature": "loss and optimiser (Section 2)",
    "seed": "the run",
}


def describe_recipes() -> str:
    """The recipes for --help, a paragraph each."""
    paragraphs = [
        "recipes (they override the defaults above, and flags override them; the warm-up of a\n"
        f"recipe is cut to {SHORT_WARMUP:.0%} of the epochs of a run that is made shorter):"
    ]
    for name, overrides in RECIPES.items():
        flags = " ".join(
            flag(key) if value is True else f"{flag(key)} {value}"
            for key, value in overrides.items()
        )
        text = textwrap.fill(flags, 90, break_on_hyphens=False)
        paragraphs.append(f"  {name}:\n{textwrap.indent(text, '      ')}")
    return "\n".join(paragraphs)


def parse_command_line(argv: Sequence[str] | None = None) -> tuple[Config, bool, str]:
    """The configuration, whether to replace a run of the same name, the file of --show-views."""
    parser = utils.OneLineParser(
        prog="simclr.py",
        usage="python simclr.py [--dataset NAME] [--recipe NAME] [--flag value ...]",
        description=__doc__,
        epilog=describe_recipes(),
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="start anew, replacing a run of the same name"
    )
    parser.add_argument(
        "--show-views", metavar="FILE", default="",
        help="draw what the augmentation makes of some images, to FILE.png, and do not train",
    )  # fmt: skip
    utils.add_flags(parser, Config, FIELD_GROUPS)
    options = vars(parser.parse_args(argv))
    overwrite, views_file = options.pop("overwrite"), options.pop("show_views")
    return make_config(**options), overwrite, views_file


def describe_config(config: Config) -> str:
    """The resolved configuration, a line a group."""
    lines: list[str] = []
    for field in dataclasses.fields(config):
        if field.name in FIELD_GROUPS:
            lines.append("")
        lines[-1] += f"{field.name}={getattr(config, field.name)} "
    return "\n".join(textwrap.fill(x, 100, subsequent_indent="  ") for x in lines)


SHEET = (8, 8)  # images and views of each that --show-views draws
LARGEST_TILE = 256  # px: more than the figure shows


def draw_views(config: Config, data: Images, device: torch.device) -> Any:
    """Some images and, beside each, views as they are trained on: a matplotlib Figure.

    config: resolved. data: what is trained on. Which images and views follows from config.seed.
    """
    from matplotlib.figure import Figure

    count, views = min(SHEET[0], len(data)), SHEET[1]
    random = utils.generator("cpu", config.seed, SHUFFLE)
    rows = torch.randperm(len(data), generator=random)[:count]
    originals = next(utils.subset(data, rows).batches(config.view_side, count, device))
    key = (config.seed, VIEWS)
    batches = augmented_batches(data, rows[None], [key], make_augment(config), views, device, 0)
    drawn = next(batches).unflatten(0, (views, count)).transpose(0, 1)  # (N, views, 3, S, S)
    tiles = utils.to_uint8(torch.cat([originals[:, None], drawn], 1)).cpu()
    picture = utils.mosaic(tiles, gap=max(1, config.view_side // 16))

    width, margin, heading = 9, 0.05, 0.35  # inches
    height = (width - 2 * margin) * picture.shape[0] / picture.shape[1]
    figure = Figure(figsize=(width, height + margin + heading))
    axes = figure.subplots()
    axes.imshow(picture, interpolation="nearest")
    step = picture.shape[1] / (views + 1)
    axes.set_xticks([step * (i + 0.5) for i in range(views + 1)])
    axes.set_xticklabels(["image", *(f"view {i + 1}" for i in range(views))])
    axes.set_yticks([])
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    axes.spines[:].set_visible(False)
    right, top = 1 - margin / width, 1 - heading / figure.get_figheight()
    figure.subplots_adjust(margin / width, margin / figure.get_figheight(), right, top)
    return figure


def show_views(config: Config, file: Path) -> None:
    """What `python simclr.py --show-views FILE` does."""
    device = utils.choose_device(config.device)
    data = utils.load_images(config.dataset, "pretrain", config.data_dir).to(device)
    if not len(data):
        raise InputError("there are no images to show")
    config = resolve(config, data, device)
    config.view_size = min(config.view_side, LARGEST_TILE)
    utils.save_figure(draw_views(config, data, device), file)
    print(f"views of {config.dataset} by the recipe {config.recipe}: {file}")


def finished_summary(config: Config, data: Data) -> dict | None:
    """The summary of the run if it is complete. InputError if it is another configuration's."""
    file, images = config.folder / SUMMARY, len(data.pretrain)
    try:
        summary = json.loads(file.read_bytes())
        record = {"images": images, **summary}
        check_same_run(record, config, images, utils.files_digest(data.pretrain))
        if "knn" in summary:
            results_table(summary, len(data.test))  # has all that is shown of it
    except (FileNotFoundError, NotADirectoryError):
        return None
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file} is damaged ({error}); delete it, and the run is evaluated again"
        ) from error
    return summary


def run(config: Config, overwrite: bool = False) -> dict:
    """Pre-train and evaluate: what `python simclr.py` does. Returns the summary.

    Raises InputError, also if another process works on the run, and Interrupted.
    """
    device = utils.choose_device(config.device)
    with utils.process_group(device):
        return run_on(
            config, device, overwrite and not utils.broadcast_from_rank0(utils.marked, OVERWRITTEN)
        )


def run_on(config: Config, device: torch.device, overwrite: bool) -> dict:
    """run() on a device, in one process or in several that work together."""
    data = load_data(config, device)
    as_given, config = config, resolve(config, data.pretrain, device)
    check_same_on_all_ranks(config, data)
    print(describe_config(config))
    summary = None if overwrite else utils.broadcast_from_rank0(finished_summary, config, data)
    if summary is not None:
        print(f"\n{config.folder} is finished; --overwrite trains it again")
        if "knn" in summary:
            print(results_table(summary, len(data.test)))
        return summary
    processes = utils.world_size()
    where = device if processes == 1 else f"{processes} processes on {device.type}"
    print(
        f"\n{describe_data(data)}\n"
        f"on {where} in {config.precision}; files in {config.folder}, "
        f"figure in {config.figure_folder}"
    )

    utils.cache_pixels(data.pretrain, config.cache)
    with run_lock(config):
        summary = train_and_evaluate(config, data, device, overwrite)
    if "knn" in summary:
        print("\n" + results_table(summary, len(data.test)))
    else:
        print("\nNo labelled test images, so the representation was not evaluated")
    print(
        f"\n{summary['epochs']} of {config.epochs} epochs: {summary['training_seconds']:.0f} s of "
        f"training, {summary['views_per_second']:,.0f} views/s; "
        f"{summary['monitoring_seconds']:.0f} s of monitoring kNN; "
        f"{summary['seconds']:.0f} s with the evaluation\n"
        f"curves        {config.figure_folder / FIGURE}\n"
        f"weights, log  {config.folder}\n"
        f"{next_steps(as_given)}"
    )
    return summary


def check_same_on_all_ranks(config: Config, data: Data) -> None:
    """Raise InputError if processes that are to work together have other settings or images."""
    facts = {
        flag(f.name): getattr(config, f.name)
        for f in dataclasses.fields(config)
        if f.metadata["identity"] or f.name in ("run", "max_bad", "compile")
    }
    for split in ("pretrain", "train", "test"):
        part = getattr(data, split)
        facts[f"images ({split})"] = (len(part), utils.files_digest(part))
    utils.check_same_on_all_ranks(facts)


def train_and_evaluate(config: Config, data: Data, device: torch.device, overwrite: bool) -> dict:
    """Pre-train, evaluate, draw the last figure and write the summary, which is returned."""
    model = pretrain(config, data, device, overwrite=overwrite)
    started = time.perf_counter()
    results = evaluate(model, data, config, device) if data.labelled else {}
    return utils.broadcast_from_rank0(write_summary, config, data, model, results, started)


def write_summary(
    config: Config, data: Data, model: SimCLR, results: dict[str, dict], started: float
) -> dict:
    """The summary, and the last figure, of a trained model. started: when its evaluation did."""
    log = utils.read_jsonl(config.folder / "log.jsonl")
    training = sum(row["seconds"] for row in log)
    monitoring = sum(row.get("knn_seconds", 0) for row in log)
    size, steps = batch_count(config, len(data.pretrain))
    summary = {
        "config": dataclasses.asdict(config),
        "images": len(data.pretrain),
        "files": utils.files_digest(data.pretrain),
        "parameters": sum(p.numel() for p in model.encoder.parameters()),
        "loss": log[-1]["loss"],
        **results,
        "epochs": len(log),
        "views_per_second": 2 * size * steps * len(log) / max(training, 1e-3),
        "training_seconds": training,
        "monitoring_seconds": monitoring,
        "seconds": training + monitoring + time.perf_counter() - started,
    }
    baselines = {key: results["knn"][key] for key in ("pixels", "untrained")} if results else None
    try:
        FigureKeeper(config, size).draw(log, baselines)
    except InputError:  # which costs no result
        utils.write_json(config.folder / SUMMARY, summary)
        raise
    utils.write_json(config.folder / SUMMARY, summary)  # last: where it is, the run is finished
    return summary


def next_steps(config: Config) -> str:
    """Commands to try after a run. config: as it was given, before resolve()."""
    seed, run = config.seed + 1, str(config.folder)
    name = f"{config.run.removesuffix(f'_seed{config.seed}')}_seed{seed}"
    steps = {
        "what it is worth": ["load_simCLR.py", run],
        "see it": ["tSNE.py", run],
        "another seed": ["simclr.py", *flags_of(dataclasses.replace(config, seed=seed, run=name))],
        "CIFAR-10, on a GPU": ["simclr.py", "--dataset", "cifar10"],
        "your own images": ["simclr.py", "--dataset", "folder", "--data-dir", "PHOTOS"],
        "every setting": ["simclr.py", "--help"],
    }
    here = Path(__file__).parent
    lines = [
        f"  {what:18}  {utils.python_command(utils.from_here(here / script), *flags)}"
        for what, (script, *flags) in steps.items()
    ]
    return "\n".join(["\nnext:", *lines])


def flags_of(config: Config) -> list[str]:
    """The flags that give a configuration; resolve() has not been there yet."""
    plain = make_config(dataset=config.dataset, recipe=config.recipe, epochs=config.epochs)
    plain.dataset, plain.recipe = Config.dataset, DATASET_RECIPE[config.dataset]
    plain.epochs = RECIPES[config.recipe].get("epochs", Config.epochs)
    flags: list[str] = []
    for name, value in dataclasses.asdict(config).items():
        if value == getattr(plain, name):
            continue
        if isinstance(value, bool):
            flags.append(flag(name if value else f"no_{name}"))
        else:
            flags += [flag(name), str(value)]
    return flags


@utils.command("simclr.py")
def main(argv: Sequence[str] | None = None) -> None:
    try:
        config, overwrite, views_file = parse_command_line(argv)
        with utils.InterruptedBySignals():
            if views_file:
                if utils.rank_info().rank == 0:
                    show_views(config, Path(views_file))
            else:
                run(config, overwrite)
    except Interrupted as stop:
        given = [sys.argv[0], *(word for word in sys.argv[1:] if word != "--overwrite")]
        alone = argv is None and utils.rank_info().size == 1
        command = utils.python_command(*given) if alone else "the same call"
        if utils.rank_info().rank == 0:
            print(f"\nstopped and saved; continue with: {command}", file=sys.stderr)
        raise SystemExit(128 + stop.signal) from None


if __name__ == "__main__":
    main()
