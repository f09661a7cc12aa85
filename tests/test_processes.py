"""Several processes are one: each result is compared with that of a single process.

Most tests fork their processes from one that has imported everything, and computed nothing, which
would start threads; a few start them with torchrun, as users do.
"""

import dataclasses
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import ablation_SimCLR
import load_simCLR
import simclr
import utils
from utils import InputError

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["load_simCLR", "pytest", "sklearn.datasets", "sklearn.model_selection"]
)


def work(folder, environment, function, arguments):
    """What a process does: the function, its output and result to files."""
    rank = environment["RANK"]
    for name, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(folder / f"{name}{rank}", os.O_CREAT | os.O_WRONLY), descriptor)
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    torch.save(function(*arguments), folder / f"result{rank}")


class Group:
    """A function in W processes that know each other as those of torchrun do."""

    def __init__(self, folder, world, function, *arguments, store=None, restarts=0):
        self.folder, self.world = folder, world
        self.store = store
        if store is None:
            self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        common = dict(
            WORLD_SIZE=world, LOCAL_WORLD_SIZE=world, MASTER_ADDR="127.0.0.1",
            MASTER_PORT=self.store.port, TORCHELASTIC_USE_AGENT_STORE=True,
            TORCHELASTIC_RESTART_COUNT=restarts,
        )  # fmt: skip
        self.processes = []
        for rank in range(world):
            environment = {**common, "RANK": rank, "LOCAL_RANK": rank}
            process = CONTEXT.Process(target=work, args=(folder, environment, function, arguments))
            process.start()
            self.processes.append(process)

    def codes(self, seconds=100):
        """The exit codes; processes that do not end in time have None, and are killed."""
        until = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0, until - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        return codes

    def said(self, name="err"):
        """All that they wrote to stderr or stdout."""
        return "".join((self.folder / f"{name}{i}").read_text() for i in range(self.world))

    def results(self):
        assert self.codes() == [0] * self.world, self.said()
        files = [self.folder / f"result{i}" for i in range(self.world)]
        return [torch.load(file, weights_only=False) for file in files]


@pytest.fixture
def group(tmp_path):
    def start(world, function, *arguments, **options):
        folder = tmp_path / f"group{len(list(tmp_path.glob('group*')))}"
        folder.mkdir()
        return Group(folder, world, function, *arguments, **options)

    return start


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------ W processes = one


def three_steps(config, kind=torch.float64, block_bytes=simclr.BLOCK_BYTES):
    """Losses, gradients of each step, and the model afterwards."""
    simclr.BLOCK_BYTES = block_bytes
    with utils.process_group(CPU):
        run = simclr.Pretraining(config, simclr.load_data(config, CPU), CPU)
        run.model.to(kind)
        gradients, losses = [], []
        run.optimizer.register_step_pre_hook(
            lambda *_: gradients.append([p.grad.clone() for p in run.model.parameters()])
        )

        def loss(z1, z2):
            value = run.loss(z1, z2)
            losses.append(value.item())
            return value

        simclr.train_epoch(
            utils.distributed(run.model), run.optimizer, (x.to(kind) for x in run.batches()),
            run.rate, loss, config.precision, run.position, lambda: run.position.step == 3,
            run.pieces,
        )  # fmt: skip
        position = dataclasses.asdict(run.position)
        return dict(
            losses=torch.tensor(losses), gradients=gradients, model=run.model.state_dict(),
            sums=[position[k] for k in ("loss_sum", "accuracy_sum", "cosine")],
        )  # fmt: skip


