"""What keeps a run whole: the clock, digests, the checkpoint before, locks, writes that fail.

faults.py does the same to whole processes, in numbers; here is a small part of it.
"""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

import load_simCLR
import simclr
import utils
from utils import InputError

HERE = Path(__file__).parent


@pytest.fixture
def run_folder(tmp_path, write_image, tiny_config, monkeypatch):
    """Makes the configuration of a run on eight tiny images, which takes no time; so its figure."""
    monkeypatch.setattr(simclr, "draw_training", lambda *_: Figure(figsize=(1, 1)))
    for i in range(8):
        write_image(tmp_path / "photos" / f"{i}.png", seed=i)

    def make(**overrides):
        few = dict(dataset="folder", recipe="digits", data_dir=str(tmp_path / "photos"))
        small = dict(width=0.02, head_dim=8, head_hidden=8, batch_size=2, precision="float32")
        return tiny_config(**{**few, **small, "epochs": 3, **overrides})

    return make


def position(config, name="last.pt"):
    found = utils.load_checkpoint(config.folder / name)["position"]
    return found["epoch"], found["step"]


def failing(monkeypatch, name, reason=errno.ENOSPC):
    """From now on no file of this name can be written."""
    real = os.fsync

    def fsync(descriptor):
        if name in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(reason, os.strerror(reason))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


# ------------------------------------------------------------------------- real processes, in small


def test_real_runs_survive_a_few_of_each_fault():
    """Kills, signals, a second process, failing writes and damage: see faults.py."""
    done = subprocess.run(
        [sys.executable, str(HERE / "faults.py"), "--quick", "--kills", "5", "--corruptions", "100",
         "--only", "kills", "signals", "locks", "storage", "corruptions"],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines()[2:]]
    assert len(rows) == 9
    assert all(int(tried) == int(survived) > 0 for _, _, tried, survived, *_ in rows)


# ----------------------------------------------------------------------------------- interruption


