"""Optimisers and learning rates of the recipes."""

# The batched operations torch._foreach_* have no public names.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from tenfold.errors import UserError

OptimizerName = Literal["lamb", "adamw"]

_LARGEST_WEIGHT_NORM = 10.0
_EMBEDDINGS = ("token_embedding.weight", "positional_embedding", "class_embedding")
# betas and eps: of the paper, and of DeCLIP's recipe for small data
_DEFAULTS: dict[str, tuple[tuple[float, float], float]] = {
    "lamb": ((0.9, 0.999), 1e-4),
    "adamw": ((0.9, 0.98), 1e-8),
}


class Lamb(Optimizer):
    """LAMB as FILIP was trained with it (You et al., 2020; section 4).

    For every tensor p with gradient g, the scalar temperature and biases included:

        m = β₁ m + (1 − β₁) g
        v = β₂ v + (1 − β₂) g²
        u = m / (√v + eps) + weight_decay · p
        p = p − lr · min(‖p‖, 10) / ‖u‖ · u

    with a factor of 1 where either norm is 0. There is no bias correction and no clipping of the
    gradient.

    Args:
        params: tensors or groups of them.
        lr: 0 or more.
        betas: β₁ and β₂, from 0 to below 1.
        eps: 0 or more.
        weight_decay: 0 or more.

    Raises:
        ValueError: a number out of range.

    Example:
        >>> optimizer = Lamb(parameter_groups(model, 3e-2), lr=peak_lr(6e-3, batch=8192))
    """

    # timm's Lamb corrects the bias of m and v, clips the norm of all gradients together to 1, has
    # the factor only where there is weight decay, and does not limit ||p|| to 10.

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        for group in self.param_groups:
            _check_group(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all tensors that have a gradient.

        Args:
            closure: computes the loss anew and returns it.

        Returns:
            What the closure returned.

        Raises:
            ValueError: a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for params in _alike(group["params"]):
                self._update(params, group)
        return loss

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """One step of tensors of one device and precision."""
        beta1, beta2 = group["betas"]
        grads = [p.grad for p in params if p.grad is not None]
        for p in params:
            if not self.state[p]:
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        mean = [self.state[p]["exp_avg"] for p in params]
        square = [self.state[p]["exp_avg_sq"] for p in params]
        torch._foreach_lerp_(mean, grads, 1 - beta1)
        torch._foreach_mul_(square, beta2)
        torch._foreach_addcmul_(square, grads, grads, 1 - beta2)
        update = torch._foreach_sqrt(square)
        torch._foreach_add_(update, group["eps"])
        update = torch._foreach_div(mean, update)
        if group["weight_decay"]:
            torch._foreach_add_(update, params, alpha=group["weight_decay"])
        torch._foreach_mul_(update, _trust_ratios(params, update))
        torch._foreach_add_(params, update, alpha=-group["lr"])


def is_exempt(name: str, parameter: Tensor) -> bool:
    """Whether the paper has no weight decay for a parameter.

    These are biases, LayerNorm, the temperature, and the embeddings of tokens, positions and
    classes.
    """
    return parameter.ndim < 2 or name.endswith(_EMBEDDINGS)


def is_vector(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is no matrix, which alone decay in the recipe of the shapes task."""
    return parameter.ndim < 2


def parameter_groups(
    module: nn.Module,
    weight_decay: float,
    *,
    exempt: Callable[[str, Tensor], bool] = is_exempt,
) -> list[dict[str, Any]]:
    """Two groups of what is to be trained: with weight decay, and without.

    Args:
        module: its parameters that require gradients are taken.
        weight_decay: of the first group.
        exempt: whether the parameter of a name goes to the second group.

    Raises:
        UserError: a weight decay below 0, or nothing to train.
    """
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise UserError(f"weight_decay must be 0 or more, got {weight_decay}")
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (spared if exempt(name, parameter) else decayed).append(parameter)
    if not decayed and not spared:
        raise UserError("all weights are frozen", fix="let some require gradients")
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def peak_lr(base_lr: float, batch: int) -> float:
    """Highest learning rate of a batch: `base_lr` · √(batch / 512).

    Args:
        base_lr: that of a batch of 512.
        batch: pairs in a step, of all processes together.

    Raises:
        UserError: not above 0.
    """
    if not (math.isfinite(base_lr) and base_lr > 0 and batch > 0):
        raise UserError(f"base_lr and batch must be above 0, got {base_lr} and {batch}")
    return base_lr * math.sqrt(batch / 512)


def make_optimizer(
    name: str,
    groups: list[dict[str, Any]],
    lr: float,
    *,
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
) -> Optimizer:
    """LAMB or AdamW over parameter groups.

    Args:
        name: "lamb" or "adamw".
        groups: of `parameter_groups`.
        lr: the highest one.
        betas: by default (0.9, 0.999) of LAMB and (0.9, 0.98) of AdamW.
        eps: by default 1e-4 of LAMB and 1e-8 of AdamW.

    Raises:
        UserError: another name, or a number out of range.
    """
    if name not in get_args(OptimizerName):
        known = ", ".join(get_args(OptimizerName))
        raise UserError(f"optimizer must be one of {known}, got {name!r}")
    usual_betas, usual_eps = _DEFAULTS[name]
    betas, eps = betas or usual_betas, usual_eps if eps is None else eps
    try:
        for group in groups:
            _check_group({"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, **group})
    except ValueError as error:
        raise UserError(str(error)) from None
    kind = Lamb if name == "lamb" else torch.optim.AdamW
    return kind(groups, lr=lr, betas=betas, eps=eps)


def warmup_cosine(
    optimizer: Optimizer, *, steps: int, warmup: int, start: float = 0.0, end: float = 0.0
) -> LambdaLR:
    """Linear growth of the learning rate, then half a cosine.

    Args:
        optimizer: its groups hold the highest learning rates.
        steps: of the whole run.
        warmup: steps of growth; the last of them has the highest rate.
        start: rate in front of the growth, in highest ones.
        end: rate behind the last step, in highest ones.

    Raises:
        UserError: a growth that leaves no step, or rates that are no shares.
    """
    if not 0 <= warmup < steps:
        raise UserError(
            f"a warm-up of {warmup} steps does not fit a run of {steps}",
            fix="make it shorter, or the run longer",
        )
    if not (0 <= start <= 1 and 0 <= end <= 1):
        raise UserError(f"start and end are shares of the rate from 0 to 1, got {start} and {end}")

    def factor(step: int) -> float:
        if step < warmup:
            return start + (1 - start) * (step + 1) / warmup
        progress = min(1.0, (step - warmup) / (steps - warmup))
        return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)


@torch.no_grad()
def clip_each_gradient(parameters: Iterable[Tensor], max_norm: float = 1.0) -> None:
    """Shorten every tensor's gradient to a norm of at most `max_norm`, each by itself.

    MindFormers' fine-tuning clips so; the paper's own training does not clip.

    Raises:
        ValueError: `max_norm` not above 0, or a sparse gradient.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm must be above 0, not {max_norm}")
    for params in _alike(parameters):
        grads = [p.grad for p in params if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(grads))
        torch._foreach_mul_(grads, list((max_norm / norms).clamp(max=1).unbind()))


def _check_group(group: dict[str, Any]) -> None:
    if not (math.isfinite(group["lr"]) and group["lr"] >= 0):
        raise ValueError(f"lr must be 0 or more, got {group['lr']}")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas must be from 0 to below 1, got {group['betas']}")
    for name in ("eps", "weight_decay"):
        if not (math.isfinite(group[name]) and group[name] >= 0):
            raise ValueError(f"{name} must be 0 or more, got {group[name]}")


def _alike(params: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors with a gradient, by device and precision, as batched operations need them."""
    found: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for p in params:
        if p.grad is None:
            continue
        if p.grad.is_sparse:
            raise ValueError("gradients must be dense; embed with sparse=False")
        found.setdefault((p.device, p.dtype), []).append(p)
    return list(found.values())


def _trust_ratios(params: list[Tensor], updates: tuple[Tensor, ...]) -> list[Float[Tensor, ""]]:
    """How far each update goes: the norm of the tensor over that of the update."""
    weight = torch.stack(torch._foreach_norm(params)).clamp(max=_LARGEST_WEIGHT_NORM)
    length = torch.stack(torch._foreach_norm(updates))
    ratios = torch.where((weight == 0) | (length == 0), 1.0, weight / length)
    return list(ratios.unbind())
