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

import pytest
import torch

import faults
import load_simCLR
import simclr
import utils
from conftest import ROOT, flags_of, load_run, position
from utils import InputError


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


@contextlib.contextmanager
def failing(name, after=0, reason=errno.ENOSPC):
    """Context manager: no file of this name can be written once so many epochs are complete."""
    sync, real, epochs = os.fsync, simclr.epoch_row, [0]

    def fsync(descriptor):
        if epochs[0] >= after and name in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(reason, os.strerror(reason))
        sync(descriptor)

    def epoch_row(config, data, now, size):
        epochs[0] = now.epoch
        return real(config, data, now, size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        patch.setattr(simclr, "epoch_row", epoch_row)
        yield


def record_saves(monkeypatch, step_seconds, save_seconds=0.0):
    """A list that gets the position of each last.pt, by a clock that steps and saves advance."""
    clock, saved, save, update = [0.0], [], utils.save_checkpoint, utils.Progress.update

    def save_checkpoint(path, state, previous=None):
        save(path, state, previous)
        saved.append((state["position"]["epoch"], state["position"]["step"]))
        clock[0] += save_seconds

    def update_progress(bar):
        update(bar)
        clock[0] += step_seconds

    monkeypatch.setattr(utils, "save_checkpoint", save_checkpoint)
    monkeypatch.setattr(utils.Progress, "update", update_progress)
    for name in ("monotonic", "perf_counter"):
        monkeypatch.setattr(utils.time, name, lambda: clock[0])
    return saved


# ------------------------------------------------------------------------- real processes, in small


def test_real_runs_survive_a_few_of_each_fault():
    """Kills, signals and failing writes: see faults.py."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/faults.py"), "--quick", "--only", "kills", "signals",
         "storage"],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines()[2:]]
    assert len(rows) == 5
    assert all(int(tried) == int(survived) > 0 for _, _, _, tried, survived, *_ in rows)


# ----------------------------------------------------------------------------------- interruption


def test_a_checkpoint_is_saved_by_the_clock(run_folder, monkeypatch):
    """Four steps an epoch, three minutes each."""
    saved = record_saves(monkeypatch, 180)
    simclr.run(run_folder(checkpoint_minutes=8, epochs=2))
    assert saved == [(0, 0), (0, 3), (1, 0), (1, 3), (2, 0)]


def test_saving_takes_a_small_share_of_the_time(run_folder, monkeypatch):
    """Epochs of 20 s, and a second for a checkpoint, which may take 2 % of the time."""
    monkeypatch.undo()
    saved = record_saves(monkeypatch, 5, 1.0)
    monkeypatch.setattr(simclr, "redraw", lambda *_: None)
    monkeypatch.setattr(utils, "save_figure", lambda *_: None)
    config = run_folder(checkpoint_minutes=0, epochs=10)
    simclr.run(config)
    assert saved == [(0, 0), (1, 0), (3, 0), (5, 0), (8, 0), (10, 0)]
    rows = utils.read_jsonl(config.folder / "log.jsonl")
    assert [row["epoch"] for row in rows] == [*range(1, 11)]


def test_the_second_ctrl_c_ends_at_once():
    for first in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(KeyboardInterrupt), utils.stop_signals() as stop:
            os.kill(os.getpid(), first)
            assert stop == [first]
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_outside_training_gives_its_code(run_folder, monkeypatch, capsys, number):
    def stopped(*_, **__):
        if number == signal.SIGINT:
            raise KeyboardInterrupt  # as Python does; a job of "&" ignores the signal
        os.kill(os.getpid(), number)
        time.sleep(1)

    monkeypatch.setattr(simclr, "train", stopped)
    with pytest.raises(SystemExit) as end:
        simclr.main(flags_of(run_folder(epochs=1)))
    assert end.value.code == 128 + number
    assert "stopped; what had been saved before is kept" in capsys.readouterr().err


def test_a_lock_is_exclusive_and_dies_with_its_holder(tmp_path):
    with pytest.raises(BrokenPipeError), utils.run_lock(tmp_path):
        raise BrokenPipeError  # as in `simclr.py | head -1`: it is not the lock's error
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

    def flipped(i, change):
        return good[:i] + bytes([good[i] ^ change]) + good[i + 1 :]

    damaged = [good[:i] for i in range(0, len(good), 5)]
    damaged += [flipped(i, 1 << i % 8) for i in range(len(good))]
    damaged += [good + rest for rest in (b"\0", b"0" * 64, good)]
    parts = re.finditer(b"PK\1\2", good)  # of the zip's directory, which may be marked as folders
    damaged += [flipped(part.start() + 38, 0x10) for part in parts]
    for content in damaged:
        file.write_bytes(content)
        with contextlib.suppress(InputError):
            assert faults.canonical(utils.load_checkpoint(file)) == same


def test_a_state_that_is_not_of_this_run_is_refused_and_left_alone(run_folder):
    config = run_folder(epochs=1)
    simclr.run(config)
    (config.folder / "summary.json").unlink()
    last = config.folder / "last.pt"
    state = utils.load_checkpoint(last)
    name, weight = next(iter(state["model"].items()))
    for part, value in (
        ("format", 3), ("config", "text"), ("config", {**state["config"], "arch": "vgg"}),
        ("position", {}), ("model", {}), ("model", {**state["model"], name: weight * torch.nan}),
        ("model", {**state["model"], name: torch.zeros(3)}),
    ):  # fmt: skip
        utils.save_checkpoint(last, {**state, part: value})
        content = last.read_bytes()
        with pytest.raises(InputError, match=re.escape(str(config.folder))):
            simclr.run(config)
        with pytest.raises(InputError):
            simclr.load_source(last)
        assert last.read_bytes() == content


@pytest.mark.parametrize("how", ["damaged", "cut", "gone"])
def test_the_checkpoint_before_is_used(run_folder, capsys, how):
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


def test_a_full_disk_is_a_warning_until_the_end(run_folder, capsys):
    config = run_folder(epochs=4)
    with failing(str(config.folder), 1):
        with pytest.raises(InputError, match=r"last\.pt: No space left.*previous version is in"):
            simclr.run(config)
    err = capsys.readouterr().err
    assert err.count("warning: cannot write") == err.count("\n") == 1
    assert position(config) == (1, 0)
    assert not list(config.folder.glob("*.tmp"))
    simclr.run(config)
    assert position(config) == (4, 0)


@pytest.mark.parametrize("name", ["log.jsonl", "config.json", "loss_plot.png"])
def test_a_record_that_cannot_be_written_stops_no_training(run_folder, capsys, name):
    config, needed = run_folder(), name != "loss_plot.png"  # needed at the end
    error = pytest.raises(InputError, match=name) if needed else contextlib.nullcontext()
    with failing(name, 1), error:
        simclr.run(config)
    assert position(config) == (3, 0)
    assert capsys.readouterr().err.count("warning: ") == 1
    assert (config.folder / "summary.json").exists() == (not needed)
    simclr.run(config)
    assert len(utils.read_jsonl(config.folder / "log.jsonl")) == 3


def test_where_nothing_can_be_saved_nothing_is_trained(run_folder, monkeypatch):
    config = run_folder()
    monkeypatch.setattr(simclr, "training_step", None)
    with failing(".pt", reason=errno.EDQUOT):
        with pytest.raises(InputError, match=r"cannot write .*quota"):
            simclr.run(config)
    assert not list(config.folder.glob("*pt*"))
