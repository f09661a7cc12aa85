"""tSNE.py: what is drawn follows from the run, figures and page show it, bad input is one line.

The page is tried in a real browser (browser.py) where there is one. No test uses a GPU.
"""

import base64
import itertools
import re
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import torch
from matplotlib import font_manager
from PIL import Image
from sklearn.datasets import load_digits

import browser
import load_simCLR
import simclr
import tSNE
import utils
from conftest import ROOT

IMAGES, PERPLEXITY = 120, 8
FLAGS = ["--device", "cpu", "--images", str(IMAGES), "--perplexity", str(PERPLEXITY)]
CPU = torch.device("cpu")


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
    """What the command prints and draws."""
    command = [sys.executable, str(ROOT / "tSNE.py"), *run.places, *FLAGS]
    command += ["--thumbnails", "--epochs"]
    where = tmp_path_factory.mktemp("elsewhere")
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert not list(where.iterdir())
    return SimpleNamespace(printed=done.stdout, figures=run.config.figure_folder)


def embedding(run, *flags):
    """What the command makes of these flags, before it draws."""
    where, options = tSNE.parse_command_line([*run.places, *FLAGS, *flags])
    network = tSNE.load_network(utils.find_checkpoint(where, options.checkpoints), CPU, options)
    scene = tSNE.read_scene(network.config, options, CPU)
    return tSNE.Embedding(network, scene, options, CPU, network.source.file.parent / "tsne")


@pytest.fixture(scope="module")
def shown(run, drawn):
    """What the command has drawn: scene, labels int64 (N,), panels, and features of h."""
    chosen = embedding(run)
    panels, features = chosen.panels()
    scene = chosen.scene
    return SimpleNamespace(scene=scene, labels=scene.labels, panels=panels, features=features)


@pytest.fixture
def photos(tmp_path, write_image, capsys):
    """Trains a run of a second on a folder of images; returns flags for tSNE.py, and figures."""

    def train(paths, *flags):
        for i, path in enumerate(paths):
            write_image(tmp_path / "photos" / path, (12, 12 + 6 * (i % 2)), seed=i)  # streamed
        places = ["--checkpoints", str(tmp_path / "c"), "--figures", str(tmp_path / "f")]
        simclr.main([
            "--dataset", "folder", "--data-dir", str(tmp_path / "photos"), "--image-size", "8",
            "--arch", "resnet10", "--width", "0.125", "--epochs", "1", "--batch-size", "8",
            "--warmup-epochs", "0", "--knn-every", "0", "--workers", "0", "--device", "cpu",
            *places, "--run", "photos", *flags,
        ])  # fmt: skip
        capsys.readouterr()
        return [*places, "--device", "cpu"], tmp_path / "f" / "photos"

    return train


@pytest.fixture
def quick(monkeypatch):
    """Leaves neighbours.png empty: its many axes take seconds."""
    figure = matplotlib.figure.Figure(figsize=(1, 1))
    monkeypatch.setattr(tSNE, "draw_neighbours", lambda *_: figure)


# ------------------------------------------------------------------------------------- the whole


