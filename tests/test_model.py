"""Encoder and projection head (Section 4) against torchvision."""

import pytest
import torch
import torchvision
from torch import nn

import simclr
from simclr import ARCHITECTURES, Encoder, SimCLR, make_config
from utils import Images


@pytest.mark.parametrize("arch", ["resnet34", "resnet101", "resnet152"])
def test_deeper_ones_have_torchvisions_weights(arch):
    """By names and shapes; that so made networks compute the same is seen below."""
    with torch.device("meta"):
        theirs = getattr(torchvision.models, arch)()
        theirs.fc = nn.Identity()
        ours = Encoder(arch)
    assert [(name, value.shape) for name, value in ours.state_dict().items()] == [
        (name, value.shape) for name, value in theirs.state_dict().items()
    ]


@pytest.mark.parametrize(
    ("arch", "stem"), [("resnet18", "imagenet"), ("resnet50", "imagenet"), ("resnet18", "small")]
)
def test_width_1_is_torchvisions(arch, stem):
    theirs = getattr(torchvision.models, arch)()
    theirs.fc = nn.Identity()
    if stem == "small":
        theirs.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
        theirs.maxpool = nn.Identity()
    ours = Encoder(arch, stem=stem)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
    assert ours.feature_dim == theirs(x).shape[1]


@pytest.mark.parametrize("arch", list(ARCHITECTURES))
@pytest.mark.parametrize("width", [0.25, 2.0])
def test_width_multiplies_every_channel_count(arch, width):
    block = ARCHITECTURES[arch][0]
    with torch.device("meta"):
        encoder = Encoder(arch, width, "small")
        for name, parameter in Encoder(arch, 1.0, "small").named_parameters():
            scaled = encoder.get_parameter(name)
            assert scaled.shape[0] == width * parameter.shape[0], name
            if parameter.ndim == 4 and name != "conv1.weight":
                assert scaled.shape[1] == width * parameter.shape[1], name
    assert encoder.feature_dim == 512 * block.expansion * width


def test_imagenet_stem_is_chosen_above_64_px():
    data = Images(torch.zeros(2, 3, 96, 96, dtype=torch.uint8))
    for size, stem, kernel in ((64, "auto", 3), (65, "auto", 7), (96, "small", 3)):
        config = make_config(dataset="digits", image_size=size, stem=stem)
        encoder = SimCLR(simclr.resolve(config, data, torch.device("cpu"))).encoder
        assert encoder.conv1.kernel_size == (kernel, kernel)


def test_projection_heads():
    h = torch.randn(6, 10)
    assert simclr.make_projector("none", 10, 7, 5, False)(h) is h
    linear = simclr.make_projector("linear", 10, 7, 5, False)
    assert torch.allclose(linear(h), h @ linear.weight.T)
    mlp = simclr.make_projector("nonlinear", 10, 7, 5, False)
    by_hand = (h @ mlp[0].weight.T + mlp[0].bias).relu() @ mlp[2].weight.T + mlp[2].bias
    assert torch.allclose(mlp(h), by_hand, atol=1e-6)
    kinds = [type(layer) for layer in simclr.make_projector("nonlinear", 10, 7, 5, True)]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]


def test_weights_depend_on_the_seed_and_leave_the_global_generator_alone():
    def weights(seed):
        config = make_config(dataset="digits", image_size=16, seed=seed)
        return simclr.make_model(config).state_dict()

    torch.manual_seed(1)
    first = weights(0)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))
    assert all(torch.equal(a, b) for a, b in zip(first.values(), weights(0).values(), strict=True))
    assert not torch.equal(first["encoder.conv1.weight"], weights(1)["encoder.conv1.weight"])


@pytest.mark.parametrize("size", [17, 64])
def test_narrow_shortcuts_equal_strided_convolutions(size, monkeypatch):
    """The same names, weights and outputs; without it torch may end the process at 64 px."""
    torch.manual_seed(0)
    narrow = simclr.Encoder("resnet10", 0.125, "small")
    monkeypatch.setattr(simclr, "CONV_BUG_CHANNELS", 0)
    torch.manual_seed(0)
    plain = simclr.Encoder("resnet10", 0.125, "small")
    kinds = [type(encoder.layer2[0].downsample[0]) for encoder in (plain, narrow)]
    assert kinds == [nn.Conv2d, simclr.SubsamplingConv]
    assert list(narrow.state_dict()) == list(plain.state_dict())
    x = torch.rand(4, 3, size, size)
    assert torch.allclose(narrow(x), plain(x), atol=1e-6)
    narrow.to(memory_format=torch.channels_last)
    narrow(x.contiguous(memory_format=torch.channels_last)).sum().backward()
    assert narrow.layer2[0].downsample[0].weight.grad.isfinite().all()
