"""Features kept in a folder, so that a network sees every image once for all evaluations."""

import json
from pathlib import Path

import torch

from utils import UsageError, log, save_atomically, save_torch


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
