"""What keeps a run whole: the clock, digests, the checkpoint before, locks, writes that fail.

faults.py does the same to whole processes, in numbers; here is a small part of it.
"""

import contextlib
import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import faults
import load_simCLR
import simclr
import utils
from conftest import flags_of, load_run, position
from utils import InputError

HERE = Path(__file__).parent


@pytest.fixture
def run_folder(tmp_path, write_image, tiny_config, no_figure, monkeypatch):
    """Makes the configuration of a run on eight tiny images, which saves after each epoch."""
    monkeypatch.setattr(utils.Clock, "within", lambda *_: True)
    utils.log_warning.cache_clear()
    for i in range(8):
        write_image(tmp_path / "photos" / f"{i}.png", seed=i)

    def make(**overrides):
        few = dict(dataset="folder", recipe="digits", data_dir=str(tmp_path / "photos"))
        small = dict(width=0.02, head_dim=8, head_hidden=8, batch_size=2, precision="float32")
        return tiny_config(**{**few, **small, "epochs": 3, **overrides})

    return make


def failing(monkeypatch, name, reason=errno.ENOSPC):
    """From now on no file of this name can be written."""
    real = os.fsync

    def fsync(descriptor):
        if name in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(reason, os.strerror(reason))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


def failing_later(monkeypatch, name):
    """After the first epoch no file of this name can be written."""
    real = simclr.epoch_row

    def epoch_row(config, data, now, size):
        if now.epoch == 1:
            failing(monkeypatch, name)
        return real(config, data, now, size)

    monkeypatch.setattr(simclr, "epoch_row", epoch_row)


def record_saves(monkeypatch, seconds=0.0, clock=None):
    """A list that gets the position of each last.pt. seconds: that saving takes by the clock."""
    saved, real = [], utils.save_checkpoint

    def save(path, state, previous=None):
        real(path, state, previous)
        saved.append((state["position"]["epoch"], state["position"]["step"]))
        if clock:
            clock[0] += seconds

    monkeypatch.setattr(utils, "save_checkpoint", save)
    return saved


def step_clock(monkeypatch, seconds):
    """A clock, [seconds], that advances by a step's time after each step."""
    clock, advance = [0.0], utils.Progress.update

    def advance_clock(self):
        advance(self)
        clock[0] += seconds

    monkeypatch.setattr(utils.Progress, "update", advance_clock)
    for name in ("monotonic", "perf_counter"):
        monkeypatch.setattr(utils.time, name, lambda: clock[0])
    return clock


# ------------------------------------------------------------------------- real processes, in small


def test_real_runs_survive_a_few_of_each_fault():
    """Kills, signals, failing writes and damage: see faults.py."""
    done = subprocess.run(
        [sys.executable, str(HERE / "faults.py"), "--quick", "--only", "kills", "signals",
         "storage", "corruptions"],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines()[2:]]
    assert len(rows) == 7
    assert all(int(tried) == int(survived) > 0 for _, _, tried, survived, *_ in rows)


# ----------------------------------------------------------------------------------- interruption


def test_a_checkpoint_is_saved_by_the_clock(run_folder, monkeypatch):
    """Four steps an epoch, three minutes each."""
    step_clock(monkeypatch, 180)
    saved = record_saves(monkeypatch)
    simclr.run(run_folder(checkpoint_minutes=8, epochs=2))
    assert saved == [(0, 0), (0, 3), (1, 0), (1, 3), (2, 0)]


def test_saving_takes_a_small_share_of_the_time(run_folder, monkeypatch):
    """Epochs of 20 s, and a second for a checkpoint, which may take 2 % of the time."""
    monkeypatch.undo()
    clock = step_clock(monkeypatch, 5)
    saved = record_saves(monkeypatch, 1.0, clock)
    monkeypatch.setattr(simclr, "redraw", lambda *_: None)
    monkeypatch.setattr(utils, "save_figure", lambda *_: None)
    config = run_folder(checkpoint_minutes=0, epochs=10)
    simclr.run(config)
    assert saved == [(0, 0), (1, 0), (3, 0), (5, 0), (8, 0), (10, 0)]
    assert [row["epoch"] for row in utils.read_jsonl(config.folder / "log.jsonl")] == [
        *range(1, 11)
    ]


def test_the_second_ctrl_c_ends_at_once():
    for first in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(utils.Stopped), utils.StopSignals() as stop:
            os.kill(os.getpid(), first)
            assert stop.signal == first
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_outside_training_gives_its_code(run_folder, monkeypatch, capsys, number):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a job of "&"

    def stopped(*_, **__):
        os.kill(os.getpid(), number)
        time.sleep(1)

    monkeypatch.setattr(simclr, "train", stopped)
    with pytest.raises(SystemExit) as end:
        simclr.main(flags_of(run_folder(epochs=1)))
    signal.signal(signal.SIGINT, before)
    assert end.value.code == 128 + number
    assert "stopped; what had been saved before is kept" in capsys.readouterr().err


