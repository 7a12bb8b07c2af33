r"""Late interaction in tiles: exact, never larger than a tile, and fast on any device.

Forward, one product S of a tile of images with a tile of packed words serves both directions: its
maxima over patches and over words are added up, and with gradients the winners are kept, one byte
each. In a tile all images' first patches come before all their second ones, so that both maxima run
along whole vectors. Where a maximum is, is the largest of countdown x (S == maximum): a third of
the time of torch.max, and the lowest place on ties.

Backward, with a(i,j,k) the winning word of a patch, b(i,j,r) the winning patch of a word and g the
gradients of the sums,

.. math::
    dV_i[k] = \sum_j g^I_{ij} T_j[a(i,j,k)] + \sum_j \sum_{r: b(i,j,r)=k} g^T_{ij} T_j[r]

and the mirror image for dT: weighted sums of rows of a table, which `embedding_bag` takes without
an intermediate. The first half knows its rows; for the second, sorting the winners brings together
what belongs to one patch. No product of patches with words is needed.

Legend of the shape suffixes: b images, c texts (sorted by length), n patches, p packed words of all
texts, d width; in a tile w words, i images, j texts of m words each, x patches of all images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor
from torch.nn import functional as F

from tenfold.contrastive.masks import PackedTokens, pack, place_type

_TILE = 1 << 20
"""Bytes of a tile of S: it stays in a core's second-level cache."""

_IMAGES = 32
"""Images of a tile; torch takes maxima along whole vectors from that many on."""

_BLOCK_IMAGES, _BLOCK_WORDS = 8, 256
"""The backward pass makes its indices for so many images, or words, at a time."""

_Sums = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def late_interaction_tiled(
    image_tokens: Float[Tensor, "images patches dim"],
    text_tokens: Float[Tensor, "texts words dim"],
    image_mask: Bool[Tensor, "images patches"] | None = None,
    text_mask: Bool[Tensor, "texts words"] | None = None,
    *,
    return_argmax: bool = False,
) -> tuple[
    Float[Tensor, "images texts"],
    Float[Tensor, "images texts"],
    Integer[Tensor, "images texts patches"] | None,
    Integer[Tensor, "images texts words"] | None,
]:
    """Sums of maxima in both directions, in tiles; the arguments are those of `late_interaction`.

    Returns:
        The sum over valid patches of their best word, that over valid words of their best patch,
        and with `return_argmax` which word and which patch (-1 at padding).
    """
    rows = None if text_mask is None else text_mask.sum(1).argsort(stable=True)
    packed = pack(text_tokens.detach(), text_mask, rows)
    if image_mask is not None:
        # what is hidden may be anything, even no number
        image_tokens = image_tokens.masked_fill(~image_mask.unsqueeze(2), 0)
    if torch.is_grad_enabled() and (image_tokens.requires_grad or text_tokens.requires_grad):
        found = _Tiled.apply(image_tokens, text_tokens, image_mask, packed)
    else:
        found = _scan(image_tokens, image_mask, packed, return_argmax)
    i2t_bc, t2i_bc, a_cnb, b_pb = cast(_Sums, found)
    if not return_argmax or a_cnb is None or b_pb is None:
        return i2t_bc, t2i_bc, None, None
    a_bcn, b_bcm = _padded_winners(a_cnb, b_pb, packed, text_tokens.shape[1])
    if image_mask is not None:
        a_bcn.masked_fill_(~image_mask.unsqueeze(1), -1)
    return i2t_bc, t2i_bc, a_bcn, b_bcm


class _Tiled(torch.autograd.Function):
    """What `_scan` finds, with the gradient that its winners give."""

    @staticmethod
    def forward(
        ctx: Any, v_bnd: Tensor, t_cmd: Tensor, mask_bn: Tensor | None, packed: PackedTokens
    ) -> tuple[Tensor | None, ...]:
        i2t_bc, t2i_bc, a_cnb, b_pb = _scan(v_bnd, mask_bn, packed, True)
        ctx.packed, ctx.length = packed, t_cmd.shape[1]
        ctx.save_for_backward(v_bnd, mask_bn, a_cnb, b_pb)
        ctx.mark_non_differentiable(a_cnb, b_pb)
        ctx.set_materialize_grads(False)  # zeros for the winners would be as large as they are
        return i2t_bc, t2i_bc, a_cnb, b_pb

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        v_bnd, mask_bn, a_cnb, b_pb = ctx.saved_tensors
        packed: PackedTokens = ctx.packed
        dv_bnd = dt_cmd = None
        with torch.no_grad():
            g_i2t, g_t2i = (
                v_bnd.new_zeros(len(v_bnd), len(packed.rows))
                if g is None
                else g.index_select(1, packed.rows)
                for g in grads[:2]
            )
            if ctx.needs_input_grad[0]:
                dv_bnd = _image_gradient(g_i2t, g_t2i, a_cnb, b_pb, packed)
            if ctx.needs_input_grad[1]:
                dt_pd = _text_gradient(g_i2t, g_t2i, a_cnb, b_pb, packed, v_bnd, mask_bn)
                dt_cmd = packed.pad(dt_pd, ctx.length)
        sources = [x for x in (*grads[:2], v_bnd) if x is not None]
        once = [d if d is None else _Once.apply(d, *sources) for d in (dv_bnd, dt_cmd)]
        return *once, None, None  # pyright: ignore[reportReturnType]


