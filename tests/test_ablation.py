"""Losses and transformations against oracles; how a grid of runs behaves; a study for real."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from scipy import ndimage, special
from torchvision.transforms.v2 import functional as TF

import ablation_SimCLR as ablation
import simclr
import utils
from conftest import CPU, error_of, interrupt, load_run, module_digest, rows_of

TINY = ["--epochs", "1", "--width", "0.125", "--batch-size", "300", "--device", "cpu"]


# ----------------------------------------------------------------------------------------- losses


def two_views(n=7, dim=5, seed=0):
    random = torch.Generator().manual_seed(seed)
    return (torch.randn(n, dim, generator=random, dtype=torch.float64) for _ in range(2))


def by_double_loop(z1, z2, term, mined):
    """Mean over the 2N views of term(u·v+, [u·v- …]), negatives from the other side (B.10)."""
    sides = [[v / v.norm() for v in z] for z in (z1, z2)]
    total = 0.0
    for side, i in np.ndindex(2, len(z1)):
        cosines = [float(sides[side][i] @ v) for v in sides[1 - side]]
        positive = cosines.pop(i)
        if mined:
            farther = [c for c in cosines if c < positive]
            cosines = [max(farther) if farther else min(cosines)]
        total += term(positive, cosines)
    return total / (2 * len(z1))


@pytest.mark.parametrize("mined", [False, True])
@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_nt_logistic_is_the_double_loop(mined, tau):
    def term(positive, negatives):
        push = sum(math.log(special.expit(-c / tau)) for c in negatives) / len(negatives)
        return -math.log(special.expit(positive / tau)) - push

    z1, z2 = two_views()
    loss = ablation.nt_logistic(z1, z2, tau, mined=mined)
    assert loss.item() == pytest.approx(by_double_loop(z1, z2, term, mined), abs=1e-12)


@pytest.mark.parametrize("mined", [False, True])
@pytest.mark.parametrize("margin", [0.0, 0.4, 1.6])
def test_margin_triplet_is_the_double_loop(mined, margin):
    def term(positive, negatives):
        return sum(max(c - positive + margin, 0) for c in negatives) / len(negatives)

    z1, z2 = two_views(seed=1)
    name = "margin-semi-hard" if mined else "margin"
    loss = ablation.Variant(loss_function=name, margin=margin).loss(simclr.Config())(z1, z2, 0.1)
    assert loss.item() == pytest.approx(by_double_loop(z1, z2, term, mined), abs=1e-12)


def test_dot_product_loss_is_the_double_loop():
    z1, z2 = two_views(seed=2)
    z, n, tau, total = torch.cat([z1, z2]), len(z1), 3.0, 0.0
    for i in range(2 * n):
        others = [math.exp(float(z[i] @ z[k]) / tau) for k in range(2 * n) if k != i]
        total -= math.log(math.exp(float(z[i] @ z[(i + n) % (2 * n)]) / tau) / sum(others))
    loss = ablation.LOSSES["nt-xent-dot"](z1, z2, tau)
    assert loss.item() == pytest.approx(total / (2 * n), abs=1e-12)


@pytest.mark.parametrize("name", ablation.LOSSES)
def test_losses_have_gradients_and_take_bfloat16(name):
    z1, z2 = (z.requires_grad_() for z in two_views(4, 3, seed=3))
    loss = ablation.LOSSES[name]
    assert torch.autograd.gradcheck(lambda a, b: loss(a, b, 0.5), (z1, z2))
    assert loss(z1.bfloat16(), z2.bfloat16(), 0.5).dtype == torch.float32


# -------------------------------------------------------------------------------- transformations


@pytest.fixture
def squares(images):
    """float32 (16, 3, 20, 20)."""
    return images[..., :20, :].contiguous()


def test_sobel_is_scipys(squares):
    edges, x = ablation.sobel(squares, torch.empty(16, 0)), squares.double().numpy()
    for i in np.ndindex(16, 3):
        gradient = [ndimage.sobel(x[i], axis=axis, mode="mirror") for axis in (0, 1)]
        np.testing.assert_allclose(edges[i], np.hypot(*gradient).clip(0, 4) / 4, atol=1e-5)


def test_right_angles_are_torchvisions_and_sometimes_left_out(squares):
    u = torch.tensor([[0.0], [0.2], [0.3], [0.5], [0.74], [0.75], [0.999], [0.26]])
    turns = [0, 0, 1, 2, 2, 3, 3, 1]
    for got, image, turn in zip(ablation.rotate(squares[:8], u), squares, turns, strict=False):
        assert torch.equal(got, TF.rotate(image, 90 * turn))
    sometimes = simclr.RandomApply(ablation.SOMETIMES, ablation.rotate, 2)
    got = sometimes(squares[:2], torch.tensor([[0.49, 0.3], [0.51, 0.3]]))
    assert torch.equal(got[0], squares[0].rot90(1, (-2, -1)))
    assert torch.equal(got[1], squares[1])


def test_cutout_blackens_one_square_of_half_the_side():
    u = torch.rand(200, 2, generator=torch.Generator().manual_seed(0))
    tops = set()
    for image in ablation.cutout(torch.ones(200, 3, 20, 20), u):
        rows, columns = (image[0] == 0).nonzero().unbind(1)
        top, left = int(rows.min()), int(columns.min())
        expected = torch.ones(3, 20, 20)
        expected[:, top : top + 10, left : left + 10] = 0
        assert torch.equal(image, expected)
        tops.add(top)
    assert tops == set(range(11))  # anywhere, each image at its own place


def test_noise_is_normal_with_its_own_deviation():
    (step,) = ablation.TRANSFORMATIONS["noise"](simclr.make_config(image_size=32))
    images = torch.full((8, 3, 32, 32), 0.5)
    u = torch.rand(8, step.draws, generator=torch.Generator().manual_seed(0))
    noise = (step(images, u) - 0.5).flatten(1)
    sigma = ablation.NOISE * u[:, 0]
    assert torch.allclose(noise.std(1), sigma, rtol=0.05, atol=1e-3)
    assert (noise.mean(1).abs() < 4 * sigma / math.sqrt(3072) + 1e-6).all()
    assert (noise[0] / noise[0].std()).pow(4).mean() == pytest.approx(3, abs=0.3)  # kurtosis
    extremes = torch.tensor([[0.0], [1.0 - 2**-24]]).repeat(1, step.draws)
    assert step(images[:2], extremes).isfinite().all()


@pytest.mark.parametrize("name", ablation.TRANSFORMATIONS)
def test_transformations_treat_each_image_alone(name, squares):
    config = simclr.make_config(dataset="cifar10", image_size=20)
    augment = simclr.Augment(config.view_side, ablation.TRANSFORMATIONS[name](config))
    u = augment.draw(16, utils.generator("cpu", 0))
    together = augment(squares, u)
    for i in (0, 7):
        alone = augment(squares[i : i + 1], u[i : i + 1])
        assert torch.allclose(together[i], alone[0], atol=1e-6)


# ---------------------------------------------------------------------- variants and measurements


def make_run(config, **variant):
    data = simclr.load_data(config, CPU)
    config = simclr.resolve(config, data.pretrain, CPU)
    return ablation.Run(config, ablation.Variant(**variant), data, CPU)


@pytest.fixture
def run_of(tiny_config):
    """Makes a run of a variant on the digits."""
    return lambda **variant: make_run(tiny_config(epochs=1, precision="float32"), **variant)


def batches_of(run, epoch=0, start=0):
    return run.variant.batches(run.config, run.data.pretrain, run.device, epoch, start)


class Pixels(torch.nn.Module):
    """A model whose h and z are the pixels."""

    def forward(self, x):
        return x.flatten(1), x.flatten(1)


def test_one_branch_is_the_image_itself(run_of):
    run = run_of(branch=("rotate", "sobel"))
    whole = list(batches_of(run))
    x1, x2 = whole[0].chunk(2)
    order = torch.randperm(1437, generator=utils.generator("cpu", 0, simclr.SHUFFLE, 0))
    assert torch.equal(x2, run.data.pretrain.images[order[:300]].float() / 255)
    turned = torch.stack([ablation.sobel(x2.rot90(k, (-2, -1)), None) for k in range(4)])
    nearest = (turned - x1).abs().amax((2, 3, 4)).argmin(0)
    assert torch.allclose(turned[nearest, torch.arange(300)], x1, atol=1e-6)
    assert nearest.bincount().min() > 40
    assert torch.equal(whole[2], next(batches_of(run, start=2)))


def test_streamed_images_are_cropped_once_for_both_branches(photo_config):
    """Outside of the square that is cut out, the two views are the same crop, as in memory."""
    run = make_run(photo_config(12, batch_size=4, rotation=0.0), branch=("cutout",))
    assert run.data.pretrain.images is None
    whole = list(batches_of(run))
    for views in whole:
        x1, x2 = views.chunk(2)
        cut = (x1 != x2).any(1, keepdim=True)
        assert torch.equal(x1, x2.masked_fill(cut, 0.0))
        assert 1 / 8 < cut.float().mean() <= 1 / 4
    assert torch.equal(whole[1], next(batches_of(run, start=1)))
    assert not torch.equal(whole[0].sort(0)[0], next(batches_of(run, epoch=1)).sort(0)[0])


def test_two_passes_are_two_passes(run_of):
    run, variant = run_of(), ablation.Variant(passes=2)
    one, two = run.variant.model(run.config), variant.model(run.config)
    assert module_digest(one) == module_digest(two)
    views = next(batches_of(run))
    expected = torch.cat([one.train()(half)[1] for half in views.chunk(2)])
    assert torch.allclose(two.train()(views)[1], expected, atol=1e-6)
    assert not torch.allclose(one(views)[1], expected, atol=1e-3)


@pytest.mark.parametrize("loss", ["nt-xent", "nt-xent-dot"])
def test_the_contrastive_task_is_the_papers(run_of, monkeypatch, loss):
    """google-research/simclr, objective.py and run.py: the softmax is over logits_ab, (N, N)."""
    run = run_of(loss_function=loss)
    monkeypatch.setattr(ablation, "TASK_STEPS", 1)
    found = ablation.contrastive_task(Pixels(), run)
    views = next(batches_of(run, epoch=1))  # training sees epoch 0
    a, b = views.flatten(1).double().numpy().reshape(2, 300, -1)
    if loss == "nt-xent":
        a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    entropies, hits = [], []
    for hidden1, hidden2 in ((a, b), (b, a)):
        logits_ab = hidden1 @ hidden2.T / run.config.temperature
        probability = special.softmax(logits_ab, axis=1)
        entropies.append(-(probability * np.log(probability + 1e-8)).sum(1).mean())
        hits.append((logits_ab.argmax(1) == np.arange(300)).mean())
    assert found["entropy"] == pytest.approx(np.mean(entropies), abs=1e-3)
    assert found["contrastive_accuracy"] == pytest.approx(np.mean(hits), abs=2e-3)


@pytest.mark.parametrize("extra", ablation.EXTRAS)
def test_probes_know_what_was_done_to_a_view(run_of, extra):
    run = run_of(extra=extra)
    h, z, label = ablation.transformed_features(Pixels(), run, run.data.test, 1)
    n = 300 * ablation.PROBE_VIEWS
    assert (h.shape, z.shape, label.shape) == ((n, 768), (n, 768), (n,))
    assert label.bincount(minlength=2).min() > n / len(label.unique()) - 5 * math.sqrt(n)
    augment = simclr.make_augment(run.config)
    u = augment.draw(300, utils.generator("cpu", 0, simclr.LABELS, 1, 2))  # the third batch
    views = augment(run.data.test.images[:300], u)
    last = simclr.Augment(16, [ablation.EXTRAS[extra](run.config)])
    changed = last(views, last.draw(300, utils.generator("cpu", 0, simclr.LABELS, 1, 2, 1)))
    assert torch.allclose(h[600:900].view_as(views), changed, atol=1e-5)
    for view, got, choice in zip(views, changed, label[600:900].tolist(), strict=True):
        if extra == "rotation":
            assert torch.equal(got, view.rot90(choice, (-2, -1)))
        else:
            assert choice == (not torch.equal(got, view))


def test_an_mlp_learns_what_a_line_cannot(tiny_config):
    x = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] * x[:, 1] > 0).long()
    assert ablation.mlp_accuracy(x[:1500], y[:1500], x[1500:], y[1500:], tiny_config()) > 0.85


@pytest.mark.parametrize("how", [dict(branch=("cutout", "noise")), dict(passes=2, extra="noise")])
def test_a_resumed_run_ends_as_if_it_had_not_been_stopped(small_config, how):
    def trained(name):
        run = make_run(small_config(epochs=2, precision="float32", run=name), **how)
        return module_digest(run.pretrained())

    whole = trained("whole")
    interrupt(lambda: trained("parts"), 2)
    assert trained("parts") == whole


# -------------------------------------------------------------------------------- runs of a study


@pytest.fixture
def places(tmp_path):
    return ["--checkpoints", str(tmp_path / "c"), "--figures", str(tmp_path / "f")]


@pytest.fixture
def fast(monkeypatch):
    """Studies of two settings without training. Lists the (temperature, seed) that were done."""
    done = []

    def measure(run):
        config = run.config
        if config.temperature == 0.13:
            raise RuntimeError("out of\nmemory")
        done.append((config.temperature, config.seed))
        return {"linear": config.temperature, "knn": 0.5 + 0.01 * config.seed}

    for name, temperatures in dict(one=(0.11, 0.12), two=(0.12, 0.14), bad=(0.11, 0.13)).items():
        settings = [ablation.Setting(f"temperature={t}", {"temperature": t}, measure=measure)
                    for t in temperatures]  # fmt: skip
        study = ablation.Study("?", "-", lambda base, settings=settings: settings)
        monkeypatch.setitem(ablation.STUDIES, name, study)
    return done


def exit_code(argv):
    with pytest.raises(SystemExit) as left:
        ablation.main(argv)
    return left.value.code


def test_a_grid_is_done_once_shared_and_kept(fast, places, capsys, tmp_path):
    def rows(name):
        return rows_of(tmp_path / f"f/ablation/{name}.csv")

    ablation.main(["one", "--seeds", "2", *places])
    assert fast == [(0.11, 0), (0.12, 0), (0.11, 1), (0.12, 1)]
    assert "| temperature=0.12 | 12.0 ± 1.7" in capsys.readouterr().out
    one = rows("one")
    for seeds in (1, 2):  # fewer lose no results
        ablation.main(["one", "--seeds", str(seeds), *places])
        assert len(rows("one")) == 2 * seeds
    assert rows("one") == one
    assert len(fast) == 4
    ablation.main(["two", "--seeds", "1", *places])
    assert fast[4:] == [(0.14, 0)]
    two = rows("two")
    assert [row["setting"] for row in two] == ["temperature=0.12", "temperature=0.14"]
    assert two[0]["run"] == one[1]["run"] != two[1]["run"]
    assert (tmp_path / "c" / two[0]["run"] / "measure.json").exists()


def test_another_configuration_is_another_run(fast, places, capsys, tmp_path):
    ablation.main(["one", "--seeds", "1", *places])
    ablation.main(["one", "--seeds", "1", "--epochs", "5", "--run", "short", *places])
    assert len(fast) == len(list((tmp_path / "c/ablation").iterdir())) == 4
    assert (tmp_path / "f/ablation/short/one.csv").exists()


def test_a_failed_run_is_reported_and_the_others_are_done(fast, places, capsys, tmp_path):
    assert exit_code(["bad", "--seeds", "2", *places]) == 1
    err = capsys.readouterr().err
    assert "2 runs failed" in err
    assert "bad/temperature=0.13-seed1: out of memory\n" in err
    assert len(rows_of(tmp_path / "f/ablation/bad.csv")) == 2


def test_an_interrupted_grid_continues(fast, places, capsys, monkeypatch):
    real = ablation.run_job

    def stopped(job, *others):
        if len(fast) == 2:
            raise simclr.Interrupted(15)
        real(job, *others)

    monkeypatch.setattr(ablation, "run_job", stopped)
    assert exit_code(["one", "--seeds", "2", *places]) == 128 + 15
    assert "stopped and saved; continue with: " in capsys.readouterr().err
    monkeypatch.setattr(ablation, "run_job", real)
    ablation.main(["one", "--seeds", "2", *places])
    assert len(set(fast)) == len(fast) == 4


def test_a_run_that_another_process_does_is_left_to_it(fast, places, capsys, tmp_path):
    given = {"checkpoints": str(tmp_path / "c"), "figures": str(tmp_path / "f")}
    folder = ablation.make_jobs("one", given, 1)[0].config.folder
    with utils.run_lock(folder):
        ablation.main(["one", "--seeds", "1", *places])
    assert fast == [(0.12, 0)]
    assert "1 of 2 runs of one are left" in capsys.readouterr().out
    assert not (tmp_path / "f/ablation/one.png").exists()
    ablation.main(["one", "--seeds", "1", *places])
    assert len(fast) == 2
    assert (tmp_path / "f/ablation/one.png").exists()


@pytest.mark.parametrize(("argv", "message"), [
    ("temprature", "argument study: invalid choice: 'temprature'"),
    ("temperature --temperature 0.5", "the study temperature sets --temperature itself"),
    ("temperature --loss dcl", "the study temperature sets --loss itself"),
    ("temperature --seeds 0", "--seeds must be at least 1"),
])  # fmt: skip
def test_bad_input_is_one_line(capsys, tmp_path, places, argv, message):
    assert message in error_of(capsys, ablation.main, *argv.split(), *places)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_result_is_one_line(fast, places, capsys, tmp_path):
    ablation.main(["one", "--seeds", "1", *places])
    next((tmp_path / "c").rglob("measure.json")).write_text("{")
    error = error_of(capsys, ablation.main, "one", "--seeds", "1", *places)
    assert "measure.json is damaged; delete it" in error


# --------------------------------------------------------------------------- studies and verdicts


@pytest.mark.parametrize("dataset", ["digits", "cifar10", "folder"])
@pytest.mark.parametrize("name", ablation.STUDIES)
def test_every_study_is_possible_on_every_data_set(name, dataset):
    study, given = ablation.STUDIES[name], {"dataset": dataset}
    jobs = ablation.make_jobs(name, given, 2)
    settings = study.settings(ablation.make_base(given))
    names = [s.name for s in settings]
    assert len(set(names)) == len(names) == len(jobs) / 2
    assert len({job.result_file for job in jobs}) == len(jobs)
    assert study.draw in ablation.DRAWINGS
    assert set(study.metrics) <= set(ablation.METRICS)
    for _, better, worse, *metric in study.claims:
        for pattern in (better, worse):
            assert ablation.fnmatch.filter(names, pattern), pattern
        assert {*metric} <= {*study.metrics}
    if study.draw != "lines":
        known = {s.group or s.name for s in settings} | {ablation.COLOR}
        assert all(set(numbers) <= known for numbers in study.paper.values())


def results_of(images=1000, **values):
    """Results of settings with a list of values in %, one a seed."""
    settings = [ablation.Setting(n, {}, series=n, x=n, title=n) for n in values]
    rows = [
        {"setting": name, "seed": seed, "linear": value / 100, "test_images": images}
        for name, numbers in values.items()
        for seed, value in enumerate(numbers)
    ]
    return ablation.Results(settings, rows)


def study_of(**fields):
    return ablation.Study("?", "-", lambda base: [], **fields)


def verdict(study, **values):
    return ablation.verdict(study, results_of(**values))


def test_verdict_on_an_order():
    study = study_of(paper={"linear": {"a": 60.0, "b": 50.0, "c": 55.0}})
    text = verdict(study, a=[90, 92], b=[80, 81], c=[79, 79])
    assert text.startswith("Best here: a (paper: the same; next: b), better by 10.5 ± 0.7 points")
    assert "= 105 of 1,000 images, 2 seeds: significant." in text
    assert "From best to worst: 12.0 points (paper: 10.0). 2 of 3 pairs of settings are" in text
    assert verdict(study, a=[90], b=[90.6], c=[79]).startswith(
        "Best here: b (paper: a), better by 0.6 points = 6 of 1,000 images, one seed: "
        "not significant. Train longer, or with more seeds."
    )
    assert verdict(study, a=[90]) == "Too little was measured to compare."
    assert verdict(study_of(), a=[90], b=[80]).startswith("Best here: a (next: b), better by 10.0")


def test_verdict_on_claims():
    claims = tuple((f"a beats {b}, by 3 points", "a", b) for b in "bcde")
    text = verdict(study_of(claims=claims), a=[90, 92], b=[80, 81], c=[89, 93], d=[95, 96], e=[])
    lines = text.splitlines()
    assert lines[0].startswith("The paper: a beats b, by 3 points. Here: better by 10.5 ± 0.7 po")
    assert lines[1].endswith("2 seeds: not significant.")
    assert "Here: worse by 4.5 ± 0.7 points" in lines[2]
    assert lines[2].endswith("2 seeds: significant.")
    assert lines[3].endswith("Here: not measured.")
    text = verdict(study_of(claims=claims[:1]), a=[90], b=[80])
    assert text.endswith("one seed: significant, if other seeds agree.")


def test_the_table_has_the_sampling_error_of_few_test_images():
    few, many = (
        ablation.markdown(study_of(metrics=("linear",)), results_of(n, a=[89, 91], b=[90, 90]))
        for n in (400, 2000)
    )
    assert few.count("90.0 ± 2.1 ") == few.count("90.0 ± 1.5 ") == 1  # √(1.41² + 1.5²)
    assert many.count("90.0 ± 1.4 ") == many.count("90.0 ± 0.0 ") == 1


def test_few_images_make_a_difference_insignificant():
    """Two standard errors of a difference of accuracies near 0.9: 2.7 points for 1,000 images."""
    sides, values = (("a", "linear"), ("b", "linear")), dict(a=[91, 91.2], b=[89, 89.3])
    assert not ablation.compare(results_of(1000, **values), *sides)[0]
    assert ablation.compare(results_of(10_000, **values), *sides)[0]


def test_listing_estimates_the_time(fast, places, capsys, monkeypatch, tmp_path):
    for name in set(ablation.STUDIES) - {"one", "two"}:
        monkeypatch.delitem(ablation.STUDIES, name)
    ablation.main([*TINY, *places, "--seeds", "2"])
    out = capsys.readouterr().out
    assert "one                4 runs" in out
    assert "all                8 runs" in out
    assert list(tmp_path.iterdir()) == []
    assert not fast
    ablation.main(["one", *TINY, *places, "--seeds", "1"])
    ablation.main([*TINY, *places, "--seeds", "1"])
    assert "one                2 runs     done" in (out := capsys.readouterr().out)
    assert out.endswith("ablation_SimCLR.py two\n")  # the shortest that is left


def test_a_study_for_real(places, tmp_path, capsys, monkeypatch, few_digits):
    study = ablation.STUDIES["temperature"]

    def two(base):
        return [s for s in study.settings(base) if s.name in ("l2-tau0.5", "dot-tau10")]

    monkeypatch.setitem(ablation.STUDIES, "temperature", dataclasses.replace(study, settings=two))
    ablation.main(["temperature", "--seeds", "1", *TINY, "--batch-size", "50", *places])
    assert "of 1 pairs of settings are in the paper's order" in capsys.readouterr().out
    rows = rows_of(tmp_path / "f/ablation/temperature.csv")
    assert len(rows) == 2
    for row in rows:
        assert 0.5 < float(row["knn"]) <= 1
        assert 0.5 < float(row["linear"]) <= 1
        assert 0 < float(row["entropy"]) <= math.log(50) + 1e-5
        folder = tmp_path / "c" / row["run"]
        variant = json.loads((folder / "variant.json").read_bytes())
        assert variant["loss_function"] == row["loss_function"]
        assert load_run(folder / "last.pt").epoch == 1  # an ordinary run
