"""Losses and transformations against oracles; how a grid of runs behaves; a study for real."""

import csv
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import ndimage
from torchvision.transforms.v2 import functional as TF

import ablation_SimCLR as ablation
import simclr
import utils
from conftest import ROOT

TINY = ["--epochs", "1", "--width", "0.125", "--batch-size", "300", "--device", "cpu"]


# ----------------------------------------------------------------------------------------- losses


def two_views(n=7, dim=5, seed=0):
    random = torch.Generator().manual_seed(seed)
    return (torch.randn(n, dim, generator=random, dtype=torch.float64) for _ in range(2))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def by_double_loop(z1, z2, term, mined):
    """Mean over the 2N views of term(u·v+, [u·v- …]), negatives from the other side (B.10)."""
    sides = [[v / v.norm() for v in z] for z in (z1, z2)]
    total, n = 0.0, len(z1)
    for side in (0, 1):
        for i in range(n):
            u = sides[side][i]
            cosines = [float(u @ v) for v in sides[1 - side]]
            positive = cosines.pop(i)
            if mined:
                farther = [c for c in cosines if c < positive]
                cosines = [max(farther) if farther else min(cosines)]
            total += term(positive, cosines)
    return total / (2 * n)


@pytest.mark.parametrize("mined", [False, True])
@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_nt_logistic_is_the_double_loop(mined, tau):
    z1, z2 = two_views()

    def term(positive, negatives):
        push = sum(math.log(sigmoid(-c / tau)) for c in negatives) / len(negatives)
        return -math.log(sigmoid(positive / tau)) - push

    got = ablation.nt_logistic(z1, z2, tau, 0.0, mined)
    assert got.item() == pytest.approx(by_double_loop(z1, z2, term, mined), abs=1e-12)


@pytest.mark.parametrize("mined", [False, True])
@pytest.mark.parametrize("margin", [0.0, 0.4, 1.6])
def test_margin_triplet_is_the_double_loop(mined, margin):
    z1, z2 = two_views(seed=1)

    def term(positive, negatives):
        return sum(max(c - positive + margin, 0) for c in negatives) / len(negatives)

    got = ablation.margin_triplet(z1, z2, 0.1, margin, mined)
    assert got.item() == pytest.approx(by_double_loop(z1, z2, term, mined), abs=1e-12)


def test_semi_hard_without_a_farther_negative():
    similarity = torch.tensor([[0.1, 0.5, 0.3], [0.9, 0.2, 0.4], [0.9, 0.1, 0.5]])
    negative = ~torch.eye(3, dtype=torch.bool)
    both = ablation.semi_hard(similarity.repeat(2, 1), negative.repeat(2, 1))
    assert both[:3, 0].tolist() == pytest.approx([0.3, 0.4, 0.1])  # no, no, 0.1 < 0.5


def test_dot_product_loss_is_the_double_loop():
    z1, z2 = two_views(seed=2)
    z, n, tau = torch.cat([z1, z2]), len(z1), 3.0
    total = 0.0
    for i in range(2 * n):
        others = [math.exp(float(z[i] @ z[k]) / tau) for k in range(2 * n) if k != i]
        total -= math.log(math.exp(float(z[i] @ z[(i + n) % (2 * n)]) / tau) / sum(others))
    got = ablation.LOSSES["nt-xent-dot"](z1, z2, tau, 0.0)
    assert got.item() == pytest.approx(total / (2 * n), abs=1e-12)


@pytest.mark.parametrize("name", ablation.LOSSES)
def test_losses_have_gradients_and_take_bfloat16(name):
    z1, z2 = (z.requires_grad_() for z in two_views(4, 3, seed=3))
    loss = ablation.LOSSES[name]
    assert torch.autograd.gradcheck(lambda a, b: loss(a, b, 0.5, 0.3), (z1, z2))
    assert loss(z1.bfloat16(), z2.bfloat16(), 0.5, 0.3).dtype == torch.float32


# -------------------------------------------------------------------------------- transformations


@pytest.fixture
def squares(images):
    """float32 (16, 3, 20, 20)."""
    return images[..., :20, :].contiguous()


def test_sobel_is_scipys(squares):
    got = ablation.Sobel()(squares, torch.empty(16, 0))
    x = squares.double().numpy()
    for i, channel in np.ndindex(16, 3):
        gradient = [ndimage.sobel(x[i, channel], axis=axis, mode="mirror") for axis in (0, 1)]
        expected = np.hypot(*gradient).clip(0, 4) / 4
        np.testing.assert_allclose(got[i, channel], expected, atol=1e-5)


