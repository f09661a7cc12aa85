"""The training loop: Algorithm 1, batches, exact resume, and a run's files."""

import dataclasses
import json
import math
import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import simclr
import utils
from simclr import Position, SimCLR
from utils import ImageFiles, ImageSet, InputError

CPU = torch.device("cpu")
TIMES = ("seconds", "knn_seconds", "views_per_second")


def run(config, **options):
    return simclr.run(config, **options)


def weights(config):
    return utils.load_checkpoint(config.folder / "last.pt")["model"]


def log(config):
    rows = utils.read_jsonl(config.folder / "log.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def assert_equal_runs(a, b):
    assert log(a) == log(b)
    for (name, left), right in zip(weights(a).items(), weights(b).values(), strict=True):
        assert torch.equal(left, right), name
    left, right = (json.loads((c.folder / "summary.json").read_text()) for c in (a, b))
    for key in ("loss", "knn", "linear_10", "linear_all"):
        assert left[key] == right[key]


def interrupt_after(monkeypatch, steps):
    """Sends this process SIGTERM after so many steps; the count goes on from run to run."""
    count = [0]
    real = utils.Progress.advance

    def advance(self):
        real(self)
        count[0] += 1
        if count[0] == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(utils.Progress, "advance", advance)


# ------------------------------------------------------------------------------------ Algorithm 1


def test_an_epoch_equals_algorithm_1_by_hand(tiny_config, device):
    """Three steps of the loop against a plain writing of it with torch's own SGD."""
    config = tiny_config(
        dataset="digits", image_size=16, optimizer="sgd", lr=0.1, lr_scaling="none",
        weight_decay=0.01, precision="float32", batch_size=8, temperature=0.5,
    )  # fmt: skip
    random = torch.Generator().manual_seed(0)
    batches = [torch.rand(16, 3, 16, 16, generator=random).to(device) for _ in range(3)]
    rates = [0.1, 0.2, 0.05]

    ours = simclr.make_model(config).to(device)
    position = Position()
    simclr.train_epoch(
        ours, simclr.make_optimizer(config, ours), batches, lambda step: rates[step],
        lambda a, b: simclr.nt_xent(a, b, 0.5), "float32", position, lambda: False,
    )  # fmt: skip

    theirs = simclr.make_model(config).to(device).train()
    decayed = [p for p in theirs.parameters() if p.ndim > 1]
    others = [p for p in theirs.parameters() if p.ndim <= 1]
    solver = torch.optim.SGD(
        [{"params": decayed, "weight_decay": 0.01}, {"params": others}], lr=0, momentum=0.9
    )
    losses = []
    for views, rate in zip(batches, rates, strict=True):
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

    assert position.step == 3
    assert position.loss_sum == pytest.approx(sum(losses), rel=1e-4)
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.allclose(a.float(), b.float(), atol=2e-4), name


def test_both_views_share_one_batchnorm_pass(tiny_config):
    """The running mean after a step is that of all 2N views together."""
    config = tiny_config(image_size=16, precision="float32")
    model = simclr.make_model(config)
    views = torch.cat([torch.zeros(8, 3, 16, 16), torch.rand(8, 3, 16, 16)])
    with torch.no_grad():
        mean = model.encoder.conv1(views).mean((0, 2, 3))
    solver = simclr.make_optimizer(config, model)
    simclr.train_epoch(
        model, solver, [views], lambda _: 0.0, lambda a, b: simclr.nt_xent(a, b, 0.5), "float32",
        Position(), lambda: False,
    )  # fmt: skip
    assert torch.allclose(model.encoder.bn1.running_mean, 0.1 * mean, atol=1e-6)
    assert model.encoder.bn1.num_batches_tracked == 1


# ---------------------------------------------------------------------------------------- batches


def numbered(n):
    """Images whose brightness tells their index."""
    grey = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1)
    return ImageSet(grey.expand(n, 3, 16, 16).contiguous())


