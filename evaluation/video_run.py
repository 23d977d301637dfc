"""DAVIS from options to numbers: every video's masks are written, and scored where the truth is there."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from data.davis import PUBLISHED, Video, open_davis, read_frame, read_mask, save_mask
from data.decode import Reading, reading_from
from evaluation.features import evaluating
from evaluation.images import check_count, check_finite
from evaluation.network import network_from_options
from evaluation.propagation import (
    MULTIPLE,
    Settings,
    frame_size,
    frame_tensor,
    hard_mask,
    one_hot_labels,
    propagate,
    resized_indices,
)
from evaluation.results import write_result
from evaluation.run import refuse_another_run
from evaluation.video_scores import VOID, score_frame, summarise
from lock import hold
from models.checkpoints import Network, weights_hash
from utils import (
    UsageError,
    World,
    all_gather_objects,
    barrier,
    check_writable,
    escape,
    log,
    make_folder,
    save_atomically,
)

TOKENS = "patch tokens of the last block"
SCORES = "scores.json"  # in a video's folder, written last: what is there is complete


def check_options(args: argparse.Namespace) -> None:
    """Raise UsageError for values that cannot work, before anything is read."""
    for name, least in (("topk", 1), ("n_last_frames", 0), ("size_mask_neighborhood", 0), ("short_side", 1)):
        if getattr(args, name) < least:
            raise UsageError(f"--{name} {getattr(args, name)}: must be at least {least}")
    check_writable(Path(args.output_dir))


def evaluate(args: argparse.Namespace, world: World) -> None:
    videos = open_davis(args.data_path, args.split)
    what = f"{escape(args.data_path)}: videos of {escape(args.split)}"
    check_count(args, what, len(videos), PUBLISHED.get(args.split, len(videos)))
    network = network_from_options(args)
    check_has_patches(network)
    network.model.to(world.device)
    folder, settings = Path(args.output_dir), settings_from(args)
    run = {"weights": weights_hash(network.model), "short_side": args.short_side, **settings._asdict()}
    log.info(f"{what}: {len(videos)}; {TOKENS}; {', '.join(f'{name} {value}' for name, value in run.items())}")
    runs = {video.name: run | {"files": video.fingerprint} for video in videos}
    with hold(folder, world):
        for name, ours in runs.items():
            finished(folder / name / SCORES, ours)  # of another run: refused before anything is computed
        barrier()
        failures = []
        try:
            for number, video in list(enumerate(videos, 1))[world.rank :: world.size]:
                path = folder / video.name / SCORES
                objects, there = finished(path, runs[video.name]), path.exists()
                if objects is None:
                    objects = follow(network, video, path.parent, args, world)
                    save_scores(path, runs[video.name], objects)
                said = f"J&F {summarise(objects)['J&F-Mean']:.1f}" if objects else "not scored"
                said += ", from an earlier start" * there
                log.info(f"{number} of {len(videos)}: {escape(video.name)}: {len(video.frames)} frames, {said}")
        except UsageError as error:
            failures.append(str(error))
        for failure in (text for part in all_gather_objects(failures) for text in part):
            raise UsageError(failure)  # on all processes, so that none waits for another
        if world.rank == 0:
            report(args, network, videos, {v.name: finished(folder / v.name / SCORES) for v in videos}, run)


def settings_from(args: argparse.Namespace) -> Settings:
    return Settings(args.n_last_frames, args.size_mask_neighborhood, args.topk)


def check_has_patches(network: Network) -> None:
    if not hasattr(network.model, "get_last_selfattention"):
        raise UsageError(f"{network.label}: a video wants patch tokens; use one of our vision transformers (vit_*)")


# ---------------------------------------------------------------------------------------------------------------------
# One video
# ---------------------------------------------------------------------------------------------------------------------


def follow(
    network: Network, video: Video, folder: Path, args: argparse.Namespace, world: World
) -> list[dict[str, list[float]]] | None:
    """Write the masks of all frames. {"J": per frame, "F": per frame} of every object; None where truth is missing."""
    reading, patch = reading_from(args), network.model.patch_size
    first = read_mask(video.masks[0], read_frame(video.frames[0], reading).shape[:2], reading)
    size = size_for_patches(first.shape, args.short_side, patch)
    grid = tuple(side // patch for side in size)
    scored = list(range(1, len(video.frames) - 1))  # neither the first, which is given, nor the last: as DAVIS does
    truths = {number: video.masks[number] for number in scored if video.masks[number]}
    objects = int(first[first != VOID].max(initial=0))
    make_folder(folder)
    save_mask(first, folder / f"{video.frames[0].stem}.png")
    labels = one_hot_labels(resized_indices(first, grid)).to(world.device)
    tokens = tokens_of_frames(network, video, size, reading, world.device)
    found: list[list[tuple[float, float]]] = []
    for number, soft in enumerate(propagate(tokens, labels, settings_from(args)), 1):
        mask = hard_mask(soft, patch, first.shape)
        save_mask(mask, folder / f"{video.frames[number].stem}.png")
        if number in truths:
            found.append(score_frame(mask, read_mask(truths[number], first.shape, reading), objects))
    if not scored or len(truths) < len(scored) or not objects:
        return None
    return [{"J": [j for j, _ in pairs], "F": [f for _, f in pairs]} for pairs in zip(*found, strict=True)]


def size_for_patches(size: tuple[int, int], short_side: int, patch: int) -> tuple[int, int]:
    """The originals' size of a frame; of patches that do not divide its sides, what holds whole ones.

    Raises UsageError where there is no room for one.
    """
    multiple = patch if MULTIPLE % patch else MULTIPLE
    found = frame_size(*size, short_side // patch * patch, multiple)
    if min(found) < patch:
        raise UsageError(f"--short_side {short_side}: too small for frames of {size[1]} x {size[0]} pixels in patches")
    return found


@torch.no_grad()
def tokens_of_frames(
    network: Network, video: Video, size: tuple[int, int], reading: Reading, device: torch.device
) -> Iterator[torch.Tensor]:
    """Of every frame in turn: patch tokens after the final norm, without any class token, (tokens, dim)."""
    model, shape = network.model, None
    for path in video.frames:
        pixels = read_frame(path, reading)
        shape = shape or pixels.shape
        if pixels.shape != shape:
            raise UsageError(f"{escape(path)}: {pixels.shape[1]} x {pixels.shape[0]} pixels, unlike the first frame")
        with evaluating(model):
            tokens = model.get_intermediate_layers(frame_tensor(pixels, size)[None].to(device))[0]
        yield check_finite(network.label, tokens[0, model.num_prefix_tokens :])


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def save_scores(path: Path, run: dict, objects: list | None) -> None:
    text = json.dumps({"run": run, "objects": objects})
    try:
        save_atomically(path, lambda temporary: temporary.write_text(text))
    except OSError as error:
        raise UsageError(f"--output_dir {escape(path.parent)}: {path.name} cannot be written: {error}") from error


def finished(path: Path, run: dict | None = None) -> list | None:
    """Every object's scores ([] where the truth is missing); None where the video is still to be followed.

    Raises UsageError where they are of another ``run``.
    """
    try:
        record = json.loads(path.read_text())
        theirs, objects = dict(record["run"]), record["objects"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if run is not None:
        refuse_another_run(path, theirs, run)
    return objects or []


def report(args: argparse.Namespace, network: Network, videos: list[Video], scores: dict, run: dict) -> None:
    """DAVIS's line and eval_video.json."""
    unscored = [name for name, objects in scores.items() if not objects]
    objects = [one for name in scores for one in scores[name]]
    numbers = summarise(objects) if objects else {}
    if unscored:
        names = ", ".join(escape(name) for name in unscored[:5]) + " and more" * (len(unscored) > 5)
        log.warning(f"warning: {len(unscored)} videos have no true masks of every frame and are not scored: {names}")
    if numbers:
        log.info(f"{len(objects)} objects: " + ", ".join(f"{name} {value:.1f}" for name, value in numbers.items()))
    numbers |= {"videos": len(videos), "objects": len(objects), "unscored": unscored, "tokens": TOKENS}
    numbers |= {name: value for name, value in run.items() if name != "weights"}
    data = f"DAVIS 2017 {args.split} ({len(videos)} videos)"
    write_result(args, "eval_video", network, data, {"train": 0, "test": 0}, numbers)
