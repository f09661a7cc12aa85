"""load_simCLR.py: trustworthy evaluation, embedding, export, and other people's checkpoints."""

import argparse
import json
import operator
import shutil
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

import load_simCLR
import simclr
import utils
from conftest import (
    CPU,
    error_of,
    load_images,
    load_run,
    module_digest,
    random_statistics,
    read_image,
    rows_of,
)
from hostile import Calls
from load_simCLR import Options, Source, load_encoder, load_source
from utils import Images, InputError, LabelTraining


@pytest.fixture
def trained(finished):
    """The checkpoint file of a finished run on digits."""
    return finished.folder / "last.pt"


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of the run's folder, for what a test changes or writes."""
    return shutil.copytree(finished.folder, tmp_path / "checkpoints" / "digits_resnet10")


@pytest.fixture
def places(folder, tmp_path):
    """Flags that send results elsewhere than beside the shared run."""
    flags = ("--checkpoints", folder.parent, "--figures", tmp_path / "figures", "--device", "cpu")
    return tuple(str(x) for x in flags)


@pytest.fixture
def evaluation(trained):
    return load_simCLR.Evaluation(load_source(trained), Options(epochs=15), CPU)


def call(*argv):
    return load_simCLR.run(*load_simCLR.parse_command_line([str(x) for x in argv]))


# ------------------------------------------------------------------------------- the frozen encoder


def test_load_encoder_is_the_trained_encoder_frozen(trained):
    encoder = load_encoder(trained.parent)
    images = load_images("digits", "test").images[:8].float() / 255
    h = encoder(images)
    assert h.shape == (8, encoder.feature_dim) == (8, 64)
    assert not h.requires_grad
    assert not any(module.training for module in encoder.modules())
    assert torch.equal(h, load_run(trained).model.encoder(images))


@pytest.mark.parametrize("part", ["encoder.conv1.weight", "encoder.bn1.running_mean", "mean"])
def test_an_evaluation_that_changes_the_encoder_is_void(trained, few_digits, part):
    """The mean of the normalisation is a buffer that is not in the state dict."""

    def drift(module, *_):
        operator.attrgetter(part)(module).data[0] += 1e-6

    source = load_source(trained, normalize="cifar10")
    source.encoder.register_forward_hook(drift)
    evaluation = load_simCLR.Evaluation(source, Options(tasks=("knn",)), CPU)
    with pytest.raises(RuntimeError, match="changed the encoder"):
        list(load_simCLR.evaluate(evaluation, {"columns": [], "seconds": {}}))


def test_all_frozen_tasks_leave_the_encoder_alone(trained, few_digits, monkeypatch):
    monkeypatch.setattr(LabelTraining, "steps", lambda *_: 5)
    tasks, source = ("knn", "linear", "linear-augmented", "semi"), load_source(trained)
    source.config.micro_batch, source.config.compile = 16, "on"  # of pre-training; 210 are no 16s
    options = Options(tasks=tasks, labels=("1",), seeds=1, epochs=1)
    evaluation = load_simCLR.Evaluation(source, options, CPU)
    assert (evaluation.config.micro_batch, evaluation.config.compile) == (0, "off")
    before = {k: v.clone() for k, v in source.encoder.state_dict().items()}
    columns = [*load_simCLR.evaluate(evaluation, {"columns": [], "seconds": {}})][-1]["columns"]
    assert [column["task"] for column in columns] == ["knn", *tasks]
    assert all(torch.equal(v, before[k]) for k, v in source.encoder.state_dict().items())
    rows = set(simclr.REPRESENTATIONS)
    assert all(set(column["scores"]) == rows for column in columns[:-1])
    assert set(columns[-1]["scores"]) == rows - {"projection"}  # the head is not tuned


# -------------------------------------------------------------------------------------- classifiers


def test_the_strength_is_chosen_on_held_out_training_images(monkeypatch):
    """The same search with scikit-learn, on the same split, chooses the same strength."""
    random, y = torch.Generator().manual_seed(0), torch.arange(600) % 3
    x = torch.randn(3, 20, generator=random)[y] + 2.5 * torch.randn(600, 20, generator=random)
    x = x * torch.logspace(-1, 1, 20)  # features of very different scale
    strengths = tuple(10.0 ** (2 - i) for i in range(7))
    assert np.allclose(utils.L2_STRENGTHS, np.logspace(5, -6, 45)[::4])  # of the paper's 45
    monkeypatch.setattr(utils, "L2_STRENGTHS", strengths)
    chosen = utils.fit_linear_classifier(x, y, 3).l2
    scaled = ((x - x.mean(0)) / x.std(0, correction=0)).double().numpy()
    fit, held_out = (rows.numpy() for rows in utils.stratified_split(y))
    assert len(held_out) == 120
    scores = []
    for l2 in strengths:
        model = LogisticRegression(C=1 / (l2 * len(fit)), tol=1e-8, max_iter=10_000)
        model.fit(scaled[fit], y[fit])
        scores.append(model.score(scaled[held_out], y[held_out]))
    assert scores[strengths.index(chosen)] >= max(scores) - 1 / 120
    assert max(scores) > min(scores)  # the choice matters here


@pytest.mark.parametrize("per_class", [1, 2, 4])
def test_many_classes_of_few_images_are_learned(per_class):
    """No class can spare an image, or each but one: the classifier is not the zero one."""
    random = torch.Generator().manual_seed(0)
    y = torch.arange(300 * per_class) % 300
    centres = torch.randn(300, 64, generator=random)
    x, x_test = (centres[y] + 0.1 * torch.randn(len(y), 64, generator=random) for _ in range(2))
    fitted = utils.fit_linear_classifier(x, y, 300)
    assert utils.accuracy(fitted(x_test).argmax(1), y) > 0.9


