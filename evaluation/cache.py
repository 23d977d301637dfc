"""Features kept in a folder, so that a network sees every image once for all evaluations.

``FeatureStore`` keeps any features of any sets side by side, memory-mapped, and goes on where it was stopped;
``FeatureCache`` keeps one feature of a train and a test set in the files of DINO's k-NN.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data.decode import BadImage
from data.preprocess import eval_transform
from data.source import Source
from evaluation.features import Feature, extract_features, feature_widths, token_features
from evaluation.unreadable import Unreadable, readable
from lock import hold
from models.checkpoints import Network, weights_hash
from utils import UsageError, World, all_gather_objects, barrier, log, make_folder, save_atomically, save_torch

CHUNK = 16384  # images between two points at which an extraction can be taken up again


class Preparation(NamedTuple):
    """What an image goes through: the shorter side to ``resize``, a centre crop of ``crop`` pixels, normalisation."""

    crop: int
    resize: int

    def __str__(self) -> str:
        return f"resize {self.resize} bicubic, centre crop {self.crop}, ImageNet normalisation"


class FeatureStore:
    """Features (images, width) float32 of one network and one set per folder, a file for each, filled in order.

    A folder is named by a hash of weights, preparation and list of images (``set.json`` says them), so nothing of
    another network is ever read. Beside ``<feature>.npy`` a JSON says how many images are ``done`` and which of them
    could not be read; it is written after the rows it promises. The first process writes; all of them read the files.
    """

    def __init__(self, folder: str | Path, chunk: int = CHUNK):
        self.folder, self.chunk = Path(folder), chunk

    def features(
        self,
        network: Network,
        source: Source,
        preparation: Preparation,
        wanted: Sequence[Feature],
        *,
        world: World,
        batch_size: int = 128,
        num_workers: int = 10,
    ) -> tuple[list[torch.Tensor], list[Unreadable]]:
        """``wanted`` of every image that can be read, in order, and the images that cannot.

        What is not there yet is extracted, several features in one pass. Every process has to call this with the same
        arguments; ``network`` is on the device. Raises UsageError.
        """
        key = {"weights": weights_hash(network.model), "arch": network.label}
        key |= {"preprocessing": str(preparation), "images": source.fingerprint}
        digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=12).hexdigest()
        place = _Place(self.folder / digest, len(source))
        options = {"world": world, "batch_size": batch_size, "num_workers": num_workers, "device": world.device}
        (states, *_) = all_gather_objects([place.state(feature, source) for feature in wanted])
        missing: dict[int, list[Feature]] = {}  # images done -> features
        for feature, state in zip(wanted, states, strict=True):
            if state["done"] < len(source):
                missing.setdefault(state["done"], []).append(feature)
        said = f"features of {source.name} in {place.folder}"
        log.info(f"{said}: " + ("to be extracted" if missing else "used, same network and images"))
        if missing:
            with hold(place.folder, world):
                if world.rank == 0:
                    place.describe(key)
                for done, features in missing.items():
                    if done:
                        log.info(f"{said}: taken up at image {done} of {len(source)}")
                    noted = states[wanted.index(features[0])]["unreadable"]
                    self._extract(place, network, source, preparation, features, done, noted, options)
        barrier()
        parts = [place.state(feature, source)["unreadable"] for feature in wanted]
        unreadable = [Unreadable(*image) for image in parts[0]]
        kept = readable(len(source), unreadable)
        matrices = [place.open(feature) for feature in wanted]
        return [matrix[kept] if unreadable else matrix for matrix in matrices], unreadable

    def _extract(self, place, network, source, preparation, features, done, noted, options) -> None:
        """Chunk by chunk, from image ``done`` on."""
        world = options["world"]
        transform = eval_transform(preparation.crop, preparation.resize)
        widths = feature_widths(network.model, features, preparation.crop, world.device)
        maps = [place.map(f, w, new=done == 0) for f, w in zip(features, widths, strict=True)] * (world.rank == 0)
        noted = list(noted)

        def all_of_them(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
            return torch.cat(token_features(model, images, features), dim=1)

        for start in range(done, len(source), self.chunk):
            part = _Part(source, range(start, min(start + self.chunk, len(source))))
            rows, unreadable = extract_features(network.model, part, transform, feature=all_of_them, **options)
            if not torch.isfinite(rows).all():
                raise UsageError(
                    f"{network.label}: features that are not finite numbers; its weights are damaged or diverged"
                )
            noted += [[start + image.index, image.name, image.reason] for image in unreadable]
            if world.rank == 0:
                where = start + readable(len(part), unreadable).numpy()
                for feature, target, columns in zip(features, maps, rows.split(widths, dim=1), strict=True):
                    if len(where):
                        target[where] = columns.numpy()
                    place.note(feature, target, part.indices.stop, noted)


class _Place:
    """The files of one network and one set of so many ``images``."""

    def __init__(self, folder: Path, images: int):
        self.folder, self.images = folder, images

    def file(self, feature: Feature, suffix: str) -> Path:
        return self.folder / f"blocks{feature.n_last_blocks}-pool_{feature.avgpool}-{feature.token}{suffix}"

    def state(self, feature: Feature, source: Source) -> dict:
        """What is done; nothing where an image can be read that could not before, or where files do not fit."""
        nothing = {"done": 0, "unreadable": []}
        try:
            state = json.loads(self.file(feature, ".json").read_text())
            mapped = np.load(self.file(feature, ".npy"), mmap_mode="r", allow_pickle=False)
            if len(mapped) != self.images or not 0 <= state["done"] <= self.images:
                return nothing
            noted = [index for index, *_ in state["unreadable"]]
        except FileNotFoundError:
            return nothing
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning(f"warning: {self.folder}: kept features are damaged and not used ({error})")
            return nothing
        return state if len(still_unreadable(source, noted)) == len(noted) else nothing

    def describe(self, key: dict) -> None:
        make_folder(self.folder)
        self._write(self.folder / "set.json", key)

    def map(self, feature: Feature, width: int, new: bool) -> np.memmap:
        path = self.file(feature, ".npy")
        try:
            if new:
                self.file(feature, ".json").unlink(missing_ok=True)
                return np.lib.format.open_memmap(path, "w+", np.float32, (self.images, width))
            return np.lib.format.open_memmap(path, "r+")
        except OSError as error:
            raise UsageError(f"{path}: features cannot be written there: {error}") from error

    def note(self, feature: Feature, rows: np.memmap, done: int, unreadable: list) -> None:
        """Rows first, so that a run that is killed leaves no JSON that promises too much."""
        rows.flush()
        self._write(self.file(feature, ".json"), {"done": done, "unreadable": unreadable})

    def _write(self, path: Path, content: dict) -> None:
        try:
            save_atomically(path, lambda temporary: temporary.write_text(json.dumps(content)))
        except OSError as error:
            raise UsageError(f"{path}: features cannot be written there: {error}") from error

    def open(self, feature: Feature) -> torch.Tensor:
        """Mapped, not read; what is written to it stays in memory."""
        return torch.from_numpy(np.load(self.file(feature, ".npy"), mmap_mode="c", allow_pickle=False))


class _Part(Source):
    """The images ``indices`` of a source."""

    def __init__(self, source: Source, indices: range):
        self.source, self.indices = source, indices
        self.labels, self.class_names = source.labels[indices.start : indices.stop], source.class_names
        self.name = source.name

    def image_name(self, index: int) -> str:
        return self.source.image_name(self.indices[index])

    def array(self, index: int) -> np.ndarray:
        return self.source.array(self.indices[index])

    def pil(self, index: int):
        return self.source.pil(self.indices[index])


def still_unreadable(source: Source, indices: Sequence[int]) -> list[Unreadable]:
    """Those of the images ``indices`` that cannot be read now either: mended ones are part of the set again."""
    found = []
    for index in indices:
        try:
            if 0 <= index < len(source):
                source.pil(index)
        except BadImage as error:
            found.append(Unreadable(index, error.name, error.reason))
    return found


class FeatureCache:
    """Normalised features of a train and a test set in a folder, in DINO's files, and a key of all that shapes them.

    The key is any flat dict: weights, architecture, preprocessing, lists of images, kind of feature, and under
    "unreadable", where there are such, the images of these lists that have no row. Features are given back only where
    the whole key is the same.
    """

    PARTS = ("trainfeat", "testfeat", "trainlabels", "testlabels")

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def difference(self, key: dict) -> str:
        """Why the features in the folder are not those of ``key``; '' when they are."""
        if not self.folder.is_dir() or not any(self.folder.glob("*feat.pth")):
            return "no features there yet"
        try:
            stored = json.loads((self.folder / "features.json").read_text())
        except FileNotFoundError:
            return "no features.json there: nobody knows which checkpoint these features come from"
        except (OSError, ValueError) as error:
            return f"features.json cannot be read ({error})"
        differing = [name for name in {**stored, **key} if stored.get(name) != key.get(name)]
        return "; ".join(f"{n} is {_brief(stored.get(n))} there and {_brief(key.get(n))} here" for n in differing)

    def unreadable(self) -> dict[str, list[int]]:
        """Indices of the images of "train" and "test" without a row, as the key in the folder tells them."""
        try:
            noted = json.loads((self.folder / "features.json").read_text()).get("unreadable", {})
            return {part: [int(index) for index in noted.get(part, ())] for part in ("train", "test")}
        except (OSError, ValueError, TypeError, AttributeError):  # ``difference`` says what is wrong with it
            return {"train": [], "test": []}

    def load(self, key: dict) -> tuple[torch.Tensor, ...] | None:
        """(train features, test features, train labels, test labels), or None; the log says which and why."""
        why, parts = self.difference(key), []
        if not why:
            try:
                parts = [torch.load(self.folder / f"{part}.pth", weights_only=True) for part in self.PARTS]
            except Exception as error:  # a damaged file fails in many ways, and is extracted again
                why = f"a file cannot be read ({str(error).splitlines()[0]})"
        log.info(f"features in {self.folder}: " + (f"not used, {why}" if why else "used, same network and images"))
        return None if why else tuple(parts)

    def save(self, key: dict, parts: tuple[torch.Tensor, ...]) -> None:
        """The key is written last, so that an interrupted run leaves no key that promises too much."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "features.json").unlink(missing_ok=True)
            for name, tensor in zip(self.PARTS, parts, strict=True):
                save_torch(tensor.cpu(), self.folder / f"{name}.pth")
            save_atomically(self.folder / "features.json", lambda path: path.write_text(json.dumps(key, indent=1)))
        except OSError as error:
            raise UsageError(f"{self.folder}: features cannot be written there: {error}") from error
        log.info(f"features written to {self.folder}")


def _brief(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:12] + "..."
