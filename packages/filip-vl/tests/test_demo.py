"""The demo and what it measures: against scores written down, one pair of tokens at a time."""

import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy import ndarray
from PIL import Image

from filip_vl import comparison
from filip_vl.cli import app
from filip_vl.commands.demo import content_alignment
from filip_vl.comparison import (
    METRICS,
    compare_shapes,
    fit_recipe,
    score_shapes,
    step_seconds,
    steps_within,
)
from filip_vl.data import eval_transform
from filip_vl.data.shapes import shape_vocabulary
from filip_vl.model import FilipModel
from filip_vl.module import FilipModule, load_model
from filip_vl.synthetic import (
    CLASS_NAMES,
    SIZE,
    TEST_SEED,
    exchanged_caption,
    near_duplicates,
    scene,
    single_object,
)
from filip_vl.tokenizers import WordTokenizer
from tenfold.errors import UserError
from tenfold.recipes import recipe_parts

PAIRS, GROUPS, SINGLES, STEPS, SHOWN = 20, 2, 1, 3, 2
PICTURES = ("comparison", "contributions", "curves", "retrieval", "similarity")


@pytest.fixture
def small(monkeypatch):
    """Fewer scenes to train and to measure on, fewer pictures."""
    for name, value in {"TEST_PAIRS": PAIRS, "GROUPS": GROUPS, "_SINGLES": SINGLES}.items():
        monkeypatch.setattr(comparison, name, value)
    monkeypatch.setattr(sys.modules["filip_vl.commands.demo"], "_SHOWN", SHOWN)

    def fewer(package: str, name: str):
        parts = recipe_parts(package, name)
        parts["data"]["init_args"] |= {"batch_size": 16, "train_size": 48, "val_size": 16}
        return parts

    monkeypatch.setattr(comparison, "recipe_parts", fewer)


def demo(*argv: object) -> int:
    return app.main(["demo", *map(str, argv)])


def refused(capsys, *argv: object) -> str:
    capsys.readouterr()
    assert demo(*argv) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    return line


# -- what is measured ------------------------------------------------------------------------------