def test_right_angles_are_torchvisions(squares):
    u = torch.tensor([[0.0], [0.2], [0.3], [0.5], [0.74], [0.75], [0.999], [0.26]])
    turns = [0, 0, 1, 2, 2, 3, 3, 1]
    step = ablation.RightAngle()
    assert step.turns(u).tolist() == turns
    for got, image, turn in zip(step(squares[:8], u), squares, turns, strict=False):
        assert torch.equal(got, TF.rotate(image, 90 * turn))


def test_cutout_blackens_one_square_of_half_the_side():
    images = torch.ones(200, 3, 20, 20)
    got = ablation.Cutout()(images, torch.rand(200, 2, generator=torch.Generator().manual_seed(0)))
    tops = set()
    for image in got:
        rows, columns = (image[0] == 0).nonzero().unbind(1)
        top, left = int(rows.min()), int(columns.min())
        assert torch.equal(image == 0, (TF.erase(torch.ones(3, 20, 20), top, left, 10, 10,
                                                 torch.zeros(3, 10, 10)) == 0))  # fmt: skip
        tops.add(top)
    assert tops == set(range(11))  # anywhere, each image at its own place


def test_noise_is_normal_with_its_own_deviation():
    step = ablation.GaussianNoise(32)
    images = torch.full((8, 3, 32, 32), 0.5)
    u = torch.rand(8, step.draws, generator=torch.Generator().manual_seed(0))
    noise = (step(images, u) - 0.5).flatten(1)
    sigma = ablation.NOISE * u[:, 0]
    assert torch.allclose(noise.std(1), sigma, rtol=0.05, atol=1e-3)
    assert (noise.mean(1).abs() < 4 * sigma / math.sqrt(3072) + 1e-6).all()
    kurtosis = (noise[0] / noise[0].std()).pow(4).mean()
    assert kurtosis == pytest.approx(3, abs=0.3)
    extremes = torch.tensor([[0.0], [1.0 - 2**-24]]).repeat(1, step.draws)
    assert step(images[:2], extremes).isfinite().all()


def test_sometimes_and_whole(squares):
    step = ablation.Sometimes(ablation.RightAngle())
    u = torch.tensor([[0.49, 0.3], [0.51, 0.3]])
    got = step(squares[:2], u)
    assert torch.equal(got[0], squares[0].rot90(1, (-2, -1)))
    assert torch.equal(got[1], squares[1])
    assert torch.equal(ablation.Whole(20)(squares, torch.empty(16, 0)), squares)


@pytest.mark.parametrize("name", ablation.TRANSFORMATIONS)
def test_transformations_treat_each_image_alone(name, squares):
    config = simclr.make_config(dataset="cifar10", image_size=20)
    augment = simclr.Augment(config.view_side, ablation.TRANSFORMATIONS[name](config))
    u = augment.draw(16, utils.generator("cpu", 0))
    together = augment(squares, u)
    assert together.shape == squares.shape
    for i in (0, 7):
        alone = augment(squares[i : i + 1], u[i : i + 1])
        assert torch.allclose(together[i], alone[0], atol=1e-6)


# --------------------------------------------------------------------------------- runs of a kind


def make_run(tiny_config, **fields):
    config = tiny_config(epochs=1, precision="float32")
    device = torch.device("cpu")
    data = simclr.load_data(config, device)
    config = simclr.resolve(config, data.pretrain, device)
    return ablation.AblationRun(config, data, device, ablation.Variant(**fields))


def test_one_branch_is_the_image_itself(tiny_config):
    run = make_run(tiny_config, branch=("rotate", "sobel"))
    views = next(run.batches())
    x1, x2 = views.chunk(2)
    order = torch.randperm(1437, generator=utils.generator("cpu", 0, simclr.SHUFFLE, 0))
    images = run.data.pretrain.images[order[:300]].float() / 255
    assert torch.equal(x2, images)
    candidates = torch.stack([
        ablation.Sobel()(images.rot90(k, (-2, -1)), torch.empty(300, 0)) for k in range(4)
    ])  # fmt: skip
    nearest = (candidates - x1).abs().amax((2, 3, 4)).argmin(0)
    assert torch.allclose(candidates[nearest, torch.arange(300)], x1, atol=1e-6)
    assert nearest.bincount().min() > 40
    run.position = simclr.Position(0, 2)
    resumed = next(run.batches())
    run.position = simclr.Position()
    assert torch.equal(list(run.batches())[2], resumed)


