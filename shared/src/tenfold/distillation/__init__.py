"""Distillation losses: one idea a file, one base class, one registry.

>>> from tenfold.distillation import create_loss
>>> loss = create_loss("kd", temperature=4.0)
>>> loss(student_logits, teacher_logits).backward()
"""

from tenfold.distillation.base import (
    DistillationLoss,
    available_losses,
    create_loss,
    register,
)
from tenfold.distillation.kd import KnowledgeDistillation
from tenfold.distillation.soft_target import SoftTargetCrossEntropy

__all__ = [
    "DistillationLoss",
    "KnowledgeDistillation",
    "SoftTargetCrossEntropy",
    "available_losses",
    "create_loss",
    "register",
]
