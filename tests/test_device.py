"""Training never waits for the device, and mixes no devices. This needs no GPU.

Tensors on torch's device "meta" have shapes but no numbers. What would wait for a GPU until it has
computed some, such as .item(), a mask as an index or `if tensor:`, is an error there; copies from
the CPU that are waited for, and operations on two devices, are noted here.
"""

import contextlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ablation_SimCLR as ablation
import simclr
import utils
from utils import ImageFiles, ImageSet, InputError

META = torch.device("meta")
STEPS = 3
RECIPES = {  # recipe -> --micro-batch, bytes of NT-Xent's blocks
    "digits": (0, 2**22),  # AdamW, rotation
    "cifar10-fast": (4, 2**22),  # SGD, colours
    "imagenet-paper": (0, 4 * 16 * 5),  # LARS, blur; blocks of 5 of the 16 rows
}


class Copies(TorchFunctionMode):
    """Notes which functions make a tensor of Python's numbers."""

    def __init__(self, noted):
        self.noted = noted

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.tensor, torch.as_tensor, Tensor.new_tensor):
            self.noted.append(function.__name__)
        return function(*args, **(kwargs or {}))


class Mixtures(TorchDispatchMode):
    """Notes which operations have tensors on two devices, copies that are not waited for apart."""

    def __init__(self, noted):
        super().__init__()
        self.noted = noted

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        if len({x.device for x in tensors}) > 1 and not kwargs.get("non_blocking"):
            self.noted.append(str(operation))
        return result


@contextlib.contextmanager
def watched():
    """Yields a list that grows by what is waited for, or works on two devices."""
    noted = []
    with Copies(noted), Mixtures(noted):
        yield noted


@pytest.fixture(autouse=True)
def what_meta_has_not(monkeypatch):
    """Generators, of which the device alone is kept, and autocast."""
    generator, draw = utils.generator, simclr.Augment.draw

    def draw_there(augment, n, where=None, device="cpu"):
        return draw(augment, n, None, META) if where is META else draw(augment, n, where, device)

    monkeypatch.setattr(simclr.Augment, "draw", draw_there)
    monkeypatch.setattr(
        utils, "generator", lambda where, *keys: META if where == META else generator(where, *keys)
    )
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


def images():
    pixels = torch.empty(8 * STEPS, 3, 16, 16, dtype=torch.uint8, device=META)
    return ImageSet(pixels, torch.empty(8 * STEPS, dtype=torch.long, device=META), ("a", "b", "c"))


def settings(recipe="digits", **others):
    return simclr.make_config(
        recipe=recipe, arch="resnet10", width=0.125, image_size=16, batch_size=8, view_size=12,
        head_hidden=8, precision="float32", **others,
    )  # fmt: skip


def train(config, data):
    """An epoch of the steps of train(). Returns how many, and what was noted from the second on."""
    model = simclr.make_model(config).to(META)
    optimizer = simclr.make_optimizer(config, model)
    now = simclr.TrainState(STEPS, torch.zeros(3, device=META))
    with watched() as noted:
        for views in simclr.view_batches(config, data, META, 0, 0):
            simclr.set_rate(optimizer, simclr.learning_rate(config, now.done, 8, STEPS))
            value, z = simclr.training_step(model, views, simclr.nt_xent, config)
            optimizer.step()
            optimizer.zero_grad()
            now.add(value, simclr.contrastive_accuracy(*z.chunk(2)), simclr.mean_cosine(z))
            if now.step == 1:  # an epoch begins with copies
                noted.clear()
    return now.step, noted


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_does_not_wait_for_the_device(recipe, monkeypatch):
    micro_batch, block = RECIPES[recipe]
    monkeypatch.setattr(simclr, "BLOCK_BYTES", {"cpu": block, "gpu": block})
    assert train(settings(recipe, micro_batch=micro_batch), images()) == (STEPS, [])