def test_the_command_draws_the_newest_run(drawn):
    for name in ("tsne", "neighbours", "tsne_thumbnails", "tsne_epochs"):
        image = Image.open(drawn.figures / f"{name}.png").convert("RGB")
        assert min(image.size) > 250
        assert len(image.getcolors(image.width * image.height)) > 50
        assert (np.asarray(image)[:, [0, -1]] == 255).all()  # nothing is cut off
    page = (drawn.figures / "tsne.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "http" not in page.replace("http-equiv", "")  # nothing is fetched
    assert f"drawing {IMAGES} test images of digits" in drawn.printed
    for stage in ("features, SimCLR h", "t-SNE, pixels", "t-SNE, epoch2", "figures", "page"):
        assert re.search(rf"^{stage} +\d+\.\d s$", drawn.printed, re.MULTILINE)


def test_accuracies_in_the_titles_are_those_of_simclr(run, shown):
    trained = simclr.load_source(run.folder / "last.pt")
    untrained = trained.untrained(trained.config)
    encoders = simclr.encoders(trained.encoder, untrained, CPU, trained.projector)
    data = simclr.Data(shown.scene.train, shown.scene.train, shown.scene.shown)
    for panel in shown.panels:
        expected = simclr.knn_accuracy(encoders[panel.name], data, trained.config, CPU)
        assert panel.knn == expected
        assert panel.note == f"kNN {utils.accuracy_text(expected, IMAGES)}"
    assert [p.name for p in shown.panels] == list(simclr.REPRESENTATIONS)
    assert len({p.note for p in shown.panels}) > 1


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


def test_a_network_computes_in_its_runs_precision_where_the_hardware_has_it(
    run, tmp_path, monkeypatch
):
    state = utils.load_checkpoint(run.folder / "last.pt")
    state["config"]["precision"] = "bfloat16"
    utils.save_checkpoint(tmp_path / "half.pt", state)
    for has, precision in ((False, "float32"), (True, "bfloat16")):
        monkeypatch.setattr(utils, "has_fast_bfloat16", lambda _, has=has: has)
        network = tSNE.load_network(tmp_path / "half.pt", CPU, tSNE.Options())
        assert network.config.precision == precision


def test_another_projects_encoder_and_an_exported_one_are_drawn(run, quick, tmp_path, capsys):
    source = simclr.load_source(run.folder / "last.pt")
    load_simCLR.export_encoder(source, tmp_path / "ours.pt")
    theirs = {f"module.encoder_q.{k}": v for k, v in source.resnet.state_dict().items()}
    torch.save({"state_dict": theirs}, tmp_path / "theirs.pth")
    flags = ["--figures", str(tmp_path / "f"), "--method", "pca", *FLAGS, "--dataset", "digits"]
    for name in ("ours.pt", "theirs.pth"):
        tSNE.main([str(tmp_path / name), *flags])
        page = (tmp_path / "f" / name.split(".")[0] / "tsne.html").read_text(encoding="utf-8")
        assert '"pre-trained encoder"' in page
        assert "SimCLR z" not in page
    with pytest.raises(SystemExit, match="2"):
        tSNE.main([str(tmp_path / "ours.pt"), *flags[:-2]])
    assert "does not say on what images: give --dataset" in capsys.readouterr().err


# ----------------------------------------------------------------------------------- the cache


@pytest.fixture
def work(monkeypatch):
    """Counts what is computed rather than taken from the cache."""
    done = Counter()

    def counted(name, function):
        return lambda *arguments: done.update([name]) or function(*arguments)

    for name in ("features_of", "tsne"):
        monkeypatch.setattr(tSNE, name, counted(name, getattr(tSNE, name)))
    return done


def test_what_took_long_is_kept_until_something_changes(run, drawn, work):
    first = embedding(run, "--epochs")
    panels, _ = first.panels()
    first.epochs()
    assert work == Counter()  # all computed by the command

    embedding(run, "--perplexity", "9").panels()
    assert work == Counter(tsne=4)
    embedding(run, "--images", "100", "--panels", "pixels").panels()
    assert work == Counter(features_of=2, tsne=5)  # pixels, and h for its neighbours

    for file in first.cache.glob("tsne-pixels-*.npz"):
        file.write_bytes(file.read_bytes()[:200])  # damaged: computed again, and the same
    again, _ = embedding(run).panels()
    assert work == Counter(features_of=2, tsne=6)
    for old, new in zip(panels, again, strict=True):
        np.testing.assert_array_equal(old.xy, new.xy)


def test_another_checkpoint_or_other_images_are_not_mistaken(run, drawn, work, tmp_path):
    other = tmp_path / "other.pt"
    state = utils.load_checkpoint(run.folder / "last.pt")
    state["model"]["encoder.conv1.weight"] += 0.01
    utils.save_checkpoint(other, state)
    embedding(run, str(other), "--method", "pca").panels()
    assert work == Counter(features_of=4)

    scene = embedding(run).scene
    assert embedding(run).scene.digest == scene.digest
    assert embedding(run, "--seed", "1").scene.digest != scene.digest
    images = scene.shown.images.clone()
    images[3, 0, 5, 5] ^= 1
    shown = simclr.dataclasses.replace(scene.shown, images=images)
    assert simclr.dataclasses.replace(scene, shown=shown).digest != scene.digest


def test_a_run_in_a_folder_that_cannot_be_written_is_drawn(
    run, quick, tmp_path, monkeypatch, capsys
):
    argv = [*FLAGS, "--method", "pca", "--panels", "pixels", "--figures", str(tmp_path / "f")]
    shutil.copy(run.folder / "last.pt", tmp_path)
    (tmp_path / "tsne").write_text("a file where the cache should be")
    tSNE.main([str(tmp_path / "last.pt"), *argv])
    assert "warning: cannot write" in capsys.readouterr().err
    figures = tmp_path / "f" / run.config.run
    assert (figures / "tsne.png").exists()
    assert not (figures / "tsne").exists()
    # a file system that can only be read: what is kept goes beside the figures
    monkeypatch.setattr(tSNE.os, "access", lambda path, _: Path(path) != tmp_path / "tsne")
    tSNE.main([str(tmp_path / "last.pt"), *argv])
    assert capsys.readouterr().err == ""
    assert len(list((figures / "tsne").glob("features-*.npz"))) == 2


# --------------------------------------------------------------------------------------- the maths


@pytest.fixture(scope="module")
def points():
    """float32 (150, 64): digits."""
    return load_digits().data[:150].astype(np.float32)


def test_components_keep_the_variance_and_are_two_at_least(points):
    for shape in ((150, 64), (12, 64), (150, 1)):
        x = points[: shape[0], 10 : 10 + shape[1]]
        components = tSNE.principal_components(x)
        assert components.shape == (shape[0], max(2, min(50, *x.shape)))
        assert components.var(0).sum() == pytest.approx(x.var(0).sum(), rel=0.01)


def test_tsne_keeps_neighbours_and_the_arrangement_that_it_is_given(points):
    x = tSNE.principal_components(points)
    xy = tSNE.tsne(x, 8, seed=0)
    np.testing.assert_array_equal(xy, tSNE.tsne(x, 8, seed=0))
    labels = load_digits().target[:150]
    near = scipy.spatial.KDTree(xy).query(xy, 2)[1][:, 1]
    assert (labels[near] == labels).mean() > 0.85

    noise = np.random.default_rng(0).normal(size=x.shape) * 0.2 * x.std()
    moved = {}
    for start in (None, xy):
        again = tSNE.aligned(tSNE.tsne(x + noise.astype(np.float32), 8, 0, start), xy)
        change = np.square(again - tSNE.aligned(xy, xy)).sum()
        moved[start is None] = change / np.square(xy - xy.mean(0)).sum()
    assert moved[False] < 0.2
    assert moved[True] > 0.5


def test_alignment_undoes_a_turn_a_reflection_and_a_shift():
    target = np.random.default_rng(0).normal(size=(40, 2)) * [3.0, 1.0] + 5
    turned = target @ np.array([[0.6, 0.8], [0.8, -0.6]]) - 7
    np.testing.assert_allclose(tSNE.aligned(turned, target), target - target.mean(0), atol=1e-5)


@pytest.mark.parametrize(("count", "side"), [(60, 9), (81, 9), (1, 1), (3, 40)])
def test_thumbnails_take_the_nearest_free_cell(count, side):
    xy = np.random.default_rng(1).normal(size=(count, 2)) ** 3  # crowded in the middle
    cells = tSNE.grid_cells(xy, side, seed=2)
    # replayed by brute force
    span = np.ptp(xy, axis=0).max() or 1
    unit = (xy - (xy.max(0) + xy.min(0)) / 2) / span + 0.5
    wanted = np.stack([1 - unit[:, 1], unit[:, 0]], 1) * (side - 1)
    free = set(itertools.product(range(side), range(side)))
    for i in np.random.default_rng(2).permutation(count):
        nearest = min(np.hypot(*(wanted[i] - cell)) for cell in free)
        assert np.hypot(*(wanted[i] - cells[i])) == pytest.approx(nearest)
        free.remove(tuple(cells[i]))  # it was free


def test_neighbours_are_the_most_similar_other_images(run, shown):
    model, features = simclr.load_run(run.folder / "last.pt").model, shown.features
    h, training = (
        simclr.features(model.encoder, data, run.config, CPU).double()
        for data in (shown.scene.shown, shown.scene.train)
    )
    for bank, k, rows, values in (
        (h, 10, features["near"], features["similarity"]),
        (training, 8, features["train_near"], features["train_similarity"]),
    ):
        cosine = torch.nn.functional.cosine_similarity(h[:, None], bank[None], dim=2)
        if bank is h:
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


@pytest.mark.parametrize("classes", [1, 2, 10, 11, 50, 51, 100, 151])
def test_no_two_classes_look_alike(classes):
    styles = tSNE.class_styles(classes)
    assert len(set(styles)) == classes
    assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour, _ in styles)
    assert all(0 <= marker < len(tSNE.MARKERS) for _, marker in styles)


