"""Whole runs on a GPU: `python -m pytest -m cuda`. Without one they are skipped.

A GPU adds in another order each time, so numbers are compared within tolerances, which each test
states.
"""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import ablation_SimCLR
import load_simCLR
import simclr
import tSNE
import utils
from conftest import interrupt, position

pytestmark = pytest.mark.cuda
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device and pytest -m cuda")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # three digits of a convolution


@pytest.fixture
def gpu_config(small_config):
    """Makes the configuration of a run of a second on the GPU: four epochs of four steps."""
    return lambda **fields: small_config(device=DEVICE, precision="float32", **fields)


def column(config, name):
    return [row[name] for row in utils.read_jsonl(config.folder / utils.LOG) if name in row]


def test_an_interrupted_run_ends_as_one_that_was_not(gpu_config):
    """Losses to 2 %, kNN accuracy to a tenth: 4 of the 40 images."""
    whole, pieces = gpu_config(run="whole"), gpu_config(run="pieces")
    simclr.run(whole)
    interrupt(lambda: simclr.run(pieces), 6)
    assert position(pieces) == (1, 2)
    summary = simclr.run(pieces)
    assert column(pieces, "loss") == pytest.approx(column(whole, "loss"), rel=0.02)
    expected = json.loads((whole.folder / utils.SUMMARY).read_bytes())
    for score in ("knn", "linear_10", "linear_all"):
        assert summary[score] == pytest.approx(expected[score], abs=0.1)


def test_a_compiled_network_learns_what_a_plain_one_learns(gpu_config, unjudged, capsys):
    """Six epochs of a step. Losses to 0.1 %, statistics to 1 % of the largest of a layer."""
    settings = dict(batch_size=210, epochs=6, optimizer="sgd", lr=0.01, lr_scaling="none")
    plain, compiled = (gpu_config(run=x, compile=x, **settings) for x in ("off", "on"))
    simclr.run(plain)
    simclr.run(compiled)
    assert capsys.readouterr().out.count("compiled in") == 1
    assert column(compiled, "loss") == pytest.approx(column(plain, "loss"), rel=1e-3)
    one, other = (utils.load_checkpoint(c.folder / "last.pt")["model"] for c in (plain, compiled))
    for name, value in one.items():
        if "running" in name:
            assert (other[name] - value).abs().max() <= 0.01 * value.abs().max(), name


def test_a_streamed_run_is_that_of_the_cpu(gpu_config, tmp_path, write_image):
    """Its random numbers are drawn on the CPU. Losses to 2 %."""
    for i in range(24):
        size = (40 + i, 36)
        write_image(tmp_path / "photos" / "ab"[i % 2] / f"{i}.png", size, seed=i)
    folder = dict(
        dataset="folder", recipe="cifar10", data_dir=str(tmp_path / "photos"), image_size=32,
        batch_size=8, epochs=2, arch="resnet10", workers=2, lr=0.01,
    )  # fmt: skip
    here, there = gpu_config(run="here", **folder), gpu_config(run="there", **folder)
    there.device = "cpu"
    simclr.run(here)
    simclr.run(there)
    assert column(here, "loss") == pytest.approx(column(there, "loss"), rel=0.02)
    assert len(column(here, "knn")) == 1


def test_what_follows_a_run(gpu_config, tmp_path):
    """Evaluation (accuracies to two of the 40 images), embedding, and maps of a run on a GPU."""
    config = gpu_config()
    simclr.run(config)
    last, figures = str(config.folder / utils.CHECKPOINT), ["--figures", str(tmp_path / "figures")]
    accuracies = []
    for device in (DEVICE, "cpu"):
        out = str(tmp_path / f"{device}.json")
        load_simCLR.main([last, "--device", device, "--out", out, *figures])
        results = json.loads((tmp_path / f"{device}.json").read_bytes())
        accuracies += [[c["scores"].get("simclr", [0]) for c in results["columns"]]]
    assert np.allclose(*accuracies, atol=0.05)
    tSNE.main([last, "--device", DEVICE, "--method", "pca", *figures])
    with Image.open(tmp_path / "figures" / config.run / "tsne.png") as picture:
        assert picture.width > 800


def test_an_ablation(gpu_config, tmp_path):
    places = ["--checkpoints", str(tmp_path / "c"), "--figures", str(tmp_path / "f")]
    flags = "--seeds 1 --epochs 1 --width 0.125 --batch-size 50".split()
    ablation_SimCLR.main(["encoder-pass", *flags, "--device", DEVICE, *places])
    rows = (tmp_path / "f/ablation/encoder-pass.csv").read_text().splitlines()
    assert len(rows) == 3
