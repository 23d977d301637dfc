"""UNIC: universal classification models via multi-teacher distillation (2408.05088).

One student learns to reproduce the features of several frozen teachers. What differs from DINO: no teacher follows the
student, there are no prototypes, and one crop of an image goes to everybody.

    z_t   teacher t's class token and patches, standardised with running statistics        standardise.py
    y_t   the ladder's image of the student's raw tokens, all blocks, in t's space           ladder.py
    L_ti  mean of class token and patches of  lam_lcos (1 - cos(y, z)) + lam_lsl1 smooth_l1(y, z)      section 3.1
    loss  mean of L_ti over the pairs (teacher t, image i) that are kept: the hardest teacher of every image, the
          others with probability 1 - t_drop_prob                                                     section 3.4

Quirks of the original that are kept, since published numbers stand on them: blocks are read before the final norm, so
that neither this norm nor the mask token is ever trained, though both stand in the optimiser's groups; the mean is over
the kept pairs of a process (so is that of an accumulated piece), whose gradients then count alike; an image with more
teachers weighs more.
"""

import argparse
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from data.unic_views import UNICViews
from methods.base import Clock, Method, backbone_arguments
from methods.health import effective_rank
from methods.ladder import hidden_widths, ladder_options, literal_options
from methods.parts import Part, Renamed, adopt_parts
from methods.standardise import Standardisation
from methods.teachers_record import TeachersRecord
from methods.unic_files import refuse_another_ladder, student_from_file, student_to_file
from models import build_backbone, families_that, family_of
from models.checkpoints import weights_hash
from models.ladder import KINDS, Ladder
from models.teachers import Teacher, build_teachers, check_teachers
from randomness import counted_uniforms
from utils import UsageError, bool_flag, cosine_scheduler, log, to_device, world_size

TEACHERS = "dino_vitbase_16,deit3_vitbase_16,ibot_vitbase_16,dbotft_vitbase_16"
ADAMW = {"betas": (0.9, 0.99), "eps": 1e-8}
_DROPPING = 0x171C  # what a draw is for


class Student(nn.Module):
    """The encoder that is to be kept, and the ladder that only distillation needs. parity: their names in files."""

    def __init__(self, encoder: nn.Module, lp: Ladder):
        super().__init__()
        self.encoder, self.lp = encoder, lp


