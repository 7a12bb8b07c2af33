"""The small post-norm encoder that is trained from scratch, one or several at once.

Shapes: M models (an axis that is there only for several), b texts, n tokens, d width, h heads,
e = d / h, L blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from bert_oversmoothing.synthetic import PROBE_TOKENS, PROBE_VOCABULARY

ShareAttention = Literal["none", "first"]


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes and start of an `Encoder`; the defaults are those of the odd-run task.

    Attributes:
        vocab_size: number of token ids.
        max_tokens: number of positions.
        width: d.
        heads: h, a divisor of `width`.
        ff_width: of the hidden layer of FF.
        layers: L.
        std: of all weight matrices, N(0, std²); biases start at 0. It decides how much an untrained
            encoder smooths.
        embedding_std: of the word embeddings; None means `std`.
        position_std: of the positions; None means `std`.
        eps: of the layer norms.
        share_attention: "first" computes the attention matrices in the first block and uses them
            in all, as a graph network with one adjacency does.
        deepnorm: residuals times (2L)^(1/4), and weights of values, outputs and FF start smaller
            by (8L)^(-1/4) (Wang et al., "DeepNet", 2022).

    Raises:
        ValueError: sizes that are not positive, or a width that the heads do not divide.
    """

    vocab_size: int = 23
    max_tokens: int = 16
    width: int = 32
    heads: int = 4
    ff_width: int = 64
    layers: int = 12
    std: float = 0.2
    embedding_std: float | None = None
    position_std: float | None = None
    eps: float = 1e-12
    share_attention: ShareAttention = "none"
    deepnorm: bool = False

    def __post_init__(self) -> None:
        sizes = (self.vocab_size, self.max_tokens, self.width, self.heads, self.ff_width)
        if min(*sizes, self.layers) < 1 or self.width % self.heads:
            raise ValueError(f"positive sizes and a width that the heads divide, not {self}")
        if self.share_attention not in get_args(ShareAttention):
            raise ValueError(
                f"share_attention must be one of {get_args(ShareAttention)}, "
                f"not {self.share_attention!r}"
            )

    @property
    def residual_scale(self) -> float:
        """Factor of the residual."""
        return (2 * self.layers) ** 0.25 if self.deepnorm else 1.0

    @property
    def scaled_std(self) -> float:
        """Deviation of the weights of values, outputs and FF."""
        return self.std * (8 * self.layers) ** -0.25 if self.deepnorm else self.std


def probe_config(std: float) -> EncoderConfig:
    """The encoder of the frozen probe: d = 48, d_ff = 4 d, words N(0, 1), positions N(0, 0.25).

    Args:
        std: of the weight matrices; 0.05 hardly smooths, 0.2 smooths all away.
    """
    return EncoderConfig(
        vocab_size=PROBE_VOCABULARY,
        max_tokens=PROBE_TOKENS,
        width=48,
        ff_width=192,
        std=std,
        embedding_std=1.0,
        position_std=0.5,
    )


class NormInputs(NamedTuple):
    """What the two layer norms of a block are given: Attn(H), and FF(LN1(Attn(H)))."""

    attention: Float[Tensor, "*M b n d"]
    feed_forward: Float[Tensor, "*M b n d"]


class EncoderOutput(NamedTuple):
    """What an encoder makes of a batch.

    Attributes:
        hidden_states: H_0, the normalised embeddings, to H_L.
        attentions: of every block, where they were asked for; rows sum to 1.
        norm_inputs: of every block, where they were asked for.
    """

    hidden_states: tuple[Float[Tensor, "*M b n d"], ...]
    attentions: tuple[Float[Tensor, "*M b h n n"], ...] | None
    norm_inputs: tuple[NormInputs, ...] | None


class _Linear(nn.Module):
    """y = x W^T + b, for each model its own W and b."""

    def __init__(self, models: tuple[int, ...], in_: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*models, out, in_))
        self.bias = nn.Parameter(torch.zeros(*models, out))

    def forward(self, x: Float[Tensor, "*M b n i"]) -> Float[Tensor, "*M b n o"]:
        if self.weight.dim() == 2:
            return F.linear(x, self.weight, self.bias)
        y = torch.baddbmm(self.bias[:, None], x.flatten(1, 2), self.weight.mT)
        return y.unflatten(1, x.shape[1:3])


