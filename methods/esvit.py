"""EsViT: efficient self-supervised vision transformers, of several stages, with a region-matching task (2106.09785).

The view task is DINO's. The region task compares every token of the last stage of a student's crop with the token of a
teacher's view that is most like it, through a head and a centre of its own (regions.py):

    view_iv    mean over images of  H(P(teacher's view i), crop v)                                      eq. 3
    region_iv  mean over images and tokens j of  H(P(teacher's token m_iv(j)), token j)                 eq. 4
    loss       mean over pairs i != v of  (view + region) / 2;  of the view loss alone without regions

Which token is most like another is decided by the backbone's tokens, which get no gradient from it: only the two heads
hand one on. parity: so switching regions on halves the weight of the view task.

Exact, and less work than the textbook form: a student row's logits are formed once, whatever it is compared with
(``Targets``), and no (tokens, prototypes) matrix of the student's is kept. Any number of sizes of crops will do, one
too; the original takes exactly two. Of mixed images (--use_mixup) the teacher sees the unmixed ones.
"""

import argparse
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from data.deit_views import DeiTCropViews
from data.matches_picture import matches_picture
from data.mixing import build_mixup, mix
from methods.base import Clock, backbone_arguments
from methods.centring import Centres
from methods.distillation import (
    cross_view_loss,
    mean_logits,
    mixed_view_loss,
    prototype_cross_entropy,
    teacher_probabilities,
)
from methods.esvit_options import add_esvit_arguments, check_esvit_arguments, deit_augmentation
from methods.heads import DINOHead, unit_vectors
from methods.multicrop import (
    MultiCropNetwork,
    add_crop_arguments,
    check_crop_arguments,
    local_crops,
    multi_crop_views,
)
from methods.parts import Part, Renamed
from methods.regions import match_regions, matched_rows, region_targets, share_matched, tokens_of_crops
from methods.teacher import (
    PrototypeMethod,
    add_following_arguments,
    add_temperature_arguments,
    check_following_arguments,
    check_temperature_arguments,
    temperatures,
)
from models import build_backbone, family_of
from models.batch_norm import batch_norm_of_the_batch
from randomness import counted_uniforms
from utils import UsageError, bool_flag

HEADS = ("head.", "head_dense.")
HOLDS_ITS_HEADS = ("vit", "swin", "cvt", "vil")  # families whose names in the original's files begin with nothing
TEACHER_VIEWS = 2
NEIGHBOURS = 8  # chunks around a chunk of Vision Longformer
SHOWN_TOKENS = 64  # of which health tells the entropy
_NEIGHBOUR = 0xE5B  # what a draw is for
# vectors of all crops (crops * batch, dim), and tokens (samples, n, dim) of every size of them
Regions = tuple[torch.Tensor, list[torch.Tensor]]


class RegionNetwork(MultiCropNetwork):
    """Backbone, head of the view task, and the region task's ``head_dense`` where there is that task."""

    def __init__(self, backbone: nn.Module, head: nn.Module, head_dense: nn.Module | None = None):
        super().__init__(backbone, head)
        if head_dense is not None:
            self.head_dense = head_dense

    def regions(
        self, crops: Sequence[torch.Tensor], draws: np.ndarray | None, neighbours: np.ndarray | None
    ) -> Regions:
        """What the backbone makes of all crops.

        ``neighbours``: (sizes, calls of attention), for the networks that look at one of those at random.
        """
        further = () if neighbours is None else (neighbours,)
        return self.backbone.forward_regions(crops, draws, *further)

    def vectors(
        self, crops: Sequence[torch.Tensor], draws: np.ndarray | None, neighbours: np.ndarray | None
    ) -> torch.Tensor:
        """The first of ``regions``, with no more work than it needs."""
        if neighbours is not None:
            return self.backbone.forward_crops(crops, draws, neighbours)
        return self.features(crops, draws)


