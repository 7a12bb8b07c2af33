"""One training step of each stage: forward and backward, no optimizer.

Stage I is the sandwich rule with in-place (ensemble) bootstrapping (DS-Net section 3.2), Stage II
the training of the gate on a frozen supernet (section 3.3).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ds_net_plus.losses import GateLoss, GateSample, gumbel_gate, sgs_targets, value_loss
from ds_net_plus.model import DynamicNet
from tenfold.checkpoint import ema_update
from tenfold.distillation import SoftTargetCrossEntropy
from tenfold.errors import UserError

__all__ = [
    "Stage1Output",
    "Stage2Output",
    "drop_zero_gradients",
    "ema_update",
    "sample_routes",
    "stage1_step",
    "stage2_step",
]

DISTILL_MODES = ("ib", "inplace", "none", "ramp", "switch")
ESTIMATORS = ("mixture", "mask")

soft_cross_entropy = SoftTargetCrossEntropy()


@dataclass
class Stage1Output:
    """What one sandwich step computed; keys L, R1, R2, S in the order they ran.

    Attributes:
        routes: route of each key ("largest", r1, r2, 0).
        logits: class logits, detached.
        losses: mean loss, detached.
        targets: the distribution that each learned from, (batch, classes).
    """

    routes: dict[str, int | str]
    logits: dict[str, Tensor] = field(default_factory=dict)
    losses: dict[str, Tensor] = field(default_factory=dict)
    targets: dict[str, Tensor] = field(default_factory=dict)

    @property
    def outputs(self) -> dict[str, Tensor]:
        """The class logits, under the name that the method's description uses."""
        return self.logits

    @property
    def loss(self) -> Tensor:
        """Sum of the four losses, the official objective: not divided by four."""
        return torch.stack(list(self.losses.values())).sum()


def sample_routes(step: int, num_routes: int, count: int = 2, seed: int = 0) -> tuple[int, ...]:
    """`count` independent uniform draws from 1..num_routes-1, the same on every rank."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return tuple(torch.randint(1, num_routes, (count,), generator=generator).tolist())


def stage1_step(
    student: DynamicNet,
    teacher: DynamicNet | None,
    x: Float[Tensor, "batch colours height width"],
    y: Int[Tensor, " batch"],
    routes: Sequence[int],
    *,
    distill: str = "ib",
    ensemble: bool = False,
    smoothing: float = 0.1,
    progress: float = 0.0,
    backward: Callable[[Tensor], object] = torch.Tensor.backward,
    no_sync: Callable[[], AbstractContextManager] = nullcontext,
) -> Stage1Output:
    """Forward and backward of largest, random and smallest; gradients add up in the student.

    The largest mode learns from the labels. The others learn from

    - "ib": the teacher's largest mode;  "inplace": the student's own largest mode, detached;
    - "none": the labels;  "ramp": labels moving linearly to "ib" with `progress`;
    - "switch": labels while progress < 0.5, "ib" afterwards.

    Args:
        student: in training mode; its batch-norm statistics follow in the order L, R1, R2, S.
        teacher: its exponential moving average in eval mode; None where `distill` needs none.
        x: images.
        y: labels.
        routes: the random routes.
        distill: target of all modes but the largest.
        ensemble: the smallest learns from the mean of the teacher run as L, R1 and R2 (IEB).
        smoothing: label smoothing.
        progress: share of the training that is over, 0..1, for "ramp" and "switch".
        backward: called with every loss, e.g. `LightningModule.manual_backward`.
        no_sync: context for all backward passes but the last, to reduce gradients once under DDP.

    Raises:
        UserError: an unknown `distill`.
    """
    names = ["L", *(f"R{i + 1}" for i in range(len(routes))), "S"]
    output = Stage1Output(dict(zip(names, ["largest", *routes, 0], strict=True)))
    hard = _smoothed(y, student.num_classes, smoothing)
    weight = _teacher_weight(distill, progress)
    soft: Tensor | None = None
    if weight > 0 and distill != "inplace":
        assert teacher is not None, "this kind of distillation needs a teacher"
        soft = _teacher_targets(teacher, x, ["largest"])
    for name, route in output.routes.items():
        logits = student(x, route=route)
        target = hard
        if name != "L" and weight > 0:
            assert soft is not None
            if name == "S" and ensemble:
                assert teacher is not None, "the ensemble needs a teacher"
                soft = _teacher_targets(teacher, x, ["largest", *routes])
            target = (1 - weight) * hard + weight * soft
        loss = soft_cross_entropy(logits, target)
        with nullcontext() if name == names[-1] else no_sync():
            backward(loss)
        if name == "L" and distill == "inplace":
            soft = logits.detach().softmax(1)
        output.logits[name] = logits.detach()
        output.losses[name] = loss.detach()
        output.targets[name] = target
    return output


def _smoothed(y: Tensor, classes: int, smoothing: float) -> Tensor:
    return F.one_hot(y, classes).float() * (1 - smoothing) + smoothing / classes


def _teacher_weight(distill: str, progress: float) -> float:
    if distill not in DISTILL_MODES:
        raise UserError(f"distill must be one of {', '.join(DISTILL_MODES)}, got {distill!r}")
    fixed = {"ib": 1.0, "inplace": 1.0, "none": 0.0, "ramp": progress}
    return fixed.get(distill, float(progress >= 0.5))


@torch.no_grad()
def _teacher_targets(teacher: DynamicNet, x: Tensor, routes: Sequence[int | str]) -> Tensor:
    with _eval_mode(teacher):  # with its own statistics, which must not follow this batch
        return torch.stack([teacher(x, route=route).softmax(1) for route in routes]).mean(0)


@contextmanager
def _eval_mode(net: torch.nn.Module) -> Iterator[None]:
    training = net.training
    net.eval()
    try:
        yield
    finally:
        net.train(training)


@contextmanager
def _gate_alone(model: DynamicNet) -> Iterator[None]:
    """Only the slimming head collects gradients inside."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    for parameter in model.gate_parameters():
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)


