"""What ICKD gives on the embedded tasks over three seeds; minutes each (run with -m slow)."""

import pytest

from ickd.commands.compare import TOY_WEIGHTS
from ickd.comparison import compare_losses


def gains(scores: list[float], other: list[float]) -> list[float]:
    return [ours - theirs for ours, theirs in zip(scores, other, strict=True)]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def compared(recipe: str, losses: list[str], out) -> dict[str, list[float]]:
    found = compare_losses(
        recipe,
        losses,
        out,
        seeds=(0, 1, 2),
        weights=TOY_WEIGHTS,
        accelerator="cpu",
        progress=False,
    )
    for name, scores in found.scores.items():
        print(recipe, name, [round(score, 2) for score in scores])
    return found.scores


@pytest.mark.slow
def test_ickd_beats_the_plain_student_on_bound_gratings(tmp_path):
    """By 3 points in the mean, and in every seed."""
    scores = compared("demo", ["none", "ickd"], tmp_path)
    gained = gains(scores["ickd"], scores["none"])
    assert mean(gained) >= 3
    assert min(gained) > 0


@pytest.mark.slow
def test_the_grid_is_what_helps_on_textured_blobs(tmp_path):
    """6x6 cells give 1.5 points over the plain student, and 2 over a single cell."""
    plain, whole, cells = "none", "ickd_grid:1x1", "ickd_grid:6x6"
    scores = compared("blobs", [plain, whole, cells], tmp_path)
    assert mean(gains(scores[cells], scores[plain])) >= 1.5
    assert mean(gains(scores[cells], scores[whole])) >= 2