def test_the_augmented_classifier_learns_from_pixels(evaluation):
    """Crops of nearly constant pixels vary a thousand times more than the pixels themselves."""
    evaluation.encoders = {"pixels": evaluation.encoders["pixels"]}
    ((_, _, logits),) = evaluation.linear_augmented()
    assert utils.accuracy(logits.argmax(1), evaluation.data.test.labels) > 0.85


# ---------------------------------------------------------------------------- learning from labels


def test_training_on_labels_is_nesterovs_sgd_with_a_cosine_for_enough_steps():
    random = torch.Generator().manual_seed(0)
    batches = [(torch.randn(6, 5, generator=random), torch.arange(6) % 3) for _ in range(4)]
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    training = LabelTraining(weight_decay=0.01)
    utils.train_on_labels(ours, batches, 4, 0.3, training, "float32")
    solver = torch.optim.SGD(theirs.parameters(), 0.3, 0.9, weight_decay=0.01, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(solver, 4)
    for x, y in batches:
        solver.zero_grad()
        F.cross_entropy(theirs(x), y).backward()
        solver.step()
        schedule.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)

    training = LabelTraining(epochs=60)
    assert [training.batch(n) for n in (10, 600, 12_811)] == [10, 64, 1024]
    assert training.steps(12_811) == 60 * 13  # 1 % of ImageNet, as in the paper
    assert training.steps(10) == training.min_steps
    assert LabelTraining(epochs=30).steps(50_000) == 30 * 49


def test_labelled_batches_have_their_own_labels_and_see_every_row(tiny_config):
    grey = torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1).expand(20, 3, 16, 16)
    data = Images(grey.contiguous(), torch.arange(20) * 3, tuple("abc"))
    augment = simclr.make_augment(tiny_config(image_size=16))
    augment.steps = augment.steps[:1]  # a crop of one colour is of that colour
    rows = torch.tensor([1, 3, 5, 7, 9, 11, 13, 15])

    def batches(key=(0,)):
        return list(simclr.labelled_batches(data, rows, augment, 4, 5, key, CPU))

    seen = batches()
    assert [len(x) for x, _ in seen] == [4] * 5
    for x, labels in seen:
        assert ((x[:, 0, 0, 0] * 255).round().long() * 3 == labels).all()
    for start in (0, 2):  # two batches are a pass
        labels = torch.cat([seen[start][1], seen[start + 1][1]])
        assert sorted(labels.tolist()) == (rows * 3).tolist()
    assert not torch.equal(seen[0][1], seen[2][1])  # another order each pass
    assert all(torch.equal(a[1], b[1]) for a, b in zip(seen, batches(), strict=True))
    assert any(not torch.equal(a[1], b[1]) for a, b in zip(seen, batches((1,)), strict=True))


def test_fine_tuning_trains_a_copy_of_everything(evaluation):
    encoder, rows = evaluation.encoders["simclr"], evaluation.label_rows("2", 0)
    augment = simclr.geometric_augment(evaluation.config)
    steps = [type(step).__name__ for step in augment.steps]
    assert steps == ["RandomResizedCrop", "RandomRotation"]
    training, data = LabelTraining(epochs=1, min_steps=3), evaluation.data.train
    network = simclr.fine_tune(encoder, data, rows, augment, training, evaluation.config, CPU)
    assert not network.training
    pairs = zip(network[0].parameters(), encoder.parameters(), strict=True)
    assert not any(torch.equal(a, b) for a, b in pairs)
    assert network(torch.rand(2, 3, 16, 16)).shape == (2, 10)


def test_label_rows_and_untrained_networks_are_drawn_anew_for_each_seed(evaluation):
    labels = evaluation.data.train.labels
    few = evaluation.label_rows("3", 0)
    assert labels[few].bincount().tolist() == [3] * 10
    assert evaluation.label_rows("3", 0).tolist() == few.tolist()
    assert evaluation.label_rows("3", 1).tolist() != few.tolist()
    for whole in ("100%", "1.0"):
        assert len(evaluation.label_rows(whole, 0)) == 1437
    assert labels[evaluation.label_rows("1%", 0)].bincount().tolist() == [1] * 10  # at least one
    tenth = labels[evaluation.label_rows("0.1", 0)].bincount()
    assert (tenth - labels.bincount() / 10).abs().max() <= 0.5
    with pytest.raises(InputError, match="class '8' has only 139 training images"):
        evaluation.label_rows("140", 0)
    fresh = simclr.make_model(evaluation.config).encoder  # where the run began
    networks = [evaluation.encoders["untrained"]]
    networks += [evaluation.source.untrained(evaluation.config, seed) for seed in (0, 1)]
    same = [module_digest(x) == module_digest(fresh) for x in networks]
    assert same == [True, True, False]


# -------------------------------------------------------------------------------- the command line