def test_a_checkpoint_is_saved_by_the_clock(run_folder, monkeypatch):
    """Four steps an epoch, three minutes each: after every fourth step, whatever the epoch."""
    clock, saved = [0.0], []
    real_advance, real_save = utils.Progress.advance, simclr.Pretraining.save

    def advance(self):
        real_advance(self)
        clock[0] += 180

    def save(self):
        saved.append((self.position.epoch, self.position.step))
        real_save(self)

    monkeypatch.setattr(simclr.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(utils.Progress, "advance", advance)
    monkeypatch.setattr(simclr.Pretraining, "save", save)
    simclr.run(run_folder(save_every=2, run="a", epochs=4))
    # the first epoch ends without a checkpoint before it, so it is saved; then 12 minutes, …
    assert saved == [(1, 0), (2, 0), (3, 0), (4, 0)]
    saved.clear()
    simclr.run(run_folder(save_every=3, checkpoint_minutes=8, run="b", epochs=2))
    assert saved == [(0, 3), (1, 2), (2, 0)]
    saved.clear()
    simclr.run(run_folder(save_every=2, checkpoint_minutes=0, run="c", epochs=4))
    assert saved == [(1, 0), (2, 0), (4, 0)]


def test_the_second_ctrl_c_ends_at_once():
    for first in (signal.SIGINT, signal.SIGTERM):
        with utils.StopSignals() as stop:
            os.kill(os.getpid(), first)
            assert stop.signal == first
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_outside_training_cleans_up_and_gives_its_code(
    run_folder, monkeypatch, capsys, number
):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a job of "&"
    config = run_folder(epochs=1)
    argv = [*simclr.flags_of(config), "--checkpoints", config.checkpoints]

    def stopped(*_):
        os.kill(os.getpid(), number)
        time.sleep(1)

    monkeypatch.setattr(simclr, "train_and_evaluate", stopped)
    with pytest.raises(SystemExit) as left:
        simclr.main(argv)
    signal.signal(signal.SIGINT, before)
    assert left.value.code == 128 + number
    assert "stopped; what had been saved before is kept" in capsys.readouterr().err


def test_a_lock_is_exclusive_and_dies_with_its_holder(tmp_path):
    with utils.file_lock(tmp_path / "lock") as free:
        assert free
        with utils.file_lock(tmp_path / "lock") as also:
            assert not also
        reader, writer = os.pipe()
        worker = os.fork()
        if not worker:  # as a process that decodes images, which may outlive its parent
            os.write(writer, b"here")
            time.sleep(30)
            os._exit(0)
        os.read(reader, 4)
    try:
        with utils.file_lock(tmp_path / "lock") as free:
            assert free
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_run_that_another_process_has_is_refused_and_not_touched(run_folder, overwrite):
    config = run_folder(epochs=1)
    simclr.run(config)
    if not overwrite:
        (config.folder / "summary.json").unlink()
    before = {file: file.read_bytes() for file in config.folder.iterdir()}
    with utils.file_lock(config.folder / simclr.LOCK):
        with pytest.raises(InputError, match="another process is working on"):
            simclr.run(config, overwrite=overwrite)
    assert {file: file.read_bytes() for file in config.folder.iterdir()} == before
    with utils.file_lock(config.folder / simclr.LOCK):
        if overwrite:  # what is finished is only read
            assert simclr.run(config)["loss"] > 0


def test_what_killed_processes_left_is_removed(run_folder):
    config = run_folder(epochs=1)
    config.folder.mkdir(parents=True)
    config.figure_folder.mkdir(parents=True)
    names = (".last.pt.12.tmp", ".epoch0003.pt.12.tmp", ".log.jsonl.12.tmp", ".trial.pt.12.tmp")
    left = [config.folder / name for name in (*names, "trial.pt")]
    left.append(config.figure_folder / ".loss_plot.png.12.tmp")
    others = config.folder / ".evaluation.json.12.tmp"  # load_simCLR.py may be writing it
    for file in (*left, others):
        file.touch()
    simclr.run(config)
    assert not any(file.exists() for file in left)
    assert others.exists()


# ---------------------------------------------------------------------------------------- storage


def test_any_damage_to_a_small_checkpoint_is_found(tmp_path):
    """In headers and padding too, which the zip's checksums leave out; at the end in each byte."""
    file = tmp_path / "a.pt"
    utils.save_checkpoint(file, {"weight": torch.zeros(3)})
    good = file.read_bytes()
    assert set(torch.load(file, weights_only=True)) == {"weight"}  # still torch's own format
    for i in (*range(0, len(good) - 200, 5), *range(len(good) - 200, len(good))):
        for content in (good[:i], good[:i] + bytes([good[i] ^ 1 << i % 8]) + good[i + 1 :]):
            file.write_bytes(content)
            with pytest.raises(InputError):
                utils.load_checkpoint(file)
    for more in (b"\0", b"0" * 64, good):
        file.write_bytes(good + more)
        with pytest.raises(InputError):
            utils.load_checkpoint(file)


def test_files_without_a_digest_are_read(tmp_path):
    for zipped in (True, False):
        torch.save({"a": 1}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        assert utils.load_checkpoint(tmp_path / "a.pt") == {"a": 1}


@pytest.mark.parametrize("how", ["damaged", "cut", "gone"])
def test_the_checkpoint_before_is_used(run_folder, monkeypatch, capsys, how):
    config = run_folder()
    simclr.run(config)
    whole = utils.load_checkpoint(config.folder / "last.pt")["model"]
    (config.folder / "summary.json").unlink()
    assert (position(config), position(config, "previous.pt")) == ((3, 0), (2, 0))
    last = config.folder / "last.pt"
    content = last.read_bytes()
    last.write_bytes(content[:-9] if how == "cut" else b"?" + content[1:])
    if how == "gone":
        last.unlink()
    capsys.readouterr()
    assert simclr.find_checkpoint("", config.checkpoints) == last
    assert simclr.load_run(simclr.find_checkpoint(config.run, config.checkpoints)).epoch == 2
    assert load_simCLR.load_source(last).description.count("epoch 2")
    warnings = capsys.readouterr().err
    assert warnings.count("\n") == warnings.count("using the one before") == 2
    replaced, real = [], os.replace

    def replace(source, target):
        if Path(target).name in ("last.pt", "previous.pt"):
            replaced.append(Path(target).name)
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    simclr.run(config)
    assert "using the one before" in capsys.readouterr().err
    assert replaced == ["last.pt"]  # what is damaged does not become the one before
    now = utils.load_checkpoint(last)["model"]
    assert all(torch.equal(now[name], value) for name, value in whole.items())


def test_two_damaged_checkpoints_are_both_named(run_folder):
    config = run_folder()
    simclr.run(config)
    (config.folder / "summary.json").unlink()
    for name in ("last.pt", "previous.pt"):
        file = config.folder / name
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"last\.pt is damaged .* and .*previous\.pt is damaged"):
        simclr.run(config)


def test_a_full_disk_is_a_warning_until_the_end(run_folder, monkeypatch, capsys):
    config, real = run_folder(epochs=4), simclr.Pretraining.finish_epoch
    with monkeypatch.context() as patch:

        def finish_epoch(self):
            if self.position.epoch == 1:
                failing(patch, str(config.folder))
            return real(self)

        patch.setattr(simclr.Pretraining, "finish_epoch", finish_epoch)
        with pytest.raises(InputError, match=r"last\.pt: No space left.*previous version is in"):
            simclr.run(config)
    err = capsys.readouterr().err
    assert err.count("warning: cannot write") == err.count("\n") == 1
    assert position(config) == (1, 0)
    assert not list(config.folder.glob("*.tmp"))
    simclr.run(config)
    assert position(config) == (4, 0)


@pytest.mark.parametrize("name", ["log.jsonl", "config.json"])
def test_a_record_that_cannot_be_written_stops_no_training(run_folder, monkeypatch, capsys, name):
    config = run_folder()
    with monkeypatch.context() as patch:
        failing(patch, name)
        with pytest.raises(InputError, match=name):  # at the end, which needs it
            simclr.run(config)
    assert position(config) == (3, 0)
    assert capsys.readouterr().err.count("warning: ") == 1
    simclr.run(config)
    assert len(utils.read_jsonl(config.folder / "log.jsonl")) == 3


def test_a_figure_that_cannot_be_written_costs_nothing_else(run_folder, monkeypatch, capsys):
    config = run_folder()
    failing(monkeypatch, "loss_plot.png", errno.EIO)
    with pytest.raises(InputError, match=r"loss_plot\.png"):
        simclr.run(config)
    assert (config.folder / "summary.json").exists()
    assert capsys.readouterr().err.count("warning: ") == 1


def test_a_run_is_finished_when_its_figure_is_drawn(run_folder, monkeypatch):
    """Else a kill between the two would leave an older figure for good."""
    config, there = run_folder(epochs=1), []
    real = simclr.FigureKeeper.draw

    def draw(self, *arguments):
        there.append((config.folder / "summary.json").exists())
        real(self, *arguments)

    monkeypatch.setattr(simclr.FigureKeeper, "draw", draw)
    simclr.run(config)
    assert there == [False, False]


def test_where_nothing_can_be_saved_nothing_is_trained(run_folder, monkeypatch):
    config = run_folder()
    failing(monkeypatch, ".pt", errno.EDQUOT)
    monkeypatch.setattr(simclr, "train_epoch", None)
    with pytest.raises(InputError, match=r"cannot write .*quota"):
        simclr.run(config)
    assert not list(config.folder.glob("*pt*"))


def test_a_warning_is_said_once_for_each_reason(capsys):
    forgiving, reasons = utils.WarnOnFailure(), []

    def write(_name):
        if reasons:
            raise InputError(f"cannot write: {reasons[0]}") from OSError(1, reasons[0])

    def other(name):
        write(name)

    for reason in ("full", "full", "broken", None, "full"):
        reasons[:] = [reason] if reason else []
        for each in (write, other):
            assert forgiving(each, "a") == (reason is None)
    said = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[2].split(";")[0] for line in said] == ["full", "broken", "full"]


