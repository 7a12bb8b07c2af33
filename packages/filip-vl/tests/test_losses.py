"""FilipLoss against the reference arrays and loops in float64, alone and on two ranks."""

import math
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from filip_vl.losses import FilipLoss
from tenfold.testing import PackageContract, in_processes

RANKS = 2
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-6}


@pytest.fixture(scope="module")
def arrays(reference) -> Mapping[str, np.ndarray]:
    return dict(np.load(reference / "reference_late_interaction.npz"))


def inputs(arrays: Mapping[str, np.ndarray], dtype: torch.dtype) -> dict[str, Tensor]:
    found = {k: torch.from_numpy(arrays[k]).to(dtype) for k in ("image_tokens", "text_tokens")}
    found["logit_scale"] = torch.from_numpy(arrays["log_scale"]).to(dtype)
    return {k: x.requires_grad_() for k, x in found.items()}


def check(found: Tensor, wanted: np.ndarray, tolerance: float) -> None:
    expected = torch.from_numpy(wanted).to(found.dtype)
    largest = max(expected.abs().max().item(), 1e-3)
    assert (found.detach() - expected).abs().max().item() <= tolerance * largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("impl", ["naive", "tiled"])
@pytest.mark.parametrize(
    ("prefix", "suffix", "options"),
    [("", "", {}), ("", "_multi_positive", {}), ("select_", "", {"token_fraction": 0.25})],
    ids=["pairs", "several positives", "a quarter of the tokens"],
)
def test_the_reference_arrays(arrays, dtype, impl, prefix, suffix, options):
    given = inputs(arrays, dtype)
    targets = torch.from_numpy(arrays["positives"]) if suffix else None
    mask = torch.from_numpy(arrays["text_mask"])
    loss = FilipLoss(impl=impl, **options)(**given, text_mask=mask, targets=targets)
    loss.backward()
    # the arrays are float32 roundings of float64 numbers
    tolerance = TOLERANCE[dtype]
    check(loss, arrays[f"{prefix}loss{suffix}"], tolerance)
    names = {"image_tokens": "image_tokens", "text_tokens": "text_tokens"}
    names["logit_scale"] = "log_scale"
    for name, key in names.items():
        if f"{prefix}grad_{key}{suffix}" not in arrays:
            continue  # that of the temperature is there for the plain loss alone
        check(given[name].grad, arrays[f"{prefix}grad_{key}{suffix}"], tolerance)
    assert not given["text_tokens"].grad[~mask].any()


def best(of: np.ndarray, among: np.ndarray) -> list[float]:
    return [max(float(a @ b) for b in among) for a in of]


def scores(v: np.ndarray, t: np.ndarray, keys: tuple[np.ndarray, np.ndarray]) -> list[np.ndarray]:
    """Both directions by loops; the last pair are the tokens that are asked."""
    i2t = [[np.mean(best(v[i], keys[1][j])) for j in range(len(t))] for i in range(len(v))]
    t2i = [[np.mean(best(t[j], keys[0][i])) for j in range(len(t))] for i in range(len(v))]
    return [np.array(i2t), np.array(t2i)]


def by_hand(i2t: np.ndarray, t2i: np.ndarray, scale: float, smoothing: float = 0.0) -> float:
    total, n = 0.0, len(i2t)
    for z in (scale * i2t, scale * t2i.T):
        log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
        target = (1 - smoothing) * np.eye(n) + smoothing / n
        total -= (target * log_p).sum() / n / 2
    return total


def tokens(seed: int, rows: int, length: int, dim: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, length, dim, generator=generator, dtype=torch.float64)


def test_smoothing_by_hand():
    v, t = tokens(0, 4, 5), tokens(1, 4, 3)
    a, b = (F.normalize(x, dim=2).numpy() for x in (v, t))
    found = FilipLoss(label_smoothing=0.1)(v, t, math.log(7.0))
    assert found.item() == pytest.approx(by_hand(*scores(a, b, (a, b)), 7.0, 0.1), rel=1e-10)


def test_keys_alone_are_selected_by_hand():
    """Tokens that ask stay whole; DeCLIP's way, with the paper's score of a token."""
    v, t = tokens(2, 3, 8), tokens(3, 3, 4)
    a, b = (F.normalize(x, dim=2).numpy() for x in (v, t))
    s = np.einsum("ind,jmd->ijnm", a, b)
    patches, words = s.max((1, 3)), s.max((0, 2))
    kept = [
        np.stack([x[i][np.argsort(-score[i])[:k]] for i in range(3)])
        for x, score, k in ((a, patches, 4), (b, words, 2))
    ]
    found = FilipLoss(token_fraction=0.5, select_sides="keys")(v, t, math.log(5.0))
    assert found.item() == pytest.approx(by_hand(*scores(a, b, tuple(kept)), 5.0), rel=1e-10)


