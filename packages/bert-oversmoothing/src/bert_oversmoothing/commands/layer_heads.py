"""A head on every layer of a frozen encoder: states on the disk, heads trained side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from bert_oversmoothing.capture import capture
from bert_oversmoothing.data import OversmoothingData
from bert_oversmoothing.diagnostics import TokenCosine
from bert_oversmoothing.families import Encoder
from bert_oversmoothing.module.optimisation import linear_schedule
from tenfold.errors import UserError
from tenfold.progress import track
from tenfold.training import mix

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_STD = 0.02

# -- states ------------------------------------------------------------------------------------


class States(NamedTuple):
    """What the heads read of all layers, item by item, and what they are to find.

    Attributes:
        values: states in float32, on the disk; the tokens of an item one after the other.
        first: row at which an item begins.
        length: its rows: 1 of a text, its choices, or its tokens.
        fields: labels, places of answers and numbers of the items.
        cosine: mean over texts of the cosine of their tokens, by layer.
    """

    values: Float[np.ndarray, "rows layers width"]
    first: Int64[Tensor, " items"]
    length: Int64[Tensor, " items"]
    fields: dict[str, Tensor]
    cosine: list[float]

    def batch(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """States (layers, items, rows, width) of some items, and which of the rows are theirs."""
        length = self.length[items]
        place = torch.arange(int(length.max()))
        real = place < length[:, None]
        rows = (self.first[items][:, None] + place).where(real, 0)
        states = torch.from_numpy(self.values[rows.numpy()])
        return states.permute(2, 0, 1, 3), real


def keep_states(
    encoder: Encoder, data: OversmoothingData, split: str, file: Path, *, room: int
) -> States:
    """Run the encoder once over a split, and keep what heads read of every layer.

    Args:
        encoder: of a model on its device.
        data: that has been set up.
        split: "train" or "val".
        file: for the states.
        room: bytes that it may take.

    Raises:
        UserError: it would take more.
    """
    layers = len(encoder.blocks) + 1
    similarity = [TokenCosine() for _ in range(layers)]
    kept: list[Tensor] = []
    counts, fields = [], []
    batches = data.train_dataloader() if split == "train" else data.val_dataloader()
    device = next(encoder.model.parameters()).device
    whole = data.task == "qa"
    with file.open("wb") as stream, torch.no_grad():
        for batch in track(batches, label=f"states of {split}, batch"):
            mask = batch["attention_mask"]
            texts = mask.flatten(0, -2).bool()

            def keep(layer: int, hidden: Tensor, texts: Tensor = texts) -> None:
                similarity[layer].update(hidden.cpu(), texts)
                kept.append((hidden[texts.to(device)] if whole else hidden[:, 0]).float().cpu())

            inputs = {
                name: batch[name].flatten(0, -2).to(device) for name in _INPUTS if name in batch
            }
            kept.clear()
            with capture(encoder, keep):
                encoder.model(**inputs)
            rows = torch.stack(kept, 1).numpy()
            if not counts and rows.nbytes * len(batches) > room:
                what = f"the states of {split} would take {rows.nbytes * len(batches) / 1e9:.3g} GB"
                fix = "give fewer items, as --data.train_size 10000, or a larger --cache-limit"
                raise UserError(f"{what}, there is room for {room / 1e9:.3g}", fix=fix)
            stream.write(rows.tobytes())
            each = mask.sum(-1) if whole else torch.full((len(mask),), len(texts) // len(mask))
            counts.append(each)
            fields.append({name: x for name, x in batch.items() if name not in _INPUTS})
    count = torch.cat(counts)
    shape = (int(count.sum()), layers, encoder.width)
    values = np.memmap(file, np.float32, "r", shape=shape)
    joined = {name: torch.cat([part[name] for part in fields]) for name in fields[0]}
    cosine = [metric.compute().cosine.mean for metric in similarity]
    return States(values, count.cumsum(0) - count, count, joined, cosine)


# -- heads -------------------------------------------------------------------------------------


class LayerHeads(nn.Module):
    """A head for each layer, side by side: a linear map, behind a dense layer with tanh on texts.

    Args:
        layers: how many.
        width: of the states.
        outputs: logits of each row.
        dense: whether there is a dense layer, the pooler of a text.
        start: what it starts as in every layer; random weights as those of BERT if left out.
        seed: of random weights.
    """

    def __init__(
        self,
        layers: int,
        width: int,
        outputs: int,
        *,
        dense: bool,
        start: nn.Linear | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(_STD * torch.randn(layers, *shape, generator=generator))

        self.dense = weight(width, width) if dense else None
        self.dense_bias = nn.Parameter(torch.zeros(layers, 1, width)) if dense else None
        self.weight = weight(width, outputs)
        self.bias = nn.Parameter(torch.zeros(layers, 1, outputs))
        if self.dense is not None and self.dense_bias is not None and start is not None:
            self.dense.data[:] = start.weight.detach().float().cpu().T
            self.dense_bias.data[:] = start.bias.detach().float().cpu()

    def forward(
        self, states: Float[Tensor, "layers items rows width"]
    ) -> Float[Tensor, "layers items rows outputs"]:
        """Logits."""
        x = states.flatten(1, 2)
        if self.dense is not None and self.dense_bias is not None:
            x = torch.baddbmm(self.dense_bias, x, self.dense).tanh()
        return torch.baddbmm(self.bias, x, self.weight).unflatten(1, states.shape[1:3])


def fit_heads(
    known: States,
    data: OversmoothingData,
    *,
    epochs: int,
    lr: float,
    batch_size: int,
    start: nn.Linear | None = None,
    seed: int = 0,
) -> LayerHeads:
    """Heads of all layers, trained on the same batches; none has a part in another's gradient.

    Args:
        known: training states.
        data: whose task it is.
        epochs: of all items.
        lr: the highest rate of AdamW.
        batch_size: items in a step.
        start: see `LayerHeads`.
        seed: of start and order.
    """
    _, layers, width = known.values.shape
    outputs = {"qa": 2, "choice": 1}.get(data.task, data.num_labels)
    dense = data.task != "qa"
    heads = LayerHeads(
        layers, width, outputs, dense=dense, start=start if dense else None, seed=seed
    )
    named = list(heads.named_parameters())
    groups = [
        {"params": [p for n, p in named if n.endswith("bias") == bias], "weight_decay": decay}
        for bias, decay in ((False, 0.01), (True, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr)
    items = len(known.length)
    batches = -(-items // batch_size)
    rate = linear_schedule(optimizer, steps=epochs * batches, warmup=0.1)
    for epoch in track(range(epochs), label=f"heads of seed {seed}, epoch"):
        order = torch.randperm(items, generator=torch.Generator().manual_seed(mix(seed, epoch)))
        for chosen in order.split(batch_size):
            logits, real = logits_of(heads, known, chosen)
            loss = head_losses(logits, real, {k: x[chosen] for k, x in known.fields.items()}, data)
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
            rate.step()
    return heads


def logits_of(heads: LayerHeads, states: States, items: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (layers, items, rows, outputs) of some items, and which rows are theirs."""
    x, real = states.batch(items)
    return heads(x), real