@pytest.mark.parametrize("number", simclr.READABLE_FORMATS)
def test_checkpoints_of_each_format_load_and_continue(tiny_config, monkeypatch, number):
    """Each written by the code of its time: SIGTERM after six steps of

    simclr.py --width 0.02 --head-dim 8 --head-hidden 8 --batch-size 300 --epochs 3 --knn-every 2
    --optimizer sgd --lr 0.1 --precision float32 --device cpu --run small
    """
    monkeypatch.setattr(simclr, "evaluate", lambda *_: {})
    file = HERE / "data" / f"format{number}.pt"
    state = utils.load_checkpoint(file)
    assert state["format"] == number
    assert simclr.load_run(file).epoch == 1
    config = tiny_config(
        width=0.02, head_dim=8, head_hidden=8, batch_size=300, epochs=3, knn_every=2,
        optimizer="sgd", lr=0.1, precision="float32", run="small", warmup_epochs=0.1 * 3,
    )  # fmt: skip
    config.folder.mkdir(parents=True)
    (config.folder / "last.pt").write_bytes(file.read_bytes())
    simclr.run(config)
    log = utils.read_jsonl(config.folder / "log.jsonl")
    assert [row["epoch"] for row in log] == [1, 2, 3]
    assert log[0] == state["log"][0]


def test_a_newer_format_is_refused(tmp_path):
    utils.save_checkpoint(tmp_path / "a.pt", {"format": 4})
    with pytest.raises(InputError, match=r"of format 4; this version reads formats 1 to 3"):
        simclr.load_run(tmp_path / "a.pt")


# --------------------------------------------------------------------------------------- long runs


def test_drawing_takes_a_small_share_of_the_time_however_long_the_log(run_folder, monkeypatch):
    """An epoch a second; a figure takes longer, the longer the log."""
    clock, drawn = [0.0], []

    def draw(log, *_):
        seconds = 0.2 + len(log) / 1000
        clock[0] += seconds
        drawn.append(seconds)

    monkeypatch.setattr(simclr.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(simclr, "draw_training", draw)
    monkeypatch.setattr(utils, "save_figure", lambda *_: None)
    figure = simclr.FigureKeeper(run_folder(), 2)
    for epoch in range(1, 5001):
        clock[0] += 1
        if figure.due:
            figure.draw([{}] * epoch)
    assert len(drawn) > 10
    assert sum(drawn) < 0.0125 * clock[0]
