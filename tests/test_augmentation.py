"""Augmentation (Section 3): every step against torchvision, and what must be random."""

import math

import pytest
import torch
from scipy import stats
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

import simclr
from simclr import RandomResizedCrop

ADJUST = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)


def crop_boxes(crop, u, height, width):
    """Boxes (N, 4) for images of one size."""
    return crop.boxes(u, *(torch.full((len(u),), side) for side in (height, width)))


@pytest.mark.parametrize("size", [8, 16, 40])
def test_crop_takes_each_images_own_box_and_equals_torchvision(images, size):
    boxes = torch.tensor([[i % 8, i % 5, 6 + i % 10, 4 + i % 12] for i in range(len(images))])
    boxes[:4] = torch.tensor([(0, 0, 24, 20), (3, 5, 11, 13), (20, 2, 4, 18), (23, 19, 1, 1)])
    ours = simclr.resized_crop(images, boxes, size)
    for image, box, crop in zip(images, boxes.tolist(), ours, strict=True):
        theirs = TF.resized_crop(image, *box, [size, size], antialias=True)
        assert (crop - theirs).abs().max() <= 1e-4


@pytest.mark.parametrize("shape", [(32, 32), (24, 60), (9, 100)])
def test_crop_boxes_are_distributed_as_torchvisions(shape):
    n, scale = 4000, (0.08, 1.0)
    u = torch.rand(n, RandomResizedCrop.draws, generator=torch.Generator().manual_seed(1))
    ours = crop_boxes(RandomResizedCrop(16, scale), u, *shape)
    torch.manual_seed(2)
    crop = v2.RandomResizedCrop(16, scale)
    image = torch.zeros(3, *shape)
    draws = [crop.make_params([image]) for _ in range(n)]
    for i, key in enumerate(("top", "left", "height", "width")):
        theirs = [int(d[key]) for d in draws]
        assert stats.ks_2samp(ours[:, i].tolist(), theirs).pvalue > 1e-3, key


def test_crop_boxes_lie_inside_for_the_extremes_of_u():
    for value in (0.0, 1 - 2**-24):
        u = torch.full((1, RandomResizedCrop.draws), value)
        for shape in [(8, 8), (32, 32), (10, 300), (1, 1)]:
            top, left, height, width = crop_boxes(RandomResizedCrop(8, (0.08, 1.0)), u, *shape)[0]
            assert 0 <= top <= shape[0] - height
            assert 0 <= left <= shape[1] - width
            assert height >= 1
            assert width >= 1


@pytest.mark.parametrize("angle", [-90.0, -15.0, 0.0, 7.3, 45.0])
def test_rotation_equals_torchvision(images, angle):
    u = torch.full((len(images), 1), (angle + 90) / 180)
    ours = simclr.RandomRotation(90.0)(images, u)
    theirs = TF.rotate(images, angle, interpolation=TF.InterpolationMode.BILINEAR)
    assert (ours - theirs).abs().max() <= 1e-4


@pytest.mark.parametrize("turns", [-0.5, -0.2, 0.0, 0.1, 0.5])
def test_hue_equals_torchvision(images, turns):
    ours = simclr.adjust_hue(images, torch.full((len(images),), turns))
    assert (ours - TF.adjust_hue(images, turns)).abs().max() <= 2e-3


def test_jitter_is_torchvisions_steps_by_the_numbers_of_u(images):
    """s = 1 of the paper: factors from 0.2 to 1.8, hue ± 0.2, three orders at least."""
    step = simclr.ColorJitter(0.8, (0.8, 0.8, 0.8), 0.2)
    u = torch.rand(len(images), step.draws, generator=torch.Generator().manual_seed(8))
    u[0, 0] = 0.9  # left out
    u[1:, 0] *= 0.8
    orders = set()
    for image, row, ours in zip(images, u.tolist(), step(images, u), strict=True):
        theirs, order = image, sorted(range(3), key=lambda k, row=row: row[5 + k])
        if row[0] < 0.8:
            orders.add(tuple(order))
            for k in order:
                theirs = ADJUST[k](theirs, 0.2 + 1.6 * row[1 + k])
            theirs = TF.adjust_hue(theirs, -0.2 + 0.4 * row[4])
        assert (ours - theirs).abs().max() <= 2e-3
    assert len(orders) >= 3