@pytest.mark.parametrize("spread", [0.0, 0.02, 0.3, 5.0])
def test_every_class_has_its_name_on_the_map(spread):
    random = np.random.default_rng(0)
    names = ["daisy", "dandelion", "roses", "sunflowers", "tulips", "none of these"]
    labels = np.arange(100) % 5  # the last class has no images
    centres = np.array([[0, 0], [0, 1], [1, 0], [1, 1], [3, 3]])
    xy = tSNE.unit_square(centres[labels] + spread * random.normal(size=(100, 2)))
    places = tSNE.name_places(xy, labels, names)
    assert [label for label, _, _ in places] == [0, 1, 2, 3, 4]
    for (a, x, y), (b, x2, y2) in itertools.combinations(places, 2):
        width = 1.1 * 2 / 39 * (len(names[a]) + len(names[b])) / 2
        assert abs(x - x2) > width or abs(y - y2) > 2 / 39  # no name is on another
    for label, x, y in places:
        assert abs(x) + 1.1 / 39 * len(names[label]) <= 1.001  # inside the map
        if spread < 0.1:
            assert np.abs(xy[label] - (x, y)).max() < 0.5  # and at its class
    assert tSNE.name_places(xy, labels, [*names, *"abcde"]) == []  # too many for a map


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
    labels = torch.arange(count) % len(classes) if classes else None
    data = utils.ImageSet(images, labels, tuple(classes))
    scene = tSNE.Scene(data, torch.arange(count), "test", data, "odd")
    config = simclr.make_config(image_size=8)
    source = simclr.Source(Path("x.pt"), None, None, "none", "", config)
    network = tSNE.Network(source, config, {"simclr": utils.flat_pixels}, "")
    features = tSNE.features_of(network, "simclr", scene, CPU)
    return scene, features, tSNE.Panel("simclr", "SimCLR h", features["components"][:, :2], 0.5)