def unit_rows(batch) -> list[ndarray]:
    """Unit vectors of every item, without padding, in float64."""
    found = []
    for tokens, mask in zip(batch.tokens.detach(), batch.mask, strict=True):
        rows = tokens[mask].double().numpy()
        found.append(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    return found


def best_mean(queries: ndarray, keys: ndarray) -> float:
    """The mean over queries of their best key, as section 3.4 has it."""
    return float((queries @ keys.T).max(1).mean())


def encoded(model: FilipModel, scenes) -> tuple[list[ndarray], list[ndarray]]:
    pixels = torch.stack([eval_transform(SIZE)(Image.fromarray(made.image)) for made in scenes])
    texts = [made.caption for made in scenes]
    return unit_rows(model.encode_image(pixels)), unit_rows(model.encode_text(texts))


def first_found(scores: ndarray, right: ndarray) -> float:
    """Share of the rows of which no wrong answer scores above every right one."""
    return float(np.mean([s[r].max() >= s[~r].max() for s, r in zip(scores, right, strict=True)]))


@pytest.mark.parametrize("name", ["filip_tiny", "clip_tiny"])
def test_what_is_measured_is_what_loops_find(small, name):
    torch.manual_seed(0)
    model = FilipModel.from_config(name, tokenizer=WordTokenizer.train(shape_vocabulary()))
    model.eval()
    found = score_shapes(model)
    assert set(found) == set(METRICS)
    scenes = [scene(TEST_SEED, n) for n in range(PAIRS)]
    images, texts = encoded(model, scenes)
    i2t = np.array([[best_mean(v, t) for t in texts] for v in images])
    t2i = np.array([[best_mean(t, v) for v in images] for t in texts])
    sets = [{shape.name for shape in made.objects} for made in scenes]
    right = np.array([[a == b for b in sets] for a in sets])
    assert found["i2t_r1"] == pytest.approx(first_found(i2t, right))
    assert found["t2i_r1"] == pytest.approx(first_found(t2i, right))

    wins = []
    for made, v in zip(scenes, images, strict=True):
        other = exchanged_caption(made)
        if other is not None:
            pair = unit_rows(model.encode_text([made.caption, other]))
            scores = [best_mean(v, t) + best_mean(t, v) for t in pair]
            wins.append(scores[0] > scores[1])
    assert 0 < len(wins) < PAIRS
    assert found["binding"] == pytest.approx(np.mean(wins))

    inside = {"fine_i2t_r1": [], "fine_t2i_r1": []}
    for group in range(GROUPS):
        images, texts = encoded(model, near_duplicates(TEST_SEED, group))
        forth = np.array([[best_mean(v, t) for t in texts] for v in images])
        back = np.array([[best_mean(t, v) for v in images] for t in texts])
        inside["fine_i2t_r1"].append(first_found(forth, np.eye(4) > 0))
        inside["fine_t2i_r1"].append(first_found(back, np.eye(4) > 0))
    for metric, shares in inside.items():
        assert found[metric] == pytest.approx(np.mean(shares)), metric

    singles = [single_object(TEST_SEED, n) for n in range(SINGLES * len(CLASS_NAMES))]
    images, _ = encoded(model, singles)
    prompts = unit_rows(model.encode_text([f"a photo of a {name}" for name in CLASS_NAMES]))
    chosen = [int(np.argmax([best_mean(v, t) for t in prompts])) for v in images]
    assert found["zero_shot"] == pytest.approx(np.mean(np.arange(len(singles)) == chosen))


# -- the command -----------------------------------------------------------------------------------


def test_a_demo_measures_draws_and_is_not_done_again(small, tmp_path, capsys, monkeypatch):
    out = tmp_path / "demo"
    assert demo("--out", out, "--steps", STEPS, "--seed", 3) == 0
    told = capsys.readouterr().out
    found = json.loads((out / "metrics.json").read_text())
    assert list(found) == ["FILIP", "CLIP"]
    for side, scores in found.items():
        model = load_model(out / f"{side.lower()}-3")
        assert model.config.pooled == (side == "CLIP")
        wanted = score_shapes(model)
        assert set(scores) == set(METRICS)
        for metric, name in METRICS.items():
            assert scores[metric] == [pytest.approx(wanted[metric], abs=1e-9)]
            assert f"{100 * wanted[metric]:.1f}" in next(
                line for line in told.splitlines() if line.startswith(name)
            )
    names = [*PICTURES, *(f"alignment_{n}" for n in range(SHOWN))]
    assert sorted(path.stem for path in out.glob("*.png")) == sorted(names)
    for name in names:
        with Image.open(out / f"{name}.png") as picture:
            assert min(picture.size) > 100

    def never(*_, **__):
        raise AssertionError("trained again")

    drawn = []
    monkeypatch.setattr(comparison, "fit_recipe", never)
    monkeypatch.setattr(
        sys.modules["filip_vl.commands.demo"], "draw", lambda *given: drawn.append(given) or []
    )
    assert demo("--out", out, "--minutes", 100, "--seed", 3) == 0
    assert "3 steps of each side" in capsys.readouterr().out
    assert json.loads((out / "metrics.json").read_text()) == found
    assert drawn == [(out, 3, found)]
    assert "--steps 3, remove the folder" in refused(capsys, "--out", out, "--seed", 3)


def test_an_interrupted_comparison_goes_on(tmp_path, monkeypatch):
    trained, breaks = [], [False, True]

    def fit(recipe: str, folder: Path, seed: int, **options):
        if breaks and breaks.pop(0):
            raise RuntimeError("broken off")
        trained.append((recipe, folder.name, seed, options["steps"]))

    monkeypatch.setattr(comparison, "fit_recipe", fit)
    monkeypatch.setattr(comparison, "score_shapes", lambda _: dict.fromkeys(METRICS, 0.5))
    with pytest.raises(RuntimeError):
        compare_shapes(tmp_path, (0, 1), steps=7)
    with pytest.raises(UserError, match=r"a run of 7 steps, and 600 are asked for.*--steps 7"):
        compare_shapes(tmp_path, (0, 1))
    found = compare_shapes(tmp_path, (0, 1), steps=7)
    assert trained == [
        ("demo", "filip-0", 0, 7),
        ("demo-clip", "clip-0", 0, 7),
        ("demo", "filip-1", 1, 7),
        ("demo-clip", "clip-1", 1, 7),
    ]
    assert found == {side: {key: [0.5, 0.5] for key in METRICS} for side in ("FILIP", "CLIP")}


@pytest.mark.parametrize(
    ("seconds", "most", "steps"),
    [
        # 10 seconds for the scenes, 0.65 of the rest at 0.16 seconds a step of both
        (51, None, 160),
        (10_000, None, 600),
        (10_000, 1005, 1005),
        (51, 50, 50),
        (1, None, 10),
        (1, 3, 3),
    ],
)
def test_a_time_has_room_for_so_many_steps(tmp_path, monkeypatch, seconds, most, steps):
    paces = {"demo": 0.1, "demo-clip": 0.06}
    monkeypatch.setattr(comparison, "step_seconds", lambda recipe, _: paces[recipe])
    monkeypatch.setattr(comparison, "_drawing_seconds", lambda: 10)
    assert steps_within(seconds, tmp_path, most) == steps
    (tmp_path / "results.json").write_text('{"filip-0": {"steps": 70}}')
    assert steps_within(seconds, tmp_path, most) == 70


def test_the_pace_is_that_of_the_steps(small, monkeypatch):
    monkeypatch.setattr(comparison, "_PACED", 3)
    monkeypatch.setattr(comparison, "_WARMUP", 1)
    step = FilipModule.training_step
    durations = iter((5.0, 0.25, 0.75))  # the first one does not count
    now = 100.0

    def timed(self, *given):
        nonlocal now
        now += next(durations)
        return step(self, *given)

    monkeypatch.setattr(FilipModule, "training_step", timed)
    monkeypatch.setattr(comparison, "time", SimpleNamespace(perf_counter=lambda: now))
    assert step_seconds("demo-clip") == pytest.approx(0.5)


def test_times_that_are_none_are_refused(tmp_path, capsys):
    for minutes in ("0", "-1"):
        line = refused(capsys, "--out", tmp_path / "out", "--minutes", minutes)
        assert "--minutes must be above 0" in line
    assert "--steps must be 1 or more" in refused(capsys, "--steps", 0)
    assert not (tmp_path / "out").exists()


def test_patches_of_the_pictures_choose_among_colours_and_shapes():
    torch.manual_seed(0)
    model = FilipModel.from_config("filip_tiny", tokenizer=WordTokenizer.train(shape_vocabulary()))
    model.eval()
    made = scene(TEST_SEED, 1)
    found = content_alignment(model, made)
    (image,), (text,) = encoded(model, [made])
    spoken = [word for name in CLASS_NAMES for word in name.split()]
    content = [n for n, string in enumerate(found.strings) if string in spoken]
    chosen = [content[int(np.argmax(patch @ text[content].T))] for patch in image]
    assert found.index.flatten().tolist() == chosen
    assert " ".join(found.strings[n] for n in found.label) == made.objects[0].name


# -- what is learned -------------------------------------------------------------------------------


def test_fifty_steps_lower_the_loss(tmp_path):
    fewer = {"batch_size": 12, "train_size": 60, "val_size": 12}
    fit_recipe("demo", tmp_path, steps=50, progress=False, data=fewer)
    with (tmp_path / "metrics.csv").open() as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert len(losses) == 10
    # at first no caption is told from another
    assert losses[0] == pytest.approx(np.log(12), abs=0.5)
    assert np.mean(losses[-3:]) < 0.6 * losses[0]


@pytest.mark.slow
def test_words_point_at_their_objects_only_after_late_interaction(tmp_path):
    """The headline of section 9: equal towers, data and steps."""
    found = compare_shapes(tmp_path, (0,), progress=False)
    assert found["FILIP"]["pointing"][0] >= 0.9
    assert found["CLIP"]["pointing"][0] <= 0.3
    assert found["FILIP"]["alignment_content"][0] - found["CLIP"]["alignment_content"][0] >= 0.5
