"""The benchmark works: a tiny form of it, whose figures mean nothing."""

import contextlib
import io
import json
import math

import pytest

import benchmark
import gpu
import simclr
from conftest import error_of


@pytest.mark.filterwarnings("ignore")  # of worker processes
def test_every_group_is_measured(tmp_path, capsys, device, monkeypatch, write_image):
    """The loops in this process: the test below has a real one of its own."""

    def in_this_process(options, *flags, processes=1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            benchmark.main([*size.split(), "--device", options.device, *flags])
        return json.loads(printed.getvalue().splitlines()[-1])

    monkeypatch.setattr(benchmark, "in_a_process", in_this_process)
    file = tmp_path / "results" / "benchmark.json"
    size = "--width 0.125 --image-size 16 --batch-size 16 --seconds 0.01 --quick"
    photo = write_image(tmp_path / "photos" / "0.jpg", size=(40, 30))
    places = ["--json", str(file), "--photos", str(photo.parent)]
    benchmark.main([*size.split(), "--device", str(device), *places])
    results, printed = json.loads(file.read_text()), capsys.readouterr().out
    assert list(results["table"]) == [
        "limits", "augmentation", "decoding", "whole step", "share of the step", "loss",
        "several processes",
    ]  # fmt: skip
    values = {row["name"]: row["value"] for rows in results["table"].values() for row in rows}
    for name, value in values.items():
        assert name.strip() in printed
        assert 0 <= value < math.inf, name
    usual, ours = values["the usual loop"], values["whole step"]
    assert values["whole step ÷ the usual loop"] == pytest.approx(ours / usual, rel=0.5)


def test_the_loss_needs_a_block_of_similarities():
    """The matrix of 2N = 12,288 views would have 576 MiB."""
    options = benchmark.Options(device="cpu", nt_xent=12_288, seconds=0.01)
    found = benchmark.in_a_process(options, "--nt-xent", str(options.nt_xent))
    assert 2**22 < found["bytes"] < 2**27


@pytest.mark.parametrize("flags", [["--loop", "none"], ["--batch-size", "1"], ["--arch", "vgg"]])
def test_bad_input_is_one_line(flags, capsys):
    error_of(capsys, benchmark.main, *flags, "--seconds", "0.01", "--device", "cpu")


def test_the_gpu_checks_need_a_gpu(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        gpu.main(["--out", str(tmp_path)])
    assert stop.value.code == 2
    assert "there is no GPU" in capsys.readouterr().err


def test_a_section_of_the_gpu_checks_fails_alone(tmp_path, capsys, monkeypatch):
    def broken():
        raise AssertionError("not equal")

    chosen = ("compiled equals eager", "linear algebra", "save and resume", "kNN", "profile")
    real = gpu.Checks.sections
    monkeypatch.setattr(
        gpu.Checks, "sections",
        lambda self: {"broken": broken, **{name: real(self)[name] for name in chosen}},
    )  # fmt: skip
    monkeypatch.setattr(simclr, "COMPILE", simclr.COMPILE)  # gpu.py changes it
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--tiny", "--device", "cpu", "--out", str(tmp_path)])
    assert ended.value.code == 1
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert [name for name, found in results.items() if "FAILED" in found] == ["broken"]
    assert set(results) == {"broken", *chosen}
    assert "failed on cpu: broken\n" in capsys.readouterr().out
