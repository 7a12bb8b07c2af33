"""The moving average of a state dict against loops, series and closed forms."""

import pytest
import torch
from torch import Tensor, nn

from tenfold.checkpoint import ema_decay, ema_update


def test_ema_equals_a_loop_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    ema = {"w": torch.randn(3, 4, generator=generator), "b": torch.randn(5, generator=generator)}
    by_hand = {k: [float(v) for v in t.flatten()] for k, t in ema.items()}
    for step in range(200):
        decay = ema_decay(step, 0.97)
        state = {k: torch.randn(t.shape, generator=generator) for k, t in ema.items()}
        ema_update(ema, state, decay)
        for key, values in by_hand.items():
            new = state[key].flatten().tolist()
            by_hand[key] = [decay * a + (1 - decay) * b for a, b in zip(values, new, strict=True)]
    for key, values in by_hand.items():
        assert ema[key].flatten().tolist() == pytest.approx(values, rel=1e-5, abs=1e-6)


def test_ema_of_a_constant_state_is_a_geometric_series() -> None:
    ema = {"w": torch.zeros(2, dtype=torch.float64)}
    for _ in range(50):
        ema_update(ema, {"w": torch.ones(2, dtype=torch.float64)}, 0.9)
    assert ema["w"].tolist() == pytest.approx([1 - 0.9**50] * 2, rel=1e-12)


def test_ema_decay_warms_up() -> None:
    # (1 + t) / (10 + t) reaches 0.997 where 1 + t = 0.997 (10 + t): t = 2990.
    assert ema_decay(0, 0.997) == pytest.approx(0.1)
    assert ema_decay(90, 0.997) == pytest.approx(0.91)
    assert ema_decay(2989, 0.997) < 0.997
    assert ema_decay(2991, 0.997) == 0.997


def test_ema_mixes_dtypes_and_copies_integers() -> None:
    ema = {
        "single": torch.zeros(3),
        "double": torch.zeros(3, dtype=torch.float64),
        "half": torch.zeros(3, dtype=torch.bfloat16),
        "complex": torch.zeros(1, dtype=torch.complex64),
        "count": torch.tensor(5),
        "flag": torch.tensor([True, False]),
        "empty": torch.empty(0),
    }
    state = {
        "single": torch.full((3,), 4.0, dtype=torch.bfloat16),
        "double": torch.full((3,), 4.0),
        "half": torch.full((3,), 4.0),
        "complex": torch.tensor([4j]),
        "count": torch.tensor(2**53 + 1),
        "flag": torch.tensor([False, True]),
        "empty": torch.empty(0),
    }
    tensors = dict(ema)
    dtypes = {k: v.dtype for k, v in ema.items()}
    ema_update(ema, state, 0.75)
    assert all(ema[k] is tensors[k] for k in ema)  # in place
    assert {k: v.dtype for k, v in ema.items()} == dtypes
    for key in ("single", "double", "half"):
        assert ema[key].tolist() == [1.0] * 3
    assert ema["complex"].tolist() == [1j]
    assert ema["count"].item() == 2**53 + 1  # would be rounded on the way through a float
    assert ema["flag"].tolist() == [False, True]
    assert state["single"].dtype == torch.bfloat16


@pytest.mark.parametrize(("decay", "expected"), [(1.0, 2.0), (0.0, 6.0)])
def test_ema_ends_are_exact(decay: float, expected: float) -> None:
    ema = {"w": torch.full((3,), 2.0)}
    ema_update(ema, {"w": torch.full((3,), 6.0)}, decay)
    assert ema["w"].tolist() == [expected] * 3


def test_ema_of_modules_follows_parameters_and_buffers() -> None:
    student = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    teacher = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    student(torch.randn(4, 1, 2, 2))
    ema_update(teacher.state_dict(), student.state_dict(), 0.5)
    for key, value in teacher.state_dict().items():
        if key.endswith("num_batches_tracked"):
            assert value.item() == 1
        else:
            torch.testing.assert_close(value, (before[key] + student.state_dict()[key]) / 2)
    assert all(p.requires_grad and p.grad_fn is None for p in teacher.parameters())


def test_ema_moves_tied_tensors_once() -> None:
    table = torch.zeros(2, 3)
    ema = {"embed": table, "head": table, "head_t": table.t()}
    new = torch.ones(2, 3)
    ema_update(ema, {"embed": new, "head": new, "head_t": new.t()}, 0.5)
    assert table.tolist() == [[0.5] * 3] * 2
    # Two halves of one buffer are different memory and both move.
    flat = torch.zeros(4)
    ema_update({"a": flat[:2], "b": flat[2:]}, {"a": torch.ones(2), "b": torch.ones(2)}, 0.5)
    assert flat.tolist() == [0.5] * 4


def test_ema_refuses_what_would_be_silently_wrong() -> None:
    def ema() -> dict[str, Tensor]:
        return {"a": torch.zeros(2), "b": torch.zeros(3)}

    net = nn.Linear(2, 2)
    cases = [
        (ema(), {"a": torch.ones(2), "b": torch.ones(1)}, 0.5, r"b: \(1,\) instead of \(3,\)"),
        (ema(), {"a": torch.ones(2)}, 0.5, r"1 missing \(b\)"),
        (ema(), {**ema(), "c": torch.ones(1)}, 0.5, r"1 unexpected \(c\)"),
        (ema(), ema(), 1.5, "decay must lie in"),
        (ema(), ema(), float("nan"), "decay must lie in"),
        (net.state_dict(), net.state_dict(), 0.5, "averaged with itself"),
    ]
    for average, state, decay, message in cases:
        before = {k: v.clone() for k, v in average.items()}
        with pytest.raises(ValueError, match=message):
            ema_update(average, state, decay)
        assert all(torch.equal(before[k], v) for k, v in average.items())
