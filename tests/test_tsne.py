"""tSNE.py: what is drawn follows from the run, figures and page show it, bad input is one line.

The page is tried in a real browser (browser.py) where there is one. No test uses a GPU.
"""

import contextlib
import io
import itertools
import re
import shutil
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
from conftest import CPU, error_of, load_run, module_digest

IMAGES, PERPLEXITY = 120, 8
FLAGS = ["--device", "cpu", "--images", str(IMAGES), "--perplexity", str(PERPLEXITY)]


@pytest.fixture(scope="module")
def run(finished, tmp_path_factory):
    """A copy of the run on the digits, which kept its epochs, for the cache and the figures.

    config: resolved; folder: of its checkpoints; places: flags.
    """
    root = tmp_path_factory.mktemp("run")
    folder = shutil.copytree(finished.folder, root / "c" / finished.config.run)
    places = dict(checkpoints=str(root / "c"), figures=str(root / "f"))
    config = simclr.dataclasses.replace(load_run(folder / "last.pt").config, **places)
    flags = [word for name, place in places.items() for word in (f"--{name}", place)]
    return SimpleNamespace(config=config, folder=folder, places=flags)


@pytest.fixture(scope="module")
def drawn(run):
    """What the command prints and draws."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        tSNE.main([*run.places, *FLAGS, "--thumbnails", "--epochs"])
    assert err.getvalue() == ""
    return SimpleNamespace(printed=out.getvalue(), figures=run.config.figure_folder)


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
    labels = chosen.scene.labels
    return SimpleNamespace(scene=chosen.scene, labels=labels, panels=panels, features=features)


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
        assert str(panel) == f"{panel.title} · kNN {utils.accuracy_text(expected, IMAGES)}"
    assert [p.name for p in shown.panels] == list(simclr.REPRESENTATIONS)
    assert len({p.knn for p in shown.panels}) > 1


def test_epochs_begin_with_the_untrained_encoder_and_lie_on_each_other(run, drawn):
    strip = embedding(run, "--epochs").epochs()
    assert [p.title for p in strip] == ["untrained", *(f"epoch {i}" for i in range(1, 5))]
    for before, panel in itertools.pairwise(strip):
        # no turn or reflection fits the panel before better
        best, _ = scipy.linalg.orthogonal_procrustes(panel.xy, before.xy - before.xy.mean(0))
        np.testing.assert_allclose(best, np.eye(2), atol=1e-3)
    kept = [*utils.kept_checkpoints(run.folder), run.folder / "last.pt"]
    weights = [module_digest(load_run(file).model) for file in kept]
    assert weights[3] == weights[4]
    assert len(set(weights)) == 4  # each epoch has its own


def test_formats_and_panels(run, drawn, tmp_path):
    panels = ["--panels", "projection", "pixels"]
    tSNE.main([*run.places[:2], "--figures", str(tmp_path), *FLAGS, "--format", "pdf", *panels])
    for name in ("tsne", "neighbours"):
        assert (tmp_path / run.config.run / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    panels, _ = embedding(run, "--panels", "projection", "pixels", "projection").panels()
    assert [p.name for p in panels] == ["projection", "pixels"]


def test_another_projects_encoder_and_an_exported_one_are_drawn(run, quick, tmp_path, capsys):
    source = simclr.load_source(run.folder / "last.pt")
    load_simCLR.export_encoder(source, tmp_path / "ours.pt")
    theirs = {f"module.encoder_q.{k}": v for k, v in source.resnet.state_dict().items()}
    torch.save({"state_dict": theirs}, tmp_path / "theirs.pth")
    flags = ["--figures", str(tmp_path / "f"), "--method", "pca", *FLAGS, "--dataset", "digits"]
    for name in ("ours.pt", "theirs.pth"):
        tSNE.main([str(tmp_path / name), *flags])
        page = (tmp_path / "f" / name.split(".")[0] / "tsne.html").read_text(encoding="utf-8")
        assert '"pre-trained encoder' in page
        assert "SimCLR z" not in page
    with pytest.raises(SystemExit, match="2"):
        tSNE.main([str(tmp_path / "ours.pt"), *flags[:-2]])
    assert "does not say on what images: give --dataset" in capsys.readouterr().err


# ----------------------------------------------------------------------------------- the cache


@pytest.fixture
def work(monkeypatch):
    """Counts the maps that are computed rather than taken from the cache."""
    done, real = Counter(), tSNE.tsne
    monkeypatch.setattr(tSNE, "tsne", lambda *arguments: done.update(["tsne"]) or real(*arguments))
    return done


def test_what_took_long_is_kept_until_something_changes(run, drawn, work):
    first = embedding(run, "--epochs")
    panels, _ = first.panels()
    first.epochs()
    assert work == Counter()  # all computed by the command

    embedding(run, "--perplexity", "9").panels()
    assert work == Counter(tsne=4)
    embedding(run, "--images", "100", "--panels", "pixels").panels()
    assert work == Counter(tsne=5)

    for file in first.cache.glob("tsne-pixels-*.npz"):
        file.write_bytes(file.read_bytes()[:200])  # damaged: computed again, and the same
    again, _ = embedding(run).panels()
    assert work == Counter(tsne=6)
    for old, new in zip(panels, again, strict=True):
        np.testing.assert_array_equal(old.xy, new.xy)


def test_another_checkpoint_is_not_mistaken(run, drawn, work, tmp_path):
    other = tmp_path / "other.pt"
    state = utils.load_checkpoint(run.folder / "last.pt")
    state["model"]["encoder.conv1.weight"] += 0.01
    utils.save_checkpoint(other, state)
    shutil.copytree(run.folder / "tsne", tmp_path / "tsne")
    embedding(run, str(other)).panels()
    assert work == Counter(tsne=4)


def test_a_run_in_a_folder_that_cannot_be_written_is_drawn(run, quick, tmp_path, capsys):
    argv = [*FLAGS, "--panels", "pixels", "--figures", str(tmp_path / "f")]
    shutil.copy(run.folder / "last.pt", tmp_path)
    (tmp_path / "tsne").write_text("a file where the cache should be")
    tSNE.main([str(tmp_path / "last.pt"), *argv])
    assert "warning: cannot write" in capsys.readouterr().err
    figures = tmp_path / "f" / run.config.run
    assert (figures / "tsne.png").exists()
    assert not (figures / "tsne").exists()


# --------------------------------------------------------------------------------------- the maths


def test_components_keep_the_variance_and_tsne_neighbours_and_a_given_arrangement():
    points, labels = load_digits().data[:150].astype(np.float32), load_digits().target[:150]
    x = tSNE.principal_components(points)
    assert x.shape == (150, 50)
    assert x.var(0).sum() == pytest.approx(points.var(0).sum(), rel=0.01)
    assert tSNE.principal_components(points[:, 10:11]).shape == (150, 2)  # at least two
    xy = tSNE.tsne(x, 8, seed=0)
    np.testing.assert_array_equal(xy, tSNE.tsne(x, 8, seed=0))
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
    model, features = load_run(run.folder / "last.pt").model, shown.features
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


# ---------------------------------------------------------- appearance, one's own images, bad input


@pytest.mark.parametrize("classes", [1, 10, 50, 151])
def test_no_two_classes_look_alike(classes):
    styles = tSNE.class_styles(classes)
    assert len(set(styles)) == classes
    assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour, _ in styles)
    assert all(0 <= marker < len(tSNE.MARKERS) for _, marker in styles)


@pytest.mark.parametrize("spread", [0.0, 0.02, 5.0])
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
    halves = np.repeat([[-0.5, -0.5], [0.5, 0.5]], [40, 60], 0) + random.normal(0, 0.05, (100, 2))
    [(_, x, y)] = tSNE.name_places(halves, np.zeros(100, int), ["a"])
    assert abs(x - 0.5) < 0.2 > abs(y - 0.5)  # in the larger part of the class, not between both


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
    data = utils.Images(images, labels, tuple(classes))
    scene = tSNE.Scene(data, torch.arange(count), "test", data, "odd")
    config = simclr.make_config(image_size=8)
    source = simclr.Source(Path("x.pt"), None, None, "none", "", config)
    network = tSNE.Network(source, config, {"simclr": utils.flat_pixels})
    features = tSNE.features_of(network, "simclr", scene, CPU)
    return scene, features, tSNE.Panel("simclr", "SimCLR h", features["components"][:, :2], 0.5)


def draw_all(scene, features, panel, folder):
    """All figures; no warning may come. Returns the texts of the first and of the last."""
    with warnings.catch_warnings(), matplotlib.rc_context(scene.style):
        warnings.simplefilter("error")
        figures = [
            tSNE.draw_panels([panel], scene, "caption"),
            tSNE.draw_thumbnails(panel, scene, "caption", 0),
            tSNE.draw_neighbours(scene, features, 8, 0),
        ]
        for i, figure in enumerate(figures):
            utils.save_figure(figure, folder / f"{i}.svg")
    return [text.get_text() for text in figures[0].legends[0].get_texts()], {
        text.get_text() for text in figures[-1].findobj(matplotlib.text.Text)
    }


@pytest.mark.parametrize("classes", [HARMLESS, [f"class {i}" for i in range(37)], []])
def test_figures_take_any_names_and_numbers_of_classes(classes, tmp_path, monkeypatch):
    monkeypatch.setattr(tSNE, "QUERIES", 2)
    legend, neighbours = draw_all(*odd_scene(classes), tmp_path)
    assert legend == [utils.printable(name) for name in classes]
    header = "nearest training images" + ", cosine similarity" * (not classes)
    assert {"query", header, "Random images"} <= neighbours


def test_names_that_the_font_lacks_are_drawn_by_another_or_numbered(tmp_path, monkeypatch, capsys):
    manager = font_manager.fontManager
    monkeypatch.setattr(manager, "ttflist", [])
    monkeypatch.setattr(font_manager, "findSystemFonts", list)
    for font in Path(matplotlib.get_data_path(), "fonts", "ttf").glob("*.ttf"):
        manager.addfont(font)  # those that matplotlib brings; its cache need not list them
    legend, neighbours = draw_all(*odd_scene(["cat", "𝒜", "猫", "犬"]), tmp_path)
    assert legend == ["cat", "𝒜", "class 2", "class 3"]
    assert {"✓ class 2", "✗ 𝒜"} <= neighbours
    err = capsys.readouterr().err
    assert err.endswith("in figures class 2 is 猫, class 3 is 犬\n")
    assert err.count("\n") == 1
    manager._findfont_cached.cache_clear()


def test_unlabelled_images_are_drawn_without_colours_and_others_beside_them(
    photo_config, unjudged, quick, tmp_path, write_image, capsys
):
    config = photo_config(17, width=0.125, epochs=1, batch_size=8, max_bad=0.1, run="photos")
    simclr.run(config)
    (tmp_path / "photos" / "7.png").write_bytes(b"no image")  # it is left out
    flags = ["--checkpoints", config.checkpoints, "--figures", config.figures, "--device", "cpu"]
    capsys.readouterr()
    tSNE.main(flags)  # of so few images the perplexity is 5
    printed, err = capsys.readouterr()
    assert "drawing 16 unlabelled training images of photos, without accuracies" in printed
    assert "kNN" not in printed
    assert "7.png" in err
    page = (config.figure_folder / "tsne.html").read_text(encoding="utf-8")
    assert '"labels": null' in page
    assert '"8.png"' in page
    assert '"7.png"' not in page

    before = {file: file.read_bytes() for file in config.figure_folder.iterdir()}
    assert {"tsne.png", "neighbours.png"} <= {file.name for file in before}
    for i in range(8):
        write_image(tmp_path / "others" / f"{i}.png", seed=100 + i)
    tSNE.main([*flags, "--method", "pca", "--data-dir", str(tmp_path / "others")])
    assert all(file.read_bytes() == content for file, content in before.items())
    names = {"tsne-others.png", "neighbours-others.png", "tsne-others.html"}
    assert {file.name for file in config.figure_folder.iterdir() if file not in before} == names


@pytest.mark.parametrize(("argv", "message"), [
    ("--panels", "expected at least one argument"),
    ("--images 1", "--images must be at least 2, got 1"),
    ("--perplexity 0.5", "--perplexity must be at least 1, got 0.5"),
    ("--method umap", "invalid choice: 'umap'"),
    ("--checkpoints nowhere", "no run under"),
])  # fmt: skip
def test_bad_input_is_one_line(run, capsys, argv, message):
    assert message in error_of(capsys, tSNE.main, *run.places, *FLAGS, *argv.split())


def test_a_run_without_kept_epochs_says_how_to_keep_them(run, capsys, tmp_path):
    lonely = shutil.copy(run.folder / "last.pt", tmp_path / "lonely.pt")
    argv = (lonely, "--epochs", "--figures", tmp_path / "f", *FLAGS)
    assert "has none: train with simclr.py --keep-every K" in error_of(capsys, tSNE.main, *argv)


def test_files_that_cannot_be_written_or_read(run, drawn, quick, capsys, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("a file where the folder should be")
    argv = (*run.places[:2], *FLAGS, "--figures")
    assert "cannot write" in error_of(capsys, tSNE.main, *argv, blocked)
    (tmp_path / "f" / run.config.run / "tsne.png").mkdir(parents=True)
    assert "cannot write" in error_of(capsys, tSNE.main, *argv, tmp_path / "f")
    monkeypatch.setattr(tSNE, "TEMPLATE", tmp_path / "explorer.html")
    error = error_of(capsys, tSNE.main, *argv, tmp_path / "g")
    assert "explorer.html, a part of tSNE.py" in error


def test_images_that_are_all_alike(run):
    chosen = embedding(run)
    chosen.scene.shown.images[:] = 0
    with pytest.raises(utils.InputError, match="all images have the same features"):
        chosen.panels()


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
    error = error_of(capsys, simclr.main, *flags, tmp_path / "views.txt")
    assert "the file's ending must be one of" in error


# -------------------------------------------------------------------------------- in a real browser

needs_browser = pytest.mark.skipif(not browser.CHROMIUM, reason="there is no Chromium")


def alone(panel):
    """An image that no other covers on the map."""
    distances = scipy.spatial.distance.squareform(scipy.spatial.distance.pdist(panel.xy))
    np.fill_diagonal(distances, np.inf)
    return int(distances.min(1).argmax())


@needs_browser
def test_the_mouse_shows_an_image_and_pins_it_with_its_neighbours(drawn, shown):
    i = alone(shown.panels[2])
    script = f"""
        mouse({i}, "move");
        const tip = get("tip"), pen = tip.querySelector("canvas").getContext("2d");
        const seen = {{ tip: tip.textContent, image: [...pen.getImageData(0, 0, 96, 96).data] }};
        mouse({i}, "down", "up");
        seen.cards = all("#neighbours button").map((b) => [b.textContent, b.className]);
        seen.agreement = get("agreement").textContent;
        all("#neighbours button")[0].click();
        seen.next = explorer.state().pinned;
        document.dispatchEvent(new KeyboardEvent("keydown", {{ key: "Escape" }}));
        return {{ ...seen, last: explorer.state().pinned }};"""
    seen = browser.act(drawn.figures / "tsne.html", script)
    assert seen["tip"] == f"{shown.scene.classes[shown.labels[i]]}test image {shown.scene.rows[i]}"
    pixels = np.array(seen["image"]).reshape(96, 96, 4)[3::6, 3::6, :3]  # 16 px, 6 times as large
    np.testing.assert_array_equal(pixels, shown.scene.shown.images[i].permute(1, 2, 0))
    near, similarity = shown.features["near"][i], shown.features["similarity"][i]
    same = shown.labels[near] == shown.labels[i]
    for (words, look), n, value, right in zip(seen["cards"], near, similarity, same, strict=True):
        name = shown.scene.classes[shown.labels[n]]
        assert words == f"{'✓' if right else '✗'} {value:.3f}{name}"
        assert look == ("same" if right else "other")
    assert f"{same.sum()} of 10 are of its class" in seen["agreement"]
    assert (seen["next"], seen["last"]) == (near[0], -1)


@needs_browser
def test_the_legend_and_the_filter_hide_images_from_view_and_from_the_mouse(drawn, shown):
    i = alone(shown.panels[2])
    label = int(shown.labels[i])
    colour = list(bytes.fromhex(tSNE.class_styles(10)[label][0][1:]))
    script = f"""
        const seen = [], note = async () =>
            seen.push(get("count").textContent, (await pixels({colour})) > 0);
        await note();
        all("#legend button")[{label}].click();
        await note();
        mouse({i}, "move");
        seen.push(explorer.state().hovered);
        get("all").click();
        await note();
        get("mixed").click();
        return [...seen, get("count").textContent];"""
    everything = f"{IMAGES} images"
    mixed = (shown.labels[shown.features["near"]] == shown.labels[:, None]).sum(1) < 5
    before, some, hidden, none, hovered, *after = browser.act(drawn.figures / "tsne.html", script)
    assert [before, some, *after[:2]] == [everything, True] * 2
    assert [hidden, none] == [f"{(shown.labels != label).sum()} of {everything}", False]
    assert hovered != i
    assert after[2] == f"{mixed.sum()} of {everything}"


@needs_browser
def test_switching_the_panel_moves_the_points(drawn, shown):
    script = f"""
        const seen = [], note = () => seen.push([
            all("#panels button").findIndex((b) => b.getAttribute("aria-pressed") === "true"),
            Array.from({{ length: {IMAGES} }}, (_, i) => explorer.screenOf(i)),
        ]);
        note();
        all("#panels button")[0].click();
        await until(() => !explorer.state().moving);
        note();
        const text = all("#panels button").map((b) => b.textContent);
        return [seen, text];"""
    seen, text = browser.act(drawn.figures / "tsne.html", script)
    assert [pressed for pressed, _ in seen] == [2, 0]
    for number, points in seen:
        at = np.array([[p["x"], -p["y"]] for p in points])
        xy = tSNE.unit_square(shown.panels[number].xy)
        # without the scale: the size of the map may still have changed in between
        at = (at - (at.max(0) + at.min(0)) / 2) / np.ptp(at, axis=0).max()
        np.testing.assert_allclose(at, xy / np.ptp(xy, axis=0).max(), atol=1e-3)
    assert text[0] == str(shown.panels[0]).replace(" · ", "")
    assert len(text) == 9  # with those of the epochs


@needs_browser
def test_names_of_classes_are_text_wherever_they_stand(tmp_path):
    scene, features, panel = odd_scene()
    tiles = tSNE.small_images(scene.shown, 8)
    page = tSNE.build_page([panel], scene, features, HARMLESS[0], "<b>", tiles)
    (tmp_path / "odd.html").write_text(page, encoding="utf-8")
    script = """
        mouse(1, "move", "down", "up");
        const names = all("#legend button span").map((span) => span.textContent);
        return [document.title, get("caption").textContent, names, all("script, img").length];"""
    title, caption, names, elements = browser.act(tmp_path / "odd.html", script)
    assert (title, caption, names) == (HARMLESS[0], "<b>", list(HARMLESS))
    assert elements == 3  # the page's two scripts, and the one above


@needs_browser
def test_a_narrow_dark_window_scrolls_down_only(drawn):
    script = """return [document.documentElement.scrollWidth, innerWidth, get("map").clientHeight,
        getComputedStyle(document.body).backgroundColor];"""
    page = drawn.figures / "tsne.html"
    assert browser.act(page, script)[3] == "rgb(255, 255, 255)"
    dark = ("--window-size=360,640", "--blink-settings=preferredColorScheme=0")
    needed, width, height, paper = browser.act(page, script, *dark)
    assert needed == width <= 500
    assert height >= 300
    assert paper != "rgb(255, 255, 255)"
