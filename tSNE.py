"""See a representation: the test images by t-SNE, as a figure and as a page to explore.

    python tSNE.py                             # the newest run
    python tSNE.py cifar10_resnet18            # a run by its name, its folder or its checkpoint
    python tSNE.py RUN --format pdf            # for a paper; also --panels, --perplexity, --seed
    python tSNE.py RUN --thumbnails            # the images themselves, on a grid
    python tSNE.py RUN --epochs                # through training, of simclr.py --keep-every K

draws, in figures/<run>/,

    tsne.png             the same images as raw pixels, by the untrained encoder, as h and as z
    tsne.html            one file to open in a browser: zoom, point at images, pin neighbours
    neighbours.png       images and their nearest training images in h, where it works and where not
    tsne_thumbnails.png  with --thumbnails
    tsne_epochs.png      with --epochs

Each representation goes through PCA to 50 dimensions and then t-SNE with the cosine metric,
started from the first two principal components, so that a picture follows from checkpoint, data,
perplexity and seed. t-SNE may turn and mirror its result at will: all panels are turned to fit
that of h as well as they can. Two dimensions cannot show everything, and t-SNE shows clusters
where there are few: the kNN accuracy in a title is that of the representation itself.

What took long is kept in checkpoints/<run>/tsne/, so that drawing again is quick.

Reading order: options · colours · representations · embedding in the plane · figures · the page ·
the command line · the page's template.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import simclr
import utils
from utils import Images, InputError, flag, setting

# --------------------------------------------------------------------------------------- options


@dataclass
class Options:
    """The command line."""

    panels: tuple[str, ...] = setting(
        tuple(simclr.REPRESENTATIONS), "what to draw, in this order", tuple(simclr.REPRESENTATIONS)
    )
    images: int = setting(10_000, "draw at most so many of the test images, chosen at random")
    method: str = setting("tsne", "pca is quick, and shows less", ("tsne", "pca"))
    perplexity: float = setting(30.0, "of t-SNE: about how many neighbours an image has")
    seed: int = setting(0, "of t-SNE and of all random choices")
    format: str = setting("png", "of the figures", ("png", "pdf", "svg"))
    thumbnails: bool = setting(False, "also draw the images themselves, on a grid")
    epochs: bool = setting(False, "also draw h through training, of the checkpoints kept")
    data_dir: str = setting("", "where the images are, if not where the run had them")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    checkpoints: str = setting("checkpoints", "folder of all runs' checkpoints")
    figures: str = setting("figures", "folder of all runs' figures")


def check_options(options: Options) -> None:
    """Raise InputError for the first option that is out of range."""
    for name, lowest in (("images", 2), ("seed", 0)):
        value = getattr(options, name)
        if value < lowest:
            raise InputError(f"{flag(name)} must be {lowest} or more, got {value}")
    if not 1 <= options.perplexity < math.inf:
        raise InputError(f"--perplexity must be 1 or more, got {options.perplexity}")


def check_perplexity(options: Options, images: int) -> None:
    """t-SNE looks at 3 · perplexity neighbours, so there must be as many other images."""
    most = (images - 1) / 3
    if options.method == "tsne" and options.perplexity > most:
        way = f"--perplexity {math.floor(most)} at most, or " if most >= 1 else ""
        raise InputError(
            f"{images} images are too few for a perplexity of {options.perplexity:g}: it needs "
            f"three times as many neighbours; use {way}--method pca"
        )


# --------------------------------------------------------------------------------------- colours

# Petroff 2021 (arXiv 2107.02270): ten colours that people with colour-vision deficiency can tell
# apart; matplotlib has them as petroff10.
TEN_COLOURS = (
    "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6",
    "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd",
)  # fmt: skip
MARKERS = "os^DX"  # matplotlib's; the page draws the same, in this order
UNLABELLED = "#3f90da"
RIGHT, WRONG = "#0072b2", "#d55e00"  # Okabe and Ito's blue and vermillion


def class_styles(classes: int) -> list[tuple[str, int]]:
    """A colour "#rrggbb" and the number of a marker for each class, different for any two.

    Up to ten classes differ by colour. Of more, every five in a row share a hue and differ by
    marker; hues are evenly spaced in OKLCH, in two lightnesses by turns.
    """
    if classes <= len(TEN_COLOURS):
        return [(colour, 0) for colour in TEN_COLOURS[:classes]]
    hues = math.ceil(classes / len(MARKERS))
    colours = [oklch(0.52 if i % 2 else 0.70, 0.15, i / hues) for i in range(hues)]
    return [(colours[c // len(MARKERS)], c % len(MARKERS)) for c in range(classes)]


def oklch(lightness: float, chroma: float, turns: float) -> str:
    """A colour of the perceptual space OKLCH (Ottosson 2020) as "#rrggbb", clipped to sRGB."""
    a, b = chroma * math.cos(2 * math.pi * turns), chroma * math.sin(2 * math.pi * turns)
    to_lms = np.array([[0.3963377774, 0.2158037573], [-0.1055613458, -0.0638541728],
                       [-0.0894841775, -1.2914855480]])  # fmt: skip
    to_rgb = np.array([[4.0767416621, -3.3077115913, 0.2309699292],
                       [-1.2684380046, 2.6097574011, -0.3413193965],
                       [-0.0041960863, -0.7034186147, 1.7076147010]])  # fmt: skip
    linear = (to_rgb @ (lightness + to_lms @ (a, b)) ** 3).clip(0, 1)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return "#{:02x}{:02x}{:02x}".format(*(255 * srgb).round().astype(int))


def rgb(colour: str) -> Tensor:
    """ "#rrggbb" -> uint8 (3,)."""
    return torch.tensor(list(bytes.fromhex(colour[1:])), dtype=torch.uint8)


# ------------------------------------------------------------------------------- representations

COMPONENTS = 50  # what PCA leaves for t-SNE
PAGE_NEIGHBOURS = 10  # of the drawn images, on the page
TRAIN_NEIGHBOURS = 8  # of the training images, in the figure


@dataclass
class Scene:
    """The images that are drawn, and those that they are compared with.

    shown: N images. rows: int64 (N,), their numbers in the split. split: "test", or "training"
    where there are no test images. train: the training images.
    """

    shown: Images
    rows: Tensor
    split: str
    train: Images
    name: str  # of the data set

    @property
    def labels(self) -> np.ndarray | None:
        """int64 (N,), or None."""
        return None if self.shown.labels is None else self.shown.labels.cpu().numpy()

    @property
    def data(self) -> simclr.Data:
        return simclr.Data(self.train, self.train, self.shown)

    @property
    def judged(self) -> bool:
        """Whether a kNN accuracy can be measured: labels, and images that were held out."""
        return self.split == "test" and self.data.labelled

    def describe(self) -> str:
        labelled = "" if self.labels is not None else "unlabelled "
        return f"{len(self.rows):,} {labelled}{self.split} images of {self.name}"


def read_scene(config: simclr.Config, options: Options, device: torch.device) -> Scene:
    """The run's test images, or its training images if it has no others, at most --images.

    Without those that cannot be read, of which there may be as many as in training.
    """
    found = utils.load_splits(config.dataset, ("train", "test"), config.data_dir)
    workers = utils.worker_count(config.workers)
    train, images = (
        utils.only_readable(simclr.tolerant(x, config), workers).to(device) for x in found
    )
    split = "test"
    if not len(images):
        images, split = train, "training"
    if len(images) < 2:
        raise InputError(f"need at least 2 images to draw, got {len(images)}")
    random = utils.generator("cpu", options.seed)
    rows = torch.randperm(len(images), generator=random)[: options.images].sort().values
    name = config.dataset
    if name == "folder":
        name = Path(config.data_dir).resolve().name
    return Scene(utils.subset(images, rows), rows, split, train, name)


class Cache:
    """Arrays that took long to compute, in files named by what they follow from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file(self, name: str, key: str) -> Path:
        return self.folder / f"{name}-{key[:16]}.npz"

    def read(self, name: str, key: str) -> dict[str, np.ndarray] | None:
        """What was written under (name, key), or None; a damaged file counts as none."""
        try:
            with np.load(self.file(name, key), allow_pickle=False) as file:
                return dict(file)
        except Exception:  # zipfile, zlib, numpy and the system raise many types for a bad file
            return None

    def write(self, name: str, key: str, arrays: dict[str, np.ndarray]) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        utils.write_atomically(self.file(name, key), buffer.getbuffer())


def digest(*parts: Any) -> str:
    """A name for whatever follows from `parts`: bytes, arrays, or plain values."""
    hashed = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            part = np.ascontiguousarray(part)  # noqa: PLW2901
            hashed.update(repr((part.dtype.str, part.shape)).encode())
        content = part if isinstance(part, bytes | np.ndarray) else repr(part).encode()
        hashed.update(content)
        hashed.update(b"\0")
    return hashed.hexdigest()


