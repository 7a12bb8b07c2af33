"""What analysing costs beside the plain forward pass, and what a fusion costs the encoder.

Ratios of CPU time on one thread, of rounds in which everything has its turn; the median counts.
"""

import copy
import gc
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForQuestionAnswering

from benchmarks.bert_oversmoothing.minilm import open_minilm
from benchmarks.bert_oversmoothing.sst2 import sentences
from benchmarks.results import Results, markdown
from bert_oversmoothing.analysis.corpus import Texts
from bert_oversmoothing.analysis.sample import choose, draw
from bert_oversmoothing.analysis.streaming import run_batch, stream
from bert_oversmoothing.families import read_encoder
from bert_oversmoothing.fusion import LayerFusion
from bert_oversmoothing.model import FusionForQuestionAnswering
from tenfold.device import time_interleaved
from tenfold.errors import UserError

README = Path("packages/bert-oversmoothing/README.md")
METRICS = ("cos", "dm", "sigma", "who")
PARTS, BATCH, SAMPLE, ROUNDS = 10, 16, 64, 3
PASSES = 45  # of every model, of comparing the fusions on one encoder
TOKENS, TEXTS = 128, 4
ENCODERS = {"6 x 384": (6, 384, 12), "BERT-base": (12, 768, 12)}
FUSIONS = ("max", "gate", "concat", "scalar_mix")
AGAIN = "plain again"
LAYERS, WIDTH = 13, 256


def run(seeds: int = 1, only: str | None = None) -> None:
    """Measures everything anew, or one part, and writes the tables.

    Args:
        seeds: not used; a time has no seed.
        only: "analyze", "fused" or "heads".

    Raises:
        UserError: no such part, or no sentences.
    """
    parts: dict[str, Callable[[], Any]] = {"analyze": analyzing, "fused": fused, "heads": heads}
    if only not in (None, *parts):
        raise UserError(f"no part is called {only!r}", fix=f"there is {', '.join(parts)}")
    results = Results("speed", "bert-oversmoothing")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in [only] if only else parts:
            results.runs.pop(name, None)
            results.once(name, parts[name])
            print(name, "done", flush=True)
    finally:
        torch.set_num_threads(threads)
    results.publish(README, tables(results.content))


# -- analyze ---------------------------------------------------------------------------------------


def analyzing() -> dict[str, Any]:
    """MiniLM on all sentences of SST-2 in ten parts, and its graph part on a sample."""
    model, tokenizer = open_minilm()
    encoder = read_encoder(model)
    corpus = Texts(sentences("train", "dev", "test"), tokenizer, TOKENS)
    rows, found = corpus.usable, []
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak of what went before is forgotten
    peaks = []
    for part in range(PARTS):
        corpus.usable = rows[part::PARTS]  # the longest first, so that all parts are alike

        def plain() -> None:
            with torch.no_grad():
                for batch in corpus.batches(corpus.usable, BATCH):
                    run_batch(model, batch)

        def analysed() -> None:
            stream(encoder, corpus, METRICS, batch_size=BATCH, on_nan="raise")

        found.append(_seconds({"plain": plain, "analyze": analysed}, rounds=2))
        peaks.append(_peak_mib())
    chosen = choose(rows, SAMPLE)
    corpus.usable = rows
    model.set_attn_implementation("eager")

    def eager() -> None:
        with torch.no_grad():
            for batch in corpus.batches(chosen, BATCH):
                run_batch(model, batch)

    def graph() -> None:
        draw(encoder, corpus, chosen, ("graph", "bound"), batch_size=BATCH, attention="eager")

    sample = _seconds({"eager": eager, "graph": graph}, rounds=ROUNDS)
    return {
        "texts": len(rows),
        "ratios": [run["analyze"] / run["plain"] for run in found],
        "plain_s": sum(run["plain"] for run in found),
        "peak_mib": peaks,
        "sample": len(chosen),
        "graph": sample["graph"] / sample["eager"],
        "graph_s": sample["graph"],
    }


