"""What the pictures say, and that nothing in them lies over anything else."""

import string

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image
from torch import Tensor

from filip_vl import report, synthetic
from filip_vl.alignment import Alignment, Word
from filip_vl.comparison import METRICS
from filip_vl.report.common import (
    CLASS_WORD,
    CLIP,
    FILIP,
    RIGHT,
    WRONG,
    middle_cut,
    pixels,
    short,
    word_colors,
    wrapped,
)
from tenfold.plotting import MUTED
from tenfold.plotting.tidy import check_tidy

MINUS = "\N{MINUS SIGN}"
SCENES = [synthetic.scene(7, n) for n in range(12)]
LONG = "a photo of a very long caption whose words are many and go on and on until nobody reads"


def alignment(
    rows: int = 6, columns: int = 6, words: int = 5, label: tuple[int, ...] = (2,), seed: int = 0
) -> Alignment:
    """Random similarities of a caption of so many words, one token each."""
    generator = torch.Generator().manual_seed(seed)
    similarities = 0.3 * torch.randn(words + 2, rows, columns, generator=generator)
    names = [string.ascii_lowercase[n % 26] * (1 + n % 7) + str(n) for n in range(words)]
    strings = ["<start_of_text>", *names, "<end_of_text>"]
    found = [Word(name, (n,)) for n, name in enumerate(names, 1)]
    shares = similarities.flatten(1).amax(1) / (words + 2)
    i2t = float(similarities.amax(0).mean())
    return Alignment(similarities, strings, found, label, i2t, float(shares.sum()), shares)


def texts(ax: Axes) -> str:
    """All that is written in and over a panel."""
    return "\n".join(
        [ax.get_title("left"), ax.get_title(), *(text.get_text() for text in ax.texts)]
    )


def titled(fig: Figure, start: str) -> Axes:
    return next(ax for ax in fig.axes if texts(ax).strip().startswith(start))


def frames(ax: Axes) -> list[tuple[tuple[float, float], tuple[float, ...]]]:
    """Corners and colours of what is outlined in a panel."""
    found = [patch for patch in ax.patches if isinstance(patch, Rectangle) and not patch.get_fill()]
    return [(patch.get_xy(), to_rgba(patch.get_edgecolor())) for patch in found]


def told(fig: Figure) -> dict[str, Patch]:
    """What the legend under a figure explains."""
    (legend,) = fig.legends
    names = [text.get_text() for text in legend.get_texts()]
    return dict(zip(names, legend.get_patches(), strict=True))


