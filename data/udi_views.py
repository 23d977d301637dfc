"""The crops of UDI (2407.17671), drawn near each other, and which of their patches show the same."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from data.augment import Crop, CropRecipe, crop_uniforms, draw_crop, render, render_pil
from data.correspondence import (
    CORNERS,
    SamplingMaps,
    crop_coordinates,
    image_maps,
    reference_box,
    shift_towards,
    strata,
    stratified_sample,
)
from data.loader import stack
from randomness import counted_uniforms

_POINTS = 0x0D1  # keeps these draws apart from those of the crops


class UDIViews:
    """Two global crops, the second near the first, and ``local_crops_number`` local ones near both (UDI,
    udi_augmentation.py). All are coloured alike:

    | crop   | size | area               | flip | jitter 0.4 0.4 0.2 0.1 | greyscale | one of three                    |
    |--------|------|--------------------|------|------------------------|-----------|---------------------------------|
    | global | 224  | global_crops_scale | 0.5  | 0.8                    | 0.2       | 1/4: blur 0.5; 1/4: blur 1;     |
    | local  | 96   | local_crops_scale  | 0.5  | 0.8                    | 0.2       | 1/2: blur 0.1, and solarise 0.2 |

    With ``include_patch`` patches are sampled, one of every ``global_sampling_window_size``**2 of the global crops and
    one of every ``local_sampling_window_size``**2 of the local ones, and a sample says where in the (other) global
    crops they are. Views are counted in the order [first to second, second to first], and for a local crop [to second,
    to first]; the valid points come first, and the rest is zero:

        "source"         (2, points) int64                     token of the source
        "target_index"   (2, points, 4) int64                  tokens of the target around the place
        "target_weight"  (2, points, 4) float32                their bilinear weights
        "valid"          (2,) int64                            number of valid points
        "local_source", "local_index", "local_weight", "local_valid"     the same of local crops, (local crops, 2, ...)

    The latter are absent without local crops. ``augment``: "fast" wants arrays (height, width, 3) uint8, "pil" Pillow
    images. Both make the same decisions for a key and carry them out in their own way.
    """

    def __init__(
        self,
        global_crops_scale: Sequence[float] = (0.25, 1.0),
        local_crops_scale: Sequence[float] = (0.05, 0.25),
        local_crops_number: int = 6,
        global_crops_size: int = 224,
        local_crops_size: int = 96,
        patch_size: int = 16,
        global_sampling_window_size: int = 3,
        local_sampling_window_size: int = 2,
        augment: str = "fast",
        include_patch: bool = True,
    ):
        if augment not in ("fast", "pil"):
            raise ValueError(f"augment {augment!r}: has to be fast or pil")
        first = CropRecipe(global_crops_size, tuple(global_crops_scale))
        local = CropRecipe(local_crops_size, tuple(local_crops_scale))
        self.recipes = [first] * 2 + [local] * local_crops_number
        self.grids = global_crops_size // patch_size, local_crops_size // patch_size
        self.windows = global_sampling_window_size, local_sampling_window_size
        self.augment, self.include_patch = augment, include_patch
        if include_patch:  # refused here rather than by the first image
            levels = 2 if local_crops_number else 1
            self.points = [strata(*level) for level in list(zip(self.grids, self.windows, strict=True))[:levels]]

    def __repr__(self) -> str:
        lines = [f"UDIViews ({self.augment})", *(f"  {recipe}, blur and solarise drawn" for recipe in self.recipes)]
        if self.include_patch:
            levels = zip(("global", "local"), self.points, self.grids, strict=False)
            lines += [f"  {points} points of {grid} x {grid} patches of a {kind} crop" for kind, points, grid in levels]
        return "\n".join(lines)

    def __call__(self, image: np.ndarray | Image.Image, key: tuple[int, ...]) -> dict:
        """{"crops": list of (3, size, size) uint8, first the global ones} and, if patches are sampled, their maps."""
        width, height = image.size if self.augment == "pil" else image.shape[1::-1]
        crops, coordinates = self.draw(key, height, width)
        carry_out = render_pil if self.augment == "pil" else render
        pairs = zip(crops, self.recipes, strict=True)
        sample: dict = {"crops": [carry_out(image, crop, recipe.size, recipe.interpolation) for crop, recipe in pairs]}
        if not self.include_patch:
            return sample
        between, local = self.maps(key, coordinates)
        names = ("source", "target_index", "target_weight", "valid")
        sample |= {name: torch.from_numpy(part) for name, part in zip(names, between, strict=True)}
        if local is not None:
            names = ("local_source", "local_index", "local_weight", "local_valid")
            sample |= {name: torch.from_numpy(part) for name, part in zip(names, local, strict=True)}
        return sample

    def draw(self, key: tuple[int, ...], height: int, width: int) -> tuple[list[Crop], np.ndarray]:
        """All decisions about the crops of an image, and their coordinates (crops, 4)."""
        kinds = counted_uniforms(*key, _POINTS, 0, np.arange(len(self.recipes))).tolist()
        drawn = zip(self.recipes, kinds, crop_uniforms(key, len(self.recipes)), strict=True)
        first, second, *local = (draw_crop(coloured(recipe, kind), u, height, width) for recipe, kind, u in drawn)

        def place(*crops: Crop) -> np.ndarray:
            return crop_coordinates([crop.box for crop in crops], [crop.flip for crop in crops], height, width)

        def near(reference: np.ndarray, crop: Crop) -> Crop:
            return crop._replace(box=shift_towards(crop.box, reference, height, width))

        second = near(place(first)[0], second)
        reference = reference_box(*place(first, second))
        crops = [first, second, *(near(reference, crop) for crop in local)]
        return crops, place(*crops)

    def maps(self, key: tuple[int, ...], coordinates: np.ndarray) -> tuple[SamplingMaps, SamplingMaps | None]:
        """Points for the image ``key``, the same for crops of one size, and where they are (``image_maps``)."""
        tokens = []
        for level, points in enumerate(self.points):
            corner, *selections = counted_uniforms(*key, _POINTS, 1 + level, np.arange(1 + points))
            window = self.windows[level]
            selections = (np.array(selections) * window**2).astype(int)
            tokens.append(stratified_sample(selections, int(corner * CORNERS), self.grids[level], window))
        return image_maps(coordinates, tokens, self.grids)

    @staticmethod
    def collate(samples: list[dict]) -> dict:
        """The stacked samples and, made here because a GPU could not tell their number without being waited for, the
        flat positions of all valid points: "points" in (2, batch, points), "local_points" in (local crops, 2, batch,
        points)."""
        piece = stack(samples)
        if "valid" in piece:
            piece["points"] = _positions(piece["valid"], piece["source"].shape[-1])
        if "local_valid" in piece:
            piece["local_points"] = _positions(piece["local_valid"], piece["local_index"].shape[-2])
        return piece


def coloured(recipe: CropRecipe, uniform: float) -> CropRecipe:
    """``recipe`` with one of the three ways to blur and solarise, chosen by a uniform number."""
    if uniform < 0.25:
        return replace(recipe, blur=0.5)
    return replace(recipe, blur=1.0) if uniform < 0.5 else replace(recipe, blur=0.1, solarize=0.2)


def _positions(valid: torch.Tensor, points: int) -> torch.Tensor:
    """(batch, ...) numbers of valid points -> flat positions of these in (..., batch, points)."""
    return (torch.arange(points) < valid.movedim(0, -1)[..., None]).flatten().nonzero().flatten()
