"""DINO: self-distillation with no labels (Caron et al., 2104.14294).

A student sees all crops of an image, a teacher only the two global ones; the student's distribution over prototypes
must match the teacher's on every other crop (algorithm 1). The teacher is the student's running average. Its logits
are centred (eq. 4) and sharpened so that it collapses neither to one prototype nor to all of them.

Quirks of the original that are kept, since published numbers stand on them: gradients are clipped tensor by tensor;
class token, positions and the prototypes' norms are weight-decayed; the teacher stays in training mode (it matters for
batch norm only).
"""

import argparse
from collections.abc import Callable

import torch

from methods.base import Clock, backbone_arguments
from methods.centring import Centres
from methods.distillation import cross_view_loss, teacher_probabilities
from methods.heads import DINOHead
from methods.multicrop import MultiCropNetwork, add_crop_arguments, check_crop_arguments, multi_crop_views
from methods.parts import Part
from methods.teacher import (
    PrototypeMethod,
    add_following_arguments,
    add_temperature_arguments,
    check_following_arguments,
    check_temperature_arguments,
    temperatures,
)
from models import build_backbone, family_of
from utils import UsageError, bool_flag


class DINO(PrototypeMethod):
    name = "dino"
    teacher_views = 2

    # ---- options and data -------------------------------------------------------------------------------------------

    @staticmethod
    def add_arguments(parser: argparse._ArgumentGroup) -> None:
        add = parser.add_argument
        add("--out_dim", default=65536, type=int, help="prototypes; large values suit large data sets")
        add("--use_bn_in_head", default=False, type=bool_flag, help="batch norm in the head; ResNets use it")
        add_following_arguments(parser)
        add_temperature_arguments(parser)
        add_crop_arguments(parser)

    @staticmethod
    def check_arguments(args: argparse.Namespace) -> None:
        if args.out_dim < 1:
            raise UsageError(f"--out_dim {args.out_dim}: a head needs at least one prototype (the default is 65536)")
        if family_of(args.arch).name == "vil" and args.vil_mode == 1:
            raise UsageError("--vil_mode 1: dino draws no neighbours for it; pass 0 or -1, or --method esvit")
        check_following_arguments(args)
        check_temperature_arguments(args)
        check_crop_arguments(args)

    @staticmethod
    def views(args: argparse.Namespace) -> Callable:
        return multi_crop_views(args)

    @classmethod
    def build(cls, args: argparse.Namespace) -> "DINO":
        student = build_backbone(args.arch, drop_path_rate=args.drop_path_rate, **backbone_arguments(args))
        teacher = build_backbone(args.arch, **backbone_arguments(args))
        head = {"out_dim": args.out_dim, "use_bn": args.use_bn_in_head}
        return cls(
            MultiCropNetwork(student, DINOHead(student.embed_dim, norm_last_layer=args.norm_last_layer, **head)),
            MultiCropNetwork(teacher, DINOHead(teacher.embed_dim, **head)),
            teacher_temps=temperatures(args),
            freeze_last_layer=args.freeze_last_layer,
        )

    def __init__(
        self,
        student: MultiCropNetwork,
        teacher: MultiCropNetwork,
        teacher_temps,
        freeze_last_layer: int = 1,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
    ):
        """``teacher_temps``: one temperature per epoch. The teacher starts as a copy of the student."""
        centres = Centres(center_momentum, center=(1, teacher.head.last_layer.weight_g.shape[0]))
        super().__init__(student, teacher, centres, freeze_last_layer)
        self.teacher_temps = teacher_temps
        self.student_temp = student_temp

    # ---- one step ---------------------------------------------------------------------------------------------------

    def forward(self, batch: dict, clock: Clock) -> dict[str, torch.Tensor]:
        """``batch["crops"]``: list of (batch, 3, height, width), the two global crops first."""
        crops = batch["crops"]
        probs = self.teacher_targets(crops[: self.teacher_views], clock)  # (2, batch, prototypes)
        z = self.student_bottleneck(crops, clock)  # (crops * batch, 256)
        loss = cross_view_loss(z, self.student.head.last_layer.weight(), probs, self.student_temp)
        self._seen.update(probs=probs, loss=loss.detach())
        return {"loss": loss}

    @torch.no_grad()
    def teacher_targets(self, crops: list[torch.Tensor], clock: Clock) -> torch.Tensor:
        features = self.teacher.features(crops)
        logits = self.teacher.head(features)  # (2 * batch, prototypes)
        self.centres.collect(center=logits)
        self._seen["features"] = features
        probs = teacher_probabilities(logits, self.centres.center, self.teacher_temps[clock.epoch])
        self.note_prototypes(probs, clock)
        return probs.unflatten(0, (self.teacher_views, -1))

    def student_bottleneck(self, crops: list[torch.Tensor], clock: Clock) -> torch.Tensor:
        depth = getattr(self.student.backbone, "depth", 0)
        draws = clock.drop_path_draws(depth, len(crops), crops[0].shape[0])
        return self.student.head.bottleneck(self.student.features(crops, draws))

    def checkpoint_parts(self) -> dict[str, Part]:
        return {"student": self.student, "teacher": self.teacher, "dino_loss": self.centres}
