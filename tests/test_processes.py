"""Several processes are one: each result is compared with that of a single process.

Most tests fork their processes from one that has imported everything, and computed nothing, which
would start threads; a few start them with torchrun, as users do.
"""

import dataclasses
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

import load_simCLR
import simclr
import utils
from conftest import CPU, ROOT, error_of, flags_of, log_of, position
from utils import InputError

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
        self.store = store or dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
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


def three_steps(config, block_bytes):
    """Losses and gradients of each step, the model afterwards, and what is logged, in float64."""
    simclr.BLOCK_BYTES = {"cpu": block_bytes, "gpu": block_bytes}
    with utils.process_group(CPU):
        data = simclr.load_data(config, CPU)
        model = utils.on_device(simclr.make_model(config), CPU).double()
        network, optimizer = utils.distributed(model), simclr.make_optimizer(config, model)
        gradients, losses, logged = [], [], []
        network.train()
        batches = simclr.view_batches(config, data.pretrain, CPU, 0, 0)
        for views in itertools.islice(batches, 3):
            loss, z = simclr.training_step(network, views.double(), simclr.nt_xent, config)
            gradients.append([p.grad.clone() for p in model.parameters()])
            losses.append(loss)
            logged += [simclr.contrastive_accuracy(*z.chunk(config.views)), simclr.mean_cosine(z)]
            simclr.set_rate(optimizer, config.lr)
            optimizer.step()
            optimizer.zero_grad()
        return losses, gradients, model.state_dict(), logged


STEPS = dict(
    precision="float32", batch_size=24, optimizer="sgd", lr=0.1, lr_scaling="none", head_bn=True,
    warmup_epochs=0.0, stem="small", image_size=16,
)  # fmt: skip
PLAIN, BLOCKS = 2**22, 7 * 48 * 8  # bytes of the loss' matrix: the whole, or 7 of its 48 rows


@pytest.mark.parametrize(
    ("world", "micro_batch", "block_bytes", "views"),
    [(2, 0, PLAIN, 2), (3, 0, BLOCKS, 4), (2, 12, BLOCKS, 4), (3, 12, PLAIN, 2)],
)
def test_processes_equal_one(
    world, micro_batch, block_bytes, views, group, tiny_config, monkeypatch
):
    """In float64, where what is left is no rounding of thousands of ReLUs at their kink."""
    monkeypatch.setattr(simclr, "BLOCK_BYTES", simclr.BLOCK_BYTES)  # is put back
    arguments = tiny_config(**STEPS, micro_batch=micro_batch, views=views), block_bytes
    several = group(world, three_steps, *arguments)
    *expected, expected_log = three_steps(*arguments)
    for *result, logged in several.results():
        close(result, expected, 1e-9)
        close(logged, expected_log)  # float32


def all_features(config, counts):
    """Features and kNN accuracy of parts of the digits with an untrained encoder."""
    with utils.process_group(CPU):
        data = simclr.load_data(config, CPU)
        model = simclr.make_model(config)
        parts = [utils.subset(data.train, torch.arange(n)) for n in counts]
        features = [simclr.features(model.encoder, part, config, CPU) for part in parts]
        return features, simclr.knn_accuracy(model.encoder, data, config, CPU)


def test_embeddings_and_knn_of_processes(group, tiny_config):
    config = tiny_config(**STEPS)
    counts = [1, 2, 7, 600]  # some processes have nothing to do, or less than others
    several = group(3, all_features, config, counts)
    features, knn = all_features(config, counts)
    for other_features, other_knn in several.results():
        assert [len(x) for x in other_features] == counts
        close(other_features, features)
        assert other_knn == pytest.approx(knn, abs=1e-6)


@pytest.fixture
def folder_config(tiny_config, tmp_path, write_image):
    """Makes the configuration of a streamed folder, in which a file to learn from is damaged."""

    def make(count=24, **options):
        root = tmp_path / "images"
        for i, split in itertools.product(range(count), ("train", "test")):
            write_image(root / split / f"{i % 2}" / f"{i:02}.png", (20 + i, 24), seed=i)
        (root / "train/1/03.png").write_bytes(b"no image")
        folder = dict(dataset="folder", data_dir=str(root), recipe="digits", image_size=16)
        options = {**dict(batch_size=6, epochs=1, warmup_epochs=0.0, knn_every=1), **options}
        return tiny_config(**folder, workers=0, **options)

    return make