def test_a_step_on_streamed_images_does_not_wait_for_the_device(tmp_path, write_image):
    names = [f"{i:02}.png" for i in range(8 * STEPS)]
    for name in names:
        write_image(tmp_path / name, size=(20, 16))
    files = ImageFiles(tmp_path, np.array(names, "S"))
    assert train(settings("folder", workers=0), files) == (STEPS, [])


def test_a_step_on_labels_does_not_wait_for_the_device():
    config, data, steps = settings(), images(), []
    how = simclr.LabelTraining(epochs=1, batch_size=8, min_steps=STEPS)
    encoder = simclr.make_model(config).encoder.to(META)
    with watched() as noted:

        def after_step():
            if not steps:
                noted.clear()
            steps.append(0)

        simclr.fine_tune(
            encoder, data, torch.arange(len(data)), simclr.geometric_augment(config), how, config,
            META, after_step=after_step,
        )  # fmt: skip
    assert (len(steps), noted) == (STEPS, [])


def test_neighbours_do_not_wait_for_the_device():
    h, labels = torch.empty(24, 5, device=META), images().labels
    with watched() as noted:
        for temperature in (None, 0.1):
            utils.knn_predict(h, labels, h, 3, k=4, temperature=temperature)
    assert not noted


@pytest.mark.parametrize("name", ablation.LOSSES)
def test_other_losses_do_not_wait_for_the_device(name):
    z = torch.empty(8, 5, device=META, requires_grad=True)
    options = {"margin": 0.1} if "margin" in name else {}
    with watched() as noted:
        ablation.LOSSES[name](*z.chunk(2), 0.5, **options).backward()
    assert not noted


def test_other_transformations_do_not_wait_for_the_device():
    config, data = settings(), images()
    steps = [step for make in ablation.TRANSFORMATIONS.values() for step in make(config)]
    steps += [make(config) for make in ablation.EXTRAS.values()]
    with watched() as noted:
        simclr.Augment(config.view_side, steps)(data.images)
    assert not noted


def test_tests_without_the_mark_and_what_they_start_see_no_gpu():
    count = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", count], capture_output=True, check=True)
    assert (os.environ["CUDA_VISIBLE_DEVICES"], int(done.stdout)) == ("", 0)


def test_the_gpu_that_is_chosen_is_the_current_one(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    with FakeTensorMode():
        assert [str(utils.choose_device(name)) for name in ("cuda", "cuda:0")] == ["cuda", "cuda:0"]
    assert current == [torch.device("cuda:0")]


@pytest.mark.parametrize(
    ("fast", "device", "precision", "expected"),
    [
        (True, "cuda", "bfloat16", "bfloat16"),
        (True, "cuda", "float32", "float32 (convolutions in TF32)"),
        (False, "cuda", "float32", "float32 (this GPU has no bfloat16)"),  # T4, V100, RTX 20
        (False, "cpu", "float32", "float32"),
    ],
)
def test_precision_is_named_by_what_it_is(fast, device, precision, expected, monkeypatch):
    monkeypatch.setattr(utils, "has_fast_bfloat16", lambda _: fast)
    assert utils.describe_precision(precision, torch.device(device)) == expected


def test_a_gpu_for_which_torch_has_no_kernels_is_refused(monkeypatch):
    class Old(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is not torch.empty:  # the memory it can get
                raise RuntimeError("CUDA error: no kernel image is available\nfor it")
            return function(*args, **kwargs)

    with FakeTensorMode(), Old():
        with pytest.raises(InputError, match=r"cuda is not available here \(CUDA error: no kernel"):
            utils.choose_device("cuda")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("Tried to allocate 20.00 GiB"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_lack_of_memory_is_known(error, expected):
    assert utils.is_out_of_memory(error) == expected


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError])
def test_too_little_memory_is_a_line(kind, capsys):
    with pytest.raises(SystemExit, match="2"), utils.command("simclr.py"):
        raise kind("2 GiB\nof 1")
    expected = "simclr.py: error: there is too little memory: 2 GiB of 1\n"
    assert capsys.readouterr().err == expected
    with pytest.raises(RuntimeError, match="another"), utils.command("simclr.py"):
        raise RuntimeError("another")
