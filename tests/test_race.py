"""The race works: a tiny form of it, whose figures mean nothing."""

import pytest

import race
import utils
from conftest import error_of

FLAGS = "--dataset digits --width 0.125 --batch-size 100 --view-size 12 --device cpu --points 2"


@pytest.mark.filterwarnings("ignore")  # of worker processes
def test_both_loops_race_and_are_drawn(tmp_path, few_digits):
    results, figure = tmp_path / "sub" / "race.jsonl", tmp_path / "race.png"
    common = [*FLAGS.split(), "--rotation", "0", "--results", str(results)]
    race.main([*common, "--steps", "3"])
    race.main([*common, "--steps", "3"])
    race.main([*common, "--minutes", "0.002", "--seed", "1", "--view-size", "16"])
    race.main([*common, "--steps", "3", "--loop", "usual"])
    race.main([*common, "--steps", "1", "--points", "9"])  # a step may make several due
    ours, again, clock, usual, short = utils.read_jsonl(results)
    assert (short["steps"], [point[0] for point in short["curve"]]) == (1, [1.0])
    assert ours["curve"] == again["curve"]
    for row in (ours, usual):
        assert (row["steps"], row["by_clock"]) == (3, False)
        assert [point[0] for point in row["curve"]] == [0.6667, 1.0]
        assert row["knn"] == row["curve"][-1][1] > 0.2
        assert row["linear"] > 0.2
    assert usual["precision"] == "float32"
    assert clock["by_clock"]
    assert clock["curve"][-1][0] >= 1
    assert clock["seed"] == 1
    race.main(["--draw", str(figure), "--results", str(results)])
    assert figure.stat().st_size > 10_000
    lines = race.draw([ours, again, clock, usual]).legends[0].get_texts()
    assert len(lines) == 3  # two of them are one race by two seeds


def test_the_rate_follows_the_race():
    config = race.simclr.make_config(
        dataset="digits", epochs=10, warmup_epochs=1.0, lr=2.0, lr_scaling="none"
    )
    rates = [race.rate(config, progress) for progress in (0.0, 0.05, 0.1, 0.55, 1.0)]
    assert rates == pytest.approx([0.0, 1.0, 2.0, 1.0, 0.0], abs=1e-3)


@pytest.mark.parametrize(("flags", "message"), [
    ("--minutes 0", "--minutes must be positive"),
    ("--points 0", "--points 1 or more"),
    ("--loop best", "invalid choice: 'best'"),
    ("--loop usual --steps 1", "no blur and no rotation"),  # the digits' recipe rotates
    ("--draw x.png", "race.jsonl yet"),
])  # fmt: skip
def test_bad_input_is_one_line(flags, message, capsys, tmp_path):
    common = ("--results", tmp_path / "race.jsonl", "--device", "cpu")
    assert message in error_of(capsys, race.main, *flags.split(), *common)
