"""The counts by which answers on a GPU are judged."""

import pytest

from tests.support.judge import RATIO, Seen


def test_counts_add_up() -> None:
    seen = Seen(64, 9, 10, 1, [(5, 3, 7.0)]) + Seen(64, 12, 10, 0, [])
    assert seen == Seen(128, 21, 20, 1, [(5, 3, 7.0)])


def test_a_clear_choice_that_is_missed_fails_whatever_the_counts() -> None:
    with pytest.raises(AssertionError, match="missed"):
        Seen(64, 1, 10, 1, [(5, 3, 7.0)]).check()


def test_many_more_others_than_in_bf16_fail() -> None:
    assert Seen(640, int(RATIO * 100), 100).check().startswith("120 of 640")
    with pytest.raises(AssertionError):
        Seen(640, int(RATIO * 100) + 1, 100).check()
