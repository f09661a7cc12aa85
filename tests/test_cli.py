"""The command line: what is printed, and that bad input is one line and exit code 2."""

import dataclasses
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

import simclr
import utils
from conftest import ROOT, error_of

TINY_FLAGS = ["--width", "0.02", "--epochs", "2", "--batch-size", "300", "--warmup-epochs", "1"]


def fails(capsys, tmp_path, *argv):
    """The line of error of simclr.py, which leaves no folder."""
    places = ("--checkpoints", tmp_path / "c", "--figures", tmp_path / "f")
    error = error_of(capsys, simclr.main, *argv, *places)
    assert not (tmp_path / "c").exists()
    assert not (tmp_path / "f").exists()
    return error


@pytest.mark.parametrize(("argv", "message"), [
    ("--dataset imagenette", "invalid choice: 'imagenette'"),
    ("--recipe best", "unknown recipe 'best'"),
    ("--batch-size 1", "--batch-size must be at least 2"),
    ("--batch-size many", "invalid int value: 'many'"),
    ("--temperature 0", "--temperature must be at least 1e-06, got 0"),
    ("--range 5 1", "--range must be two numbers, the smaller one first, got (5.0, 1.0)"),
    ("--range 0 255", "--range is for folders of pictures, not for digits"),
    ("--lr inf", "--lr must be 1e-12 to 1e+30, got inf"),
    ("--image-size 7", "images of 7 px and views of 7 px: both need at least 8"),
    ("--view-size 5000", "--view-size must be 0 to 4096, got 5000"),
    ("--view-sizes 0 8", "--view-sizes must be 0.01 to 4096, got (0.0, 8.0)"),
    ("--view-sizes 4 16", "views of 4 px: both need at least 8"),
    ("--views 1", "--views must be 2 to 64, got 1"),
    ("--width 0", "--width must be 0.015625 to 16"),
    ("--hue 0.9 --color-strength 1", "--hue 0.9 times s must be at most 0.5 turns"),
    ("--warmup-epochs 100", "--warmup-epochs 100.0 exceeds --epochs 90"),
    ("--seed -1", "--seed must be at least 0"),
    ("--run ../../etc", "must be a plain name"),
    ("--stop-at-knn 0.9 --knn-every 0", "--knn-every must be at least 1"),
    ("--micro-batch 7", "--micro-batch 7 does not divide the batch of 256 images"),
    ("--epoch 3", "unrecognized arguments: --epoch 3"),
    ("--device warp", "--device warp is not available here"),
    ("--device cuda", "--device cuda is not available here"),
    ("--device meta", "--device meta: expected auto"),
    ("--dataset folder --data-dir nowhere", "--data-dir nowhere is not a folder"),
    ("--data-dir mine", "for images of your own add --dataset folder"),
    ("--labels-from x", "--labels-from x goes with --dataset folder"),
])  # fmt: skip
def test_bad_input_is_one_line(capsys, tmp_path, argv, message):
    assert message in fails(capsys, tmp_path, *argv.split())


def test_folders_that_cannot_be_learned_from(capsys, tmp_path, write_image):
    photos = tmp_path / "photos"
    photos.mkdir()
    folder = ("--dataset", "folder", "--data-dir", str(photos))
    assert "no images in" in fails(capsys, tmp_path, *folder)
    write_image(photos / "a.png")
    assert "need at least 2 images to contrast, got 1" in fails(capsys, tmp_path, *folder)
    write_image(photos / "b.png", size=(5, 5))
    write_image(photos / "a.png", size=(5, 5))
    assert "images of 5 px" in fails(capsys, tmp_path, *folder)


