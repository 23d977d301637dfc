"""UDI: unsqueezed distillation-based self-supervised learning, from multi-modal targets (2407.17671).

Student and teacher have two class tokens. The first is distilled as in DINO; patches at sampled places of one global
crop match the teacher's patches at the same places of the other; the second class token matches a blend of what the
teacher says of a crop's places on average, and of the whole view.

    level cls     H(P(teacher's cls), cls)                  on every other crop
    level cls+    H(P(alpha * mean of places + (1 - alpha) * cls), cls+),  the places of that very crop
    level patch   H(P(teacher's place), place)              global crops only

Every level has a row of the centre; all share one head. Exact, and less work than the textbook form: the last layer is
linear, so means and blends are of 256 numbers and not of 65536, and places are packed.

Quirks of the original that are kept: targets blend logits; a mean of places is divided by the sum of their weights plus
1e-5; the patch loss is divided by the places of its own process; the patch row of the centre has the places of local
crops too. A batch without any place adds nothing (the original ends with NaN).
"""

import argparse
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn as nn

from data.sampling_picture import sampling_picture
from data.udi_views import UDIViews
from methods.base import Clock, backbone_arguments
from methods.centring import LevelCentre
from methods.distillation import Targets, prototype_cross_entropy, teacher_probabilities
from methods.heads import DINOHead
from methods.multicrop import add_crop_arguments, check_crop_arguments, crop_kinds, crop_settings
from methods.parts import Part
from methods.srs import SampledBackbone
from methods.teacher import (
    PrototypeMethod,
    add_following_arguments,
    add_temperature_arguments,
    check_following_arguments,
    check_temperature_arguments,
    temperatures,
)
from models import build_backbone, families_that, family_of
from utils import UsageError, bool_flag

MEAN_EPS = 1e-5


class UDINetwork(nn.Module):
    """Backbone with sampling, and one head for all levels. parity: the head is saved under the name of every level."""

    def __init__(self, backbone: SampledBackbone, head: DINOHead, levels: int):
        super().__init__()
        self.backbone = backbone
        self.head = nn.ModuleList([head] * levels)


class UDICriterionState(nn.Module):
    """The state of the loss under the original's names."""

    def __init__(self, centering: LevelCentre):
        super().__init__()
        self.centering = centering


