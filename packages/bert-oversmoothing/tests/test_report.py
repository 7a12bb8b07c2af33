"""What the pictures and the page say, and that nothing in them lies over anything else."""

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from PIL import Image

from bert_oversmoothing import report
from bert_oversmoothing.report import checks, demo, heads, layers, matrices, smoothing
from bert_oversmoothing.report.axes import log_axis, spaced
from bert_oversmoothing.report.common import FUSIONS, PARTS, RAMP, empty_figure, head_colors
from bert_oversmoothing.report.compare import compare
from bert_oversmoothing.report.tables import Tables
from bert_oversmoothing.report.words import plain
from bert_oversmoothing.theorem.blocks import BlockDesign
from bert_oversmoothing.theorem.check import Trial
from tenfold.errors import UserError
from tenfold.plotting import MUTED, PALETTE
from tenfold.plotting.tidy import check_tidy

MINUS = "\N{MINUS SIGN}"
STRANGE = ["<s>", "Ġinternationalisation", "日本語", "$", "▁pneumonoultramicroscopic", "🙂", "a\nb"]
STRANGE += ["$x$", "", "</s>", "\x07", "\\frac{1", "a_b^c", "##ing", "100%"]
TERMS = {
    "post": ("log_attention", "log_norm1", "log_feed_forward", "log_norm2"),
    "pre": ("log_attention", "log_feed_forward"),
}


def made_up(
    blocks: int = 4,
    count: int = 2,
    tokens: list[str] | None = None,
    bounds: list[float] | None = None,
    order: str = "post",
) -> Tables:
    """Tables of a model with every column, from random numbers in the ranges of real ones."""
    rng = np.random.default_rng(blocks)
    tokens = tokens or ["[CLS]", "deep", "nets", "smooth", "[SEP]"]
    rows: list[dict[str, Any]] = []
    for layer in range(blocks + 1):
        row: dict[str, Any] = {"layer": layer}
        for name in ("cosine", "relative_distance"):
            low, middle, high = sorted(float(x) for x in 0.05 + 0.9 * rng.random(3))
            row |= {name: middle, f"{name}_p5": low, f"{name}_p95": high}
        names = ["cosine_between", "cosine_excess", "cosine_without_mean", "identity_cosine"]
        names += ["identity_accuracy", "effective_rank", "effective_rank_centred"]
        names += ["stable_rank", "stable_rank_centred"]
        row |= {name: float(rng.random()) for name in names}
        if layer:
            parts = {name: float(rng.normal(0, 0.4)) for name in TERMS[order]}
            row["log_contraction"] = sum(parts.values())
            if order == "pre" and layer == blocks:  # after the block, and no part of its factor
                parts["log_final_norm"] = -0.5
            row |= parts
            bound = bounds[layer - 1] if bounds else float(10 + 30 * rng.random())
            row |= {"v_tight": bound, "v_paper": 2 * bound}
            row |= {"sigma_product_min": 0.4, "sigma1_lowest": 0.2, "sigma2_lowest": 0.3}
            row |= {"top_token_share": float(rng.random())}
        rows.append(row)
    statistics = ("lam", *heads.STATISTICS)[: 3 if blocks == 1 else None]
    head_rows: list[dict[str, Any]] = [
        {"layer": layer, "head": head} | {name: float(rng.random()) for name in statistics}
        for layer in range(1, blocks + 1)
        for head in range(count)
    ]
    n, numbers = len(tokens), blocks + 1
    scales = {
        f"{name}_quantiles": np.sort(np.exp(rng.normal(0, 0.4, (blocks, 101))), axis=1)
        for name in ("sigma1", "sigma2", "sigma_product")
    }
    gates = rng.random((n, numbers))
    sample = scales | {
        "cka": rng.random((numbers, numbers)),
        "spectrum": -np.sort(-rng.random((numbers, n)), axis=1),
        "cosine_first": rng.uniform(-1, 1, (n, n)),
        "cosine_middle": rng.uniform(-1, 1, (n, n)),
        "cosine_last": rng.uniform(-1, 1, (n, n)),
        "gate_weights": gates / gates.sum(1, keepdims=True),
    }
    run = {
        "model": "<script>alert('model')</script>",
        "order": order,
        "blocks": blocks,
        "texts": {"given": 20, "used": 17, "empty": 2, "single": 1},
        "versions": {"torch": "2.9"},
        "verdict": {"word": "mild", "sentence": "0.3 -> 0.5 & more", "thresholds": [0.1, 0.3]},
        "notes": ["a <b>note</b>"],
        "options": {"exclude_special": False},
        "sample_text": {
            "text": "half \ud83d and <script src='https://x.y/z.js'></script>",
            "tokens": tokens,
            "layers": list(range(numbers)),
        },
    }
    return Tables(rows, head_rows, [], run, sample)


@pytest.fixture(scope="module")
def tables() -> Tables:
    return made_up()


