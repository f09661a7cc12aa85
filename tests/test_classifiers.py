"""kNN, logistic regression and standardisation against scikit-learn's; raw pixels."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

import utils


@pytest.fixture(scope="module")
def clusters():
    """Four overlapping clusters: (train x, train y, test x, test y)."""
    random = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 12, generator=random)
    y = torch.arange(400) % 4
    x = centres[y] + 1.2 * torch.randn(400, 12, generator=random)
    return x[:300], y[:300], x[300:], y[300:]


def knn_predict(x, y, x_test, classes, k=10, temperature=None):
    similarity, neighbours = utils.nearest_neighbours(x, x_test, k)
    return utils.knn_vote(similarity, y[neighbours], classes, temperature)


@pytest.mark.parametrize(("k", "temperature"), [(1, None), (10, None), (77, None), (50, 0.1)])
def test_knn_equals_scikit_learn(clusters, device, k, temperature):
    x, y, x_test, _ = clusters
    weights = (lambda distance: np.exp((1 - distance) / temperature)) if temperature else "uniform"
    theirs = KNeighborsClassifier(k, metric="cosine", weights=weights).fit(x, y).predict(x_test)
    ours = knn_predict(x.to(device), y.to(device), x_test.to(device), 4, k, temperature)
    assert (ours.cpu().numpy() == theirs).all()


def test_knn_in_blocks_is_the_same(clusters, monkeypatch):
    x, y, x_test, _ = clusters
    whole = knn_predict(x, y, x_test, 4)
    monkeypatch.setattr(utils, "_KNN_BYTES", 4 * len(x) * 7)  # 7 rows at a time
    assert torch.equal(knn_predict(x, y, x_test, 4), whole)


def test_knn_with_fewer_images_than_neighbours():
    x, y = torch.eye(3), torch.tensor([0, 1, 1])
    assert knn_predict(x, y, torch.eye(3), 2, k=10).tolist() == [1, 1, 1]


@pytest.mark.parametrize("c", [0.01, 1.0, 100.0])
def test_logistic_regression_equals_scikit_learn(clusters, device, c):
    x, y, x_test, _ = clusters
    theirs = LogisticRegression(C=c, tol=1e-10, max_iter=5000).fit(x.double(), y)
    double = x.to(device, torch.float64)
    weight, bias = utils.LogisticRegression(double, y.to(device), 4).fit(1 / (c * len(x)), 1e-9)
    assert np.abs(weight.T.cpu().numpy() - theirs.coef_).max() < 1e-4 * np.abs(theirs.coef_).max()
    bias = (bias - bias.mean()).cpu().numpy()  # the intercept is free up to a constant
    expected = theirs.intercept_ - theirs.intercept_.mean()
    assert np.abs(bias - expected).max() < 1e-4 * max(1, np.abs(expected).max())
    predicted = x_test.numpy() @ weight.cpu().numpy() + bias
    assert (predicted.argmax(1) == theirs.predict(x_test)).all()


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


def test_raw_pixels_are_averaged_down_to_32_px():
    assert utils.flat_pixels(torch.rand(2, 3, 16, 16)).shape == (2, 768)
    small = utils.flat_pixels(torch.full((2, 3, 96, 96), 0.25))
    assert small.shape == (2, 3 * 32 * 32)
    assert torch.allclose(small, torch.tensor(0.25))
