"""load_simCLR.py: trustworthy evaluation, embedding, export, and other people's checkpoints."""

import argparse
import csv
import io
import json
import math
import pickle

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
from load_simCLR import Column, Evaluation, Options, load_encoder, load_source
from simclr import LabelTraining
from utils import ImageSet, InputError

CPU = torch.device("cpu")


@pytest.fixture
def trained(finished):
    """The checkpoint file of a finished run on digits."""
    return finished.folder / "last.pt"


@pytest.fixture
def places(trained, tmp_path):
    """Flags that send results elsewhere than beside the shared run: a copy of it, and figures."""
    folder = tmp_path / "checkpoints" / "digits_resnet10"
    folder.mkdir(parents=True)
    for name in ("last.pt", "config.json", "log.jsonl", "summary.json"):
        (folder / name).write_bytes((trained.parent / name).read_bytes())
    flags = ("--checkpoints", folder.parent, "--figures", tmp_path / "figures", "--device", "cpu")
    return tuple(str(x) for x in flags)


def evaluation_of(file, **overrides):
    source = load_source(file)
    config, data = load_simCLR.evaluation_setup(source, Options(**overrides), CPU)
    return source, Evaluation(source, config, data, CPU, overrides.get("epochs", 0))


# ------------------------------------------------------------------------------- the frozen encoder


def test_smaller_views_of_the_training_are_not_those_of_the_evaluation(trained):
    source = load_source(trained)
    source.config.view_size = 12
    config, _ = load_simCLR.evaluation_setup(source, Options(), CPU)
    assert (config.image_size, config.view_side) == (16, 16)
    assert simclr.make_augment(config).size == 16


def test_load_encoder_is_the_trained_encoder_frozen(trained):
    encoder = load_encoder(trained.parent)
    images = utils.load_images("digits", "test").images[:8].float() / 255
    h = encoder(images)
    assert h.shape == (8, encoder.feature_dim) == (8, 64)
    assert not h.requires_grad
    assert not any(module.training for module in encoder.modules())
    assert torch.equal(h, simclr.load_run(trained).model.encoder(images))


@pytest.mark.parametrize("part", ["parameter", "buffer"])
def test_a_changed_encoder_voids_the_evaluation(part):
    encoder = simclr.Encoder("resnet10", 0.125, "small")
    with utils.frozen(encoder):
        encoder(torch.rand(4, 3, 16, 16))  # in eval mode here: nothing moves
    assert encoder.training
    changed = {"parameter": encoder.conv1.weight, "buffer": encoder.bn1.running_mean}[part]
    with pytest.raises(RuntimeError, match="changed the encoder"), utils.frozen(encoder):
        changed.data.view(-1)[0] += 1e-7
    hidden = load_simCLR.Normalized(encoder, (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(RuntimeError, match="changed the encoder"), utils.frozen(hidden):
        hidden.mean += 1  # not in the state dict
    with pytest.raises(RuntimeError, match="changed the encoder"), utils.frozen(encoder):
        encoder.train()(torch.rand(4, 3, 16, 16))  # the classic mistake: BatchNorm moves


def test_every_part_is_in_its_old_mode_after_embedding():
    encoder = simclr.Encoder("resnet10", 0.125, "small").eval()
    whole = nn.Sequential(encoder, nn.Linear(64, 8).train()).train()
    encoder.eval()
    data = ImageSet(torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8))
    utils.embed(whole, data, 16, CPU)
    assert whole.training
    assert whole[1].training
    assert not any(module.training for module in encoder.modules())


def test_all_frozen_tasks_leave_the_file_and_the_encoder_alone(trained, few_digits, monkeypatch):
    """Through the program's own guard, and by the bytes of each tensor."""
    monkeypatch.setattr(LabelTraining, "steps", lambda *_: 5)
    source, evaluation = evaluation_of(trained, epochs=1)
    before = {k: v.clone() for k, v in source.encoder.state_dict().items()}
    options = Options(tasks=("knn", "linear", "linear-augmented", "semi"), labels=("1",), seeds=1)
    results = load_simCLR.evaluate(source, evaluation, options)
    assert [column["task"] for column in results["columns"]] == [
        "knn", "knn", "linear", "linear-augmented", "semi",
    ]  # fmt: skip
    assert all(torch.equal(v, before[k]) for k, v in source.encoder.state_dict().items())
    rows = set(simclr.REPRESENTATIONS)
    assert all(set(column["scores"]) == rows for column in results["columns"][:-1])
    assert set(results["columns"][-1]["scores"]) == rows - {"projection"}  # the head is not tuned


def test_an_encoder_that_moves_is_caught_by_the_program(trained):
    def drift(module, *_):
        module.bn1.running_mean += 1e-3

    source, evaluation = evaluation_of(trained)
    source.encoder.register_forward_hook(drift)
    with pytest.raises(RuntimeError, match="changed the encoder"):
        load_simCLR.evaluate(source, evaluation, Options(tasks=("knn",)))


# -------------------------------------------------------------------------------------- classifiers


def test_neighbours_equal_brute_force():
    random = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(50, 6, generator=random), torch.randn(9, 6, generator=random)
    similarity, rows = utils.nearest_neighbours(bank, queries, 4)
    cosine = F.cosine_similarity(queries[:, None], bank[None], dim=2)
    for i in range(9):
        order = sorted(range(50), key=lambda j: -cosine[i, j])[:4]
        assert rows[i].tolist() == order
        assert torch.allclose(similarity[i], cosine[i, order], atol=1e-6)


@pytest.fixture(scope="module")
def overlapping():
    """Classes that overlap, features of very different scale: (x, y, x_test, y_test)."""
    random = torch.Generator().manual_seed(0)
    y = torch.arange(900) % 3
    x = torch.randn(3, 20, generator=random)[y] + 2.5 * torch.randn(900, 20, generator=random)
    x = x * torch.logspace(-1, 1, 20)
    return x[:600], y[:600], x[600:], y[600:]


@pytest.mark.parametrize("l2", [1e-4, 1e-2, 1.0])
def test_linear_classifier_equals_scikit_learn(overlapping, l2):
    x, y, x_test, y_test = overlapping
    ours = utils.fit_linear_classifier(x, y, 3, strengths=(l2,))
    mean, std = x.mean(0), x.std(0, correction=0)
    theirs = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-10, max_iter=10_000)
    theirs.fit(((x - mean) / std).double().numpy(), y.numpy())
    coefficients = (ours.weight * std[:, None]).T.numpy()
    assert np.abs(coefficients - theirs.coef_).max() < 0.02 * np.abs(theirs.coef_).max()
    accuracy = theirs.score(((x_test - mean) / std).double().numpy(), y_test.numpy())
    assert abs(utils.accuracy(ours(x_test).argmax(1), y_test) - accuracy) <= 0.0034  # an image


