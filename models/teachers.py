"""Frozen networks to learn from: their class token and patches, for the images and on the grid of the student.

UNIC (2408.05088) distils several of them. None has code of its own: a teacher is a network of this house or of timm,
with the numbers that its images are normalised by, in evaluation mode and without gradients.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from models import family_of, library
from models.checkpoints import network_from_state
from models.layouts.clip import from_open_clip
from models.layouts.names import State, square_side
from models.layouts.shapes import arch_of, describe, vit_arguments
from models.reading import read_backbone
from models.safe_load import SUFFIXES, CheckpointError
from models.vit import Variant
from utils import UsageError, log, nearest

FOLDER = Path("teachers")  # where the file of a published name is looked for when none is given
TIMM = "timm/"


class Pixels(NamedTuple):
    """What images are normalised by, per colour channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


IMAGENET = Pixels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = Pixels((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@dataclass(frozen=True)
class Published:
    """A name of the original, what its file holds and where that comes from."""

    arch: str
    patch_size: int
    source: str


PUBLISHED = {
    "dino_vitbase_16": Published(
        "vit_base", 16, "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth"
    ),
    "ibot_vitbase_16": Published(
        "vit_base", 16, "https://github.com/bytedance/ibot, ViT-B/16 with random masks, checkpoint_teacher.pth"
    ),
    "deit3_vitbase_16": Published("vit_base", 16, "https://dl.fbaipublicfiles.com/deit/deit_3_base_224_1k.pth"),
    "dbotft_vitbase_16": Published("vit_base", 16, "https://github.com/liuxingbin/dbot, 84.5_dbot_base_finetune.pth"),
    "dino2_vitgiant_14": Published(
        "vit_giant2", 14, "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitg14/dinov2_vitg14_reg4_pretrain.pth"
    ),
    "metaclip_vithuge_14": Published("vit_huge", 14, "https://dl.fbaipublicfiles.com/MMPT/metaclip/h14_fullcc2.5b.pt"),
}


# ---------------------------------------------------------------------------------------------------------------------
# A teacher
# ---------------------------------------------------------------------------------------------------------------------


class Teacher(nn.Module):
    """A frozen network seen from its student.

    images (batch, 3, side, side), normalised with ImageNet's numbers -> class token (batch, dim), patches (batch,
    patches of the student, dim). ``side``: pixels of the images that the network itself sees, by which its grid is the
    student's; where it is not, its map is resampled. ``grid``: the student's patches along a side.
    """

    def __init__(
        self, name: str, network: nn.Module, dim: int, side: int, grid: int, pixels: Pixels = IMAGENET, about: str = ""
    ):
        super().__init__()
        self.name, self.dim, self.side, self.grid, self.pixels = name, dim, side, grid, pixels
        self.about = about  # which network and file, for people
        self.network = network.requires_grad_(False)
        (mean, std), (our_mean, our_std) = (torch.tensor(v, dtype=torch.float64) for v in (pixels, IMAGENET))
        for buffer, value in (("scale", our_std / std), ("shift", (our_mean - mean) / std)):
            self.register_buffer(buffer, value.view(3, 1, 1).to(torch.get_default_dtype()), persistent=False)
        self.eval()

    def train(self, mode: bool = True) -> "Teacher":
        """Never: batch norms and stochastic depth stay as they were learnt."""
        return super().train(False)

    def place(self, half: torch.dtype | None) -> "Teacher":
        """Keep what products are made of in ``half``, the type that autocast computes them in; norms stay as they are.

        Autocast would make those copies anew in every step, as it keeps only those of weights that want a gradient.
        """
        for module in self.network.modules() if half is not None else ():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(half)
        return self

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = images.dtype
        if self.pixels != IMAGENET:
            images = images * self.scale + self.shift
        if images.shape[-1] != self.side:
            images = F.interpolate(images, size=(self.side, self.side), mode="bicubic", antialias=True)
        classes, patches = features(self.network, images)
        return classes.to(dtype), self._on_grid(patches.to(dtype))

    def _on_grid(self, patches: torch.Tensor) -> torch.Tensor:
        side = square_side(patches.shape[1])
        if side == self.grid:
            return patches
        maps = patches.transpose(1, 2).unflatten(2, (side, side))
        maps = F.interpolate(maps, size=(self.grid, self.grid), mode="bilinear", align_corners=False)
        return maps.flatten(2).transpose(1, 2)


def features(network: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a network of this house, of timm or a ResNet of torchvision says: (batch, dim), (batch, patches, dim).

    The class token is what the network pools to, which is a token of its own only where it has one.
    """
    if hasattr(network, "forward_head"):  # timm
        tokens = network.forward_features(images)
        classes = network.forward_head(tokens, pre_logits=True)
        if tokens.ndim == 4:
            channels_last = getattr(network, "output_fmt", "NCHW") == "NHWC"
            return classes, tokens.flatten(1, 2) if channels_last else tokens.flatten(2).transpose(1, 2)
        return classes, tokens[:, getattr(network, "num_prefix_tokens", 0) :]
    if hasattr(network, "layer4"):  # torchvision
        x = network.maxpool(network.relu(network.bn1(network.conv1(images))))
        maps = network.layer4(network.layer3(network.layer2(network.layer1(x))))
        return network.avgpool(maps).flatten(1), maps.flatten(2).transpose(1, 2)
    tokens = network.forward_features(images)
    return tokens[:, 0], tokens[:, network.num_prefix_tokens :]


# ---------------------------------------------------------------------------------------------------------------------
# From names
# ---------------------------------------------------------------------------------------------------------------------


def check_teachers(text: str) -> None:
    """Raises UsageError for what the names of ``--teachers NAME[=FILE],...`` cannot mean; looks at no file."""
    for name, file in _pairs(text):
        if name.startswith(TIMM):
            _check_timm(name)
        elif not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise UsageError(f"--teachers {name!r}: a name has letters, digits, _ and -; write NAME=FILE, NAME=FILE")
        elif file is None and name not in PUBLISHED:
            raise UsageError(
                f"--teachers {name}: unknown{nearest(name, PUBLISHED)}; known are {', '.join(PUBLISHED)}, "
                f"{TIMM}<name>, and any other as {name}=FILE"
            )
        if file == "":
            raise UsageError(f"--teachers {name}=: no file; write {name}=FILE")


def build_teachers(text: str, image_size: int, patch_size: int, download: bool) -> list[Teacher]:
    """The teachers of ``--teachers`` by name, for a student of such images and patches.

    ``download``: whether timm may fetch the weights of ``timm/<name>`` without a file. Raises UsageError in one line.
    """
    check_teachers(text)
    grid = image_size // patch_size
    teachers = []
    for name, file in _pairs(text):
        try:
            teachers.append(_fetch(name, grid, download) if _has_no_file(name, file) else _build(name, file, grid))
        except CheckpointError as error:
            raise UsageError(f"--teachers {name}: {str(error).splitlines()[0]}") from error
        log.info(f"teacher {name}: {teachers[-1].about}")
    return teachers


def _pairs(text: str) -> list[tuple[str, str | None]]:
    """parity: sorted by name, which is the order of the ladder and of its random numbers (UNIC)."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise UsageError("--teachers is empty: name at least one, such as " + next(iter(PUBLISHED)))
    parts = [word.partition("=") for word in words]
    pairs = [(name.strip(), file.strip() if equals else None) for name, equals, file in parts]
    names = [name for name, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"--teachers {twice}: named twice; name every teacher once")
    return sorted(pairs)


def _check_timm(name: str) -> None:
    import timm

    plain = name.removeprefix(TIMM)
    base, _, tag = plain.partition(".")
    if not timm.is_model(base):
        raise UsageError(
            f"--teachers {name}: timm {timm.__version__} has no such model{nearest(base, timm.list_models())}"
        )
    tagged = timm.list_pretrained(f"{base}.*")
    if tag and plain not in tagged:
        raise UsageError(
            f"--teachers {name}: timm {timm.__version__} has no weights of this name{nearest(plain, tagged)}"
        )


def _has_no_file(name: str, file: str | None) -> bool:
    return file is None and name.startswith(TIMM)


def _fetch(name: str, grid: int, download: bool) -> Teacher:
    if not download:
        raise UsageError(f"--teachers {name}: pass {name}=FILE, or --download_teachers to let timm fetch the weights")
    network = library.timm_backbone(name.removeprefix(TIMM), 0.0, pretrained=True)
    return _probed(name, network, grid, f"{name}, weights that timm fetched")


def _file_of(name: str, file: str | None) -> Path:
    """The file of a teacher. Raises UsageError where there is none, and says where it comes from."""
    found = [Path(file)] if file else [FOLDER / f"{name}{suffix}" for suffix in SUFFIXES]
    if path := next((path for path in found if path.is_file()), None):
        return path
    come = f"; it comes from {PUBLISHED[name].source}" if name in PUBLISHED else ""
    if file:
        raise UsageError(f"--teachers {name}={file}: no such file{come or '; check the path'}")
    raise UsageError(f"--teachers {name}: no file {found[0]}; pass {name}=FILE{come}")


def _build(name: str, file: str | None, grid: int) -> Teacher:
    """A teacher from a file: of the architecture that its name says, or that the file shows."""
    path = _file_of(name, file)
    state, info = read_backbone(path)
    arch, further, pixels = None, {}, IMAGENET
    if name.startswith(TIMM):
        arch = name
    elif info.layout.method == "clip":
        state, pixels = from_open_clip(state), CLIP
        further = {"variant": Variant(mlp="quick_gelu", norm_first=True)}
    if name in PUBLISHED:
        _check_published(name, path, state)
    network = network_from_state(state, info, arch, **further)
    what = f"{network.label} from {path} ({info.layout.name}{', QuickGELU' if further else ''})"
    count_pixels = family_of(network.arch).pixels_per_token
    if count_pixels is None:
        return _probed(name, network.model, grid, what)
    side = grid * count_pixels(network.arguments)
    about = _about(what, network.model, network.model.embed_dim, side)
    return Teacher(name, network.model, network.model.embed_dim, side, grid, pixels, about)


def _check_published(name: str, path: Path, state: State) -> None:
    wanted, shape = PUBLISHED[name], vit_arguments(state)
    if shape is None or (arch_of(state), shape["patch_size"]) != (wanted.arch, wanted.patch_size):
        raise UsageError(
            f"--teachers {name}: {path} holds a {describe(state)}, not a {wanted.arch}/{wanted.patch_size}; "
            f"that comes from {wanted.source}"
        )


def _about(what: str, network: nn.Module, dim: int, side: int) -> str:
    values = sum(parameter.numel() for parameter in network.parameters())
    return f"{what}, {values / 1e6:.1f} M parameters, {dim} wide, sees images of {side} pixels"


# ---------------------------------------------------------------------------------------------------------------------
# Networks whose grid is only seen by asking them
# ---------------------------------------------------------------------------------------------------------------------


def _pixels(network: nn.Module) -> Pixels:
    """timm says it; torchvision's networks are trained here or there, with ImageNet's numbers."""
    config = getattr(network, "pretrained_cfg", None)
    return Pixels(tuple(config["mean"]), tuple(config["std"])) if config else IMAGENET


def _probed(name: str, network: nn.Module, grid: int, what: str) -> Teacher:
    """At the size that gives the student's grid if the network takes it, else at its own, whose map is resampled."""
    network.eval()
    own = getattr(network, "pretrained_cfg", {}).get("input_size", (3, 224, 224))[-1]
    try:
        own_grid, dim = _grid_of(network, own)
    except Exception as error:  # whatever a network of another library says to a blank image
        raise UsageError(f"--teachers {name}: {_first_line(error)}") from error
    side = round(grid * own / own_grid)
    try:
        _grid_of(network, side)
    except Exception:
        side = own
    return Teacher(name, network, dim, side, grid, _pixels(network), _about(what, network, dim, side))


def _grid_of(network: nn.Module, side: int) -> tuple[int, int]:
    """(patches along a side, width) that a network has for images of ``side`` pixels. Raises ValueError."""
    with torch.no_grad():
        classes, patches = features(network, torch.zeros(1, 3, side, side))
    grid = square_side(patches.shape[1]) if patches.ndim == 3 else None
    if grid is None:
        raise ValueError(f"its features {tuple(patches.shape)} are no square grid of patches; pass another network")
    if classes.shape != (1, patches.shape[2]):
        raise ValueError(
            f"its pooled features are {classes.shape[-1]} wide and its patches {patches.shape[2]}; pass another network"
        )
    return grid, patches.shape[2]


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
