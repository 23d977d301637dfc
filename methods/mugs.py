"""Mugs: a multi-granular self-supervised learning framework (Zhou et al., 2203.14415).

Three losses of one student and a teacher that follows it, each of every pair of a teacher's view with another view of
the student (crops 0 and 1 are the teacher's, all further ones the student's):

    instance      unit vectors of class tokens against a queue of the teacher's earlier ones           contrast.py
    local group   the same of the mean token, after it met its nearest in a memory of earlier images    local_group.py
    group         class tokens over prototypes, as DINO                                                 distillation.py

    loss = (sum of the losses) / (sum of their weights)

Quirks of the original that are kept, since published numbers stand on them: parity: the weights divide the sum and
multiply nothing; the student's crops 0 and 1 are other crops than the teacher's, and yet a crop is not compared with
that of its number; memories are written with twice the stride (memory.py); vit_large clips ten times closer after
epoch 100; the first epochs, in which prototypes rest, are counted from 0; class token, positions and the prototypes'
norms are weight-decayed. A loss of weight 0 costs nothing here: what only it needs is not built.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn as nn

from data.mugs_views import erase_
from methods.base import Clock, backbone_arguments
from methods.centring import Centres
from methods.contrast import info_nce
from methods.distillation import Targets, prototype_cross_entropy, teacher_probabilities
from methods.heads import ContrastiveHead, DINOHead
from methods.health import effective_rank
from methods.local_group import LocalGroupTransformer, Views
from methods.memory import NEVER, Memory, Queue
from methods.mugs_crops import crops_picture, mugs_views
from methods.mugs_options import add_mugs_arguments, check_mugs_arguments
from methods.parts import Part, Renamed
from methods.teacher import PrototypeMethod, temperatures
from models import build_backbone
from models.vit import VisionTransformer

INSTANCE, LOCAL_GROUP, GROUP = LOSSES = ("instance-sup.", "local-group-sup.", "group-sup.")  # the original's names
TEACHER_VIEWS = 2
LATE = 100  # the last epoch before the gradients of vit_large are clipped closer


class MugsNetwork(nn.Module):
    """A backbone and the heads of the losses that count; ``relation`` is a backbone's that has relation blocks."""

    def __init__(
        self,
        backbone: VisionTransformer,
        instance_head: ContrastiveHead | None,
        local_group_head: ContrastiveHead | None,
        group_head: DINOHead | None,
    ):
        super().__init__()
        self.backbone = backbone
        self.instance_head, self.local_group_head, self.group_head = instance_head, local_group_head, group_head

    def views(
        self, crops: Sequence[torch.Tensor], memory: Memory | None, k: int, draws: np.ndarray | None = None
    ) -> Views:
        """What is read of crops (batch, 3, height, width); without a memory only class tokens."""
        if memory is None:
            return Views(self.backbone.forward_crops(crops, draws), None, None, None)
        return self.backbone.forward_views(crops, memory, k, draws)


