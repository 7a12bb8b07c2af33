"""report: draw an analysis again."""

from pathlib import Path

from bert_oversmoothing.analysis import draw
from bert_oversmoothing.report import Tables


def report(run: Path) -> None:
    """Draw the pictures and the page of an analysis again, from its tables.

    Args:
        run: folder that analyze wrote.
    """
    files = draw(Tables.load(run), run)
    print(f"wrote {len(files) - 1} figures to {run / 'figures'}")
    print(f"see {files[-1]}")
