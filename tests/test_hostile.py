"""A sample of hostile.py: whatever is given, a run or one line, and nothing executed or lost.

`python tests/hostile.py` does all of it.
"""

import io
import sys
import threading

import pytest
import torch

import hostile
import simclr
import utils
from utils import InputError


def check(outcomes):
    """Every trial survived, and there were some."""
    for outcome in outcomes:
        assert outcome.tried > 0, outcome.name
        assert not outcome.failures, "\n".join([outcome.name, *outcome.failures[:10]])
        assert outcome.survived == outcome.tried


def test_checkpoints():
    pytest.importorskip("hypothesis")
    check(hostile.checkpoints(tries=5, every=25))


def test_torch_reads_nothing_that_was_not_looked_at():
    with hostile.temporary() as folder:
        base = hostile.Base(folder)
        cases = hostile.as_file_cases(base)
        for what in ("a pickle", "a directory"):
            base.file.write_bytes(cases[f"{what} that torch alone finds"])
            assert base.judge(hostile.ALL, "refused") == ""


def test_images(no_figure):
    check(hostile.images(every=4))


def test_data_sets():
    check(hostile.data_sets(runs=False))


def test_command_lines():
    pytest.importorskip("hypothesis")
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


def test_a_run_that_cannot_fit_is_refused(tiny_config, monkeypatch):
    """What is counted is less than the run takes, and more than half of it where it is large."""
    cpu = torch.device("cpu")
    config = tiny_config(image_size=16, precision="float32", stem="small", optimizer="sgd")
    weights = sum(p.nbytes for p in simclr.make_model(config).parameters())
    views = 2 * config.batch_size * (3 * 16**2 + 8 * 16**2) * 4  # 8 = 64 / 8 channels
    for enough in (True, False):
        monkeypatch.setattr(utils, "memory_of", lambda _: 3 * weights + views - (not enough))  # noqa: B023
        if enough:
            simclr.check_memory(config, 1000, cpu)
        else:
            with pytest.raises(InputError, match="needs more than 0 GiB of memory, and cpu has 0"):
                simclr.check_memory(config, 1000, cpu)


def test_large_images_are_embedded_in_small_batches():
    sizes = []

    def encoder(x):
        sizes.append(len(x))
        return x.flatten(1)[:, :2]

    images = utils.ImageSet(torch.zeros(20, 3, 8, 8, dtype=torch.uint8))
    utils.embed(encoder, images, 448, torch.device("cpu"), batch_size=16)
    assert sizes == [4] * 5
    sizes.clear()
    utils.embed(encoder, images, 224, torch.device("cpu"), batch_size=16)
    assert sizes == [16, 4]


def test_workers_are_as_many_as_the_machine_can_use(monkeypatch):
    monkeypatch.setattr(utils, "cpu_cores", lambda: 2)
    assert [utils.worker_count(n) for n in (-1, 0, 3, 10_000)] == [2, 0, 2, 2]


def test_torchs_own_checkpoints_pass_as_they_are(tmp_path):
    """What a checkpoint may name covers what torch saves of tensors and plain types."""
    state = {
        "tensors": [torch.zeros(2, dtype=kind) for kind in (torch.half, torch.int8, torch.bool)],
        "view": torch.arange(9.0).view(3, 3).T, "parameter": torch.nn.Parameter(torch.ones(2)),
        "plain": (1, 2.5, None, True, "text", {"a": [torch.Size([1]), torch.float32]}),
        "optimizer": torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1).state_dict(),
    }  # fmt: skip
    for new in (True, False):
        buffer = io.BytesIO()
        torch.save(state, buffer, _use_new_zipfile_serialization=new)
        (tmp_path / "x.pt").write_bytes(buffer.getvalue())
        again = utils.load_checkpoint(tmp_path / "x.pt")
        assert again["plain"] == state["plain"]
        assert torch.equal(again["view"], state["view"])
