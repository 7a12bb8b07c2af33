"""Stage I, forward and backward: the sandwich rule with in-place bootstrapping (section 3.2)."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ds_net_plus.model import DynamicNet, RouteLike
from ds_net_plus.steps.common import eval_mode
from tenfold.distillation import SoftTargetCrossEntropy
from tenfold.errors import UserError

DISTILL_MODES = ("ib", "inplace", "none", "ramp", "switch")

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

    routes: dict[str, RouteLike]
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


def sample_routes(
    step: int, num_routes: int, count: int = 2, seed: int = 0, gates: int = 1
) -> tuple[RouteLike, ...]:
    """Independent uniform draws for one step, the same on every rank.

    Args:
        step: number of the step.
        num_routes: routes of a gate.
        count: draws.
        seed: of the whole run.
        gates: with one, a route is drawn from 1..num_routes-1 (the smallest runs anyway); with
            several, every gate's index from 0..num_routes-1, so that mixed paths learn, too.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    if gates == 1:
        return tuple(torch.randint(1, num_routes, (count,), generator=generator).tolist())
    draws = torch.randint(0, num_routes, (count, gates), generator=generator)
    return tuple(tuple(path) for path in draws.tolist())


def stage1_step(
    student: DynamicNet,
    teacher: DynamicNet | None,
    x: Float[Tensor, "batch colours height width"],
    y: Int[Tensor, " batch"] | Float[Tensor, "batch classes"],
    routes: Sequence[RouteLike],
    *,
    other_view: Float[Tensor, "batch colours height width"] | None = None,
    external: nn.Module | None = None,
    distill: str = "ib",
    ensemble: bool = False,
    smoothing: float = 0.1,
    progress: float = 0.0,
    backward: Callable[[Tensor], object] = torch.Tensor.backward,
    no_sync: Callable[[], AbstractContextManager] = nullcontext,
) -> Stage1Output:
    """Forward and backward of largest, random and smallest; gradients add up in the student.

    The largest mode learns from the labels, in equal parts from an external teacher where there is
    one. The others learn from

    - "ib": the teacher's largest mode;  "inplace": the student's own largest mode, detached;
    - "none": the labels;  "ramp": labels moving linearly to "ib" with `progress`;
    - "switch": labels while progress < 0.5, "ib" afterwards.

    Args:
        student: in training mode; its batch-norm statistics follow in the order L, R1, R2, S.
        teacher: its exponential moving average in eval mode; None where `distill` needs none.
        x: images.
        y: labels, or distributions over classes (of mixed images).
        routes: the random routes.
        other_view: another view of the same images, which all modes but the largest see while their
            targets come from `x` (multi-view consistency of DS-Net++); None: they see `x`.
        external: a trained classifier that teaches the largest mode.
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
        logits = student(x if name == "L" or other_view is None else other_view, route=route)
        target = hard
        if name == "L" and external is not None:
            with torch.no_grad(), eval_mode(external):
                target = (hard + external(x).softmax(1)) / 2
        if name != "L" and weight > 0:
            assert soft is not None
            if name == "S" and ensemble:
                assert teacher is not None, "the ensemble needs a teacher"
                soft = _teacher_targets(teacher, x, ["largest", *routes])
            target = (1 - weight) * hard + weight * soft
        loss = soft_cross_entropy(logits, target)
        if name == names[-1] and dist.is_available() and dist.is_initialized():
            loss = loss + _touch(student)
        with nullcontext() if name == names[-1] else no_sync():
            backward(loss)
        if name == "L" and distill == "inplace":
            soft = logits.detach().softmax(1)
        output.logits[name] = logits.detach()
        output.losses[name] = loss.detach()
        output.targets[name] = target
    return output


def _touch(net: nn.Module) -> Tensor:
    """Zero, with every trained parameter in its graph.

    Ranks exchange the gradients that the last backward pass reaches. The smallest route may have
    fewer blocks than those before it, whose gradients would stay each rank's own.
    """
    parts = [p.flatten()[:1] for p in net.parameters() if p.requires_grad]
    return 0 * torch.cat(parts).float().sum()


def _smoothed(y: Tensor, classes: int, smoothing: float) -> Tensor:
    distribution = y if y.is_floating_point() else F.one_hot(y, classes).float()
    return distribution * (1 - smoothing) + smoothing / classes


def _teacher_weight(distill: str, progress: float) -> float:
    if distill not in DISTILL_MODES:
        raise UserError(f"distill must be one of {', '.join(DISTILL_MODES)}, got {distill!r}")
    fixed = {"ib": 1.0, "inplace": 1.0, "none": 0.0, "ramp": progress}
    return fixed.get(distill, float(progress >= 0.5))


@torch.no_grad()
def _teacher_targets(teacher: DynamicNet, x: Tensor, routes: Sequence[RouteLike]) -> Tensor:
    with eval_mode(teacher):  # with its own statistics, which must not follow this batch
        return torch.stack([teacher(x, route=route).softmax(1) for route in routes]).mean(0)


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
