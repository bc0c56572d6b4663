"""What malloc takes for blocks that come and go, against sizes worked by hand."""

import sys

import pytest

from trainer.plan import glibc

MIB = 2**20
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's")


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([(0, 100 * MIB), (0, 0), (1, 100 * MIB), (1, 0)], 100 * MIB),
        ([(0, 100 * MIB), (1, 50 * MIB), (0, 0), (1, 0)], 150 * MIB),
        # Once a block of 20 MiB was freed, smaller ones lie in the heap: a ninth keeps it from shrinking when 16 MiB
        # below it are freed, and 17 MiB find no room there.
        (
            [(10, 20 * MIB), (10, 0), *[(i, 2 * MIB) for i in range(9)], *[(i, 0) for i in range(8)], (9, 17 * MIB)],
            35 * MIB,
        ),
    ],
    ids=["one after the other", "at once", "a heap with a hole"],
)
def test_blocks_take_what_they_are_and_the_holes_between_them(events, expected):
    assert glibc.footprint_bytes(events) == pytest.approx(expected, rel=0.01)


def test_a_machine_that_gives_no_memory_is_no_reason_to_fail():
    assert glibc.footprint_bytes([(0, 2**62)]) is None