def tidy(fig: Figure) -> None:
    """The check at a size that takes a fraction of the time to draw; texts shrink with the rest."""
    fig.set_dpi(60)
    fig.draw_without_rendering()
    fig.set_layout_engine("none")  # once is enough
    check_tidy(fig)


def texts(ax: Axes) -> str:
    """All that is written in and over a panel."""
    return "\n".join([ax.get_title("left"), *(text.get_text() for text in ax.texts)])


def titled(fig: Figure, start: str) -> Axes:
    return next(ax for ax in fig.axes if ax.get_title("left").startswith(start))


def drawn(fig: Figure | None) -> Figure:
    assert fig is not None
    return fig


def line(ax: Axes, label: str) -> tuple[np.ndarray, np.ndarray]:
    """A labelled line, in data units."""
    found = next(each for each in ax.lines if str(each.get_label()).startswith(label))
    return np.asarray(found.get_xdata(), float), np.asarray(found.get_ydata(), float)


def bars(ax: Axes) -> list[Rectangle]:
    return [patch for patch in ax.patches if isinstance(patch, Rectangle)]


def image(ax: Axes) -> np.ndarray:
    return np.ma.filled(np.asarray(ax.images[0].get_array(), float), np.nan)


# -- all pictures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("picture", report.PICTURES, ids=lambda picture: picture.name)
@pytest.mark.filterwarnings("error")  # such as of a glyph that no font has
def test_pictures_of_large_and_of_the_least_models_are_tidy(picture):
    names = [STRANGE[n % len(STRANGE)] for n in range(32)]
    large = made_up(24, 16, names, bounds=[0.8 if n % 5 else 3.0 for n in range(24)])
    tidy(drawn(picture.draw(large)))
    tidy(drawn(picture.draw(made_up(1, 1, ["<s>", "</s>"], order="pre"))))


def test_missing_columns_are_no_pictures(tmp_path):
    nothing = Tables([{"layer": n} for n in range(3)], [{"layer": 1, "head": 0}])
    assert report.draw_all(nothing, tmp_path) == []
    assert [picture.draw(nothing) for picture in report.PICTURES] == [None] * len(report.PICTURES)
    nothing.layers = [{"layer": n, "cosine": 0.5} for n in range(3)]
    assert [file.name for file in report.draw_all(nothing, tmp_path)] == ["similarity.png"]


def test_a_row_without_a_value_is_a_gap_and_no_error(tables):
    holes = [dict(row) for row in tables.layers]
    for name in ("cosine", "cosine_p5", "log_norm1", "top_token_share", "v_tight", "stable_rank"):
        holes[2][name] = None
    damaged = replace(tables, layers=holes, heads=tables.heads[1:])
    for picture in report.PICTURES:
        assert picture.draw(damaged) is not None
    ax = drawn(layers.similarity(damaged)).axes[0]
    assert math.isnan(line(ax, "inside a text")[1][2])
    assert math.isnan(image(drawn(heads.contraction_of_heads(damaged)).axes[0])[0, 0])


# -- curves ---------------------------------------------------------------------------------------


def test_similarity_has_its_band_and_what_texts_share(tables):
    ax = drawn(layers.similarity(tables)).axes[0]
    for label, name in (
        ("inside a text", "cosine"),
        ("between", "cosine_between"),
        ("excess", "cosine_excess"),
        ("inside, after", "cosine_without_mean"),
    ):
        x, y = line(ax, label)
        assert x.tolist() == [0, 1, 2, 3, 4]
        assert y.tolist() == tables.column(name)
    (band,) = [each for each in ax.collections if isinstance(each, PolyCollection)]
    corners = {tuple(corner) for corner in np.asarray(band.get_paths()[0].vertices).tolist()}
    for name in ("cosine_p5", "cosine_p95"):
        assert set(enumerate(tables.column(name))) <= corners
    fused = drawn(layers.similarity(replace(tables, run={"fused_cosine": 0.21}))).axes[0]
    assert line(fused, "inside, of the fused")[1].tolist() == [0.21]


def test_distance_follows_the_measured_logs_and_bounds_only_what_is_bound():
    bounds = [0.9, 0.5, 1.0, 0.8]
    tables = made_up(bounds=bounds)
    fig = drawn(layers.distance(tables))
    left, right = titled(fig, "Distance"), titled(fig, "Contraction")
    assert line(left, "$d_M(H_l)\\,/\\,\\|")[1].tolist() == tables.column("relative_distance")
    logs = tables.column("log_contraction")[1:]
    measured = [math.exp(math.fsum(logs[:layer])) for layer in range(5)]
    assert line(left, "$d_M(H_l)\\,/\\,d_M(H_0)")[1] == pytest.approx(measured)
    x, y = line(left, "bound on it")
    assert x.tolist() == [0, 1, 2]
    assert y == pytest.approx([1.0, 0.9, 0.9 * 0.5])
    x, y = line(left, "_again")
    assert x.tolist() == [3, 4]
    assert y == pytest.approx([measured[3], measured[3] * 0.8])
    assert line(right, "measured")[1] == pytest.approx(np.exp(logs))
    assert line(right, "bound v, tight")[1].tolist() == bounds
    assert line(right, "bound v, the paper")[1].tolist() == tables.column("v_paper")[1:]
    assert "v < 1) in 3 of 4 blocks" in texts(right)


