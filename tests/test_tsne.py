"""tSNE.py: what is drawn follows from the run, figure and page show it, bad input is one line.

The page is tried in a real browser (browser.py) where there is one.
"""

import base64
import itertools
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import torch
from PIL import Image
from sklearn.datasets import load_digits

import browser
import simclr
import tSNE
import utils
from conftest import ROOT, TINY

IMAGES, PERPLEXITY = 120, 8
FLAGS = ["--images", str(IMAGES), "--perplexity", str(PERPLEXITY)]
CPU = torch.device("cpu")


def train(root, **overrides):
    """A run of seconds below `root`; returns its configuration, resolved."""
    places = dict(checkpoints=str(root / "c"), figures=str(root / "f"))
    config = simclr.make_config(**{**TINY, "knn_every": 0, **places, **overrides})
    data = simclr.load_data(config, CPU)
    config = simclr.resolve(config, data.pretrain, CPU)
    simclr.pretrain(config, data, CPU)
    return config


@pytest.fixture(scope="module")
def run(finished, tmp_path_factory):
    """A copy of the run on the digits, which kept its epochs, for the cache and the figures.

    config: resolved; folder: of its checkpoints; places: flags.
    """
    root = tmp_path_factory.mktemp("run")
    shutil.copytree(finished.folder, root / "c" / finished.config.run)
    places = dict(checkpoints=str(root / "c"), figures=str(root / "f"))
    trained = simclr.load_run(finished.folder / "last.pt").config
    config = simclr.dataclasses.replace(trained, **places)
    flags = [word for name, place in places.items() for word in (f"--{name}", place)]
    return SimpleNamespace(config=config, folder=config.folder, places=flags)


@pytest.fixture(scope="module")
def drawn(run, tmp_path_factory):
    """What the command says and draws."""
    command = [sys.executable, str(ROOT / "tSNE.py"), *run.places, *FLAGS]
    command += ["--thumbnails", "--epochs"]
    where = tmp_path_factory.mktemp("elsewhere")
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not list(where.iterdir())
    return SimpleNamespace(said=done.stdout, figures=run.config.figure_folder)


def embedding(run, *flags):
    where, options = tSNE.parse_command_line([*run.places, *FLAGS, *flags])
    file = simclr.find_checkpoint(where, options.checkpoints)
    return tSNE.Embedding(simclr.load_run(file), file, options)


# ------------------------------------------------------------------------------------- the whole