def draw_all(scene, features, panel, folder):
    """All figures; no warning may come. Returns the texts of the first and of the last."""
    with warnings.catch_warnings(), matplotlib.rc_context(scene.style):
        warnings.simplefilter("error")
        figures = [
            tSNE.draw_panels([panel], scene, "caption"),
            tSNE.draw_thumbnails(panel, scene, "caption", CPU, 0),
            tSNE.draw_neighbours(scene, features, 8, 0),
        ]
        for i, figure in enumerate(figures):
            utils.save_figure(figure, folder / f"{i}.svg")
    return [text.get_text() for text in figures[0].legends[0].get_texts()], {
        text.get_text() for text in figures[-1].findobj(matplotlib.text.Text)
    }


@pytest.mark.parametrize("classes", [HARMLESS, [f"class {i}" for i in range(37)], ["a"], []])
def test_figures_take_any_names_and_numbers_of_classes(classes, tmp_path):
    legend, neighbours = draw_all(*odd_scene(classes), tmp_path)
    assert legend == [utils.printable(name) for name in classes]
    header = "nearest training images" + ", cosine similarity" * (not classes)
    assert {"query", header, "Random images"} <= neighbours


def test_names_that_the_font_lacks_are_drawn_by_another_or_numbered(tmp_path, monkeypatch, capsys):
    manager = font_manager.fontManager
    own = [font for font in manager.ttflist if matplotlib.get_data_path() in font.fname]
    monkeypatch.setattr(manager, "ttflist", own)  # those that matplotlib brings
    monkeypatch.setattr(font_manager, "findSystemFonts", list)
    manager._findfont_cached.cache_clear()
    legend, neighbours = draw_all(*odd_scene(["cat", "𝒜", "猫", "犬"]), tmp_path)
    assert legend == ["cat", "𝒜", "class 2", "class 3"]
    assert {"✓ class 2", "✗ 𝒜"} <= neighbours
    err = capsys.readouterr().err
    assert err.endswith("in figures class 2 is 猫, class 3 is 犬\n")
    assert err.count("\n") == 1
    manager._findfont_cached.cache_clear()


