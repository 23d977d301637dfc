"""Runners: linear segmentation as UNIC measures it."""

import re
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image

from data.segmentation import (
    Photometric,
    TestScale,
    classes_of,
    distort,
    is_varied,
    normalised,
    rescaled,
    resize_image,
    resize_labels,
)
from evaluation.segmentation import (
    IGNORED,
    LinearHead,
    Segmenter,
    Window,
    build_optimizer,
    centre_padding,
    count_pixels,
    image_logits,
    learning_rate,
    pixel_loss,
    published,
    resized,
    resized_classes,
    scores,
    train_step,
    windows,
)
from tests.parity import Case, load_cases
from tests.parity.tolerance import EXACT, Tolerance
from tests.parity.unic_models import built, our_names


def head_of(case: Case) -> LinearHead:
    state = case.state("head")
    classes, dim = state["conv_seg.weight"].shape[:2]
    head = LinearHead(dim, classes).to(case.dtype)
    head.load_state_dict(state)
    return head


def head(case: Case) -> Iterator[tuple]:
    p, model, maps = case.params, head_of(case), case.tensor("in/feature_map")
    yield "parameters sizes", model.conv_seg.weight.shape[:2], (p["num_classes"], p["dim"]), EXACT
    yield "parameters norm", (model.bn.eps, model.bn.momentum), (p["bn_eps"], p["bn_momentum"]), EXACT
    yield "parameters ignored", IGNORED, p["ignore_index"], EXACT
    yield "out/eval_logits", model.eval()([maps]), case.arrays["out/eval_logits"]
    logits = model.train()([maps])
    loss, share = pixel_loss(logits, case.tensor("in/label").squeeze(1))
    loss.backward()
    yield "out/train_logits", logits, case.arrays["out/train_logits"]
    yield "out/loss_ce", loss, case.arrays["out/loss_ce"]
    yield "out/acc_seg", share[None], case.arrays["out/acc_seg"]
    found = {f"out/grad/{name}": parameter.grad for name, parameter in model.named_parameters()}
    found |= {f"out/after/{name}": buffer for name, buffer in model.named_buffers()}
    for name in (*case.names("out/grad/"), *case.names("out/after/")):
        yield name, found[name], case.arrays[name]


def train(case: Case) -> Iterator[tuple]:
    p, model = case.params, head_of(case).train()
    optimizer = build_optimizer(list(model.parameters()), p["base_lr"], p["weight_decay"], tuple(p["betas"]))
    losses, rates = [], []
    for step, (maps, labels) in enumerate(zip(case.tensor("in/feature_maps"), case.tensor("in/labels"), strict=True)):
        rates.append(learning_rate(step, p["base_lr"], p["max_iters"], p["warmup_iters"], p["warmup_ratio"]))
        loss, _ = pixel_loss(model([maps]), labels.squeeze(1))
        loss.backward()
        train_step(optimizer, rates[-1])
        losses.append(loss.detach())
    yield "out/loss", torch.stack(losses), case.arrays["out/loss"]
    yield "out/lr", rates, case.arrays["out/lr"]
    state = model.state_dict()
    for name in case.names("out/head/"):
        yield name, state[name.removeprefix("out/head/")], case.arrays[name]


def rates(case: Case) -> Iterator[tuple]:
    for name, runs in case.arrays.items():
        for number, run in enumerate(runs if isinstance(runs, list) else [runs]):
            yield from _rates(f"{name} {number}", run)


def _rates(label: str, run: dict) -> Iterator[tuple]:
    settings = [run[key] for key in ("base_lr", "max_iters", "warmup_iters", "warmup_ratio", "power", "min_lr")]
    found = [learning_rate(i, *settings) for i in run["iters"]]
    yield f"{label} lr", found, run["lr"]


def inference(case: Case) -> Iterator[tuple]:
    p, model = case.params, head_of(case).eval()
    file, prefix = p["backbone"].split()
    (student,) = (c for c in load_cases(case.folder) if file in c.files)
    state = our_names(student.state(prefix.removesuffix("/*")))
    network = built(state, student.params["num_heads"], masked_im_modeling=True).to(case.dtype).eval()
    network.load_state_dict(state)
    segmenter = Segmenter(network, [p["out_block"]], True, model).to(case.dtype).eval()
    for variant in p["variants"]:
        name, image = variant["name"], case.tensor(f"{variant['name']}/in/image")
        yield f"parameters {name} multiple", network.patch_size, variant["padded_to_multiple_of"], EXACT
        window = Window(variant["crop_size"], variant["stride"]) if variant["mode"] == "slide" else None
        rows, columns = windows(image.shape[-2:], window)[0] if window else (slice(None), slice(None))
        first = image_logits(segmenter, image[..., rows, columns], None)
        yield f"{name}/out/first_window_logits", first, case.arrays[f"{name}/out/first_window_logits"]
        logits = image_logits(segmenter, image, window)
        stretched = resized(logits, variant["ori_shape"])
        yield f"{name}/out/logits", stretched, case.arrays[f"{name}/out/logits"]
        yield (
            f"{name}/out/pred",
            resized_classes(logits[0], variant["ori_shape"])[None],
            case.arrays[f"{name}/out/pred"],
        )


