"""Every ablation of the SimCLR paper by one command.

    python ablation_SimCLR.py                      # the studies, and how long they take
    python ablation_SimCLR.py temperature          # one of them, on the embedded digits
    python ablation_SimCLR.py temperature --dataset cifar10 --epochs 100 --seeds 3
    python ablation_SimCLR.py all --shard 1/4      # a quarter of all runs; the last shard draws
    torchrun --nproc_per_node=4 ablation_SimCLR.py all     # the same, a GPU each

Each run is an ordinary run of simclr.py in checkpoints/ablation/<study>/<setting>-seed<k>. The same
command again continues where it stopped; runs that studies share are done once. Results are
figures/ablation/<study>.csv, a row a run, and <study>.png, in the form of the paper's figure.

Your own study is an entry of STUDIES, at the end of the part of that name:

    "crop": Study(
        "How small may crops be?", "Section 3",
        lambda base: grid(crop_min=(0.08, 0.2, 0.5)),
    ),

The fields of a setting are those of simclr.Config, or of Variant where the training itself is
another, or arguments of what is measured. Every flag of simclr.py sets the base that a study
varies; the base is shorter than simclr.py's own runs (SHORT).

Reading order: losses · transformations · a run and what is measured of it · the table of studies ·
results, their reading, table and figure · going through a grid · the command line.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import fnmatch
import functools
import hashlib
import io
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import simclr
import utils
from simclr import Config, Data, LabelTraining
from utils import Images, ImageSet, InputError, flag, setting

# ----------------------------------------------------------------------------------------- losses
#
# Table 2 and Table 4. All take z1, z2: (N, D), the projections of the two views, temperature and
# margin (each uses what it needs), and return a scalar. u is a view, v+ its partner, v- another.


def opposite_similarities(z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine of each view to the N views of the other side, at least float32 (2N, N), and where
    the negatives are: bool (2N, N), false at the partner.

    Appendix B.10: the losses other than NT-Xent take negatives from one augmented side only.
    """
    with simclr.full_precision(z1):
        cosine = simclr.normalize_rows(z1) @ simclr.normalize_rows(z2).T  # (N, N)
    negative = ~torch.eye(len(z1), dtype=torch.bool, device=z1.device)
    return torch.cat([cosine, cosine.T]), negative.repeat(2, 1)


def positives(similarity: Tensor) -> Tensor:
    """Similarity of each view to its partner: (2N, N) -> (2N, 1)."""
    return similarity.unflatten(0, (2, -1)).diagonal(dim1=1, dim2=2).reshape(-1, 1)


def semi_hard(similarity: Tensor, negative: Tensor) -> Tensor:
    """For each view its semi-hard negative's similarity: (2N, N) -> (2N, 1).

    The closest of the negatives that are farther than the partner (Schroff et al. 2015, Section
    5.1); where none is, the farthest negative, which comes nearest to being one.
    """
    farther = negative & (similarity < positives(similarity))
    closest = similarity.masked_fill(~farther, -torch.inf).amax(1, keepdim=True)
    farthest = similarity.masked_fill(~negative, torch.inf).amin(1, keepdim=True)
    return torch.where(farther.any(1, keepdim=True), closest, farthest)


def over_negatives(values: Tensor, negative: Tensor) -> Tensor:
    """Mean of the values (2N, N) at the negatives. values[negative] would wait for a GPU."""
    return (values * negative).sum() / negative.sum()


def nt_logistic(
    z1: Tensor, z2: Tensor, temperature: float, margin: float, mined: bool = False
) -> Tensor:
    """Mean over views of -log sigmoid(u·v+ / tau) - mean over v- of log sigmoid(-u·v- / tau).

    mined: the semi-hard negative alone instead of all.
    """
    del margin
    similarity, negative = opposite_similarities(z1, z2)  # (2N, N)
    attraction = F.logsigmoid(positives(similarity) / temperature)  # (2N, 1)
    if mined:
        repulsion = F.logsigmoid(-semi_hard(similarity, negative) / temperature)  # (2N, 1)
    else:
        repulsion = over_negatives(F.logsigmoid(-similarity / temperature), negative)
    return -attraction.mean() - repulsion.mean()


def margin_triplet(
    z1: Tensor, z2: Tensor, temperature: float, margin: float, mined: bool = False
) -> Tensor:
    """Mean over views and v- of max(u·v- - u·v+ + margin, 0). mined: as in nt_logistic()."""
    del temperature
    similarity, negative = opposite_similarities(z1, z2)
    excess = (semi_hard(similarity, negative) if mined else similarity) - positives(similarity)
    hinge = (excess + margin).clamp(min=0)
    return hinge.mean() if mined else over_negatives(hinge, negative)


def dot_product_logits(z1: Tensor, z2: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """simclr.contrastive_logits() with dot products of z as it is, not normalised (Table 5)."""
    z = torch.cat([z1, z2]).to(torch.promote_types(z1.dtype, torch.float32))  # (2N, D)
    with simclr.full_precision(z):
        logits = z @ z.T / temperature
    logits.fill_diagonal_(float("-inf"))  # (2N, 2N)
    return logits, torch.arange(len(z), device=z.device).roll(len(z1))


LOGITS = {"nt-xent": simclr.contrastive_logits, "nt-xent-dot": dot_product_logits}
LOSSES: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "nt-xent": lambda z1, z2, temperature, _: simclr.nt_xent(z1, z2, temperature),
    "nt-xent-dot": lambda z1, z2, temperature, _: F.cross_entropy(
        *dot_product_logits(z1, z2, temperature)
    ),
    "nt-logistic": nt_logistic,
    "nt-logistic-semi-hard": functools.partial(nt_logistic, mined=True),
    "margin": margin_triplet,
    "margin-semi-hard": functools.partial(margin_triplet, mined=True),
}

# -------------------------------------------------------------------------------- transformations
#
# Steps like those of simclr.Augment: pure functions of images (N, 3, S, S) and of u, uniform
# numbers in [0, 1), a row an image and as many columns as the step declares in `draws`.

CUTOUT = 0.5  # side of the square that is cut out, as a share of the image's
NOISE = 0.2  # largest standard deviation of the noise
SOBEL = 4.0  # response to an edge from black to white along an axis


class Whole:
    """The image as it is: resized and cut to a square where it is none."""

    draws = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, images: Tensor, u: Tensor) -> Tensor:
        return utils.center_view(images, self.size)


class Cutout:
    """Blackens a square somewhere in the image (DeVries and Taylor 2017)."""

    draws = 2

    def __call__(self, images: Tensor, u: Tensor) -> Tensor:
        inside = [
            self.covered(u[:, i], pixels) for i, pixels in enumerate(images.shape[-2:])
        ]  # (N, H), (N, W)
        return images.masked_fill((inside[0][:, :, None] & inside[1][:, None])[:, None], 0.0)

    @staticmethod
    def covered(u: Tensor, pixels: int) -> Tensor:
        """Which of the pixels along a side are cut out: bool (N, pixels)."""
        length = round(CUTOUT * pixels)
        start = (u[:, None] * (pixels - length + 1)).floor().clamp(max=pixels - length)  # (N, 1)
        place = torch.arange(pixels, device=u.device)
        return (place >= start) & (place < start + length)


class GaussianNoise:
    """Adds white noise, its standard deviation between 0 and NOISE."""

    def __init__(self, size: int) -> None:
        self.draws = 1 + 3 * size**2

    def __call__(self, images: Tensor, u: Tensor) -> Tensor:
        tiny = torch.finfo(u.dtype).eps
        normal = torch.special.ndtri(u[:, 1:].clamp(tiny, 1 - tiny)).view_as(images)
        return (images + simclr.per_image(NOISE * u[:, 0]) * normal).clamp(0, 1)


class Sobel:
    """Length of each channel's gradient by Sobel's kernels, mirrored at the edges, in [0, 1]."""

    draws = 0

    def __call__(self, images: Tensor, u: Tensor) -> Tensor:
        x = F.pad(images, (1, 1, 1, 1), mode="reflect")  # (N, 3, S + 2, S + 2)
        rows = x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]  # (N, 3, S, S + 2)
        columns = x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]  # (N, 3, S + 2, S)
        across, down = rows[..., 2:] - rows[..., :-2], columns[..., 2:, :] - columns[..., :-2, :]
        return (torch.hypot(across, down) / SOBEL).clamp(0, 1)


class RightAngle:
    """Rotates by 0, 90, 180 or 270 degrees counter-clockwise."""

    draws = 1

    def turns(self, u: Tensor) -> Tensor:
        """How many quarter turns: int64 (N,)."""
        return (4 * u[:, 0]).long()

    def __call__(self, images: Tensor, u: Tensor) -> Tensor:
        turned = torch.stack([images.rot90(k, (-2, -1)) for k in range(4)])  # (4, N, 3, S, S)
        return turned[self.turns(u), torch.arange(len(images), device=images.device)]


class Sometimes:
    """Another step, with probability p."""

    def __init__(self, step: Any, p: float = 0.5) -> None:
        self.step, self.p, self.draws = step, p, 1 + step.draws

    def __call__(self, images: Tensor, u: Tensor) -> Tensor:
        return torch.where(simclr.per_image(u[:, 0] < self.p), self.step(images, u[:, 1:]), images)