def test_evaluation_from_the_command_line(places, folder, tmp_path, capsys):
    results = call("digits_resnet10", *places, "--predictions", tmp_path / "p.csv")
    out = capsys.readouterr().out
    assert all(name in out for name in ("raw pixels", "SimCLR h", "SimCLR z", "kNN, k = 10"))
    assert json.loads((folder / "evaluation.json").read_text()) == results
    by_title = {column["title"]: column["scores"] for column in results["columns"]}
    summary = json.loads((folder / "summary.json").read_text())
    for key in ("pixels", "untrained", "simclr"):  # the run's own final table says the same
        assert by_title["kNN, k = 10"][key] == [summary["knn"][key]]
        assert by_title["linear"][key] == [summary["linear_all"][key]]
    rows, test = rows_of(tmp_path / "p.csv"), load_images("digits", "test")
    assert [row["image"] for row in rows] == [str(i) for i in range(360)]
    assert [int(row["true"]) for row in rows] == test.labels.tolist()
    right = np.mean([row["true"] == row["predicted"] for row in rows])
    assert right == pytest.approx(by_title["linear"]["simclr"][0])
    assert all(0.1 <= float(row["confidence"]) <= 1 for row in rows)
    assert np.trace(results["confusion"]) / 360 == pytest.approx(right)
    with Image.open(tmp_path / "figures" / "digits_resnet10" / "evaluation.png") as picture:
        assert picture.width > 1000
    classifier = load_simCLR.load_classifier(folder / "linear_classifier.pt")  # it is kept
    kept = classifier(test.images.float() / 255).argmax(1).tolist()
    assert np.mean([int(row["predicted"]) == k for row, k in zip(rows, kept, strict=True)]) > 0.97

    again = call(*places, "--tasks", "knn")  # the newest run; what was measured stays
    assert [c["title"] for c in again["columns"]] == [c["title"] for c in results["columns"]]
    assert again["confusion"] == results["confusion"]


def test_results_are_kept_of_the_same_checkpoint_and_settings(
    places, folder, few_digits, monkeypatch
):
    def interrupted(self):
        raise KeyboardInterrupt

    def tasks(results):
        return [column["task"] for column in results["columns"]]

    with monkeypatch.context() as patch:
        patch.setitem(load_simCLR.TASKS, "linear", (interrupted, ""))
        with pytest.raises(KeyboardInterrupt):
            call(*places, "--tasks", "knn", "linear")
    assert tasks(json.loads((folder / "evaluation.json").read_text())) == ["knn", "knn"]
    monkeypatch.setattr(LabelTraining, "steps", lambda *_: 5)
    more = call(*places, *"--tasks semi --labels 1 --epochs 1 --seeds 1".split())
    assert tasks(more) == ["knn", "knn", "semi"]
    assert more["columns"][2]["title"] == "fine-tuned, 1 a class (10), 1 epoch"
    other = call(*places, "--tasks", "linear", "--precision", "float32")
    kept = ["knn", "knn", "linear", "semi"]
    assert tasks(other) == (kept if more["precision"] == "float32" else ["linear"])
    state = utils.load_checkpoint(folder / "last.pt")
    state["model"]["encoder.conv1.weight"] += 1
    utils.save_checkpoint(folder / "last.pt", state)
    assert tasks(call(*places, "--tasks", "knn", "--precision", "float32")) == ["knn", "knn"]


def results_of(columns, **more):
    known = {"uneven_classes": False, "train_images": 9, "test_images": 2000}
    return {**known, "columns": columns, **more}


def test_the_table_and_the_figure_show_the_scores():
    columns = [
        {"task": "knn", "title": "kNN", "scores": {"pixels": [0.5], "simclr": [0.875]}},
        {"task": "semi", "title": "fine-tuned",
         "scores": {"untrained": [0.5], "simclr": [0.8, 0.9]}},
    ]  # fmt: skip
    names = simclr.REPRESENTATIONS
    *lines, verdict = load_simCLR.text_of(results_of(columns), names).splitlines()
    cells = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]
    assert cells[0] == ["raw pixels", "untrained encoder", "SimCLR h"]
    assert cells[1:] == [
        ["kNN", "50.0 %", "–", "87.5 %"], ["fine-tuned", "–", "50.0 %", "85.0 ± 7.1 %"]
    ]  # fmt: skip
    assert verdict == "fine-tuned: pre-training is 35.0 points better than training from scratch"
    one = {**columns[1], "scores": {"untrained": [0.5], "simclr": [0.8]}}
    assert load_simCLR.text_of(results_of([one]), names).endswith("(one seed: not certain)")
    few = load_simCLR.text_of(results_of(columns, test_images=100), names)
    assert "87.5 ± 3.3 %" in few  # √(p(1 - p)/n)
    assert "85.0 ± 7.9 %" in few  # and the spread over seeds
    assert "50.0 ± 5.0 %" in few
    assert "sampling error of 100 images" in few
    (axis,) = load_simCLR.draw_evaluation(results_of(columns), names).axes
    drawn = {c.get_label(): c.lines[0].get_xdata().tolist() for c in axis.containers}
    assert drawn["SimCLR h"] == pytest.approx([87.5, 85.0])


def test_transfer_to_a_folder_of_uneven_classes(places, folder, tmp_path, write_image, capsys):
    scans = tmp_path / "scans"
    for kind, n in ((r"$\frac$", 57), ("ünï", 3)):
        for i in range(n):
            write_image(scans / kind / f"{i}.png", seed=i + n)
    flags = ("--data-dir", scans, "--predictions", tmp_path / "p.csv")
    results, out = call(*places, "--dataset", "folder", *flags), capsys.readouterr().out
    assert results["classes"] == [r"$\frac$", "ünï"]
    assert results["image_size"] == 16  # as in training
    rows = rows_of(tmp_path / "p.csv")
    assert len(rows) == 12
    assert all((scans / row["image"]).is_file() for row in rows)  # named by their paths
    assert (folder / "evaluation-folder.json").exists()
    assert not (folder / "evaluation.json").exists()

    assert results["majority"] == pytest.approx(11 / 12)
    assert "the largest has 91.7 % of the test images" in out
    titles = [f"{title}:" for title in (*load_simCLR.MEASURES.values(), "Accuracy")]
    assert [line for line in out.splitlines() if line in titles] == titles
    by_title = {column["title"]: column for column in results["columns"]}
    assert set(by_title["linear"]["measures"]["simclr"]) == {"mean_per_class", "macro_f1", "auroc"}
    assert by_title["kNN, k = 200, weighted"]["scores"] == {}  # of 48 training images
    assert "kNN, k = 200, weighted: too few training images (48)" in out
    again = call(*places, "--tasks", "knn")
    assert not again["uneven_classes"]
    assert "Mean accuracy" not in capsys.readouterr().out