def test_two_passes_are_two_passes(tiny_config):
    one, two = make_run(tiny_config), make_run(tiny_config, passes=2)
    views = next(one.batches())
    assert utils.module_digest(one.model) == utils.module_digest(two.model)
    expected = [one.model.train()(half)[1] for half in views.chunk(2)]
    assert torch.allclose(two.model.train()(views)[1], torch.cat(expected), atol=1e-6)
    assert not torch.allclose(one.model(views)[1], torch.cat(expected), atol=1e-3)
    assert utils.module_digest(one.model) != utils.module_digest(
        two.model
    )  # one has had a third pass
    held = {id(p) for group in two.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in two.model.parameters()}


@pytest.mark.parametrize("extra", ablation.EXTRAS)
def test_probes_know_what_was_done_to_a_view(tiny_config, extra):
    run = make_run(tiny_config, extra=extra)
    job = ablation.Measured(run.config, run.variant, run.data, run.device)

    class Pixels(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1), x.mean((1, 2, 3))[:, None]

    h, z, label = ablation.transformed_features(Pixels(), job, run.data.test, extra, 1)
    n = 300 * ablation.PROBE_VIEWS
    assert (h.shape, z.shape, label.shape) == ((n, 768), (n, 1), (n,))
    assert label.bincount(minlength=2).min() > n / len(label.unique()) - 5 * math.sqrt(n)
    u = run.augment.draw(300, utils.generator("cpu", 0, simclr.LABELS, 1, 2))  # the third batch
    steps, own = run.augment.steps, run.augment.steps[-1].draws
    before = simclr.Augment(run.config.view_side, steps[:-1])
    views = before(run.data.test.images[:300], u[:, :-own])
    got, done = h[600:900].view_as(views), label[600:900]
    for i in range(300):
        one = views[i : i + 1]
        if extra == "rotation":
            expected = one.rot90(int(done[i]), (-2, -1))
        else:
            expected = steps[-1].step(one, u[i : i + 1, -own + 1 :]) if done[i] else one
        assert torch.allclose(got[i], expected[0], atol=1e-5)


def test_an_mlp_learns_what_a_line_cannot(tiny_config):
    x = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] * x[:, 1] > 0).long()
    found = ablation.mlp_accuracy(x[:1500], y[:1500], x[1500:], y[1500:], tiny_config())
    assert found > 0.85


# ------------------------------------------------------------------------------- the way of a grid


@pytest.fixture
def places(tmp_path):
    return ["--checkpoints", str(tmp_path / "c"), "--figures", str(tmp_path / "f")]


@pytest.fixture
def fast(monkeypatch):
    """Two settings instead of a study's many, and no training: counts the runs that were done."""
    done = []

    def measure(job):
        done.append(job.config.run)
        if job.config.temperature == 0.13:
            raise RuntimeError("out of\nmemory")
        return {"linear": job.config.temperature, "knn": 0.5 + 0.01 * job.config.seed, "loss": 1.0}

    monkeypatch.setitem(ablation.MEASURES, "representation", measure)

    def use(name, *temperatures):
        study = ablation.Study("?", "-", lambda base: ablation.grid(temperature=temperatures))
        monkeypatch.setitem(ablation.STUDIES, name, study)

    use("one", 0.11, 0.12)
    use("two", 0.12, 0.14)
    use("broken", 0.11, 0.13)
    return done


def test_a_grid_is_done_once_and_shared(fast, places, capsys, tmp_path):
    ablation.main(["one", "--seeds", "2", *places])
    assert fast == [f"ablation/one/temperature={t}-seed{s}" for s in (0, 1) for t in (0.11, 0.12)]
    assert "| temperature=0.12 | 12.0 ± 0.0" in capsys.readouterr().out
    ablation.main(["one", "--seeds", "2", *places])
    assert len(fast) == 4
    ablation.main(["two", "--seeds", "1", *places])
    assert fast[4:] == ["ablation/two/temperature=0.14-seed0"]
    with open(tmp_path / "f/ablation/two.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == [
        "ablation/one/temperature=0.12-seed0", "ablation/two/temperature=0.14-seed0"
    ]  # fmt: skip
    ablation.main(["two", "--dry-run", *places])
    out = capsys.readouterr().out
    assert "shared with ablation/one/temperature=0.12-seed0" in out
    assert out.count("to do") == 3  # seed 2 of both, and seed 1 of one
    assert len(fast) == 5