def test_the_sprite_holds_each_image_in_its_place_and_is_of_limited_size():
    tiles = torch.randint(256, (7, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    uri, columns = tSNE.make_sprite(tiles.to(torch.uint8))
    picture = np.asarray(Image.open(tSNE.io.BytesIO(base64.b64decode(uri.split(",")[1]))))
    for i, tile in enumerate(tiles):
        row, column = divmod(i, columns)
        part = picture[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        np.testing.assert_array_equal(part, tile.permute(1, 2, 0))
    assert tSNE.tile_side(10_000, 224) == tSNE.tile_side(10_000, 32) == 32
    assert tSNE.tile_side(360, 224) == tSNE.TILE_PIXELS
    assert tSNE.tile_side(100_000, 224) ** 2 * 100_000 <= tSNE.SPRITE_PIXELS


# --------------------------------------------------------------------------------- one's own images


def test_unlabelled_images_are_drawn_without_colours_and_unreadable_ones_left_out(photos, capsys):
    flags, figures = photos([f"{i}.png" for i in range(17)], "--max-bad", "0.1")
    (figures.parents[1] / "photos" / "7.png").write_bytes(b"no image")
    tSNE.main([*flags, "--perplexity", "4"])
    printed, err = capsys.readouterr()
    assert "drawing 16 unlabelled training images of photos" in printed
    assert "without colours and accuracies: the images have no labels" in printed
    assert "kNN" not in printed
    assert "7.png" in err
    page = (figures / "tsne.html").read_text(encoding="utf-8")
    assert '"labels": null' in page
    assert '"8.png"' in page
    assert '"7.png"' not in page
    assert (figures / "tsne.png").exists()
    assert (figures / "neighbours.png").exists()


def test_training_images_with_labels_have_colours_but_no_accuracy(photos, quick, capsys):
    flags, _ = photos([f"train/{'ab'[i % 2]}/{i}.png" for i in range(16)])
    flags += ["--method", "pca"]
    tSNE.main(flags)
    printed = capsys.readouterr().out
    assert "drawing 16 training images of photos" in printed
    assert "without accuracies: no labelled images were held out" in printed
    panels, features = embedding(SimpleNamespace(places=flags)).panels()
    assert all(panel.note == "" for panel in panels)
    assert not (features["train_near"] == np.arange(16)[:, None]).any()


def test_figures_of_other_images_do_not_replace_the_runs_own(photos, quick, tmp_path, write_image):
    flags, figures = photos([f"{i}.png" for i in range(8)])
    flags += ["--method", "pca"]
    for i in range(8):
        write_image(tmp_path / "others" / f"{i}.png", seed=100 + i)
    tSNE.main(flags)
    before = {file: file.read_bytes() for file in figures.iterdir()}
    tSNE.main([*flags, "--data-dir", str(tmp_path / "others")])
    assert all(file.read_bytes() == content for file, content in before.items())
    names = {"tsne-others.png", "neighbours-others.png", "tsne-others.html"}
    assert {file.name for file in figures.iterdir()} - {file.name for file in before} == names
    tSNE.main([*flags, "--data-dir", str(tmp_path / "others" / ".." / "photos")])
    assert len(list(figures.iterdir())) == len(before) + len(names)


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
        ("--panels", "expected at least one argument"),
        ("--images 1", "--images must be at least 2, got 1"),
        ("--seed -1", "--seed must be at least 0"),
        ("--perplexity 0.5", "--perplexity must be at least 1, got 0.5"),
        ("--perplexity nan", "--perplexity must be"),
        ("--perplexity 50", "120 images are too few for a perplexity of 50"),
        ("--perplexity 50", "use --perplexity 39 at most, or --method pca"),
        ("--images 3", "use --method pca"),
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
    argv = [str(lonely), "--epochs", "--figures", str(tmp_path / "f"), *FLAGS]
    assert "has none: train with simclr.py --keep-every K" in fails(capsys, *argv)


def test_files_that_cannot_be_written_or_read(run, drawn, quick, capsys, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("a file where the folder should be")
    argv = (*run.places[:2], *FLAGS, "--figures")
    assert "cannot write" in fails(capsys, *argv, str(blocked))
    (tmp_path / "f" / run.config.run / "tsne.png").mkdir(parents=True)
    assert "cannot write" in fails(capsys, *argv, str(tmp_path / "f"))
    monkeypatch.setattr(tSNE, "TEMPLATE", tmp_path / "explorer.html")
    assert "explorer.html, a part of tSNE.py" in fails(capsys, *argv, str(tmp_path / "g"))


def test_images_that_are_all_alike(run):
    chosen = embedding(run)
    chosen.scene.shown.images[:] = 0
    chosen.scene.digest = "black"
    with pytest.raises(utils.InputError, match="nothing to draw: by raw pixels all images are"):
        chosen.panels()


# --------------------------------------------------------------------- augmentation and kept epochs


def test_the_sheet_of_views_shows_images_and_their_augmentation(tmp_path, capsys):
    file = tmp_path / "views.png"
    flags = ["--device", "cpu", "--checkpoints", str(tmp_path / "c"), "--show-views"]
    simclr.main([*flags, str(file)])
    assert str(file) in capsys.readouterr().out
    assert not (tmp_path / "c").exists()  # nothing was trained
    first = file.read_bytes()
    assert min(Image.open(file).size) > 500
    simclr.main([*flags, str(file)])
    assert file.read_bytes() == first
    simclr.main([*flags, str(file), "--crop-min", "1", "--rotation", "0", "--jitter-p", "0"])
    assert file.read_bytes() != first
    for name in ("views.txt", "views"):
        with pytest.raises(SystemExit, match="2"):
            simclr.main([*flags, str(tmp_path / name)])
        assert "the file's ending must be one of" in capsys.readouterr().err


def test_views_without_augmentation_are_the_image(tiny_config):
    config = tiny_config(crop_min=1.0, rotation=0.0, jitter_p=0.0)
    data = utils.load_images("digits", "pretrain")
    figure = simclr.draw_views(simclr.resolve(config, data, CPU), data, CPU)
    picture = figure.axes[0].get_images()[0].get_array()
    first, *views = np.split(picture.astype(int), 9, axis=1)
    for view in views:  # a crop of all the area may still lack a row or column
        assert np.abs(view - first).mean() < 30


def test_kept_epochs_are_checkpoints_and_go_when_the_run_is_overwritten(
    run, small_config, monkeypatch
):
    files = utils.kept_checkpoints(run.folder)
    assert [file.name for file in files] == [f"epoch000{i}.pt" for i in range(1, 5)]
    runs = [simclr.load_run(file) for file in [*files, run.folder / "last.pt"]]
    assert [r.epoch for r in runs] == [1, 2, 3, 4, 4]
    weights = [utils.module_digest(r.model) for r in runs]
    assert len(set(weights)) == 4
    assert weights[3] == weights[4]
    monkeypatch.setattr(simclr, "evaluate", lambda *_: {})  # takes long
    config = small_config(keep_every=2, epochs=3)
    simclr.run(config)
    assert [file.name for file in utils.kept_checkpoints(config.folder)] == ["epoch0002.pt"]
    simclr.run(simclr.dataclasses.replace(config, keep_every=0, epochs=1), overwrite=True)
    assert utils.kept_checkpoints(config.folder) == []


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


def alone(panel):
    """An image that no other covers on the map."""
    distances = scipy.spatial.distance.squareform(scipy.spatial.distance.pdist(panel.xy))
    np.fill_diagonal(distances, np.inf)
    return int(distances.min(1).argmax())


@needs_browser
def test_hovering_shows_the_image_its_class_and_number(page, shown):
    i = alone(shown.panels[2])
    assert page.run("document.getElementById('tip').hidden")
    page.pointer(page.place(i))
    page.wait_for("!document.getElementById('tip').hidden")
    name = shown.scene.classes[shown.labels[i]]
    assert page.text("#tip") == f"{name}test image {shown.scene.rows[i]}"
    picture = page.run(
        "Array.from(document.querySelector('#tip canvas').getContext('2d')"
        ".getImageData(0, 0, 96, 96).data)"
    )
    picture = np.array(picture).reshape(96, 96, 4)[3::6, 3::6, :3]  # 16 px, six times as large
    np.testing.assert_array_equal(picture, shown.scene.shown.images[i].permute(1, 2, 0))
    page.pointer((8, 8))
    page.wait_for("document.getElementById('tip').hidden")
    assert page.log() == []


@needs_browser
def test_clicking_pins_and_shows_neighbours_and_escape_unpins(page, shown):
    i = alone(shown.panels[2])
    near, similarity = shown.features["near"][i], shown.features["similarity"][i]
    page.pointer(page.place(i), click=True)
    page.wait_for(f"explorer.state().pinned === {i}")
    cards = page.run(
        "Array.from(document.querySelectorAll('#neighbours button'))"
        ".map((b) => [b.textContent, b.className])"
    )
    same = shown.labels[near] == shown.labels[i]
    for (words, look), n, value, right in zip(cards, near, similarity, same, strict=True):
        name = shown.scene.classes[shown.labels[n]]
        assert words == f"{'✓' if right else '✗'} {value:.3f}{name}"
        assert look == ("same" if right else "other")
    assert f"{same.sum()} of 10 are of its class" in page.text("#agreement")

    page.click("#neighbours button")
    assert page.state()["pinned"] == near[0]
    page.press("Escape")
    assert page.state()["pinned"] == -1
    assert page.run("document.getElementById('pinned').hidden")
    page.run("document.getElementById('map').focus()")
    page.press("Enter")  # the one nearest to the middle
    assert page.state()["pinned"] >= 0


@needs_browser
def test_the_legend_and_the_filter_hide_images_from_view_and_from_the_mouse(page, shown):
    i = alone(shown.panels[2])
    label = int(shown.labels[i])
    colour = tSNE.class_styles(10)[label][0]
    everything = f"{IMAGES} images"
    assert page.text("#count") == everything
    assert page.pixels(colour) > 0
    page.click(f"#legend button:nth-child({label + 1})")
    pressed = f"document.querySelectorAll('#legend button')[{label}].getAttribute('aria-pressed')"
    assert page.run(pressed) == "false"
    assert page.text("#count") == f"{(shown.labels != label).sum()} of {everything}"
    assert page.pixels(colour) == 0
    page.pointer(page.place(i))
    assert page.state()["hovered"] != i
    page.click("#none")
    assert page.text("#count") == f"0 of {everything}"
    page.click("#all")
    assert page.text("#count") == everything
    assert page.pixels(colour) > 0

    mixed = (shown.labels[shown.features["near"]] == shown.labels[:, None]).sum(1) < 5
    assert page.text("#mixedcount") == str(mixed.sum())
    page.click("#mixed")
    assert page.text("#count") == f"{mixed.sum()} of {everything}"
    for i in np.flatnonzero(~mixed)[:5]:
        page.pointer(page.place(i))
        assert page.state()["hovered"] != i
    page.click("#mixed")
    assert page.text("#count") == everything


@needs_browser
def test_switching_the_panel_moves_the_points(page, shown):
    buttons = "Array.from(document.querySelectorAll('#panels button'))"
    scale = page.run("0.47 * Math.min(document.getElementById('map').clientWidth,"
                     "document.getElementById('map').clientHeight)")  # fmt: skip

    def is_at(number):
        points = page.run(f"Array.from({{length: {IMAGES}}}, (_, i) => explorer.screenOf(i))")
        xy = tSNE.unit_square(shown.panels[number].xy)
        at = np.array([[p["x"], -p["y"]] for p in points])
        np.testing.assert_allclose((at - (at.max(0) + at.min(0)) / 2) / scale, xy, atol=1e-3)
        pressed = page.run(f"{buttons}.map((b) => b.getAttribute('aria-pressed'))")
        return pressed.index("true") == number

    assert is_at(2)
    page.click("#panels button:nth-child(1)")
    assert page.state()["moving"]
    page.wait_for("!explorer.state().moving")
    assert is_at(0)
    assert shown.panels[0].note in page.text("#panels button:nth-child(1)")
    for key, number in (("4", 3), ("[", 2)):
        page.press(key)
        page.wait_for("!explorer.state().moving")
        assert is_at(number)
    assert page.run(f"{buttons}.length") == 9  # with those of the epochs


@needs_browser
def test_wheel_drag_and_keys_move_the_map(page):
    x, y = page.place(5)
    page.wheel(x, y, -500)
    page.wait_for("explorer.state().zoom > 1.5")
    np.testing.assert_allclose(page.place(5), (x, y), atol=2)  # what is under the mouse stays
    page.pointer((300, 400), (330, 420), (350, 450), drag=True)
    np.testing.assert_allclose(page.place(5), (x + 50, y + 50), atol=2)
    assert page.state()["pinned"] == -1  # a drag is no click
    page.press("ArrowRight")
    assert page.place(5)[0] == pytest.approx(x - 10, abs=2)
    zoom = page.state()["zoom"]
    page.press("+")
    assert page.state()["zoom"] > zoom
    page.press("-", "-")
    assert page.state()["zoom"] < zoom
    page.press("0")
    assert (page.state()["zoom"], page.state()["x"]) == (1, 0)


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
    scene, features, panel = odd_scene()
    tiles = tSNE.small_images(scene.shown, 8, CPU)
    file = tmp_path / "odd.html"
    page = tSNE.build_page([panel], scene, features, HARMLESS[0], "<b>", tiles)
    file.write_text(page, encoding="utf-8")
    chrome.open(file)
    assert chrome.run("document.title") == HARMLESS[0]
    assert chrome.text("#caption") == "<b>"
    chrome.pointer(chrome.place(1), click=True)
    chrome.wait_for("explorer.state().pinned >= 0")
    names = "Array.from(document.querySelectorAll('#legend button span'))"
    assert chrome.run(f"{names}.map((s) => s.textContent)") == list(HARMLESS)
    assert chrome.run("document.querySelectorAll('script').length") == 2
    assert chrome.run("document.querySelectorAll('img').length") == 0
    assert chrome.log() == []


@needs_browser
def test_a_narrow_dark_window_scrolls_down_only(drawn, page, tmp_path):
    paper = "getComputedStyle(document.body).backgroundColor"
    assert page.run(paper) == "rgb(255, 255, 255)"  # where nothing else is asked for
    with browser.Browser(tmp_path, 360, 640, dark=True) as phone:
        phone.open(drawn.figures / "tsne.html")
        assert phone.run("document.documentElement.scrollWidth") == 360
        assert phone.run("document.getElementById('map').clientHeight") >= 300
        phone.click("#legend button")
        assert phone.text("#count") != f"{IMAGES} images"
        assert phone.run(paper) != page.run(paper)
