"""The blocks of a model as trials of the theorem, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bert_oversmoothing.analysis.corpus import Corpus, Ready, Texts, longest_text
from bert_oversmoothing.analysis.sample import draw
from bert_oversmoothing.families import Encoder, read_encoder
from bert_oversmoothing.theorem import BlockDesign, Trial
from tenfold.errors import UserError

TOKENS = 32
"""Of a text of random words, at most."""


def model_trials(
    model: PreTrainedModel,
    texts: Sequence[str] | None = None,
    tokenizer: Any = None,
    *,
    count: int = 16,
    seed: int = 0,
    max_length: int = 128,
) -> list[list[Trial]]:
    """What every block does to d_M on some texts, beside its bound; a list a block.

    The model is turned to float64, so that a bound is not broken by rounding. Of the trials sigma
    and the gain of attention are not measured (NaN); their std is that of all matrices of a block.

    Args:
        model: any encoder with a bound.
        texts: to be tried; random words, or random images, if left out.
        tokenizer: of the texts.
        count: how many random texts.
        seed: of these.
        max_length: tokens above which a text is cut.

    Raises:
        UserError: no block has a bound, no text has two tokens, or there are no attention maps.
    """
    inner = model.model if model.config.model_type == "fusion" else model
    assert isinstance(inner, PreTrainedModel)
    encoder = read_encoder(inner.double())
    if all(encoder.unbounded(index) for index in range(len(encoder.blocks))):
        raise UserError(f"no bound: {encoder.unbounded(0)}", where=model.config.model_type)
    corpus: Corpus
    if texts is None:
        corpus = Ready([_random_inputs(encoder, count, seed)])
    else:
        corpus = Texts(texts, tokenizer, longest_text(encoder.model, tokenizer, max_length))
    if not corpus.usable:
        raise UserError("no text has two tokens or more", fix="give texts of some words")
    drawn = draw(encoder, corpus, corpus.usable, ("bound",), batch_size=16, attention="eager")
    if drawn.bound is None:
        raise UserError("no block has a bound", where=str(encoder.activation))
    return [
        [
            _trial(_design(encoder, index, tokens), value)
            for tokens, value in zip(drawn.lengths, value_t3.tolist(), strict=True)
            if value[0] == value[0] and value[2] == value[2]  # NaN: no bound, or nothing to bound
        ]
        for index, value_t3 in enumerate(drawn.bound.per_text().unbind(1))
    ]


def _random_inputs(encoder: Encoder, count: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    model = encoder.model
    if model.main_input_name == "pixel_values":
        size = model.config.image_size
        side = (size, size) if isinstance(size, int) else tuple(size)
        channels = getattr(model.config, "num_channels", 3)
        return {"pixel_values": torch.randn(count, channels, *side, generator=generator)}
    words = len(model.get_input_embeddings().get_parameter("weight"))
    tokens = longest_text(model, None, TOKENS)
    # The first ids are special ones, padding among them.
    first = min(5, words - 1)
    ids = torch.randint(first, words, (count, tokens), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _design(encoder: Encoder, index: int, tokens: int) -> BlockDesign:
    assert encoder.order is not None
    matrices = [p for p in encoder.blocks[index].module.parameters() if p.ndim > 1]
    std = float(torch.cat([p.detach().flatten() for p in matrices]).std())
    norms = [norm for norm in encoder.blocks[index].norms if norm is not None]
    return BlockDesign(
        tokens=tokens,
        width=encoder.width,
        heads=encoder.heads or 1,
        order=encoder.order,
        activation=encoder.activation or "",
        std=float(f"{std:.2g}"),
        norm="layer" if all(norm.centred for norm in norms) else "rms",
    )


def _trial(design: BlockDesign, value: Sequence[float]) -> Trial:
    nan = float("nan")
    tight, paper, ratio = value
    return Trial(design, ratio, tight, paper, nan, nan, nan, nan)