def test_class_measures_equal_those_by_hand():
    truth = torch.tensor([0, 0, 0, 0, 1, 1])
    scores = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.9, 0.35])
    logits = torch.stack([0.5 - scores, scores - 0.5], 1)  # predicted: 0, 0, 0, 0, 1, 0
    expected = {"accuracy": 5 / 6, "mean_per_class": 3 / 4, "macro_f1": 7 / 9, "auroc": 7 / 8}
    assert load_simCLR.class_measures(logits, truth) == pytest.approx(expected)


@pytest.fixture
def odd_folder(tmp_path, write_image):
    folder = tmp_path / "mixed"
    write_image(folder / "a.png", size=(30, 20), seed=1)
    write_image(folder / "deep" / "b.jpg", size=(16, 16), seed=2)
    (folder / "broken.png").write_bytes(b"no image")
    write_image(folder / "c.png", size=(9, 40), mode="L", seed=3)
    return folder


def test_embedding_a_folder(places, folder, tmp_path, odd_folder, capsys):
    call(*places, "--embed", odd_folder, "--out", tmp_path / "h.npz", "--workers", "0")
    said = capsys.readouterr().err
    assert "broken.png" in said
    assert "it is left out" in said
    with np.load(tmp_path / "h.npz", allow_pickle=False) as saved:
        assert saved["paths"].tolist() == ["a.png", "c.png", "deep/b.jpg"]
        h = torch.from_numpy(saved["h"])
    encoder = load_encoder(folder)
    for i, path in enumerate(["a.png", "c.png", "deep/b.jpg"]):
        image = utils.center_view(read_image(odd_folder / path)[None], 16)
        by_hand = encoder((image * 255).round() / 255)[0]
        assert torch.allclose(h[i], by_hand, atol=0.03 * by_hand.abs().max().item())  # bfloat16


# ------------------------------------------------------------------------------------------- export


def lines_of(text):
    """The code in a printed text: its indented lines."""
    return "\n".join(line[2:] for line in text.splitlines() if line.startswith("  "))


@pytest.mark.parametrize("stem", ["imagenet", "small"])
def test_an_exported_encoder_is_torchvisions(tmp_path, stem):
    """By the lines that the export prints."""
    encoder = random_statistics(simclr.Encoder("resnet18", 1.0, stem))
    config = simclr.make_config(dataset="digits", arch="resnet18")
    source = Source(tmp_path / "last.pt", encoder, encoder, "none", "", config)
    text = load_simCLR.export_encoder(source, tmp_path / "encoder.pt")
    names = dict(torch=torch, nn=nn, torchvision=torchvision, FasterRCNN=FasterRCNN,
                 resnet_fpn_backbone=resnet_fpn_backbone)  # fmt: skip
    exec(lines_of(text.split("or into")[0]), names)
    theirs, images = names["model"].eval(), torch.rand(2, 3, 48, 48)
    theirs.fc = nn.Identity()
    expected = encoder(images)
    assert torch.allclose(theirs(images), expected, atol=1e-5)
    again = load_source(tmp_path / "encoder.pt")  # and comes back, without a normalisation
    assert (again.normalize, again.foreign.origin) == ("none", "simclr.py")
    assert torch.allclose(again.encoder(images), expected, atol=1e-5)
    if stem == "imagenet":
        exec(lines_of(text), names)
        check_detector(names["model"], encoder)


def check_detector(detector, encoder):
    """It sees what the encoder saw, and all of it learns, BatchNorm too."""
    detector.transform.min_size, detector.transform.max_size = (64,), 64
    image = torch.rand(3, 64, 64)
    seen, _ = detector.transform([image])
    assert torch.equal(seen.tensors[0], image)
    body = detector.backbone.body.eval()
    assert torch.allclose(body(image[None])["3"].mean((2, 3)), encoder(image[None]), atol=1e-5)
    target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    losses = sum(detector.train()([image], [target]).values())
    losses.backward()
    assert losses.isfinite()
    assert all(p.requires_grad and p.grad is not None for p in body.parameters())
    assert not torch.equal(body.bn1.running_mean, encoder.bn1.running_mean)


# -------------------------------------------------------------------------------- import, bad input


def renamed(network, prefix, rename=lambda name: name, extra=()):
    """A state dict with other names, and tensors of heads that must not matter."""
    state = {prefix + rename(name): value for name, value in network.state_dict().items()}
    return {**state, **randoms(dict(extra))}


def randoms(shapes):
    return {name: torch.rand(shape) for name, shape in shapes.items()}


def numbered(parts, name):
    """torchvision's name -> that in an nn.Sequential of these children."""
    first, _, rest = name.partition(".")
    return f"{parts.index(first)}.{rest}"


