"""Late interaction's Triton kernels: interpreted, compiled, and on a GPU if there is one.

Whether Triton interprets is settled when it is first imported: the interpreter has a process of
its own, which imports no more than it needs.
"""

import importlib.util
import math
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tenfold.contrastive import Impl, fused, late_interaction
from tenfold.contrastive.fused import late_interaction_fused
from tenfold.contrastive.late import kernels_agree
from tenfold.errors import UserError
from tenfold.pytest_plugin import check_annotations

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


@dataclass(frozen=True)
class Problem:
    """Tokens, masks and the gradients of both scores."""

    v: Tensor
    t: Tensor
    g_i2t: Tensor
    g_t2i: Tensor
    v_mask: Tensor | None = None
    t_mask: Tensor | None = None


def problem(
    images: int,
    texts: int,
    patches: int,
    words: int,
    width: int,
    *,
    dtype: torch.dtype = torch.float32,
    v_masked: bool = False,
    lengths: list[int] | None = None,
) -> Problem:
    """Random unit tokens; masks with holes; texts of given lengths, whose words are anywhere."""
    g = torch.Generator().manual_seed(0)
    v = F.normalize(torch.randn(images, patches, width, generator=g), dim=-1).to(dtype)
    t = F.normalize(torch.randn(texts, words, width, generator=g), dim=-1).to(dtype)
    g_i2t, g_t2i = torch.randn(2, images, texts, generator=g).unbind()
    v_mask = t_mask = None
    if v_masked:
        v_mask = torch.rand(images, patches, generator=g) < 0.7
        v_mask[:, patches // 2] = True
    if lengths is not None:
        places = torch.rand(texts, words, generator=g).argsort(1)
        t_mask = places < torch.tensor(lengths).unsqueeze(1)
    return Problem(v, t, g_i2t, g_t2i, v_mask, t_mask)


def by_hand(p: Problem) -> list[np.ndarray]:
    """Scores, winners and gradients of all pairs one by one, in float64, as the paper defines them.

    numpy's argmax returns the lowest place on ties.
    """
    v, t = p.v.double().numpy(), p.t.double().numpy()
    (images, patches, _), (texts, words, _) = v.shape, t.shape
    i2t, t2i = np.zeros((2, images, texts))
    a, b = np.full((images, texts, patches), -1), np.full((images, texts, words), -1)
    dv, dt = np.zeros(v.shape), np.zeros(t.shape)
    for i in range(images):
        own = np.arange(patches) if p.v_mask is None else p.v_mask[i].numpy().nonzero()[0]
        for j in range(texts):
            said = np.arange(words) if p.t_mask is None else p.t_mask[j].numpy().nonzero()[0]
            s = v[i, own] @ t[j, said].T
            i2t[i, j], t2i[i, j] = s.max(1).sum(), s.max(0).sum()
            a[i, j, own], b[i, j, said] = said[s.argmax(1)], own[s.argmax(0)]
            g_i2t, g_t2i = p.g_i2t[i, j].item(), p.g_t2i[i, j].item()
            for k, r in zip(own, a[i, j, own], strict=True):
                dv[i, k] += g_i2t * t[j, r]
                dt[j, r] += g_i2t * v[i, k]
            for r, k in zip(said, b[i, j, said], strict=True):
                dv[i, k] += g_t2i * t[j, r]
                dt[j, r] += g_t2i * v[i, k]
    return [i2t, t2i, a, b, dv, dt]


def solved(p: Problem, patches: dict[str, Any] | None = None, **options: Any) -> list[np.ndarray]:
    """The same of the kernels; `patches` are of names in the module."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in (patches or {}).items():
            monkeypatch.setattr(fused, name, value)
        v, t = (x.detach().clone().requires_grad_() for x in (p.v, p.t))
        found = late_interaction_fused(v, t, p.v_mask, p.t_mask, return_argmax=True, **options)
        dv, dt = torch.autograd.grad(found[:2], (v, t), (p.g_i2t, p.g_t2i))
    assert [x.dtype for x in (*found, dv, dt) if x is not None] == [
        *(torch.float32, torch.float32, torch.int64, torch.int64, p.v.dtype, p.t.dtype)
    ]
    return [np.array(x.detach().double()) for x in (*found, dv, dt) if x is not None]


def same(found: list[np.ndarray], expected: list[np.ndarray], dtype: torch.dtype) -> None:
    for x, y in zip(found[:2], expected[:2], strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    for x, y in zip(found[2:4], expected[2:4], strict=True):
        np.testing.assert_array_equal(x, y)
    for x, y in zip(found[4:], expected[4:], strict=True):
        if dtype == torch.float32:
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
        else:
            assert np.linalg.norm(x - y) <= 2e-3 * np.linalg.norm(y)


# -------------------------------------------------------------------------------- interpreter


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable[..., Any]]:
    """Calls a function where Triton interprets."""
    with ProcessPoolExecutor(1, get_context("spawn"), check_annotations, ("tenfold",)) as pool:
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setenv("TRITON_INTERPRET", "1")
            monkeypatch.setenv("OMP_NUM_THREADS", "1")
            pool.submit(int).result()  # starts the process
        yield lambda function, *args, **options: pool.submit(function, *args, **options).result()


MIXED = [1, 2, 5, 9, 1, 17, 33, 3]


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("sizes", "hidden"),
    [
        pytest.param((3, 5, 7, 6, 20), {}, id="odd"),
        pytest.param((5, 4, 1, 1, 16), {}, id="pooled"),
        pytest.param((5, 8, 12, 40, 24), {"lengths": MIXED}, id="long and short"),
        pytest.param((3, 2, 70, 5, 40), {"v_masked": True, "lengths": [1, 4]}, id="both hidden"),
    ],
)
def test_scores_winners_and_gradients_are_those_by_hand(interpreted, sizes, hidden, dtype):
    p = problem(*sizes, **hidden, dtype=dtype)
    same(interpreted(solved, p), by_hand(p), dtype)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_trial_before_auto_takes_them_finds_them_right(interpreted, dtype):
    assert interpreted(kernels_agree, torch.device("cpu"), dtype, 32)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_trial_on_the_gpu(dtype):
    assert kernels_agree(torch.device("cuda", 0), dtype, 256)


@needs_triton
def test_more_than_256_patches_or_words_take_two_bytes(interpreted):
    byte, two = torch.uint8, torch.int16
    cases = {
        (256, 4): [byte, byte],
        (257, 4): [byte, two],
        (4, 256): [byte] * 2,
        (4, 257): [two, byte],
    }
    for (patches, words), types in cases.items():
        p = problem(2, 2, patches, words, 16)
        same(interpreted(solved, p), by_hand(p), torch.float32)
        assert interpreted(kept, p, "store") == types


def kept(p: Problem, save: Any, limit: int = 1 << 29) -> list[torch.dtype]:
    """The types of the winners that wait for the backward pass."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(fused, "_STORE_BYTES", limit)
        i2t, *_ = late_interaction_fused(p.v.requires_grad_(), p.t, save_argmax=save)
    node: Any = i2t.grad_fn
    return [x.dtype for x in node.saved_tensors[2:]]


@needs_triton
def test_equal_tokens_leave_the_win_and_the_gradient_to_the_first(interpreted):
    p = problem(2, 2, 40, 6, 16)  # 40 patches are several tiles
    v, t = p.v.clone(), p.t.clone()
    t[:, 0], v[:, 0] = v[0, 2], t[0, 1]  # the ones that are wanted most
    v[:, 2], v[:, 3], v[:, 35] = v[0, 2], v[0, 2], v[0, 2]
    t[:, 1], t[:, 4], t[:, 5] = t[0, 1], t[0, 1], t[0, 1]
    p = replace(p, v=v, t=t)
    found = interpreted(solved, p)
    same(found, by_hand(p), torch.float32)
    assert found[2][:, :, 0].tolist() == [[1, 1], [1, 1]]
    assert found[3][:, :, 0].tolist() == [[2, 2], [2, 2]]


@needs_triton
def test_winners_kept_and_found_again_give_one_gradient(interpreted):
    p = problem(5, 4, 7, 12, 20, v_masked=True, lengths=[9, 1, 12, 5])
    winners = 4 * 7 + 27  # of one image, a byte each
    kept_ones = interpreted(solved, p, save_argmax="store")
    for limit in (1, 2 * winners):  # one image at a time, and two
        again = interpreted(solved, p, {"_STORE_BYTES": limit}, save_argmax="recompute")
        same(again, kept_ones, torch.float32)


def one_score_alone(p: Problem, which: int) -> list[np.ndarray]:
    v, t = (x.detach().clone().requires_grad_() for x in (p.v, p.t))
    score = late_interaction_fused(v, t)[which]
    grads = torch.autograd.grad(score, (v, t), (p.g_i2t, p.g_t2i)[which])
    return [x.double().numpy() for x in grads]


@needs_triton
@pytest.mark.parametrize(("which", "unused"), [(0, "g_t2i"), (1, "g_i2t")])
def test_one_score_alone_has_its_gradient(interpreted, which, unused):
    p = problem(3, 4, 5, 6, 16)
    expected = by_hand(replace(p, **{unused: torch.zeros(3, 4)}))[4:]
    for x, y in zip(interpreted(one_score_alone, p, which), expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@needs_triton
def test_winners_are_kept_up_to_a_limit(interpreted):
    p = problem(3, 2, 4, 5, 16)
    winners = 3 * 2 * (4 + 5)
    assert len(interpreted(kept, p, "auto", winners + 1)) == 2
    assert interpreted(kept, p, "auto", winners) == []
    assert len(interpreted(kept, p, "store", winners)) == 2
    assert interpreted(kept, p, "recompute") == []


def processors(device: torch.device) -> int:
    return 64


launch = fused._launch


def launch_apart(kernel: str, grid: Any, shape: Any, operands: Any, *rest: Any) -> None:
    """Programs of the interpreter run in turn, so that a place they share would go unnoticed."""
    launch(kernel, grid, shape, operands, *rest)
    if kernel != "forward":
        sums = operands[kernel == "backward_texts"]
        assert len(sums) == grid[1] > 1
        assert sums.flatten(1).any(1).all()


@needs_triton
def test_sums_split_over_programs_are_the_same_sums(interpreted):
    p = problem(5, 6, 20, 40, 20, v_masked=True, lengths=[33, 20, 34, 21, 40, 22])
    split = {"_processors": processors, "_launch": launch_apart}
    same(interpreted(solved, p, split), by_hand(p), torch.float32)


def test_sums_are_split_where_programs_are_few(monkeypatch):
    monkeypatch.setattr(fused, "_processors", lambda device: 132)
    cases = {(4, 100): 33, (4, 7): 7, (132, 100): 1, (5000, 100): 1}
    assert {case: fused._shares(torch.device("cpu"), *case) for case in cases} == cases


@needs_triton
@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_gradients_of_any_size_keep_their_digits_in_half_precision(interpreted, size):
    p = problem(3, 4, 7, 6, 20, dtype=torch.bfloat16)
    p = replace(p, g_i2t=p.g_i2t * size, g_t2i=p.g_t2i * size)
    same(interpreted(solved, p), by_hand(p), torch.bfloat16)


@needs_triton
def test_gradients_that_are_all_0_stay_0(interpreted):
    p = problem(3, 4, 7, 6, 20)
    nothing = torch.zeros_like(p.g_i2t)
    found = interpreted(solved, replace(p, g_i2t=nothing, g_t2i=nothing))
    assert not found[4].any()
    assert not found[5].any()


@needs_triton
def test_hidden_tokens_may_be_no_numbers(interpreted):
    p = problem(3, 4, 7, 6, 20, v_masked=True, lengths=[1, 2, 6, 3])
    assert p.v_mask is not None
    assert p.t_mask is not None
    clean = interpreted(solved, p)
    v, t = (
        x.masked_fill(~mask.unsqueeze(2), math.nan)
        for x, mask in ((p.v, p.v_mask), (p.t, p.t_mask))
    )
    for x, y in zip(interpreted(solved, replace(p, v=v, t=t)), clean, strict=True):
        np.testing.assert_array_equal(x, y)


def public(p: Problem, impl: Any, **options: Any) -> list[Tensor]:
    found = late_interaction(p.v, p.t, p.v_mask, p.t_mask, impl=impl, **options)
    return [x.double() for x in found]


@needs_triton
@pytest.mark.parametrize("options", [{}, {"reduce": "sum"}, {"mask_padding": False}], ids=str)
def test_late_interaction_takes_the_kernels_by_name(interpreted, options):
    p = problem(3, 4, 7, 6, 20, v_masked=True, lengths=[1, 2, 6, 3])
    for more in ({}, {"return_argmax": True}):
        found = interpreted(public, p, "triton", **options, **more)
        for x, y in zip(found, public(p, "naive", **options, **more), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def odd_ones(p: Problem) -> list[Tensor]:
    """Gradients of tokens that lie apart, of two types, of which one score is used."""
    v = p.v.transpose(0, 1).contiguous().transpose(0, 1)[:, 1:].requires_grad_()
    t = p.t.half().requires_grad_()
    i2t, *_ = late_interaction_fused(v, t)
    return [x.double() for x in torch.autograd.grad(i2t.sum(), (v, t))]


@needs_triton
def test_tokens_may_lie_apart_and_be_of_two_types(interpreted):
    p = problem(3, 4, 8, 6, 20)
    dv, dt = interpreted(odd_ones, p)
    ones, zeros = torch.ones(3, 4), torch.zeros(3, 4)
    *_, dv_by_hand, dt_by_hand = by_hand(Problem(p.v[:, 1:], p.t.half(), ones, zeros))
    np.testing.assert_allclose(dv, dv_by_hand, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dt, dt_by_hand, rtol=1e-3, atol=1e-3)


def empty(images: int, texts: int) -> list[tuple[int, ...]]:
    v, t = torch.ones(images, 2, 16).requires_grad_(), torch.ones(texts, 3, 16).requires_grad_()
    i2t, t2i, *_ = late_interaction_fused(v, t)
    return [tuple(x.shape) for x in (i2t, *torch.autograd.grad((i2t + t2i).sum(), (v, t)))]


@needs_triton
def test_no_image_and_no_text_give_empty_scores(interpreted):
    assert interpreted(empty, 0, 3) == [(0, 3), (0, 2, 16), (3, 3, 16)]
    assert interpreted(empty, 2, 0) == [(2, 0), (2, 2, 16), (0, 3, 16)]


def second_derivative(p: Problem) -> None:
    i2t, *_ = late_interaction_fused(p.v.requires_grad_(), p.t)
    (gradient,) = torch.autograd.grad(i2t.square().sum(), p.v, create_graph=True)
    gradient.square().sum().backward()


@needs_triton
def test_a_second_derivative_is_refused(interpreted):
    with pytest.raises(RuntimeError, match="once_differentiable"):
        interpreted(second_derivative, problem(2, 2, 3, 3, 16))


# -------------------------------------------------------------------------------------- tiles


def test_every_text_is_in_one_run_and_every_tile_has_its_size():
    lengths = [1, 1, 2, 3, 8, 9, 16, 17, 64, 77, 130, 512]
    for patches in (1, 5, 12, 49, 196, 256, 577):
        runs = list(fused._runs(lengths, patches))
        covered = [text for run in runs for text in range(run.first, run.last)]
        assert covered == [*range(len(lengths))]
        for run in runs:
            assert max(lengths[run.first : run.last]) <= run.words
            assert 16 <= run.rows <= 64
            assert run.columns >= 64
            assert run.rows * run.columns <= 8192


def test_short_images_and_short_texts_share_tiles():
    (run,) = fused._runs([19] * 8, 12)  # the 25 % of FILIP base
    assert (run.images, run.patches, run.texts, run.words) == (4, 16, 2, 32)
    (run,) = fused._runs([1] * 8, 1)  # CLIP's pooled vectors
    assert (run.images, run.patches, run.texts, run.words) == (8, 8, 8, 8)
    (run,) = fused._runs([14] * 8, 196)
    assert (run.images, run.patches) == (4, 16)  # 13 x 16 leaves 12 rows empty, 4 x 64 leaves 60


# ----------------------------------------------------------------------------------- bad input


def test_what_the_kernels_cannot_do_is_said_in_a_line(monkeypatch):
    p = problem(2, 2, 3, 3, 16)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="do not run on cpu"):
        late_interaction_fused(p.v, p.t)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UserError, match="float16, bfloat16 and float32 tokens, not float64"):
        late_interaction_fused(p.v, p.t.double())
    with pytest.raises(UserError, match="a text has 513 words"):
        late_interaction_fused(p.v, torch.ones(1, 513, 16))
    with pytest.raises(Exception, match=r"must be one of|type hint"):
        late_interaction_fused(p.v, p.t, save_argmax="both")  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="Triton is not installed"):
        late_interaction_fused(p.v, p.t)