def test_the_command_draws_the_newest_run(run, drawn):
    for name in ("tsne", "neighbours", "tsne_thumbnails", "tsne_epochs"):
        image = Image.open(drawn.figures / f"{name}.png").convert("RGB")
        assert min(image.size) > 250
        assert len(image.getcolors(image.width * image.height)) > 50
        assert (np.asarray(image)[:, [0, -1]] == 255).all()  # nothing is cut off
    page = (drawn.figures / "tsne.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "http" not in page.replace("http-equiv", "")  # nothing is fetched
    assert f"drawing {IMAGES} test images of digits" in drawn.said
    for stage in (
        "features, SimCLR h",
        "t-SNE, pixels, untrained, simclr, projection",
        "t-SNE, epoch 2",
        "figures",
        "page",
    ):
        assert re.search(rf"^{stage} +\d+\.\d s$", drawn.said, re.MULTILINE)


def test_accuracies_in_the_titles_are_those_of_simclr(run, drawn):
    chosen = embedding(run)
    panels, _ = chosen.panels()
    trained = simclr.load_run(run.folder / "last.pt")
    encoders = simclr.encoders(trained.model, trained.config, CPU)
    for panel in panels:
        expected = simclr.knn_accuracy(encoders[panel.name], chosen.scene.data, trained.config, CPU)
        assert panel.knn == expected
        assert panel.note == f"kNN {100 * expected:.1f} %"
    assert [p.name for p in panels] == list(simclr.REPRESENTATIONS)
    assert len({p.note for p in panels}) > 1


def test_epochs_begin_with_the_untrained_encoder_and_lie_on_each_other(run, drawn):
    strip = embedding(run, "--epochs").epochs()
    assert [p.title for p in strip] == ["untrained", *(f"epoch {i}" for i in range(1, 5))]
    for before, panel in itertools.pairwise(strip):
        # no turn or reflection fits the panel before better
        best, _ = scipy.linalg.orthogonal_procrustes(panel.xy, before.xy - before.xy.mean(0))
        np.testing.assert_allclose(best, np.eye(2), atol=1e-3)


def test_formats_and_panels(run, drawn, tmp_path):
    panels = ["--panels", "projection", "pixels"]
    tSNE.main([*run.places[:2], "--figures", str(tmp_path), *FLAGS, "--format", "pdf", *panels])
    for name in ("tsne", "neighbours"):
        assert (tmp_path / run.config.run / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    panels, _ = embedding(run, "--panels", "projection", "pixels", "projection").panels()
    assert [p.name for p in panels] == ["projection", "pixels"]


# ----------------------------------------------------------------------------------- the cache


@pytest.fixture
def work(monkeypatch):
    """Counts what is computed rather than taken from the cache."""
    done = {"study": 0, "tsne": 0}

    def counting(name, function):
        def call(*args, **kwargs):
            done[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(tSNE, name, call)

    counting("study", tSNE.study)
    counting("tsne", tSNE.tsne)
    return done


def test_what_took_long_is_kept_until_something_changes(run, drawn, work):
    first = embedding(run, "--epochs")
    panels, _ = first.panels()
    first.epochs()
    assert work == {"study": 0, "tsne": 0}  # all computed by the command

    embedding(run, "--perplexity", "9").panels()
    assert work == {"study": 0, "tsne": 4}
    embedding(run, "--images", "100", "--panels", "pixels").panels()
    assert work == {"study": 2, "tsne": 5}  # pixels, and h for its neighbours
    first.cache.file("tsne-pixels", "").parent.joinpath("other.npz").write_text("not ours")

    for file in first.cache.folder.glob("tsne-pixels-*.npz"):
        file.write_bytes(file.read_bytes()[:200])  # damaged: computed again, and the same
    again, _ = embedding(run).panels()
    assert work == {"study": 2, "tsne": 6}
    for old, new in zip(panels, again, strict=True):
        np.testing.assert_array_equal(old.xy, new.xy)


def test_another_checkpoint_or_other_images_are_not_mistaken(run, drawn, work, tmp_path):
    other = tmp_path / "other.pt"
    state = utils.load_checkpoint(run.folder / "last.pt")
    state["model"]["encoder.conv1.weight"] += 0.01
    utils.save_checkpoint(other, state)
    _where, options = tSNE.parse_command_line([str(other), *FLAGS, "--method", "pca"])
    tSNE.Embedding(simclr.load_run(other), other, options).panels()
    assert work == {"study": 4, "tsne": 0}

    chosen = embedding(run)
    before = tSNE.scene_digest(chosen.scene)
    assert tSNE.scene_digest(embedding(run).scene) == before
    chosen.scene.shown.images[3, 0, 5, 5] ^= 1
    assert tSNE.scene_digest(chosen.scene) != before
    assert tSNE.scene_digest(embedding(run, "--seed", "1").scene) != before


# --------------------------------------------------------------------------------------- the maths


@pytest.fixture(scope="module")
def points():
    """float32 (150, 64): digits."""
    return load_digits().data[:150].astype(np.float32)


@pytest.mark.parametrize("shape", [(150, 64), (150, 20), (12, 64)])
def test_principal_components_are_those_of_the_svd(points, shape):
    x = points[: shape[0], : shape[1]]
    ours = tSNE.principal_components(x)
    k = min(50, *shape)
    assert ours.shape == (shape[0], k)
    u, singular, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    expected = (u * singular)[:, :k]
    signs = np.sign((ours * expected).sum(0))
    np.testing.assert_allclose(ours * signs, expected, atol=2e-3 * singular[0])
    np.testing.assert_array_equal(ours, tSNE.principal_components(x))
    one = tSNE.principal_components(x[:, 10:11])  # one dimension is drawn as a line
    assert one.shape == (shape[0], 2)
    assert (one[:, 1] == 0).all()


def test_tsne_follows_from_its_seed_and_keeps_neighbours(points):
    x = tSNE.principal_components(points)
    xy = tSNE.tsne(x, 8, seed=0)
    assert xy.shape == (150, 2)
    np.testing.assert_array_equal(xy, tSNE.tsne(x, 8, seed=0))
    labels = load_digits().target[:150]
    near = scipy.spatial.KDTree(xy).query(xy, 2)[1][:, 1]
    assert (labels[near] == labels).mean() > 0.85


def test_tsne_keeps_the_arrangement_that_it_is_given(points):
    x = tSNE.principal_components(points)
    noise = np.random.default_rng(0).normal(size=x.shape) * 0.2 * x.std()
    xy = tSNE.tsne(x, 8, seed=0)

    def moved(**start):
        again = tSNE.aligned(tSNE.tsne(x + noise.astype(np.float32), 8, seed=0, **start), xy)
        return np.square(again - tSNE.aligned(xy, xy)).sum() / np.square(xy - xy.mean(0)).sum()

    assert moved(start=xy) < 0.2
    assert moved() > 0.5


def test_alignment_is_orthogonal_procrustes():
    random = np.random.default_rng(0)
    target, xy = random.normal(size=(2, 40, 2)) * [[[3.0, 1.0]]] + 5
    centred = xy - xy.mean(0)
    turn, _ = scipy.linalg.orthogonal_procrustes(centred, target - target.mean(0))
    np.testing.assert_allclose(tSNE.aligned(xy, target), centred @ turn, atol=1e-5)
    turned = target @ np.array([[0.6, 0.8], [0.8, -0.6]]) - 7  # a reflection
    np.testing.assert_allclose(tSNE.aligned(turned, target), target - target.mean(0), atol=1e-5)


@pytest.mark.parametrize(("count", "side"), [(60, 9), (81, 9), (1, 1), (3, 40)])
def test_thumbnails_take_the_nearest_free_cell(count, side):
    xy = np.random.default_rng(1).normal(size=(count, 2)) ** 3  # crowded in the middle
    cells = tSNE.grid_cells(xy, side, seed=2)
    assert len({tuple(cell) for cell in cells}) == count
    assert cells.min() >= 0
    assert cells.max() < side
    # replayed by brute force
    span = np.ptp(xy, axis=0).max() or 1
    unit = (xy - (xy.max(0) + xy.min(0)) / 2) / span + 0.5
    wanted = np.stack([1 - unit[:, 1], unit[:, 0]], 1) * (side - 1)
    taken = set()
    for i in np.random.default_rng(2).permutation(count):
        free = [(r, c) for r in range(side) for c in range(side) if (r, c) not in taken]
        distances = [np.hypot(*(wanted[i] - cell)) for cell in free]
        assert np.hypot(*(wanted[i] - cells[i])) == pytest.approx(min(distances))
        taken.add(tuple(cells[i]))


def test_neighbours_are_the_most_similar_other_images(run, drawn):
    chosen = embedding(run)
    _, found = chosen.panels()
    model = simclr.load_run(run.folder / "last.pt").model
    shown, training = (
        simclr.features(model.encoder, data, run.config, CPU).double()
        for data in (chosen.scene.shown, chosen.scene.train)
    )
    for bank, k, rows, values in (
        (shown, 10, found["near"], found["similarity"]),
        (training, 8, found["train_near"], found["train_similarity"]),
    ):
        cosine = torch.nn.functional.cosine_similarity(shown[:, None], bank[None], dim=2)
        if bank is shown:
            cosine.fill_diagonal_(-2)
        expected = cosine.topk(k, dim=1).values
        np.testing.assert_allclose(values, expected, atol=1e-5)
        np.testing.assert_allclose(cosine.gather(1, torch.from_numpy(rows)), expected, atol=1e-5)


def test_an_image_is_never_its_own_neighbour_even_among_equal_ones():
    features = torch.tensor([[1.0, 0.0]] * 5 + [[0.0, 1.0]])
    similarity, rows = tSNE.other_neighbours(features, 3)
    assert rows.shape == similarity.shape == (6, 3)
    assert not (rows == torch.arange(6)[:, None]).any()
    assert torch.equal(similarity[:5], torch.ones(5, 3))
    assert torch.equal(similarity[5], torch.zeros(3))


# -------------------------------------------------------------------------------------- appearance


@pytest.mark.parametrize("classes", [1, 2, 8, 10, 11, 100, 150])
def test_no_two_classes_look_alike(classes):
    styles = tSNE.class_styles(classes)
    assert len(set(styles)) == classes
    assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour, _ in styles)
    assert all(0 <= marker < len(tSNE.MARKERS) for _, marker in styles)


def test_ten_classes_differ_with_colour_vision_deficiency():
    # Machado et al. 2009, severity 1: protanopia, deuteranopia, tritanopia, in linear RGB
    kinds = np.array([
        [0.152286, 1.052583, -0.204868, 0.114503, 0.786281, 0.099216,
         -0.003882, -0.048116, 1.051998],
        [0.367322, 0.860646, -0.227968, 0.280085, 0.672501, 0.047413,
         -0.011820, 0.042940, 0.968881],
        [1.255528, -0.076749, -0.178779, -0.078411, 0.930809, 0.147602,
         0.004733, 0.691367, 0.303900],
    ]).reshape(3, 3, 3)  # fmt: skip
    srgb = torch.stack([tSNE.rgb(colour) for colour, _ in tSNE.class_styles(10)]).numpy() / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    for kind in (np.eye(3), *kinds):
        lab = oklab((linear @ kind.T).clip(0, 1))
        distances = scipy.spatial.distance.pdist(lab)
        assert distances.min() > 0.04


def oklab(linear):
    """Linear RGB (…, 3) to OKLab."""
    m1 = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
          [0.0883024619, 0.2817188376, 0.6299787005]]  # fmt: skip
    m2 = [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
          [0.0259040371, 0.7827717662, -0.8086757660]]  # fmt: skip
    return np.cbrt(linear @ np.transpose(m1)) @ np.transpose(m2)


@pytest.mark.parametrize("colour", [(0.7, 0.1, 0.25), (0.52, 0.08, 0.6)])
def test_oklch_is_the_inverse_of_oklab(colour):
    lightness, chroma, turns = colour
    srgb = tSNE.rgb(tSNE.oklch(*colour)).numpy() / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    angle = 2 * np.pi * turns
    expected = [lightness, chroma * np.cos(angle), chroma * np.sin(angle)]
    np.testing.assert_allclose(oklab(linear), expected, atol=4e-3)


HARMLESS = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "$x^{$",
    "_a\n\u2028b",
)


