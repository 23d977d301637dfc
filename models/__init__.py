"""Backbones. ``build_backbone`` is the door: every other room asks it for a network by name.

What other rooms have to know of a kind of networks stands in its row of FAMILIES, and nowhere else; so a further kind
is a row, and the file of its networks. What timm brings has no row: LIBRARY answers for it.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch.nn as nn

from models import cvt, library, swin, vil, vit
from models.layouts.libraries import RESNETS, resnet_of
from models.layouts.names import State
from models.layouts.shapes import swin_arguments, vit_arguments
from models.layouts.stages import cvt_arguments, vil_arguments
from utils import UsageError

USUAL_DROP_PATH = 0.1  # stochastic depth of a student's last block
IMAGE_SIZE = 224  # at which positions and windows are laid out, unless a file says otherwise
ALIASES = {"deit_tiny": "vit_tiny", "deit_small": "vit_small"}


def any_size(option: str, size: int, arguments: Mapping[str, int]) -> None:
    """Images of every size will do."""


def whole_patches(option: str, size: int, arguments: Mapping[str, int]) -> None:
    """Raises UsageError for images that patches do not cover."""
    patch = arguments["patch_size"]
    if size < patch:
        raise UsageError(f"{option} {size} is smaller than one patch of {patch} pixels")
    if size % patch:
        near = size - size % patch
        raise UsageError(f"--patch_size {patch} does not divide {option} {size}; nearest {near} or {near + patch}")


def whole_windows(option: str, size: int, arguments: Mapping[str, int]) -> None:
    """Raises UsageError for images of which a CvT has no map, or none that the windows of its relative bias fit."""
    smallest = cvt.smallest_side(windows=bool(arguments["rel_pos_embed"]))
    if size < smallest:
        what = "with a relative bias (--rel_pos_embed) " if arguments["rel_pos_embed"] else ""
        raise UsageError(f"{option} {size}: a CvT {what}takes images from {smallest} pixels on")


def whole_chunks(option: str, size: int, arguments: Mapping[str, int]) -> None:
    """Raises UsageError for images that a ViL's patches do not cover, or of which its last stage has no token."""
    stages = vil.stages_of(vil.DEFAULT, arguments["vil_arch"])
    whole_patches(option, size, {"patch_size": stages[0].patch})
    if size < vil.token_pixels(stages):
        raise UsageError(f"{option} {size}: a ViL takes images from {vil.token_pixels(stages)} pixels on")


def any_patch(arguments: Mapping[str, int]) -> None:
    """There are no patches to be wrong."""


def positions_fit(arguments: Mapping[str, int]) -> None:
    """Raises UsageError for patches that do not divide the size at which positions are laid out."""
    patch, size = arguments["patch_size"], arguments.get("img_size", IMAGE_SIZE)
    sides = [size] if isinstance(size, int) else size
    if patch < 1 or any(side % patch for side in sides):
        side = next((side for side in sides if patch < 1 or side % patch), size)
        usual = ", ".join(str(size) for size in (8, 14, 16, 32) if side % size == 0)
        raise UsageError(
            f"--patch_size {patch} does not divide {side} pixels, at which positions are laid out"
            + (f"; these do: {usual}" if usual else "")
        )


def known_mode(arguments: Mapping[str, int]) -> None:
    """Raises UsageError for what no ViL does, and for an architecture's string that says no network."""
    if arguments["vil_mode"] not in (-1, 0, 1):
        raise UsageError(f"--vil_mode {arguments['vil_mode']}: 0 (all chunks around), 1 (one of them) or -1 (none)")
    vil.stages_of(vil.DEFAULT, arguments["vil_arch"])


def patches_of_four(arguments: Mapping[str, int]) -> None:
    """Raises UsageError for patches that no Swin has: masks and merging count on those of 4 pixels."""
    patch, wanted = arguments["patch_size"], swin.PATCH_SIZE
    if patch != wanted:
        raise UsageError(f"--patch_size {patch}: Swin's patches are {wanted} pixels; pass --patch_size {wanted}")


@dataclass(frozen=True, eq=False)
class Family:
    """Networks of one kind. ``arguments``, here and below: of a constructor, options and what a file says."""

    name: str
    networks: Mapping[str, Callable[..., nn.Module]] = field(default_factory=dict)  # --arch -> constructor
    # that a constructor reads -> what they are if left out
    options: Mapping[str, int | str | None] = field(default_factory=dict)
    check_patch: Callable[[Mapping[str, int]], None] = any_patch
    check_size: Callable[[str, int, Mapping[str, int]], None] = any_size  # of images that an option asks for
    pixels_per_token: Callable[[Mapping[str, int]], int] | None = None  # of the tokens of the last block; None: unknown
    hides_patches: bool = False  # whether a student can be shown images with masks, whose cells are those tokens
    class_attention: bool = False  # whether there are class tokens, which attend to every patch
    shapes: Callable[[State], dict | None] = lambda state: None  # arguments that the tensors of a file show
    drop_path: Mapping[str, float] = field(default_factory=dict)  # the published rates that are not USUAL_DROP_PATH
    from_file: tuple[str, ...] = ()  # those of them that a network is built with, whatever its options are

    def arguments(self, given: Mapping[str, object]) -> dict[str, int]:
        """The options among ``given``, and those left out."""
        found = {name: given.get(name) for name in self.options}
        return {name: self.options[name] if value is None else value for name, value in found.items()}


