"""report: draw an analysis again."""

from pathlib import Path

from bert_oversmoothing.analysis import draw
from bert_oversmoothing.convert import check_writable
from bert_oversmoothing.report import Tables


def report(run: Path) -> None:
    """Draw the pictures and the page of an analysis again, from its tables.

    Args:
        run: folder that analyze wrote.
    """
    tables = Tables.load(run)
    check_writable(run / "figures" / "any.png")
    print("drawing the pictures", flush=True)
    files = draw(tables, run)
    print(f"wrote {len(files) - 1} figures to {run / 'figures'}")
    print(f"see {files[-1]}")