def test_valid_words_may_be_the_base_of_the_share():
    v, t = tokens(4, 2, 4), tokens(5, 2, 8)
    mask = torch.tensor([[True] * 6 + [False] * 2, [True] * 3 + [False] * 5])
    loss = FilipLoss(token_fraction=0.5, select_text_base="valid")
    a, b = (F.normalize(x, dim=2).numpy() for x in (v, t))
    s = np.einsum("ind,jmd->ijnm", a, b)
    s[:, ~mask.numpy().any(1)] = -np.inf
    i2t, t2i = np.zeros((2, 2)), np.zeros((2, 2))
    words = [[r for r in range(8) if mask[j, r]] for j in range(2)]
    patch_score = [[max(s[i, j, k, r] for j in range(2) for r in words[j]) for k in range(4)]
                   for i in range(2)]  # fmt: skip
    word_score = [[max(s[i, j, k, r] for i in range(2) for k in range(4)) for r in words[j]]
                  for j in range(2)]  # fmt: skip
    kept_p = [np.argsort([-x for x in row])[:2] for row in patch_score]
    kept_w = [[words[j][n] for n in np.argsort([-x for x in row])[: math.ceil(len(row) / 2)]]
              for j, row in enumerate(word_score)]  # fmt: skip
    for i in range(2):
        for j in range(2):
            i2t[i, j] = np.mean([max(s[i, j, k, r] for r in kept_w[j]) for k in kept_p[i]])
            t2i[i, j] = np.mean([max(s[i, j, k, r] for k in kept_p[i]) for r in kept_w[j]])
    found = loss(v, t, math.log(3.0), text_mask=mask)
    assert found.item() == pytest.approx(by_hand(i2t, t2i, 3.0), rel=1e-10)


def test_a_share_of_cropped_captions_is_one_of_their_whole_length():
    v, t = tokens(14, 4, 8), tokens(15, 4, 12)
    mask = torch.arange(12) < torch.tensor([6, 2, 5, 4]).unsqueeze(1)
    loss = FilipLoss(token_fraction=0.25)
    whole = loss(v, t, 2.0, text_mask=mask)
    torch.testing.assert_close(loss(v, t[:, :6], 2.0, text_mask=mask), whole)
    assert loss(v, t[:, :6], 2.0, text_mask=mask[:, :6]) != whole  # one word instead of three
    with pytest.raises(ValueError, match=r"behind the 5 given, in row 0"):
        loss(v, t[:, :5], 2.0, text_mask=mask)


def test_the_ablations_by_hand():
    v, t = tokens(16, 3, 4), tokens(17, 3, 5)
    mask = torch.arange(5) < torch.tensor([5, 2, 3]).unsqueeze(1)
    a, b = (F.normalize(x, dim=2).numpy() for x in (v, t))
    i2t, t2i = scores(a, b, (a, b))
    found = FilipLoss(mask_padding=False)(v, t, math.log(7.0), text_mask=mask)
    assert found.item() == pytest.approx(by_hand(i2t, t2i, 7.0), rel=1e-10)
    found = FilipLoss(reduce="sum")(v, t, 0.0)
    assert found.item() == pytest.approx(by_hand(4 * i2t, 5 * t2i, 1.0), rel=1e-10)


def test_one_token_a_side_is_clip():
    v, t = tokens(6, 5, 1), tokens(7, 5, 1)
    cosine = F.normalize(v[:, 0], dim=1) @ F.normalize(t[:, 0], dim=1).T
    z, own = cosine * 9.0, torch.arange(5)
    wanted = (F.cross_entropy(z, own) + F.cross_entropy(z.T, own)) / 2
    torch.testing.assert_close(FilipLoss()(v, t, math.log(9.0)), wanted)


def test_a_batch_of_one_has_no_loss():
    v, t = tokens(8, 1, 5).requires_grad_(), tokens(9, 1, 3)
    loss = FilipLoss()(v, t, 2.0)
    loss.backward()
    assert loss.item() == 0
    assert not v.grad.any()