def test_a_bound_that_says_nothing_is_told(tables):
    fig = drawn(layers.distance(tables))
    assert "vacuous" in texts(fig.axes[1])
    assert "all 4 blocks" in texts(fig.axes[1])
    assert not any("bound on it" in str(each.get_label()) for each in fig.axes[0].lines)
    unknown = [row | {"v_tight": None, "v_paper": None} for row in tables.layers]
    fig = drawn(layers.distance(replace(tables, layers=unknown)))
    assert "no bound is known" in texts(fig.axes[1])


def test_ranks_identity_and_spectrum_are_those_of_the_tables(tables):
    ranks, identity = (drawn(f(tables)).axes[0] for f in (layers.ranks, layers.identity))
    assert [list(np.asarray(each.get_ydata())) for each in ranks.lines] == [
        tables.column(f"{name}_rank{end}")
        for name in ("effective", "stable")
        for end in ("", "_centred")
    ]
    assert line(identity, "cosine")[1].tolist() == tables.column("identity_cosine")
    assert line(identity, "nearest")[1].tolist() == tables.column("identity_accuracy")
    fig = drawn(layers.spectrum(tables))
    assert np.array([each.get_ydata() for each in fig.axes[0].lines]) == pytest.approx(
        tables.sample["spectrum"]
    )
    assert [each.get_color() for each in fig.axes[0].lines] == [RAMP(n / 4) for n in range(5)]


# -- who smooths ----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["post", "pre"])
def test_stacked_bars_are_the_contributions_and_add_up_to_the_net(order):
    tables = made_up(order=order)
    fig = drawn(smoothing.contributions(tables))
    ax, total = titled(fig, "Who smooths"), titled(fig, "All blocks")
    stacks = [each for each in ax.containers if isinstance(each, BarContainer)]
    shown = [name for name in PARTS if any(row.get(name) for row in tables.layers)]
    assert [each.get_label() for each in stacks] == [PARTS[name][0] for name in shown]
    if order == "pre":  # behind the last block
        shown.remove("log_final_norm")
        (final,) = stacks.pop()
        found = (final.get_x() + final.get_width() / 2, final.get_y(), final.get_height())
        assert found == pytest.approx((5, 0, -0.5))
    ends = np.zeros((2, 4))
    for name, each in zip(shown, stacks, strict=True):
        values = np.nan_to_num(tables.column(name)[1:])
        assert [bar.get_height() for bar in each] == pytest.approx(values)
        for block, bar in enumerate(each):  # every bar begins where that of its sign ended
            side = int(values[block] <= 0)
            assert bar.get_y() == pytest.approx(ends[side, block])
            ends[side, block] += values[block]
    net = line(ax, "net")[1]
    assert net == pytest.approx(ends.sum(0))
    assert net == pytest.approx(tables.column("log_contraction")[1:])
    sums = [np.nansum(tables.column(name)) for name in shown]
    apart = [-0.5] if order == "pre" else []
    assert [bar.get_width() for bar in bars(total)] == pytest.approx([*sums, *apart])
    together = f"together {sum(sums):+.2f}".replace("-", MINUS)
    assert together in texts(total)
    shares = [bar.get_height() for bar in bars(titled(fig, "Largest token"))]
    assert shares == pytest.approx([100 * share for share in tables.column("top_token_share")[1:]])


@pytest.mark.parametrize("blocks", [1, 12, 24, 48])
def test_the_final_norm_has_a_place_and_a_name_behind_the_blocks(blocks):
    fig = drawn(smoothing.contributions(made_up(blocks, order="pre")))
    ax = titled(fig, "Who smooths")
    names = [label.get_text() for label in ax.get_xticklabels()]
    assert dict(zip(names, ax.get_xticks(), strict=True))["final\nnorm"] == blocks + 1
    assert {int(name) for name in names[:-1]} <= {*range(1, blocks + 1)}
    tidy(fig)


def test_violins_span_their_quantiles_with_minimum_and_threshold_marked(tables):
    fig = drawn(smoothing.scales(tables))
    ax = titled(fig, "Product")
    quantiles = tables.sample["sigma_product_quantiles"]
    (violins,) = [each for each in ax.collections if isinstance(each, PolyCollection)]
    for row, path in zip(quantiles, violins.get_paths(), strict=True):
        heights = np.asarray(path.vertices)[:, 1]
        assert (heights.min(), heights.max()) == pytest.approx((row[0], row[-1]))
    assert line(ax, "smallest of any text")[1].tolist() == quantiles[:, 0].tolist()
    assert line(ax, "mean over texts")[1].tolist() == tables.column("sigma_product_min")[1:]
    assert line(ax, "threshold 1")[1].tolist() == [1, 1]
    (medians,) = [each for each in ax.collections if isinstance(each, LineCollection)]
    middles = [segment[0][1] for segment in medians.get_segments()]
    assert middles == pytest.approx(np.median(quantiles, axis=1))
    second = titled(fig, "Divisors of the second")
    assert line(second, "smallest of any token")[1].tolist() == tables.column("sigma2_lowest")[1:]


