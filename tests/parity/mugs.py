"""Runners: Mugs's backbone, heads, memory and losses. Names of arrays have dots between parts."""

import re
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn as nn

from evaluation.features import class_token
from methods.centring import Centres
from methods.contrast import info_nce
from methods.distillation import teacher_probabilities
from methods.heads import ContrastiveHead, DINOHead
from methods.local_group import LocalGroupTransformer, mean_tokens
from methods.memory import Memory, Queue
from methods.mugs import from_file, group_cross_entropy
from tests.parity import Case
from tests.parity.constants import EXACT
from tests.parity.losses import on_ranks
from tests.parity.losses import temperatures as temperatures_of
from tests.parity.recorded import queue_at_start, stepwise


def part(case: Case, prefix: str) -> dict[str, torch.Tensor]:
    """What stands under ``prefix.`` in the case's file."""
    return {name.removeprefix(f"{prefix}."): case.tensor(name) for name in case.names(f"{prefix}.")}


def numbers(case: Case, pattern: str) -> list[int]:
    """The numbers that (\\d+) in ``pattern`` stands for among the names of the arrays, in order."""
    return sorted({int(match[1]) for name in case.arrays if (match := re.match(pattern, name))})


def memory_of(case: Case, state: dict[str, torch.Tensor], **options) -> Memory:
    """A memory of these ``queue_q`` and ``queue_k``, whose pointer is at the start."""
    memory = Memory(*reversed(state["queue_q"].shape), **options).to(case.dtype)
    start = {f"block.{name}": value for name, value in state.items()}
    memory.load_state_dict(memory.from_file(start | {"block.queue_ptr": torch.zeros(1, dtype=torch.int64)}))
    return memory


def compared(case: Case, found: dict) -> Iterator[tuple]:
    """What was ``found``, by label, against what the file has of it; some arrays may be missing there."""
    for label, value in found.items():
        if label in case.arrays:
            yield label, value, case.arrays[label]


def eps_of(module: nn.Module, p: dict) -> tuple:
    return sorted({norm.eps for norm in module.modules() if isinstance(norm, nn.LayerNorm)}), [p["ln_eps"]], EXACT


# ---------------------------------------------------------------------------------------------------------------------
# The parts
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def backbone_forward(case: Case) -> Iterator[tuple]:
    p = case.params
    sizes = {name: p[name] for name in ("embed_dim", "depth", "num_heads", "patch_size", "img_size", "mlp_ratio")}
    more = {"num_relation_blocks": p["num_relation_blocks"], "qkv_bias": p["qkv_bias"]}
    network = LocalGroupTransformer(**sizes, **more, drop_path_rate=p["drop_path"]).to(case.dtype)
    network.load_state_dict(part(case, "sd.backbone"))
    yield "ln_eps", *eps_of(network, p)
    memory = memory_of(case, {name: case.tensor(f"in.{name}") for name in ("queue_q", "queue_k")})
    yield "memory_size", len(memory.unit), p["memory_size"]
    kinds = [name.removeprefix("in.x_") for name in case.names("in.x_")]
    crops = [case.tensor(f"in.x_{kind}") for kind in kinds]
    together = network.forward_views(crops, memory, p["top_n"])
    pieces = zip(*(together[i].split([len(crop) for crop in crops]) for i in (0, 1, 3)), strict=True)
    for kind, images, (classes, relations, index) in zip(kinds, crops, pieces, strict=True):
        raw = network.get_intermediate_layers(images, norm=False)[0]
        tokens = network.forward_features(images)
        patches = network.forward_views([images], memory, p["top_n"]).patches
        found = {
            "tokens": tokens,
            "relation": relations,
            "mem_query": mean_tokens(*network.forward_rows([images])),
            "mem_index": index,
            "pos": network.position_embedding(*images.shape[-2:]),
            "relation_no_memory": network.norm(network.first_related(raw)),
            "knn_feature": class_token(network, images),
            "last_attention": network.get_last_selfattention(images),
        }
        for label in case.names(f"out.{kind}."):
            name = label.removeprefix(f"out.{kind}.")
            if blocks := re.fullmatch(r"last(\d+)_block_tokens", name):
                found[name] = torch.stack(network.get_intermediate_layers(images, int(blocks[1])))
            yield label, found[name], case.arrays[label]
            if name == "tokens":
                yield f"{label}, class tokens in one pass", classes, case.arrays[label][:, 0]
                yield f"{label}, mean patch", patches, case.arrays[label][:, 1:].mean(axis=1)


