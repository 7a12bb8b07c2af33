"""Distillation losses: one idea a file, one base class, one registry.

>>> from tenfold.distillation import create_loss
>>> loss = create_loss("kd", temperature=4.0)
>>> loss(student_logits, teacher_logits).backward()
"""

from tenfold.distillation.base import (
    DistillationLoss,
    available_losses,
    create_loss,
    get_loss,
    loss_class,
    register,
)
from tenfold.distillation.ickd import (
    GridICCLoss,
    ICCLoss,
    dead_channels,
    grid_cells,
    icc_matrix,
)
from tenfold.distillation.kd import KnowledgeDistillation
from tenfold.distillation.soft_target import SoftTargetCrossEntropy
from tenfold.distillation.taps import Taps

__all__ = [
    "DistillationLoss",
    "GridICCLoss",
    "ICCLoss",
    "KnowledgeDistillation",
    "SoftTargetCrossEntropy",
    "Taps",
    "available_losses",
    "create_loss",
    "dead_channels",
    "get_loss",
    "grid_cells",
    "icc_matrix",
    "loss_class",
    "register",
]