def _seconds(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median CPU seconds."""
    options: dict[str, Any] = {"warmup": 0, "repeats": rounds, "clock": time.process_time}
    times = time_interleaved(steps, **options)
    return {name: timing.median_ms / 1000 for name, timing in times.items()}


def _peak_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if "VmHWM" in line)


# -- fusion ----------------------------------------------------------------------------------------


def fused() -> dict[str, Any]:
    """Answering questions with random encoders, plain and fused, without gradients."""
    return {name: _fused(*sizes) for name, sizes in ENCODERS.items()}


def _fused(blocks: int, width: int, heads: int) -> dict[str, float]:
    """Medians of ratios within rounds, each in an order of its own.

    A model that runs twice in a row finds its weights in the caches, and the pace of the machine
    changes from round to round.
    """
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
    }
    torch.manual_seed(0)
    plain = BertForQuestionAnswering(BertConfig(**sizes, intermediate_size=4 * width)).eval()
    models: dict[str, torch.nn.Module] = {"plain": plain, AGAIN: copy.deepcopy(plain)}
    models |= {
        kind: FusionForQuestionAnswering.from_encoder(plain, fusion=kind, init="random").eval()
        for kind in FUSIONS
    }
    for model in models.values():  # the same memory: where weights lie costs up to a tenth
        getattr(model, "model", model).load_state_dict(plain.state_dict(), assign=True)
    ids = torch.randint(1000, 20_000, (TEXTS, TOKENS))
    mask = torch.ones_like(ids)
    order, rounds, draw = list(models), list[dict[str, float]](), random.Random(0)
    with torch.no_grad():
        for _ in range(PASSES):
            draw.shuffle(order)
            rounds.append({name: _pass_seconds(models[name], ids, mask) for name in order})
    rounds = rounds[2:]  # behind the first ones all is warm
    found = {
        kind: statistics.median(2 * t[kind] / (t["plain"] + t[AGAIN]) for t in rounds)
        for kind in FUSIONS
    }
    found[AGAIN] = statistics.median(t[AGAIN] / t["plain"] for t in rounds)
    base = statistics.median(times["plain"] for times in rounds)
    return found | {"plain_ms": 1000 * base, "rounds": len(rounds)}


def _pass_seconds(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> float:
    start = time.process_time()
    model(input_ids=ids, attention_mask=mask)
    return time.process_time() - start


def heads() -> dict[str, Any]:
    """The heads alone: layer by layer as they come, against all layers stacked."""
    torch.manual_seed(0)
    states = [torch.randn(TEXTS, TOKENS, WIDTH) for _ in range(LAYERS)]
    found: dict[str, Any] = {}
    for kind in ("max", "gate", "concat"):
        fusion = LayerFusion(kind, WIDTH, LAYERS)

        def streamed(fusion: LayerFusion = fusion) -> torch.Tensor:
            with torch.no_grad():
                return fusion(states, need_weights=False).hidden

        def stacked(fusion: LayerFusion = fusion) -> torch.Tensor:
            with torch.no_grad():
                return _stacked(fusion, states)

        apart = float((streamed() - stacked()).abs().max())
        steps = {"stacked": stacked, "streamed": streamed}
        times = time_interleaved(steps, warmup=3, repeats=30, clock=time.process_time)
        found[kind] = {
            "stacked_ms": times["stacked"].median_ms,
            "streamed_ms": times["streamed"].median_ms,
            "apart": apart,
        }
    return found


def _stacked(fusion: LayerFusion, states: list[torch.Tensor]) -> torch.Tensor:
    """The equations as they are written."""
    if fusion.kind == "concat":
        return torch.cat(states, -1) @ fusion.weight.T + fusion.bias
    layers = torch.stack(states)
    if fusion.kind == "max":
        return layers.amax(0)
    logits = torch.einsum("kbnd,kd->kbn", layers, fusion.gate.weight)
    gates = (logits + fusion.gate.bias[:, None, None]).softmax(0)
    return (gates[..., None] * layers).sum(0)


# -- tables ----------------------------------------------------------------------------------------


def tables(content: dict[str, Any]) -> str:
    """The README's tables of speed, of the parts that were measured."""
    runs = content["runs"]
    parts = {"analyze": analyze_text, "fused": fused_table, "heads": heads_table}
    texts = []
    for name, make in parts.items():
        if name in runs:
            machine = content["machines"].get(name, content["machine"]["cpu"])
            texts += [make(runs[name]), f"One thread of {machine.split(', ')[0]}."]
    return "\n\n".join([*texts, "All are CPU times, medians of interleaved rounds."])


def analyze_text(found: dict[str, Any]) -> str:
    """What an analysis costs."""
    ratios, peaks = found["ratios"], found["peak_mib"]
    return (
        f"`analyze` without the graph part on the {found['texts']:,} sentences of SST-2 (MiniLM): "
        f"{statistics.median(ratios):.3f} times the plain forward pass ({min(ratios):.3f} to "
        f"{max(ratios):.3f} over ten parts of the corpus). The process held at most "
        f"{peaks[0]:.0f} MiB after the first tenth and {peaks[-1]:.0f} MiB after all. The graph "
        f"and the bound, on a sample of {found['sample']} texts: {found['graph']:.1f} times the "
        f"eager forward pass of the sample ({found['graph_s']:.1f} s)."
    )


def fused_table(found: dict[str, Any]) -> str:
    """What a fused model costs."""
    rows = [
        [name, *(f"{run[kind]:.3f}" for kind in (*FUSIONS, AGAIN)), f"{run['plain_ms']:.0f} ms"]
        for name, run in found.items()
    ]
    head = ["encoder", *FUSIONS, AGAIN, "plain"]
    return (
        f"A model with fusion against the plain one (question answering, {TEXTS} texts of {TOKENS} "
        "tokens, no gradients), which runs twice in every round; the second against the first says "
        "what the measurement can tell apart:\n\n" + markdown(head, rows)
    )


def heads_table(found: dict[str, Any]) -> str:
    """What the heads cost alone."""
    rows = [
        [
            kind,
            f"{run['stacked_ms']:.2f} ms",
            f"{run['streamed_ms']:.2f} ms",
            f"{run['stacked_ms'] / run['streamed_ms']:.2f}x",
            f"{run['apart']:.1g}",
        ]
        for kind, run in found.items()
    ]
    head = ["fusion", "all layers stacked", "one after the other", "faster", "differ by"]
    return (
        f"The heads alone ({LAYERS} layers, {TEXTS} texts of {TOKENS} tokens, width {WIDTH}); one "
        "after the other, none is kept and each is searched for NaN:\n\n" + markdown(head, rows)
    )
