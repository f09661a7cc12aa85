"""From one's own pictures to one's own tool: layouts, weights to start from, classifiers."""

import dataclasses
import importlib.util
import re
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision
from matplotlib.figure import Figure
from PIL import Image

import load_simCLR
import simclr
import utils
from conftest import CPU, error_of, load_images, load_run, random_statistics, rows_of
from utils import InputError


def load(root, **settings):
    """Data of a folder, and what a run says of it."""
    data = simclr.load_data(simclr.Config(dataset="folder", data_dir=str(root), **settings), CPU)
    return data, utils.describe_data(data)


@pytest.fixture
def put(write_image, tmp_path):
    """Writes images of these names."""

    def write(*names, size=(12, 12)):
        for i, name in enumerate(names):
            write_image(tmp_path / name, size, seed=i)

    return write


CLASSES = ("größe 2", "rot")


def paint(file, red, seed, size=16):
    """A noisy picture that is rather red, or rather blue."""
    pixels = np.random.default_rng(seed).integers(0, 120, (size, size, 3), dtype=np.uint8)
    pixels[..., 0 if red else 2] += 120
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    """Pictures with few labels, and a run that has learned from all of them. Tests copy it."""
    root = tmp_path_factory.mktemp("own pictures")
    for i in range(6):
        for red, name in enumerate(CLASSES):
            paint(root / "pets/train" / name / f"{i}.png", red, i)
            paint(root / "pets/test" / name / f"{i} b.png", red, 100 + i)
            paint(root / "pets/unlabelled" / f"{name} {i}.png", red, 200 + i)
    places = dict(checkpoints=str(root / "c"), figures=str(root / "f"))
    settings = dict(dataset="folder", recipe="digits", data_dir=str(root / "pets"), epochs=2)
    config = simclr.make_config(**settings, **places, width=0.125, batch_size=8, device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simclr, "draw_training", lambda *_, **__: Figure(figsize=(1, 1)))
        simclr.run(config)
    return SimpleNamespace(root=root, config=config, settings=settings)


@pytest.fixture
def run(pets, tmp_path):
    """A copy of the run's folder."""
    return shutil.copytree(pets.config.folder, tmp_path / "c" / "pets_resnet10")


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """Fine-tuning takes a second instead of ten."""
    monkeypatch.setattr(load_simCLR, "LabelTraining", partial(utils.LabelTraining, min_steps=20))


def evaluate(*words):
    load_simCLR.main([*map(str, words), "--workers", "0", "--device", "cpu"])


# ------------------------------------------------------------ few labels, many unlabelled pictures

FEW = ["train/cat/1.png", "train/größe 2/2.png", "test/cat/3.png", "test/größe 2/4.png"]


@pytest.mark.parametrize(
    "place", ["unlabelled/a b/5.png", "Unlabeled/ü.png", "train/unlabelled/5.png"]
)
@pytest.mark.parametrize("size", [(12, 12), (200, 200)])  # in memory, on disk
def test_unlabelled_pictures_are_learned_from(tmp_path, put, place, size):
    put(*FEW, place, size=size)
    data, said = load(tmp_path)
    assert [len(x) for x in (data.pretrain, data.train, data.test)] == [3, 2, 2]
    assert utils.image_names(data.pretrain) == ["train/cat/1.png", "train/größe 2/2.png", place]
    assert torch.equal(data.pretrain.image(0), data.train.image(0))
    assert data.train.classes == ("cat", "größe 2")
    assert data.train.labels.tolist() == data.test.labels.tolist() == [0, 1]
    learned = f"3 images to learn from in {tmp_path}, 2 with labels in {tmp_path}/train, "
    assert f"{learned}2 test images in {tmp_path}/test" in said
    config = simclr.make_config(dataset="folder", data_dir=str(tmp_path), epochs=3)
    text = simclr.describe_run(config, data, CPU)
    assert "none held out: that needs 160 unlabelled images" in text