STEPS = dict(
    precision="float32", batch_size=24, optimizer="sgd", lr=0.1, lr_scaling="none", head_bn=True,
    warmup_epochs=0.0, stem="small", image_size=16,
)  # fmt: skip


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("micro_batch", [0, 12])
@pytest.mark.parametrize("block_bytes", [simclr.BLOCK_BYTES, 7 * 48 * 8], ids=["plain", "chunked"])
def test_processes_equal_one(world, micro_batch, block_bytes, group, tiny_config, monkeypatch):
    """In float64, where what is left is no rounding of thousands of ReLUs at their kink."""
    monkeypatch.setattr(simclr, "BLOCK_BYTES", simclr.BLOCK_BYTES)  # is put back
    arguments = tiny_config(**STEPS, micro_batch=micro_batch), torch.float64, block_bytes
    found = group(world, three_steps, *arguments)
    expected = three_steps(*arguments)
    for result in found.results():
        for name in ("losses", "gradients", "model"):
            close(result[name], expected[name], 1e-9)
        close(result["sums"], expected["sums"])  # float32


@pytest.mark.parametrize("world", [2, 3])
def test_gradients_of_processes_in_float32(world, group, tiny_config):
    config = tiny_config(**STEPS)
    found = group(world, three_steps, config, torch.float32)
    expected = three_steps(config, torch.float32)
    for result in found.results():
        close(result["losses"][0], expected["losses"][0])
        close(result["gradients"][0], expected["gradients"][0])


def all_features(config, counts):
    """Features and kNN accuracy of parts of the digits with an untrained encoder."""
    with utils.process_group(CPU):
        data = simclr.load_data(config, CPU)
        model = simclr.make_model(config)
        parts = [utils.subset(data.train, torch.arange(n)) for n in counts]
        found = [simclr.features(model.encoder, part, config, CPU) for part in parts]
        return found, simclr.knn_accuracy(model.encoder, data, config, CPU)


@pytest.mark.parametrize("world", [2, 3])
def test_embeddings_and_knn_of_processes(world, group, tiny_config):
    config = tiny_config(**STEPS)
    counts = [1, 2, 7, 600]  # some processes have nothing to do, or less than others
    found = group(world, all_features, config, counts)
    features, knn = all_features(config, counts)
    for other_features, other_knn in found.results():
        assert [len(x) for x in other_features] == counts
        close(other_features, features)
        assert other_knn == pytest.approx(knn, abs=1e-6)


def streamed(config):
    """Features of images on disk, some unreadable, after an epoch on them: also who is missing."""
    with utils.process_group(CPU):
        data = simclr.load_data(config, CPU)
        run = simclr.Pretraining(simclr.resolve(config, data.pretrain, CPU), data, CPU)
        views = torch.cat(list(run.batches()))
        utils.agree_on_unreadable(data.pretrain)
        missing = sorted(data.pretrain.unreadable)
        data = simclr.load_data(config, CPU)
        found = simclr.features(run.model.encoder, data.train, run.config, CPU)
        return views, missing, found, data.train.labels_read, sorted(data.train.unreadable)


def test_streamed_images_in_processes(group, tiny_config, tmp_path, write_image):
    for i in range(14):
        write_image(tmp_path / "images" / "train" / f"{i % 2}" / f"{i}.png", (20 + i, 24), seed=i)
        write_image(tmp_path / "images" / "test" / f"{i % 2}" / f"{i}.png", (20 + i, 24), seed=i)
    (tmp_path / "images" / "train" / "1" / "5.png").write_bytes(b"no image")
    config = tiny_config(
        dataset="folder", data_dir=str(tmp_path / "images"), recipe="digits", batch_size=12,
        image_size=16, precision="float32", max_bad=0.2, workers=0,
    )  # fmt: skip
    shared = group(2, streamed, config)
    views, missing, features, labels, missing_too = streamed(config)
    assert len(missing) == len(missing_too) == 1
    assert len(features) == len(labels) == 13
    results = shared.results()
    for other_views, *others in results:
        assert len(other_views) == len(views) / 2
        assert others[0] == missing
        close(others[1], features)
        close(others[2:], [labels, missing_too])
    both = torch.stack([result[0].unflatten(0, (2, -1)) for result in results], 2)
    close(both.flatten(1, 2).flatten(0, 1), views)
    assert shared.said().count("warning: cannot read") == 2  # once for each time it was loaded