def test_fewer_seeds_lose_no_rows(fast, places, tmp_path):
    ablation.main(["one", "--seeds", "3", *places])
    before = (tmp_path / "f/ablation/one.csv").read_text()
    ablation.main(["one", "--seeds", "1", *places])
    after = (tmp_path / "f/ablation/one.csv").read_text()
    assert sorted(after.splitlines()) == sorted(before.splitlines())


def test_a_failed_run_is_reported_and_the_others_are_done(fast, places, capsys, tmp_path):
    with pytest.raises(SystemExit) as left:
        ablation.main(["broken", "--seeds", "2", *places])
    assert left.value.code == 1
    err = capsys.readouterr().err
    assert "2 runs failed" in err
    assert "ablation/broken/temperature=0.13-seed1: out of memory\n" in err
    assert len((tmp_path / "f/ablation/broken.csv").read_text().splitlines()) == 3


def test_an_interrupted_grid_continues(fast, places, capsys, monkeypatch, tmp_path):
    measure = ablation.MEASURES["representation"]

    def stopped(job):
        if len(fast) == 2:
            raise simclr.Interrupted(15)
        return measure(job)

    monkeypatch.setitem(ablation.MEASURES, "representation", stopped)
    with pytest.raises(SystemExit) as left:
        ablation.main(["one", "--seeds", "2", *places])
    assert left.value.code == 128 + 15
    assert "the same command continues" in capsys.readouterr().err
    monkeypatch.setitem(ablation.MEASURES, "representation", measure)
    ablation.main(["one", "--seeds", "2", *places])
    assert len(set(fast)) == len(fast) == 4


@pytest.mark.parametrize(
    "fields", [dict(branch=("cutout", "noise")), dict(passes=2, extra="noise")]
)
def test_a_resumed_run_ends_as_if_it_had_not_been_stopped(small_config, fields):
    def made(name):
        config = small_config(epochs=2, precision="float32", run=name, knn_every=0)
        config = simclr.resolve(config, data.pretrain, device)
        return ablation.AblationRun(config, data, device, ablation.Variant(**fields))

    device = torch.device("cpu")
    data = simclr.load_data(small_config(), device)
    whole, first, second = made("whole"), made("parts"), made("parts")
    whole.train()
    first.checkpoint.parent.mkdir(parents=True)
    position = first.position
    simclr.train_epoch(
        first.model, first.optimizer, first.batches(), first.rate, first.loss, "float32", position,
        lambda: position.step == 2,
    )  # fmt: skip
    first.save()
    assert second.resume()
    assert second.position.step == 2
    second.train()
    assert utils.module_digest(second.model) == utils.module_digest(whole.model)


def test_shards_do_disjoint_parts_and_the_last_draws(fast, places, capsys, tmp_path):
    ablation.main(["one", "--shard", "2/2", *places])
    assert len(fast) == 3
    assert "3 of 6 runs of one are left" in capsys.readouterr().out
    assert not (tmp_path / "f/ablation/one.png").exists()
    ablation.main(["one", "--shard", "1/2", *places])
    assert len(set(fast)) == len(fast) == 6
    assert (tmp_path / "f/ablation/one.png").exists()


def test_a_run_that_another_process_does_is_left_to_it(fast, places, capsys, tmp_path):
    given = {"checkpoints": str(tmp_path / "c"), "figures": str(tmp_path / "f")}
    job = ablation.make_jobs("one", given, 1)[0]
    hold = (
        "import sys; sys.path.insert(0, sys.argv[1]); import fcntl, time\n"
        "file = open(sys.argv[2], 'w'); fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True); time.sleep(60)"
    )
    lock = job.place.with_suffix(".lock")
    lock.parent.mkdir(parents=True)
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(ROOT), str(lock)], stdout=subprocess.PIPE
    )
    try:
        holder.stdout.readline()
        ablation.main(["one", "--seeds", "1", *places])
        assert fast == ["ablation/one/temperature=0.12-seed0"]
        assert "1 of 2 runs of one are left" in capsys.readouterr().out
    finally:
        holder.kill()
        holder.wait()
    ablation.main(["one", "--seeds", "1", *places])  # the lock died with its holder
    assert len(fast) == 2


