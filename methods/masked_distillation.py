"""Masked self-distillation: what iBOT and AttMask share, which is all but the masks (iBOT, 2111.07832).

The student sees the global crops with some patches hidden, and the local crops as they are; the teacher sees the
global crops unhidden. The student's class token must match the teacher's of every other crop, as in DINO, and its
hidden patches the teacher's patches of the *same* crop (eq. 2 and 3). Class tokens and patches have a centre each.

Exact, and much less work than the textbook form: heads and last block run on the tokens the loss reads; the mean logit
over all patches, which moves the patch centre, is the last layer's product with the mean vector, since it is linear.

Quirks of the original that are kept: an image without hidden patches adds nothing to the patch loss and still counts in
its average; the patch centre averages all patches, hidden or not; a student with two sets of prototypes and a teacher
with one (the default of the options!) make the teacher's patches follow the class prototypes.
"""

import argparse
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn as nn

from data.pictures import crops_grid
from methods.base import Clock, backbone_arguments
from methods.centring import Centres
from methods.distillation import cross_view_loss, masked_patch_loss, mean_logits, teacher_probabilities
from methods.heads import ACTIVATIONS, NORMS, IBOTHead
from methods.multicrop import MultiCropNetwork, add_crop_arguments, check_crop_arguments, local_crops
from methods.parts import Part
from methods.teacher import (
    PrototypeMethod,
    add_following_arguments,
    add_temperature_arguments,
    check_following_arguments,
    check_temperature_arguments,
    check_temperatures,
    temperatures,
)
from models import build_backbone, families_that, family_of
from models.swin import DEFAULT_DROP_PATH
from models.vit import group_by_size
from utils import UsageError, bool_flag, log, warmup_scheduler


