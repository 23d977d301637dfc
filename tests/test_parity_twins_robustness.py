"""Twins of golden cases of retrieval, robustness and correspondence: the same format with other numbers."""

import numpy as np
import torch
from PIL import Image

from models.matching import load_tensors
from models.reading import read_backbone
from tests.parity import find_runner, judge
from tests.parity.networks import build_vit
from tests.twins import agrees, as_arrays, copied, golden, random, rewrite


def area_under_precision(hits: list[bool], relevant: int) -> float:
    """Average precision as the area of trapezoids, image by image."""
    area = recall = found = 0.0
    before = 1.0
    for looked, hit in enumerate(hits, start=1):
        found += hit
        precision = found / looked
        area += (found / relevant - recall) * (before + precision) / 2
        recall, before = found / relevant, precision
    return area


def test_retrieval_is_scored_with_other_lists_and_ks():
    case = golden("eval_core", "retrieval_map")
    database, queries = random(15, 5, seed=1).numpy(), random(3, 5, seed=2).numpy()
    gnd = [
        {"easy": [1, 4], "hard": [2], "junk": []},
        {"easy": [], "hard": [3, 9, 14], "junk": [0, 5, 6]},
        {"easy": [], "hard": [], "junk": [1]},
    ]
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    ranks = np.argsort(-(unit(database) @ unit(queries).T), axis=0)
    case.params["ks"] = [2, 7]
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    small = Image.fromarray(image).resize((70, 90), Image.BICUBIC)
    small.thumbnail((50, 50), Image.LANCZOS)
    values = {"gnd": gnd, "thumbnail_size": list(small.size)}
    for name, relevant, ignored in (("M", ("easy", "hard"), ("junk",)), ("H", ("hard",), ("junk", "easy"))):
        aps, precisions = [], []
        for q, lists in enumerate(gnd):
            wanted, out = ([image for key in keys for image in lists[key]] for keys in (relevant, ignored))
            hits = [image in wanted for image in ranks[:, q] if image not in out]
            if not wanted:
                aps.append(None)
                continue
            aps.append(area_under_precision(hits, len(wanted)))
            last = max(place for place, hit in enumerate(hits, 1) if hit)
            precisions.append([sum(hits[: min(k, last)]) / min(k, last) for k in case.params["ks"]])
        mean = float(np.mean([ap for ap in aps if ap is not None]))
        values[name] = {"mAP": mean, "aps": aps, "mP_at_k": np.mean(precisions, axis=0).tolist()}
    inputs = {"in/db_features": database, "in/query_features": queries, "in/seed_image": image}
    outputs = {"out/ranks": ranks, "out/thumbnail50": np.asarray(small)[::3, ::3]}
    case = rewrite(case, inputs, outputs, values, {"out/thumbnail50": "thumbnail((50,50), LANCZOS), every 3rd pixel"})
    case.entry["inputs"] = {
        "gnd": {"value": case.entry["outputs"].pop("gnd")["value"]},
        "in/seed_image": {"meaning": "Pillow bicubic resize of this to (width,height)=(70,90)"},
    }
    agrees(case)


def test_copies_are_described_and_whitened_with_other_powers():
    case = golden("eval_core", "copy_detection")
    case.params |= {"gem_p": 3, "gem_eps": 1e-2, "whitening_power": 0.25}
    tokens, learnt = random(2, 7, 4, seed=1), random(30, 6, seed=2)
    learnt[:, 5] = learnt[:, 4] + 1e-5 * learnt[:, 5]  # a direction without variance
    database, queries = random(9, 6, seed=3), random(4, 6, seed=4)
    gem = (tokens[:, 1:].clamp(min=1e-2) ** 3).mean(1) ** (1 / 3)
    values, vectors = np.linalg.eigh((learnt.T @ learnt).numpy() / len(learnt))
    scale = np.maximum(values, values.max() * 1e-5) ** -0.25
    white = [((x - learnt.mean(0)).numpy() @ vectors) * scale for x in (queries, database)]
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in white)
    rows = [{"ranks": [1, 5], "nres": 3, "ap": area_under_precision([False, True, False, False, False, True], 3)},
            {"ranks": [], "nres": 1, "ap": 0.0}]  # fmt: skip
    inputs = {"in/tokens": tokens, "in/whitening_features": learnt, "in/database": database, "in/queries": queries}
    outputs = {"out/descriptor": torch.cat((tokens[:, 0], gem), dim=1), "out/similarity": a @ b.T}
    agrees(rewrite(case, inputs, outputs, {"average_precision": rows}))