def test_equal_divisors_are_a_line_and_no_error(tables):
    same = {"sigma_product_quantiles": np.full((4, 101), 2.0)}
    fig = drawn(smoothing.scales(replace(tables, sample=same)))
    assert not any(isinstance(each, PolyCollection) for each in fig.axes[0].collections)
    tidy(fig)


# -- matrices -------------------------------------------------------------------------------------


def test_heads_are_drawn_as_head_by_layer(tables):
    (ax, _) = drawn(heads.contraction_of_heads(tables)).axes
    for row in tables.heads:
        assert image(ax)[int(row["head"]), int(row["layer"]) - 1] == row["lam"]
    written = {text.get_text() for text in ax.texts}
    assert {f"{row['lam']:.2f}" for row in tables.heads} <= written
    fig = drawn(heads.head_statistics(tables))
    for name, (head, _) in heads.STATISTICS.items():
        assert np.array_equal(image(titled(fig, head)), heads.head_matrix(tables, name))


def test_token_matrices_tell_layer_mean_and_tokens(tables):
    fig = drawn(matrices.token_cosines(tables))
    for ax, name, layer in zip(fig.axes, ("first", "middle", "last"), (0, 2, 4), strict=False):
        values = tables.sample[f"cosine_{name}"]
        assert np.array_equal(image(ax), values)
        pairs = [values[i, j] for i in range(5) for j in range(5) if i != j]
        assert f"Layer {layer}\nmean {np.mean(pairs):.2f}".replace("-", MINUS) in texts(ax)
        named = [label.get_text() for label in ax.get_xticklabels()]
        assert named == tables.run["sample_text"]["tokens"]


def test_tokens_that_are_too_many_to_name_are_counted():
    many = made_up(2, 1, [f"token{n}" for n in range(128)])
    for draw in (matrices.token_cosines, matrices.gate_weights):
        fig = drawn(draw(many))
        labels = [label.get_text() for label in fig.axes[0].get_xticklabels()]
        assert labels == [str(n) for n in range(0, 128, 10)]
        assert fig.get_size_inches()[0] < 14
    tidy(fig)


def test_gate_weights_are_layer_by_token_with_the_numbers_of_the_layers(tables):
    run = tables.run | {"sample_text": tables.run["sample_text"] | {"layers": [0, 3, 6, 9, 12]}}
    fig = drawn(matrices.gate_weights(replace(tables, run=run)))
    weights = tables.sample["gate_weights"]
    assert np.array_equal(image(fig.axes[0]), weights.T)
    assert [label.get_text() for label in fig.axes[0].get_yticklabels()] == [
        "0",
        "3",
        "6",
        "9",
        "12",
    ]
    means = [bar.get_width() for bar in bars(fig.axes[1])]
    assert means == pytest.approx(weights.mean(0))


def test_likeness_of_layers_is_the_cka(tables):
    assert np.array_equal(
        image(drawn(matrices.layer_similarity(tables)).axes[0]), tables.sample["cka"]
    )


# -- words and axes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "letters", "shown"),
    [
        ("日本語", 0, "□□□"),
        ("a\nb\tc", 0, "a⏎b c"),
        ("$x$", 0, r"\$x\$"),
        ("▁the", 0, "▁the"),
        ("abcdefghij", 5, "ab…ij"),
        ("", 3, ""),
    ],
)
def test_strings_are_made_fit_to_be_drawn(text, letters, shown):
    assert plain(text, letters) == shown


UNIT = empty_figure(3, 3).add_subplot(ylim=(0, 1))


@settings(max_examples=60, deadline=None)
@given(thousandths=st.lists(st.integers(0, 1000), min_size=1, max_size=9))
def test_names_keep_their_order_and_their_distance(thousandths):
    heights = [height / 1000 for height in thousandths]
    places = np.array(spaced(UNIT, heights, 0.1))
    order = np.argsort(heights, kind="stable")
    assert (np.diff(places[order]) > 0.1 - 1e-9).all()
    assert places.min() > -1e-9
    assert places.max() < 1 + 1e-9
    if len(heights) == 1 or np.diff(np.sort(heights)).min() > 0.1:
        assert places == pytest.approx(heights)


@pytest.mark.parametrize("limits", [(0.97, 1.04), (0.6, 0.9), (0.3, 30), (1e-7, 3), (0.5, 2e6)])
def test_logarithmic_axes_have_numbers_within_their_limits(limits):
    ax = empty_figure(3, 3).add_subplot(yscale="log", ylim=limits)
    log_axis(ax)
    ticks = ax.get_yticks()
    assert 3 <= len(ticks) <= 9
    assert limits[0] <= min(ticks) < max(ticks) <= limits[1]
    for tick, label in zip(ticks, ax.get_yticklabels(), strict=True):
        text = label.get_text()
        told = text.replace("\N{MULTIPLICATION SIGN}$10^{", "e").replace("$10^{", "1e")
        assert float(told.replace("}$", "")) == pytest.approx(tick)