def miou(case: Case) -> Iterator[tuple]:
    p, counts = case.params, 0
    for name in case.names("in/pred"):
        raw = case.arrays[name.replace("pred", "gt")]
        labels = torch.from_numpy(classes_of(raw) if p["reduce_zero_label"] else raw)
        counts = counts + count_pixels(case.tensor(name), labels, p["num_classes"])
    yield "parameters ignored", IGNORED, p["ignore_index"], EXACT
    right, predicted, labelled = counts
    found = scores(counts)
    areas = {"intersect": right, "union": predicted + labelled - right, "pred_area": predicted, "label_area": labelled}
    for name, value in (areas | {key: found[key] for key in ("IoU", "Acc")}).items():
        yield f"out/{name}", value, case.arrays[f"out/{name}"]
    for name in ("mIoU", "mAcc", "aAcc"):
        yield f"parameters {name}_reported", published(found[name]), p[f"{name}_reported"]


def pipeline(case: Case) -> Iterator[tuple]:
    p, image, labels = case.params, case.arrays["in/img_bgr"][..., ::-1].copy(), case.arrays["in/seg"]
    for row in p["rescale_sizes"]:
        yield "sizes", rescaled(row["w"], row["h"], *row["scale"]), row["new_wh"], EXACT
    for number, row in enumerate(p["resize"]):
        size = rescaled(*labels.shape[::-1], max(row["scale"]), min(row["scale"]))
        name = f"resize{number}"
        tolerance = case.tolerance_of("resize_img"), case.tolerance_of("resize_seg")
        found = resize_image(image, size)[..., ::-1].astype(int), resize_labels(labels, size)
        yield f"{name}/img", found[0], case.arrays[f"{name}/img"].astype(int), tolerance[0]
        yield f"{name}/seg", found[1], case.arrays[f"{name}/seg"], tolerance[1]
        view = TestScale(min(row["scale"]), max(row["scale"]))(Image.fromarray(image))
        yield f"{name}/img as tested", view, normalised(resize_image(image, size)), EXACT
    words = case.entry["tolerance"]["photo"]
    colours = float(re.search(r"max ([\d.]+) level", words)[1])
    mean, most = (float(re.search(rf"{name} <= ([\d.]+)", words)[1]) for name in ("mean abs diff", "max"))
    for number, row in enumerate(p["photometric"]):
        how = {key: row[key] for key in ("brightness", "contrast", "saturation", "hue")}
        found = distort(image, Photometric(contrast_first=bool(row["mode"]), **how))[..., ::-1].astype(int)
        expected = case.arrays[f"photo{number}/img_bgr"].astype(int)
        through_hsv = row["saturation"] is not None or row["hue"] is not None
        apart = np.abs(found - expected)
        yield f"photo{number}/img_bgr", found, expected, Tolerance(atol=most if through_hsv else colours)
        yield f"photo{number}/img_bgr in the mean", apart.mean(), 0.0, Tolerance(atol=mean if through_hsv else colours)
    yield (
        "normalise/rgb",
        normalised(image).movedim(0, -1),
        case.arrays["normalise/rgb"],
        case.tolerance_of("normalise"),
    )
    for number, accepted in enumerate(p["crop_accept"]):
        yield f"crop/seg{number}", bool(is_varied(case.arrays[f"crop/seg{number}"])), accepted, EXACT
    for row in p["center_padding"]:
        found = centre_padding(row["h"], row["w"], row["multiple"])
        yield "parameters center_padding", found, row["pad_left_right_top_bottom"], EXACT


RUNNERS = {
    "unic/semseg_head": head,
    "unic/semseg_train": train,
    "unic/semseg_lr": rates,
    "unic/semseg_inference": inference,
    "unic/semseg_miou": miou,
    "unic/semseg_pipeline": pipeline,
}
