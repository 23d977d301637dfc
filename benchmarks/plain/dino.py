"""DINO as its algorithm is written: class tokens of every crop, a log-softmax for every pair of views."""

import torch

from methods.base import Clock
from methods.dino import DINO
from plain import textbook


def forward(method: DINO, batch: dict, clock: Clock) -> torch.Tensor:
    crops = batch["crops"]
    draws = clock.drop_path_draws(method.student.backbone.depth, len(crops), crops[0].shape[0])
    with torch.no_grad():
        teacher = textbook.head(method.teacher.head, textbook.class_tokens(method.teacher.backbone, crops[:2], None))
    student = textbook.head(method.student.head, textbook.class_tokens(method.student.backbone, crops, draws))
    temps = (method.student_temp, method.teacher_temps[clock.epoch])
    loss = textbook.cross_view_loss(student, teacher, method.centres.center, temps, len(crops))
    textbook.move(method.centres.center, teacher.float(), method.centres.momentum)
    return loss