def drop_zero_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Sets gradients that are zero everywhere to None, so no momentum or decay moves those weights.

    The official program's habit. One transfer from the device for all parameters.
    """
    with_grad = [p for p in parameters if p.grad is not None]
    if not with_grad:
        return
    grads = [p.grad for p in with_grad if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads, float("inf")))  # pyright: ignore[reportPrivateImportUsage]
    for parameter, norm in zip(with_grad, norms.tolist(), strict=True):
        if norm == 0:
            parameter.grad = None


@dataclass
class Stage2Output:
    """What one gate step computed.

    Attributes:
        sample: the sampled decision (None for the value gate, which samples nothing).
        gate_logits: noise-free logits of the slimming head.
        logits: class logits of the routed network (None for the value gate).
        losses: "loss" (with its graph) and its parts.
        targets: difficulty labels, None without SGS.
    """

    sample: GateSample | None
    gate_logits: Tensor
    logits: Tensor | None
    losses: dict[str, Tensor]
    targets: Tensor | None

    @property
    def loss(self) -> Tensor:
        """The objective."""
        return self.losses["loss"]

    @property
    def gate(self) -> Tensor | None:
        """The straight-through one-hot gate."""
        return None if self.sample is None else self.sample.gate


def gate_objective(
    model: DynamicNet,
    gate_input: Float[Tensor, "batch hidden"],
    y: Int[Tensor, " batch"],
    *,
    route_logits: Float[Tensor, "batch routes classes"] | None = None,
    features: Float[Tensor, "batch channels height width"] | None = None,
    noise: Float[Tensor, "batch routes"] | None = None,
    gate_loss: str = "sgs",
    estimator: str = "mixture",
    sgs: str = "try_best",
    objective: GateLoss | None = None,
    size: int | None = None,
) -> Stage2Output:
    """Stage-II losses of one batch, differentiable in the gate's parameters alone.

    Args:
        model: the frozen supernet, in eval mode.
        gate_input: what the slimming head reads.
        y: labels.
        route_logits: class logits of every route of the space; cached, or computed from `features`.
        features: the front's output; the mask estimator needs it.
        noise: Gumbel noise, drawn where None.
        gate_loss: "sgs" (paper) or "value".
        estimator: "mixture": z = sum_k g_k z_k over real route outputs; "mask": dense masked run.
        sgs: difficulty labels, one of `SGS_MODES`.
        objective: weights of the paper's loss.
        size: image side that costs are stated for.

    Raises:
        UserError: an unknown option.
    """
    if estimator not in ESTIMATORS or gate_loss not in ("sgs", "value"):
        raise UserError(
            f"estimator must be one of {', '.join(ESTIMATORS)} and gate_loss 'sgs' or 'value', "
            f"got {estimator!r} and {gate_loss!r}"
        )
    space = model.routing_space
    gate_logits = model.gate_logits(gate_input.detach())
    if route_logits is None:
        needed = _needed_routes(len(space), gate_loss, estimator, sgs)
        assert features is not None
        route_logits = _route_logits(model, features, needed)
    if gate_loss == "value":
        loss = value_loss(gate_logits, route_logits, y)
        return Stage2Output(None, gate_logits, None, {"loss": loss}, None)
    sample = gumbel_gate(gate_logits, noise)
    if estimator == "mixture":
        logits = torch.einsum("nk,nkc->nc", sample.gate, route_logits)
    else:
        assert features is not None, "the mask estimator runs the network: it cannot be cached"
        logits = model.masked_rest(features.detach(), sample.gate, space)
    targets = None if sgs == "none" else sgs_targets(route_logits.argmax(2) == y[:, None], sgs)
    losses = (objective or GateLoss())(
        gate_logits, sample, logits, y, targets, model.space_madds(size)
    )
    return Stage2Output(sample, gate_logits, logits, losses, targets)


def _needed_routes(count: int, gate_loss: str, estimator: str, sgs: str) -> set[int]:
    if gate_loss == "value" or estimator == "mixture" or sgs == "ladder":
        return set(range(count))
    return {"try_best": {0}, "give_up": {0, count - 1}}.get(sgs, set())


@torch.no_grad()
def _route_logits(model: DynamicNet, features: Tensor, needed: set[int]) -> Tensor:
    """(batch, routes, classes); routes that nobody reads stay zero."""
    space = model.routing_space
    logits = features.new_zeros(len(features), len(space), model.num_classes)
    for j in needed:
        logits[:, j] = model.rest(features, space[j])
    return logits


def stage2_step(
    model: DynamicNet,
    x: Float[Tensor, "batch colours height width"],
    y: Int[Tensor, " batch"],
    routing_space: Sequence[int] | None = None,
    noise: Float[Tensor, "batch routes"] | None = None,
    *,
    gate_loss: str = "sgs",
    estimator: str = "mixture",
    sgs: str = "try_best",
    sgs_on: str = "logits",
    lambda_ce: float = 1.0,
    lambda_cplx: float = 0.5,
    lambda_sgs: float = 1.0,
    scale: float | str | None = None,
    smoothing: float = 0.1,
    backward: Callable[[Tensor], object] | None = torch.Tensor.backward,
) -> Stage2Output:
    """Forward and backward of one gate step; gradients add up in the slimming head alone.

    Args:
        model: the supernet; run in eval mode, whatever its mode, and left in the mode it had.
        x: images.
        y: labels.
        routing_space: routes that the gate's outputs stand for; the model's own where None.
        noise: Gumbel noise (batch, routes), drawn where None.
        gate_loss: "sgs" (paper) or "value".
        estimator: "mixture" or "mask", see `gate_objective`.
        sgs: difficulty labels, see `sgs_targets`; "none" leaves them out.
        sgs_on: "logits", or "probs" as in the official program.
        lambda_ce: weight of the classification loss.
        lambda_cplx: weight of the complexity term.
        lambda_sgs: weight of the difficulty labels.
        scale: MAdds that count as 1 in the complexity term, the widest route's where None.
        smoothing: label smoothing.
        backward: called with the loss; None leaves the gradients to the caller.

    Raises:
        UserError: an invalid routing space or an unknown option.
    """
    if routing_space is not None:
        model.routing_space = routing_space
    objective = GateLoss(
        lambda_ce,
        lambda_cplx,
        lambda_sgs,
        None if scale is None else float(scale),
        sgs_on,
        smoothing,
    )
    with _eval_mode(model), _gate_alone(model):
        with torch.no_grad():
            front = model.front(x)
        output = gate_objective(
            model,
            front.gate_input,
            y,
            features=front.features,
            noise=noise,
            gate_loss=gate_loss,
            estimator=estimator,
            sgs=sgs,
            objective=objective,
            size=x.shape[-1],
        )
        if backward is not None:
            backward(output.loss)
    return output
