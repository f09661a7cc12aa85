"""Every ablation of the SimCLR paper by one command.

    python ablation_SimCLR.py                      # list the studies and how long they take here
    python ablation_SimCLR.py temperature          # one study, on the embedded digits
    python ablation_SimCLR.py temperature --dataset cifar10 --epochs 100 --seeds 3
    torchrun --nproc_per_node=4 -- ablation_SimCLR.py all    # each process takes what is left

Each run is an ordinary run of simclr.py in checkpoints/ablation/<data set>-seed<k>-<digest>. The
digest follows from the run's settings, so studies share equal runs, and the same command continues
where it stopped, or helps while it runs: each process takes a run that no other has begun. The
results of a study are figures/ablation/<study>.csv, one row per run, and <study>.png, drawn like
the paper's figure by the process that ends last.

To add a study, add an entry to STUDIES, like that of encoder-pass. A setting names fields of
simclr.Config, fields of Variant (another loss, other views, another forward pass), or arguments of
the measurement. Flags of simclr.py set the base that a study varies.

Reading order: losses · transformations · variants of the training · measurements · the table of
studies · runs · results and verdict · figures · a study · time · the command line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import functools
import hashlib
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import simclr
import utils
from simclr import Config
from utils import Data, Images, InputError, LabelTraining, flag

# ----------------------------------------------------------------------------------------- losses
#
# Tables 2, 4 and 5. All take z1, z2: (N, D), the projections of the two views, and the temperature,
# and return a scalar. u is a view, v+ its partner, v- the view of another image.


def opposite_similarities(z1: Tensor, z2: Tensor, cosine: bool = True) -> Tensor:
    """Cosine, or dot product, of each view and each of the N views of the other side: (2N, N)."""
    z1, z2 = (simclr.normalize_rows(z) if cosine else utils.at_least_float32(z) for z in (z1, z2))
    with utils.autocast(z1.device, "float32"):
        similarity = z1 @ z2.T  # (N, N)
    return torch.cat([similarity, similarity.T])


def positives(similarity: Tensor) -> Tensor:
    """Similarity of each view to its partner: (2N, N) -> (2N, 1)."""
    return similarity.unflatten(0, (2, -1)).diagonal(dim1=1, dim2=2).reshape(-1, 1)


def mean_of_negatives(values: Tensor, similarity: Tensor, mined: bool) -> Tensor:
    """Mean of the values (2N, N) at the negatives, all on the other side (Appendix B.10).

    mined: at each view's semi-hard negative alone, the closest one that is farther than the partner
    (Schroff et al. 2015, Section 5.1), or at the farthest negative if none is farther.
    """
    negative = ~torch.eye(values.shape[1], dtype=torch.bool, device=values.device).repeat(2, 1)
    if mined:
        farther = negative & (similarity < positives(similarity))
        closest = similarity.masked_fill(~farther, -torch.inf).argmax(1, keepdim=True)
        farthest = similarity.masked_fill(~negative, torch.inf).argmin(1, keepdim=True)
        chosen = torch.where(farther.any(1, keepdim=True), closest, farthest)  # (2N, 1)
        return values.gather(1, chosen).mean()
    return (values * negative).sum() / negative.sum()  # values[negative] would wait for a GPU


def nt_logistic(z1: Tensor, z2: Tensor, temperature: float, *, mined: bool = False) -> Tensor:
    """Mean over views of -log sigmoid(u·v+ / tau) - mean over v- of log sigmoid(-u·v- / tau)."""
    similarity = opposite_similarities(z1, z2)  # (2N, N)
    attraction = F.logsigmoid(positives(similarity) / temperature).mean()
    repulsion = F.logsigmoid(-similarity / temperature)  # (2N, N)
    return -attraction - mean_of_negatives(repulsion, similarity, mined)


def margin_triplet(
    z1: Tensor, z2: Tensor, temperature: float, *, margin: float = 0.0, mined: bool = False
) -> Tensor:
    """Mean over views and v- of max(u·v- - u·v+ + margin, 0). The temperature is not used."""
    similarity = opposite_similarities(z1, z2)  # (2N, N)
    hinge = (similarity - positives(similarity) + margin).clamp(min=0)
    return mean_of_negatives(hinge, similarity, mined)


def nt_xent_dot(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """NT-Xent (Eq. 1) with dot products of z as it is instead of cosines (Table 5)."""
    z = utils.at_least_float32(torch.cat([z1, z2]))  # (2N, D)
    rows = torch.arange(len(z), device=z.device)
    with utils.autocast(z.device, "float32"):
        return simclr.block_loss(z, rows, 2, temperature, decoupled=False) / len(z)


LOSSES: dict[str, simclr.Loss] = {
    **simclr.LOSSES,
    "nt-xent-dot": nt_xent_dot,
    "nt-logistic": nt_logistic,
    "nt-logistic-semi-hard": functools.partial(nt_logistic, mined=True),
    "margin": margin_triplet,
    "margin-semi-hard": functools.partial(margin_triplet, mined=True),
}

# -------------------------------------------------------------------------------- transformations
#
# Pure functions of images (N, 3, S, S) in [0, 1] and of u, uniform numbers in [0, 1), one row per
# image, as the steps of simclr.Augment are.

CUTOUT = 0.5  # side of the square that is cut out, as a share of the image's side
NOISE = 0.2  # largest standard deviation of the noise
SOBEL = 4.0  # response to an edge from black to white along an axis
SOMETIMES = 0.5  # probability of noise and Sobel in Table 3


@dataclass
class Step:
    """A step of simclr.Augment. function: (images, u) -> images, where u has `draws` columns."""

    function: Callable[[Tensor, Tensor], Tensor]
    draws: int = 0

    def __call__(self, images: Tensor, u: Tensor) -> Tensor:
        return self.function(images, u)


def cutout(images: Tensor, u: Tensor) -> Tensor:
    """Blackens a square somewhere in the image (DeVries and Taylor 2017). u: (N, 2)."""
    pixels = images.shape[-1]
    length = round(CUTOUT * pixels)
    start = (u * (pixels - length + 1)).floor().clamp(max=pixels - length)  # (N, 2)
    offset = torch.arange(pixels, device=u.device) - start[..., None]  # (N, 2, S)
    rows, columns = ((offset >= 0) & (offset < length)).unbind(1)  # (N, S) each
    return images.masked_fill(rows[:, None, :, None] & columns[:, None, None], 0.0)


def sobel(images: Tensor, u: Tensor) -> Tensor:
    """Length of each channel's gradient by Sobel's kernels, mirrored at the edges. u: not used."""
    x = F.pad(images, (1, 1, 1, 1), mode="reflect")  # (N, 3, S + 2, S + 2)
    rows = x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]  # (N, 3, S, S + 2)
    columns = x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]  # (N, 3, S + 2, S)
    across, down = rows[..., 2:] - rows[..., :-2], columns[..., 2:, :] - columns[..., :-2, :]
    return (torch.hypot(across, down) / SOBEL).clamp(0, 1)


def gaussian_noise(images: Tensor, u: Tensor) -> Tensor:
    """Adds white noise with a standard deviation between 0 and NOISE. u: (N, 1 + 3·S²)."""
    tiny = torch.finfo(u.dtype).eps
    normal = torch.special.ndtri(u[:, 1:].clamp(tiny, 1 - tiny)).view_as(images)
    return (images + NOISE * u[:, :1, None, None] * normal).clamp(0, 1)


def rotate(images: Tensor, u: Tensor) -> Tensor:
    """Rotates by 0, 90, 180 or 270 degrees counter-clockwise, ⌊4u⌋ quarters. u: (N, 1)."""
    turned = torch.stack([images.rot90(k, (-2, -1)) for k in range(4)])  # (4, N, 3, S, S)
    return turned[(4 * u[:, 0]).long(), torch.arange(len(images), device=images.device)]


TRANSFORMATIONS: dict[str, Callable[[Config], list[Any]]] = {  # of Figure 5, in its order
    "crop": lambda c: [
        simclr.RandomResizedCrop(c.view_side, (c.crop_min, 1.0)), simclr.RandomFlip(c.flip)
    ],
    "cutout": lambda c: [Step(cutout, 2)],
    "color": lambda c: simclr.make_augment(  # without the crop: jitter and grey
        dataclasses.replace(c, flip=0.0, rotation=0.0, blur_p=0.0)
    ).steps[1:],
    "sobel": lambda c: [Step(sobel)],
    "noise": lambda c: [Step(gaussian_noise, 1 + 3 * c.view_side**2)],
    "blur": lambda c: [simclr.RandomBlur(1.0)],
    "rotate": lambda c: [Step(rotate, 1)],
}  # fmt: skip
EXTRAS: dict[str, Callable[[Config], Any]] = {  # what Table 3 adds to both views
    "rotation": lambda c: Step(rotate, 1),
    "noise": lambda c: simclr.RandomApply(SOMETIMES, gaussian_noise, 2 + 3 * c.view_side**2),
    "sobel": lambda c: simclr.RandomApply(SOMETIMES, sobel),
}

# ------------------------------------------------------------------------ variants of the training


@dataclass(frozen=True)
class Variant:
    """How a training differs from simclr.py's: in its loss, its views or its forward pass."""

    loss_function: str = ""  # one of LOSSES; "": the configuration's
    margin: float = 0.0  # of the margin losses
    branch: tuple[str, ...] = ()  # TRANSFORMATIONS of one view; the other gets none (Figure 5)
    extra: str = ""  # one of EXTRAS, which both views get as well
    passes: int = 1  # 2: each view has a forward pass, and so BatchNorm statistics, of its own

    def loss(self, config: Config) -> simclr.Loss:
        """z1, z2 (N, D), temperature -> scalar."""
        loss = LOSSES[self.loss_function or config.loss]
        if self.loss_function.startswith("margin"):
            loss = functools.partial(loss, margin=self.margin)
        return loss

    def batches(
        self, config: Config, data: Images, device: torch.device, epoch: int, start: int
    ) -> Iterator[Tensor]:
        """simclr.view_batches() with the views of this variant: float32 (KN, 3, S, S).

        `branch` transforms the first N views; the other N are the same images without it (Figure
        5). Images in memory have one size and are taken whole. Streamed images have many sizes:
        each is cropped at random, once for both views, as in the paper (Section 3.1).
        """
        config = config.at_epoch(epoch)
        augment = simclr.make_augment(config)
        if self.extra:
            augment.steps.append(EXTRAS[self.extra](config))
        if not self.branch:
            yield from simclr.view_batches(config, data, device, epoch, start, augment)
            return
        whole = Step(lambda images, u: utils.center_view(images, config.view_side))
        augment.steps = [augment.steps[0] if data.images is None else whole]
        steps = [step for name in self.branch for step in TRANSFORMATIONS[name](config)]
        transform = simclr.Augment(config.view_side, steps)
        one_view = dataclasses.replace(config, views=1)
        images = simclr.view_batches(one_view, data, device, epoch, start, augment)
        for step, x in enumerate(images, start):  # (N, 3, S, S)
            key = (config.seed, simclr.VIEWS, epoch, step, 1)  # another stream than the crops'
            u = transform.draw(len(x), utils.generator(device, *key))
            yield torch.cat([transform(x, u), x])

    def model(self, config: Config) -> simclr.SimCLR:
        """The model to start from, with the same weights for any number of passes."""
        model = simclr.start_model(config)
        if self.passes == 2:
            model.__class__ = TwoPasses
        return model