# -- the page -------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Tags with their attributes, and what is written."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def _small(monkeypatch):
    """Files of small pictures are written faster."""
    monkeypatch.setattr("tenfold.plotting.figures.DPI", 40)


@pytest.mark.usefixtures("_small")
def test_the_page_is_one_file_and_escapes_every_string(tmp_path):
    tables = made_up(1, 1, ["<script>alert(1)</script>", "b"])
    files = report.draw_all(tables, tmp_path / "figures")
    assert [file.stem for file in files] == [picture.name for picture in report.PICTURES]
    page = report.write_html(tables, tmp_path / "new" / "report.html", files).read_text("utf-8")
    read = Reader(page)
    assert read.open == []
    kinds = {tag for tag, _ in read.tags}
    assert not kinds & {"script", "link", "iframe", "object", "a", "base"}
    images = [found for tag, found in read.tags if tag == "img"]
    assert len(images) == len(files)
    for found in images:
        assert str(found["src"]).startswith("data:image/png;base64,")
        assert len(str(found["alt"])) > 10
    # No address in any attribute or in the style but those of data.
    references = [v for _, found in read.tags for k, v in found.items() if k in ("src", "href")]
    assert len(references) == len(images)
    assert "url(" not in page
    assert "@import" not in page
    assert "<script>alert('model')</script>" in read.text
    assert "a <b>note</b>" in read.text
    assert "https://x.y/z.js" in read.text  # as words alone
    assert "given 20, used 17, empty 2, single 1" in read.text
    assert "mild" in read.text
    assert "vacuous (v \N{GREATER-THAN OR EQUAL TO} 1) in all 1 blocks" in read.text
    assert "Anisotropy" in read.text
    assert "count as tokens" in read.text
    assert (
        "meta",
        {"name": "viewport", "content": "width=device-width, initial-scale=1"},
    ) in read.tags


def test_the_page_draws_what_is_not_drawn_yet_and_has_the_table_of_layers(tmp_path):
    rows: list[dict[str, Any]] = [
        {"layer": 0, "cosine": 0.25, "relative_distance": 0.5},
        {"layer": 1, "cosine": -0.125, "relative_distance": 0.5, "v_tight": 1234.5},
    ]
    run = {"options": {"exclude_special": True}, "order": "pre"}
    page = report.write_html(Tables(rows, run=run), tmp_path / "r.html").read_text("utf-8")
    assert page.count("<img ") == 2  # similarity and distance
    cells = [f"<td>{cell}</td>" for cell in ("0", "0.250", "0.500", "")]
    assert "".join(cells) in page
    cells = [f"<td>{cell}</td>" for cell in ("1", f"{MINUS}0.125", "0.500", "1.23e+03")]
    assert "".join(cells) in page
    assert "are left out" in page
    assert "never below 1" in page


def test_the_page_of_empty_tables_is_a_page(tmp_path):
    page = report.write_html(Tables([{"layer": 0}]), tmp_path / "r.html").read_text("utf-8")
    assert Reader(page).open == []
    assert "<img" not in page


# -- several models, the theorem, the probe -------------------------------------------------------


def test_curves_of_models_lie_over_one_another():
    models = {"a": made_up(), "runs/$weird$/" + "long" * 20: made_up(order="pre")}
    fig = compare(models)
    ax = titled(fig, "Token similarity")
    shown = [each for each in ax.lines if len(np.asarray(each.get_ydata())) > 0]
    assert [list(np.asarray(each.get_ydata())) for each in shown] == [
        tables.column("cosine") for tables in models.values()
    ]
    assert [list(np.asarray(each.get_xdata())) for each in shown] == [[0, 1, 2, 3, 4]] * 2
    names = [text.get_text() for text in fig.legends[0].get_texts()]
    assert names[0] == "a"
    assert len(names[1]) < 50
    tidy(fig)


def test_curves_that_cover_one_another_are_all_seen():
    models = {name: made_up() for name in "abcd"}
    for tables in [*models.values()][1:]:
        tables.run["fused_cosine"] = 0.25
    fig = compare(models)
    for ax in fig.axes:
        curves = [each for each in ax.lines if len(np.asarray(each.get_ydata())) == 5]
        assert len(curves) == 4
        widths, heights = ([f(each) for each in curves] for f in (Line2D.get_linewidth, zorder))
        assert all(below - above > 1 for below, above in pairwise(widths))
        assert all(below < above for below, above in pairwise(heights))
        marked = [each.get_markevery() for each in curves]
        assert marked == [(first, 4) for first in range(4)]
    stars = [each for each in fig.axes[0].lines if each.get_marker() == "*" and xy(each)]
    assert [xy(each) for each in stars] == [[(4, 0.25)]] * 3
    assert [each.get_color() for each in stars] == list(PALETTE[1:4])
    sizes = [each.get_markersize() for each in stars]
    assert all(below - above > 2 for below, above in pairwise(sizes))
    names = [text.get_text() for text in fig.legends[0].get_texts()]
    assert names == [*"abcd", "similarity of the fused states"]
    tidy(fig)