def scene_digest(scene: Scene) -> str:
    """Changes when other images are drawn or compared with (files: when their names change)."""
    parts: list[Any] = [scene.rows.numpy(), scene.split]
    for images in (scene.shown, scene.train):
        held = isinstance(images, utils.ImageSet)
        parts.append(images.images.cpu().numpy() if held else images.paths)
        parts.append(None if images.labels is None else images.labels.cpu().numpy())
    return digest(*parts)


def study(
    encoder: Callable[[Tensor], Tensor],
    scene: Scene,
    config: simclr.Config,
    device: torch.device,
    neighbours: bool = False,
) -> dict[str, np.ndarray]:
    """What is drawn of one representation.

    encoder: float (B, 3, S, S) in [0, 1] -> (B, D). Returns components float32 (N, ≤ 50), knn
    float (), which is NaN where it cannot be measured, and with `neighbours` near and train_near,
    int64 (N, k), and their cosine similarities, float32 (N, k): the most similar drawn and
    training images, never the image itself.
    """
    shown = simclr.features(encoder, scene.shown, config, device)  # (N, D)
    found = {"components": principal_components(shown.cpu().numpy())}
    found["knn"] = np.array(math.nan)
    held_out = scene.split == "test"
    if scene.judged or (neighbours and held_out):
        train = simclr.features(encoder, scene.train, config, device)
        k = max(simclr.KNN_NEIGHBOURS, TRAIN_NEIGHBOURS)
        similarity, rows = utils.nearest_neighbours(train, shown, k)
    if scene.judged:
        votes = scene.train.labels[rows[:, : simclr.KNN_NEIGHBOURS]]
        winner = utils.knn_vote(similarity, votes, len(scene.train.classes))
        found["knn"] = np.array(utils.accuracy(winner, scene.shown.labels))
    if neighbours:
        near = other_neighbours(shown, PAGE_NEIGHBOURS)
        found["similarity"], found["near"] = (x.cpu().numpy() for x in near)
        if not held_out:  # the training images are the ones drawn, all or some of them
            similarity, rows = near[0], scene.rows.to(device)[near[1]]
        for key, value in (("train_similarity", similarity), ("train_near", rows)):
            found[key] = value[:, :TRAIN_NEIGHBOURS].cpu().numpy()
    return found


