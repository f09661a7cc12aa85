"""A sample of hostile.py: a run or one line. `python tests/hostile.py` does all of it."""

import hostile
import utils


def check(outcomes):
    """Every trial survived, and there were some."""
    for outcome in outcomes:
        assert outcome.tried > 0, outcome.name
        assert not outcome.failures, "\n".join([outcome.name, *outcome.failures[:10]])


def test_images(no_figure):
    check(hostile.images())


def test_data_sets(no_figure):
    check(hostile.data_sets())


def test_command_lines():
    check(hostile.commands(tries=100))


def test_numbers():
    check(hostile.numbers())


def test_a_message_is_one_line_for_a_terminal():
    assert utils.one_line("a\nb\t c\x1b[31m \udcff", 100) == r"a b c\x1b[31m \udcff"
    assert len(utils.one_line("x" * 10**6, 50)) == 50
    assert utils.shown(10**5000) == "a int too large to print"
