"""What happens when memory runs out, and what an iteration keeps in memory."""

from __future__ import annotations

import logging

import pytest
import torch

from flowbench.errors import RunError
from flowbench.models.counting import Evaluations
from flowbench.models.memory import Portion


class Device:
    """Has room for so many rows at a time."""

    def __init__(self, room: int, error: Exception | None = None) -> None:
        self.room, self.error, self.tried = room, error or torch.OutOfMemoryError("CUDA out of memory."), []

    def work(self, rows: slice) -> list[int]:
        self.tried.append((rows.start, rows.stop))
        if rows.stop - rows.start > self.room:
            raise self.error
        return [*range(rows.start, rows.stop)]


def test_a_portion_that_runs_out_of_memory_is_halved_alone_and_all_later_ones_are_smaller(
    caplog: pytest.LogCaptureFixture,
):
    device, portion = Device(3), Portion("decoding", 4)
    with caplog.at_level(logging.WARNING):
        parts = [*portion.map(device.work, 7)]
    assert parts == [[0, 1], [2, 3], [4, 5], [6]]
    assert device.tried == [(0, 4), (0, 2), (2, 4), (4, 6), (6, 7)]
    assert caplog.messages == ["out of memory: decoding goes on with 2 images at a time instead of 4"]
    assert [*portion.map(device.work, 3)] == [[0, 1], [2]]


def test_without_a_size_all_rows_are_done_at_once():
    assert [*Portion("decoding", None).map(Device(9).work, 9)] == [[*range(9)]]
    assert [*Portion("decoding", None).map(Device(9).work, 0)] == []


def test_groups_are_never_cut_apart():
    device = Device(4)
    assert [*Portion("the rollout").map(device.work, 10, groups=[2, 2, 4, 1, 1])] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9],
    ]
    assert [*Portion("the rollout", 1).map(device.work, 6, groups=[2, 4])] == [[0, 1], [2, 3, 4, 5]]
    with pytest.raises(RunError, match=r"the rollout does not fit even with 4 images that belong together at a time"):
        [*Portion("the rollout").map(Device(3).work, 8, groups=[2, 2, 4])]


def test_what_does_not_fit_in_the_smallest_portion_is_said_with_the_remedy():
    with pytest.raises(RunError, match="out of memory: decoding does not fit even with one of its images") as raised:
        [*Portion("decoding", 2).map(Device(0).work, 3)]
    assert "--memory-limit" in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("anything"),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        MemoryError(),
    ],
)
def test_every_kind_of_exhausted_memory_is_recognised(error: Exception):
    assert [*Portion("decoding", None).map(Device(1, error).work, 2)] == [[0], [1]]


def test_other_errors_are_passed_on():
    with pytest.raises(RuntimeError, match="shapes"):
        [*Portion("decoding", None).map(Device(1, RuntimeError("shapes do not match")).work, 2)]


def test_work_that_adds_to_one_state_is_taken_back_and_done_again_from_the_beginning():
    device, done = Device(3), []

    def work(size: int) -> int:
        for start in range(0, 8, size):
            done.extend(device.work(slice(start, start + size)))
            device.room = 2  # the second part finds less room than the first
        return len(done)

    portion = Portion("the update", 4, "rows")
    device.room = 4
    assert portion.whole(work, 8, undo=done.clear) == 8
    assert (done, portion.size) == ([*range(8)], 2)
    with pytest.raises(RunError, match="even with 4 rows that belong together"):
        portion.whole(lambda size: device.work(slice(0, 4)), 8, smallest=4)


def test_an_attempt_that_runs_out_of_memory_is_not_counted():
    device, ledger = Device(3), Evaluations()

    def work(rows: slice) -> list[int]:
        ledger.add(rows.stop - rows.start, trained=True, graded=True)
        return device.work(rows)

    portion = Portion("the update", 4, "rows", ledger)
    assert [*portion.map(work, 4)] == [[0, 1], [2, 3]]
    assert ledger.counts == {"training": 4, "backward": 4}
    device.room, portion.size = 2, 4

    def whole(size: int) -> int:
        return sum(len(work(slice(start, start + size))) for start in range(0, 4, size))

    assert portion.whole(whole, 4) == 4
    assert ledger.counts == {"training": 8, "backward": 8}


def test_velocities_are_counted_by_the_outermost_purpose():
    ledger = Evaluations()
    ledger.add(2, trained=False, graded=False)
    with ledger.counted_as("dev"), ledger.counted_as("sampling"):
        ledger.add(3, trained=True, graded=False)
    with ledger.counted_as("sampling"):
        ledger.add(5, trained=False, graded=False)
    assert ledger.counts == {"reference": 2, "dev": 3, "sampling": 5}
    assert ledger.total == 7