def odd_scene(classes=HARMLESS, count=40):
    """Noise whose classes have names that mean something to HTML, JavaScript and matplotlib."""
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, 8, 8), generator=random, dtype=torch.uint8)
    labels = torch.arange(count) % len(classes)
    data = utils.ImageSet(images, labels, tuple(classes))
    scene = tSNE.Scene(data, torch.arange(count), "test", data, "odd")
    found = tSNE.study(utils.flat_pixels, scene, simclr.make_config(image_size=8), CPU, True)
    panel = tSNE.Panel("simclr", "SimCLR h", found["components"][:, :2], 0.5)
    return scene, found, panel


@pytest.mark.parametrize("classes", [HARMLESS, [f"class {i}" for i in range(37)], ["a"]])
def test_figures_take_any_names_and_numbers_of_classes(classes, tmp_path):
    scene, found, panel = odd_scene(classes)
    figures = [
        tSNE.draw_panels([panel], scene, "caption"),
        tSNE.draw_thumbnails(panel, scene, CPU, 0),
        tSNE.draw_neighbours(scene, found, simclr.make_config(image_size=8), 0),
    ]
    for i, figure in enumerate(figures):
        utils.save_figure(figure, tmp_path / f"{i}.svg")
    texts = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert texts == [tSNE.printable(name) for name in classes]