def test_unlabelled_pictures_beside_classes(tmp_path, put):
    put(*(f"{c}/{i}.png" for c in "ab" for i in range(5)), "unlabelled/x.png")
    data, _ = load(tmp_path)
    assert [len(x) for x in (data.pretrain, data.train, data.test)] == [9, 8, 2]
    alone, _ = load(tmp_path / "unlabelled" / "..", labels_from=str(tmp_path))
    assert [len(x) for x in (alone.pretrain, alone.train, alone.test)] == [11, 8, 2]


def test_what_is_not_used_is_counted_and_named(tmp_path, put, capsys):
    put(*FEW, "val/cat/5.png", "mehr Bilder/6.png", "mehr Bilder/7.png", "8.png")
    (tmp_path / "labels.csv").write_text("")
    utils.log_warning.cache_clear()
    load(tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"files not used in {tmp_path}: mehr Bilder/ (2), val/ (1), beside the folders 2 "
        "(8.png, labels.csv). Images without labels belong in unlabelled/"
    )


def test_a_class_without_test_images_is_named(tmp_path, put):
    put(*FEW, "train/eel/5.png")
    data, said = load(tmp_path)
    assert data.train is data.pretrain  # without unlabelled pictures
    assert said.endswith("; no test images of eel")
    put(*(f"single/{c}/{i}.png" for c, n in (("a", 1), ("b", 5)) for i in range(n)))
    assert load(tmp_path / "single")[1].endswith("; no test images of a")


def test_labels_from_another_folder(tmp_path, put):
    put(*(f"all/2024/{i}.png" for i in range(4)), "all/5.png")
    put(*(f"labelled/{name}" for name in FEW))
    data, said = load(tmp_path / "all", labels_from=str(tmp_path / "labelled"))
    assert [len(x) for x in (data.pretrain, data.train, data.test)] == [5, 2, 2]
    assert data.labelled
    assert f"5 images to learn from in {tmp_path}/all, 2 with labels in {tmp_path}/labelled" in said
    with pytest.raises(InputError, match=r"--labels-from .*/all has no labelled training and test"):
        load(tmp_path / "all", labels_from=str(tmp_path / "all"))
    with pytest.raises(InputError, match=r"^cannot read .*/nowhere \(FileNotFoundError: "):
        load(tmp_path / "all", labels_from=str(tmp_path / "nowhere"))
    put("labelled/test/zebra/1.png")
    with pytest.raises(InputError, match=r"classes that are not among those to learn from.*zebra"):
        load(tmp_path / "all", labels_from=str(tmp_path / "labelled"))


def test_two_folders_have_two_run_names():
    folders = ("a/pets", "größe 2", "/")
    names = [simclr.make_config(dataset="folder", data_dir=folder).run for folder in folders]
    assert names == ["pets_resnet18", "größe 2_resnet18", "folder_resnet18"]


# ------------------------------------------------------------------------------------- classifiers