class _Norm(nn.Module):
    """Layer norm, for each model its own gain and offset."""

    def __init__(self, models: tuple[int, ...], width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(*models, width))
        self.bias = nn.Parameter(torch.zeros(*models, width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*M b n d"]) -> Float[Tensor, "*M b n d"]:
        width = x.shape[-1:]
        if self.weight.dim() == 1:
            return F.layer_norm(x, width, self.weight, self.bias, self.eps)
        y = F.layer_norm(x, width, eps=self.eps)
        return torch.addcmul(self.bias[:, None, None], y, self.weight[:, None, None])


class _Block(nn.Module):
    """H' = LN2(FF(LN1(Attn(H)))); without `own_attention` it is given its attention matrices."""

    def __init__(self, config: EncoderConfig, models: tuple[int, ...], own_attention: bool) -> None:
        super().__init__()
        width = config.width
        self.heads, self.residual_scale = config.heads, config.residual_scale
        self.query_key = _Linear(models, width, 2 * width) if own_attention else None
        self.value = _Linear(models, width, width)
        self.output = _Linear(models, width, width)
        self.norm1 = _Norm(models, width, config.eps)
        self.up = _Linear(models, width, config.ff_width)
        self.down = _Linear(models, config.ff_width, width)
        self.norm2 = _Norm(models, width, config.eps)

    def forward(
        self,
        hidden: Float[Tensor, "*M b n d"],
        bias: Float[Tensor, "*#M b 1 1 n"] | None,
        attention: Float[Tensor, "*M b h n n"] | None,
    ) -> tuple[Float[Tensor, "*M b n d"], Float[Tensor, "*M b h n n"], NormInputs]:
        if self.query_key is not None:
            attention = self._attention(self.query_key(hidden), bias)
        assert attention is not None
        mixed = (attention @ self._heads(self.value(hidden))).transpose(-3, -2).flatten(-2)
        attended = torch.add(self.output(mixed), hidden, alpha=self.residual_scale)
        middle = self.norm1(attended)
        expanded = self.down(F.gelu(self.up(middle)))
        forwarded = torch.add(expanded, middle, alpha=self.residual_scale)
        return self.norm2(forwarded), attention, NormInputs(attended, forwarded)

    def _attention(
        self, query_key: Float[Tensor, "*M b n qk"], bias: Float[Tensor, "*#M b 1 1 n"] | None
    ) -> Float[Tensor, "*M b h n n"]:
        query, key = map(self._heads, query_key.chunk(2, dim=-1))
        logits = query * query.shape[-1] ** -0.5 @ key.mT
        return (logits if bias is None else logits + bias).softmax(-1)

    def _heads(self, x: Float[Tensor, "*M b n d"]) -> Float[Tensor, "*M b h n e"]:
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)


class Encoder(nn.Module):
    """BERT's encoder without dropout and token types, from scratch.

    Several models at once are one module whose every parameter has a leading axis of models:
    their products are one `baddbmm`, which at these widths is faster than one model after the
    other. Optimisers that work element by element train them as if each were alone; clip their
    gradients with `clip_per_model`.

    Args:
        config: sizes and start.
        models: how many, or None for a single one, whose tensors have no such axis.
        generator: of the start; None takes torch's own.

    Raises:
        ValueError: less than one model.

    Example:
        >>> encoder = Encoder(EncoderConfig(vocab_size=23, max_tokens=16))
        >>> len(encoder(torch.randint(23, (2, 16))).hidden_states)
        13
    """

    def __init__(
        self,
        config: EncoderConfig,
        *,
        models: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if models is not None and models < 1:
            raise ValueError(f"at least one model, not {models}")
        self.config, self.models = config, models
        axis = () if models is None else (models,)
        self.word = nn.Parameter(torch.empty(*axis, config.vocab_size, config.width))
        self.position = nn.Parameter(torch.empty(*axis, config.max_tokens, config.width))
        self.norm = _Norm(axis, config.width, config.eps)
        self.blocks = nn.ModuleList(
            _Block(config, axis, own_attention=index == 0 or config.share_attention == "none")
            for index in range(config.layers)
        )
        self._reset(generator)

    @torch.no_grad()
    def _reset(self, generator: torch.Generator | None) -> None:
        config = self.config
        for parameter, std in (
            (self.word, config.embedding_std),
            (self.position, config.position_std),
        ):
            parameter.normal_(0, config.std if std is None else std, generator=generator)
        for name, module in self.named_modules():
            if isinstance(module, _Linear):
                std = config.std if name.endswith("query_key") else config.scaled_std
                module.weight.normal_(0, std, generator=generator)

    def forward(
        self,
        ids: Int64[Tensor, "*T b n"],
        mask: Bool[Tensor, "*T b n"] | None = None,
        *,
        output_attentions: bool = False,
        output_norm_inputs: bool = False,
    ) -> EncoderOutput:
        """All hidden states.

        Args:
            ids: token ids; for several models without an axis of models all read the same texts.
            mask: True where a token is real, of the shape of `ids`; None if all are.
            output_attentions: keep the attention matrices.
            output_norm_inputs: keep what the layer norms are given.

        Raises:
            ValueError: more tokens than positions, or another number of models.
        """
        states, attentions, inputs = [self._embed(ids)], [], []
        bias = None
        if mask is not None:
            # a finite number, so that a text without any real token stays finite
            bias = torch.zeros_like(mask, dtype=states[0].dtype)
            bias = bias.masked_fill(~mask, torch.finfo(bias.dtype).min)[..., None, None, :]
        attention = None
        for block in self.blocks:
            hidden, attention, given = block(states[-1], bias, attention)
            states.append(hidden)
            attentions.append(attention)
            inputs.append(given)
        return EncoderOutput(
            tuple(states),
            tuple(attentions) if output_attentions else None,
            tuple(inputs) if output_norm_inputs else None,
        )

    def _embed(self, ids: Int64[Tensor, "*T b n"]) -> Float[Tensor, "*M b n d"]:
        if ids.shape[-1] > self.config.max_tokens:
            raise ValueError(f"{ids.shape[-1]} tokens, and only {self.config.max_tokens} positions")
        position = self.position[..., : ids.shape[-1], :]
        if self.models is None:
            return self.norm(F.embedding(ids, self.word) + position)
        if ids.dim() == 3 and len(ids) != self.models:
            raise ValueError(f"texts of {len(ids)} models for {self.models}")
        first = torch.arange(self.models, device=ids.device)[:, None, None] * self.config.vocab_size
        # one table under the other: the gradient of such a look-up is faster than that of indexing
        word = F.embedding(ids + first, self.word.flatten(0, 1))
        return self.norm(word + position[:, None])


@torch.no_grad()
def stack(encoders: Sequence[Encoder]) -> Encoder:
    """Several single encoders of one configuration as one, with their parameters copied.

    Raises:
        ValueError: none, different configurations, or one that is several already.
    """
    if not encoders or any(
        e.config != encoders[0].config or e.models is not None for e in encoders
    ):
        raise ValueError("single encoders of one configuration can be stacked, at least one")
    stacked = Encoder(encoders[0].config, models=len(encoders)).to(encoders[0].word)
    states = [encoder.state_dict() for encoder in encoders]
    stacked.load_state_dict({k: torch.stack([state[k] for state in states]) for k in states[0]})
    return stacked


@torch.no_grad()
def unstack(encoder: Encoder) -> list[Encoder]:
    """The single encoders of several, with their parameters copied.

    Raises:
        ValueError: it is a single one.
    """
    if encoder.models is None:
        raise ValueError("a single encoder cannot be unstacked")
    singles = []
    for index in range(encoder.models):
        single = Encoder(encoder.config).to(encoder.word)
        single.load_state_dict({k: v[index] for k, v in encoder.state_dict().items()})
        singles.append(single)
    return singles


@torch.no_grad()
def clip_per_model(parameters: Iterable[nn.Parameter], max_norm: float) -> Float[Tensor, " M"]:
    """Clips the gradient of each of several models to a norm of its own, in place.

    Args:
        parameters: each with a leading axis of models; those without a gradient are left out.
        max_norm: largest norm, above 0.

    Returns:
        The norms before clipping.

    Raises:
        ValueError: no parameter has a gradient.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        raise ValueError("no parameter has a gradient")
    square = torch.stack([g.reshape(len(g), -1).square().sum(1) for g in gradients]).sum(0)
    norm = square.sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1)
    for gradient in gradients:
        gradient.mul_(factor.view(-1, *[1] * (gradient.dim() - 1)))
    return norm