def test_small_gradients_are_left_out_of_the_backward_pass_alone():
    v, t = tokens(10, 6, 5), tokens(11, 6, 4)
    found = []
    for tol in (0.0, 1e-12, 0.5):
        leaf = v.clone().requires_grad_()
        loss = FilipLoss(skip_tol=tol)(leaf, t, math.log(20.0))
        loss.backward()
        found.append((loss.item(), leaf.grad))
    assert found[0][0] == found[1][0] == found[2][0]
    torch.testing.assert_close(found[0][1], found[1][1])
    assert not torch.equal(found[0][1], found[2][1])


def test_half_precision_tokens_are_compared_in_float32():
    v, t = tokens(12, 4, 5), tokens(13, 4, 3)
    exact = FilipLoss()(v, t, 3.0)
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            found = FilipLoss()(v.to(dtype), t.to(dtype), torch.tensor(3.0))
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(exact.item(), rel=5e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_fraction": 0.0}, "token_fraction"),
        ({"token_fraction": 1.5}, "token_fraction"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"skip_tol": -0.1}, "skip_tol"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        FilipLoss(**options)


# ---- two ranks


def whole() -> dict[str, Tensor]:
    mask = torch.arange(7) < torch.tensor([7, 2, 5, 3, 6, 4]).unsqueeze(1)
    return {
        "image_tokens": tokens(20, 6, 5),
        "text_tokens": tokens(21, 6, 7),
        "text_mask": mask,
        "logit_scale": torch.tensor(2.0, dtype=torch.float64),
    }


SEVERAL = torch.eye(6) + torch.eye(6).roll(2, 1)
CASES: Mapping[str, dict[str, Any]] = {
    "rowblock": {},
    "gather": {"distributed": "gather"},
    "smoothed": {"label_smoothing": 0.1},
    "smoothed, gather": {"label_smoothing": 0.1, "distributed": "gather"},
    "several": {},
    "several, gather": {"label_smoothing": 0.1, "distributed": "gather"},
    "half": {"comm_dtype": "float16"},
}


def step(name: str, rank: int | None = None) -> dict[str, Tensor]:
    """Loss and gradients of all pairs, or of a rank's share of them."""
    given = whole()
    targets = SEVERAL if name.startswith("several") else None
    if rank is not None:
        given = {k: x if k == "logit_scale" else x[rank::RANKS] for k, x in given.items()}
        targets = targets if targets is None else targets[rank::RANKS]
        if rank == 1:  # its captions are shorter, and cropped
            given["text_tokens"] = given["text_tokens"][:, :4]
            given["text_mask"] = given["text_mask"][:, :4]
    leaves = {k: x.requires_grad_() for k, x in given.items() if k != "text_mask"}
    options = {"comm_dtype": "float32", **CASES[name]}
    loss = FilipLoss(**options)(**given, targets=targets)
    loss.backward()
    return {"loss": loss.detach(), **{k: x.grad for k, x in leaves.items()}}


class Ranks(PackageContract):
    """What the processes run."""

    def rank(self, folder: str, rank: int) -> None:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=RANKS,
            timeout=timedelta(seconds=60),
        )
        found: dict[str, Any] = {name: step(name, rank) for name in CASES}
        uneven = tokens(0, 2 + rank, 3)
        try:
            FilipLoss()(uneven, uneven, 1.0)
        except ValueError as error:
            found["uneven"] = str(error)
        torch.save(found, f"{folder}/{rank}.pt")
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    codes = in_processes(Ranks(), [("rank", str(folder), rank) for rank in range(RANKS)])
    assert codes == [0, 0], f"the ranks ended with {codes}, see stderr"
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_do_as_one(two, name):
    """Gradients are averaged over ranks, as DDP does it."""
    alone, tolerance = step(name), 2e-3 if name == "half" else 1e-9
    ours = [rank[name] for rank in two]
    losses = torch.stack([rank["loss"] for rank in ours])
    torch.testing.assert_close(losses.mean(), alone["loss"], rtol=tolerance, atol=0)
    if "gather" not in name:
        assert losses[0] == losses[1]
    scale = sum(rank["logit_scale"] for rank in ours) / RANKS
    torch.testing.assert_close(scale, alone["logit_scale"], rtol=10 * tolerance, atol=1e-9)
    for key in ("image_tokens", "text_tokens"):
        joined = torch.zeros_like(alone[key])
        for rank, found in enumerate(ours):
            joined[rank::RANKS, : found[key].shape[1]] = found[key] / RANKS
        largest = alone[key].abs().max().item()
        assert (joined - alone[key]).abs().max().item() <= tolerance * largest


def test_batches_of_different_sizes_are_told(two):
    for rank in two:
        assert "rank 0: 2, rank 1: 3" in rank["uneven"]
        assert "drop_last" in rank["uneven"]