def test_the_strength_is_chosen_on_held_out_training_images(overlapping):
    """The same search with scikit-learn, on the same split, chooses the same strength."""
    x, y, _, _ = overlapping
    strengths = tuple(10.0 ** (2 - i) for i in range(7))
    calls = []
    chosen = utils.fit_linear_classifier(x, y, 3, strengths, lambda: calls.append(1)).l2
    assert len(calls) == len(strengths)
    scaled = ((x - x.mean(0)) / x.std(0, correction=0)).double().numpy()
    fit, held_out = utils.split_held_out(y.numpy())
    assert len(held_out) == 120
    scores = []
    for l2 in strengths:
        model = LogisticRegression(C=1 / (l2 * len(fit)), tol=1e-8, max_iter=10_000)
        model.fit(scaled[fit], y[fit])
        scores.append(model.score(scaled[held_out], y[held_out]))
    assert scores[strengths.index(chosen)] >= max(scores) - 1 / 120
    assert max(scores) > min(scores)  # the choice matters here


def test_of_equal_strengths_the_strongest_is_taken():
    x = torch.cat([torch.randn(50, 4) - 9, torch.randn(50, 4) + 9])  # any strength separates these
    y = torch.arange(100) // 50
    assert utils.fit_linear_classifier(x, y, 2, strengths=(1.0, 0.1, 0.01)).l2 == 1.0


@pytest.mark.parametrize("per_class", [1, 2, 4])
def test_many_classes_of_few_images_are_learned(per_class):
    """No class can spare an image, or each but one: the classifier is not the zero one."""
    random = torch.Generator().manual_seed(0)
    y = torch.arange(300 * per_class) % 300
    centres = torch.randn(300, 64, generator=random)
    x, x_test = (centres[y] + 0.1 * torch.randn(len(y), 64, generator=random) for _ in range(2))
    fitted = utils.fit_linear_classifier(x, y, 300)
    assert utils.accuracy(fitted(x_test).argmax(1), y) > 0.9


def test_the_augmented_classifier_learns_from_pixels(trained):
    """Crops of nearly constant pixels vary a thousand times more than the pixels themselves."""
    _, evaluation = evaluation_of(trained, epochs=15)
    fitted = evaluation.fit_on_augmented("pixels")
    assert evaluation.score(fitted(evaluation.features("pixels")[1])) > 0.85


def test_the_paper_has_45_strengths():
    assert len(utils.L2_STRENGTHS) == 45
    assert utils.L2_STRENGTHS[0] == pytest.approx(1e5)
    assert utils.L2_STRENGTHS[-1] == pytest.approx(1e-6)
    ratios = [a / b for a, b in zip(utils.L2_STRENGTHS, utils.L2_STRENGTHS[1:], strict=False)]
    assert max(ratios) == pytest.approx(min(ratios))


# ---------------------------------------------------------------------------- learning from labels


def test_training_on_labels_equals_sgd_by_hand():
    random = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(6, 5, generator=random), torch.arange(6) % 3) for _ in range(4)
    ]  # fmt: skip
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    how = LabelTraining(momentum=0.8, weight_decay=0.01)
    simclr.train_on_labels(ours, batches, 4, 0.3, how, "float32")
    velocity = {name: 0.0 for name, _ in theirs.named_parameters()}
    for step, (x, y) in enumerate(batches):
        rate = 0.3 * (1 + math.cos(math.pi * step / 4)) / 2
        theirs.zero_grad()
        F.cross_entropy(theirs(x), y).backward()
        with torch.no_grad():
            for name, p in theirs.named_parameters():
                g = p.grad + 0.01 * p
                velocity[name] = 0.8 * velocity[name] + g
                p.sub_(rate * (g + 0.8 * velocity[name]))  # Nesterov
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_labelled_batches_have_their_own_labels_and_see_every_row(tiny_config):
    grey = torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1).expand(20, 3, 16, 16)
    data = ImageSet(grey.contiguous(), torch.arange(20) * 3, tuple("abc"))
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


def test_small_label_sets_get_small_batches_and_enough_steps():
    how = LabelTraining(epochs=60)
    assert how.batch(10) == 10
    assert how.batch(600) == 64
    assert how.batch(12_811) == 1024  # 1 % of ImageNet, as in the paper
    assert how.steps(12_811) == 60 * 13
    assert how.steps(10) == how.min_steps
    assert LabelTraining(epochs=30).steps(50_000) == 30 * 49


