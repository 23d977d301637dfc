"""A classifier on data sets of hard images: ImageNet-9 with its challenge, ImageNet-A, ImageNet-C."""

import argparse
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from data.datasets import open_source
from data.decode import BadImage, reading_from
from data.joined import Joined
from data.preprocess import MEAN, STD, eval_transform
from data.source import Source
from evaluation.confidence import interval_of
from evaluation.imagenet_classes import (
    CORRUPTIONS,
    FURTHER_CORRUPTIONS,
    IMAGENET_9,
    IMAGENET_A,
    SEVERITIES,
    imagenet_9,
    numbers,
)
from evaluation.images import check_count
from evaluation.robust_run import Exactly, Trial, check_classes, crop_of
from evaluation.robustness import calibration_error, composed, hits, response_rate_accuracy
from utils import UsageError, World, escape, log

IMAGENET = 1000
PER_VARIANT, IMAGES_A, PER_CORRUPTION = 4050, 7500, 50000
MASKS, FOREGROUNDS, BACKGROUNDS = "fg_mask", "original", "only_bg_t"
NINE_MEAN, NINE_STD = (0.4717, 0.4499, 0.3837), (0.2600, 0.2516, 0.2575)  # of networks with nine classes
_PHOTOGRAPH = re.compile(r"n\d{8}_\d+")


def check_imagenet_head(trial: Trial, what: str) -> None:
    if trial.classifier.classes != IMAGENET:
        raise UsageError(f"{what} asks for a head of {IMAGENET} classes; this one has {trial.classifier.classes}")


# ---------------------------------------------------------------------------------------------------------------------
# ImageNet-9
# ---------------------------------------------------------------------------------------------------------------------


class Superclasses:
    """The nine classes that a classifier's answers stand for. Images are pixels in [0, 1], clamped."""

    def __init__(self, trial: Trial, nine: bool):
        classes = trial.classifier.classes
        if nine and classes != len(IMAGENET_9):
            raise UsageError(f"--in9: asks for a head of {len(IMAGENET_9)} classes; this one has {classes}")
        if not nine:
            check_imagenet_head(trial, "ImageNet-9 without --in9")
        device = trial.world.device
        self.classifier = trial.classifier
        self.mapped = None if nine else imagenet_9(classes).to(device)
        constants = (NINE_MEAN, NINE_STD) if nine else (MEAN, STD)
        self.mean, self.std = (torch.tensor(values, device=device).view(3, 1, 1) for values in constants)

    def right(self, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.classifier((pixels.clamp(0, 1) - self.mean) / self.std)
        return hits(logits.argmax(dim=1), labels, self.mapped)


def variant(args: argparse.Namespace, name: str) -> Source:
    source = open_source(str(Path(args.data_path) / name / "val")).read_as(reading_from(args))
    check_classes(source, len(IMAGENET_9), "ImageNet-9")
    check_count(args, f"{args.data_path}: {name}/val/", len(source), PER_VARIANT)
    return source


def variants_in(data_path: str) -> list[str]:
    root = Path(data_path)
    found = sorted(folder.parent.name for folder in root.glob("*/val") if folder.parent.name != MASKS)
    if not found:
        raise UsageError(
            f"--data_path {escape(data_path)}: no <variant>/val/ there; the images are published as bg_challenge "
            "with the backgrounds challenge (ImageNet-9)"
        )
    return found


def backgrounds(args: argparse.Namespace, world: World) -> None:
    trial = Trial(args, world, "eval_backgrounds")
    nine, accuracy, images = Superclasses(trial, args.in9), {}, 0
    for name in variants_in(args.data_path):
        source = variant(args, name)
        found, kept = trial.rows(
            source, Exactly(args.crop_size), lambda _, pixels, labels: nine.right(pixels, labels)[:, None]
        )
        accuracy[name], images = 100 * found.mean().item(), images + len(kept)
        log.info(f"Accuracy on {name} is {accuracy[name]:.2f}% ({interval_of(accuracy[name], len(kept))})")
    result = {"accuracy": accuracy, "images": images}
    if {"mixed_same", "mixed_rand"} <= accuracy.keys():
        result["bg_gap"] = accuracy["mixed_same"] - accuracy["mixed_rand"]
        log.info(f"BG-gap (mixed_same - mixed_rand) is {result['bg_gap']:.2f}%")
    trial.write(args.data_path, result)


def challenge(args: argparse.Namespace, world: World) -> None:
    """A foreground is vulnerable if any background makes the network take it for something else."""
    trial = Trial(args, world, "eval_challenge")
    nine = Superclasses(trial, args.in9)
    foregrounds, behind = variant(args, FOREGROUNDS), variant(args, BACKGROUNDS)
    masks = masks_of(args, foregrounds)
    pixels = pixels_of(behind, args.crop_size)
    log.info(f"{len(foregrounds)} foregrounds on up to {len(pixels)} backgrounds each, until one misleads")

    def row(indices: torch.Tensor, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[misled(*rest)] for rest in zip(indices.tolist(), images, labels, strict=True)]).float()

    def misled(index: int, image: torch.Tensor, label: torch.Tensor) -> bool:
        mask = torch.from_numpy(read_mask(masks[index], args.crop_size)).to(image.device)
        for start in range(0, len(pixels), args.batch_size_per_gpu):
            part = pixels[start : start + args.batch_size_per_gpu].to(image.device).float() / 255
            if not nine.right(composed(image, mask, part), label).all():
                return True
        return False

    found, kept = trial.rows(foregrounds, Exactly(args.crop_size), row)
    vulnerable = int(found.sum())
    share = 100 * (1 - vulnerable / len(kept))
    log.info(f"{vulnerable} of {len(kept)} foregrounds are vulnerable; challenge accuracy {share:.2f}%")
    result = {"vulnerable": vulnerable, "foregrounds": len(kept), "backgrounds": len(pixels), "accuracy": share}
    trial.write(args.data_path, result)