TRANSFORMATIONS: dict[str, Callable[[Config], list[Any]]] = {  # of Figure 5, in its order
    "crop": lambda c: [
        simclr.RandomResizedCrop(c.view_side, (c.crop_min, 1.0)), simclr.RandomFlip(c.flip)
    ],
    "cutout": lambda c: [Cutout()],
    "color": lambda c: [
        step for step in simclr.make_augment(c).steps
        if isinstance(step, simclr.ColorJitter | simclr.RandomGrayscale)
    ],
    "sobel": lambda c: [Sobel()],
    "noise": lambda c: [GaussianNoise(c.view_side)],
    "blur": lambda c: [simclr.RandomBlur(1.0, c.view_side)],
    "rotate": lambda c: [RightAngle()],
}  # fmt: skip
EXTRAS: dict[str, Callable[[Config], Any]] = {  # what Table 3 adds to both views
    "rotation": lambda c: RightAngle(),
    "noise": lambda c: Sometimes(GaussianNoise(c.view_side)),
    "sobel": lambda c: Sometimes(Sobel()),
}

# ---------------------------------------------------------------- a run, and what is measured of it


@dataclass(frozen=True)
class Variant:
    """How a training departs from simclr.py's; by default it does not."""

    loss_function: str = "nt-xent"  # one of LOSSES
    margin: float = 0.0  # of the margin losses
    branch: tuple[str, ...] = ()  # what one view gets in turn while the other gets nothing (Fig 5)
    extra: str = ""  # one of EXTRAS, which both views get as well
    passes: int = 1  # 2: each view has a BatchNorm pass of its own


class TwoPasses(simclr.SimCLR):
    """In training each half of the batch, one view of each image, goes through on its own."""

    def forward(self, views: Tensor) -> tuple[Tensor, Tensor]:
        if not self.training:
            return super().forward(views)
        h, z = zip(*(super(TwoPasses, self).forward(half) for half in views.chunk(2)), strict=True)
        return torch.cat(h), torch.cat(z)


class AblationRun(simclr.Pretraining):
    """A pre-training with another loss, other views or another forward pass."""

    def __init__(self, config: Config, data: Data, device: torch.device, variant: Variant) -> None:
        super().__init__(config, data, device)
        self.variant = variant
        self.augment = make_augment(config, variant, data.pretrain)
        steps = [step for name in variant.branch for step in TRANSFORMATIONS[name](config)]
        self.branch = simclr.Augment(config.view_side, steps)
        if variant.passes == 2:
            weights = self.model.state_dict()
            self.model = TwoPasses(config).to(device, memory_format=torch.channels_last)
            self.model.load_state_dict(weights)
            self.optimizer = simclr.make_optimizer(config, self.model)

    def loss(self, z1: Tensor, z2: Tensor) -> Tensor:
        variant = self.variant
        return LOSSES[variant.loss_function](z1, z2, self.config.temperature, variant.margin)

    def batches(self) -> Iterator[Tensor]:
        if not self.variant.branch:
            yield from super().batches()
            return
        epoch, first = self.position.epoch, self.position.step
        for step, views in enumerate(super().batches(), first):
            x1, x2 = views.chunk(2)  # (N, 3, S, S)
            key = (self.config.seed, simclr.VIEWS, epoch, step, 1)  # another stream than the crops'
            u = self.branch.draw(len(x1), utils.generator(self.device, *key))
            yield torch.cat([self.branch(x1, u), x2])

    def state(self) -> dict:
        return {**super().state(), "variant": dataclasses.asdict(self.variant)}


def make_augment(config: Config, variant: Variant, data: Images) -> simclr.Augment:
    """What both views get. config: resolved.

    With one augmented branch that is nothing: images in memory have one size. Where they have
    many, it is a random crop, as in the paper (Section 3.1).
    """
    if variant.branch:
        size = config.view_side
        crop = simclr.RandomResizedCrop(size, (config.crop_min, 1.0))
        return simclr.Augment(size, [Whole(size) if isinstance(data, ImageSet) else crop])
    augment = simclr.make_augment(config)
    if variant.extra:
        augment.steps.append(EXTRAS[variant.extra](config))
    return augment