@pytest.fixture
def folder_config(tiny_config, tmp_path, write_image):
    """Makes the configuration of a streamed folder, of which some files are damaged."""

    def make(train=(), test=(), count=24, **options):
        for split, damaged in (("train", train), ("test", test)):
            for i in range(count):
                file = tmp_path / "images" / split / f"{i % 2}" / f"{i:02}.png"
                write_image(file, (20 + i, 24), seed=i)
                if i in damaged:
                    file.write_bytes(b"no image")
        options = {**dict(batch_size=6, epochs=1, warmup_epochs=0.0, knn_every=1), **options}
        return tiny_config(
            dataset="folder", data_dir=str(tmp_path / "images"), recipe="digits", image_size=16,
            workers=0, **options,
        )  # fmt: skip

    return make


def batch_rows(config):
    """Which files the processes of two meet in the first epoch: (steps, N / 2) of each."""
    size, steps = simclr.batch_count(config, 24)
    random = utils.generator("cpu", config.seed, simclr.SHUFFLE, 0)
    order = torch.randperm(24, generator=random)[: size * steps].view(steps, size)
    return order[:, 0::2], order[:, 1::2]


def damaged_files(rows):
    """The numbers of the files that are these rows of the list, which goes by classes."""
    return [int(row) * 2 if row < 12 else (int(row) - 12) * 2 + 1 for row in rows]


def run_to_the_end(config):
    simclr.evaluate = lambda *_: {}
    a_run(config)


@pytest.mark.parametrize("where", ["one process", "both together"])
def test_too_many_bad_files_end_all_processes_after_saving(where, group, folder_config):
    plain = folder_config()
    first, second = batch_rows(plain)
    if where == "one process":  # in the last step: 2 of 24 are more than 0.05
        bad = damaged_files(second[-1][:2])
    else:  # 1 is less, 2 of the two are more
        bad = damaged_files([first[-1][0], second[-1][0]])
    config = folder_config(train=bad, max_bad=0.05)
    for _ in range(2 if where == "one process" else 1):  # again: it has not gone past them
        found = group(2, run_to_the_end, config)
        assert found.codes() == [2, 2]
        lines = [x for x in found.said().splitlines() if "error" in x]
        assert len(lines) == 1
        assert "2 of 24 images cannot be read" in lines[0]
        position = utils.load_checkpoint(config.folder / simclr.CHECKPOINT)["position"]
        assert (position["epoch"], position["step"]) == (0, 3 + (where != "one process"))
    group(2, run_to_the_end, dataclasses.replace(config, max_bad=0.5)).results()
    assert log_of(config.folder)[0]["unreadable"] > 0


def test_bad_test_images_are_left_out_by_any_number_of_processes(group, folder_config):
    """More than --max-bad of them, and in one process' share there is no other."""
    config = folder_config(test=range(14, 24), max_bad=0.01, precision="float32")
    found = group(3, run_to_the_end, config)
    found.results()
    alone = dataclasses.replace(config, run="alone")
    group(1, run_to_the_end, alone).results()
    knn = [log_of(c.folder)[0]["knn"] for c in (config, alone)]
    assert knn[0] == pytest.approx(knn[1], abs=0.11)
    assert knn[0] * 14 == pytest.approx(round(knn[0] * 14))


def exchanged():
    with utils.process_group(CPU):
        numbers = utils.all_reduce_max(utils.rank(), -utils.rank())
        first = utils.broadcast_from_rank0(
            lambda x: {"rank": utils.rank(), "x": x}, torch.arange(3)
        )
        rows = utils.all_gather_rows(10 * utils.shard_indices(5), 5)
        return numbers, first["rank"], first["x"].tolist(), rows.tolist()


