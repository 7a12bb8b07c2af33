"""The Lightning module: a student that learns from labels and from a teacher."""

from ickd.module.distiller import Distiller
from ickd.module.fitting import fit_recipe, make_data
from ickd.module.loading import load_student
from ickd.module.objective import LossChoice, Objective, parse_losses

__all__ = [
    "Distiller",
    "LossChoice",
    "Objective",
    "fit_recipe",
    "load_student",
    "make_data",
    "parse_losses",
]
