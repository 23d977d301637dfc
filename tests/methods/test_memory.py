"""Queues and memories: what is written where, what is found, and that nothing changes where a step does not count."""

import pytest
import torch
import torch.nn.functional as F

from methods.memory import NEVER, Memory, Queue, largest
from tests.twins import random


def keys_of(first: int, count: int) -> torch.Tensor:
    """Two views (2, count, 3) whose numbers tell them apart."""
    return torch.arange(first, first + 6 * count, dtype=torch.float32).view(2, count, 3)


def test_pieces_of_a_queue_are_written_view_by_view_and_wrap():
    whole, pieces = Queue(3, 10), Queue(3, 10)
    pieces.load_state_dict(whole.state_dict())
    before = whole.queue.clone()
    for step in range(3):
        keys = keys_of(100 * step, 4)
        whole.collect(keys)
        for part in keys.split((1, 3), dim=1):
            pieces.collect(part)
        whole.commit(None)
        pieces.commit(torch.ones(()))
        assert torch.equal(whole.queue, pieces.queue) and int(pieces.queue_ptr) == 8 * (step + 1) % 10
        if step == 0:
            assert torch.equal(whole.queue[:, :8].t(), keys.flatten(0, 1))
            assert torch.equal(whole.queue[:, 8:], before[:, 8:])
    assert torch.equal(whole.queue[:, :4].t(), keys.flatten(0, 1)[4:])


def test_a_batch_nearly_as_large_as_its_queue_leaves_the_second_view():
    queue, keys = Queue(3, 5), keys_of(0, 4)
    queue.collect(keys)
    queue.commit(None)
    assert torch.equal(queue.queue[:, [4, 0, 1, 2]].t(), keys[1]) and torch.equal(queue.queue[:, 3], keys[0, 3])
    assert int(queue.queue_ptr) == 3


def test_a_step_that_does_not_count_leaves_queue_memory_and_pointers_and_is_forgotten():
    queue, memory = Queue(3, 10), Memory(3, 10)
    parts = {name: value.clone() for part in (queue, memory) for name, value in part.named_buffers()}
    bad = torch.full((4, 3), torch.nan)
    queue.collect(bad.expand(2, 4, 3))
    memory.collect(bad, torch.arange(4), torch.tensor([True, False, True, True]))
    queue.commit(torch.zeros(()))
    memory.commit(5, torch.zeros(()))
    for part in (queue, memory):
        for name, value in part.named_buffers():
            assert torch.equal(value, parts[name]), name
    queue.collect(keys_of(0, 1))
    queue.commit(torch.ones(()))
    assert int(queue.queue_ptr) == 2


@pytest.mark.parametrize("gate", [None, torch.ones(())])
def test_only_wanted_rows_are_written_and_their_images_and_step_are_known(gate):
    memory = Memory(2, 6)
    old = memory.queue_k.clone()
    rows = torch.arange(8.0).view(4, 2)
    for part, images, wanted in ((slice(0, 2), [7, 8], [0, 1]), (slice(2, 4), [9, 3], [1, 0])):
        memory.collect(rows[part], torch.tensor(images), torch.tensor(wanted, dtype=torch.bool))
    assert int(memory.commit(11, gate)) == 2
    for name in ("queue_q", "queue_k"):
        assert torch.equal(getattr(memory, name)[:2], rows[1:3])
    assert torch.equal(memory.queue_k[2:], old[2:])
    assert memory.images.tolist() == [8, 9, *[NEVER] * 4] and memory.written.tolist() == [11, 11, *[NEVER] * 4]
    assert int(memory.queue_ptr) == 4 and memory.share_written() == pytest.approx(2 / 6)
    torch.testing.assert_close(memory.unit, F.normalize(memory.queue_q, dim=1))


@pytest.mark.parametrize(("once", "ends"), [(False, [4, 3, 0, 6]), (True, [2, 1, 3, 6])])
def test_the_pointer_advances_by_twice_the_rows_unless_they_wrap_or_by_their_number(once, ends):
    memory, found = Memory(2, 7, advance_once=once), []
    for count in (2, 6, 2, 3):
        memory.collect(torch.ones(count, 2))
        memory.commit(0, None)
        found.append(int(memory.queue_ptr))
    memory.collect(torch.ones(2, 2), wanted=torch.zeros(2, dtype=torch.bool))
    memory.commit(0, None)
    assert found == ends and int(memory.queue_ptr) == found[-1], "no row, no step"


@pytest.mark.parametrize("size", [40, 640])
def test_the_nearest_rows_are_those_of_all_products(size):
    memory, queries = Memory(5, size).double(), random(9, 5)
    cosines = F.normalize(queries, dim=1) @ F.normalize(memory.queue_q, dim=1).t()
    found = memory.nearest(queries, 6)
    assert torch.equal(found.index, cosines.topk(6, dim=1).indices)
    assert torch.equal(found.rows, memory.queue_k[found.index])
    assert torch.equal(largest(cosines, 6), found.index)


def test_files_hold_three_queues_two_of_which_are_one_storage_and_bring_back_the_rest_bit_for_bit():
    memory = Memory(3, 8)
    memory.collect(torch.randn(3, 3), torch.arange(3))
    memory.commit(4, None)
    state, notes = memory.to_file(memory.state_dict()), {n: v.clone() for n, v in memory.notes().items()}
    assert list(state) == ["block.queue_q", "block.queue_k", "block.queue_v", "block.queue_ptr"]
    assert state["block.queue_v"].data_ptr() == state["block.queue_k"].data_ptr()
    other = Memory(3, 8)
    other.load_state_dict(other.from_file(state))
    torch.testing.assert_close(other.unit, memory.unit)
    assert other.share_written() == memory.share_written()
    other.load_notes(notes)
    for name, value in memory.named_buffers():
        assert torch.equal(value, dict(other.named_buffers())[name]), name
    with pytest.raises(KeyError, match="queue_q"):
        other.from_file({})


def test_a_memory_that_is_moved_is_normalised_in_its_new_precision():
    memory = Memory(3, 8).double()
    torch.testing.assert_close(memory.unit.norm(dim=1), torch.ones(8).double(), rtol=1e-15, atol=1e-15)
