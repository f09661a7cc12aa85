"""The training loop: Algorithm 1, batches, exact resume, and a run's files."""

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

import simclr
import utils
from conftest import CPU, interrupt, load_images, load_run, log_of, position
from simclr import SimCLR, run
from utils import Images, InputError


def train(config, **options):
    """simclr.train() for a configuration that is not resolved."""
    data = simclr.load_data(config, CPU)
    return simclr.train(simclr.resolve(config, data.pretrain, CPU), data, CPU, **options)


def assert_equal_training(a, b):
    assert log_of(a) == log_of(b)
    left, right = (utils.load_checkpoint(c.folder / "last.pt")["model"] for c in (a, b))
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def kill(config, function, call):
    """Runs until the call of that number to simclr's function, in which the run is killed."""
    real, count = getattr(simclr, function), itertools.count(1)

    def die(*arguments):
        if next(count) == call:
            raise RuntimeError("killed")
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simclr, function, die)
        with pytest.raises(RuntimeError, match="killed"):
            run(config)


# ------------------------------------------------------------------------------------ Algorithm 1


def test_an_epoch_equals_algorithm_1_by_hand(tiny_config, device):
    """Three steps; that both views share one pass of BatchNorm shows in its statistics."""
    config = tiny_config(
        image_size=16, optimizer="sgd", weight_decay=0.01, precision="float32", batch_size=8,
        temperature=0.5,
    )  # fmt: skip
    random = torch.Generator().manual_seed(0)
    batches = [torch.rand(16, 3, 16, 16, generator=random).to(device) for _ in range(3)]
    ours, theirs = (simclr.make_model(config).to(device).train() for _ in range(2))
    optimizer, our_losses, losses = simclr.make_optimizer(config, ours), [], []
    decayed = [p for p in theirs.parameters() if p.ndim > 1]
    others = [p for p in theirs.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others}]
    solver = torch.optim.SGD(groups, lr=0, momentum=0.9)
    for views, rate in zip(batches, [0.1, 0.2, 0.05], strict=True):
        simclr.set_rate(optimizer, rate)
        our_losses.append(simclr.training_step(ours, views, simclr.nt_xent, config)[0].item())
        optimizer.step()
        optimizer.zero_grad()

        for group in solver.param_groups:
            group["lr"] = rate
        z = F.normalize(theirs.projector(theirs.encoder(views)), dim=1)
        similarity = (z @ z.T / 0.5).exp()
        similarity = similarity - similarity.diag().diag()
        positive = torch.cat([similarity.diag(8), similarity.diag(-8)])
        loss = -(positive / similarity.sum(1)).log().mean()
        solver.zero_grad()
        loss.backward()
        solver.step()
        losses.append(loss.item())

    assert our_losses == pytest.approx(losses, rel=1e-4)
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.allclose(a.float(), b.float(), atol=2e-4), name


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_precision_is_that_of_the_forward_pass(tiny_config, precision):
    config = tiny_config(image_size=16, precision=precision)
    _, z = simclr.training_step(
        simclr.make_model(config), torch.rand(8, 3, 16, 16), simclr.nt_xent, config
    )
    assert z.dtype == getattr(torch, precision)


# ---------------------------------------------------------------------------------------- batches


def numbered(n):
    """Images whose brightness tells their index."""
    grey = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1)
    return Images(grey.expand(n, 3, 16, 16).contiguous())


def plain_augment(config):
    """The crop alone: it does not change an image of one colour."""
    augment = simclr.make_augment(config)
    augment.steps = augment.steps[:1]
    return augment


@pytest.mark.parametrize(("n", "batch", "expected"), [(10, 4, 2), (8, 4, 2), (3, 4, 1), (2, 2, 1)])
def test_an_epoch_sees_each_image_once_and_drops_a_smaller_last_batch(
    tiny_config, n, batch, expected
):
    config, seen = tiny_config(image_size=16, batch_size=batch), []
    batches = [*simclr.view_batches(config, numbered(n), CPU, 0, 0, plain_augment(config))]
    assert len(batches) == expected
    for views in batches:
        first, second = (views[:, 0, 0, 0] * 255).round().int().chunk(2)
        assert torch.equal(first, second)  # row i and row N + i are one image
        seen += first.tolist()
    assert len(set(seen)) == len(seen) == expected * min(n, batch)