def test_masked_images_have_other_ratios_grids_and_classes():
    case = golden("attmask", "masked_eval")
    p = case.params
    labels, generator = torch.tensor([3, 0, 2, 1, 5, 6]), torch.Generator().manual_seed(3)
    images = torch.from_numpy(case.arrays["images"][:6])
    attentioner, model = (build_vit(p["model"]).double().eval() for _ in range(2))
    attentioner.load_state_dict(case.state("attentioner"), strict=False)
    load_tensors(model, *read_backbone(case.folder / "checkpoint_plain.pth", "teacher"))
    p["n_last_blocks"], p["masked_images_is_for_ratio"], p["fill_value_normalised"] = 2, 0.25, [-1.5, 0.25, 3.0]
    weight, bias = torch.randn(9, 24, generator=generator, dtype=torch.float64), random(9, seed=4)
    probabilities = attentioner.get_last_selfattention(images.double(), queries=1)[:, :, 0, 1:].detach().mean(1)
    outputs, results = {"attention": probabilities}, []
    for number, ratio in enumerate((0.25, 0.8)):
        count = int(64 * ratio)
        order = probabilities.argsort(dim=1, descending=True)
        mask = torch.zeros(6, 64, dtype=torch.bool)
        for row, places in zip(mask, order, strict=True):
            row[places[:count]] = True
        outputs[f"mask_{number}"] = mask.view(6, 8, 8)
        pixels = mask.view(6, 1, 8, 1, 8, 1).expand(6, 3, 8, 4, 8, 4).reshape(6, 3, 32, 32)
        seen = torch.where(pixels, torch.tensor(p["fill_value_normalised"]).view(3, 1, 1), images)
        results.append({"masking_ratio": ratio, "masked_tokens": count, **answers(model, seen, labels, weight, bias)})
        if ratio == 0.25:
            outputs["masked_images"] = seen
    state = {name: case.arrays[name] for name in case.names("attentioner/")}
    inputs = {"images": images, "labels": labels, "linear_weight": weight, "linear_bias": bias} | state
    case.__dict__["arrays"] = as_arrays(inputs | outputs)
    case.entry["outputs"] |= {"results": results, "clean": answers(model, images, labels, weight, bias)}
    agrees(case)


def answers(model, images, labels, weight, bias) -> dict:
    with torch.no_grad():
        tokens = model.get_intermediate_layers(images.double(), 2)
    logits = torch.cat([layer[:, 0] for layer in tokens], dim=1) @ weight.T + bias
    order = logits.argsort(dim=1, descending=True)
    right = order == labels[:, None]
    loss = -logits.log_softmax(dim=1)[torch.arange(len(labels)), labels].mean().item()
    return {"acc1": 100 * right[:, 0].double().mean().item(), "acc5": 100 * right[:, :5].sum().item() / len(labels),
            "loss": loss}  # fmt: skip