class _Once(torch.autograd.Function):
    """A gradient that cannot be differentiated again, and says so."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            "late interaction in tiles has no second derivative: take impl='naive' for one"
        )


# ------------------------------------------------------------------------------------ forward


@dataclass(frozen=True)
class _Run:
    """Neighbouring texts of one length, and the packed words that are theirs."""

    texts: slice
    words: slice
    length: int


def _tiles(lengths: list[int], room: int) -> Iterator[list[_Run]]:
    """Cut packed texts into tiles of at most `room` words, or of one text, as runs of a length."""
    tile: list[_Run] = []
    used = text = word = 0
    for length, group in groupby(lengths):
        left = sum(1 for _ in group)
        while left:
            fits = min(left, max((room - used) // length, 0 if tile else 1))
            if fits > 0:
                words = fits * length
                tile.append(_Run(slice(text, text + fits), slice(word, word + words), length))
                left, used, text, word = left - fits, used + words, text + fits, word + words
            if left:
                yield tile
                tile, used = [], 0
    if tile:
        yield tile


def _words(tile: list[_Run]) -> slice:
    return slice(tile[0].words.start, tile[-1].words.stop)


@dataclass(frozen=True)
class _Found:
    """What the tiles add to: sums of maxima, and on demand the winners."""

    i2t_cb: Float[Tensor, "c b"]
    t2i_cb: Float[Tensor, "c b"]
    a_cnb: Integer[Tensor, "c n b"] | None
    b_pb: Integer[Tensor, "p b"] | None

    @classmethod
    def empty(cls, v_bnd: Tensor, packed: PackedTokens, longest: int, winners: bool) -> _Found:
        (images, patches, _), texts = v_bnd.shape, len(packed.rows)
        sums = v_bnd.new_empty(2, texts, images)
        if not winners:
            return cls(sums[0], sums[1], None, None)
        words, kinds = len(packed.tokens), (place_type(longest), place_type(patches))
        a_cnb = v_bnd.new_empty(texts, patches, images, dtype=kinds[0])
        return cls(sums[0], sums[1], a_cnb, v_bnd.new_empty(words, images, dtype=kinds[1]))


def _scan(
    v_bnd: Float[Tensor, "b n d"],
    mask_bn: Bool[Tensor, "b n"] | None,
    packed: PackedTokens,
    winners: bool,
) -> tuple[
    Float[Tensor, "b c"],
    Float[Tensor, "b c"],
    Integer[Tensor, "c n b"] | None,
    Integer[Tensor, "p b"] | None,
]:
    """Sums of maxima over words and over patches, and on demand the winning words and patches."""
    images, patches, width = v_bnd.shape
    lengths = packed.offsets.diff().tolist()
    longest = max(lengths, default=1)
    columns = max(1, min(images, _IMAGES)) * patches
    room = max(1, _TILE // (v_bnd.element_size() * columns))
    tiles = list(_tiles(lengths, room))
    found = _Found.empty(v_bnd, packed, longest, winners)
    buffer = v_bnd.new_empty(max(room, longest) * columns)
    scratch = torch.empty_like(buffer) if winners else None
    for first in range(0, images, _IMAGES):
        own = slice(first, first + _IMAGES)
        v_nid = v_bnd[own].transpose(0, 1).contiguous()
        v_dx = v_nid.view(-1, width).T
        hidden_ni = None if mask_bn is None else ~mask_bn[own].T
        for tile in tiles:
            t_wd = packed.tokens[_words(tile)]
            s_wx = buffer[: len(t_wd) * v_dx.shape[1]].view(len(t_wd), -1)
            torch.mm(t_wd, v_dx, out=s_wx)
            _collect(s_wx.unflatten(1, v_nid.shape[:2]), tile, own, hidden_ni, scratch, found)
    back = packed.rows.argsort()
    sums = (sums_cb.T.index_select(1, back) for sums_cb in (found.i2t_cb, found.t2i_cb))
    return *sums, found.a_cnb, found.b_pb  # pyright: ignore[reportReturnType]


def _collect(
    s_wni: Float[Tensor, "w n i"],
    tile: list[_Run],
    own: slice,
    hidden_ni: Bool[Tensor, "n i"] | None,
    scratch: Float[Tensor, " room"] | None,
    found: _Found,
) -> None:
    """Add the maxima of one tile to what is found."""
    if hidden_ni is not None:
        s_wni.masked_fill_(hidden_ni, -torch.inf)
    best_wi, patch_wi = _maximum(s_wni, scratch)
    if found.b_pb is not None and patch_wi is not None:
        found.b_pb[_words(tile), own] = patch_wi
    start = tile[0].words.start
    for run in tile:
        inside = slice(run.words.start - start, run.words.stop - start)
        s_jmx = s_wni[inside].flatten(1).unflatten(0, (-1, run.length))
        best_jx, word_jx = _maximum(s_jmx, scratch)
        best_jni = best_jx.unflatten(1, s_wni.shape[1:])
        if hidden_ni is not None:
            best_jni = best_jni.masked_fill_(hidden_ni, 0)
        found.i2t_cb[run.texts, own] = best_jni.sum(1)
        found.t2i_cb[run.texts, own] = best_wi[inside].unflatten(0, (-1, run.length)).sum(1)
        if found.a_cnb is not None and word_jx is not None:
            found.a_cnb[run.texts, :, own] = word_jx.view_as(best_jni)


def _maximum(
    s_xyz: Float[Tensor, "x y z"], scratch: Float[Tensor, " room"] | None
) -> tuple[Float[Tensor, "x z"], Float[Tensor, "x z"] | None]:
    """The maximum over the middle axis, and with a scratch buffer the lowest place of it."""
    best_xz = s_xyz.amax(1)
    if scratch is None:
        return best_xz, None
    places = s_xyz.shape[1]
    hits_xyz = scratch[: s_xyz.numel()].view(s_xyz.shape)
    torch.eq(s_xyz, best_xz.unsqueeze(1), out=hits_xyz)  # ones and zeros in the type of S
    hits_xyz *= torch.arange(places, 0, -1, dtype=s_xyz.dtype, device=s_xyz.device).unsqueeze(1)
    # NaN equals nothing, and its place must still exist
    return best_xz, (places - hits_xyz.amax(1)).clamp_(max=places - 1)


def _padded_winners(
    a_cnb: Integer[Tensor, "c n b"], b_pb: Integer[Tensor, "p b"], packed: PackedTokens, length: int
) -> tuple[Integer[Tensor, "b c n"], Integer[Tensor, "b c length"]]:
    """The winners where a person looks for them: positions in padded texts, in their order."""
    back = packed.rows.argsort()
    places = a_cnb.index_select(0, back).permute(2, 0, 1).long()
    starts = packed.offsets[:-1].index_select(0, back).unsqueeze(1)
    a_bcn = packed.positions[places + starts] % length
    b_bp = b_pb.new_full((b_pb.shape[1], len(back) * length), -1, dtype=torch.int64)
    b_bp[:, packed.positions] = b_pb.T.long()
    return a_bcn, b_bp.unflatten(1, (-1, length))


# ----------------------------------------------------------------------------------- backward


def _image_gradient(
    g_i2t_bc: Float[Tensor, "b c"],
    g_t2i_bc: Float[Tensor, "b c"],
    a_cnb: Integer[Tensor, "c n b"],
    b_pb: Integer[Tensor, "p b"],
    packed: PackedTokens,
) -> Float[Tensor, "b n d"]:
    """For each patch the words it chose, and the words that chose it."""
    images, patches = len(g_i2t_bc), a_cnb.shape[1]
    table_pd, starts = packed.tokens, packed.offsets[:-1]
    text_p = _text_of_words(packed)
    word_p = torch.arange(len(table_pd), dtype=torch.int32, device=table_pd.device)
    dv_bnd = table_pd.new_empty(images, patches, table_pd.shape[1])
    for first in range(0, images, _BLOCK_IMAGES):
        own = slice(first, first + _BLOCK_IMAGES)
        g_ic = g_i2t_bc[own]
        chosen = _used(g_ic)
        index_inc = _take(a_cnb[:, :, own], 0, chosen).permute(2, 1, 0) + starts[chosen]
        weight_inc = _take(g_ic, 1, chosen).unsqueeze(1).expand_as(index_inc)
        sums = _weighted_rows(table_pd, index_inc.flatten(0, 1), weight_inc.flatten(0, 1))
        g_ip = g_t2i_bc[own].index_select(1, text_p)
        choosing = _used(g_ip)
        key_ip = _take(b_pb[:, own], 0, choosing).T.contiguous()
        bags = torch.arange(len(key_ip), device=key_ip.device) * patches
        rows, weights = _take(word_p, 0, choosing), _take(g_ip, 1, choosing)
        sums += _sorted_rows(table_pd, key_ip, rows, weights, bags, len(sums))
        dv_bnd[own] = sums.unflatten(0, (-1, patches))
    return dv_bnd


def _text_gradient(
    g_i2t_bc: Float[Tensor, "b c"],
    g_t2i_bc: Float[Tensor, "b c"],
    a_cnb: Integer[Tensor, "c n b"],
    b_pb: Integer[Tensor, "p b"],
    packed: PackedTokens,
    v_bnd: Float[Tensor, "b n d"],
    mask_bn: Bool[Tensor, "b n"] | None,
) -> Float[Tensor, "p d"]:
    """For each packed word the patches it chose, and the patches that chose it."""
    images, patches, width = v_bnd.shape
    table_xd = v_bnd.detach().reshape(-1, width)
    start_b = torch.arange(images, dtype=torch.int32, device=v_bnd.device) * patches
    row_nb = start_b + torch.arange(patches, dtype=torch.int32, device=v_bnd.device).unsqueeze(1)
    g_i2t_cb, g_t2i_cb, text_p = g_i2t_bc.T.contiguous(), g_t2i_bc.T, _text_of_words(packed)
    dt_pd = torch.empty_like(packed.tokens)
    for tile in _tiles(packed.offsets.diff().tolist(), _BLOCK_WORDS):
        words, texts = _words(tile), slice(tile[0].texts.start, tile[-1].texts.stop)
        g_wb = g_t2i_cb.index_select(0, text_p[words])
        chosen = _used(g_wb)
        index_wb = _take(b_pb[words], 1, chosen) + start_b[chosen]
        sums = _weighted_rows(table_xd, index_wb, _take(g_wb, 1, chosen))
        choosing = _used(g_i2t_cb[texts])
        key_jx = _take(a_cnb[texts], 2, choosing).flatten(1)
        g_jnb = _take(g_i2t_cb[texts], 1, choosing).unsqueeze(1)
        if mask_bn is None:
            g_jnb = g_jnb.expand(-1, patches, -1)
        else:
            g_jnb = g_jnb * _take(mask_bn.T, 1, choosing)
        bags = packed.offsets[texts].long() - words.start
        rows = _take(row_nb, 1, choosing).flatten()
        sums += _sorted_rows(table_xd, key_jx, rows, g_jnb.flatten(1), bags, len(sums))
        dt_pd[words] = sums
    return dt_pd


def _text_of_words(packed: PackedTokens) -> Integer[Tensor, " p"]:
    return torch.arange(len(packed.rows), device=packed.rows.device).repeat_interleave(
        packed.offsets.diff(), output_size=len(packed.tokens)
    )


def _used(weights: Float[Tensor, "rows columns"]) -> Integer[Tensor, " used"]:
    """Which columns have a weight at all: pairs without gradient cost nothing."""
    return (weights != 0).any(0).nonzero().flatten()


def _take(x: Tensor, dim: int, index: Integer[Tensor, " used"]) -> Tensor:
    """Some slices of an axis, without a copy where they are all."""
    return x if len(index) == x.shape[dim] else x.index_select(dim, index)


def _weighted_rows(
    table: Float[Tensor, "rows d"],
    index: Integer[Tensor, "bags entries"],
    weights: Float[Tensor, "bags entries"],
) -> Float[Tensor, "bags d"]:
    """Each bag's weighted sum of rows of the table."""
    if index.shape[1] == 0:
        return table.new_zeros(len(index), table.shape[1])
    return F.embedding_bag(index, table, mode="sum", per_sample_weights=weights)