def zorder(each: Line2D) -> float:
    return each.get_zorder()


def xy(each: Line2D) -> list[tuple[float, float]]:
    return [*zip(np.asarray(each.get_xdata()), np.asarray(each.get_ydata()), strict=True)]


@pytest.mark.parametrize("first", [1.0, 0.9])
def test_ties_at_layer_0_are_explained_where_there_are_some(first):
    models = {"a": made_up(), "b": made_up()}
    models["a"].layers[0]["identity_accuracy"] = 1.0
    models["b"].layers[0]["identity_accuracy"] = first
    fig = compare(models)
    told = "a word that comes twice shares its vector" in texts(titled(fig, "Identity retained"))
    assert told == (first < 1)
    if told:
        tidy(fig)


def test_models_of_other_depths_share_relative_depth():
    fig = compare({"a": made_up(2), "b": made_up(4)})
    shown = [each for each in fig.axes[0].lines if len(np.asarray(each.get_ydata())) > 0]
    assert [list(np.asarray(each.get_xdata())) for each in shown] == [
        [0, 0.5, 1],
        [0, 0.25, 0.5, 0.75, 1],
    ]
    assert fig.axes[0].get_xlabel() == "layer over depth"
    with pytest.raises(ValueError, match="nothing to compare"):
        compare({"a": Tables([{"layer": 0}])})


def trial(order: Any, std: float, ratio: float, bound: float) -> Trial:
    return Trial(BlockDesign(8, 32, 2, order, "relu", std), ratio, bound, bound, 1, 1, 1, 1)


def test_trials_stand_at_bound_and_ratio_by_order_and_std():
    trials = [
        trial("post", 0.1, 0.9, 4.0),
        trial("post", 0.02, 0.95, 0.98),
        trial("post", 0.1, 0.8, 6.0),
        trial("post", 0.1, 3.0, 2.0),
        trial("pre", 0.02, 1.4, 9.0),
    ]
    fig = checks.theorem(trials)
    post, pre = fig.axes
    x, y = line(post, "weights of std 0.1")
    assert list(zip(x, y, strict=True)) == [(4.0, 0.9), (6.0, 0.8), (2.0, 3.0)]
    assert [list(part) for part in line(post, "weights of std 0.02")] == [[0.98], [0.95]]
    assert [list(part) for part in line(pre, "weights of std 0.02")] == [[9.0], [1.4]]
    assert [list(part) for part in line(post, "violation")] == [[2.0], [3.0]]
    diagonal = line(post, "ratio = bound")
    assert np.array_equal(*diagonal)
    assert "4 blocks, 1 violations, v < 1 in 1" in texts(post)
    assert "1 blocks, 0 violations, v < 1 in 0" in texts(pre)
    shaded = max(patch.get_extents().x1 for patch in post.patches)
    assert shaded == pytest.approx(post.transData.transform((1.0, 1.0))[0])
    tidy(fig)
    with pytest.raises(ValueError, match="no trials"):
        checks.theorem([])


def test_blocks_of_a_model_have_a_bar_of_their_deviations():
    stds = [0.03 + 0.001 * n for n in range(12)]
    fig = checks.theorem([trial("post", std, 0.9, 10 + 1000 * std) for std in stds])
    ax, bar = fig.axes
    assert bar.get_ylim() == pytest.approx((stds[0], stds[-1]))
    dots = [each for each in ax.lines if each.get_linestyle() == "None"]
    found = [(float(np.ravel(each.get_xdata())[0]), to_rgba(each.get_color())) for each in dots]
    for n, (bound, color) in enumerate(found):
        assert bound == 10 + 1000 * stds[n]
        assert color == pytest.approx(RAMP(n / 11), abs=0.01)
    tidy(fig)


def test_blocks_of_a_model_are_told_apart_by_their_number():
    trials = [trial("post", 0.02, 0.9, 4.0 + n) for n in range(4)]
    ax = checks.theorem(trials, [1, 1, 2, 2]).axes[0]
    assert [list(part) for part in line(ax, "block 2")] == [[6.0, 7.0], [0.9, 0.9]]
    assert "4 trials, 0 violations, v < 1 in 0" in texts(ax)
    fig = checks.theorem([trial("post", 0.02, 0.9, 4.0 + n) for n in range(9)], [*range(1, 10)])
    ax, bar = fig.axes
    assert bar.get_ylim() == pytest.approx((1, 9))
    assert bar.get_ylabel() == "block"
    dots = [each for each in ax.lines if each.get_linestyle() == "None"]
    for n, each in enumerate(dots):
        assert to_rgba(each.get_color()) == pytest.approx(RAMP(n / 8), abs=0.01)
    assert len(dots) == 9
    tidy(fig)