def test_order_and_views_follow_from_seed_epoch_and_step(tiny_config):
    data = load_images("digits", "test")
    data.images = data.images[:20]

    def batches(epoch, start=0, **overrides):
        config = tiny_config(image_size=16, batch_size=5, **overrides)
        return torch.stack([*simclr.view_batches(config, data, CPU, epoch, start)])

    first = batches(0)
    assert torch.equal(first, batches(0))
    assert torch.equal(first[2:], batches(0, start=2))
    assert not torch.equal(first[0], batches(1)[0])
    assert not torch.equal(first[0], batches(0, seed=1)[0])
    one, two = first[0].chunk(2)
    assert ((one - two).abs().amax((1, 2, 3)) > 0).all()  # two views, not one twice


def test_streamed_views_equal_views_from_memory(photo_config, tmp_path):
    """The crop made by a worker is the crop made on the device, up to 8-bit rounding.

    --view-size is the side of the views, held in memory or streamed, and of nothing else.
    """
    config = photo_config(4, (20, 20), view_size=12, batch_size=4, rotation=0.0)
    memory = load_images("folder", "pretrain", config.data_dir)
    names = np.array([f"{i}.png".encode() for i in range(4)])
    streamed = Images(None, paths=names, root=tmp_path / "photos")
    augment = plain_augment(config)
    (a,), (b,) = (
        simclr.view_batches(config, data, CPU, 0, 0, augment) for data in (memory, streamed)
    )
    assert (a - b).abs().max() <= 1.5 / 255
    assert a.shape == (8, 3, 12, 12)
    assert simclr.features(utils.flat_pixels, memory, config, CPU).shape == (4, 3 * 16 * 16)
    assert simclr.geometric_augment(config).size == 16  # for a classifier, which is tested on them


# ---------------------------------------------------------------------------- runs and their files


