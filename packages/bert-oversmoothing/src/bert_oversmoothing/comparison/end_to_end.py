"""Part B: encoder and head, trained together to find the odd run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from bert_oversmoothing.comparison.heads import BASELINE, BATCH, PILOT_SEED, cosines
from bert_oversmoothing.comparison.results import Kept
from bert_oversmoothing.comparison.training import TASK, Models, train
from bert_oversmoothing.encoder import EncoderConfig, ShareAttention
from bert_oversmoothing.synthetic import LONGEST_RUN, Items, exact_match

SINGLE = "best_layer(3)"
"""The best single layer, which is what a shallow net is: by the pilot seeds of `layer_scores` the
shallowest within a point of the best."""

HEADS = (BASELINE, "concat", "max", "gate", "scalar_mix", SINGLE)
STD, STEPS = 0.2, 150


def odd_run(
    seeds: Sequence[int] = (0, 1, 2),
    steps: int = STEPS,
    std: float = STD,
    *,
    heads: Sequence[str] = HEADS,
    share_attention: ShareAttention = "none",
    out: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train an encoder and a head from scratch to find the odd run, for every head.

    Encoders of one seed start alike and see the same batches.

    Args:
        seeds: of encoder, items and heads; the validation items are the same.
        steps: of the optimiser.
        std: of the weights; 0.2 smooths all away before training.
        heads: names.
        share_attention: "first" takes the attention matrices of the first block in all blocks.
        out: folder whose results.json keeps what is finished; None keeps nothing.
        progress: show it.

    Returns:
        `seeds`, the settings, `chance` of an exact match, `chance_loss`; `em[head][seed]`, 0..1;
        `loss[head][seed][step]`; similarities of the tokens of a text: `cosine_last` and
        `cosine_fused[head][seed]` of the last layer and of what is read, after training, and means
        over the seeds, `cosine_before[layer]` and `cosine_after[head][layer]`.

    Raises:
        UserError: the folder holds results of other settings.
    """
    settings = odd_run_settings(steps, std, share_attention)
    kept = Kept(out, "odd_run", settings)
    config = odd_run_config(std, share_attention)
    for seed in seeds:
        run = kept.runs.get(str(seed), {})
        missing = [name for name in heads if name not in run.get("heads", {})]
        if missing:
            label = f"odd run, seed {seed}, step" if progress else None
            found = _seed_runs(seed, config, missing, steps, TASK.validation(), label)
            found["heads"] = {**run.get("heads", {}), **found["heads"]}
            kept.add(str(seed), found)
    runs = [kept.runs[str(seed)] for seed in seeds]
    of = {head: [run["heads"][head] for run in runs] for head in heads}
    return {
        "seeds": list(seeds),
        **settings,
        "chance": 1 / (TASK.context * LONGEST_RUN),
        "chance_loss": math.log(TASK.context),
        **{f: {h: [run[f] for run in of[h]] for h in heads} for f in ("em", "loss")},
        "cosine_last": {head: [run["cosine"][-1] for run in of[head]] for head in heads},
        "cosine_fused": {head: [run["cosine_fused"] for run in of[head]] for head in heads},
        "cosine_before": _mean(run["before"] for run in runs),
        "cosine_after": {head: _mean(run["cosine"] for run in of[head]) for head in heads},
    }


def odd_run_settings(
    steps: int, std: float = STD, share_attention: ShareAttention = "none"
) -> dict[str, Any]:
    """What runs must have in common to be compared."""
    return {"steps": steps, "std": std, "share_attention": share_attention}


def _mean(rows: Iterable[list[float]]) -> list[float]:
    """Of every column."""
    return [statistics.fmean(column) for column in zip(*rows, strict=True)]


def layer_scores(
    seed: int = PILOT_SEED, steps: int = STEPS, std: float = STD, *, progress: bool = True
) -> dict[int, float]:
    """Exact match of reading one block alone, for each block, to choose the best single layer by.

    Neither the seed nor the items are those of `odd_run`: the models are judged by items that
    follow those that they were trained on.
    """
    config = odd_run_config(std)
    names = [f"best_layer({layer})" for layer in range(1, config.layers + 1)]
    first = BATCH * steps
    judges = TASK.items(seed, range(first, first + len(TASK.validation().ids)))
    label = f"single layers, seed {seed}, step" if progress else None
    found = _seed_runs(seed, config, names, steps, judges, label)["heads"]
    return {layer: found[name]["em"] for layer, name in enumerate(names, 1)}


def odd_run_config(std: float, share_attention: ShareAttention = "none") -> EncoderConfig:
    """The encoder of the odd run: d = 32, h = 4, d_ff = 64, L = 12."""
    return EncoderConfig(
        vocab_size=TASK.vocab_size,
        max_tokens=TASK.tokens,
        std=std,
        share_attention=share_attention,
    )


def _seed_runs(
    seed: int,
    config: EncoderConfig,
    heads: Sequence[str],
    steps: int,
    judges: Items,
    label: str | None,
) -> dict[str, Any]:
    """Similarity before training, and of every head what was found."""
    models = Models(heads, config, seed)
    with torch.no_grad():
        before = cosines(models.states(judges.ids)[0])
    losses = train(models, seed, steps, label)
    found = {}
    with torch.no_grad():
        for name, head, own, loss in zip(
            heads, models.readers, models.states(judges.ids), losses, strict=True
        ):
            found[name] = {
                "em": exact_match(head(own), judges).double().mean().item(),
                "loss": loss,
                "cosine": cosines(own),
                "cosine_fused": cosines([head.fused(own)])[0],
            }
    return {"before": before, "heads": found}
