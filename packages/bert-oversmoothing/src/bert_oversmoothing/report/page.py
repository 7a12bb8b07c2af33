"""The report: one HTML file with everything in it, that needs nothing from anywhere."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from bert_oversmoothing.report.common import known, png
from bert_oversmoothing.report.drawing import PICTURES
from bert_oversmoothing.report.layers import bound_note
from bert_oversmoothing.report.tables import Tables
from bert_oversmoothing.report.told import layer_table, summary
from bert_oversmoothing.report.words import number
from tenfold.checkpoint import atomic_file
from tenfold.plotting import DPI

_FACTS = (
    *("model", "family", "revision", "order", "blocks", "width", "heads", "device"),
    *("texts", "tokens", "versions", "options", "timings"),
)
_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.2rem; background: #fff; color: #1f2328;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .4rem; }
.verdict { border-left: .4rem solid #0072b2; background: #f3f7fb; padding: .8rem 1rem; }
.verdict b { font-size: 1.15rem; }
.verdict.strong { border-color: #d55e00; background: #fdf4ee; }
.verdict.mild { border-color: #e69f00; background: #fdf8ec; }
p, li, dd { overflow-wrap: anywhere; }
.note, dt { color: #656d76; }
.wide { overflow-x: auto; }
img { display: block; max-width: 100%; height: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #e4e7eb;
  white-space: nowrap; }
th { vertical-align: bottom; white-space: normal; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
dd { margin: 0; }
@media (max-width: 40rem) {
  body { padding: .8rem; }
  .wide img { min-width: 36rem; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .5rem; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  section { break-inside: avoid; }
  .wide { overflow: visible; }
  table { font-size: 6.5pt; }
  th, td { padding: .1rem .2rem; }
}
"""


def write_html(tables: Tables, path: str | Path, drawn: Iterable[Path] = ()) -> Path:
    """Write the whole report as one file: verdict, pictures with how to read them, tables, facts.

    Nothing in it is fetched from elsewhere, and every string of the run is escaped.

    Args:
        tables: what was found.
        path: of the file.
        drawn: what `draw_all` has written for these tables, so as not to draw it again.

    Returns:
        ``path``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    model = _text(tables.run.get("model") or "a model")
    body = [
        f"<h1>Over-smoothing in {model}</h1>",
        _verdict(tables.run),
        _caveats(tables),
        *_pictures(tables, {file.stem: file for file in drawn}),
        _section("The layers", layer_table(tables)),
        _section("The run", _facts(tables.run)),
    ]
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Over-smoothing in {model}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body>\n</html>\n"
    )
    with atomic_file(path) as file:
        file.write(page.encode("utf-8", "replace"))  # a token may hold half a character
    return path


def _text(value: Any) -> str:
    """A value of the run for people, escaped and without control characters."""
    match value:
        case Mapping():
            shown = ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
        case _:
            shown = _plain(value)
    return escape("".join(c if c.isprintable() else " " for c in shown), quote=True)


def _plain(value: Any) -> str:
    match value:
        case None:
            return "none"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.4g}"
        case Mapping():
            return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
        case list() | tuple():
            return ", ".join(_plain(item) for item in value)
    return str(value)


def _section(head: str, content: str) -> str:
    return f"<section>\n<h2>{head}</h2>\n{content}\n</section>" if content else ""


def _verdict(run: Mapping[str, Any]) -> str:
    verdict = run.get("verdict") or {}
    word, sentence, thresholds = (verdict.get(n) for n in ("word", "sentence", "thresholds"))
    if not (word or sentence):
        return ""
    lines = [f"<b>Over-smoothing: {_text(word or 'not measured')}</b>"]
    if sentence:
        lines.append(f"<br>{_text(sentence)}")
    if word and thresholds:
        lines.append(
            '<br><span class="note">The word tells by how much the similarity of the last layer '
            f"exceeds the smallest of any layer; thresholds {_text(thresholds)}.</span>"
        )
    kind = word if word in ("mild", "strong") else "none"
    return f'<p class="verdict {kind}">' + "\n".join(lines) + "</p>"


def _caveats(tables: Tables) -> str:
    """What a reader must know before believing the pictures."""
    run, items = tables.run, []
    if known(tables.column("log_contraction")) or known(tables.column("v_tight")):
        items.append(
            f"The theorem: {bound_note(tables)}. Where v is 1 or more, the bound neither promises "
            "nor excludes contraction; rely on the measured split of “Who smooths”."
        )
    if run.get("order") == "pre":
        items.append("In a pre-norm block v is never below 1: the theorem cannot promise anything.")
    between = [value for value in tables.column("cosine_between") if math.isfinite(value)]
    last = f" (here {number(between[-1])} in the last layer)" if between else ""
    items.append(
        "Anisotropy: tokens of different texts may be similar too, because all share an offset"
        f"{last}. That is no smoothing; compare the excess."
    )
    special = "Special tokens such as [CLS] and [SEP] "
    if (run.get("options") or {}).get("exclude_special"):
        items.append(special + "are left out.")
    else:
        items.append(special + "count as tokens, and weigh much in short texts.")
    items += [str(note) for note in run.get("notes") or []]
    return _section(
        "Before you read on", "<ul>" + "".join(f"<li>{_text(i)}</li>" for i in items) + "</ul>"
    )


def _pictures(tables: Tables, drawn: Mapping[str, Path]) -> Iterable[str]:
    for name, title, draw, reading in PICTURES:
        if name in drawn:
            content = drawn[name].read_bytes()
        elif (fig := draw(tables)) is not None:
            content = png(fig)
        else:
            continue
        # A PNG has its size in its first chunk; the browser needs it before it has decoded it.
        width, height = (96 * pixels // DPI for pixels in struct.unpack(">II", content[16:24]))
        alt = f"{escape(title)}. {escape(summary(tables, name))}"
        source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
        yield _section(
            escape(title),
            f'<p>{escape(reading)}</p>\n<div class="wide"><img width="{width}" '
            f'height="{height}" alt="{alt}" src="{source}"></div>',
        )


def _facts(run: Mapping[str, Any]) -> str:
    pairs: Sequence[tuple[str, Any]] = [
        (name, run[name]) for name in _FACTS if run.get(name) not in (None, "", {}, [])
    ]
    text = (run.get("sample_text") or {}).get("text")
    if text:
        pairs = [*pairs, ("text shown", text)]
    if not pairs:
        return ""
    told = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in pairs)
    return f"<dl>{told}</dl>"
