"""Similarities of images to many prompts, in which equal beginnings are looked at once.

A text tower that only looks back gives prompts of one beginning the same tokens there. A patch's
best word of a prompt is thus the maximum along a path in the tree of all prompts, and a node's
maximum serves every prompt that goes through it (exact). Prompts that share nothing make a forest
of single paths: packed prompts without padding.

Legend of the shape names: `nodes` of one level, `columns` are the patches of some images.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

_CPU_TILE, _GPU_TILE = 1 << 22, 1 << 28  # bytes of the similarities of one level


class Level(NamedTuple):
    """The tokens that stand at one place of their prompts.

    Attributes:
        tokens: of its nodes, where they are among all tokens of all prompts.
        parents: the node of the level above that each one follows; empty for the first level.
        ends: nodes with which prompts end.
        prompts: the prompts that end with them.
    """

    tokens: Int[ndarray, " nodes"]
    parents: Int[ndarray, " followers"]
    ends: Int[ndarray, " ending"]
    prompts: Int[ndarray, " ending"]


def grow(
    ids: Int[ndarray, "prompts length"],
    mask: Bool[ndarray, "prompts length"],
    shared: Int[ndarray, " prompts"],
) -> list[Level]:
    """Merge what sorted prompts have in common.

    Args:
        ids: of the prompts, in lexicographic order.
        mask: True where a token counts; the others are no nodes.
        shared: how many positions of each prompt may be merged with the prompt before it.

    Returns:
        The levels from the first tokens on. Tokens are counted prompt by prompt, without those
        that do not count.
    """
    lengths, positions = mask.sum(1), np.argsort(~mask, axis=1, kind="stable")
    begun = np.arange(ids.shape[1]) >= shared[:, None]
    begun[0] = True
    begun[1:] |= np.logical_or.accumulate(ids[1:] != ids[:-1], axis=1)
    path = np.take_along_axis(begun.cumsum(0), positions, 1)
    counts = np.arange(ids.shape[1]) < lengths[:, None]
    new = np.ones_like(counts)
    new[1:] = (path[1:] != path[:-1]) | (positions[1:] != positions[:-1]) | ~counts[:-1]
    new = np.logical_or.accumulate(new, axis=1) & counts
    number, first = new.cumsum(0) - 1, np.cumsum(lengths) - lengths
    levels = []
    for place in range(int(lengths.max())):
        rows = np.flatnonzero(new[:, place])
        parents = number[rows, place - 1] if place else np.empty(0, np.int64)
        done = np.flatnonzero(lengths == place + 1)
        levels.append(Level(first[rows] + place, parents, number[done, place], done))
    return levels


class PromptForest:
    """Prompts whose equal beginnings are stored once.

    Args:
        tokens: of all prompts, normalised, one prompt behind the other without padding.
        levels: what `grow` made of the prompts.
        dtype: in which tokens are kept; products are taken in float32 or better.
    """

    def __init__(
        self,
        tokens: Float[Tensor, "total dim"],
        levels: list[Level],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        def put(indices: ndarray) -> Tensor:
            return torch.from_numpy(indices).to(tokens.device)

        self.tokens = [tokens.index_select(0, put(level.tokens)).to(dtype) for level in levels]
        self.parents = [put(level.parents) for level in levels]
        self.ends = [(put(level.ends), put(level.prompts)) for level in levels]
        self.prompts = sum(len(level.prompts) for level in levels)

    @property
    def nodes(self) -> int:
        """Tokens that are stored."""
        return sum(len(tokens) for tokens in self.tokens)

    def scores(
        self,
        image_tokens: Float[Tensor, "images patches dim"],
        weights: Float[Tensor, "images patches"],
    ) -> Float[Tensor, "images prompts"]:
        """s^I of every image and prompt: the weighted mean over patches of their best words.

        Args:
            image_tokens: normalised.
            weights: 1 / n on each image's n valid patches, 0 on the others.
        """
        images, patches, _ = image_tokens.shape
        dtype = torch.promote_types(image_tokens.dtype, torch.float32)
        result = image_tokens.new_empty((images, self.prompts), dtype=dtype)
        widest = max(len(tokens) for tokens in self.tokens)
        tile = _CPU_TILE if image_tokens.device.type == "cpu" else _GPU_TILE
        step = max(1, tile // (widest * patches * dtype.itemsize))
        room = result.new_empty((3, widest * min(step, images) * patches))
        with torch.autocast(image_tokens.device.type, enabled=False):
            for first in range(0, images, step):
                part = slice(first, first + step)
                self._score(image_tokens[part].to(dtype), weights[part], room, result[part])
        return result

    def _score(
        self,
        v_bnd: Float[Tensor, "images patches dim"],
        w_bn: Float[Tensor, "images patches"],
        room: Float[Tensor, "3 cells"],
        result: Float[Tensor, "images prompts"],
    ) -> None:
        """Fill in the scores of a few images, level by level in the given room."""
        images, patches, dim = v_bnd.shape
        v_dk, columns = v_bnd.reshape(-1, dim).mT, images * patches
        above, other, spare = room
        for tokens, parents, (ends, prompts) in zip(
            self.tokens, self.parents, self.ends, strict=True
        ):
            here, inherited = (
                cells[: len(tokens) * columns].view(-1, columns) for cells in (other, spare)
            )
            torch.mm(tokens.to(v_dk.dtype), v_dk, out=here)
            if len(parents):
                rows = above[: above.numel() // columns * columns].view(-1, columns)
                torch.index_select(rows, 0, parents, out=inherited)
                torch.maximum(here, inherited, out=here)
            if len(ends):
                best = here.index_select(0, ends).unflatten(1, (images, patches))
                result[:, prompts] = (best * w_bn).sum(2).mT
            above, other = other, above
