"""The three Triton kernels of late interaction; `fused` launches them.

A tile is `I` images of `N` patches by `J` texts of `M` words, all powers of two. Larger images take
several tiles, one after the other; of shorter ones, or shorter texts, several share a tile, so that
matrix units stay busy. Rows and columns that are no token are loaded as zeros, whatever memory
holds there.

Legend of the shape suffixes: i images, n patches, j texts and m words of a tile; x = i·n its rows,
y = j·m its columns; k, d slices of the width.
"""

# No annotation may be a string here, and none is checked as tests check all others: Triton reads
# them, and the source of the very functions that it is given.

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _tokens(table, row_x, real_x, first, D: tl.constexpr, K: tl.constexpr):
    """Columns first.. of some rows of a table of tokens; zeros where there is none."""
    column_k = first + tl.arange(0, K)
    inside_xk = real_x[:, None] & (column_k < D)[None, :]
    return tl.load(table + row_x[:, None] * D + column_k[None, :], mask=inside_xk, other=0.0)


@triton.jit
@no_type_check
def _add(table, row_x, real_x, first, sum_xk, D: tl.constexpr, K: tl.constexpr):
    """Add to columns first.. of some rows; no other program does."""
    column_k = first + tl.arange(0, K)
    inside_xk = real_x[:, None] & (column_k < D)[None, :]
    at_xk = table + row_x[:, None] * D + column_k[None, :]
    tl.store(at_xk, tl.load(at_xk, mask=inside_xk, other=0.0) + sum_xk, mask=inside_xk)


@triton.jit
@no_type_check
def _patches(image_i, first, mask, images, patches, N: tl.constexpr):
    """Row numbers of a tile of patches, and which are real ones."""
    patch_n = first + tl.arange(0, N)
    row_in = image_i.to(tl.int64)[:, None] * patches + patch_n[None, :]
    real_in = (image_i < images)[:, None] & (patch_n < patches)[None, :]
    if mask is not None:
        real_in = real_in & (tl.load(mask + row_in, mask=real_in, other=0) != 0)
    return patch_n, row_in, real_in


@triton.jit
@no_type_check
def _words(text_j, last, offsets, M: tl.constexpr):
    """Row numbers of a tile of words, and which are real ones."""
    real_j = text_j < last
    start_j = tl.load(offsets + text_j, mask=real_j, other=0)
    stop_j = tl.load(offsets + text_j + 1, mask=real_j, other=0)
    row_jm = start_j[:, None] + tl.arange(0, M)[None, :]
    return stop_j - start_j, row_jm.to(tl.int64), row_jm < stop_j[:, None]