def test_a_fine_tuned_classifier_is_kept_and_used(pets, run, tmp_path, capsys):
    before = utils.load_checkpoint(run / "last.pt")["model"]
    evaluate(run, "--fine-tune", "--labels", "3", "--epochs", "1")
    said = capsys.readouterr().out
    assert " labelled images, 1 steps\n" in said  # --epochs is not overruled
    assert "fine-tuned, 3 a class (6), 1 epoch, SimCLR h, seed 0: test accuracy " in said
    after = utils.load_checkpoint(run / "last.pt")["model"]
    assert all(torch.equal(before[name], after[name]) for name in before)

    classifier = load_simCLR.load_classifier(run)
    assert (classifier.classes, classifier.image_size) == (CLASSES, 16)
    assert not classifier.training
    test = load_images("folder", "test", pets.root / "pets")
    logits = classifier(test.images.float() / 255)
    right = utils.accuracy(logits.argmax(1), test.labels)
    assert right == classifier.facts["accuracy"]
    assert f"{100 * right:.1f}" in said

    evaluate(run, "--classify", pets.root / "pets/test", "--out", tmp_path / "x.csv")
    said = capsys.readouterr().out
    assert "classifier: fine-tuned on 6 labelled images, 2 classes, right for " in said
    rows = rows_of(tmp_path / "x.csv")
    assert [row["image"] for row in rows] == utils.image_names(test)
    assert [row["predicted"] for row in rows] == [CLASSES[i] for i in logits.argmax(1)]
    picture = pets.root / "pets/test/größe 2/3 b.png"
    evaluate(run / "classifier.pt", "--classify", picture, "--out", tmp_path / "one.csv")
    (row,) = rows_of(tmp_path / "one.csv")
    assert row == {**rows[3], "image": "3 b.png"}
    evaluate(run / "classifier.pt", "--embed", picture, "--out", tmp_path / "one.npz")
    with np.load(tmp_path / "one.npz") as arrays:
        h = classifier.encoder(test.images[3:4].float() / 255)
        np.testing.assert_allclose(arrays["h"], h, rtol=1e-4, atol=1e-5)


def test_a_linear_classifier_is_kept(pets, run, capsys):
    evaluate(run, "--classify", pets.root / "pets/test")
    said = capsys.readouterr().out
    assert "classifier: linear classifier on 12 labelled images, 2 classes" in said
    assert str(run / "classified.csv") in said
    classifier = load_simCLR.load_classifier(run / "linear_classifier.pt")
    test, rows = load_images("folder", "test", pets.root / "pets"), rows_of(run / "classified.csv")
    predicted = classifier(test.images.float() / 255).argmax(1).tolist()
    assert list(rows[0]) == ["image", "predicted", "confidence"]
    assert [row["predicted"] for row in rows] == [CLASSES[i] for i in predicted]


def test_a_classifier_of_another_checkpoint_or_version_is_not_used(pets, run, tmp_path, capsys):
    evaluate(run, "--fine-tune", "--epochs", "1")
    file = run / "classifier.pt"
    good = utils.load_checkpoint(file)
    for change, text in (
        ({"classifier_format": 2}, "is a classifier of format 2; this version reads format 1"),
        ({"network": {"arch": "resnet18"}}, "is not a checkpoint"),
        ({"linear": {"weight": torch.zeros(3, 64), "bias": torch.zeros(3)}}, "does not fit"),
        ({"encoder": {}}, "does not fit"),
    ):
        utils.save_checkpoint(file, good | change)
        with pytest.raises(InputError, match=text):
            load_simCLR.load_classifier(file)
    utils.save_checkpoint(file, good)
    utils.save_checkpoint(run / "last.pt", utils.load_checkpoint(run / "last.pt") | {"log": []})
    evaluate(run, "--classify", pets.root / "pets/test", "--out", tmp_path / "x.csv")
    said = capsys.readouterr()
    assert "classifier: linear classifier" in said.out
    assert "classifier.pt is of an earlier checkpoint, and is not used" in said.err


def test_wrong_calls_of_the_classifier(run, capsys):
    with pytest.raises(InputError, match=r"no checkpoint at .*classifier\.pt"):
        load_simCLR.load_classifier(run)
    shutil.copy(run / "last.pt", run / "classifier.pt")
    with pytest.raises(InputError, match=r"classifier\.pt is no classifier; --fine-tune makes one"):
        load_simCLR.load_classifier(run)
    (run / "classifier.pt").unlink()
    for words, text in {
        "--fine-tune --labels 1 2": "--fine-tune takes one label set, got 1 2",
        "--fine-tune --labels 7": "class 'größe 2' has only 6 training images",
        "--fine-tune --out x.csv": "--out x.csv: it must end in .pt",
        "--fine-tune --classify . --out x.pt": "give one of --classify, --fine-tune",
        "--classify nowhere": "--classify nowhere is not a folder or an image",
    }.items():
        assert text in error_of(capsys, lambda argv: evaluate(*argv), run, *words.split())