def masks_of(args: argparse.Namespace, foregrounds: Source) -> list[Path]:
    """For every foreground the file of its mask, found by the photograph both were made from."""
    files = sorted((Path(args.data_path) / MASKS / "val").rglob("*.npy"))
    if not files:
        raise UsageError(f"--data_path {escape(args.data_path)}: no {MASKS}/val/<class>/*.npy there")
    known = {photograph_of(file.name): file for file in files}
    found = [known.get(photograph_of(Path(foregrounds.image_name(i)).name)) for i in range(len(foregrounds))]
    if None in found:
        raise UsageError(f"{foregrounds.image_name(found.index(None))}: has no mask in {MASKS}/val/")
    return found


def photograph_of(name: str) -> str:
    match = _PHOTOGRAPH.search(name)
    return match[0] if match else name.rpartition(".")[0]


def read_mask(path: Path, size: int) -> np.ndarray:
    """(size, size) bool; Raises UsageError."""
    try:
        mask = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"{escape(path)}: not a mask ({str(error).splitlines()[0]})") from error
    if mask.ndim == 3:
        mask = mask[0] if mask.shape[0] in (1, 3) else mask[..., 0]
    if mask.shape != (size, size):
        raise UsageError(f"{escape(path)}: a mask of shape {mask.shape} instead of {size} x {size}")
    return mask.astype(bool)


def pixels_of(source: Source, size: int) -> torch.Tensor:
    """All images of a source, uint8 (images, 3, size, size)."""
    pixels = torch.empty(len(source), 3, size, size, dtype=torch.uint8)
    for index in range(len(source)):
        try:
            image = source.pil(index)
            if image.size != (size, size):
                raise BadImage("image", f"{image.size[0]} x {image.size[1]} pixels instead of {size} x {size}")
        except BadImage as error:
            raise UsageError(f"{source.image_name(index)}: {error.reason}; backgrounds must all be read") from error
        pixels[index] = transforms.functional.pil_to_tensor(image)
    return pixels


# ---------------------------------------------------------------------------------------------------------------------
# ImageNet-A and ImageNet-C
# ---------------------------------------------------------------------------------------------------------------------