def test_redraw_needs_nothing_but_the_csv(fast, places, capsys, tmp_path):
    ablation.main(["one", *places])
    table = capsys.readouterr().out.split("\n\n")[-3:]
    (tmp_path / "f/ablation/one.png").unlink()
    (tmp_path / "c").rename(tmp_path / "elsewhere")
    ablation.main(["one", "--redraw", *places])
    assert capsys.readouterr().out.split("\n\n")[-3:] == table
    assert (tmp_path / "f/ablation/one.png").exists()
    assert len(fast) == 6


def test_another_configuration_is_refused(fast, places, capsys, tmp_path):
    ablation.main(["one", "--seeds", "1", *places])
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    capsys.readouterr()
    for argv in (["one", "--epochs", "5"], ["one", "--redraw", "--lr", "0.5"]):
        with pytest.raises(SystemExit) as left:
            ablation.main([*argv, *places])
        assert left.value.code == 2
        assert "one.csv holds results of --dataset digits --epochs 30, not of" in (
            capsys.readouterr().err
        )
    (tmp_path / "f/ablation/one.csv").unlink()
    with pytest.raises(SystemExit):
        ablation.main(["one", "--epochs", "5", *places])
    err = capsys.readouterr().err
    assert "--epochs (30 there, 5 now)" in err
    assert "temperature=0.11-seed0 holds a run" in err
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == {
        p: content for p, content in before.items() if p.name != "one.csv"
    }
    ablation.main(["one", "--epochs", "5", "--run", "short", "--seeds", "1", *places])
    assert (tmp_path / "f/ablation/short/one.csv").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("temprature", "unknown study 'temprature'; there are "),
        ("temperature --temperature 0.5", "the study temperature sets --temperature itself"),
        ("all --temperature 0.5", "sets --temperature itself"),
        ("temperature --shard 5/4", "--shard must be i/n with i from 1 to n"),
        ("temperature --shard 0/4", "--shard must be i/n"),
        ("temperature --shard half", "--shard must be i/n"),
        ("temperature --seeds 0", "--seeds must be at least 1"),
        ("temperature --epochs 0", "--epochs must be at least 1"),
        ("temperature --epoch 3", "unrecognized arguments"),
        ("temperature --redraw", "there are no results in"),
        ("temperature --run ../x", "--run must be a plain name"),
        ("--redraw", "--redraw goes with a study"),
    ],
)
def test_bad_input_is_one_line(capsys, tmp_path, places, argv, message):
    with pytest.raises(SystemExit) as left:
        ablation.main([*argv.split(), *places])
    assert left.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("ablation_SimCLR.py: error: ")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "nonsense\n1\n", "setting,seed,base\na,b,c\n", "\x00"])
def test_a_damaged_csv_is_not_overwritten(fast, places, capsys, tmp_path, content):
    file = tmp_path / "f/ablation/one.csv"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    with pytest.raises(SystemExit) as left:
        ablation.main(["one", *places])
    assert left.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert file.read_text() == content
    assert not fast


# --------------------------------------------------------------------------- studies and reading


@pytest.mark.parametrize("dataset", ["digits", "cifar10", "folder"])
@pytest.mark.parametrize("name", ablation.STUDIES)
def test_every_study_is_possible_on_every_data_set(name, dataset):
    study, given = ablation.STUDIES[name], {"dataset": dataset}
    jobs = ablation.make_jobs(name, given, 2)
    settings = study.settings(ablation.make_base(given))
    names = [s.name for s in settings]
    assert len(set(names)) == len(names) == len(jobs) / 2
    assert len({(job.digest, job.measure, *job.arguments.values()) for job in jobs}) == len(jobs)
    assert study.draw in ablation.DRAWINGS
    for metric in study.metrics:
        assert metric in ablation.METRICS
    for claim in study.claims:
        for pattern, metric in (claim.better, claim.worse):
            assert ablation.fnmatch.filter(names, pattern), pattern
            assert metric in study.metrics
    if study.draw != "lines":
        known = {s.group or s.name for s in settings} | {ablation.COLOR}
        assert all(set(numbers) <= known for numbers in study.paper.values())


