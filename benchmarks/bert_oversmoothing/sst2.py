"""A small BERT on real sentences: pre-trained on them, fine-tuned with and without a fusion.

SST-2 as `sentence TAB label` (6,920, 872 and 1,821 sentences). A BERT of 12 blocks of width 128
learns to find hidden words of the training sentences, then their sentiment, the head reading the
last layer alone or a fusion of all layers that starts as the last. TENFOLD_DATA names the folder
that holds sst2/train.tsv, dev.tsv and test.tsv.
"""

import json
import os
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from torch import Tensor

from benchmarks.results import cell, markdown, plain
from bert_oversmoothing.analysis import analyze
from bert_oversmoothing.data import OversmoothingData
from bert_oversmoothing.model import FusionModel
from bert_oversmoothing.module import FusionModule
from tenfold.checkpoint import atomic_file
from tenfold.cli import silence_noise
from tenfold.errors import UserError
from tenfold.runs import begun, make_trainer

SEEDS = 3
FUSIONS = ("last", "concat", "max", "gate")
MLM_EPOCHS, MLM_LR = 10, 5e-4
EPOCHS, LR, FUSION_LR = 3, 2e-4, 1e-3
BATCH, TOKENS, POOL = 32, 64, 20
BERT = {
    "model_type": "bert",
    "hidden_size": 128,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": TOKENS,
}

Run = dict[str, Any]


def folder() -> Path:
    """The folder of the sentences.

    Raises:
        UserError: TENFOLD_DATA is not set.
    """
    if "TENFOLD_DATA" not in os.environ:
        raise UserError("no sentences", fix="set TENFOLD_DATA to the folder that holds sst2")
    return Path(os.environ["TENFOLD_DATA"]) / "sst2"


def sentences(*splits: str) -> list[str]:
    """The sentences of "train", "dev" or "test", one split after the other."""
    files = [folder() / f"{split}.tsv" for split in splits]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return [line.partition("\t")[0] for line in lines]


def compare_fusions(out: Path, seeds: Sequence[int]) -> dict[str, Run]:
    """Pre-train and fine-tune with every seed on one thread, unless that is done.

    Args:
        out: folder of the runs and of results.json.
        seeds: of initialisation, order, hidden words and dropout.

    Returns:
        By "SEED mlm" and "SEED FUSION" what was measured.
    """
    kept = out / "results.json"
    found: dict[str, Run] = json.loads(kept.read_text()) if kept.is_file() else {}

    def once(key: str, work: Callable[[], Run]) -> None:
        if key in found:
            return
        start = time.process_time()
        run = work()
        found[key] = run | {"cpu_s": time.process_time() - start}
        out.mkdir(parents=True, exist_ok=True)
        with atomic_file(kept) as file:
            file.write(json.dumps(found, indent=1).encode())
        print(key, {name: value for name, value in run.items() if name != "layers"}, flush=True)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for seed in seeds:
            plain = out / f"{seed}-plain"
            once(f"{seed} mlm", partial(pretrain, out / f"{seed}-mlm", plain, seed))
            for fusion in FUSIONS:
                work = out / f"{seed}-{fusion}"
                once(f"{seed} {fusion}", partial(fine_tune, work, plain, fusion, seed))
    finally:
        torch.set_num_threads(threads)
    return found


def pretrain(work: Path, plain: Path, seed: int) -> Run:
    """Find hidden words; the encoder without a fusion is written to `plain`."""
    data = OversmoothingData(
        "tsv",
        str(folder()),
        task="mlm",
        tokenizer="word",
        max_length=TOKENS,
        batch_size=BATCH,
        bucket=POOL,
        seed=seed,
    )
    seed_everything(seed, verbose=False)
    backbone = BERT | {"vocab_size": len(data.tokenizer)}
    module = FusionModule(backbone, task="mlm", fusion="last", lr=MLM_LR)
    fit(work, module, data, MLM_EPOCHS, seed)
    net = module.net.cpu().eval()
    shutil.rmtree(plain, ignore_errors=True)
    net.model.save_pretrained(plain)
    data.tokenizer.save_pretrained(plain)
    return {"words": len(data.tokenizer), "loss": hidden_word_loss(net, data)} | alike(net, data)


def fine_tune(work: Path, plain: Path, fusion: str, seed: int) -> Run:
    """Learn the sentiment, the head reading what the fusion gives."""
    data = OversmoothingData(
        "tsv",
        str(folder()),
        tokenizer=str(plain),
        max_length=TOKENS,
        batch_size=BATCH,
        bucket=POOL,
        seed=seed,
    )
    seed_everything(seed, verbose=False)
    module = FusionModule(weights=str(plain), fusion=fusion, lr=LR, fusion_lr=FUSION_LR)
    fit(work, module, data, EPOCHS, seed)
    net = module.net.cpu().eval()
    data.setup("test")
    found = {split: accuracy(net, loader) for split, loader in loaders(data).items()}
    alpha = getattr(net.fusion, "alpha", None)
    return found | {"alpha": None if alpha is None else float(alpha.detach())} | alike(net, data)


