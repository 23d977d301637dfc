"""The crops of Mugs (2203.14415): weak ones, made as DINO's, and strong ones, of an image changed by RandAugment."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from data.augment import CropRecipe, crop_uniforms, draw_crop, pil_transform, render
from data.augmented import Original
from data.loader import stack
from data.preprocess import MEAN, STD
from data.randaugment import UNIFORMS_PER_OPERATION, draw_counted, parse_policy
from data.strong_crops import UNIFORMS_PER_ERASING, Erased, StrongTransform, draw_erased, render_strong
from data.views import seeded_generators, seeded_numpy
from randomness import counted_seed, counted_uniforms

_KINDS, _STRONG, _NOISE = 0x3065, 0x3066, 0x3067  # keep these draws apart from those of the crops
TEACHER_CROPS = 2
Made = tuple[str, torch.Tensor, Erased | None]  # the kind of a crop, its pixels, what is erased of them


class MugsViews:
    """Two weak crops for the teacher; for the student two global crops, both weak or both strong, and
    ``local_crops_number`` local ones, of which each is weak or strong (Mugs, src/multicropdataset.py):

    | crop          | size | area               | flip | jitter 0.4 0.4 0.2 0.1 | greyscale | blur 0.1-2.0 | solarise |
    |---------------|------|--------------------|------|------------------------|-----------|--------------|----------|
    | global weak 1 | 224  | global_crops_scale | 0.5  | 0.8                    | 0.2       | 1.0          | -        |
    | global weak 2 | 224  | global_crops_scale | 0.5  | 0.8                    | 0.2       | 0.1          | 0.2      |
    | local weak    | 96   | local_crops_scale  | 0.5  | 0.8                    | 0.2       | 0.5          | -        |

    A strong crop is cut, in the same sizes and areas, out of the image flipped (0.5) and changed by RandAugment
    (``policy``), with ``color_aug`` by jitter and greyscale as well; then a box of it is erased (``erase``). Crops are
    weak with probability ``prob``. ``vanilla``: the student's global crops are the teacher's.

    ``augment``: "fast" wants arrays (height, width, 3) uint8, "pil" Pillow images, which it treats as the original
    does, bit for bit. Both draw from the same distribution.

    parity: erased pixels are N(0, 1) before they are normalised as all others are; without ``prefetched``, after it.
    """

    def __init__(
        self,
        global_crops_scale: Sequence[float] = (0.25, 1.0),
        local_crops_scale: Sequence[float] = (0.05, 0.25),
        local_crops_number: int = 10,
        global_crops_size: int = 224,
        local_crops_size: int = 96,
        policy: str = "rand-m9-mstd0.5-inc1",
        color_aug: bool = False,
        erase: float = 0.25,
        prob: float = 0.5,
        vanilla: bool = False,
        prefetched: bool = True,
        augment: str = "fast",
    ):
        if augment not in ("fast", "pil"):
            raise ValueError(f"augment {augment!r}: has to be fast or pil")
        self.local_crops_number, self.prob, self.vanilla = local_crops_number, prob, vanilla
        self.policy_text, self.policy = policy, parse_policy(policy)
        self.erase, self.prefetched, self.augment = erase, prefetched, augment
        first = CropRecipe(global_crops_size, tuple(global_crops_scale), blur=1.0)
        second = replace(first, blur=0.1, solarize=0.2)
        local = CropRecipe(local_crops_size, tuple(local_crops_scale), blur=0.5)
        colours = {} if color_aug else {"jitter": 0.0, "grayscale": 0.0}
        self.weak = {"global_weak_1": first, "global_weak_2": second, "local_weak": local}
        self.strong = {
            "global_strong": replace(first, blur=0.0, **colours),
            "local_strong": replace(local, blur=0.0, **colours),
        }
        if augment == "pil":
            self.weak_transforms = {kind: pil_transform(recipe) for kind, recipe in self.weak.items()}
            self.strong_transforms = {
                kind: StrongTransform(recipe, self.policy, erase) for kind, recipe in self.strong.items()
            }

    def __repr__(self) -> str:
        lines = [
            f"MugsViews ({self.augment}), {self.local_crops_number} local crops, weak with probability {self.prob:g}"
        ]
        lines += [f"  {kind}: {recipe}" for kind, recipe in (self.weak | self.strong).items()]
        return "\n".join([*lines, f"  strong: {self.policy_text}, a box erased with probability {self.erase:g}"])

    def __call__(self, image: np.ndarray | Image.Image, key: tuple[int, ...]) -> dict:
        """A dict of

        "crops"    2 of the teacher, then 2 + ``local_crops_number`` of the student, each (3, size, size) uint8
        "weak"     whether the student's global crops are weak
        "strong"   which crops are strong, (crops,) bool
        "erased"   what is erased of every crop, with normalised values, or None
        """
        made = self.fast_crops(image, key) if self.augment == "fast" else self.pil_crops(image, key)
        kinds, crops, erased = zip(*made, strict=True)
        erased = [part and part._replace(values=self.normalised(part.values)) for part in erased]
        return {
            "crops": list(crops),
            "weak": self.is_weak(kinds),
            "strong": torch.tensor([kind in self.strong for kind in kinds]),
            "erased": erased,
        }

    @staticmethod
    def collate(samples: list[dict]) -> dict:
        """The stacked samples; in "erased" for every crop [positions, values]: int64 into the flattened (batch, 3,
        size, size), and float32. Made here because a GPU could not tell their number without being waited for."""
        piece = stack([{name: part for name, part in sample.items() if name != "erased"} for sample in samples])
        parts = zip(*(sample["erased"] for sample in samples), strict=True)
        sizes = [crop.shape[-1] for crop in piece["crops"]]
        return piece | {"erased": [_flat(erased, size) for erased, size in zip(parts, sizes, strict=True)]}

    def kinds(self, uniform: Callable[[], float]) -> Iterator[str]:
        """What every crop is, in order; ``uniform`` is asked when a kind is drawn, and not before.

        parity: ``prob`` is that of weak crops, though the original's help says otherwise.
        """
        both = ("global_weak_1", "global_weak_2")
        yield from both
        yield from both if self.vanilla or not self._is_strong(uniform) else ("global_strong",) * 2
        for _ in range(self.local_crops_number):
            yield "local_strong" if self._is_strong(uniform) else "local_weak"

    def _is_strong(self, uniform: Callable[[], float]) -> bool:
        return self.prob < 1 and uniform() > self.prob

    def is_weak(self, kinds: Sequence[str]) -> bool:
        """Whether the student's global crops are."""
        return kinds[TEACHER_CROPS] not in self.strong

    def pil_crops(self, image: Image.Image, key: tuple[int, ...]) -> list[Made]:
        """All crops from torch's, NumPy's and ``random``'s generators, seeded with the key."""
        seed = counted_seed(*key)
        with seeded_generators(seed), seeded_numpy(seed):
            return self._each(random.random, lambda kind, _: self._pil_crop(kind, image))

    def _pil_crop(self, kind: str, image: Image.Image) -> Made:
        if kind in self.strong:
            return kind, *self.strong_transforms[kind](image)
        pixels = np.array(self.weak_transforms[kind](image))
        return kind, torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), None

    def fast_crops(self, image: np.ndarray, key: tuple[int, ...]) -> list[Made]:
        """All crops from counted numbers; the strong ones share what has to be known of the whole image."""
        crops, original = 2 * TEACHER_CROPS + self.local_crops_number, Original(image)
        kinds = iter(counted_uniforms(*key, _KINDS, np.arange(crops)).tolist())
        uniforms, of_operations = crop_uniforms(key, crops), self.policy.count * UNIFORMS_PER_OPERATION
        more = np.arange(of_operations + UNIFORMS_PER_ERASING)
        more = counted_uniforms(*key, _STRONG, np.arange(crops)[:, None], more).tolist()

        def make(kind: str, number: int) -> Made:
            recipe = self.strong[kind] if kind in self.strong else self.weak[kind]
            crop = draw_crop(recipe, uniforms[number], *original.size)
            if kind in self.weak:
                return kind, render(image, crop, recipe.size), None
            operations = draw_counted(self.policy, more[number][:of_operations])
            pixels = render_strong(original, crop, operations, recipe.size)
            erased = draw_erased(self.erase, more[number][of_operations:], recipe.size, (*key, _NOISE, number))
            return kind, pixels, erased

        return self._each(lambda: next(kinds), make)

    def _each(self, uniform: Callable[[], float], make: Callable[[str, int], Made]) -> list[Made]:
        made: list[Made] = []
        for number, kind in enumerate(self.kinds(uniform)):
            copied = self.vanilla and TEACHER_CROPS <= number < 2 * TEACHER_CROPS
            made.append(made[number - TEACHER_CROPS] if copied else make(kind, number))
        return made

    def normalised(self, noise: torch.Tensor) -> torch.Tensor:
        if not self.prefetched:
            return noise
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        return (noise - mean) / std


def erase_(crops: Sequence[torch.Tensor], erased: Sequence[Sequence[torch.Tensor]]) -> None:
    """Write what ``MugsViews.collate`` says into normalised crops of (batch, 3, size, size), in place."""
    for crop, (positions, values) in zip(crops, erased, strict=True):
        crop.view(-1).index_copy_(0, positions, values.to(crop.dtype))


def _flat(erased: Sequence[Erased | None], size: int) -> list[torch.Tensor]:
    """What is erased of one crop of every image -> positions in (images, 3, size, size), and values."""
    positions, values = [torch.empty(0, dtype=torch.int64)], [torch.empty(0)]
    for number, part in enumerate(erased):
        if part is not None:
            top, left, height, width = part.box
            rows, columns = torch.arange(top, top + height), torch.arange(left, left + width)
            planes = 3 * number + torch.arange(3)
            positions.append(((planes[:, None] * size + rows)[..., None] * size + columns).flatten())
            values.append(part.values.flatten())
    return [torch.cat(positions), torch.cat(values)]
