"""Twins of Mugs's golden cases: the same format with other numbers, computed from the textbook form."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from methods.base import Clock
from methods.heads import ContrastiveHead
from methods.local_group import LocalGroupTransformer
from models.vit import resampling_matrix
from tests.parity import find_runner, judge
from tests.parity.case import Case
from tests.parity.mugs_training import small_mugs
from tests.parity.recorded import queue_at_start, stepwise
from tests.twins import GOLDEN, agrees, as_arrays, golden, random, randomise, unnoticed


def rewrite(case: Case, inputs: dict, outputs: dict) -> Case:
    """The case with these arrays and no others; the manifest lists outputs by ``key``."""
    case.__dict__["arrays"] = as_arrays(inputs | outputs)
    case.entry["outputs"] = [{"key": name} for name in outputs]
    return case


def stored(prefix: str, state: dict) -> dict:
    return {f"{prefix}.{name}": tensor for name, tensor in state.items()}


def rms(x, norm):
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def through(block, x: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A block as it is written, and its attention."""
    dim = x.shape[-1]
    q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in block.attn.qkv(rms(x, block.norm1)).chunk(3, -1))
    weights = (q @ k.transpose(-2, -1) / math.sqrt(dim // heads)).softmax(dim=-1)
    x = x + block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
    y = block.mlp.fc1(rms(x, block.norm2))
    return x + block.mlp.fc2(0.5 * y * (1 + torch.erf(y / math.sqrt(2)))), weights


def test_a_backbone_of_other_heads_depth_and_grids_that_are_not_square():
    case = golden("mugs", "backbone_forward")
    sizes = {"embed_dim": 8, "depth": 4, "num_heads": 2, "patch_size": 4, "img_size": 12, "mlp_ratio": 2}
    case.params |= sizes | {"top_n": 2, "memory_size": 5}
    network = randomise(LocalGroupTransformer(**sizes))
    queue = {name: random(5, 8, seed=seed) for seed, name in enumerate(("queue_q", "queue_k"))}
    inputs, outputs = stored("sd.backbone", network.state_dict()) | {f"in.{n}": v for n, v in queue.items()}, {}
    with torch.no_grad():
        for kind, (height, width), last in (("wide", (8, 20), 3), ("small", (8, 8), 1)):
            images = random(3, 3, height, width, seed=7)
            patches = F.conv2d(images, network.patch_embed.proj.weight, network.patch_embed.proj.bias, stride=4)
            grid = (height // 4, width // 4)
            moved = resampling_matrix((3, 3), grid, exact=False) @ network.pos_embed[0, 1:]
            positions = torch.cat((network.pos_embed[:, :1], moved[None]), dim=1)
            x = torch.cat((network.cls_token.expand(3, -1, -1), patches.flatten(2).transpose(1, 2)), dim=1) + positions
            layers, attention = [], None
            for block in network.blocks:
                x, attention = through(block, x, 2)
                layers.append(rms(x, network.norm))
            query = x.mean(dim=1)
            cosine = F.normalize(query, dim=1) @ F.normalize(queue["queue_q"], dim=1).t()
            index = cosine.argsort(dim=1, descending=True)[:, :2]
            together = torch.cat((query[:, None], queue["queue_k"][index]), dim=1)
            relation = rms(through(network.relation_blocks[0], together, 2)[0][:, 0], network.norm)
            alone = rms(through(network.relation_blocks[0], x, 2)[0][:, 0], network.norm)
            inputs[f"in.x_{kind}"] = images
            found = {"tokens": layers[-1], "relation": relation, "mem_query": query, "mem_index": index}
            found |= {"pos": positions, "relation_no_memory": alone, "knn_feature": layers[-1][:, 0]}
            found |= {f"last{last}_block_tokens": torch.stack(layers[-last:]), "last_attention": attention}
            outputs |= {f"out.{kind}.{name}": value for name, value in found.items()}
    agrees(rewrite(case, inputs, outputs))


@pytest.mark.parametrize("predictor", [True, False])
def test_heads_of_other_widths_with_two_layers(predictor):
    case = golden("mugs", "heads")
    case.params |= {"in_dim": 5, "hidden_dim": 7, "pred_hidden_dim": 6, "out_dim": 4, "nlayers": 2}
    head = randomise(ContrastiveHead(5, 4, predictor, nlayers=2, hidden_dim=7, predictor_dim=6))
    state, x, upstream = head.state_dict(), random(3, 5).requires_grad_(), random(3, 4, seed=2)
    inputs = stored("sd.who", state) | {"in.x": x.detach(), "in.upstream.who": upstream}
    outputs = {}
    for norm in (True, False) if predictor else (True,):
        y = F.gelu(x @ state["projector.0.weight"].t()) @ state["projector.2.weight"].t()
        if predictor:
            y = y / y.norm(dim=1, keepdim=True) if norm else y
            y = F.gelu(y @ state["predictor.0.weight"].t()) @ state["predictor.2.weight"].t()
        y = y / y.norm(dim=1, keepdim=True)
        (grad,) = torch.autograd.grad((y * upstream).sum(), x)
        prefix = "out.who." if norm else "out.who.no_norm_before_pred."
        outputs |= {f"{prefix}train1": y, f"{prefix}grad_x": grad}
    agrees(rewrite(case, inputs, outputs))


def test_a_memory_of_another_size_with_rows_that_are_never_written():
    case = golden("mugs", "local_group_memory")
    case.params |= {"K": 7, "dim": 3, "top_n": 2}
    queues = {name: random(7, 3, seed=seed) for seed, name in enumerate(("queue_q", "queue_k", "queue_v"))}
    inputs = {f"in.init_{name}": value.clone() for name, value in queues.items()} | {"in.query": random(2, 3, seed=9)}
    outputs, pointer = {}, 0
    for step, (count, weak) in enumerate([(2, None), (4, [1, 0, 1, 1]), (3, [0, 0, 0])]):
        tokens = random(count, 3, seed=20 + step)
        inputs |= {f"in.step{step}.tokens": tokens}
        inputs |= {} if weak is None else {f"in.step{step}.weak": np.array(weak, np.uint8)}
        rows = tokens if weak is None else tokens[torch.tensor(weak) > 0]
        for at, row in enumerate(rows):
            for queue in queues.values():
                queue[(pointer + at) % 7] = row
        end = pointer + len(rows)
        pointer = (end + len(rows)) % 7 if end <= 7 else end - 7
        returned = [0 if weak is None else len(rows)]
        outputs |= {f"out.step{step}.ptr": [pointer], f"out.step{step}.returned": returned}
        outputs[f"out.step{step}.queue"] = queues["queue_q"].clone()
    cosine = F.normalize(inputs["in.query"], dim=1) @ F.normalize(queues["queue_q"], dim=1).t()
    index = cosine.argsort(dim=1, descending=True)[:, :2]
    outputs |= {"out.index": index, "out.neighbours": queues["queue_k"][index], "out.final.queue_k": queues["queue_k"]}
    outputs |= {"out.neighbours_v": queues["queue_v"][index], "out.final.queue_v": queues["queue_v"]}
    agrees(rewrite(case, inputs, outputs))


def contrast(z, keys, queue, temperature):
    views, batch = z.chunk(len(z) // keys.shape[1]), keys.shape[1]
    pairs = {}
    for i in (0, 1):
        for v, view in enumerate(views):
            logits = torch.cat(((view * keys[i]).sum(1, keepdim=True), view @ queue), dim=1) / temperature
            pairs[i, v] = -(logits.log_softmax(dim=1)[:, 0].sum() / batch)
    large = (pairs[0, 1] + pairs[1, 0]) / 2
    small = [pair for (_, v), pair in pairs.items() if v > 1]
    return (large + sum(small) / len(small)) / 2 if small else large


@pytest.mark.parametrize(("crops", "batch", "size"), [(2, 2, 5), (4, 1, 9)])
def test_a_contrast_of_other_crops_and_queues(crops, batch, size):
    case = golden("mugs", "infonce_loss")
    case.params |= {"ncrops": crops, "dim": 3, "queue_size": size, "temperature": 0.4, "batch": batch, "steps": 3}
    queue, pointer = F.normalize(random(3, size), dim=0), 0
    inputs, outputs = {"in.queue_init": queue.clone()}, {"out.ptr_init": [0]}
    for step in range(3):
        z = F.normalize(random(crops * batch, 3, seed=step), dim=1).requires_grad_()
        keys = F.normalize(random(2, batch, 3, seed=9 + step), dim=2)
        loss = contrast(z, keys, queue.clone(), 0.4)
        for key in keys.flatten(0, 1):
            queue[:, pointer] = key
            pointer = (pointer + 1) % size
        inputs |= {f"in.step{step}.student": z, f"in.step{step}.teacher": keys.flatten(0, 1)}
        found = {"loss": loss, "grad_student": torch.autograd.grad(loss, z)[0]}
        found |= {"queue": queue.clone(), "ptr": [pointer]}
        outputs |= {f"out.step{step}.{name}": value for name, value in found.items()}
    agrees(rewrite(case, inputs, outputs))


def test_a_queue_that_was_recorded_at_the_end_is_found_from_the_gradients():
    start = F.normalize(random(3, 4), dim=0)
    queue, steps = start.clone(), []
    for step in range(3):
        z = F.normalize(random(20, 3, seed=step + 1), dim=1).requires_grad_()
        keys = F.normalize(random(2, 1, 3, seed=9 + step), dim=2)
        (grad,) = torch.autograd.grad(contrast(z, keys, queue.clone(), 0.3), z)
        steps.append((z.detach(), keys, grad))
        queue[:, [2 * step % 4, (2 * step + 1) % 4]] = keys[:, 0].t()
    found = queue_at_start(queue, steps, 0.3)
    apart = (found[:, :, None] - start[:, None]).norm(dim=0).amin(dim=1)
    assert apart.max() < 1e-8 and (queue - start).abs().max() > 0.1


def test_what_was_recorded_of_every_step_alike_is_what_the_last_one_left():
    case = golden("mugs", "infonce_loss")
    case.__dict__["arrays"] = {"a": np.ones(2), "b": np.ones(2)}
    found = {"a": torch.zeros(2), "b": torch.ones(2)}
    assert [value.tolist() for _, value, _ in stepwise(case, found)] == [[1.0, 1.0]] * 2
    case.arrays["a"] = np.zeros(2)
    assert [value.tolist() for _, value, _ in stepwise(case, found)] == [[0.0, 0.0], [1.0, 1.0]]


@pytest.mark.parametrize("crops", [2, 3])
def test_a_group_loss_of_other_crops_and_temperatures(crops):
    case = golden("mugs", "group_loss")
    p = {"out_dim": 5, "ncrops": crops, "warmup_teacher_temp": 0.1, "teacher_temp": 0.3, "nepochs": 3, "batch": 2}
    p |= {"warmup_teacher_temp_epochs": 2, "student_temp": 0.5, "center_momentum": 0.6, "epoch_of_step": [2, 0]}
    case.params.update(p)
    temps, centre = [0.1, 0.3, 0.3], random(1, 5, seed=9)
    inputs, outputs = {"in.center_init": centre}, {"out.teacher_temp_schedule": temps}
    for step, epoch in enumerate(p["epoch_of_step"]):
        student, teacher = random(2 * crops, 5, seed=step).requires_grad_(), random(4, 5, seed=5 + step)
        targets = ((teacher - centre) / temps[epoch]).softmax(1).chunk(2)
        views = (student / 0.5).log_softmax(1).chunk(crops)
        pair = {(i, v): -(q * s).sum(1).mean() for i, q in enumerate(targets) for v, s in enumerate(views)}
        large, small = (pair[0, 1] + pair[1, 0]) / 2, [pair[i, v] for i, v in pair if v > 1]
        loss = (large + sum(small) / len(small)) / 2 if small else large
        centre = 0.6 * centre + 0.4 * teacher.mean(0, keepdim=True)
        inputs |= {f"in.step{step}.student": student, f"in.step{step}.teacher": teacher}
        found = {"loss": loss, "grad_student": torch.autograd.grad(loss, student)[0], "center": centre}
        outputs |= {f"out.step{step}.{name}": value for name, value in found.items()}
    agrees(rewrite(case, inputs, outputs))


def test_schedules_of_other_lengths():
    case = golden("mugs", "schedules")
    case.params |= {"epochs": 3, "niter": 2, "warmup": 1, "lr": 0.1, "bs": 32, "world": 4, "min_lr": 0.01}
    case.params |= {"wd": 0.3, "wde": 0.1, "mom": 0.5, "wt": 0.1, "tt": 0.2, "we": 2, "scaled_base_lr": 0.05}
    cosine = [(1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    whole = [(1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]
    lr = [0.0, 0.05, *(0.01 + 0.04 * c for c in cosine)]
    decay, momentum = [0.1 + 0.2 * c for c in whole], [1 - 0.5 * c for c in whole]
    preset = {"lr": 0.1, "batch_size_per_gpu": 32, "world": 4, "epochs": 3, "warmup_epochs": 1, "min_lr": 0.01}
    preset |= {"weight_decay": 0.3, "weight_decay_end": 0.1, "momentum_teacher": 0.5, "iters_per_epoch": 2}
    case.params["presets"] = {"mine": preset | {"imagenet_train_images": 256}}
    outputs = {"out.lr": lr, "out.wd": decay, "out.momentum": momentum, "out.teacher_temp": [0.1, 0.2, 0.2]}
    outputs["out.preset.mine"] = [[1, 5], [lr[1], lr[5]], [decay[1], decay[5]], [momentum[1], momentum[5]]]
    outputs["out.drop_path.depth3_rate0.5"] = [0.0, 0.25, 0.5]
    agrees(rewrite(case, {}, outputs))


def test_groups_of_a_deeper_network():
    case = golden("mugs", "param_groups")
    case.params |= {"dim": 6, "depth": 3, "heads": 1, "hid": 4, "pred": 5, "out": 3, "gout": 7, "bott": 4}
    block = ["norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias"]
    block += ["norm2.weight", "norm2.bias", *(f"mlp.fc{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias"))]
    names = ["cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]
    names += [f"blocks.{i}.{name}" for i in range(3) for name in block] + ["norm.weight", "norm.bias"]
    names = [f"backbone.{name}" for name in (*names, *(f"relation_blocks.0.{name}" for name in block))]
    for head in ("instance_head", "local_group_head"):
        names += [f"{head}.projector.{i}.weight" for i in (0, 2, 4)] + [f"{head}.predictor.{i}.weight" for i in (0, 2)]
    names += [f"group_head.projector.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")]
    names += ["group_head.last_layer.weight_v"]
    flat = [name for name in names if name.endswith(".bias") or "norm" in name]
    groups = [
        {"name": "normal_params", "apply_wd": True, "lr_mult": 1.0},
        {"name": "patch_embed", "apply_wd": True, "lr_mult": "patch_embed_lr_mult"},
        {"name": "no_wd", "apply_wd": False, "lr_mult": 1.0},
        {"name": "patch_embed_no_wd", "apply_wd": False, "lr_mult": "patch_embed_lr_mult"},
    ]
    for group in groups:
        wanted = [name for name in names if (name in flat) != group["apply_wd"]]
        group["params"] = [name for name in wanted if ("patch_embed" in name) == ("patch_embed" in group["name"])]
    case.__dict__["arrays"] = {"norm_last_layer=True": groups}
    agrees(case)


def test_clipping_and_steps_with_other_numbers():
    case = golden("mugs", "clip_and_optimizers")
    case.params |= {"lr": [0.3, 0.2], "weight_decay": [0.1, 0.4], "clip": 1.1, "patch_embed_lr_mult": 0.5}
    case.params |= {"freeze_last_layer": 1, "epoch_of_step": [0, 1]}
    shapes = {"backbone.patch_embed.proj.bias": (3,), "backbone.cls_token": (1, 1, 2), "head.last_layer.w": (2, 3)}
    values = {name: random(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    inputs, outputs, moments = {f"in.param.{n}": v for n, v in values.items()}, {}, dict.fromkeys(shapes, 0.0)
    for step, (lr, decay) in enumerate(zip(case.params["lr"], case.params["weight_decay"], strict=True)):
        norms = []
        for seed, name in enumerate(shapes):
            grad = random(*shapes[name], seed=30 + 5 * step + seed) * 2
            norms.append(grad.norm())
            clipped = grad * min(1.0, float(1.1 / (grad.norm() + 1e-6)))
            inputs[f"in.step{step}.grad.{name}"] = grad
            outputs[f"out.step{step}.clipped.{name}"] = clipped
            if "last_layer" not in name or step > 0:
                wide = values[name].ndim > 1
                moments[name] = 0.9 * moments[name] + clipped + decay * wide * values[name]
                rate = lr * (0.5 if "patch_embed" in name else 1.0)
                values[name] = values[name] - rate * moments[name]
            outputs[f"out.sgd.step{step}.{name}"] = values[name]
        outputs[f"out.step{step}.norms"] = torch.stack(norms)
    agrees(rewrite(case, inputs, outputs))


@pytest.mark.parametrize("name", ["trajectory", "trajectory_variants"])
def test_what_is_wrong_in_a_whole_run_is_noticed(name):
    """Of one number of every kind of output."""
    case = golden("mugs", name)
    if name == "trajectory_variants":
        case.params["variants"] = {"lars": case.params["variants"]["lars"]}
        case.entry["outputs"] = [output for output in case.entry["outputs"] if ".lars." in output["key"]]
        case.__dict__["arrays"] = {name: array for name, array in case.arrays.items() if ".lars." in name}
    assert unnoticed(case) == []


def test_a_trajectory_without_local_crops_and_with_a_frozen_norm_follows_the_plain_formulation():
    """One step of other sizes: losses against the textbook, from the same networks."""
    p = {"dim": 6, "depth": 1, "heads": 2, "patch": 4, "img": 8, "hid": 5, "pred": 4, "out": 3, "gout": 7, "bott": 4}
    method = randomise(small_mugs(p, True, loss_weights=(1, 0.5, 2), queue_sizes=(9, 8), top_n=2))
    crops = [random(2, 3, 8, 8, seed=seed) for seed in range(4)]
    given = {"crops": [crop.clone() for crop in crops], "weak": torch.tensor([True, False])}
    found = method(given, Clock(0, 0))
    with torch.no_grad():
        networks = {"teacher": torch.cat(crops[:2]), "student": torch.cat(crops[2:])}
        classes, relations = {}, {}
        for side, images in networks.items():
            network, memory = getattr(method, side), method.memories[side]
            raw = network.backbone.get_intermediate_layers(images, norm=False)[0]
            query = raw.mean(dim=1)
            cosine = F.normalize(query, dim=1) @ F.normalize(memory.queue_q, dim=1).t()
            rows = memory.queue_k[cosine.topk(2, dim=1).indices]
            related = through(network.backbone.relation_blocks[0], torch.cat((query[:, None], rows), dim=1), 2)[0]
            relations[side] = rms(related[:, 0], network.backbone.norm)
            classes[side] = rms(raw[:, 0], network.backbone.norm)
        parts = []
        for head, features, queue in (
            ("instance_head", classes, method.queues["instance-sup"]),
            ("local_group_head", relations, method.queues["local-group-sup"]),
        ):
            keys = getattr(method.teacher, head)(features["teacher"]).unflatten(0, (2, -1))
            z = getattr(method.student, head)(features["student"])
            parts.append(contrast(z, keys, queue.queue, 0.2))
        targets = (method.teacher.group_head(classes["teacher"]) / 0.04).softmax(1).chunk(2)
        views = (method.student.group_head(classes["student"]) / 0.1).log_softmax(1).chunk(2)
        parts.append(-((targets[0] * views[1]).sum(1).mean() + (targets[1] * views[0]).sum(1).mean()) / 2)
    for name, part in zip(("instance-sup.", "local-group-sup.", "group-sup."), parts, strict=True):
        torch.testing.assert_close(found[name].detach(), part, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found["loss"].detach(), sum(parts) / 3.5, rtol=1e-10, atol=1e-12)
    assert found["weak aug. ratio"] == 0.5


def test_the_manifest_names_no_training_case_that_no_runner_knows():
    entries = json.loads((GOLDEN / "mugs" / "manifest.json").read_text())["cases"]
    training = {"backbone_forward", "heads", "local_group_memory", "infonce_loss", "group_loss", "param_groups"}
    training |= {"schedules", "clip_and_optimizers", "trajectory", "trajectory_variants", "two_rank_state"}
    training |= {"checkpoint_features", "knn"}
    assert training <= {entry["name"] for entry in entries}
    assert all(find_runner(golden("mugs", name)) for name in training) and judge
