"""Names at the ends of lines do not overlap and keep their order."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from linbench.report.labels import spread


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40).map(sorted), st.floats(0.001, 0.2))
def test_names_keep_their_order_and_their_distance(wanted, gap):
    placed = spread(wanted, gap)
    least = min(gap, 1 / max(len(wanted) - 1, 1))
    assert all(after - before >= least - 1e-9 for before, after in pairwise(placed))
    assert -1e-9 <= placed[0] <= placed[-1] <= 1 + 1e-9


def test_names_that_have_room_stay_where_their_lines_end():
    assert spread([0.1, 0.5, 0.9], 0.05) == pytest.approx([0.1, 0.5, 0.9])


def test_names_that_collide_share_the_room_around_them():
    assert spread([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])
