"""iBOT and AttMask: DINO on class tokens, and the head on every patch, of which the masked ones count."""

import torch
import torch.nn.functional as F

from methods.base import Clock
from methods.masked_distillation import MaskedDistillation
from plain import textbook


def forward(method: MaskedDistillation, batch: dict, clock: Clock) -> torch.Tensor:
    crops, views = batch["crops"], method.teacher_views
    draws = clock.drop_path_draws(method.student.backbone.depth, len(crops), crops[0].shape[0])
    with torch.no_grad():
        (teacher,) = textbook.backbone(method.teacher.backbone, crops[:views], None)
        looked = method.teacher.backbone.get_last_selfattention(torch.cat(crops[:views]))[:, :, 0, 1:].mean(dim=1)
        masks, _ = method.choose_masks(batch, clock, looked if method.name == "attmask" else None)
    student = textbook.backbone(method.student.backbone, crops, draws, masks)
    return heads_and_loss(method, teacher, student, masks.flatten(1), clock)


def heads_and_loss(
    method: MaskedDistillation, teacher: torch.Tensor, student: list[torch.Tensor], masks: torch.Tensor, clock: Clock
) -> torch.Tensor:
    """Heads on every token, local crops too; one log-softmax over all patches and for every pair of class tokens."""

    def both(module, tokens):
        z = F.normalize(module.mlp(tokens), dim=-1)
        return textbook.prototypes(module.last_layer, z[:, 0]), textbook.prototypes(module.last_layer2, z[:, 1:])

    views, centres = method.teacher_views, method.centres
    with torch.no_grad():
        teacher_cls, teacher_patch = both(method.teacher.head, teacher)
    outputs = [both(method.student.head, tokens) for tokens in student]
    cls = torch.cat([classes for classes, _ in outputs])
    temps = (method.student_temp, method.teacher_temps[clock.epoch])
    loss = textbook.cross_view_loss(cls, teacher_cls, centres.center, temps, len(cls) // (len(teacher_cls) // views))
    targets = F.softmax((teacher_patch.float() - centres.center2) / method.teacher_patch_temps[clock.epoch], dim=-1)
    log_probs = F.log_softmax(outputs[0][1].float() / method.student_temp, dim=-1)
    per_patch = torch.sum(-targets * log_probs, dim=-1)
    patch = ((per_patch * masks).sum(dim=-1) / masks.sum(dim=-1).clamp(min=1)).mean()
    textbook.move(centres.center, teacher_cls.float(), centres.momentum)
    textbook.move(centres.center2, teacher_patch.float().mean(dim=1, keepdim=True), centres.momentum)
    return method.lambda1 * loss + method.lambda2 * patch