def _resnet(arch: str, drop_path_rate: float) -> nn.Module:
    from models import resnet  # torchvision takes a second to import

    return resnet.build(arch, drop_path_rate)


VIT = Family(
    name="vit",
    networks={f"vit_{size}": getattr(vit, f"vit_{size}") for size in vit.SIZES},
    options={"patch_size": 16},
    check_patch=positions_fit,
    check_size=whole_patches,
    pixels_per_token=lambda arguments: arguments["patch_size"],
    hides_patches=True,
    class_attention=True,
    shapes=vit_arguments,
    from_file=(
        "img_size",
        "init_values",
        "num_class_tokens",
        "num_registers",
        "use_mean_pooling",
        "variant",
        "qkv_bias",
    ),
)
SWIN = Family(
    name="swin",
    networks={name: getattr(swin, name) for name in swin.DEFAULT_DROP_PATH},
    options={"patch_size": swin.PATCH_SIZE, "window_size": 7},
    check_patch=patches_of_four,
    check_size=whole_patches,
    pixels_per_token=lambda arguments: swin.MASK_UNIT,
    hides_patches=True,
    shapes=swin_arguments,
    drop_path=swin.DEFAULT_DROP_PATH,
)
CVT = Family(
    name="cvt",
    networks={name: getattr(cvt, name) for name in ("cvt_tiny", "cvt_small")},
    options={"rel_pos_embed": False},
    check_size=whole_windows,
    pixels_per_token=lambda arguments: cvt.TOKEN_PIXELS,
    shapes=cvt_arguments,
    from_file=("rel_pos_embed",),
)
VIL = Family(
    name="vil",
    networks=vil.NETWORKS,
    options={"vil_arch": None, "vil_mode": 0},
    check_patch=known_mode,
    check_size=whole_chunks,
    pixels_per_token=lambda arguments: vil.token_pixels(vil.stages_of(vil.DEFAULT, arguments["vil_arch"])),
    shapes=vil_arguments,
    from_file=("vil_arch", "img_size"),
)
RESNET = Family(
    name="resnet",
    networks={name: functools.partial(_resnet, name) for name in RESNETS.values()},
    shapes=lambda state: {"arch": name} if (name := resnet_of(state)) else None,
)
FAMILIES = (VIT, SWIN, CVT, VIL, RESNET)
LIBRARY = Family(name="library")  # timm's: they read no option of ours, and pool to a vector


def family_of(arch: str) -> Family:
    """The family of a name; LIBRARY for what is none of ours, known or not."""
    arch = ALIASES.get(arch, arch)
    return next((family for family in FAMILIES if arch in family.networks), LIBRARY)


def drop_path_of(arch: str) -> float:
    """The rate of stochastic depth that a student of this name was published with."""
    return family_of(arch).drop_path.get(arch, USUAL_DROP_PATH)


def families_that(answer: Callable[[Family], object]) -> str:
    """For messages: ``vit_* or swin_*``, the families of ours of which ``answer`` is true."""
    return " or ".join(f"{family.name}_*" for family in FAMILIES if answer(family))


def our_names() -> list[str]:
    return [name for family in FAMILIES for name in family.networks]


def backbone_names() -> list[str]:
    """Names that ``build_backbone`` takes, besides ``timm/<name>``."""
    return [*our_names(), *ALIASES]


def unread_options(arch: str) -> set[str]:
    """Options of networks that this one does not read, so that they say nothing of what it computes."""
    return {name for family in FAMILIES for name in family.options} - set(family_of(arch).options)


def build_backbone(arch: str, patch_size: int | None = None, drop_path_rate: float = 0.0, **kwargs) -> nn.Module:
    """A network without classifier: images (batch, 3, height, width) -> features (batch, ``embed_dim``).

    ``arch``: a name of one of our families, or ``timm/<name>``. ``patch_size`` (left out:
    the family's) and further arguments concern our networks only. Raises UsageError for an unknown name.
    """
    family = family_of(arch)
    if family is LIBRARY:
        return library.build(arch, drop_path_rate, backbone_names())
    arguments = kwargs | family.arguments({"patch_size": patch_size} | kwargs)
    family.check_patch(arguments)
    return family.networks[ALIASES.get(arch, arch)](drop_path_rate=drop_path_rate, **arguments)
