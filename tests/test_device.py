"""Training never waits for the device; what is refused or out of memory. This needs no GPU.

Tensors on torch's device "meta" have shapes but no numbers. What would wait for a GPU until it has
computed some, such as .item(), a mask as an index or `if tensor:`, is an error there.
"""

import contextlib

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

import simclr
import utils
from utils import Images, InputError

META = torch.device("meta")
STEPS = 3
RECIPES = {  # recipe -> --micro-batch, bytes of NT-Xent's blocks
    "digits": (0, 2**22),  # AdamW, rotation
    "cifar10-fast": (4, 2**22),  # SGD, colours
    "imagenet-paper": (0, 4 * 16 * 5),  # LARS, blur; blocks of 5 of the 16 rows
}


@pytest.fixture(autouse=True)
def what_meta_has_not(monkeypatch):
    """Generators, of which the device alone is kept, and autocast."""
    generator, draw = utils.generator, simclr.Augment.draw

    def draw_there(self, n, where):
        draws = sum(step.draws for step in self.steps)
        return torch.rand(n, draws, device=META) if where is META else draw(self, n, where)

    monkeypatch.setattr(simclr.Augment, "draw", draw_there)
    monkeypatch.setattr(
        utils, "generator", lambda where, *keys: META if where == META else generator(where, *keys)
    )
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


def images():
    pixels = torch.empty(8 * STEPS, 3, 16, 16, dtype=torch.uint8, device=META)
    return Images(pixels, torch.empty(8 * STEPS, dtype=torch.long, device=META), ("a", "b", "c"))


def settings(recipe="digits", **others):
    return simclr.make_config(
        recipe=recipe, arch="resnet10", width=0.125, image_size=16, batch_size=8, view_size=12,
        head_hidden=8, precision="float32", **others,
    )  # fmt: skip


def train(config, data):
    """An epoch of the steps of train(). Returns how many."""
    model = simclr.make_model(config).to(META)
    optimizer = simclr.make_optimizer(config, model)
    now = simclr.TrainState(STEPS, torch.zeros(3, device=META))
    for views in simclr.view_batches(config, data, META, 0, 0):
        simclr.set_rate(optimizer, simclr.learning_rate(config, now.done, 8, STEPS))
        value, z = simclr.training_step(model, views, simclr.nt_xent, config)
        optimizer.step()
        optimizer.zero_grad()
        now.add(value, simclr.contrastive_accuracy(*z.chunk(config.views)), simclr.mean_cosine(z))
    return now.step


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_does_not_wait_for_the_device(recipe, monkeypatch):
    micro_batch, block = RECIPES[recipe]
    monkeypatch.setattr(simclr, "BLOCK_BYTES", {"cpu": block, "gpu": block})
    assert train(settings(recipe, micro_batch=micro_batch), images()) == STEPS


def test_a_step_on_streamed_images_does_not_wait_for_the_device(tmp_path, write_image):
    names = [f"{i:02}.png" for i in range(8 * STEPS)]
    for name in names:
        write_image(tmp_path / name, size=(20, 16))
    files = Images(None, paths=np.array(names, "S"), root=tmp_path)
    assert train(settings("folder", workers=0), files) == STEPS


def test_a_gpu_for_which_torch_has_no_kernels_is_refused(monkeypatch):
    class Old(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is not torch.empty:  # the memory it can get
                raise RuntimeError("CUDA error: no kernel image is available\nfor it")
            return function(*args, **kwargs)

    with FakeTensorMode(), Old():
        with pytest.raises(InputError, match=r"not available here \(RuntimeError: CUDA error"):
            utils.choose_device("cuda")


@pytest.mark.parametrize(
    ("error", "expected"),
    [(torch.OutOfMemoryError("Tried to allocate\n20.00 GiB"), True), (MemoryError("2 GB"), True),
     (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
     (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
     (RuntimeError("CUDA error: out of memory"), True),
     (RuntimeError("CUDA error: an illegal memory access was encountered"), False)],
)  # fmt: skip
def test_lack_of_memory_and_nothing_else_is_a_line(error, expected, capsys):
    kind, text = (SystemExit, "^2$") if expected else (RuntimeError, "illegal memory access")
    with pytest.raises(kind, match=text), utils.command("simclr.py"):
        raise error
    line = f"simclr.py: error: there is too little memory: {error}".replace("\n", " ")
    assert capsys.readouterr().err == (line + "\n") * expected
