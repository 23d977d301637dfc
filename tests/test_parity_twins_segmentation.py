"""Twins of the golden cases of segmentation: the same format with other numbers, computed in plain steps."""

import colorsys

import numpy as np
import torch
import torch.nn.functional as F

from evaluation.segmentation import LinearHead
from tests.parity import find_runner, judge
from tests.test_parity_twins_dense import plain_maps
from tests.twins import agrees, as_arrays, copied, golden, random, randomise, rewrite, stored


def plain_logits(state: dict, maps: torch.Tensor, mean: torch.Tensor, var: torch.Tensor) -> torch.Tensor:
    shape = (1, -1, 1, 1)
    x = (maps - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt()
    x = x * state["bn.weight"].view(shape) + state["bn.bias"].view(shape)
    return torch.einsum("kd,bdhw->bkhw", state["conv_seg.weight"][..., 0, 0], x) + state["conv_seg.bias"].view(shape)


def plain_loss(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear").movedim(1, -1)
    there = labels != 255
    loss = -logits.log_softmax(-1)[there].gather(1, labels[there][:, None]).sum() / labels.numel()
    return loss, 100.0 * (logits.argmax(-1)[there] == labels[there]).double().mean()


def head_state(dim: int, classes: int) -> dict[str, torch.Tensor]:
    state = randomise(LinearHead(dim, classes)).state_dict()
    return state | {"bn.running_mean": random(dim, seed=7), "bn.running_var": random(dim, seed=8).abs() + 0.3}


def test_a_head_of_other_classes_and_sizes():
    case = golden("unic", "semseg_head")
    case.params |= {"num_classes": 5, "dim": 9}
    state, maps = head_state(9, 5), random(2, 9, 3, 7)
    labels = torch.randint(0, 5, (2, 17, 40))
    labels[1, :9] = 255
    leaves = {
        name: state[name].requires_grad_() for name in ("conv_seg.weight", "conv_seg.bias", "bn.weight", "bn.bias")
    }
    mean, var = maps.mean((0, 2, 3)), maps.var((0, 2, 3), correction=0)
    logits = plain_logits(state, maps, mean, var)
    loss, share = plain_loss(logits, labels)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    count = maps[:, 0].numel()
    moved = {"mean": mean, "var": var * count / (count - 1)}
    outputs = {f"out/after/bn.running_{n}": 0.9 * state[f"bn.running_{n}"] + 0.1 * x for n, x in moved.items()}
    outputs |= {f"out/grad/{name}": g for name, g in zip(leaves, gradients, strict=True)}
    outputs |= {"out/eval_logits": plain_logits(state, maps, state["bn.running_mean"], state["bn.running_var"])}
    outputs |= {"out/train_logits": logits, "out/loss_ce": loss, "out/acc_seg": share[None].float()}
    outputs |= {"out/after/bn.num_batches_tracked": np.int64(1)}
    inputs = stored("head", state) | {"in/feature_map": maps, "in/label": labels[:, None].numpy()}
    agrees(rewrite(case, inputs, outputs))


def test_training_of_another_length_rate_and_momentum():
    case = golden("unic", "semseg_train")
    settings = {"base_lr": 0.03, "weight_decay": 0.02, "betas": [0.8, 0.95], "max_iters": 9, "warmup_iters": 3}
    case.params |= settings | {"warmup_ratio": 0.1}
    state, maps, labels = head_state(6, 4), random(4, 3, 6, 2, 5), torch.randint(0, 4, (4, 3, 1, 9, 11))
    labels[:, :, :, 4] = 255
    inputs = stored("head", state) | {"in/feature_maps": maps, "in/labels": labels.numpy().astype(np.uint8)}
    names = ("bn.weight", "bn.bias", "conv_seg.weight", "conv_seg.bias")
    p = {name: state[name].clone() for name in names}
    buffers = {"mean": state["bn.running_mean"].clone(), "var": state["bn.running_var"].clone()}
    first, second = ({name: torch.zeros_like(x) for name, x in p.items()} for _ in range(2))
    losses, rates = [], []
    for i in range(4):
        rates.append(0.03 * (1 - i / 9) * (0.1 + 0.9 * i / 3 if i < 3 else 1))
        leaves = {name: x.clone().requires_grad_() for name, x in p.items()}
        mean, var = maps[i].mean((0, 2, 3)), maps[i].var((0, 2, 3), correction=0)
        loss, _ = plain_loss(plain_logits(leaves, maps[i], mean, var), labels[i, :, 0])
        losses.append(loss.item())
        count = maps[i][:, 0].numel()
        for name, value in (("mean", mean), ("var", var * count / (count - 1))):
            buffers[name] = 0.9 * buffers[name] + 0.1 * value
        for name, g in zip(names, torch.autograd.grad(loss, [leaves[n] for n in names]), strict=True):
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.95 * second[name] + 0.05 * g * g
            step = (first[name] / (1 - 0.8 ** (i + 1))) / ((second[name] / (1 - 0.95 ** (i + 1))).sqrt() + 1e-8)
            p[name] = p[name] * (1 - rates[-1] * 0.02) - rates[-1] * step
    outputs = {"out/loss": np.array(losses), "out/lr": np.array(rates)} | {f"out/head/{n}": x for n, x in p.items()}
    outputs |= {f"out/head/bn.running_{name}": x for name, x in buffers.items()}
    agrees(rewrite(case, inputs, outputs | {"out/head/bn.num_batches_tracked": np.int64(4)}))


def test_learning_rates_of_another_power_and_floor():
    case, iterations = golden("unic", "semseg_lr"), [0, 3, 9, 10, 17, 29]
    run = {"base_lr": 0.5, "max_iters": 30, "warmup_iters": 10, "warmup_ratio": 0.2, "power": 2.0, "min_lr": 0.1}
    rates = []
    for i in iterations:
        rate = 0.1 + 0.4 * ((30 - i) / 30) ** 2
        rates.append(rate * (0.2 + 0.8 * i / 10) if i < 10 else rate)
    case.__dict__["arrays"] = {"semseg_lr": [run | {"iters": iterations, "lr": rates}]}
    assert judge(case, find_runner(case)).status == "ok"
    rates[-1] *= 1.001
    assert judge(case, find_runner(case)).status == "FAIL"


def test_inference_with_other_windows_blocks_and_sizes():
    case = golden("unic", "semseg_inference")
    student = golden("unic", "student_vit")
    heads, classes = student.params["num_heads"], 3
    backbone = {name.replace("blocks.0.", "blocks.", 1): tensor for name, tensor in student.state("sd").items()}
    dim, patch = backbone["patch_embed.proj.weight"].shape[0], backbone["patch_embed.proj.weight"].shape[-1]
    side = round((backbone["pos_embed"].shape[1] - 1) ** 0.5)
    state = head_state(dim, classes)

    def logits_of(image: torch.Tensor) -> torch.Tensor:
        height, width = image.shape[-2:]
        down, right = -height % patch, -width % patch
        padded = F.pad(image, (right // 2, right - right // 2, down // 2, down - down // 2))
        (maps,) = plain_maps(backbone, padded, (side, side), heads, [1], True, 1e-6)
        logits = plain_logits(state, maps, state["bn.running_mean"], state["bn.running_var"])
        return F.interpolate(logits, size=(height, width), mode="bilinear")

    window = {"mode": "slide", "crop_size": [24, 32], "stride": [17, 9]}
    variants = [{"name": "a", **window, "ori_shape": [61, 40]}, {"name": "b", "mode": "whole", "ori_shape": [29, 35]}]
    inputs, outputs = stored("head", state), {}
    for variant, size in zip(variants, ((43, 41), (30, 37)), strict=True):
        name = variant["name"]
        variant["padded_to_multiple_of"] = patch
        image = inputs[f"{name}/in/image"] = random(1, 3, *size)
        if variant["mode"] == "slide":
            total, cover = torch.zeros(1, classes, *size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
            for top in (0, 17, 43 - 24):
                for left in (0, 41 - 32):
                    part = (slice(top, top + 24), slice(left, left + 32))
                    total[..., part[0], part[1]] += logits_of(image[..., part[0], part[1]])
                    cover[part] += 1
            first, logits = logits_of(image[..., :24, :32]), total / cover
        else:
            first = logits = logits_of(image)
        logits = F.interpolate(logits, size=variant["ori_shape"], mode="bilinear")
        outputs |= {f"{name}/out/first_window_logits": first, f"{name}/out/logits": logits}
        outputs[f"{name}/out/pred"] = logits.argmax(1).numpy()
    case.params |= {"variants": variants, "out_block": 1}
    case.entry["tolerance"] = {"logits": {"atol": 1e-9, "rtol": 1e-9}, "pred": "exact"}
    agrees(rewrite(case, inputs, outputs))


def test_mean_iou_of_other_classes_and_of_maps_that_count_from_zero():
    for reduce in (True, False):
        case, classes, rng = golden("unic", "semseg_miou"), 6, np.random.default_rng(int(reduce))
        inputs, sums = {}, np.zeros((4, classes))
        for i in range(3):
            inputs[f"in/pred{i}"] = predicted = rng.integers(0, classes - 1, (7 + i, 5))
            truth = rng.integers(0, classes - 1, (7 + i, 5))
            there = rng.random((7 + i, 5)) < 0.8
            raw = np.where(there, truth + 1, 0) if reduce else np.where(there, truth, 255)
            inputs[f"in/gt{i}"] = raw.astype(np.uint8)
            for k in range(classes):
                hit, said, meant = ((x == k) & there for x in (predicted, predicted, truth))
                sums[:, k] += [(hit & meant).sum(), (said | meant).sum(), said.sum(), meant.sum()]
        with np.errstate(invalid="ignore"):
            iou, accuracy = sums[0] / sums[1], sums[0] / sums[3]
        outputs = dict(zip(("intersect", "union", "pred_area", "label_area", "IoU", "Acc"),
                           (*sums, iou, accuracy), strict=True))  # fmt: skip
        shares = {"mIoU": np.nanmean(iou), "mAcc": np.nanmean(accuracy), "aAcc": sums[0].sum() / sums[3].sum()}
        case.params |= {"num_classes": classes, "reduce_zero_label": reduce}
        case.params |= {f"{name}_reported": round(100 * share, 2) / 100 for name, share in shares.items()}
        agrees(rewrite(case, inputs, {f"out/{name}": values for name, values in outputs.items()}))
        case.params["mIoU_reported"] += 0.01
        assert judge(case, find_runner(case)).status == "FAIL"


def test_a_pipeline_of_other_sizes_colours_and_draws():
    case, rng = golden("unic", "semseg_pipeline"), np.random.default_rng(5)
    image, labels = rng.integers(0, 256, (14, 11, 3)).astype(np.uint8), rng.integers(0, 9, (14, 11)).astype(np.uint8)
    inputs, outputs = {"in/img_bgr": image, "in/seg": labels}, {}
    case.params["rescale_sizes"] = [{"w": 11, "h": 14, "scale": [10**8, 24], "new_wh": [24, 31]}]
    case.params["resize"] = [{"ratio": 1.0, "scale": [10**8, 22]}, {"ratio": 1.0, "scale": [10**8, 6]}]
    for number, size in enumerate([(22, 28), (6, 8)]):
        outputs[f"resize{number}/img"] = plain_resize(image, size).round().astype(np.uint8)
        rows, columns = (np.arange(new) * old // new for new, old in zip(size[::-1], labels.shape, strict=True))
        outputs[f"resize{number}/seg"] = labels[rows][:, columns]
    draws = [(None, 0, 1.4, None, None), (-12.5, 1, 0.7, 1.2, -9), (None, 1, None, 0.6, 15)]
    keys = ("brightness", "mode", "contrast", "saturation", "hue")
    case.params["photometric"] = [dict(zip(keys, row, strict=True)) for row in draws]
    for number, row in enumerate(draws):
        outputs[f"photo{number}/img_bgr"] = plain_photometric(image[..., ::-1], *row)[..., ::-1]
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    outputs["normalise/rgb"] = ((image[..., ::-1] - mean) / std).astype(np.float32)
    crops = [np.repeat([0, 1], [75, 25]), np.repeat([0, 1], [74, 26]), np.repeat([0, 255], [50, 50])]
    case.params["crop_accept"] = [False, True, False]
    inputs |= {f"crop/seg{i}": crop.reshape(10, 10).astype(np.uint8) for i, crop in enumerate(crops)}
    case.params["center_padding"] = [{"h": 29, "w": 41, "multiple": 14, "pad_left_right_top_bottom": [0, 1, 6, 7]}]
    case.__dict__["arrays"] = as_arrays(inputs | outputs)
    result = judge(case, find_runner(case))
    assert result.status == "ok", result.problems
    for name in outputs:
        wrong = copied(case)
        wrong.arrays[name] = wrong.arrays[name].astype(np.float64)
        wrong.arrays[name].flat[3] += 20
        assert judge(wrong, find_runner(wrong)).status == "FAIL", name
    for name in ("crop_accept", "center_padding", "rescale_sizes"):
        wrong = copied(case)
        value = wrong.params[name][0]
        wrong.params[name][0] = not value if isinstance(value, bool) else value | {"new_wh": [1, 1], "h": 28}
        assert judge(wrong, find_runner(wrong)).status == "FAIL", name


def plain_resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear, of a pixel's centre."""
    result = image.astype(np.float64)
    for axis, new in ((0, size[1]), (1, size[0])):
        old = image.shape[axis]
        where = ((np.arange(new) + 0.5) * old / new - 0.5).clip(0, old - 1)
        before = np.minimum(where.astype(int), old - 2)
        share = (where - before).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        result = result.take(before, axis) * (1 - share) + result.take(before + 1, axis) * share
    return result


def plain_photometric(rgb: np.ndarray, brightness, mode, contrast, saturation, hue) -> np.ndarray:
    def cut(x):
        return np.trunc(np.clip(x, 0, 255))

    x = rgb.astype(np.float64)
    x = cut(x + (brightness or 0))
    x = cut(x * contrast) if mode == 1 and contrast else x
    if saturation or hue:
        hsv = np.array([colorsys.rgb_to_hsv(*pixel / 255) for pixel in x.reshape(-1, 3)])
        hsv[:, 1] = (hsv[:, 1] * (saturation or 1)).clip(0, 1)
        hsv[:, 0] = (hsv[:, 0] + (hue or 0) / 180) % 1
        x = np.array([colorsys.hsv_to_rgb(*pixel) for pixel in hsv]).reshape(x.shape) * 255
    return (cut(x * contrast) if mode == 0 and contrast else x).round().astype(np.uint8)