def heads(case: Case) -> Iterator[tuple]:
    p = case.params
    variants = {re.match(r"out\.(\w+)\.", name)[1]: None for name in case.outputs()}
    for tag in variants:
        state = part(case, f"sd.{tag}")
        group = "last_layer.weight_v" in state
        build = group_head if group else contrastive_head
        for prefix in (f"out.{tag}.", f"out.{tag}.no_norm_before_pred."):
            labels = [name for name in case.names(prefix) if "no_norm" in prefix or "no_norm" not in name]
            if labels:
                train_norm = f"out.{tag}.grad_weight_g" in case.arrays
                head = build(p, state, **({"train_norm": train_norm} if group else {"norm": "no_norm" not in prefix}))
                yield from head_outputs(case, tag, prefix, labels, head.to(case.dtype))


def contrastive_head(p: dict, state: dict[str, torch.Tensor], norm: bool) -> ContrastiveHead:
    sizes = {"hidden_dim": p["hidden_dim"], "predictor_dim": p["pred_hidden_dim"], "nlayers": p["nlayers"]}
    predictor, use_bn = (any(word in name for name in state) for word in ("predictor", "running_mean"))
    head = ContrastiveHead(p["in_dim"], p["out_dim"], predictor, use_bn, norm, **sizes).double()
    head.load_state_dict(state)
    return head


def group_head(p: dict, state: dict[str, torch.Tensor], train_norm: bool) -> DINOHead:
    sizes = {"hidden_dim": p["hidden_dim"], "bottleneck_dim": p["bottleneck_dim"], "nlayers": p["nlayers"]}
    use_bn = any("running_mean" in name for name in state)
    head = DINOHead(p["in_dim"], p["group_out_dim"], use_bn, norm_last_layer=not train_norm, **sizes).double()
    own = from_file({f"group_head.{name}": value for name, value in state.items()})
    head.load_state_dict({name.removeprefix("group_head."): value for name, value in own.items()})
    return head


def head_outputs(case: Case, tag: str, prefix: str, labels: list[str], head: nn.Module) -> Iterator[tuple]:
    """Training on x, if the case has it on x2 too, then what stands in the statistics, then evaluation on x.

    Where the case also has the head without its first norm, what was recorded of the statistics may be of that pass,
    which begins anew with one on x.
    """
    x = case.tensor("in.x").requires_grad_()
    found = {"train1": head(x)}
    once = {name.replace("mlp.", "projector."): buffer.clone() for name, buffer in head.named_buffers()}
    (found["train1"] * case.tensor(f"in.upstream.{tag}")).sum().backward()
    found["grad_x"] = x.grad
    if isinstance(head, DINOHead):
        found |= {f"grad_{name}": getattr(head.last_layer, name).grad for name in ("weight_g", "weight_v")}
    if f"{prefix}train2" in labels:
        found["train2"] = head(case.tensor("in.x2"))
    found["eval"] = head.eval()(case.tensor("in.x"))
    found |= {name.replace("mlp.", "projector."): buffer.clone() for name, buffer in head.named_buffers()}
    if f"out.{tag}.no_norm_before_pred.train1" in case.arrays:
        for name in once.keys() & {label.removeprefix(prefix) for label in labels}:
            off = [np.abs(value[name].numpy() - case.arrays[f"{prefix}{name}"]).max() for value in (once, found)]
            found[name] = once[name] if off[0] < off[1] else found[name]
    for label in labels:
        yield label, found[label.removeprefix(prefix)], case.arrays[label]