def test_what_processes_tell_each_other(group):
    for result in group(3, exchanged).results():
        assert result == ([2, 0], 0, [0, 1, 2], [0, 10, 20, 30, 40])


# ------------------------------------------------------------------------------ gradient caching


class Network(nn.Module):
    """Views -> h, z, with all that could differ between two passes."""

    def __init__(self, dropout=0.0, norm=True):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8) if norm else nn.Identity(),
            nn.ReLU(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(72, 5),
        )  # fmt: skip

    def forward(self, views):
        return views, self.layers(views)


def gradients_of(network, step):
    network.zero_grad()
    loss = step()
    return loss, [p.grad.clone() for p in network.parameters()]


def both_ways(network, views, pieces, device):
    """Loss and gradients by cached_gradients(), and with all activations in memory."""

    def project(x):
        return network(x)[1]

    def contrast(z):
        return simclr.nt_xent(*z.chunk(2), temperature=0.2), None

    def cached():
        torch.manual_seed(1)
        return simclr.cached_gradients(network, project, views, contrast, pieces)[0].detach()

    def plain():
        torch.manual_seed(1)
        parts = views.unflatten(0, (2, -1)).chunk(pieces, dim=1)
        z = [project(part.flatten(0, 1)).unflatten(0, (2, -1)) for part in parts]
        loss = contrast(torch.cat(z, 1).flatten(0, 1))[0]
        loss.backward()
        return loss.detach()

    return gradients_of(network, cached), gradients_of(network, plain)


@pytest.mark.parametrize("pieces", [2, 6])
@pytest.mark.parametrize(("norm", "dropout"), [(False, 0.0), (False, 0.5), (True, 0.5)])
def test_cached_gradients(pieces, norm, dropout, device):
    torch.manual_seed(0)
    network = Network(dropout, norm).to(device).double().train()
    views = torch.rand(24, 3, 8, 8, device=device, dtype=torch.float64)
    cached, plain = both_ways(network, views, pieces, device)
    close(cached, plain, 1e-12)


@pytest.mark.parametrize("frozen", [True, False])
def test_cached_gradients_are_the_whole_batchs(frozen, device, tiny_config):
    """Where BatchNorm is in eval mode they are; else its statistics are those of the pieces."""
    model = simclr.make_model(tiny_config(**STEPS)).to(device).train(not frozen)
    views = torch.rand(24, 3, 16, 16, device=device)
    (loss, cached), _ = both_ways(model, views, 3, device)
    _, (whole_loss, whole) = both_ways(model, views, 1, device)
    assert torch.allclose(loss, whole_loss, atol=1e-5) == frozen
    differ = [
        not torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(cached, whole, strict=True)
    ]
    assert any(differ) != frozen


def test_running_statistics_move_once(device):
    torch.manual_seed(0)
    network = Network().to(device).train()
    views = torch.rand(24, 3, 8, 8, device=device)
    expected = nn.BatchNorm2d(8).to(device)
    for part in views.unflatten(0, (2, -1)).chunk(3, dim=1):
        expected(network.layers[0](part.flatten(0, 1)))
    simclr.cached_gradients(
        network, lambda x: network(x)[1], views, lambda z: (z.square().sum(), None), 3
    )
    norm = network.layers[1]
    assert norm.num_batches_tracked == 3
    close(norm.running_mean, expected.running_mean)
    close(norm.running_var, expected.running_var)
    assert norm.track_running_stats


def test_a_run_in_micro_batches(small_config):
    """Trains, and is another run than one with another size of them."""
    config = small_config(micro_batch=25, run="micro", epochs=2)
    summary = simclr.run(config)
    assert summary["loss"] < np.log(99)
    with pytest.raises(InputError, match="--micro-batch"):
        simclr.run(small_config(micro_batch=10, run="micro", epochs=2))