class TwoPasses(simclr.SimCLR):
    """In training each half of the batch, one view of each image, has a pass of its own."""

    def forward(self, views: Tensor) -> tuple[Tensor, Tensor]:
        if not self.training:
            return super().forward(views)
        h, z = zip(*map(super().forward, views.chunk(2)), strict=True)
        return torch.cat(h), torch.cat(z)


# ------------------------------------------------------------------------------------ measurements
#
# Each measurement takes a Run and returns numbers, accuracies in [0, 1].

TASK_STEPS = 8  # batches that the contrastive task is measured on
SUPERVISED = dict(batch_size=256, lr=0.1, weight_decay=1e-4)  # of LabelTraining
FEW_LABELS, FEW_EPOCHS, MANY_EPOCHS = 0.01, 60, 30  # Appendix B.5: 1 % of the labels, 10 %
PROBE = LabelTraining(epochs=20, batch_size=256, lr=0.1, min_steps=500)
PROBE_VIEWS = 4  # of each image
COLOR = "color"  # the setting that tells whether a view has lost its colour (Table 3)


@dataclass
class Run:
    """What a measurement is made with. config: resolved."""

    config: Config
    variant: Variant
    data: Data
    device: torch.device

    def pretrained(self) -> simclr.SimCLR:
        """The model after pre-training, which is done, continued or read from the checkpoint."""
        return simclr.train(
            self.config, self.data, self.device, loss=self.variant.loss(self.config),
            batches=self.variant.batches, model=self.variant.model(self.config),
        )  # fmt: skip

    def fine_tuned_accuracy(
        self, encoder: nn.Module, rows: Tensor, augment: simclr.Augment, schedule: LabelTraining
    ) -> float:
        """Test accuracy after training a copy of the encoder on the labels of some images."""
        config, data = self.config, self.data
        network = simclr.fine_tune(
            encoder, data.train, rows, augment, schedule, config, self.device, config.seed
        )
        logits = simclr.features(network, data.test, config, self.device)
        return utils.accuracy(logits.argmax(1), data.test.labels)


def representation(run: Run) -> dict[str, float]:
    """kNN (k = 10) and linear accuracy of h and z, frozen; and the contrastive task (Table 5).

    `selection` is the kNN accuracy of h within the training set. Searches choose by it, so that
    they do not look at the test images.
    """
    model, data = run.pretrained(), run.data
    classes, results = len(data.train.classes), {}
    with utils.frozen(model):
        for suffix, network in (("_z", nn.Sequential(*model.children())), ("", model.encoder)):
            x, y = simclr.labelled_features(network, data.train, run.config, run.device)
            x_test, y_test = simclr.labelled_features(network, data.test, run.config, run.device)
            results["knn" + suffix] = simclr.knn_of(x, y, x_test, y_test, classes)
            classifier = utils.fit_linear_classifier(x, y, classes)
            results["linear" + suffix] = utils.accuracy(classifier(x_test).argmax(1), y_test)
        results["selection"], _ = simclr.validation_knn(x, y, classes)  # x: h
        results |= contrastive_task(model, run)
    return results