@torch.no_grad()
def local_group_memory(case: Case) -> Iterator[tuple]:
    """The original's third queue, which nothing reads and is queue_k here, is what a memory that returns it returns."""
    p = case.params
    start = {name: case.tensor(f"in.init_{name}") for name in ("queue_q", "queue_k")}
    memory, third = memory_of(case, start), None
    if "in.init_queue_v" in case.arrays:
        third = memory_of(case, start | {"queue_k": case.tensor("in.init_queue_v")})
    yield "K and dim", list(memory.unit.shape), [p["K"], p["dim"]]
    queues = {}
    for step in numbers(case, r"in\.step(\d+)\."):
        flags, label = f"in.step{step}.weak", f"out.step{step}"
        weak = case.tensor(flags).bool() if flags in case.arrays else None
        memory.collect(case.tensor(f"in.step{step}.tokens"), wanted=weak)
        written = memory.commit(step, None)
        stored = memory.to_file(memory.state_dict())
        if third is not None:
            third.collect(case.tensor(f"in.step{step}.tokens"), wanted=weak)
            third.commit(step, None)
            stored["block.queue_v"] = third.queue_k
        returned = [0 if weak is None else int(written)]
        yield from compared(case, {f"{label}.ptr": stored["block.queue_ptr"], f"{label}.returned": returned})
        queues[f"{label}.queue"] = stored["block.queue_q"].clone()
    yield from stepwise(case, queues)
    for label in case.names("out.final."):
        yield label, stored[f"block.{label.removeprefix('out.final.')}"], case.arrays[label]
    found = memory.nearest(case.tensor("in.query"), p["top_n"])
    values = stored["block.queue_v"][found.index]
    yield from compared(case, {"out.index": found.index, "out.neighbours": found.rows, "out.neighbours_v": values})


def contrast_step(student: torch.Tensor, teacher: torch.Tensor, queue: Queue, temperature: float) -> tuple:
    student, keys = student.clone().requires_grad_(), teacher.unflatten(0, (2, -1))
    loss = info_nce(student, keys, queue.queue, temperature).loss
    queue.collect(keys)
    loss.backward()
    queue.commit(None)
    return loss.detach(), student.grad


def queue_of(state: torch.Tensor) -> Queue:
    queue = Queue(*state.shape).to(state.dtype)
    queue.queue.copy_(state)
    return queue


def infonce_loss(case: Case) -> Iterator[tuple]:
    p = case.params
    start, steps = case.tensor("in.queue_init"), numbers(case, r"in\.step(\d+)\.student$")
    given = [[case.tensor(f"in.step{step}.{side}") for side in ("student", "teacher")] for step in steps]
    yield "out.ptr_init, steps", len(steps), p["steps"]
    last = case.arrays.get(f"out.step{steps[-1]}.queue")
    if last is not None and np.array_equal(start.numpy(), last):  # recorded when it was what it is at the end
        gradients = (case.tensor(f"out.step{step}.grad_student") for step in steps)
        known = [(z, keys.unflatten(0, (2, -1)), grad) for (z, keys), grad in zip(given, gradients, strict=True)]
        start = queue_at_start(start, known, p["temperature"])
    queue, queues = queue_of(start), {}
    yield from compared(case, {"out.ptr_init": queue.queue_ptr})
    for step, (student, teacher) in enumerate(given):
        loss, grad = contrast_step(student, teacher, queue, p["temperature"])
        found = {"loss": loss, "grad_student": grad, "ptr": queue.queue_ptr}
        yield from compared(case, {f"out.step{step}.{name}": value for name, value in found.items()})
        queues[f"out.step{step}.queue"] = queue.queue.clone()
    yield from stepwise(case, queues)