def test_the_probe_shows_who_always_names_the_same():
    rows = [{"layer": n, "cosine": 0.1 * n, "error": 0.5 - 0.1 * n} for n in range(3)]
    fig = checks.probe([row | {"error_most_frequent": 0.45} for row in rows])
    for ax in fig.axes[:2]:
        height = np.asarray(line(ax, "always the most frequent label")[1], float)
        assert height == pytest.approx([45, 45])
    tidy(fig)
    assert not checks.probe(rows).legends


@pytest.mark.parametrize("count", [1, 13, 25])
def test_the_probe_shows_error_against_similarity_with_numbers(count):
    rows = [
        {
            "layer": n,
            "cosine": 0.2 + 0.02 * n,
            "error": 0.1 + (n - 10) ** 2 / 900,
            "error_std": 0.01,
        }
        for n in reversed(range(count))
    ]
    fig = checks.probe(rows)
    ax = fig.axes[0]
    x, y = (np.asarray(part, float) for part in ax.lines[0].get_data())
    assert x == pytest.approx([row["cosine"] for row in rows[::-1]])
    assert y == pytest.approx([100 * row["error"] for row in rows[::-1]])
    best = min(rows, key=lambda row: row["error"])
    assert f"least error, layer {best['layer']}" in texts(ax)
    ring = np.concatenate([np.asarray(part, float) for part in ax.lines[-1].get_data()])
    assert ring == pytest.approx([best["cosine"], 100 * best["error"]])
    assert {text.get_text() for text in ax.texts} >= {str(n) for n in range(count)}
    tidy(fig)


# -- the demo -------------------------------------------------------------------------------------

FROZEN: dict[str, Any] = {
    "std": [0.05, 0.1, 0.2],
    "cosine": {0.05: [0.0, 0.04], 0.1: [0.7, 0.8], 0.2: [0.9999, 1.0]},
    "accuracy": {
        "last": {0.05: [0.96, 0.98], 0.1: [0.6, 0.7], 0.2: [0.12, 0.14]},
        "gate": {0.05: [0.99, 1.0], 0.1: [0.97, 0.99], 0.2: [0.97, 0.99]},
        "concat": {0.05: [1.0, 1.0], 0.1: [1.0, 1.0], 0.2: [0.98, 1.0]},
        "max": {0.05: [0.98, 0.98], 0.1: [0.8, 0.84], 0.2: [0.3, 0.4]},
        "scalar_mix": {0.05: [0.98, 0.99], 0.1: [0.9, 0.94], 0.2: [0.9, 0.91]},
        "gate_identity": {0.05: [0.99, 0.99], 0.1: [0.98, 0.98], 0.2: [0.94, 0.96]},
    },
    "chance": 1 / 8,
}


def test_the_frozen_probe_stands_over_one_minus_similarity():
    fig = demo.frozen_probe(FROZEN)
    ax = fig.axes[0]
    for label, head in (("last layer", "last"), ("scalar mix", "scalar_mix"), ("max", "max")):
        x, y = line(ax, label)
        assert x == pytest.approx([1 - np.mean(v) for v in FROZEN["cosine"].values()])
        assert y == pytest.approx([np.mean(v) for v in FROZEN["accuracy"][head].values()])
    left, right = ax.get_xlim()
    assert left > right  # similarity grows to the right
    assert ax.get_xscale() == "log"
    for tick, label in zip(ax.get_xticks(), ax.get_xticklabels(), strict=True):
        assert float(label.get_text()) == pytest.approx(1 - tick)
    bands = [each for each in ax.collections if isinstance(each, PolyCollection)]
    for rows, band in zip(FROZEN["accuracy"].values(), bands, strict=True):
        heights = np.asarray(band.get_paths()[0].vertices)[:, 1]
        seeds = [value for values in rows.values() for value in values]
        assert (heights.min(), heights.max()) == pytest.approx((min(seeds), max(seeds)))
    assert any(list(np.asarray(each.get_ydata())) == [1 / 8] * 2 for each in ax.lines)
    assert "2 seeds" in texts(ax)
    tidy(fig)
    same = FROZEN | {"cosine": {std: [1.0] for std in FROZEN["std"]}}  # as float32 may have it
    assert np.isfinite(line(demo.frozen_probe(same).axes[0], "max")[0]).all()
    with pytest.raises(ValueError, match="nothing to show"):
        demo.frozen_probe(FROZEN | {"std": []})


ODD: dict[str, Any] = {
    "em": {
        "scalar_mix": [0.378, 0.401],
        "last": [0.333, 0.018],
        "max": [0.487, 0.458],
        "gate": [0.367, 0.383],
        "concat": [0.612, 0.755],
        "best_layer(3)": [0.461, 0.604],
    },
    "chance": 1 / 36,
}
ODD["loss"] = {
    head: [[4.0 * math.exp(-step / (20 + 9 * seed)) for step in range(60)] for seed in range(2)]
    for head in ODD["em"]
}
ODD["chance_loss"] = 2.48
ODD["cosine_before"] = [0.04, 0.5, 0.98, 1.0]
ODD["cosine_after"] = {head: [0.04, 0.3, 0.6, 0.1 * n] for n, head in enumerate(ODD["em"], 3)}