def streamed(config):
    """Features of images on disk, some unreadable, after an epoch on them: also who is missing."""
    with utils.process_group(CPU):
        data = simclr.load_data(config, CPU)
        config = simclr.resolve(config, data.pretrain, CPU)
        views = torch.cat(list(simclr.view_batches(config, data.pretrain, CPU, 0, 0)))
        assert utils.unreadable_error(data.pretrain) is None
        missing = sorted(data.pretrain.unreadable)
        data = simclr.load_data(config, CPU)
        encoder = simclr.make_model(config).encoder
        x, labels = simclr.labelled_features(encoder, data.train, config, CPU)
        return views, missing, x, labels, sorted(data.train.unreadable)


def test_streamed_images_in_processes(group, folder_config):
    config = folder_config(count=14, batch_size=12, precision="float32", max_bad=0.2)
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
    assert shared.said().count("warning: cannot read") == 1


def test_too_many_bad_files_end_all_processes_after_saving(group, folder_config):
    """Only one of the processes meets the file."""
    config = folder_config(max_bad=0.01)
    several = group(2, a_run, config)
    assert several.codes() == [2, 2]
    lines = {x for x in several.said().splitlines() if "error" in x}
    assert len(lines) == 1
    assert "cannot read the image" in lines.pop()
    assert position(config) == (1, 0)
    group(2, a_run, dataclasses.replace(config, max_bad=0.5)).results()
    assert log_of(config)[0]["unreadable"] == 1


# ------------------------------------------------------------------------------ gradient caching