def content(folder):
    """Every file below a folder, with its content."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=["new", "overwrite"])
@pytest.mark.parametrize("blocked", ["--checkpoints", "--figures"])
@pytest.mark.parametrize("how", ["a file", "read-only"])
def test_output_that_cannot_be_written(capsys, tmp_path, monkeypatch, blocked, how, overwrite):
    """Nothing is written, and nothing lost of the run that was to be replaced."""
    places = {"--checkpoints": tmp_path / "c", "--figures": tmp_path / "f"}
    if overwrite and blocked != "--checkpoints":
        (tmp_path / "c" / "digits_resnet10").mkdir(parents=True)
        for name in ("config.json", "last.pt", "log.jsonl", "summary.json"):
            (tmp_path / "c" / "digits_resnet10" / name).write_text("of the old run")
    if how == "a file":
        places[blocked].write_text("a file where the folder should be")
    else:
        monkeypatch.setattr(
            utils.os, "access", lambda path, _: not path.is_relative_to(places[blocked])
        )  # root may write anywhere
    before = content(tmp_path)
    argv = [*TINY_FLAGS, *overwrite, *(str(x) for pair in places.items() for x in pair)]
    assert "cannot write" in error_of(capsys, simclr.main, *argv)
    assert content(tmp_path) == before


def test_help_teaches_every_flag_and_recipe_and_the_recipes_are_valid(capsys):
    with pytest.raises(SystemExit) as left:
        simclr.main(["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    for field in simclr.dataclasses.fields(simclr.Config):
        assert simclr.flag(field.name) in text
    for recipe in simclr.RECIPES:
        assert f"  {recipe}:" in text
        config = simclr.make_config(recipe=recipe, dataset="cifar10")
        assert config.recipe == recipe
        simclr.make_augment(simclr.dataclasses.replace(config, image_size=32))
    assert "at most 10% of it" in text


def test_flags_override_the_recipe_and_the_recipe_the_defaults():
    argv = "--dataset cifar100 --temperature 0.9 --overwrite --no-decay-all".split()
    config, overwrite, _ = simclr.parse_command_line(argv)
    assert overwrite
    assert (config.temperature, config.decay_all) == (0.9, False)
    assert config.jitter_p == 0.8  # from the defaults
    names = (config.recipe, config.arch, config.run)  # the second is the recipe's
    assert names == ("cifar10", "resnet18", "cifar100_resnet18")


def test_a_shorter_run_gets_a_shorter_warm_up_unless_it_is_given():
    assert simclr.make_config(recipe="cifar10-paper").warmup_epochs == 10  # of 1000
    assert simclr.make_config(recipe="cifar10-paper", epochs=5).warmup_epochs == 0.5
    config = simclr.make_config(recipe="cifar10-paper", epochs=5, warmup_epochs=3.0)
    assert config.warmup_epochs == 3
    given, computed = (simclr.make_config(epochs=3, **w) for w in ({"warmup_epochs": 0.3}, {}))
    assert utils.differences(dataclasses.asdict(given), computed) == []  # 0.1 · 3 > 0.3


def command(tmp_path, *argv):
    places = ["--checkpoints", str(tmp_path / "c"), "--figures", str(tmp_path / "f")]
    return [sys.executable, str(ROOT / "simclr.py"), *TINY_FLAGS, *places, *argv]


def test_the_command_runs_from_anywhere(finished):
    assert "raw pixels" in finished.said
    assert "resnet10, 300 images a step, 2 views of each (16 px), 4 epochs" in finished.said
    assert not list(finished.where.iterdir())


def test_a_signal_saves_and_says_how_to_continue(tmp_path):
    """Ctrl-C; faults.py sends the other signals, anywhere, to processes that it forks."""
    log = tmp_path / "c" / "digits_resnet10" / "log.jsonl"
    process = subprocess.Popen(
        command(tmp_path, "--epochs", "10000", "--overwrite"), cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while len(utils.read_jsonl(log)) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    said = err.split("stopped and saved; continue with: ")[1].strip()
    assert shlex.split(said) == command(tmp_path, "--epochs", "10000")
    assert "Traceback" not in err
    state = utils.load_checkpoint(log.parent / "last.pt")
    assert state["position"]["epoch"] >= 2


def test_importing_does_nothing(tmp_path):
    code = (
        "import torch; state = torch.get_rng_state(); import ablation_SimCLR, load_simCLR, tSNE;"
        "assert torch.equal(torch.get_rng_state(), state)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not done.stdout
    assert list(tmp_path.iterdir()) == []


def test_links_of_the_documents_lead_to_files_of_the_project():
    for page in (ROOT / "README.md", ROOT / "figures/README.md", ROOT / "tests/README.md"):
        links = re.findall(r"\]\(([^)#:]+)[)#]", page.read_text(encoding="utf-8"))
        assert links
        assert [link for link in links if not (page.parent / link).exists()] == []
