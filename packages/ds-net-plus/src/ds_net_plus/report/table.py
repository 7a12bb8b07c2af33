"""The demo's console table: static routes, dynamic points, random routing, oracle."""

import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from ds_net_plus.evaluate import (
    Point,
    RouteTable,
    gain_at_equal_madds,
    oracle,
    random_routing,
)
from ds_net_plus.report.common import Latency, headline_point, madds_unit, route_names, short


@dataclass(frozen=True)
class Row:
    """One way to run the network.

    Attributes:
        kind: "static", "dynamic", "random" or "oracle".
        name: what it is.
        top1: accuracy, 0..1.
        madds: mean MAdds of an image.
        shares: share of images on every route.
        ms: measured time of an image, None where not measured.
        gain: top-1 over the static curve at equal MAdds, None for the static routes themselves.
    """

    kind: str
    name: str
    top1: float
    madds: float
    shares: tuple[float, ...]
    ms: float | None = None
    gain: float | None = None


def comparison_rows(
    table: RouteTable,
    dynamic: Sequence[Point],
    latency: Latency | None = None,
    routes: Sequence[int] | None = None,
) -> list[Row]:
    """Static routes, dynamic points, random routing with the headline point's shares, oracle.

    Args:
        table: answers of the static routes.
        dynamic: operating points of the gate.
        latency: measured times.
        routes: indices of the table's routes in the network; 0 to K - 1 where None.
    """
    count = len(table.madds)
    names, top1 = route_names(count, routes), table.static_top1()
    rows = [
        Row(
            "static",
            names[k],
            top1[k],
            table.madds[k],
            tuple(float(j == k) for j in range(count)),
            latency.static[k] if latency else None,
        )
        for k in range(count)
    ]
    for i, point in enumerate(dynamic):
        ms = latency.points[i] if latency else None
        rows.append(_row("dynamic", f"dynamic, tau {point.tau:.3g}", point, table, ms))
    if dynamic and table.scores.ndim == 2:  # several gates mix paths, which the table has not
        shares = dynamic[headline_point(table, dynamic)].shares
        cost, expected = random_routing(table, shares)
        mixed = Point(0.0, expected, cost, shares)
        rows.append(_row("random", "random, same mix", mixed, table))
    rows.append(_row("oracle", "oracle", oracle(table), table))
    return rows


def _row(kind: str, name: str, point: Point, table: RouteTable, ms: float | None = None) -> Row:
    gain = gain_at_equal_madds(point, table)
    return Row(kind, name, point.top1, point.madds, point.shares, ms, gain)


def comparison_table(
    rows: Sequence[Row], *, color: bool | None = None, routes: Sequence[int] | None = None
) -> str:
    """The rows as a table: coloured for a terminal, else plain Markdown.

    Ratios are to the last static row. Gain: top-1 over the static curve at equal MAdds. The time
    columns are left out where nothing was timed.

    Args:
        rows: of `comparison_rows`, at least one of them static.
        color: None for what standard output is.
        routes: indices of the routes in the network, for the heading of the shares.
    """
    fancy = sys.stdout.isatty() if color is None else color
    reference = [row for row in rows if row.kind == "static"][-1]
    timed = any(row.ms is not None for row in rows)
    unit, letter = madds_unit(reference.madds)
    indices = "/".join(map(str, routes or range(len(reference.shares))))
    heads = ["", "top-1 %", f"MAdds ({letter})", "MAdds ratio"]
    heads += ["ms / image", "time ratio"] if timed else []
    heads += ["gain (points)", f"% on route {indices}"]
    table = Table(box=box.SIMPLE_HEAD if fancy else box.MARKDOWN)
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i else "left", no_wrap=True)
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        table.add_row(
            *_cells(row, reference, unit, timed),
            style="bold" if row.kind == "dynamic" else None,
            end_section=fancy and after is not None and after.kind != row.kind,
        )
    return _render(table, fancy)


def _cells(row: Row, reference: Row, unit: float, timed: bool) -> list[str]:
    cells = [
        row.name,
        f"{100 * row.top1:.2f}",
        short(row.madds / unit),
        f"{row.madds / reference.madds:.2f}",
    ]
    if timed:
        cells.append("" if row.ms is None else short(row.ms))
        both = row.ms is not None and reference.ms is not None
        cells.append(f"{row.ms / reference.ms:.2f}" if both else "")  # pyright: ignore[reportOptionalOperand, reportOperatorIssue]
    cells.append("" if row.gain is None else f"{100 * row.gain:+.2f}")
    mixed = row.kind != "static"  # of a static route the share is plain
    cells.append("/".join(f"{100 * share:.0f}" for share in row.shares) if mixed else "")
    return cells


def _render(table: Table, fancy: bool) -> str:
    """Wide enough for every cell: a table that a terminal wraps is no table."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=fancy, width=200, no_color=not fancy)
    console.print(table)
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    return "\n".join(lines).strip("\n")