@pytest.mark.parametrize(
    ("micro_batch", "message"),
    [(400, "larger than the batch of 300"), (7, "does not divide the batch of 300; 6 does"),
     (-1, "0 or more")],
)  # fmt: skip
def test_micro_batches_that_do_not_fit(micro_batch, message, tiny_config):
    with pytest.raises(InputError, match=message):
        simclr.run(tiny_config(micro_batch=micro_batch))


@pytest.mark.parametrize(
    ("micro_batch", "remedy"),
    [(0, "try --micro-batch 150, or"), (100, "try --micro-batch 50, or"),
     (1, "try a smaller --batch-size")],
)  # fmt: skip
def test_too_little_memory_suggests_micro_batches(micro_batch, remedy, tiny_config, monkeypatch):
    def train_epoch(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(simclr, "train_epoch", train_epoch)
    with pytest.raises(InputError, match=remedy):
        simclr.run(tiny_config(micro_batch=micro_batch))


def test_micro_batches_need_less_memory(tiny_config, monkeypatch):
    monkeypatch.setattr(utils, "memory_of", lambda _: 2 * 2**30)
    config = dict(arch="resnet50", width=1.0, stem="small", image_size=32, batch_size=4096)
    with pytest.raises(InputError, match="--micro-batch"):
        simclr.check_memory(tiny_config(**config), 50_000, CPU)
    simclr.check_memory(tiny_config(**config, micro_batch=64), 50_000, CPU)


# ------------------------------------------------------------------------------ runs and their ends


def a_run(config, fails=""):
    """simclr.py's main() with the run's flags; `fails` makes the last process run into an error."""
    if fails and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
        if fails == "killed":
            simclr.Pretraining.finish_epoch = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        if fails == "error":
            simclr.Pretraining.finish_epoch = raise_an_error
        if fails == "signal":
            advance = utils.Progress.advance
            utils.Progress.advance = lambda bar: (
                advance(bar), os.kill(os.getpid(), signal.SIGTERM)
            )  # fmt: skip
    simclr.main([*simclr.flags_of(config), "--checkpoints", config.checkpoints])


def raise_an_error(_):
    raise InputError("the cat sat on the keyboard")


def log_of(folder):
    return utils.read_jsonl(folder / "log.jsonl")


RUN = dict(precision="float32", batch_size=300, epochs=3, knn_every=2, optimizer="sgd", lr=1e-4)


def test_a_stop_in_one_process_stops_all_and_any_number_goes_on(group, tiny_config, monkeypatch):
    config = tiny_config(**RUN, run="stopped")
    stopped = group(2, a_run, config, "signal")
    assert stopped.codes() == [128 + signal.SIGTERM] * 2
    assert stopped.said().count("stopped and saved") == 1
    state = utils.load_checkpoint(config.folder / simclr.CHECKPOINT)
    assert (state["position"]["epoch"], state["position"]["step"]) == (0, 1)

    going_on = group(3, a_run, config, "signal")
    assert going_on.codes() == [128 + signal.SIGTERM] * 3
    assert "continuing" not in going_on.said()
    monkeypatch.setattr(simclr, "evaluate", lambda *_: {})
    whole = tiny_config(**RUN, run="whole")
    simclr.run(config)
    simclr.run(whole)
    for row, expected in zip(log_of(config.folder), log_of(whole.folder), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert row["lr"] == expected["lr"]
        assert row.get("knn", 0) == pytest.approx(expected.get("knn", 0), abs=0.01)


@pytest.mark.parametrize("fails", ["error", "killed"])
def test_the_others_end_when_one_does(fails, group, tiny_config):
    config = tiny_config(**RUN, run="broken")
    found = group(3, a_run, config, fails)
    codes = found.codes(60)
    assert codes == [2, 2, 2 if fails == "error" else -signal.SIGKILL]
    lines = [line for line in found.said().splitlines() if "error" in line]
    assert len(lines) == 1
    assert ("the cat sat" if fails == "error" else "lost another one") in lines[0]
    assert "Traceback" not in found.said()


def other_settings(config):
    a_run(dataclasses.replace(config, seed=int(os.environ["RANK"])))


def other_images(config):
    real = utils.load_splits
    last = slice(None, -1) if os.environ["RANK"] == "1" else slice(None)

    def load_splits(*arguments):
        train, test = real(*arguments)
        return train, utils.subset(test, torch.arange(len(test))[last])

    utils.load_splits = load_splits
    a_run(config)


@pytest.mark.parametrize(
    ("differs", "message"), [(other_settings, "--seed"), (other_images, "images (test)")]
)
def test_processes_must_be_given_the_same(differs, message, group, tiny_config):
    found = group(2, differs, tiny_config(**RUN))
    assert found.codes() == [2, 2]
    assert found.said().splitlines() == [
        f"simclr.py: error: process 1 has other {message} than process 0"
    ]


def overwriting(config, killed):
    """As torchrun starts a run anew, in the same store, after a kill."""
    if killed:
        save = utils.save_checkpoint

        def save_checkpoint(path, *arguments, **options):
            if path.name == simclr.CHECKPOINT and killed == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            save(path, *arguments, **options)
            if path.name == simclr.CHECKPOINT:
                os.kill(os.getpid(), signal.SIGKILL)

        utils.save_checkpoint = save_checkpoint
    simclr.evaluate = lambda *_: {}
    simclr.main([*simclr.flags_of(config), "--checkpoints", config.checkpoints, "--overwrite"])


@pytest.mark.parametrize("killed", ["before", "after"])
def test_a_run_that_is_overwritten_is_overwritten_once(killed, group, tiny_config, monkeypatch):
    """Killed before its first checkpoint the old run is still there; after it the new one is."""
    monkeypatch.setattr(simclr, "evaluate", lambda *_: {})
    config = tiny_config(**{**RUN, "epochs": 2})
    simclr.run(config)
    first = group(2, overwriting, config, killed)
    assert first.codes()[0] == -signal.SIGKILL
    again = group(2, overwriting, config, "", store=first.store, restarts=1)
    again.results()
    assert ("continuing" in again.said("out")) == (killed == "after")
    assert "is finished" not in again.said("out")


@pytest.mark.parametrize(
    ("world", "flags", "message"),
    [(2, dict(batch_size=301), "--batch-size 301 is not divisible by 2 processes; 300 is"),
     (3, dict(batch_size=300, micro_batch=20), "--micro-batch 20 is not divisible by 3 processes"),
     (2, dict(micro_batch=400), "larger than the batch"),
     (2, dict(device="cuda:0"), "one device for 2 processes"),
     (2, dict(dataset="folder", data_dir="nowhere"), "not a folder")],
)  # fmt: skip
def test_bad_input_is_one_line_of_one_process(world, flags, message, group, tiny_config, tmp_path):
    config = tiny_config(**{**RUN, **flags})
    found = group(world, a_run, config)
    assert found.codes(60) == [2] * world
    assert len(found.said().splitlines()) == 1
    assert message in found.said()
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpus_that_there_are_not(group, tiny_config):
    found = group(2, a_run, tiny_config(**{**RUN, "device": "cuda"}))
    assert found.codes(60) == [2, 2]
    assert len(found.said().splitlines()) == 1
    assert "cuda is not available here" in found.said()


def test_more_processes_than_gpus(monkeypatch):
    place = dict(RANK="2", WORLD_SIZE="3", LOCAL_RANK="2", LOCAL_WORLD_SIZE="3", MASTER_ADDR="x")
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="3 processes, but this machine has 2 GPUs"):
        utils.choose_device("auto")


def load(arguments):
    load_simCLR.main(arguments)


def test_evaluation_by_processes_is_that_of_one(group, tiny_config, monkeypatch):
    config = tiny_config(precision="float32", epochs=1, knn_every=0)
    monkeypatch.setattr(simclr, "evaluate", lambda *_: {})
    simclr.run(config)
    where = [str(config.folder), "--device", "cpu", "--figures", config.figures]
    refused = group(2, load, [*where, "--tasks", "knn", "semi"])
    assert refused.codes() == [2, 2]
    assert "semi: they train in one process" in refused.said()

    shared = group(3, load, [*where, "--tasks", "knn"])
    shared.results()
    file = config.folder / "evaluation.json"
    found = json.loads(file.read_text())["columns"]
    file.unlink()
    load([*where, "--tasks", "knn"])
    expected = json.loads(file.read_text())["columns"]
    assert len(found) == len(expected) == 2
    for column, other in zip(found, expected, strict=True):
        assert column["title"] == other["title"]
        assert column["scores"].keys() == other["scores"].keys()
        for name, scores in other["scores"].items():
            assert column["scores"][name] == pytest.approx(scores, abs=0.003)
    assert shared.said("out").count("kNN, k = 10") == 1


def ablate(arguments):
    ablation_SimCLR.do = note  # training is tested elsewhere
    ablation_SimCLR.main(arguments)


def note(job, data, device):
    """As do() of a job, but that it fails: which process had it is all that is asked."""
    print(f"process {os.environ['RANK']} has {job.config.run}", flush=True)
    if os.environ["RANK"] == "0":
        raise InputError("it failed")
    time.sleep(0.2)


def test_an_ablation_gives_each_process_its_runs(group, tiny_config):
    """A failure in one process does not end the others."""
    config = tiny_config()
    places = ["--checkpoints", config.checkpoints, "--figures", config.figures]
    arguments = ["temperature", "--seeds", "1", "--device", "cpu", *places]
    found = group(2, ablate, arguments)
    assert found.codes() == [1, 0], found.said()
    runs = re.findall("process (.) has (.*)", found.said("out"))
    names = [job.config.run for job in ablation_SimCLR.Grid("temperature", {}, 1).jobs]
    assert sorted(name for _, name in runs) == sorted(names)
    assert [name for rank, name in runs if rank == "0"] == names[::2]

    refused = group(2, ablate, [*arguments, "--shard", "1/2"])
    assert refused.codes() == [2, 2]
    assert len(refused.said().splitlines()) == 1


def children(pid):
    """The processes that a process has started, by their ranks."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/environ"):
        try:
            environment = status.read_bytes().split(b"\0")
            parent = (status.parent / "stat").read_text().rsplit(")", 1)[1].split()[1]
        except OSError:
            continue
        ranks = [int(x[5:]) for x in environment if x.startswith(b"RANK=")]
        if int(parent) == pid and ranks:
            found[ranks[0]] = int(status.parent.name)
    return found


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_torchrun_goes_on_after_a_killed_process(tmp_path):
    """A process is killed when there is a checkpoint: torchrun starts all again, which resume."""
    flags = "--width 0.125 --batch-size 300 --epochs 3 --knn-every 0 --device cpu"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    process = subprocess.Popen(
        [*torchrun, "--nproc_per_node=2", "--max-restarts=1", "--", ROOT / "simclr.py",
         *flags.split(), "--run", "killed"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    last = tmp_path / "checkpoints" / "killed" / "last.pt"
    until = time.monotonic() + 60
    while not last.exists() and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    said = process.communicate(timeout=100)[0]
    assert process.returncode == 0, said
    assert re.search("continuing .* after [0-9]+ of 3 epochs", said)
    assert "lost another one" in said
    assert [row["epoch"] for row in log_of(last.parent)] == [*range(1, 4)]
    assert last.with_name("summary.json").exists()


def test_torchrun_shows_the_error(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc_per_node=2", "--", ROOT / "simclr.py", "--batch-size", "11"],
        cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count("simclr.py: error: --batch-size 11 is not divisible by 2") == 1
    assert "exitcode  : 2" in done.stderr
    assert not list(tmp_path.iterdir())
