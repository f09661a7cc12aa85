"""Draws maps of a representation: the test images by t-SNE, as figures and as a page to explore.

    python tSNE.py                             # the newest run
    python tSNE.py cifar10_resnet18            # a run by its name, its folder or its checkpoint
    python tSNE.py RUN --format pdf            # for a paper; also --panels, --perplexity, --seed
    python tSNE.py RUN --thumbnails            # the images themselves, on a grid
    python tSNE.py RUN --epochs                # through training, of simclr.py --keep-every K
    python tSNE.py RUN --dataset folder --data-dir PHOTOS   # other images than the run's
    python tSNE.py moco_v2.pth.tar --dataset cifar10    # another project's encoder

writes to figures/<run>/

    tsne.png             the same images as raw pixels, by the untrained encoder, as h and as z
    tsne.html            one file to open in a browser: zoom, point at images, pin neighbours
    neighbours.png       images and their nearest training images in h, where it works and where not
    tsne_thumbnails.png  with --thumbnails
    tsne_epochs.png      with --epochs

and with --data-dir PHOTOS tsne-PHOTOS.png and so on. Each representation goes through PCA to 50
dimensions and then t-SNE with the cosine metric, started from the first two principal components.
A figure follows from checkpoint, data, perplexity and seed. The axes of t-SNE have no meaning:
every panel is turned and mirrored to fit the panel of h as well as it can. Two dimensions cannot
show everything, and t-SNE may show clusters that the features do not have. The kNN accuracy in a
title is measured on the features. The maps of t-SNE are kept in checkpoints/<run>/tsne/.

Reading order: options · network and images · features · positions by t-SNE · names and colours ·
figures · the page (its template: figures/explorer.html) · command line.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import joblib
import matplotlib
import numpy as np
import torch
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from PIL import Image
from scipy.linalg import orthogonal_procrustes
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits
from torch import Tensor
from torchvision.utils import make_grid

import simclr
import utils
from utils import Images, InputError, setting

# --------------------------------------------------------------------------------------- options


# fmt: off
@dataclass
class Options:
    """The command line."""

    panels: tuple[str, ...] = setting(tuple(simclr.REPRESENTATIONS), "what to draw, in this order",
                                      tuple(simclr.REPRESENTATIONS))
    images: int = setting(10_000, "draw at most so many of the test images, chosen at random",
                          low=2)
    method: str = setting("tsne", "pca is quick, and shows less", ("tsne", "pca"))
    perplexity: float = setting(30.0, "of t-SNE: about how many neighbours an image has, at most a "
                                "third of the others", low=1)
    seed: int = setting(0, "of t-SNE and of all random choices", low=0)
    format: str = setting("png", "of the figures", ("png", "pdf", "svg"))
    thumbnails: bool = setting(False, "also draw the images themselves, on a grid")
    epochs: bool = setting(False, "also draw h through training, of the checkpoints kept")
    dataset: str = setting("", "draw images of this data set (default: the run's)", utils.DATASETS)
    data_dir: str = setting("", "where the images are, if not where the run had them")
    image_size: int = setting(0, "side in px that the encoder sees; 0: as in training",
                              low=0, high=simclr.MAX_SIZE)
    range: tuple[float, float] = setting((), "values that are black and white in grey pictures of "
                                       "more than 8 bits (default: the run's)")
    normalize: str = setting("auto", "how images in [0, 1] are normalised before the encoder; "
                             "auto: as its origin did", ("auto", "none", *utils.MEANS))
    prefix: str = setting("", "which encoder of another project's file, if it holds several")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    checkpoints: str = setting("checkpoints", "folder of all runs' checkpoints")
    figures: str = setting("figures", "folder of all runs' figures")
    # fmt: on


# ----------------------------------------------------------------------------- network and images

FEW = 100  # images on disk that are decoded before worker processes have started


@dataclass
class Network:
    """The encoders of a checkpoint, and the settings of its images.

    encoders: by the keys of simclr.REPRESENTATIONS, float (B, 3, S, S) in [0, 1] -> (B, D) each.
    """

    source: simclr.Source
    config: simclr.Config
    encoders: dict[str, Callable[[Tensor], Tensor]]


def load_network(file: Path, device: torch.device, options: Options) -> Network:
    """Reads the encoders of a file, see simclr.load_source(), and the settings of its images."""
    source = simclr.load_source(file, options.normalize, options.prefix)
    config = source.config_for(options.dataset, options.data_dir, options.image_size, options.range)
    config.precision = source.precision(device)
    encoders = simclr.encoders(source.encoder, source.untrained(config), device, source.projector)
    return Network(source, config, encoders)


@dataclass
class Scene:
    """The images that are drawn, and the training images that they are compared with.

    shown: N images. rows: int64 (N,), their numbers in the split. split: "test", or "training"
    where there are no test images. name: of the data set. Computed from these: classes, the name
    of each label, () if unlabelled; labels, int64 (N,); names and style, of classes in figures;
    judged, whether kNN accuracy can be measured.
    """

    shown: Images
    rows: Tensor
    split: str
    train: Images
    name: str

    def __post_init__(self) -> None:
        labelled = all(images.labels is not None for images in (self.shown, self.train))
        self.classes = self.shown.classes if labelled else ()
        labels = self.shown.labels if labelled else torch.zeros(len(self.rows), dtype=torch.int64)
        self.labels = labels.cpu().numpy()
        self.names, self.style = utils.names_in_figures(self.classes)
        data = simclr.Data(self.train, self.train, self.shown)
        self.judged = self.split == "test" and data.labelled

    def __str__(self) -> str:
        labelled = "" if self.classes else "unlabelled "
        return f"{len(self.rows):,} {labelled}{self.split} images of {self.name}"


def read_scene(config: simclr.Config, options: Options, device: torch.device) -> Scene:
    """At most --images readable test images of a run, or training images if it has no others."""
    given = config.data_dir, config.max_bad, config.range
    splits = utils.load_splits(config.dataset, ("train", "test"), *given)
    train, test = (utils.only_readable(x, config.workers).to(device) for x in splits)
    images, split = (test, "test") if len(test) else (train, "training")
    if len(images) < 2:
        raise InputError(f"need at least 2 images to draw, got {len(images)}")
    order = torch.randperm(len(images), generator=utils.generator("cpu", options.seed))
    rows = order[: options.images].sort().values
    name = Path(config.data_dir).resolve().name if config.dataset == "folder" else config.dataset
    return Scene(utils.subset(images, rows), rows, split, train, name)


def small_images(images: Images, side: int) -> Tensor:
    """All images without augmentation at `side` px: uint8 (N, 3, side, side) on the CPU."""
    batches = images.batches(side, 512, torch.device("cpu"), workers=-1 if len(images) > FEW else 0)
    return torch.cat([utils.to_uint8(batch) for batch in batches])


@contextlib.contextmanager
def stage(title: str) -> Iterator[None]:
    """Context manager that prints how long something took."""
    if sys.stdout.isatty():
        print(f"{title} …", end="\r", flush=True)
    started = time.perf_counter()
    yield
    print(f"{title:56}{time.perf_counter() - started:7.1f} s", flush=True)


# -------------------------------------------------------------------------------------- features

Arrays = dict[str, np.ndarray]
COMPONENTS = 50  # what PCA leaves for t-SNE
PAGE_NEIGHBOURS = 10  # of the drawn images, on the page
TRAIN_NEIGHBOURS = 8  # of the training images, in the figure; at most simclr.KNN_NEIGHBOURS


def features_of(network: Network, name: str, scene: Scene, device: torch.device) -> Arrays:
    """What is drawn of the representation `name`, a key of simclr.REPRESENTATIONS.

    Returns components, float32 (N, ≤ 50), and knn, an accuracy in [0, 1], NaN where it cannot be
    measured. Of h also near and train_near, int64 (N, k), the most similar drawn and training
    images, never the image itself; and their cosine similarities, similarity and
    train_similarity, float32 (N, k). Raises InputError if there is nothing to see.
    """
    encoder, config, h = network.encoders[name], network.config, name == "simclr"
    shown = simclr.features(encoder, scene.shown, config, device)  # (N, D)
    if (shown == shown[0]).all():
        title = simclr.row_names(network.source.config)[name]
        raise InputError(f"nothing to draw: all images have the same features ({title})")
    components = principal_components(shown.cpu().numpy())
    results: dict[str, Any] = {"components": components, "knn": np.float64(math.nan)}
    if h:
        similarity, near = other_neighbours(shown, PAGE_NEIGHBOURS)
        results |= {"near": near, "similarity": similarity}
        # where there are no test images, the training images are the ones drawn
        train_similarity, train_near = similarity, scene.rows.to(device)[near]
    if scene.split == "test" and (scene.judged or h):
        train = simclr.features(encoder, scene.train, config, device)
        train_similarity, train_near = utils.nearest_neighbours(train, shown, simclr.KNN_NEIGHBOURS)
    if scene.judged:
        votes = scene.train.labels[train_near]
        winner = utils.knn_vote(train_similarity, votes, len(scene.classes))
        results["knn"] = np.float64(utils.accuracy(winner, scene.shown.labels))
    if h:
        results["train_near"] = train_near[:, :TRAIN_NEIGHBOURS]
        results["train_similarity"] = train_similarity[:, :TRAIN_NEIGHBOURS]
    return {key: torch.as_tensor(value).cpu().numpy() for key, value in results.items()}


def other_neighbours(features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """utils.nearest_neighbours() among the rows (N, D) themselves, without each row itself."""
    similarity, rows = utils.nearest_neighbours(features, features, k + 1)
    own = rows == torch.arange(len(rows), device=rows.device)[:, None]
    own[~own.any(1), -1] = True  # of many equal images an image itself may not be among the first
    return similarity[~own].view(len(rows), -1), rows[~own].view(len(rows), -1)


def principal_components(features: np.ndarray) -> np.ndarray:
    """The first 50 principal components of (N, D), zeros if fewer than 2: float32 (N, 2 to 50)."""
    pca = PCA(min(COMPONENTS, *features.shape), random_state=0)
    components = pca.fit_transform(features).astype(np.float32)
    return np.pad(components, ((0, 0), (0, max(0, 2 - components.shape[1]))))


# ---------------------------------------------------------------------------- positions by t-SNE

# of Barnes-Hut, scikit-learn's is 0.5: on 10,000 CIFAR-10 images 0.7 takes 60 % of the time and
# gives the same KL divergence (2.613 and 2.616 after 500 steps)
ANGLE = 0.7
MOST_EPOCHS = 6  # panels of kept checkpoints that --epochs draws


def tsne(
    components: np.ndarray, perplexity: float, seed: int, start: np.ndarray | None = None
) -> np.ndarray:
    """scikit-learn's t-SNE with the cosine metric: (N, D) -> float32 (N, 2).

    start: (N, 2), an arrangement to begin with, which is largely kept; without it, the first two
    components. One thread: several would wait for each other at each of thousands of steps, ten
    times slower where other programs use the cores too. Panels are computed in parallel instead.
    """
    init = "pca" if start is None else start.astype(np.float32)
    model = TSNE(
        perplexity=perplexity, metric="cosine", init=init, random_state=seed, angle=ANGLE, n_jobs=1
    )
    with threadpool_limits(1, user_api="openmp"):  # of this thread alone
        return model.fit_transform(components)


def aligned(xy: np.ndarray, target: np.ndarray) -> np.ndarray:
    """xy (N, 2), centred, and turned or mirrored to lie as near to `target` as possible."""
    centred = xy - xy.mean(0)
    turn, _ = orthogonal_procrustes(centred, target - target.mean(0))
    return (centred @ turn).astype(np.float32)


@dataclass
class Panel:
    """One map of the images: xy float32 (N, 2); knn in [0, 1], or NaN."""

    name: str
    title: str
    xy: np.ndarray
    knn: float

    def __str__(self) -> str:
        accuracy = f" · kNN {utils.accuracy_text(self.knn, len(self.xy))}"
        return self.title + accuracy * (not math.isnan(self.knn))


@dataclass
class Embedding:
    """Computes the maps of a scene. cache: a folder of positions that were computed before."""

    network: Network
    scene: Scene
    options: Options
    device: torch.device
    cache: Path

    def features(self, network: Network, name: str) -> Arrays:
        """features_of() the representation `name` by a network of the run."""
        epoch = "" if network is self.network else f", epoch {network.source.epoch}"
        with stage(f"features, {simclr.row_names(network.source.config)[name]}{epoch}"):
            return features_of(network, name, self.scene, self.device)

    def positions(
        self, network: Network, features: Arrays, name: str, start: np.ndarray | None = None
    ) -> np.ndarray:
        """float32 (N, 2), not aligned. start: an arrangement (N, 2) for t-SNE to begin with."""
        options, config, shown = self.options, network.config, self.scene.shown
        if options.method == "pca":
            return features["components"][:, :2]
        arguments = (features["components"], options.perplexity, options.seed, start)
        # not of the features: a GPU may compute them with other last bits
        key = [utils.file_digest(network.source.file), options.normalize, options.prefix]
        key += [config.precision, config.image_size, config.range, arguments[1:]]
        images = shown.paths if shown.images is None else shown.images.cpu().numpy()
        key += [images, self.scene.rows.numpy()]
        file = self.cache / f"tsne-{name}-{joblib.hash(key)}.npz"
        # a missing or damaged file raises many types: of zipfile, zlib, numpy and the system
        with contextlib.suppress(Exception), np.load(file, allow_pickle=False) as arrays:
            return arrays["xy"]
        with stage(f"t-SNE, {name}"):
            xy = tsne(*arguments)
        buffer = io.BytesIO()
        np.savez(buffer, xy=xy)
        utils.warn_on_failure(utils.write_atomically, file, buffer.getbuffer())
        return xy

    def panels(self) -> tuple[list[Panel], Arrays]:
        """The panels that were asked for, turned to fit h, and the features of h."""
        names = dict.fromkeys(n for n in self.options.panels if n in self.network.encoders)
        if not names:
            raise InputError(f"{self.network.source.file} holds no projection head to draw")
        features = {name: self.features(self.network, name) for name in names | {"simclr": None}}
        # t-SNE releases Python's lock. Ctrl-C ends this pool at once: its threads are daemons
        with ThreadPool(utils.cpu_cores()) as pool:
            wanted = [(self.network, features[name], name) for name in names]
            maps = pool.starmap(self.positions, wanted)
        positions = dict(zip(names, maps, strict=True))
        target = positions.get("simclr", next(iter(positions.values())))
        panels, titles = [], simclr.row_names(self.network.source.config)
        for name, xy in positions.items():
            knn = float(features[name]["knn"])
            panels.append(Panel(name, titles[name], aligned(xy, target), knn))
        return panels, features["simclr"]

    def epochs(self) -> list[Panel]:
        """h through training: untrained, the kept checkpoints (at most MOST_EPOCHS), the last.

        Each panel begins with the arrangement of the one before it and is turned to fit that.
        """
        kept = utils.kept_checkpoints(self.network.source.file.parent)
        kept = kept[:: math.ceil(len(kept) / MOST_EPOCHS)]
        networks = [load_network(file, self.device, self.options) for file in kept]
        if networks[-1].source.epoch < self.network.source.epoch:
            networks.append(self.network)
        features = self.features(self.network, "untrained")
        xy = self.positions(self.network, features, "untrained")
        panels = [Panel("epoch0", "untrained", aligned(xy, xy), float(features["knn"]))]
        for network in networks:
            epoch = network.source.epoch
            name, before = f"epoch{epoch}", panels[-1].xy
            features = self.features(network, "simclr")
            xy = aligned(self.positions(network, features, name, before), before)
            panels.append(Panel(name, f"epoch {epoch}", xy, float(features["knn"])))
        return panels


# ----------------------------------------------------------------------------- names and colours

TILE_NAME_WIDTH = 10  # characters, in neighbours.png
MARKERS = "os^DX"  # matplotlib's; the page draws the same, in this order
RIGHT, WRONG, GREY = "#0072b2", "#d55e00", "0.3"  # Okabe and Ito's blue and vermillion


def class_styles(classes: int) -> list[tuple[str, int]]:
    """A colour "#rrggbb" and the number of a marker for each class, different for any two.

    Petroff's ten colours (arXiv 2107.02270), which people with colour-vision deficiency can tell
    apart, with one marker after another; a colour map where those are too few. Images without
    classes have the first style.
    """
    palette = matplotlib.color_sequences["petroff10"]
    if classes > len(palette) * len(MARKERS):
        hues = np.linspace(0.05, 0.95, math.ceil(classes / len(MARKERS)))
        palette = matplotlib.colormaps["turbo"](hues)
    count = len(palette)
    return [(to_hex(palette[c % count]), c // count) for c in range(max(1, classes))]


# --------------------------------------------------------------------------------------- figures

PANEL_INCHES = 2.7
LEGEND_ROW_INCHES = 0.14
MOST_COLUMNS = 4
DPI = 200
MOST_VECTOR_POINTS = 2000  # a panel of more becomes pixels in PDF and SVG
MOST_NAMES = 10  # classes: up to here the names stand on the maps too
MOST_LEGEND = 200  # classes: more would leave no room for the panels
CHARACTER_WIDTH = 0.0565  # of a name on a map, which is 2 wide
NAME_RADIUS = 0.1  # standard deviation of the kernel that estimates a class's density
NAME_ROWS = np.linspace(-0.95, 0.95, 20).tolist()  # heights at which names stand
GRID_FILL = 0.35  # share of the thumbnails' grid that holds an image
GRID_PIXELS = 3000  # side of the grid
CELL_PIXELS = (16, 72)  # least and most
FRAME_SHARE = 0.08  # of a cell's side
QUERIES = 6  # random ones, and as many of the worst
TILE_INCHES = 0.62


def unit_square(xy: np.ndarray) -> np.ndarray:
    """xy (N, 2) moved and scaled into [-1, 1]², its shape kept."""
    centred = xy - (xy.max(0) + xy.min(0)) / 2
    return centred / (np.abs(centred).max() or 1)


def name_places(xy: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> list[tuple]:
    """Where the names of classes stand on a map: (class, x, y), no name on another.

    xy: in [-1, 1]². A name stands as near as it can to where its class is densest. A class without
    images has none. There are none where there are more than MOST_NAMES classes.
    """
    if not 0 < len(names) <= MOST_NAMES:
        return []
    halves = [min(1, CHARACTER_WIDTH * utils.text_width(name) / 2) for name in names]
    places: list[tuple] = []
    for label in np.unique(labels).tolist():
        own, half = xy[labels == label], halves[label]
        own = own[:: 1 + len(own) // 1000]  # enough to estimate a density
        squares = np.square(own[:, None] - own).sum(-1)  # (M, M) squared distances
        x, y = own[np.exp(-squares / (2 * NAME_RADIUS**2)).sum(1).argmax()].tolist()
        x = min(max(x, half - 1), 1 - half)  # the name stays inside the map
        taken = [row for other, at, row in places if abs(x - at) <= half + halves[other]]
        free = [row for row in NAME_ROWS if row not in taken]
        places.append((label, round(x, 4), min(free, key=lambda row: abs(row - y))))
    return places


def figure_with_legend(width: float, height: float, scene: Scene, caption: str) -> Figure:
    """A matplotlib Figure of that size in inches; below come the caption and the classes."""
    names = scene.names if len(scene.names) <= MOST_LEGEND else []
    entry = 0.35 + 0.068 * max(map(utils.text_width, names), default=1)  # inches
    columns = max(1, min(len(names), int(width / entry)))
    height += 0.25 + LEGEND_ROW_INCHES * math.ceil(len(names) / columns)
    figure = Figure(figsize=(width, height), layout="compressed")
    handles = [
        Line2D([], [], color=colour, marker=MARKERS[marker], linestyle="", markersize=5)
        for colour, marker in class_styles(len(names))[: len(names)]
    ]
    legend = figure.legend(
        handles, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=8,
        handletextpad=0.1, columnspacing=1.0, borderpad=0.1, labelspacing=0.25, title=caption,
        title_fontsize=8,
    )  # fmt: skip
    legend.get_title().set_color("0.35")
    return figure


def draw_panels(panels: Sequence[Panel], scene: Scene, caption: str) -> Figure:
    """The panels side by side, classes by colour and marker: a matplotlib Figure."""
    rows = math.ceil(len(panels) / MOST_COLUMNS)
    columns = math.ceil(len(panels) / rows)  # five panels are 3 + 2, not 4 + 1
    size = (columns * PANEL_INCHES, rows * (PANEL_INCHES + 0.2))
    figure = figure_with_legend(*size, scene, caption)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis, panel in zip(axes, panels, strict=False):
        draw_map(axis, unit_square(panel.xy), scene)
        axis.set_title(str(panel), fontsize=9.5)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    return figure


def draw_map(axis: Any, xy: np.ndarray, scene: Scene) -> None:
    """The images as points, in random order so that no class covers all others, and the names."""
    size = np.clip(0.12 * (72 * PANEL_INCHES) ** 2 / len(xy), 0.9, 12.0)  # in square points
    look = dict(s=size, linewidths=0, rasterized=len(xy) > MOST_VECTOR_POINTS)
    colours, markers = map(np.array, zip(*class_styles(len(scene.names)), strict=True))
    order = np.random.default_rng(0).permutation(len(xy))
    for number in np.unique(markers):
        chosen = order[markers[scene.labels[order]] == number]
        colour = colours[scene.labels[chosen]]
        axis.scatter(*xy[chosen].T, c=colour, marker=MARKERS[number], **look)
    # bold for any font: many have no bold face
    halo = [withStroke(linewidth=w, foreground=c) for w, c in ((2.6, "white"), (0.4, "black"))]
    for label, x, y in name_places(xy, scene.labels, scene.names):
        axis.text(x, y, scene.names[label], fontsize=8, path_effects=halo, ha="center", va="center")
    axis.set(xticks=[], yticks=[], xlim=(-1.04, 1.04), ylim=(-1.04, 1.04), aspect="equal")
    axis.spines[:].set_color("0.85")


def grid_cells(xy: np.ndarray, side: int, seed: int = 0) -> np.ndarray:
    """A cell of its own, int64 (N, 2) row and column, for each point of xy (N, 2); N ≤ side².

    In random order every point takes the nearest cell that is free.
    """
    places = (unit_square(xy)[:, ::-1] * (-1, 1) + 1) / 2 * (side - 1)  # row, column; y upwards
    free = np.mgrid[:side, :side].reshape(2, -1).astype(np.float64)  # (2, side²)
    cells = np.empty((len(xy), 2), dtype=np.int64)
    for i in np.random.default_rng(seed).permutation(len(xy)):
        j = np.square(free - places[i, :, None]).sum(0).argmin()
        cells[i] = free[:, j]
        free[:, j] = np.inf  # taken
    return cells


def draw_thumbnails(panel: Panel, scene: Scene, caption: str, seed: int) -> Figure:
    """The images on a grid, each near its place in the panel, framed in its class's colour."""
    side = math.ceil(math.sqrt(len(panel.xy) / GRID_FILL))
    cell = int(np.clip(GRID_PIXELS // side, *CELL_PIXELS))
    frame = max(1, round(FRAME_SHARE * cell))
    palette = torch.tensor([to_rgb(colour) for colour, _ in class_styles(len(scene.names))])
    row, column = torch.from_numpy(grid_cells(panel.xy, side, seed)).T
    grid = torch.full((side, side, 3, cell, cell), 255, dtype=torch.uint8)
    frames = utils.to_uint8(palette)[scene.labels]  # (N, 3)
    grid[row, column] = frames[:, :, None, None].expand(-1, -1, cell, cell)
    inner = slice(frame, cell - frame)
    grid[row, column, :, inner, inner] = small_images(scene.shown, cell - 2 * frame)
    part = grid[row.min() : row.max() + 1, column.min() : column.max() + 1]  # (R, C, 3, S, S)
    picture = make_grid(part.flatten(0, 1), part.shape[1], padding=0).permute(1, 2, 0).numpy()

    height, width = np.array(picture.shape[:2]) / DPI  # a pixel of it is one of the figure
    figure = figure_with_legend(width + 0.1, height + 0.5, scene, caption)
    axes = figure.subplots()
    axes.imshow(picture)
    axes.set_axis_off()
    axes.set_title(str(panel), fontsize=11)
    return figure


def tile_labels(scene: Scene, features: Arrays, query: int) -> list[tuple[str, str]]:
    """Text and colour of a drawn image and of its nearest training images, in this order."""
    if not scene.classes:
        return [("", GREY), *((f"{x:.2f}", GREY) for x in features["train_similarity"][query])]
    names = [utils.printable(name, TILE_NAME_WIDTH) for name in scene.names]
    own, theirs = scene.labels[query], scene.train.labels[features["train_near"][query]].tolist()
    near = [(f"✓ {names[x]}", RIGHT) if x == own else (f"✗ {names[x]}", WRONG) for x in theirs]
    return [(names[own], GREY), *near]


def draw_neighbours(scene: Scene, features: Arrays, size: int, seed: int) -> Figure:
    """Rows of an image and its nearest training images in h, each marked right or wrong.

    Images at random, and those with the fewest neighbours of their class, of these the ones with
    the most similar neighbours. size: of the images, in px.
    """
    shuffled = np.random.default_rng(seed).permutation(len(scene.rows))
    chosen = {"Random images": shuffled[:QUERIES]}  # title -> int64 (rows,)
    if scene.classes:
        train_labels = scene.train.labels.cpu().numpy()
        right = train_labels[features["train_near"]] == scene.labels[:, None]  # (N, k)
        surest = -features["train_similarity"].mean(1)
        worst = np.lexsort((surest, right.sum(1)))[:QUERIES]
        chosen["Images with the fewest neighbours of their class"] = worst
    rows, k = len(chosen["Random images"]), features["train_near"].shape[1]
    width, height = TILE_INCHES * (k + 1.2), 0.82 * rows + 0.6
    figure = Figure(figsize=(width * len(chosen), height))
    parts = figure.subfigures(1, len(chosen), squeeze=False)[0]
    for part, (title, queries) in zip(parts, chosen.items(), strict=True):
        part.suptitle(title, x=0.02, ha="left", fontsize=9, fontweight="bold", family="sans-serif")
        axes = part.subplots(rows, 1 + k, squeeze=False)
        part.subplots_adjust(0.02, 0.2 / height, 0.98, 1 - 0.5 / height, 0.06, 0.3)
        axes[0, 0].set_title("query", fontsize=7)
        header = "nearest training images" + ", cosine similarity" * (not scene.classes)
        axes[0, 1].set_title(header, fontsize=7, loc="left")
        near = torch.from_numpy(features["train_near"][queries]).flatten()
        own = small_images(utils.subset(scene.shown, torch.from_numpy(queries)), size)
        theirs = small_images(utils.subset(scene.train, near), size).unflatten(0, (rows, k))
        tiles = torch.cat([own[:, None], theirs], 1).flatten(0, 1)  # (rows · (1 + k), 3, S, S)
        labels = [label for query in queries for label in tile_labels(scene, features, query)]
        for axis, tile, (text, colour) in zip(axes.flat, tiles, labels, strict=True):
            axis.imshow(tile.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set(color=colour, linewidth=1.6)
            axis.set_xlabel(text, fontsize=5.5, color=colour, labelpad=2)
    return figure


# -------------------------------------------------------------------------------------- the page

# One file that needs no server and no network; its content policy makes sure of that. All names in
# the data reach the page as text content, never as HTML.
TEMPLATE = Path(__file__).with_name("figures") / "explorer.html"
SPRITE_PIXELS = 10_240_000  # of all images together, so that any browser can hold it
TILE_PIXELS = 96  # side of an image at most
LOSSLESS_BYTES = 2**22  # before compression; a larger sprite is compressed with loss
WEBP_QUALITY = 80


def build_page(
    panels: Sequence[Panel], scene: Scene, features: Arrays, title: str, caption: str,
    tiles: Tensor,
) -> str:  # fmt: skip
    """The whole page. features: of h. tiles: uint8 (N, 3, S, S), the images."""
    styles = class_styles(len(scene.classes))
    maps = [unit_square(panel.xy) for panel in panels]
    data = {
        "title": title,
        "caption": caption,
        "split": scene.split,
        "classes": list(scene.classes),
        "colours": [colour for colour, _ in styles],
        "markers": [marker for _, marker in styles],
        "labels": packed(scene.labels, "<u2") if scene.classes else None,
        "rows": packed(scene.rows.numpy(), "<u4"),
        "paths": None if scene.shown.paths is None else utils.image_names(scene.shown),
        "panels": [str(panel) for panel in panels],
        "xy": [packed(xy, "<f4") for xy in maps],
        "names": [name_places(xy, scene.labels, scene.classes) for xy in maps],
        "start": max(range(len(panels)), key=lambda i: panels[i].name == "simclr"),
        "near": packed(features["near"], "<u4"),
        "similarity": packed(features["similarity"], "<f4"),
        "tile": tiles.shape[-1],
        "sprite": make_sprite(tiles),
    }
    with utils.errors_as_input_error(f"cannot read {TEMPLATE}, a part of tSNE.py"):
        template = TEMPLATE.read_text(encoding="utf-8")
    text = json.dumps(data).replace("<", "\\u003c")  # nothing that ends the <script> element
    return template.replace("__DATA__", text)


def packed(array: np.ndarray, dtype: str) -> str:
    """The array's bytes in base64, for a typed array of the page."""
    return base64.b64encode(np.ascontiguousarray(array, dtype=dtype).tobytes()).decode()


def make_sprite(tiles: Tensor) -> str:
    """All images in one, about as many in a row as rows: uint8 (N, 3, S, S) -> data URI."""
    grid = make_grid(tiles, math.ceil(math.sqrt(len(tiles))), padding=0, pad_value=255)  # (3, H, W)
    picture = Image.fromarray(grid.permute(1, 2, 0).numpy())
    buffer = io.BytesIO()
    picture.save(buffer, "webp", lossless=grid.numel() <= LOSSLESS_BYTES, quality=WEBP_QUALITY)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


# ---------------------------------------------------------------------------------- command line


def parse_command_line(argv: Sequence[str] | None = None) -> tuple[str, Options]:
    """The run (see utils.find_checkpoint) and the options."""
    usage = "python tSNE.py [RUN] [--flag value ...]"
    parser = utils.OneLineParser(prog="tSNE.py", usage=usage, description=__doc__)
    parser.add_argument("run", nargs="?", default="", help="name, folder or checkpoint of a run")
    utils.add_flags(parser, Options)
    given = vars(parser.parse_args(argv))
    where, panels = given.pop("run"), tuple(given.pop("panels", Options.panels))
    options = Options(panels, **given)
    utils.check_settings(options)
    return where, options


def draw(embedding: Embedding, folder: Path, suffix: str) -> list[Path]:
    """Draws the figures and the page. suffix: of the files' names. Returns the files."""
    network, scene, options = embedding.network, embedding.scene, embedding.options
    panels, features = embedding.panels()
    strip = embedding.epochs() if options.epochs else []
    size, seed = network.config.image_size, options.seed
    method = f"t-SNE, perplexity {options.perplexity:.4g}" if options.method == "tsne" else "PCA"
    caption = f"{scene} · {method}"
    if scene.judged:
        caption += f" · kNN accuracy on the features (k = {simclr.KNN_NEIGHBOURS}, cosine)"
    with stage("figures"):
        figures = {"tsne": draw_panels(panels, scene, caption)}
        figures["neighbours"] = draw_neighbours(scene, features, size, seed)
        if strip:
            figures["tsne_epochs"] = draw_panels(strip, scene, caption)
        if options.thumbnails:
            panel = next((p for p in panels if p.name == "simclr"), panels[0])
            figures["tsne_thumbnails"] = draw_thumbnails(panel, scene, caption, seed)
        files = [folder / f"{name}{suffix}.{options.format}" for name in figures]
        for file, figure in zip(files, figures.values(), strict=True):
            utils.save_figure(figure, file, DPI)
    with stage("page"):
        fits = math.isqrt(SPRITE_PIXELS // len(scene.rows))  # side in px
        tiles = small_images(scene.shown, max(1, min(size, TILE_PIXELS, fits)))
        source = network.source
        title = f"{source.name}, epoch {source.epoch}" if source.config else source.name
        page = build_page([*panels, *strip], scene, features, title, caption, tiles)
        files.append(folder / f"tsne{suffix}.html")
        utils.write_atomically(files[-1], page.encode())
    return files


def run(where: str, options: Options) -> list[Path]:
    """What `python tSNE.py` does. Returns the files that it wrote."""
    device = utils.choose_device(options.device)
    network = load_network(utils.find_checkpoint(where, options.checkpoints), device, options)
    config, source = network.config, network.source
    folder = Path(options.figures) / source.name
    if options.epochs and not (source.config and utils.kept_checkpoints(source.file.parent)):
        why = f"{source.file.parent} has none: train with simclr.py --keep-every K"
        raise InputError(f"--epochs needs checkpoints of several epochs, and {why}")
    utils.make_folder(folder)
    print(f"{source.file}: {source.description}")
    with stage("reading the images"):
        scene = read_scene(config, options, device)
    if not config.image_size:
        config.image_size = simclr.side_of(scene.shown)
    simclr.check_size(source, config.image_size)
    most = (len(scene.rows) - 1) / 3  # t-SNE needs three times as many neighbours
    if options.method == "tsne" and options.perplexity > most:
        print(f"perplexity {most:.4g} instead of {options.perplexity:g}, for so few images")
        options.perplexity = most
    why = "" if scene.judged else ", without accuracies: there are no labelled test images"
    print(f"drawing {scene}{why}")
    # figures of other images do not replace those of the run's own
    suffix = f"-{scene.name}" * source.other_images(config)
    cache = source.output("tsne", options.figures)
    with matplotlib.rc_context(scene.style):
        return draw(Embedding(network, scene, options, device, cache), folder, suffix)


@utils.command("tSNE.py")
def main(argv: Sequence[str] | None = None) -> None:
    if utils.rank_info().rank:
        return  # of torchrun's processes only the main process draws
    with stage("in all"):
        files = run(*parse_command_line(argv))
    print("\n".join(str(path) for path in files))


if __name__ == "__main__":
    main()