@dataclass
class Job:
    """A row of a study's results: a pre-training and one measurement of it.

    config: not resolved; its `run` is the name that the run gets unless one of the same
    configuration exists. arguments: of the measurement.
    """

    setting: Setting
    config: Config
    variant: Variant
    measure: str  # one of MEASURES
    arguments: dict[str, Any]

    @property
    def seed(self) -> int:
        return self.config.seed

    @functools.cached_property
    def digest(self) -> str:
        """The same for all jobs that need the same pre-training, and for no others."""
        fields = dataclasses.fields(self.config)
        identity = {f.name: getattr(self.config, f.name) for f in fields if f.metadata["identity"]}
        if self.config.dataset == "folder":
            identity["data_dir"] = str(Path(self.config.data_dir).resolve())
        text = json.dumps([identity, dataclasses.asdict(self.variant)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def place(self) -> Path:
        """A file that holds the name of the run; beside it lies the one that is locked."""
        return Path(self.config.checkpoints) / simclr.ABLATIONS / ".runs" / self.digest

    @property
    def name(self) -> str:
        """The run's name: another study's, or an earlier one, if it is the same run."""
        with contextlib.suppress(OSError):
            name = self.place.read_text(encoding="utf-8").strip()
            if name and (Path(self.config.checkpoints) / name / RECORD).exists():
                return name
        return self.config.run

    @property
    def folder(self) -> Path:
        return Path(self.config.checkpoints) / self.name

    @property
    def result_file(self) -> Path:
        words = [self.measure, *map(str, self.arguments.values())]
        return self.folder / ("-".join(words) + ".json")

    def result(self) -> dict | None:
        """What was measured, if it has been. InputError if the folder is of another run."""
        try:
            record = json.loads((self.folder / RECORD).read_bytes())
            if record["digest"] != self.digest:
                raise InputError(
                    f"{self.folder} holds a run with another configuration: "
                    f"{', '.join(self.departures(record)) or 'of another version'}. Choose another "
                    f"name with {flag('run')}, or delete it"
                )
            return json.loads(self.result_file.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except InputError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.result_file} is damaged ({error}); delete it") from error

    def departures(self, record: dict) -> list[str]:
        variant = dataclasses.asdict(self.variant)
        there = {k: list(v) if isinstance(v, tuple) else v for k, v in variant.items()}
        found = simclr.differences(record["config"], self.config)
        return found + [
            f"{key} ({record['variant'].get(key)} there, {value} now)"
            for key, value in there.items()
            if record["variant"].get(key) != value
        ]


RECORD = "ablation.json"  # in each run's folder: what it is a run of


@dataclass
class Measured:
    """What a measurement is made with. config: resolved. pretrained(): trains, or continues."""

    config: Config
    variant: Variant
    data: Data
    device: torch.device

    def pretrained(self) -> simclr.SimCLR:
        make_run = functools.partial(AblationRun, variant=self.variant)
        return simclr.pretrain(self.config, self.data, self.device, make_run=make_run)

    @property
    def classes(self) -> int:
        return len(self.data.train.classes)

    def log(self) -> list[dict]:
        return utils.read_jsonl(self.config.folder / "log.jsonl")

    def accuracy(self, network: Callable[[Tensor], Tensor]) -> float:
        """Test accuracy in [0, 1] of images -> logits."""
        logits = simclr.features(network, self.data.test, self.config, self.device)
        return utils.accuracy(logits.argmax(1), self.data.test.labels)


def representation(job: Measured) -> dict[str, float]:
    """Accuracies in [0, 1] of h and z, frozen: kNN (k = 10) and a linear classifier.

    Also `selection`, the kNN accuracy of h within the training set, which settings are chosen by,
    and of the contrastive task after training its entropy (nats) and accuracy (Table 5).
    """
    model = job.pretrained()
    y, y_test, found = job.data.train.labels, job.data.test.labels, {}
    with utils.frozen(model):
        for suffix, encoder in (("", model.encoder), ("_z", nn.Sequential(*model.children()))):
            x, x_test = (
                simclr.features(encoder, part, job.config, job.device)
                for part in (job.data.train, job.data.test)
            )
            k, classes = simclr.KNN_NEIGHBOURS, job.classes
            predicted = utils.knn_predict(x, y, x_test, classes, k)
            found["knn" + suffix] = utils.accuracy(predicted, y_test)
            classifier = utils.fit_linear_classifier(x, y, classes)
            found["linear" + suffix] = utils.accuracy(classifier(x_test).argmax(1), y_test)
            if not suffix:
                fit, held = (torch.from_numpy(r) for r in utils.split_held_out(y.cpu().numpy()))
                predicted = utils.knn_predict(x[fit], y[fit], x[held], classes, k)
                found["selection"] = utils.accuracy(predicted, y[held])
        found |= contrastive_task(model, job)
    found["loss"] = job.log()[-1]["loss"]
    found["parameters"] = sum(p.numel() for p in model.encoder.parameters())
    return found


TASK_STEPS = 8  # batches that the contrastive task is measured on


@torch.no_grad()
def contrastive_task(model: simclr.SimCLR, job: Measured) -> dict[str, float]:
    """How sure and how right the trained model is about which view belongs to which (Table 5).

    Mean entropy in nats of each view's softmax over the others, and the share of views whose
    partner is the likeliest; on views of training images that training did not see.
    """
    run = AblationRun(job.config, job.data, job.device, job.variant)
    run.position = simclr.Position(job.config.epochs)
    logits_of = LOGITS.get(job.variant.loss_function, simclr.contrastive_logits)
    entropies, hits = [], []
    for views in itertools.islice(run.batches(), TASK_STEPS):
        with utils.autocast(job.device, job.config.precision):
            _, z = model(views.contiguous(memory_format=torch.channels_last))
        logits, partner = logits_of(*z.chunk(2), job.config.temperature)
        entropies.append(torch.special.entr(logits.softmax(1)).sum(1).mean())
        hits.append((logits.argmax(1) == partner).float().mean())
    return {
        "entropy": torch.stack(entropies).mean().item(),
        "contrastive_accuracy": torch.stack(hits).mean().item(),
    }


def supervised(job: Measured) -> dict[str, float]:
    """Test accuracy of the same network trained on all labels with the same augmentation."""
    config, start = job.config, simclr.make_model(job.config).encoder.to(job.device)
    how = LabelTraining(config.epochs, min(256, config.batch_size), 0.1, weight_decay=1e-4)
    rows = torch.arange(len(job.data.train))
    augment = make_augment(config, job.variant, job.data.train)
    network = simclr.fine_tune(
        start, job.data.train, rows, augment, how, config, job.device, config.seed
    )
    parameters = sum(p.numel() for p in start.parameters())
    return {"linear": job.accuracy(network), "parameters": parameters}


def fine_tuned(job: Measured, start: str, share: float) -> dict[str, float]:
    """Test accuracy after fine-tuning on a share of the labels of each class (Appendix B.5).

    start: "simclr", or "scratch" for the untrained network.
    """
    config, labels = job.config, job.data.train.labels.cpu().numpy()
    model = job.pretrained() if start == "simclr" else simclr.make_model(config).to(job.device)
    key = utils.derive_seed(config.seed, simclr.LABELS)
    rows = torch.cat(
        [
            torch.from_numpy(order[: max(1, round(share * len(order)))])
            for order in utils.class_balanced_order(labels, key)
        ]
    )
    how = LabelTraining(epochs=60 if share <= 0.01 else 30)
    network = simclr.fine_tune(
        model.encoder, job.data.train, rows, simclr.geometric_augment(config), how, config,
        job.device, config.seed,
    )  # fmt: skip
    return {"accuracy": job.accuracy(network), "labels": len(rows)}


PROBE = LabelTraining(epochs=20, batch_size=256, lr=0.1, min_steps=500)
PROBE_VIEWS = 4  # of each image
COLOR = "color"  # the probe for a transformation that is there anyway


def probe(job: Measured, transformation: str) -> dict[str, float]:
    """Accuracies in [0, 1] of telling which transformation a view had, from h and from g(h).

    Table 3: an MLP on frozen features of augmented training images, tested on augmented test
    images. transformation: COLOR or one of EXTRAS. `chance` is the share of the commonest.
    """
    model, found = job.pretrained(), {}
    with utils.frozen(model):
        train, test = (
            transformed_features(model, job, data, transformation, i)
            for i, data in enumerate((job.data.train, job.data.test))
        )
    for i, name in enumerate(("probe_h", "probe_z")):
        x, x_test = utils.standardize(train[i], test[i])
        found[name] = mlp_accuracy(x, train[2], x_test, test[2], job.config)
    found["chance"] = test[2].bincount().max().item() / len(test[2])
    return found


@torch.no_grad()
def transformed_features(
    model: simclr.SimCLR, job: Measured, data: Images, transformation: str, part: int
) -> tuple[Tensor, Tensor, Tensor]:
    """h (M, D), z (M, D') and which transformation, int64 (M,), of PROBE_VIEWS views an image."""
    config, augment = job.config, make_augment(job.config, job.variant, data)
    kind = simclr.RandomGrayscale if transformation == COLOR else type(augment.steps[-1])
    index = next(i for i, step in enumerate(augment.steps) if type(step) is kind)
    step, first = augment.steps[index], sum(s.draws for s in augment.steps[:index])

    size = min(config.batch_size, len(data))
    steps = len(data) // size
    rows = torch.arange(size * steps).view(steps, size).repeat(PROBE_VIEWS, 1)
    keys = [(config.seed, simclr.LABELS, part, i) for i in range(len(rows))]
    workers = utils.worker_count(config.workers)
    views = simclr.augmented_batches(data, rows, keys, augment, 1, job.device, workers)
    where = job.device if isinstance(data, ImageSet) else "cpu"  # where the randomness is drawn
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for x, key in zip(views, keys, strict=True):
        u = augment.draw(size, utils.generator(where, *key))[:, first:].to(job.device)
        label = step.turns(u) if isinstance(step, RightAngle) else (u[:, 0] < step.p).long()
        with utils.autocast(job.device, config.precision):
            h, z = model(x.contiguous(memory_format=torch.channels_last))
        found.append((h.float(), z.float(), label))
    h, z, label = (torch.cat(column) for column in zip(*found, strict=True))
    return h, z, label


def mlp_accuracy(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, config: Config) -> float:
    """Test accuracy of an MLP with one hidden layer as wide as its input, trained by SGD."""
    classes = int(y.max()) + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(utils.derive_seed(config.seed, simclr.LABELS))
        network = nn.Sequential(
            nn.Linear(x.shape[1], x.shape[1]), nn.ReLU(), nn.Linear(x.shape[1], classes)
        ).to(x.device)
    steps, size = PROBE.steps(len(x)), PROBE.batch(len(x))
    generator = utils.generator(x.device, config.seed, simclr.LABELS, 2)
    chosen = torch.randint(len(x), (steps, size), generator=generator, device=x.device)
    batches = ((x[rows], y[rows]) for rows in chosen)
    peak = PROBE.lr * size / 256
    simclr.train_on_labels(network, batches, steps, peak, PROBE, "float32")
    with torch.no_grad():
        return utils.accuracy(network(x_test).argmax(1), y_test)


MEASURES: dict[str, Callable[..., dict[str, float]]] = {
    "representation": representation,
    "supervised": supervised,
    "fine_tuned": fine_tuned,
    "probe": probe,
}

# ----------------------------------------------------------------------------- the table of studies


@dataclass(frozen=True, eq=False)
class Setting:
    """A point of a study's grid.

    fields: of Config, of Variant, or arguments of `measure`. series and x: where it is drawn.
    group: settings of one group are a search, of which the best by `selection` is shown.
    """

    name: str
    fields: dict[str, Any]
    measure: str = "representation"
    series: str = ""
    x: float | str = ""
    group: str = ""
    title: str = ""

    @property
    def label(self) -> str:
        """What people read: its title, or what there is of series and x, or its name."""
        return self.title or f"{self.series} {self.x}".strip() or self.name


def grid(**fields: Sequence[Any]) -> list[Setting]:
    """All combinations of values, each named after them."""
    settings = []
    for values in itertools.product(*fields.values()):
        named = dict(zip(fields, values, strict=True))
        name = ",".join(f"{key}={value}" for key, value in named.items())
        settings.append(Setting(name, named))
    return settings


@dataclass(frozen=True)
class Claim:
    """What the paper says: one side of a comparison is better. by: how much, in its words.

    A side is a pattern of settings' names and one of METRICS.
    """

    text: str
    better: tuple[str, str]
    worse: tuple[str, str]
    by: str = ""


@dataclass(frozen=True)
class Study:
    """One ablation: a grid about a base, and how its results are shown."""

    question: str
    where: str  # in the paper
    settings: Callable[[Config], list[Setting]]  # of a base
    metrics: tuple[str, ...] = ("linear", "knn")  # what is shown, of METRICS; the first is compared
    # the paper's numbers: metric -> setting's name (or group) -> value; of lines series -> x -> it
    paper: dict[str, dict[Any, float]] = field(default_factory=dict)
    claims: tuple[Claim, ...] = ()  # what the paper says in words
    draw: str = "dots"  # one of DRAWINGS
    axis: str = ""  # what x is
    fixed: tuple[str, ...] = ()  # flags that make no sense here, beside those of varied fields
    around: tuple[str, ...] = ()  # fields varied around the base's value, whose flags are taken


METRICS = {  # what is measured -> what it is called, its unit, and what to multiply it with
    "linear": ("linear on h", "%", 100),
    "knn": ("kNN on h", "%", 100),
    "linear_z": ("linear on z", "%", 100),
    "knn_z": ("kNN on z", "%", 100),
    "accuracy": ("accuracy", "%", 100),
    "entropy": ("entropy", "nats", 1),
    "contrastive_accuracy": ("contrastive acc.", "%", 100),
    "probe_h": ("from h", "%", 100),
    "probe_z": ("from g(h)", "%", 100),
    "chance": ("chance", "%", 100),
    "parameters": ("parameters", "", 1),
    "labels": ("labels", "", 1),
    "selection": ("selection", "%", 100),
    "loss": ("loss", "", 1),
}


def augmentation_settings(base: Config) -> list[Setting]:
    """Single transformations and ordered pairs: the row's first, then the column's."""
    singles = [
        Setting(f"{name}-alone", dict(branch=(name,)), series=name, x=name, title=f"{name} alone")
        for name in TRANSFORMATIONS
    ]
    pairs = [
        Setting(f"{first}+{then}", dict(branch=(first, then)), series=first, x=then)
        for first, then in itertools.permutations(TRANSFORMATIONS, 2)
    ]
    return singles + pairs


STRENGTHS = {"⅛": 0.125, "¼": 0.25, "½": 0.5, "1": 1.0}


def color_settings(base: Config) -> list[Setting]:
    fields = {x: dict(color_strength=s, blur_p=0.0) for x, s in STRENGTHS.items()}
    fields["1 + blur"] = dict(color_strength=1.0, blur_p=0.5)
    return [
        Setting(
            f"{series}-s{f['color_strength']:g}{'-blur' * (f['blur_p'] > 0)}", f, measure, series, x
        )
        for series, measure in (("SimCLR", "representation"), ("supervised", "supervised"))
        for x, f in fields.items()
    ]


def size_settings(base: Config) -> list[Setting]:
    """The base's depth and the next two, its width and what is half and twice as wide."""
    known = list(simclr.ARCHITECTURES)
    first = min(known.index(base.arch), len(known) - 3)
    archs, widths = known[first : first + 3], [base.width * factor for factor in (0.5, 1, 2)]
    ends = {(archs[0], widths[0]): "-smallest", (archs[-1], widths[-1]): "-largest"}
    return [
        Setting(
            f"{series}-{arch}-x{width:g}{ends.get((arch, width), '')}",
            dict(arch=arch, width=width), measure, f"{series}, {arch}", PARAMETERS,
            title=f"{series}, {arch}, width {width:g}",
        )
        for arch in archs
        for series, measure in (("SimCLR", "representation"), ("supervised", "supervised"))
        for width in widths
    ]  # fmt: skip


PARAMETERS = "parameters"  # x is what was measured of them


HEAD_WIDTHS = (32, 128, 512, 2048)


def projection_settings(base: Config) -> list[Setting]:
    """No head has no width of its own: z is h."""
    heads = [
        Setting(f"{kind}-{dim}", dict(projection=kind, head_dim=dim), series=f"{kind} head", x=dim)
        for kind in ("nonlinear", "linear")
        for dim in HEAD_WIDTHS
    ]
    return [*heads, Setting("none", dict(projection="none"), series="no head", x=feature_dim(base))]


def feature_dim(base: Config) -> int:
    return simclr.Encoder(base.arch, base.width).feature_dim


def information_settings(base: Config) -> list[Setting]:
    """g(h) as wide as h, as in Table 3. Images without colour are spared the first row."""
    names = {
        COLOR: "colour or grey", "rotation": "rotation", "noise": "original or noisy",
        "sobel": "original or Sobel",
    }  # fmt: skip
    return [
        Setting(
            name, dict(transformation=name, extra="" if name == COLOR else name,
                       head_dim=feature_dim(base)), "probe", x=text,
        )
        for name, text in names.items()
        if name != COLOR or base.gray_p > 0
    ]  # fmt: skip


def loss_settings(base: Config) -> list[Setting]:
    """Each loss with a search over tau or margin and the rate, as in Appendix B.10."""
    margins, temperatures = ("margin", (0.4, 0.8, 1.6)), ("temperature", (0.1, 0.2, 0.5))
    names = {
        "margin": ("Margin", margins),
        "nt-logistic": ("NT-Logistic", temperatures),
        "margin-semi-hard": ("Margin (semi-hard)", margins),
        "nt-logistic-semi-hard": ("NT-Logistic (semi-hard)", temperatures),
        "nt-xent": ("NT-Xent", temperatures),
    }
    return [
        Setting(
            f"{loss}-{key}{value:g}-lr{lr:g}", {"loss_function": loss, key: value, "lr": lr},
            group=title, title=f"{title}: {'m' if key == 'margin' else 'τ'} {value:g}, lr {lr:g}",
        )
        for loss, (title, (key, values)) in names.items()
        for value in values
        for lr in rates(base, (0.25, 1))
    ]  # fmt: skip


def rates(base: Config, factors: Sequence[float]) -> list[float]:
    """Learning rates around the base's."""
    return [float(f"{factor * base.lr:.3g}") for factor in factors]


def temperature_settings(base: Config) -> list[Setting]:
    normalised = [
        Setting(f"l2-tau{tau:g}", dict(temperature=tau), series="ℓ2, τ =", x=f"{tau:g}")
        for tau in (0.05, 0.1, 0.5, 1.0)
    ]
    plain = [
        Setting(
            f"dot-tau{tau:g}", dict(temperature=tau, loss_function="nt-xent-dot"),
            series="no ℓ2, τ =", x=f"{tau:g}",
        )
        for tau in (10.0, 100.0)
    ]  # fmt: skip
    return normalised + plain


BATCHES = {"digits": (64, 128, 256, 512)}  # others: the paper's first four


def batch_settings(base: Config) -> list[Setting]:
    """Batch x epochs x how the rate grows with the batch; the two meet at the base's batch."""
    peak, n = simclr.peak_learning_rate(base, base.batch_size), base.batch_size
    scalings = {"linear": peak * 256 / n, "sqrt": peak / math.sqrt(n)}
    lengths = {"half": max(1, base.epochs // 2), "whole": base.epochs, "double": 2 * base.epochs}
    batches = BATCHES.get(base.dataset, (256, 512, 1024, 2048))
    ends = {batches[0]: "-smallest", batches[-1]: "-largest"}
    return [
        Setting(
            f"{scaling}-{length}-n{batch}{ends.get(batch, '')}",
            dict(lr_scaling=scaling, lr=lr, epochs=epochs, batch_size=batch),
            series=f"{epochs} epochs, {'linear' if scaling == 'linear' else '√N'}", x=batch,
        )
        for length, epochs in lengths.items()
        for scaling, lr in scalings.items()
        for batch in batches
    ]  # fmt: skip


def optimizer_settings(base: Config) -> list[Setting]:
    """Each with a search over its rate, none scaled with the batch."""
    searched = {
        "LARS": dict(optimizer="lars", weight_decay=1e-6, lr=(0.3, 1.0, 3.0)),
        "SGD": dict(optimizer="sgd", weight_decay=5e-4, lr=(0.03, 0.1, 0.3)),
        "AdamW": dict(optimizer="adamw", weight_decay=1e-4, lr=(1e-3, 2e-3, 4e-3)),
    }
    return [
        Setting(
            f"{name}-lr{lr:g}",
            {**fields, "lr_scaling": "none", "lr": lr},
            group=name,
            title=f"{name}, lr {lr:g}",
        )
        for name, fields in searched.items()
        for lr in fields["lr"]
    ]


def label_settings(base: Config) -> list[Setting]:
    return [
        Setting(
            f"{start}-{100 * share:g}%", dict(start=start, share=share), "fine_tuned", title,
            100 * share,
        )
        for start, title in (("simclr", "from SimCLR"), ("scratch", "from scratch"))
        for share in (0.01, 0.1, 1.0)
    ]  # fmt: skip


def pass_settings(base: Config) -> list[Setting]:
    return [
        Setting("one-pass", dict(passes=1), title="both views in one pass"),
        Setting("two-passes", dict(passes=2), title="a pass for each view"),
    ]


STUDIES: dict[str, Study] = {
    "augmentation": Study(
        "Which two transformations make the task?", "Figure 5",
        augmentation_settings, draw="matrix", fixed=("rotation", "blur_p"),
        claims=(
            Claim("crop and colour beat the average of all",
                  ("crop+color", "linear"), ("*", "linear")),
            Claim("crop and colour beat crop alone",
                  ("crop+color", "linear"), ("crop-alone", "linear")),
            Claim("pairs beat singles", ("*+*", "linear"), ("*-alone", "linear")),
        ),
    ),
    "color-strength": Study(
        "Does stronger colour distortion help SimCLR more than supervised learning?", "Table 1",
        color_settings, metrics=("linear",), draw="lines", axis="strength s of colour distortion",
        paper={
            "SimCLR": {"⅛": 59.6, "¼": 61.0, "½": 62.6, "1": 63.2, "1 + blur": 64.5},
            "supervised": {"⅛": 77.0, "¼": 76.7, "½": 76.5, "1": 75.7, "1 + blur": 75.4},
        },
        claims=(
            Claim("SimCLR is better with s = 1 than with ⅛",
                  ("SimCLR-s1", "linear"), ("SimCLR-s0.125", "linear"), "3.6"),
            Claim("blur helps SimCLR",
                  ("SimCLR-s1-blur", "linear"), ("SimCLR-s1", "linear"), "1.3"),
            Claim("supervised learning is better with s = ⅛ than with 1",
                  ("supervised-s0.125", "linear"), ("supervised-s1", "linear"), "1.3"),
        ),
    ),
    "depth-width": Study(
        "Do depth and width help SimCLR more than supervised learning?", "Figure 7",
        size_settings, metrics=("linear", "parameters"), draw="lines", around=("arch", "width"),
        axis="parameters of the encoder",
        claims=(
            Claim("SimCLR gains from the smallest to the largest network",
                  ("SimCLR-*-largest", "linear"), ("SimCLR-*-smallest", "linear")),
            Claim("supervised learning does (the paper: less)",
                  ("supervised-*-largest", "linear"), ("supervised-*-smallest", "linear")),
        ),
    ),
    "projection": Study(
        "Is a nonlinear head needed, how wide, and is h better than z?", "Figure 8",
        projection_settings, metrics=("linear", "linear_z", "knn", "knn_z"), draw="lines",
        axis="width of z",
        claims=(
            Claim("a nonlinear head beats a linear one",
                  ("nonlinear-*", "linear"), ("linear-*", "linear"), "3 points"),
            Claim("a nonlinear head beats none",
                  ("nonlinear-*", "linear"), ("none", "linear"), "more than 10"),
            Claim("h beats z",
                  ("nonlinear-*", "linear"), ("nonlinear-*", "linear_z"), "more than 10"),
        ),
    ),
    "information": Study(
        "What does the head throw away?", "Table 3", information_settings, draw="together",
        metrics=("probe_h", "probe_z", "chance"),
        paper={
            "probe_h": {COLOR: 99.3, "rotation": 67.6, "noise": 99.5, "sobel": 96.6},
            "probe_z": {COLOR: 97.4, "rotation": 25.6, "noise": 59.6, "sobel": 56.3},
            "chance": {COLOR: 80, "rotation": 25, "noise": 50, "sobel": 50},
        },
        claims=tuple(
            Claim(f"h tells {text} better than g(h)", (name, "probe_h"), (name, "probe_z"), by)
            for name, text, by in (
                ("rotation", "the rotation", "42.0"), ("noise", "noise", "39.9"),
                ("sobel", "Sobel", "40.3"),
            )
        ),
    ),
    "loss": Study(
        "Is NT-Xent better than other contrastive losses?", "Table 4, Appendix B.10",
        loss_settings, metrics=("linear", "knn", "selection"), around=("lr",),
        paper={
            "linear": {
                "Margin": 50.9, "NT-Logistic": 51.6, "Margin (semi-hard)": 57.5,
                "NT-Logistic (semi-hard)": 57.9, "NT-Xent": 63.9,
            }
        },
    ),
    "temperature": Study(
        "Do normalisation and temperature of NT-Xent matter?", "Table 5",
        temperature_settings, metrics=("linear", "knn", "entropy", "contrastive_accuracy"),
        paper={
            metric: dict(zip(
                ("l2-tau0.05", "l2-tau0.1", "l2-tau0.5", "l2-tau1", "dot-tau10", "dot-tau100"),
                values, strict=True,
            ))
            for metric, values in (
                ("linear", (59.7, 64.4, 60.7, 58.0, 57.2, 57.0)),
                ("entropy", (1.0, 4.5, 8.2, 8.3, 0.5, 0.5)),
                ("contrastive_accuracy", (90.5, 87.8, 68.2, 59.1, 91.7, 92.1)),
            )
        },
    ),
    "batch-size": Study(
        "Do larger batches and longer training help?", "Figure 9, Table B.1",
        batch_settings, metrics=("linear",), draw="lines", axis="batch size N (images)",
        around=("epochs", "lr"),
        paper={
            f"{epochs} epochs, {how}": dict(zip((256, 1024, 4096), values, strict=True))
            for epochs, how, values in (
                (100, "linear", (57.5, 62.8, 64.6)), (100, "√N", (62.8, 64.3, 64.5)),
                (200, "linear", (61.9, 65.3, 66.5)), (200, "√N", (64.3, 66.1, 66.8)),
                (400, "linear", (64.7, 67.2, 68.2)), (400, "√N", (65.7, 67.2, 68.0)),
                (800, "linear", (66.6, 68.5, 68.9)), (800, "√N", (66.5, 68.3, 69.1)),
            )
        },
        claims=(
            Claim("the largest batch beats the smallest", ("linear-whole-*-largest", "linear"),
                  ("linear-whole-*-smallest", "linear"), "7.1 at 100 epochs"),
            Claim("twice the epochs are better", ("linear-double-*", "linear"),
                  ("linear-whole-*", "linear"), "1.3 to 4.4"),
            Claim("with the smallest batch √N beats linear scaling",
                  ("sqrt-whole-*-smallest", "linear"), ("linear-whole-*-smallest", "linear"),
                  "5.3 at 100 epochs"),
        ),
    ),
    "optimizer": Study(
        "Which optimiser?", "not in the paper, which uses LARS",
        optimizer_settings, metrics=("linear", "knn", "selection"),
    ),
    "initialisation": Study(
        "What is pre-training worth when few labels are known?", "Table 7, Appendix B.5",
        label_settings, metrics=("accuracy",), draw="lines", axis="labels, % of each class",
        claims=tuple(
            Claim(f"with {share} % of the labels SimCLR beats scratch",
                  (f"simclr-{share}%", "accuracy"), (f"scratch-{share}%", "accuracy"))
            for share in (1, 10, 100)
        ),
    ),
    "encoder-pass": Study(
        "Must both views share a BatchNorm pass?", "not in the paper", pass_settings,
    ),
}  # fmt: skip

SHORT = {"digits": 30}  # epochs of a run, unless told; others: 100, the paper's for most ablations
DEFAULT_EPOCHS = 100


def make_base(given: dict[str, Any]) -> Config:
    """What the studies vary: the recipe for the data set, shortened, with the flags on top."""
    return simclr.make_config(**base_fields(given))


def base_fields(given: dict[str, Any]) -> dict[str, Any]:
    epochs = SHORT.get(given.get("dataset", Config.dataset), DEFAULT_EPOCHS)
    return {"epochs": epochs, "knn_every": 0, "save_every": 10, **given}


def make_jobs(name: str, given: dict[str, Any], seeds: int) -> list[Job]:
    """All runs of a study, the seeds outermost so that each of them is whole early.

    Raises InputError if a flag is one that the study varies, or a setting is not possible.
    """
    study, base = STUDIES[name], make_base(given)
    settings = study.settings(base)
    varied = ({key for s in settings for key in s.fields} | set(study.fixed)) - set(study.around)
    for key in sorted(varied & set(given)):
        raise InputError(f"the study {name} sets {flag(key)} itself: leave it out")
    folder = Path(simclr.ABLATIONS, given.get("run", ""), name)
    jobs = []
    for seed, chosen in itertools.product(range(base.seed, base.seed + seeds), settings):
        parts = split_fields(chosen.fields)
        run = str(folder / f"{chosen.name}-seed{seed}")
        config = simclr.make_config(**{**base_fields(given), **parts[0], "seed": seed, "run": run})
        jobs.append(Job(chosen, config, Variant(**parts[1]), chosen.measure, parts[2]))
    return jobs


def split_fields(fields: dict[str, Any]) -> tuple[dict, dict, dict]:
    """Those of Config, those of Variant, and arguments of the measurement."""
    parts: tuple[dict, dict, dict] = ({}, {}, {})
    of_config, of_variant = ({f.name for f in dataclasses.fields(c)} for c in (Config, Variant))
    for key, value in fields.items():
        parts[0 if key in of_config else 1 if key in of_variant else 2][key] = value
    return parts


# ---------------------------------------------------------------------- results and their reading


@dataclass
class Results:
    """The rows of a study's CSV: of each run its setting's name, seed and what was measured."""

    settings: list[Setting]  # those shown, in order
    rows: list[dict[str, Any]]

    def values(self, name: str, metric: str) -> dict[int, float]:
        """Seed -> value, in the metric's unit. name: a pattern; of many settings the mean."""
        found: dict[int, list[float]] = {}
        known = [s.name for s in self.settings if fnmatch.fnmatchcase(s.name, name)]
        for row in self.rows:
            if row["setting"] in known and isinstance(row.get(metric), float | int):
                found.setdefault(row["seed"], []).append(row[metric] * METRICS[metric][2])
        return {seed: statistics.fmean(values) for seed, values in sorted(found.items())}

    def mean(self, name: str, metric: str) -> float:
        """NaN if it was not measured."""
        values = self.values(name, metric).values()
        return statistics.fmean(values) if values else math.nan

    def spread(self, name: str, metric: str) -> float:
        """Standard deviation over the seeds; 0 where there is one."""
        values = list(self.values(name, metric).values())
        return statistics.stdev(values) if len(values) > 1 else 0.0

    @property
    def seeds(self) -> int:
        return len({row["seed"] for row in self.rows})

    def best(self) -> Results:
        """Of each group of settings that one whose mean `selection` is the largest."""
        groups: dict[str, list[Setting]] = {}
        for s in self.settings:
            groups.setdefault(s.group or s.name, []).append(s)

        def score(s: Setting) -> float:
            mean = self.mean(s.name, "selection")
            return -math.inf if math.isnan(mean) else mean

        chosen = [max(group, key=score) for group in groups.values()]
        return Results(chosen, self.rows)


def show(mean: float, spread: float, seeds: int, digits: int = 1) -> str:
    if math.isnan(mean):
        return "–"
    return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if seeds > 1 else "")


def markdown(study: Study, results: Results) -> str:
    """The table of the study, a row a setting, mean ± standard deviation over seeds."""
    heads = ["setting"]
    for metric in study.metrics:
        name, unit, _ = METRICS[metric]
        heads.append(f"{name}, {unit}" if unit else name)
        if metric in study.paper:
            heads.append("paper, ImageNet")
    lines = [heads]
    for s in results.settings:
        line = [s.label]
        for metric in study.metrics:
            numbers = (results.mean(s.name, metric), results.spread(s.name, metric))
            line.append(show(*numbers, len(results.values(s.name, metric))))
            if metric in study.paper:
                number = study.paper[metric].get(s.group or s.name)
                line.append("–" if number is None else f"{number:g}")
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    text.insert(1, "| " + " | ".join("-" * w for w in widths) + " |")
    return "\n".join(text)


def difference(results: Results, better: tuple[str, str], worse: tuple[str, str]) -> list[float]:
    """Of each seed that has both, better minus worse."""
    left, right = results.values(*better), results.values(*worse)
    return [left[seed] - right[seed] for seed in left if seed in right]


def against_spread(differences: Sequence[float]) -> str:
    """A difference with its spread over seeds, and whether it is more than that."""
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return f"{mean:+.1f} points (one seed)"
    spread = statistics.stdev(differences)
    verdict = "more than" if abs(mean) > spread else "within"
    return f"{mean:+.1f} ± {spread:.1f} points, {verdict} the seeds' spread"


def read_order(study: Study, results: Results) -> str:
    """Whether settings come in the paper's order, and whether ours differ at all."""
    metric = next(iter(study.paper))
    paper = {s: study.paper[metric].get(s.group or s.name) for s in results.settings}
    ours = {s: results.mean(s.name, metric) for s in results.settings}
    both = [s for s in results.settings if paper[s] is not None and not math.isnan(ours[s])]
    if len(both) < 2:
        return "Too little was measured to compare with the paper."
    pairs = [(a, b) for a, b in itertools.combinations(both, 2) if paper[a] != paper[b]]
    same = sum((ours[a] - ours[b]) * (paper[a] - paper[b]) > 0 for a, b in pairs)
    first, last = max(both, key=ours.get), min(both, key=ours.get)
    theirs = max(both, key=paper.get)
    best = f"our best is {first.label}, as in the paper"
    if first is not theirs:
        ahead = difference(results, (first.name, metric), (theirs.name, metric))
        best = f"our best is {first.label}, by {against_spread(ahead)}, "
        best += f"over {theirs.label}, the paper's"
    gap = against_spread(difference(results, (first.name, metric), (last.name, metric)))
    theirs_gap = max(paper[s] for s in both) - min(paper[s] for s in both)
    return (
        f"{same} of {len(pairs)} pairs of settings are in the paper's order by "
        f"{METRICS[metric][0]}; {best}; from best to worst it is {gap} (the paper: "
        f"{theirs_gap:.1f})."
    )


def read_claims(study: Study, results: Results) -> str:
    """Of each thing that the paper says, whether it holds here."""
    words = []
    for claim in study.claims:
        found = difference(results, claim.better, claim.worse)
        if not found:
            words.append(f"{claim.text}: not measured")
            continue
        mean = statistics.fmean(found)
        clear = len(found) > 1 and abs(mean) > statistics.stdev(found)
        verdict = (
            ("agrees" if clear else "agrees, but not clearly")
            if mean > 0
            else ("the contrary" if clear else "not seen")
        )
        by = f" (paper: {claim.by})" if claim.by else ""
        words.append(f"{claim.text}{by}: {verdict}, {against_spread(found)}")
    return "; ".join(words) + "."


def read(study: Study, results: Results) -> str:
    """One sentence: does our ordering agree with the paper's?"""
    if study.claims:
        return read_claims(study, results)
    return read_order(study, results) if study.paper else read_extremes(study, results)


def read_extremes(study: Study, results: Results) -> str:
    """The best and the worst, where the paper has nothing to compare with."""
    metric = study.metrics[0]
    known = [s for s in results.settings if not math.isnan(results.mean(s.name, metric))]
    if len(known) < 2:
        return "Too little was measured to compare."
    ordered = sorted(known, key=lambda s: results.mean(s.name, metric))
    first, last = ordered[-1], ordered[0]
    gap = against_spread(difference(results, (first.name, metric), (last.name, metric)))
    name = METRICS[metric][0]
    return f"The best by {name} is {first.label}, the worst {last.label}: {gap}."


# ------------------------------------------------------------------------------------------ figures

MARKERS = "osD^vPX*<>"


def draw_dots(study: Study, results: Results, where: str) -> Any:
    """A row a setting, a panel a metric (if the paper has numbers, those it has).

    The paper's are beside it, on a scale of their own.
    """
    from matplotlib.figure import Figure

    shown = [m for m in study.metrics if m in study.paper] or study.metrics
    panels = [(m, ours) for m in shown if m != "selection" for ours in (True, False)]
    panels = [(m, ours) for m, ours in panels if ours or m in study.paper]
    places = range(len(results.settings))
    size = (2.2 + 1.75 * len(panels), 1.5 + 0.34 * len(results.settings))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (metric, ours) in zip(axes, panels, strict=True):
        name, unit, _ = METRICS[metric]
        if ours:
            means = [results.mean(s.name, metric) for s in results.settings]
            bars = [results.spread(s.name, metric) for s in results.settings]
            axis.errorbar(means, places, xerr=bars, fmt="o", color="black", capsize=3)
        else:
            theirs = study.paper[metric]
            numbers = [theirs.get(s.group or s.name, math.nan) for s in results.settings]
            axis.plot(numbers, places, "D", color="0.45", mfc="white")
            axis.set_facecolor("0.96")
        axis.set_title(f"{name}\n{where if ours else 'the paper, ImageNet'}", fontsize=8)
        axis.set_xlabel(unit, fontsize=8)
        axis.margins(x=0.15)
        axis.tick_params(labelsize=8)
        axis.grid(color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(places, [s.label for s in results.settings])
    axes[0].set_ylim(len(results.settings) - 0.5, -0.5)
    return figure


def draw_together(study: Study, results: Results, where: str) -> Any:
    """A row a setting, all metrics in one panel; the paper's in another."""
    from matplotlib.figure import Figure

    places, names = range(len(results.settings)), [s.name for s in results.settings]
    figure = Figure(figsize=(8, 1.7 + 0.45 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, sharex=True)
    for metric, marker, color in zip(
        study.metrics, MARKERS, ("black", "black", "0.4"), strict=False
    ):
        fill = "black" if metric == study.metrics[0] else "white"
        mark = dict(marker="|", markersize=16)  # of chance
        if metric != "chance":
            mark = dict(marker=marker, mfc=fill)
        mark |= dict(color=color, linestyle="", label=METRICS[metric][0])
        means = [results.mean(name, metric) for name in names]
        bars = [results.spread(name, metric) for name in names]
        left.errorbar(means, places, xerr=bars, capsize=3, **mark)
        right.plot([study.paper[metric].get(name, math.nan) for name in names], places, **mark)
    left.set_title(where, fontsize=9)
    right.set_title("the paper, ImageNet", fontsize=9)
    right.set_facecolor("0.96")
    for axis in (left, right):
        axis.set_xlabel("test accuracy, %", fontsize=9)
        axis.grid(color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
    left.set_yticks(places, [s.label for s in results.settings])
    left.set_ylim(len(names) - 0.5, -0.5)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3,
                  fontsize=8, frameon=False)  # fmt: skip
    return figure


APART = 0.06  # between the error bars of lines that have the same x: in doublings of x


def draw_lines(study: Study, results: Results, where: str) -> Any:
    """Accuracy against x, a line a series (dashed: of z); the paper's beside it if there is one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9 if study.paper else 5.5, 4.2), layout="constrained")
    axes = figure.subplots(1, 1 + bool(study.paper), squeeze=False)[0]
    metrics = [m for m in study.metrics if m in ("linear", "linear_z", "accuracy")]
    series = list(dict.fromkeys(s.series for s in results.settings))
    places, lines = positions(results), len(series) * len(metrics)
    for i, name in enumerate(series):
        members = [s for s in results.settings if s.series == name]
        for j, metric in enumerate(metrics):
            aside = APART * (i * len(metrics) + j - (lines - 1) / 2)
            x = [
                places(s) * 2**aside if is_numeric(s.x) else places(s) + aside / 2 for s in members
            ]
            means = [results.mean(s.name, metric) for s in members]
            bars = [results.spread(s.name, metric) for s in members]
            plain = metric == metrics[0]
            label = name if len(metrics) == 1 else f"{name}, {'h' if plain else 'z'}"
            axes[0].errorbar(
                x, means, yerr=bars, capsize=2, label=label, **look(i, len(series), plain)
            )
    axes[0].set_title(where, fontsize=9)
    dress(axes[0], study, [(places(s), s.x) for s in results.settings])
    if study.paper:
        ticks = list(dict.fromkeys(x for line in study.paper.values() for x in line))
        numeric = isinstance(ticks[0], int | float)
        for i, (name, line) in enumerate(study.paper.items()):
            x = list(line) if numeric else [ticks.index(tick) for tick in line]
            axes[1].plot(x, list(line.values()), label=name, **look(i, len(study.paper), True))
        axes[1].set_title("the paper, ImageNet, ResNet-50", fontsize=9)
        axes[1].set_facecolor("0.96")
        dress(axes[1], study, [(t if numeric else i, t) for i, t in enumerate(ticks)])
    return figure


def look(i: int, count: int, plain: bool) -> dict[str, Any]:
    """Line, mark and grey of the i-th of `count` series: to be told apart without colours."""
    shade = f"{0.65 * (i // 2) / max(1, (count - 1) // 2):.2f}"
    return dict(
        color=shade, marker=MARKERS[i % len(MARKERS)], linestyle="-" if i % 2 == 0 else "--",
        mfc=shade if plain else "white", linewidth=1.4 if plain else 0.8, markersize=5,
    )  # fmt: skip


def positions(results: Results) -> Callable[[Setting], float]:
    """Where a setting lies on the x axis: at its number, or else at its place among the names."""
    names = list(dict.fromkeys(s.x for s in results.settings))

    def place(s: Setting) -> float:
        if s.x == PARAMETERS:
            return results.mean(s.name, PARAMETERS)
        return s.x if isinstance(s.x, int | float) else names.index(s.x)

    return place


def is_numeric(x: Any) -> bool:
    """Whether settings of this x lie on an axis of numbers, which is logarithmic."""
    return isinstance(x, int | float) or x == PARAMETERS


def dress(axis: Any, study: Study, ticks: Sequence[tuple[float, Any]]) -> None:
    """Axes of draw_lines(). ticks: (place, what is written there)."""
    from matplotlib.ticker import LogLocator

    shown = dict(sorted((place, text) for place, text in ticks if not math.isnan(place)))
    numeric = any(is_numeric(text) for text in shown.values())
    if numeric:
        axis.set_xscale("log")
        axis.minorticks_off()
    if PARAMETERS in shown.values():
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g} M")
    else:
        axis.set_xticks(list(shown), [f"{t:g}" if numeric else t for t in shown.values()])
    axis.set_xlabel(study.axis, fontsize=9)
    axis.set_ylabel("accuracy, % of test images", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(color="0.9")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(
        fontsize=7, frameon=False, handlelength=3, ncols=2, loc="upper center",
        bbox_to_anchor=(0.5, -0.14),
    )  # fmt: skip


def draw_matrix(study: Study, results: Results, where: str) -> Any:
    """Figure 5: the row's transformation, then the column's; the last column is the row's mean."""
    from matplotlib.figure import Figure

    names = list(TRANSFORMATIONS)
    values = [[math.nan] * len(names) for _ in names]
    for s in results.settings:
        values[names.index(s.series)][names.index(s.x)] = results.mean(s.name, study.metrics[0])
    known = [[value for value in row if not math.isnan(value)] for row in values]
    averages = [statistics.fmean(row) if row else math.nan for row in known]
    rows = [[*row, average] for row, average in zip(values, averages, strict=True)]
    figure = Figure(figsize=(6.6, 5.2), layout="constrained")
    axis = figure.subplots()
    low, high = min(itertools.chain(*known)), max(itertools.chain(*known))
    image = axis.imshow(rows, cmap="Greys", vmin=low - 0.15 * (high - low), vmax=high)
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            dark = value > (low + high) / 2
            text = "–" if math.isnan(value) else f"{value:.1f}"
            axis.text(j, i, text, ha="center", va="center", fontsize=8,
                      color="white" if dark else "black")  # fmt: skip
    axis.axvline(len(names) - 0.5, color="black", linewidth=2)
    axis.set_xticks(range(len(names) + 1), [*names, "average"], rotation=40, ha="right")
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel="second transformation (diagonal: one alone)", ylabel="first transformation")
    axis.set_title(
        f"{METRICS[study.metrics[0]][0]}, one augmented branch; {where.replace(' ± std', '')}",
        fontsize=9,
    )
    figure.colorbar(image, ax=axis, label="linear evaluation, % of test images", shrink=0.8)
    return figure


DRAWINGS: dict[str, Callable[[Study, Results, str], Any]] = {
    "dots": draw_dots,
    "together": draw_together,
    "lines": draw_lines,
    "matrix": draw_matrix,
}


def draw(name: str, results: Results, base: Config) -> bytes:
    """The figure of a study as PNG."""
    study = STUDIES[name]
    seeds = f"mean ± std of {results.seeds} seeds" if results.seeds > 1 else "1 seed"
    picture = io.BytesIO()
    figure = DRAWINGS[study.draw](study, results, f"{base.dataset}, {seeds}")
    figure.suptitle(f"{study.question}\n{study.where}", fontsize=10)
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()


# ------------------------------------------------------------------------------------- the CSV file


def describe_base(given: dict[str, Any]) -> str:
    """The flags that tell a base from the default one, seeds apart: what a CSV is of."""
    base = dataclasses.replace(make_base({**given, "run": "x"}), seed=0)
    names = [f.name for f in dataclasses.fields(base) if f.metadata["identity"]]
    names += ["data_dir"] * (base.dataset == "folder")
    shown = {"dataset": base.dataset, "recipe": base.recipe, "epochs": base.epochs}
    plain = make_base({"run": "x", **shown})
    if base.recipe == simclr.DATASET_RECIPE[base.dataset]:
        del shown["recipe"]
    shown |= {n: getattr(base, n) for n in names if getattr(base, n) != getattr(plain, n)}
    return " ".join(f"{flag(key)} {value}" for key, value in shown.items())


FIXED_COLUMNS = ("setting", "seed")
LAST_COLUMNS = ("seconds", "run", "base")


def rows_of(jobs: Iterable[Job], given: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each job that is done."""
    rows = []
    for job in jobs:
        result = job.result()
        if result is not None:
            fields = {k: "+".join(v) if isinstance(v, tuple) else v
                      for k, v in job.setting.fields.items()}  # fmt: skip
            last = {"run": job.name, "base": describe_base(given)}
            rows.append({"setting": job.setting.name, "seed": job.seed, **fields, **result, **last})
    return rows


def write_csv(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    middle = dict.fromkeys(key for row in rows for key in row)
    columns = [*FIXED_COLUMNS, *(k for k in middle if k not in FIXED_COLUMNS + LAST_COLUMNS)]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*columns, *LAST_COLUMNS], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    utils.write_atomically(file, text.getvalue().encode())


def number(text: str | None) -> Any:
    """A CSV's cell: an int or a float if it is one."""
    for kind in (int, float):
        with contextlib.suppress(ValueError, TypeError):
            return kind(text)
    return text


def read_csv(file: Path, given: dict[str, Any], settings: Sequence[Setting]) -> list[dict]:
    """The rows of an earlier CSV; none if there is no such file.

    Raises InputError if it is damaged, or of another configuration: it would be overwritten.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        rows = [{k: number(v) for k, v in row.items()} for row in csv.DictReader(lines)]
        bases = {row["base"] for row in rows}
        foreign = {row["setting"] for row in rows} - {s.name for s in settings}
        whole = bool(rows) and all(isinstance(row["seed"], int) for row in rows)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise InputError(f"{file} is not a study's results ({error!r})") from error
    if not whole:
        raise InputError(f"{file} is not a study's results; move it away")
    base = describe_base(given)
    if bases != {base} or foreign:
        what = (
            f"of {' and '.join(sorted(map(str, bases)))}"
            if bases != {base}
            else (
                f"of settings that the study does not have ({', '.join(sorted(map(str, foreign)))})"
            )
        )
        raise InputError(
            f"{file} holds results {what}, not of {base}; choose another name with {flag('run')}, "
            "or move it away"
        )
    return rows


# ----------------------------------------------------------------------------- going through a grid


def do(job: Job, data: Data, device: torch.device) -> None:
    """Train, or continue, the job's run, measure and keep the result. The caller holds its lock."""
    started = time.perf_counter()
    name = job.name
    config = simclr.resolve(dataclasses.replace(job.config, run=name), data.pretrain, device)
    with simclr.run_lock(config):  # simclr.py may continue the run as well
        utils.remove_leftovers(job.place.parent, job.place.name)
        utils.remove_leftovers(config.folder, RECORD, job.result_file.name)
        if not (config.folder / RECORD).exists():
            if (config.folder / simclr.CHECKPOINT).exists():
                raise InputError(
                    f"{config.folder} holds a run that is not an ablation's: delete it"
                )
            record = {
                "digest": job.digest,
                "config": dataclasses.asdict(job.config),
                "variant": dataclasses.asdict(job.variant),
            }
            utils.write_json(config.folder / RECORD, record)
            utils.write_atomically(job.place, name.encode())
        measured = Measured(config, job.variant, data, device)
        before = sum(row["seconds"] for row in measured.log())  # of training in earlier calls
        result = MEASURES[job.measure](measured, **job.arguments)
        seconds = before + time.perf_counter() - started
        utils.write_json(job.result_file, {**result, "seconds": round(seconds, 1)})


class Grid:
    """The jobs of a study, and this process's part in them."""

    def __init__(self, name: str, given: dict[str, Any], seeds: int) -> None:
        self.name, self.given, self.study = name, given, STUDIES[name]
        self.base = make_base(given)
        self.jobs = make_jobs(name, given, seeds)
        self.settings = self.study.settings(self.base)
        folder = Path(self.base.figures, simclr.ABLATIONS, given.get("run", ""))
        self.csv, self.png = folder / f"{name}.csv", folder / f"{name}.png"
        self.failed: dict[str, str] = {}  # run -> why

    def check(self) -> None:
        """Raise InputError if results or runs of another configuration are in the way."""
        read_csv(self.csv, self.given, self.settings)
        for job in self.jobs:
            job.result()

    def left(self) -> list[Job]:
        return [job for job in self.jobs if job.result() is None]

    def go(self, data: Data, device: torch.device, shard: tuple[int, int] = (1, 1)) -> None:
        """Do all jobs of a shard that are not done and that no other process is doing.

        A job that fails is noted, and the others are done. Raises simclr.Interrupted.
        """
        mine = self.jobs[shard[0] - 1 :: shard[1]]
        for i, job in enumerate(mine, 1):
            if job.result() is not None:
                continue
            utils.make_folders(job.place.parent)
            with utils.file_lock(job.place.with_suffix(".lock")) as free:
                if not free or job.result() is not None:  # another process has it, or had it
                    continue
                print(f"{i}/{len(mine)}  {job.config.run}", flush=True)
                try:
                    do(job, data, device)
                except (simclr.Interrupted, KeyboardInterrupt):
                    raise
                except Exception as error:  # whatever it is, the other runs can be done
                    reason = " ".join(str(error).split()) or type(error).__name__
                    self.failed[job.config.run] = reason
                    print(f"failed: {reason}", file=sys.stderr, flush=True)

    def finish(self) -> None:
        """Write the table and the figure if this process is the last, and say what was found."""
        left = [job for job in self.left() if job.config.run not in self.failed]
        if left:
            print(
                f"\n{len(left)} of {len(self.jobs)} runs of {self.name} are left to other shards "
                "or processes; the last one draws"
            )
            return
        rows = rows_of(self.jobs, self.given)
        done = {(row["setting"], row["seed"]) for row in rows}
        earlier = read_csv(self.csv, self.given, self.settings)
        rows += [row for row in earlier if (row["setting"], row["seed"]) not in done]
        if rows:
            write_csv(self.csv, rows)
            self.report(rows)

    def report(self, rows: list[dict[str, Any]]) -> None:
        """Draw the figure; print the table and its reading."""
        results = Results(list(self.settings), rows)
        if any(s.group for s in self.settings):
            results = results.best()
        utils.write_atomically(self.png, draw(self.name, results, self.base))
        print(f"\n{self.study.question} ({self.study.where}) on {self.base.dataset}\n")
        print(markdown(self.study, results))
        print(f"\n{read(self.study, results)}\n\ntable   {self.csv}\nfigure  {self.png}")

    def redraw(self) -> None:
        rows = read_csv(self.csv, self.given, self.settings)
        if not rows:
            raise InputError(f"there are no results in {self.csv} yet")
        self.report(rows)


# -------------------------------------------------------------------------------- the time it takes

TIMED_BATCH, TIMED_STEPS = 64, 2
OVERHEAD = 1.5  # seconds a run for measuring it and drawing its curves, beside what is counted


class Clock:
    """Estimates how long jobs take from a few steps on this machine."""

    def __init__(self, data: Data, device: torch.device) -> None:
        self.data, self.device = data, device
        self.speeds: dict[tuple, float] = {}  # what the time of a view depends on -> seconds

    def seconds_per_view(self, job: Job) -> float:
        config = simclr.resolve(job.config, self.data.pretrain, self.device)
        key = (config.arch, config.width, config.view_side, config.precision)
        if key not in self.speeds:
            small = dataclasses.replace(config, batch_size=TIMED_BATCH)
            run = AblationRun(small, self.data, self.device, Variant())

            def steps(count: int) -> float:
                position = simclr.Position()
                batches = itertools.islice(run.batches(), count)
                simclr.train_epoch(
                    run.model, run.optimizer, batches, run.rate, run.loss, config.precision,
                    position, lambda: False,
                )  # fmt: skip
                return position.seconds / max(1, position.step) / (2 * run.batch_size)

            steps(1)  # the first is slower
            self.speeds[key] = steps(TIMED_STEPS)
        return self.speeds[key]

    def seconds(self, jobs: Iterable[Job]) -> float:
        """Of what is not done yet, in one process. A pre-training that is shared counts once."""
        total, trained, measured = 0.0, set(), set()
        for job in jobs:
            key = (job.digest, job.measure, *job.arguments.values())
            if key in measured or job.result() is not None:
                continue
            measured.add(key)
            size, steps = simclr.batch_count(job.config, len(self.data.pretrain))
            views = 0.5 * size * steps * job.config.epochs  # a labelled view a step: a forward less
            if job.measure != "supervised" and job.arguments.get("start") != "scratch":
                views = 0 if job.digest in trained else 2 * size * steps * job.config.epochs
                trained.add(job.digest)
            if job.measure == "fine_tuned":
                share = job.arguments["share"]
                n = max(1, round(share * len(self.data.train)))
                how = LabelTraining()
                views += how.steps(n) * how.batch(n) * 0.7
            total += OVERHEAD + views * self.seconds_per_view(job)
        return total


def duration(seconds: float) -> str:
    """For people: "40 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# -------------------------------------------------------------------------------- the command line


@dataclass
class Options:
    """What the command line has beside the study and the base."""

    seeds: int = setting(3, "runs of each setting, with seeds from --seed on")
    shard: str = setting("", "i/n: do every n-th run, beginning with the i-th")
    dry_run: bool = setting(False, "list the runs and do none")
    redraw: bool = setting(False, "draw again from the CSV, without training")


def parse_shard(text: str) -> tuple[int, int]:
    """ "2/4" -> (2, 4)."""
    first, _, second = text.partition("/")
    if not (first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second)):
        raise InputError(f"--shard must be i/n with i from 1 to n, such as 1/4, got {text}")
    return int(first), int(second)


def shard_of(options: Options) -> tuple[int, int]:
    """Which of how many shards this process does: the one asked for, or torchrun's."""
    place = utils.rank_info()
    if place.size > 1 and options.shard:
        raise InputError("--shard: torchrun makes a shard of each process by itself")
    return parse_shard(options.shard or f"{place.rank + 1}/{place.size}")


def parse_command_line(
    argv: Sequence[str] | None = None,
) -> tuple[list[str], Options, dict[str, Any]]:
    """The studies (none: list them), the options, and the flags that were given of the base."""
    parser = utils.OneLineParser(
        prog="ablation_SimCLR.py",
        usage="python ablation_SimCLR.py [STUDY|all] [--seeds N] [--shard i/n] [--flag value ...]",
        description=__doc__,
    )
    parser.add_argument("study", nargs="?", default="", help=f"all, or: {', '.join(STUDIES)}")
    utils.add_flags(parser, Options, {"seeds": "the grid"})
    utils.add_flags(parser, Config, simclr.FIELD_GROUPS)
    given = vars(parser.parse_args(argv))
    study = given.pop("study")
    names = [f.name for f in dataclasses.fields(Options)]
    options = Options(**{name: given.pop(name) for name in names if name in given})
    if options.seeds < 1:
        raise InputError(f"--seeds must be at least 1, got {options.seeds}")
    shard_of(options)
    if study and study != "all" and study not in STUDIES:
        raise InputError(f"unknown study {study!r}; there are {', '.join(STUDIES)}, and all")
    if options.redraw and not study:
        raise InputError("--redraw goes with a study or all")
    return list(STUDIES) if study == "all" else [study] * bool(study), options, given


def list_studies(given: dict[str, Any], seeds: int) -> None:
    """What each study answers, its runs, and the time that is left of them."""
    base = make_base(given)
    device = utils.choose_device(base.device)
    data = simclr.load_data(base, device)
    clock, every = Clock(data, device), []
    print(f"on {describe_base(given)}, {seeds} seed{'s' * (seeds != 1)}, {device}:\n")
    for name, study in STUDIES.items():
        try:
            jobs = make_jobs(name, given, seeds)
            to_do = any(job.result() is None for job in jobs)
        except InputError as error:  # a flag, or a run that is in the way: of this study alone
            print(f"{name:16}{'–':>4} runs {'–':>8}  {error}")
            continue
        every += jobs
        left = duration(clock.seconds(jobs)) if to_do else "done"
        print(f"{name:16}{len(jobs):4} runs {left:>8}  {study.question}")
    text = duration(clock.seconds(every))
    print(
        f"\n{'all':16}{len(every):4} runs {text:>8}  (estimated from a few steps on this machine)"
    )
    script = utils.from_here(__file__)
    print(f"\nrun one:  {utils.python_command(script, next(iter(STUDIES)))}")


def list_runs(grid_: Grid) -> None:
    """What --dry-run prints."""
    print(f"{grid_.name}: {grid_.study.question} ({grid_.study.where})")
    for job in grid_.jobs:
        state = "to do" if job.result() is None else "done"
        if job.name != job.config.run:
            state += f", shared with {job.name}"
        fields = " ".join(
            f"{k}={'+'.join(v) if isinstance(v, tuple) else v}"
            for k, v in job.setting.fields.items()
        )
        print(f"  {job.config.run}  {fields}  ({state})")


def run(names: Sequence[str], options: Options, given: dict[str, Any]) -> bool:
    """What `python ablation_SimCLR.py` does. Returns whether no run failed."""
    if utils.rank_info().rank and (not names or options.redraw or options.dry_run):
        return True  # once is enough
    if not names:
        list_studies(given, options.seeds)
        return True
    grids = [Grid(name, given, options.seeds) for name in names]
    if options.redraw:
        for each in grids:
            if len(grids) == 1 or each.csv.exists():
                each.redraw()
        return True
    for each in grids:
        each.check()  # before anything is done
        if options.dry_run:
            list_runs(each)
    if options.dry_run:
        return True
    base = grids[0].base
    device = utils.choose_device(base.device)
    data = simclr.load_data(base, device)
    if not data.labelled:
        raise InputError(f"{base.dataset} in {base.data_dir} has no labels to measure by")
    utils.cache_pixels(data.pretrain, base.cache)
    data = simclr.only_readable(data, base)
    utils.make_folders(grids[0].csv.parent, base.folder.parent)
    print(f"{describe_base(given)}: {simclr.describe_data(data)}; on {device}", flush=True)
    for each in grids:
        each.go(data, device, shard_of(options))
        each.finish()
    failed = {run: why for each in grids for run, why in each.failed.items()}
    if failed:
        print(f"\n{len(failed)} runs failed; the same command tries them again", file=sys.stderr)
        for name, why in failed.items():
            print(f"  {name}: {why}", file=sys.stderr)
    return not failed


@utils.command("ablation_SimCLR.py")
def main(argv: Sequence[str] | None = None) -> None:
    try:
        with utils.InterruptedBySignals():
            fine = run(*parse_command_line(argv))
            utils.wait_for_others()
            if not fine:
                raise SystemExit(1)
    except simclr.Interrupted as stop:
        print("\nstopped and saved; the same command continues", file=sys.stderr)
        raise SystemExit(128 + stop.signal) from None


if __name__ == "__main__":
    main()
