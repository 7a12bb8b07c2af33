"""Which of several networks a state dict belongs to, told by its keys and shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.checkpoint import KeyReport, compare_keys, extract_state_dict, strip_prefix
from tenfold.errors import UserError

_WRAPPERS = ("student_model.", "student.")
_COUNTER = ".num_batches_tracked"

Builder = Callable[[str, int], nn.Module]
"""A network from its name and number of classes."""


@dataclass(frozen=True)
class Match:
    """The network whose keys and shapes are the nearest to a file's.

    Attributes:
        name: of the network.
        classes: length of its logits, read off the file.
        report: what differs.
        state: the file's tensors, with the counters of batch norms that old files lack.
        order: the network's keys.
        counters: how many counters were added.
    """

    name: str
    classes: int
    report: KeyReport
    state: Mapping[str, Tensor]
    order: tuple[str, ...]
    counters: int

    def weights(self, family: str) -> dict[str, Tensor]:
        """The state dict in the network's order.

        Args:
            family: what the candidates are, for messages.

        Raises:
            UserError: the file is of none of the candidates, or not finite.
        """
        if not self.report.fits:
            raise UserError(
                f"the weights are of no network of {family}; the closest is {self.name}, with "
                f"{self.report.summary()}"
            )
        for key, tensor in self.state.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise UserError(f"{key} holds numbers that are not finite")
        return {key: self.state[key] for key in self.order}


def network_part(raw: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of one network out of a checkpoint that may hold more.

    Prefixes of parallel training (`module.`) and of a distiller's student (`student_model.`,
    `student.`) are taken off; what is beside a student is no part of it.

    Args:
        raw: what `tenfold.checkpoint.load_state` read.

    Returns:
        The network's state dict, and the rest under its own keys.

    Raises:
        UserError: no weights, or two keys that become one.
    """
    found, _ = extract_state_dict(raw, ("model", "state_dict"))
    try:
        state = strip_prefix(found)
        for wrapper in _WRAPPERS:
            inside = {k: v for k, v in state.items() if k.startswith(wrapper)}
            if inside:
                rest = {k: v for k, v in state.items() if k not in inside}
                return strip_prefix(strip_prefix(inside, wrapper)), rest
    except ValueError as error:
        raise UserError(f"the checkpoint holds two networks: {error}") from error
    return state, {}


def closest(state: Mapping[str, Tensor], names: Iterable[str], build: Builder) -> Match:
    """The candidate from which a state dict differs least, none if there is no difference.

    Args:
        state: of one network, whose only matrix is its classifier.
        names: candidates.
        build: makes them; called on the meta device.
    """
    classes = max([1, *(len(tensor) for tensor in state.values() if tensor.ndim == 2)])
    counters = {
        key.removesuffix(".running_var") + _COUNTER: torch.zeros((), dtype=torch.int64)
        for key in state
        if key.endswith(".running_var")
    }
    whole = counters | dict(state)
    reports = {}
    for name in names:
        report = compare_keys(whole, _empty(build, name, classes))
        reports[name] = report
        if report.fits:
            break
    name = min(reports, key=lambda n: _distance(reports[n]))
    order = tuple(_empty(build, name, classes))
    return Match(name, classes, reports[name], whole, order, len(whole) - len(state))


@cache
def _empty(build: Builder, name: str, classes: int) -> dict[str, Tensor]:
    with torch.device("meta"):
        return build(name, classes).state_dict()


def _distance(report: KeyReport) -> int:
    return len(report.missing) + len(report.unexpected) + len(report.mismatched)


def number(value: Any) -> float | None:
    """A figure that may have been saved as a tensor, None for anything else."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    return float(value) if isinstance(value, int | float) else None
