"""SimCLR: a simple framework for contrastive learning of visual representations, in PyTorch.

Chen, Kornblith, Norouzi and Hinton, ICML 2020, https://arxiv.org/abs/2002.05709.

    python simclr.py                                      # embedded digits, a minute on a laptop
    python simclr.py --dataset cifar10                    # ResNet-18, on a GPU
    python simclr.py --dataset folder --data-dir photos   # your own images, labelled or not
    python simclr.py --show-views views.png               # see the augmentation before training
    torchrun --nproc_per_node=8 -- simclr.py --dataset cifar10    # on eight GPUs, the same run

The idea, in the notation of the paper, which the formulas of the code use:

    x      one of the N images of a batch
    t(x)   a random augmentation of x; every image gives two views, so a batch has 2N
    h      f(view), the encoder's output after average pooling: the representation, kept
    z      g(h), the projection head's output: the loss sees it; thrown away after training
    tau    the temperature of NT-Xent. The loss asks of each view: which of the other 2N - 1
           is the second view of the same image? (Eq. 1)

Shapes also use K, the number of views of an image (2, or --views); S, the side of a view in px; D,
the width of z; and W, the number of processes (ranks), each of which computes N / W images.

Read from the top to the end of train(), in the paper's order: settings · augmentation (Section 3)
· encoder and projection head (Section 4) · NT-Xent (Section 2.1) · optimiser and schedule
(Section 2.2) · batches of views · Algorithm 1. Below it: the parts of train(), recipes, the
evaluation of a run, fine-tuning and the command line.

A run keeps its files in checkpoints/<run>/ and draws figures/<run>/loss_plot.png. The same
command continues a run that was interrupted or killed. On the CPU, with the same number of
threads, the result is bit for bit that of an uninterrupted run: all randomness derives from
(seed, epoch, step).
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.optim import Optimizer
from torchvision.transforms.v2 import functional as TF

import utils
from utils import ARCHITECTURES, Data, Images, InputError, Interrupted, LabelTraining, flag, setting

# ---------------------------------------------------------------------------------------- settings

MIN_SIZE, MAX_SIZE = 8, 4096  # px, sides of images and views
MAX_HEAD = 65_536  # width of the head's layers
# streams of randomness: derive_seed(seed, VIEWS, …)
WEIGHTS, SHUFFLE, VIEWS, LABELS, HELD_OUT = range(5)


# fmt: off
@dataclass
class Config:
    """The settings of one run: its command line, and what its checkpoint records.

    The defaults are the paper's settings for ImageNet, but with a batch of 256 images (paper:
    4096) and without blur (paper: p = 0.5). A recipe (RECIPES) overrides them for a data set, and
    flags override the recipe; see make_config(). A run is continued only with the same settings,
    but those with identity=False may change.
    """

    recipe: str = setting("", "named settings, listed below; they replace the values in [ ] "
                          "(default: the recipe for the data set)", group="data")
    dataset: str = setting("digits", "what to pre-train on", utils.DATASETS)
    data_dir: str = setting("data", "where data sets are kept and downloaded to; with 'folder' "
                            "your images", identity=False)
    labels_from: str = setting("", "another folder, with train/<class>/ and test/<class>/, to "
                               "measure kNN on; all of --data-dir is trained on", identity=False)
    image_size: int = setting(0, "side in px that the encoder sees; 0: the images' own, or 224 if "
                              "their sizes vary", low=0, high=MAX_SIZE)
    view_size: int = setting(0, "side in px of all views in pre-training, instead of a recipe's "
        "--view-sizes; 0: image_size. Smaller is faster (arXiv 1906.06423)", low=0, high=MAX_SIZE)
    view_sizes: tuple[float, ...] = setting((), "several sides, each for an equal part of the "
        "epochs: views that grow. Up to 1 they are shares of image_size, others are in px",
        low=0.01, high=MAX_SIZE)
    range: tuple[float, float] = setting((), "values shown as black and as white in grey pictures "
                                         "of more than 8 bits (default: by type and values)")
    hold_out: float = setting(0.0, "share of unlabelled images held out to measure contrastive "
        "accuracy and rank of h (64 to 2,048, at most a tenth; under 16: none)", low=0, high=0.1)
    crop_min: float = setting(0.08, "smallest share of an image's area in a crop", low=1e-6, high=1,
        group="augmentation (Section 3, Appendix A)")
    flip: float = setting(0.5, "probability of a horizontal flip", low=0, high=1)
    rotation: float = setting(0.0, "largest random rotation, in degrees", low=0, high=180)
    jitter_p: float = setting(0.8, "probability of colour jitter", low=0, high=1)
    color_strength: float = setting(1.0, "s: multiplies the four strengths below", low=0)
    brightness: float = setting(0.8, "strength of brightness jitter at s = 1", low=0)
    contrast: float = setting(0.8, "strength of contrast jitter at s = 1", low=0)
    saturation: float = setting(0.8, "strength of saturation jitter at s = 1", low=0)
    hue: float = setting(0.2, "strength of hue jitter at s = 1, in turns of the circle", low=0)
    gray_p: float = setting(0.2, "probability of dropping the colour", low=0, high=1)
    blur_p: float = setting(0.0, "probability of Gaussian blur, sigma 0.1 to 2 px", low=0, high=1)
    arch: str = setting("resnet50", "encoder f", tuple(ARCHITECTURES),
        group="encoder and projection head (Section 4)")
    width: float = setting(1.0, "multiplies f's channels (paper: 1x, 2x, 4x)", low=1 / 64, high=16)
    stem: str = setting("auto", "small: 3x3 without max-pool, for images up to 64 px; imagenet: "
                        "7x7 and max-pool", ("auto", "small", "imagenet"))
    init: str = setting("", "start from these weights: a run, or a file of torchvision, timm or "
        "another project (arch, width, stem and normalize follow from it)", identity=False)
    init_sha256: str = setting("", "SHA-256 that the --init file must have (default: any)")
    normalize: str = setting("none", "how images in [0, 1] are normalised", ("none", *utils.MEANS))
    projection: str = setting("nonlinear", "projection head g", ("nonlinear", "linear", "none"))
    head_hidden: int = setting(0, "width of g's hidden layer; 0: that of h", low=0, high=MAX_HEAD)
    head_dim: int = setting(128, "width of z", low=1, high=MAX_HEAD)
    head_bn: bool = setting(False, "BatchNorm in g's hidden layer")
    loss: str = setting("nt-xent", "dcl: decoupled, without the positive pair in the denominator; "
        "that is not NT-Xent (arXiv 2110.06848)", ("nt-xent", "dcl"),
        group="loss and optimiser (Section 2)")
    temperature: float = setting(0.1, "tau of NT-Xent", low=1e-6)
    batch_size: int = setting(256, "N, images a step over all processes", low=2)
    views: int = setting(2, "K, views of each image; more than two are all each other's positives "
                         "(arXiv 2403.05490)", low=2, high=64)
    micro_batch: int = setting(0, "split the batch into parts of so many images, to save memory "
                               "(gradient caching); BatchNorm works on each part; 0: off", low=0)
    epochs: int = setting(100, "passes over the data", low=1)
    optimizer: str = setting("lars", "update rule", ("lars", "sgd", "adamw"))
    lr: float = setting(0.3, "learning rate before it is scaled", low=1e-12, high=1e30)
    lr_scaling: str = setting("linear", "peak rate: lr*N/256, lr*sqrt(N), or lr itself",
                              ("linear", "sqrt", "none"))
    warmup_epochs: float = setting(10.0, "epochs of linear warm-up before the cosine decay", low=0)
    momentum: float = setting(0.9, "momentum of LARS and SGD", low=0, high=0.9999)
    weight_decay: float = setting(1e-6, "weight decay", low=0)
    decay_all: bool = setting(False, "decay biases and BatchNorm as well")
    seed: int = setting(0, "seed of everything random", low=0, group="the run")
    precision: str = setting("auto", "auto: bfloat16 where the hardware has it (GPUs from Ampere "
        "on: not T4, V100, RTX 20), else float32", ("auto", "bfloat16", "float32"))
    compile: str = setting("auto", "torch.compile the network; auto: on CUDA, where it saves time",
                           ("auto", "on", "off"), identity=False)
    knn_every: int = setting(10, "epochs between measurements of kNN; 0: only at the end", low=0)
    knn_split: str = setting("test", "images that kNN classifies: the test images, or a fifth of "
                             "the labelled training images", ("test", "held-out"))
    stop_at_knn: float = setting(0.0, "kNN accuracy at which the run ends; 0: none", low=0, high=1)
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps", identity=False)
    workers: int = setting(-1, "processes that decode streamed images; -1: one per core",
                           identity=False, low=-1)
    max_bad: float = setting(0.01, "share of the streamed images that may be unreadable: others "
                             "replace them. With more the run stops", identity=False, low=0, high=1)
    checkpoint_minutes: float = setting(10.0, "minutes between checkpoints in an epoch; 0: none",
                                        identity=False, low=0)
    keep_every: int = setting(0, "epochs between checkpoints that are kept, as epoch0010.pt, "
                              "beside the last; 0: none", identity=False, low=0)
    tensorboard: bool = setting(False, "also write the log, and a sheet of views, as events for "
                                "TensorBoard (pip install tensorboard)", identity=False)
    run: str = setting("", "name of the run (default: <dataset or folder>_<arch>)", identity=False)
    checkpoints: str = setting("checkpoints", "folder of all runs' checkpoints", identity=False)
    figures: str = setting("figures", "folder of all runs' figures", identity=False)
    # fmt: on

    @property
    def view_side(self) -> int:
        """Side in px of the views in pre-training. For a resolved configuration."""
        return self.view_size or self.image_size

    def at_epoch(self, epoch: int) -> Config:
        """The configuration with the view_size of an epoch, counted from 0, in view_sizes."""
        sides = self.view_sizes or (self.view_size,)
        part = len(sides) * min(epoch, self.epochs - 1) // self.epochs
        return dataclasses.replace(self, view_size=sides[part])

    @property
    def folder(self) -> Path:
        """Where the run keeps its checkpoints, log and summary."""
        return Path(self.checkpoints) / self.run

    @property
    def figure_folder(self) -> Path:
        return Path(self.figures) / self.run


# ---------------------------------------------------------------------------------- augmentation
#
# Each step is a pure function of images and of u, uniform numbers in [0, 1): a row for each image,
# as many columns as the step declares in `draws`. So every image has its own parameters, nothing
# loops over images or waits for the device, and the same u gives the same views again.

RATIO = (3 / 4, 4 / 3)  # aspect ratios of crops, width : height
CROP_TRIES = 10  # as in torchvision: boxes larger than the image are drawn again, at most 10 times
BLUR_SIGMA = (0.1, 2.0)  # px
BLUR_KERNEL = 0.1  # kernel size as a share of the image's side
# bytes of float32 images that are augmented together: a CPU's cache, a small part of a GPU's memory
CHUNK_BYTES = {"cpu": 2**21, "gpu": 2**28}


def uniform(low: float, high: float, u: Tensor) -> Tensor:
    """[0, 1) -> [low, high)."""
    return low + (high - low) * u


@dataclass
class RandomResizedCrop:
    """A random part of the image, resized to a square (paper: area 8-100 %, aspect 3/4-4/3)."""

    size: int  # px
    scale: tuple[float, float]  # of the area
    draws = 2 * CROP_TRIES + 2  # areas, ratios, top, left

    def boxes(self, u: Tensor, height: Tensor, width: Tensor) -> Tensor:
        """Crop boxes int64 (N, 4): top, left, height, width, distributed as torchvision's.

        height, width: (N,), of the images in px.
        """
        height, width = height.to(u)[:, None], width.to(u)[:, None]  # float (N, 1)
        area = height * width * uniform(*self.scale, u[:, :CROP_TRIES])  # (N, tries)
        ratio = uniform(*map(math.log, RATIO), u[:, CROP_TRIES:-2]).exp()  # log-uniform
        w = (area * ratio).sqrt().round()  # (N, tries)
        h = (area / ratio).sqrt().round()
        fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)

        # the last box always fits: the largest central one of an allowed aspect ratio
        w = torch.cat([w, torch.minimum(width, (height * RATIO[1]).round())], 1)  # (N, tries + 1)
        h = torch.cat([h, torch.minimum(height, (width / RATIO[0]).round())], 1)
        first = F.pad(fits, (0, 1), value=True).int().argmax(1, keepdim=True)  # (N, 1), that fits
        w, h = w.gather(1, first), h.gather(1, first)  # (N, 1)

        # rounding may give one pixel too many
        top = torch.minimum((u[:, -2:-1] * (height - h + 1)).floor(), height - h)
        left = torch.minimum((u[:, -1:] * (width - w + 1)).floor(), width - w)
        central = first == CROP_TRIES
        top = torch.where(central, ((height - h) / 2).floor(), top)
        left = torch.where(central, ((width - w) / 2).floor(), left)
        return torch.cat([top, left, h, w], dim=1).long()

    def __call__(self, images: Tensor, u: Tensor) -> Tensor:
        height, width = (u.new_full((len(u),), side) for side in images.shape[-2:])
        return resized_crop(images, self.boxes(u, height, width), self.size)


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
    outputs = torch.arange(size, device=start.device) + 0.5  # the middles of the pixels
    inputs = torch.arange(pixels, device=start.device) + 0.5
    scale = (length / size)[:, None]  # (N, 1) input px per output px
    centre = start[:, None] + scale * outputs  # (N, size) where they lie in the input
    distance = (inputs - centre[..., None]).abs_()  # (N, size, pixels)
    distance.div_(scale.clamp(min=1)[..., None])  # in widths of the triangle
    inside = (inputs > start[:, None]) & (inputs < (start + length)[:, None])  # (N, pixels)
    weights = (1 - distance).clamp_(min=0).mul_(inside[:, None])  # (N, size, pixels)
    return weights.div_(weights.sum(-1, keepdim=True))


@dataclass
class RandomApply:
    """Applies a function to each image with probability p; others stay as they are, bit for bit.

    function: (images, u) -> (N, 3 or 1, H, W), where u has draws - 1 columns.
    """

    p: float
    function: Callable[[Tensor, Tensor], Tensor]
    draws: int = 1

    def __call__(self, images: Tensor, u: Tensor) -> Tensor:
        chosen = (u[:, :1, None, None] < self.p).to(images.dtype)  # (N, 1, 1, 1), 0 or 1
        # exact, and on a CPU several times as fast as torch.where with a mask
        return images.lerp(self.function(images, u[:, 1:]), chosen)


RandomFlip = partial(RandomApply, function=lambda images, _: images.flip(-1))  # left and right


@dataclass
class RandomRotation:
    """Rotates about the centre by an angle from [-degrees, degrees], bilinear; outside is black."""

    degrees: float
    draws = 1

    def __call__(self, images: Tensor, u: Tensor) -> Tensor:
        angle = torch.deg2rad(uniform(-self.degrees, self.degrees, u[:, 0]))  # counter-clockwise
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)  # (N,)
        ratio = images.shape[-2] / images.shape[-1]  # the grid's units are half sides
        matrix = torch.stack([cos, -sin * ratio, zero, sin / ratio, cos, zero], 1).view(-1, 2, 3)
        grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, align_corners=False)


@dataclass
class ColorJitter:
    """Brightness, contrast and saturation in random order, then hue, each by a random factor.

    The first three blend the image with a grey one: out = f·x + (1 - f)·reference, clamped, where
    the reference is black, the image's mean luma, or each pixel's luma.
    torchvision puts hue at a random place in the order. With hue last, the whole augmentation is
    1.3 to 1.9 times as fast; a pixel differs by 0.004 on average at s = 0.5, and by 0.011 at s = 1,
    where 6 % of the pixels differ by more than 0.05.
    """

    p: float
    strengths: tuple[float, float, float]  # of brightness, contrast, saturation
    hue: float
    draws = 8  # coin, three factors, hue, three for the order

    def __call__(self, images: Tensor, u: Tensor) -> Tensor:
        jittered = u[:, :1] < self.p  # (N, 1)
        factors = [uniform(max(0, 1 - s), 1 + s, u[:, 1 + i]) for i, s in enumerate(self.strengths)]
        factors = torch.where(jittered, torch.stack(factors, 1), 1.0)  # (N, 3); 1 changes nothing
        contrast, saturation = 1, 2
        for which in u[:, 5:8].argsort(1)[..., None, None].split(1, dim=1):  # (N, 1, 1, 1)
            factor = factors[..., None, None].gather(1, which)  # (N, 1, 1, 1)
            reference = TF.rgb_to_grayscale(images)  # (N, 1, H, W)
            mean = reference.mean((-3, -2, -1), keepdim=True)  # (N, 1, 1, 1)
            reference *= (1 - factor) * (which == saturation)
            reference += (1 - factor) * (which == contrast) * mean
            images = torch.addcmul(reference, images, factor).clamp_(0, 1)
        if self.hue:
            turns = torch.where(jittered[:, 0], uniform(-self.hue, self.hue, u[:, 4]), 0.0)  # (N,)
            images = adjust_hue(images, turns)
        return images


def adjust_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Shift the hue of (N, 3, H, W) in [0, 1] by (N,) turns of the colour circle, through HSV.

    In HSV each channel is  min + (max - min)·clamp(|6·frac(hue + n/6) - 2| - 1, 0, 1)  with
    n = 5, 3, 1 for red, green, blue; saturation and value stay, so max and min do too.
    """
    red, green, blue = images.split(1, dim=1)  # (N, 1, H, W)
    high, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    chroma = high - low
    # The hue, in sixths of a turn times chroma, has a formula for each channel that may be the
    # largest. A choice by lerp with weights 0 and 1 is exact, and on a CPU ten times as fast as
    # torch.where with a mask of pixels.
    not_red, not_green = (high - red).sign_(), (high - green).sign_()  # 0 or 1
    hue_if_red = green - blue
    hue_if_green = (blue - red).add_(chroma, alpha=2)
    hue_if_blue = (red - green).add_(chroma, alpha=4)
    sixths = hue_if_green.lerp_(hue_if_blue, not_green)
    sixths = hue_if_red.lerp_(sixths, not_red)
    hue = sixths.div_((6 * chroma).clamp_(min=1e-12)) + turns.view(-1, 1, 1, 1)  # (N, 1, H, W)
    n = 5 - 2 * torch.arange(3, device=images.device).view(1, 3, 1, 1)
    k = hue + (n / 6 + 1)  # (N, 3, H, W); + 1: frac() of a negative number is negative
    k = k.frac_().mul_(6).sub_(2).abs_().sub_(1).clamp_(0, 1)
    return torch.addcmul(low, chroma, k)


