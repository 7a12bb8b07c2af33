"""Part A: what a head finds in a random encoder that is not trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bert_oversmoothing.comparison.heads import BASELINE, BATCH, Head, cosines
from bert_oversmoothing.comparison.results import Kept
from bert_oversmoothing.encoder import Encoder, probe_config
from bert_oversmoothing.synthetic import PROBE_CLASSES, Probe, probe_task
from tenfold.progress import track

PROBE_HEADS = (BASELINE, "max", "gate", "concat", "scalar_mix", "gate_identity")
STDS = (0.05, 0.10, 0.15, 0.20)
PROBE_STEPS, PROBE_LR = 120, 1e-2


def frozen_probe(
    seeds: Sequence[int] = (0, 1, 2),
    stds: Sequence[float] = STDS,
    *,
    heads: Sequence[str] = PROBE_HEADS,
    steps: int = PROBE_STEPS,
    out: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Tell the class of every token from the states of a random encoder that is not trained.

    The deviation of its weights decides how much it smooths. Heads of one seed see the same
    batches.

    Args:
        seeds: of encoder, task and heads.
        stds: of the weight matrices.
        heads: names.
        steps: of the optimiser.
        out: folder whose results.json keeps what is finished; None keeps nothing.
        progress: show it.

    Returns:
        `seeds`, `std` (a list), `steps`, `chance`; `cosine[std][seed]`, the mean similarity of the
        tokens of a text in the last layer, and `layers[std][seed][layer]` in all;
        `accuracy[head][std][seed]` on other sequences, 0..1.

    Raises:
        UserError: the folder holds results of other settings.
    """
    kept = Kept(out, "frozen_probe", {"steps": steps})
    cells = [(std, seed) for std in stds for seed in seeds]
    for std, seed in track(cells, label="frozen probe, encoder") if progress else cells:
        run = kept.runs.get(f"{std}/{seed}", {})
        missing = [name for name in heads if name not in run.get("accuracy", {})]
        if missing:
            found = probe_encoder(seed, std, missing, steps)
            found["accuracy"] = {**run.get("accuracy", {}), **found["accuracy"]}
            kept.add(f"{std}/{seed}", found)
    runs = {std: [kept.runs[f"{std}/{seed}"] for seed in seeds] for std in stds}
    return {
        "seeds": list(seeds),
        "std": list(stds),
        "steps": steps,
        "chance": 1 / PROBE_CLASSES,
        "cosine": {std: [run["cosine"][-1] for run in row] for std, row in runs.items()},
        "layers": {std: [run["cosine"] for run in row] for std, row in runs.items()},
        "accuracy": {
            head: {std: [run["accuracy"][head] for run in row] for std, row in runs.items()}
            for head in heads
        },
    }


def probe_encoder(seed: int, std: float, heads: Sequence[str], steps: int) -> dict[str, Any]:
    """Similarity by layer and accuracy by head, of one encoder."""
    train, test = probe_task(seed)
    config = probe_config(std)
    encoder = Encoder(config, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        seen, unseen = (torch.stack(encoder(part.ids).hidden_states) for part in (train, test))
    readers = [Head(name, config, PROBE_CLASSES, seed) for name in heads]
    _train_probes(readers, seen, train, seed, steps)
    accuracy = {}
    with torch.no_grad():
        for name, head in zip(heads, readers, strict=True):
            right = head(unseen.unbind()).argmax(-1) == test.label
            accuracy[name] = right.double().mean().item()
    return {"cosine": cosines(unseen), "accuracy": accuracy}


def _train_probes(
    heads: Sequence[Head], states: Float[Tensor, "k b n d"], task: Probe, seed: int, steps: int
) -> None:
    """Cross-entropy over all tokens of random sequences, the same for all; without a schedule."""
    optimizer = torch.optim.AdamW([group for head in heads for group in head.groups(PROBE_LR)])
    order = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(task.ids), (BATCH,), generator=order)
        batch, labels = states[:, rows].unbind(), task.label[rows].flatten()
        optimizer.zero_grad()
        for head in heads:
            F.cross_entropy(head(batch).flatten(0, 1), labels).backward()
        optimizer.step()