def plain_augment(config):
    """The crop alone: it does not change an image of one colour."""
    augment = simclr.make_augment(config)
    augment.steps = augment.steps[:1]
    return augment


@pytest.mark.parametrize(("n", "batch", "expected"), [(10, 4, 2), (8, 4, 2), (3, 4, 1), (2, 2, 1)])
def test_an_epoch_sees_each_image_once_and_drops_a_smaller_last_batch(
    tiny_config, n, batch, expected
):
    config = tiny_config(image_size=16, batch_size=batch)
    batches = list(
        simclr.view_batches(config, numbered(n), plain_augment(config), CPU, epoch=0, start=0)
    )
    assert len(batches) == expected
    seen = []
    for views in batches:
        indices = (views[:, 0, 0, 0] * 255).round().int()
        first, second = indices.chunk(2)
        assert torch.equal(first, second)  # row i and row N + i are one image
        seen += first.tolist()
    assert len(set(seen)) == len(seen) == expected * min(n, batch)


def test_order_and_views_follow_from_seed_epoch_and_step(tiny_config):
    config = tiny_config(image_size=16, batch_size=5)
    data, augment = utils.load_images("digits", "test"), simclr.make_augment(config)
    data.images = data.images[:20]

    def batches(epoch, start=0, **overrides):
        changed = tiny_config(image_size=16, batch_size=5, **overrides)
        return list(simclr.view_batches(changed, data, augment, CPU, epoch, start))

    first = batches(0)
    assert all(torch.equal(a, b) for a, b in zip(first, batches(0), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first[2:], batches(0, start=2), strict=True))
    assert not torch.equal(first[0], batches(1)[0])
    assert not torch.equal(first[0], batches(0, seed=1)[0])
    one, two = first[0].chunk(2)
    assert ((one - two).abs().amax((1, 2, 3)) > 0).all()  # two views, not one twice


def test_streamed_batches_do_not_depend_on_the_workers(tiny_config, tmp_path, write_image):
    for i in range(9):
        write_image(tmp_path / f"{i}.png", size=(30 + i, 40), seed=i)
    data = utils.load_images("folder", "pretrain", tmp_path)
    assert isinstance(data, ImageFiles)

    def batches(workers, start=0):
        config = tiny_config(image_size=16, batch_size=4, workers=workers)
        augment = simclr.make_augment(config)
        return list(simclr.view_batches(config, data, augment, CPU, 0, start))

    alone, two = batches(0), batches(2)
    assert len(alone) == 2
    assert alone[0].shape == (8, 3, 16, 16)
    assert all(torch.equal(a, b) for a, b in zip(alone, two, strict=True))
    assert torch.equal(alone[1], batches(1, start=1)[0])


def test_streamed_views_equal_views_from_memory(tiny_config, tmp_path, write_image):
    """The crop made by a worker is the crop made on the device, up to 8-bit rounding."""
    for i in range(4):
        write_image(tmp_path / f"{i}.png", size=(20, 20), seed=i)
    memory = utils.load_images("folder", "pretrain", tmp_path)
    names = np.array([f"{i}.png".encode() for i in range(4)])
    streamed = ImageFiles(tmp_path, names)
    config = tiny_config(image_size=16, batch_size=4, workers=0, rotation=0.0)
    augment = plain_augment(config)
    (a,) = simclr.view_batches(config, memory, augment, CPU, 0, 0)
    (b,) = simclr.view_batches(config, streamed, augment, CPU, 0, 0)
    assert (a - b).abs().max() <= 1.5 / 255