STAGES = ["layer1", "layer2", "layer3", "layer4"]
WITH_POOL = partial(numbered, ["conv1", "bn1", "relu", "maxpool", *STAGES])
WITHOUT_POOL = partial(numbered, ["conv1", "bn1", "relu", *STAGES])
WITHOUT_RELU = partial(numbered, ["conv1", "bn1", *STAGES])


def simclr_v2(name):
    """The names of SimCLRv2-Pytorch's blocks."""
    layer, _, rest = name.partition(".")
    if layer in ("conv1", "bn1"):
        return {"conv1": "net.0.0.", "bn1": "net.0.1.0."}[layer] + rest
    block, _, rest = rest.partition(".")
    part, _, leaf = rest.rpartition(".")
    inner = {
        "conv1": "net.0", "bn1": "net.1.0", "conv2": "net.2", "bn2": "net.3.0", "conv3": "net.4",
        "bn3": "net.5.0", "downsample.0": "projection.shortcut", "downsample.1": "projection.bn.0",
    }[part]  # fmt: skip
    return f"net.{layer[-1]}.blocks.{block}.{inner}.{leaf}"


def shortcut(name):
    return name.replace("downsample", "shortcut")


def small_stem(network, padding=1, relu=True):
    channels = network.conv1.out_channels
    network.conv1 = nn.Conv2d(3, channels, 3, stride=1, padding=padding, bias=False)
    network.maxpool = nn.Identity()
    network.relu = network.relu if relu else nn.Identity()
    return network


def without_fc(network):
    network.fc = nn.Identity()
    return network


def head(*prefixes):
    mlp = {"0.weight": (8, 512), "0.bias": (8,), "2.weight": (4, 8), "2.bias": (4,)}
    return {prefix + name: shape for prefix in prefixes for name, shape in mlp.items()}


def as_it_is(network):
    return network


def under(key, **others):
    return lambda tensors: {**others, key: tensors}


def like(tensors):
    """Another network's tensors."""
    return {name: torch.rand_like(value.float()) for name, value in tensors.items()}


def with_copy(old, new, key="state_dict"):
    """Beside each tensor that of a momentum encoder, whose names have another part."""

    def wrap(tensors):
        return {key: {**like({n.replace(old, new): v for n, v in tensors.items()}), **tensors}}

    return wrap


FC = {"fc.weight": (1000, 512), "fc.bias": (1000,)}
LIGHTLY, SOLO_LEARN = head("projection_head.layers."), head("projector.", "classifier.")
NO_RELU, PADDED = partial(small_stem, relu=False), partial(small_stem, padding=2)
BARE, IN_STATE_DICT = as_it_is, under("state_dict")
# project -> network, prefix and names, other tensors, what is around them, normalisation
FOREIGN = {
    "torchvision": (as_it_is, "", None, FC, BARE, "imagenet"),
    "timm, saved while training": (
        as_it_is, "module.", None, {f"module.{name}": shape for name, shape in FC.items()},
        under("state_dict", arch="resnet18", args=argparse.Namespace(lr=0.1)), "imagenet"),
    "MoCo": (as_it_is, "module.encoder_q.", None, head("module.encoder_q.fc."),
             with_copy("encoder_q", "encoder_k"), "imagenet"),
    "MoCo, CIFAR": (small_stem, "encoder_q.net.", WITHOUT_POOL,
                    {"encoder_q.net.9.weight": (4, 512)}, IN_STATE_DICT, "cifar10-per-image"),
    "MoCo v3": (as_it_is, "module.base_encoder.", None, head("module.base_encoder.fc."),
                with_copy("base_encoder", "momentum_encoder"), "imagenet"),
    "DINO": (as_it_is, "backbone.", None, head("head.mlp."),
             lambda t: {"student": like(t), "teacher": t}, "imagenet"),
    "SwAV": (as_it_is, "module.", None, {"module.prototypes.weight": (9, 4)}, BARE, "imagenet"),
    "SimSiam": (as_it_is, "module.encoder.", None, head("module.encoder.fc.", "module.predictor."),
                IN_STATE_DICT, "imagenet"),
    "Barlow Twins": (as_it_is, "module.backbone.", None,
                     {**head("module.projector."), "module.bn.running_mean": (4,)},
                     under("model", epoch=5), "imagenet"),
    "lightly": (as_it_is, "backbone.", WITH_POOL, LIGHTLY, IN_STATE_DICT, "imagenet"),
    "lightly, its own ResNet": (NO_RELU, "backbone.", lambda x: shortcut(WITHOUT_RELU(x)), LIGHTLY,
                                IN_STATE_DICT, "imagenet"),
    "lightly's BYOL in a module, compiled": (
        as_it_is, "model.backbone._orig_mod.", WITH_POOL, head("model.projection_head."),
        with_copy("backbone", "backbone_momentum"), "imagenet"),
    "solo-learn, ImageNet": (as_it_is, "backbone.", None, SOLO_LEARN, IN_STATE_DICT, "imagenet"),
    "solo-learn, CIFAR": (PADDED, "backbone.", None, SOLO_LEARN,
                          with_copy("backbone", "momentum_backbone"), "cifar10"),
    "solo-learn, older": (PADDED, "encoder.", None, SOLO_LEARN, IN_STATE_DICT, "cifar10"),
    "sthalles": (as_it_is, "backbone.", None, head("backbone.fc."),
                 under("state_dict", arch="resnet18"), "none"),
    "sthalles, older": (as_it_is, "features.", WITH_POOL, {"l1.weight": (8, 512)}, BARE, "none"),
    "Spijkervet": (as_it_is, "encoder.", None, head("projector."), BARE, "none"),
    "Spijkervet, several GPUs": (as_it_is, "module.encoder.", None, head("module.projector."),
                                 BARE, "none"),
    "dkobak": (small_stem, "backbone.", None, head("projector."), BARE, "none"),
    "SupContrast": (small_stem, "encoder.module.", shortcut, head("head."),
                    under("model", opt=argparse.Namespace(model="resnet18")), "cifar10-per-image"),
    "p3i0t": (small_stem, "enc.", None, head("projector."), BARE, "none"),
    "leftthomas": (small_stem, "f.", WITHOUT_POOL,
                   {**head("g."), "f.total_ops": (1,), "total_params": (1,)}, BARE,
                   "cifar10-per-image"),
}  # fmt: skip


