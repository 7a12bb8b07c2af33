"""A check for tests: can everything that is written in a figure be read?"""

from unittest.mock import patch

import numpy as np
from matplotlib.backend_bases import RendererBase
from matplotlib.figure import Figure
from matplotlib.text import Text

from tenfold.plotting.labels import settle_labels
from tenfold.plotting.style import style


def check_tidy(fig: Figure) -> None:
    """Make sure that no text of a figure lies over another one or leaves the figure.

    Raises:
        AssertionError: names the texts.
    """
    settle_labels(fig)
    drawn: list[Text] = []
    draw = Text.draw

    def note(text: Text, renderer: RendererBase) -> None:
        drawn.append(text)
        draw(text, renderer)

    with style(), patch.object(Text, "draw", note):
        fig.draw_without_rendering()
    written = [t for t in dict.fromkeys(drawn) if t.get_visible() and t.get_text().strip()]
    assert written, "a figure without a word"
    boxes = np.array([t.get_window_extent().extents for t in written])  # left, bottom, right, top
    low, high = boxes[:, :2], boxes[:, 2:]
    whole = fig.bbox.padded(1)
    inside = ((low >= whole.min) & (high <= whole.max)).all(1)
    cut = [written[n].get_text() for n in np.flatnonzero(~inside)]
    assert not cut, f"{cut[0]!r} leaves the figure"
    low, high = low + 1, high - 1  # they may touch
    over = ((low[:, None] <= high) & (low <= high[:, None])).all(2)
    pairs = [[written[n].get_text() for n in pair] for pair in np.argwhere(np.triu(over, 1))]
    assert not pairs, "{!r} lies over {!r}".format(*pairs[0])