def test_large_sets_of_images_make_a_page_of_limited_size():
    assert tSNE.tile_side(10_000, 32) == 32
    assert tSNE.tile_side(10_000, 224) == 32
    assert tSNE.tile_side(360, 224) == tSNE.TILE_PIXELS
    for count in (2, 1000, 100_000):
        assert tSNE.tile_side(count, 224) ** 2 * count <= tSNE.SPRITE_PIXELS


def test_the_sprite_holds_each_image_in_its_place():
    tiles = torch.randint(256, (7, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    uri, columns = tSNE.make_sprite(tiles.to(torch.uint8))
    picture = np.asarray(Image.open(tSNE.io.BytesIO(base64.b64decode(uri.split(",")[1]))))
    for i, tile in enumerate(tiles):
        row, column = divmod(i, columns)
        part = picture[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        np.testing.assert_array_equal(part, tile.permute(1, 2, 0))


# --------------------------------------------------------------------------------- one's own images


def test_unlabelled_images_are_drawn_without_colours(tmp_path, write_image, capsys):
    for i in range(16):
        size = (12, 12) if i % 2 else (20, 14)  # streamed, and their paths shown
        write_image(tmp_path / "photos" / f"{i}.png", size, seed=i)
    photos = dict(dataset="folder", data_dir=str(tmp_path / "photos"), image_size=8)
    config = train(tmp_path, **photos, epochs=1, batch_size=8, workers=0, warmup_epochs=0.0)
    capsys.readouterr()
    tSNE.main(
        ["--checkpoints", config.checkpoints, "--figures", config.figures, "--perplexity", "4"]
    )
    said = capsys.readouterr().out
    assert "drawing 16 unlabelled training images of photos" in said
    assert "without colours and accuracies, since they have no labels" in said
    assert "kNN" not in said
    page = (config.figure_folder / "tsne.html").read_text(encoding="utf-8")
    assert '"labels": null' in page
    assert '"7.png"' in page
    assert (config.figure_folder / "tsne.png").exists()
    assert (config.figure_folder / "neighbours.png").exists()


def test_images_that_cannot_be_read_are_named_and_left_out(tmp_path, write_image, capsys):
    for i in range(16):
        write_image(tmp_path / "photos" / f"{i}.png", (20, 14 + i % 2), seed=i)  # streamed
    photos = dict(dataset="folder", data_dir=str(tmp_path / "photos"), image_size=8, max_bad=0.1)
    config = train(tmp_path, **photos, epochs=1, batch_size=8, workers=0, warmup_epochs=0.0)
    (tmp_path / "photos" / "7.png").write_bytes(b"no image")
    capsys.readouterr()
    places = ["--checkpoints", config.checkpoints, "--figures", config.figures]
    tSNE.main([*places, "--method", "pca"])
    said = capsys.readouterr()
    assert "drawing 15 unlabelled training images of photos" in said.out
    assert "7.png" in said.err + said.out
    page = (config.figure_folder / "tsne.html").read_text(encoding="utf-8")
    assert '"8.png"' in page
    assert '"7.png"' not in page


def test_training_images_with_labels_have_colours_but_no_accuracy(tmp_path, write_image, capsys):
    for i in range(16):
        write_image(tmp_path / "photos" / "train" / "ab"[i % 2] / f"{i}.png", seed=i)
    photos = dict(dataset="folder", data_dir=str(tmp_path / "photos"))
    config = train(tmp_path, **photos, epochs=1, batch_size=8, warmup_epochs=0.0)
    places = ["--checkpoints", config.checkpoints, "--figures", config.figures]
    tSNE.main([*places, "--method", "pca"])
    said = capsys.readouterr().out
    assert "drawing 16 training images of photos" in said
    assert "without accuracies, since no labelled images were held out" in said
    where, options = tSNE.parse_command_line([*places, "--method", "pca"])
    file = simclr.find_checkpoint(where, options.checkpoints)
    panels, found = tSNE.Embedding(simclr.load_run(file), file, options).panels()
    assert all(panel.knn is None for panel in panels)
    assert not (found["train_near"] == np.arange(16)[:, None]).any()


# -------------------------------------------------------------------------------------- bad input


def fails(capsys, *argv):
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        tSNE.main(argv)
    assert left.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("tSNE.py: error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--panels pixels attention", "invalid choice: 'attention'"),
        ("--panels", "expected at least one argument"),
        ("--images 1", "--images must be 2 or more, got 1"),
        ("--seed -1", "--seed must be 0 or more"),
        ("--perplexity 0.5", "--perplexity must be 1 or more, got 0.5"),
        ("--perplexity nan", "--perplexity must be 1 or more, got nan"),
        ("--perplexity 50", "120 images are too few for a perplexity of 50"),
        ("--perplexity 50", "use --perplexity 39 at most, or --method pca"),
        ("--images 3", "use --method pca"),
        ("--format bmp", "invalid choice: 'bmp'"),
        ("--method umap", "invalid choice: 'umap'"),
        ("--device warp", "--device warp is not available here"),
        ("somebody", "somebody is neither a checkpoint nor a run under"),
    ],
)
def test_bad_input_is_one_line(run, capsys, argv, message):
    assert message in fails(capsys, *run.places, *FLAGS, *argv.split())


def test_no_run_and_no_epochs(run, capsys, tmp_path):
    assert "no run under" in fails(capsys, "--checkpoints", str(tmp_path))
    lonely = tmp_path / "lonely.pt"
    lonely.write_bytes((run.folder / "last.pt").read_bytes())
    assert "has none: train with simclr.py --keep-every K" in fails(
        capsys, str(lonely), "--epochs", "--figures", str(tmp_path / "f")
    )


def test_output_that_cannot_be_written(run, drawn, capsys, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("a file where the folder should be")
    assert "cannot write" in fails(capsys, *run.places[:2], "--figures", str(blocked))
    (tmp_path / "f" / run.config.run / "tsne.png").mkdir(parents=True)
    argv = (*run.places[:2], *FLAGS, "--figures", str(tmp_path / "f"))
    assert "cannot write" in fails(capsys, *argv)


def test_images_that_are_all_alike(run, capsys, tmp_path):
    black = torch.zeros(40, 3, 16, 16, dtype=torch.uint8)
    chosen = embedding(run)
    chosen.scene.shown.images[:] = 0
    chosen.data_key = "black"
    with pytest.raises(
        utils.InputError, match="nothing to draw: by raw pixels all images are alike"
    ):
        chosen.panels()
    assert len(black) == 40


# --------------------------------------------------------------------- augmentation and kept epochs


def test_the_sheet_of_views_shows_images_and_their_augmentation(tmp_path, capsys):
    file = tmp_path / "views.png"
    simclr.main(["--show-views", str(file), "--checkpoints", str(tmp_path / "c")])
    assert str(file) in capsys.readouterr().out
    assert not (tmp_path / "c").exists()  # nothing was trained
    first = file.read_bytes()
    assert min(Image.open(file).size) > 500
    simclr.main(["--show-views", str(file)])
    assert file.read_bytes() == first
    simclr.main(
        ["--show-views", str(file), "--crop-min", "1", "--rotation", "0", "--jitter-p", "0"]
    )
    picture = np.asarray(Image.open(file).convert("L"))
    assert file.read_bytes() != first
    assert picture.std() > 10


def test_views_without_augmentation_are_the_image(tiny_config):
    config = tiny_config(crop_min=1.0, rotation=0.0, jitter_p=0.0)
    data = utils.load_images("digits", "pretrain")
    config = simclr.resolve(config, data, CPU)
    figure = simclr.draw_views(config, data, CPU)
    picture = figure.axes[0].get_images()[0].get_array()
    step = picture.shape[1] // 9
    for i in range(1, 9):  # a crop of all the area may still lack a row or column
        difference = picture[:, i * step : (i + 1) * step].astype(int) - picture[:, :step]
        assert np.abs(difference).mean() < 30


@pytest.mark.parametrize("name", ["views.txt", "views"])
def test_a_sheet_of_an_unknown_format_is_refused(tmp_path, capsys, name):
    with pytest.raises(SystemExit) as left:
        simclr.main(["--show-views", str(tmp_path / name)])
    assert left.value.code == 2
    assert "the file's ending must be one of" in capsys.readouterr().err


def test_kept_epochs_are_checkpoints_and_go_when_the_run_is_overwritten(
    run, small_config, monkeypatch
):
    files = simclr.kept_checkpoints(run.folder)
    assert [file.name for file in files] == [f"epoch000{i}.pt" for i in range(1, 5)]
    runs = [simclr.load_run(file) for file in files]
    assert [r.epoch for r in runs] == [1, 2, 3, 4]
    last = simclr.load_run(run.folder / "last.pt")
    for name, value in last.model.state_dict().items():
        assert torch.equal(value, runs[3].model.state_dict()[name])
    assert not torch.equal(runs[0].model.encoder.conv1.weight, runs[1].model.encoder.conv1.weight)
    monkeypatch.setattr(simclr, "evaluate", lambda *_: {})  # takes long
    config = small_config(keep_every=2, epochs=3)
    simclr.run(config)
    assert [file.name for file in simclr.kept_checkpoints(config.folder)] == ["epoch0002.pt"]
    simclr.run(simclr.dataclasses.replace(config, keep_every=0, epochs=1), overwrite=True)
    assert simclr.kept_checkpoints(config.folder) == []


# -------------------------------------------------------------------------------- in a real browser

needs_browser = pytest.mark.skipif(browser.WHY_NOT is not None, reason=str(browser.WHY_NOT))


@pytest.fixture(scope="module")
def chrome(tmp_path_factory):
    with browser.Browser(tmp_path_factory.mktemp("profile"), 1100, 760) as window:
        yield window


@pytest.fixture
def page(chrome, drawn):
    chrome.open(drawn.figures / "tsne.html")
    return chrome


def place(window, i):
    """Where image i is in the window, in CSS px."""
    box = "document.getElementById('map').getBoundingClientRect()"
    point = window.run(f"explorer.screenOf({i})")
    left, top = window.run(f"[{box}.left, {box}.top]")
    return left + point["x"], top + point["y"]


def text(window, selector):
    return window.run(f"document.querySelector({selector!r}).textContent")


def state(window):
    return window.run("explorer.state()")


def pixels_of(window, colour):
    """How many pixels of the map are exactly of a colour "#rrggbb"."""
    r, g, b = tSNE.rgb(colour).tolist()
    window.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return window.run(
        "(() => { const c = document.getElementById('map'); let n = 0;"
        "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "for (let i = 0; i < d.length; i += 4)"
        f"if (d[i] === {r} && d[i + 1] === {g} && d[i + 2] === {b} && d[i + 3] === 255) n++;"
        "return n; })()"
    )


def alone(window, layout):
    """An image that no other covers on the map, of a panel's positions (N, 2)."""
    distances = scipy.spatial.distance.squareform(scipy.spatial.distance.pdist(layout))
    np.fill_diagonal(distances, np.inf)
    return int(distances.min(1).argmax())


@needs_browser
def test_hovering_shows_the_image_its_class_and_number(page, run):
    chosen = embedding(run)
    panels, _ = chosen.panels()
    i = alone(page, panels[2].xy)
    assert page.run("document.getElementById('tip').hidden")
    page.pointer(place(page, i))
    page.wait_for("!document.getElementById('tip').hidden")
    label = chosen.scene.shown.classes[chosen.scene.labels[i]]
    assert text(page, "#tip") == f"{label}test image {chosen.scene.rows[i]}"
    # the picture is the image
    shown = page.run(
        "Array.from(document.querySelector('#tip canvas').getContext('2d')"
        ".getImageData(0, 0, 96, 96).data)"
    )
    shown = np.array(shown).reshape(96, 96, 4)[3::6, 3::6, :3]  # 16 px, six times as large
    np.testing.assert_array_equal(shown, chosen.scene.shown.images[i].permute(1, 2, 0))
    page.pointer((8, 8))
    page.wait_for("document.getElementById('tip').hidden")
    assert page.log() == []


@needs_browser
def test_clicking_pins_and_shows_neighbours_and_escape_unpins(page, run):
    chosen = embedding(run)
    panels, found = chosen.panels()
    i = alone(page, panels[2].xy)
    page.pointer(place(page, i), click=True)
    page.wait_for(f"explorer.state().pinned === {i}")
    labels, classes = chosen.scene.labels, chosen.scene.shown.classes
    cards = page.run(
        "Array.from(document.querySelectorAll('#neighbours button'))"
        ".map((b) => [b.textContent, b.className])"
    )
    assert len(cards) == 10
    for (words, look), n, value in zip(
        cards, found["near"][i], found["similarity"][i], strict=True
    ):
        same = labels[n] == labels[i]
        assert words == f"{'✓' if same else '✗'} {value:.3f}{classes[labels[n]]}"
        assert look == ("same" if same else "other")
    agreeing = (labels[found["near"][i]] == labels[i]).sum()
    assert f"{agreeing} of 10 are of its class" in text(page, "#agreement")

    page.click("#neighbours button")
    assert state(page)["pinned"] == found["near"][i][0]
    page.press("Escape")
    assert state(page)["pinned"] == -1
    assert page.run("document.getElementById('pinned').hidden")
    page.run("document.getElementById('map').focus()")
    page.press("Enter")  # the one nearest to the middle
    assert state(page)["pinned"] >= 0


@needs_browser
def test_the_legend_hides_classes_from_view_and_from_the_mouse(page, run):
    chosen = embedding(run)
    panels, _ = chosen.panels()
    i = alone(page, panels[2].xy)
    label = int(chosen.scene.labels[i])
    colour = tSNE.class_styles(10)[label][0]
    button = f"#legend button:nth-child({label + 1})"
    assert text(page, "#count") == f"{IMAGES} images"
    assert pixels_of(page, colour) > 0
    page.click(button)
    assert page.run(f"document.querySelector({button!r}).getAttribute('aria-pressed')") == "false"
    left = (chosen.scene.labels != label).sum()
    assert text(page, "#count") == f"{left} of {IMAGES} images"
    assert pixels_of(page, colour) == 0
    page.pointer(place(page, i))
    assert state(page)["hovered"] != i
    page.click("#none")
    assert text(page, "#count") == f"0 of {IMAGES} images"
    page.click("#all")
    assert text(page, "#count") == f"{IMAGES} images"
    assert pixels_of(page, colour) > 0


@needs_browser
def test_the_filter_leaves_images_among_other_classes(page, run):
    chosen = embedding(run)
    _, found = chosen.panels()
    labels = chosen.scene.labels
    mixed = (labels[found["near"]] == labels[:, None]).sum(1) < 5
    assert text(page, "#mixedcount") == str(mixed.sum())
    page.click("#mixed")
    assert text(page, "#count") == f"{mixed.sum()} of {IMAGES} images"
    for i in np.flatnonzero(~mixed)[:5]:
        page.pointer(place(page, i))
        assert state(page)["hovered"] != i
    page.click("#mixed")
    assert text(page, "#count") == f"{IMAGES} images"


@needs_browser
def test_switching_the_panel_moves_the_points(page, run):
    panels, _ = embedding(run).panels()
    scale = page.run("0.47 * Math.min(document.getElementById('map').clientWidth,"
                     "document.getElementById('map').clientHeight)")  # fmt: skip

    def at():
        points = page.run(f"Array.from({{length: {IMAGES}}}, (_, i) => explorer.screenOf(i))")
        xy = np.array([[p["x"], -p["y"]] for p in points])
        return (xy - (xy.max(0) + xy.min(0)) / 2) / scale

    def pressed():
        return page.run(
            "Array.from(document.querySelectorAll('#panels button'))"
            ".map((b) => b.getAttribute('aria-pressed')).indexOf('true')"
        )

    np.testing.assert_allclose(at(), tSNE.unit_square(panels[2].xy), atol=1e-3)
    assert pressed() == 2
    page.click("#panels button:nth-child(1)")
    assert state(page)["moving"]
    page.wait_for("!explorer.state().moving")
    np.testing.assert_allclose(at(), tSNE.unit_square(panels[0].xy), atol=1e-3)
    assert pressed() == 0
    assert panels[0].note in text(page, "#panels button:nth-child(1)")
    page.press("4")
    page.wait_for("!explorer.state().moving")
    assert pressed() == 3
    np.testing.assert_allclose(at(), tSNE.unit_square(panels[3].xy), atol=1e-3)
    page.press("[")
    assert pressed() == 2
    assert len(page.run("Array.from(document.querySelectorAll('#panels button'))")) == 9  # epochs


@needs_browser
def test_wheel_drag_and_keys_move_the_map(page):
    x, y = place(page, 5)
    page.wheel(x, y, -500)
    page.wait_for("explorer.state().zoom > 1.5")
    np.testing.assert_allclose(place(page, 5), (x, y), atol=2)  # what is under the mouse stays
    page.pointer((300, 400), (330, 420), (350, 450), drag=True)
    np.testing.assert_allclose(place(page, 5), (x + 50, y + 50), atol=2)
    assert state(page)["pinned"] == -1  # a drag is no click
    page.press("ArrowRight")
    assert place(page, 5)[0] == pytest.approx(x - 10, abs=2)
    zoom = state(page)["zoom"]
    page.press("+")
    assert state(page)["zoom"] > zoom
    page.press("-", "-")
    assert state(page)["zoom"] < zoom
    page.press("0")
    assert (state(page)["zoom"], state(page)["x"]) == (1, 0)


@needs_browser
def test_every_control_can_be_reached_with_the_tab_key(page):
    reached = set()
    for _ in range(32):
        page.press("Tab")
        reached.add(page.run("document.activeElement.id || document.activeElement.parentNode.id"))
        if page.run("document.activeElement !== document.body"):  # at the page's end
            assert page.run("getComputedStyle(document.activeElement).outlineWidth") == "3px"
    assert {"panels", "map", "in", "out", "reset", "all", "none", "legend", "mixed"} <= reached


@needs_browser
def test_names_of_classes_are_text_wherever_they_stand(chrome, tmp_path):
    scene, found, panel = odd_scene()
    tiles = tSNE.small_images(scene.shown, 8, CPU)
    file = tmp_path / "odd.html"
    file.write_text(tSNE.build_page([panel], scene, found, HARMLESS[0], "<b>", tiles), "utf-8")
    chrome.open(file)
    assert chrome.run("document.title") == HARMLESS[0]
    assert text(chrome, "#caption") == "<b>"
    chrome.pointer(place(chrome, 1), click=True)
    chrome.wait_for("explorer.state().pinned >= 0")
    names = chrome.run(
        "Array.from(document.querySelectorAll('#legend button span')).map((s) => s.textContent)"
    )
    assert names == list(HARMLESS)
    assert chrome.run("document.querySelectorAll('script').length") == 2
    assert chrome.run("document.querySelectorAll('img').length") == 0
    assert chrome.log() == []


@needs_browser
def test_a_narrow_window_scrolls_down_only(drawn, tmp_path):
    with browser.Browser(tmp_path, 360, 640, dark=True) as phone:
        phone.open(drawn.figures / "tsne.html")
        assert phone.run("document.documentElement.scrollWidth") == 360
        assert phone.run("document.getElementById('map').clientHeight") >= 300
        phone.click("#legend button")
        assert text(phone, "#count") != f"{IMAGES} images"
        assert paper(phone) != WHITE


@needs_browser
def test_the_page_is_white_where_nothing_else_is_asked_for(page):
    assert paper(page) == WHITE


WHITE = "rgb(255, 255, 255)"


def paper(window):
    return window.run("getComputedStyle(document.body).backgroundColor")
