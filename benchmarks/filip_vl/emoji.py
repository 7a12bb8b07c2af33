"""FILIP against CLIP's loss on real pictures: 3,543 emoji and their names.

The names tell fine attributes apart (skin tone, gender, job). Both sides have the same towers,
pairs, steps and augmentation; CLIP's joint vector is four times as wide. TENFOLD_DATA names the
folder that holds noto-emoji/train.parquet and test.parquet.
"""

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything

from filip_vl.alignment import candidate_scores, exchanged_attributes, share_of_first
from filip_vl.commands.index import index
from filip_vl.commands.search import search
from filip_vl.data import FilipDataModule
from filip_vl.model import FilipModel, TokenBatch
from filip_vl.module import FilipModule
from filip_vl.retrieval import TokenSet, retrieval_metrics, retrieval_ranks
from tenfold.checkpoint import atomic_file
from tenfold.cli import silence_noise
from tenfold.errors import UserError
from tenfold.runs import begun, make_trainer

SEEDS, EPOCHS, BATCH = 3, 30, 128
SIDES = {"FILIP": ("filip_tiny", {"embed_dim": 64}), "CLIP": ("clip_tiny", {"embed_dim": 256})}
TOWERS = {
    "image_size": 64,
    "vision_width": 96,
    "vision_layers": 3,
    "text_width": 96,
    "context_length": 24,
}
METRICS = {
    "i2t_r1": "R@1 image to text",
    "i2t_r5": "R@5 image to text",
    "i2t_r10": "R@10 image to text",
    "t2i_r1": "R@1 text to image",
    "t2i_r5": "R@5 text to image",
    "t2i_r10": "R@10 text to image",
    "skin_tone": "skin tone, of 5",
    "gender": "gender, of 2",
}
QUERIES = (
    "woman detective medium skin tone",
    "grinning face with smiling eyes",
    "man with red hair",
)
CHANCE = {"skin_tone": 0.2, "gender": 0.5}

Scores = dict[str, dict[str, list[float]]]


def compare_emoji(out: Path, seeds: Sequence[int], epochs: int = EPOCHS) -> Scores:
    """Trains both sides with every seed, unless that is done, and measures them on the test pairs.

    Args:
        out: folder of the runs and of results.json.
        seeds: of initialisation, order and augmentation.
        epochs: of training.

    Returns:
        By side and metric of `METRICS` a value for each seed.
    """
    kept = out / "results.json"
    found: dict[str, dict[str, float]] = json.loads(kept.read_text()) if kept.is_file() else {}
    for seed in seeds:
        for side in SIDES:
            key = f"{side.lower()}-{seed}"
            if found.get(key, {}).get("epochs") == epochs:
                continue
            data, model = fit(side, out / key, seed, epochs)
            found[key] = {"epochs": epochs, **score(model, data)}
            with atomic_file(kept) as file:
                file.write(json.dumps(found, indent=1).encode())
    return {
        side: {m: [found[f"{side.lower()}-{seed}"][m] for seed in seeds] for m in METRICS}
        for side in SIDES
    }


def fit(side: str, folder: Path, seed: int, epochs: int) -> tuple[FilipDataModule, FilipModel]:
    """One side's model after training; an interrupted run goes on."""
    data = FilipDataModule(
        "parquet",
        str(_folder()),
        train="train.parquet",
        test="test.parquet",
        context_length=TOWERS["context_length"],
        image_size=TOWERS["image_size"],
        augment="crop",
        crop_scale=(0.6, 1.0),
        batch_size=BATCH,
        seed=seed,
    )
    seed_everything(seed, verbose=False)
    name, fields = SIDES[side]
    module = FilipModule(name, TOWERS | fields, lr=1e-3, decay="matrices")
    checkpoint = begun(folder, module, epochs)
    trainer = make_trainer(folder, epochs=epochs, seed=seed, limit_val_batches=0)
    with warnings.catch_warnings():
        silence_noise()
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    return data, module.model.cpu().eval()


def draw_searches(out: Path) -> None:
    """The first FILIP's index of the test pictures, and a contact sheet for each of `QUERIES`."""
    index(ckpt=out / "filip-0", images=str(_folder() / "test.parquet"), out=out / "index")
    for number, text in enumerate(QUERIES):
        search(index=out / "index", text=text, k=8, out=out / f"search_{number}.png")


def _folder() -> Path:
    if "TENFOLD_DATA" not in os.environ:
        raise UserError("no emoji", fix="set TENFOLD_DATA to the folder that holds noto-emoji")
    return Path(os.environ["TENFOLD_DATA"]) / "noto-emoji"


@torch.no_grad()
def score(model: FilipModel, data: FilipDataModule) -> dict[str, float]:
    """Recalls, and of every attribute the share of images whose name beats the exchanged ones."""
    data.setup("test")
    pairs = data.pairs("test")
    assert pairs is not None
    captions = [str(pairs.captions[n][0]) for n in range(len(pairs))]
    batches: list[TokenBatch] = [model.encode_image(b.image) for b in data.test_dataloader()]
    texts = model.encode_text(captions)
    ranks = retrieval_ranks(TokenSet(batches), TokenSet([texts]), torch.arange(len(captions)))
    found: dict[str, Any] = retrieval_metrics(ranks)
    others = [exchanged_attributes(caption) for caption in captions]
    tokens, mask = (
        torch.cat(parts) for parts in zip(*((b.tokens, b.mask) for b in batches), strict=True)
    )
    for name in CHANCE:
        rows = [n for n, values in enumerate(others) if name in values]
        wanted = [[captions[n], *others[n][name]] for n in rows]
        images = TokenBatch(tokens[rows], mask[rows])
        found[name] = share_of_first(candidate_scores(model, images, wanted))
    return {name: found[name] for name in METRICS}
