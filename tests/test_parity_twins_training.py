"""Twins of golden cases of training: the same format with other numbers, and the runner follows.

What they expect is computed here, from the textbook form or with the product's functions: a runner that has taken a
number of its case for granted then disagrees. ``agrees`` also makes every expected number another one, and the runner
has to notice.
"""

import math
import random as python_random
import re

import numpy as np
import pytest
import torch

from evaluation.finetune_steps import Stepper, soft_cross_entropy
from methods.heads import DINOHead, IBOTHead
from methods.masking import MaskedViews, MaskRatio
from methods.multicrop import MultiCropNetwork
from models.finetuned import FinetunedSwin, FinetunedTransformer, layer_decay_groups
from models.swin import SwinTransformer
from models.vit import VisionTransformer
from tests.parity import find_runner, judge
from tests.parity.masks import NoCrops, symmetrised
from tests.parity.networks import build_vit
from tests.parity.swin import hash_images
from tests.twins import agrees, as_arrays, golden, random, randomise, rewrite, stored
from utils import cosine_scheduler, warmup_scheduler

# ---------------------------------------------------------------------------------------------------------------------
# Networks and heads of other sizes
# ---------------------------------------------------------------------------------------------------------------------


def test_a_transformer_of_other_sizes_on_images_that_are_not_square():
    case = golden("dino", "vit_forward")
    case.params |= {"dim": 20, "depth": 2, "heads": 5, "patch": 4, "img": 12}
    vit = randomise(build_vit(case.params)).eval()
    images = {"in/x_wide": random(2, 3, 8, 20), "in/x_tall": random(1, 3, 17, 13, seed=2)}
    outputs = {}
    with torch.no_grad():
        for name, x in images.items():
            kind, layers = name.removeprefix("in/x_"), vit.get_intermediate_layers(x, 2)
            outputs |= {f"out/cls_{kind}": vit(x), f"out/attn_{kind}": vit.get_last_selfattention(x)}
            outputs |= {f"out/inter0_{kind}": layers[0], f"out/inter_n1_{kind}": layers[1]}
    agrees(rewrite(case, stored("state", vit.state_dict()) | images, outputs))


@pytest.mark.parametrize(("heads", "relative"), [(2, False), (6, False), (4, True)])
def test_fine_tuned_networks_of_any_number_of_heads_and_blocks(heads, relative):
    """The manifest does not say how many heads there are, and only tables of relative positions show it."""
    case = golden("eval_core", "finetune_vit_relpos" if relative else "finetune_vit_cls")
    sizes = {"patch_size": 4, "embed_dim": 12, "depth": 3, "num_heads": heads, "img_size": 12}
    model = randomise(FinetunedTransformer(5, not relative, relative, use_mean_pooling=relative, **sizes)).eval()
    images = random(2, 3, 12, 12)
    with torch.no_grad():
        outputs = {"out/logits": model(images), "out/features": model.pooled(images)}
    agrees(rewrite(case, stored("state", model.state_dict()) | {"in/x": images}, outputs))


def test_layers_and_decays_of_other_networks():
    case = golden("eval_core", "layer_decay_groups")
    vit = FinetunedTransformer(
        3,
        True,
        True,
        use_mean_pooling=True,
        patch_size=8,
        embed_dim=8,
        depth=2,
        num_heads=2,
        img_size=16,
        init_values=0.1,
    )
    swin = FinetunedSwin(3, embed_dim=8, depths=(1, 3), num_heads=(2, 4), img_size=32, window_size=4)
    values = {}
    for kind, model, layers in (("vit", vit, 2), ("swin", swin, 4)):
        groups = layer_decay_groups(model, 0.8, 0.1)
        values[kind] = {n: [g["lr_scale"], g["weight_decay"]] for g in groups for n in g["names"]}
        values[f"{kind}_values"] = [0.8**power for power in range(layers + 1, -1, -1)]
    words = dict.fromkeys(("vit", "swin"), "name -> [lr_scale, weight_decay], layer_decay=0.8, weight_decay=0.1")
    agrees(rewrite(case, {}, {}, values, words))


