"""All pictures of an analysis: which there are, how each is read, and drawing them to files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from bert_oversmoothing.report import heads, layers, matrices, smoothing
from bert_oversmoothing.report.tables import Tables
from tenfold.plotting import save


class Picture(NamedTuple):
    """A picture of an analysis.

    Attributes:
        name: of its file, without .png.
        title: over it in the report.
        draw: makes it; None if the tables have nothing for it.
        reading: a paragraph on how it is read.
    """

    name: str
    title: str
    draw: Callable[[Tables], Figure | None]
    reading: str


PICTURES = (
    Picture(
        "similarity",
        "Similarity by layer",
        layers.similarity,
        "The mean cosine similarity of all pairs of tokens of a text. A line that rises towards 1 "
        "means that the tokens of a text become alike: over-smoothing. The similarity between "
        "tokens of different texts is that of any two tokens: what is high there is an offset that "
        "all texts share (anisotropy), not smoothing. The excess is the part that belongs to the "
        "text itself.",
    ),
    Picture(
        "distance",
        "Distance to equal rows, and the theorem's bound",
        layers.distance,
        "d_M is the distance of a text's token matrix to the nearest matrix whose rows are all "
        "equal. On the left, as a share of the matrix's norm, and against that of layer 0. On the "
        "right, the factor by which each block changes it, beside the bound of the theorem: a "
        "block whose v is below 1 must contract, and a bound above 1 says nothing.",
    ),
    Picture(
        "contributions",
        "Who smooths",
        smoothing.contributions,
        "The logarithm of each block's factor on d_M, split over the parts of the block. The split "
        "is exact and holds whatever the bound says. A bar below 0 pulls the tokens together, one "
        "above 0 drives them apart, and the diamond is the sum. A norm behind the last block has a "
        "bar of its own: it is part of no block, and no layer is measured behind it. The small "
        "bars tell how much of d_M squared lies in one token: where that is most of it, the "
        "picture speaks of that token more than of the others.",
    ),
    Picture(
        "sigma",
        "Divisors of the norms",
        smoothing.scales,
        "A layer norm divides each token by its standard deviation. In the theorem the smallest "
        "ones of the block's two norms stand in the denominator of v, so large values mean "
        "contraction. Violins show their distribution, the line in each its median.",
    ),
    Picture(
        "lambda",
        "What attention can contract",
        heads.contraction_of_heads,
        "The square root of lambda bounds the factor by which a head's attention matrix alone "
        "changes d_M. 0 means that every token receives the same mixture; 1 is reached by a head "
        "in which every token looks at itself; more than 1 is possible, where a few tokens are "
        "looked at by many.",
    ),
    Picture(
        "heads",
        "Statistics of the heads",
        heads.head_statistics,
        "The attention matrix of each head as the random walk on a graph of the tokens. A sink is "
        "the token that receives most of the attention; almost always it is a special token or a "
        "full stop.",
    ),
    Picture(
        "tokens",
        "Similarity of the tokens of one text",
        matrices.token_cosines,
        "Cosine similarity of every two tokens of one text, at the embeddings, in the middle and "
        "at the end. Smoothing fills the square with one dark colour.",
    ),
    Picture(
        "gate",
        "What the fusion reads",
        matrices.gate_weights,
        "The weight that the fusion gives to each layer, token by token (Figure 7 of the paper). "
        "Equal weights mean that it has no preference.",
    ),
    Picture(
        "spectrum",
        "Singular values",
        layers.spectrum,
        "Singular values of a text's token matrix, over the largest. The faster they fall, the "
        "fewer directions the tokens span; a matrix of equal rows has one.",
    ),
    Picture(
        "rank",
        "Rank",
        layers.ranks,
        "The effective rank is the exponential of the entropy of the singular values, the stable "
        "rank the squared Frobenius norm over the squared largest singular value. Centred: after "
        "the mean of the rows is removed.",
    ),
    Picture(
        "cka",
        "Likeness of layers",
        matrices.layer_similarity,
        "Linear CKA compares the tokens' geometry in two layers. Where the cell "
        "is pale, two layers have little in common; a dark block is a run of layers that change "
        "little.",
    ),
    Picture(
        "identity",
        "Identity retained",
        layers.identity,
        "How near each token's state stays to the token's own vector at layer 0, and how often "
        "that vector is still the nearest one of its text. It falls because of context as well as "
        "of smoothing.",
    ),
)
"""In the order of the report."""


def draw_all(tables: Tables, folder: str | Path) -> list[Path]:
    """Draw every picture that there are data for, as <folder>/<name>.png.

    Returns:
        The files, in the order of `PICTURES`.
    """
    drawn = []
    for picture in PICTURES:
        fig = picture.draw(tables)
        if fig is not None:
            drawn.append(save(fig, Path(folder) / f"{picture.name}.png"))
    return drawn