def foreign(project, network):
    """Network, checkpoint and normalisation of a row of FOREIGN, with this network's weights."""
    adapt, prefix, rename, others, wrap, normalize = FOREIGN[project]
    network = random_statistics(adapt(network))
    return network, wrap(renamed(network, prefix, rename or as_it_is, others)), normalize


@pytest.mark.parametrize("project", list(FOREIGN))
def test_importing_another_projects_checkpoint(tmp_path, project):
    """A quarter as wide as theirs, as it is the names that differ; torchvision's own apart."""
    network = simclr.Encoder("resnet18", 0.25, "imagenet")
    if project == "torchvision":
        network = without_fc(torchvision.models.resnet18())
    check_import(tmp_path, *foreign(project, network))


def check_import(tmp_path, network, state, normalize):
    """The file gives the network's outputs, behind the normalisation of its training."""
    torch.save(state, tmp_path / "theirs.pth.tar")
    source = load_source(tmp_path / "theirs.pth.tar")
    assert source.normalize == normalize
    assert source.foreign.origin
    images = torch.rand(3, 3, 48, 48)
    inputs = images
    if normalize != "none":
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in utils.MEANS[normalize])
        inputs = (images - mean) / std
    with torch.no_grad():
        assert torch.allclose(source.encoder(images), network(inputs), atol=1e-4, rtol=1e-4)
    assert source.encoder.feature_dim == network(inputs).shape[1]
    assert not any(p.requires_grad for p in source.encoder.parameters())


def test_importing_googles_simclr_in_torch(tmp_path):
    """Version 1 has torchvision's names at widths that torchvision has not, version 2 others."""
    wide = random_statistics(simclr.Encoder("resnet10", 2, "imagenet"))
    fc = {"fc.weight": (1000, 1024), "fc.bias": (1000,)}
    state = dict(reversed(renamed(wide, "", extra=fc).items()))  # their order differs
    check_import(tmp_path, wide, {"state_dict": state}, "none")
    network = random_statistics(simclr.Encoder("resnet50", 0.25, "imagenet"))
    state = renamed(network, "", simclr_v2, {"fc.weight": (10, 512), "fc.bias": (10,)})
    check_import(tmp_path, network, {"resnet": state, "head": {}}, "none")


def found_in(state):
    return utils.find_encoder(state, "x.pt")


@pytest.mark.parametrize(("stem", "wrap", "guess"), [
    ("imagenet", lambda s: {"state_dict": {**s, **randoms(FC)}}, "none"),  # as Google's
    ("imagenet", as_it_is, "imagenet"),
    ("small", as_it_is, "none"),
    ("small", lambda s: {"model": {  # as Barlow Twins', which has no such stem
        **{f"module.backbone.{name}": value for name, value in s.items()},
        **randoms(head("module.projector.")),
    }}, "imagenet"),
])  # fmt: skip
def test_an_unknown_origin_is_said(tmp_path, stem, wrap, guess):
    state = wrap(simclr.Encoder("resnet10", 0.125, stem).state_dict())
    encoder = found_in(state)
    assert (encoder.origin, encoder.normalize) == ("", guess)
    inputs = "in [0, 1]" if guess == "none" else "normalised for imagenet"
    said = f"origin unknown: inputs taken as {inputs}; set --normalize"
    torch.save(state, tmp_path / "x.pt")
    assert said in load_source(tmp_path / "x.pt").description
    assert said not in load_source(tmp_path / "x.pt", "cifar10").description
    call(tmp_path / "x.pt", "--export", tmp_path / "y.pt")  # which does not make it a fact
    assert said in load_source(tmp_path / "y.pt").description


@pytest.mark.parametrize("prefix", ["", "module._orig_mod.", "a.b.c.0.", "base_model.trunk._x."])
def test_the_encoder_is_found_below_any_prefix(prefix):
    tensors = simclr.Encoder("resnet10", 0.125, "small").state_dict()
    flat = {prefix + name: value for name, value in tensors.items()}
    for state in (flat, {"epoch": 1, "model": {"deep": flat}, "optimizer": {"state": {0: {}}}}):
        encoder = found_in({**state, "head.0.weight": torch.rand(4, 64)})
        assert encoder.tensors.keys() == tensors.keys()
        assert encoder.rest == ["head"]
        assert (encoder.arch, encoder.width, encoder.stem) == ("resnet10", 0.125, "small")


def test_of_several_encoders_one_has_to_be_named(tmp_path):
    first, second = (simclr.Encoder("resnet10", 0.125, "small").state_dict() for _ in range(2))
    torch.save({"state_dict": first, "state_dict_ema": second}, tmp_path / "x.pt")
    message = r"several encoders; choose one by --prefix: state_dict\., state_dict_ema\."
    with pytest.raises(InputError, match=message):
        load_source(tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"no encoder at --prefix other\. \(there: state_dict\."):
        load_source(tmp_path / "x.pt", prefix="other")
    for prefix, state in (("state_dict", first), ("state_dict_ema.", second)):
        encoder = load_encoder(tmp_path / "x.pt", prefix=prefix)
        assert torch.equal(encoder.conv1.weight, state["conv1.weight"])
    same = found_in({"encoder_q.0": first, "backbone": {**first}})  # no choice
    assert same.tensors.keys() == first.keys()