def test_views_may_be_smaller_than_the_images_that_are_judged(tiny_config, tmp_path, write_image):
    """--view-size is the side of the views, held in memory or streamed, and of nothing else."""
    config = tiny_config(image_size=16, view_size=12, batch_size=4, workers=0, blur_p=1.0)
    for i in range(4):
        write_image(tmp_path / f"{i}.png", size=(20, 20), seed=i)
    memory = utils.load_images("folder", "pretrain", tmp_path)
    streamed = ImageFiles(tmp_path, np.array([f"{i}.png".encode() for i in range(4)]))
    augment = plain_augment(config)
    for data in (memory, streamed):
        (views,) = simclr.view_batches(config, data, augment, CPU, 0, 0)
        assert views.shape == (8, 3, 12, 12)
    pixels = simclr.features(utils.flat_pixels, memory, config, CPU)
    assert pixels.shape == (4, 3 * 16 * 16)
    assert simclr.geometric_augment(config).size == 16  # for a classifier, which is tested on them


def test_views_as_large_as_the_images_are_no_setting(tiny_config):
    """So that a run continues whichever of the two is given; another size is another run."""
    data = numbered(4)
    given, left, other = (
        simclr.resolve(tiny_config(view_size=size), data, CPU) for size in (16, 0, 12)
    )
    assert given == left
    assert (left.view_side, other.view_side) == (16, 12)
    assert simclr.differences(dataclasses.asdict(left), other) == ["--view-size (0 there, 12 now)"]
    before = {k: v for k, v in dataclasses.asdict(left).items() if k != "view_size"}
    assert simclr.differences(before, left) == []  # of a version that did not have it


# ---------------------------------------------------------------------------- runs and their files


@pytest.fixture
def unjudged(monkeypatch):
    """Leaves the final evaluation out, which takes as long as a small run itself."""
    monkeypatch.setattr(simclr, "evaluate", lambda *_: {})


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
    assert saved["image_size"] == 16
    assert saved["stem"] == "small"
    summary = json.loads((config.folder / "summary.json").read_text())
    for key in ("knn", "linear_10", "linear_all"):
        assert set(summary[key]) == {"pixels", "untrained", "simclr"}
        assert all(0.3 < value <= 1 for value in summary[key].values())
    assert summary["knn"]["simclr"] == rows[-1]["knn"]
    assert summary["views_per_second"] > 0
    assert summary["seconds"] >= summary["training_seconds"] > 0
    encoder = SimCLR(simclr.Config(**summary["config"])).encoder
    assert summary["parameters"] == sum(p.numel() for p in encoder.parameters())
    with Image.open(config.figure_folder / "loss_plot.png") as picture:
        assert picture.width > 800
    assert "SimCLR h" in finished.said


def test_two_runs_are_bit_identical_and_a_seed_changes_them(small_config):
    a, b, c = small_config(run="a"), small_config(run="b"), small_config(run="c", seed=1)
    for config in (a, b, c):
        run(config)
    assert_equal_runs(a, b)
    assert log(a) != log(c)


def test_a_compiled_run_is_the_same_run(small_config, unjudged, monkeypatch, capsys):
    monkeypatch.setattr(simclr, "COMPILE", {"backend": "aot_eager"})  # needs no compiler
    plain, compiled = small_config(run="a"), small_config(run="b", compile="on")
    run(plain)
    assert "compiled in" not in capsys.readouterr().out
    run(compiled)
    assert "compiled in" in capsys.readouterr().out
    assert log(compiled) == log(plain)
    for left, right in zip(weights(plain).values(), weights(compiled).values(), strict=True):
        assert torch.equal(left, right)


def test_every_network_of_a_process_is_compiled(tiny_config, monkeypatch):
    """Of a function torch compiles so many forms, of all networks together, and no more."""
    compiled = []
    monkeypatch.setattr(
        simclr, "COMPILE", {"backend": lambda graph, _: compiled.append(graph) or graph.forward}
    )
    images = ImageSet(torch.zeros(4, 3, 16, 16, dtype=torch.uint8))
    with torch._dynamo.config.patch(recompile_limit=1):
        for width in (0.0625, 0.125):
            config = tiny_config(image_size=16, width=width, precision="float32", compile="on")
            simclr.Pretraining(config, simclr.Data(images, images, images), CPU).network()
    assert len(compiled) == 2