class Mugs(PrototypeMethod):
    name = "mugs"
    free_options = frozenset(("debug", "ddpjob", "rank", "world_size"))  # of launchers, and of no meaning here

    # ---- options and data -------------------------------------------------------------------------------------------

    @staticmethod
    def add_arguments(parser: argparse._ArgumentGroup) -> None:
        add_mugs_arguments(parser)

    @staticmethod
    def check_arguments(args: argparse.Namespace) -> None:
        check_mugs_arguments(args)

    @staticmethod
    def views(args: argparse.Namespace) -> Callable:
        return mugs_views(args)

    @classmethod
    def build(cls, args: argparse.Namespace) -> "Mugs":
        counts = dict(zip(LOSSES, args.loss_weights, strict=True))
        kind = {"network": LocalGroupTransformer} if counts[LOCAL_GROUP] else {}
        contrast = {"use_bn": args.use_bn_in_head, "norm_before_pred": args.norm_before_pred}

        def network(predictor: bool, drop_path_rate: float, norm_last_layer: bool) -> MugsNetwork:
            backbone = build_backbone(args.arch, drop_path_rate=drop_path_rate, **kind, **backbone_arguments(args))
            heads = [
                ContrastiveHead(backbone.embed_dim, dim, predictor, **contrast) if counts[loss] else None
                for loss, dim in ((INSTANCE, args.instance_out_dim), (LOCAL_GROUP, args.local_group_out_dim))
            ]
            group = None
            if counts[GROUP]:
                sizes = {"out_dim": args.group_out_dim, "bottleneck_dim": args.group_bottleneck_dim}
                sizes |= {"use_bn": args.use_bn_in_head, "norm_last_layer": norm_last_layer}
                group = DINOHead(backbone.embed_dim, **sizes)
            return MugsNetwork(backbone, *heads, group)

        return cls(
            network(True, args.drop_path_rate, args.norm_last_layer),
            network(False, 0.0, True),
            loss_weights=args.loss_weights,
            teacher_temps=temperatures(args, "group_"),
            student_temp=args.group_student_temp,
            contrast_temps=(args.instance_temp, args.local_group_temp),
            queue_sizes=(args.instance_queue_size, args.local_group_queue_size),
            top_n=args.local_group_knn_top_n,
            advance_once=args.local_group_advance_once,
            freeze_last_layer=args.freeze_last_layer,
            patch_embed_lr_mult=args.patch_embed_lr_mult,
            clip_late=args.arch == "vit_large",
        )

    def __init__(
        self,
        student: MugsNetwork,
        teacher: MugsNetwork,
        loss_weights: Sequence[float],
        teacher_temps: np.ndarray,
        student_temp: float = 0.1,
        contrast_temps: tuple[float, float] = (0.2, 0.2),
        queue_sizes: tuple[int, int] = (65536, 65536),
        top_n: int = 8,
        advance_once: bool = False,
        freeze_last_layer: int = 1,
        patch_embed_lr_mult: float = 0.2,
        clip_late: bool = False,
        center_momentum: float = 0.9,
    ):
        """``contrast_temps`` and ``queue_sizes``: of instance and local group; the latter's memories are as large as
        its queue. ``teacher_temps``: one per epoch. The teacher starts as a copy of the student.
        """
        self.weights = {loss: weight for loss, weight in zip(LOSSES, loss_weights, strict=True) if weight}
        centres = None
        if GROUP in self.weights:
            centres = Centres(center_momentum, center=(1, teacher.group_head.last_layer.weight_g.shape[0]))
        super().__init__(student, teacher, centres, freeze_last_layer)
        self.queues, self.memories = nn.ModuleDict(), nn.ModuleDict()
        heads = {INSTANCE: teacher.instance_head, LOCAL_GROUP: teacher.local_group_head}
        for (loss, head), size in zip(heads.items(), queue_sizes, strict=True):
            if loss in self.weights:
                self.queues[_key(loss)] = Queue(head.projector[-1].out_features, size)
        if LOCAL_GROUP in self.weights:
            for side in ("student", "teacher"):
                self.memories[side] = Memory(student.backbone.embed_dim, queue_sizes[1], advance_once)
        self.teacher_temps, self.student_temp = teacher_temps, student_temp
        self.contrast_temps = dict(zip(heads, contrast_temps, strict=True))
        self.top_n = top_n
        self.patch_embed_lr_mult, self.clip_late = patch_embed_lr_mult, clip_late

    # ---- one step ---------------------------------------------------------------------------------------------------

    def forward(self, batch: dict, clock: Clock) -> dict[str, torch.Tensor]:
        """``batch``: crops (batch, 3, height, width), two of the teacher, then the student's, two of them global; weak
        (batch,), whether the student's global crops are weakly augmented; erased, for every crop flat positions in it
        and their normalised values, if pixels were erased; indices (batch,), which images these are.
        """
        crops = batch["crops"]
        if "erased" in batch:
            erase_(crops, batch["erased"])
        crops, student_crops = crops[:TEACHER_VIEWS], crops[TEACHER_VIEWS:]
        with torch.no_grad():
            teacher = self.teacher.views(crops, self._memory("teacher"), self.top_n)
        depth, images = self.student.backbone.depth, len(crops[0])
        draws = clock.drop_path_draws(depth, len(student_crops), images)
        student = self.student.views(student_crops, self._memory("student"), self.top_n, draws)
        losses = self.losses(student, teacher, clock)
        self.remember(student, teacher, batch, clock)
        return losses | {"weak aug. ratio": batch["weak"].to(losses["loss"].dtype).mean()}

    def losses(self, student: Views, teacher: Views, clock: Clock) -> dict[str, torch.Tensor]:
        """ "loss" and its parts; the teacher's views have no gradient."""
        losses = {loss: self._loss(loss, student, teacher, clock) for loss in self.weights}
        return {"loss": sum(losses.values()) / sum(self.weights.values()), **losses}

    def _loss(self, name: str, student: Views, teacher: Views, clock: Clock) -> torch.Tensor:
        if name == GROUP:
            return self.group_loss(student.classes, teacher.classes, clock)
        kind = {INSTANCE: "instance", LOCAL_GROUP: "local_group"}[name]
        which = {INSTANCE: "classes", LOCAL_GROUP: "relations"}[name]
        queue, head = self.queues[_key(name)], f"{kind}_head"
        with torch.no_grad():
            keys = getattr(self.teacher, head)(getattr(teacher, which)).unflatten(0, (TEACHER_VIEWS, -1))
        z = getattr(self.student, head)(getattr(student, which))
        found = info_nce(z, keys, queue.queue, self.contrast_temps[name])
        queue.collect(keys)
        self._seen[f"{kind}_rank"] = found.rank
        return found.loss

    def group_loss(self, student: torch.Tensor, teacher: torch.Tensor, clock: Clock) -> torch.Tensor:
        """Of class tokens (crops * batch, dim) over prototypes."""
        with torch.no_grad():
            logits = self.teacher.group_head(teacher)
            self.centres.collect(center=logits)
            probs = teacher_probabilities(logits, self.centres.center, self.teacher_temps[clock.epoch])
            self.note_prototypes(probs, clock)
        probs = probs.unflatten(0, (TEACHER_VIEWS, -1))
        head = self.student.group_head
        loss = group_cross_entropy(head.bottleneck(student), head.last_layer.weight(), probs, self.student_temp)
        self._seen |= {"probs": probs, "loss": loss.detach()}
        return loss

    def _memory(self, side: str) -> Memory | None:
        return self.memories[side] if self.memories else None

    @torch.no_grad()
    def remember(self, student: Views, teacher: Views, batch: dict, clock: Clock) -> None:
        """Collect the first crop of both sides: of the student where it is weakly augmented, of the teacher always."""
        self._seen |= {"features": teacher.classes, "index": student.index}
        self._iteration = clock.iteration
        if self.memories:
            images = batch.get("indices")
            self.memories["student"].collect(student.patches, images, batch["weak"].bool())
            self.memories["teacher"].collect(teacher.patches, images)

    def param_groups(self) -> list[dict]:
        """parity: four groups, of which those of the patch embedding have a lower rate; their names stand in files."""
        groups: dict[str, list[nn.Parameter]] = {name: [] for name in ("normal_params", "patch_embed", "no_wd")}
        groups["patch_embed_no_wd"] = []
        for name, parameter in self.student.named_parameters():
            if parameter.requires_grad:
                undecayed = name.endswith(".bias") or parameter.ndim == 1
                kinds = ("patch_embed", "patch_embed_no_wd") if "patch_embed" in name else ("normal_params", "no_wd")
                groups[kinds[undecayed]].append(parameter)
        options = {name: {} for name in groups}
        for name in options:
            options[name] |= {"weight_decay": 0.0, "wd_multiplier": 0.0} if name.endswith("no_wd") else {}
            options[name] |= {"lr_multiplier": self.patch_embed_lr_mult} if "patch_embed" in name else {}
        return [{"params": parameters, "name": name, **options[name]} for name, parameters in groups.items()]

    def clip_gradients(self, clip: float, clock: Clock) -> torch.Tensor:
        """parity: vit_large is clipped at a tenth after epoch 100, counted from 0."""
        return super().clip_gradients(clip / 10 if self.clip_late and clock.epoch > LATE else clip, clock)

    def after_step(self, clock: Clock, gate: torch.Tensor | None) -> None:
        super().after_step(clock, gate)
        self.write(clock, gate)

    def write(self, clock: Clock, gate: torch.Tensor | None) -> None:
        """What was collected, into queues and memories."""
        for part in self.queues.values():
            part.commit(gate)
        for part in self.memories.values():
            part.commit(clock.iteration, gate)

    # ---- looking at it ----------------------------------------------------------------------------------------------

    def health(self) -> dict[str, torch.Tensor]:
        """Besides the group's: ``_rank``, the share of a queue nearer to a view than its positive is; what the student
        finds in its memory, whose rows may have been overwritten since: ``age`` in steps, ``spread`` from 0, where all
        that is found points one way, to nearly 1; and the share of rows that were ever written.
        """
        seen = self._seen
        found = super().health() if self.centres else {"effective_rank": effective_rank(seen["features"])}
        found |= {name: value for name, value in seen.items() if name.endswith("_rank")}
        if self.memories:
            memory, index = self.memories["student"], seen["index"].flatten()
            written = memory.written[index]
            known = (written != NEVER).float()
            ages = (self._iteration - written).clamp_min(0) * known
            found |= {
                "memory_written": memory.share_written(),
                "retrieved_age": ages.sum() / known.sum().clamp_min(1),
                "retrieved_spread": 1 - memory.unit[index].float().mean(dim=0).square().sum(),
            }
        return found

    def pictures(self, batch: dict, clock: Clock) -> Iterator[tuple[str, np.ndarray]]:
        yield "first_batch", crops_picture(batch)

    def epoch_state(self) -> dict:
        """Also what a memory knows of its rows and the original's files have no place for."""
        memories = {f"{side}_mem": memory.notes() for side, memory in self.memories.items()}
        return (super().epoch_state() if self.centres else {}) | {"memories": memories}

    def load_epoch_state(self, state: dict) -> None:
        if self.centres:
            super().load_epoch_state(state)
        for side, memory in self.memories.items():
            memory.load_notes(state["memories"][f"{side}_mem"])

    def checkpoint_parts(self) -> dict[str, Part]:
        networks = {side: getattr(self, side) for side in ("student", "teacher")}
        parts: dict[str, Part] = {side: Renamed(network, to_file, from_file) for side, network in networks.items()}
        for side, memory in self.memories.items():
            parts[f"{side}_mem"] = Renamed(memory, memory.to_file, memory.from_file)
        parts |= {loss: self.queues[_key(loss)] for loss in (INSTANCE, LOCAL_GROUP) if loss in self.weights}
        return parts | ({GROUP: self.centres} if self.centres else {})