def test_an_error_of_the_locked_work_is_not_the_locks(tmp_path):
    """A reader that ends, as in `simclr.py | head -1`, says nothing about the lock's file."""
    with pytest.raises(BrokenPipeError), utils.run_lock(tmp_path):
        raise BrokenPipeError


def test_a_lock_is_exclusive_and_dies_with_its_holder(tmp_path):
    with utils.run_lock(tmp_path):
        with pytest.raises(InputError, match="another process is working on"):
            utils.run_lock(tmp_path).__enter__()
        reader, writer = os.pipe()
        worker = os.fork()
        if not worker:  # as a process that decodes images, which may outlive its parent
            os.write(writer, b"here")
            time.sleep(30)
            os._exit(0)
        os.read(reader, 4)
    try:
        utils.run_lock(tmp_path).__enter__()
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


def test_a_finished_run_can_be_read_while_another_process_has_it(run_folder):
    config = run_folder(epochs=1)
    simclr.run(config)
    with utils.run_lock(config.folder):
        with pytest.raises(InputError, match="another process is working on"):
            simclr.run(config, overwrite=True)
        assert simclr.run(config)["loss"] > 0


def test_what_killed_processes_left_is_removed(run_folder):
    config = run_folder(epochs=1)
    config.folder.mkdir(parents=True)
    for name in (".last.pt.12.tmp", ".epoch0003.pt.12.tmp", ".log.jsonl.12.tmp"):
        (config.folder / name).touch()
    simclr.run(config)
    assert not list(config.folder.glob("*.tmp"))


# ---------------------------------------------------------------------------------------- storage


def test_any_damage_to_a_small_checkpoint_is_found(tmp_path):
    """It is an error, or it leaves the content as it is, as in most fields of a zip's headers."""
    file, state = tmp_path / "a.pt", {"format": simclr.CHECKPOINT_FORMAT, "weight": torch.zeros(3)}
    utils.save_checkpoint(file, state)
    good, same = file.read_bytes(), faults.canonical(state)
    assert set(torch.load(file, weights_only=True)) == {"format", "weight"}  # torch's own format
    damaged = [good[:i] for i in range(0, len(good), 5)]
    damaged += [faults.flipped(good, i, 1 << i % 8) for i in range(len(good))]
    damaged += [good + rest for rest in (b"\0", b"0" * 64, good)]
    parts = re.finditer(b"PK\1\2", good)  # of the zip's directory, which may be marked as folders
    damaged += [faults.flipped(good, part.start() + 38, 0x10) for part in parts]
    for content in damaged:
        file.write_bytes(content)
        assert faults.judge_damage(file, same)[1] == []


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
    assert utils.find_checkpoint("", config.checkpoints) == last
    assert load_run(utils.find_checkpoint(config.run, config.checkpoints)).epoch == 2
    assert load_simCLR.load_source(last).description.count("epoch 2")
    warnings = capsys.readouterr().err
    assert warnings.count("\n") == warnings.count("using the checkpoint before it") == 1
    utils.log_warning.cache_clear()
    simclr.run(config)
    assert "using the checkpoint before it" in capsys.readouterr().err
    now = utils.load_checkpoint(last)["model"]
    assert all(torch.equal(now[name], value) for name, value in whole.items())


def test_a_full_disk_is_a_warning_until_the_end(run_folder, monkeypatch, capsys):
    config = run_folder(epochs=4)
    with monkeypatch.context() as patch:
        failing_later(patch, str(config.folder))
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
        failing_later(patch, name)
        with pytest.raises(InputError, match=name):  # at the end, which needs it
            simclr.run(config)
    assert position(config) == (3, 0)
    assert capsys.readouterr().err.count("warning: ") == 1
    simclr.run(config)
    assert len(utils.read_jsonl(config.folder / "log.jsonl")) == 3


def test_a_figure_that_cannot_be_written_costs_nothing_else(run_folder, monkeypatch, capsys):
    config = run_folder()
    failing(monkeypatch, "loss_plot.png", errno.EIO)
    simclr.run(config)
    assert (config.folder / "summary.json").exists()
    assert capsys.readouterr().err.count("warning: ") == 1


def test_where_nothing_can_be_saved_nothing_is_trained(run_folder, monkeypatch):
    config = run_folder()
    failing(monkeypatch, ".pt", errno.EDQUOT)
    monkeypatch.setattr(simclr, "training_step", None)
    with pytest.raises(InputError, match=r"cannot write .*quota"):
        simclr.run(config)
    assert not list(config.folder.glob("*pt*"))
