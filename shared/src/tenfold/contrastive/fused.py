r"""Late interaction in three Triton kernels: no tensor of products leaves the chip.

Forward, one product of a tile of patches with a tile of words serves both directions. Its maxima
are added up, and where a gradient is wanted their places are kept, a byte each. Backward, dL/dS is
rebuilt from those places in registers,

.. math::
    W_{ij}[k,r] = [a(i,j,k) = r]\, g^I_{ij} + [b(i,j,r) = k]\, g^T_{ij}, \qquad
    dV_i = \sum_j W_{ij} T_j, \qquad dT_j = \sum_i W_{ij}^\top V_i

with a(i,j,k) the winning word of a patch, b(i,j,r) the winning patch of a word and g the gradients
of the sums: both gradients are products too, which matrix units do faster than memory gathers rows.

Legend of the shape suffixes: b images, c texts (sorted by length), n patches, m words, p packed
words of all texts, d width.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Integer, UInt8
from torch import Tensor
from torch.autograd.function import once_differentiable

from tenfold.contrastive.masks import PackedTokens, pack, place_type
from tenfold.errors import UserError

SaveArgmax = Literal["auto", "store", "recompute"]

_STORE_BYTES = 512 << 20
"""Winners that need more are found again in the backward pass, so many bytes of them at a time."""

LONGEST = 512
"""Valid words that a text may have: a text is never cut into tiles."""

_ROWS, _COLUMNS = 64, 64
"""A tile of S: patches by words, of several images and texts where they are short."""

_LEAST = 8
"""Patches and words that a tile has room for: more of shorter ones would crowd its memory."""

_HALF_TILE, _FLOAT_TILE = 1 << 14, 1 << 11
"""Numbers of a tile of a gradient. Full products of float32 use no matrix units, but registers."""

_WHERE, _FIX = "impl='triton'", "choose impl='auto', which takes tiles then"


def late_interaction_fused(
    image_tokens: Float[Tensor, "images patches dim"],
    text_tokens: Float[Tensor, "texts words dim"],
    image_mask: Bool[Tensor, "images patches"] | None = None,
    text_mask: Bool[Tensor, "texts words"] | None = None,
    *,
    return_argmax: bool = False,
    save_argmax: SaveArgmax = "auto",
) -> tuple[
    Float[Tensor, "images texts"],
    Float[Tensor, "images texts"],
    Integer[Tensor, "images texts patches"] | None,
    Integer[Tensor, "images texts words"] | None,
]:
    """Maxima in both directions, in Triton kernels; see `tenfold.contrastive.late_interaction`.

    Products of halves are added up in float32, those of float32 are full ones, whatever torch's
    matrix precision. bfloat16 becomes float16, which holds all digits of unit vectors, and in which
    the weights of the gradient are not off by 0.4 %. Equal inputs give equal bits, in the backward
    pass too. There is no second derivative.

    Args:
        image_tokens: normalised patches, -1..1: float16, bfloat16 or float32.
        text_tokens: normalised words, at most 512 valid ones a text.
        image_mask: True where a patch is valid; all are if left out.
        text_mask: True where a word is valid, which need not be at the front.
        return_argmax: also return which word each patch chose and which patch each word.
        save_argmax: "store" the winners for the backward pass, a byte each (two where there are
            more than 256 to choose from), or "recompute" them there, which costs one product more;
            "auto" stores up to 512 MiB.

    Returns:
        The sum over valid patches of their best word, that over valid words of their best patch,
        both float32, and with `return_argmax` which word and which patch (-1 at padding).

    Raises:
        ValueError: an option that does not exist.
        UserError: no Triton, no device that runs it, float64, a text that is too long.
    """
    if save_argmax not in get_args(SaveArgmax):
        raise ValueError(f"save_argmax must be one of {get_args(SaveArgmax)}, got {save_argmax!r}")
    dtype = torch.promote_types(image_tokens.dtype, text_tokens.dtype)
    _check_support(image_tokens.device, dtype)
    if dtype == torch.bfloat16:
        dtype = torch.float16
    rows = None if text_mask is None else text_mask.sum(1).argsort(stable=True)
    texts = _Texts(pack(text_tokens.detach().to(dtype), text_mask, rows), image_tokens.shape[1])
    wanted = torch.is_grad_enabled() and (image_tokens.requires_grad or text_tokens.requires_grad)
    few = len(image_tokens) * texts.winner_bytes < _STORE_BYTES
    stored = wanted and (few if save_argmax == "auto" else save_argmax == "store")
    mask_bn = None if image_mask is None else image_mask.contiguous().view(torch.uint8)
    i2t_bc, t2i_bc, a_bcn, b_bp = _Fused.apply(  # pyright: ignore[reportGeneralTypeIssues]
        image_tokens, text_tokens, mask_bn, texts, stored, return_argmax
    )
    if not return_argmax:
        return i2t_bc, t2i_bc, None, None
    a_bcn, b_bcm = _padded_winners(a_bcn, b_bp, texts.packed, text_tokens.shape[1])
    if image_mask is not None:
        a_bcn.masked_fill_(~image_mask.unsqueeze(1), -1)
    return i2t_bc, t2i_bc, a_bcn, b_bcm


def _check_support(device: torch.device, dtype: torch.dtype) -> None:
    if importlib.util.find_spec("triton") is None:
        raise UserError("Triton is not installed", where=_WHERE, fix=f"install it, or {_FIX}")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError(f"the Triton kernels do not run on {device.type}", where=_WHERE, fix=_FIX)
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        what = f"the Triton kernels take float16, bfloat16 and float32 tokens, not {name}"
        raise UserError(what, where=_WHERE, fix=_FIX)


def _padded_winners(
    a_bcn: Integer[Tensor, "b c n"], b_bp: Integer[Tensor, "b p"], packed: PackedTokens, length: int
) -> tuple[Integer[Tensor, "b c n"], Integer[Tensor, "b c length"]]:
    """The winners where a person looks for them: positions in padded texts, in their order."""
    places_bcn = (a_bcn + packed.offsets[:-1, None]).index_select(1, packed.rows.argsort())
    b_bx = b_bp.new_full((len(b_bp), len(packed.rows) * length), -1, dtype=torch.int64)
    b_bx[:, packed.positions] = b_bp.long()
    return packed.positions[places_bcn] % length, b_bx.unflatten(1, (-1, length))


# --------------------------------------------------------------------------------------- tiles


@dataclass(frozen=True)
class _Run:
    """Packed texts first..last, of similar length, and how they and the images are cut into tiles.

    Attributes:
        first: the first text.
        last: the text behind the last one.
        start: the first packed word.
        stop: the packed word behind the last one.
        images: in a tile; like the three below a power of two.
        patches: in a tile, of each image.
        texts: in a tile.
        words: in a tile, of each text; no text has more.
    """

    first: int
    last: int
    start: int
    stop: int
    images: int
    patches: int
    texts: int
    words: int

    @property
    def rows(self) -> int:
        """Of a tile."""
        return self.images * self.patches

    @property
    def columns(self) -> int:
        """Of a tile."""
        return self.texts * self.words

    @property
    def tiles(self) -> int:
        """How many tiles the texts fill."""
        return _parts(self.last - self.first, self.texts)


class _Texts:
    """Packed texts in ascending length, and how images of so many patches meet them.

    Attributes:
        packed: the texts.
        runs: parts of them for one launch each.
        types: of the places of words and of patches.
        winner_bytes: what the winners of one image take.
    """

    def __init__(self, packed: PackedTokens, patches: int) -> None:
        lengths = packed.offsets.diff().tolist()
        longest = max(lengths, default=1)
        if longest > LONGEST:
            what = f"a text has {longest} words, the Triton kernels take {LONGEST}"
            raise UserError(what, where=_WHERE, fix=_FIX)
        self.packed = packed
        self.runs = list(_runs(lengths, patches))
        self.types = place_type(longest), place_type(patches)
        a, b = self.types
        self.winner_bytes = len(lengths) * patches * a.itemsize + len(packed.tokens) * b.itemsize


def _runs(lengths: list[int], patches: int) -> Iterator[_Run]:
    """One run for all texts that fill up to the same power of two; lengths ascend."""
    first = start = 0
    for words, group in groupby(lengths, lambda length: max(_LEAST, _power_of_two(length))):
        own = [*group]
        last, stop = first + len(own), start + sum(own)
        texts = max(1, _COLUMNS // words)
        rows = min(_ROWS, 2 * _ROWS * _COLUMNS // (texts * words))
        # the size that leaves the fewest rows empty, the larger of equals
        sizes = [size for size in (64, 32, 16) if size <= rows]
        size = min(sizes, key=lambda size: _parts(patches, size) * size)
        size = min(size, max(_LEAST, _power_of_two(patches)))
        yield _Run(first, last, start, stop, rows // size, size, texts, words)
        first, start = last, stop


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _parts(whole: int, part: int) -> int:
    return -(-whole // part)


# ------------------------------------------------------------------------------------ autograd


class _Fused(torch.autograd.Function):
    """What `_scan` finds, with the gradient that its winners give."""

    @staticmethod
    def forward(
        ctx: Any,
        image_tokens: Tensor,
        text_tokens: Tensor,
        mask_bn: Tensor | None,
        texts: _Texts,
        stored: bool,
        returned: bool,
    ) -> tuple[Tensor | None, ...]:
        v_bnd = image_tokens.to(texts.packed.tokens.dtype).contiguous()
        i2t_bc, t2i_bc, a_bcn, b_bp = _scan(v_bnd, mask_bn, texts, stored or returned)
        ctx.texts, ctx.length = texts, text_tokens.shape[1]
        ctx.types = image_tokens.dtype, text_tokens.dtype
        ctx.save_for_backward(v_bnd, mask_bn, *((a_bcn, b_bp) if stored else ()))
        ctx.mark_non_differentiable(*(x for x in (a_bcn, b_bp) if x is not None))
        ctx.set_materialize_grads(False)  # zeros for the winners would be as large as they are
        return i2t_bc, t2i_bc, a_bcn, b_bp

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        v_bnd, mask_bn, *stored = ctx.saved_tensors
        texts: _Texts = ctx.texts
        t_pd = texts.packed.tokens
        g_i2t_bc, g_t2i_bc = (
            v_bnd.new_zeros(len(v_bnd), len(texts.packed.rows), dtype=torch.float32)
            if g is None
            else g.contiguous()
            for g in grads[:2]
        )
        scale = _scale(g_i2t_bc, g_t2i_bc)
        dv_bnd = torch.zeros_like(v_bnd, dtype=torch.float32)
        dt_pd = torch.zeros_like(t_pd, dtype=torch.float32)
        size = len(v_bnd) if stored else _STORE_BYTES // max(1, texts.winner_bytes)
        for own in _slices(len(v_bnd), max(1, size)):
            mask_in = None if mask_bn is None else mask_bn[own]
            winners = stored or _scan(v_bnd[own], mask_in, texts, True)[2:]
            weights = mask_in, g_i2t_bc[own], g_t2i_bc[own], *winners, scale
            if ctx.needs_input_grad[0]:
                _add_gradient("backward_images", dv_bnd[own], t_pd, texts, weights)
            if ctx.needs_input_grad[1]:
                _add_gradient("backward_texts", v_bnd[own], dt_pd, texts, weights)
        dt_cmd = texts.packed.pad(dt_pd.to(ctx.types[1]), ctx.length)
        return dv_bnd.to(ctx.types[0]), dt_cmd, None, None, None, None


def _slices(rows: int, size: int) -> Iterator[slice]:
    return (slice(first, first + size) for first in range(0, rows, size))


def _scale(*gradients: Float[Tensor, "b c"]) -> Float[Tensor, "1"]:
    """The power of two that takes the largest gradient to 512..1024.

    In half precision, smaller ones then keep all of their digits down to 2^-24 of it.
    """
    if gradients[0].numel() == 0:
        return gradients[0].new_ones(1)
    largest = torch.stack([g.abs().max() for g in gradients]).max()
    exponent = 10 - torch.frexp(largest).exponent
    return torch.exp2(exponent.clamp(max=126).float()).reshape(1)


# ------------------------------------------------------------------------------------- kernels


def _scan(
    v_bnd: Float[Tensor, "b n d"],
    mask_bn: UInt8[Tensor, "b n"] | None,
    texts: _Texts,
    winners: bool,
) -> tuple[
    Float[Tensor, "b c"],
    Float[Tensor, "b c"],
    Integer[Tensor, "b c n"] | None,
    Integer[Tensor, "b p"] | None,
]:
    """Sums of maxima over words and over patches, and on demand their places."""
    (images, patches, width), packed = v_bnd.shape, texts.packed
    i2t_bc, t2i_bc = v_bnd.new_empty(2, images, len(packed.rows), dtype=torch.float32)
    a_bcn = b_bp = None
    if winners:
        a_bcn = v_bnd.new_empty(images, len(packed.rows), patches, dtype=texts.types[0])
        b_bp = v_bnd.new_empty(images, len(packed.tokens), dtype=texts.types[1])
    operands = v_bnd, packed.tokens, mask_bn, i2t_bc, t2i_bc, a_bcn, b_bp
    for run in texts.runs:
        k = _slice(width, min(128, (1 << 15) // run.columns) // v_bnd.itemsize)
        grid = (_parts(images, run.images) * run.tiles,)
        _launch("forward", grid, v_bnd.shape, operands, texts, run, k)
    return i2t_bc, t2i_bc, a_bcn, b_bp


def _add_gradient(
    kernel: Literal["backward_images", "backward_texts"],
    image_table: Float[Tensor, "b n d"],
    text_table: Float[Tensor, "p d"],
    texts: _Texts,
    weights: tuple[Tensor | None, ...],
) -> None:
    """Add one side's gradient to the table of that side."""
    images, patches, width = image_table.shape
    half = torch.float16 in (image_table.dtype, text_table.dtype)
    for run in texts.runs:
        k = _slice(width, (_HALF_TILE if half else _FLOAT_TILE) // max(run.rows, run.columns))
        slices, image_tiles = _parts(width, k), _parts(images, run.images)
        if kernel == "backward_images":
            programs, summands = image_tiles * _parts(patches, run.patches), run.tiles
            gradient = image_table
        else:
            programs, summands = run.tiles, image_tiles
            gradient = text_table[run.start : run.stop]
        shares = _shares(gradient.device, programs * slices, summands)
        sums = gradient.unsqueeze(0) if shares == 1 else gradient.new_zeros(shares, *gradient.shape)
        tables = (sums, text_table) if kernel == "backward_images" else (image_table, sums)
        grid = programs, shares, slices
        _launch(kernel, grid, image_table.shape, (*tables, *weights), texts, run, k)
        if shares > 1:
            gradient += sums.sum(0)


def _slice(width: int, most: int) -> int:
    """Columns of the tokens that a kernel takes at a time."""
    return max(16, min(_power_of_two(width), most))


def _shares(device: torch.device, programs: int, summands: int) -> int:
    """Into how many programs each sum is split, so that there are enough to occupy the device.

    The shares' sums are added up afterwards. They take one tile a processor, no more.
    """
    return max(1, min(summands, _processors(device) // max(1, programs)))


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _launch(
    kernel: str,
    grid: tuple[int, ...],
    shape: torch.Size,
    operands: tuple[Tensor | None, ...],
    texts: _Texts,
    run: _Run,
    k: int,
) -> None:
    """Start a kernel on images of a shape and on the texts of a run."""
    from tenfold.contrastive import kernels  # imports Triton

    (images, patches, width), packed = shape, texts.packed
    sizes = images, patches, len(packed.rows), len(packed.tokens), run.first, run.last
    tile = {"I": run.images, "N": run.patches, "J": run.texts, "M": run.words}
    with torch.cuda.device_of(packed.tokens):  # Triton takes the current device
        getattr(kernels, kernel)[grid](
            packed.offsets, packed.rows, *operands, *sizes, D=width, **tile, K=k, num_warps=8
        )