# ------------------------------------------------------------------ weights to start from


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """torchvision's ResNet-18 and its file, of random weights."""
    network = random_statistics(torchvision.models.resnet18())
    file = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(network.state_dict(), file)
    network.fc = torch.nn.Identity()
    return network, file


def test_the_model_starts_from_torchvisions_weights(imagenet):
    network, file = imagenet
    config = simclr.make_config(dataset="folder", init=str(file))
    shape = (config.arch, config.width, config.stem, config.normalize)
    assert shape == ("resnet18", 1.0, "imagenet", "imagenet")
    assert config.init_sha256 == utils.file_digest(file)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in utils.MEANS["imagenet"])
    h = simclr.start_model(config).eval().encoder(images)
    torch.testing.assert_close(h, network((images - mean) / std))  # padding included


def test_wrong_weights_to_start_from(imagenet, tmp_path, capsys):
    file = imagenet[1]
    torch.save({"weight": torch.ones(2)}, tmp_path / "x.pt")
    for words, text in {
        f"--init {file} --arch resnet50": f"--arch is resnet50, but --init {file} has resnet18",
        f"--init {file} --width 2": f"--width is 2.0, but --init {file} has 1.0",
        f"--init {tmp_path}/x.pt": "has no encoder that is a plain ResNet",
        f"--init {file} --init-sha256 abc": "--init-sha256 is abc, but --init",
        "--init nowhere": "nowhere is neither a checkpoint nor a run",
    }.items():
        assert text in error_of(capsys, simclr.main, *words.split())


def test_a_run_that_starts_from_another_run(pets, tmp_path, no_figure, capsys):
    first, second = (tmp_path / f"{name}.pt" for name in ("first", "second"))
    shutil.copy(pets.config.folder / "last.pt", first)
    state = utils.load_checkpoint(first)
    state["model"]["encoder.conv1.weight"] += 0.1
    utils.save_checkpoint(second, state)
    places = dict(checkpoints=str(tmp_path / "c"), figures=str(tmp_path / "f"), device="cpu")
    settings = {**pets.settings, **places, "epochs": 1, "normalize": "imagenet"}
    config = simclr.make_config(**settings, init=str(first))
    assert config.width == 0.125
    simclr.run(config)
    said = capsys.readouterr().out
    assert f"starts from {first}" in said
    assert "before pre-training" in said
    assert "untrained encoder" not in said
    with pytest.raises(InputError, match=r"holds a run with other settings: --init-sha256 \("):
        simclr.run(dataclasses.replace(config, init_sha256=utils.file_digest(second)))

    first.unlink()  # the run keeps a copy
    source = simclr.load_source(config.folder / "last.pt")
    assert source.normalize == "imagenet"
    start = utils.without_normalization(source.untrained(source.config)).state_dict()
    weights = utils.load_checkpoint(pets.config.folder / "last.pt")["model"]
    assert all(torch.equal(start[k], weights[f"encoder.{k}"]) for k in start)
    own = f"{pets.root}/pets/."  # the folder that the run learned from, in other words
    flags = ("--labels", "2", "--seeds", "1", "--figures", tmp_path, "--data-dir", own)
    evaluate(config.folder, "--tasks", "semi", *flags)
    said = capsys.readouterr().out
    assert "before pre-training" in said
    assert "fine-tuning the weights before it" in said
    assert (config.folder / "evaluation.json").exists()


# ------------------------------------------------------------ is it learning, without labels?