@torch.no_grad()
def contrastive_task(model: simclr.SimCLR, run: Run) -> dict[str, float]:
    """How well the trained model finds the partner of a view on the other side (Table 5).

    Entropy in nats of each view's softmax over the N views of the other side, at most ln N; and
    contrastive accuracy, the share of views whose partner is the likeliest of them. Both are the
    paper's (logits_ab in google-research/simclr). The views are of training images, but new.
    """
    config = dataclasses.replace(run.config, views=2)
    cosine = run.variant.loss_function != "nt-xent-dot"
    batches = run.variant.batches(config, run.data.pretrain, run.device, config.epochs, 0)
    numbers = []
    for views in itertools.islice(batches, TASK_STEPS):
        _, z = simclr.forward(model, views, config.precision)
        logits = opposite_similarities(*z.chunk(2), cosine) / config.temperature  # (2N, N)
        partner = torch.arange(len(z) // 2, device=z.device).repeat(2)  # (2N,)
        entropy = torch.special.entr(logits.softmax(1)).sum(1).mean()
        numbers.append(torch.stack([entropy, (logits.argmax(1) == partner).float().mean()]))
    entropy, accuracy = torch.stack(numbers).mean(0).tolist()
    return {"entropy": entropy, "contrastive_accuracy": accuracy}


def supervised(run: Run) -> dict[str, float]:
    """Test accuracy of the same network trained on all labels with the same augmentation."""
    encoder = simclr.make_model(run.config).encoder.to(run.device)
    augment = simclr.make_augment(dataclasses.replace(run.config, view_size=0))  # as test images
    schedule = LabelTraining(run.config.epochs, **SUPERVISED)
    rows = torch.arange(len(run.data.train))
    return {"linear": run.fine_tuned_accuracy(encoder, rows, augment, schedule)}


def fine_tuned(run: Run, start: str, share: float) -> dict[str, float]:
    """Test accuracy after fine-tuning on a share of the labels of each class (Appendix B.5).

    start: "simclr", or "scratch" for the untrained network.
    """
    config, labels = run.config, run.data.train.labels
    model = run.pretrained() if start == "simclr" else simclr.make_model(config).to(run.device)
    orders = utils.class_balanced_order(labels, utils.derive_seed(config.seed, simclr.LABELS))
    rows = torch.cat([order[: max(1, round(share * len(order)))] for order in orders])
    schedule = LabelTraining(epochs=FEW_EPOCHS if share <= FEW_LABELS else MANY_EPOCHS)
    augment = simclr.geometric_augment(config)
    accuracy = run.fine_tuned_accuracy(model.encoder, rows, augment, schedule)
    return {"accuracy": accuracy, "labels": len(rows)}


def probe(run: Run) -> dict[str, float]:
    """Accuracy of telling which transformation a view had, from h and from g(h) (Table 3).

    The transformation is the variant's `extra`, or, without one, dropping the colour. An MLP learns
    it from frozen features of augmented training images, and is tested on augmented test images.
    `chance` is the share of the commonest.
    """
    model, results = run.pretrained(), {}
    with utils.frozen(model):
        train = transformed_features(model, run, run.data.train, 0)
        test = transformed_features(model, run, run.data.test, 1)
    for i, name in enumerate(("probe_h", "probe_z")):
        x, x_test = utils.standardize(train[i], test[i])
        results[name] = mlp_accuracy(x, train[2], x_test, test[2], run.config)
    results["chance"] = test[2].bincount().max().item() / len(test[2])
    return results


@torch.no_grad()
def transformed_features(model: nn.Module, run: Run, data: Images, part: int) -> tuple[Tensor, ...]:
    """h (M, D), z (M, D') and which transformation, int64 (M,), of PROBE_VIEWS views an image.

    part: keeps the randomness of training and test images apart.
    """
    config, extra = run.config, run.variant.extra
    share = SOMETIMES if extra else config.gray_p
    step = EXTRAS[extra](config) if extra else simclr.RandomGrayscale(share)
    last = simclr.Augment(config.view_side, [step])
    augment = simclr.make_augment(config if extra else dataclasses.replace(config, gray_p=0.0))
    size, count = simclr.batch_count(config, len(data))
    rows = torch.arange(size * count).view(count, size).repeat(PROBE_VIEWS, 1)
    keys = [(config.seed, simclr.LABELS, part, i) for i in range(len(rows))]
    batches = simclr.augmented_batches(data, rows, keys, augment, 1, run.device, config.workers)
    outputs = []
    for x, key in zip(batches, keys, strict=True):  # (N, 3, S, S)
        u = last.draw(len(x), utils.generator(run.device, *key, 1))
        label = 4 * u[:, 0] if extra == "rotation" else u[:, 0] < share  # what the step chose
        outputs.append((*simclr.forward(model, last(x, u), config.precision), label.long()))
    h, z, labels = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    return h.float(), z.float(), labels


def mlp_accuracy(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, config: Config) -> float:
    """Test accuracy of an MLP with one hidden layer as wide as its input, trained by SGD."""
    classes, width = int(y.max()) + 1, x.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(utils.derive_seed(config.seed, simclr.LABELS))
        network = simclr.make_projector("nonlinear", width, width, classes, False).to(x.device)
    steps, size = PROBE.steps(len(x)), PROBE.batch(len(x))
    generator = utils.generator(x.device, config.seed, simclr.LABELS, 2)
    chosen = torch.randint(len(x), (steps, size), generator=generator, device=x.device)
    batches = ((x[rows], y[rows]) for rows in chosen)
    utils.train_on_labels(network, batches, steps, PROBE.lr * size / 256, PROBE, "float32")
    with torch.no_grad():
        return utils.accuracy(network(x_test).argmax(1), y_test)


# ----------------------------------------------------------------------------- the table of studies


@dataclass(frozen=True, eq=False)
class Setting:
    """A point of a study's grid.

    fields: of Config, of Variant, or arguments of `measure`. series and x: where it is drawn.
    group: the settings of a group are a search; the best by `selection` is shown.
    """

    name: str
    fields: dict[str, Any]
    measure: Callable[..., dict[str, float]] = representation
    series: str = ""
    x: float | str = ""
    group: str = ""
    title: str = ""

    @property
    def label(self) -> str:
        """What people read."""
        return self.title or f"{self.series} {self.x}".strip() or self.name


@dataclass(frozen=True)
class Study:
    """One ablation: a grid of settings around a base, and how its results are shown."""

    question: str
    where: str  # in the paper
    settings: Callable[[Config], list[Setting]]  # from a base
    metrics: tuple[str, ...] = ("linear", "knn")  # of METRICS; settings are compared by the first
    # the paper's numbers, by metric and setting (or group); of "lines" by series and x
    paper: dict[str, dict[Any, float]] = field(default_factory=dict)
    # sentences of the paper, each with the settings that are better and those that are worse there:
    # patterns of names, compared by the first metric; a fourth word is the metric of the worse ones
    claims: tuple[tuple[str, ...], ...] = ()
    draw: str = "dots"  # one of DRAWINGS
    axis: str = ""  # what x is, for lines
    fixed: tuple[str, ...] = ()  # flags that are refused, beside those of varied fields
    around: tuple[str, ...] = ()  # varied around the base's value, so their flags are taken


METRICS = {  # title and unit; numbers in % are measured as shares
    "linear": "linear on h, %",
    "knn": "kNN on h, %",
    "linear_z": "linear on z, %",
    "knn_z": "kNN on z, %",
    "accuracy": "accuracy, %",
    "entropy": "entropy, nats",
    "contrastive_accuracy": "contrastive acc., %",
    "probe_h": "from h, %",
    "probe_z": "from g(h), %",
    "chance": "chance, %",
    "selection": "selection, %",
}
OF_TEST_IMAGES = ("linear", "knn", "linear_z", "knn_z", "accuracy", "probe_h", "probe_z")
SUPERVISED_TOO = (("SimCLR", representation), ("supervised", supervised))  # series, measure
BATCHES = {"digits": (64, 128, 256, 512)}
PAPER_BATCHES = (256, 512, 1024, 2048)  # for all other data sets


def size_settings(base: Config) -> list[Setting]:
    """The base's depth and the next two; half its width, its width and twice its width."""
    known = list(simclr.ARCHITECTURES)
    first = min(known.index(base.arch), len(known) - 3)
    archs, widths = known[first : first + 3], [base.width * factor for factor in (0.5, 1, 2)]
    ends = {(archs[0], widths[0]): "-smallest", (archs[-1], widths[-1]): "-largest"}
    with torch.device("meta"):  # without memory for the weights
        encoders = {key: simclr.Encoder(*key) for key in itertools.product(archs, widths)}
    millions = {key: sum(p.numel() for p in f.parameters()) / 1e6 for key, f in encoders.items()}
    return [
        Setting(f"{series}-{arch}-x{width:g}{ends.get((arch, width), '')}",
                dict(arch=arch, width=width), measure, f"{series}, {arch}", millions[arch, width],
                title=f"{series}, {arch}, width {width:g} ({millions[arch, width]:.3g} M)")
        for arch in archs
        for series, measure in SUPERVISED_TOO
        for width in widths
    ]  # fmt: skip


def projection_settings(base: Config) -> list[Setting]:
    """Heads of several widths. Without a head z is h, which has one width."""
    dim = simclr.Encoder(base.arch, base.width).feature_dim
    heads = [
        Setting(f"{kind}-{out}", dict(projection=kind, head_dim=out), series=f"{kind} head", x=out)
        for kind in ("nonlinear", "linear")
        for out in (32, 128, 512, 2048)
    ]
    return [*heads, Setting("none", dict(projection="none"), series="no head", x=dim)]


def information_settings(base: Config) -> list[Setting]:
    """g(h) is as wide as h, as in Table 3. The first row is left out for images without colour."""
    dim = simclr.Encoder(base.arch, base.width).feature_dim
    rows = {"": "colour or grey"} if base.gray_p else {}
    rows |= {"rotation": "rotation", "noise": "original or noisy", "sobel": "original or Sobel"}
    return [
        Setting(extra or COLOR, dict(extra=extra, head_dim=dim), probe, title=title)
        for extra, title in rows.items()
    ]


def loss_settings(base: Config) -> list[Setting]:
    """Each loss with a search over tau or margin and the rate, as in Appendix B.10."""
    titles = {
        "margin": "Margin", "nt-logistic": "NT-Logistic", "margin-semi-hard": "Margin (semi-hard)",
        "nt-logistic-semi-hard": "NT-Logistic (semi-hard)", "nt-xent": "NT-Xent",
        "dcl": "decoupled (DCL)",
    }  # fmt: skip
    margins, temperatures = ("margin", "m", (0.4, 0.8, 1.6)), ("temperature", "τ", (0.1, 0.2, 0.5))
    rates = [float(f"{factor * base.lr:.3g}") for factor in (0.25, 1)]
    return [
        Setting(f"{loss}-{key}{value:g}-lr{lr:g}", {"loss_function": loss, key: value, "lr": lr},
                group=title, title=f"{title}: {letter} {value:g}, lr {lr:g}")
        for loss, title in titles.items()
        for key, letter, values in [margins if loss.startswith("margin") else temperatures]
        for value in values
        for lr in rates
    ]  # fmt: skip


def batch_settings(base: Config) -> list[Setting]:
    """Batch x epochs x scaling of the rate; both scalings give the same at the base's batch."""
    peak, n = simclr.peak_learning_rate(base, base.batch_size), base.batch_size
    scalings = {"linear": ("linear", peak * 256 / n), "sqrt": ("√N", peak / math.sqrt(n))}
    lengths = {"half": max(1, base.epochs // 2), "whole": base.epochs, "double": 2 * base.epochs}
    batches = BATCHES.get(base.dataset, PAPER_BATCHES)
    ends = {batches[0]: "-smallest", batches[-1]: "-largest"}
    return [
        Setting(f"{scaling}-{length}-n{batch}{ends.get(batch, '')}",
                dict(lr_scaling=scaling, lr=lr, epochs=epochs, batch_size=batch),
                series=f"{epochs} epochs, {text}", x=batch)
        for length, epochs in lengths.items()
        for scaling, (text, lr) in scalings.items()
        for batch in batches
    ]  # fmt: skip


STUDIES: dict[str, Study] = {
    "augmentation": Study(
        "Which two transformations make the task?", "Figure 5",
        # singles, then ordered pairs: the row's transformation first, then the column's
        lambda base: [
            Setting(f"{name}-alone", dict(branch=(name,)), series=name, x=name,
                    title=f"{name} alone")
            for name in TRANSFORMATIONS
        ] + [
            Setting(f"{first}+{then}", dict(branch=(first, then)), series=first, x=then)
            for first, then in itertools.permutations(TRANSFORMATIONS, 2)
        ],
        draw="matrix", fixed=("rotation", "blur_p"),
        claims=(
            ("crop and colour beat the average of all", "crop+color", "*"),
            ("crop and colour beat crop alone", "crop+color", "crop-alone"),
            ("pairs beat singles", "*+*", "*-alone"),
        ),
    ),
    "color-strength": Study(
        "Does stronger colour distortion help SimCLR more than supervised learning?", "Table 1",
        lambda base: [
            Setting(f"{series}-{name}", dict(color_strength=s, blur_p=p), measure, series, x)
            for series, measure in SUPERVISED_TOO
            for x, name, s, p in (
                ("⅛", "s0.125", 0.125, 0.0), ("¼", "s0.25", 0.25, 0.0), ("½", "s0.5", 0.5, 0.0),
                ("1", "s1", 1.0, 0.0), ("1 + blur", "s1-blur", 1.0, 0.5),
            )
        ],
        metrics=("linear",), draw="lines", axis="strength s of colour distortion",
        paper={
            "SimCLR": {"⅛": 59.6, "¼": 61.0, "½": 62.6, "1": 63.2, "1 + blur": 64.5},
            "supervised": {"⅛": 77.0, "¼": 76.7, "½": 76.5, "1": 75.7, "1 + blur": 75.4},
        },
        claims=(
            ("SimCLR is better with s = 1 than with ⅛, by 3.6 points",
             "SimCLR-s1", "SimCLR-s0.125"),
            ("blur helps SimCLR, by 1.3 points", "SimCLR-s1-blur", "SimCLR-s1"),
            ("supervised learning is better with s = ⅛ than with 1, by 1.3 points",
             "supervised-s0.125", "supervised-s1"),
        ),
    ),
    "depth-width": Study(
        "Do depth and width help SimCLR more than supervised learning?", "Figure 7",
        size_settings, metrics=("linear",), draw="lines", around=("arch", "width"),
        axis="parameters of the encoder, millions",
        claims=(
            ("SimCLR is better with the largest network than with the smallest",
             "SimCLR-*-largest", "SimCLR-*-smallest"),
            ("supervised learning is, too, but by less",
             "supervised-*-largest", "supervised-*-smallest"),
        ),
    ),
    "projection": Study(
        "Is a nonlinear head needed, how wide, and is h better than z?", "Figure 8",
        projection_settings, metrics=("linear", "linear_z", "knn", "knn_z"), draw="lines",
        axis="width of z",
        claims=(
            ("a nonlinear head beats a linear one, by 3 points", "nonlinear-*", "linear-*"),
            ("a nonlinear head beats none, by more than 10 points", "nonlinear-*", "none"),
            ("h beats z, by more than 10 points", "nonlinear-*", "nonlinear-*", "linear_z"),
        ),
    ),
    "information": Study(
        "What does the head throw away?", "Table 3", information_settings,
        metrics=("probe_h", "probe_z", "chance"),
        paper={
            "probe_h": {COLOR: 99.3, "rotation": 67.6, "noise": 99.5, "sobel": 96.6},
            "probe_z": {COLOR: 97.4, "rotation": 25.6, "noise": 59.6, "sobel": 56.3},
            "chance": {COLOR: 80, "rotation": 25, "noise": 50, "sobel": 50},
        },
        claims=tuple(
            (f"h tells {name} better than g(h), by {by} points", name, name, "probe_z")
            for name, by in (("rotation", 42.0), ("noise", 39.9), ("sobel", 40.3))
        ),
    ),
    "loss": Study(
        "Is NT-Xent better than other contrastive losses?", "Table 4, Appendix B.10",
        loss_settings, metrics=("linear", "knn", "selection"), around=("lr",), fixed=("loss",),
        paper={"linear": {
            "Margin": 50.9, "NT-Logistic": 51.6, "Margin (semi-hard)": 57.5,
            "NT-Logistic (semi-hard)": 57.9, "NT-Xent": 63.9,
        }},
    ),
    "temperature": Study(
        "Do normalisation and temperature of NT-Xent matter?", "Table 5",
        lambda base: [
            Setting(f"{name}-tau{tau:g}", dict(loss_function=loss, temperature=tau),
                    title=f"{title}, τ = {tau:g}")
            for name, loss, title, values in (
                ("l2", "nt-xent", "ℓ2", (0.05, 0.1, 0.5, 1.0)),
                ("dot", "nt-xent-dot", "no ℓ2", (10.0, 100.0)),
            )
            for tau in values
        ],
        metrics=("linear", "knn", "entropy", "contrastive_accuracy"), fixed=("loss",),
        paper={
            "linear": {"l2-tau0.05": 59.7, "l2-tau0.1": 64.4, "l2-tau0.5": 60.7, "l2-tau1": 58.0,
                       "dot-tau10": 57.2, "dot-tau100": 57.0},
            "entropy": {"l2-tau0.05": 1.0, "l2-tau0.1": 4.5, "l2-tau0.5": 8.2, "l2-tau1": 8.3,
                        "dot-tau10": 0.5, "dot-tau100": 0.5},
            "contrastive_accuracy": {
                "l2-tau0.05": 90.5, "l2-tau0.1": 87.8, "l2-tau0.5": 68.2, "l2-tau1": 59.1,
                "dot-tau10": 91.7, "dot-tau100": 92.1},
        },
    ),
    "batch-size": Study(
        "Do larger batches and longer training help?", "Figure 9, Table B.1",
        batch_settings, metrics=("linear",), draw="lines", axis="batch size N (images)",
        around=("epochs", "lr"),
        paper={
            "100 epochs, linear": {256: 57.5, 1024: 62.8, 4096: 64.6},
            "100 epochs, √N": {256: 62.8, 1024: 64.3, 4096: 64.5},
            "200 epochs, linear": {256: 61.9, 1024: 65.3, 4096: 66.5},
            "200 epochs, √N": {256: 64.3, 1024: 66.1, 4096: 66.8},
            "400 epochs, linear": {256: 64.7, 1024: 67.2, 4096: 68.2},
            "400 epochs, √N": {256: 65.7, 1024: 67.2, 4096: 68.0},
            "800 epochs, linear": {256: 66.6, 1024: 68.5, 4096: 68.9},
            "800 epochs, √N": {256: 66.5, 1024: 68.3, 4096: 69.1},
        },
        claims=(
            ("the largest batch beats the smallest, by 7.1 points at 100 epochs",
             "linear-whole-*-largest", "linear-whole-*-smallest"),
            ("twice the epochs are better, by 1.3 to 4.4 points",
             "linear-double-*", "linear-whole-*"),
            ("with the smallest batch √N beats linear scaling, by 5.3 points at 100 epochs",
             "sqrt-whole-*-smallest", "linear-whole-*-smallest"),
        ),
    ),
    "optimizer": Study(
        "Which optimiser?", "not in the paper, which uses LARS",
        lambda base: [  # each with a search over its rate, which is not scaled with the batch
            Setting(f"{name}-lr{lr:g}",
                    dict(optimizer=name.lower(), weight_decay=decay, lr_scaling="none", lr=lr),
                    group=name, title=f"{name}, lr {lr:g}")
            for name, decay, rates in (
                ("LARS", 1e-6, (0.3, 1.0, 3.0)),
                ("SGD", 5e-4, (0.03, 0.1, 0.3)),
                ("AdamW", 1e-4, (1e-3, 2e-3, 4e-3)),
            )
            for lr in rates
        ],
        metrics=("linear", "knn", "selection"),
    ),
    "initialisation": Study(
        "What is pre-training worth when few labels are known?", "Table 7, Appendix B.5",
        lambda base: [
            Setting(f"{start}-{100 * share:g}%", dict(start=start, share=share), fine_tuned,
                    f"from {title}", f"{100 * share:g} %")
            for start, title in (("simclr", "SimCLR"), ("scratch", "scratch"))
            for share in (0.01, 0.1, 1.0)
        ],
        metrics=("accuracy",), draw="lines", axis="labels of each class",
        claims=tuple(
            (f"with {x} % of the labels SimCLR beats scratch", f"simclr-{x}%", f"scratch-{x}%")
            for x in (1, 10, 100)
        ),
    ),
    "encoder-pass": Study(
        "Must both views share a BatchNorm pass?", "not in the paper",
        lambda base: [Setting("one-pass", dict(passes=1)), Setting("two-passes", dict(passes=2))],
    ),
    "views": Study(
        "Are more views of fewer images better?", "not in the paper; arXiv 2403.05490",
        lambda base: [  # as many views a step, as many steps, the same rate
            Setting(f"{k}-views", dict(
                views=k, batch_size=base.views * base.batch_size // k, lr_scaling="none",
                epochs=max(1, base.views * base.epochs // k),
                warmup_epochs=base.views * base.warmup_epochs / k,
                lr=simclr.peak_learning_rate(base, base.batch_size),
            ), title=f"{k} views of {base.views * base.batch_size // k} images")
            for k in (2, 4, 8)
        ],
        metrics=("knn", "linear"), around=("batch_size", "epochs", "lr"),
    ),
    "resolution": Study(
        "Do views that grow save time?", "not in the paper; arXiv 2212.05611",
        lambda base: [
            Setting("whole", dict(view_sizes=(1.0,)), title="the images' side"),
            Setting("smaller", dict(view_sizes=(0.75,)), title="¾ of it"),
            Setting("growing", dict(view_sizes=simclr.GROWING), title="½, then ¾, then all of it"),
        ],
        metrics=("knn", "linear"), fixed=("view_size",),
    ),
}  # fmt: skip

# ------------------------------------------------------------------------------ the runs of a study

SHORT = {"digits": 30}  # epochs of the base; other data sets: 100, the paper's for most ablations
DEFAULT_EPOCHS = 100


@dataclass
class Job:
    """A row of a study's results: a pre-training and one measurement of it.

    config: not resolved; jobs that need the same pre-training have the same config.run, the name
    of its folder. arguments: of the measurement.
    """

    name: str
    setting: Setting
    config: Config
    variant: Variant
    arguments: dict[str, Any]

    @property
    def result_file(self) -> Path:
        words = [self.setting.measure.__name__, *map(str, self.arguments.values())]
        return self.config.folder / ("-".join(words) + ".json")

    def result(self) -> dict | None:
        """What was measured, if it has been. Raises InputError if the file is damaged."""
        if not self.result_file.exists():
            return None
        with utils.errors_as_input_error(f"{self.result_file} is damaged; delete it"):
            return dict(json.loads(self.result_file.read_bytes()))


def make_base(given: dict[str, Any]) -> Config:
    """What the studies vary: the recipe for the data set, shortened, with the flags on top.

    It has two views of one size, as in the paper, and as many views a step as the recipe.
    """
    epochs = SHORT.get(given.get("dataset", Config.dataset), DEFAULT_EPOCHS)
    given = {"epochs": epochs, "knn_every": 0, "view_sizes": (), **given}
    base = simclr.make_config(**given)
    if "views" in given or base.views == 2:
        return base
    size, peak = base.batch_size * base.views // 2, simclr.peak_learning_rate
    lr = base.lr * peak(base, base.batch_size) / peak(base, size)  # the same peak
    return simclr.make_config(**{"views": 2, "batch_size": size, "lr": lr, **given})


def make_jobs(study_name: str, given: dict[str, Any], seeds: int) -> list[Job]:
    """All jobs of a study, seed by seed, so that one seed is complete early.

    Raises InputError if a flag is one that the study varies, or a setting is not possible.
    """
    study, base = STUDIES[study_name], make_base(given)
    settings = study.settings(base)
    varied = ({key for s in settings for key in s.fields} | set(study.fixed)) - set(study.around)
    for key in sorted(varied & set(given)):
        raise InputError(f"the study {study_name} sets {flag(key)} itself: leave it out")
    of_config, of_variant = ({f.name for f in dataclasses.fields(k)} for k in (Config, Variant))
    jobs = []
    for seed, chosen in itertools.product(range(base.seed, base.seed + seeds), settings):
        fields = chosen.fields.items()
        config = make_base(given | {k: v for k, v in fields if k in of_config} | {"seed": seed})
        variant = Variant(**{k: v for k, v in fields if k in of_variant})
        arguments = {k: v for k, v in fields if k not in of_config | of_variant}
        two_views = variant.loss_function not in ("", *simclr.LOSSES) or variant.passes == 2
        if config.views > 2 and (two_views or variant.branch):
            raise InputError(f"the study {study_name} is of two views: leave --views out")
        config.run = run_name(config, variant)
        name = f"{study_name}/{chosen.name}-seed{seed}"
        jobs.append(Job(name, chosen, config, variant, arguments))
    return jobs


def run_name(config: Config, variant: Variant) -> str:
    """The name of a run: the same for all jobs that need the same pre-training, for no others."""
    names = [f.name for f in dataclasses.fields(config) if f.metadata["identity"]]
    identity = {name: getattr(config, name) for name in names}
    for name in ("data_dir", "labels_from"):
        if config.dataset == "folder" and (folder := getattr(config, name)):
            identity[name] = str(Path(folder).resolve())
    text = json.dumps([identity, dataclasses.asdict(variant)], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return f"{utils.ABLATIONS}/{config.dataset}-seed{config.seed}-{digest}"


def run_job(job: Job, data: Data, device: torch.device) -> None:
    """Train or continue the job's run, measure, and keep the result. The caller holds its lock."""
    started = time.perf_counter()
    run = Run(simclr.resolve(job.config, data.pretrain, device), job.variant, data, device)
    simclr.check_batch(run.config, len(data.pretrain))
    log = run.config.folder / utils.LOG
    utils.write_json(log.with_name("variant.json"), dataclasses.asdict(job.variant))  # for people
    before = sum(row["seconds"] for row in utils.read_jsonl(log))  # of training in earlier calls
    result = job.setting.measure(run, **job.arguments)
    result["test_images"] = len(data.test)
    result["seconds"] = round(before + time.perf_counter() - started, 1)
    utils.write_json(job.result_file, result)


# -------------------------------------------------------------------------- results and the verdict


class Results:
    """The rows of a study's CSV, and the settings that are shown, in order."""

    def __init__(self, settings: list[Setting], rows: list[dict[str, Any]]) -> None:
        self.settings, self.rows = settings, rows
        self.seeds = len({row["seed"] for row in rows})
        self.images = rows[0]["test_images"]  # of the test split

    def values(self, pattern: str, metric: str) -> dict[int, float]:
        """Seed -> value in the metric's unit, the mean over the settings that match `pattern`."""
        names = fnmatch.filter([s.name for s in self.settings], pattern)
        factor = 100 if METRICS[metric].endswith("%") else 1
        by_seed: dict[int, list[float]] = {}
        for row in self.rows:
            if row["setting"] in names and metric in row:
                by_seed.setdefault(row["seed"], []).append(factor * row[metric])
        return {seed: statistics.fmean(values) for seed, values in sorted(by_seed.items())}

    def columns(self, metric: str) -> tuple[list[float], list[float]]:
        """Mean (NaN: not measured) and standard deviation (0: one seed) of each setting."""
        values = [list(self.values(s.name, metric).values()) for s in self.settings]
        means = [statistics.fmean(v) if v else math.nan for v in values]
        return means, [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]

    def best_of_groups(self) -> Results:
        """Only the setting with the best mean `selection` of each group, a run of neighbours."""
        scores = {s: self.values(s.name, "selection").values() or [-1.0] for s in self.settings}
        groups = itertools.groupby(self.settings, lambda s: s.group or s.name)
        best = [max(group, key=lambda s: statistics.fmean(scores[s])) for _, group in groups]
        return Results(best, self.rows)


def paper_numbers(study: Study, metric: str, settings: Sequence[Setting]) -> list[float]:
    """The paper's number for each setting, NaN if it has none."""
    numbers = study.paper.get(metric, {})
    return [numbers.get(s.group or s.name, math.nan) for s in settings]


def markdown(study: Study, results: Results) -> str:
    """The table of the study, a row per setting: means over the seeds, and their error.

    That is utils.accuracy_error(), or, for numbers that are no test accuracies, the standard
    deviation over the seeds.
    """
    columns = [["setting", *(s.label for s in results.settings)]]
    for metric in study.metrics:
        images = results.images if metric in OF_TEST_IMAGES else utils.FEW_IMAGES
        cells = [METRICS[metric]]
        for mean, spread in zip(*results.columns(metric), strict=True):
            error = 100 * utils.accuracy_error(mean / 100, images, spread / 100)
            text = f"{mean:.1f}" + f" ± {error:.1f}" * (results.seeds > 1 or error > 0)
            cells.append("–" if math.isnan(mean) else text)
        columns.append(cells)
        if metric in study.paper:
            numbers = paper_numbers(study, metric, results.settings)
            cells = ["–" if math.isnan(number) else f"{number:g}" for number in numbers]
            columns.append(["paper, ImageNet", *cells])
    for column in columns:
        width = max(map(len, column))
        column.insert(1, "-" * width)
        column[:] = [cell.ljust(width) for cell in column]
    return "\n".join(f"| {' | '.join(row)} |" for row in zip(*columns, strict=True))


def compare(results: Results, left: tuple[str, str], right: tuple[str, str]) -> tuple[bool, str]:
    """Whether two accuracies differ significantly, and their difference in words.

    left, right: a pattern of settings' names and a metric; they are compared seed by seed.
    Significant is a difference of more than two standard errors: of its mean over the seeds, and
    of accuracies on so many test images. With one seed the first is unknown.
    """
    values, others = results.values(*left), results.values(*right)
    points = [values[seed] - others[seed] for seed in values if seed in others]
    if not points:
        return False, "not measured"
    mean, seeds = statistics.fmean(points), len(points)
    spread = statistics.stdev(points) if seeds > 1 else 0.0
    shares = [statistics.fmean(side.values()) / 100 for side in (values, others)]
    sampling = sum(p * (1 - p) for p in shares) / results.images  # variance of the difference
    error, count = (f" ± {spread:.1f}", f"{seeds} seeds") if seeds > 1 else ("", "one seed")
    text = f"{'better' if mean >= 0 else 'worse'} by {abs(mean):.1f}{error} points"
    text += f" = {abs(mean) * results.images / 100:.0f} of {results.images:,} images, {count}"
    if abs(mean) <= 2 * math.sqrt(spread**2 / seeds + 100**2 * sampling):
        return False, f"{text}: not significant"
    return True, f"{text}: significant" + ", if other seeds agree" * (seeds == 1)


def verdict(study: Study, results: Results) -> str:
    """Which of the paper's claims are seen here, or else which setting is best, in sentences."""
    metric, lines = study.metrics[0], []
    for text, better, worse, *worse_metric in study.claims:
        right = (worse, worse_metric[0] if worse_metric else metric)
        lines.append(f"The paper: {text}. Here: {compare(results, (better, metric), right)[1]}.")
    if lines:
        return "\n".join(lines)

    ours = dict(zip(results.settings, results.columns(metric)[0], strict=True))
    theirs = dict(zip(ours, paper_numbers(study, metric, results.settings), strict=True))
    ours = {s: mean for s, mean in ours.items() if not math.isnan(mean)}
    theirs = {s: theirs[s] for s in ours if not math.isnan(theirs[s])}
    if len(ours) < 2:
        return "Too little was measured to compare."
    ranked = sorted(ours, key=ours.__getitem__, reverse=True)
    best, other = ranked[:2]
    favourite = max(theirs, key=theirs.__getitem__, default=best)
    note = "paper: the same; " * bool(theirs) + f"next: {other.label}"
    if favourite is not best:
        other, note = favourite, f"paper: {favourite.label}"
    significant, difference = compare(results, (best.name, metric), (other.name, metric))
    text = f"Best here: {best.label} ({note}), {difference}."
    text += " Train longer, or with more seeds." * (not significant)
    text += f"\nFrom best to worst: {ours[best] - ours[ranked[-1]]:.1f} points"
    pairs = [(a, b) for a, b in itertools.combinations(theirs, 2) if theirs[a] != theirs[b]]
    if not pairs:
        return text + "."
    same = sum((ours[a] - ours[b]) * (theirs[a] - theirs[b]) > 0 for a, b in pairs)
    text += f" (paper: {max(theirs.values()) - min(theirs.values()):.1f}). "
    return text + f"{same} of {len(pairs)} pairs of settings are in the paper's order."


# ------------------------------------------------------------------------------------------ figures

MARKERS = "osD^vPX*<>"
APART = 0.06  # between lines that have the same x, so that their error bars do not overlap
SPAN = {"%": 4.0, "nats": 1.0}  # an axis is at least so long: small differences look small


def style_axis(axis: Any, title: str, values: str, metric: str, paper: bool) -> None:
    """What all panels look like: a grid and no frame, grey for the paper's numbers.

    values: "x" or "y", the axis of `metric`.
    """
    axis.set_title(title, fontsize=9)
    axis.set_facecolor("0.96" if paper else "white")
    axis.tick_params(labelsize=8)
    axis.grid(color="0.9")
    axis.spines[["top", "right"]].set_visible(False)
    low, high = getattr(axis, f"get_{values}lim")()
    missing = max(0, SPAN.get(METRICS[metric].split()[-1], 0) - (high - low)) / 2
    axis.set(**{f"{values}lim": (low - missing, high + missing)})


def draw_dots(figure: Any, study: Study, results: Results, our_title: str) -> None:
    """A row per setting, a panel per metric, and beside it one of the paper's numbers, if any.

    If the paper has numbers, only the metrics that it has are drawn.
    """
    shown = [m for m in study.metrics if m != "selection" and m in (study.paper or METRICS)]
    panels = [*itertools.product(shown, (False, True) if study.paper else (False,))]
    rows = range(len(results.settings))
    figure.set_size_inches(2.2 + 1.75 * len(panels), 1.7 + 0.34 * len(rows))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (metric, paper) in zip(axes, panels, strict=True):
        means, bars = results.columns(metric)
        if paper:
            means, bars = paper_numbers(study, metric, results.settings), None
        axis.errorbar(means, rows, xerr=bars, fmt="o", capsize=3, color="black")
        axis.margins(x=0.15)
        if "chance" in shown:  # these accuracies are compared with each other
            axis.set_xlim(0, 105)
        title = "the paper, ImageNet" if paper else our_title
        style_axis(axis, f"{METRICS[metric]}\n{title}", "x", metric, paper)
    axes[0].set_yticks(rows, [s.label for s in results.settings])
    axes[0].set_ylim(len(rows) - 0.5, -0.5)


def draw_lines(figure: Any, study: Study, results: Results, our_title: str) -> None:
    """Accuracy against x, a line per series (and one of z); the paper's beside it if it has any."""
    metrics = [m for m in study.metrics if m in ("linear", "linear_z", "accuracy")]
    ours = []  # (label, x, y, error bars or None). x: numbers, on a logarithmic axis, or names
    for name in dict.fromkeys(s.series for s in results.settings):
        series = Results([s for s in results.settings if s.series == name], results.rows)
        x = [s.x for s in series.settings]
        for metric in metrics:
            label = f"{name}, {'z' if metric == 'linear_z' else 'h'}" if len(metrics) > 1 else name
            ours.append((label, x, *series.columns(metric)))
    theirs = [(name, [*line], [*line.values()], None) for name, line in study.paper.items()]
    panels = [(our_title, ours), ("the paper, ImageNet, ResNet-50", theirs)][: 1 + bool(theirs)]
    figure.set_size_inches(9 if theirs else 5.5, 4.2)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, lines) in zip(axes, panels, strict=True):
        ticks = list(dict.fromkeys(x for _, xs, *_ in lines for x in xs))
        numeric = not isinstance(ticks[0], str)
        for i, (label, xs, means, bars) in enumerate(lines):
            aside = APART * (i - (len(lines) - 1) / 2) if lines is ours else 0
            places = [x * 2**aside if numeric else ticks.index(x) + aside / 2 for x in xs]
            axis.errorbar(
                places, means, yerr=bars, capsize=2, label=label, markersize=5,
                marker=MARKERS[i % len(MARKERS)], linestyle="--" if i % 2 else "-",
            )  # fmt: skip
        if numeric:
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:g}")
        else:
            axis.set_xticks(range(len(ticks)), ticks)
        axis.set_xlabel(study.axis, fontsize=9)
        axis.set_ylabel("accuracy, % of test images", fontsize=9)
        style_axis(axis, title, "y", study.metrics[0], lines is theirs)
        axis.legend(fontsize=7, frameon=False, handlelength=3, ncols=2, loc="upper center",
                    bbox_to_anchor=(0.5, -0.14))  # fmt: skip


def draw_matrix(figure: Any, study: Study, results: Results, our_title: str) -> None:
    """Figure 5: the row's transformation, then the column's; the last column is the row's mean."""
    names = list(TRANSFORMATIONS)
    means, _ = results.columns(study.metrics[0])
    cells = {(s.series, s.x): mean for s, mean in zip(results.settings, means, strict=True)}
    rows = [[cells.get((first, then), math.nan) for then in names] for first in names]
    for row in rows:
        row.append(statistics.fmean([v for v in row if not math.isnan(v)] or [math.nan]))
    known = [v for row in rows for v in row if not math.isnan(v)]
    low, high = min(known), max(*known, min(known) + SPAN["%"])
    figure.set_size_inches(6.6, 5.2)
    axis = figure.subplots()
    image = axis.imshow(rows, cmap="Greys", vmin=low - 0.15 * (high - low), vmax=high)
    for i, j in itertools.product(range(len(names)), range(len(names) + 1)):
        text = "–" if math.isnan(rows[i][j]) else f"{rows[i][j]:.1f}"
        color = "white" if rows[i][j] > (low + high) / 2 else "black"
        axis.text(j, i, text, ha="center", va="center", fontsize=8, color=color)
    axis.axvline(len(names) - 0.5, color="black", linewidth=2)
    axis.set_xticks(range(len(names) + 1), [*names, "average"], rotation=40, ha="right")
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel="second transformation (diagonal: one alone)", ylabel="first transformation")
    axis.set_title(f"one augmented branch; {our_title.replace(' ± std', '')}", fontsize=9)
    figure.colorbar(image, ax=axis, label="linear evaluation, % of test images", shrink=0.8)


DRAWINGS = {"dots": draw_dots, "lines": draw_lines, "matrix": draw_matrix}

# ------------------------------------------------------------------------------------------ a study


def describe_base(given: dict[str, Any]) -> str:
    """The data set, the epochs and the other flags of the base: what a CSV is of."""
    base = make_base(given)
    named = {f.name for f in dataclasses.fields(base) if f.metadata["identity"]} - {"seed"}
    flags = {"dataset": base.dataset, "epochs": base.epochs, **given}
    named |= {"data_dir", "labels_from", "init"}
    return " ".join(f"{flag(name)} {value}" for name, value in flags.items() if name in named)


def run_jobs(jobs: Sequence[Job], data: Data, device: torch.device) -> dict[str, str]:
    """Runs the jobs that no process has done or is running. Returns failures: name -> why."""
    failed = {}
    for i, job in enumerate(jobs, 1):
        with contextlib.suppress(utils.RunInUse), utils.run_lock(job.config.folder):
            if job.result() is not None:  # another process has just done it
                continue
            print(f"{i}/{len(jobs)}  {job.name}  ({job.config.folder})", flush=True)
            try:
                run_job(job, data, device)
            except Exception as error:  # of any kind: the other jobs can be done
                failed[job.name] = utils.one_line(str(error)) or type(error).__name__
                print(f"failed: {failed[job.name]}", file=sys.stderr, flush=True)
    return failed


def report(study_name: str, jobs: Sequence[Job], given: dict[str, Any], folder: Path) -> None:
    """Writes table and figure of jobs that are done into the folder; prints table and verdict."""
    from matplotlib.figure import Figure  # late: half a second that --help does not need

    study, base, rows = STUDIES[study_name], make_base(given), []
    for job in jobs:
        row = {"setting": job.setting.name, "seed": job.config.seed, **job.setting.fields}
        rows.append(row | job.result() | {"run": job.config.run, "base": describe_base(given)})
    columns = dict.fromkeys(itertools.chain(*rows))
    table, picture = folder / f"{study_name}.csv", folder / f"{study_name}.png"
    utils.write_csv(table, columns, ([row.get(name, "") for name in columns] for row in rows))

    results = Results(study.settings(base), rows).best_of_groups()
    seeds = f"mean ± std of {results.seeds} seeds" if results.seeds > 1 else "1 seed"
    figure = Figure(layout="constrained")
    DRAWINGS[study.draw](figure, study, results, f"{base.dataset}, {seeds}")
    figure.suptitle(f"{study.question}\n{study.where}", fontsize=10)
    utils.save_figure(figure, picture, dpi=120)
    print(f"\n{study.question} ({study.where}) on {base.dataset}\n")
    print(markdown(study, results))
    if results.images < utils.FEW_IMAGES:
        print(f"±: sampling error of {results.images:,} images, and spread over seeds if any")
    print(f"\n{verdict(study, results)}\n\ntable   {table}\nfigure  {picture}")


# -------------------------------------------------------------------------------- the time it takes

TIMED_VIEWS = 128
OVERHEAD = 1.5  # seconds per measurement


def seconds_left(jobs: Sequence[Job], images: int, per_view: float) -> float:
    """Estimated seconds of the unfinished jobs, each network taken to be as fast as the base's.

    Shared pre-trainings count once; fine-tuning is not counted.
    """
    left = {job.result_file: job for job in jobs if job.result() is None}
    views: dict[Path, int] = {}
    for file, job in left.items():
        size, steps = simclr.batch_count(job.config, images)
        if job.setting.measure is supervised:
            views[file] = size * steps * job.config.epochs
        elif job.arguments.get("start") != "scratch":
            views[job.config.folder] = job.config.views * size * steps * job.config.epochs
    return per_view * sum(views.values()) + OVERHEAD * len(left)


# -------------------------------------------------------------------------------- the command line


def parse_command_line(argv: Sequence[str] | None) -> tuple[list[str], int, dict[str, Any]]:
    """The studies (none: list them), the number of seeds, and the flags of the base."""
    parser = utils.OneLineParser(
        prog="ablation_SimCLR.py",
        usage="python ablation_SimCLR.py [STUDY|all] [--seeds N] [--flag value ...]",
        description=__doc__,
    )
    parser.add_argument("study", nargs="?", choices=["all", *STUDIES], help="default: list them")
    text = "runs of each setting, seeds from --seed on [3]"
    parser.add_argument("--seeds", type=int, default=3, help=text)
    utils.add_flags(parser, Config)
    given = vars(parser.parse_args(argv))
    study, seeds = given.pop("study"), given.pop("seeds")
    if seeds < 1:
        raise InputError(f"--seeds must be at least 1, got {seeds}")
    return list(STUDIES) if study == "all" else [study] * bool(study), seeds, given


def list_studies(given: dict[str, Any], seeds: int, data: Data, device: torch.device) -> None:
    """Print the question of each study, its number of runs, and the time that they still take."""
    print(f"on {describe_base(given)}, {seeds} seed{'s' * (seeds != 1)}, {device}:\n", flush=True)
    config = simclr.resolve(make_base(given), data.pretrain, device)
    model = utils.on_device(simclr.make_model(config), device)
    views = torch.zeros((TIMED_VIEWS, 3, config.view_side, config.view_side), device=device)
    per_view = simclr.seconds_a_pass(model, views, config) / TIMED_VIEWS
    times, every = dict.fromkeys(STUDIES, math.inf), []
    for name, study in STUDIES.items():
        try:
            jobs = make_jobs(name, given, seeds)
            seconds = seconds_left(jobs, len(data.pretrain), per_view)
        except InputError as error:  # a flag, or a damaged result: of this study alone
            print(f"{name:16}{'–':>4} runs {'–':>8}  {error}")
            continue
        every += jobs
        times[name] = seconds or math.inf
        left = tqdm.format_interval(seconds) if seconds else "done"
        print(f"{name:16}{len(jobs):4} runs {left:>8}  {study.question}")
    left = tqdm.format_interval(seconds_left(every, len(data.pretrain), per_view))
    print(f"\n{'all':16}{len(every):4} runs {left:>8}  (mm:ss or h:mm:ss, estimated)")
    command = utils.python_command(utils.from_here(__file__), min(times, key=times.__getitem__))
    print(f"\nrun the shortest:  {command}")


def run(names: Sequence[str], seeds: int, given: dict[str, Any]) -> None:
    """What `python ablation_SimCLR.py` does. Raises SystemExit if a run failed."""
    base = make_base(given)
    grids = {name: make_jobs(name, given, seeds) for name in names}
    device = utils.choose_device(base.device)
    data = simclr.load_data(base, device)
    if not names:
        list_studies(given, seeds, data, device)
        return
    if not data.labelled:
        raise InputError(f"{base.dataset} in {base.data_dir} has no labels to measure by")
    data = simclr.readable_data(data, base)
    figures = Path(base.figures, utils.ABLATIONS, given.get("run", ""))
    for folder in (figures, Path(base.checkpoints, utils.ABLATIONS)):
        utils.make_folder(folder)
    print(f"{describe_base(given)}: {utils.describe_data(data)}; on {device}", flush=True)
    failed: dict[str, str] = {}
    for name, jobs in grids.items():
        failed |= run_jobs(jobs, data, device)
        done = [job for job in jobs if job.name not in failed]
        if left := sum(job.result() is None for job in done):
            others = "are left to other processes; the last one draws"
            print(f"\n{left} of {len(jobs)} runs of {name} {others}")
        elif done:
            report(name, done, given, figures)
    if failed:
        print(f"\n{len(failed)} runs failed; the same command tries them again", file=sys.stderr)
        for name, why in failed.items():
            print(f"  {name}: {why}", file=sys.stderr)
        raise SystemExit(1)


@utils.command("ablation_SimCLR.py")
def main(argv: Sequence[str] | None = None) -> None:
    run(*parse_command_line(argv))


if __name__ == "__main__":
    main()