class EsViT(PrototypeMethod):
    name = "esvit"

    # ---- options and data -------------------------------------------------------------------------------------------

    @staticmethod
    def add_arguments(parser: argparse._ArgumentGroup) -> None:
        add = parser.add_argument
        add("--out_dim", default=65536, type=int, help="prototypes of every head; large values suit large data sets")
        add("--use_bn_in_head", default=False, type=bool_flag, help="batch norm in the heads")
        add_following_arguments(parser)
        add_temperature_arguments(parser)
        add_crop_arguments(parser, several=True)
        add_esvit_arguments(parser)
        parser.set_defaults(arch="deit_small", drop_path_rate=None, saveckp_freq=5, init_progress=True)

    @staticmethod
    def check_arguments(args: argparse.Namespace) -> None:
        if args.out_dim < 1:
            raise UsageError(f"--out_dim {args.out_dim}: a head needs at least one prototype (the default is 65536)")
        check_following_arguments(args)
        check_temperature_arguments(args)
        check_crop_arguments(args)
        check_esvit_arguments(args)

    @staticmethod
    def views(args: argparse.Namespace) -> Callable:
        if args.aug_opt == "deit_aug":
            return DeiTCropViews(args.global_crops_size, local_crops(args), **deit_augmentation(args))
        return multi_crop_views(args)

    @classmethod
    def build(cls, args: argparse.Namespace) -> "EsViT":
        networks = []
        for rate, frozen in ((args.drop_path_rate, args.norm_last_layer), (0.0, True)):
            backbone = build_backbone(args.arch, drop_path_rate=rate, **backbone_arguments(args))
            heads = [
                DINOHead(backbone.embed_dim, args.out_dim, use_bn=args.use_bn_in_head, norm_last_layer=frozen)
                for _ in range(1 + args.use_dense_prediction)
            ]
            networks.append(RegionNetwork(backbone, *heads))
        return cls(
            *networks,
            teacher_temps=temperatures(args),
            freeze_last_layer=args.freeze_last_layer,
            mixup=build_mixup(args, args.batch_size_per_gpu) if args.use_mixup else None,
            mixed_views=args.num_mixup_views,
            file_prefix="" if family_of(args.arch).name in HOLDS_ITS_HEADS else "backbone.backbone.",
        )

    def __init__(
        self,
        student: RegionNetwork,
        teacher: RegionNetwork,
        teacher_temps: np.ndarray,
        freeze_last_layer: int = 1,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        mixup: Callable | None = None,
        mixed_views: int = 10,
        file_prefix: str = "",
    ):
        """``teacher_temps``: one temperature per epoch. The teacher starts as a copy of the student.

        ``file_prefix``: what the backbone's names begin with in files.
        """
        self.regional = hasattr(student, "head_dense")
        shape = (1, teacher.head.last_layer.weight_g.shape[0])
        shapes = {"center": shape} | ({"center_grid": shape} if self.regional else {})
        super().__init__(student, teacher, Centres(center_momentum, **shapes), freeze_last_layer)
        self.teacher_temps, self.student_temp = teacher_temps, student_temp
        self.mixup, self.mixed_views = mixup, mixed_views
        self.file_prefix = file_prefix
        # parity: with batch norm the teacher is wrapped for its statistics, and its names say so
        self.wrapped = ("student", "teacher") if batch_norm_of_the_batch(teacher) else ("student",)

    # ---- one step ---------------------------------------------------------------------------------------------------

    def forward(self, batch: dict, clock: Clock) -> dict[str, torch.Tensor]:
        """``batch["crops"]``: list of (batch, 3, height, width), the two global crops first."""
        crops = batch["crops"]
        views = crops[:TEACHER_VIEWS]
        if not self.regional:
            with torch.no_grad():
                features = self.teacher.vectors(views, None, self.neighbours(views, clock, network=1))
            shown, mixes = (crops, None) if self.mixup is None else self.mixed(crops, clock)
            vectors = self.student.vectors(shown, self.draws(crops, clock), self.neighbours(crops, clock))
            return self.view_losses(vectors, features, mixes, clock)
        with torch.no_grad():
            teacher = self.teacher.regions(views, None, self.neighbours(views, clock, network=1))
        student = self.student.regions(crops, self.draws(crops, clock), self.neighbours(crops, clock))
        return self.losses(student, teacher, clock)

    def view_losses(
        self, vectors: torch.Tensor, features: torch.Tensor, mixes: torch.Tensor | None, clock: Clock
    ) -> dict[str, torch.Tensor]:
        """The loss without regions, from the student's vectors (crops * batch, dim) and the teacher's (2 * batch, dim).

        ``mixes``: of what every student's image is mixed (``mixed_view_loss``); None where it is itself.
        """
        logits, probs = self.view_targets(features, clock)
        self.centres.collect(center=logits)
        z, weight = self.student.head.bottleneck(vectors), self.student.head.last_layer.weight()
        if mixes is None:
            loss = cross_view_loss(z, weight, probs, self.student_temp)
        else:
            loss = mixed_view_loss(z, weight, probs, mixes, self.student_temp)
        self._seen["loss"] = loss.detach()
        return {"loss": loss}

    def losses(self, student: Regions, teacher: Regions, clock: Clock) -> dict[str, torch.Tensor]:
        """Both losses, from what ``RegionNetwork.regions`` returned of all crops and of the teacher's views."""
        batch = len(teacher[0]) // TEACHER_VIEWS
        pairs = TEACHER_VIEWS * (len(student[0]) // batch - 1)
        logits, probs = self.view_targets(teacher[0], clock)
        sources = match_regions(*(tokens_of_crops(tokens, batch) for _, tokens in (student, teacher)))
        mean, region_probs, sources = self.region_targets(*teacher[1], sources, clock)
        self.centres.collect(center=logits, center_grid=mean)

        z, weight = self.student.head.bottleneck(student[0]), self.student.head.last_layer.weight()
        view = cross_view_loss(z, weight, probs, self.student_temp)
        self._seen["loss"] = view.detach()
        z = self.student.head_dense.bottleneck(torch.cat([tokens.flatten(0, 1) for tokens in student[1]]))
        weight = self.student.head_dense.last_layer.weight()
        targets = region_targets(region_probs, sources, pairs)
        region = prototype_cross_entropy(z, weight, targets, self.student_temp)[0]
        return {"loss": 0.5 * view + 0.5 * region, "view": view.detach(), "region": region.detach()}

    @torch.no_grad()
    def view_targets(self, features: torch.Tensor, clock: Clock) -> tuple[torch.Tensor, torch.Tensor]:
        """The teacher's vectors (2 * batch, dim) -> logits, and distributions (2, batch, prototypes)."""
        logits = self.teacher.head(features)
        probs = teacher_probabilities(logits, self.centres.center, self.teacher_temps[clock.epoch])
        self.note_prototypes(probs, clock)
        probs = probs.unflatten(0, (TEACHER_VIEWS, -1))
        self._seen.update(probs=probs, features=features)
        return logits, probs

    @torch.no_grad()
    def region_targets(
        self, tokens: torch.Tensor, sources: list[torch.Tensor], clock: Clock
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """The teacher's tokens (2 * batch, n, dim), and which of their rows every crop's are compared with.

        Returns    what moves the centre, the mean logits of every view (2 * batch, prototypes); distributions (rows,
                   prototypes) of the rows that are matched; and the sources counted among these
        """
        head, per_view = self.teacher.head_dense, tokens.shape[1]
        z = head.bottleneck(tokens.flatten(0, 1))
        layer = partial(F.linear, weight=head.last_layer.weight())
        mean = mean_logits(layer, z.unflatten(0, tokens.shape[:2]))
        share = share_matched(sources, len(z))
        rows, sources = matched_rows(sources)
        logits = layer(z if rows is None else z.index_select(0, rows))
        probs = teacher_probabilities(logits, self.centres.center_grid, self.teacher_temps[clock.epoch])
        some = sources[0].flatten()[:: max(1, sources[0].numel() // SHOWN_TOKENS)]
        self._seen.update(region_probs=probs.index_select(0, some), matched_share=share, matched=share * per_view)
        return mean, probs, sources

    # ---- what is drawn ----------------------------------------------------------------------------------------------

    def draws(self, crops: Sequence[torch.Tensor], clock: Clock) -> np.ndarray:
        """For the student's stochastic depth."""
        return clock.drop_path_draws(getattr(self.student.backbone, "depth", 0), len(crops), len(crops[0]))

    def neighbours(self, crops: Sequence[torch.Tensor], clock: Clock, network: int = 0) -> np.ndarray | None:
        """Which chunk beside its own every attention of Vision Longformer sees: (sizes of crops, calls), 1 to 8.

        ``network``: 1 is the teacher, which draws for itself. The same in all pieces and processes. None for networks
        that have nothing of the kind.
        """
        calls = getattr(self.student.backbone, "attention_calls", 0)
        if not calls:
            return None
        sizes = len(list(itertools.groupby(crops, lambda crop: crop.shape[-2:])))
        key = (clock.seed, clock.iteration, _NEIGHBOUR, network, np.arange(sizes)[:, None], np.arange(calls))
        return 1 + (counted_uniforms(*key) * NEIGHBOURS).astype(np.int64)

    @torch.no_grad()
    def mixed(self, crops: Sequence[torch.Tensor], clock: Clock) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The crops with the images of the first ones mixed, which the teacher's are not; and of what every image is
        made (crops, batch, batch).
        """
        images = torch.arange(len(crops[0]), device=crops[0].device)
        shown, whole = list(crops), torch.eye(len(images), device=images.device)
        mixes = [whole] * len(crops)
        for number, crop in enumerate(crops[: self.mixed_views]):
            key = (clock.seed, clock.iteration, clock.first_sample, number)
            shown[number], mixes[number] = mix(self.mixup, crop.clone(), images, key)
        return shown, torch.stack(mixes)

    # ---- looking at it ----------------------------------------------------------------------------------------------

    def health(self) -> dict[str, torch.Tensor]:
        """Of regions: the entropy of some that are matched; the share, and the number in a view, of those that are."""
        measures = super().health()
        if not self.regional:
            return measures
        entropy = torch.special.entr(self._seen["region_probs"]).sum(dim=-1).mean()
        return measures | {
            "region_entropy": entropy,
            "region_entropy_over_ln_k": entropy / math.log(self.centres.center_grid.shape[-1]),
            "region_centre_norm": self.centres.center_grid.norm(),
            "matched_share": self._seen["matched_share"],
            "matched_tokens": self._seen["matched"],
        }

    def pictures(self, batch: dict, clock: Clock) -> Iterator[tuple[str, np.ndarray]]:
        """The crops, and for an image which regions are compared with which."""
        yield from super().pictures(batch, clock)
        if self.regional:
            crops = [crop[:1] for crop in batch["crops"]]
            yield "matches", matches_picture(crops, *self.matches_of(crops, clock))

    @torch.no_grad()
    def matches_of(self, crops: list[torch.Tensor], clock: Clock) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Unit tokens (n, dim) that the student has of every crop of one image, and the teacher of its views."""
        training = self.training
        self.eval()  # statistics of batch norm are not moved
        sides = [(self.student, crops, 0), (self.teacher, crops[:TEACHER_VIEWS], 1)]
        found = [
            tokens_of_crops(network.regions(shown, None, self.neighbours(shown, clock, number))[1], 1)
            for network, shown, number in sides
        ]
        self.train(training)
        return tuple([unit_vectors(tokens[0]) for tokens in side] for side in found)

    def identity(self) -> dict[str, str]:
        """Images of a process are mixed with each other, so it has to have as many when a run goes on."""
        return {} if self.mixup is None else {"images mixed with each other": str(self.mixup.num_classes)}

    def checkpoint_parts(self) -> dict[str, Part]:
        names = partial(names_in_files, prefix=self.file_prefix), names_of_ours
        return {
            "student": Renamed(self.student, *names),
            "teacher": Renamed(self.teacher, *names),
            "dino_loss": self.centres,
        }


def names_in_files(state: dict, prefix: str) -> dict:
    """``backbone.`` of our names -> what the original's files have there."""
    return {n if n.startswith(HEADS) else prefix + n.removeprefix("backbone."): value for n, value in state.items()}


def names_of_ours(state: dict) -> dict:
    """Undoes ``names_in_files``, whatever its prefix."""

    def ours(name: str) -> str:
        return name if name.startswith(HEADS) else "backbone." + re.sub(r"^(backbone\.)*", "", name)

    return {ours(name): value for name, value in state.items()}