def fit(work: Path, module: FusionModule, data: OversmoothingData, epochs: int, seed: int) -> None:
    """Train; an interrupted run goes on."""
    checkpoint = begun(work, module, epochs)
    options: dict[str, Any] = {"limit_val_batches": 0, "gradient_clip_val": 1.0}
    trainer = make_trainer(work, epochs=epochs, seed=seed, **options)
    with warnings.catch_warnings():
        silence_noise()
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint)


def loaders(data: OversmoothingData) -> dict[str, Iterable[Mapping[str, Tensor]]]:
    """Batches of the sentences that were not learned from."""
    data.setup("validate")
    return {"dev": data.val_dataloader(), "test": data.test_dataloader()}


@torch.no_grad()
def accuracy(net: FusionModel, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Share of the sentences whose label has the larger logit."""
    right = []
    for batch in batches:
        given = {name: x for name, x in batch.items() if name not in ("index", "labels")}
        right.append(net(**given).logits.argmax(1) == batch["labels"])
    return float(torch.cat(right).double().mean())


@torch.no_grad()
def hidden_word_loss(net: FusionModel, data: OversmoothingData) -> float:
    """Nats a hidden word of the development sentences."""
    total, count = 0.0, 0
    data.setup("validate")
    for batch in data.val_dataloader():
        hidden = int((batch["labels"] != -100).sum())
        total += hidden * float(net(**{n: x for n, x in batch.items() if n != "index"}).loss)
        count += hidden
    return total / count


def alike(net: FusionModel, data: OversmoothingData) -> Run:
    """How alike the tokens of a development sentence are, by layer."""
    report = analyze(net, data.tokenizer, sentences("dev"), metrics=("cos",), attn="off")
    rows = report.tables.layers
    columns = ("cosine", "cosine_between", "cosine_excess")
    layers = {name: [row[name] for row in rows] for name in columns}
    return {"layers": layers, "fused_cosine": report.tables.run.get("fused_cosine")}


# -- tables ----------------------------------------------------------------------------------------


def heading(content: Mapping[str, Any]) -> str:
    """What was done."""
    runs = content["runs"]
    losses = [run["loss"] for key, run in runs.items() if key.endswith("mlm")]
    seconds = Counter[str]()
    for key, run in runs.items():
        seconds[key.split()[0]] += run["cpu_s"]  # of an interrupted run only what came last
    minutes = max(seconds.values()) / 60
    return (
        f"SST-2 ({content['seeds']} seeds, {minutes:.0f} minutes of one thread each): a BERT of "
        f"{BERT['num_hidden_layers']} blocks of width {BERT['hidden_size']}, {MLM_EPOCHS} epochs "
        f"of hidden words of its own 6,920 sentences (rate {MLM_LR:g}; {plain(losses, 2)} nats a "
        f"word at the end), then {EPOCHS} epochs of sentiment (rate {LR:g}, of the "
        f"fusion {FUSION_LR:g}, which starts as the last layer). Accuracy in per cent, intervals "
        "of 95 % over seeds:"
    )


def table(content: Mapping[str, Any]) -> str:
    """Accuracy by fusion, paired by seed with the last layer, and how alike tokens are."""
    rows = []
    for fusion in FUSIONS:
        runs = _runs(content, fusion)
        row = [fusion if fusion != "last" else "last layer (baseline)"]
        for split in ("dev", "test"):
            ours = [100 * run[split] for run in runs]
            apart = [
                a - 100 * run[split] for a, run in zip(ours, _runs(content, "last"), strict=True)
            ]
            row += [plain(ours), "" if fusion == "last" else cell(apart, 1)]
        read = "fused_cosine" if fusion != "last" else None
        last = [run["layers"]["cosine"][-1] for run in runs]
        row.append(plain(last, 2))
        row.append(plain([run[read] for run in runs] if read else last, 2))
        row.append(plain([run["layers"]["cosine_excess"][-1] for run in runs], 2))
        rows.append(row)
    head = ["head", "dev", "against last", "test", "against last"]
    return markdown([*head, "CosSim, layer 12", "of what is read", "excess, layer 12"], rows)


def alike_text(content: Mapping[str, Any]) -> str:
    """Similarity by layer, before and after fine-tuning."""
    rows = []
    for name, key in (("pre-trained", "mlm"), ("fine-tuned, last", "last"), ("gate", "gate")):
        runs = _runs(content, key)
        columns = zip(*(run["layers"]["cosine"] for run in runs), strict=True)
        rows.append([name, *(f"{sum(column) / len(column):.2f}" for column in columns)])
    layers = range(len(rows[0]) - 1)
    return "Token similarity on the development sentences, by layer:\n\n" + markdown(
        ["", *map(str, layers)], rows
    )


def _runs(content: Mapping[str, Any], kind: str) -> list[Run]:
    """Of all seeds, in their order."""
    return [content["runs"][f"{seed} {kind}"] for seed in range(content["seeds"])]
