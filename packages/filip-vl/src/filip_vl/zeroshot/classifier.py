"""Zero-shot classification: images against the prompts of every class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy import ndarray
from torch import Tensor

from filip_vl.model import FilipModel, TokenBatch
from filip_vl.model.tokens import crop_to_longest
from filip_vl.zeroshot.forest import PromptForest, grow
from filip_vl.zeroshot.prompts import SLOT, fill, read_classes, read_templates

Ensemble = Literal["similarity", "none"]
"""Mean of the similarities to all prompts of a class, or the first template alone."""

Sharing = Literal["none", "prefix", "tree"]
"""Whose tokens are looked at once: nobody's, those before the label, all that are equal."""

_BLOCK = 1024  # prompts of one forest; what they share with other blocks is stored again


class TopClasses(NamedTuple):
    """The best classes of images, best first.

    Attributes:
        scores: of the classes.
        classes: their indices.
        names: their names.
    """

    scores: Float[Tensor, "images k"]
    classes: Int64[Tensor, "images k"]
    names: list[list[str]]


class ZeroShotClassifier:
    """Scores images against classes that are given by their names alone.

    A class's score is the mean of s^I over its prompts (section 3.7). Similarities are averaged,
    never token vectors, whose positions mean different things in different prompts. All prompts
    are encoded once, in the making.

    Example:
        >>> classifier = ZeroShotClassifier(model, ["cat", "dog"], "imagenet")
        >>> classifier.top(pixels, k=1).names
        [['cat'], ['dog'], ['dog']]

    Args:
        model: with a tokenizer; it is used as it is, so put it in eval mode.
        classes: names, or where they are: see `read_classes`.
        templates: with `{}` for the name, or where they are: see `read_templates`.
        ensemble: of the prompts of a class.
        sharing: of tokens between prompts, which changes the time alone. A model whose captions
            have one token shares none.
        dtype: in which the tokens of the prompts are kept; float16 halves the memory, and moves
            scores by some 1e-5.
        batch_size: prompts that are encoded at a time.

    Attributes:
        classes: the names.
        prompts: all of them, class by class.

    Raises:
        ValueError: no class, duplicate classes, no template, templates without `{}`, prompts
            without a token that counts, an option that does not exist, a model without a tokenizer.
        UserError: classes or templates that are not where they should be.
    """

    def __init__(
        self,
        model: FilipModel,
        classes: str | Path | Sequence[str],
        templates: str | Path | Sequence[str] = "imagenet",
        *,
        ensemble: Ensemble = "similarity",
        sharing: Sharing = "tree",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 256,
    ) -> None:
        options = (("ensemble", ensemble, Ensemble), ("sharing", sharing, Sharing))
        for option, value, known in options:
            if value not in get_args(known):
                raise ValueError(f"{option} must be one of {get_args(known)}, got {value!r}")
        if model.tokenizer is None:
            raise ValueError("prompts need a tokenizer: set model.tokenizer")
        self.model = model
        self.classes = read_classes(classes)
        self.templates = read_templates(templates)[: 1 if ensemble == "none" else None]
        self.prompts = [fill(t, name) for name in self.classes for t in self.templates]
        context = model.config.context_length
        ids, lengths = model.tokenizer.encode(self.prompts, context)
        config = model.config
        dropped = 0 if config.pooled else int(config.drop_bos) + int(config.drop_eos)
        empty = [p for p, n in zip(self.prompts, lengths.tolist(), strict=True) if n <= dropped]
        if empty:
            raise ValueError(f"prompts without a token that counts: {empty[:5]}")
        shared = self._shared(sharing, context)
        self._order = np.lexsort(ids.numpy().T[::-1])
        self._forests = []
        for first in range(0, len(ids), _BLOCK):
            rows = self._order[first : first + _BLOCK]
            forest = encode_prompts(
                model, ids[torch.from_numpy(rows)], shared[rows], dtype, batch_size
            )
            self._forests.append(forest)

    def scores(
        self, images: Float[Tensor, "images 3 height width"] | TokenBatch
    ) -> Float[Tensor, "images classes"]:
        """Mean of s^I over the prompts of every class, -1..1.

        Args:
            images: pixels as `FilipModel.encode_image` takes them, or the tokens that it gave.
        """
        by_prompt = self.prompt_scores(images)
        return by_prompt.unflatten(1, (len(self.classes), len(self.templates))).mean(2)

    @torch.no_grad()
    def prompt_scores(
        self, images: Float[Tensor, "images 3 height width"] | TokenBatch
    ) -> Float[Tensor, "images prompts"]:
        """s^I of every single prompt, in the order of `prompts`; see `scores`."""
        batch = self.model.encode_image(images) if isinstance(images, Tensor) else images
        tokens = batch.normalized()
        weights = batch.mask.to(tokens.dtype) / batch.mask.sum(1, keepdim=True)
        found = torch.cat([forest.scores(tokens, weights) for forest in self._forests], 1)
        result = torch.empty_like(found)
        result[:, torch.from_numpy(self._order).to(found.device)] = found
        return result

    def top(
        self, images: Float[Tensor, "images 3 height width"] | TokenBatch, k: int = 5
    ) -> TopClasses:
        """The `k` best classes of every image, or all if there are fewer; the first of equals."""
        scores, classes = (x[:, :k] for x in self.scores(images).sort(descending=True, stable=True))
        names = [[self.classes[index] for index in row] for row in classes.tolist()]
        return TopClasses(scores, classes, names)

    def _shared(self, sharing: Sharing, context: int) -> ndarray:
        """How many positions of each prompt may be merged with other prompts."""
        if sharing != "prefix":
            return np.full(len(self.prompts), context if sharing == "tree" else 0)
        assert self.model.tokenizer is not None
        starts = [template.partition(SLOT)[0] for template in self.templates]
        lengths = self.model.tokenizer.encode(starts, context).lengths.numpy() - 1  # no end
        return np.tile(lengths, len(self.classes))


@torch.no_grad()
def encode_prompts(
    model: FilipModel,
    ids: Int64[Tensor, "prompts length"],
    shared: ndarray,
    dtype: torch.dtype,
    batch_size: int,
) -> PromptForest:
    """Encode sorted prompts, and keep what they have in common once.

    Args:
        model: its text tower.
        ids: of the prompts, in lexicographic order.
        shared: see `grow`.
        dtype: in which tokens are kept.
        batch_size: prompts that are encoded at a time.
    """
    device = model.text_projection.device
    masks = np.zeros(ids.shape, dtype=bool)
    tokens = []
    for first in range(0, len(ids), batch_size):
        part = ids[first : first + batch_size]
        text = model.encode_text(crop_to_longest(part, model.config.end).to(device))
        masks[first : first + len(part), : text.mask.shape[1]] = text.mask.cpu()
        tokens.append(text.normalized()[text.mask])
    if model.config.pooled:  # its only token looks back at the whole prompt
        shared = np.zeros_like(shared)
    return PromptForest(torch.cat(tokens), grow(ids.numpy(), masks, shared), dtype)