class UNIC(Method):
    name = "unic"
    wrapped = ("model",)
    inherited = ("model", "teacher_ft_stats")
    # teachers are known by ``identity``, wherever their files lie; the others are read once
    free_options = frozenset(("teachers", "download_teachers", "fresh_statistics"))

    # ---- options and data -------------------------------------------------------------------------------------------

    @staticmethod
    def add_arguments(parser: argparse._ArgumentGroup) -> None:
        add = parser.add_argument
        add(
            "--teachers",
            default=TEACHERS,
            metavar="NAME[=FILE],...",
            help="frozen networks to learn from: published names, timm/<name>, or any name with the checkpoint to read",
        )
        add("--download_teachers", action="store_true", help="let timm fetch the weights of timm/<name>")
        add("--image_size", default=224, type=int, help="pixels along a side of what everybody sees")
        add(
            "--lp_args",
            default="{'std': 0.02}",
            type=lambda text: repr(ladder_options(text)),
            help="the ladder, as a Python dictionary: which_blocks, hidden_dim, last_hidden_dim, prenorm, midnorm, std",
        )
        add("--tnorm_ema_momentum_start", default=1.0, type=float, help="first weight of a step's statistics")
        add("--tnorm_ema_momentum_end", default=0.001, type=float, help="their weight at the end, along a cosine")
        add("--fresh_statistics", default=False, type=bool_flag, help="of --init_from take no statistics of teachers")
        add("--t_drop_prob", default=0.5, type=float, help="how often an image leaves a teacher out, but its hardest")
        add("--lam_lcos", default=0.5, type=float, help="weight of the cosine distance")
        add("--lam_lsl1", default=0.5, type=float, help="weight of the smooth L1 distance")
        add(
            "--optim_args",
            default=repr(ADAMW),
            type=lambda text: repr(optimiser_options(text)),
            help="of AdamW, as a Python dictionary: betas, eps",
        )
        parser.set_defaults(
            arch="vit_base",
            batch_size_per_gpu=128,
            epochs=200,
            lr=3e-4,
            weight_decay=3e-2,
            weight_decay_end=None,
            clip_grad=0.0,
            num_workers=12,
            output_dir="./output",
            seed=22,
        )

    @staticmethod
    def check_arguments(args: argparse.Namespace) -> None:
        check_teachers(args.teachers)
        if args.batch_size_per_gpu * world_size() < 2:
            raise UsageError(
                f"--batch_size_per_gpu {args.batch_size_per_gpu}: teachers are standardised over the images of a step, "
                "which one image cannot be; pass at least 2"
            )
        family = family_of(args.arch)
        if not family.class_attention:
            known = families_that(lambda family: family.class_attention)
            raise UsageError(f"--arch {args.arch}: unic's student needs class tokens and patches; pass a {known}")
        family.check_size("--image_size", args.image_size, family.arguments(vars(args)))
        for name in ("t_drop_prob", "tnorm_ema_momentum_start", "tnorm_ema_momentum_end"):
            if not 0 <= getattr(args, name) <= 1:
                raise UsageError(f"--{name} {getattr(args, name)}: must be from 0 to 1")
        weights = {name: getattr(args, name) for name in ("lam_lcos", "lam_lsl1")}
        for name, value in weights.items():
            if not 0 <= value < float("inf"):
                raise UsageError(f"--{name} {value}: a weight, which must not be negative")
        if not any(weights.values()):
            raise UsageError("--lam_lcos 0 --lam_lsl1 0: nothing would be learnt; give one of them a weight")

    @staticmethod
    def views(args: argparse.Namespace) -> Callable:
        return UNICViews(args.image_size, args.augment)

    @staticmethod
    def image_size(args: argparse.Namespace) -> int:
        return args.image_size

    @classmethod
    def build(cls, args: argparse.Namespace) -> "UNIC":
        size = {"img_size": args.image_size, "masked_im_modeling": True}  # parity: a mask token, which nobody uses
        arguments = backbone_arguments(args) | size
        encoder = build_backbone(args.arch, drop_path_rate=args.drop_path_rate, **arguments)
        nn.init.normal_(encoder.cls_token, std=1e-6)
        ladder = ladder_options(args.lp_args)
        hidden = hidden_widths(ladder, encoder.depth)
        teachers = build_teachers(args.teachers, args.image_size, args.patch_size, args.download_teachers)
        dims = ", ".join(f"{teacher.name} ({teacher.dim} dimensions)" for teacher in teachers)
        log.info(f"standardised by running mean and spread, apart for class tokens and patches: {dims}")
        norms = {name: ladder[name] for name in ("prenorm", "midnorm", "std")}
        lp = Ladder(encoder.embed_dim, {teacher.name: teacher.dim for teacher in teachers}, hidden, **norms)
        return cls(
            Student(encoder, lp),
            teachers,
            t_drop_prob=args.t_drop_prob,
            weights=(args.lam_lcos, args.lam_lsl1),
            adamw=optimiser_options(args.optim_args),
            fresh_statistics=args.fresh_statistics,
        )

    def __init__(
        self,
        student: Student,
        teachers: Sequence[Teacher],
        t_drop_prob: float = 0.5,
        weights: tuple[float, float] = (0.5, 0.5),
        adamw: dict | None = None,
        fresh_statistics: bool = False,
    ):
        """``weights``: of the cosine and the smooth L1 distance; ``adamw``: its betas and eps."""
        super().__init__()
        self.student = student
        freeze_untrained(student)
        self.teachers = nn.ModuleList(sorted(teachers, key=lambda teacher: teacher.name))
        self.teachers.requires_grad_(False).eval()
        self.names = [teacher.name for teacher in self.teachers]
        self.hashes = {f"teacher {teacher.name}": weights_hash(teacher)[:16] for teacher in self.teachers}
        self.standardisation = Standardisation({teacher.name: teacher.dim for teacher in self.teachers})
        self.t_drop_prob, self.weights = t_drop_prob, weights
        self.adamw = ADAMW if adamw is None else adamw
        self.fresh_statistics = fresh_statistics
        self.record = TeachersRecord(self.names)
        self._features: torch.Tensor | None = None  # what health() looks at

    def train(self, mode: bool = True) -> "UNIC":
        """Teachers stay in evaluation mode: their batch norms and their stochastic depth are what they were."""
        super().train(mode)
        self.teachers.eval()
        return self

    def place(self, device: torch.device, dtype: torch.dtype, half: torch.dtype | None) -> "UNIC":
        self.to(device, dtype)
        for teacher in self.teachers:
            teacher.place(half)
        return self

    @staticmethod
    def schedules(args: argparse.Namespace, niter: int, global_batch: int) -> dict[str, np.ndarray]:
        """``momentum`` is that of the statistics."""
        first, last = args.tnorm_ema_momentum_start, args.tnorm_ema_momentum_end
        momentum = cosine_scheduler(first, last, args.epochs, niter)
        return Method.schedules(args, niter, global_batch) | {"momentum": momentum}

    # ---- one step ---------------------------------------------------------------------------------------------------

    def forward(self, batch: dict, clock: Clock) -> dict[str, torch.Tensor]:
        """``batch["crops"]``: one crop (batch, 3, side, side)."""
        (images,) = batch["crops"]
        encoder = self.student.encoder
        blocks = encoder.forward_blocks(images, clock.batch_draws(encoder.depth, len(images)))
        projected = self.student.lp(blocks, encoder.num_prefix_tokens)
        targets = self.targets(images)
        losses = token_losses(projected, targets, self.weights)  # (teachers, kinds, batch)
        of_pairs = losses.mean(dim=1)  # (teachers, batch)
        kept = keep_teachers(of_pairs.detach(), self.t_drop_prob, self.uniforms(clock, len(images)))
        self.remember(clock.epoch, blocks[-1][:, 0].detach(), losses.detach(), targets)
        return {"loss": mean_of_kept(of_pairs, kept), **self.measures(losses.detach(), kept)}

    @torch.no_grad()
    def targets(self, images: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """What every teacher says of the images: class token (batch, dim), patches (batch, patches, dim)."""
        targets = self.standardisation({teacher.name: teacher(images) for teacher in self.teachers})
        self.standardisation.collect(targets)
        return targets

    def uniforms(self, clock: Clock, batch: int) -> np.ndarray:
        """A number in [0, 1) for every teacher and image of this piece: (teachers, batch)."""
        teacher, sample = np.arange(len(self.names))[:, None], clock.first_sample + np.arange(batch)
        return counted_uniforms(clock.seed, clock.iteration, _DROPPING, teacher, sample)

    def measures(self, losses: torch.Tensor, kept: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of every teacher its losses, whether it was kept or not, and the share of images that keep it."""
        columns = torch.cat((losses.mean(dim=2), kept.mean(dim=1, keepdim=True)), dim=1)
        labels = [f"loss/{kind}_{name}" for name in self.names for kind in (*KINDS, "kept")]
        labels = [label.replace("loss/kept_", "kept/") for label in labels]
        return dict(zip(labels, columns.flatten().unbind(), strict=True))

    def param_groups(self) -> list[dict]:
        """parity: what is never trained has its place as well, so that moments have the original's numbers."""
        decayed, undecayed = [], []
        for name, parameter in self.student.named_parameters():
            (undecayed if name.endswith(".bias") or parameter.ndim == 1 else decayed).append(parameter)
        options = {"betas": tuple(self.adamw["betas"]), "eps": self.adamw["eps"]}
        return [
            {"params": decayed, **options},
            {"params": undecayed, "weight_decay": 0.0, "wd_multiplier": 0.0, **options},
        ]

    def after_step(self, clock: Clock, gate: torch.Tensor | None) -> None:
        self.standardisation.commit(clock.momentum, gate)

    # ---- looking at it ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def remember(self, epoch: int, features: torch.Tensor, losses: torch.Tensor, targets: dict[str, tuple]) -> None:
        """For ``health``: class tokens of this piece, and how every teacher fared."""
        self._features = features
        silent = torch.stack([F.smooth_l1_loss(torch.zeros_like(z), z) for z, _ in targets.values()])
        self.record.add(epoch, losses, self.weights[0] + self.weights[1] * silent)

    def health(self) -> dict[str, torch.Tensor]:
        return {
            "effective_rank": effective_rank(self._features),
            "statistics_drift": self.standardisation.drift,
            **self.record.measures(),
        }

    def epoch_state(self) -> dict:
        return self.record.epoch_state()

    def load_epoch_state(self, state: dict) -> None:
        self.record.load_epoch_state(state)

    def frozen_networks(self) -> dict[str, nn.Module]:
        return {teacher.name: teacher for teacher in self.teachers}

    def identity(self) -> dict[str, str]:
        """A teacher is who it is by its name and weights; its file may lie elsewhere when a run goes on."""
        return self.hashes

    def checkpoint_parts(self) -> dict[str, Part]:
        statistics = self.standardisation
        return {
            "model": Renamed(self.student, student_to_file, student_from_file),
            "teacher_ft_stats": Renamed(statistics, statistics.to_file, statistics.from_file),
        }

    def adopt(self, state: dict[str, dict]) -> list[str]:
        """The student and the statistics, of the same teachers; positions of another size of images are resampled."""
        parts = self.checkpoint_parts()
        refuse_another_ladder(self.student.lp, student_from_file(state["model"]))
        if self.fresh_statistics:
            del parts["teacher_ft_stats"]
        else:
            try:
                self.standardisation.from_file(state["teacher_ft_stats"])
            except ValueError as error:
                raise UsageError(f"{error}; pass --fresh_statistics true to do without") from None
        fresh = adopt_parts(parts, {key: state[key] for key in parts if key in state}, self.student.encoder)
        return fresh + ["teacher_ft_stats"] * self.fresh_statistics

    def evaluation_backbone(self) -> nn.Module:
        return self.student.encoder


def optimiser_options(text: str) -> dict:
    """``--optim_args``, checked."""
    options = literal_options("--optim_args", text, ADAMW)
    betas, eps = options["betas"], options["eps"]
    if not (isinstance(betas, list | tuple) and len(betas) == 2 and all(_number(b) and 0 <= b < 1 for b in betas)):
        raise UsageError(f"--optim_args: betas {betas!r} have to be two numbers from 0 to below 1")
    if not (_number(eps) and eps > 0):
        raise UsageError(f"--optim_args: eps {eps!r} has to be a positive number")
    return {"betas": tuple(betas), "eps": eps}


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def freeze_untrained(student: Student) -> None:
    """No gradient for what no loss reads: the final norm, the mask token, blocks behind the ladder's last."""
    encoder = student.encoder
    encoder.masked_embed.requires_grad_(False)
    for module in (encoder.norm, *encoder.blocks[student.lp.blocks[-1] + 1 :]):
        module.requires_grad_(False)


def distances(projected: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cosine distance and smooth L1 (mean over dimensions) of every image: (2, batch), in the target's precision.

    Shapes     (batch, dim), or (batch, patches, dim), of which the mean over patches is taken
    """
    projected = projected.to(target.dtype)
    cosine = 1 - F.cosine_similarity(projected, target, dim=-1, eps=1e-8)
    smooth_l1 = F.smooth_l1_loss(projected, target, reduction="none").mean(dim=-1)
    found = torch.stack((cosine, smooth_l1))
    return found if found.ndim == 2 else found.mean(dim=-1)


def token_losses(projected: dict[str, tuple], targets: dict[str, tuple], weights: tuple[float, float]) -> torch.Tensor:
    """(teachers, class token and patches, batch), in the order of ``targets``; ``weights`` of the two distances."""
    pairs = [zip(projected[name], targets[name], strict=True) for name in targets]
    cosine, smooth_l1 = torch.stack([torch.stack([distances(y, z) for y, z in pair]) for pair in pairs]).unbind(2)
    return weights[0] * cosine + weights[1] * smooth_l1


def mean_of_kept(losses: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """parity: over the kept pairs of all images, so that one with more teachers weighs more."""
    return (kept * losses).sum() / kept.sum()


def keep_teachers(losses: torch.Tensor, drop_prob: float, uniforms: np.ndarray) -> torch.Tensor:
    """Which pairs count, 1 or 0, all (teachers, batch): an image's hardest teacher, the others where u >= drop_prob."""
    drawn = to_device(torch.from_numpy(uniforms >= drop_prob), losses.device)
    return drawn.scatter(0, losses.argmax(dim=0, keepdim=True), True).to(losses.dtype)