@triton.jit(do_not_specialize=["images", "texts", "words", "first", "last"])
@no_type_check
def forward(
    offsets,  # [texts + 1]
    columns,  # [texts]: where the scores of a packed text go
    image_table,  # [images * patches, D]
    text_table,  # [words, D]
    image_mask,  # [images, patches] uint8, or None
    i2t,  # [images, texts] fp32
    t2i,  # [images, texts] fp32
    a,  # [images, texts, patches], texts as they are packed; or None
    b,  # [images, words], or None
    images,
    patches,
    texts,
    words,
    first,  # texts first..last of the packed ones
    last,
    D: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    N: tl.constexpr,
    J: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
):
    """Sums of the maxima of one product along both of its sides. Grid: image x text tiles."""
    text_tiles = tl.cdiv(last - first, J)
    image_i = tl.program_id(0) // text_tiles * I + tl.arange(0, I)
    text_j = first + tl.program_id(0) % text_tiles * J + tl.arange(0, J)
    length_j, word_jm, real_jm = _words(text_j, last, offsets, M)
    word_y, real_y = tl.reshape(word_jm, (J * M,)), tl.reshape(real_jm, (J * M,))
    sum_inj = tl.zeros((I, N, J), tl.float32)
    best_ijm = tl.full((I, J, M), float("-inf"), tl.float32)
    b_ijm = tl.zeros((I, J, M), tl.int32)
    pair_ij = image_i.to(tl.int64)[:, None] * texts + text_j[None, :]
    real_ij = (image_i < images)[:, None] & (text_j < last)[None, :]
    for start in range(0, patches, N):
        patch_n, row_in, real_in = _patches(image_i, start, image_mask, images, patches, N)
        row_x, real_x = tl.reshape(row_in, (I * N,)), tl.reshape(real_in, (I * N,))
        s_xy = tl.zeros((I * N, J * M), tl.float32)
        for k in range(0, D, K):
            v_xk = _tokens(image_table, row_x, real_x, k, D, K)
            t_yk = _tokens(text_table, word_y, real_y, k, D, K)
            s_xy = tl.dot(v_xk, tl.trans(t_yk), s_xy, input_precision="ieee")
        s_injm = tl.reshape(s_xy, (I, N, J, M))
        by_word_injm = tl.where(real_jm[None, None, :, :], s_injm, float("-inf"))
        by_patch_injm = tl.where(real_in[:, :, None, None], s_injm, float("-inf"))
        if a is not None:
            word_inj, a_inj = tl.max(by_word_injm, 3, return_indices=True)
            patch_ijm, at_ijm = tl.max(by_patch_injm, 1, return_indices=True)
            b_ijm = tl.where(patch_ijm > best_ijm, start + at_ijm, b_ijm)  # > : the lowest wins
            # where tokens are no numbers, a winner must still be a word of the text
            a_inj = tl.minimum(a_inj, length_j[None, None, :] - 1)
            at_inj = pair_ij[:, None, :] * patches + patch_n[None, :, None]
            store_inj = real_ij[:, None, :] & (patch_n < patches)[None, :, None]
            tl.store(a + at_inj, a_inj.to(a.dtype.element_ty), mask=store_inj)
        else:
            word_inj = tl.max(by_word_injm, 3)
            patch_ijm = tl.max(by_patch_injm, 1)
        sum_inj += tl.where(real_in[:, :, None], word_inj, 0.0)
        best_ijm = tl.maximum(best_ijm, patch_ijm)
    column_j = tl.load(columns + text_j, mask=text_j < last, other=0)
    score_ij = image_i.to(tl.int64)[:, None] * texts + column_j[None, :]
    tl.store(i2t + score_ij, tl.sum(sum_inj, 1), mask=real_ij)
    best_ijm = tl.where(real_jm[None, :, :], best_ijm, 0.0)
    tl.store(t2i + score_ij, tl.sum(best_ijm, 2), mask=real_ij)
    if a is not None:
        at_ijm = image_i.to(tl.int64)[:, None, None] * words + word_jm[None, :, :]
        store_ijm = (image_i < images)[:, None, None] & real_jm[None, :, :]
        tl.store(b + at_ijm, b_ijm.to(b.dtype.element_ty), mask=store_ijm)


@triton.jit
@no_type_check
def _weights(rows, columns, operands, sizes, X: tl.constexpr, Y: tl.constexpr):
    """dL/dS of a tile, scaled: not 0 where a patch chose a word or a word a patch."""
    image_i, patch_n, real_in = rows
    text_j, word_jm, real_jm = columns
    scores, g_i2t, g_t2i, a, b, scale = operands
    images, patches, texts, words, last = sizes
    real_ij = (image_i < images)[:, None] & (text_j < last)[None, :]
    column_j = tl.load(scores + text_j, mask=text_j < last, other=0)
    score_ij = image_i.to(tl.int64)[:, None] * texts + column_j[None, :]
    g_i2t_ij = tl.load(g_i2t + score_ij, mask=real_ij, other=0.0) * scale
    g_t2i_ij = tl.load(g_t2i + score_ij, mask=real_ij, other=0.0) * scale
    pair_ij = image_i.to(tl.int64)[:, None] * texts + text_j[None, :]
    at_inj = pair_ij[:, None, :] * patches + patch_n[None, :, None]
    asks_inj = real_ij[:, None, :] & real_in[:, :, None]
    a_inj = tl.load(a + at_inj, mask=asks_inj, other=0).to(tl.int32)
    g_inj = tl.where(asks_inj, g_i2t_ij[:, None, :], 0.0)
    at_ijm = image_i.to(tl.int64)[:, None, None] * words + word_jm[None, :, :]
    asks_ijm = (image_i < images)[:, None, None] & real_jm[None, :, :]
    b_ijm = tl.load(b + at_ijm, mask=asks_ijm, other=0).to(tl.int32)
    g_ijm = tl.where(asks_ijm, g_t2i_ij[:, :, None], 0.0)
    place_m = tl.arange(0, word_jm.shape[1])
    chose_injm = a_inj[:, :, :, None] == place_m[None, None, None, :]
    chosen_injm = b_ijm[:, None, :, :] == patch_n[None, :, None, None]
    w_injm = tl.where(chose_injm, g_inj[:, :, :, None], 0.0)
    w_injm += tl.where(chosen_injm, g_ijm[:, None, :, :], 0.0)
    return tl.reshape(w_injm, (X, Y))