def other_neighbours(features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """utils.nearest_neighbours() among the rows (N, D) themselves, without each row itself."""
    similarity, rows = utils.nearest_neighbours(features, features, k + 1)
    own = rows == torch.arange(len(rows), device=rows.device)[:, None]
    own[~own.any(1), -1] = True  # of many equal images an image itself may not be among the first
    others = (len(rows), rows.shape[1] - 1)
    return similarity[~own].view(others), rows[~own].view(others)


# ------------------------------------------------------------------------ embedding in the plane

# of Barnes-Hut, scikit-learn's is 0.5: on 10,000 CIFAR-10 images 0.7 takes 60 % of the time and
# gives the same KL divergence (2.613 and 2.616 after 500 steps)
ANGLE = 0.7
TINY_SPREAD = 1e-4  # standard deviation of the start, as in scikit-learn's init="pca"


@dataclass
class Panel:
    """One picture of the images: xy float32 (N, 2); knn in [0, 1] or None."""

    name: str
    title: str
    xy: np.ndarray
    knn: float | None

    @property
    def note(self) -> str:
        return "" if self.knn is None else f"kNN {100 * self.knn:.1f} %"


def principal_components(features: np.ndarray) -> np.ndarray:
    """The features (N, D) along their first 50 principal axes: float32 (N, min(50, N, D)).

    There are always two columns, of zeros if need be.
    """
    from sklearn.decomposition import PCA  # late: a second that not every import needs

    with np.errstate(invalid="ignore"):  # shares of a variance of 0, which are not used
        pca = PCA(min(COMPONENTS, *features.shape), random_state=0)
        components = pca.fit_transform(features).astype(np.float32)
    return np.pad(components, ((0, 0), (0, max(0, 2 - components.shape[1]))))


def tsne(
    components: np.ndarray, perplexity: float, seed: int, start: np.ndarray | None = None
) -> np.ndarray:
    """scikit-learn's t-SNE with the cosine metric: (N, D) -> float32 (N, 2).

    start: (N, 2), an arrangement to begin with, which is largely kept; without it, the first two
    components, tiny. On one thread: several of them wait for each other at each of thousands of
    steps, and where other programs take their turns on the cores that makes it ten times slower.
    Panels run beside each other instead.
    """
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    if start is None:
        start = components[:, :2] / components[:, 0].std() * TINY_SPREAD
    start = start.astype(np.float32)
    model = TSNE(
        perplexity=perplexity, metric="cosine", init=start, random_state=seed, angle=ANGLE, n_jobs=1
    )
    with threadpool_limits(1, user_api="openmp"):  # of this thread alone
        return model.fit_transform(components)


def in_parallel(jobs: dict[str, Callable[[], np.ndarray]], what: str) -> dict[str, np.ndarray]:
    """The results of jobs that release Python's lock, one to a core, with the progress shown."""
    started = time.perf_counter()
    pool = ThreadPoolExecutor(utils.cpu_cores())
    futures = {name: pool.submit(job) for name, job in jobs.items()}
    left = set(futures.values())
    try:
        with utils.Progress(len(jobs), 0, unit="panel") as progress:
            while left:
                done, left = wait(left, timeout=0.5)
                progress.bar.update(len(done))
                progress.bar.refresh()  # its clock
                seconds = time.perf_counter() - started
                line = f"{what}: {len(jobs) - len(left)} of {len(jobs)} after {seconds:.0f} s"
                progress.show({}, line, last=not left)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # at once, if Ctrl-C was pressed
    return {name: future.result() for name, future in futures.items()}


def aligned(xy: np.ndarray, target: np.ndarray) -> np.ndarray:
    """xy (N, 2), centred and turned or mirrored so as to be as near to `target` as it can.

    Orthogonal Procrustes: distances within xy stay as they are.
    """
    centred = xy - xy.mean(0)
    u, _, vt = np.linalg.svd(centred.T @ (target - target.mean(0)))
    return (centred @ (u @ vt)).astype(np.float32)


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Says how long something took."""
    if sys.stdout.isatty():
        print(f"{name} …", end="\r", flush=True)
    started = time.perf_counter()
    yield
    print(f"{name:56}{time.perf_counter() - started:7.1f} s", flush=True)


Studied = tuple[dict[str, np.ndarray], str]  # what study() found, and its key in the cache


class Embedding:
    """Computes what is drawn of a run's images, or takes it from the cache."""

    def __init__(self, run: simclr.TrainedRun, file: Path, options: Options) -> None:
        self.options = options
        self.device = utils.choose_device(options.device)
        data_dir = options.data_dir or run.config.data_dir
        self.config = dataclasses.replace(run.config, data_dir=data_dir)
        self.run, self.file = run, file
        with stage("reading the images"):
            self.scene = read_scene(self.config, options, self.device)
        check_perplexity(options, len(self.scene.rows))
        self.cache = Cache(file.parent / "tsne")
        self.data_key = scene_digest(self.scene)

    def studies(
        self, run: simclr.TrainedRun, file: Path, names: Sequence[str], note: str = ""
    ) -> dict[str, Studied]:
        """study() of the run's representations `names`, and the key of each."""
        checkpoint = digest(file.read_bytes())
        encoders: dict[str, Callable[[Tensor], Tensor]] = {}
        results = {}
        for name in names:
            key = digest(checkpoint, self.data_key, name)
            found = self.cache.read(f"features-{name}", key)
            if found is None:
                if not encoders:
                    model = run.model.to(self.device, memory_format=torch.channels_last)
                    encoders = simclr.encoders(model, self.config, self.device)
                with stage(f"features, {simclr.REPRESENTATIONS[name]}{note}"):
                    h = name == "simclr"
                    found = study(encoders[name], self.scene, self.config, self.device, h)
                if not found["components"].std(0).max() > 0:
                    raise InputError(
                        f"nothing to draw: by {simclr.REPRESENTATIONS[name]} all images are alike"
                    )
                self.cache.write(f"features-{name}", key, found)
            results[name] = found, key
        return results

    def place(self, studied: dict[str, Studied]) -> dict[str, np.ndarray]:
        """Positions (N, 2) of the images in each of the representations, not yet aligned."""
        if self.options.method == "pca":
            return {name: found["components"][:, :2] for name, (found, _) in studied.items()}
        perplexity, seed = self.options.perplexity, self.options.seed
        placed, jobs = {}, {}
        keys = {name: digest(key, perplexity, seed) for name, (_, key) in studied.items()}
        for name, (found, _) in studied.items():
            known = self.cache.read(f"tsne-{name}", keys[name])
            if known is None:
                points = found["components"]
                jobs[name] = lambda points=points: tsne(points, perplexity, seed)
            else:
                placed[name] = known["xy"]
        if jobs:
            with stage(f"t-SNE, {', '.join(jobs)}"):
                computed = in_parallel(jobs, "t-SNE")
            for name, xy in computed.items():
                self.cache.write(f"tsne-{name}", keys[name], {"xy": xy})
            placed |= computed
        return placed

    def panels(self) -> tuple[list[Panel], dict[str, np.ndarray]]:
        """The panels that were asked for, turned to fit h, and study() of h."""
        names = list(dict.fromkeys((*self.options.panels, "simclr")))  # h: for the neighbours
        studied = self.studies(self.run, self.file, names)
        wanted = list(dict.fromkeys(self.options.panels))
        placed = self.place({name: studied[name] for name in wanted})
        target = placed.get("simclr", placed[wanted[0]])
        panels = [
            Panel(
                name, simclr.REPRESENTATIONS[name], aligned(placed[name], target),
                known_or_none(studied[name][0]["knn"]),
            )
            for name in wanted
        ]  # fmt: skip
        return panels, studied["simclr"][0]

    def epochs(self) -> list[Panel]:
        """h through training: untrained, the kept checkpoints (at most MOST_EPOCHS), the last.

        Each begins with the arrangement before it and is turned to fit it.
        """
        steps = [(simclr.load_run(file), file) for file in kept_files(self.file)]
        if steps[-1][0].epoch < self.run.epoch:
            steps.append((self.run, self.file))
        studied = self.studies(self.run, self.file, ["untrained"])
        found, chain = studied["untrained"]
        xy = self.place(studied)["untrained"]
        panels = [Panel("epoch0", "untrained", aligned(xy, xy), known_or_none(found["knn"]))]
        for run, file in steps:
            title, before = f"epoch {run.epoch}", panels[-1].xy
            found, key = self.studies(run, file, ["simclr"], f", {title}")["simclr"]
            chain = digest(chain, key, self.options.perplexity, self.options.seed)
            xy = aligned(self.place_after(before, found["components"], title, chain), before)
            panels.append(Panel(f"epoch{run.epoch}", title, xy, known_or_none(found["knn"])))
        return panels

    def place_after(
        self, before: np.ndarray, components: np.ndarray, title: str, key: str
    ) -> np.ndarray:
        """Positions (N, 2) that begin as `before` and come to fit the components (N, D)."""
        if self.options.method == "pca":
            return components[:, :2]
        known = self.cache.read("tsne-epoch", key)
        if known is not None:
            return known["xy"]
        with stage(f"t-SNE, {title}"):
            xy = tsne(components, self.options.perplexity, self.options.seed, start=before)
        self.cache.write("tsne-epoch", key, {"xy": xy})
        return xy


MOST_EPOCHS = 6  # panels of trained encoders in the strip


def kept_files(last: Path) -> list[Path]:
    """The checkpoints of a run that --epochs shows, evenly spaced, the earliest first.

    Raises InputError if simclr.py kept none.
    """
    kept = simclr.kept_checkpoints(last.parent)
    if not kept:
        raise InputError(
            f"--epochs needs checkpoints of several epochs, and {last.parent} has none: "
            "train with simclr.py --keep-every K"
        )
    chosen = np.unique(np.linspace(0, len(kept) - 1, MOST_EPOCHS).round().astype(int))
    return [kept[i] for i in chosen]


def known_or_none(value: np.ndarray) -> float | None:
    return None if np.isnan(value) else float(value)


# --------------------------------------------------------------------------------------- figures

PANEL_INCHES = 2.7
LEGEND_ROW_INCHES = 0.14
MOST_COLUMNS = 4
DPI = 200
MOST_VECTOR_POINTS = 2000  # a panel of more becomes pixels in PDF and SVG
MOST_NAMES = 10  # classes: up to here a class that is a cluster has its name on it
CLUSTER_SHARE = 0.7  # of the points around a cluster's centre are of its class, at least
MOST_LEGEND = 200  # classes: more would leave no room for the panels
NAME_LENGTH = 24


def printable(name: str) -> str:
    """A class's name, which may be any folder's, on one line and short."""
    name = "".join(c if c.isprintable() else "?" for c in name)
    return name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…"


def cluster_centre(xy: np.ndarray, labels: np.ndarray, label: int) -> np.ndarray | None:
    """Where (2,) the images of a class are a cluster, or None if they are none.

    Of the images nearest to the medians of its coordinates, half as many as it has, most must be
    of the class.
    """
    own = labels == label
    if not own.any():
        return None
    centre = np.median(xy[own], axis=0)
    near = np.square(xy - centre).sum(1).argsort()[: max(1, own.sum() // 2)]
    return centre if own[near].mean() >= CLUSTER_SHARE else None


def draw_panels(
    panels: Sequence[Panel], scene: Scene, caption: str, columns: int = MOST_COLUMNS
) -> Any:
    """The panels side by side, classes by colour and marker: a matplotlib Figure."""
    from matplotlib.figure import Figure  # late: half a second that not every import needs

    rows = math.ceil(len(panels) / columns)
    columns = math.ceil(len(panels) / rows)  # five panels are 3 + 2, not 4 + 1
    classes = scene.shown.classes if scene.labels is not None else ()
    legend_columns = min(len(classes), max(1, int(columns * PANEL_INCHES / legend_width(classes))))
    legend_rows = math.ceil(len(classes) / legend_columns) if 0 < len(classes) <= MOST_LEGEND else 0
    height = rows * (PANEL_INCHES + 0.2) + 0.25 + LEGEND_ROW_INCHES * legend_rows
    figure = Figure(figsize=(columns * PANEL_INCHES, height), layout="compressed")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        draw_points(axis, panel.xy, scene.labels, len(classes))
        note = f" · {panel.note}" if panel.note else ""
        axis.set_title(panel.title + note, fontsize=9.5)
        if 0 < len(classes) <= MOST_NAMES:
            name_clusters(axis, panel.xy, scene.labels, classes)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_color("0.85")
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    add_legend(figure, classes if legend_rows else (), legend_columns, caption)
    return figure


def draw_points(axis: Any, xy: np.ndarray, labels: np.ndarray | None, classes: int) -> None:
    """A scatter plot of equal scales, no class on top of all others."""
    points = (72 * PANEL_INCHES) ** 2  # the panel's area in square points
    size = np.clip(0.12 * points / len(xy), 0.9, 12.0)
    order = np.random.default_rng(0).permutation(len(xy))
    look = dict(s=size, linewidths=0, rasterized=len(xy) > MOST_VECTOR_POINTS)
    if labels is None:
        axis.scatter(*xy.T, color=UNLABELLED, **look)
    else:
        styles = class_styles(classes)
        colours = np.array([colour for colour, _ in styles])
        markers = np.array([marker for _, marker in styles])
        for number in np.unique(markers):
            chosen = order[markers[labels[order]] == number]
            axis.scatter(*xy[chosen].T, c=colours[labels[chosen]], marker=MARKERS[number], **look)
    reach = 1.04 * np.abs(xy - (centre := (xy.max(0) + xy.min(0)) / 2)).max()
    axis.set(xlim=(centre[0] - reach, centre[0] + reach), aspect="equal")
    axis.set_ylim(centre[1] - reach, centre[1] + reach)


def name_clusters(axis: Any, xy: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> None:
    from matplotlib.patheffects import withStroke

    for label, name in enumerate(classes):
        centre = cluster_centre(xy, labels, label)
        if centre is not None:
            text = axis.text(*centre, printable(name), ha="center", va="center", fontsize=8)
            halo = withStroke(linewidth=2.2, foreground="white")
            text.set(parse_math=False, fontweight="bold", path_effects=[halo])


def legend_width(classes: Sequence[str]) -> float:
    """Inches that an entry of the legend takes."""
    return 0.35 + 0.068 * max((len(printable(name)) for name in classes), default=1)


def add_legend(figure: Any, classes: Sequence[str], columns: int, caption: str) -> None:
    """Classes below the panels with the caption above them; only the caption without classes."""
    from matplotlib.lines import Line2D

    if not classes:
        figure.supxlabel(caption, fontsize=8, color="0.35", parse_math=False)
        return
    handles = [
        Line2D([], [], color=colour, marker=MARKERS[marker], linestyle="", markersize=5)
        for colour, marker in class_styles(len(classes))
    ]
    legend = figure.legend(
        handles, [str(i) for i in range(len(classes))], loc="outside lower center", ncols=columns,
        frameon=False, fontsize=8, handletextpad=0.1, columnspacing=1.0, borderpad=0.1,
        labelspacing=0.25, title=caption, title_fontsize=8,
    )  # fmt: skip
    for text, name in zip(legend.get_texts(), classes, strict=True):  # no mathematics in names
        text.set(text=printable(name), parse_math=False)
    legend.get_title().set(color="0.35", parse_math=False)


def framed(tiles: Tensor, colours: Tensor, width: int) -> Tensor:
    """Images uint8 (N, 3, S, S) inside frames of colours uint8 (N, 3): (N, 3, S+2·width, …)."""
    side = tiles.shape[-1] + 2 * width
    frames = colours[:, :, None, None].repeat(1, 1, side, side)
    frames[:, :, width : side - width, width : side - width] = tiles
    return frames


GRID_FILL = 0.35  # share of the grid's cells that hold an image
GRID_PIXELS = 3000  # side of the grid
CELL_PIXELS = (16, 72)  # least and most
FRAME_SHARE = 0.08  # of a cell's side


def grid_cells(xy: np.ndarray, side: int, seed: int = 0) -> np.ndarray:
    """A cell of its own, int64 (N, 2) row and column, for each point of xy (N, 2); N ≤ side².

    In random order every point takes the nearest cell that is free.
    """
    span = (xy.max(0) - xy.min(0)).max() or 1.0
    middle = (xy.max(0) + xy.min(0)) / 2
    wanted = ((xy - middle) / span + 0.5) * (side - 1)  # x to the right, y upwards
    wanted = np.stack([side - 1 - wanted[:, 1], wanted[:, 0]], axis=1)
    free = np.mgrid[:side, :side].reshape(2, -1).astype(np.float64)  # (2, cells not taken yet)
    left = free.shape[1]
    cells = np.empty((len(xy), 2), dtype=np.int64)
    for i in np.random.default_rng(seed).permutation(len(xy)):
        rows, columns = free[:, :left]
        j = (np.square(rows - wanted[i, 0]) + np.square(columns - wanted[i, 1])).argmin()
        cells[i] = free[:, j]
        left -= 1
        free[:, j] = free[:, left]
    return cells


def draw_thumbnails(panel: Panel, scene: Scene, device: torch.device, seed: int) -> Any:
    """The images on a grid, each near its place in the panel, framed in its class's colour."""
    from matplotlib.figure import Figure

    side = math.ceil(math.sqrt(len(panel.xy) / GRID_FILL))
    cell = int(np.clip(GRID_PIXELS // side, *CELL_PIXELS))
    width = max(1, round(FRAME_SHARE * cell))
    tiles = small_images(scene.shown, cell - 2 * width, device)
    classes = scene.shown.classes if scene.labels is not None else ()
    palette = torch.stack([rgb(c) for c, _ in class_styles(len(classes)) or [(UNLABELLED, 0)]])
    colours = palette[scene.labels if classes else np.zeros(len(tiles), dtype=np.int64)]
    row, column = torch.from_numpy(grid_cells(panel.xy, side, seed)).T
    grid = torch.full((side, side, 3, cell, cell), 255, dtype=torch.uint8)
    grid[row, column] = framed(tiles, colours, width)
    used = (
        slice(int(row.min()), int(row.max()) + 1),
        slice(int(column.min()), int(column.max()) + 1),
    )
    picture = utils.mosaic(grid[used])

    inches = np.array(picture.shape[1::-1]) / DPI  # a pixel of the picture is one of the figure
    columns = max(1, int(inches[0] / legend_width(classes)))
    rows = math.ceil(len(classes) / columns) if len(classes) <= MOST_LEGEND else 0
    size = (inches[0] + 0.1, inches[1] + 0.75 + LEGEND_ROW_INCHES * rows)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.imshow(picture)
    axes.set_axis_off()
    note = f" · {panel.note}" if panel.note else ""
    axes.set_title(panel.title + note, fontsize=11)
    add_legend(
        figure, classes if rows else (), min(columns, max(1, len(classes))), scene.describe()
    )
    return figure


FEW = 100  # images on disk that are decoded before worker processes have started


def small_images(images: Images, side: int, device: torch.device) -> Tensor:
    """All images without augmentation at `side` px: uint8 (N, 3, side, side) on the CPU."""
    workers = utils.cpu_cores() if len(images) > FEW else 0
    batches = images.batches(side, 512, device, workers)
    return torch.cat([utils.to_uint8(batch).cpu() for batch in batches])


QUERIES = 6  # random ones, and as many of the worst


def choose_queries(scene: Scene, found: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Which images neighbours.png shows: title -> int64 rows of the drawn images.

    The worst have the fewest neighbours of their class, and among those the most similar ones.
    """
    count = min(QUERIES, len(scene.rows))
    chosen = {"random images": np.random.default_rng(seed).permutation(len(scene.rows))[:count]}
    if scene.labels is not None and scene.train.labels is not None:
        train_labels = scene.train.labels.cpu().numpy()
        right = train_labels[found["train_near"]] == scene.labels[:, None]  # (N, k)
        surest = -found["train_similarity"].mean(1)
        chosen["fewest neighbours of their class"] = np.lexsort((surest, right.sum(1)))[:count]
    return chosen


def draw_neighbours(
    scene: Scene, found: dict[str, np.ndarray], config: simclr.Config, seed: int
) -> Any:
    """Rows of an image and its nearest training images in h, each marked right or wrong."""
    from matplotlib.figure import Figure

    chosen = choose_queries(scene, found, seed)
    columns = 1 + found["train_near"].shape[1]
    rows = max(len(queries) for queries in chosen.values())
    figure = Figure(figsize=(0.62 * columns * len(chosen), 0.82 * rows + 0.5))
    for number, (title, queries) in enumerate(chosen.items()):
        left, share = (number + 0.015) / len(chosen), 0.97 / len(chosen)
        top = 1 - 0.45 / figure.get_figheight()
        axis = figure.add_axes((left, 0.0, share, top))
        axis.set(xlim=(-0.62, columns), ylim=(1.3 * rows, -0.05))
        axis.set_axis_off()
        figure.text(left + 0.004, 1 - 0.2 / figure.get_figheight(), title.capitalize(),
                    fontweight="bold", fontsize=9, va="center")  # fmt: skip
        for row, query in enumerate(queries):
            near = found["train_near"][query]
            images = [utils.subset(scene.shown, torch.tensor([query])),
                      utils.subset(scene.train, torch.from_numpy(near))]  # fmt: skip
            tiles = torch.cat(
                [small_images(x, config.image_size, torch.device("cpu")) for x in images]
            )
            draw_row(axis, 1.3 * row, tiles, found["train_similarity"][query], scene, query, near)
    return figure


def draw_row(
    axis: Any, y: float, tiles: Tensor, similarity: np.ndarray, scene: Scene, query: int,
    near: np.ndarray,
) -> None:  # fmt: skip
    """One row of draw_neighbours(): the image, a gap, its neighbours with their classes below."""
    labels = None if scene.labels is None else int(scene.labels[query])
    known = labels is not None and scene.train.labels is not None
    for i, tile in enumerate(tiles):
        x = i - 0.6 if i == 0 else i
        colour, text, mark = "0.3", "", ""
        if i == 0 and labels is not None:
            text = printable(scene.shown.classes[labels])
        elif i > 0:
            text = f"{similarity[i - 1]:.2f}"
        if i > 0 and known:
            theirs = int(scene.train.labels[near[i - 1]])
            colour, mark = (RIGHT, "✓ ") if theirs == labels else (WRONG, "✗ ")
            text = printable(scene.train.classes[theirs])
        box = (x + 0.04, x + 0.96, y + 0.96, y + 0.04)
        axis.imshow(
            tile.permute(1, 2, 0).numpy(), extent=box, interpolation="nearest", aspect="auto"
        )
        axis.add_patch(
            axis_rectangle((x + 0.04, y + 0.04), 0.92, 0.92, edgecolor=colour, linewidth=1.6)
        )
        axis.text(x + 0.5, y + 1.1, mark + text, ha="center", va="center", fontsize=5.5,
                  color=colour, parse_math=False)  # fmt: skip


def axis_rectangle(corner: tuple[float, float], width: float, height: float, **look: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, width, height, fill=False, clip_on=False, **look)


# -------------------------------------------------------------------------------------- the page

SPRITE_PIXELS = 10_240_000  # of all images together, so that any browser can hold it
TILE_PIXELS = 96  # side of an image at most
LOSSLESS_BYTES = 2**22  # before compression; a larger sprite is compressed with loss
WEBP_QUALITY = 80


def build_page(
    panels: Sequence[Panel], scene: Scene, found: dict[str, np.ndarray], title: str, caption: str,
    tiles: Tensor,
) -> str:  # fmt: skip
    """The whole page. found: of study(), near and similarity. tiles: uint8 (N, 3, S, S)."""
    classes = scene.shown.classes if scene.labels is not None else ()
    styles = class_styles(len(classes)) or [(UNLABELLED, 0)]
    sprite, columns = make_sprite(tiles)
    files = isinstance(scene.shown, utils.ImageFiles)
    data = {
        "title": title,
        "caption": caption,
        "split": scene.split,
        "count": len(scene.rows),
        "classes": list(classes),
        "colours": [colour for colour, _ in styles],
        "markers": [marker for _, marker in styles],
        "labels": packed(scene.labels, "<u2") if classes else None,
        "rows": packed(scene.rows.numpy(), "<u4"),
        "paths": [os.fsdecode(path) for path in scene.shown.paths] if files else None,
        "panels": [page_panel(panel, scene.labels, len(classes)) for panel in panels],
        "start": max(range(len(panels)), key=lambda i: panels[i].name == "simclr"),
        "near": packed(found["near"], "<u4"),
        "similarity": packed(found["similarity"], "<f4"),
        "neighbours": found["near"].shape[1],
        "tile": tiles.shape[-1],
        "columns": columns,
        "sprite": sprite,
    }  # fmt: skip
    before, after = PAGE.split("__DATA__")
    return before + json_for_html(data) + after


def page_panel(panel: Panel, labels: np.ndarray | None, classes: int) -> dict[str, Any]:
    """A panel's record of the page's data; names: of clusters, [class, x, y] each."""
    xy = unit_square(panel.xy)
    names = []
    for label in range(classes if classes <= MOST_NAMES else 0):
        centre = cluster_centre(xy, labels, label)
        if centre is not None:
            names.append([label, *(round(float(x), 4) for x in centre)])
    texts = {"name": panel.name, "title": panel.title, "note": panel.note}
    return {**texts, "xy": packed(xy, "<f4"), "names": names}


def json_for_html(value: Any) -> str:
    """JSON that means the same inside a <script> element, whatever names it holds."""
    text = json.dumps(value)  # all but ASCII is escaped, U+2028 and U+2029 with it
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def packed(array: np.ndarray, dtype: str) -> str:
    """The array's bytes in base64, for a typed array of the page."""
    return base64.b64encode(np.ascontiguousarray(array, dtype=dtype).tobytes()).decode()


def unit_square(xy: np.ndarray) -> np.ndarray:
    """xy moved and scaled into [-1, 1]², its shape kept."""
    centred = xy - (xy.max(0) + xy.min(0)) / 2
    return centred / (np.abs(centred).max() or 1)


def tile_side(count: int, size: int) -> int:
    """Side in px at which `count` images of `size` px fit into the sprite."""
    return max(1, min(size, TILE_PIXELS, math.isqrt(SPRITE_PIXELS // count)))


def make_sprite(tiles: Tensor) -> tuple[str, int]:
    """All images in one, uint8 (N, 3, S, S) -> (data URI, images in a row)."""
    columns = math.ceil(math.sqrt(len(tiles)))
    missing = -len(tiles) % columns
    blank = tiles.new_full((missing, *tiles.shape[1:]), 255)
    grid = torch.cat([tiles, blank]).unflatten(0, (-1, columns))
    picture = Image.fromarray(utils.mosaic(grid))
    buffer = io.BytesIO()
    picture.save(buffer, "webp", lossless=grid.numel() <= LOSSLESS_BYTES, quality=WEBP_QUALITY)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode(), columns


# ------------------------------------------------------------------------------ the command line


def parse_command_line(argv: Sequence[str] | None = None) -> tuple[str, Options]:
    """The run (see simclr.find_checkpoint) and the options."""
    parser = utils.OneLineParser(
        prog="tSNE.py",
        usage="python tSNE.py [RUN] [--flag value ...]",
        description=__doc__,
    )
    parser.add_argument("run", nargs="?", default="", help="name, folder or checkpoint of a run")
    utils.add_flags(parser, Options, {})
    given = vars(parser.parse_args(argv))
    where = given.pop("run")
    given["panels"] = tuple(given.get("panels", Options.panels))
    options = Options(**given)
    check_options(options)
    return where, options


def draw(where: str, options: Options) -> list[Path]:
    """What `python tSNE.py` does. Returns the files it wrote."""
    file = simclr.find_checkpoint(where, options.checkpoints)
    run = simclr.load_run(file)
    file = run.file
    folder = Path(options.figures) / run.config.run
    if options.epochs:
        kept_files(file)  # complain before the work
    print(f"{file}: {run.config.arch} after {run.epoch} epochs")
    embedding = Embedding(run, file, options)
    utils.check_folders(folder)  # before the work; they are made when there is a figure
    scene, config = embedding.scene, embedding.config
    print(f"drawing {scene.describe()}")
    if scene.labels is None:
        print("without colours and accuracies, since they have no labels")
    elif not scene.judged:
        print("without accuracies, since no labelled images were held out")

    panels, found = embedding.panels()
    strip = embedding.epochs() if options.epochs else []
    caption = describe(scene, options)
    written = []

    def save(figure: Any, name: str) -> None:
        written.append(folder / f"{name}.{options.format}")
        utils.save_figure(figure, written[-1], DPI)

    with stage("figures"):
        save(draw_panels(panels, scene, caption), "tsne")
        save(draw_neighbours(scene, found, config, options.seed), "neighbours")
        if strip:
            save(draw_panels(strip, scene, caption), "tsne_epochs")
    if options.thumbnails:
        with stage("thumbnails"):
            panel = next((p for p in panels if p.name == "simclr"), panels[0])
            figure = draw_thumbnails(panel, scene, embedding.device, options.seed)
            save(figure, "tsne_thumbnails")
    with stage("page"):
        side = tile_side(len(scene.rows), config.image_size)
        tiles = small_images(scene.shown, side, embedding.device)
        title = f"{run.config.run}, epoch {run.epoch}"
        page = build_page([*panels, *strip], scene, found, title, caption, tiles)
        written.append(folder / "tsne.html")
        utils.write_atomically(written[-1], page.encode())
    return written


def describe(scene: Scene, options: Options) -> str:
    """The figures' caption."""
    how = f"t-SNE, perplexity {options.perplexity:g}" if options.method == "tsne" else "PCA"
    judged = (
        f" · kNN accuracy before it (k = {simclr.KNN_NEIGHBOURS}, cosine)" if scene.judged else ""
    )
    return f"{scene.describe()} · {how}{judged}"


@utils.command("tSNE.py")
def main(argv: Sequence[str] | None = None) -> None:
    try:
        started, arguments = time.perf_counter(), parse_command_line(argv)
        if utils.rank_info().rank:
            return  # of torchrun's processes one draws
        written = draw(*arguments)
        print(f"{'in all':56}{time.perf_counter() - started:7.1f} s")
        print("\n".join(str(path) for path in written))
    except KeyboardInterrupt:
        print("\nstopped; what was computed is kept", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(130)  # t-SNE's threads cannot be asked to stop, and would be waited for


# --------------------------------------------------------------------------- the page's template
#
# One file without a server or a network, which the content policy makes sure of. __DATA__ is
# replaced by JSON; all names in it reach the page as text content, never as HTML.

PAGE_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --panel: #f6f7f8; --ink: #1c2126; --soft: #5c6670; --line: #d5dade;
  --faint: #dfe3e6; --accent: #0072b2; --wrong: #b84a00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --panel: #1d2226; --ink: #eceff1; --soft: #a3adb5; --line: #3a4249;
    --faint: #2d3338; --accent: #56b4e9; --wrong: #ff9a4d;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; height: 100vh; display: grid; color: var(--ink); background: var(--paper);
  font: 15px/1.4 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  grid-template: auto minmax(0, 1fr) / minmax(0, 1fr) 21rem;
  grid-template-areas: "top side" "stage side";
}
header { grid-area: top; padding: .6rem 1rem .5rem; border-bottom: 1px solid var(--line); }
h1 { margin: 0; font-size: 1.1rem; overflow-wrap: anywhere; }
h2 { margin: 0 0 .4rem; font-size: .95rem; }
p { margin: 0; }
.soft { color: var(--soft); font-size: .82rem; overflow-wrap: anywhere; }
#panels { display: flex; flex-wrap: wrap; gap: .35rem; margin-top: .5rem; }
button {
  font: inherit; color: inherit; background: var(--paper); border: 1px solid var(--line);
  border-radius: 6px; padding: .2rem .6rem; cursor: pointer;
}
button:hover { border-color: var(--accent); }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 1px; }
#panels button { text-align: left; line-height: 1.25; }
#panels button small { display: block; color: var(--soft); }
#panels [aria-pressed=true] { border-color: var(--accent); box-shadow: inset 0 -3px var(--accent); }
#stage { grid-area: stage; position: relative; overflow: hidden; }
#map {
  position: absolute; inset: 0; width: 100%; height: 100%; display: block;
  cursor: crosshair; touch-action: none;
}
#map:focus-visible { outline-offset: -3px; }
#count { position: absolute; left: .8rem; bottom: .5rem; pointer-events: none; }
#zoom { position: absolute; right: .7rem; bottom: .6rem; display: flex; gap: .3rem; }
#zoom button { min-width: 2.2rem; height: 2.2rem; padding: 0 .5rem; }
#tip {
  position: absolute; left: 0; top: 0; padding: .4rem; border-radius: 8px; pointer-events: none;
  background: var(--panel); border: 1px solid var(--line); box-shadow: 0 2px 10px #0004;
  max-width: 13rem;
}
#tip[hidden] { display: none; }
aside {
  grid-area: side; overflow-y: auto; padding: .8rem 1rem; background: var(--panel);
  border-left: 1px solid var(--line);
}
section + section, aside details {
  margin-top: 1rem; border-top: 1px solid var(--line); padding-top: .8rem;
}
canvas.tile { display: block; border-radius: 3px; }
.row { display: flex; gap: .8rem; align-items: flex-start; }
.row > div { min-width: 0; }
#agreement { margin-top: .5rem; }
#neighbours { display: grid; grid-template-columns: repeat(5, 1fr); gap: .3rem; margin-top: .6rem; }
#neighbours button {
  padding: 3px; line-height: 1.2; font-size: .68rem; border-width: 2px; min-width: 0;
  overflow: hidden; text-overflow: ellipsis; white-space: nowrap;
}
#neighbours canvas { width: 100%; height: auto; margin-bottom: 2px; }
#neighbours .same { border-color: var(--accent); }
#neighbours .other { border-color: var(--wrong); border-style: dashed; }
#legend {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .25rem;
}
#legend button {
  display: flex; gap: .4rem; align-items: center; text-align: left; padding: .2rem .4rem;
  font-size: .82rem;
}
#legend button span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
#legend button small { margin-left: auto; color: var(--soft); }
#legend [aria-pressed=false] { opacity: .45; text-decoration: line-through; }
#legend canvas { flex: none; }
.bar { display: flex; align-items: baseline; gap: .4rem; margin-bottom: .4rem; }
.bar h2 { margin: 0 auto 0 0; }
.bar button { font-size: .8rem; padding: .05rem .5rem; }
label { display: flex; gap: .5rem; align-items: baseline; margin-bottom: .8rem; cursor: pointer; }
kbd {
  border: 1px solid var(--line); border-radius: 4px; padding: 0 .3em; font-size: .85em;
  background: var(--paper);
}
dl {
  display: grid; grid-template-columns: auto 1fr; gap: .25rem .7rem; margin: .5rem 0 0;
  font-size: .85rem;
}
dd { margin: 0; }
[hidden] { display: none !important; }
@media (max-width: 720px) {
  body { display: block; height: auto; }
  header { padding: .5rem .7rem; }
  #panels { display: grid; grid-template-columns: 1fr 1fr; }
  #stage { height: 62vh; min-height: 300px; border-bottom: 1px solid var(--line); }
  aside { border-left: 0; padding: .7rem; }
}
"""

PAGE_BODY = """
<header>
  <h1 id="title"></h1>
  <p id="caption" class="soft"></p>
  <div id="panels" role="group" aria-label="Representation"></div>
</header>
<div id="stage">
  <canvas id="map" tabindex="0" role="application"
    aria-label="Map of the images. Arrow keys move, plus and minus zoom, Enter pins the image
      nearest to the middle."></canvas>
  <p id="count" class="soft" role="status"></p>
  <div id="zoom" role="group" aria-label="Zoom">
    <button id="in" aria-label="Zoom in">+</button>
    <button id="out" aria-label="Zoom out">−</button>
    <button id="reset">Reset</button>
  </div>
  <div id="tip" hidden></div>
</div>
<aside>
  <section id="details" aria-live="polite">
    <p id="hint" class="soft">Point at an image to see it. Click, or tap, to pin it and see its
      nearest neighbours. Zoom in until the images themselves appear.</p>
    <div id="pinned" hidden>
      <div class="bar"><h2>Pinned</h2><button id="unpin">Unpin</button></div>
      <div class="row"><canvas class="tile" id="picture"></canvas><div id="facts"></div></div>
      <p class="soft" id="agreement"></p>
      <div id="neighbours"></div>
    </div>
  </section>
  <section id="classes">
    <label><input type="checkbox" id="mixed">
      <span>Only images whose neighbours mostly belong to another class
        (<span id="mixedcount"></span>)</span></label>
    <div class="bar"><h2>Classes</h2>
      <button id="all">All</button><button id="none">None</button></div>
    <div id="legend" role="group" aria-label="Classes"></div>
  </section>
  <details>
    <summary>Keys</summary>
    <dl>
      <dt><kbd>←</kbd> <kbd>→</kbd> <kbd>↑</kbd> <kbd>↓</kbd></dt><dd>move</dd>
      <dt><kbd>+</kbd> <kbd>−</kbd> <kbd>0</kbd></dt><dd>zoom, reset</dd>
      <dt><kbd>1</kbd> … <kbd>9</kbd>, <kbd>[</kbd> <kbd>]</kbd></dt>
      <dd>choose a representation</dd>
      <dt><kbd>Enter</kbd></dt><dd>on the map: pin the image nearest to its middle</dd>
      <dt><kbd>Esc</kbd></dt><dd>unpin</dd>
    </dl>
  </details>
</aside>
"""

PAGE_SCRIPT = """
"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const get = (id) => document.getElementById(id);

// ---- what is drawn

function unpack(Type, text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  return new Type(bytes.buffer);
}
const N = data.count, K = data.neighbours;
const labels = data.labels && unpack(Uint16Array, data.labels);      // (N)
const rows = unpack(Uint32Array, data.rows);                         // (N) numbers in the split
const near = unpack(Uint32Array, data.near);                         // (N, K) drawn images
const similarity = unpack(Float32Array, data.similarity);            // (N, K)
const layouts = data.panels.map((p) => unpack(Float32Array, p.xy));  // (N, 2) in [-1, 1], y up
const sprite = new Image();

const mixed = new Uint8Array(N);  // whether most neighbours are of another class
if (labels) {
  for (let i = 0; i < N; i++) mixed[i] = agreeing(i) * 2 < K ? 1 : 0;
}
function agreeing(i) {
  let same = 0;
  for (let j = 0; j < K; j++) same += labels[near[i * K + j]] === labels[i] ? 1 : 0;
  return same;
}
const styleOf = (i) => (labels ? labels[i] : 0);
const className = (i) => data.classes[labels[i]];
const order = shuffled(N);  // so that no class covers the others

function shuffled(n) {
  const list = Uint32Array.from({ length: n }, (_, i) => i);
  let state = 1;
  for (let i = n - 1; i > 0; i--) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    const j = Math.floor((state / 2 ** 32) * (i + 1));
    [list[i], list[j]] = [list[j], list[i]];
  }
  return list;
}

// ---- state

let panel = data.start;
let xy = Float32Array.from(layouts[panel]);  // where the points are now, in mid-flight too
let flight = null;                           // {from, to, began} while they move
const view = { x: 0, y: 0, zoom: 1 };        // the point in the middle of the map
let hovered = -1, pinned = -1;
const hidden = new Set();                    // classes
let onlyMixed = false;
const still = matchMedia("(prefers-reduced-motion: reduce)");
const FLIGHT_MS = 700, MOST_ZOOM = 200, MOST_TILES = 150;

const shown = (i) => !(labels && hidden.has(labels[i])) && !(onlyMixed && !mixed[i]);

// ---- geometry

const map = get("map"), pen = map.getContext("2d");
let width = 1, height = 1, ratio = 1;  // CSS px; device px per CSS px
const scale = () => 0.47 * Math.min(width, height) * view.zoom;
const screenX = (i) => width / 2 + (xy[2 * i] - view.x) * scale();
const screenY = (i) => height / 2 - (xy[2 * i + 1] - view.y) * scale();

function zoomBy(factor, x = width / 2, y = height / 2) {  // (x, y) stays where it is
  const zoom = Math.min(MOST_ZOOM, Math.max(0.5, view.zoom * factor));
  const dx = (x - width / 2) / scale(), dy = (height / 2 - y) / scale();
  const kept = 1 - view.zoom / zoom;
  view.x += dx * kept;
  view.y += dy * kept;
  view.zoom = zoom;
  redraw();
}
function moveBy(dx, dy) {
  view.x -= dx / scale();
  view.y += dy / scale();
  redraw();
}
function resetView() {
  Object.assign(view, { x: 0, y: 0, zoom: 1 });
  redraw();
}
function nearestTo(x, y, reach) {  // the shown image nearest to a place on the map, or -1
  let best = -1, least = reach * reach;
  for (let i = 0; i < N; i++) {
    const d = (screenX(i) - x) ** 2 + (screenY(i) - y) ** 2;
    if (d < least && shown(i)) [best, least] = [i, d];
  }
  return best;
}

// ---- drawing

function radius() {
  const spacing = Math.sqrt((width * height) / N);
  return Math.min(7, Math.max(1.6, 0.22 * spacing) * view.zoom ** 0.35);
}
function markerPath(p, kind, x, y, r) {
  p.beginPath();
  if (kind === 0) p.arc(x, y, r, 0, 2 * Math.PI);
  if (kind === 1) p.rect(x - 0.88 * r, y - 0.88 * r, 1.76 * r, 1.76 * r);
  if (kind === 2) polygon(p, x, y, 1.25 * r, [-90, 30, 150]);
  if (kind === 3) polygon(p, x, y, 1.25 * r, [0, 90, 180, 270]);
  if (kind === 4) {
    for (const turn of [45, 135]) {
      polygon(p, x, y, 1.3 * r, [turn - 18, turn + 18, turn + 162, turn + 198]);
    }
  }
}
function polygon(p, x, y, r, degrees) {
  degrees.forEach((degree, i) => {
    const a = (degree * Math.PI) / 180;
    p[i ? "lineTo" : "moveTo"](x + r * Math.cos(a), y + r * Math.sin(a));
  });
  p.closePath();
}
function stamp(colour, kind, r) {  // a marker drawn once, to be copied for each point
  const side = 2 * Math.ceil(1.4 * r * ratio) + 2;
  const canvas = Object.assign(element("canvas"), { width: side, height: side });
  const p = canvas.getContext("2d");
  p.fillStyle = colour;
  markerPath(p, kind, side / 2, side / 2, r * ratio);
  p.fill();
  return canvas;
}
function tileAt(p, i, x, y, size) {  // image i with its corner at (x, y)
  if (!sprite.complete || !sprite.naturalWidth) return;
  const t = data.tile;
  p.imageSmoothingEnabled = size < t;
  const left = (i % data.columns) * t, top = Math.floor(i / data.columns) * t;
  p.drawImage(sprite, left, top, t, t, x, y, size, size);
}
const colourOf = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

let waiting = false;
function redraw() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame((now) => {
    waiting = false;
    advance(now);
    paint();
  });
}
function advance(now) {
  if (!flight) return;
  flight.began ??= now;
  const t = Math.min(1, (now - flight.began) / FLIGHT_MS);
  const s = t * t * (3 - 2 * t);
  for (let j = 0; j < xy.length; j++) xy[j] = flight.from[j] + s * (flight.to[j] - flight.from[j]);
  if (t === 1) flight = null;
  else redraw();
}
function paint() {
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  const r = radius(), inside = [], faint = [];
  for (const i of order) {
    const x = screenX(i), y = screenY(i);
    if (x < -r || y < -r || x > width + r || y > height + r) continue;
    if (shown(i)) inside.push(i);
    else if (onlyMixed && !(labels && hidden.has(labels[i]))) faint.push(i);
  }
  copyMarkers(faint, stamps([colourOf("--faint")], [0], 0.8 * r), () => 0);
  const tiles = view.zoom > 1.5 && inside.length <= MOST_TILES && !flight;
  const side = tiles ? tileSide(inside.length) : 0;
  const mark = tiles ? (i, more, ...look) => frame(i, side / 2 + more, ...look)
    : (i, more, ...look) => ring(i, r + more, ...look);
  if (tiles) paintTiles(inside, side);
  else copyMarkers(inside, stamps(data.colours, data.markers, r), styleOf);
  if (!tiles && !flight && !onlyMixed) paintNames();
  if (pinned >= 0) paintPinned(mark);
  if (hovered >= 0) mark(hovered, 4, 2);
  if (document.activeElement === map && map.matches(":focus-visible")) paintCross();
}
const sheets = new Map();
function stamps(colours, kinds, r) {  // all markers in a row, kept: a frame copies thousands
  const key = [colours.join(), r.toFixed(2), ratio].join();
  if (!sheets.has(key)) {
    if (sheets.size > 50) sheets.clear();
    const list = colours.map((c, k) => stamp(c, kinds[k], r)), side = list[0].width;
    const sheet = Object.assign(element("canvas"), { width: side * list.length, height: side });
    const p = sheet.getContext("2d");
    list.forEach((s, k) => p.drawImage(s, k * side, 0));
    sheets.set(key, { sheet, side });
  }
  return sheets.get(key);
}
function copyMarkers(points, { sheet, side }, which) {
  pen.setTransform(1, 0, 0, 1, 0, 0);
  const cx = width / 2 - view.x * scale(), cy = height / 2 + view.y * scale(), s = scale();
  for (const i of points) {  // at whole pixels, which is twice as fast
    const x = Math.round((cx + xy[2 * i] * s) * ratio - side / 2);
    const y = Math.round((cy - xy[2 * i + 1] * s) * ratio - side / 2);
    pen.drawImage(sheet, which(i) * side, 0, side, side, x, y, side, side);
  }
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
}
const tileSide = (count) => Math.min(80, Math.max(20, 0.5 * Math.sqrt((width * height) / count)));
function paintTiles(points, size) {
  for (const i of points) {
    const x = screenX(i) - size / 2, y = screenY(i) - size / 2;
    pen.fillStyle = data.colours[styleOf(i)];
    pen.fillRect(x - 2, y - 2, size + 4, size + 4);
    tileAt(pen, i, x, y, size);
  }
}
function paintNames() {  // of the classes that are clusters, where those are
  pen.font = "600 13px system-ui, sans-serif";
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  pen.lineWidth = 3;
  pen.strokeStyle = colourOf("--paper");
  pen.fillStyle = colourOf("--ink");
  for (const [c, x, y] of data.panels[panel].names) {
    if (hidden.has(c)) continue;
    const at = [width / 2 + (x - view.x) * scale(), height / 2 - (y - view.y) * scale()];
    pen.strokeText(data.classes[c], ...at);
    pen.fillText(data.classes[c], ...at);
  }
}
function paintPinned(mark) {
  pen.lineWidth = 1.2;
  for (let j = 0; j < K; j++) {
    const n = near[pinned * K + j];
    const same = !labels || labels[n] === labels[pinned];
    pen.strokeStyle = colourOf(same ? "--accent" : "--wrong");
    pen.setLineDash(same ? [] : [5, 3]);
    pen.beginPath();
    pen.moveTo(screenX(pinned), screenY(pinned));
    pen.lineTo(screenX(n), screenY(n));
    pen.stroke();
    mark(n, 2, 1.5, pen.strokeStyle);
  }
  mark(pinned, 5, 3);
}
function frame(i, r, thickness, colour = colourOf("--ink")) {
  pen.setLineDash([]);
  pen.lineWidth = thickness;
  pen.strokeStyle = colour;
  pen.strokeRect(screenX(i) - r, screenY(i) - r, 2 * r, 2 * r);
}
function ring(i, r, thickness, colour = colourOf("--ink")) {
  pen.setLineDash([]);
  pen.lineWidth = thickness;
  pen.strokeStyle = colour;
  pen.beginPath();
  pen.arc(screenX(i), screenY(i), r, 0, 2 * Math.PI);
  pen.stroke();
}
function paintCross() {  // where Enter pins
  const [x, y] = [width / 2, height / 2];
  pen.strokeStyle = colourOf("--soft");
  pen.lineWidth = 1;
  pen.beginPath();
  for (const s of [-1, 1]) {
    pen.moveTo(x + 4 * s, y); pen.lineTo(x + 12 * s, y);
    pen.moveTo(x, y + 4 * s); pen.lineTo(x, y + 12 * s);
  }
  pen.stroke();
}

// ---- texts and controls

function element(tag, text = "", className = "") {
  return Object.assign(document.createElement(tag), { textContent: text, className });
}
function tileCanvas(i, size, canvas = element("canvas")) {
  const side = Math.round(size * ratio);
  canvas.className = "tile";
  canvas.width = canvas.height = side;
  canvas.style.width = canvas.style.height = `${size}px`;
  tileAt(canvas.getContext("2d"), i, 0, 0, side);
  return canvas;
}
function facts(i) {  // what is known of an image, as elements
  const list = [];
  if (labels) list.push(element("strong", className(i)));
  list.push(element("p", `${data.split} image ${rows[i]}`, "soft"));
  if (data.paths) list.push(element("p", data.paths[i], "soft"));
  return list;
}
function hover(i, x = 0, y = 0) {
  const tip = get("tip");
  if (i !== hovered) {
    hovered = i;
    tip.hidden = i < 0;
    if (i >= 0) tip.replaceChildren(tileCanvas(i, 96), ...facts(i));
    redraw();
  }
  if (i < 0) return;
  const left = x + 16 + tip.offsetWidth > width ? x - 16 - tip.offsetWidth : x + 16;
  const top = Math.min(Math.max(4, y - 30), height - tip.offsetHeight - 4);
  tip.style.transform = `translate(${Math.max(4, left)}px, ${Math.max(4, top)}px)`;
}
function pin(i) {
  pinned = i;
  get("pinned").hidden = i < 0;
  get("hint").hidden = i >= 0;
  if (i >= 0) {
    tileCanvas(i, 112, get("picture"));
    get("facts").replaceChildren(...facts(i));
    const agreement = labels ? `; ${agreeing(i)} of ${K} are of its class` : "";
    get("agreement").textContent = `Nearest neighbours in h, cosine similarity${agreement}`;
    get("neighbours").replaceChildren(...Array.from({ length: K }, (_, j) => neighbour(i, j)));
  }
  redraw();
}
function neighbour(i, j) {
  const n = near[i * K + j], button = element("button");
  const value = similarity[i * K + j].toFixed(3);
  const same = labels && labels[n] === labels[i];
  const mark = labels ? (same ? "✓ " : "✗ ") : "";
  button.append(tileCanvas(n, 48), element("span", mark + value));
  if (labels) button.append(element("br"), element("span", className(n)));
  button.className = labels ? (same ? "same" : "other") : "";
  button.title = `${labels ? className(n) + ", " : ""}${data.split} image ${rows[n]}`;
  button.addEventListener("click", () => {
    pin(n);
    get("neighbours").querySelector("button")?.focus({ preventScroll: true });
  });
  return button;
}
function press(group, isPressed) {
  [...get(group).children].forEach((button, i) => {
    button.setAttribute("aria-pressed", String(isPressed(i)));
  });
}
function choosePanel(k) {
  panel = (k + data.panels.length) % data.panels.length;
  press("panels", (i) => i === panel);
  if (still.matches) xy.set(layouts[panel]);
  else flight = { from: Float32Array.from(xy), to: layouts[panel], began: null };
  hover(-1);
  redraw();
}
function toggle(classes, off) {
  for (const c of classes) hidden[off ? "add" : "delete"](c);
  press("legend", (c) => !hidden.has(c));
  recount();
}
function recount() {
  let count = 0;
  for (let i = 0; i < N; i++) count += shown(i) ? 1 : 0;
  const all = `${N.toLocaleString("en")} images`;
  get("count").textContent = count === N ? all : `${count.toLocaleString("en")} of ${all}`;
  hover(-1);
  redraw();
}

function build() {
  document.title = data.title;
  get("title").textContent = data.title;
  get("caption").textContent = data.caption;
  data.panels.forEach((p, k) => {
    const button = element("button", p.title);
    if (p.note) button.append(element("small", p.note));
    button.addEventListener("click", () => choosePanel(k));
    get("panels").append(button);
  });
  press("panels", (k) => k === panel);
  get("panels").hidden = data.panels.length < 2;
  get("classes").hidden = !labels;
  if (labels) buildLegend();
  get("all").addEventListener("click", () => toggle(data.classes.keys(), false));
  get("none").addEventListener("click", () => toggle(data.classes.keys(), true));
  get("mixed").addEventListener("change", (e) => { onlyMixed = e.target.checked; recount(); });
  get("unpin").addEventListener("click", () => { pin(-1); map.focus(); });
  get("in").addEventListener("click", () => zoomBy(1.5));
  get("out").addEventListener("click", () => zoomBy(1 / 1.5));
  get("reset").addEventListener("click", resetView);
  recount();
}
function buildLegend() {
  const counts = new Uint32Array(data.classes.length);
  for (const label of labels) counts[label]++;
  data.classes.forEach((name, c) => {
    const button = element("button");
    const swatch = stamp(data.colours[c], data.markers[c], 5);
    swatch.style.width = `${swatch.width / ratio}px`;
    button.append(swatch, element("span", name));
    button.append(element("small", counts[c].toLocaleString("en")));
    button.title = name;
    button.addEventListener("click", () => toggle([c], !hidden.has(c)));
    get("legend").append(button);
  });
  press("legend", () => true);
  get("mixedcount").textContent = mixed.reduce((sum, x) => sum + x, 0).toLocaleString("en");
}

// ---- mouse, touch and keys

const fingers = new Map();  // pointers that are down: id -> {x, y}
let dragged = 0;            // how far since the first came down
const place = (e) => {
  const box = map.getBoundingClientRect();
  return { x: e.clientX - box.left, y: e.clientY - box.top };
};
const reachOf = (e) => (e.pointerType === "touch" ? 24 : Math.max(12, radius() + 5));

map.addEventListener("pointerdown", (e) => {
  if (!fingers.size) dragged = 0;
  fingers.set(e.pointerId, place(e));
  map.setPointerCapture(e.pointerId);
});
map.addEventListener("pointermove", (e) => {
  const now = place(e), before = fingers.get(e.pointerId);
  if (!before) {
    hover(flight ? -1 : nearestTo(now.x, now.y, reachOf(e)), now.x, now.y);
    return;
  }
  dragged += Math.hypot(now.x - before.x, now.y - before.y);
  fingers.set(e.pointerId, now);
  if (dragged < 4) return;
  hover(-1);
  const share = 1 / fingers.size;
  moveBy((now.x - before.x) * share, (now.y - before.y) * share);
  if (fingers.size === 2) {  // the other finger is what the map is stretched from
    const [, other] = [...fingers].find(([id]) => id !== e.pointerId);
    const gap = (p) => Math.max(10, Math.hypot(p.x - other.x, p.y - other.y));
    zoomBy(gap(now) / gap(before), (now.x + other.x) / 2, (now.y + other.y) / 2);
  }
});
map.addEventListener("pointerup", (e) => {
  if (fingers.delete(e.pointerId) && !fingers.size && dragged < 4) {
    const { x, y } = place(e);
    pin(nearestTo(x, y, reachOf(e)));
  }
});
map.addEventListener("pointercancel", (e) => fingers.delete(e.pointerId));
map.addEventListener("pointerleave", () => hover(-1));
map.addEventListener("wheel", (e) => {
  e.preventDefault();
  const { x, y } = place(e);
  zoomBy(Math.exp(-e.deltaY * (e.deltaMode ? 0.05 : 0.0016)), x, y);
}, { passive: false });
map.addEventListener("focus", redraw);
map.addEventListener("blur", redraw);

const STEP = 60;  // px an arrow key moves
const KEYS = {
  ArrowLeft: () => moveBy(STEP, 0), ArrowRight: () => moveBy(-STEP, 0),
  ArrowUp: () => moveBy(0, STEP), ArrowDown: () => moveBy(0, -STEP),
  "+": () => zoomBy(1.3), "=": () => zoomBy(1.3), "-": () => zoomBy(1 / 1.3), 0: resetView,
  "[": () => choosePanel(panel - 1), "]": () => choosePanel(panel + 1),
  Escape: () => pin(-1),
};
document.addEventListener("keydown", (e) => {
  if (e.ctrlKey || e.metaKey || e.altKey) return;
  let act = KEYS[e.key];
  if (e.key.startsWith("Arrow") && e.target !== map && e.target !== document.body) return;
  if (/^[1-9]$/.test(e.key) && e.key <= data.panels.length) act = () => choosePanel(e.key - 1);
  if (e.key === "Enter" && e.target === map) {
    act = () => pin(nearestTo(width / 2, height / 2, Infinity));
  }
  if (!act) return;
  e.preventDefault();
  act();
});

// ---- start

function resize() {
  ratio = window.devicePixelRatio || 1;
  width = map.clientWidth;
  height = map.clientHeight;
  map.width = Math.round(width * ratio);
  map.height = Math.round(height * ratio);
  redraw();
}
ratio = window.devicePixelRatio || 1;
build();
new ResizeObserver(resize).observe(map);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
sprite.addEventListener("load", () => { document.body.dataset.ready = "true"; redraw(); });
sprite.src = data.sprite;
// for the console, and for tests
window.explorer = {
  screenOf: (i) => ({ x: screenX(i), y: screenY(i) }),
  state: () => ({ panel, pinned, hovered, moving: flight !== null, ...view }),
};
})();
"""

PAGE = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
  style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>Representation</title>
<style>{PAGE_STYLE}</style>
</head>
<body>{PAGE_BODY}
<script type="application/json" id="data">__DATA__</script>
<script>{PAGE_SCRIPT}</script>
</body>
</html>
"""

if __name__ == "__main__":
    main()