def photo(height: int = 32, width: int = 48, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


# -- what all share -------------------------------------------------------------------------------


def test_pictures_may_be_bytes_or_tensors():
    image = photo()
    np.testing.assert_allclose(pixels(image), image / 255)
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    np.testing.assert_allclose(pixels(tensor), image / 255)
    np.testing.assert_allclose(pixels(tensor / 255), image / 255, atol=1e-6)
    with pytest.raises(ValueError, match=r"not \(3, 4\)"):
        pixels(np.zeros((3, 4)))
    with pytest.raises(ValueError, match=r"not 0\.\.1"):
        pixels(np.full((2, 2, 3), 1.5))


def test_texts_are_cut_between_words():
    assert short("a red ring", 10) == "a red ring"
    assert short("a red ring and a cross", 12) == "a red ring \N{HORIZONTAL ELLIPSIS}"
    assert short("x" * 20, 6) == "xxxxx\N{HORIZONTAL ELLIPSIS}"
    for text in (LONG, LONG.replace(" ", ""), "x " * 90):
        for count in (1, 2, 3):
            lines = wrapped(text, 20, count).split("\n")
            assert len(lines) == count
            assert max(map(len, lines)) <= 20
    assert word_colors(11)[0] == word_colors(11)[10]


def test_what_is_too_long_keeps_both_of_its_ends():
    dots = "\N{HORIZONTAL ELLIPSIS}"
    assert middle_cut("a red ring", 10) == "a red ring"
    assert middle_cut("one two three four five six", 17) == f"one two {dots} six"
    assert middle_cut("one two three four five six", 19) == f"one two {dots} five six"
    assert middle_cut("x" * 20 + "y" * 20, 9) == f"xxx {dots} yyy"
    one, other = (wrapped(f"{LONG} {LONG} a red {end}", 33, 4) for end in ("ring", "cross"))
    assert one.endswith("ring")
    assert other.endswith("cross")


def test_save_all_writes_pngs(tmp_path):
    fig = report.cost_curves({"tiled": [report.Cost(8, 1.0, 2.0**20)]})
    (path,) = report.save_all({"cost": fig}, tmp_path / "new")
    assert path == tmp_path / "new" / "cost.png"
    with Image.open(path) as picture_file:
        assert min(picture_file.size) > 200


# -- alignment ------------------------------------------------------------------------------------


def test_the_index_of_every_patch_is_written():
    found = alignment(4, 6)
    fig = report.plot_alignment(photo(), found, "A heading")
    ax = titled(fig, "Word of each patch")
    numbers = {text.get_position(): text for text in ax.texts if text.get_text().isdigit()}
    assert len(numbers) == 24
    dark = np.asarray(ax.images[1].get_array())[..., 3]
    for (row, column), index in np.ndenumerate(found.index.numpy()):
        text = numbers[column + 0.5, row + 0.5]
        assert int(text.get_text()) == index
        assert (text.get_color() == CLASS_WORD) == (index == 2)
        assert (dark[row, column] == 0) == (index == 2)
    (label,) = [text for text in ax.texts if text.get_text() == "label: bb1"]
    assert label.get_color() == CLASS_WORD
    listed = texts(titled(fig, "Words"))
    assert all(name in listed for name in found.strings)
    counts = np.bincount(found.index.flatten(), minlength=7)
    assert all(str(count) in listed.split("\n") for count in counts if count)
    check_tidy(fig)
    tops = {round(one.get_window_extent().y1) for one in fig.axes}
    assert len(tops) == 1  # the headings are at one height


def test_without_a_label_nothing_is_darker():
    fig = report.plot_alignment(photo(32, 32), alignment(label=()))
    ax = titled(fig, "Word of each patch")
    assert not np.asarray(ax.images[1].get_array()).any()
    assert "by its index" in texts(ax)
    check_tidy(fig)


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (7, 4)])
def test_many_patches_and_words_find_room(rows, columns):
    found = alignment(rows, columns, words=50, label=(3, 40))
    fig = report.plot_alignment(photo(16 * rows, 16 * columns), found, LONG)
    listed = texts(titled(fig, "Words")).split("\n")
    assert {"3", "40"} <= set(listed)  # the label's tokens are never left out
    check_tidy(fig)


def drawn_colors(fig: Figure) -> np.ndarray:
    fig.canvas.draw()
    return np.asarray(fig.canvas.buffer_rgba())[..., :3]


def test_the_colours_of_heat_are_those_of_its_bar():
    maps = {"similarity": alignment().similarity, "attention": torch.rand(6, 6) / 100}
    fig = report.heat_maps(photo(), maps, "Where it looks")
    check_tidy(fig)
    colors = drawn_colors(fig)
    for name, heat in maps.items():
        ax = titled(fig, name)
        np.testing.assert_allclose(ax.images[0].get_array(), heat, atol=1e-6)
        (bar,) = ax.child_axes
        panel, wide = ax.get_window_extent(), bar.get_window_extent()
        assert (wide.x0, wide.x1) == pytest.approx((panel.x0, panel.x1))
        low, high = float(heat.min()), float(heat.max())
        labels = [label.get_text().replace(MINUS, "-") for label in bar.get_xticklabels()]
        assert len(set(labels)) == 5
        np.testing.assert_allclose(
            np.array(labels, float), np.linspace(low, high, 5), atol=0.06 * (high - low)
        )
        y = len(colors) - int((wide.y0 + wide.y1) / 2)
        for (row, column), value in np.ndenumerate(heat.numpy()):
            for inside in (0.25, 0.75):  # one colour over all of a patch
                x = panel.x0 + panel.width * (column + inside) / 6
                down = panel.y1 - panel.height * (row + inside) / 6
                patch = colors[len(colors) - int(down), int(x)]
                place = (float(value) - low) / (high - low)
                along = wide.x0 + place * wide.width
                in_bar = colors[y, int(np.clip(along, wide.x0 + 2, wide.x1 - 2))]
                np.testing.assert_allclose(patch.astype(int), in_bar.astype(int), atol=12)