def test_grayscale_equals_torchvision(images):
    theirs = TF.rgb_to_grayscale(images, num_output_channels=3)
    ours = simclr.RandomGrayscale(1.0)(images, torch.zeros(len(images), 1))
    assert (ours - theirs).abs().max() <= 1e-4


@pytest.mark.parametrize("sigma", [0.1, 2.0])
@pytest.mark.parametrize("kernel", [3, 23])
def test_blur_equals_torchvision(images, sigma, kernel):
    if kernel // 2 >= min(images.shape[-2:]):
        images = images.repeat(1, 1, 2, 2)
    ours = simclr.gaussian_blur(images, torch.full((len(images),), sigma), kernel)
    theirs = TF.gaussian_blur(images, [kernel, kernel], [sigma, sigma])
    assert (ours - theirs).abs().max() <= 1e-4


def paper(**changes):
    """The augmentation of the paper for ImageNet, to 16 px."""
    return simclr.make_augment(simclr.Config(image_size=16, **{"blur_p": 0.5, **changes}))


def test_same_randomness_same_views_on_every_device_and_in_pieces(images, device, monkeypatch):
    """A batch is cut into pieces that fit the cache of a CPU; 16 images are two of them here."""
    augment = paper(rotation=10.0)
    u = augment.draw(len(images), torch.Generator().manual_seed(3))
    whole = augment(images, u)
    monkeypatch.setattr(simclr, "CHUNK_BYTES", dict.fromkeys(("cpu", "gpu"), 8 * 12 * 16**2))
    assert (whole - augment(images, u)).abs().max() <= 1e-5
    assert (whole - augment(images.to(device), u.to(device)).cpu()).abs().max() <= 1e-4


def test_every_image_gets_its_own_randomness():
    """One image repeated: all views differ, in each step alone and in all together."""
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).repeat(64, 1, 1, 1)
    everything = paper(rotation=10.0, blur_p=1.0)
    for steps in [everything.steps, *([s] for s in everything.steps)]:
        augment = simclr.Augment(16, steps)
        u = augment.draw(64, torch.Generator().manual_seed(1))
        distinct = torch.unique(augment(image, u).flatten(1), dim=0)
        coin = isinstance(steps[0], simclr.RandomApply) and steps[0].draws == 1  # flip, grey
        # a jitter that is left out (p = 0.8), or a crop of the same box, may repeat
        assert len(distinct) == 2 if coin else len(distinct) > 40, steps


def test_a_view_depends_on_its_own_row_of_u_and_on_nothing_else(images):
    augment = paper(rotation=10.0)
    images = images.repeat(4, 1, 1, 1)  # 64
    u = augment.draw(len(images), torch.Generator().manual_seed(4))
    together = augment(images, u)
    alone = torch.cat([augment(x[None], v[None]) for x, v in zip(images, u, strict=True)])
    assert (together - alone).abs().max() <= 1e-5


@pytest.mark.parametrize("p", [0.2, 0.5, 0.8])
def test_probabilities(p):
    n = 4000
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)).repeat(n, 1, 1, 1)
    jitter = simclr.ColorJitter(p, (0.4, 0.4, 0.4), 0.1)
    for step in (simclr.RandomFlip(p), simclr.RandomGrayscale(p), simclr.RandomBlur(p), jitter):
        u = torch.rand(n, step.draws, generator=torch.Generator().manual_seed(5))
        if step.draws == 2:  # blur
            u[:, 1] = 0.5  # a sigma that is large enough to see
        changed = ((step(image, u) - image).abs().amax((1, 2, 3)) > 1e-4).float().mean().item()
        assert abs(changed - p) < 4 * math.sqrt(p * (1 - p) / n), step


def test_every_setting_of_the_augmentation_is_passed_on():
    config = simclr.make_config(
        dataset="digits", image_size=40, crop_min=0.3, flip=0.1, rotation=12.0, jitter_p=0.6,
        color_strength=0.5, brightness=0.7, contrast=0.6, saturation=0.4, hue=0.1, gray_p=0.25,
        blur_p=0.35,
    )  # fmt: skip
    assert simclr.make_augment(config).steps == [
        simclr.RandomResizedCrop(40, (0.3, 1.0)),
        simclr.RandomFlip(0.1),
        simclr.RandomRotation(12.0),
        simclr.ColorJitter(0.6, (0.35, 0.3, 0.2), 0.05),
        simclr.RandomGrayscale(0.25),
        simclr.RandomBlur(0.35),
    ]