def test_fine_tuning_trains_a_copy_of_everything(trained):
    _, evaluation = evaluation_of(trained)
    encoder, rows = evaluation.encoders["simclr"], evaluation.label_rows("2", 0)
    before = utils.module_digest(encoder)
    augment = simclr.geometric_augment(evaluation.config)
    assert [type(step).__name__ for step in augment.steps] == [
        "RandomResizedCrop",
        "RandomRotation",
    ]
    how = LabelTraining(epochs=1, min_steps=3)
    network = simclr.fine_tune(
        encoder, evaluation.data.train, rows, augment, how, evaluation.config, CPU
    )
    assert utils.module_digest(encoder) == before
    assert not network.training
    moved = [
        not torch.equal(a, b)
        for a, b in zip(network[0].parameters(), encoder.parameters(), strict=True)
    ]
    assert all(moved)
    assert network(torch.rand(2, 3, 16, 16)).shape == (2, 10)


def test_label_rows_are_balanced_and_drawn_anew_for_each_seed(trained):
    _, evaluation = evaluation_of(trained)
    labels = evaluation.data.train.labels
    few = evaluation.label_rows("3", 0)
    assert labels[few].bincount().tolist() == [3] * 10
    assert evaluation.label_rows("3", 0).tolist() == few.tolist()
    assert evaluation.label_rows("3", 1).tolist() != few.tolist()
    assert len(evaluation.label_rows("100%", 0)) == 1437
    assert len(evaluation.label_rows("1.0", 0)) == 1437
    assert labels[evaluation.label_rows("1%", 0)].bincount().tolist() == [1] * 10  # at least one
    tenth = labels[evaluation.label_rows("0.1", 0)].bincount()
    assert (tenth - labels.bincount() / 10).abs().max() <= 0.5
    with pytest.raises(InputError, match="class '8' has only 139 training images"):
        evaluation.label_rows("140", 0)


def test_from_scratch_starts_where_the_run_began(trained):
    _, evaluation = evaluation_of(trained)
    fresh = simclr.make_model(evaluation.config).encoder
    assert utils.module_digest(evaluation.untrained(0)) == utils.module_digest(fresh)
    assert utils.module_digest(evaluation.untrained(1)) != utils.module_digest(fresh)
    assert utils.module_digest(evaluation.encoders["untrained"]) == utils.module_digest(fresh)


# -------------------------------------------------------------------------------- the command line


def call(*argv):
    return load_simCLR.run(*load_simCLR.parse_command_line([str(x) for x in argv]))


