"""Hierarchical fusion of the layers of an encoder (section 5 of the paper) and its peers.

In names, b: texts, n: tokens, d: width, k: fused layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from bert_oversmoothing.fusion.layers import layer_read
from bert_oversmoothing.fusion.parts import Gate, Maximum, add_product, wide, widen
from tenfold.errors import UserError

GateKind = Literal["softmax", "sigmoid", "channel"]
Init = Literal["random", "identity"]

_GATE_STD = 0.02


class Fused(NamedTuple):
    """What a fusion gives.

    `weights` are float32 or better, from 0 to 1: (batch, tokens, layers) of a gate, with a width
    before the layers where it is by channel, (layers) of a scalar mix; else None. They add up to 1
    over the layers, save those of a sigmoid gate, and are 0 on padding.
    """

    hidden: Float[Tensor, "batch tokens width"]
    weights: Float[Tensor, "*axes layers"] | None


class LayerFusion(nn.Module):
    r"""One state per token from the states of K layers.

    Shi et al., "Revisiting Over-smoothing in BERT from the Perspective of Graph", ICLR 2022:

    .. math::  \text{concat:}\; F = [H_1; \dots; H_K] W + b \qquad
               \text{max:}\; F_{ij} = \max_l (H_l)_{ij} \qquad
               \text{gate:}\; F = \sum_l G_l H_l,\; G = \operatorname{softmax}_l(H_l w_l + c_l)

    Beside them, "mean" is that of the layers, "scalar_mix" is ELMo's γ Σ softmax(w)_l H_l, "last"
    is the last layer given (what an encoder has without a fusion) and "best_layer(i)" is layer i.

    Without gradients, layers are taken up one after the other, and none is kept (`stream`).

    Example:
        >>> fusion = LayerFusion("gate", width=768, num_layers=13, init="identity")
        >>> hidden, weights = fusion(encoder(**batch, output_hidden_states=True).hidden_states)

    Args:
        kind: one of the above.
        width: d, of every layer.
        num_layers: K, 1 or more.
        gate_kind: "softmax" over the layers, one logit a token; "sigmoid", independent gates;
            "channel", softmax over the layers with a logit for every channel.
        gate_shared: one gate for all layers, not one for each.
        init: "identity" starts as the last layer, equal to the bit (on CUDA, a concat with TF32
            off). All but concat then have one parameter more, the scalar alpha = 0 of
            F = H + alpha (fusion - H), H the last layer. "random" starts a concat with weights
            N(0, 1 / (K d)), a gate near the mean of the layers; kinds without parameters stay as
            they are. "last" and "best_layer(i)" are the same under both.
        norm_each: applied to every layer before the fusion: the final norm of a pre-norm encoder.
            It stays the encoder's, and is not among the parameters of this module.
        layers: numbers of the layers, K of them, as `parse_layers` gives; of these is the i of
            "best_layer(i)", and errors name them. 0 to K - 1 if not given.

    Raises:
        UserError: an option that does not exist, a size below 1, or no such layer.
    """

    # A gate's weights follow nn.Linear, (out, in) for each layer: (K, d), by channel (K, d, d).

    def __init__(
        self,
        kind: str,
        width: int,
        num_layers: int,
        *,
        gate_kind: GateKind = "softmax",
        gate_shared: bool = False,
        init: Init = "random",
        norm_each: Callable[[Tensor], Tensor] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("gate_kind", gate_kind, get_args(GateKind)),
            ("init", init, get_args(Init)),
        ):
            if value not in known:
                raise UserError(f"unknown {name}: {value!r}", fix=f"choose {', '.join(known)}")
        for name, size in (("width", width), ("num_layers", num_layers)):
            if size < 1:
                raise UserError(f"{name} must be 1 or more, got {size}")
        self.layers = tuple(range(num_layers) if layers is None else layers)
        if len(self.layers) != num_layers:
            raise UserError(f"{len(self.layers)} layers are named, num_layers is {num_layers}")
        self.kind, self.width, self.num_layers = kind, width, num_layers
        self.gate_kind, self.gate_shared, self.init = gate_kind, gate_shared, init
        self.position = layer_read(kind, self.layers)
        # in a tuple, which a module does not search for modules
        self._norm_each = (norm_each,)
        if kind == "concat":
            self.weight = nn.Parameter(torch.empty(width, num_layers * width))
            self.bias = nn.Parameter(torch.empty(width))
        elif kind == "gate":
            channels = width if gate_kind == "channel" else None
            self.gate = Gate(width, 1 if gate_shared else num_layers, channels)
        elif kind == "scalar_mix":
            self.mix = nn.Parameter(torch.empty(num_layers))
            self.gamma = nn.Parameter(torch.empty(()))
        starts_as_last = init == "identity" and kind != "concat" and self.position is None
        self.alpha = nn.Parameter(torch.empty(())) if starts_as_last else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set all parameters to their start, as `init` has it."""
        if self.kind == "concat":
            nn.init.zeros_(self.bias)
            if self.init == "identity":
                nn.init.zeros_(self.weight)
                self.weight[:, -self.width :].fill_diagonal_(1)
            else:
                nn.init.normal_(self.weight, std=(self.num_layers * self.width) ** -0.5)
        elif self.kind == "gate":
            nn.init.normal_(self.gate.weight, std=_GATE_STD)
            nn.init.zeros_(self.gate.bias)
        elif self.kind == "scalar_mix":
            nn.init.zeros_(self.mix)
            nn.init.ones_(self.gamma)
        if self.alpha is not None:
            nn.init.zeros_(self.alpha)

    def forward(
        self,
        hidden_states: Sequence[Tensor],
        attention_mask: Shaped[Tensor, "batch tokens"] | None = None,
        *,
        need_weights: bool = True,
    ) -> Fused:
        """Fuse the layers.

        Args:
            hidden_states: K layers (batch, tokens, width), the last one last.
            attention_mask: 0 on padding, which has weights of 0; its states are fused all the same.
            need_weights: whether to give the weights; those by channel are as large as all layers.

        Returns:
            States in the precision of the last layer, and weights.

        Raises:
            UserError: not K layers, not all of one shape, or NaN or infinity in one that is read
                (not looked for under torch.compile and torch.export).
        """
        stream = self.stream(need_weights=need_weights)
        if not torch.is_grad_enabled():
            for hidden in hidden_states:
                stream.add(hidden)
            return stream.result(attention_mask)
        states = []
        for hidden in hidden_states:
            if (read := stream.read(hidden)) is not None:
                stream.note(read)
                states.append(read)
        stream.check()
        fused, weights = self._plain(states)
        return self._finish(states[-1], fused, weights if need_weights else None, attention_mask)

    def stream(self, *, need_weights: bool = True) -> FusionStream:
        """Take up the layers of one batch one after the other, without gradients."""
        return FusionStream(self, need_weights)

    def is_identity(self) -> bool:
        """Whether the fusion gives the last layer to the bit, as at the start of init identity."""
        if self.position is not None:
            return self.position == self.num_layers - 1
        if self.alpha is not None:
            return self.alpha.item() == 0
        if self.kind != "concat":
            return False
        identity = torch.zeros_like(self.weight)
        identity[:, -self.width :].fill_diagonal_(1)
        return torch.equal(self.weight, identity) and not self.bias.any().item()

    def extra_repr(self) -> str:
        """What is printed of the module."""
        gate = f", gate_kind={self.gate_kind}, gate_shared={self.gate_shared}"
        shown = gate if self.kind == "gate" else ""
        return f"{self.kind}, {self.width}, layers={[*self.layers]}, init={self.init}{shown}"

    def _plain(self, states: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """The fusion as its equation has it, before gamma and alpha."""
        if self.position is not None:
            return states[0], None
        if self.kind == "concat":
            return F.linear(torch.cat(states, -1), self.weight, self.bias), None
        if self.kind == "max":
            return Maximum.apply(*states), None
        if self.kind == "gate":
            logits = [self.gate(hidden, i) for i, hidden in enumerate(states)]
            weights = self._gates(torch.stack(logits, -1))
        else:
            weights = self._shares(states[0])
        # a product takes the wider precision of its two, and keeps no wide copy of a layer
        total = weights[..., 0] * states[0]
        for i, hidden in enumerate(states[1:], 1):
            total = total + weights[..., i] * hidden
        return total, weights

    def _gates(
        self, logits: Float[Tensor, "batch tokens channels layers"]
    ) -> Float[Tensor, "batch tokens channels layers"]:
        """The gates of all layers, of one channel or of d."""
        return logits.sigmoid() if self.gate_kind == "sigmoid" else logits.softmax(-1)

    def _shares(self, like: Tensor) -> Float[Tensor, "1 layers"]:
        """The weights of a mean or a scalar mix, the same for all tokens."""
        if self.kind == "scalar_mix":
            return widen(self.mix).softmax(0)[None]
        dtype = wide(like.dtype)
        return like.new_full((1, self.num_layers), 1 / self.num_layers, dtype=dtype)

    def _finish(
        self, last: Tensor, fused: Tensor, weights: Tensor | None, mask: Tensor | None
    ) -> Fused:
        """Gamma, alpha, the precision of the last layer, and weights as they are given out."""
        if self.kind == "scalar_mix":
            fused = self.gamma * fused
        if self.alpha is not None:
            # a difference of two float16 may be too large for one, and 0 * inf is NaN
            fused = last + self.alpha * (widen(fused) - last)
        if mask is not None and mask.shape != last.shape[:2]:
            what = f"a mask of shape {(*mask.shape,)} for states of {(*last.shape,)}"
            raise UserError(what, where="attention_mask", fix="give (batch, tokens)")
        if weights is None or self.kind == "mean":
            return Fused(fused.to(last.dtype), None)
        if self.kind == "scalar_mix":
            return Fused(fused.to(last.dtype), weights[0])
        if mask is not None:
            weights = weights.masked_fill(~mask.bool()[..., None, None], 0)
        by_channel = self.gate_kind == "channel"
        return Fused(fused.to(last.dtype), weights if by_channel else weights.squeeze(-2))


class FusionStream:
    """A fusion that takes up one layer after the other and keeps none but the last.

    A concat adds one product to a sum, a max is a running maximum, a softmax gate a running mean
    in which the newest layer has the share exp(a_l) / (exp(a_1) + ... + exp(a_l)). Gradients do
    not flow.

    Example:
        >>> stream = fusion.stream()
        >>> for block in blocks:
        ...     stream.add(hidden := block(hidden))
        >>> fused = stream.result()

    Args:
        fusion: whose layers come.
        need_weights: whether the result has weights; the logits of all layers are kept for them.
    """

    def __init__(self, fusion: LayerFusion, need_weights: bool = True) -> None:
        self._fusion, self._need_weights = fusion, need_weights
        self._shape: torch.Size | None = None
        self._count = 0
        # Small tensors that are kept between the large ones of a forward pass scatter the heap,
        # and malloc hands pages back and fetches them again: what is kept has its place early.
        self._sums: Tensor | None = None
        self._logits: Tensor | None = None
        self._largest: Tensor | None = None
        self._sum: Tensor | None = None
        self._total: Tensor | None = None
        self._last: Tensor | None = None

    def read(self, hidden: Tensor) -> Tensor | None:
        """Count a layer, and give what the fusion reads of it: it normed, or None for nothing.

        Raises:
            UserError: one layer too many, of another width, or of another shape than those before.
        """
        fusion, i = self._fusion, self._count
        if i >= fusion.num_layers:
            raise UserError(f"more than the {fusion.num_layers} layers of the fusion are given")
        layer = fusion.layers[i]
        if hidden.ndim != 3 or hidden.shape[-1] != fusion.width:
            what = f"layer {layer} has states of shape {(*hidden.shape,)}"
            raise UserError(what, fix=f"the fusion takes (batch, tokens, {fusion.width})")
        if self._shape is not None and hidden.shape != self._shape:
            raise UserError(
                f"states change shape at layer {layer}: {(*self._shape,)} to {(*hidden.shape,)}",
                fix="an encoder whose tokens change in number cannot be fused",
            )
        self._shape = hidden.shape
        self._count += 1
        if fusion.position not in (None, i):
            return None
        norm = fusion._norm_each[0]
        return hidden if norm is None else norm(hidden)

    def note(self, numbers: Tensor) -> None:
        """Add up what each text has of the newest layer: `check` finds NaN and infinity in sums."""
        # Asking a traced or a meta tensor for its numbers fails.
        if torch.compiler.is_compiling() or numbers.is_meta:
            return
        if self._sums is None:
            shape = self._fusion.num_layers, len(numbers)
            self._sums = numbers.new_zeros(shape, dtype=wide(numbers.dtype))
        flat = numbers.detach().flatten(1)
        torch.sum(flat, 1, dtype=self._sums.dtype, out=self._sums[self._count - 1])

    @torch.no_grad()
    def add(self, hidden: Tensor) -> None:
        """Take up the next layer (batch, tokens, width).

        Its memory may be overwritten before the result, but for the last layer and "best_layer(i)".

        Raises:
            UserError: as `read`.
        """
        fusion, i = self._fusion, self._count
        read = self.read(hidden)
        if read is not None:
            self._total = self._take(read, i, self._total)
            if fusion.position is not None or i == fusion.num_layers - 1:
                self._last = read

    @torch.no_grad()
    def result(self, attention_mask: Tensor | None = None) -> Fused:
        """The fusion of the layers taken up, see `LayerFusion.forward`.

        Raises:
            UserError: not K layers, or NaN or infinity in one that is read.
        """
        self.check()
        fusion = self._fusion
        assert self._last is not None
        assert self._total is not None
        weights = None
        if self._logits is not None:
            weights = fusion._gates(self._logits)
        elif fusion.kind == "scalar_mix" and self._need_weights:
            weights = fusion._shares(self._last)
        return fusion._finish(self._last, self._total, weights, attention_mask)

    def check(self) -> None:
        """Raise a UserError where layers are missing, or one that is read holds no finite number.

        All are looked at together: the processor waits for an accelerator once.
        """
        fusion = self._fusion
        if self._count != fusion.num_layers:
            raise UserError(f"{self._count} layers are given, the fusion has {fusion.num_layers}")
        if self._sums is None or (finite := self._sums.isfinite()).all():
            return
        i, text = (~finite).nonzero()[0].tolist()
        what = f"layer {fusion.layers[i]} holds NaN, infinity or numbers near it in text {text}"
        fix = "run the encoder in float32, or leave that layer out of layers"
        raise UserError(f"{what} of the batch", fix=fix)

    def _take(self, hidden: Tensor, i: int, total: Tensor | None) -> Tensor:
        """What is kept after layer i, made of what was kept before it."""
        fusion = self._fusion
        if fusion.kind != "gate":
            self.note(hidden)
        if fusion.position is not None:
            return hidden
        if fusion.kind == "max":
            if total is None:
                return hidden.clone()
            return torch.maximum(total, hidden, out=total if total.dtype == hidden.dtype else None)
        if fusion.kind == "concat":
            weight = fusion.weight[:, i * fusion.width : (i + 1) * fusion.width]
            if total is None:
                return widen(F.linear(hidden, weight)).add_(fusion.bias)
            return add_product(total, hidden, weight)
        if fusion.kind != "gate":
            share = fusion._shares(hidden)[..., i]
            return hidden * share if total is None else total.addcmul_(hidden, share)
        logits: Tensor = fusion.gate(hidden, i)
        self.note(logits)  # fewer numbers than the layer's, and NaN or infinity there is one here
        if self._need_weights:
            if self._logits is None:
                self._logits = logits.new_empty(*logits.shape, fusion.num_layers)
            self._logits[..., i] = logits
        if fusion.gate_kind == "sigmoid":
            share = logits.sigmoid()
            return hidden * share if total is None else total.addcmul_(hidden, share)
        share = self._newest_share(logits)
        if total is None:
            return hidden.to(wide(hidden.dtype), copy=True)
        return total.lerp_(hidden.to(total.dtype), share.to(total.dtype))

    def _newest_share(self, logits: Tensor) -> Tensor:
        """The softmax weight of the newest layer among those so far."""
        # Relative to the largest: the log of a sum of exponentials loses digits of large logits.
        if self._largest is None or self._sum is None:
            self._largest, self._sum = logits.clone(), torch.ones_like(logits)
            return self._sum
        largest = torch.maximum(self._largest, logits)
        newest = (logits - largest).exp_()
        self._sum.mul_(self._largest.sub_(largest).exp_()).add_(newest)
        self._largest.copy_(largest)
        return newest / self._sum