def group_step(student: torch.Tensor, teacher: torch.Tensor, centres: Centres, temps: tuple[float, float]) -> tuple:
    """For given logits: with the unit vectors as prototypes, a student's vector is its logits."""
    student = student.clone().requires_grad_()
    centres.collect(center=teacher)
    probs = teacher_probabilities(teacher, centres.center, temps[1]).unflatten(0, (2, -1))
    loss = group_cross_entropy(student, torch.eye(student.shape[1], dtype=student.dtype), probs, temps[0])
    loss.backward()
    centres.commit(None)
    return loss.detach(), student.grad


def group_loss(case: Case) -> Iterator[tuple]:
    p = case.params
    temps = temperatures_of(p)
    yield from compared(case, {"out.teacher_temp_schedule": temps})
    centres = Centres(p["center_momentum"], center=(1, p["out_dim"])).to(case.dtype)
    centres.center.copy_(case.tensor("in.center_init"))
    for step, epoch in enumerate(p["epoch_of_step"]):
        given = (case.tensor(f"in.step{step}.{side}") for side in ("student", "teacher"))
        loss, grad = group_step(*given, centres, (p["student_temp"], temps[epoch]))
        found = {"loss": loss, "grad_student": grad, "center": centres.center}
        yield from compared(case, {f"out.step{step}.{name}": value for name, value in found.items()})


def state_on_rank(rank: int, p: dict, inputs: dict, dtype: torch.dtype) -> dict:
    queue, temps = queue_of(inputs["in.queue_init"]), temperatures_of(p)
    memory = Memory(p["memory_dim"], p["memory_size"]).to(dtype)
    for rows in (memory.queue_q, memory.queue_k):
        rows.copy_(inputs["in.mem_init"])
    memory.renormalise()
    centres = Centres(p["center_momentum"], center=(1, p["group_out_dim"])).to(dtype)
    computed = {}
    for step, epoch in enumerate(p["epoch_of_step"]):
        given = {name: inputs[f"in.step{step}.rank{rank}.{name}"] for name in ("s", "t", "gs", "gt", "tok", "weak")}
        loss, grad = contrast_step(given["s"], given["t"], queue, p["temperature"])
        group, group_grad = group_step(given["gs"], given["gt"], centres, (p["student_temp"], temps[epoch]))
        memory.collect(given["tok"], wanted=given["weak"].bool())
        weak = memory.commit(step, None)
        found = {"nce_loss": loss, "nce_grad": grad, "group_loss": group, "group_grad": group_grad}
        found |= {"queue": queue.queue.clone(), "center": centres.center.clone(), "mem": memory.queue_q.clone()}
        found["ptrs"] = torch.stack((queue.queue_ptr[0], memory.queue_ptr[0], weak))
        computed |= {f"out.step{step}.{name}": value for name, value in found.items()}
    return computed


def two_rank_state(case: Case) -> Iterator[tuple]:
    """The case's names have the rank in the middle; those of ``on_ranks`` have it at the end."""
    twin = Case(case.folder, case.method, case.entry)
    rank = r"^(out\.step\d+)\.(rank\d+)\.(\w+)$"
    twin.arrays = {re.sub(rank, r"\1.\3_\2", name): value for name, value in case.arrays.items()}
    twin.outputs = lambda: [name for name in twin.arrays if name.startswith("out.")]
    for label, *values in on_ranks(state_on_rank)(twin):
        yield re.sub(r"^(out\.step\d+)\.(\w+?)_(rank\d+)$", r"\1.\3.\2", label), *values


RUNNERS = {
    "mugs/backbone_forward": backbone_forward,
    "mugs/heads": heads,
    "mugs/local_group_memory": local_group_memory,
    "mugs/infonce_loss": infonce_loss,
    "mugs/group_loss": group_loss,
    "mugs/two_rank_state": two_rank_state,
}