@triton.jit(do_not_specialize=["images", "texts", "words", "first", "last"])
@no_type_check
def backward_images(
    offsets,  # [texts + 1]
    columns,  # [texts]
    sums,  # [shares, images * patches, D] fp32, added to
    text_table,  # [words, D]
    image_mask,  # [images, patches] uint8, or None
    g_i2t,  # [images, texts] fp32
    g_t2i,  # [images, texts] fp32
    a,  # [images, texts, patches]
    b,  # [images, words]
    scale,  # [1] fp32: what gradients are multiplied by, to suit the type of the tokens
    images,
    patches,
    texts,
    words,
    first,  # texts first..last of the packed ones
    last,
    D: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    N: tl.constexpr,
    J: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
):
    """Add W T to dV. Grid: tiles of patches x shares of the texts x slices of the width."""
    patch_tiles = tl.cdiv(patches, N)
    image_i = tl.program_id(0) // patch_tiles * I + tl.arange(0, I)
    start = tl.program_id(0) % patch_tiles * N
    patch_n, row_in, real_in = _patches(image_i, start, image_mask, images, patches, N)
    share = tl.cdiv(tl.cdiv(last - first, J), tl.num_programs(1)) * J
    begin = first + tl.program_id(1) * share
    column = tl.program_id(2) * K
    factor = tl.load(scale)
    operands = columns, g_i2t, g_t2i, a, b, factor
    sizes = images, patches, texts, words, last
    sum_xk = tl.zeros((I * N, K), tl.float32)
    for text in range(begin, tl.minimum(begin + share, last), J):
        text_j = text + tl.arange(0, J)
        _, word_jm, real_jm = _words(text_j, last, offsets, M)
        tile = (image_i, patch_n, real_in), (text_j, word_jm, real_jm)
        w_xy = _weights(tile[0], tile[1], operands, sizes, I * N, J * M)
        word_y, real_y = tl.reshape(word_jm, (J * M,)), tl.reshape(real_jm, (J * M,))
        t_yk = _tokens(text_table, word_y, real_y, column, D, K)
        sum_xk = tl.dot(w_xy.to(t_yk.dtype), t_yk, sum_xk, input_precision="ieee")
    row_x, real_x = tl.reshape(row_in, (I * N,)), tl.reshape(real_in, (I * N,))
    row_x += tl.program_id(1).to(tl.int64) * images * patches
    _add(sums, row_x, real_x, column, sum_xk / factor, D, K)


@triton.jit(do_not_specialize=["images", "texts", "words", "first", "last"])
@no_type_check
def backward_texts(
    offsets,
    columns,
    image_table,  # [images * patches, D]
    sums,  # [shares, words of texts first..last, D] fp32, added to
    image_mask,  # these as above
    g_i2t,
    g_t2i,
    a,
    b,
    scale,
    images,
    patches,
    texts,
    words,
    first,
    last,
    D: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    N: tl.constexpr,
    J: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
):
    """Add W' V to dT. Grid: tiles of words x shares of the images x slices of the width."""
    text_j = first + tl.program_id(0) * J + tl.arange(0, J)
    _, word_jm, real_jm = _words(text_j, last, offsets, M)
    share = tl.cdiv(tl.cdiv(images, I), tl.num_programs(1)) * I
    begin = tl.program_id(1) * share
    column = tl.program_id(2) * K
    factor = tl.load(scale)
    operands = columns, g_i2t, g_t2i, a, b, factor
    sizes = images, patches, texts, words, last
    sum_yk = tl.zeros((J * M, K), tl.float32)
    for image in range(begin, tl.minimum(begin + share, images), I):
        image_i = image + tl.arange(0, I)
        for start in range(0, patches, N):
            patch_n, row_in, real_in = _patches(image_i, start, image_mask, images, patches, N)
            tile = (image_i, patch_n, real_in), (text_j, word_jm, real_jm)
            w_xy = _weights(tile[0], tile[1], operands, sizes, I * N, J * M)
            row_x, real_x = tl.reshape(row_in, (I * N,)), tl.reshape(real_in, (I * N,))
            v_xk = _tokens(image_table, row_x, real_x, column, D, K)
            w_yx = tl.trans(w_xy.to(v_xk.dtype))
            sum_yk = tl.dot(w_yx, v_xk, sum_yk, input_precision="ieee")
    word_y, real_y = tl.reshape(word_jm, (J * M,)), tl.reshape(real_jm, (J * M,))
    base, end = tl.load(offsets + first), tl.load(offsets + last)
    word_y += tl.program_id(1).to(tl.int64) * (end - base) - base
    _add(sums, word_y, real_y, column, sum_yk / factor, D, K)
