"""The contract of every package (`tenfold.testing`), kept by four tasks with their fusions."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bert_oversmoothing.data import OversmoothingData
from bert_oversmoothing.module import FusionModule
from tenfold.testing import PackageContract
from tenfold.training import LAST

SENTENCES = Path(__file__).parent / "sentences"
SMALL = {
    "model_type": "bert",
    "vocab_size": 48,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
}

# section 4.1 of the specification: BERT-base with its pooler, and the gate of K = 13 layers
BERT, POOLER, WIDTH = 109_482_240, 768 * 768 + 768, 768
GATE = 9_997
PAIR, SCORE = 2 * (WIDTH + 1), WIDTH + 1
SPANS = BERT - POOLER + GATE + PAIR


def bert(vocabulary: int, positions: int, width: int, layers: int, ff: int) -> int:
    """Parameters of a BERT without pooler."""
    embeddings = (vocabulary + positions + 2) * width + 2 * width
    attention = 4 * (width * width + width) + 2 * width
    return embeddings + layers * (attention + 2 * width * ff + ff + width + 2 * width)


class Logits(nn.Module):
    """A classifier of tensors."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.net(input_ids=ids, attention_mask=mask).logits


class TestContract(PackageContract):
    cli = "bert_oversmoothing.cli:app"
    modules = ("classification", "qa", "choice", "mlm")
    parameter_counts = {  # noqa: RUF012
        "demo": bert(32, 32, 32, 12, 64) + 13 * 33 + 2 * 33,
        **dict.fromkeys(
            ("glue-cola", "glue-sst2", "glue-mrpc", "glue-qqp", "glue-qnli", "glue-rte"),
            BERT + GATE + PAIR,
        ),
        "glue-wnli": BERT + GATE + PAIR,
        "glue-stsb": BERT + GATE + SCORE,
        "glue-mnli": BERT + GATE + 3 * (WIDTH + 1),
        "swag": BERT + GATE + SCORE,
        "squad1": SPANS,
        "squad2": SPANS,
        "tsv": BERT + GATE + PAIR,
        # the transformation before the tied embeddings, its norm, and a bias for each word
        "mlm-text": bert(8192, 64, 128, 12, 256) + 13 * 129 + 128 * 129 + 2 * 128 + 8192,
    }
    fit_options = ("--data.train_size=16", "--data.val_size=8", "--data.batch_size=8")
    bad_inputs = (
        (["fit", "--config", "nosuch"], "the recipes are demo"),
        (["fit", "--fusion", "gates"], "unknown fusion: 'gates'"),
        (["fit", "--layers", "last:40"], "'last:40' is out of range"),
        (["fit", "--layers", "[0, 99]"], "no such layers: 99"),
        (["fit", "--layers", "[3, 3]"], "layers given twice"),
        (["fit", "--model.init", "identity", "--layers", "[1, 2]"], "init identity starts as"),
        (["fit", "--model.gate_kind", "hard"], "hard"),
        (["fit", "--model.task", "summary"], "summary"),
        (["fit", "--model.task", "choice"], "the data have task qa, the model choice"),
        (["fit", "--model.lr", "-1"], "lr must be above 0"),
        (["fit", "--data.form", "after"], "give --model.task classification --model.num_labels 5"),
        (["fit", "--model.fusion_lr", "0"], "fusion_lr must be above 0"),
        (["fit", "--model.warmup", "2"], "warmup must be 0 or more and at most 1"),
        (["fit", "--model.backbone.model_type", "brt"], "brt"),
        (["fit", "--model.backbone.vocab_size", "9"], "the tokenizer has 23 ids, the model 9"),
        (["fit", "--weights", "./nowhere"], "nowhere"),
        (["fit", "--weights", "empty"], "empty"),
        (["fit", "--data.source", "sst2"], "needs a folder"),
        (["fit", "--data.source", "sst2", "--data.root", "nowhere"], "no such folder"),
        (["fit", "--data.source", "sst5"], "source must be one of"),
        (["fit", "--trainer.max_epochs", "-1", "--trainer.max_steps", "-1"], "max_steps"),
        (["test", "--ckpt", "nowhere.ckpt"], "no such checkpoint"),
        (["test", "--ckpt", "torn.ckpt"], "cut short"),
        (["probe", "./nowhere"], "nowhere"),
        (["probe", "good.ckpt", "--epochs", "0"], "--epochs must be 1 or more"),
        (["probe", "good.ckpt", "--cache-limit", "0"], "--cache-limit"),
        (["probe", "good.ckpt", "--data.source", "sst5"], "source must be one of"),
    )

    stage = "classification"

    @pytest.fixture(autouse=True)
    def _of_a_stage(self, request: pytest.FixtureRequest) -> None:
        """Every task has data of its own."""
        parameters = getattr(getattr(request.node, "callspec", None), "params", {})
        self.stage = parameters.get("name", self.stage)

    def build(self, name: str, seed: int = 0) -> Any:
        self.stage = name
        return super().build(name, seed)

    def classification(self) -> FusionModule:
        """A gate, with dropout, the regulariser, and the dense blocks computed again."""
        more = {"dropout": 0.1, "regulariser": 0.1, "gradient_checkpointing": True}
        return FusionModule(SMALL, num_labels=5, fusion="gate", lr=1e-2, fusion_lr=1e-2, **more)

    def qa(self) -> FusionModule:
        return FusionModule(SMALL, task="qa", fusion="concat", dropout=0.0, lr=1e-2, fusion_lr=None)

    def choice(self) -> FusionModule:
        return FusionModule(SMALL, task="choice", fusion="max", dropout=0.0, lr=2e-2)

    def mlm(self) -> FusionModule:
        """Ranks hide different numbers of words."""
        mix = {"fusion": "scalar_mix", "layers": "last:2"}
        return FusionModule(SMALL, task="mlm", lr=1e-2, **mix)

    def data(self) -> OversmoothingData:
        if self.stage == "mlm":
            text = {"source": "text", "root": str(SENTENCES), "tokenizer": "word"}
            return OversmoothingData(**text, batch_size=8)
        form = {"classification": "after"}.get(self.stage, self.stage)
        return OversmoothingData(form=form, batch_size=8, train_size=24, val_size=8)

    def exported(self) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
        module = FusionModule(SMALL, num_labels=2, fusion="gate")
        ids = torch.randint(3, 20, (2, 9))
        return Logits(module.net), (ids, torch.ones_like(ids))

    def prepare_bad_inputs(self, folder: Path) -> None:
        (folder / "empty").mkdir()
        good = (self.finished("classification")[0] / LAST).read_bytes()
        (folder / "good.ckpt").write_bytes(good)
        (folder / "torn.ckpt").write_bytes(good[:-1000])