@pytest.mark.parametrize(("n", "held_out"), [(150, 0), (200, 20), (700, 64), (4000, 80)])
def test_how_many_images_are_held_out(n, held_out):
    images = utils.Images(torch.zeros(n + 10, 3, 1, 1, dtype=torch.uint8))
    images.images[:, 0, 0, 0] = torch.arange(n + 10) % 256
    labelled = utils.Images(images.images[:10], torch.zeros(10).long(), ("a",))
    config = simclr.make_config(dataset="folder")
    learned, rest = simclr.split_held_out(config, images, labelled)
    assert (len(rest) if rest else 0) == held_out
    assert torch.equal(learned.images[:10], labelled.images)  # the labelled ones stay
    assert len(learned) == n + 10 - held_out
    again = simclr.split_held_out(dataclasses.replace(config, seed=1), images, labelled)[1]
    assert rest is None or torch.equal(rest.images, again.images)
    assert simclr.split_held_out(simclr.make_config(), images, labelled)[1] is None  # benchmarks
    everything = simclr.split_held_out(config, images, images)[1]
    assert n < 200 or len(everything) >= held_out


def test_effective_rank():
    assert simclr.effective_rank(torch.ones(50, 8)) == pytest.approx(1, abs=1e-3)
    assert simclr.effective_rank(torch.zeros(50, 8)) == 1
    q = torch.linalg.qr(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)))[0]
    assert simclr.effective_rank(q) == pytest.approx(8, abs=1e-3)
    two = q * torch.tensor([3.0, 1, 0, 0, 0, 0, 0, 0])
    assert simclr.effective_rank(two) == pytest.approx(4 / 3**0.75, abs=1e-3)


def test_an_unlabelled_run_logs_what_its_held_out_images_show(
    tiny_config, tmp_path, no_figure, monkeypatch, capsys
):
    monkeypatch.setattr(simclr, "HELD_OUT_BATCH", 10)
    for i in range(170):
        paint(tmp_path / "all" / f"{i}.png", i % 2, i)
    shape = dict(arch="resnet10", epochs=2, knn_every=1, batch_size=50)
    config = tiny_config(dataset="folder", data_dir=str(tmp_path / "all"), **shape)
    simclr.run(config)
    assert "153 images to learn from" in (said := capsys.readouterr().out)
    assert "(17 more are held out, see --hold-out)" in said
    assert said.count("rank of h") == 2  # after every monitored epoch
    assert f"load_simCLR.py {config.folder} --data-dir LABELLED_IMAGES --fine-tune\n" in said
    log = utils.read_jsonl(config.folder / "log.jsonl")
    assert [set(row) >= {"held_out_accuracy", "effective_rank"} for row in log] == [True, True]
    data, trained = simclr.load_data(config, CPU), load_run(config.folder / "last.pt")
    values = simclr.measure_held_out(trained.model, data.held_out, trained.config, CPU)
    assert values == {key: log[-1][key] for key in values}
    h = trained.model.encoder(data.held_out.images.float() / 255)
    assert 1 <= values["effective_rank"] <= min(h.shape)


def test_the_figure_shows_the_effective_rank():
    row = {"loss": 3, "contrastive_accuracy": 0.1, "lr": 0.1, "held_out_accuracy": 0.3}
    log = [{**row, "epoch": e, "effective_rank": 5.0 + e} for e in range(1, 4)]
    *_, accuracy, rank = simclr.draw_training(simclr.Config(), log, 50).axes
    assert accuracy.lines[0].get_ydata().tolist() == [30, 30, 30]
    assert rank.lines[0].get_ydata().tolist() == [6, 7, 8]
    assert accuracy.get_ylim() == (0, 100)
    assert rank.get_ylim() == (0, pytest.approx(8, rel=0.1))
    one = simclr.draw_training(simclr.Config(), log[:1], 50).axes[0]
    assert [x for x in one.get_xticks() if x % 1] == []  # no fractions of an epoch


# -------------------------------------------------------- from Python, other devices, grey pictures


def test_readmes_lines_from_python_run_as_they_stand(tmp_path, monkeypatch, no_figure):
    text = (Path(simclr.__file__).parent / "README.md").read_text(encoding="utf-8")
    (block,) = [x for x in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "pretrain(" in x]
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(block, names)
    assert names["h"].shape == (8, 32)
    assert Path("checkpoints/own_encoder/log.jsonl").is_file()
    again = names["encoder"](names["images"][:8].float() / 255)
    torch.testing.assert_close(again, names["h"])  # saved and loaded


