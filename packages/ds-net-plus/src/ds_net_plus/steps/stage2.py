"""Stage II, forward and backward: the gates of a frozen supernet (section 3.3)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ds_net_plus.losses import GateLoss, GateSample, gumbel_gate, sgs_targets, value_loss
from ds_net_plus.model import DynamicNet
from ds_net_plus.steps.common import eval_mode, gate_alone
from tenfold.errors import UserError

ESTIMATORS = ("mixture", "mask")


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
    features: Float[Tensor, "batch ..."] | None = None,
    noise: Float[Tensor, "batch ... routes"] | None = None,
    gate_loss: str = "sgs",
    estimator: str = "mixture",
    sgs: str = "try_best",
    objective: GateLoss | None = None,
    size: int | None = None,
    upstream: Sequence[int] | None = None,
) -> Stage2Output:
    """Stage-II losses of one batch, differentiable in the gate's parameters alone.

    Args:
        model: the frozen supernet, in eval mode.
        gate_input: what the (first) slimming head reads; with several gates and cached
            `route_logits` what all of them read on one path, see `upstream_inputs`.
        y: labels.
        route_logits: class logits of every route of the space; cached, or computed from `features`.
        features: the front's output; the mask estimator needs it.
        noise: Gumbel noise, (batch, gates, routes) with several gates, drawn where None.
        gate_loss: "sgs" (paper) or "value": every gate predicts what each route is worth when it is
            taken at all gates; what it reads comes from a path drawn for the batch.
        estimator: "mixture": z = sum_k g_k z_k over real route outputs (with several gates, stage
            outputs gate by gate); "mask": dense masked run.
        sgs: difficulty labels, one of `SGS_MODES`.
        objective: weights of the paper's loss.
        size: image side that costs are stated for.
        upstream: path on which several value gates read; drawn where None.

    Raises:
        UserError: an unknown option.
    """
    if estimator not in ESTIMATORS or gate_loss not in ("sgs", "value"):
        raise UserError(
            f"estimator must be one of {', '.join(ESTIMATORS)} and gate_loss 'sgs' or 'value', "
            f"got {estimator!r} and {gate_loss!r}"
        )
    space, several = model.routing_space, model.num_gates > 1
    if route_logits is None:
        needed = _needed_routes(len(space), gate_loss, estimator, sgs, several)
        assert features is not None
        route_logits = _route_logits(model, features, needed)
        if several and gate_loss == "value":
            path = sample_upstream(model) if upstream is None else upstream
            gate_input = upstream_inputs(model, features, gate_input, path)
    if gate_loss == "value":
        gate_logits = model.all_gate_logits(gate_input.detach())
        loss = value_loss(gate_logits, route_logits, y)
        return Stage2Output(None, gate_logits, None, {"loss": loss}, None)
    if several:
        if features is None:
            raise UserError(
                "the paper's loss with several gates runs the network in every step",
                fix="add --cache false, or take --gate-loss value",
            )
        gate_logits, sample, logits = _walk(model, features, gate_input, noise, estimator)
    else:
        gate_logits = model.gate_logits(gate_input.detach())
        sample = gumbel_gate(gate_logits, noise)
        if estimator == "mixture":
            logits = torch.einsum("nk,nkc->nc", sample.gate, route_logits)
        else:
            assert features is not None, "the mask estimator runs the network: it cannot be cached"
            logits = model.masked_rest(features.detach(), sample.gate, space)
    targets = None if sgs == "none" else sgs_targets(route_logits.argmax(2) == y[:, None], sgs)
    losses = (objective or GateLoss())(
        gate_logits, sample, logits, y, targets, model.path_madds(size)
    )
    return Stage2Output(sample, gate_logits, logits, losses, targets)


def _walk(
    model: DynamicNet,
    features: Tensor,
    gate_input: Tensor,
    noise: Tensor | None,
    estimator: str,
) -> tuple[Tensor, GateSample, Tensor]:
    """Samples gate by gate; every gate reads what the ones before it led to.

    "mixture": behind each gate every route of its stage is run, and the results, zero-padded to the
    widest, are weighted by the gate. Weights meet a padded input as they would meet a sliced one.

    Returns:
        (batch, gates, routes) logits, the samples in the same shape, and class logits.
    """
    space, samples, all_logits = model.routing_space, [], []
    features = model.widen(features.detach(), 0)
    gate_input = gate_input.detach()
    for gate in range(model.num_gates):
        gate_logits = model.gate_logits(gate_input, gate)
        sample = gumbel_gate(gate_logits, None if noise is None else noise[:, gate])
        if estimator == "mask":
            features, gate_input = model.masked_stage(features, gate, sample.gate, space)
        else:
            runs = [model.stage(model.enter(features, gate, k), gate, k) for k in space]
            wide = torch.stack([model.widen(run.features, gate + 1) for run in runs], 1)
            features = torch.einsum("nk,nk...->n...", sample.gate, wide)
            inputs = torch.stack([run.gate_input for run in runs], 1)
            gate_input = torch.einsum("nk,nkh->nh", sample.gate, inputs)
        samples.append(sample)
        all_logits.append(gate_logits)
    columns = (torch.stack(part, 1) for part in zip(*samples, strict=True))
    return torch.stack(all_logits, 1), GateSample(*columns), features


def sample_upstream(model: DynamicNet, generator: torch.Generator | None = None) -> list[int]:
    """A route of the routing space for each gate, uniform and independent."""
    space = model.routing_space
    draws = torch.randint(len(space), (model.num_gates,), generator=generator)
    return [space[j] for j in draws.tolist()]


@torch.no_grad()
def upstream_inputs(
    model: DynamicNet, features: Tensor, gate_input: Tensor, path: Sequence[int]
) -> Float[Tensor, "batch all_hidden"]:
    """What every gate reads on one path, side by side.

    Args:
        model: the supernet.
        features: the front's.
        gate_input: the first gate's.
        path: a route for each gate; that of the last one does not matter.
    """
    inputs = [gate_input]
    for gate, route in enumerate(path[:-1]):
        features, following = model.stage(model.enter(features, gate, route), gate, route)
        inputs.append(following)
    return torch.cat(inputs, 1)


def _needed_routes(count: int, gate_loss: str, estimator: str, sgs: str, several: bool) -> set[int]:
    mixed = estimator == "mixture" and not several  # with several gates stages are mixed instead
    if gate_loss == "value" or mixed or sgs == "ladder":
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
    noise: Float[Tensor, "batch ... routes"] | None = None,
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
    """Forward and backward of one gate step; gradients add up in the slimming heads alone.

    Args:
        model: the supernet; run in eval mode, whatever its mode, and left in the mode it had.
        x: images.
        y: labels.
        routing_space: routes that the gate's outputs stand for; the model's own where None.
        noise: Gumbel noise (batch, routes), (batch, gates, routes) with several gates; drawn where
            None.
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
    with eval_mode(model), gate_alone(model):
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
