"""Other programs' losses against x-clip's own numbers, and against loops over what they do."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from filip_vl import compat
from filip_vl.losses import FilipLoss


def tokens(seed: int, rows: int, length: int, dim: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, length, dim, generator=generator, dtype=torch.float64)


def unit(x: Tensor) -> np.ndarray:
    return F.normalize(x, dim=-1).numpy()


def cross_entropy(z: np.ndarray, smoothing: float = 0.0) -> float:
    n = len(z)
    log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
    target = (1 - smoothing) * np.eye(n) + smoothing / n
    return float(-(target * log_p).sum() / n)


def test_xclip_as_published(reference):
    data = np.load(reference / "xclip_finegrained_tiny.npz")
    image, text = (torch.from_numpy(data[f"{side}_latents"]) for side in ("image", "text"))
    mask, scale = torch.from_numpy(data["text_mask"]), math.exp(2.0)
    found = compat.xclip(image, text, mask, scale)
    assert found.item() == pytest.approx(data["loss_code"].item(), rel=1e-5)
    ours = FilipLoss()(image, text, 2.0, text_mask=mask)  # the right axes
    assert ours.item() == pytest.approx(data["loss_correct_axes"].item(), rel=1e-5)


def test_declip_by_hand():
    v, t, keys = tokens(0, 3, 6), tokens(1, 3, 5), 2
    a, b = unit(v), unit(t)
    asked_i, asked_t = [], []
    for i in range(3):
        p = a[i] @ b[i].T
        asked_i.append(a[i][np.argsort(-p.sum(1))[:keys]])
        asked_t.append(b[i][np.argsort(-p.sum(0))[:keys]])
    per_image = np.array(
        [[(a[i] @ asked_t[j].T).max(1).mean() for j in range(3)] for i in range(3)]
    )
    per_text = np.array([[(b[j] @ asked_i[i].T).max(1).mean() for i in range(3)] for j in range(3)])
    wanted = (cross_entropy(7 * per_image) + cross_entropy(7 * per_text)) / 2
    assert compat.declip(v, t, 7.0, keys=keys).item() == pytest.approx(wanted, rel=1e-10)


def test_declip_keeps_all_where_there_are_few():
    v, t = tokens(2, 3, 4), tokens(3, 3, 5)
    torch.testing.assert_close(compat.declip(v, t, 5.0), compat.declip(v, t, 5.0, keys=5))
    torch.testing.assert_close(compat.declip(v, t, 5.0), FilipLoss()(v, t, math.log(5.0)))


def test_mindformers_by_hand():
    v, t = tokens(4, 3, 4), tokens(5, 3, 5)
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3, [True] * 3 + [False] * 2])
    a, b, m = unit(v), unit(t) * mask.numpy()[..., None], mask.numpy()
    per_image, per_text = np.zeros((3, 3)), np.zeros((3, 3))
    for i in range(3):
        for j in range(3):
            s = a[i] @ b[j].T
            per_image[i, j] = s.max(1).mean()
            per_text[j, i] = (s.max(0) * m[j]).sum() / m[j].sum()
    wanted = (cross_entropy(9 * per_image, 0.1) + cross_entropy(4 * per_text, 0.1)) / 2
    found = compat.mindformers(v, t, mask, 9.0, 4.0)
    assert found.item() == pytest.approx(wanted, rel=1e-10)


def test_mindformers_clips_its_logits():
    v, t = tokens(6, 2, 3), tokens(7, 2, 3)
    mask = torch.ones(2, 3, dtype=torch.bool)
    a, b = unit(v), unit(t)
    s = np.einsum("ind,jmd->ijnm", a, b)
    rows = [
        np.clip(500 * s.max(3).mean(2), -100, 100),
        np.clip(500 * s.max(2).mean(2).T, -100, 100),
    ]
    wanted = sum(
        -(0.9 * np.eye(2) + 0.05)[k] @ (z[k] - z[k].max() - np.log(np.exp(z[k] - z[k].max()).sum()))
        for z in rows
        for k in range(2)
    ) / 4  # fmt: skip
    assert compat.mindformers(v, t, mask, 500.0, 500.0).item() == pytest.approx(wanted, rel=1e-9)


def test_mindformers_selection_counts_padding():
    t = tokens(8, 2, 8)
    mask = torch.tensor([[True] * 2 + [False] * 6, [True] * 8])
    b = torch.from_numpy(unit(t)) * mask.unsqueeze(2)
    v = torch.from_numpy(unit(tokens(9, 2, 5)))
    score = np.einsum("jmd,ind->jmin", b.numpy(), v.numpy()).max((2, 3))
    kept, valid = compat.mindformers_select(b, v, mask, 0.5)
    assert kept.shape == (2, 4, 6)
    for row in range(2):
        order = np.argsort(-score[row], kind="stable")[:4]
        np.testing.assert_allclose(
            np.sort(score[row][order]),
            np.sort((kept[row].numpy() @ v.flatten(0, 1).numpy().T).max(1)),
        )
    assert valid[1].all()