class MaskedDistillation(PrototypeMethod):
    """A subclass says which patches are hidden: ``choose_masks``."""

    # ---- options ----------------------------------------------------------------------------------------------------

    @staticmethod
    def add_arguments(parser: argparse._ArgumentGroup) -> None:
        add = parser.add_argument
        add("--out_dim", default=8192, type=int, help="prototypes of the class token")
        add("--patch_out_dim", default=8192, type=int, help="prototypes of the patches, where they have their own")
        add(
            "--shared_head",
            default=False,
            type=bool_flag,
            help="the student's class token and patches share prototypes",
        )
        add("--shared_head_teacher", default=True, type=bool_flag, help="the teacher's do; best true for both")
        add(
            "--norm_in_head",
            default=None,
            choices=list(NORMS),
            help="norm after the head's hidden layers; default none",
        )
        add("--act_in_head", default="gelu", choices=list(ACTIVATIONS), help="activation of the head")
        add("--use_masked_im_modeling", default=True, type=bool_flag, help="hide the masked patches from the student")
        add("--lambda1", default=1.0, type=float, help="weight of the class loss")
        add("--lambda2", default=1.0, type=float, help="weight of the patch loss")
        add("--warmup_teacher_patch_temp", default=0.04, type=float, help="first teacher temperature of the patches")
        add("--teacher_patch_temp", default=0.07, type=float, help="final teacher temperature of the patches")
        add("--global_crops_number", default=2, type=int, help="global crops per image, which the teacher sees")
        add_following_arguments(parser)
        add_temperature_arguments(parser)
        add_crop_arguments(parser)
        parser.set_defaults(
            warmup_teacher_temp_epochs=30,
            local_crops_number=0,
            global_crops_scale=(0.14, 1.0),
            batch_size_per_gpu=128,
            saveckp_freq=40,
        )

    @staticmethod
    def check_arguments(args: argparse.Namespace) -> None:
        for name in ("out_dim", "patch_out_dim", "global_crops_number"):
            if getattr(args, name) < 1:
                raise UsageError(f"--{name} {getattr(args, name)}: must be at least 1")
        check_crop_arguments(args)
        if args.global_crops_number == 1 and not local_crops(args):
            raise UsageError(
                f"--global_crops_number {args.global_crops_number} --local_crops_number {args.local_crops_number}: a "
                "student learns from another crop of the image; pass two crops or more"
            )
        check_following_arguments(args)
        check_temperature_arguments(args)
        check_temperatures(args, "warmup_teacher_patch_temp", "teacher_patch_temp")
        warmup = args.warmup_teacher_temp_epochs + args.pred_start_epoch
        if warmup > args.epochs:
            raise UsageError(
                f"--pred_start_epoch {args.pred_start_epoch} and --warmup_teacher_temp_epochs "
                f"{args.warmup_teacher_temp_epochs} are together longer than --epochs {args.epochs}"
            )
        if args.shared_head and not args.shared_head_teacher:
            raise UsageError(
                "--shared_head true --shared_head_teacher false: the teacher's own patch prototypes would never follow "
                "the student; pass --shared_head_teacher true"
            )
        if not args.shared_head and args.shared_head_teacher:
            if args.out_dim != args.patch_out_dim:
                raise UsageError(
                    f"--out_dim {args.out_dim} --patch_out_dim {args.patch_out_dim}: have to be equal with "
                    "--shared_head false --shared_head_teacher true; pass --shared_head true, as every published run"
                )
            log.warning(
                "warning: --shared_head false with --shared_head_teacher true makes the teacher's patches follow the "
                "student's class prototypes; every published run passes --shared_head true"
            )
        mask_grid(args)

    @classmethod
    def build(cls, args: argparse.Namespace) -> "MaskedDistillation":
        networks = []
        for backbone, shared, frozen in zip(
            build_backbones(args),
            (args.shared_head, args.shared_head_teacher),
            (args.norm_last_layer, True),  # the teacher has no gradient in any case
            strict=True,
        ):
            head = IBOTHead(
                backbone.embed_dim,
                args.out_dim,
                args.patch_out_dim,
                shared_head=shared,
                norm=args.norm_in_head,
                act=args.act_in_head,
                norm_last_layer=frozen,
            )
            networks.append(MultiCropNetwork(backbone, head))
        return cls(*networks, **cls.settings(args))

    @staticmethod
    def settings(args: argparse.Namespace) -> dict:
        """The arguments of the constructor, but for the networks."""
        return {
            "teacher_temps": temperatures(args),
            "teacher_patch_temps": patch_temperatures(
                args.warmup_teacher_patch_temp,
                args.teacher_patch_temp,
                args.warmup_teacher_temp_epochs,
                args.epochs,
                args.pred_start_epoch,
            ),
            "teacher_views": args.global_crops_number,
            "freeze_last_layer": args.freeze_last_layer,
            "lambda1": args.lambda1,
            "lambda2": args.lambda2,
        }

    def __init__(
        self,
        student: MultiCropNetwork,
        teacher: MultiCropNetwork,
        teacher_temps: np.ndarray,
        teacher_patch_temps: np.ndarray,
        teacher_views: int = 2,
        freeze_last_layer: int = 1,
        lambda1: float = 1.0,
        lambda2: float = 1.0,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
    ):
        """Temperatures: one per epoch. The teacher starts with all it has in common with the student."""
        out_dim, patch_out_dim = (
            layer.weight_g.shape[0] for layer in (teacher.head.last_layer, teacher.head.last_layer2)
        )
        centres = Centres(center_momentum, center=(1, out_dim), center2=(1, 1, patch_out_dim))
        super().__init__(student, teacher, centres, freeze_last_layer)
        self.teacher_temps, self.teacher_patch_temps = teacher_temps, teacher_patch_temps
        self.teacher_views, self.student_temp = teacher_views, student_temp
        self.lambda1, self.lambda2 = lambda1, lambda2

    # ---- one step ---------------------------------------------------------------------------------------------------

    def forward(self, batch: dict, clock: Clock) -> dict[str, torch.Tensor]:
        """``batch["crops"]``: list of (batch, 3, height, width), the global crops first."""
        crops = batch["crops"]
        tokens, attention = self.look(crops[: self.teacher_views])
        masks, masked = self.choose_masks(batch, clock, attention)
        probs, patch_probs = self.teacher_targets(tokens, masked, clock)
        z, z_patches = self.student_vectors(crops, masks, masked, clock)
        self._seen["hidden"] = masks.float().mean()
        return self.losses(z, z_patches, probs, patch_probs, masks.flatten(1), masked)

    def losses(self, z, z_patches, probs, patch_probs, masks, masked) -> dict[str, torch.Tensor]:
        """What the student's bottleneck vectors lose against the teacher's distributions (``cross_view_loss`` and
        ``masked_patch_loss`` give the shapes).
        """
        head = self.student.head
        weight, patch_weight = head.last_layer.weight(), head.last_layer2.weight()
        cls = cross_view_loss(z, weight, probs, self.student_temp)
        patch = masked_patch_loss(z_patches, patch_weight, patch_probs, masks, masked, self.student_temp)
        self._seen["loss"] = cls.detach()
        return {
            "loss": self.lambda1 * cls + self.lambda2 * patch,
            "cls": self.lambda1 * cls,
            "patch": self.lambda2 * patch,
            "acc": self.agreement(z, weight, probs),
        }

    @torch.no_grad()
    def look(self, crops: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The teacher's tokens of the global crops (crops * batch, 1 + patches, dim), and its attention if masks
        follow it (crops * batch, patches).
        """
        return self.teacher.backbone.forward_features(torch.cat(crops)), None

    def choose_masks(
        self, batch: dict, clock: Clock, attention: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks (crops * batch, rows, columns) bool of the global crops, and the flat positions of what they hide."""
        return torch.cat(batch["masks"]), batch["masked"]

    @torch.no_grad()
    def teacher_targets(
        self, tokens: torch.Tensor, masked: torch.Tensor, clock: Clock
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Distributions of class tokens (crops, batch, prototypes) and of hidden patches (positions, prototypes)."""
        head, classes = self.teacher.head, tokens[:, 0]
        z = head.bottleneck(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])
        logits = head.last_layer(z[:, 0])
        patch_logits = head.last_layer2(z[:, 1:].flatten(0, 1).index_select(0, masked))
        self.centres.collect(center=logits, center2=mean_logits(head.last_layer2, z[:, 1:]))
        probs = teacher_probabilities(logits, self.centres.center, self.teacher_temps[clock.epoch])
        patch_probs = teacher_probabilities(
            patch_logits, self.centres.center2[0], self.teacher_patch_temps[clock.epoch]
        )
        self.note_prototypes(probs, clock)
        probs = probs.unflatten(0, (self.teacher_views, -1))
        # parity: pseudo-labels are those of the raw logits, without the centre
        self._seen.update(probs=probs, features=classes, prototypes=logits[: probs.shape[1]].argmax(dim=-1))
        return probs, patch_probs

    def student_vectors(
        self, crops: list[torch.Tensor], masks: torch.Tensor, masked: torch.Tensor, clock: Clock
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Bottleneck vectors of all class tokens (crops * batch, 256) and of the hidden patches (positions, 256)."""
        backbone, head = self.student.backbone, self.student.head
        draws = clock.drop_path_draws(backbone.depth, len(crops), crops[0].shape[0])
        shown = masks if backbone.masked_embed is not None else None
        if head.has_batch_norm:
            return self.vectors_of_all_tokens(crops, shown, masked, draws)
        views = self.teacher_views
        classes, patches = backbone.forward_masked(crops[:views], crops[views:], shown, masked, draws)
        return head.bottleneck(torch.cat((classes, patches))).split([len(classes), len(patches)])

    def vectors_of_all_tokens(
        self, crops: list[torch.Tensor], masks: torch.Tensor | None, masked: torch.Tensor, draws: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same by the textbook: batch statistics are those of all tokens, global crops and local crops apart."""
        backbone, head = self.student.backbone, self.student.head
        groups = [torch.cat(crops[: self.teacher_views]), *group_by_size(crops[self.teacher_views :])]
        classes, patches, first = [], None, 0
        for group in groups:
            part = draws[..., first : first + len(group)]
            tokens = backbone.forward_features(group, None if first else masks, part)
            z = head.bottleneck(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])
            classes.append(z[:, 0])
            patches = z[:, 1:].flatten(0, 1).index_select(0, masked) if patches is None else patches
            first += len(group)
        return torch.cat(classes), patches

    @torch.no_grad()
    def agreement(self, z: torch.Tensor, weight: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
        """Share of images whose first crop the teacher gives the prototype that the student gives the second one."""
        batch = probs.shape[1]
        student = (z[batch : 2 * batch] @ weight.t()).argmax(dim=-1)
        return (student == self._seen["prototypes"]).float().mean()

    # ---- looking at it ----------------------------------------------------------------------------------------------

    def health(self) -> dict[str, torch.Tensor]:
        patches = {"patch_centre_norm": self.centres.center2.norm(), "hidden_patches": self._seen["hidden"]}
        return super().health() | patches

    def pseudo_labels(self) -> torch.Tensor | None:
        return self._seen["prototypes"]

    def pictures(self, batch: dict, clock: Clock) -> Iterator[tuple[str, np.ndarray]]:
        yield "first_batch", crops_grid(batch["crops"], self.masks(batch, clock).cpu().numpy())

    def masks(self, batch: dict, clock: Clock) -> torch.Tensor:
        """The patches that the student will not see, (views, batch, rows, columns) bool of the global crops."""
        return torch.stack(batch["masks"])

    def checkpoint_parts(self) -> dict[str, Part]:
        return {"student": self.student, "teacher": self.teacher, "ibot_loss": self.centres}


def patch_temperatures(first: float, final: float, warmup_epochs: int, epochs: int, start_epoch: int) -> np.ndarray:
    """One temperature per epoch: ``first`` until patches are hidden, then the linear warm-up, then ``final``."""
    return np.concatenate(
        (np.full(start_epoch, first), warmup_scheduler(first, final, warmup_epochs, epochs - start_epoch))
    )


def build_backbones(args: argparse.Namespace) -> tuple[nn.Module, nn.Module]:
    """Student and teacher; only the student can hide patches and drops paths.

    parity: a Swin drops with its architecture's own rate, whatever --drop_path says (iBOT main_ibot.py).
    """
    rate = DEFAULT_DROP_PATH.get(args.arch, args.drop_path_rate)
    masking = {"masked_im_modeling": args.use_masked_im_modeling}
    student = build_backbone(args.arch, drop_path_rate=rate, **masking, **backbone_arguments(args))
    return student, build_backbone(args.arch, **backbone_arguments(args))


def mask_grid(args: argparse.Namespace) -> tuple[int, int]:
    """Rows and columns of a global crop's mask. Raises UsageError for a backbone without patches, and for crops that
    are no whole number of a mask's cells.
    """
    family = family_of(args.arch)
    if not family.hides_patches:
        known = families_that(lambda family: family.hides_patches)
        raise UsageError(f"--arch {args.arch}: {args.method} predicts patches; pass a {known}")
    unit = family.pixels_per_token(family.arguments(vars(args)))
    if args.global_crops_size % unit:
        near = args.global_crops_size - args.global_crops_size % unit
        raise UsageError(
            f"--global_crops_size {args.global_crops_size}: a mask of {args.arch} has cells of {unit} pixels; nearest "
            f"{' or '.join(str(size) for size in (near, near + unit) if size)}"
        )
    for _, size in local_crops(args):
        if size < unit:
            raise UsageError(f"--local_crops_size {size}: smaller than a mask's cell, {unit} pixels for {args.arch}")
    return (args.global_crops_size // unit,) * 2
