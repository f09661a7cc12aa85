"""kNN and logistic regression against scikit-learn; embedding leaves the encoder as it was."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

import utils
from simclr import Encoder
from utils import ImageSet


@pytest.fixture(scope="module")
def clusters():
    """Four overlapping clusters: (train x, train y, test x, test y)."""
    random = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 12, generator=random)
    y = torch.arange(400) % 4
    x = centres[y] + 1.2 * torch.randn(400, 12, generator=random)
    return x[:300], y[:300], x[300:], y[300:]


@pytest.mark.parametrize("k", [1, 10, 77])
def test_knn_equals_scikit_learn(clusters, device, k):
    x, y, x_test, _ = clusters
    theirs = KNeighborsClassifier(k, metric="cosine").fit(x, y).predict(x_test)
    ours = utils.knn_predict(x.to(device), y.to(device), x_test.to(device), 4, k)
    assert (ours.cpu().numpy() == theirs).all()


def test_weighted_knn_equals_scikit_learn(clusters, device):
    x, y, x_test, _ = clusters
    theirs = KNeighborsClassifier(
        50, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.1)
    )
    theirs = theirs.fit(x, y).predict(x_test)
    ours = utils.knn_predict(x.to(device), y.to(device), x_test.to(device), 4, 50, temperature=0.1)
    assert (ours.cpu().numpy() == theirs).all()


def test_knn_in_blocks_is_the_same(clusters, monkeypatch):
    x, y, x_test, _ = clusters
    whole = utils.knn_predict(x, y, x_test, 4)
    monkeypatch.setattr(utils, "_KNN_BYTES", 4 * len(x) * 7)  # 7 rows at a time
    assert torch.equal(utils.knn_predict(x, y, x_test, 4), whole)


def test_knn_with_fewer_images_than_neighbours():
    x, y = torch.eye(3), torch.tensor([0, 1, 1])
    assert utils.knn_predict(x, y, torch.eye(3), 2, k=10).tolist() == [1, 1, 1]


@pytest.mark.parametrize("c", [0.01, 1.0, 100.0])
def test_logistic_regression_equals_scikit_learn(clusters, device, c):
    x, y, x_test, _ = clusters
    theirs = LogisticRegression(C=c, tol=1e-10, max_iter=5000).fit(x.double(), y)
    double = x.to(device, torch.float64)
    weight, bias = utils.fit_logistic_regression(double, y.to(device), 4, c, tolerance=1e-9)
    assert np.abs(weight.T.cpu().numpy() - theirs.coef_).max() < 1e-4 * np.abs(theirs.coef_).max()
    bias = (bias - bias.mean()).cpu().numpy()  # the intercept is free up to a constant
    expected = theirs.intercept_ - theirs.intercept_.mean()
    assert np.abs(bias - expected).max() < 1e-4 * max(1, np.abs(expected).max())
    predicted = x_test.numpy() @ weight.cpu().numpy() + bias
    assert (predicted.argmax(1) == theirs.predict(x_test)).all()


def test_logistic_regression_with_fewer_rows_than_features(device):
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 100, generator=random).double(), torch.arange(30) % 3
    theirs = LogisticRegression(tol=1e-10, max_iter=5000).fit(x, y)
    weight, _ = utils.fit_logistic_regression(x.to(device), y.to(device), 3, tolerance=1e-9)
    assert np.abs(weight.T.cpu().numpy() - theirs.coef_).max() < 1e-4 * np.abs(theirs.coef_).max()


@pytest.mark.parametrize("rows", [30, 100])
def test_principal_axes(device, monkeypatch, rows):
    """Of fewer and of more rows than features, decomposed on the CPU: other devices may lack it."""
    x = torch.randn(rows, 40, generator=torch.Generator().manual_seed(0)).double().to(device)
    x -= x.mean(0)
    for name in ("eigh", "svd"):
        real = getattr(torch.linalg, name)

        def on_cpu(matrix, real=real, **options):
            assert (matrix.device.type, matrix.dtype) == ("cpu", x.dtype)
            return real(matrix, **options)

        monkeypatch.setattr(torch.linalg, name, on_cpu)
    variances, axes = utils.principal_axes(x)
    assert (variances.device, axes.device) == (x.device, x.device)
    assert torch.allclose(axes.mT @ axes, torch.eye(min(rows, 40), dtype=x.dtype, device=device))
    assert torch.allclose((x @ axes).square().mean(0), variances)


def test_standardize_equals_scikit_learn(clusters):
    x, _, x_test, _ = clusters
    x, x_test = x.clone(), x_test.clone()
    x[:, 3] = 7.0  # a dead feature
    ours, ours_test = utils.standardize(x, x_test)
    scaler = StandardScaler().fit(x)
    alive = [i for i in range(12) if i != 3]
    assert np.allclose(ours[:, alive], scaler.transform(x)[:, alive], atol=1e-5)
    assert np.allclose(ours_test[:, alive], scaler.transform(x_test)[:, alive], atol=1e-5)
    assert (ours[:, 3] == 0).all()
    assert (ours_test[:, 3] == 0).all()


def test_embedding_does_not_touch_the_encoder(device):
    encoder = Encoder("resnet10", 0.125, "small").to(device).train()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    data = ImageSet(torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8))
    h = utils.embed(encoder, data, 16, device, batch_size=7)
    assert h.shape == (20, 64)
    assert h.dtype == torch.float32
    assert not h.requires_grad
    assert encoder.training
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    encoder.eval()
    with torch.no_grad():
        by_hand = encoder(data.images.to(device).float() / 255)
    assert torch.allclose(h, by_hand, atol=1e-5)


def test_raw_pixels_are_averaged_down_to_32_px():
    assert utils.flat_pixels(torch.rand(2, 3, 16, 16)).shape == (2, 768)
    small = utils.flat_pixels(torch.full((2, 3, 96, 96), 0.25))
    assert small.shape == (2, 3 * 32 * 32)
    assert torch.allclose(small, torch.tensor(0.25))