def imagenet_a(args: argparse.Namespace, world: World) -> None:
    """Only the 200 classes of the data set compete; how well confidence tells of errors."""
    trial = Trial(args, world, "eval_imagenet_a")
    check_imagenet_head(trial, "ImageNet-A")
    chosen = torch.tensor(numbers(IMAGENET_A), device=world.device)
    source = open_source(args.data_path).read_as(reading_from(args))
    check_classes(source, len(chosen), "ImageNet-A")
    check_count(args, source.name, len(source), IMAGES_A)

    def row(_, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        confidence, predicted = trial.classifier(images)[:, chosen].softmax(dim=1).max(dim=1)
        return torch.stack((confidence, hits(predicted, labels).to(confidence)), dim=1)

    found, kept = trial.rows(source, eval_transform(*crop_of(args, trial.network)), row)
    confidence, correct = found.T.numpy()
    accuracy = 100 * float(correct.mean())
    calibration, aurra = calibration_error(confidence, correct), response_rate_accuracy(confidence, correct)
    log.info(f"Accuracy (%): {accuracy:.2f} ({interval_of(accuracy, len(kept))})")
    few = np.isnan(calibration)
    log.info("RMS Calib Error (%): " + ("needs 200 images" if few else f"{100 * calibration:.2f}"))
    log.info(f"AURRA (%): {100 * aurra:.2f}")
    result = {"accuracy": accuracy, "rms_calibration_error": None if few else 100 * calibration, "aurra": 100 * aurra}
    trial.write(source.name, result | {"images": len(kept)})


class Cropped:
    """PIL RGB -> the normalised middle (3, size, size)."""

    def __init__(self, size: int):
        self.size = size
        self.rest = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])

    def __call__(self, image: Image.Image) -> torch.Tensor:
        if min(image.size) < self.size:
            raise BadImage("image", f"{image.size[0]} x {image.size[1]} pixels, {self.size} are needed")
        return self.rest(transforms.functional.center_crop(image, self.size))


def imagenet_c(args: argparse.Namespace, world: World) -> None:
    """All folders in one pass, so that nothing waits between them."""
    trial = Trial(args, world, "eval_imagenet_c")
    root, sources = Path(args.data_path), {}
    for name in (*CORRUPTIONS, *FURTHER_CORRUPTIONS):
        there = [severity for severity in SEVERITIES if (root / name / str(severity)).is_dir()]
        if there and len(there) < len(SEVERITIES):
            missing = min(set(SEVERITIES) - set(there))
            raise UsageError(f"--data_path {escape(root)}: {name}/ has no severity {missing}")
        for severity in there:
            source = open_source(str(root / name / str(severity))).read_as(reading_from(args))
            check_classes(source, trial.classifier.classes)
            if not sources:
                check_count(args, source.name, len(source), PER_CORRUPTION)
            sources[name, severity] = source
    if not sources:
        raise UsageError(
            f"--data_path {escape(root)}: no <corruption>/<severity>/<class>/ there, such as gaussian_noise/1/; the "
            "images are published as ImageNet-C"
        )
    joined = Joined(list(sources.values()), str(root))
    row = lambda _, images, labels: hits(trial.classifier(images).argmax(dim=1), labels)[:, None]  # noqa: E731
    found, kept = trial.rows(joined, Cropped(args.crop_size), row)
    parts = np.searchsorted(joined.ends, kept.numpy(), side="right")
    wrong = 1 - found[:, 0].numpy()
    errors = {
        place: float(wrong[parts == number].mean()) if (parts == number).any() else float("nan")
        for number, place in enumerate(sources)
    }
    means = {name: float(np.mean([errors[name, s] for s in SEVERITIES])) for name, s in errors if s == SEVERITIES[0]}
    for name, error in means.items():
        log.info(f"Distortion: {name:<17} | CE (unnormalized) (%): {100 * error:.2f}")
    result = {"error": {name: 100 * error for name, error in means.items()}, "images": len(kept)}
    result["mean_error"] = 100 * float(np.mean(list(means.values())))
    absent = [name for name in (*CORRUPTIONS, *FURTHER_CORRUPTIONS) if name not in means]
    if absent:
        log.warning(f"warning: {root}: nothing of {', '.join(absent)}, so means are over the others")
    log.info(f"mCE (unnormalized by AlexNet errors) (%): {result['mean_error']:.2f} over {len(means)}")
    if means.keys() >= CORRUPTIONS.keys():
        result["mCE"] = 100 * float(np.mean([means[name] / alexnet for name, alexnet in CORRUPTIONS.items()]))
        log.info(f"mCE (relative to AlexNet's errors, 15 corruptions) (%): {result['mCE']:.2f}")
    trial.write(str(root), result)