def test_a_run_that_cannot_be_compiled_is_run_as_it_is(small_config, unjudged, monkeypatch, capsys):
    def broken(graph, inputs):
        raise RuntimeError("no compiler\nof any kind")

    monkeypatch.setattr(simclr, "COMPILE", {"backend": broken})
    plain, compiled = small_config(run="a"), small_config(run="b", compile="on")
    run(plain)
    run(compiled)
    assert log(compiled) == log(plain)
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "torch.compile cannot be used here" in line]
    assert any("no compiler of any kind" in line for line in lines)


def test_long_runs_on_a_gpu_are_compiled(tiny_config):
    data = ImageSet(torch.zeros(4096, 3, 32, 32, dtype=torch.uint8))
    for device, epochs, expected in (("cuda", 100, "on"), ("cuda", 1, "off"), ("cpu", 100, "off")):
        config = tiny_config(batch_size=64, epochs=epochs, precision="float32")
        assert simclr.resolve(config, data, torch.device(device)).compile == expected


def test_the_logged_rates_are_the_schedules(small_config, unjudged):
    """Four steps an epoch, so a warm-up counted in epochs or a peak of the wrong batch shows."""
    config = small_config(epochs=4, warmup_epochs=2.0, lr=0.02, lr_scaling="linear", batch_size=50)
    run(config)
    last_steps = [4 * epoch - 1 for epoch in (1, 2, 3, 4)]
    expected = [simclr.learning_rate(step, 16, 8, 0.02 * 50 / 256) for step in last_steps]
    assert [row["lr"] for row in log(config)] == pytest.approx(expected)
    assert expected[:2] == pytest.approx([0.02 * 50 / 512, 0.02 * 50 / 256])


def test_the_rate_scales_with_the_images_that_there_are(tiny_config):
    config = tiny_config(image_size=16, batch_size=4096, lr=1.0, lr_scaling="linear")
    data = simclr.Data(numbered(64), numbered(64), numbered(2))
    training = simclr.Pretraining(config, data, CPU)
    assert max(training.rate(step) for step in range(4)) == pytest.approx(64 / 256)


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_precision_is_that_of_the_forward_pass(tiny_config, precision):
    config = tiny_config(image_size=16)
    model, seen = simclr.make_model(config), []

    def loss(z1, z2):
        seen.append(z1.dtype)
        return simclr.nt_xent(z1, z2, 0.5)

    simclr.train_epoch(
        model, simclr.make_optimizer(config, model), [torch.rand(8, 3, 16, 16)], lambda _: 0.0,
        loss, precision, Position(), lambda: False,
    )  # fmt: skip
    assert seen == [getattr(torch, precision)]


@pytest.mark.parametrize("optimizer", ["adamw", "lars", "sgd"])
def test_interrupted_and_continued_is_bit_identical(small_config, monkeypatch, optimizer):
    """Stopped in the middle of epoch 2 (of 4 steps each) and at the end of epoch 3."""
    settings = dict(optimizer=optimizer, lr=1e-3, lr_scaling="none")
    whole = small_config(run="whole", **settings)
    run(whole)
    pieces = small_config(run="pieces", **settings)
    for steps in (6, 6):
        with monkeypatch.context() as patch:
            interrupt_after(patch, steps)
            with pytest.raises(simclr.Interrupted) as stopped:
                run(pieces)
        assert stopped.value.signal == signal.SIGTERM
        assert not (pieces.folder / "summary.json").exists()
    position = utils.load_checkpoint(pieces.folder / "last.pt")["position"]
    assert (position["epoch"], position["step"]) == (3, 0)
    run(pieces)
    assert_equal_runs(whole, pieces)


