"""What is read off the replies of a load: seconds a token."""

import pytest

from benchmarks.load import Reply, late_tpot, percentile, steady_tpot


def test_late_tpot_leaves_out_what_came_in_a_bunch():
    reply = Reply(asked=0.0, times=[9.0, 9.001, 9.002, 10.0, 12.0], counts=[1, 1, 1, 1, 3])
    assert late_tpot(reply) == pytest.approx((12.0 - 9.002) / 4)


def test_steady_tpot_counts_only_while_all_decode():
    early = Reply(asked=0.0, times=[1.0, 2.0, 3.0, 4.0, 5.0], counts=[1] * 5)
    late = Reply(asked=0.0, times=[3.0, 3.5, 4.0], counts=[1, 1, 2])
    assert steady_tpot([early]) == 1.0
    assert steady_tpot([early, late]) == pytest.approx((1.0 + 1 / 3) / 2)
    assert percentile([3.0, 1.0, 2.0], 0.99) == 3.0
