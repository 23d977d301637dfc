"""A student of UNIC (2408.05088) in the space of one of its teachers: what its ladder makes of images, unstandardised.

    z_t = y_t (std_t + eps) + mean_t        y_t: the ladder's sum over blocks; mean_t, std_t: what t was standardised by

A training checkpoint holds all of it: encoder, ladder and statistics. So a student stands for its teacher wherever
features are read, beside CLIP's texts too.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn as nn

from models.checkpoints import Network, network_from_state
from models.ladder import KINDS, Ladder, ladder_arguments, module_name
from models.layouts.names import State, below
from models.layouts.positions import Grid
from models.reading import read_backbone
from models.safe_load import CheckpointError, load_file
from utils import UsageError, escape, nearest

EPS = 1e-6  # added to spreads where they are divided by


def unstandardised(projected: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """A student's image (..., dim) in the space of a teacher whose features had this mean and std (dim,).

    parity: ``std`` has eps in it already, and gets it once more, as where the teacher's features were divided by it.
    """
    return projected * (std + EPS) + mean


class TeacherSpace(nn.Module):
    """images (batch, 3, side, side) -> what stands for the teacher's class token, (batch, its dim).

    ``ladder`` leads to this teacher alone; ``statistics``: {"cls": {"mean": (1, dim), "std": ...}, "patch": ...}.
    """

    num_prefix_tokens = 1

    def __init__(self, encoder: nn.Module, ladder: Ladder, statistics: Mapping[str, Mapping[str, torch.Tensor]]):
        super().__init__()
        (self.teacher,) = ladder.teachers
        self.dim = statistics["cls"]["mean"].numel()
        self.encoder, self.ladder = encoder, ladder
        for kind in KINDS:
            for name in ("mean", "std"):
                value = statistics[kind][name].flatten().to(torch.get_default_dtype(), copy=True)
                self.register_buffer(f"{kind}_{name}", value)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        (classes,) = self.ladder.classes(self.encoder.forward_blocks(images))
        return unstandardised(classes, self.cls_mean, self.cls_std)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """Class token and patches, (batch, 1 + patches, dim), as networks of this house give theirs."""
        blocks = self.encoder.forward_blocks(images)
        classes, patches = self.ladder(blocks, self.encoder.num_prefix_tokens)[self.teacher]
        classes = unstandardised(classes, self.cls_mean, self.cls_std)
        return torch.cat((classes[:, None], unstandardised(patches, self.patch_mean, self.patch_std)), dim=1)


def teacher_space_from_file(
    path: str | Path, checkpoint_key: str, head: str, grid: Grid | None = None, **asked: object
) -> Network:
    """The student in ``path`` in the space of its teacher ``head``. Raises CheckpointError in one line.

    The file: a training checkpoint of ours or of the original. ``grid``, ``asked``: as ``network_from_file`` takes it.
    """
    state, info = read_backbone(path, checkpoint_key, grid=grid)
    network = network_from_state(state, info, **asked)
    statistics = load_file(path, mapped=True).get("teacher_ft_stats")
    try:
        model = teacher_space(network.model, below(state, "lp."), statistics, head)
    except UsageError as error:
        raise CheckpointError(f"--apply_head {escape(head)}: {info.path}: {error}") from error
    return network._replace(model=model, head=head)


def teacher_space(encoder: nn.Module, ladder: State, statistics: object, head: str) -> TeacherSpace:
    """From what a file holds of ladder and statistics, whose widths are compared. Raises UsageError."""
    name = module_name(head)
    arguments = ladder_arguments(ladder)
    dims = arguments["heads"]
    if name not in dims:
        known = ", ".join(map(escape, sorted(dims)))
        raise UsageError(f"its ladder does not lead there{nearest(name, dims)}; it leads to {known}")
    depth, width, last = len(getattr(encoder, "blocks", ())), getattr(encoder, "embed_dim", 0), max(arguments["hidden"])
    if arguments["dim"] != width or last >= depth or not hasattr(encoder, "forward_blocks"):
        raise UsageError(
            f"its ladder takes tokens {arguments['dim']} wide of blocks up to {last}, its encoder has {depth} blocks "
            f"{width} wide; they are of two networks"
        )
    made = Ladder(**arguments | {"heads": {name: dims[name]}})
    ours = made.state_dict()
    _compare({f"lp.{key}": (ladder.get(key), value) for key, value in ours.items()})
    made.load_state_dict({key: ladder[key] for key in ours})
    return TeacherSpace(encoder, made, _statistics_of(name, statistics, dims[name]))


def _statistics_of(name: str, statistics: object, dim: int) -> dict[str, dict[str, torch.Tensor]]:
    """Those of one teacher, where teachers keep the dots of their names."""
    if not isinstance(statistics, dict):
        raise UsageError("no statistics of teachers (teacher_ft_stats); pass the training checkpoint")
    kinds = next((value for key, value in statistics.items() if module_name(str(key)) == name), None)
    found: dict[str, dict] = {kind: {} for kind in KINDS}
    for kind, values in found.items():
        of_kind = kinds.get(kind) if isinstance(kinds, dict) else None
        for key in ("mean", "std"):
            value = of_kind.get(key) if isinstance(of_kind, dict) else None
            values[key] = value.flatten() if isinstance(value, torch.Tensor) else None
            _compare({f"teacher_ft_stats of it, {kind} {key}": (values[key], torch.empty(dim))})
    return found


def _compare(tensors: dict[str, tuple[torch.Tensor | None, torch.Tensor]]) -> None:
    """Raises UsageError where what is there, by its name, is not as large as what is wanted."""
    for name, (there, wanted) in tensors.items():
        if there is None or there.shape != wanted.shape:
            shape = "none" if there is None else tuple(there.shape)
            raise UsageError(f"{name}: {shape} there, {tuple(wanted.shape)} expected; the file is damaged")