def test_resuming_from_an_older_checkpoint_is_bit_identical(small_config, monkeypatch):
    """The log is ahead of the checkpoint, as after a kill: its rows are written again."""
    whole, killed = small_config(run="whole"), small_config(run="killed", save_every=2)
    run(whole)
    with monkeypatch.context() as patch:

        def die(self, *_args, **_options):
            if len(utils.read_jsonl(killed.folder / "log.jsonl")) == 3:
                raise RuntimeError("killed")

        patch.setattr(utils.Progress, "show", die)
        with pytest.raises(RuntimeError, match="killed"):
            run(killed)
    assert len(log(killed)) == 3
    assert utils.load_checkpoint(killed.folder / "last.pt")["position"]["epoch"] == 2
    run(killed)
    assert_equal_runs(whole, killed)


def test_a_finished_run_is_left_alone_and_overwrite_starts_anew(small_config, capsys):
    config = small_config(epochs=1)
    first = run(config)
    stamp = (config.folder / "last.pt").stat().st_mtime_ns
    assert run(config) == first
    assert "is finished" in capsys.readouterr().out
    assert (config.folder / "last.pt").stat().st_mtime_ns == stamp
    again = run(config, overwrite=True)
    assert (config.folder / "last.pt").stat().st_mtime_ns != stamp
    assert again["loss"] == first["loss"]


def test_a_signal_in_the_last_epoch_stops_before_the_evaluation(
    small_config, monkeypatch, unjudged
):
    config = small_config(epochs=1)
    interrupt_after(monkeypatch, 4)
    with pytest.raises(simclr.Interrupted):
        run(config)
    assert not (config.folder / "summary.json").exists()
    monkeypatch.setattr(simclr, "train_epoch", None)  # nothing is left to train
    assert run(config)["loss"] == log(config)[0]["loss"]