def test_evaluation_from_the_command_line(places, tmp_path, capsys):
    predictions = tmp_path / "p.csv"
    results = call("digits_resnet10", *places, "--predictions", predictions)
    out = capsys.readouterr().out
    for name in ("raw pixels", "untrained encoder", "SimCLR h", "SimCLR z", "kNN, k = 10"):
        assert name in out
    folder = tmp_path / "checkpoints" / "digits_resnet10"
    assert json.loads((folder / "evaluation.json").read_text()) == results
    by_title = {column["title"]: column["scores"] for column in results["columns"]}
    summary = json.loads((folder / "summary.json").read_text())
    for key in ("pixels", "untrained", "simclr"):  # the run's own final table says the same
        assert by_title["kNN, k = 10"][key] == [summary["knn"][key]]
    with open(predictions, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [str(i) for i in range(360)]
    truth = utils.load_images("digits", "test").labels
    assert [int(row["true"]) for row in rows] == truth.tolist()
    right = np.mean([row["true"] == row["predicted"] for row in rows])
    assert right == pytest.approx(by_title["linear"]["simclr"][0])
    assert all(0.1 <= float(row["confidence"]) <= 1 for row in rows)
    confusion = np.array(results["confusion"])
    assert confusion.sum() == 360
    assert np.trace(confusion) / 360 == pytest.approx(right)
    with Image.open(tmp_path / "figures" / "digits_resnet10" / "evaluation.png") as picture:
        assert picture.width > 1000

    again = call(*places, "--tasks", "knn")  # the newest run; what was measured stays
    assert [c["title"] for c in again["columns"]] == [c["title"] for c in results["columns"]]
    assert again["confusion"] == results["confusion"]


def test_results_of_another_checkpoint_are_not_kept(places, tmp_path, few_digits):
    first = call(*places, "--tasks", "linear")
    folder = tmp_path / "checkpoints" / "digits_resnet10"
    state = utils.load_checkpoint(folder / "last.pt")
    state["model"]["encoder.conv1.weight"] += 1
    utils.save_checkpoint(folder / "last.pt", state)
    second = call(*places, "--tasks", "knn")
    assert {c["task"] for c in first["columns"]} == {"linear"}
    assert {c["task"] for c in second["columns"]} == {"knn"}


def test_what_was_measured_is_kept_whatever_happens_then(places, tmp_path, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Evaluation, "linear", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call(*places, "--tasks", "knn", "linear")
    file = tmp_path / "checkpoints" / "digits_resnet10" / "evaluation.json"
    assert [c["task"] for c in json.loads(file.read_text())["columns"]] == ["knn", "knn"]


def test_other_settings_are_named_and_not_mixed(places, few_digits, monkeypatch):
    monkeypatch.setattr(LabelTraining, "steps", lambda *_: 5)
    first = call(*places, "--tasks", "supervised", "--epochs", "1", "--seeds", "1")
    assert first["columns"][0]["title"] == "supervised, all labels, 1 epochs"
    other = call(*places, "--tasks", "knn", "--precision", "float32")
    mixed = other["precision"] != first["precision"]
    assert {c["task"] for c in other["columns"]} == ({"knn"} if mixed else {"knn", "supervised"})


def test_class_names_that_are_no_mathematics_and_no_text():
    columns = [{"task": "linear", "title": "linear", "scores": {"simclr": [0.5]}}]
    classes = [r"$\frac$", "x\udcff", "a" * 40]
    tile = (np.zeros((4, 4, 3), np.uint8), load_simCLR.drawable(classes[0], 12))
    figure = load_simCLR.draw_evaluation(
        columns, simclr.REPRESENTATIONS, np.eye(3, dtype=int), classes, [tile]
    )
    figure.savefig(io.BytesIO(), format="png")
    ticks = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    assert ticks == [r"\$\frac\$", "x\\udcff", "a" * 13 + "…"]


def test_transfer_to_a_folder_names_images_by_their_path(places, tmp_path, write_image):
    for split, n in (("train", 6), ("test", 3)):
        for kind in ("a b", "ünï"):
            for i in range(n):
                write_image(tmp_path / "photos" / split / kind / f"{i}.png", seed=i)
    results = call(
        *places, "--dataset", "folder", "--data-dir", tmp_path / "photos",
        "--predictions", tmp_path / "p.csv",
    )  # fmt: skip
    assert results["classes"] == ["a b", "ünï"]
    assert results["image_size"] == 16  # as in training
    with open(tmp_path / "p.csv", newline="", encoding="utf-8") as file:
        assert {row["image"] for row in csv.DictReader(file)} == {
            f"{kind}/{i}.png" for kind in ("a b", "ünï") for i in range(3)
        }
    folder = tmp_path / "checkpoints" / "digits_resnet10"
    assert (folder / "evaluation-folder.json").exists()
    assert not (folder / "evaluation.json").exists()


def test_mistakes_are_ordered_by_confidence():
    truth, predicted = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([0, 2, 1, 0, 0])
    confidence = torch.tensor([0.99, 0.5, 0.9, 0.98, 0.7])
    assert load_simCLR.most_confident_mistakes(truth, predicted, confidence) == [2, 4, 1]
    counts = load_simCLR.confusion_matrix(truth, predicted, 3)
    assert counts.tolist() == [[2, 0, 0], [1, 0, 1], [0, 1, 0]]


def test_the_table_and_the_figure_show_the_scores():
    columns = [
        {"task": "knn", "title": "kNN", "scores": {"pixels": [0.5], "simclr": [0.875]}},
        {"task": "semi", "title": "few", "scores": {"untrained": [0.5], "simclr": [0.8, 0.9]}},
    ]
    text = load_simCLR.table(columns, simclr.REPRESENTATIONS)
    lines = {line[:17].strip(): line[17:].split("   ") for line in text.splitlines()}
    assert [cell.strip() for cell in lines["SimCLR h"] if cell.strip()] == [
        "87.5 %",
        "85.0 ± 7.1 %",
    ]
    assert [cell.strip() for cell in lines["raw pixels"] if cell.strip()] == ["50.0 %", "–"]
    assert "SimCLR z" not in text
    narrow = load_simCLR.table(columns, simclr.REPRESENTATIONS, width=40)
    assert narrow.count("SimCLR h") == 2  # a block for each column
    assert load_simCLR.margins(columns) == [
        "few: pre-training beats training from scratch by 35.0 points"
    ]
    figure = load_simCLR.draw_evaluation(columns, simclr.REPRESENTATIONS)
    (axis,) = figure.axes
    drawn = {c.get_label(): c.lines[0].get_xdata().tolist() for c in axis.containers}
    assert drawn["SimCLR h"] == pytest.approx([87.5, 85.0])
    tile = (np.zeros((4, 4, 3), np.uint8), "a → b")
    figure = load_simCLR.draw_evaluation(
        columns, simclr.REPRESENTATIONS, [[3, 1], [0, 2]], "ab", [tile]
    )
    assert any(text.get_text() == "3" for text in figure.axes[1].texts)
    assert figure.axes[2].get_title() == "a → b"


# --------------------------------------------------------------------------------------- new images


@pytest.fixture
def odd_folder(tmp_path, write_image):
    folder = tmp_path / "mixed"
    write_image(folder / "a.png", size=(30, 20), seed=1)
    write_image(folder / "deep" / "b.jpg", size=(16, 16), seed=2)
    (folder / "broken.png").write_bytes(b"no image")
    write_image(folder / "c.png", size=(9, 40), mode="L", seed=3)
    return folder


def test_embedding_a_folder(places, tmp_path, odd_folder, capsys):
    call(*places, "--embed", odd_folder, "--out", tmp_path / "h.npz", "--workers", "0")
    out = capsys.readouterr().out
    assert "1 of 4 images could not be read" in out
    assert "broken.png" in out
    with np.load(tmp_path / "h.npz", allow_pickle=False) as saved:
        assert saved["paths"].tolist() == ["a.png", "c.png", "deep/b.jpg"]
        h = torch.from_numpy(saved["h"])
    encoder = load_encoder(tmp_path / "checkpoints" / "digits_resnet10")
    for i, path in enumerate(["a.png", "c.png", "deep/b.jpg"]):
        image = utils.center_view(utils.read_image(odd_folder / path)[None], 16)
        by_hand = encoder((image * 255).round() / 255)[0]
        assert torch.allclose(h[i], by_hand, atol=0.03 * by_hand.abs().max().item())  # bfloat16


def test_classifying_a_folder(places, tmp_path, few_digits, capsys):
    test = utils.load_images("digits", "test")
    folder = tmp_path / "scans"
    folder.mkdir()
    for i in range(40):
        pixels = test.images[i].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    call(*places, "--classify", folder, "--workers", "0")
    file = tmp_path / "checkpoints" / "digits_resnet10" / "classified.csv"
    assert str(file) in capsys.readouterr().out
    call(*places, "--predictions", tmp_path / "p.csv")
    with open(file, newline="") as one, open(tmp_path / "p.csv", newline="") as two:
        ours, expected = list(csv.DictReader(one)), list(csv.DictReader(two))[:40]
    assert list(ours[0]) == ["image", "predicted", "confidence"]
    assert ours[7]["image"] == "07.png"
    same = [a["predicted"] == b["predicted"] for a, b in zip(ours, expected, strict=True)]
    assert sum(same) >= 39  # bfloat16 in batches of another size


# ------------------------------------------------------------------------------------------- export


def random_statistics(network, seed=0):
    """BatchNorm statistics and scales as if trained, so that a wrong mapping shows."""
    random = torch.Generator().manual_seed(seed)
    for value in network.state_dict().values():
        if value.ndim == 1:
            value.copy_(0.5 + torch.rand(value.shape, generator=random))
    return network.eval()


def small_stem(network, padding=1):
    channels = network.conv1.out_channels
    network.conv1 = nn.Conv2d(3, channels, 3, stride=1, padding=padding, bias=False)
    network.maxpool = nn.Identity()
    return network


@pytest.mark.parametrize("stem", ["imagenet", "small"])
def test_an_exported_encoder_is_torchvisions(tmp_path, stem, capsys):
    config = simclr.make_config(
        dataset="digits", arch="resnet18", width=1.0, image_size=48, stem=stem, run="r",
        checkpoints=str(tmp_path), figures=str(tmp_path),
    )  # fmt: skip
    model = simclr.make_model(config)
    random_statistics(model.encoder)
    run = simclr.Pretraining(config, simclr.load_data(config, CPU), CPU)
    run.model.load_state_dict(model.state_dict())
    run.save()
    call(tmp_path / "r" / "last.pt", "--export", tmp_path / "encoder.pt")

    theirs = torchvision.models.resnet18()
    if stem == "small":
        small_stem(theirs)
    state = torch.load(tmp_path / "encoder.pt", weights_only=True)
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert sorted(missing) == ["fc.bias", "fc.weight"]
    assert unexpected == []
    theirs.fc = nn.Identity()
    images = torch.rand(2, 3, 48, 48)
    expected = model.encoder(images)
    assert torch.allclose(theirs.eval()(images), expected, atol=1e-5)
    again = load_source(tmp_path / "encoder.pt")  # and comes back, without a normalisation
    assert again.normalize == "none"
    assert torch.allclose(again.encoder(images), expected, atol=1e-5)

    told = capsys.readouterr().out
    assert "model = torchvision.models.resnet18()" in told
    assert ("model.maxpool = nn.Identity()" in told) == (stem == "small")

    if stem == "imagenet":  # people fine-tune for detection too
        backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
        backbone.body.load_state_dict(state, strict=True)
        detector = FasterRCNN(backbone, num_classes=2, min_size=64, max_size=64).train()
        target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
        losses = sum(detector([torch.rand(3, 64, 64)], [target]).values())
        losses.backward()
        assert losses.isfinite()
        assert backbone.body.layer4[0].conv1.weight.grad.abs().sum() > 0


# ------------------------------------------------------------------------------------------- import


def renamed(network, prefix, rename=lambda name: name, extra=()):
    """A state dict with other names, and tensors of heads that must not matter."""
    state = {prefix + rename(name): value for name, value in network.state_dict().items()}
    return {**state, **{name: torch.rand(shape) for name, shape in dict(extra).items()}}


def numbered(parts):
    """torchvision's names -> numbers in an nn.Sequential of these children."""

    def rename(name):
        first, _, rest = name.partition(".")
        return f"{parts.index(first)}.{rest}"

    return rename


WITH_POOL = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"]
WITHOUT_POOL = ["conv1", "bn1", "relu", "layer1", "layer2", "layer3", "layer4"]
WITHOUT_RELU = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]


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


MLP = {"0.weight": (8, 512), "0.bias": (8,), "2.weight": (4, 8), "2.bias": (4,)}


def head(prefix, tensors=None):
    return {prefix + name: shape for name, shape in (tensors or MLP).items()}


FC = {"fc.weight": (10, 512), "fc.bias": (10,)}
# project -> (network, state dict in its naming, wrapper, normalisation that its training used)
FOREIGN = {
    "torchvision": lambda n: (n, renamed(n, "", extra=FC), "imagenet"),
    "timm, saved while training": lambda n: (
        n, {"state_dict": renamed(n, "module.", extra=head("module.", FC)), "arch": "resnet18",
            "epoch": 3, "args": argparse.Namespace(lr=0.1)}, "imagenet",
    ),
    "MoCo": lambda n: (
        n, {"epoch": 200, "arch": "resnet18", "optimizer": {}, "state_dict": {
            **renamed(n, "module.encoder_q.", extra=head("module.encoder_q.fc.")),
            **{k: torch.rand_like(v.float()) for k, v in renamed(n, "module.encoder_k.").items()},
            "module.queue": torch.rand(4, 9), "module.queue_ptr": torch.zeros(1),
        }}, "imagenet",
    ),
    "MoCo, CIFAR": lambda n: (
        small_stem(n), {"state_dict": renamed(n, "encoder_q.net.", numbered(WITHOUT_POOL),
                        head("encoder_q.net.9.", {"weight": (4, 512), "bias": (4,)}))},
        "cifar10-per-image",
    ),
    "lightly": lambda n: (
        n, {"state_dict": renamed(n, "backbone.", numbered(WITH_POOL),
            head("projection_head.layers.")), "pytorch-lightning_version": "2.6.6"}, "imagenet",
    ),
    "lightly, its own ResNet": lambda n: (
        without_relu(small_stem(n)), {"state_dict": renamed(
            n, "backbone.", lambda x: shortcut(numbered(WITHOUT_RELU)(x)),
            head("projection_head.layers."))}, "imagenet",
    ),
    "solo-learn, ImageNet": lambda n: (
        n, {"state_dict": renamed(n, "backbone.", extra={**head("projector."),
            **head("classifier.", {"weight": (10, 512), "bias": (10,)})})}, "imagenet",
    ),
    "solo-learn, CIFAR": lambda n: (
        small_stem(n, padding=2), {"state_dict": renamed(n, "backbone.", extra={
            **head("projector."), **head("classifier.", {"weight": (10, 512)}),
            **head("momentum_backbone.", {"conv1.weight": (64, 3, 3, 3)})})}, "cifar10",
    ),
    "solo-learn, older": lambda n: (
        small_stem(n, padding=2), {"state_dict": renamed(n, "encoder.", extra={
            **head("projector."), **head("classifier.", {"weight": (10, 512)})})}, "cifar10",
    ),
    "sthalles": lambda n: (
        n, {"epoch": 100, "arch": "resnet18", "optimizer": {},
            "state_dict": renamed(n, "backbone.", extra=head("backbone.fc."))}, "none",
    ),
    "sthalles, older": lambda n: (
        n, renamed(n, "features.", numbered(WITH_POOL), {"l1.weight": (8, 512)}), "none",
    ),
    "Spijkervet": lambda n: (n, renamed(n, "encoder.", extra=head("projector.")), "none"),
    "Spijkervet, several GPUs": lambda n: (
        n, renamed(n, "module.encoder.", extra=head("module.projector.")), "none"
    ),
    "dkobak": lambda n: (
        small_stem(n), renamed(n, "backbone.", extra=head("projector.")), "none"
    ),
    "SupContrast": lambda n: (
        small_stem(n), {"opt": argparse.Namespace(model="resnet18"), "epoch": 5, "optimizer": {},
            "model": renamed(n, "encoder.module.", shortcut, head("head."))}, "cifar10-per-image",
    ),
    "p3i0t": lambda n: (small_stem(n), renamed(n, "enc.", extra=head("projector.")), "none"),
    "leftthomas": lambda n: (
        small_stem(n), renamed(n, "f.", numbered(WITHOUT_POOL),
            {**head("g."), "f.total_ops": (1,), "total_params": (1,)}), "cifar10-per-image",
    ),
}  # fmt: skip


def without_relu(network):
    network.relu = nn.Identity()
    return network


@pytest.mark.parametrize("project", list(FOREIGN))
def test_importing_another_projects_checkpoint(tmp_path, project):
    """A quarter as wide as theirs, as it is the names that differ; torchvision's own apart."""
    network = simclr.Encoder("resnet18", 0.25, "imagenet")
    if project == "torchvision":
        network = without_fc(torchvision.models.resnet18())
    check_import(tmp_path, *FOREIGN[project](network))


def check_import(tmp_path, network, state, normalize):
    """The file gives the network's outputs, behind the normalisation of its training."""
    random_statistics(network)  # in place: the state dict holds the same tensors
    torch.save(state, tmp_path / "theirs.pth.tar")
    source = load_source(tmp_path / "theirs.pth.tar")
    assert source.normalize == normalize
    images = torch.rand(3, 3, 48, 48)
    inputs = images
    if normalize != "none":
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in load_simCLR.MEANS[normalize])
        inputs = (images - mean) / std
    with torch.no_grad():
        assert torch.allclose(source.encoder(images), network(inputs), atol=1e-4, rtol=1e-4)
    assert source.encoder.feature_dim == network(inputs).shape[1]
    assert not any(p.requires_grad for p in source.encoder.parameters())