def test_heat_of_other_shapes():
    fig = report.heat_maps(photo(64, 32), {"constant": torch.zeros(2, 2)})
    assert len(titled(fig, "constant").child_axes[0].get_xticks()) == 1
    check_tidy(fig)
    check_tidy(report.heat_maps(photo(128, 32), {"tall": torch.rand(8, 2) / 1000}))
    check_tidy(
        report.heat_maps(photo(20, 90), {"wide": torch.rand(2, 9), "more": torch.rand(2, 9)})
    )
    with pytest.raises(ValueError, match="no maps"):
        report.heat_maps(photo(), {})


@pytest.mark.parametrize("words", [1, 14])
def test_every_word_has_a_strip_and_its_best_patch(words):
    found = alignment(4, 6, words)
    fig = report.word_strips(photo(), found, LONG)
    for n, word in enumerate(found.words):
        ax = titled(fig, word.text)
        heat = found.word_maps[n].numpy()
        np.testing.assert_allclose(ax.images[0].get_array(), heat, atol=1e-6)
        row, column = np.unravel_index(heat.argmax(), heat.shape)
        assert frames(ax)[0][0] == (column, row)
        assert ax.get_xlabel() == f"{heat.max():.2f}".replace("-", MINUS)
    check_tidy(fig)
    with pytest.raises(ValueError, match="no words"):
        report.word_strips(photo(), alignment(words=0, label=()))


# -- scores ---------------------------------------------------------------------------------------


