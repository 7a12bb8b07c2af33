"""Objectives of Stage II: the straight-through gate, difficulty labels and the gate's losses."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tenfold.errors import UserError

SGS_MODES = ("try_best", "give_up", "ladder", "none")


class GateSample(NamedTuple):
    """A sampled decision; with several gates they are the second dimension.

    Attributes:
        gate: one-hot in value, with the gradient of `soft` (straight through).
        soft: softmax of the noisy logits.
        choice: the sampled position.
    """

    gate: Float[Tensor, "batch ... routes"]
    soft: Float[Tensor, "batch ... routes"]
    choice: Int[Tensor, "batch ..."]


def gumbel_noise(logits: Float[Tensor, "batch routes"]) -> Float[Tensor, "batch routes"]:
    """-log(Exp(1)) samples in the shape of `logits`, never in half precision: Exp(1) could be 0."""
    return -torch.empty_like(logits, dtype=full_precision(logits.dtype)).exponential_().log()


def full_precision(dtype: torch.dtype) -> torch.dtype:
    """float32 in the place of the half precisions."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def gumbel_gate(
    logits: Float[Tensor, "batch routes"],
    noise: Float[Tensor, "batch routes"] | None = None,
    temperature: float = 1.0,
) -> GateSample:
    """Straight-through Gumbel softmax: onehot(argmax s) - sg(s) + s, s = softmax((l + G) / T).

    Args:
        logits: the slimming head's output.
        noise: Gumbel(0, 1) samples; drawn where None.
        temperature: T > 0; the paper uses 1.
    """
    noise = gumbel_noise(logits) if noise is None else noise
    soft = ((logits + noise) / temperature).softmax(1)
    choice = soft.argmax(1)
    hard = F.one_hot(choice, logits.shape[1]).to(soft.dtype)
    return GateSample(hard - soft.detach() + soft, soft, choice)


def sgs_targets(
    correct: Bool[Tensor, "batch routes"], mode: str = "try_best"
) -> Int[Tensor, " batch"]:
    """Difficulty labels of sandwich gate sparsification: the position each image should take.

    Args:
        correct: whether each route of the space classifies each image correctly (top-1), cheapest
            first. "try_best" reads the first column, "give_up" the first and the last.
        mode: "try_best": first route if it is correct, else last. "give_up": first route also
            where the last is wrong as well. "ladder": cheapest correct route, last if none.

    Raises:
        UserError: an unknown mode.
    """
    last = correct.shape[1] - 1
    if mode == "try_best":
        easy = correct[:, 0]
    elif mode == "give_up":
        easy = correct[:, 0] | ~correct[:, -1]
    elif mode == "ladder":
        return torch.where(correct.any(1), correct.int().argmax(1), last)
    else:
        raise UserError(f"sgs must be one of {', '.join(SGS_MODES)}, got {mode!r}")
    return torch.where(easy, 0, last)


@dataclass(frozen=True)
class GateLoss:
    """The paper's Stage-II loss: lambda_ce CE + lambda_cplx (E[MAdds] / scale)^2 + lambda_sgs SGS.

    Attributes:
        lambda_ce: weight of the classification loss of the routed prediction.
        lambda_cplx: weight of the complexity term.
        lambda_sgs: weight of the sparsification term.
        scale: MAdds that count as 1; the largest route's where None (the official code: 1e9).
        sgs_on: "logits": cross-entropy of the noise-free logits; "probs": of the noisy softmax,
            taken for logits once more, as the official program does.
        smoothing: label smoothing of both cross-entropies.
    """

    lambda_ce: float = 1.0
    lambda_cplx: float = 0.5
    lambda_sgs: float = 1.0
    scale: float | None = None
    sgs_on: str = "logits"
    smoothing: float = 0.1

    def __post_init__(self) -> None:
        """Rejects an unknown `sgs_on` and a scale that is not positive."""
        if self.scale is not None and not self.scale > 0:
            raise UserError(f"scale must be above 0 MAdds, got {self.scale:g}")
        if self.sgs_on not in ("logits", "probs"):
            raise UserError(f"sgs_on must be 'logits' or 'probs', got {self.sgs_on!r}")

    def __call__(
        self,
        gate_logits: Float[Tensor, "batch ... routes"],
        sample: GateSample,
        dynamic_logits: Float[Tensor, "batch classes"],
        labels: Int[Tensor, " batch"],
        targets: Int[Tensor, " batch"] | None,
        madds: Sequence[int] | Tensor,
    ) -> dict[str, Tensor]:
        """The weighted sum under "loss" and its three parts, unweighted.

        Args:
            gate_logits: noise-free logits.
            sample: the decision made from them.
            dynamic_logits: class logits of the routed network, differentiable in `sample.gate`.
            labels: classes.
            targets: difficulty labels, the same for all gates, or None to leave the term out.
            madds: cost of the routes, ascending, or of all paths, see `complexity`.
        """
        ce = F.cross_entropy(dynamic_logits, labels, label_smoothing=self.smoothing)
        cplx = complexity(sample.gate, madds, self.scale)
        sgs = torch.zeros_like(ce)
        if targets is not None:
            scores = gate_logits if self.sgs_on == "logits" else sample.soft
            every = targets if scores.ndim == 2 else targets.repeat_interleave(scores.shape[1])
            sgs = F.cross_entropy(scores.flatten(0, -2), every, label_smoothing=self.smoothing)
        loss = self.lambda_ce * ce + self.lambda_cplx * cplx + self.lambda_sgs * sgs
        return {"loss": loss, "ce": ce, "complexity": cplx, "sgs": sgs}


def complexity(
    gate: Float[Tensor, "batch ... routes"],
    madds: Sequence[int] | Tensor,
    scale: float | None = None,
) -> Float[Tensor, ""]:
    """(E[MAdds] / scale)^2, the batch mean inside the square.

    Args:
        gate: (batch, routes), or (batch, gates, routes).
        madds: cost of every route, or of every path with one dimension for each gate.
        scale: MAdds that count as 1; the widest path's where None.
    """
    costs = torch.as_tensor(madds, dtype=torch.float64)
    wide = gate.to(full_precision(gate.dtype))
    costs = (costs / (scale or costs.flatten()[-1])).to(gate.device, wide.dtype)
    first, *others = wide.unbind(1) if gate.ndim == 3 else (wide,)
    with torch.autocast(gate.device.type, enabled=False):
        expected = torch.einsum("nk,k...->n...", first, costs)
        for choice in others:
            expected = torch.einsum("nk,nk...->n...", choice, expected)
    return expected.mean().square()


def value_loss(
    gate_logits: Float[Tensor, "batch ... routes"],
    route_logits: Float[Tensor, "batch routes classes"],
    labels: Int[Tensor, " batch"],
) -> Float[Tensor, ""]:
    """Binary cross-entropy of each output against its route's probability of the true class.

    Args:
        gate_logits: (batch, routes), or (batch, gates, routes): all gates have the same targets.
        route_logits: class logits of every route.
        labels: classes.
    """
    probability = route_logits.softmax(2)
    picked = probability.gather(2, labels[:, None, None].expand(-1, probability.shape[1], 1))
    target = picked.squeeze(2)
    if gate_logits.ndim == 3:
        target = target[:, None].expand_as(gate_logits)
    return F.binary_cross_entropy_with_logits(gate_logits, target)
