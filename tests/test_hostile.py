"""A sample of hostile.py: a run or one line, and nothing executed or lost.

`python tests/hostile.py` does all of it.
"""

import sys
import threading

import pytest
import torch

import hostile
import utils


def check(outcomes):
    """Every trial survived, and there were some."""
    for outcome in outcomes:
        assert outcome.tried > 0, outcome.name
        assert not outcome.failures, "\n".join([outcome.name, *outcome.failures[:10]])


def test_checkpoints():
    check(hostile.checkpoints(every=8))


def test_images(no_figure):
    check(hostile.images(every=4))


def test_data_sets():
    check(hostile.data_sets(runs=False))


def test_command_lines():
    check(hostile.commands(tries=150))


def test_numbers():
    check(hostile.numbers())


# -------------------------------------------------------------------- the judge itself, and details


def says(text, code):
    def call():
        print(text, file=sys.stderr, end="")
        raise SystemExit(code)

    return call


@pytest.mark.parametrize(
    ("call", "how"),
    [
        (lambda: 1, "run"),
        (says("x.py: error: y\n", 2), "refused"),
        (says("warning: z\nx.py: error: y\n", 2), "refused"),
        (says("x.py: error: y\nmore\n", 2), "broken"),
        (says("x.py: error: y\n", 1), "broken"),
        (lambda: {}["x"], "broken"),
        (lambda: print("careful", file=sys.stderr), "broken"),
        (lambda: hostile.warnings.warn("stray", stacklevel=1), "broken"),
        (lambda: bytearray(b"1") * (800 * 2**20), "broken"),
    ],
)
def test_the_judge_sees_what_is_wrong(call, how):
    trial = hostile.attempt(call)
    assert trial.how == how, trial.text


def test_what_would_run_code_does_so_for_pickle(tmp_path):
    """Else a canary that stays away would prove nothing."""
    canary = tmp_path / "canary"
    content = hostile.pickle.dumps(hostile.Calls(hostile.os.system, f"touch {canary}"))
    hostile.pickle.loads(content)
    assert canary.exists()


def test_a_message_is_one_line_for_a_terminal():
    assert utils.one_line("a\nb\t c\x1b[31m \udcff", 100) == r"a b c\x1b[31m \udcff"
    assert len(utils.one_line("x" * 10**6, 50)) == 50
    assert utils.shown(10**5000) == "a int too large to print"


def test_images_are_opened_by_several_threads(tmp_path, write_image):
    """The filter of warnings is left as it was."""
    files = [write_image(tmp_path / f"{i}.png", seed=i) for i in range(8)]
    before = list(hostile.warnings.filters)
    threads = [
        threading.Thread(target=lambda: [utils.read_image(file) for file in files * 20])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert hostile.warnings.filters == before


def test_large_images_are_embedded_in_small_batches():
    sizes = []

    def encoder(x):
        sizes.append(len(x))
        return x.flatten(1)[:, :2]

    images = utils.ImageSet(torch.zeros(20, 3, 8, 8, dtype=torch.uint8))
    for size, expected in ((448, [4] * 5), (224, [16, 4])):
        sizes.clear()
        utils.embed(encoder, images, size, torch.device("cpu"), batch_size=16)
        assert sizes == expected


def test_workers_are_as_many_as_the_machine_can_use(monkeypatch):
    monkeypatch.setattr(utils, "cpu_cores", lambda: 2)
    assert [utils.worker_count(n) for n in (-1, 0, 3, 10_000)] == [2, 0, 2, 2]
