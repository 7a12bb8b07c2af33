"""Late interaction against published arrays, plain loops, peers' formulas and invariances."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tenfold.contrastive import drop_small_gradients, info_nce, late, late_interaction, tiled
from tenfold.errors import UserError

REFERENCE = np.load(Path(__file__).parent / "reference/filip-vl/reference_late_interaction.npz")
IMPLS = ["naive", "tiled"]
PRECISIONS = [(torch.float32, 1e-5), (torch.float64, 1e-6)]


@pytest.fixture(params=IMPLS)
def impl(request) -> Any:
    return request.param


@pytest.fixture
def small_tiles(monkeypatch) -> None:
    """Tiles and blocks so small that a few images and words have borders between them."""
    monkeypatch.setattr(tiled, "_TILE", 600)
    monkeypatch.setattr(tiled, "_IMAGES", 3)
    monkeypatch.setattr(tiled, "_BLOCK_IMAGES", 2)
    monkeypatch.setattr(tiled, "_BLOCK_WORDS", 7)


def reference(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    array = torch.from_numpy(REFERENCE[name])
    return array.to(dtype) if array.is_floating_point() else array


MEASURE = """
import ctypes, gc, sys, time
import torch
from torch.nn import functional as F
from tenfold.contrastive import info_nce, late_interaction

