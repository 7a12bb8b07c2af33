"""The pictures of words and patches, of retrieval, and of runs.

Every picture is a plain function from images, alignments, scores or a log to a matplotlib figure;
`save_all` writes a set of them.

>>> found = alignment_map(model, pixels, "a photo of a balloon.", "balloon")
>>> save_all({"alignment": plot_alignment(image, found)}, "pictures")
"""

from filip_vl.report.alignment import heat_maps, plot_alignment, word_strips
from filip_vl.report.common import save_all
from filip_vl.report.comparison import Cost, comparison_bars, cost_curves
from filip_vl.report.confusion import confusion_matrix
from filip_vl.report.retrieval import Hit, Query, contact_sheet, retrieval_sheet
from filip_vl.report.scores import contribution_bars, similarity_matrices
from filip_vl.report.training import training_curves

__all__ = [
    "Cost",
    "Hit",
    "Query",
    "comparison_bars",
    "confusion_matrix",
    "contact_sheet",
    "contribution_bars",
    "cost_curves",
    "heat_maps",
    "plot_alignment",
    "retrieval_sheet",
    "save_all",
    "similarity_matrices",
    "training_curves",
    "word_strips",
]
