"""Where a vision transformer looks: maps of the class token's attention, masks of what holds most of it, pictures."""

import math

import cv2
import numpy as np
import torch

from randomness import counted_uniforms
from utils import UsageError

# ---------------------------------------------------------------------------------------------------------------------
# From a network to maps and masks
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def attention_maps(model: torch.nn.Module, images: torch.Tensor, class_token: int = 0) -> torch.Tensor:
    """Last-block attention of a class token to every patch: (batch, 3, height, width) -> (batch, heads, rows, columns).

    Pixels beyond a multiple of the patch size are left out. Raises UsageError for a network without such attention.
    """
    check_has_attention(model)
    rows, columns = (size // model.patch_size for size in images.shape[-2:])
    images = images[..., : rows * model.patch_size, : columns * model.patch_size]
    attention = model.get_last_selfattention(images, queries=model.num_class_tokens)
    return patch_maps(attention, model.num_prefix_tokens, rows, columns, class_token)


def class_token_names(model: torch.nn.Module) -> list[str]:
    """What the class tokens of a vision transformer are called; one alone needs no name."""
    return ["cls", "cls+"] if model.num_class_tokens == 2 else [""]


def check_has_attention(model: torch.nn.Module) -> None:
    if not hasattr(model, "get_last_selfattention") or getattr(model, "num_class_tokens", 1) < 1:
        raise UsageError(
            f"{type(model).__name__}: no class token's attention to show; use one of our vision transformers (vit_*)"
        )


def patch_maps(
    attention: torch.Tensor, num_prefix_tokens: int, rows: int, columns: int, class_token: int = 0
) -> torch.Tensor:
    """Attention (batch, heads, queries, tokens) -> that of one query to the patches (batch, heads, rows, columns)."""
    return attention[:, :, class_token, num_prefix_tokens:].unflatten(-1, (rows, columns))


def keep_mass(attention: torch.Tensor, threshold: float) -> torch.Tensor:
    """The strongest patches that together hold ``threshold`` of each map's attention: bool (..., rows, columns)."""
    values, order = attention.flatten(-2).sort(dim=-1)
    cumulative = (values / values.sum(dim=-1, keepdim=True)).cumsum(dim=-1)
    kept = torch.empty_like(order, dtype=torch.bool).scatter_(-1, order, cumulative > 1 - threshold)
    return kept.view_as(attention)


def attention_entropy(attention: torch.Tensor) -> torch.Tensor:
    """In bits, of every query's attention: (..., queries, keys) -> (..., queries)."""
    return torch.special.entr(attention).sum(dim=-1) / math.log(2)


def enlarge(maps: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Every patch as ``patch_size`` x ``patch_size`` equal pixels: (..., rows, columns) -> (..., height, width)."""
    return maps.repeat_interleave(patch_size, dim=-2).repeat_interleave(patch_size, dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# From maps to pictures: uint8 (height, width, 3) RGB
# ---------------------------------------------------------------------------------------------------------------------

GAP, LABEL_HEIGHT = 6, 22  # pixels of a contact sheet
CELL = 240  # longer side of its pictures
ROW = 8  # pictures beside each other, at most
DIM, SHADOW = 0.2, 0.1  # of coloured heads: the least light that is painted, and how much of the image is left


def heat(values: torch.Tensor | np.ndarray) -> np.ndarray:
    """A map (height, width) from its minimum, dark violet, to its maximum, yellow (viridis)."""
    values = np.asarray(values, dtype=np.float64)
    span = values.max() - values.min()
    index = np.minimum(255, np.floor(256 * (values - values.min()) / span)) if span > 0 else np.zeros_like(values)
    return cv2.applyColorMap(index.astype(np.uint8), cv2.COLORMAP_VIRIDIS)[..., ::-1].copy()


def stretched(image: torch.Tensor) -> np.ndarray:
    """A normalised image (3, height, width) with its values stretched to black and white, as DINO saves its input."""
    image = (image - image.min()) / (image.max() - image.min()).clamp(min=1e-5)
    return (image * 255 + 0.5).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()


def blended(image: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """``image`` half covered with ``colour`` where ``mask`` (height, width) is set, and the mask's outline."""
    picture = image.copy()
    picture[mask] = (picture[mask].astype(np.uint16) + np.array(colour, np.uint16)) // 2
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    return cv2.drawContours(picture, contours, -1, colour, thickness=max(1, max(mask.shape) // 240))


def bright_colour(number: int) -> tuple[int, int, int]:
    """A saturated colour with a random hue; the same number always has the same one."""
    hue = int(180 * counted_uniforms(0, number))
    return tuple(int(c) for c in cv2.cvtColor(np.uint8([[[hue, 255, 255]]]), cv2.COLOR_HSV2RGB)[0, 0])


def head_colours(heads: int) -> np.ndarray:
    """A colour for every head, hues in equal steps: (heads, 3) uint8."""
    hues = np.round(np.arange(heads) * 180 / heads).astype(np.uint8)
    colours = np.stack((hues, np.full_like(hues, 200), np.full_like(hues, 255)), axis=-1)
    return cv2.cvtColor(colours[None], cv2.COLOR_HSV2RGB)[0]


def coloured_heads(image: np.ndarray, maps: torch.Tensor, threshold: float) -> np.ndarray:
    """What every head looks at, in one picture: a patch has the colour of the head that looks at it most.

    A head looks at the fewest patches that hold ``threshold`` of its attention, and lights them by the root of it,
    stretched from its least to its most; what stays below DIM of that is left to ``image``, of which a nearly black
    shadow is seen. ``image`` uint8 (height, width, 3), a multiple of ``maps`` (heads, rows, columns) in size.
    Source     Mugs (2203.14415), the figure of self-attention
    """
    maps = np.nan_to_num(maps.detach().double().cpu().numpy())
    kept = np.where(keep_mass(torch.from_numpy(maps), threshold).numpy(), maps, -1.0)
    head = kept.argmax(axis=0)  # (rows, columns); the first of equals
    low, high = (extreme(axis=(1, 2), keepdims=True) for extreme in (maps.min, maps.max))
    light = np.sqrt((maps - low) / np.maximum(high - low, 1e-12))
    light = np.take_along_axis(light, head[None], axis=0)[0] * (kept.max(axis=0) >= 0)
    light = np.where(light > DIM, light, 0.0)
    shadow = SHADOW * cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None].astype(np.float64)
    cell = image.shape[0] // maps.shape[1], image.shape[1] // maps.shape[2]
    light, head = (values.repeat(cell[0], axis=0).repeat(cell[1], axis=1) for values in (light, head))
    painted = head_colours(len(maps))[head] * light[..., None]
    return np.round(painted + shadow * (1 - light[..., None])).astype(np.uint8)


def overlaid(image: np.ndarray, values: np.ndarray) -> np.ndarray:
    """``image`` lit where ``values`` (rows, columns) are large and dimmed where they are small.

    The largest fiftieth is lit alike: a few tokens that draw nearly all attention would leave the rest in the dark.
    """
    low, high = values.min(), np.quantile(values, 0.98)
    smooth = cv2.resize(values.astype(np.float32), image.shape[1::-1], interpolation=cv2.INTER_CUBIC)
    smooth = np.clip((smooth - low) / max(high - low, 1e-12), 0, 1)[..., None]
    return np.round(image * (0.25 + 0.75 * smooth)).astype(np.uint8)


def attention_sheet(
    image: np.ndarray, maps: torch.Tensor, masked: list[np.ndarray] | None = None, token: str = ""
) -> np.ndarray:
    """Contact sheet: the image, the image lit by the heads' mean attention, a map per head, a mask per head if given.

    ``image`` and ``masked`` uint8 (height, width, 3), ``maps`` (heads, rows, columns) of any resolution; ``token``: the
    class token's name, where there are several.
    """
    maps = np.nan_to_num(maps.detach().float().cpu().numpy())  # a failing run's pictures are black, not an error
    cells = [(f"image, {token}" if token else "image", image), ("mean of heads", overlaid(image, maps.mean(axis=0)))]
    cells += [(f"head {number}", heat(values)) for number, values in enumerate(maps)]
    cells += [(f"mask of head {number}", picture) for number, picture in enumerate(masked or ())]
    scale = CELL / max(image.shape[:2])
    size = tuple(max(1, round(side * scale)) for side in image.shape[1::-1])  # width, height
    smooth = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    rows = -(-len(cells) // ROW)
    columns = -(-len(cells) // rows)
    height, width = size[1] + LABEL_HEIGHT + GAP, size[0] + GAP
    sheet = np.full((rows * height + GAP, columns * width + GAP, 3), 255, np.uint8)
    for number, (label, picture) in enumerate(cells):
        is_map = label.startswith("head")
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_NEAREST if is_map else smooth)
        top, left = GAP + number // columns * height, GAP + number % columns * width
        cv2.putText(
            sheet,
            label,
            (left + 1, top + LABEL_HEIGHT - 7),
            cv2.FONT_HERSHEY_SIMPLEX,
            0.45,
            (40, 40, 40),
            1,
            cv2.LINE_AA,
        )
        sheet[top + LABEL_HEIGHT : top + LABEL_HEIGHT + size[1], left : left + size[0]] = picture
    return sheet
