"""Distillation losses: one idea a file, one base class, one registry.

>>> from tenfold.distillation import create_loss
>>> loss = create_loss("kd", temperature=4.0)
>>> loss(student_logits, teacher_logits).backward()
"""

from tenfold.distillation.ab import ABLoss
from tenfold.distillation.at import ATLoss
from tenfold.distillation.base import (
    DistillationLoss,
    available_losses,
    create_loss,
    get_loss,
    loss_class,
    register,
)
from tenfold.distillation.cc import CCLoss
from tenfold.distillation.crd import CRDLoss
from tenfold.distillation.dist import DISTLoss
from tenfold.distillation.dkd import DKDLoss
from tenfold.distillation.embeds import LinearEmbed, MLPEmbed
from tenfold.distillation.fitnet import FitNetLoss
from tenfold.distillation.fsp import FSPLoss
from tenfold.distillation.ft import FTLoss
from tenfold.distillation.ickd import (
    GridICCLoss,
    ICCLoss,
    dead_channels,
    grid_cells,
    icc_matrix,
)
from tenfold.distillation.kd import KnowledgeDistillation
from tenfold.distillation.kd_logit_std import KDLogitStdLoss
from tenfold.distillation.kd_mixed import KDMixedLoss
from tenfold.distillation.kdsvd import KDSVDLoss
from tenfold.distillation.mse import FeatureMSELoss
from tenfold.distillation.negatives import OtherClassSampler
from tenfold.distillation.nst import NSTLoss
from tenfold.distillation.ofd import OFDLoss, margin_from_bn
from tenfold.distillation.pkt import PKTLoss
from tenfold.distillation.reviewkd import ReviewKDLoss
from tenfold.distillation.rkd import RKDLoss
from tenfold.distillation.soft_target import SoftTargetCrossEntropy
from tenfold.distillation.sp import SPLoss
from tenfold.distillation.taps import Taps
from tenfold.distillation.vid import VIDLoss

__all__ = [
    "ABLoss",
    "ATLoss",
    "CCLoss",
    "CRDLoss",
    "DISTLoss",
    "DKDLoss",
    "DistillationLoss",
    "FSPLoss",
    "FTLoss",
    "FeatureMSELoss",
    "FitNetLoss",
    "GridICCLoss",
    "ICCLoss",
    "KDLogitStdLoss",
    "KDMixedLoss",
    "KDSVDLoss",
    "KnowledgeDistillation",
    "LinearEmbed",
    "MLPEmbed",
    "NSTLoss",
    "OFDLoss",
    "OtherClassSampler",
    "PKTLoss",
    "RKDLoss",
    "ReviewKDLoss",
    "SPLoss",
    "SoftTargetCrossEntropy",
    "Taps",
    "VIDLoss",
    "available_losses",
    "create_loss",
    "dead_channels",
    "get_loss",
    "grid_cells",
    "icc_matrix",
    "loss_class",
    "margin_from_bn",
    "register",
]