def without_fc(network):
    network.fc = nn.Identity()
    return network


@pytest.mark.parametrize("width", [1, 0.5])
def test_importing_googles_simclr_in_torch(tmp_path, width):
    """Version 1 as torchvision's names at any width, version 2 with names of its own."""
    wide = simclr.Encoder("resnet50", width, "imagenet")
    state = dict(reversed(renamed(wide, "").items()))  # their order differs
    check_import(tmp_path, wide, {"state_dict": state}, "imagenet")
    if width == 1:
        network = without_fc(torchvision.models.resnet50())
        state = renamed(network, "", simclr_v2, {"fc.weight": (10, 2048), "fc.bias": (10,)})
        check_import(tmp_path, network, {"resnet": state, "head": {}}, "none")


def test_exporting_an_imported_encoder(tmp_path):
    """Its padding and normalisation go with it; what torchvision cannot compute is refused."""
    _, state, _ = FOREIGN["solo-learn, CIFAR"](without_fc(torchvision.models.resnet18()))
    torch.save(state, tmp_path / "theirs.ckpt")
    call(tmp_path / "theirs.ckpt", "--export", tmp_path / "ours.pt")
    again = load_source(tmp_path / "ours.pt")
    assert again.normalize == "cifar10"
    assert again.plain.conv1.padding == (2, 2)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(again.encoder(images), load_encoder(tmp_path / "theirs.ckpt")(images))
    _, state, _ = FOREIGN["lightly, its own ResNet"](without_fc(torchvision.models.resnet18()))
    torch.save(state, tmp_path / "lightly.ckpt")
    with pytest.raises(InputError, match="a stem without ReLU"):
        call(tmp_path / "lightly.ckpt", "--export", tmp_path / "no.pt")
    assert not (tmp_path / "no.pt").exists()