@pytest.mark.parametrize(("k", "parts"), [(2, 2), (2, 6), (3, 1), (3, 4)])  # views, micro-batches
def test_cached_gradients_are_those_with_all_activations(k, parts, device, tiny_config):
    """BatchNorm's statistics are of each micro-batch, and its running ones move once for each."""
    config = tiny_config(**STEPS, views=k, micro_batch=24 // k // parts)
    cached, plain = (simclr.make_model(config).to(device).double().train() for _ in range(2))
    views = torch.rand(24, 3, 16, 16, device=device, dtype=torch.float64)
    loss, z = simclr.training_step(cached, views, simclr.nt_xent, config)

    pieces = views.unflatten(0, (k, -1)).chunk(parts, dim=1)
    parted = [plain(x.flatten(0, 1))[1].unflatten(0, (k, -1)) for x in pieces]
    z1, z2, *others = torch.cat(parted, 1)
    expected = simclr.nt_xent(z1, z2, config.temperature, *others)
    expected.backward()
    close(loss, expected.detach(), 1e-9)
    close(z, torch.cat([z1, z2, *others]).detach(), 1e-9)
    for a, b in zip(cached.parameters(), plain.parameters(), strict=True):
        close(a.grad, b.grad, 1e-9)
    close(cached.state_dict(), plain.state_dict())


def test_too_little_memory_suggests_micro_batches(tiny_config, monkeypatch, capsys):
    def training_step(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(simclr, "training_step", training_step)
    error = error_of(capsys, simclr.main, *flags_of(tiny_config()))
    assert "too little memory (a --micro-batch, or a smaller --batch-size, --view-size" in error


# ------------------------------------------------------------------------------ runs and their ends


def a_run(config, fails="", *flags):
    """simclr.py's main() with the run's flags; `fails` makes the last process run into an error."""
    simclr.evaluate = lambda *_: {}
    last = os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)
    if last and fails == "killed":
        simclr.epoch_row = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    if last and fails == "error":
        simclr.epoch_row = raise_an_error
    if last and fails == "decoding":
        simclr.augmented_batches = fail_after_two_batches
    if last and fails == "signal":
        update = utils.Progress.update
        utils.Progress.update = lambda bar: (update(bar), os.kill(os.getpid(), signal.SIGTERM))
    simclr.main([*flags_of(config), *flags])


def raise_an_error(*_):
    raise InputError("the cat sat on the keyboard")


def fail_after_two_batches(*arguments, batches=simclr.augmented_batches):
    yield from itertools.islice(batches(*arguments), 2)
    raise_an_error()


RUN = dict(precision="float32", batch_size=300, epochs=3, knn_every=2, optimizer="sgd", lr=1e-4)


def test_a_stop_in_one_process_stops_all_and_any_number_goes_on(group, tiny_config, unjudged):
    config = tiny_config(**RUN, run="stopped")
    stopped = group(2, a_run, config, "signal")
    assert stopped.codes() == [128 + signal.SIGTERM] * 2
    assert stopped.said().count("stopped and saved") == 1
    assert position(config) == (0, 1)

    going_on = group(3, a_run, config, "signal")
    assert going_on.codes() == [128 + signal.SIGTERM] * 3
    assert "continuing" not in going_on.said()
    whole = tiny_config(**RUN, run="whole")
    simclr.run(config)
    simclr.run(whole)
    for row, expected in zip(log_of(config), log_of(whole), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert row["lr"] == expected["lr"]
        assert row.get("knn", 0) == pytest.approx(expected.get("knn", 0), abs=0.01)


@pytest.mark.parametrize("fails", ["error", "decoding", "killed"])
def test_the_others_end_when_one_does(fails, group, tiny_config):
    config = tiny_config(**RUN, run="broken")
    several = group(3, a_run, config, fails)
    assert several.codes(60) == [2, 2, -signal.SIGKILL if fails == "killed" else 2]
    said = several.said()
    lines = [line for line in said.splitlines() if "error" in line]
    assert sum("the cat sat" in line for line in lines) == (fails != "killed")
    assert sum("lost the connection to another rank" in line for line in lines) == 2
    assert len(lines) == (2 if fails == "killed" else 3)
    assert "is saved" not in said
    assert ("continue from the last save by the same command" in said) == (fails == "decoding")
    assert "Traceback" not in said


def test_a_run_that_is_overwritten_is_overwritten_once(group, tiny_config, unjudged):
    """The command that torchrun starts again has --overwrite, and goes on with the new run."""
    config = tiny_config(**{**RUN, "epochs": 2, "knn_every": 0})
    simclr.run(config)
    flags = "--overwrite", "--checkpoint-minutes", "1e-9"
    first = group(2, a_run, config, "killed", *flags)
    assert first.codes()[1] == -signal.SIGKILL
    again = group(2, a_run, config, "", *flags, store=first.store, restarts=1)
    again.results()
    assert "continuing" in again.said("out")
    assert "is finished" not in again.said("out")


def test_bad_input_is_one_line_of_one_process(group, tiny_config, tmp_path):
    several = group(2, a_run, tiny_config(**{**RUN, "batch_size": 301}))
    assert several.codes(60) == [2, 2]
    assert len(set(several.said().splitlines())) == 1
    assert "--batch-size: 301 images do not divide" in several.said()
    assert not (tmp_path / "checkpoints").exists()


def test_more_processes_than_gpus(monkeypatch):
    place = dict(RANK="2", WORLD_SIZE="3", LOCAL_RANK="2", LOCAL_WORLD_SIZE="3", MASTER_ADDR="x")
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match=r"3 processes need .* but this machine has 2"):
        utils.choose_device("auto")


def test_evaluation_by_processes_is_that_of_one(group, tiny_config, unjudged):
    config = tiny_config(precision="float32", epochs=1, knn_every=0)
    simclr.run(config)
    where = [str(config.folder), "--device", "cpu", "--figures", config.figures, "--tasks", "knn"]
    refused = group(2, load_simCLR.main, [*where, "semi"])
    assert refused.codes() == [2, 2]
    assert "semi: they train in one process" in refused.said()

    shared = group(2, load_simCLR.main, where)
    shared.results()
    file = config.folder / "evaluation.json"
    columns = json.loads(file.read_text())["columns"]
    file.unlink()
    load_simCLR.main(where)
    expected = json.loads(file.read_text())["columns"]
    assert len(columns) == len(expected) == 2
    for column, other in zip(columns, expected, strict=True):
        assert column["title"] == other["title"]
        assert column["scores"].keys() == other["scores"].keys()
        for name, scores in other["scores"].items():
            assert column["scores"][name] == pytest.approx(scores, abs=0.003)
    assert shared.said("out").count("kNN, k = 10") == 1


TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node=2 --max-restarts=1 --"
KILLED_ONCE = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import simclr
if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
    simclr.epoch_row = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
simclr.main()
"""


def test_torchrun_goes_on_after_a_killed_process(tmp_path):
    """torchrun starts all of them again, and they resume."""
    (tmp_path / "killed_once.py").write_text(KILLED_ONCE)
    flags = "--width 0.125 --batch-size 300 --epochs 3 --knn-every 0 --device cpu --run killed"
    flags += " --checkpoint-minutes 0.0001"  # after each step
    done = subprocess.run(
        [sys.executable, *TORCHRUN.split(), "killed_once.py", *flags.split()],
        cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "continuing checkpoints/killed after 0 of 3 epochs" in done.stdout
    assert "lost the connection" in done.stderr
    folder = tmp_path / "checkpoints" / "killed"
    assert [row["epoch"] for row in utils.read_jsonl(folder / "log.jsonl")] == [1, 2, 3]
    assert (folder / "summary.json").exists()
