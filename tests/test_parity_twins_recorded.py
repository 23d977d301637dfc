"""Golden cases whose buffers were recorded as views: what is wrong in the product is noticed all the same."""

import pytest
import torch
import torch.nn.functional as F

import methods.memory
import methods.mugs
import tests.parity.mugs
from methods.contrast import info_nce
from methods.memory import Memory, Queue
from tests.parity import find_runner, judge
from tests.parity.recorded import queue_at_start
from tests.test_parity_twins_mugs import contrast, rewrite
from tests.twins import agrees, golden, random


def another_temperature(z, keys, queue, temperature):
    return info_nce(z, keys, queue, 1.1 * temperature)


def not_normalised(self, queries, k):
    index = (queries @ self.queue_q.t()).topk(k, dim=1).indices
    return methods.memory.Neighbours(self.queue_k[index], index)


def written_before_it_is_read(z, keys, queue, temperature):
    flat = keys.detach().flatten(0, 1)[: queue.shape[1]]
    return info_nce(z, keys, queue.index_copy(1, torch.arange(len(flat)), flat.t()), temperature)


def one_place_on(commit):
    def committed(self, gate):
        commit(self, gate)
        self.queue_ptr.copy_((self.queue_ptr + 1) % self.queue.shape[1])

    return committed


def other_view_first(collect):
    return lambda self, keys: collect(self, keys.flip(0))


def advance_by_their_number(self, number, taken):
    self.queue_ptr.copy_((self.queue_ptr + number) % len(self.unit))


def everything_is_wanted(collect):
    return lambda self, rows, images=None, wanted=None: collect(self, rows, images)


SOLVED: dict[bytes, torch.Tensor] = {}
CONTRAST = ("infonce_loss", "trajectory")
MEMORY = ("local_group_memory", "trajectory")
FAULTS = {  # where, what stands there instead, and the cases that have to notice
    "temperature": ("info_nce", another_temperature, CONTRAST),
    "written before it is read": ("info_nce", written_before_it_is_read, CONTRAST),
    "pointer of a queue": (Queue, "commit", one_place_on(Queue.commit), CONTRAST),
    "order of views": (Queue, "collect", other_view_first(Queue.collect), CONTRAST),
    "pointer of a memory": (Memory, "_advance", advance_by_their_number, MEMORY),
    "no normalisation": (Memory, "nearest", not_normalised, MEMORY),
    "what is weak": (Memory, "collect", everything_is_wanted(Memory.collect), MEMORY),
}


@pytest.fixture(autouse=True)
def solved_once(monkeypatch):
    """What a queue was does not depend on the product, so that it is not looked for again."""

    def once(recorded, steps, temperature):
        key = recorded.numpy().tobytes()
        if key not in SOLVED:
            SOLVED[key] = queue_at_start(recorded, steps, temperature)
        return SOLVED[key]

    monkeypatch.setattr(tests.parity.mugs, "queue_at_start", once)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_product_fails(fault, monkeypatch):
    *where, replacement, cases = FAULTS[fault]
    for place in [where] if len(where) == 2 else [(module, *where) for module in (methods.mugs, tests.parity.mugs)]:
        monkeypatch.setattr(*place, replacement)
    for name in cases:
        case = golden("mugs", name)
        assert judge(case, find_runner(case)).status == "FAIL", name


def contrast_case(crops: int, batch: int, dim: int, size: int, steps: int, views: bool):
    """The contrast of other sizes, recorded as it was at every step or as ``views`` of what the queue became."""
    case = golden("mugs", "infonce_loss")
    case.params |= {"ncrops": crops, "dim": dim, "queue_size": size, "temperature": 0.3, "batch": batch}
    case.params["steps"] = steps
    queue, pointer = F.normalize(random(dim, size), dim=0), 0
    inputs, outputs = {"in.queue_init": queue.clone()}, {"out.ptr_init": [0]}
    for step in range(steps):
        z = F.normalize(random(crops * batch, dim, seed=step), dim=1).requires_grad_()
        keys = F.normalize(random(2, batch, dim, seed=9 + step), dim=2)
        loss = contrast(z, keys, queue.clone(), 0.3)
        for key in keys.flatten(0, 1):
            queue[:, pointer] = key
            pointer = (pointer + 1) % size
        inputs |= {f"in.step{step}.student": z, f"in.step{step}.teacher": keys.flatten(0, 1)}
        found = {"loss": loss, "grad_student": torch.autograd.grad(loss, z)[0]}
        found |= {"queue": queue.clone(), "ptr": [pointer]}
        outputs |= {f"out.step{step}.{name}": value for name, value in found.items()}
    if views:
        inputs["in.queue_init"] = queue.clone()
        outputs |= {f"out.step{step}.queue": queue.clone() for step in range(steps)}
    return rewrite(case, inputs, outputs)


SIZES = [(5, 1, 6, 4, 3), (2, 1, 6, 5, 4), (4, 2, 6, 30, 3), (6, 2, 10, 7, 4), (4, 2, 5, 4, 1)]


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "-".join(map(str, sizes)))
def test_a_queue_of_other_sizes_recorded_in_either_way(sizes, views):
    """Smaller and larger than what all steps write, without local views, written over twice, and one step."""
    agrees(contrast_case(*sizes, views))


@pytest.mark.parametrize("fault", ["temperature", "order of views"])
def test_a_fault_fails_where_no_step_is_free_of_the_lost_start(fault, monkeypatch):
    case = contrast_case(4, 2, 6, 30, 3, True)
    *where, replacement, _ = FAULTS[fault]
    for place in [where] if len(where) == 2 else [(module, *where) for module in (methods.mugs, tests.parity.mugs)]:
        monkeypatch.setattr(*place, replacement)
    assert judge(case, find_runner(case)).status == "FAIL"