def batch_scores(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    i2t, t2i = (0.3 * torch.rand(count, count, generator=generator) for _ in range(2))
    i2t.diagonal().add_(0.3)
    t2i.diagonal().add_(0.3)
    i2t[0, 1] = t2i[2, 1] = 0.9  # image 0 is wrong, and caption 1 is
    return i2t, t2i


@pytest.mark.parametrize("count", [4, 12])
def test_matrices_mark_what_was_chosen(count):
    i2t, t2i = batch_scores(count)
    captions = [scene.caption for scene in SCENES[:count]]
    captions[0] = f"{LONG} {LONG}"
    fig = report.similarity_matrices(
        i2t, t2i, [scene.image for scene in SCENES[:count]], captions, "A batch"
    )
    rows, columns = titled(fig, "s\u1d35, image"), titled(fig, "s\u1d40, text")
    np.testing.assert_allclose(rows.images[0].get_array(), i2t, atol=1e-6)
    np.testing.assert_allclose(columns.images[0].get_array(), t2i, atol=1e-6)
    for ax, wrong in ((rows, (0, 1)), (columns, (2, 1))):
        want = {(n, n): to_rgba(RIGHT) for n in range(count)} | {wrong: to_rgba(WRONG)}
        del want[(0, 0) if ax is rows else (1, 1)]
        found = {(round(y + 0.44), round(x + 0.44)): color for (x, y), color in frames(ax)}
        assert found == want
    for ax in (rows, columns):
        assert f"{count - 1} of {count} right" in texts(ax)
    named = told(fig)
    assert to_rgba(named["chosen, and right"].get_edgecolor()) == to_rgba(RIGHT)
    assert to_rgba(named["chosen, but of another pair"].get_edgecolor()) == to_rgba(WRONG)
    check_tidy(fig)


def test_matrices_refuse_what_cannot_be_shown():
    i2t, t2i = batch_scores(4)
    with pytest.raises(ValueError, match="4 pairs, 3 images, 4 captions"):
        report.similarity_matrices(i2t, t2i, [photo()] * 3, ["a"] * 4)
    big = torch.zeros(30, 30)
    with pytest.raises(ValueError, match="30 pairs"):
        report.similarity_matrices(big, big, [photo()] * 30, ["a"] * 30)


def test_bars_add_up_to_the_score():
    found = [alignment(seed=n) for n in range(2)]
    found[1].shares[2] = -0.04
    fig = report.contribution_bars(
        [scene.image for scene in SCENES[:2]], found, ["the hit", "another"], LONG
    )
    panels = [ax for ax in fig.axes if len(ax.patches) == 7]
    assert len(panels) == 2
    drawn = np.array([[bar.get_width() for bar in ax.patches] for ax in panels])
    np.testing.assert_allclose(
        drawn, [[100 * value for value in one.word_shares.values()] for one in found]
    )
    names = [label.get_text() for label in panels[0].get_yticklabels()]
    assert names == found[0].strings
    for column, ax in enumerate(panels):  # what beats the other hit stands out
        best = drawn[column] >= drawn.max(0)
        assert [to_rgba(FILIP) == bar.get_facecolor() for bar in ax.patches] == best.tolist()
    named = told(fig)
    assert to_rgba(named["the largest share of this word"].get_facecolor()) == to_rgba(FILIP)
    faint = named["another image has a larger one"].get_facecolor()
    assert {bar.get_facecolor() for ax in panels for bar in ax.patches} == {to_rgba(FILIP), faint}
    assert f"{MINUS}4.00" in texts(panels[1])
    assert f"s\u1d40 = {found[0].s_t2i:.3f}" in texts(titled(fig, "the hit"))
    check_tidy(fig)
    alone = report.contribution_bars([photo()], found[:1])
    assert not alone.legends  # nothing to compare with
    check_tidy(alone)
    check_tidy(report.contribution_bars([photo()], [alignment(words=40)]))
    with pytest.raises(ValueError, match="different captions"):
        report.contribution_bars([photo()] * 2, [found[0], alignment(words=3)])


# -- retrieval ------------------------------------------------------------------------------------


def query(n: int, right: int | None = 0, caption: str = "", **more) -> report.Query:
    images = [SCENES[(n + k) % 12].image for k in range(5)]
    hits = [k == right for k in range(5)]
    rank = 17 if right is None else right + 1
    scores = [0.9 - 0.1 * k for k in range(5)]
    return report.Query(caption or SCENES[n].caption, images, scores, hits, rank, **more)


def test_a_sheet_frames_what_is_right():
    fig = report.retrieval_sheet([query(0), query(1, right=2), query(2, caption=LONG * 3)], "Found")
    by_row = np.array([ax for ax in fig.axes if ax.images]).reshape(3, 5)
    framed = [[bool(frames(ax)) for ax in row] for row in by_row]
    assert np.argwhere(framed).tolist() == [[0, 0], [1, 2], [2, 0]]
    assert by_row[1, 2].get_xlabel() == "0.700"
    assert "right image at rank 3" in "\n".join(map(texts, fig.axes))
    check_tidy(fig)


def test_a_sheet_of_failures_shows_what_was_wanted():
    wanted = SCENES[9].image
    fig = report.retrieval_sheet(
        [query(0, right=None, wanted=wanted), query(1, right=1, wanted=wanted)], "Failures"
    )
    named = [ax for ax in fig.axes if ax.get_xlabel() == "wanted"]
    assert len(named) == 1  # the other one is among the best
    np.testing.assert_allclose(named[0].images[0].get_array(), pixels(wanted))
    assert frames(named[0])[0][1] == to_rgba(RIGHT)
    check_tidy(fig)
    for bad in ([], [query(0)._replace(scores=[0.1])]):
        with pytest.raises(ValueError, match=r"no queries|one for one"):
            report.retrieval_sheet(bad)


def test_a_contact_sheet_outlines_the_words():
    words = ["a", "red", "ring"]
    patches = [[None, (0, 5), (3, 2)], [None, (1, 1), (1, 1)], [None, None, (5, 5)]]
    hits = [
        report.Hit(SCENES[n].image, 0.5 - 0.1 * n, (6, 6), patches[n], f"a_very_long_name_{n}.jpg")
        for n in range(3)
    ]
    fig = report.contact_sheet(words, hits, heading="Search")
    red, ring = (to_rgba(color) for color in word_colors(3)[1:])
    first, second, third = (frames(ax) for ax in fig.axes if ax.images)
    assert first == [((5.06, 0.06), red), ((2.06, 3.06), ring)]
    (outer, inner) = (corner for corner, _ in second)  # one inside the other
    assert outer == (1.06, 1.06)
    assert inner > outer
    assert [color for _, color in third] == [ring]
    written = {text.get_text(): text.get_color() for ax in fig.axes for text in ax.texts}
    assert to_rgba(written["ring"]) == ring
    assert written["a"] == MUTED  # it has no patch
    check_tidy(fig)


@pytest.mark.parametrize(("count", "shape"), [(1, (64, 32)), (7, (32, 64))])
def test_contact_sheets_of_other_sizes(count, shape):
    words = LONG.split() * 2
    hits = [report.Hit(photo(*shape), 0.5, (2, 2), [(0, 0)] * len(words)) for _ in range(count)]
    check_tidy(report.contact_sheet(words, hits, columns=3))
    with pytest.raises(ValueError, match="not one for one"):
        report.contact_sheet(words[1:], hits)


def test_a_contact_sheet_begins_with_the_picture_looked_for():
    hits = [report.Hit(SCENES[n].image, 0.5, (6, 6), []) for n in range(1, 8)]
    fig = report.contact_sheet([], hits, heading="Like it", picture=SCENES[0].image)
    first, *others = [ax for ax in fig.axes if ax.images]
    np.testing.assert_allclose(first.images[0].get_array(), pixels(SCENES[0].image))
    assert first.get_xlabel() == "looked for"
    assert len(others) == 7
    np.testing.assert_allclose(others[0].images[0].get_array(), pixels(SCENES[1].image))
    assert [bool(frames(ax)) for ax in (first, *others)] == [True] + 7 * [False]
    assert not any(ax.texts for ax in fig.axes)
    check_tidy(fig)
    with pytest.raises(ValueError, match="no words"):
        report.contact_sheet([], hits)


def test_a_contact_sheet_of_many_hits_shows_the_best(monkeypatch):
    monkeypatch.setattr(report.retrieval, "_MOST", 6)
    hits = [report.Hit(photo(4, 4, n), 1 - n / 1000, (1, 1), [(0, 0)]) for n in range(7)]
    fig = report.contact_sheet(["ring"], hits[:6], heading="Search: ring")
    assert fig.get_suptitle() == "Search: ring"
    fig = report.contact_sheet(["ring"], hits * 200, heading="Search: ring")
    assert fig.get_suptitle() == "Search: ring (the best 6 of 1,400)"
    shown = [ax for ax in fig.axes if ax.images]
    assert len(shown) == 6
    assert shown[-1].get_xlabel() == "0.995"
    check_tidy(fig)


# -- runs -----------------------------------------------------------------------------------------


def log(seed: int) -> list[dict[str, float]]:
    noise = np.random.default_rng(seed).normal(size=100)
    rows = [
        {"step": n, "train/loss": 4 * 0.97**n + 0.1 * abs(noise[n]), "train/temperature": 0.07}
        for n in range(100)
    ]
    return rows + [
        {"step": n, "val/i2t_r1": n / 120, "val/t2i_r1": n / 140} for n in range(0, 100, 20)
    ]


def test_curves_of_two_runs():
    fig = report.training_curves({"FILIP": log(0), "CLIP": log(1)}, "Two runs")
    loss, temperature, recall = (
        titled(fig, name) for name in ("Contrastive loss", "Temperature", "Retrieval")
    )
    colors = {str(line.get_label()): line.get_color() for line in loss.lines}
    assert colors["FILIP"] == FILIP
    assert colors["CLIP"] == CLIP
    assert len(temperature.get_legend().get_texts()) == 2
    (drawn,) = [line for line in recall.lines if line.get_label() == "CLIP, text to image"]
    np.testing.assert_allclose(drawn.get_ydata(), [100 * n / 140 for n in range(0, 100, 20)])
    check_tidy(fig)


def test_no_curve_is_hidden_or_cut_off():
    rows = [
        {"step": n, "train/loss": 4.1 - 0.01 * n, "train/temperature": 0.07, "val/i2t_r1": 1.0}
        for n in range(8)
    ]
    fig = report.training_curves({"FILIP": rows, "CLIP": rows, "DeCLIP": rows})
    check_tidy(fig)
    for ax in fig.axes:
        highest = max(line.get_ydata().max() for line in ax.lines if line.get_marker() == "o")
        (_, top), (_, edge) = (ax.transData.transform((0, y)) for y in (highest, ax.get_ylim()[1]))
        assert edge - top > fig.dpi / 72 * 5  # more than half a marker
    lines = titled(fig, "Temperature").lines[:3]
    assert lines[0].get_linestyle() == "-"
    assert all(line.get_linestyle() == "--" for line in lines[1:])  # gaps show what lies below
    widths = [line.get_linewidth() for line in lines]
    assert widths[0] > widths[1] > widths[2]


def test_curves_of_little():
    fig = report.training_curves({"FILIP": [{"step": 1, "train/loss": 2.0}]})
    assert len(fig.axes) == 1
    check_tidy(fig)
    fig = report.training_curves({"FILIP": [{"step": 1, "train/logit_scale": 20.0}]})
    assert titled(fig, "Temperature").lines[0].get_ydata() == pytest.approx([0.05])
    with pytest.raises(ValueError, match="train/loss"):
        report.training_curves({"FILIP": [{"step": 1, "lr": 0.1}]})


SCORES = {
    "FILIP": {"R@1 i2t": [0.87, 0.84], "pointing game": [0.98, 0.99], "binding": [0.94, 0.95]},
    "CLIP": {"R@1 i2t": [0.76, 0.64], "pointing game": [0.10, 0.15], "binding": [0.67, 0.55]},
}


def test_bars_have_means_and_seeds():
    fig = report.comparison_bars(SCORES, {"binding": 0.5}, "FILIP and CLIP")
    (ax,) = fig.axes
    heights = [bar.get_height() for bar in ax.patches]
    np.testing.assert_allclose(heights, [85.5, 98.5, 94.5, 70.0, 12.5, 61.0])
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    np.testing.assert_allclose(dots[0].get_ydata(), [87, 84])
    assert len(dots) == 6
    (chance, _) = [line for line in ax.lines if line.get_marker() == ""]
    np.testing.assert_allclose(chance.get_ydata(), [50, 50])
    assert "each of 2 seeds" in texts(ax)
    assert {"70.0", "98.5", "12.5"} <= set(texts(ax).split("\n"))
    check_tidy(fig)
    single = {name: {m: v[:1] for m, v in rows.items()} for name, rows in SCORES.items()}
    fig = report.comparison_bars(single)
    assert not fig.axes[0].lines
    check_tidy(fig)
    for bad in ({}, {**SCORES, "SLIP": {"R@1": [0.1]}}, {"FILIP": {"R@1": []}}):
        with pytest.raises(ValueError, match=r"no networks|different metrics|without values"):
            report.comparison_bars(bad)


@pytest.mark.parametrize("networks", [1, 3])
def test_metrics_keep_their_words_together(networks):
    scores = {str(n): {name: [1.0] for name in METRICS.values()} for n in range(networks)}
    fig = report.comparison_bars(scores)
    (ax,) = fig.axes
    labels = [label.get_text() for label in ax.get_xticklabels()]
    assert [" ".join(label.split()) for label in labels] == list(METRICS.values())
    assert max(label.count("\n") for label in labels) == 1
    check_tidy(fig)


@pytest.mark.parametrize(
    ("seconds", "labels"),
    [
        (1.0, ["50", "100", "200", "500"]),
        (0.06, ["1,000", "1,500", "2,000", "3,000", "5,000"]),
        (0.07, ["500", "1,000", "2,000", "5,000"]),
    ],
)
def test_a_log_axis_has_several_labels(seconds, labels):
    costs = [report.Cost(64, seconds, 2**20), report.Cost(256, seconds, 2**50)]
    fig = report.cost_curves({"tiled": costs})
    speed, memory = titled(fig, "Throughput"), titled(fig, "Peak memory")
    assert [label.get_text() for label in speed.get_yticklabels()] == labels
    assert [float(label.replace(",", "")) for label in labels] == speed.get_yticks().tolist()
    low, high = speed.get_ylim()
    assert low < 64 / seconds < 256 / seconds < high
    assert len(memory.get_yticks()) == 11  # a power of ten each
    check_tidy(fig)


def test_a_lone_cost_is_shown():
    check_tidy(report.cost_curves({"tiled": [report.Cost(8, 1.0, 0)]}))


def test_costs_are_throughput_and_mebibytes():
    costs = {
        "naive": [report.Cost(64, 0.5, 164 * 2**20), report.Cost(256, 10.0, 2890 * 2**20)],
        "tiled": [report.Cost(n, n / 500, n * 2**20) for n in (1024, 64, 256, 512, 128)],
        "two matmuls": [report.Cost(64, 0.6, 200 * 2**20)],
    }
    fig = report.cost_curves(costs, "one core", "Cost")
    speed, memory = titled(fig, "Throughput"), titled(fig, "Peak memory")
    np.testing.assert_allclose(speed.lines[0].get_xydata(), [[64, 128], [256, 25.6]])
    np.testing.assert_allclose(memory.lines[1].get_ydata(), [64, 128, 256, 512, 1024])
    assert "one core" in speed.get_ylabel()
    check_tidy(fig)


def test_the_confusion_matrix_lists_the_errors():
    counts = np.array([[8, 2, 0], [0, 5, 5], [0, 0, 0]])
    fig = report.confusion_matrix(counts, ["cat", "a hot dog with much mustard", "ship"], "Errors")
    ax, errors = titled(fig, "Predicted classes"), titled(fig, "Commonest errors")
    shown = np.ma.filled(ax.images[0].get_array(), np.nan)
    np.testing.assert_allclose(shown, [[80, 20, 0], [0, 50, 50], [np.nan] * 3])
    assert "65.0 % of all are right" in texts(ax)
    assert [text.get_text() for text in errors.texts if "%" in text.get_text()] == ["50 %", "20 %"]
    check_tidy(fig)
    with pytest.raises(ValueError, match="names 2"):
        report.confusion_matrix(counts, ["a", "b"])


@pytest.mark.parametrize("count", [1, 20, 60])
def test_confusions_of_few_and_many_classes(count):
    counts = np.random.default_rng(0).integers(0, 5, (count, count))
    np.fill_diagonal(counts, 20)
    check_tidy(report.confusion_matrix(counts, [f"class number {n}" for n in range(count)]))