@pytest.mark.parametrize("imported", [True, False])
def test_images_of_another_range_are_refused(tmp_path, trained, imported):
    torch.save(simclr.Encoder("resnet10", 1.0, "imagenet").state_dict(), tmp_path / "x.pt")
    file = tmp_path / "x.pt" if imported else trained
    images = torch.rand(2, 3, 32, 32)
    for wrong, message in (
        (images * 255, r"give images in \[0, 1\], not .* to 25\d: images / 255"),
        ((images - 0.45) / 0.22, "do not normalise them"),
        (images[:, :1], r"give RGB images \(B, 3, S, S\), not \(2, 1, 32, 32\)"),
    ):
        with pytest.raises(InputError, match=message):
            load_encoder(file)(wrong)
    encoder = load_encoder(file)
    h = encoder(images)
    assert torch.equal(torch.jit.trace(encoder, images)(images), h)


def test_exporting_an_imported_encoder(tmp_path):
    """Its padding and normalisation go with it; what torchvision cannot compute is refused."""
    _, state, _ = foreign("solo-learn, CIFAR", simclr.Encoder("resnet18"))
    torch.save(state, tmp_path / "theirs.ckpt")
    call(tmp_path / "theirs.ckpt", "--export", tmp_path / "ours.pt")
    again = load_source(tmp_path / "ours.pt")
    assert (again.normalize, again.foreign.origin) == ("cifar10", "solo-learn")
    assert again.resnet.conv1.padding == (2, 2)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(again.encoder(images), load_encoder(tmp_path / "theirs.ckpt")(images))
    _, state, _ = foreign("lightly, its own ResNet", simclr.Encoder("resnet18"))
    torch.save(state, tmp_path / "lightly.ckpt")
    with pytest.raises(InputError, match="a stem without ReLU"):
        call(tmp_path / "lightly.ckpt", "--export", tmp_path / "no.pt")
    assert not (tmp_path / "no.pt").exists()


@pytest.mark.parametrize("new", [True, False])
def test_older_files(tmp_path, new):
    """Of before torch 1.6, in half precision, and without counters of batches."""
    network = without_fc(torchvision.models.resnet18()).half().float()
    state = {k: v.half() for k, v in network.state_dict().items() if "num_batches" not in k}
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=new)
    encoder = load_encoder(tmp_path / "old.pth", normalize="none")
    images = torch.rand(2, 3, 48, 48)
    assert torch.allclose(encoder(images), network.eval()(images), atol=1e-5)


def test_statistics_of_split_batchnorm_are_averaged(tmp_path):
    network = random_statistics(small_stem(without_fc(torchvision.models.resnet18())))
    state = renamed(network, "backbone.", WITHOUT_POOL, LIGHTLY)
    expected = network(torch.ones(1, 3, 32, 32))
    for name, value in state.items():
        if "running" in name:
            state[name] = torch.cat([value + 0.1, value - 0.1])
    torch.save(state, tmp_path / "split.pt")
    encoder = load_encoder(tmp_path / "split.pt", normalize="none")
    assert torch.allclose(encoder(torch.ones(1, 3, 32, 32)), expected, atol=1e-4, rtol=1e-4)


SPOILED = [  # what becomes of a ResNet-18's tensors, None: it is gone, and why it must not load
    ({"layer3.1.bn2.running_var": None}, r"Missing key.*layer3\.1\.bn2\.running_var"),
    ({"layer2.1.conv9.weight": torch.zeros(1)}, r"Unexpected key.*layer2\.1\.conv9\.weight"),
    ({"layer4.0.conv1.weight": torch.zeros(512, 256, 1, 1)},
     r"size mismatch for layer4\.0\.conv1\.weight"),
    ({"layer4.1.conv1.weight": None}, r"unknown network: basic blocks \(2, 2, 2, 1\)"),
    ({"conv1.weight": torch.zeros(64, 3, 5, 5)}, r"network: .* convolution \(64, 3, 5, 5\)"),
    ({"conv1.weight": torch.zeros(64, 1, 7, 7)}, "encoder of images of 1 channels, not of RGB"),
    ({"conv1.weight": None}, r"no encoder that is a plain ResNet: .* \(it has 121 tensors: bn1\."),
    ({"bn1.bias": torch.full((64,), torch.nan)}, r"bn1\.bias is not finite"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), SPOILED)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, changes, message):
    state = {**torchvision.models.resnet18().state_dict(), **changes}
    torch.save({n: v for n, v in state.items() if v is not None}, tmp_path / "x.pt")
    with pytest.raises(InputError, match=message):
        load_encoder(tmp_path / "x.pt")