def test_fine_tuning_in_pieces_with_a_clipped_gradient():
    case = golden("eval_core", "finetune_training")
    case.params |= {"update_freq": 3, "steps_per_epoch": 1, "clip_grad": 0.5, "layer_decay": 0.5, "weight_decay": 0.2}
    model = randomise(FinetunedTransformer(4, patch_size=4, embed_dim=8, depth=1, num_heads=4, img_size=8))
    inputs = stored("state0", {name: tensor.clone() for name, tensor in model.state_dict().items()})
    lr = cosine_scheduler(0.004, 1e-6, 2, 1, 1)
    stepper, losses = Stepper(model, layer_decay_groups(model, 0.5, 0.2), clip_grad=0.5), []
    for number in range(6):
        x, target = random(2, 3, 8, 8, seed=number), random(2, 4, seed=number).softmax(1)
        inputs |= {f"in/micro{number}_x": x, f"in/micro{number}_target": target}
        loss = soft_cross_entropy(model(x), target)
        (loss / 3).backward()
        losses.append(loss.item())
        if number % 3 == 2:
            stepper.step(lr[number // 3], 0.2)
    outputs = {"out/micro_losses": losses, "out/lr_schedule": lr} | stored("state_final", model.state_dict())
    agrees(rewrite(case, inputs, outputs))


@pytest.mark.parametrize("layers", [1, 2])
def test_clipping_and_freezing_a_head_of_other_layers(layers):
    case = golden("dino", "clip_and_freeze")
    case.params["clip"] = 0.9
    vit = VisionTransformer(patch_size=4, img_size=12, embed_dim=8, depth=2, num_heads=2)
    head = DINOHead(8, 6, norm_last_layer=False, nlayers=layers, hidden_dim=5, bottleneck_dim=4)
    named = dict(MultiCropNetwork(vit, head).named_parameters())
    grads = {name: random(*p.shape, seed=i) * 0.1 for i, (name, p) in enumerate(named.items())}
    norms = {name: grad.norm().item() for name, grad in grads.items()}
    clipped = {f"out/clipped/{n}": grad * min(1.0, 0.9 / (norms[n] + 1e-6)) for n, grad in grads.items()}
    frozen = {"grad_is_none_epoch1_freeze2": [n for n in named if "last_layer" in n], "grad_is_none_epoch2_freeze2": []}
    inputs = {f"in/grad/{name}": grad for name, grad in grads.items()}
    twin = rewrite(
        case, inputs, clipped, {"norms": norms, "grad_is_none_epoch1_freeze2": frozen["grad_is_none_epoch1_freeze2"]}
    )
    agrees(twin)


def test_a_teacher_whose_head_has_other_layers():
    case = golden("ibot", "teacher_init_from_student")
    sizes = {"out_dim": 6, "patch_out_dim": 6, "nlayers": 2, "hidden_dim": 7, "bottleneck_dim": 4}
    student = randomise(IBOTHead(5, **sizes, shared_head=False))
    state = student.state_dict()
    teacher = {name: state[name.replace("last_layer.", "last_layer2.")] for name in state}
    common = sorted(name for name, p in IBOTHead(5, **sizes, shared_head=True).named_parameters())
    agrees(rewrite(case, stored("student", state), stored("teacher_after", teacher), {"common_names": common}))


def test_swin_crops_of_three_sizes():
    case = golden("esvit", "swin_multicrop")
    p = case.params
    p |= {"depths": [1, 1], "num_heads": [2, 1], "local_sizes": [24, 16], "n_local": [1, 2]}
    sizes = [48, 48, 24, 16, 16]
    p["crops"] = [f"crop {i}: hash image seed {7 + 3 * i} shape (1,3,{s},{s})" for i, s in enumerate(sizes)]
    swin = randomise(
        SwinTransformer(
            img_size=48, patch_size=2, embed_dim=4, depths=[1, 1], num_heads=[2, 1], window_size=4, mlp_ratio=2.0
        )
    ).eval()
    heads = [randomise(DINOHead(8, 10, hidden_dim=9, bottleneck_dim=6), seed).eval() for seed in (2, 3)]
    crops = [hash_images(7 + 3 * i, 1, 3, s, s) for i, s in enumerate(sizes)]
    with torch.no_grad():
        logits = torch.cat([heads[0](swin(crop)) for crop in crops])
        tokens = [swin.forward_features(crop)[:, 1:] for crop in crops]
        regions = torch.cat([t.flatten(0, 1) for t in tokens])
        outputs = {"cls_logits": logits, "cls_logits_view_only": logits, "region_logits": heads[1](regions)}
    outputs |= {"region_features": regions, "npatch": [tokens[i].shape[1] for i in (0, 2, 3)]}
    inputs = {f"w::{name}": tensor for name, tensor in swin.state_dict().items()}
    for prefix, head in zip(("head", "head_dense"), heads, strict=True):
        inputs |= {f"w::{prefix}.{name}": tensor for name, tensor in head.state_dict().items()}
    case.__dict__["arrays"] = as_arrays(inputs | outputs)
    agrees(case)


# ---------------------------------------------------------------------------------------------------------------------
# Losses, schedules, masks
# ---------------------------------------------------------------------------------------------------------------------


def test_a_loss_of_other_crops_and_temperatures():
    case = golden("dino", "loss_multicrop")
    p = {
        "out_dim": 5,
        "batch": 2,
        "ncrops": 4,
        "epoch_of_step": [1, 3],
        "warmup_teacher_temp": 0.1,
        "teacher_temp": 0.3,
    }
    p |= {"warmup_teacher_temp_epochs": 2, "nepochs": 4, "student_temp": 0.5, "center_momentum": 0.6}
    case.params.clear()
    case.params.update(p)
    temps = warmup_scheduler(0.1, 0.3, 2, 4)
    centre = random(1, 5, seed=9)
    inputs, outputs = {"in/center0": centre}, {"out/teacher_temp_schedule": temps}
    for step, epoch in enumerate(p["epoch_of_step"]):
        student, teacher = random(8, 5, seed=step).requires_grad_(), random(4, 5, seed=5 + step)
        targets = ((teacher - centre) / temps[epoch]).softmax(1).chunk(2)
        log_probs = (student / 0.5).log_softmax(1).chunk(4)
        pairs = [-(q * p).sum(1).mean() for i, q in enumerate(targets) for j, p in enumerate(log_probs) if i != j]
        loss = sum(pairs) / len(pairs)
        centre = 0.6 * centre + 0.4 * teacher.mean(0, keepdim=True)
        inputs |= {f"in/student{step}": student, f"in/teacher{step}": teacher}
        outputs |= {f"out/loss{step}": loss, f"out/center{step}": centre}
        outputs[f"out/grad{step}"] = torch.autograd.grad(loss, student)[0]
    agrees(rewrite(case, inputs, outputs))


def test_the_two_centres_of_a_masked_loss_have_momenta_of_their_own():
    case = golden("ibot", "loss_global_local")
    case.params |= {"epoch_of_step": [0], "center_momentum": 0.3, "center_momentum2": 0.8}
    first = re.compile(r"(?<!center)(?<!center2_)0(_crop\d)?$|temp_")
    kept = {name: array for name, array in case.arrays.items() if first.search(name)}
    names = ("in/center0", "in/center2_0", "in/teacher_cls0", "in/teacher_patch0")
    start, start2, teacher, teacher2 = (case.arrays[name].astype(float) for name in names)
    kept |= {"in/center0": start, "in/center2_0": start2}
    kept["out/center0"] = 0.3 * start + 0.7 * teacher.mean(0, keepdims=True)
    kept["out/center2_0"] = 0.8 * start2 + 0.2 * teacher2.mean((0, 1))[None, None]
    outputs = {name: array for name, array in kept.items() if name.startswith("out/")}
    assert len(outputs) == 10
    agrees(rewrite(case, kept, outputs))


def test_schedules_of_other_lengths():
    case = golden("dino", "schedules")
    case.entry["inputs"] = {
        "args7": {
            "value": {
                "base_value": 2.0,
                "final_value": 1.0,
                "epochs": 3,
                "niter_per_ep": 2,
                "warmup_epochs": 1,
                "start_warmup_value": 0.5,
            }
        },
        "temp_args2": {
            "value": {"warmup_teacher_temp": 0.1, "teacher_temp": 0.3, "warmup_teacher_temp_epochs": 2, "nepochs": 3}
        },
    }
    cosine = [1 + (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    agrees(rewrite(case, {}, {"out/schedule7": [0.5, 2.0, *cosine], "out/temp2": [0.1, 0.3, 0.3]}))


def test_lars_with_other_numbers():
    case = golden("dino", "lars")
    case.params |= {"weight_decay": 0.3, "momentum": 0.5, "eta": 0.1, "lr": [0.2, 0.7]}
    weight, gradients = random(3, 2), [random(3, 2, seed=1), random(3, 2, seed=2)]
    inputs, outputs, p, update = {"in/p0": weight}, {}, weight, 0.0
    for step, (gradient, lr) in enumerate(zip(gradients, case.params["lr"], strict=True)):
        step_of = gradient + 0.3 * p
        update = 0.5 * update + step_of * 0.1 * p.norm() / step_of.norm()
        p = p - lr * update
        inputs[f"in/g{step}_0"], outputs[f"out/p{step}_0"] = gradient, p
    agrees(rewrite(case, inputs, outputs))


def test_mask_statistics_of_a_grid_that_is_not_square():
    case = golden("ibot", "masks_statistics")
    config = {"pred_ratio": 0.4, "pred_ratio_var": 0.0, "grid": [5, 9], "pred_shape": "block"}
    case.params["samples"] = 300
    case.entry["inputs"] = {"config3": {"value": config}}
    views = MaskedViews(NoCrops(), 1, (5, 9), "block", MaskRatio([0.4], [0.0]))
    masks = torch.stack([views(None, (0, 0, i))["masks"][0] for i in range(300)]).double()
    fraction = masks.mean(dim=(1, 2))
    stats = {"mean_fraction": fraction.mean(), "std_fraction": fraction.std(), "p_empty": 0.0}
    stats |= {"center_cell": masks[:, 2, 4].mean(), "corner_cell": masks[:, 0, 0].mean()}
    stats = {name: float(value) for name, value in stats.items()}
    stats["quantiles_05_25_50_75_95"] = np.quantile(fraction.numpy(), (0.05, 0.25, 0.5, 0.75, 0.95)).tolist()
    values = {"config3_stats": stats, "pred_start_epoch_4": {"epoch3_total": 0, "epoch4_all_nonempty": True}}
    wrong = {"config3_stats": {"mean_fraction": 0.3}, "pred_start_epoch_4": {"epoch3_total": 1}}
    twin = rewrite(case, {}, {"out/config3_cell_frequency": masks.mean(0)}, values)
    assert judge(twin, find_runner(twin)).problems == []
    for name, value in wrong.items():
        twin.entry["outputs"][name]["value"] |= value
    problems = judge(twin, find_runner(twin)).problems
    assert [problem.partition(":")[0] for problem in problems] == ["config3_stats mean_fraction", "pred_start_epoch_4"]


def test_cells_of_a_square_are_reflected_in_its_diagonals_too():
    cells = np.arange(9.0).reshape(3, 3)
    assert np.allclose(symmetrised(cells), symmetrised(cells.T))
    assert np.allclose(symmetrised(cells[:, :2]), [[3.5, 3.5]] * 3)


def test_seeded_masks_of_other_seeds_on_grids_that_are_not_square():
    case = golden("ibot", "masks_seeded")
    config = {"pred_ratio": [0.2, 0.5], "pred_ratio_var": [0.1, 0.0], "pred_shape": "rand"}
    case.entry["inputs"] = {"config8": {"value": config}}
    rng, shuffle = python_random.Random(11), np.random.RandomState(11).shuffle
    masks = {}
    for crop, (rows, columns) in enumerate([(3, 8), (6, 2)]):
        count = int(MaskRatio([0.2, 0.5], [0.1, 0.0]).draw(0, rng) * rows * columns)
        cells = np.hstack([np.zeros(rows * columns - count), np.ones(count)])
        shuffle(cells)
        masks[f"out/config8_seed11_crop{crop}"] = cells.reshape(rows, columns).astype(bool)
    agrees(rewrite(case, {}, masks))
