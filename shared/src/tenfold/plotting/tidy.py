"""A check for tests: can everything that is written in a figure be read?"""

import itertools
from unittest.mock import patch

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
        fig.canvas.draw()
    boxes = {t: t.get_window_extent() for t in drawn if t.get_visible() and t.get_text().strip()}
    assert boxes, "a figure without a word"
    whole = fig.bbox.padded(1)
    for text, box in boxes.items():
        inside = whole.x0 <= box.x0 and whole.y0 <= box.y0
        inside = inside and box.x1 <= whole.x1 and box.y1 <= whole.y1
        assert inside, f"{text.get_text()!r} leaves the figure"
    for (one, a), (other, b) in itertools.combinations(boxes.items(), 2):
        over = a.padded(-1).overlaps(b.padded(-1))
        assert not over, f"{one.get_text()!r} lies over {other.get_text()!r}"