def test_blocks_are_of_other_grids_and_shares():
    case = golden("eval_core", "occlusion_shuffle")
    side = case.params["img"] = 48
    image = np.arange(side * side, dtype=np.int32).reshape(side, side)
    rng = np.random.default_rng(5)
    order, lost = rng.permutation(12), rng.permutation(36)[:11]
    moved, kept = np.empty_like(image), np.ones_like(image)
    for j, k in enumerate(order):  # blocks of 12 x 16 pixels: 4 rows, 3 columns
        moved[j // 3 * 12 :, j % 3 * 16 :][:12, :16] = image[k // 3 * 12 :, k % 3 * 16 :][:12, :16]
    for k in lost:
        kept[k // 6 * 8 + 8 : k // 6 * 8 + 16, k % 6 * 8 + 8 : k % 6 * 8 + 16] = 0
    attention = random(3, 10, seed=6).abs().numpy()
    stay = np.zeros((2, 3, 10), bool)
    for image_number, row in enumerate(attention):
        mass = 0.0
        for patch in np.argsort(row):
            mass += row[patch] / row.sum()
            stay[0, image_number, patch] = mass <= 0.3
            stay[1, image_number, patch] = mass > 0.3
    case.entry["inputs"] = {
        "shuffle_4x3": {"value": {"shuffle": True, "shuffle_size": [4, 3], "random_offset_drop": False}},
        "offset_6": {"value": {"shuffle": False, "shuffle_size": 6, "random_offset_drop": True}},
    }
    inputs = {"in/shuffle_4x3_indices": order, "in/offset_6_indices": lost, "in/saliency_attention": attention}
    outputs = {"out/shuffle_4x3_image": moved[::5, ::5], "out/offset_6_image": (image * kept)[::3, ::3]}
    outputs |= {"out/saliency_keep_bestTrue": stay[0], "out/saliency_keep_bestFalse": stay[1]}
    words = {"out/shuffle_4x3_image": "img[0,0,::5,::5]", "out/offset_6_image": "img[0,0,::3,::3]"}
    words |= {name: "patches kept visible; drop_lambda 0.7" for name in outputs if "saliency" in name}
    agrees(rewrite(case, inputs, outputs, words=words))


def test_calibration_has_other_bins():
    case = golden("eval_core", "calibration")
    case.entry["tests"] = "RMS calibration error (bins of 30 samples) and AURRA"
    confidence = np.random.default_rng(1).random(170)
    correct = (np.random.default_rng(2).random(170) < confidence**2).astype(np.int8)
    order = np.argsort(confidence)
    gaps = [abs(confidence[order[i : i + 30]].mean() - correct[order[i : i + 30]].mean()) for i in range(0, 120, 30)]
    curve = [correct[order[::-1][:n]].mean() for n in range(1, 171)]
    values = {"rms_calibration_error": float(np.sqrt(sum(30 / 170 * gap**2 for gap in gaps))),
              "l1": float(sum(30 / 170 * gap for gap in gaps)), "aurra": float(np.mean(curve))}  # fmt: skip
    agrees(rewrite(case, {"in/confidence": confidence, "in/correct": correct}, {}, values))


def test_other_foregrounds_are_vulnerable():
    case = golden("attmask", "adv_backgrounds")
    arrays = dict(case.arrays)
    keep = [3, 1]
    case.params["class_to_super"] = {str(i): i % 3 - 1 for i in range(7)}
    predictions = arrays["pred_per_background"][keep][:, :4]
    case.params["fg_class"] = [int(predictions[0, 0]) % 3 - 1, 5]
    mapped = np.array([i % 3 - 1 for i in range(7)])
    wrong = [
        bool((mapped[row] != label).any()) for row, label in zip(predictions, case.params["fg_class"], strict=True)
    ]
    case.__dict__["arrays"] = {"backgrounds": arrays["backgrounds"][:4], "foregrounds": arrays["foregrounds"][keep],
                               "fg_masks": arrays["fg_masks"][keep], "pred_per_background": predictions}  # fmt: skip
    case.entry["outputs"]["vulnerable"] = wrong
    agrees(case)
    predicted = golden("attmask", "in9_map")
    predicted.entry["inputs"] = {"pred": [0, 160, 20, 171], "labels": [8, 0, 2, 0]}
    predicted.entry["outputs"] = {"accuracy": 0.5, "percent_2dp": "50.00"}
    assert judge(predicted, find_runner(predicted)).status == "ok"
    for name, wrong in (("accuracy", 0.25), ("percent_2dp", "25.00")):
        other = copied(predicted)
        other.entry["outputs"][name] = wrong
        assert judge(other, find_runner(other)).problems


def test_parts_are_of_another_number_of_patches():
    case = golden("eval_core", "part_linear_feature")
    case.params["topk"] = 3
    tokens, attention = random(2, 8, 5, seed=1), random(2, 2, 8, 8, seed=2).softmax(dim=-1)
    order = [sorted(range(7), key=lambda j, b=b: float(attention[b, :, 0, 1 + j].sum())) for b in range(2)]
    expected = {f"out/feature_reverse{least}": torch.stack([tokens[b, 1:][places[:3] if least else places[-3:]].mean(0)
                for b, places in enumerate(order)]) for least in (False, True)}  # fmt: skip
    agrees(rewrite(case, {"in/tokens": tokens, "in/attention": attention}, expected))


def test_views_correspond_on_other_grids_and_radii():
    case = golden("eval_core", "correspondence")
    case.params |= {"img_size": 42, "patch_size": 14, "eval_radius": [0, 2]}
    corners = [
        np.array([[0.0, 0.1, 0.5, 0.8], [0.2, 0.2, 0.9, 1.0]]),
        np.array([[0.1, 0.9, 0.7, 0.3], [0.0, 0.0, 0.4, 0.4]]),
    ]
    centres = [np.array([[[c[0] + (c[2] - c[0]) * (i + 0.5) / 3, c[1] + (c[3] - c[1]) * (j + 0.5) / 3]
               for i in range(3) for j in range(3)] for c in view]) for view in corners]  # fmt: skip
    tokens = [random(2, 9, 4, seed=seed).numpy() for seed in (1, 2)]
    overlap, match, true = np.zeros((2, 9), bool), np.zeros((2, 9), int), np.zeros((2, 9), int)
    for b in range(2):
        for i in range(9):
            y, x = centres[0][b, i]
            ys, xs = centres[1][b].T
            overlap[b, i] = ys.min() - 1 / 6 <= y <= ys.max() + 1 / 6 and xs.min() - 1 / 6 <= x <= xs.max() + 1 / 6
            match[b, i] = np.argmax([tokens[0][b, i] @ other for other in tokens[1][b]])
            true[b, i] = np.argmin((ys - y) ** 2 + (xs - x) ** 2)
    outputs = {"pos1": centres[0], "pos2": centres[1], "overlap": overlap, "match": match, "true_match": true}
    for radius in (0, 2):
        near = (abs(match // 3 - true // 3) <= radius) & (abs(match % 3 - true % 3) <= radius)
        outputs[f"accuracy_radius{radius}"] = np.array(near[overlap].mean())
    inputs = {
        f"in/{kind}{i + 1}": v for kind, vs in (("tokens", tokens), ("corner", corners)) for i, v in enumerate(vs)
    }
    agrees(rewrite(case, inputs, {f"out/{name}": value for name, value in outputs.items()}))


def test_mirrored_images_correspond_with_other_cells_and_pairs():
    case = golden("esvit", "correspondence_measure")
    case.params |= {"grid": 4, "cell": 16, "top_pairs": 5, "images": 2, "dim": 3}
    arrays, rows = {}, []
    for image in range(2):
        first = random(16, 3, seed=image).numpy()
        second = first.reshape(4, 4, 3)[:, ::-1].reshape(16, 3) + 0.3 * random(16, 3, seed=image + 9).numpy()
        arrays |= {f"fea1_{image}": first, f"fea2_{image}": second}
        cosines = (first @ second.T) / np.linalg.norm(first, axis=1)[:, None] / np.linalg.norm(second, axis=1)
        match = cosines.argmax(1)
        order = np.argsort(-cosines.max(1))
        errors = []
        for i in order[:5]:
            x, y, other_x, other_y = (16 * k + 8 for k in (i % 4, i // 4, match[i] % 4, match[i] // 4))
            errors.append(np.hypot(64 - x - other_x, y - other_y))
        rows.append([np.mean(np.array(errors) == 0), np.mean(errors), cosines.max(1)[order[5]]])
        arrays |= {f"match_{image}": match, f"order_{image}": order}
    arrays |= {"per_image": np.array(rows), "average": np.mean(rows, axis=0)}
    case.__dict__["arrays"] = arrays
    case.entry["outputs"] = [{"key": name} for name in arrays if not name.startswith("fea")]
    agrees(case)


def test_attention_has_other_queries_heads_and_thresholds():
    case = golden("esvit", "attention_analysis")
    case.params |= {"query": 2, "threshold": 0.35, "grid": 3}
    attention = (3 * random(1, 5, 9, 9, seed=4)).softmax(dim=-1).numpy()
    bits = -(attention[0] * np.log2(attention[0])).sum(-1)
    order = np.argsort(-bits[:, 2])
    masks = np.zeros((5, 9), np.int8)
    for row, head in enumerate(order):
        mass = 0.0
        for patch in np.argsort(-attention[0, head, 2]):
            masks[row, patch] = mass < 0.35
            mass += attention[0, head, 2, patch]
    outputs = {"entropy_sorted": bits[order, 2], "entropy": bits[:, 2], "entropy_mean_over_queries": bits.mean(1)}
    case.__dict__["arrays"] = {"attention": attention, **outputs, "head_order": order, "masks": masks.reshape(5, 3, 3)}
    agrees(case)