def _sorted_rows(
    table: Float[Tensor, "rows d"],
    keys: Integer[Tensor, "groups entries"],
    rows: Integer[Tensor, " entries"],
    weights: Float[Tensor, "groups entries"],
    first_bags: Integer[Tensor, " groups"],
    bags: int,
) -> Float[Tensor, "bags d"]:
    """Add row `rows[e]`, times its weight, to bag `first_bags[g] + keys[g, e]`, for all g and e."""
    if keys.shape[1] == 0:
        return table.new_zeros(bags, table.shape[1])
    order = _stable_argsort(keys)
    counts = torch.bincount((keys + first_bags.unsqueeze(1)).flatten(), minlength=bags)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(rows.dtype)
    return F.embedding_bag(
        rows.index_select(0, order.flatten()),
        table,
        offsets,
        mode="sum",
        per_sample_weights=weights.gather(1, order).flatten(),
        include_last_offset=True,
    )


def _stable_argsort(keys: Integer[Tensor, "groups entries"]) -> Integer[Tensor, "groups entries"]:
    if keys.device.type != "cpu":
        return keys.argsort(dim=1, stable=True)
    # a radix sort for keys of 8 and 16 bits, which torch has not
    return torch.from_numpy(np.argsort(keys.numpy(), axis=1, kind="stable"))
