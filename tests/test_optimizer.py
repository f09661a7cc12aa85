"""LARS by hand, which parameters are decayed, and the learning rate's schedule."""

import itertools
import math

import pytest
import torch

import simclr
from simclr import LARS, learning_rate, make_config


def test_lars_two_steps_by_hand(device):
    w = torch.tensor([[3.0, 4.0]], device=device, requires_grad=True)
    solver = LARS([w], lr=0.5, momentum=0.9, weight_decay=0.1, trust=0.001)

    w.grad = torch.tensor([[1.0, 2.0]], device=device)
    solver.step()
    g = torch.tensor([1.0 + 0.3, 2.0 + 0.4])  # gradient + decay · w
    v = 0.5 * 0.001 * 5.0 / g.norm() * g  # lr · trust · ‖w‖ / ‖g‖ · g, ‖w‖ = 5
    expected = torch.tensor([3.0, 4.0]) - v
    assert torch.allclose(w.detach().cpu()[0], expected, rtol=1e-6)

    w.grad = torch.tensor([[-1.0, 0.5]], device=device)
    solver.step()
    g = torch.tensor([-1.0, 0.5]) + 0.1 * expected
    v = 0.9 * v + 0.5 * 0.001 * expected.norm() / g.norm() * g
    assert torch.allclose(w.detach().cpu()[0], expected - v, rtol=1e-6)


def test_lars_without_adaptation_is_sgd_with_momentum():
    a, b = (torch.zeros(5, requires_grad=True) for _ in range(2))
    ours = LARS([{"params": [a], "adapt": False}], lr=0.1, momentum=0.9)
    theirs = torch.optim.SGD([b], lr=0.1, momentum=0.9)
    for step in range(5):
        a.grad, b.grad = torch.full((2, 5), step - 2.0)
        ours.step()
        theirs.step()
    assert torch.allclose(a, b, atol=1e-6)


def test_lars_takes_a_plain_step_where_a_norm_is_zero():
    zero_weight = torch.zeros(3, requires_grad=True)
    zero_gradient = torch.ones(3, requires_grad=True)
    zero_weight.grad, zero_gradient.grad = torch.ones(3), torch.zeros(3)
    LARS([zero_weight, zero_gradient], lr=0.1).step()
    assert torch.allclose(zero_weight, torch.full((3,), -0.1))
    assert torch.equal(zero_gradient, torch.ones(3))


@pytest.mark.parametrize("optimizer", ["lars", "sgd", "adamw"])
@pytest.mark.parametrize("decay_all", [False, True])
def test_biases_and_batchnorm_are_not_decayed(optimizer, decay_all):
    config = make_config(
        dataset="digits", image_size=16, optimizer=optimizer, weight_decay=0.1, decay_all=decay_all
    )
    model = simclr.SimCLR(config)
    solver = simclr.make_optimizer(config, model)
    decay = {id(p): g["weight_decay"] for g in solver.param_groups for p in g["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        one_dimensional = name.endswith("bias") or "bn" in name or "downsample.1" in name
        expected = 0.1 if decay_all or not one_dimensional else 0.0
        assert decay[id(parameter)] == expected, name
    if optimizer == "lars":
        adapted = {id(p): g["adapt"] for g in solver.param_groups for p in g["params"]}
        assert adapted[id(model.encoder.bn1.weight)] is False
        assert adapted[id(model.encoder.conv1.weight)] is True


def test_schedule_at_its_corners():
    config = make_config(epochs=10, warmup_epochs=1, lr=2.0, lr_scaling="none")
    rates = [learning_rate(config, step, 256, steps=10) for step in range(100)]
    # a tenth of the peak, not zero: the first step counts; at 55 half way down the cosine
    corners = {0: 0.2, 9: 2.0, 10: 2.0, 55: 1.0, 99: 1 + math.cos(math.pi * 89 / 90)}
    assert {step: rates[step] for step in corners} == pytest.approx(corners)
    assert max(rates) == pytest.approx(2.0)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


def test_peak_scales_with_the_batch():
    def peak(batch_size, **overrides):
        config = make_config(dataset="digits", batch_size=8192, **overrides)
        return simclr.peak_learning_rate(config, batch_size)

    assert peak(4096, lr=0.3, lr_scaling="linear") == pytest.approx(4.8)  # Section 2.2
    assert peak(4096, lr=0.075, lr_scaling="sqrt") == pytest.approx(4.8)  # Appendix B.1
    assert peak(4096, lr=0.01, lr_scaling="none") == pytest.approx(0.01)