def test_the_odd_run_has_a_bar_a_head_and_a_dot_a_seed():
    fig = demo.odd_run(ODD)
    ax, training, similarity = fig.axes
    order = ["last", "concat", "gate", "max", "scalar_mix", "best_layer(3)"]
    assert [bar.get_height() for bar in bars(ax)] == pytest.approx(
        [np.mean(ODD["em"][head]) for head in order]
    )
    dots = [each.get_ydata() for each in ax.lines if each.get_linestyle() == "None"]
    assert [list(np.asarray(each)) for each in dots] == [ODD["em"][head] for head in order]
    named = [label.get_text().replace("\n", " ") for label in ax.get_xticklabels()]
    assert named[0] == "last layer"
    assert named[-1] == "block 3 alone"
    after = [list(np.asarray(each.get_ydata())) for each in similarity.lines]
    assert all(values in after for values in ODD["cosine_after"].values())
    assert line(similarity, "before training")[1].tolist() == ODD["cosine_before"]
    assert len(training.lines) == 6 * 2 + 6 + 6 + 1  # seeds, means, strokes to names, chance
    assert any(list(np.asarray(each.get_ydata())) == [2.48] * 2 for each in training.lines)
    tidy(fig)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_the_number_of_the_odd_run_is_that_of_the_bar_and_of_no_dot(count):
    rng = np.random.default_rng(count)
    small = rng.uniform(0, 0.02, count).tolist()
    em = {"last": small, "gate": rng.uniform(0.3, 0.4, count).tolist(), "max": [0.0] * count}
    fig = demo.odd_run({"em": em, "chance": 1 / 36})
    tidy(fig)
    (ax,) = fig.axes
    numbers = [text for text in ax.texts if re.fullmatch(r"\d\.\d\d", text.get_text())]
    assert [text.get_text() for text in numbers] == [f"{np.mean(each):.2f}" for each in em.values()]
    dots = [each for each in ax.lines if each.get_linestyle() == "None"]
    assert len(dots) == (3 if count > 1 else 0)
    radius = 2.5 * fig.dpi / 72
    for text, bar in zip(numbers, bars(ax), strict=True):
        box, top = text.get_window_extent(), bar.get_window_extent()
        assert top.x0 <= box.x0 < box.x1 <= top.x1 + 1
        assert 0 <= box.y0 - top.y1 < box.height
        for each in dots:
            for x, _ in ax.transData.transform(xy(each)):
                assert not box.x0 - radius <= x <= box.x1 + radius


@pytest.mark.parametrize(
    "missing", [("loss",), ("cosine_before", "cosine_after"), ("cosine_after",)]
)
def test_parts_of_the_odd_run_may_be_missing(missing):
    fig = demo.odd_run({name: value for name, value in ODD.items() if name not in missing})
    assert len(fig.axes) == (3 if missing == ("cosine_after",) else 2)
    tidy(fig)


def test_one_seed_of_two_heads_is_a_picture():
    fig = demo.odd_run({"em": {"last": [0.0], "gate": [0.3]}, "chance": 1 / 36})
    assert len(fig.axes) == 1
    tidy(fig)
    with pytest.raises(ValueError, match="no head"):
        demo.odd_run({"em": {}, "chance": 0.1})


def test_peers_differ_in_hue_from_the_paper_and_from_the_baseline():
    colors = {name: to_rgba(color) for name, color in head_colors([*ODD["em"], "gate_x"]).items()}
    assert colors["last"] == to_rgba(MUTED)
    assert colors["gate_x"] == colors["gate"]
    fusions, peers = [colors[name] for name in FUSIONS], ["scalar_mix", "best_layer(3)"]
    assert all(colors[name] not in fusions for name in peers)
    # Warm: more red than blue; cool: more blue than red.
    assert all(colors[name][0] > colors[name][2] for name in peers)
    assert all(color[2] > color[0] for color in fusions)


# -- files ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_small")
def test_pictures_are_written_as_png_alone(tmp_path: Path):
    jobs = {
        "theorem": lambda path: report.draw_theorem([trial("post", 0.1, 0.9, 4.0)], path),
        "probe": lambda path: report.draw_probe([{"layer": 0, "cosine": 0.1, "error": 0.5}], path),
        "odd": lambda path: report.draw_odd_run({"em": {"last": [0.1]}, "chance": 0.1}, path),
        "frozen": lambda path: report.draw_frozen_probe(FROZEN, path),
        "compare": lambda path: report.draw_compare(
            {"a": Tables([{"layer": 0, "cosine": 1}])}, path
        ),
    }
    for name, job in jobs.items():
        written = job(tmp_path / "deep" / f"{name}.png")
        assert written == tmp_path / "deep" / f"{name}.png"
        assert Image.open(written).format == "PNG"
        with pytest.raises(UserError, match=r"\.png"):
            job(tmp_path / f"{name}.jpg")