def results_of(**values):
    """Results of settings with a list of values in %, one a seed."""
    settings = [ablation.Setting(name, {}) for name in values]
    rows = [
        {"setting": name, "seed": seed, "linear": value / 100}
        for name, numbers in values.items()
        for seed, value in enumerate(numbers)
    ]
    return ablation.Results(settings, rows)


def study_of(**fields):
    return ablation.Study("?", "-", lambda base: [], **fields)


def test_reading_of_an_order():
    study = study_of(paper={"linear": {"a": 60.0, "b": 50.0, "c": 55.0}})
    text = ablation.read(study, results_of(a=[90, 92], b=[80, 81], c=[79, 79]))
    assert text.startswith("2 of 3 pairs of settings are in the paper's order")
    assert "our best is a, as in the paper; from best to worst it is +12.0 ± 1.4 points" in text
    assert "more than the seeds' spread (the paper: 10.0)" in text
    text = ablation.read(study, results_of(a=[90, 92], b=[91, 93], c=[79, 79]))
    assert (
        "our best is b, by +1.0 ± 0.0 points, more than the seeds' spread, over a, the paper's"
        in text
    )
    assert "Too little" in ablation.read(study, results_of(a=[90]))


def test_reading_of_claims():
    claims = tuple(
        ablation.Claim(f"a beats {b}", ("a", "linear"), (b, "linear"), "3") for b in "bcde"
    )
    results = results_of(a=[90, 92], b=[80, 81], c=[89, 93], d=[95, 96], e=[])
    text = ablation.read(study_of(claims=claims), results)
    assert "a beats b (paper: 3): agrees, +10.5 ± 0.7 points, more than" in text
    assert "a beats c (paper: 3): not seen, +0.0 ± 1.4 points, within" in text
    assert "a beats d (paper: 3): the contrary, -4.5 ± 0.7 points" in text
    assert text.endswith("a beats e: not measured.")
    text = ablation.read(study_of(claims=claims[:1]), results_of(a=[90], b=[80]))
    assert "agrees, but not clearly, +10.0 points (one seed)" in text


def test_a_search_shows_the_best_of_each_group_by_selection():
    settings = [ablation.Setting(n, {}, group=g) for n, g in (("p", "A"), ("q", "A"), ("r", "B"))]
    rows = [
        {"setting": n, "seed": 0, "selection": s, "linear": t}
        for n, s, t in (("p", 0.8, 0.9), ("q", 0.9, 0.7), ("r", 0.5, 0.6))
    ]
    assert [s.name for s in ablation.Results(settings, rows).best().settings] == ["q", "r"]


def test_listing_estimates_the_time(fast, places, capsys, monkeypatch, tmp_path):
    for name in set(ablation.STUDIES) - {"one", "two"}:
        monkeypatch.delitem(ablation.STUDIES, name)
    ablation.main([*TINY, *places, "--seeds", "2"])
    out = capsys.readouterr().out
    assert "one                4 runs" in out
    assert "all" in out
    assert list(tmp_path.iterdir()) == []
    assert not fast
    ablation.main(["two", *places, "--seeds", "1"])  # with other settings: in the way
    capsys.readouterr()
    ablation.main([*TINY, *places, "--seeds", "1"])
    out = capsys.readouterr().out
    assert "one                2 runs" in out
    assert "two                – runs        –" in out
    assert "holds a run with another configuration" in out


# -------------------------------------------------------------------------------------- for real


def test_a_study_for_real(places, tmp_path, capsys, monkeypatch, few_digits):
    study = ablation.STUDIES["temperature"]

    def two(base):
        return [s for s in study.settings(base) if s.name in ("l2-tau0.5", "dot-tau10")]

    small = ablation.dataclasses.replace(study, settings=two)
    monkeypatch.setitem(ablation.STUDIES, "temperature", small)
    ablation.main(["temperature", "--seeds", "1", *TINY, "--batch-size", "50", *places])
    out = capsys.readouterr().out
    assert "of 1 pairs of settings are in the paper's order" in out
    with open(tmp_path / "f/ablation/temperature.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    for row in rows:
        assert 0.5 < float(row["knn"]) <= 1
        assert 0.5 < float(row["linear"]) <= 1
        assert 0 < float(row["entropy"]) <= math.log(99)
        folder = tmp_path / "c" / row["run"]
        state = utils.load_checkpoint(folder / "last.pt")  # an ordinary run
        assert state["variant"]["loss_function"] == (row["loss_function"] or "nt-xent")
        assert simclr.load_run(folder / "last.pt").epoch == 1