def test_the_module_can_be_imported_without_triton(monkeypatch):
    for name in ("triton", "triton.language"):
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.spec_from_file_location("alone", fused.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "alone", module)  # where its dataclass looks itself up
    spec.loader.exec_module(module)
    assert module.LONGEST == fused.LONGEST


# ------------------------------------------------------------------------------------- compiled


class NoGPU:
    """What Triton asks of a driver before it compiles."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 80, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Compiled:
    """Stands for a kernel: compiles what is launched."""

    kernel: Any
    found: list[Any]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            self.found.append(self.kernel.warmup(*args, grid=grid, **options))

        return launch


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU shows more")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_what_is_launched_compiles(dtype, monkeypatch, tmp_path):
    """The interpreter looks at no types: for lack of a GPU, the compiler must."""
    from triton.runtime import driver

    from tenfold.contrastive import kernels

    monkeypatch.setenv("TRITON_INTERPRET", "1")  # past the check of the device
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton warns of a choice left open
    found: list[Any] = []
    for name in ("forward", "backward_images", "backward_texts"):
        monkeypatch.setattr(kernels, name, Compiled(getattr(kernels, name), found))
    p = problem(2, 2, 5, 4, 20, dtype=dtype, v_masked=dtype == torch.float16)
    monkeypatch.setattr(driver, "_active", NoGPU())
    i2t, t2i, *_ = late_interaction_fused(p.v.requires_grad_(), p.t.requires_grad_(), p.v_mask)
    (i2t + t2i).sum().backward()
    assert [kernel.name for kernel in found] == ["forward", "backward_images", "backward_texts"]
    assert all(kernel.asm["ptx"] and kernel.metadata.shared < 99 << 10 for kernel in found)


# ------------------------------------------------------------------------------------- on a GPU


def on_gpu(p: Problem) -> Problem:
    fields = (p.v, p.t, p.g_i2t, p.g_t2i, p.v_mask, p.t_mask)
    return Problem(*(x if x is None else x.cuda() for x in fields))  # pyright: ignore[reportArgumentType]


def captions(count: int) -> list[int]:
    """Lengths of web captions, 3 + Poisson(11) tokens."""
    return (3 + np.random.default_rng(0).poisson(11, count)).tolist()


def of_winners(p: Problem, a: Tensor, b: Tensor) -> list[Tensor]:
    """Gradients in float64, text by text, of given winners: near-equal products may swap places."""
    v, t, g_i2t, g_t2i = (x.double() for x in (p.v, p.t, p.g_i2t, p.g_t2i))
    dv, dt = torch.zeros_like(v), torch.zeros_like(t)
    images = torch.arange(len(v), device=v.device).unsqueeze(1)
    for j in range(len(t)):
        said = (b[0, j] >= 0).nonzero().flatten()
        word, patch = a[:, j], b[:, j, said]
        g_i, g_t = g_i2t[:, j, None, None], g_t2i[:, j, None, None]
        dv += g_i * t[j, word]
        dv.index_put_((images, patch), g_t * t[j, said], accumulate=True)
        dt[j].index_put_((word,), g_i * v, accumulate=True)
        dt[j, said] += (g_t * v[images, patch]).sum(0)
    return [dv, dt]


@pytest.mark.gpu
@needs_triton
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("patches", "width"), [(49, 256), (196, 256), (577, 256), (12, 200)])
def test_real_sizes_on_a_gpu_equal_tiles_in_float64(patches, width, dtype):
    p = on_gpu(problem(48, 56, patches, 77, width, dtype=dtype, lengths=captions(56)))
    v, t = p.v.requires_grad_(), p.t.requires_grad_()
    *scores, a, b = late_interaction(
        v, t, None, p.t_mask, impl="triton", reduce="sum", return_argmax=True
    )
    with torch.no_grad():
        *expected, a_64, b_64 = late_interaction(
            v.double(), t.double(), None, p.t_mask, impl="tiled", reduce="sum", return_argmax=True
        )
        torch.testing.assert_close([x.double() for x in scores], expected, rtol=1e-5, atol=1e-4)
        assert max((x != y).double().mean() for x, y in ((a, a_64), (b, b_64))) < 1e-3
        reference = of_winners(p, a, b)
    gradients = torch.autograd.grad(scores, (v, t), (p.g_i2t, p.g_t2i))
    for x, y in zip(gradients, reference, strict=True):
        assert (x - y).norm() <= (1e-5 if dtype == torch.float32 else 2e-3) * y.norm()


@pytest.mark.gpu
@needs_triton
@needs_cuda
def test_a_gpu_gives_equal_bits():
    p = on_gpu(problem(256, 512, 49, 77, 256, dtype=torch.float16, lengths=captions(512)))

    def gradients() -> tuple[Tensor, ...]:
        v, t = p.v.clone().requires_grad_(), p.t.clone().requires_grad_()
        i2t, t2i = late_interaction(v, t, None, p.t_mask, impl="triton")
        return torch.autograd.grad((i2t.square() + t2i.square()).sum(), (v, t))

    for x, y in zip(gradients(), gradients(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.gpu
@needs_triton
@needs_cuda
def test_a_gpu_is_five_times_faster_in_a_hundredth_of_the_memory():
    """Section 12.7's figures, against the equations in eager mode; these take 3.1 tensors of S."""
    batch = 1024
    while 4 * 4 * batch**2 * 49 * 77 > torch.cuda.mem_get_info()[0]:
        batch //= 2
    p = on_gpu(problem(batch, batch, 49, 77, 256, lengths=captions(batch)))

    def measure(impl: Impl, dtype: torch.dtype) -> tuple[float, int]:
        v, t = (x.to(dtype).requires_grad_() for x in (p.v, p.t))
        before, times = torch.cuda.memory_allocated(), []
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            torch.cuda.synchronize()
            start = time.perf_counter()
            i2t, t2i = late_interaction(v, t, None, p.t_mask, impl=impl)
            torch.autograd.grad((i2t.square() + t2i.square()).sum(), (v, t))
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times), torch.cuda.max_memory_allocated() - before

    (naive_s, naive_bytes), (s, size) = (
        measure("naive", torch.float32),
        measure("triton", torch.float16),
    )
    assert naive_s / s >= 5
    assert size < 0.01 * naive_bytes or batch < 1024
