"""A student out of a checkpoint of fit, without its teacher."""

from __future__ import annotations

from pathlib import Path

from ickd.networks import Network, open_network
from tenfold.checkpoint import load_state, strip_prefix
from tenfold.errors import UserError
from tenfold.training import LAST

_STUDENT = "student.net."


def load_student(path: str | Path) -> Network:
    """The student of a run of `ickd fit`, in eval mode on the CPU; its teacher is not built.

    Args:
        path: a checkpoint, or the folder of a run.

    Raises:
        UserError: it is missing, damaged, not of ickd, or its network was given as a module.
    """
    path = Path(path)
    path = path / LAST if path.is_dir() else path
    raw = load_state(path)
    arguments = raw.get("hyper_parameters", {})
    state = {k: v for k, v in raw.get("state_dict", {}).items() if k.startswith(_STUDENT)}
    if not state:
        raise UserError("no checkpoint of ickd fit", where=str(path))
    name = arguments.get("student")
    if not isinstance(name, str):
        fix = "open it with Distiller.load_from_checkpoint(path, student=..., teacher=...)"
        raise UserError("its student was a module, which has no name", where=str(path), fix=fix)
    taps = [pair[0] for pair in arguments.get("pairs") or ()]
    options = {"num_classes": arguments.get("num_classes"), "taps": taps}
    network = open_network(name, **{**options, **(arguments.get("student_options") or {})})
    network.fill(strip_prefix(state, _STUDENT), where=str(path))
    return network.eval()