def head_losses(
    logits: Float[Tensor, "layers items rows outputs"],
    real: Tensor,
    fields: Mapping[str, Tensor],
    data: OversmoothingData,
) -> Float[Tensor, " layers"]:
    """The loss of the task, of every layer."""
    outputs = as_outputs(logits, real, data)
    if data.task == "qa":
        ends = [(outputs[f"{end}_logits"], fields[f"{end}_positions"]) for end in ("start", "end")]
        return torch.stack([_cross_entropy(each, place) for each, place in ends]).mean(0)
    if data.num_labels == 1 and data.task == "classification":
        return (outputs["logits"][..., 0] - fields["labels"]).square().mean(1)
    return _cross_entropy(outputs["logits"], fields["labels"])


def as_outputs(logits: Tensor, real: Tensor, data: OversmoothingData) -> dict[str, Tensor]:
    """The logits as a model of the task gives them, with the layers in front."""
    if data.task == "qa":
        start, end = logits.masked_fill(~real[..., None], -torch.inf).unbind(-1)
        return {"start_logits": start, "end_logits": end}
    return {"logits": logits[..., 0] if data.task == "choice" else logits[:, :, 0]}


def _cross_entropy(logits_kbc: Tensor, label_b: Tensor) -> Tensor:
    """Of every layer the mean over items."""
    layers = len(logits_kbc)
    each = F.cross_entropy(logits_kbc.flatten(0, 1), label_b.repeat(layers), reduction="none")
    return each.unflatten(0, (layers, -1)).mean(1)


def error_of_most_frequent(known: States, asked: States, data: OversmoothingData) -> float | None:
    """The error on other items of always naming the label that is most frequent in training.

    Args:
        known: training states.
        asked: those of the other items.
        data: whose task it is.

    Returns:
        1 less the score, 0 to 1 or, with a negative score, more; None for questions and for
        labels that are scores.
    """
    if data.task == "qa" or (data.task == "classification" and data.num_labels == 1):
        return None
    classes = int(known.length.max()) if data.task == "choice" else data.num_labels
    labels = known.fields["labels"]
    most = labels[labels >= 0].bincount().argmax()
    logits = F.one_hot(most.expand(len(asked.length)), classes).float()
    metric = data.metric("val")
    metric.update({"logits": logits}, asked.fields)
    return 1 - float(metric.compute()["score"])


@torch.no_grad()
def score_heads(
    heads: LayerHeads, asked: States, data: OversmoothingData, batch_size: int = 64
) -> list[dict[str, float]]:
    """The figures of the task on other items, of every layer; their `score` lies in 0..1."""
    metrics = [data.metric("val") for _ in asked.cosine]
    for items in torch.arange(len(asked.length)).split(batch_size):
        outputs = as_outputs(*logits_of(heads, asked, items), data)
        fields = {name: x[items] for name, x in asked.fields.items()}
        for layer, metric in enumerate(metrics):
            metric.update({name: x[layer] for name, x in outputs.items()}, fields)
    found = [{k: float(x) for k, x in metric.compute().items()} for metric in metrics]
    if data.task == "qa":  # its figures are in per cent
        found = [figures | {"score": figures["score"] / 100} for figures in found]
    return found
