"""NT-Xent (Eq. 1) against a double loop and a closed form."""

import math

import pytest
import torch

import simclr
from simclr import contrastive_accuracy, nt_xent


def nt_xent_by_loops(z1, z2, tau):
    """Eq. 1 as it stands in the paper, in float64: views 2k - 1 and 2k belong together."""
    n = len(z1)
    z = [row.double() for pair in zip(z1, z2, strict=True) for row in pair]  # (2N) interleaved

    def s(i, j):
        return (z[i] @ z[j] / (z[i].norm() * z[j].norm())).item()

    def ell(i, j):
        others = sum(math.exp(s(i, k) / tau) for k in range(2 * n) if k != i)
        return -math.log(math.exp(s(i, j) / tau) / others)

    return sum(ell(2 * k, 2 * k + 1) + ell(2 * k + 1, 2 * k) for k in range(n)) / (2 * n)


@pytest.fixture
def z1(device):
    return torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(device)


@pytest.fixture
def z2(device):
    return torch.randn(7, 5, generator=torch.Generator().manual_seed(1)).to(device)


@pytest.mark.parametrize("tau", [0.05, 0.1, 0.5, 1.0, 10.0])
def test_equals_the_double_loop(z1, z2, tau):
    expected = nt_xent_by_loops(z1.cpu(), z2.cpu(), tau)
    assert nt_xent(z1.double(), z2.double(), tau).item() == pytest.approx(expected, rel=1e-12)
    assert nt_xent(z1, z2, tau).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("n", [2, 3, 64])
def test_equal_rows_give_ln_of_2n_minus_1(n, device):
    z = torch.ones(n, 4, device=device)
    assert nt_xent(z, z, 0.5).item() == pytest.approx(math.log(2 * n - 1), rel=1e-6)


def test_gradient_by_finite_differences():
    z1 = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    z2 = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, 0.2), (z1, z2))


@pytest.mark.parametrize("rows", [1, 3, 14])  # of 14
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_blocks_of_rows_equal_the_whole_matrix(z1, z2, monkeypatch, rows, dtype, tolerance):
    z1, z2 = z1.to(dtype).requires_grad_(), z2.to(dtype).requires_grad_()
    z = torch.nn.functional.normalize(torch.cat([z1, z2]), dim=1)
    logits = (z @ z.T / 0.2).fill_diagonal_(float("-inf"))
    partner = torch.arange(14, device=z.device).roll(7)
    whole = torch.nn.functional.cross_entropy(logits, partner)
    expected = torch.autograd.grad(3 * whole, (z1, z2))
    limit = rows * len(logits) * z1.element_size()
    monkeypatch.setattr(simclr, "BLOCK_BYTES", {"cpu": limit, "gpu": limit})
    assert len(simclr.row_blocks(z)) == -(-14 // rows)
    loss = nt_xent(z1, z2, 0.2)
    assert torch.allclose(loss, whole, rtol=tolerance, atol=0)
    for found, wanted in zip(torch.autograd.grad(3 * loss, (z1, z2)), expected, strict=True):
        assert torch.allclose(found, wanted, rtol=tolerance, atol=tolerance * wanted.abs().max())
    assert contrastive_accuracy(z1, z2) == (logits.argmax(1) == partner).float().mean()


def test_float32_inside_autocast(z1, z2):
    with torch.autocast(z1.device.type, dtype=torch.bfloat16):
        inside = nt_xent(z1, z2, 0.1)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, nt_xent(z1, z2, 0.1))
    low = nt_xent(z1.bfloat16(), z2.bfloat16(), 0.1)
    assert torch.equal(low, nt_xent(z1.bfloat16().float(), z2.bfloat16().float(), 0.1))


def test_contrastive_accuracy_by_counting():
    z1 = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    z2 = torch.tensor([[0.9, 0.1], [-1.0, 0.2], [-1.0, 0.1]])
    # a1 and a2 find each other; b1 = (0, 1) finds b2 (cos .196); c1 finds c2 (.9950, b2 has .981);
    # but b2 and c2 are nearest to each other (.9952): wrong
    assert contrastive_accuracy(z1, z2).item() == pytest.approx(4 / 6)