class UDI(PrototypeMethod):
    name = "udi"

    # ---- options and data -------------------------------------------------------------------------------------------

    @staticmethod
    def add_arguments(parser: argparse._ArgumentGroup) -> None:
        add = parser.add_argument
        add("--out_dim", default=65536, type=int, help="prototypes; large values suit large data sets")
        add("--include_patch", default=True, type=bool_flag, help="sample patches; false needs --number_cls_token 1")
        add("--number_cls_token", default=2, type=int, help="2: cls and cls+; 1: cls alone")
        add("--use_bn_in_head", default=False, type=bool_flag, help="batch norm in the head")
        add("--alpha", default=0.5, type=float, help="weight of the places' mean in the target of cls+")
        add("--global_sampling_window_size", default=3, type=int, help="one place per so many patches squared")
        add("--local_sampling_window_size", default=2, type=int, help="the same in local crops")
        add_following_arguments(parser)
        add_temperature_arguments(parser)
        add_crop_arguments(parser)
        parser.set_defaults(
            teacher_temp=0.07,
            warmup_teacher_temp_epochs=30,
            global_crops_scale=(0.25, 1.0),
            local_crops_number=6,
            local_crops_scale=(0.05, 0.25),
            weight_decay_end=0.1,
            batch_size_per_gpu=128,
            epochs=300,
            min_lr=1e-5,
        )

    @staticmethod
    def check_arguments(args: argparse.Namespace) -> None:
        if args.out_dim < 1:
            raise UsageError(f"--out_dim {args.out_dim}: a head needs at least one prototype (the default is 65536)")
        if not family_of(args.arch).class_attention:
            known = families_that(lambda family: family.class_attention)
            raise UsageError(f"--arch {args.arch}: udi needs class tokens and patches; pass a {known}")
        if args.number_cls_token not in (1, 2):
            raise UsageError(f"--number_cls_token {args.number_cls_token}: there are one (cls) or two (and cls+)")
        if not args.include_patch and args.number_cls_token == 2:
            raise UsageError("--include_patch false: cls+ learns from patches; pass --number_cls_token 1 as well")
        if not 0 <= args.alpha <= 1:
            raise UsageError(f"--alpha {args.alpha}: a weight, from 0 to 1")
        check_following_arguments(args)
        check_temperature_arguments(args)
        check_crop_arguments(args)
        for kind, size in crop_kinds(args) if args.include_patch else ():
            window = getattr(args, f"{kind}_sampling_window_size")
            if not 1 <= window <= size // args.patch_size:
                raise UsageError(
                    f"--{kind}_sampling_window_size {window}: crops of {size} pixels have {size // args.patch_size} "
                    "patches a side; the window has to be within them"
                )

    @staticmethod
    def views(args: argparse.Namespace) -> Callable:
        return UDIViews(
            **crop_settings(args),
            local_crops_number=args.local_crops_number,
            local_crops_size=args.local_crops_size,
            patch_size=args.patch_size,
            global_sampling_window_size=args.global_sampling_window_size,
            local_sampling_window_size=args.local_sampling_window_size,
            include_patch=args.include_patch,
        )

    @classmethod
    def build(cls, args: argparse.Namespace) -> "UDI":
        networks = []
        for rate, frozen in ((args.drop_path_rate, args.norm_last_layer), (0.0, True)):
            arguments = backbone_arguments(args) | {"num_class_tokens": args.number_cls_token}
            vit = build_backbone(args.arch, drop_path_rate=rate, **arguments)
            head = DINOHead(vit.embed_dim, args.out_dim, use_bn=args.use_bn_in_head, norm_last_layer=frozen)
            levels = args.number_cls_token + args.include_patch
            networks.append(UDINetwork(SampledBackbone(vit, args.include_patch), head, levels))
        temps = temperatures(args)
        return cls(*networks, temps, args.include_patch, args.alpha, args.freeze_last_layer)

    def __init__(
        self,
        student: UDINetwork,
        teacher: UDINetwork,
        teacher_temps: np.ndarray,
        include_patch: bool = True,
        alpha: float = 0.5,
        freeze_last_layer: int = 1,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
    ):
        """``teacher_temps``: one temperature per epoch. The teacher starts as a copy of the student."""
        levels = len(student.head)
        centre = LevelCentre(levels, student.head[0].last_layer.weight_g.shape[0], center_momentum)
        super().__init__(student, teacher, centre, freeze_last_layer)
        self.state = UDICriterionState(centre)
        self.teacher_temps, self.student_temp = teacher_temps, student_temp
        self.include_patch, self.alpha = include_patch, alpha
        self.two_classes = levels - include_patch == 2

    # ---- one step ---------------------------------------------------------------------------------------------------

    def forward(self, batch: dict, clock: Clock) -> dict[str, torch.Tensor]:
        """``batch``: crops and sampled places, as ``data.udi_views.UDIViews`` makes them."""
        targets = self.teacher_targets(batch, clock)
        vectors = self.student_vectors(batch, clock)
        return self.losses(vectors, targets, len(batch["crops"]) - 2)

    @torch.no_grad()
    def teacher_targets(self, batch: dict, clock: Clock) -> dict[str, torch.Tensor]:
        """Distributions of every level; teacher rows are [second global crop, first], so that row i pairs with the
        student's row i: ``cls`` (2 * batch, K), ``cls+`` of the global and ``local`` crops, ``patch`` (places, K).
        """
        crops = batch["crops"]
        classes, patches = self.teacher.backbone.backbone.forward_with_patches((crops[1], crops[0]))
        z_cls = self.teacher.head[0].bottleneck(classes[:, 0])
        z_points = weights = None
        if self.include_patch:
            index, weight, points = teacher_places(batch)
            z_points = self.teacher.head[0].bottleneck(self.teacher.backbone.sample(patches, index, weight, points))
            weights = weight.double().sum(dim=2).flatten().index_select(0, points)
        self._seen["features"] = classes[:, 0]
        return self.targets_of(z_cls, z_points, weights, batch, clock)

    def targets_of(self, z_cls, z_points, weights, batch: dict, clock: Clock) -> dict[str, torch.Tensor]:
        """Targets from bottleneck vectors of class tokens (2 * batch, 256) and of all places (global, then local), and
        the weights of these (places,).
        """
        vectors, sums, counts = self.target_vectors(z_cls, z_points, weights, batch)
        layer, temp, centre = self.teacher.head[0].last_layer, self.teacher_temps[clock.epoch], self.centres.center
        level = {"cls": 0, "cls+": 1, "local": 1, "patch": -1}
        probs = {name: teacher_probabilities(layer(z), centre[level[name]], temp) for name, z in vectors.items()}
        with torch.autocast(z_cls.device.type, enabled=False):
            self.centres.collect(layer(sums), counts)
        self.note_prototypes(probs["cls"], clock)
        self._seen["probs"] = probs["cls"].unflatten(0, (2, -1))
        return probs

    def target_vectors(
        self, z_cls, z_points, weights, batch: dict
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        """What the last layer makes targets of, and for every level the weighted sum of vectors (levels, 256) whose
        logits move the centre, with the sum of the weights (levels,).
        """
        rows = len(z_cls)
        accurate = torch.float64 if z_cls.dtype == torch.float64 else torch.float32
        vectors, sums = {"cls": z_cls}, [z_cls.sum(dim=0, dtype=accurate)]
        counts = [sums[0].new_full((), rows)]
        if self.include_patch:
            groups, count = place_groups(batch, rows)
            weighted = z_points.to(accurate) * weights.to(accurate)[:, None]
            if self.two_classes:
                totals = weighted.new_zeros(count, z_points.shape[1]).index_add_(0, groups, weighted)
                mass = weighted.new_zeros(count).index_add_(0, groups, weights.to(accurate))
                means = totals / (mass + MEAN_EPS)[:, None]
                blend = self.alpha * means.view(-1, rows, means.shape[1]) + (1 - self.alpha) * z_cls.to(accurate)
                vectors["cls+"] = blend[0]
                vectors["local"] = blend[1:].flatten(0, 1)
                sums.append(blend.sum(dim=(0, 1)))
                counts.append(sums[0].new_full((), count))
            vectors["patch"] = z_points[: len(batch["points"])]
            sums.append(weighted.sum(dim=0))
            counts.append(weights.sum().to(accurate))
        return vectors, torch.stack(sums), torch.stack(counts)

    def student_vectors(self, batch: dict, clock: Clock) -> dict[str, torch.Tensor]:
        """Bottleneck vectors: ``cls`` and ``cls+`` of all crops (crops * batch, 256), ``patch`` (places, 256)."""
        crops, vit = batch["crops"], self.student.backbone.backbone
        draws = clock.drop_path_draws(vit.depth, len(crops), crops[0].shape[0])
        return self.bottleneck_vectors(*vit.forward_with_patches(crops[:2], crops[2:], draws), batch)

    def bottleneck_vectors(self, classes: torch.Tensor, patches: torch.Tensor, batch: dict) -> dict[str, torch.Tensor]:
        """The same from class tokens (crops * batch, class tokens, dim) and patches of the global crops."""
        rows = [classes[:, level] for level in range(classes.shape[1])]
        names = ["cls", "cls+"][: classes.shape[1]]
        if self.include_patch:
            index = batch["source"].transpose(0, 1).flatten(0, 1)[..., None]
            one = torch.ones_like(index, dtype=patches.dtype)
            rows.append(self.student.backbone.sample(patches, index, one, batch["points"]))
            names.append("patch")
        z = self.student.head[0].bottleneck(torch.cat([row.to(rows[0].dtype) for row in rows]))
        return dict(zip(names, z.split([len(row) for row in rows]), strict=True))

    def losses(self, vectors: dict, targets: dict, local_crops: int) -> dict[str, torch.Tensor]:
        """``vectors`` as ``bottleneck_vectors`` gives them, ``targets`` as ``targets_of`` does."""
        rows, prototypes = targets["cls"].shape
        levels = len(vectors)
        groups = {}

        def compare(name: str, count: int, probs: torch.Tensor, mass: float, share: float) -> None:
            source = torch.arange(count, device=probs.device) % max(1, len(probs))
            each = 1.0 / max(1, mass * count)
            groups[name] = Targets(probs, source, probs.new_full((count,), mass), each, share / levels)

        for name, short, local in (("cls", "cl", "cls"), ("cls+", "mcl", "local")):
            if name not in vectors:
                continue
            compare(f"g_{short}", rows, targets[name], 1.0, 1 / (1 + local_crops))
            if local_crops:
                pairs = targets[local].view(-1, 2, rows // 2, prototypes).sum(dim=1).flatten(0, 1)
                compare(f"l_{short}", len(vectors[name]) - rows, pairs, 2.0, local_crops / (1 + local_crops))
        if self.include_patch:
            compare("g_pch", len(vectors["patch"]), targets["patch"], 1.0, 1.0)
        z, weight = torch.cat(list(vectors.values())), self.student.head[0].last_layer.weight()
        loss, parts = prototype_cross_entropy(z, weight, list(groups.values()), self.student_temp)
        found = dict(zip(groups, parts, strict=True))
        of_cls = [name for name in ("g_cl", "l_cl") if name in found]
        self._seen["loss"] = levels * sum(groups[name].share * found[name] for name in of_cls)
        return {"loss": loss, **found}

    # ---- looking at it ----------------------------------------------------------------------------------------------

    def pictures(self, batch: dict, clock: Clock) -> Iterator[tuple[str, np.ndarray]]:
        yield from super().pictures(batch, clock)
        if self.include_patch:
            yield "sampling", sampling_picture(batch, self.evaluation_backbone().patch_size)

    def checkpoint_parts(self) -> dict[str, Part]:
        return {"student": self.student, "teacher": self.teacher, "udi_loss": self.state}

    def evaluation_backbone(self) -> nn.Module:
        return self.teacher.backbone.backbone


def teacher_places(batch: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All places of the teacher's rows [second global crop, first], global crops' places first.

    Returns    index and weight (2 * batch, places, 4), and flat positions of the valid ones in (2 * batch, places),
               those of global crops first
    """
    index, weight = (batch[f"target_{name}"].transpose(0, 1) for name in ("index", "weight"))  # (2, batch, s, 4)
    _, size, count, _ = index.shape
    points = batch["points"]
    if "local_index" not in batch:
        return index.flatten(0, 1), weight.flatten(0, 1), points
    local_index, local_weight = (batch[f"local_{name}"].permute(2, 0, 1, 3, 4) for name in ("index", "weight"))
    crops, local_count = local_index.shape[2:4]
    places = count + crops * local_count
    index = torch.cat((index, local_index.flatten(2, 3)), dim=2).flatten(0, 1)
    weight = torch.cat((weight, local_weight.flatten(2, 3)), dim=2).flatten(0, 1)
    points = divide(points, count) * places + points % count
    local = batch["local_points"]  # in (crops, 2, batch, local_count)
    row, place = divide(local, local_count), local % local_count
    crop, row = divide(row, 2 * size), row % (2 * size)
    local = row * places + count + crop * local_count + place
    return index, weight, torch.cat((points, local))


def place_groups(batch: dict, rows: int) -> tuple[torch.Tensor, int]:
    """Which mean every valid place belongs to, in the order of ``teacher_places``: (places,); and how many means: a
    teacher row's own, then that of every local crop in it.
    """
    groups = [divide(batch["points"], batch["source"].shape[-1])]
    count = rows
    if "local_index" in batch:
        crops, local_count = batch["local_index"].shape[1], batch["local_index"].shape[3]
        groups.append(rows + divide(batch["local_points"], local_count))
        count += crops * rows
    return torch.cat(groups), count


def divide(positions: torch.Tensor, by: int) -> torch.Tensor:
    return positions.div(by, rounding_mode="floor")