def test_a_run_that_is_overwritten_is_whole_until_the_first_checkpoint(
    small_config, monkeypatch, unjudged
):
    old = small_config(epochs=1, save_every=3)
    run(old)
    (old.folder / "summary.json").write_text("damaged")
    before = {path: path.read_bytes() for path in old.folder.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(simclr, "nt_xent", lambda z1, z2, _: (z1 * z2).sum() * float("nan"))
        with pytest.raises(InputError, match="not finite in epoch 1"):
            run(small_config(epochs=2, save_every=3), overwrite=True)
    assert {path: path.read_bytes() for path in old.folder.iterdir()} == before
    with monkeypatch.context() as patch:
        interrupt_after(patch, 6)
        with pytest.raises(simclr.Interrupted):
            run(small_config(epochs=2, save_every=3), overwrite=True)
    assert not (old.folder / "summary.json").exists()
    assert [row["epoch"] for row in log(old)] == [1]
    assert json.loads((old.folder / "config.json").read_text())["epochs"] == 2


def test_the_log_is_rebuilt_from_the_checkpoint(small_config, unjudged):
    config = small_config(epochs=2)
    first, file = run(config), config.folder / "log.jsonl"
    whole = file.read_text()
    for damage in (None, b"", b"5\n", b"\xff\xfe", whole.splitlines()[0].encode()):
        (config.folder / "summary.json").unlink()
        file.unlink() if damage is None else file.write_bytes(damage)
        again = run(config)
        assert file.read_text() == whole
        assert again["views_per_second"] == first["views_per_second"]


def test_a_checkpoint_that_does_not_hold_the_log_needs_the_file(small_config, unjudged):
    """As earlier versions wrote it."""
    config = small_config(epochs=2)
    run(config)
    file, state = config.folder / "log.jsonl", utils.load_checkpoint(config.folder / "last.pt")
    whole = file.read_text()
    state.pop("log")
    utils.save_checkpoint(config.folder / "last.pt", state)
    (config.folder / "summary.json").unlink()
    run(config)
    assert file.read_text() == whole
    for damaged in ("", whole.splitlines()[1], '{"epoch": 1}\n{"epoch": 2}\n'):
        (config.folder / "summary.json").unlink(missing_ok=True)
        file.write_text(damaged)
        with pytest.raises(InputError, match="does not have the 2 epochs of the checkpoint"):
            run(config)
    state["log"] = {"surplus": 1}
    utils.save_checkpoint(config.folder / "last.pt", state)
    with pytest.raises(InputError, match="not a checkpoint of this run"):
        run(config)


@pytest.mark.parametrize("key", ["linear_10", "config", None])
def test_a_damaged_summary_is_named(small_config, monkeypatch, key):
    scores = dict.fromkeys(simclr.FINAL_TABLE, 0.5)
    names = ("knn", "linear_10", "linear_10_std", "linear_all")
    monkeypatch.setattr(simclr, "evaluate", lambda *_: dict.fromkeys(names, scores))
    config = small_config(epochs=1)
    summary, file = run(config), config.folder / "summary.json"
    assert run(config) == summary
    summary.pop(key, None)
    file.write_bytes(b"\xff\xfe" if key is None else json.dumps(summary).encode())
    with pytest.raises(InputError, match=r"summary\.json is damaged"):
        run(config)


@pytest.mark.parametrize("finished", [True, False])
def test_another_configuration_of_the_same_name_is_refused(small_config, unjudged, finished):
    config = small_config(epochs=1)
    run(config)
    if not finished:
        (config.folder / "summary.json").unlink()
    before = (config.folder / "last.pt").read_bytes()
    with pytest.raises(InputError, match=r"--temperature \(0\.3 there, 0\.7 now\)"):
        run(small_config(epochs=1, temperature=0.7))
    assert (config.folder / "last.pt").read_bytes() == before
    run(small_config(epochs=1, workers=0))  # not part of what the run is


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_on_other_images_is_refused(
    tiny_config, no_figure, tmp_path, write_image, monkeypatch, finished
):
    for i in range(6):
        write_image(tmp_path / "photos" / f"{i}.png", seed=i)
    options = dict(dataset="folder", recipe="digits", data_dir=str(tmp_path / "photos"), epochs=3)
    if finished:
        run(tiny_config(**options))
    else:
        with monkeypatch.context() as patch:
            interrupt_after(patch, 2)
            with pytest.raises(simclr.Interrupted):
                run(tiny_config(**options))
    write_image(tmp_path / "photos" / "new.png")
    with pytest.raises(InputError, match=r"number of images \(6 there, 7 now\)"):
        run(tiny_config(**options))


def test_an_image_that_cannot_be_read_costs_no_step_that_was_done(
    tiny_config, tmp_path, write_image
):
    photos = tmp_path / "photos"
    for i in range(8):
        write_image(photos / f"{i}.png", size=(20 + i, 20), seed=i)
    options = dict(
        dataset="folder", recipe="digits", data_dir=str(photos), image_size=16, epochs=2,
        batch_size=2, workers=0,
    )  # fmt: skip
    whole, mended = tiny_config(run="whole", **options), tiny_config(run="mended", **options)
    run(whole)
    order = torch.randperm(8, generator=utils.generator("cpu", 0, simclr.SHUFFLE, 0))
    bad = photos / f"{order[5]}.png"  # in the third of four steps
    good = bad.read_bytes()
    bad.write_bytes(good[:40])
    with pytest.raises(InputError, match=rf"cannot read the image {bad} .*continues"):
        run(mended)
    assert utils.load_checkpoint(mended.folder / "last.pt")["position"]["step"] == 2
    bad.write_bytes(good)
    run(mended)
    assert log(whole) == log(mended)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_very_small_data_sets(tiny_config, no_figure, tmp_path, write_image, n):
    for i in range(n):
        write_image(tmp_path / "photos" / f"{i}.png", seed=i)
    options = dict(dataset="folder", recipe="digits", data_dir=str(tmp_path / "photos"))
    summary = run(tiny_config(**options, batch_size=2 if n == 5 else 256, epochs=2))
    assert math.isfinite(summary["loss"])
    assert "knn" not in summary  # no labels, so nothing to judge by


def test_labelled_folder_of_photographs(tiny_config, tmp_path, write_image):
    """Sizes that vary: streamed, cropped to --image-size, evaluated on val/."""
    for split, n in (("train", 6), ("val", 2)):
        for kind in ("a", "b"):
            for i in range(n):
                path = tmp_path / "photos" / split / kind / f"{i}.jpg"
                write_image(path, size=(90 + i, 70), seed=i)
    summary = run(
        tiny_config(
            dataset="folder",
            data_dir=str(tmp_path / "photos"),
            arch="resnet10",
            image_size=72,
            epochs=1,
            batch_size=4,
            warmup_epochs=0.0,
            workers=1,
        )
    )
    assert summary["config"]["stem"] == "imagenet"
    assert set(summary["knn"]) == {"pixels", "untrained", "simclr"}


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(
    small_config, monkeypatch
):
    config = small_config()
    real, calls = simclr.nt_xent, [0]

    def explode(z1, z2, temperature):
        calls[0] += 1
        return real(z1, z2, temperature) * (float("nan") if calls[0] > 6 else 1.0)

    monkeypatch.setattr(simclr, "nt_xent", explode)
    with pytest.raises(InputError, match=r"not finite in epoch 2 .* lower --lr"):
        run(config)
    state = utils.load_checkpoint(config.folder / "last.pt")
    assert state["position"]["epoch"] == 1
    assert all(v.isfinite().all() for v in state["model"].values())
    assert len(log(config)) == 1


@pytest.mark.parametrize("knn_every", [0, 1])
def test_weights_that_are_finite_and_useless_are_not_kept(small_config, knn_every):
    """One step at such a rate: the loss before it was fine, and so was the last checkpoint."""
    config = small_config(
        epochs=2, batch_size=210, optimizer="sgd", lr=1e30, lr_scaling="none", warmup_epochs=0.0,
        knn_every=knn_every,
    )  # fmt: skip
    with pytest.raises(InputError, match=r"not finite in epoch 1 .* lower --lr"):
        run(config)
    assert not (config.folder / "last.pt").exists()


def test_features_that_are_not_finite_are_not_judged(tiny_config):
    config = tiny_config(image_size=16)
    model = simclr.make_model(config)
    model.encoder.layer4[0].bn2.weight.data.fill_(torch.inf)
    with pytest.raises(InputError, match=r"not finite\. Try a lower --lr"):
        simclr.features(model.encoder, utils.load_images("digits", "test"), config, CPU)


def test_the_untrained_encoder_is_the_one_that_the_run_began_with(tiny_config):
    config = tiny_config(image_size=16, precision="float32")
    data = simclr.load_data(config, CPU)
    data.train.images, data.train.labels = data.train.images[:200], data.train.labels[:200]
    trained = simclr.make_model(dataclasses.replace(config, seed=1))
    fresh = simclr.make_model(config)
    assert utils.module_digest(
        simclr.encoders(trained, config, CPU)["untrained"]
    ) == utils.module_digest(fresh.encoder)
    found = simclr.evaluate(trained, data, config, CPU)["knn"]
    assert found["untrained"] == simclr.knn_accuracy(fresh.encoder, data, config, CPU)
    assert found["simclr"] == simclr.knn_accuracy(trained.encoder, data, config, CPU)
    assert found["simclr"] != found["untrained"]


def test_ctrl_c_during_a_save_leaves_no_file_behind(tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    utils.write_atomically(tmp_path / "a", b"old")
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        utils.write_atomically(tmp_path / "a", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


@pytest.mark.parametrize("part", ["config", "position", "images", "model", "optimizer"])
def test_a_checkpoint_with_a_strange_part_is_refused(small_config, unjudged, part):
    config = small_config(epochs=1)
    run(config)
    (config.folder / "summary.json").unlink()
    state = utils.load_checkpoint(config.folder / "last.pt")
    for strange in ({**state, part: {"surplus": 1}}, {k: v for k, v in state.items() if k != part}):
        utils.save_checkpoint(config.folder / "last.pt", strange)
        with pytest.raises(InputError):
            run(config)


def test_the_figure_shows_what_was_logged():
    rows = [
        {"epoch": e, "loss": 5 / e, "contrastive_accuracy": e / 20, "lr": 0.1 / e}
        for e in range(1, 11)
    ]
    rows[4]["knn"], rows[9]["knn"] = 0.5, 0.75
    baselines = {"pixels": 0.4, "untrained": 0.3}
    figure = simclr.draw_training(rows, chance=6.2, baselines=baselines)
    loss, guess, knn, rate = figure.axes
    assert loss.lines[0].get_ydata().tolist() == [5 / e for e in range(1, 11)]
    assert loss.lines[1].get_ydata()[0] == 6.2
    assert guess.lines[0].get_ydata()[-1] == 50
    assert knn.lines[0].get_xdata().tolist() == [5, 10]
    assert knn.lines[0].get_ydata().tolist() == [50, 75]
    assert [knn.lines[i].get_ydata()[0] for i in (1, 2)] == [40, 30]
    assert rate.lines[0].get_ydata()[0] == 0.1
    assert all(axis.get_title() for axis in figure.axes)


def test_the_figure_shows_a_loss_above_chance():
    rows = [{"epoch": 1, "loss": 30.0, "contrastive_accuracy": 0.0, "lr": 1.0}]
    loss = simclr.draw_training(rows, chance=6.2).axes[0]
    assert loss.get_ylim()[1] > 30


def test_a_run_ends_at_the_knn_accuracy_that_was_asked_for(tiny_config, monkeypatch, capsys):
    """In the epoch in which it is reached; a stopped run knows that it is not there yet."""
    found = iter([0.5, 0.8, 0.7])
    monkeypatch.setattr(simclr, "knn_accuracy", lambda *_: next(found))
    monkeypatch.setattr(simclr, "evaluate", lambda *_: {})
    config = tiny_config(stop_at_knn=0.8, knn_every=1)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(simclr.Interrupted):
            run(config)
    summary = run(config)
    assert summary["epochs"] == len(log(config)) == 2
    rows = utils.read_jsonl(config.folder / "log.jsonl")
    assert summary["monitoring_seconds"] == sum(row["knn_seconds"] for row in rows)
    assert summary["training_seconds"] == sum(row["seconds"] for row in rows)
    assert "2 of 4 epochs" in capsys.readouterr().out
    assert run(config) == summary
    assert next(found) == 0.7


@pytest.mark.parametrize(
    "wrong", [dict(stop_at_knn=90.0), dict(stop_at_knn=-0.1), dict(stop_at_knn=0.9, knn_every=0)]
)
def test_a_knn_accuracy_that_cannot_be_reached(wrong, tiny_config):
    with pytest.raises(InputError, match=r"--stop-at-knn|--knn-every"):
        tiny_config(**wrong)


def test_a_long_measurement_of_knn_loses_no_epoch(small_config, monkeypatch):
    """A run that is killed in it goes on with it, and ends as one that was not."""
    whole, killed = (small_config(run=name, knn_every=1) for name in ("whole", "killed"))
    run(whole)
    monkeypatch.setattr(simclr, "LONG", 0.0)
    with monkeypatch.context() as patch:
        measure, count = simclr.knn_accuracy, [0]

        def die(*arguments):
            count[0] += 1
            if count[0] == 2:
                raise RuntimeError("killed")
            return measure(*arguments)

        patch.setattr(simclr, "knn_accuracy", die)
        with pytest.raises(RuntimeError, match="killed"):
            run(killed)
    position = utils.load_checkpoint(killed.folder / "last.pt")["position"]
    assert (position["epoch"], position["step"]) == (1, 4)
    run(killed)
    assert_equal_runs(whole, killed)