def test_importing_a_file_of_before_torch_1_6(tmp_path):
    network = without_fc(torchvision.models.resnet18())
    torch.save(network.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    encoder = load_encoder(tmp_path / "old.pth", normalize="none")
    images = torch.rand(2, 3, 48, 48)
    assert torch.allclose(encoder(images), network.eval()(images), atol=1e-5)


def test_counters_that_old_files_lack_are_no_fault(tmp_path):
    state = without_fc(torchvision.models.resnet18()).state_dict()
    state = {k: v for k, v in state.items() if "num_batches_tracked" not in k}
    torch.save(state, tmp_path / "old.pth")
    assert load_encoder(tmp_path / "old.pth").feature_dim == 512


def test_statistics_of_split_batchnorm_are_averaged(tmp_path):
    network = random_statistics(small_stem(without_fc(torchvision.models.resnet18())))
    state = renamed(network, "backbone.", numbered(WITHOUT_POOL), head("projection_head.layers."))
    expected = network(torch.ones(1, 3, 32, 32))
    for name, value in state.items():
        if "running" in name:
            state[name] = torch.cat([value + 0.1, value - 0.1])
    torch.save(state, tmp_path / "split.pt")
    encoder = load_encoder(tmp_path / "split.pt", normalize="none")
    assert torch.allclose(encoder(torch.ones(1, 3, 32, 32)), expected, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def resnet18_state():
    return torchvision.models.resnet18().state_dict()


def spoil(kind, state):
    """A checkpoint that must not load."""
    if kind == "missing":
        del state["layer3.1.bn2.running_var"]
    elif kind == "surplus":
        state["layer2.1.conv9.weight"] = torch.zeros(1)
    elif kind == "shape":
        state["layer4.0.conv1.weight"] = torch.zeros(512, 256, 1, 1)
    elif kind == "blocks":
        state = {k: v for k, v in state.items() if not k.startswith("layer4.1.")}
    elif kind == "stem":
        state["conv1.weight"] = torch.zeros(64, 3, 5, 5)
    elif kind == "wide":
        with torch.device("meta"):  # its shapes
            state = torchvision.models.wide_resnet50_2().state_dict()
        state = {name: torch.zeros(value.shape) for name, value in state.items()}
    elif kind == "deep stem":
        del state["conv1.weight"]
        state["conv1.0.weight"] = torch.zeros(32, 3, 3, 3)
    elif kind == "unknown":
        state = {"transformer.block.weight": torch.zeros(2, 2)}
    elif kind == "huge":
        state["conv1.weight"] = torch.zeros(1).expand(64 * 300, 3, 7, 7)
    elif kind == "bool":
        state["bn1.weight"] = torch.ones(64, dtype=torch.bool)
    elif kind == "nan":
        state["bn1.bias"] = torch.full((64,), torch.nan)
    elif kind == "sparse":
        state["conv1.weight"] = torch.zeros(64, 3, 7, 7).to_sparse()
    elif kind == "no tensors":
        state = {"state_dict": {"a": 1}}
    return state


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"layer3\.1\.bn2\.running_var is missing"),
        ("surplus", r"layer2\.1\.conv9\.weight is surplus"),
        ("shape", r"layer4\.0\.conv1\.weight has shape \(512, 256, 1, 1\), not \(512, 256, 3, 3\)"),
        ("blocks", r"not supported: basic blocks \[2, 2, 2, 1\]"),
        ("stem", r"not supported: .* first convolution \(64, 3, 5, 5\)"),
        ("wide", r"layer1\.0\.conv1\.weight has shape \(128, 64, 1, 1\).*, and \d+ more"),
        ("huge", "an encoder 300 times as wide is too large"),
        ("bool", r"bn1\.weight is of type torch\.bool, not a float"),
        ("nan", r"bn1\.bias is not finite"),
        ("sparse", r"not a readable checkpoint .it names torch\._utils\._rebuild_sparse_tensor"),
        ("deep stem", "no checkpoint of a known naming"),
        ("unknown", r"no checkpoint of a known naming \(it has 1 tensors: transformer"),
        ("no tensors", r"no checkpoint of a known naming \(it has 0 tensors: none"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, resnet18_state, kind, message):
    torch.save(spoil(kind, dict(resnet18_state)), tmp_path / "x.pt")
    with pytest.raises(InputError, match=message):
        load_encoder(tmp_path / "x.pt")


class Evil:
    """Would make a file if it were unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("new", [True, False])
def test_a_file_that_would_run_code_is_refused(tmp_path, new):
    file, trace = tmp_path / "evil.pt", tmp_path / "trace"
    state = {"state_dict": {"conv1.weight": torch.zeros(1)}, "more": Evil(trace)}
    torch.save(state, file, _use_new_zipfile_serialization=new)
    with pytest.raises(InputError, match=r"evil\.pt is not a readable checkpoint"):
        load_encoder(file)
    assert not trace.exists()
    file.write_bytes(pickle.dumps(Evil(trace)))
    with pytest.raises(InputError, match="not a readable checkpoint"):
        load_encoder(file)
    assert not trace.exists()


def test_evaluating_a_foreign_checkpoint(tmp_path, few_digits, capsys):
    small = without_fc(torchvision.models.resnet18())
    torch.save(renamed(small, "encoder.", extra=head("projector.")), tmp_path / "theirs.tar")
    flags = ("--figures", tmp_path / "f", "--image-size", "32", "--tasks", "knn", "--device", "cpu")
    results = call(tmp_path / "theirs.tar", *flags, "--dataset", "digits")
    assert set(results["columns"][0]["scores"]) == {"pixels", "untrained", "simclr"}
    assert (tmp_path / "theirs.tar.evaluation.json").exists()
    assert (tmp_path / "f" / "theirs" / "evaluation.png").exists()
    assert "naming of Spijkervet/SimCLR" in capsys.readouterr().out
    with pytest.raises(InputError, match="give --dataset"):
        call(tmp_path / "theirs.tar", *flags)
    with pytest.raises(InputError, match="16 px are too small for the encoder's ImageNet stem"):
        call(tmp_path / "theirs.tar", "--dataset", "digits", "--figures", tmp_path / "f")


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("a" * 300, "is neither a checkpoint nor a run under"),
        ("nothing", "nothing is neither a checkpoint nor a run under"),
        ("--tasks best", "invalid choice: 'best'"),
        ("--labels 200%", "--labels 200%: give a share up to 100 %"),
        ("--labels 0", "--labels 0: give a share"),
        ("--labels nan", "--labels nan: give a share"),
        ("--labels few", "--labels few: give a share"),
        ("--labels -1", "--labels"),
        ("--tasks semi --labels 500", "class '0' has only 142 training images"),
        ("--seeds 0", "--seeds must be at least 1"),
        ("--epochs -1", "--epochs must be 0 or more"),
        ("--image-size 4", "--image-size must be 0 or 8 to 4096"),
        ("--embed nowhere", "--embed nowhere is not a folder"),
        ("--out x.npz", "--out goes with --embed or --classify"),
        ("--tasks knn --predictions p.csv", "add linear to --tasks"),
        ("--dataset folder --data-dir nowhere", "--data-dir nowhere is not a folder"),
        ("--dataset folder", "--dataset folder needs --data-dir"),
        ("--normalize sepia", "invalid choice: 'sepia'"),
        ("--device warp", "--device warp is not available"),
    ],
)
def test_bad_input_is_one_line(places, tmp_path, capsys, argv, message):
    before = sorted(tmp_path.rglob("*"))
    error = fails(capsys, *places, *argv.split())
    assert message in error
    assert sorted(tmp_path.rglob("*")) == before


def fails(capsys, *argv):
    with pytest.raises(SystemExit) as left:
        load_simCLR.main([str(x) for x in argv])
    assert left.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("load_simCLR.py: error: ")
    assert err.count("\n") == 1
    return err


def test_no_run_yet(tmp_path, capsys):
    error = fails(capsys, "--checkpoints", tmp_path / "none")
    assert "no run under" in error
    assert "python simclr.py makes one" in error


def test_files_that_are_no_checkpoints(tmp_path, capsys, trained):
    (tmp_path / "text.pt").write_text("hello")
    assert "not a readable checkpoint" in fails(capsys, tmp_path / "text.pt")
    (tmp_path / "empty.pt").write_bytes(b"")
    assert "not a readable checkpoint" in fails(capsys, tmp_path / "empty.pt")
    content = trained.read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
    assert "not a readable checkpoint" in fails(capsys, tmp_path / "cut.pt")
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    (tmp_path / "flipped.pt").write_bytes(flipped)
    assert "damaged" in fails(capsys, tmp_path / "flipped.pt")


def test_images_without_labels_cannot_be_evaluated_by(places, tmp_path, capsys, write_image):
    for i in range(4):
        write_image(tmp_path / "flat" / f"{i}.png", seed=i)
    folder = ("--dataset", "folder", "--data-dir", tmp_path / "flat")
    assert "no labels" in fails(capsys, *places, *folder)


def test_output_that_cannot_be_written(places, tmp_path, capsys, odd_folder):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder").mkdir()
    assert "cannot write" in fails(capsys, *places, "--export", tmp_path / "file" / "x.pt")
    assert "cannot write" in fails(capsys, *places, "--export", tmp_path / "folder")
    assert "cannot write" in fails(capsys, *places, "--predictions", tmp_path / "file" / "p.csv")
    assert "cannot write" in fails(capsys, *places, "--predictions", tmp_path / "folder")
    blocked = [tmp_path / "file" if x == str(tmp_path / "figures") else x for x in places]
    assert "cannot write" in fails(capsys, *blocked)
    out = ("--embed", odd_folder, "--out", tmp_path / "file" / "h.npz", "--workers", "0")
    assert "cannot write" in fails(capsys, *places, *out)


def test_columns_are_what_the_file_holds():
    column = Column("knn", "kNN", {"pixels": [0.5]})
    file = {**vars(column)}
    assert load_simCLR.merge({"columns": [file], "seconds": {"knn": 1}}, {
        "columns": [{**file, "scores": {"pixels": [0.75]}}], "seconds": {"linear": 2},
    }) == {
        "columns": [{**file, "scores": {"pixels": [0.75]}}], "seconds": {"knn": 1, "linear": 2},
    }  # fmt: skip
