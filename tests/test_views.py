"""More than two views of each image, views that grow, and the decoupled loss."""

import itertools
import math

import pytest
import torch

import ablation_SimCLR as ablation
import simclr
import utils
from conftest import CPU, interrupt, load_run
from utils import InputError

LOSSES = [(simclr.nt_xent, True), (simclr.LOSSES["dcl"], False)]  # whether the pair is in it


def by_loops(z, tau, with_pair):
    """The mean over pairs of views of one image. z: K lists of N rows, float64."""
    views = [(i, row / row.norm()) for rows in z for i, row in enumerate(rows)]
    terms = []
    for (a, (i, u)), (b, (j, v)) in itertools.product(enumerate(views), repeat=2):
        if i == j and a != b:
            s = math.exp(u @ v / tau)
            negatives = sum(math.exp(u @ w / tau) for k, w in views if k != i)
            terms.append(-math.log(s / (s * with_pair + negatives)))
    return sum(terms) / len(terms)


@pytest.fixture
def z():
    """Projections of 4 views of 5 images: float64 (4, 5, 3)."""
    return torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("loss", "with_pair"), LOSSES)
@pytest.mark.parametrize("views", [2, 3, 4])
def test_losses_equal_loops_over_pairs(z, loss, with_pair, views):
    z1, z2, *others = z[:views]
    expected = by_loops(z[:views], 0.2, with_pair)
    assert loss(z1, z2, 0.2, *others).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("loss", "_"), LOSSES)
def test_gradients_in_blocks_and_by_finite_differences(z, loss, _, monkeypatch):
    z.requires_grad_()
    whole = torch.autograd.grad(loss(z[0], z[1], 0.3, *z[2:]), z)[0]
    assert torch.autograd.gradcheck(lambda x: loss(x[0], x[1], 0.3, *x[2:]), z)
    monkeypatch.setattr(simclr, "BLOCK_BYTES", {"cpu": 3 * 20 * 8})  # 3 of 20 rows
    assert len(simclr.row_blocks(z.flatten(0, 1))) == 7
    blocks = torch.autograd.grad(loss(z[0], z[1], 0.3, *z[2:]), z)[0]
    assert torch.allclose(blocks, whole, rtol=1e-12, atol=1e-14)


def test_contrastive_accuracy_counts_any_other_view():
    a, b, c = torch.eye(3)
    views = torch.stack([a, b]), torch.stack([a, c]), torch.stack([a, b])
    assert simclr.contrastive_accuracy(*views).item() == pytest.approx(5 / 6)  # c is alone


@pytest.mark.parametrize("side", [24, 200])  # in memory, from disk
def test_a_batch_has_k_views_of_each_image(photo_config, side):
    config = photo_config(4, (side, side), batch_size=4, views=3)
    data = simclr.load_data(config, CPU).pretrain
    (views,) = simclr.view_batches(config, data, CPU, 0, 0)
    assert views.shape == (12, 3, 16, 16)
    assert len({view.numpy().tobytes() for view in views}) == 12
    whole = simclr.Augment(16, [simclr.RandomResizedCrop(16, (1.0, 1.0))])
    (views,) = simclr.view_batches(config, data, CPU, 0, 0, whole)
    first, second, third = views.chunk(3)
    assert torch.allclose(first, second, atol=1e-6)
    assert torch.allclose(second, third, atol=1e-6)


def test_sizes_grow_in_equal_parts_of_the_epochs(small_config):
    config = small_config(view_sizes=(8, 8, 12, 12, 16), epochs=10)
    assert [config.at_epoch(e).view_side for e in range(10)] == [8] * 4 + [12] * 4 + [16] * 2
    assert small_config().at_epoch(3).view_size == 0


def test_sizes_up_to_1_are_shares_of_the_images_side(photo_config):
    folder = photo_config(4, (24, 24)).data_dir
    given = dict(dataset="folder", data_dir=folder)
    for config, sizes in (
        (simclr.make_config(**given, view_sizes=(0.25, 0.5, 1, 20)), (8, 12, 24, 20)),
        (simclr.make_config(**given), (12, 12, 18, 18, 24)),  # the recipe's
        (simclr.make_config(**given, view_size=16), ()),
    ):
        data = simclr.load_data(config, CPU).pretrain
        assert simclr.resolve(config, data, CPU).view_sizes == sizes


def test_a_growing_run_resumes_bit_for_bit_and_ends_with_new_statistics(
    small_config, unjudged, monkeypatch
):
    options = dict(view_sizes=(8, 16), views=3, epochs=2, knn_every=0)
    whole, parted = (small_config(run=name, **options) for name in ("whole", "parted"))
    sides, real = [], simclr.training_step

    def seen(network, views, *rest):
        sides.append(views.shape[-1])
        return real(network, views, *rest)

    monkeypatch.setattr(simclr, "training_step", seen)
    simclr.run(whole)
    assert sides == [8] * 4 + [16] * 4
    interrupt(lambda: simclr.run(parted), 6)
    simclr.run(parted)
    one, two = (utils.load_checkpoint(c.folder / "last.pt")["model"] for c in (whole, parted))
    assert all(torch.equal(one[name], two[name]) for name in one)

    data = simclr.load_data(whole, CPU)
    model = load_run(whole.folder / "last.pt").model
    with torch.no_grad():
        inputs = model.encoder.conv1(next(data.pretrain.batches(16, 1000, CPU)))
    assert torch.allclose(model.encoder.bn1.running_mean, inputs.mean((0, 2, 3)), atol=0.02)
    assert model.encoder.bn1.momentum == 0.1


def test_studies_of_two_views_refuse_more():
    for study in ("augmentation", "encoder-pass", "loss"):
        with pytest.raises(InputError, match="is of two views: leave --views out"):
            ablation.make_jobs(study, {"views": 4}, 1)
    assert ablation.make_jobs("depth-width", {"views": 4}, 1)[0].config.views == 4
    views = [job.config for job in ablation.make_jobs("views", {}, 1)]
    assert {c.views * c.batch_size for c in views} == {512}
    assert [c.epochs for c in views] == [30, 15, 7]