def test_a_run_writes_its_files(finished):
    config = finished.config
    assert sorted(p.name for p in config.folder.iterdir()) == [
        ".lock", "config.json", *(f"epoch000{i}.pt" for i in range(1, 5)), "last.pt", "log.jsonl",
        "previous.pt", "summary.json",
    ]  # fmt: skip
    rows = utils.read_jsonl(config.folder / "log.jsonl")
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert [("knn" in row) for row in rows] == [False, True, False, True]
    assert all(0 < row["loss"] < math.log(600) * 1.2 for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"]
    saved = json.loads((config.folder / "config.json").read_text())
    assert (saved["image_size"], saved["stem"]) == (16, "small")
    summary = json.loads((config.folder / "summary.json").read_text())
    for key in ("knn", "linear_10", "linear_all"):
        assert set(summary[key]) == {"pixels", "untrained", "simclr"}
        assert all(0.3 < value <= 1 for value in summary[key].values())
    assert summary["knn"]["simclr"] == rows[-1]["knn"]
    parts = {part: summary[f"{part}_seconds"] for part in simclr.TIMED}
    assert summary["wall_seconds"] == pytest.approx(sum(parts.values()), abs=0.01)
    assert f"in {summary['wall_seconds']:.1f} s: training {parts['training']:.1f}" in finished.said
    encoder = SimCLR(simclr.Config(**summary["config"])).encoder
    assert summary["parameters"] == sum(p.numel() for p in encoder.parameters())
    with Image.open(config.figure_folder / "loss_plot.png") as picture:
        assert picture.width > 800
    assert "SimCLR h" in finished.said


def broken_compiler(graph, inputs):
    raise RuntimeError("no compiler\nof any kind")


@pytest.mark.parametrize(
    ("backend", "said"),
    [("eager", "compiled in"),  # needs no compiler
     (broken_compiler, "torch.compile failed, so the network is not compiled")],
)  # fmt: skip
def test_a_compiled_run_is_the_same_run(small_config, unjudged, monkeypatch, capsys, backend, said):
    monkeypatch.setattr(simclr, "COMPILE", {"backend": backend})
    plain, compiled = small_config(run="a"), small_config(run="b", compile="on")
    run(plain)
    assert said not in "".join(capsys.readouterr())
    run(compiled)
    lines = [x for text in capsys.readouterr() for x in text.splitlines() if said in x]
    assert len(lines) == 1
    assert ("no compiler of any kind" in lines[0]) == (backend == broken_compiler)
    assert_equal_training(plain, compiled)


@pytest.mark.parametrize(
    ("compile", "pays", "faster", "expected"),
    [("auto", True, True, True), ("auto", True, False, False), ("auto", False, True, False),
     ("on", False, False, True), ("off", True, True, False)],
)  # fmt: skip
def test_what_is_compiled(tiny_config, monkeypatch, compile, pays, faster, expected):
    """By default a long run on a GPU, if that makes a pass faster."""
    config = tiny_config(compile=compile, batch_size=8, precision="float32")
    config = simclr.resolve(config, numbered(8), torch.device("cuda"))
    assert config.compile == compile
    assert simclr.resolve(config, numbered(8), CPU).compile == ("on" if compile == "on" else "off")
    monkeypatch.setattr(simclr, "COMPILE", {"backend": "eager"})
    seconds = iter([0.2, 0.1 if faster else 0.3])
    monkeypatch.setattr(simclr, "seconds_a_pass", lambda *_: next(seconds))
    monkeypatch.setattr(simclr, "COMPILE_PAYS_S", 0.7 if pays else 0.9)  # 4 steps of 0.2 s
    model, now = simclr.make_model(config), simclr.TrainState(1, torch.zeros(3))
    network = simclr.compiled(model, config, 8, now)
    assert (network is not model) == expected


@pytest.mark.parametrize(("batch_size", "size", "steps"), [(50, 50, 4), (4096, 210, 1)])
def test_the_logged_rates_are_the_schedules(small_config, unjudged, batch_size, size, steps):
    """A warm-up counted in epochs, or a peak of another batch than that there is, would show."""
    config = small_config(warmup_epochs=2.0, lr=0.02, lr_scaling="linear", batch_size=batch_size)
    run(config)
    expected = [simclr.learning_rate(config, steps * e - 1, size, steps) for e in (1, 2, 3, 4)]
    assert [row["lr"] for row in log_of(config)] == pytest.approx(expected)
    assert expected[:2] == pytest.approx([0.02 * size / 512, 0.02 * size / 256])


@pytest.mark.parametrize(
    ("n", "batch", "said"),
    [(2, 256, "2 images a step (all of them)"), (3, 256, "3 images a step (all of them)"),
     (5, 2, " 2 epochs of 2 steps; each epoch leaves out 1 at random, too few for a batch")],
)  # fmt: skip
def test_very_small_data_sets(photo_config, no_figure, capsys, n, batch, said):
    config = photo_config(n, (12, 12), image_size=0, batch_size=batch)
    summary, out = run(config), capsys.readouterr().out
    assert math.isfinite(summary["loss"])
    assert "knn" not in summary  # no labels, so nothing to judge by
    assert said in out
    assert f"{config.folder} --data-dir LABELLED_IMAGES" in out


# ------------------------------------------------------------------------- stopping and continuing


@pytest.mark.parametrize("optimizer", ["adamw", "lars"])
def test_interrupted_and_continued_is_bit_identical(small_config, unjudged, optimizer):
    """Stopped in the middle of epoch 2 (of 4 steps each) and at the end of epoch 3."""
    settings = dict(optimizer=optimizer, lr=1e-3, lr_scaling="none")
    whole, pieces = (small_config(run=name, **settings) for name in ("whole", "pieces"))
    run(whole)
    for expected in ((1, 2), (3, 0)):
        interrupt(lambda: run(pieces), 6)
        assert position(pieces) == expected
        assert not (pieces.folder / "summary.json").exists()
    run(pieces)
    assert_equal_training(whole, pieces)


def test_resuming_from_an_older_checkpoint_is_bit_identical(small_config, monkeypatch):
    """The log is ahead of the checkpoint, as after a kill: its rows are written again."""
    whole, killed = small_config(run="whole"), small_config(run="killed")
    first = run(whole)
    with monkeypatch.context() as patch:
        due = iter([True])
        patch.setattr(utils.Clock, "within", lambda *_: next(due, False))
        kill(killed, "redraw", 3)
    assert len(log_of(killed)) == 3
    assert position(killed) == (1, 0)
    again = run(killed)
    assert_equal_training(whole, killed)
    assert all(again[key] == first[key] for key in ("loss", "knn", "linear_10", "linear_all"))


def test_a_run_killed_while_it_measures_knn_ends_as_one_that_was_not(
    small_config, unjudged, monkeypatch
):
    monkeypatch.setattr(simclr, "mean_cosine", lambda z: torch.ones(()))
    whole, killed = (small_config(run=name, epochs=2, knn_every=1) for name in ("whole", "killed"))
    run(whole)
    kill(killed, "knn_accuracy", 2)
    run(killed)
    assert_equal_training(whole, killed)
    assert [row.get("collapsed") for row in log_of(killed)] == [True, True]


def test_a_finished_run_is_left_alone_and_overwrite_starts_anew(small_config, monkeypatch, capsys):
    config = small_config(epochs=1)
    first, last = run(config), config.folder / "last.pt"
    stamp = last.stat().st_mtime_ns
    said = capsys.readouterr().out
    assert run(config) == json.loads(json.dumps(first))
    again = capsys.readouterr().out
    assert "is finished" in again
    assert again.splitlines()[-10:] == said.splitlines()[-10:]  # results, files, what to do next
    assert last.stat().st_mtime_ns == stamp
    monkeypatch.setattr(simclr, "evaluate", lambda *_: {})
    assert run(config, overwrite=True)["loss"] == first["loss"]
    assert last.stat().st_mtime_ns != stamp


def test_nothing_of_a_run_that_is_overwritten_remains(small_config, unjudged):
    """Its summary or kept checkpoints beside the new run's would be taken for the new run's."""
    old = small_config(epochs=2, keep_every=1)
    run(old)
    interrupt(lambda: run(small_config(epochs=3), overwrite=True), 2)
    assert sorted(path.name for path in old.folder.iterdir()) == [
        ".lock", "config.json", "last.pt", "log.jsonl", "previous.pt",
    ]  # fmt: skip
    assert log_of(old) == []
    assert json.loads((old.folder / "config.json").read_text())["epochs"] == 3


def test_a_run_without_a_step_does_not_hold_its_name(small_config, unjudged):
    """A wrong setting and Ctrl-C: the corrected command needs no --overwrite."""
    kill(small_config(epochs=1, temperature=0.7), "training_step", 1)
    assert run(small_config(epochs=1))["config"]["temperature"] == 0.3


def test_the_log_is_rebuilt_from_the_checkpoint(small_config, unjudged):
    """Where log and summary are lost or damaged, the run is evaluated again."""
    config = small_config(epochs=2)
    first, file = run(config), config.folder / "log.jsonl"
    whole = file.read_text()
    for damage in (None, b"", b"5\n", b"\xff\xfe", whole.splitlines()[0].encode()):
        (config.folder / "summary.json").write_bytes(b"\xff\xfe")
        file.unlink() if damage is None else file.write_bytes(damage)
        again = run(config)
        assert file.read_text() == whole
        assert again["views_per_second"] == first["views_per_second"]


@pytest.mark.parametrize("finished", [True, False])
def test_another_configuration_or_other_images_are_another_run(
    photo_config, no_figure, tmp_path, finished
):
    config = photo_config(6, (12, 12), epochs=1)
    run(config) if finished else interrupt(lambda: run(config), 2)
    before = (config.folder / "last.pt").read_bytes()
    with pytest.raises(InputError, match=r"--temperature \(0\.3 there, 0\.7 now\)"):
        run(photo_config(6, (12, 12), epochs=1, temperature=0.7))
    with pytest.raises(InputError, match=r"--epochs \(1 there, 2 now\); more epochs are another"):
        run(photo_config(6, (12, 12), epochs=2))
    (tmp_path / "photos" / "5.png").rename(tmp_path / "photos" / "other.png")
    with pytest.raises(InputError, match=r"images \(6 there, 6 now\)"):
        run(config)
    assert (config.folder / "last.pt").read_bytes() == before
    (tmp_path / "photos" / "other.png").rename(tmp_path / "photos" / "5.png")
    run(photo_config(6, (12, 12), epochs=1, workers=1))  # not part of what the run is


# ------------------------------------------------------------------------------------ what can fail


def test_an_image_that_cannot_be_read_ends_the_run_after_the_epoch_was_saved(
    photo_config, no_figure, tmp_path
):
    config, bad = photo_config(8), tmp_path / "photos" / "5.png"
    good = bad.read_bytes()
    bad.write_bytes(good[:40])
    for _ in range(2):  # the second time before a step is made
        with pytest.raises(InputError, match=rf"cannot read the image {bad} .* 1 of 8 images"):
            run(config)
        assert position(config) == (1, 0)
    bad.write_bytes(good)
    run(config)
    assert [row.get("unreadable") for row in log_of(config)] == [1, None]


def test_a_process_that_decodes_and_dies_costs_no_step(photo_config, no_figure):
    whole, died = photo_config(8, run="whole"), photo_config(8, run="died")
    run(whole)

    def batches(*arguments):
        yield from itertools.islice(simclr.view_batches(*arguments), 2)
        raise InputError("a process that decodes images died")

    with pytest.raises(InputError, match="died; the run is saved, and the same command continues"):
        train(died, batches=batches)
    assert position(died) == (0, 2)
    run(died)
    assert_equal_training(whole, died)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(
    small_config, monkeypatch
):
    monkeypatch.setattr(simclr, "SAVE_SHARE", 1e9)  # after every epoch
    config, calls = small_config(), itertools.count(1)

    def explode(z1, z2, temperature):
        return simclr.nt_xent(z1, z2, temperature) * (math.nan if next(calls) > 6 else 1.0)

    with pytest.raises(InputError, match=r"not finite in epoch 2 .* lower --lr"):
        train(config, loss=explode)
    assert position(config) == (1, 0)
    assert len(log_of(config)) == 1
    model = utils.load_checkpoint(config.folder / "last.pt")["model"]
    assert all(value.isfinite().all() for value in model.values())


@pytest.mark.parametrize("knn_every", [0, 1])
def test_weights_that_are_finite_and_useless_are_not_kept(small_config, knn_every):
    """One step at such a rate: the loss before it was fine, and so was the last checkpoint."""
    fast = dict(optimizer="sgd", lr=1e30, lr_scaling="none", warmup_epochs=0.0)
    config = small_config(epochs=2, batch_size=210, knn_every=knn_every, **fast)
    with pytest.raises(InputError, match=r"not finite in epoch 1 .* lower --lr"):
        run(config)
    assert position(config) == (0, 0)


# ------------------------------------------------------------------------------ what was learned


def test_the_figure_shows_what_was_logged():
    rows = [
        {"epoch": e, "loss": 5 / e, "contrastive_accuracy": e / 20, "lr": 0.1 / e}
        for e in range(1, 11)
    ]
    unmeasured = simclr.draw_training(simclr.Config(), rows, 256).axes[2]
    assert [text.get_text() for text in unmeasured.texts] == ["not measured"]
    assert not len(unmeasured.get_yticks())
    rows[4]["knn"], rows[9]["knn"] = 0.5, 0.75
    baselines = {"pixels": 0.4, "untrained": 0.3}
    figure = simclr.draw_training(simclr.Config(), rows, 256, baselines)
    loss, guess, knn, rate = figure.axes
    assert loss.lines[0].get_ydata().tolist() == [5 / e for e in range(1, 11)]
    assert loss.lines[1].get_ydata()[0] == math.log(511)
    assert guess.lines[0].get_ydata()[-1] == 50
    assert knn.lines[0].get_xdata().tolist() == [5, 10]
    assert knn.lines[0].get_ydata().tolist() == [50, 75]
    assert [line.get_ydata()[0] for line in knn.lines[-2:]] == [40, 30]
    rows[4]["knn_images"] = 25  # a sampling error of 10 %
    knn = simclr.draw_training(simclr.Config(), rows, 256).axes[2]
    assert list(knn.lines[1].get_ydata()) == [40, 60]
    assert rate.lines[0].get_ydata()[0] == 0.1
    assert all(axis.get_title() for axis in figure.axes)
    rows[0]["loss"] = 30.0  # above chance
    assert simclr.draw_training(simclr.Config(), rows, 256).axes[0].get_ylim()[1] > 30
    rows[0]["loss"] = -7.0  # as DCL's may be
    assert simclr.draw_training(simclr.Config(loss="dcl"), rows, 256).axes[0].get_ylim()[0] <= -7


def test_a_run_ends_at_the_knn_accuracy_that_was_asked_for(
    small_config, monkeypatch, capsys, unjudged
):
    """In the epoch in which it is reached; a stopped run knows that it is not there yet."""
    measured = iter([0.5, 0.8, 0.7])
    monkeypatch.setattr(simclr, "knn_accuracy", lambda *_: next(measured))
    config = small_config(stop_at_knn=0.8, knn_every=1)
    interrupt(lambda: run(config), 2)
    summary = run(config)
    assert summary["epochs"] == len(log_of(config)) == 2
    assert "2 of 4 epochs" in capsys.readouterr().out
    assert run(config) == json.loads(json.dumps(summary))
    assert next(measured) == 0.7


def test_the_monitor_can_do_without_test_images(small_config, unjudged, monkeypatch, capsys):
    """With --knn-split held-out: kNN within the training images, here by scikit-learn's."""
    monkeypatch.setattr(simclr, "knn_accuracy", None)  # of the test images
    config = small_config(knn_split="held-out", epochs=1)
    run(config)
    (row,) = log_of(config)
    data, encoder = simclr.load_data(config, CPU), load_run(config.folder / "last.pt").model
    x, y = utils.embed(encoder.encoder, data.train, 16, CPU).numpy(), data.train.labels.numpy()
    fit, held_out = (rows.numpy() for rows in utils.stratified_split(data.train.labels))
    knn = KNeighborsClassifier(10, metric="cosine").fit(x[fit], y[fit])
    assert row["knn"] == pytest.approx(knn.score(x[held_out], y[held_out]), abs=1e-6)
    assert row["knn_images"] == len(held_out)
    assert f"kNN {utils.accuracy_text(row['knn'], len(held_out))}  " in capsys.readouterr().out


def test_few_test_images_show_their_sampling_error_and_uneven_classes_their_share():
    """So that a difference of one picture is not read as a gain."""
    rows = ("pixels", "untrained", "simclr")
    scores = dict.fromkeys(simclr.SCORES, dict.fromkeys(rows, 0.9))
    scores["linear_10_std"] = dict.fromkeys(rows, 0.01)

    def table(n, *labels):
        train = SimpleNamespace(labels=torch.tensor(labels), classes="ab")
        test = Images(torch.zeros(n, 1), torch.arange(n) % 4 // 3)  # 3 of 4 are of class 0
        return simclr.results_table(scores, simclr.Config(), utils.Data(train, train, test))

    few, many = table(400, *[0] * 4, *[1] * 2), table(2000, *[0] * 10, *[1] * 10)
    assert few.count("90.0 ± 1.5 %") == 6
    assert few.count("90.0 ± 1.8 %") == 3  # of the five draws too
    assert "sampling error of 400 images" in few
    assert many.count("±") == many.count("90.0 ± 1.0 %") == 3
    assert "≤ 10 labels a class" in few  # there are 2
    assert "≤" not in many
    assert "the largest class: 75.0% of the test images" in few
    assert "largest class" not in many