SCRIPTED = torch.jit.trace(nn.Linear(2, 2), torch.rand(1, 2))
NO_CHECKPOINTS = {  # what is at the place of one: its bytes, or a function that writes it
    lambda file: torch.save([Calls(open, f"{file}.trace", "w")], file):  # unpickling runs it
        "but one that needs .*open.*: if you trust it",
    lambda file: torch.save(
        [Calls(open, f"{file}.trace", "w")], file, _use_new_zipfile_serialization=False): ".*",
    lambda file: torch.save({"model": nn.Linear(2, 2)}, file):
        r"but a whole model: .* save model\.state_dict\(\) with torch\.save",
    lambda file: torch.save({"state_dict": {}, "best": np.float64(1)}, file):
        r"but one that needs numpy.*scalar.*: if you trust it, save its state dict",
    lambda file: SCRIPTED.save(str(file)): r"but TorchScript: save torch\.jit\.load\(FILE\)",
    lambda file: np.savez(file.open("wb"), a=1): r"but NumPy's \.npz: save .*from_numpy",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n": "but a pointer of git-lfs: ",
    b"\n<!DOCTYPE html><html><title>Virus scan</title>": "but a web page: download the file",
    b"\x89HDF\r\n\x1a\n" + bytes(99): "but HDF5, as Keras writes it",
    b"\x1f\x8b" + bytes(99): "but compressed by gzip: unpack it",
    b"hello": ".*", b"": ".*",
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), NO_CHECKPOINTS.items())
def test_files_that_are_no_checkpoints_are_named_and_run_no_code(tmp_path, content, message):
    file = tmp_path / "x.pt"
    file.write_bytes(content) if isinstance(content, bytes) else content(file)
    with pytest.raises(InputError, match=r"x\.pt is not a readable checkpoint .*" + message):
        load_source(file)
    with pytest.raises(InputError, match=message):  # where a run is continued, too
        utils.load_newest(file)
    assert [*tmp_path.iterdir()] == [file]  # no code was run


def test_safetensors(tmp_path, monkeypatch):
    state = simclr.Encoder("resnet10", 0.125, "small").state_dict()
    file = tmp_path / "model.safetensors"
    file.touch()
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(InputError, match="pip install safetensors"):
        load_source(file)
    monkeypatch.undo()
    pytest.importorskip("safetensors.torch").save_file(state, file)
    assert torch.equal(load_source(file).resnet.conv1.weight, state["conv1.weight"])
    file.write_bytes(b"text")
    with pytest.raises(InputError, match="not a readable checkpoint"):
        load_source(file)


def test_evaluating_a_foreign_checkpoint(tmp_path, few_digits, capsys):
    file, figures = tmp_path / "theirs.tar", tmp_path / "f"
    small = without_fc(torchvision.models.resnet18())
    torch.save(renamed(small, "encoder.", extra=head("projector.")), file)
    flags = ("--figures", figures, "--tasks", "knn", "--device", "cpu")
    results = call(file, *flags, "--dataset", "digits", "--image-size", "32")
    assert set(results["columns"][0]["scores"]) == {"pixels", "untrained", "simclr"}
    assert json.loads((tmp_path / "theirs.tar.evaluation.json").read_text()) == results
    assert "Spijkervet/SimCLR, inputs in [0, 1]; left out: projector" in results["encoder"]
    assert results["encoder"] in capsys.readouterr().out
    assert (figures / "theirs" / "evaluation.png").exists()
    with pytest.raises(InputError, match="give --dataset"):
        call(file, *flags)
    with pytest.raises(InputError, match="16 px are too small for the encoder's ImageNet stem"):
        call(file, *flags, "--dataset", "digits")


@pytest.mark.parametrize(("argv", "message"), [
    ("--checkpoints none", "python simclr.py makes one"),
    ("nothing", "nothing is neither a checkpoint nor a run under"),
    ("--tasks best", "invalid choice: 'best'"),
    ("--labels 200%", "--labels 200%: give a share up to 100 %"),
    ("--labels 0", "--labels 0: give a share"),
    ("--labels few", "--labels few: give a share"),
    ("--tasks semi --labels 500", "class '0' has only 142 training images"),
    ("--seeds 0", "--seeds must be at least 1"),
    ("--image-size 4", "--image-size must be 0 or 8 to 4096"),
    ("--embed nowhere", "--embed nowhere is not a folder or an image"),
    ("--out x.npz", "--out x.npz: it must end in .json"),
    ("--tasks knn --predictions p.csv", "add linear to --tasks"),
    ("--dataset folder", "--dataset folder needs --data-dir"),
    ("--device warp", "--device warp is not available"),
])  # fmt: skip
def test_bad_input_is_one_line(places, tmp_path, capsys, argv, message):
    before = sorted(tmp_path.rglob("*"))
    assert message in error_of(capsys, load_simCLR.main, *places, *argv.split())
    assert sorted(tmp_path.rglob("*")) == before


def test_output_that_cannot_be_written(places, tmp_path, capsys, odd_folder):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder").mkdir()
    below = tmp_path / "file"
    for flags in (
        ("--export", below / "x.pt"),
        ("--export", tmp_path / "folder"),
        ("--predictions", below / "p.csv"),
        ("--out", below / "r.json"),
        ("--embed", odd_folder, "--out", below / "h.npz", "--workers", "0"),
        ("--figures", below),
    ):
        assert "cannot write" in error_of(capsys, load_simCLR.main, *places, *flags)


def test_results_of_a_run_that_cannot_be_written_go_elsewhere(
    places, folder, tmp_path, few_digits, odd_folder, monkeypatch, capsys
):
    monkeypatch.setattr(load_simCLR.os, "access", lambda path, _: path != folder)
    before, figures = sorted(folder.rglob("*")), tmp_path / "figures" / "digits_resnet10"
    call(*places, "--tasks", "knn")
    assert str(figures / "evaluation.json") in capsys.readouterr().out
    assert (figures / "evaluation.json").exists()
    call(*places, "--embed", odd_folder, "--workers", "0")
    assert (figures / "features.npz").exists()
    assert sorted(folder.rglob("*")) == before