def _key(loss: str) -> str:
    """Of a queue among modules, whose names have no dots."""
    return loss.rstrip(".")


def to_file(state: dict) -> dict:
    """Our names -> the original's, in which the group head's layers are a projector as well."""
    return {name.replace("group_head.mlp.", "group_head.projector."): value for name, value in state.items()}


def from_file(state: dict) -> dict:
    return {
        name.replace("group_head.projector.", "group_head.mlp.") if name.startswith("group_head.") else name: value
        for name, value in state.items()
    }


def group_cross_entropy(z: torch.Tensor, weight: torch.Tensor, probs: torch.Tensor, temperature: float) -> torch.Tensor:
    """Half the mean over the pairs of two global views, and half that over the pairs of a global with a local view.

    Shapes     z (views * batch, dim) student vectors, views-major, the two global views first; weight (prototypes,
               dim); probs (2, batch, prototypes) of the teacher
    """
    batch = probs.shape[1]
    count = len(z) // batch - TEACHER_VIEWS
    number = torch.arange(batch, device=z.device)
    other = torch.cat((number + batch, number))  # a view is compared with the teacher's other one
    share = 0.5 if count else 1.0
    targets = [Targets(probs.flatten(0, 1), other, probs.new_ones(2 * batch), 1 / (2 * batch), share)]
    if count:
        both = (probs.sum(dim=0), number.repeat(count), probs.new_full((count * batch,), 2.0))
        targets.append(Targets(*both, 1 / (2 * count * batch), share))
    return prototype_cross_entropy(z, weight, targets, temperature)[0]
