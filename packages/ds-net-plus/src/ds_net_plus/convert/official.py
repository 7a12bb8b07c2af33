"""The official DS-Net checkpoint as a `DSMobileNet`.

Our state-dict keys are the official ones, so conversion is reading: which of the file's two state
dicts, which width lists, depths and gate its shapes speak of, and whether the gate was trained.
The official program has no licence: the file itself must come from the user.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_net_plus.model import DynamicNet, create_model
from tenfold.checkpoint import KeyReport, compare_keys, extract_state_dict, load_state, strip_prefix
from tenfold.errors import UserError

DICTS = {
    "ema": ("state_dict_ema", "state_dict", "model"),
    "model": ("state_dict", "model", "state_dict_ema"),
}
_HEAD = re.compile(r"blocks\.(\d+)\.first_block\.gate\.gate\.0\.weight")
# beyond rounding: the average of a weight that never moves stays this close to it
_EMA_TOLERANCE = 1e-4


@dataclass(frozen=True)
class ConversionReport:
    """What was found in an official checkpoint.

    Attributes:
        used: key of the state dict that was read, "" for a bare state dict.
        others: keys of the other state dicts in the file.
        entries: number of tensors read.
        keys: how they fit the network; conversion is strict, so all fit.
        config: the network's constructor arguments, read off the shapes where they show.
        gate_trained: the mark that the network got; None where nothing is known.
        gate_reason: where the mark comes from.
        epoch: last finished epoch, where the file tells.
        metric: its validation metric, where the file tells.
    """

    used: str
    others: tuple[str, ...]
    entries: int
    keys: KeyReport
    config: Mapping[str, Any]
    gate_trained: bool | None
    gate_reason: str
    epoch: int | None = None
    metric: float | None = None

    def lines(self) -> list[str]:
        """The report for a person."""
        found = f"; the file also holds {', '.join(self.others)}" if self.others else ""
        gate = {True: "trained", False: "untrained", None: "not known to be trained"}
        lines = [
            f"weights: {self.used or 'bare state dict'}, {self.entries} entries{found}",
            f"keys: {len(self.keys.missing)} missing, {len(self.keys.unexpected)} unexpected, "
            f"{len(self.keys.mismatched)} of another shape",
            f"network: stem {_span(self.config['stem_widths'])}, stages "
            f"{', '.join(map(_span, self.config['stage_widths']))} x {self.config['depths']}, "
            f"gate in stage {self.config['gate_stage']}, {self.config['num_classes']} classes",
            f"assumed, since no shape shows it: strides {self.config['strides']}, attention "
            f"{self.config['attention']}",
            f"gate: {gate[self.gate_trained]} ({self.gate_reason})",
        ]
        if self.epoch is not None:
            metric = "" if self.metric is None else f", metric {self.metric:g}"
            lines.append(f"epoch {self.epoch}{metric}")
        return lines


def _span(widths: Sequence[int]) -> str:
    return f"{widths[0]}..{widths[-1]} ({len(widths)})"


def convert_official(
    source: str | Path | Mapping[str, Any],
    which: str = "ema",
    gate_trained: bool | None = None,
    **overrides: object,
) -> tuple[DynamicNet, ConversionReport]:
    """Reads an official checkpoint, strictly.

    The gate's mark is, in this order: `gate_trained`; what the training options in the file say
    (`gate_train`, `train_mode`); whether the slimming head differs between weights and moving
    average, which it does only if training has moved it. A file that has none of these counts as
    untrained (the released one is: its gate weights are the initial ones), a bare state dict as
    unknown.

    Args:
        source: the .pth.tar, or what `load_state` returned for it.
        which: "ema" prefers the moving average, "model" the weights; the other one is taken where
            the preferred one is absent.
        gate_trained: overrules the file's mark.
        **overrides: constructor arguments that no shape shows, such as strides.

    Returns:
        The network in eval mode, and the report.

    Raises:
        UserError: an unreadable file, another family, keys that do not fit, weights that are not
            finite.
    """
    if which not in DICTS:
        raise UserError(f"which must be 'ema' or 'model', got {which!r}")
    where = None if isinstance(source, Mapping) else str(source)
    raw = source if isinstance(source, Mapping) else load_state(source)
    found, used = extract_state_dict(raw, DICTS[which])
    state = strip_prefix(found, "module.")
    net = create_model("ds_mbnet", **{**infer_config(state, where), **overrides})
    keys = compare_keys(state, net.state_dict())
    if not keys.fits:
        raise UserError(f"the checkpoint is no complete DS-MBNet: {keys.summary()}", where=where)
    check_finite_weights(state, where)
    net.load_state_dict(state)
    mark, reason = _gate_mark(raw, used, gate_trained)
    net.gate_trained = mark
    others = tuple(
        k for k in DICTS[which] if used and k != used and isinstance(raw.get(k), Mapping)
    )
    epoch, metric = raw.get("epoch"), raw.get("metric")
    return net.eval(), ConversionReport(
        used,
        others,
        len(state),
        keys,
        net.config,
        mark,
        reason,
        epoch if isinstance(epoch, int) else None,
        float(metric) if isinstance(metric, int | float) else None,
    )


def infer_config(state: Mapping[str, Tensor], where: str | None = None) -> dict[str, object]:
    """Constructor arguments of the DS-MBNet that a state dict belongs to.

    Width lists are the sizes of the statistics sets. Strides, kind of attention and dropout leave
    no trace; strides are the official ones (1 in the first stage, 2 in the others).

    Raises:
        UserError: the keys are not those of a DS-MBNet.
    """
    stages = _count(state, "blocks.{}.first_block.conv_pw.weight")
    gates = sorted(int(match[1]) for key in state if (match := _HEAD.fullmatch(key)))
    stem, classifier = state.get("conv_stem.weight"), state.get("classifier.weight")
    if not stages or len(gates) != 1 or stem is None or stem.ndim != 4 or classifier is None:
        raise UserError(
            f"no DS-MBNet checkpoint: {_misfit(state)}", where=where, fix="give the official file"
        )
    blocks = [f"blocks.{s}.first_block" for s in range(stages)]
    head = state[f"{blocks[gates[0]]}.gate.gate.0.weight"]
    return {
        "num_classes": classifier.shape[0],
        "stem_widths": _widths(state, "bn1"),
        "stage_widths": [_widths(state, f"{block}.bn2") for block in blocks],
        "depths": [
            1 + _count(state, f"blocks.{s}.residual_blocks.{{}}.conv_pw.weight")
            for s in range(stages)
        ],
        "strides": [1] + [2] * (stages - 1),
        "kernel_size": stem.shape[2],
        "gate_stage": gates[0],
        "gate_outputs": head.shape[0],
        "squeeze_ratio": _squeeze_ratio(state, blocks),
        "in_channels": stem.shape[1],
    }


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    count = 0
    while pattern.format(count) in state:
        count += 1
    return count


def _widths(state: Mapping[str, Tensor], norm: str) -> list[int]:
    pattern = norm + ".aux_bn.{}.running_mean"
    return [state[pattern.format(i)].numel() for i in range(_count(state, pattern))]


def _squeeze_ratio(state: Mapping[str, Tensor], blocks: Sequence[str]) -> float:
    keys = [f"{block}.gate.conv_reduce.weight" for block in blocks]
    shapes = [tuple(state[key].shape) for key in keys if key in state]
    if all(hidden == int(0.25 * channels) for hidden, channels, *_ in shapes):
        return 0.25
    low = max(hidden / channels for hidden, channels, *_ in shapes)
    high = min((hidden + 1) / channels for hidden, channels, *_ in shapes)
    return (low + high) / 2


def _misfit(state: Mapping[str, Tensor]) -> str:
    with torch.device("meta"):
        return compare_keys(state, create_model("ds_mbnet").state_dict()).summary()


def check_finite_weights(state: Mapping[str, Tensor], where: str | None) -> None:
    """Makes sure that no tensor holds NaN or infinity.

    Raises:
        UserError: names the first that does.
    """
    bad = [key for key, value in state.items() if not bool(value.isfinite().all())]
    if bad:
        raise UserError(f"{len(bad)} tensors are not finite, the first is {bad[0]}", where=where)


def _gate_mark(raw: Mapping[str, Any], used: str, given: bool | None) -> tuple[bool | None, str]:
    """Whether the gate was trained, and why we think so."""
    if given is not None:
        return given, "as told"
    if not used:
        return None, "a bare state dict does not tell"
    options = vars(raw["args"]) if hasattr(raw.get("args"), "__dict__") else {}
    for name, value in (("gate_train", True), ("train_mode", "gate")):
        if options.get(name) == value:
            return True, f"its training options have {name}={value}"
    if options.get("train_mode"):
        return False, f"its training options have train_mode={options['train_mode']}"
    heads = [
        tensor.float()
        for key in ("state_dict", "state_dict_ema")
        for name, tensor in strip_prefix(raw.get(key) or {}, "module.").items()
        if _HEAD.fullmatch(name)
    ]
    if len(heads) == 2:
        if torch.allclose(*heads, rtol=_EMA_TOLERANCE, atol=_EMA_TOLERANCE):
            return False, "its moving average equals it: it has never moved"
        return True, "its moving average differs from it: it has moved"
    return False, "the file does not tell; a Stage-I file has none"


@torch.no_grad()
def parity_check(
    net: DynamicNet, routes: Sequence[int | str] | None = None, size: int | None = None
) -> float:
    """Largest relative deviation of materialised from sliced routes, on random images.

    Args:
        net: run in eval mode and left as it was.
        routes: routes to compare; every one and mode "largest" where None.
        size: image side; at most 64 pixels where None, to be quick.
    """
    size = size or min(net.image_size, 64)
    training, worst = net.training, 0.0
    parameter = next(net.parameters())
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((2, net.in_channels, size, size), generator=generator).to(parameter)
    try:
        net.eval()
        for route in [*range(net.num_routes), "largest"] if routes is None else routes:
            sliced = net(images, route=route)
            worst = max(worst, relative_deviation(net.materialize(route)(images), sliced))  # pyright: ignore[reportArgumentType]
    finally:
        net.train(training)
    return worst


def relative_deviation(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest expected magnitude; infinite for NaN."""
    if actual.shape != expected.shape or not bool(actual.isfinite().all()):
        return float("inf")
    scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    return float((actual - expected).abs().max() / scale)