def kilobytes(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

torch.set_num_threads(1)
impl, batch = sys.argv[1], int(sys.argv[2])
generator = torch.Generator().manual_seed(0)
shapes = (batch, 49, 256), (batch, 77, 256)
v, t = (F.normalize(torch.randn(*shape, generator=generator), dim=2) for shape in shapes)
v.requires_grad_(), t.requires_grad_()
lengths = 3 + torch.poisson(torch.full((batch,), 11.0), generator=generator)
mask = torch.arange(77) < lengths[:, None]
sum(late_interaction(v[:4], t[:4], None, mask[:4], impl=impl)).sum().backward()
gc.collect()
ctypes.CDLL("libc.so.6").malloc_trim(0)
open("/proc/self/clear_refs", "w").write("5")
before, start = kilobytes("VmRSS"), time.process_time()
loss = info_nce(*late_interaction(v, t, None, mask, impl=impl), 14.0)
torch.autograd.grad(loss, (v, t))
print(time.process_time() - start, (kilobytes("VmHWM") - before) / 1024)
"""


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def some(seed: int, *shape: int) -> Tensor:
    """A mask with holes anywhere, but no empty row."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(*shape, generator=generator) < 0.6
    mask[torch.arange(shape[0]), torch.randint(shape[1], shape[:1], generator=generator)] = True
    return mask


def loss_and_gradients(
    impl: Any, dtype: torch.dtype, targets: Tensor | None = None
) -> tuple[Tensor, ...]:
    v, t = (reference(f"{side}_tokens", dtype).requires_grad_() for side in ("image", "text"))
    log_scale = reference("log_scale", dtype).requires_grad_()
    scores = late_interaction(
        F.normalize(v, dim=2), F.normalize(t, dim=2), None, reference("text_mask"), impl=impl
    )
    loss = info_nce(*scores, log_scale.exp(), targets)
    return loss.detach(), *torch.autograd.grad(loss, (v, t, log_scale))


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(
        found.double(), expected.double(), atol=tolerance, rtol=10 * tolerance
    )


# ---------------------------------------------------------------------------- published arrays


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_scores_and_winners_are_the_published_ones(impl, dtype, tolerance):
    v, t = (F.normalize(reference(f"{side}_tokens", dtype), dim=2) for side in ("image", "text"))
    mask = reference("text_mask")
    i2t, t2i, a, b = late_interaction(v, t, None, mask, impl=impl, return_argmax=True)
    assert i2t.dtype == t2i.dtype == dtype
    close(i2t, reference("sim_i2t"), tolerance)
    close(t2i, reference("sim_t2i"), tolerance)
    assert torch.equal(a, reference("argmax_word_of_patch"))
    words = mask.expand_as(b)
    assert torch.equal(b[words], reference("argmax_patch_of_word")[words])
    assert (b[~words] == -1).all()
    close(i2t.view(8, 4, 2).mean(2), reference("prompt_class_scores"), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_sums_are_the_published_ones(impl, dtype, tolerance):
    v, t = (F.normalize(reference(f"{side}_tokens", dtype), dim=2) for side in ("image", "text"))
    i2t, t2i = late_interaction(v, t, None, reference("text_mask"), impl=impl, reduce="sum")
    close(i2t, reference("colbert_sum_i2t"), tolerance)
    close(t2i, reference("colbert_sum_t2i"), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_loss_and_gradients_are_the_published_ones(impl, dtype, tolerance):
    loss, dv, dt, d_scale = loss_and_gradients(impl, dtype)
    close(loss, reference("loss"), tolerance)
    close(dv, reference("grad_image_tokens"), tolerance)
    close(dt, reference("grad_text_tokens"), tolerance)
    close(d_scale, reference("grad_log_scale"), tolerance)
    assert not dt[~reference("text_mask")].any()


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_loss_and_gradients_of_several_positives_are_the_published_ones(impl, dtype, tolerance):
    loss, dv, dt, _ = loss_and_gradients(impl, dtype, reference("positives"))
    close(loss, reference("loss_multi_positive"), tolerance)
    close(dv, reference("grad_image_tokens_multi_positive"), tolerance)
    close(dt, reference("grad_text_tokens_multi_positive"), tolerance)


# --------------------------------------------------------------------------------- plain loops


def loops(v: Tensor, t: Tensor, v_mask: Tensor, t_mask: Tensor, g: Tensor) -> list[Tensor]:
    """Scores, winners, and gradients of (g * scores).sum(), token by token (spec of section 3)."""
    (images, patches, _), (texts, words, _) = v.shape, t.shape
    scores = torch.zeros(2, images, texts, dtype=v.dtype)
    a = torch.full((images, texts, patches), -1)
    b = torch.full((images, texts, words), -1)
    dv, dt = torch.zeros_like(v), torch.zeros_like(t)
    for i in range(images):
        for j in range(texts):
            ks = [k for k in range(patches) if v_mask[i, k]]
            rs = [r for r in range(words) if t_mask[j, r]]
            for k in ks:
                best = max(rs, key=lambda r: float(v[i, k] @ t[j, r]))
                a[i, j, k] = best
                scores[0, i, j] += v[i, k] @ t[j, best] / len(ks)
                dv[i, k] += g[0, i, j] / len(ks) * t[j, best]
                dt[j, best] += g[0, i, j] / len(ks) * v[i, k]
            for r in rs:
                best = max(ks, key=lambda k: float(v[i, k] @ t[j, r]))
                b[i, j, r] = best
                scores[1, i, j] += v[i, best] @ t[j, r] / len(rs)
                dt[j, r] += g[1, i, j] / len(rs) * v[i, best]
                dv[i, best] += g[1, i, j] / len(rs) * t[j, r]
    return [*scores, a, b, dv, dt]


def everything(impl: Any, v: Tensor, t: Tensor, *masks: Tensor | None, g: Tensor) -> list[Tensor]:
    """What `loops` returns, of one of the implementations."""
    v, t = (x.clone().requires_grad_() for x in (v, t))
    i2t, t2i, a, b = late_interaction(v, t, *masks, impl=impl, return_argmax=True)
    grads = torch.autograd.grad([i2t, t2i], [v, t], [*g.to(i2t.dtype)])
    return [i2t.detach(), t2i.detach(), a, b, *grads]


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_it_is_what_loops_over_tokens_say(impl, small_tiles, ties):
    v, t = normal(0, 4, 5, 3), normal(1, 5, 4, 3)
    if ties:
        v, t = v.round(), t.round()
    masks, g = (some(2, 4, 5), some(3, 5, 4)), normal(4, 2, 4, 5)
    same(everything(impl, v, t, *masks, g=g), loops(v, t, *masks, g))


@pytest.mark.parametrize("sides", ["both", "images", "texts"])
def test_its_gradient_is_that_of_differences(impl, sides):
    v, t = F.normalize(normal(0, 3, 4, 5), dim=2), F.normalize(normal(1, 2, 3, 5), dim=2)
    v.requires_grad_(sides != "texts")
    t.requires_grad_(sides != "images")
    masks = some(2, 3, 4), some(3, 2, 3)
    assert torch.autograd.gradcheck(lambda v, t: late_interaction(v, t, *masks, impl=impl), (v, t))


@pytest.mark.parametrize("side", [0, 1])
def test_one_direction_alone_has_its_own_gradient(impl, side):
    v, t, mask = normal(0, 3, 4, 5).requires_grad_(), normal(1, 3, 6, 5), some(2, 3, 6)
    found = torch.autograd.grad(late_interaction(v, t, None, mask, impl=impl)[side].sum(), v)
    g = torch.zeros(2, 3, 3).double()
    g[side] = 1
    expected = loops(v.detach(), t, torch.ones(3, 4).bool(), mask, g)[4]
    torch.testing.assert_close(found[0], expected)


# ---------------------------------------------------------------------------- tiled = naive

SHAPES = {
    "more images than a tile": (70, 9, 5, 4, 3),
    "more words than a block": (5, 90, 3, 7, 3),
    "one patch": (6, 5, 1, 4, 3),
    "one word": (6, 5, 4, 1, 3),
    "one image": (1, 7, 4, 3, 2),
    "one text": (7, 1, 4, 3, 2),
    "more patches than a byte": (3, 4, 300, 5, 4),
    "more words than a byte": (4, 3, 5, 300, 4),
    "width one": (4, 4, 3, 3, 1),
}


@pytest.mark.parametrize("masked", ["neither", "texts", "both"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_tiles_find_what_the_equations_say(shape, masked):
    images, texts, patches, words, dim = shape
    v, t = normal(0, images, patches, dim), normal(1, texts, words, dim)
    v_mask = some(2, images, patches) if masked == "both" else None
    t_mask = None if masked == "neither" else some(3, texts, words)
    g = normal(4, 2, images, texts)
    found, expected = (everything(impl, v, t, v_mask, t_mask, g=g) for impl in ("tiled", "naive"))
    same(found, expected)


@given(
    images=st.integers(1, 8),
    texts=st.integers(1, 8),
    patches=st.integers(1, 6),
    words=st.integers(1, 6),
    masked=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_tiles_of_any_shape_find_it_with_ties_and_duplicates(
    images, texts, patches, words, masked, seed
):
    v, t = normal(seed, images, patches, 2).round(), normal(seed + 1, texts, words, 2).round()
    v[-1], t[-1] = v[0], t[0]
    v_mask = some(seed + 2, images, patches) if masked[0] else None
    t_mask = some(seed + 3, texts, words) if masked[1] else None
    g = normal(seed + 4, 2, images, texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled, "_TILE", 400)
        patch.setattr(tiled, "_IMAGES", 3)
        patch.setattr(tiled, "_BLOCK_IMAGES", 2)
        patch.setattr(tiled, "_BLOCK_WORDS", 7)
        found = everything("tiled", v, t, v_mask, t_mask, g=g)
    same(found, everything("naive", v, t, v_mask, t_mask, g=g))


def test_without_gradients_the_scores_are_the_same(impl):
    v, t, mask = normal(0, 5, 4, 3).requires_grad_(), normal(1, 4, 6, 3), some(2, 4, 6)
    with_gradient = late_interaction(v, t, None, mask, impl=impl, return_argmax=True)
    with torch.no_grad():
        same([*late_interaction(v, t, None, mask, impl=impl, return_argmax=True)], [*with_gradient])
        same([*late_interaction(v, t, None, mask, impl=impl)], [*with_gradient[:2]])


def test_no_rows_give_no_scores(impl):
    v, t = normal(0, 0, 4, 3), normal(1, 5, 2, 3)
    assert [s.shape for s in late_interaction(v, t, impl=impl)] == [(0, 5), (0, 5)]
    assert [s.shape for s in late_interaction(t, v, impl=impl)] == [(5, 0), (5, 0)]


# --------------------------------------------------------------------------------- invariances


def test_the_order_of_tokens_does_not_matter(impl):
    v, t, mask, g = normal(0, 3, 5, 4), normal(1, 4, 6, 4), some(2, 4, 6), normal(3, 2, 3, 4)
    i2t, t2i, _, _, dv, dt = everything(impl, v, t, None, mask, g=g)
    p, r = torch.randperm(5), torch.randperm(6)
    *scores, _, _, dv_p, dt_r = everything(impl, v[:, p], t[:, r], None, mask[:, r], g=g)
    same([*scores, dv_p, dt_r], [i2t, t2i, dv[:, p], dt[:, r]])


def test_the_order_of_rows_is_the_order_of_scores(impl):
    v, t, mask, g = normal(0, 5, 3, 4), normal(1, 6, 4, 4), some(2, 6, 4), normal(3, 2, 5, 6)
    before = everything(impl, v, t, None, mask, g=g)
    p, r = torch.randperm(5), torch.randperm(6)
    after = everything(impl, v[p], t[r], None, mask[r], g=g[:, p][:, :, r])
    matrices = [x[p][:, r] for x in before[:4]]
    same(after, [*matrices, before[4][p], before[5][r]])


@pytest.mark.parametrize("junk", [7.0, -7.0, float("nan"), float("inf")])
def test_padding_changes_nothing_whatever_it_holds(impl, junk):
    v, t, g = normal(0, 3, 5, 4), normal(1, 4, 6, 4), normal(2, 2, 3, 4)
    before = everything(impl, v, t, None, None, g=g)
    padded = [F.pad(x, (0, 0, 0, 2), value=junk) for x in (v, t)]
    masks = [F.pad(torch.ones(x.shape[:2]).bool(), (0, 2)) for x in (v, t)]
    after = everything(impl, *padded, *masks, g=g)
    assert not any(d[:, -2:].any() for d in after[4:])
    assert all((winners[..., -2:] == -1).all() for winners in after[2:4])
    cut = [x[..., :-2] for x in after[2:4]] + [d[:, :-2] for d in after[4:]]
    same([*after[:2], *cut], before)


def test_padding_that_is_not_masked_counts_as_a_token(impl):
    v, t, mask = normal(0, 3, 5, 4), normal(1, 4, 6, 4), some(2, 4, 6)
    unmasked = late_interaction(v, t, impl=impl)
    same([*late_interaction(v, t, None, mask, impl=impl, mask_padding=False)], [*unmasked])


def test_a_broken_token_shows_in_the_scores_it_takes_part_in(impl):
    v, t = normal(0, 3, 5, 4), normal(1, 4, 6, 4)
    v[1, 2] = torch.nan
    for scores in late_interaction(v.requires_grad_(), t, impl=impl):
        assert scores[1].isnan().all()
        assert scores[[0, 2]].isfinite().all()


# ---------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(impl, dtype):
    v, t, mask = normal(0, 4, 5, 8).to(dtype), normal(1, 4, 6, 8).to(dtype), some(2, 4, 6)
    full = late_interaction(v.float(), t.float(), None, mask, impl=impl)
    half = late_interaction(v.requires_grad_(), t, None, mask, impl=impl)
    for x, y in zip(half, full, strict=True):
        assert torch.equal(x, y)
    (gradient,) = torch.autograd.grad(half[0].sum(), v)
    assert gradient.dtype == dtype


def test_autocast_does_not_reach_inside(impl):
    v, t = normal(0, 4, 5, 8).float(), normal(1, 4, 6, 8).float()
    plain = late_interaction(v, t, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        cast = late_interaction(v, t, impl=impl)
    assert all(torch.equal(x, y) for x, y in zip(plain, cast, strict=True))


# ---------------------------------------------------------------------------------- bad input


def test_a_row_of_padding_alone_is_named(impl):
    v, t, mask = normal(0, 3, 5, 4), normal(1, 4, 6, 4), torch.ones(4, 6).bool()
    mask[2] = False
    with pytest.raises(ValueError, match="no valid token in text row 2"):
        late_interaction(v, t, None, mask, impl=impl)
    with pytest.raises(ValueError, match="no valid token in image row 0, 2"):
        late_interaction(v, t, torch.tensor([0, 1, 0]).bool()[:, None].expand(3, 5), impl=impl)


def test_misfits_are_refused():
    v, t = normal(0, 3, 5, 4), normal(1, 4, 6, 4)
    with pytest.raises(ValueError, match="width 4, text tokens 3"):
        late_interaction(v, t[..., :3])
    with pytest.raises(ValueError, match="at least one token"):
        late_interaction(v, t[:, :0])
    with pytest.raises(
        ValueError, match=r"shape \(4, 5\): it must be torch.bool of shape \(4, 6\)"
    ):
        late_interaction(v, t, None, torch.ones(4, 5).bool())
    with pytest.raises(Exception, match=r"torch.bool|type hint"):  # jaxtyping may see it first
        late_interaction(v, t, None, torch.ones(4, 6).long())
    for options in ({"impl": "fast"}, {"reduce": "max"}):
        with pytest.raises(Exception, match=r"must be one of|type hint"):
            late_interaction(v, t, **options)  # pyright: ignore[reportArgumentType, reportCallIssue]


def test_kernels_without_a_gpu_are_refused_and_auto_takes_tiles(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    v, t = normal(0, 3, 5, 4), normal(1, 4, 6, 4)
    with pytest.raises(UserError, match="impl='auto'"):
        late_interaction(v, t, impl="triton")
    same([*late_interaction(v, t, impl="auto")], [*late_interaction(v, t, impl="tiled")])


def broken(*given: Any, **options: Any) -> Any:
    raise RuntimeError("PTX of another world\nand more")


def wrong(*given: Any, **options: Any) -> Any:
    i2t, t2i, *winners = tiled.late_interaction_tiled(*given, **options)
    return (i2t, t2i * 1.1, *winners)


@pytest.mark.parametrize(("form", "told"), [(broken, "PTX of another world"), (wrong, "differ by")])
def test_kernels_that_fail_on_a_device_are_not_taken(monkeypatch, caplog, form, told):
    given = torch.device("cpu"), torch.float32, 8
    monkeypatch.setattr(late, "late_interaction_fused", tiled.late_interaction_tiled)
    late.kernels_agree.cache_clear()
    with torch.inference_mode():
        assert late.kernels_agree(*given)
    assert not caplog.text
    monkeypatch.setattr(late, "late_interaction_fused", form)
    assert late.kernels_agree(*given)  # a device is tried once
    late.kernels_agree.cache_clear()
    assert not late.kernels_agree(*given)
    assert told in caplog.text
    assert "and more" not in caplog.text
    late.kernels_agree.cache_clear()


def test_tiles_say_that_they_have_no_second_derivative():
    def slope(impl: Any) -> Tensor:
        v, t = normal(0, 3, 5, 4).requires_grad_(), normal(1, 3, 6, 4)
        loss = info_nce(*late_interaction(v, t, impl=impl), 10.0)
        (gradient,) = torch.autograd.grad(loss, v, create_graph=True)
        return gradient.square().sum()

    slope("naive").backward()
    with pytest.raises(RuntimeError, match="no second derivative: take impl='naive'"):
        slope("tiled").backward()


# ------------------------------------------------------------------------- small gradients


def test_small_gradients_are_dropped_on_the_way_back_alone():
    v, t, mask = normal(0, 30, 4, 5).requires_grad_(), normal(1, 30, 6, 5), some(2, 30, 6)
    scores = late_interaction(v, t, None, mask, impl="tiled")
    g = torch.eye(30).double() + 1e-4
    dropped = [drop_small_gradients(s, 1e-3) for s in scores]
    assert all(torch.equal(x, y) for x, y in zip(dropped, scores, strict=True))
    found = torch.autograd.grad(dropped, v, [g, g], retain_graph=True)[0]
    large = torch.where(g > 1e-3, g, 0)
    expected = torch.autograd.grad([*scores], v, [large, large])[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert drop_small_gradients(scores[0], 0) is scores[0]
    with pytest.raises(ValueError, match="tol"):
        drop_small_gradients(scores[0], 1.0)


# -------------------------------------------------------------------------------------- peers


def pylate(queries: Tensor, documents: Tensor, q_mask: Tensor, d_mask: Tensor) -> Tensor:
    """The sum over valid query words of the maximum over all document words of S x mask."""
    s = torch.einsum("qrd,pkd->qprk", queries, documents) * d_mask[:, None]
    return (s.max(3).values * q_mask[:, None]).sum(2)


def colpali(queries: Tensor, documents: Tensor) -> Tensor:
    """The sum over query rows of the maximum over document rows, over the rows that are not 0."""
    s = torch.einsum("qrd,pkd->qprk", queries, documents)
    return s.amax(3).sum(2) / (queries[:, :, 0] != 0).sum(1, keepdim=True)


def conversation() -> tuple[Tensor, ...]:
    """Queries and documents, zeros where they are padded, and their masks."""
    q, d = F.normalize(normal(0, 4, 5, 8), dim=2), F.normalize(normal(1, 6, 7, 8), dim=2)
    masks = torch.arange(5) < torch.tensor([5, 3, 1, 4])[:, None], some(3, 6, 7)
    return q * masks[0].unsqueeze(2), d * masks[1].unsqueeze(2), *masks


def test_maxsim_is_pylates_where_no_word_is_unlike_a_whole_document(impl):
    q, d, q_mask, d_mask = conversation()
    full = torch.ones_like(d_mask)
    _, ours = late_interaction(d, q, None, q_mask, impl=impl, reduce="sum")
    torch.testing.assert_close(ours.T, pylate(q, d, q_mask, full))
    _, ours, _, b = late_interaction(
        d, q, d_mask, q_mask, impl=impl, reduce="sum", return_argmax=True
    )
    best = torch.einsum("qrd,pkd->pqrk", q, d).masked_fill(~d_mask[:, None, None], -9).amax(3)
    unlike = (best < 0) & (b >= 0) & ~d_mask.all(1)[:, None, None]
    assert unlike.any()
    # a padded word counts 0 there, where the nearest real one is negative
    gap = torch.where(unlike, -best, 0).sum(2)
    torch.testing.assert_close((ours + gap).T, pylate(q, d, q_mask, d_mask))


def test_the_mean_is_colpalis_where_documents_have_no_padding(impl):
    q, d, q_mask, d_mask = conversation()
    whole = F.normalize(normal(1, 6, 7, 8), dim=2)
    _, ours = late_interaction(whole, q, None, q_mask, impl=impl)
    theirs = colpali(q, whole)
    torch.testing.assert_close(ours.T, theirs)
    _, ours = late_interaction(d, q, d_mask, q_mask, impl=impl)
    gap = colpali(q, d) - ours.T  # their zero rows win over negative similarities
    assert gap.min() > -1e-12
    assert gap.max() > 0.01


def test_of_equal_words_the_first_has_the_gradient_where_colpali_splits_it(impl):
    q, d = normal(0, 1, 1, 3), normal(1, 1, 1, 3).repeat(1, 2, 1).requires_grad_()
    (ours,) = torch.autograd.grad(late_interaction(d, q, impl=impl)[1].sum(), d)
    (theirs,) = torch.autograd.grad(colpali(q, d).sum(), d)
    torch.testing.assert_close(ours, torch.stack([q[0, 0], torch.zeros(3).double()])[None])
    torch.testing.assert_close(theirs, q.repeat(1, 2, 1) / 2)


# ------------------------------------------------------------------------------ time and memory


class LargestTensor(TorchDispatchMode):
    """Remembers how many elements the largest tensor had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.itemsize)
        return out


def step(impl: Any, v: Tensor, t: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    loss = info_nce(*late_interaction(v, t, None, mask, impl=impl), 14.0)
    return loss.detach(), *torch.autograd.grad(loss, (v, t))


def captions(batch: int, patches: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unit tokens, and texts of 77 words of which 3 + Poisson(11) are valid."""
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, patches, dim), (batch, 77, dim)
    v, t = (F.normalize(torch.randn(*shape, generator=generator), dim=2) for shape in shapes)
    lengths = 3 + torch.poisson(torch.full((batch,), 11.0), generator=generator)
    return v.requires_grad_(), t.requires_grad_(), torch.arange(77) < lengths[:, None]


@pytest.mark.parametrize("grad", [True, False])
def test_no_tensor_of_all_products_is_made(grad):
    inputs = captions(96, 24, 16)
    largest: dict[str, int] = {}
    for impl in IMPLS:
        with LargestTensor() as seen:
            if grad:
                step(impl, *inputs)
            else:
                with torch.no_grad():
                    late_interaction(*inputs[:2], None, inputs[2], impl=impl)  # pyright: ignore[reportArgumentType, reportCallIssue]
        largest[impl] = seen.elements
    assert largest["naive"] == 96 * 24 * 96 * 77
    assert largest["tiled"] <= max(1 << 18, 96 * 24 * 96)  # a tile, or the winners


def test_tiles_of_the_real_size_have_the_naive_loss_and_gradients():
    inputs = captions(64, 49, 256)
    found, expected = (step(impl, *inputs) for impl in ("tiled", "naive"))
    assert abs(found[0] - expected[0]) < 1e-5
    assert max((x - y).abs().max() for x, y in zip(found[1:], expected[1:], strict=True)) < 1e-6


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's counters")
def test_a_batch_of_256_takes_a_sixth_of_the_time_and_a_twentieth_of_the_memory():
    def measure(impl: str, batch: int) -> tuple[float, float]:
        """CPU seconds, and MiB on top of the inputs, of one step in a process of its own."""
        command = [sys.executable, "-c", MEASURE, impl, str(batch)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds, mebibytes = map(float, done.stdout.split())
        return seconds, mebibytes

    (naive_time, naive_memory), (time_, memory) = (measure(impl, 256) for impl in IMPLS)
    assert naive_time > 6 * time_
    assert naive_memory > 20 * memory
    assert measure("tiled", 1024)[1] < 512
