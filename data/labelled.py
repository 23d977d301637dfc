"""Data sets of transfer as their authors publish them: names, labels, splits from the official files, counts checked.

Nothing is fetched. Layouts, splits and counts are those of t-ReX (2206.15369) and UNIC (2408.05088); what fine-tuning
reads beside them (CIFAR, iNaturalist by names of categories) those of DeiT's descendants. data/labelled_files.py reads
the files of every set.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.cifar import cifar
from data.datasets import FileSource, open_source
from data.index import Index, Strings
from data.labelled_files import (
    Listing,
    aircraft,
    cars,
    cog,
    dtd,
    eurosat,
    flowers,
    food,
    inaturalist,
    pets,
    sun,
)
from data.source import Source
from utils import UsageError, escape

SPLITS = ("trainval", "test")


class LabelledSet(NamedTuple):
    """``read(root, split, seed)`` lists the images; classes and images of either split as they are published."""

    read: Callable[[Path, str, int], Listing | Source] | None
    classes: int
    trainval: int
    test: int
    home: str  # where it comes from

    def images(self, split: str) -> int:
        return self.trainval if split == "trainval" else self.test


COG_IMAGES = (1_118_804, 1_115_788, 1_095_203, 1_107_128, 1_091_654)
SETS = {
    "in1k": LabelledSet(None, 1000, 1_281_167, 50_000, "image-net.org"),
    **{
        f"cog_l{level}": LabelledSet(cog(level), 1000, images, 50_000, "image-net.org and ImageNet-CoG's split files")
        for level, images in enumerate(COG_IMAGES, start=1)
    },
    "aircraft": LabelledSet(aircraft, 100, 6_667, 3_333, "FGVC-Aircraft, fgvc-aircraft-2013b"),
    "cars196": LabelledSet(cars, 196, 8_144, 8_041, "Stanford Cars: car_ims, cars_annos.mat and the devkit"),
    "dtd": LabelledSet(dtd, 47, 3_760, 1_880, "Describable Textures, release 1.0.1"),
    "eurosat": LabelledSet(eurosat, 10, 18_900, 8_100, "EuroSAT, the RGB images"),
    "flowers": LabelledSet(flowers, 102, 2_040, 6_149, "Oxford Flowers 102: jpg, imagelabels.mat, setid.mat"),
    "pets": LabelledSet(pets, 37, 3_680, 3_669, "Oxford-IIIT Pets: images and annotations"),
    "food101": LabelledSet(food, 101, 75_750, 25_250, "Food-101: images and meta"),
    "sun397": LabelledSet(sun, 397, 19_850, 19_850, "SUN397, and its Partitions"),
    "inat2018": LabelledSet(inaturalist(2018), 8_142, 437_513, 24_426, "iNaturalist 2018: train_val2018 and both JSON"),
    "inat2019": LabelledSet(inaturalist(2019), 1_010, 265_213, 3_030, "iNaturalist 2019: train_val2019 and both JSON"),
}  # fmt: skip
# For fine-tuning whole networks alone
SETS_TO_FINETUNE = {
    "cifar10": LabelledSet(cifar(10), 10, 50_000, 10_000, "CIFAR-10, binary version"),
    "cifar100": LabelledSet(cifar(100), 100, 50_000, 10_000, "CIFAR-100, binary version"),
    **{
        f"{name}_names": SETS[name]._replace(read=inaturalist(int(name[-4:]), "name"))
        for name in ("inat2018", "inat2019")
    },
}


def open_labelled(name: str, root: str | Path, split: str, seed: int = 22, official: bool = True) -> Source:
    """The images of ``split`` (trainval, test) of a set at ``root``; ``seed`` divides what comes undivided (eurosat).

    Raises UsageError when a file is missing or, if ``official``, when classes or images are not as many as published.
    """
    known, root = known_set(name), Path(root)
    if not root.is_dir():
        raise UsageError(f"--data_path {escape(root)}: no such folder; {name} comes from {known.home}")
    if known.read is None:
        source = open_source(str(root / {"trainval": "train", "test": "val"}[split]))
    else:
        try:
            listing = known.read(root, split, seed)
        except UsageError as error:
            raise UsageError(f"{error}; {name} comes from {known.home}") from None
        source = listing if isinstance(listing, Source) else source_of(listing, root, f"{name} {split}")
    if official:
        check_counts(name, split, len(source), len(source.class_names))
    return source


def known_set(name: str) -> LabelledSet:
    return SETS[name] if name in SETS else SETS_TO_FINETUNE[name]


def check_counts(name: str, split: str, images: int, classes: int) -> None:
    """Raise UsageError when these are not the published ones."""
    known = known_set(name)
    for what, found, published in (("images", images, known.images(split)), ("classes", classes, known.classes)):
        if found != published:
            raise UsageError(
                f"{name}, {split}: {found} {what} instead of the official {published}; complete it from "
                f"{known.home}, or pass --any_counts"
            )


def source_of(listing: Listing, root: Path, name: str) -> Source:
    """A source of listed files; its fingerprint changes with names and labels."""
    if not listing.names:
        raise UsageError(f"{escape(root)}: no images of {name} are listed there")
    labels = np.asarray(listing.labels, np.int64)
    digest = hashlib.blake2b(
        "\n".join(listing.names).encode(errors="surrogateescape") + labels.tobytes(), digest_size=16
    )
    no_stamps = (Strings.pack([]), np.zeros((0, 2), np.int64))
    packed = Strings.pack(listing.names)
    index = Index(packed, labels, listing.class_names, *no_stamps, fingerprint=digest.hexdigest())
    missing = next((n for n in (listing.names[0], listing.names[-1]) if not (root / n).is_file()), None)
    if missing is not None:
        raise UsageError(f"{escape(root / missing)}: listed in {name}, and not there")
    source = FileSource(root, index, root)
    source.name = f"{name} of {source.name}"
    return source
