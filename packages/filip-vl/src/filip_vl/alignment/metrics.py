"""How well words and patches fit where it is known what is seen where (section 5.6).

Legend of the shape suffixes: b pairs of an image and its caption, n patches, m words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torchmetrics import Metric

from filip_vl.alignment.words import positions_within
from filip_vl.model import FilipModel, TokenBatch
from filip_vl.synthetic import Scene
from filip_vl.tokenizers import Tokenizer

COVERED = 0.4
"""Share of a patch's pixels that make it an object's patch."""


class Grounding(NamedTuple):
    """What a caption names, and where it is seen.

    Attributes:
        instances: the object of every pixel, counted from 1; 0 is the background.
        phrases: of every object, the positions of its phrase's tokens in the caption.
        nouns: likewise those of its noun alone.
        content: positions of all words that say something, such as colours and shapes.
    """

    instances: Int64[Tensor, "height width"]
    phrases: tuple[tuple[int, ...], ...]
    nouns: tuple[tuple[int, ...], ...]
    content: tuple[int, ...]


def scene_grounding(scene: Scene, tokenizer: Tokenizer, context_length: int = 77) -> Grounding:
    """The truth of a scene of the embedded task; a phrase is article, colour and shape."""
    spans = tokenizer.spans(scene.caption, context_length)
    phrases = [positions_within(spans, p.article[0], p.shape[1]) for p in scene.phrases]
    nouns = [positions_within(spans, *p.shape) for p in scene.phrases]
    content = [n for p in scene.phrases for n in positions_within(spans, p.colour[0], p.shape[1])]
    instances = torch.from_numpy(scene.instances)
    return Grounding(instances, tuple(phrases), tuple(nouns), tuple(sorted(content)))


def patch_objects(
    instances: Int64[Tensor, "height width"], grid: tuple[int, int], covered: float = COVERED
) -> Int64[Tensor, "rows columns"]:
    """The object that covers enough of each patch, the largest if there are two; 0 for none.

    Args:
        instances: the object of every pixel, counted from 1.
        grid: rows and columns of patches.
        covered: least share of the patch's pixels.

    Raises:
        ValueError: pixels that do not divide into patches.
    """
    pixels = _pixels_of_patches(instances, grid)
    counts = torch.stack([(pixels == n).sum(-1) for n in range(int(instances.max()) + 1)])
    counts[0] = 0
    most, which = counts.max(0)
    return torch.where(most >= covered * pixels.shape[-1], which, 0)


class GroundingMetrics(Metric):
    """Alignment accuracy and pointing game over all pairs of all batches and processes.

    Alignment accuracy is the share of object patches whose best word belongs to the object's
    phrase, with all tokens of the caption as candidates (the paper's rule) and with its content
    words alone. The pointing game is the share of objects whose noun has its best patch where the
    object is seen.

    Example:
        >>> metrics = GroundingMetrics()
        >>> metrics.update(model.image_tokens(pixels), model.text_tokens(captions), truth)
        >>> metrics.compute()["pointing"]

    Args:
        covered: see `patch_objects`.
        **kwargs: of `torchmetrics.Metric`.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    hits: Tensor
    counts: Tensor

    names = ("alignment_all", "alignment_content", "pointing")

    def __init__(self, covered: float = COVERED, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.covered = covered
        for state in ("hits", "counts"):
            empty = torch.zeros(len(self.names), dtype=torch.int64)
            self.add_state(state, empty, dist_reduce_fx="sum")

    def update(self, image: TokenBatch, text: TokenBatch, truth: Sequence[Grounding]) -> None:
        """Count a batch of pairs.

        Args:
            image: tokens of the images, with their grid.
            text: tokens of the captions.
            truth: of every pair.

        Raises:
            ValueError: not one truth for each pair, or tokens that are no patches.
        """
        if image.grid is None:
            raise ValueError("the images' tokens are no patches")
        patches = image.grid[0] * image.grid[1]
        v_bnd, t_bmd = image.normalized()[:, -patches:], text.normalized()
        s_bnm = (v_bnd @ t_bmd.mT).masked_fill(~text.mask[:, None], -torch.inf).cpu()
        for s_nm, known in zip(s_bnm, truth, strict=True):
            objects = patch_objects(known.instances, image.grid, self.covered).flatten()
            found = (
                alignment_hits(s_nm, objects, known.phrases),
                alignment_hits(s_nm, objects, known.phrases, known.content),
                pointing_hits(s_nm.unflatten(0, image.grid), known),
            )
            for place, hits in enumerate(found):
                self.hits[place] += int(hits.sum())
                self.counts[place] += hits.numel()

    def compute(self) -> dict[str, float]:
        """The three shares in 0..1, by `names`; NaN where nothing was counted."""
        shares = self.hits.cpu().double() / self.counts.cpu()
        return dict(zip(self.names, shares.tolist(), strict=True))


def alignment_hits(
    s_nm: Float[Tensor, "patches tokens"],
    objects: Int64[Tensor, " patches"],
    phrases: Sequence[Sequence[int]],
    candidates: Sequence[int] | None = None,
) -> Bool[Tensor, " counted"]:
    """Of every object's patch, whether its best word belongs to the object's phrase.

    Args:
        s_nm: similarities of patches and tokens; -inf for tokens that do not count.
        objects: of the patches, counted from 1; 0 for those that are not asked.
        phrases: of every object, the positions of its tokens.
        candidates: positions among which the best is sought; all if left out.
    """
    allowed = torch.full_like(s_nm[0], -torch.inf if candidates is not None else 0)
    allowed[list(candidates or ())] = 0
    chosen = (s_nm + allowed).argmax(1)
    belongs = torch.zeros(len(phrases) + 1, s_nm.shape[1], dtype=torch.bool)
    for n, phrase in enumerate(phrases, 1):
        belongs[n, list(phrase)] = True
    asked = objects > 0
    return belongs[objects[asked], chosen[asked]]


def pointing_hits(
    s_rcm: Float[Tensor, "rows columns tokens"], truth: Grounding
) -> Bool[Tensor, " objects"]:
    """Of every object, whether the best patch of its noun touches it.

    Objects that are not seen, or whose noun was cut off, are left out.
    """
    rows, columns, _ = s_rcm.shape
    pixels = _pixels_of_patches(truth.instances, (rows, columns)).flatten(0, 1)
    hits = []
    for n, noun in enumerate(truth.nouns, 1):
        if noun and (truth.instances == n).any():
            best = s_rcm[..., list(noun)].amax(-1).flatten().argmax()
            hits.append(bool((pixels[best] == n).any()))
    return torch.tensor(hits, dtype=torch.bool)


def pair_scores(image: TokenBatch, text: TokenBatch) -> Float[Tensor, " pairs"]:
    """s^I + s^T of every image with the caption of the same row, -2..2."""
    s_bnm = image.normalized() @ text.normalized().mT
    by_patch = s_bnm.masked_fill(~text.mask[:, None], -torch.inf).amax(2)
    by_word = s_bnm.masked_fill(~image.mask[:, :, None], -torch.inf).amax(1)
    means = (
        torch.where(mask, best, 0).sum(1) / mask.sum(1)
        for best, mask in ((by_patch, image.mask), (by_word, text.mask))
    )
    return sum(means, torch.zeros(()))


@torch.no_grad()
def candidate_scores(
    model: FilipModel, image: TokenBatch, captions: Sequence[Sequence[str]], batch_size: int = 256
) -> list[Float[Tensor, " candidates"]]:
    """s^I + s^T of every image with each of its own candidates.

    Args:
        model: its text tower.
        image: tokens of the images, as `FilipModel.encode_image` gives them.
        captions: candidates of every image.
        batch_size: captions that are encoded at a time.

    Raises:
        ValueError: not one list of candidates for each image.
    """
    if len(captions) != len(image.tokens):
        raise ValueError(f"candidates of {len(captions)} images for {len(image.tokens)}")
    pairs = [(row, text) for row, texts in enumerate(captions) for text in texts]
    found = []
    for first in range(0, len(pairs), batch_size):
        rows, texts = zip(*pairs[first : first + batch_size], strict=True)
        which = torch.tensor(rows, device=image.tokens.device)
        images = TokenBatch(image.tokens[which], image.mask[which])
        found.append(pair_scores(images, model.encode_text(list(texts))).cpu())
    scores = torch.cat(found) if found else torch.empty(0)
    return list(scores.split([len(texts) for texts in captions]))


def share_of_first(scores: Sequence[Float[Tensor, " _"]]) -> float:
    """Share of the images whose first candidate outscores all their others, 0..1.

    Binding accuracy, if the first is the true caption and the other one `exchanged_caption`'s;
    attribute accuracy with those of `exchanged_attributes`. A tie is no win. Images without others
    are left out; NaN if none is left.

    Args:
        scores: of `candidate_scores`.
    """
    asked = [row for row in scores if len(row) > 1]
    wins = sum(bool(row[0] > row[1:].max()) for row in asked)
    return wins / len(asked) if asked else float("nan")


def _pixels_of_patches(
    instances: Int64[Tensor, "height width"], grid: tuple[int, int]
) -> Int64[Tensor, "rows columns pixels"]:
    (height, width), (rows, columns) = instances.shape, grid
    if height % rows or width % columns:
        raise ValueError(f"{height}x{width} pixels do not divide into {rows}x{columns} patches")
    tall, wide = height // rows, width // columns
    return instances.view(rows, tall, columns, wide).transpose(1, 2).flatten(2)