def test_pre_training_tensors_from_python(tmp_path, no_figure):
    images = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8)
    settings = dict(epochs=1, batch_size=20, checkpoints=str(tmp_path / "c"), device="cpu")
    settings |= dict(arch="resnet10", width=0.125, figures=str(tmp_path / "f"))
    model = simclr.pretrain(images, **settings)
    assert model.encoder(images[:2].float() / 255).shape == (2, 64)
    loaded = load_simCLR.load_encoder(tmp_path / "c" / "tensors")
    torch.testing.assert_close(loaded(images / 255), model.encoder(images / 255))
    with pytest.raises(InputError, match="holds a run with other settings: files of images"):
        simclr.pretrain(images.flip(-1), **settings)
    simclr.pretrain(images.flip(-1), overwrite=True, **settings)
    own = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 4))
    simclr.pretrain(images, own, **settings, run="own")
    newest = utils.find_checkpoint("", tmp_path / "c")
    assert newest.parent.name == "tensors"  # not the one of a module that only this test has
    with pytest.raises(InputError, match=r"own/last.pt holds an encoder module of your own"):
        load_simCLR.load_encoder(tmp_path / "c" / "own")
    with pytest.raises(InputError, match=r"need uint8 \(N, 3, H, W\), got torch.float32 \(40, 3,"):
        simclr.pretrain(images.float(), **settings)
    with pytest.raises(ValueError, match=r"must map images \(B, 3, S, S\) to \(B, D\), not \(2, 3"):
        simclr.pretrain(images, torch.nn.Identity(), **settings)


def test_events_for_tensorboard(pets, tiny_config, monkeypatch, no_figure):
    config = tiny_config(**pets.settings, tensorboard=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match="--tensorboard needs one more package: pip install"):
        simclr.run(config)
    writer = mock.Mock()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    monkeypatch.setattr(utils, "event_writer", lambda folder: writer)
    monkeypatch.setattr(simclr, "draw_views", mock.Mock())
    simclr.run(config)
    assert writer.add_figure.call_args.args[0] == "views"
    log = utils.read_jsonl(config.folder / "log.jsonl")
    logged = {call.args for call in writer.add_scalar.call_args_list}
    keys = ("loss", "contrastive_accuracy", "lr", "knn")
    assert logged == {(key, row[key], row["epoch"]) for row in log for key in keys if key in row}


def test_auto_takes_mps_where_there_is_no_cuda(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda *_, device: device)
    assert utils.choose_device("auto").type == "mps"
    assert not utils.has_fast_bfloat16(torch.device("mps"))


def test_an_operation_that_mps_lacks_is_one_line(capsys):
    @utils.command("simclr.py")
    def main(argv):
        raise NotImplementedError("set the environment variable `PYTORCH_ENABLE_MPS_FALLBACK=1`")

    assert "error: set the environment variable" in error_of(capsys, main)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_grey_pictures_need_no_colour_in_the_augmentation(tmp_path, capsys, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 40, 40), dtype=np.uint8)
    for i in range(4):
        Image.fromarray(pixels[i]).convert(mode).save(tmp_path / f"{i}.jpg")
    config = simclr.make_config(dataset="folder", data_dir=str(tmp_path), hue=0.1)
    utils.log_warning.cache_clear()
    grey = simclr.resolve(config, simclr.load_data(config, CPU).pretrain, CPU)
    assert (grey.saturation, grey.hue, grey.gray_p) == (0, 0, 0)
    said = "the images are grey: --saturation, --hue, --gray-p are 0, as they would change nothing"
    assert capsys.readouterr().err.splitlines() == [said]
    paint(tmp_path / "0.jpg", True, 0, size=40)
    assert simclr.resolve(config, simclr.load_data(config, CPU).pretrain, CPU).hue == 0.1
