"""Which word every patch of an image chose, and how much each word says for the caption.

Sections 3.4 and 3.9; the shape name `tokens` counts the positions of a caption.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from filip_vl.alignment.words import Word, caption_words, label_positions
from filip_vl.model import FilipModel, TokenBatch
from tenfold.errors import UserError


@dataclass(frozen=True)
class Alignment:
    """An image and a caption, token by token.

    Attributes:
        similarities: of every token of the caption with every patch, -1..1; -inf for tokens that do
            not count.
        strings: what the tokens stand for.
        words: the caption's words, with their tokens.
        label: positions of the class word's tokens; empty where none is asked for.
        s_i2t: mean over the image's tokens of their best word.
        s_t2i: mean over the caption's tokens of their best patch.
        shares: of every token in `s_t2i`, whose sum they are; 0 for tokens that do not count.
    """

    similarities: Float[Tensor, "tokens rows columns"]
    strings: list[str]
    words: list[Word]
    label: tuple[int, ...]
    s_i2t: float
    s_t2i: float
    shares: Float[Tensor, " tokens"]

    @property
    def index(self) -> Int64[Tensor, "rows columns"]:
        """a(k), the token that each patch chose; the first one of equals."""
        return self.similarities.argmax(0)

    @property
    def similarity(self) -> Float[Tensor, "rows columns"]:
        """Of each patch with the token that it chose."""
        return self.similarities.amax(0)

    @property
    def on_label(self) -> Bool[Tensor, "rows columns"]:
        """Patches that chose a token of the label."""
        return torch.isin(self.index, torch.tensor(self.label, device=self.similarities.device))

    def word_map(self, positions: tuple[int, ...]) -> Float[Tensor, "rows columns"]:
        """Similarity of each patch with the best of some tokens, such as those of a word."""
        return self.similarities[list(positions)].amax(0)

    @property
    def word_maps(self) -> Float[Tensor, "words rows columns"]:
        """`word_map` of every word."""
        return torch.stack([self.word_map(word.positions) for word in self.words])

    @property
    def word_shares(self) -> dict[str, float]:
        """What every token or word adds to `s_t2i`, in the order of the caption.

        Start and end are there by their names; a word that comes again has its number behind it.
        """
        rows = [(min(word.positions), word.text, word.positions) for word in self.words]
        spoken = {n for word in self.words for n in word.positions}
        rows += [(n, name, (n,)) for n, name in enumerate(self.strings) if n not in spoken]
        shares: dict[str, float] = {}
        for _, name, positions in sorted(rows):
            again = sum(other == name or other.startswith(f"{name} (") for other in shares)
            key = f"{name} ({again + 1})" if again else name
            shares[key] = float(self.shares[list(positions)].sum())
        return shares

    def to_json(self) -> dict[str, Any]:
        """The grid of patches as plain values: token index, token string, similarity."""
        patches = [
            [
                {"index": n, "token": self.strings[n], "similarity": round(value, 6)}
                for n, value in zip(indices, values, strict=True)
            ]
            for indices, values in zip(self.index.tolist(), self.similarity.tolist(), strict=True)
        ]
        return {
            "tokens": self.strings,
            "label": list(self.label),
            "s_i2t": self.s_i2t,
            "s_t2i": self.s_t2i,
            "patches": patches,
        }


@torch.no_grad()
def alignment_map(
    model: FilipModel,
    pixels: Float[Tensor, "3 height width"],
    text: str,
    label: str | None = None,
) -> Alignment:
    """Which word of a text every patch of an image chose.

    Tokens are taken even of a pooled model, which was not trained to have useful ones.

    Example:
        >>> found = alignment_map(model, pixels, "a photo of a balloon.", "balloon")
        >>> found.index  # 5 where a patch chose "balloon"

    Args:
        model: with a tokenizer, in eval mode.
        pixels: as `FilipModel.encode_image` takes them.
        text: such as "a photo of a balloon."
        label: words of the text whose patches are wanted.

    Raises:
        ValueError: a model without a tokenizer, or whose image tokens are no patches.
        UserError: the label is not in the text.
    """
    if model.tokenizer is None:
        raise ValueError("texts need a tokenizer: set model.tokenizer")
    context = model.config.context_length
    label_at = () if label is None else label_positions(model.tokenizer, text, label, context)
    words = caption_words(model.tokenizer, text, context)
    return align_tokens(
        model.image_tokens(pixels[None]), model.text_tokens([text]), words, label_at
    )


def align_tokens(
    image: TokenBatch, text: TokenBatch, words: list[Word], label: tuple[int, ...] = ()
) -> Alignment:
    """As `alignment_map`, of tokens that are at hand.

    Args:
        image: one image, with its grid.
        text: one caption, with its strings.
        words: the caption's words.
        label: positions of the tokens whose patches are wanted.

    Raises:
        ValueError: not one image and one caption, or tokens that are no patches.
    """
    if len(image.tokens) != 1 or len(text.tokens) != 1 or text.strings is None:
        raise ValueError("an alignment is of one image and one caption with its strings")
    if image.grid is None:
        raise ValueError("the image's tokens are no patches, so that there is nothing to align")
    strings, mask = text.strings[0], text.mask[0]
    t_md, v_nd = text.normalized()[0], image.normalized()[0]
    s_mn = (t_md @ v_nd.mT).masked_fill(~mask[:, None], -torch.inf)
    counted = s_mn.masked_fill(~image.mask, -torch.inf)
    shares = torch.where(mask, counted.amax(1), 0) / mask.sum()
    rows, columns = image.grid
    patches = s_mn[: len(strings), -rows * columns :].unflatten(1, (rows, columns))
    return Alignment(
        similarities=patches,
        strings=strings,
        words=words,
        label=label,
        s_i2t=float(s_mn.amax(0)[image.mask[0]].mean()),
        s_t2i=float(shares.sum()),
        shares=shares[: len(strings)],
    )


@torch.no_grad()
def attention_map(
    model: FilipModel,
    pixels: Float[Tensor, "3 height width"],
    patches: Bool[Tensor, "rows columns"],
) -> Float[Tensor, "rows columns"]:
    """Where some patches look in the last block of the image tower (appendix of the paper).

    Self-attention, averaged over the heads and over the patches, without the class token's column.

    Args:
        model: its image tower.
        pixels: as `FilipModel.encode_image` takes them.
        patches: whose attention it is, such as `Alignment.on_label`.

    Raises:
        UserError: no patch at all.
        ValueError: patches of another grid than the image's.
    """
    grid = model.visual.grid_of(pixels[None])
    if tuple(patches.shape) != grid:
        raise ValueError(f"patches of {tuple(patches.shape)} for a grid of {grid}")
    if not patches.any():
        fix = "look at the similarities instead: mode heat"
        raise UserError("no patch chose the label, so that no attention can be shown", fix=fix)
    attention = model.visual.last_attention(pixels[None])[0].mean(0)
    return attention[1:, 1:][patches.flatten()].mean(0).unflatten(0, grid)