def random_blur(images: Tensor, u: Tensor) -> Tensor:
    """Gaussian blur of sigma 0.1 to 2 px, kernel 10 % of the side (Appendix A). u: (N, 1)."""
    kernel = max(3, 2 * round((BLUR_KERNEL * images.shape[-1] - 1) / 2) + 1)  # odd
    return gaussian_blur(images, uniform(*BLUR_SIGMA, u[:, 0]), kernel)


RandomGrayscale = partial(RandomApply, function=lambda images, _: TF.rgb_to_grayscale(images))
RandomBlur = partial(RandomApply, function=random_blur, draws=2)


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

    `augment(images, u)` -> float32 (N, 3, size, size) in [0, 1], on the images' device.
    images: uint8 (N, 3, H, W), or float in [0, 1].
    u: float (N, draws) in [0, 1), the randomness, from draw().
    first: the step to start with (1 where the crop was made while decoding).
    """

    def __init__(self, size: int, steps: list[Any]) -> None:
        self.size, self.steps = size, steps

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """The randomness of n views: float32 (n, draws), on the generator's device."""
        draws = sum(step.draws for step in self.steps)
        return torch.rand(n, draws, generator=generator, device=generator.device)

    def __call__(self, images: Tensor, u: Tensor, first: int = 0) -> Tensor:
        limit = CHUNK_BYTES["cpu" if images.device.type == "cpu" else "gpu"]
        chunk = max(8, limit // (3 * 4 * self.size**2))  # images: 3 channels of 4 bytes
        views = []
        for x, numbers in zip(images.split(chunk), u.split(chunk), strict=True):
            x = x.float().div_(255) if x.dtype == torch.uint8 else x  # noqa: PLW2901
            columns = numbers.split([step.draws for step in self.steps], dim=1)
            for step, own in zip(self.steps[first:], columns[first:], strict=True):
                x = step(x, own)  # noqa: PLW2901
            views.append(x.clamp(0, 1))
        return torch.cat(views)


def make_augment(config: Config) -> Augment:
    """The augmentation that a (resolved) configuration describes: steps without effect left out."""
    size, s = config.view_side, config.color_strength
    strengths = s * config.brightness, s * config.contrast, s * config.saturation
    jitter = ColorJitter(config.jitter_p, strengths, s * config.hue)
    steps = [
        RandomResizedCrop(size, (config.crop_min, 1.0)),
        config.flip and RandomFlip(config.flip),
        config.rotation and RandomRotation(config.rotation),
        jitter.p and any((*strengths, jitter.hue)) and jitter,
        config.gray_p and RandomGrayscale(config.gray_p),
        config.blur_p and RandomBlur(config.blur_p),
    ]
    return Augment(size, [step for step in steps if step])


# -------------------------------------------------------------------- encoder and projection head

# channels: with fewer, torch 2.14 writes outside its memory in the gradient of 1x1 convolutions of
# stride 2 on CPUs (channels last, from 64 px on); remove SubsamplingConv once that is mended
CONV_BUG_CHANNELS = 16


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
        self.bn1 = nn.BatchNorm2d(channels)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")

    def _scaled(self, channels: int) -> int:
        return max(1, round(channels * self._width))

    def _make_layer(self, block, planes, blocks, stride=1, dilate=False):
        if planes == 64:  # the first stage; the parent's stem has 64 channels at any width
            self.inplanes = self._scaled(64)
        stage = super()._make_layer(block, self._scaled(planes), blocks, stride, dilate)
        if stride == 2 and stage[0].downsample[0].in_channels < CONV_BUG_CHANNELS:
            stage[0].downsample[0].__class__ = SubsamplingConv  # of the same weights
        return stage


class SubsamplingConv(nn.Conv2d):
    """A 1x1 convolution of stride 2, computed as one of stride 1 on every second pixel."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x[..., ::2, ::2], self.weight)


class SimCLR(nn.Module):
    """Encoder f and projection head g: views (B, 3, S, S) -> h (B, feature_dim), z (B, D).

    After training only the encoder is kept; z is for the loss (Section 4.2: h is better by more
    than 10 points). encoder: in place of the configuration's ResNet, images -> (B, D).
    """

    def __init__(self, config: Config, encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.encoder = encoder or Encoder(config.arch, config.width, config.stem)
        if config.normalize != "none":  # as the weights of --init expect
            self.encoder = utils.Normalized(self.encoder, config.normalize)
        dim = output_width(encoder, config.view_side) if encoder else self.encoder.feature_dim
        hidden, out = config.head_hidden or dim, config.head_dim
        self.projector = make_projector(config.projection, dim, hidden, out, config.head_bn)

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


def make_model(config: Config, encoder: nn.Module | None = None) -> SimCLR:
    """A fresh model whose weights depend on config.seed alone; a given encoder keeps its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(utils.derive_seed(config.seed, WEIGHTS))
        return SimCLR(config, encoder)


# --------------------------------------------------------------------------------------- NT-Xent

# bytes of similarities computed at a time: a CPU's cache, a small part of a GPU's memory
BLOCK_BYTES = {"cpu": 2**22, "gpu": 2**28}
HUGE = 1e15  # from here on the sum of squares could overflow float32


def nt_xent(
    z1: Tensor, z2: Tensor, temperature: float, *others: Tensor, decoupled: bool = False
) -> Tensor:
    """The normalised temperature-scaled cross entropy loss (Eq. 1), a scalar.

    Returns the mean, over all ordered pairs of two views of one image, of

        -log(exp(cos / tau) / (exp(cos / tau) + the sum of exp(cos / tau) to all negatives)).

    The negatives of a view are the K(N - 1) views of other images. If all views have the same z,
    the loss is ln(1 + K(N - 1)), which is ln(2N - 1) for two views.

    z1, z2: float (N, D), the projections of the two views of N >= 2 images, of any length: they
    are normalised here. others: those of further views, if there are K > 2 of each image.
    decoupled: without the pair in the denominator, which is no longer NT-Xent (DCL, Yeh et al.
    2021). Raises ValueError if the shapes differ or are not (N, D).
    """
    views = [z1, z2, *others]
    if z1.ndim != 2 or any(z.shape != z1.shape for z in views):
        raise ValueError(f"need (N, D) of one shape, got {[(*z.shape,) for z in views]}")
    loss = partial(block_loss, views=len(views), temperature=temperature, decoupled=decoupled)
    with utils.autocast(z1.device, "float32"):  # a loss needs more digits than bfloat16 has
        z = normalize_rows(torch.cat(views))  # (KN, D)
        blocks = row_blocks(z)
        total = loss(z, blocks[0]) if len(blocks) == 1 else SumOfBlocks.apply(z, loss)
        return total / (len(z) * (len(views) - 1))


LOSSES = {"nt-xent": nt_xent, "dcl": partial(nt_xent, decoupled=True)}


def block_loss(z: Tensor, rows: Tensor, views: int, temperature: float, decoupled: bool) -> Tensor:
    """Eq. 1, summed over the pairs of some of the views.

    z: (KN, D) of length 1; rows i, N + i, 2N + i … are the views of one image. rows: int64 (R,).
    """
    n = len(z) // views
    logits = z[rows] / temperature @ z.T  # (R, KN): cos / tau to every view
    same = rows[:, None] % n + n * torch.arange(views, device=z.device)  # (R, K), the row too
    positives = (z[rows, None] * z[same]).sum(2) / temperature  # (R, K)
    negatives = logits.scatter_(1, same, float("-inf")).logsumexp(1, keepdim=True)  # (R, 1)
    denominators = negatives if decoupled else torch.logaddexp(positives, negatives)
    return (denominators - positives).masked_fill(same == rows[:, None], 0).sum()  # k != i


def row_blocks(z: Tensor) -> tuple[Tensor, ...]:
    """All row numbers of z (KN, D), int64, in blocks whose similarities fill BLOCK_BYTES."""
    limit = BLOCK_BYTES["cpu" if z.device.type == "cpu" else "gpu"]
    rows = max(1, limit // (len(z) * z.element_size()))
    return torch.arange(len(z), device=z.device).split(rows)


class SumOfBlocks(torch.autograd.Function):
    """The sum of loss(z, rows) over all blocks of rows of z (KN, D), see block_loss().

    Each block's gradient is computed with its loss, and then the block's memory is freed: the
    matrix of 65,536 views would take 16 GiB. torch.utils.checkpoint takes twice the time and more
    memory on a CPU. The result can be differentiated once.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        leaf, total = z.detach().requires_grad_(), z.new_zeros(())
        for rows in row_blocks(z):
            with torch.enable_grad():
                block = loss(leaf, rows)
            block.backward()  # adds to leaf.grad
            total += block.detach()
        ctx.save_for_backward(leaf.grad)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None]:
        return outer * ctx.saved_tensors[0], None


def normalize_rows(z: Tensor) -> Tensor:
    """Rows (N, D) scaled to length 1, in at least float32. Rows shorter than 1e-12 stay short."""
    z = utils.at_least_float32(z)
    largest = z.detach().abs().amax(1, keepdim=True)  # (N, 1)
    return F.normalize(z / torch.where(largest > HUGE, largest, 1.0), dim=1)


# ------------------------------------------------------------------------ optimiser and schedule


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017), as the paper trains (Section 2.2).

    For each weight: g ← gradient + decay·w, v ← momentum·v + lr·(trust·‖w‖ / ‖g‖)·g, w ← w - v.
    trust·‖w‖ / ‖g‖ becomes 1 in a group with adapt=False (biases and BatchNorm, as in the paper),
    and where a norm is zero.
    """

    def __init__(
        self, params: Iterable, lr: float, momentum: float = 0.9, weight_decay: float = 0.0,
        trust: float = 0.001,
    ) -> None:  # fmt: skip
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust)
        super().__init__(params, {**defaults, "adapt": True})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:  # all its weights at once: few kernel launches on a GPU
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
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


def make_optimizer(config: Config, model: nn.Module) -> Optimizer:
    """LARS, SGD or AdamW over two groups: weights, and biases and BatchNorm.

    The second group is not decayed (unless config.decay_all) and not adapted by LARS.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    weights, others = [p for p in params if p.ndim > 1], [p for p in params if p.ndim <= 1]
    groups = [
        {"params": weights, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": config.weight_decay if config.decay_all else 0.0},
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

    batch_size: N, of a step: less than config.batch_size where there are fewer images.
    """
    scale = {"linear": batch_size / 256, "sqrt": math.sqrt(batch_size), "none": 1.0}
    return config.lr * scale[config.lr_scaling]


def learning_rate(config: Config, step: int, batch_size: int, steps: int) -> float:
    """The rate of a step: linear up to the peak, then half a cosine to zero (Section 2.2).

    step: from 0, over all epochs. batch_size: N. steps: of an epoch.
    """
    peak, total = peak_learning_rate(config, batch_size), config.epochs * steps
    warmup = round(config.warmup_epochs * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (1 + math.cos(math.pi * progress)) / 2


def set_rate(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


# ------------------------------------------------------------------------------ batches of views


def batch_count(config: Config, n: int) -> tuple[int, int]:
    """(images a step, steps an epoch) for n images.

    The last, smaller batch is left out, unless it is the only one: then all images are a batch.
    """
    size = min(config.batch_size, n)
    return size, n // size


def view_batches(
    config: Config, data: Images, device: torch.device, epoch: int, start: int,
    augment: Augment | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """The epoch's batches from step `start` on: K views of N images, float32 (KN, 3, S, S).

    Rows i, N + i, 2N + i … are the views of one image. Order and views follow from (seed, epoch,
    step) alone. Each of W ranks gets N / W images of a batch, every W-th, with the same views that
    they have in a single process: (KN / W, 3, S, S). augment: by default that of the epoch.
    """
    size, steps = batch_count(config, len(data))
    order = torch.randperm(len(data), generator=utils.generator("cpu", config.seed, SHUFFLE, epoch))
    batches = order[: size * steps].view(steps, size)[start:]  # (steps left, N)
    keys = [(config.seed, VIEWS, epoch, step) for step in range(start, steps)]
    yield from augmented_batches(
        data, batches, keys, augment or make_augment(config.at_epoch(epoch)), config.views,
        device, config.workers, utils.rank(), utils.world_size(),
    )  # fmt: skip


def augmented_batches(
    data: Images, batches: Tensor, keys: Sequence[tuple[int, ...]], augment: Augment, views: int,
    device: torch.device, workers: int = 0, rank: int = 0, world_size: int = 1,
) -> Iterator[Tensor]:  # fmt: skip
    """Augmented views of given images: float32 (KN, 3, S, S) on `device`, a batch each.

    batches: int64 (steps, N), rows of `data`. keys: for each batch the stream of its randomness
    (utils.generator). views: K, in the order of view_batches(). Only every world_size-th image from
    `rank` on is computed, with the views that it has in the whole batch.
    """
    n, rows = batches.shape[1], batches[:, rank::world_size]  # N, (steps, N / W)

    def draw(key: tuple[int, ...], where: torch.device | str) -> Tensor:
        """The numbers of this rank's images, (K, N / W, draws), out of those of the whole batch."""
        u = augment.draw(views * n, utils.generator(where, *key))  # (KN, draws)
        return u.unflatten(0, (views, n))[:, rank::world_size]

    if data.images is not None:
        for row, key in zip(rows.to(device), keys, strict=True):
            yield augment(data.images[row].repeat(views, 1, 1, 1), draw(key, device).flatten(0, 1))
        return

    def requests() -> Iterator[tuple[Tensor, Tensor]]:
        for row, key in zip(rows, keys, strict=True):
            u = draw(key, "cpu").transpose(0, 1).contiguous()  # (N / W, K, draws)
            yield row, u.pin_memory() if device.type == "cuda" else u

    crop: RandomResizedCrop = augment.steps[0]  # by the workers; the other steps on the device
    boxes = partial(crop_boxes, crop)
    for crops, u in utils.decoded_batches(data, requests(), crop.size, boxes, workers, device):
        images = crops.transpose(0, 1).flatten(0, 1)  # uint8 (KN / W, 3, S, S)
        u = u.to(device, non_blocking=True).transpose(0, 1).flatten(0, 1)  # noqa: PLW2901
        yield augment(images, u, first=1)


def crop_boxes(crop: RandomResizedCrop, sizes: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Boxes (N, K, 4) of K crops of each image. sizes: (N, 2) height, width. u: (N, K, draws)."""
    height, width = torch.from_numpy(sizes).repeat_interleave(u.shape[1], 0).unbind(1)
    boxes = crop.boxes(torch.from_numpy(u[..., : crop.draws]).flatten(0, 1), height, width)
    return boxes.unflatten(0, u.shape[:2]).numpy()


# -------------------------------------------------------------------------- training: Algorithm 1


@dataclass
class TrainState:
    """The position of a run. With weights and optimiser state it is all that resuming needs."""

    steps: int  # of an epoch
    sums: Tensor  # float32 (3,): loss, contrastive accuracy, mean cosine, summed over `step` steps
    epoch: int = 0  # complete epochs
    step: int = 0  # complete steps of the current epoch
    seconds: float = 0.0  # of training in the current epoch
    clock: utils.Clock = dataclasses.field(default_factory=utils.Clock)  # of the run, see TIMED
    log: list[dict] = dataclasses.field(default_factory=list)  # a row for each complete epoch

    @property
    def done(self) -> int:
        """Complete steps of the run."""
        return self.epoch * self.steps + self.step

    def add(self, loss: Tensor, accuracy: Tensor, cosine: Tensor) -> None:
        """Count a step. Its numbers stay on the device, so that the step need not wait for it."""
        self.sums += torch.stack([loss, accuracy, cosine])
        self.step += 1

    def next_epoch(self, row: dict) -> None:
        self.log.append(row | self.clock.seconds())
        self.epoch, self.step, self.seconds = self.epoch + 1, 0, 0.0
        self.sums = torch.zeros_like(self.sums)


Loss = Callable[..., Tensor]  # (z1, z2, temperature, *z of further views) -> scalar


def training_step(
    network: nn.Module, views: Tensor, loss: Loss, config: Config
) -> tuple[Tensor, Tensor]:
    """One forward and backward pass; the gradients are added to those of the weights.

    views: float32 (KN / W, 3, S, S), this rank's part of the K views of N images. Returns the
    loss of the whole batch and z (KN, D), both detached.
    """
    n = utils.world_size() * len(views) // config.views  # N
    if 0 < config.micro_batch < n:
        return cached_gradients(network, views, loss, config)
    _, z = forward(network, views, config.precision)  # one pass: BatchNorm sees all KN views
    z = gather_views(z, config.views)  # (KN, D), with gradient
    z1, z2, *others = z.chunk(config.views)
    value = loss(z1, z2, config.temperature, *others)  # Eq. 1
    value.backward()
    return value.detach(), z.detach()


def forward(network: nn.Module, views: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """h = f(views) and z = g(h): float32 (B, 3, S, S) -> (B, feature_dim), (B, D)."""
    with utils.autocast(views.device, precision):
        return network(views.contiguous(memory_format=torch.channels_last))


def gather_views(z: Tensor, views: int) -> Tensor:
    """The whole batch's z from each rank's part, with gradient: (KN / W, D) -> (KN, D).

    In the order of the batch, of which a rank has every W-th image (see view_batches). In the
    backward pass Gather sums the gradients of W ranks, and DistributedDataParallel divides by W.
    """
    if utils.world_size() == 1:
        return z
    z = utils.at_least_float32(z).unflatten(0, (views, -1))  # (K, N / W, D)
    return utils.Gather.apply(z).permute(1, 2, 0, 3).flatten(0, 2)  # from (W, K, N / W, D)


def train(
    config: Config, data: Data, device: torch.device, *, loss: Loss | None = None,
    batches: Callable[..., Iterator[Tensor]] = view_batches, model: SimCLR | None = None,
    clock: utils.Clock | None = None,
) -> SimCLR:  # fmt: skip
    """Algorithm 1, from the run's last checkpoint on. W ranks compute what one process computes.

    config: resolved. loss, batches, model: of ablations and pretrain(). The caller holds the lock.
    Raises Interrupted on a signal, after saving; InputError for other settings, bad images or loss.
    """
    size, steps = batch_count(config, len(data.pretrain))  # N, steps an epoch
    loss = loss or LOSSES[config.loss]
    model = utils.on_device(model or start_model(config), device)  # BatchNorm over all ranks
    optimizer = make_optimizer(config, model)
    run = utils.RunFolder(config.folder, config.checkpoint_minutes, config.keep_every)
    now = TrainState(steps, torch.zeros(3, device=device), clock=clock or utils.Clock())
    restore(run, config, data, model, optimizer, now)
    network = compiled(model, config, size, now)
    now.clock.lap("other")
    with utils.stop_signals() as stop, utils.Progress(config.epochs * steps, now.done) as progress:
        while not complete(config, now):
            network.train()
            signal, save_due, errors = 0, 0, []  # errors: of the stream, raised after saving
            stream = batches(config, data.pretrain, device, now.epoch, now.step)
            for views in utils.until_error(stream, errors):  # float32 (KN / W, 3, S, S)
                set_rate(optimizer, learning_rate(config, now.done, size, steps))
                value, z = training_step(network, views, loss, config)
                optimizer.step()
                optimizer.zero_grad()
                now.add(value, contrastive_accuracy(*z.chunk(config.views)), mean_cosine(z))
                progress.update()
                signal, save_due = utils.all_reduce_max(stop[0] if stop else 0, run.save_due())
                if signal or save_due:  # in all ranks after the same step
                    break  # to save; `while` then continues the epoch
            check_finite(model, now, config)  # waits for the device
            now.seconds += now.clock.lap("training")
            error = errors[0] if errors else utils.unreadable_error(data.pretrain)
            if now.step == steps:
                row = epoch_row(config, data, now, size)
                measured = measured_after(now.epoch + 1, config, data)
                if config.view_sizes and (measured or now.epoch + 1 == config.epochs):
                    estimate_statistics(model, data.pretrain, config, device)
                if measured and not error:
                    row |= measure(model, data, config, device, now)
                now.next_epoch(row)
                write_events(config, row)
                progress.show(*describe(row, config))
                (signal,) = utils.all_reduce_max(stop[0] if stop else 0)
            must = signal or error or complete(config, now)
            due = save_due or now.clock.within("saving", SAVE_SHARE)
            run.save(snapshot(config, data, model, optimizer, now), must=must, due=due)
            now.clock.lap("saving")
            redraw(config, now, size)
            if error:
                raise InputError(f"{error}; the run is saved, and the same command continues it")
            if signal:
                raise Interrupted(signal)
    return model


# --------------------------------------------------------------------------- the parts of train()

CHECKPOINT_FORMAT = 4
SAVE_SHARE = 0.02  # of the run's time, at most, for checkpoints at the end of epochs
FIGURE_SHARE = 0.01  # of the run's time, at most, to redraw the training curves
FIGURE = "loss_plot.png"
# parts of a run's wall time, in the log and the summary; other: reading, compiling, the rest
TIMED = ("training", "monitoring", "saving", "drawing", "evaluation", "other")
STATISTICS_IMAGES = 8192
HELD_OUT_BATCH = 128  # images, whose 256 views are computed together
COLLAPSED = 0.9999  # mean cosine
COMPILE = {"mode": "reduce-overhead"}  # of torch.compile: on CUDA with CUDA graphs
COMPILE_PAYS_S = 600.0  # of training: compiling takes about a minute, and saves a tenth or more
TIMED_PASSES = 6  # the first compiles, CUDA graphs are recorded in the second
REMEDIES = "Try a lower --lr, longer --warmup-epochs, higher --temperature or --precision float32"


def start_model(config: Config) -> SimCLR:
    """The model before pre-training: a fresh one, whose encoder has the weights of config.init."""
    model = make_model(config)
    if config.init:
        if utils.file_digest(Path(config.init)) != config.init_sha256:
            raise InputError(f"--init {config.init} has changed since the run began")
        weights = load_source(Path(config.init)).resnet.state_dict()
        utils.without_normalization(model.encoder).load_state_dict(weights)
    return model


def complete(config: Config, now: TrainState) -> bool:
    """Whether the last epoch is done, or the kNN accuracy is reached that ends the run."""
    accuracy = now.log[-1].get("knn", 0) if now.log else 0
    return now.epoch >= config.epochs or 0 < config.stop_at_knn <= accuracy


def snapshot(
    config: Config, data: Data, model: nn.Module, optimizer: Optimizer, now: TrainState
) -> dict:
    """The content of a checkpoint: plain types and tensors, for torch.load(weights_only=True)."""
    position = dict(epoch=now.epoch, step=now.step, sums=now.sums.tolist(), seconds=now.seconds)
    return {
        "format": CHECKPOINT_FORMAT,
        "config": dataclasses.asdict(config),
        "position": position,
        "log": now.log,
        "times": now.clock.parts,
        "images": len(data.pretrain),
        "files": data.files,
        "unreadable": sorted(data.pretrain.unreadable),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }


def restore(
    run: utils.RunFolder, config: Config, data: Data, model: nn.Module, optimizer: Optimizer,
    now: TrainState,
) -> None:  # fmt: skip
    """Load the last checkpoint into model, optimizer and `now`, or begin a new run and save it.

    A checkpoint from before the first step is overwritten. Raises InputError if the checkpoint is
    of other settings, which are named, or cannot be read, or if none can be written.
    """
    state, file = utils.broadcast_from_rank0(run.load)
    with utils.errors_as_input_error(f"{file} is not a checkpoint of this run"):
        if state is not None:
            utils.check_format(f"{file} is a checkpoint", state.get("format"), CHECKPOINT_FORMAT)
        if state is None or (state["position"]["epoch"], state["position"]["step"]) == (0, 0):
            run.save(snapshot(config, data, model, optimizer, now), must=True)
            return
        check_same_run(state, config, data)
        utils.load_weights(model, state["model"], str(file))
        groups = optimizer.state_dict()["param_groups"]  # their settings follow from the config
        optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        position, now.log = state["position"], state["log"]
        now.epoch, now.step, now.seconds = (position[k] for k in ("epoch", "step", "seconds"))
        now.sums += torch.tensor(position["sums"], device=now.sums.device)
        now.clock.parts.update(state.get("times", {}))  # of earlier processes, to their last save
        if state["unreadable"]:  # try them again: batches() records those that still are
            rows = torch.tensor(state["unreadable"])
            list(data.pretrain.batches(1, len(rows), torch.device("cpu"), rows=rows))
    if error := utils.unreadable_error(data.pretrain):
        raise error
    run.write_records(state)
    print(f"continuing {config.folder} after {now.epoch} of {config.epochs} epochs")


def compiled(model: SimCLR, config: Config, size: int, now: TrainState) -> nn.Module:
    """The network to train: the model, its DistributedDataParallel, or its compiled form.

    With --compile auto it is compiled where that can pay, and only used if it is faster. Where
    torch.compile fails, as without a C compiler, a line says so and the model is not compiled. If
    views grow, a GPU computes the largest ones now: too little memory shows before the training.
    size: N. The model's weights and statistics stay as they are.
    """
    tried = config.compile != "off" or (config.view_sizes and now.sums.is_cuda)
    if not tried or complete(config, now):
        return utils.distributed(model)
    torch.compiler.reset()  # else torch compiles only eight networks in a process
    weights, started = copy.deepcopy(model.state_dict()), time.perf_counter()
    count = config.views * (config.micro_batch or size) // utils.world_size()
    side = max(config.view_sizes or (config.view_side,))
    views = torch.zeros((count, 3, side, side), device=now.sums.device)
    network, usual = model.train(), seconds_a_pass(model, views, config)
    left, wanted = usual * (config.epochs * now.steps - now.done), config.compile == "on"
    if wanted or (config.compile == "auto" and left > COMPILE_PAYS_S):
        try:
            # CUDA graphs would overwrite the z of one micro-batch with those of the next
            fast = torch.compile(model, dynamic=False, **({} if config.micro_batch else COMPILE))
            seconds = seconds_a_pass(fast, views, config)
            network = fast if wanted or seconds < usual else model
            print(
                f"compiled in {time.perf_counter() - started:.0f} s: a pass takes "
                f"{1000 * seconds:.1f} ms instead of {1000 * usual:.1f}"
            )
        except Exception as error:  # compilers raise nearly anything
            reason = utils.one_line(str(error), 200)
            utils.log_warning(f"torch.compile failed, so the network is not compiled ({reason})")
    model.zero_grad()
    model.load_state_dict(weights)  # BatchNorm's statistics have moved
    return utils.distributed(network)


def seconds_a_pass(network: nn.Module, views: Tensor, config: Config) -> float:
    """Time of a forward and backward pass of views (B, 3, S, S), once kernels are compiled."""
    times = []
    for _ in range(TIMED_PASSES):
        network.zero_grad()
        started = time.perf_counter()
        forward(network, views, config.precision)[1].sum().backward()
        next(network.parameters()).grad.sum().item()  # waits for the device
        times.append(time.perf_counter() - started)
    return min(times)


@torch.no_grad()
def check_finite(model: SimCLR, now: TrainState, config: Config) -> None:
    """Raise InputError if the loss, a weight or an output of the network is not finite.

    Weights can be finite but so large that the outputs are not. Waits for the device once.
    """
    grey = torch.full((1, 3, config.image_size, config.image_size), 0.5, device=now.sums.device)
    values = [now.sums, *model.eval()(grey), *model.state_dict().values()]
    if not torch.stack([x.isfinite().all() for x in values]).all():
        raise InputError(
            f"the loss or the network is not finite in epoch {now.epoch + 1} (of {config.epochs}); "
            f"the last good checkpoint is kept. {REMEDIES}"
        )


@torch.no_grad()
def contrastive_accuracy(*views: Tensor) -> Tensor:
    """Share of views whose nearest other view is of the same image: K of (N, D) -> [0, 1]."""
    n = len(views[0])
    with utils.autocast(views[0].device, "float32"):
        z = normalize_rows(torch.cat(views))  # (KN, D)
        nearest = [(z[rows] @ z.T).scatter_(1, rows[:, None], float("-inf")).argmax(1)
                   for rows in row_blocks(z)]  # fmt: skip
    return (torch.cat(nearest) % n == torch.arange(len(z), device=z.device) % n).float().mean()


def mean_cosine(z: Tensor) -> Tensor:
    """Mean cosine of all pairs of different rows of (n, D): scalar in [-1, 1]; 1: collapsed.

    The squared length of the sum of all unit rows is the sum of the cosines of all pairs; in n of
    these a row is paired with itself, and the cosine is 1.
    """
    n = len(z)
    return (normalize_rows(z).sum(0).square().sum() - n) / (n * (n - 1))


def epoch_row(config: Config, data: Data, now: TrainState, size: int) -> dict:
    """The row that log.jsonl gets for a complete epoch. size: N, images a step."""
    loss, accuracy, cosine = (x / now.steps for x in now.sums.tolist())
    row = {
        "epoch": now.epoch + 1,
        "loss": loss,
        "contrastive_accuracy": accuracy,
        "lr": learning_rate(config, now.done - 1, size, now.steps),
        "views_per_second": round(config.views * size * now.steps / now.seconds, 1),
        "seconds": round(now.seconds, 3),
    }
    if cosine > COLLAPSED:
        row["collapsed"] = True
        if not any("collapsed" in earlier for earlier in now.log):
            utils.log_warning(
                f"in epoch {row['epoch']} all views have the same z: the network has collapsed, "
                f"or the images are all alike. {REMEDIES}"
            )
    if data.pretrain.unreadable:
        row["unreadable"] = len(data.pretrain.unreadable)
    return row


def measured_after(epoch: int, config: Config, data: Data) -> bool:
    """Whether the representation is measured after this epoch, counted from 1, see measure()."""
    due = epoch == config.epochs or (config.knn_every > 0 and epoch % config.knn_every == 0)
    return due and (data.labelled or data.held_out is not None)


def measure(
    model: SimCLR, data: Data, config: Config, device: torch.device, now: TrainState
) -> dict:
    """What the log gets of a monitored epoch: kNN accuracy, and what measure_held_out() finds."""
    row = measure_held_out(model, data.held_out, config, device) if data.held_out else {}
    if data.labelled and config.knn_split == "test":
        accuracy = knn_accuracy(model.encoder, data, config, device)
        row |= {"knn": accuracy, "knn_images": len(data.test)}
    elif data.labelled:
        x, y = labelled_features(model.encoder, data.train, config, device)
        row["knn"], row["knn_images"] = validation_knn(x, y, len(data.train.classes))
    return row | {"knn_seconds": round(now.clock.lap("monitoring"), 3)}


def effective_rank(h: Tensor) -> float:
    """exp of the entropy of the singular values of (N, D), their sum scaled to 1; 1: collapsed.

    How many directions the representations use, at most min(N, D) (arXiv 2210.02885).
    """
    values = torch.linalg.svdvals(h.float().cpu())
    shares = values / values.sum().clamp(min=1e-12)  # if all h are 0
    return torch.special.entr(shares).sum().exp().item()


@torch.no_grad()
def measure_held_out(
    model: SimCLR, images: Images, config: Config, device: torch.device
) -> dict[str, float]:
    """Contrastive accuracy in [0, 1] and effective rank of h on images that are not learned from.

    Images and views are the same in each epoch, for each batch size and each seed.
    """
    parts, augment, workers = [], make_augment(config), config.workers
    with utils.evaluating(model):
        for rows in torch.arange(len(images)).split(HELD_OUT_BATCH):
            key = (0, HELD_OUT, int(rows[0]))
            (views,) = augmented_batches(images, rows[None], [key], augment, 2, device, workers)
            outputs = forward(model, views, config.precision)
            parts.append([x.float().unflatten(0, (2, -1)) for x in outputs])  # (2, N, D) each
    h, z = (torch.cat(x, dim=1) for x in zip(*parts, strict=True))
    accuracy = contrastive_accuracy(*z).item()
    return {"held_out_accuracy": accuracy, "effective_rank": effective_rank(h[0])}


def estimate_statistics(
    model: SimCLR, images: Images, config: Config, device: torch.device
) -> None:
    """Estimates BatchNorm's running statistics anew, on images as they are when h is evaluated.

    For a run with view_sizes: the statistics of features depend on the size of the images. They are
    those of up to STATISTICS_IMAGES images without augmentation.
    """
    size, steps = batch_count(config, len(images))
    rows = torch.randperm(len(images), generator=utils.generator("cpu", config.seed, SHUFFLE))
    rows = rows[: size * min(steps, max(1, STATISTICS_IMAGES // size))]
    rows, size = rows[utils.rank() :: utils.world_size()], size // utils.world_size()
    batches = images.batches(config.image_size, size, device, config.workers, rows)
    with utils.autocast(device, config.precision):
        torch.optim.swa_utils.update_bn(batches, model)  # the mean over the batches


def describe(row: dict, config: Config) -> tuple[dict[str, str], str]:
    """The numbers of an epoch for the progress bar, and as a line."""
    values = {"epoch": f"{row['epoch']:4d}/{config.epochs}", "loss": f"{row['loss']:.3f}"}
    line = f"epoch {values['epoch']}  loss {values['loss']}"
    line += f"  contrastive accuracy {row['contrastive_accuracy']:5.1%}"
    more = {"kNN": utils.accuracy_text(row["knn"], row["knn_images"])} if "knn" in row else {}
    if "effective_rank" in row:
        more |= {"held out": f"{row['held_out_accuracy']:.1%}",
                 "rank of h": f"{row['effective_rank']:.1f}"}  # fmt: skip
    line += "".join(f"  {name} {value}" for name, value in more.items())
    pixels = [config.at_epoch(epoch).view_side ** 2 for epoch in range(config.epochs)]
    left = row["seconds"] * sum(pixels[row["epoch"] :]) / pixels[row["epoch"] - 1]
    line += f"  {row['views_per_second']:,.0f} views/s  {left:.0f} s left"
    return values | more, line


def cached_gradients(
    network: nn.Module, views: Tensor, loss: Loss, config: Config
) -> tuple[Tensor, Tensor]:
    """training_step() with the activations of one micro-batch in memory at a time.

    The loss needs all z at once, but z is small (Gao et al. 2021, arXiv 2101.06983). The gradient
    is that of the whole batch, for a third more time, with one difference: BatchNorm's statistics
    are those of a micro-batch, all views of M images.
    """
    size = config.micro_batch // utils.world_size()  # images of this rank in a micro-batch

    def project_part(part: Tensor) -> Tensor:  # (K, M / W, 3, S, S) -> (K, M / W, D)
        _, z = forward(network, part.flatten(0, 1), config.precision)
        return utils.at_least_float32(z).unflatten(0, (config.views, -1))

    parts = views.unflatten(0, (config.views, -1)).split(size, dim=1)
    # 1. z of all views, without activations: BatchNorm's running statistics move in pass 3 alone,
    # and dropout draws the same numbers there
    norms = [m for m in network.modules() if hasattr(m, "track_running_stats")]
    still = utils.temporarily(norms, "track_running_stats", False)
    with torch.no_grad(), still, utils.fork_rng(views.device):
        z = torch.cat([project_part(part) for part in parts], dim=1).flatten(0, 1)  # (KN / W, D)
    # 2. the gradient of the loss by each z
    z.requires_grad_()
    whole = gather_views(z, config.views)
    z1, z2, *others = whole.chunk(config.views)
    value = loss(z1, z2, config.temperature, *others)
    value.backward()
    # 3. each micro-batch again, with activations; ranks exchange the sum of the gradients once
    gradients = z.grad.unflatten(0, (config.views, -1)).split(size, dim=1)
    for i, (part, gradient) in enumerate(zip(parts, gradients, strict=True), 1):
        if utils.world_size() > 1:  # as DistributedDataParallel.no_sync() sets it
            network.require_backward_grad_sync = i == len(parts)
        project_part(part).backward(gradient)
    return value.detach(), whole.detach()


def write_events(config: Config, row: dict) -> None:
    """Writes the numbers of an epoch for TensorBoard, with --tensorboard."""
    if config.tensorboard and utils.is_main_process():
        writer = utils.event_writer(config.folder)
        for key in PANELS.keys() & row.keys():
            writer.add_scalar(key, row[key], row["epoch"])
        writer.flush()


def redraw(config: Config, now: TrainState, size: int) -> None:
    """Draw the training curves, if that has not taken too large a share of the time."""
    due = complete(config, now) or now.clock.within("drawing", FIGURE_SHARE)
    if due and now.log and utils.is_main_process():
        figure = draw_training(config, now.log, size)
        utils.warn_on_failure(utils.save_figure, figure, config.figure_folder / FIGURE)
    now.clock.lap("drawing")


@torch.no_grad()
def output_width(encoder: nn.Module, size: int) -> int:
    """D of an encoder float (B, 3, size, size) -> (B, D). Raises ValueError for another output."""
    with utils.evaluating(encoder):
        shape = encoder(torch.zeros(2, 3, size, size)).shape
    if len(shape) != 2 or shape[0] != 2:
        raise ValueError(f"the encoder must map images (B, 3, S, S) to (B, D), not {(*shape,)}")
    return shape[1]


# ---------------------------------------------------------------------- recipes, checked settings

STREAMED_SIZE = 224  # px: the default for images whose sizes vary
SMALL_STEM_SIZE = 64  # px: up to here the 3x3 stem (Appendix B.9 has 32)
SHORT_WARMUP = 0.1  # of the epochs: the longest warm-up that a recipe gives a shortened run

GROWING = (0.5, 0.5, 0.75, 0.75, 1.0)  # view_sizes with half of the pixels (arXiv 2212.05611)

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
    # much accuracy in little time: four small views of each image; tuned with a small network on a
    # CPU (tests/README.md)
    "cifar10-fast": dict(
        arch="resnet18", batch_size=128, views=4, epochs=100, view_size=20, temperature=0.15,
        crop_min=0.2, color_strength=0.5, gray_p=0.2, optimizer="sgd", lr=0.72, warmup_epochs=10.0,
        weight_decay=1e-3, decay_all=True, head_hidden=1024, head_bn=True,
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
        arch="resnet18", batch_size=128, views=4, view_sizes=GROWING, epochs=200, temperature=0.2,
        blur_p=0.5, crop_min=0.2, optimizer="sgd", lr=0.12, weight_decay=1e-4, decay_all=True,
        hold_out=0.02,
    ),
    # the paper's main setting (Section 2.2): batch 4096, LARS
    "imagenet-paper": dict(batch_size=4096, blur_p=0.5, image_size=224, head_hidden=2048),
}  # fmt: skip
RECIPES["svhn"] = {**RECIPES["cifar10"], "flip": 0.0}  # house numbers: no flip, as for the digits
# data sets without a recipe of their name take that for CIFAR-10


def make_config(**overrides: Any) -> Config:
    """Config of the recipe for the data set (or of recipe=…) with `overrides` on top, checked."""
    dataset = overrides.get("dataset", "digits")
    recipe = overrides.get("recipe") or (dataset if dataset in RECIPES else "cifar10")
    if recipe not in RECIPES:
        raise InputError(f"unknown recipe {recipe!r}; there are {', '.join(RECIPES)}")
    start = init_settings(**overrides) if overrides.get("init") else {}
    config = Config(**{**RECIPES[recipe], **overrides, **start, "recipe": recipe})
    config.range, config.view_sizes = tuple(config.range), tuple(config.view_sizes)
    if "view_size" in overrides and "view_sizes" not in overrides:
        config.view_sizes = ()
    if "warmup_epochs" not in overrides:
        config.warmup_epochs = min(config.warmup_epochs, SHORT_WARMUP * config.epochs)
    name = Path(config.data_dir).resolve().name if dataset == "folder" else dataset
    config.run = config.run or f"{name or dataset}_{config.arch}"
    check_config(config)
    return config


def init_settings(init: str, checkpoints: str = "checkpoints", **given: Any) -> dict[str, Any]:
    """The settings that follow from the weights to start from; normalize unless it is given.

    Raises InputError if the file cannot be read, or a given setting is another than the file's.
    """
    file = utils.find_checkpoint(init, checkpoints)
    source = load_source(file)
    resnet, settings = source.resnet, {**source.shape, "init_sha256": utils.file_digest(file)}
    for name, value in settings.items():
        if given.get(name, "auto") not in (value, "auto", ""):
            raise InputError(f"{flag(name)} is {given[name]}, but --init {file} has {value}")
    usual = resnet.conv1.padding[0] == resnet.conv1.kernel_size[0] // 2
    if not usual or isinstance(resnet.relu, nn.Identity):
        raise InputError(f"--init {file}: an encoder with another stem than torchvision's cannot "
                         "be trained further")  # fmt: skip
    settings["normalize"] = given.get("normalize", source.normalize)
    return settings | {"init": str(file.resolve())}


def check_config(config: Config) -> None:
    """Raise InputError for the first setting that is out of range, or does not suit another."""
    utils.check_settings(config)
    if config.hue * config.color_strength > 0.5:
        raise InputError(f"--hue {config.hue} times s must be at most 0.5 turns")
    if config.warmup_epochs > config.epochs:
        raise InputError(f"--warmup-epochs {config.warmup_epochs} exceeds --epochs {config.epochs}")
    if config.stop_at_knn and not config.knn_every:
        raise InputError("--knn-every must be at least 1 to stop at a kNN accuracy")
    if config.dataset == "digits" and config.data_dir not in ("", Config.data_dir):
        raise InputError(
            f"--data-dir {config.data_dir} is not used, as the digits come with scikit-learn; for "
            "images of your own add --dataset folder"
        )
    if config.labels_from and config.dataset != "folder":
        raise InputError(f"--labels-from {config.labels_from} goes with --dataset folder")
    name = Path(config.run)
    if name.is_absolute() or ".." in name.parts or not name.parts:
        raise InputError(f"--run {config.run!r} must be a plain name")


def side_of(data: Images) -> int:
    """What --image-size 0 means: the images' own side, or STREAMED_SIZE if their sizes vary."""
    return STREAMED_SIZE if data.images is None else min(data.images.shape[-2:])


def resolve(config: Config, data: Images, device: torch.device) -> Config:
    """Replace what was left open (0, "auto") by what fits the training images and the device.

    Raises InputError if images or views are too small.
    """
    config, ranks = dataclasses.replace(config), utils.world_size()
    config.image_size = config.image_size or side_of(data)
    config.view_sizes = tuple(
        max(MIN_SIZE, round(x * config.image_size)) if x <= 1 else round(x)
        for x in config.view_sizes
    )
    smallest = min([config.view_side, *config.view_sizes])
    if min(config.image_size, smallest) < MIN_SIZE:
        raise InputError(
            f"images of {config.image_size} px and views of {smallest} px: both need at least "
            f"{MIN_SIZE}, choose another --image-size or --view-size"
        )
    if config.view_size == config.image_size:
        config.view_size = 0
    if config.precision == "auto":
        config.precision = "bfloat16" if utils.has_fast_bfloat16(device) else "float32"
    if config.stem == "auto":
        config.stem = "small" if config.image_size <= SMALL_STEM_SIZE else "imagenet"
    if config.compile == "auto" and (device.type != "cuda" or ranks > 1 or config.micro_batch):
        config.compile = "off"
    if config.compile == "on" and ranks > 1:
        raise InputError("--compile on: not with several processes")
    config.range = config.range or data.grey_range
    colours = dict(saturation=0.0, hue=0.0, gray_p=0.0)
    grey = dataclasses.replace(config, **colours)
    if config.recipe == "folder" and grey != config and utils.all_grey(data):
        config = grey
        utils.log_warning(f"the images are grey: {', '.join(map(flag, colours))} are 0, as they "
                          "would change nothing")  # fmt: skip
    if config.dataset == "folder":
        config.data_dir = str(Path(config.data_dir).resolve())
        config.labels_from = config.labels_from and str(Path(config.labels_from).resolve())
    return config


def check_batch(config: Config, n: int) -> None:
    """Raise InputError if the batch of n images cannot be divided as asked."""
    batch, ranks = batch_count(config, n)[0], utils.world_size()
    part = config.micro_batch or batch
    name = flag("micro_batch" if config.micro_batch else "batch_size")
    if batch % part:
        raise InputError(f"{name} {part} does not divide the batch of {batch} images")
    if part % ranks:
        raise InputError(f"{name}: {part} images do not divide into equal parts for {ranks} "
                         "processes")  # fmt: skip


# -------------------------------------------------------------------- a run's data and checkpoints


def load_data(config: Config, device: torch.device) -> Data:
    """All splits of config.dataset; images that are held in memory are moved to `device`."""
    given = config.max_bad, config.range
    if config.dataset == "folder" and not os.path.isdir(config.data_dir):
        raise InputError(f"--data-dir {config.data_dir} is not a folder")
    if config.labels_from:
        pretrain = utils.load_unlabelled(Path(config.data_dir), *given)
        given = config.max_bad, pretrain.grey_range  # one range for both folders
        train, test = utils.load_splits("folder", ("train", "test"), config.labels_from, *given)
    else:
        names = ("pretrain", "train", "test")
        pretrain, train, test = utils.load_splits(config.dataset, names, config.data_dir, *given)
    if len(pretrain) < 2:
        raise InputError(f"need at least 2 images to contrast, got {len(pretrain)}")
    learned, held_out = (x and x.to(device) for x in split_held_out(config, pretrain, train))
    train = learned if train is pretrain else train.to(device)  # images for both are moved once
    data = Data(learned, train, test.to(device), held_out)
    if config.labels_from and not data.labelled:
        raise InputError(f"--labels-from {config.labels_from} has no labelled training and test "
                         "images: it needs train/<class>/ and test/<class>/")  # fmt: skip
    return data


FEWEST_HELD_OUT, MOST_HELD_OUT = 64, 2048  # images


def split_held_out(
    config: Config, pretrain: Images, train: Images
) -> tuple[Images, Images | None]:
    """The images to learn from and, unless they are too few, those held out (config.hold_out)."""
    labelled = len(train) if train.labels is not None and not config.labels_from else 0
    n = len(pretrain) - labelled  # the unlabelled ones come last
    count = min(max(round(config.hold_out * n), FEWEST_HELD_OUT), MOST_HELD_OUT, n // 10)
    if not config.hold_out or count < FEWEST_HELD_OUT // 4:
        return pretrain, None
    order = labelled + torch.randperm(n, generator=utils.generator("cpu", 0, HELD_OUT))
    rows = torch.cat([torch.arange(labelled), order[count:].sort().values])
    return utils.subset(pretrain, rows), utils.subset(pretrain, order[:count])


def readable_data(data: Data, config: Config) -> Data:
    """The data without labelled images that cannot be read: training on labels replaces none."""
    train, test = (utils.only_readable(x, config.workers) for x in (data.train, data.test))
    return Data(data.pretrain, train, test)


def check_same_run(record: dict, config: Config, data: Data) -> None:
    """Raise InputError if a run's recorded settings or files are not the given ones.

    record: has "config", "images" (their number) and "files" (see Data.files).
    """
    differ = utils.differences(record["config"], config)
    if record["files"] != data.files:
        differ.append(f"files of images ({record['images']} there, {len(data.pretrain)} now)")
    if differ:
        longer = record["config"]["epochs"] < config.epochs
        why = "; more epochs are another run, as the learning rate ends at zero" * longer
        raise InputError(
            f"{config.folder} holds a run with other settings: {', '.join(differ)}{why}. Choose "
            f"another --run (--init {config.folder} starts from its weights), or --overwrite"
        )


# ------------------------------------------------------------------------ encoders of any origin

IMAGENET_STEM_SIZE = 32  # px: from here the ImageNet stem and its four stages leave a pixel


@dataclass
class Source:
    """An encoder to evaluate or use, and where it came from."""

    file: Path
    resnet: Encoder  # normalised images (B, 3, S, S) -> h (B, feature_dim); frozen, eval mode
    encoder: nn.Module  # the same behind its normalisation, for images in [0, 1]
    normalize: str  # what that is: a key of utils.MEANS, or "none"
    description: str
    config: Config | None = None  # of the run, if the file is simclr.py's
    epoch: int = 0  # of the run
    projector: nn.Module | None = None  # h -> z, of the run
    foreign: utils.ForeignEncoder | None = None  # if the file is not simclr.py's
    classifier: dict | None = None  # the content of a classifier's file

    @property
    def name(self) -> str:
        """The folder of the figures: the run's, or named after the file."""
        return self.config.run if self.config else self.file.name.split(".")[0]

    def output(self, name: str, figures: str) -> Path:
        """Where results go: beside the checkpoint, or beside the figures if it is read-only there.

        The names begin with the checkpoint's, unless that is last.pt or previous.pt.
        """
        if not os.access(self.file.parent, os.W_OK):
            return Path(figures) / self.name / name
        own = self.file.name in (utils.CHECKPOINT, utils.PREVIOUS)
        return self.file.with_name(name if own else f"{self.file.name}.{name}")

    def other_images(self, config: Config) -> bool:
        """Whether `config` is for other images than those that measure the run."""
        own = self.config or config
        moved = Path(config.data_dir).resolve() != Path(own.labels_from or own.data_dir).resolve()
        return config.dataset != own.dataset or (config.dataset == "folder" and moved)

    def precision(self, device: torch.device, wanted: str = "auto") -> str:
        """The precision to compute in; "auto": as in training, where the hardware has it."""
        trained = self.config.precision if self.config else "float32"
        usual = trained if utils.has_fast_bfloat16(device) else "float32"
        return usual if wanted == "auto" else wanted

    @property
    def shape(self) -> dict[str, Any]:
        """Architecture, width and stem of the ResNet."""
        return {k: getattr(self.config or self.foreign, k) for k in ("arch", "width", "stem")}

    def untrained(self, config: Config, seed: int = 0) -> nn.Module:
        """The same network before pre-training, for images in [0, 1]; seed: added to the run's."""
        config = dataclasses.replace(config, seed=config.seed + seed)
        copy = self.file.with_name(f"init{Path(config.init).suffix}")  # that run() has written
        if config.init and copy.is_file():
            config = dataclasses.replace(config, init=str(copy))
        encoder = utils.without_normalization(start_model(config).encoder)
        if self.foreign:
            self.foreign.adapt(encoder)
        if self.normalize != "none":
            encoder = utils.Normalized(encoder, self.normalize)
        return encoder.eval()

    def config_for(
        self, dataset: str, data_dir: str, image_size: int, grey_range: tuple[float, ...]
    ) -> Config:
        """The settings to use the encoder on given images; what is not given is the run's."""
        config, where = self.config, data_dir
        if config is None:
            if not dataset:
                raise InputError(f"{self.file} does not say on what images: give --dataset")
            config = make_config(dataset=dataset, run=self.name, **self.shape)
        elif dataset and dataset != config.dataset:
            config = dataclasses.replace(config, dataset=dataset, range=())
        else:
            where = data_dir or config.labels_from or config.data_dir
        if config.dataset == "folder" and not where:
            raise InputError("--dataset folder needs --data-dir, the folder of the images")
        config = dataclasses.replace(
            config, data_dir=where or Config.data_dir, labels_from="",
            image_size=image_size or config.image_size, range=tuple(grey_range) or config.range,
            view_size=0, micro_batch=0, compile="off",  # these three are of pre-training
        )  # fmt: skip
        check_config(config)
        return config


def load_source(file: Path, normalize: str = "auto", prefix: str = "") -> Source:
    """Reads a checkpoint of simclr.py, one written by load_simCLR.py, or another project's.

    normalize: a key of utils.MEANS, "none", or "auto" for what its origin used. prefix: which
    encoder, if the file is another project's and holds several. Raises InputError if the file is
    damaged, of another format, needs code to be executed, or holds no ResNet that is known here.
    """
    state, file = utils.load_newest(file)
    foreign = projector = config = None
    epoch = 0
    if "config" in state and "format" in state:
        utils.check_format(f"{file} is a checkpoint", state["format"], CHECKPOINT_FORMAT)
        with utils.errors_as_input_error(f"{file} is not a checkpoint of a run"):
            config, epoch = Config(**state["config"]), state["position"]["epoch"]
            if config.arch == utils.OWN_MODULE:
                raise InputError(
                    f"{file} holds an encoder module of your own, which only your program can "
                    "load (README, From Python); name another run"
                )
            check_config(config)
            model = make_model(config).eval().requires_grad_(False)
            utils.load_weights(model, state["model"], str(file))
        resnet, projector = utils.without_normalization(model.encoder), model.projector
        about, rest = f"epoch {epoch}", ""
    else:
        foreign = utils.find_encoder(state, file, prefix)
        resnet = Encoder(foreign.arch, foreign.width, foreign.stem)
        utils.load_weights(resnet, foreign.tensors, f"{file} ({foreign.arch})")
        foreign.adapt(resnet)
        about = f"{foreign.stem} stem, {foreign.origin or 'origin unknown'}"
        rest = f"; left out: {utils.listed(foreign.rest)}" if foreign.rest else ""
    net = config or foreign
    used = net.normalize if normalize == "auto" else normalize
    inputs = "in [0, 1]" if used == "none" else f"normalised for {used}"
    guess = foreign is not None and not foreign.origin and normalize == "auto"
    about += f": inputs taken as {inputs}; set --normalize" if guess else f", inputs {inputs}"
    encoder = resnet if used == "none" else utils.Normalized(resnet, used)
    encoder.eval().requires_grad_(False)
    text = f"h of {resnet.feature_dim} dimensions, {net.arch} at width {net.width:g}, {about}{rest}"
    classifier = state if utils.CLASSIFIER_KEY in state else None
    return Source(file, resnet, encoder, used, text, config, epoch, projector, foreign, classifier)


def check_size(source: Source, size: int) -> None:
    """Raises InputError if images of `size` px do not suit the encoder's stem."""
    as_trained = source.config is not None and size == source.config.image_size
    if source.resnet.conv1.stride[0] == 2 and size < IMAGENET_STEM_SIZE and not as_trained:
        raise InputError(
            f"images of {size} px are too small for the encoder's ImageNet stem; choose "
            f"--image-size {IMAGENET_STEM_SIZE} or more"
        )


# ------------------------------------------------------------------------------ what was learned

KNN_NEIGHBOURS = 10
LABELS_PER_CLASS = 10
LABEL_DRAWS = 5
SCORES = ("knn", "linear_10", "linear_10_std", "linear_all")
REPRESENTATIONS = {
    "pixels": "raw pixels", "untrained": "untrained encoder", "simclr": "SimCLR h",
    "projection": "SimCLR z",
}  # fmt: skip


def row_names(config: Config | None) -> dict[str, str]:
    """REPRESENTATIONS as they are named for a run, or for an encoder of another project (None)."""
    if config is None:
        return REPRESENTATIONS | {"simclr": "pre-trained encoder"}
    return REPRESENTATIONS | ({"untrained": "before pre-training"} if config.init else {})


PANELS = {  # of the training curves: key in the log -> title, unit, factor, colour, fixed limits
    "loss": ("NT-Xent loss", "nats", 1, "C0", ()),
    "contrastive_accuracy": ("Contrastive accuracy", "%", 100, "C1", (0, 100)),
    "knn": ("kNN accuracy of h (k = 10, cosine)", "%", 100, "C2", ()),
    "lr": ("Learning rate", "", 1, "C3", (0, None)),
    "held_out_accuracy": ("Contrastive accuracy, held out", "%", 100, "C1", (0, 100)),
    "effective_rank": ("Effective rank of h, held out", "", 1, "C4", (0, None)),
}


def encoders(
    encoder: nn.Module, untrained: nn.Module, device: torch.device,
    projector: nn.Module | None = None,
) -> dict[str, Callable[[Tensor], Tensor]]:  # fmt: skip
    """What is compared, by the keys of REPRESENTATIONS: (B, 3, S, S) in [0, 1] -> (B, D) each."""
    for module in (encoder, untrained):
        module.to(device, memory_format=torch.channels_last)
    compared = {"pixels": utils.flat_pixels, "untrained": untrained, "simclr": encoder}
    if projector is not None:
        compared["projection"] = nn.Sequential(encoder, projector.to(device)).eval()
    return compared


def features(
    encoder: Callable[[Tensor], Tensor], data: Images, config: Config, device: torch.device
) -> Tensor:
    """What `encoder` computes of each image: float32 (N, D), NaN and errors as of utils.embed()."""
    size, precision, workers = config.image_size, config.precision, config.workers
    return utils.embed(encoder, data, size, device, precision, workers=workers)


def labelled_features(
    encoder: Callable[[Tensor], Tensor], data: Images, config: Config, device: torch.device
) -> tuple[Tensor, Tensor]:
    """features() of the images that can be read, float32 (M, D), and their labels, int64 (M,)."""
    x = features(encoder, data, config, device)
    read = ~x.isnan().any(1)
    return x[read], data.labels[read]


def knn_accuracy(
    encoder: Callable[[Tensor], Tensor], data: Data, config: Config, device: torch.device
) -> float:
    """Test accuracy in [0, 1] of k = 10 nearest neighbours by cosine among the training images."""
    train, test = (labelled_features(encoder, x, config, device) for x in (data.train, data.test))
    return knn_of(*train, *test, len(data.train.classes))


def knn_of(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, classes: int) -> float:
    """knn_accuracy() of features (N, D), (M, D) and labels. Each rank classifies its shard."""
    shard = utils.shard_indices(len(x_test)).to(x.device)
    similarity, neighbours = utils.nearest_neighbours(x, x_test[shard], KNN_NEIGHBOURS)
    predicted = utils.knn_vote(similarity, y[neighbours], classes)
    return utils.accuracy(utils.all_gather_rows(predicted, len(x_test)), y_test)


def validation_knn(x: Tensor, y: Tensor, classes: int) -> tuple[float, int]:
    """knn_of() of utils.HELD_OUT of the rows of each class among the others, and their number."""
    fit, held_out = utils.stratified_split(y)
    return knn_of(x[fit], y[fit], x[held_out], y[held_out], classes), len(held_out)


def evaluate(model: SimCLR, data: Data, config: Config, device: torch.device) -> dict[str, dict]:
    """Measures raw pixels, the untrained encoder and h on the test split: accuracies in [0, 1].

    Returns for each of SCORES a dict with the keys pixels, untrained, simclr. linear_all is the
    linear evaluation with all labels, as in load_simCLR.py. linear_10 is the mean over LABEL_DRAWS
    draws of 10 labels a class, too few to choose the l2 penalty by (C = 1), linear_10_std their
    standard deviation.
    """
    values, classes = {}, len(data.train.classes)
    for name, encoder in encoders(model.encoder, start_model(config).encoder, device).items():
        x, y = labelled_features(encoder, data.train, config, device)
        x_test, y_test = labelled_features(encoder, data.test, config, device)
        knn = knn_of(x, y, x_test, y_test, classes)
        classifier = utils.fit_linear_classifier(x, y, classes)
        every = utils.accuracy(classifier(x_test).argmax(1), y_test)
        x, x_test = utils.standardize(x, x_test)  # the l2 penalty means the same for all three
        few = []
        for draw in range(LABEL_DRAWS):
            seed = utils.derive_seed(config.seed, LABELS, draw)
            of_classes = utils.class_balanced_order(y, seed)
            rows = torch.cat([order[:LABELS_PER_CLASS] for order in of_classes])
            weight, bias = utils.LogisticRegression(x[rows], y[rows], classes).fit(1 / len(rows))
            few.append(utils.accuracy((x_test @ weight + bias).argmax(1), y_test))
        values[name] = knn, np.mean(few).item(), np.std(few, ddof=1).item(), every
    return {score: {name: x[i] for name, x in values.items()} for i, score in enumerate(SCORES)}


def results_table(results: dict[str, dict], config: Config, data: Data) -> str:
    """The results of evaluate() as text."""
    images, names, smallest = len(data.test), row_names(config), int(data.class_sizes.min())
    line = "{:22} {:>13} {:>19} {:>19}".format
    labels = "≤ " * (smallest < LABELS_PER_CLASS) + f"{LABELS_PER_CLASS} labels a class"
    titles = f"kNN (k={KNN_NEIGHBOURS})", labels, "linear, all labels"
    lines = [line(f"{images:,} test images", *titles)]
    for key in results["knn"]:
        knn, few, std, every = (results[score][key] for score in SCORES)
        cells = [(knn, images), (few, images, std), (every, images)]
        lines.append(line(names[key], *(utils.accuracy_text(*cell) for cell in cells)))
    if images < utils.FEW_IMAGES:
        lines.append(f"±: sampling error of {images:,} images, and spread over draws of 10 labels")
    if data.uneven:
        lines.append(f"the largest class: {data.majority:.1%} of the test images")
    return "\n".join(lines)


def draw_training(
    config: Config, log: Sequence[dict], size: int, baselines: dict[str, float] | None = None
) -> Any:
    """The training curves as a matplotlib Figure: PANELS, the last two if images were held out.

    log: rows of log.jsonl. size: N, images a step. baselines: kNN accuracies in [0, 1] by the keys
    of REPRESENTATIONS, when they have been measured.
    """
    from matplotlib.figure import Figure  # late: half a second that not every import needs
    from matplotlib.ticker import MaxNLocator

    lines = 3 if any("effective_rank" in row for row in log) else 2
    figure = Figure(figsize=(7.2, 2.4 * lines), layout="constrained")
    loss, guess, knn, rate, *_ = axes = figure.subplots(lines, 2, sharex=True).ravel()
    for axis, (key, (title, unit, scale, color, limits)) in zip(axes, PANELS.items(), strict=False):
        rows = [row for row in log if key in row]
        x, y = [row["epoch"] for row in rows], [scale * row[key] for row in rows]
        axis.plot(x, y, color=color, marker="." * (len(rows) < 20))
        for row, at in zip(rows, y, strict=True) if key == "knn" else ():
            bar = scale * utils.accuracy_error(row[key], row.get("knn_images", utils.FEW_IMAGES))
            axis.plot([row["epoch"]] * 2, [at - bar, at + bar], color=color, linewidth=0.8)
        if limits:
            axis.set_ylim(limits[0], limits[1] or 1.05 * axis.get_ylim()[1])
        axis.set(title=title, ylabel=unit)
        axis.grid(color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
    figure.supxlabel("epoch", fontsize="medium")

    grey, views = dict(color="0.4", linewidth=1), config.views
    chance = math.log(views * (size - 1) + (config.loss == "nt-xent"))  # when all z are equal
    if config.loss != "nt-xent":
        loss.set_title(f"Loss {config.loss}, not NT-Xent")
    loss.axhline(chance, **grey, linestyle="--", label=f"chance, {chance:.2f}")
    loss.set_ylim(min(0, *(row["loss"] for row in log)), 1.05 * loss.get_ylim()[1])  # may be < 0
    by_chance = (views - 1) / (views * size - 1)
    guess.axhline(100 * by_chance, **grey, linestyle="--", label=f"chance, {by_chance:.2%}")
    for key, style in {"pixels": "--", "untrained": ":"}.items() if baselines else ():
        knn.axhline(100 * baselines[key], **grey, linestyle=style, label=row_names(config)[key])
    knn.set_ylabel(f"% of {config.knn_split} images")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    for axis in (loss, guess, *[knn] * bool(baselines)):
        axis.legend(fontsize=8)  # where it hides no line
    if not any("knn" in row for row in log):
        knn.set_yticks([])
        knn.text(0.5, 0.5, "not measured", ha="center", transform=knn.transAxes, color="0.4")
    return figure


# ------------------------------------------------------------- learning from labels (Appendix B.5)


def geometric_augment(config: Config) -> Augment:
    """The recipe's crops, flips and rotations without its colours (B.5), at the size of testing."""
    plain = dataclasses.replace(config, view_size=0, jitter_p=0.0, gray_p=0.0, blur_p=0.0)
    return make_augment(plain)


def labelled_batches(
    data: Images, rows: Tensor, augment: Augment, batch_size: int, steps: int,
    key: tuple[int, ...], device: torch.device, workers: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """`steps` batches of augmented images, float32 (B, 3, S, S), and their labels, int64 (B,).

    rows: int64 (M,), which images of `data`. Each pass over them has a new order and equal
    batches of at most batch_size. key: the stream that order and views follow from.
    """
    count = math.ceil(len(rows) / batch_size)  # batches a pass
    size = len(rows) // count
    orders = [
        torch.randperm(len(rows), generator=utils.generator("cpu", *key, SHUFFLE, i))
        for i in range(math.ceil(steps / count))
    ]
    chosen = torch.stack([rows.cpu()[order[: size * count]] for order in orders])
    batches = chosen.view(-1, size)[:steps]  # (steps, B)
    keys = [(*key, VIEWS, step) for step in range(steps)]
    images = augmented_batches(data, batches, keys, augment, 1, device, workers)
    for x, chosen_rows in zip(images, batches.to(device), strict=True):
        yield x.contiguous(memory_format=torch.channels_last), data.labels[chosen_rows]


def fine_tune(
    encoder: nn.Module, data: Images, rows: Tensor, augment: Augment, training: LabelTraining,
    config: Config, device: torch.device, seed: int = 0, title: str = "",
) -> nn.Sequential:  # fmt: skip
    """A copy of the encoder with a linear classifier on it, trained as a whole (Appendix B.5).

    encoder: images -> features (B, encoder.feature_dim); it is not changed, and an untrained one
    makes this training from scratch. data: labelled; rows: int64 (M,), which of its images to
    learn from. title: of a progress bar. Returns images -> logits, in eval mode.
    """
    classifier = utils.zero_classifier(encoder.feature_dim, len(data.classes))
    network = nn.Sequential(copy.deepcopy(encoder), classifier).to(device)
    network.requires_grad_(True).train()
    size, steps = training.batch(len(rows)), training.steps(len(rows))
    key = (config.seed, LABELS, seed)
    batches = labelled_batches(data, rows, augment, size, steps, key, device, config.workers)
    peak = training.lr * size / 256
    utils.train_on_labels(network, batches, steps, peak, training, config.precision, title)
    return network.eval()


# ------------------------------------------------------------------------------ the command line

SHEET = (8, 8)  # images, and views of each, that --show-views draws
LARGEST_TILE = 256  # px: more than the figure shows
LESS_MEMORY = " (a --micro-batch, or a smaller --batch-size, --view-size or --width, needs less)"


def describe_recipes() -> str:
    """The recipes for --help, a paragraph each."""
    paragraphs = [
        "recipes (they override the defaults above, and flags override them; where --epochs makes\n"
        f"a run shorter, its warm-up is at most {SHORT_WARMUP:.0%} of it):"
    ]
    for name, recipe in RECIPES.items():
        texts = {k: " ".join(map(str, v)) if k == "view_sizes" else v for k, v in recipe.items()}
        words = [flag(key) + f" {value}" * (value is not True) for key, value in texts.items()]
        text = textwrap.fill(" ".join(words), 90, break_on_hyphens=False)
        paragraphs.append(f"  {name}:\n{textwrap.indent(text, '      ')}")
    return "\n".join(paragraphs)


def parse_command_line(argv: Sequence[str] | None = None) -> tuple[Config, bool, str]:
    """The configuration, whether to replace a run of the same name, the file of --show-views."""
    usage = "python simclr.py [--dataset NAME] [--recipe NAME] [--flag value ...]"
    parser = utils.OneLineParser(
        prog="simclr.py", usage=usage, description=__doc__, epilog=describe_recipes()
    )
    add, views = parser.add_argument, "draw augmented views of some images, and do not train"
    add("--overwrite", action="store_true", help="delete a run of the same name, and start anew")
    add("--show-views", metavar="FILE.png", default="", help=views)
    utils.add_flags(parser, Config)
    options = vars(parser.parse_args(argv))
    overwrite, views_file = options.pop("overwrite"), options.pop("show_views")
    return make_config(**options), overwrite, views_file


def draw_views(config: Config, data: Images, device: torch.device) -> Any:
    """Some images, and views of each as in pre-training beside it: a matplotlib Figure.

    config: resolved. data: the images to learn from. config.seed decides images and views.
    """
    from matplotlib.figure import Figure

    config = dataclasses.replace(config, view_size=min(config.view_side, LARGEST_TILE))
    count, views = min(SHEET[0], len(data)), SHEET[1]
    rows = torch.randperm(len(data), generator=utils.generator("cpu", config.seed, SHUFFLE))[:count]
    originals = next(utils.subset(data, rows).batches(config.view_side, count, device))
    key, augment = (config.seed, VIEWS), make_augment(config)
    drawn = next(augmented_batches(data, rows[None], [key], augment, views, device))
    tiles = torch.stack([originals, *drawn.split(count)], 1).flatten(0, 1)  # image, its views, …
    gap = max(1, config.view_side // 16)
    grid = torchvision.utils.make_grid(utils.to_uint8(tiles), 1 + views, gap, pad_value=255)
    picture = grid.permute(1, 2, 0).cpu().numpy()

    figure = Figure(figsize=(9, 9 * picture.shape[0] / picture.shape[1]), layout="constrained")
    axes = figure.subplots()
    axes.imshow(picture, interpolation="nearest")
    axes.set_title("images, and beside each its views", fontsize="medium", loc="left")
    axes.set_axis_off()
    return figure


def run(config: Config, overwrite: bool = False, views_file: str = "") -> dict:
    """Pre-train and evaluate: what `python simclr.py` does. Returns the summary.

    views_file: draw views to this file instead, and return {}. Raises InputError, also if another
    process works on the run, and Interrupted.
    """
    clock = utils.Clock()
    device = utils.choose_device(config.device)
    if config.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise InputError("--tensorboard needs one more package: pip install tensorboard")
    with utils.process_group(device):
        data = load_data(config, device)
        config = resolve(config, data.pretrain, device)
        if views_file:
            utils.save_figure(draw_views(config, data.pretrain, device), Path(views_file))
            print(f"views by the recipe {config.recipe}: {views_file}")
            return {}
        check_batch(config, len(data.pretrain))
        print(describe_run(config, data, device))
        if config.stop_at_knn and not data.labelled:
            raise InputError("--stop-at-knn: there are no labels to measure it by")
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        overwrite = overwrite and not restarted  # by torchrun, which restarted the new run
        summary = None if overwrite else utils.broadcast_from_rank0(read_summary, config, data)
        if summary:
            print(f"{config.folder} is finished; --overwrite trains it again")
            print_summary(summary, config, data)
            return summary
        utils.make_folder(config.figure_folder)
        with utils.run_lock(config.folder, overwrite):
            if config.tensorboard and utils.is_main_process():
                sheet = draw_views(config, data.pretrain, device)
                utils.event_writer(config.folder).add_figure("views", sheet)
            if config.init:
                init = Path(config.init)  # copied for Source.untrained(), on any machine
                utils.write_atomically(config.folder / f"init{init.suffix}", init.read_bytes())
            model = train(config, data, device, clock=clock)
            results = evaluate(model, data, config, device) if data.labelled else {}
            clock.lap("evaluation")
            summary = utils.broadcast_from_rank0(write_summary, config, data, model, results, clock)
        print_summary(summary, config, data)
        return summary


def pretrain(
    images: Tensor, encoder: nn.Module | None = None, overwrite: bool = False, **settings: Any
) -> SimCLR:
    """SimCLR from Python, on tensors: trains, or continues, a run in checkpoints/.

    images: uint8 (N, 3, H, W). encoder: any module on the CPU, float (B, 3, S, S) in [0, 1] ->
    (B, D), which is trained in place; by default the ResNet of the settings. overwrite: delete a
    run of the same name first. settings: fields of Config, on top of the recipe "folder". Returns
    the model in eval mode: model.encoder maps images to h. Raises InputError as train().
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise InputError(f"need uint8 (N, 3, H, W), got {images.dtype} {(*images.shape,)}")
    defaults = dict(recipe="folder", run="tensors", knn_every=0)
    defaults |= dict(view_size=0, views=2, batch_size=256, lr=0.06)  # a module may need one size
    config = make_config(**{**defaults, **settings})
    device = utils.choose_device(config.device)
    learned = Images(images).to(device)
    config = resolve(config, learned, device)
    check_batch(config, len(learned))
    data = Data(learned, learned, utils.subset(learned, torch.arange(0)))
    data.files = hashlib.sha256(images.cpu().numpy().tobytes()).hexdigest()
    model = make_model(config, encoder) if encoder else start_model(config)
    if encoder:
        config.arch = utils.OWN_MODULE
    with utils.run_lock(config.folder, overwrite):
        return train(config, data, device, model=model).eval()


def describe_run(config: Config, data: Data, device: torch.device) -> str:
    """What a run learns from, how and where. All its settings are in config.json."""
    n, ranks = len(data.pretrain), utils.world_size()
    size, steps = batch_count(config, n)
    batch = f"{size} images a step" + " (all of them)" * (size < config.batch_size)
    sides = ", ".join(map(str, dict.fromkeys(config.view_sizes or (config.view_side,))))
    rest = f"; each epoch leaves out {n % size} at random, too few for a batch" * (n % size > 0)
    if config.hold_out and data.held_out is None and data.pretrain.labels is None:
        rest += f"; none held out: that needs {10 * FEWEST_HELD_OUT // 4} unlabelled images"
    start = f"\nstarts from {utils.from_here(config.init)}" if config.init else ""
    where = device if ranks == 1 else f"{ranks} processes on {device.type}"
    return (
        f"{utils.describe_data(data)}\n"
        f"recipe {config.recipe}: {config.arch}, {batch}, {config.views} views of each ({sides} "
        f"px), {config.epochs} epochs of {steps} steps{rest}{start}\n"
        f"on {where} in {utils.describe_precision(config.precision, device)}; "
        f"files in {config.folder}, figure in {config.figure_folder}"
    )


def read_summary(config: Config, data: Data) -> dict | None:
    """The summary of the run if it is complete. Raises InputError if the run has other settings."""
    try:
        summary = json.loads((config.folder / utils.SUMMARY).read_bytes())
    except (OSError, ValueError):  # missing, or damaged: then the run is evaluated again
        return None
    check_same_run(summary, config, data)
    return summary


def write_summary(
    config: Config, data: Data, model: SimCLR, results: dict[str, dict], clock: utils.Clock
) -> dict:
    """Draws the last figure, writes summary.json, and returns its content."""
    log = utils.read_jsonl(config.folder / utils.LOG)
    size, steps = batch_count(config, len(data.pretrain))
    baselines = results.get("knn") if config.knn_split == "test" else None
    figure = draw_training(config, log, size, baselines)
    utils.warn_on_failure(utils.save_figure, figure, config.figure_folder / FIGURE)
    clock.lap("drawing")
    training = sum(row["seconds"] for row in log)
    summary = {
        "config": dataclasses.asdict(config),
        "images": len(data.pretrain),
        "files": data.files,
        "parameters": sum(p.numel() for p in model.encoder.parameters()),
        "loss": log[-1]["loss"],
        **results,
        "epochs": len(log),
        "views_per_second": config.views * size * steps * len(log) / max(training, 1e-3),
        **clock.seconds(),
    }
    utils.write_json(config.folder / utils.SUMMARY, summary)
    return summary


def print_summary(summary: dict, config: Config, data: Data) -> None:
    """Prints the results of a run, where its files are, and commands to try next."""
    load, see = (
        utils.python_command(utils.from_here(Path(__file__).with_name(script)), config.folder)
        for script in ("load_simCLR.py", "tSNE.py")
    )
    again = utils.python_command(utils.from_here(__file__))
    table, labels = "No labelled test images: h was not evaluated", " --data-dir LABELLED_IMAGES"
    if "knn" in summary:
        table, labels = results_table(summary, config, data), ""
    times = {part: summary.get(f"{part}_seconds", 0.0) for part in TIMED}
    use = f"  your own images     {again} --dataset folder --data-dir PHOTOS\n"
    if config.dataset == "folder":
        use = (f"  make a classifier   {load}{labels} --fine-tune\n"
               f"  use it              {load} --classify NEW_IMAGES\n")  # fmt: skip
    print(
        f"\n{table}\n"
        f"\n{summary['epochs']} of {config.epochs} epochs at {summary['views_per_second']:,.0f} "
        f"views/s in {sum(times.values()):.1f} s: "
        f"{', '.join(f'{part} {seconds:.1f}' for part, seconds in times.items())}\n"
        f"curves        {config.figure_folder / FIGURE}\n"
        f"weights, log  {config.folder}\n"
        "\nnext:\n"
        f"  evaluate it         {load}{labels}\n"
        f"  see it              {see}\n{use}"
        f"  every setting       {again} --help"
    )


@utils.command("simclr.py", LESS_MEMORY)
def main(argv: Sequence[str] | None = None) -> None:
    run(*parse_command_line(argv))


if __name__ == "__main__":
    main()
