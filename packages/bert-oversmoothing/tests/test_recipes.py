"""The recipes against the table of section 4.2 of the specification."""

import re
from typing import Any

import pytest
import yaml

from bert_oversmoothing.cli import app
from bert_oversmoothing.data import OversmoothingData
from bert_oversmoothing.metrics import GLUE_METRICS
from bert_oversmoothing.module import FusionModule
from tenfold.recipes import recipe_parts

GRID = (2e-5, 3e-5, 4e-5, 5e-5)
TABLE = {
    # longest item, batch, learning rates, epochs from and to
    **{f"glue-{name}": (128, 32, (2e-5,), 3, 3) for name in ("mnli", "qqp", "qnli", "sst2")},
    **{f"glue-{name}": (128, 32, GRID, 3, 10) for name in ("cola", "stsb", "mrpc", "wnli")},
    "glue-rte": (128, 16, GRID, 3, 10),
    "swag": (128, 16, (2e-5,), 3, 3),
    "squad1": (384, 32, (3e-5,), 2, 2),
    "squad2": (384, 48, (5e-5,), 2, 2),
}
SMALL = ("glue-cola", "glue-stsb", "glue-mrpc", "glue-rte", "glue-wnli")
OURS = ("demo", "mlm-text", "tsv")


def arguments(name: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Of model, data and trainer."""
    parts = recipe_parts("bert_oversmoothing", name)
    assert parts["model"]["class_path"] == "bert_oversmoothing.module.FusionModule"
    assert parts["data"]["class_path"] == "bert_oversmoothing.data.OversmoothingData"
    return parts["model"]["init_args"], parts["data"]["init_args"], parts["trainer"]


def test_there_are_these_recipes():
    assert set(app.recipes()) == {*TABLE, *OURS}


@pytest.mark.parametrize("name", TABLE)
def test_values_are_those_of_the_table(name):
    model, data, trainer = arguments(name)
    longest, batch, rates, least, most = TABLE[name]
    assert (data["max_length"], data["batch_size"]) == (longest, batch)
    assert model["lr"] in rates
    assert least <= trainer["max_epochs"] <= most
    shared = {"fusion_lr": 1e-3, "weight_decay": 0.01, "warmup": 0.1, "dropout": 0.1}
    assert {key: model[key] for key in shared} == shared
    assert trainer["gradient_clip_val"] == 1.0
    assert trainer["precision"] == "bf16-mixed"
    assert data.get("stride") == (128 if name.startswith("squad") else None)
    assert "weights" not in model
    assert "root" not in data


@pytest.mark.parametrize("name", TABLE)
def test_the_second_line_tells_where_values_come_from(name):
    lines = app.recipe(name).read_text().splitlines()
    assert lines[0].startswith("# ")
    assert re.match(r"# From (BERT's paper|SparseBERT's scripts)\b", lines[1]), lines[1]


@pytest.mark.parametrize("name", [*TABLE, *OURS])
def test_task_and_labels_are_those_of_the_data(name, tmp_path):
    (tmp_path / "train.tsv").write_text("a b\t0\nb a\t1\n")
    model, data, _ = arguments(name)
    found = OversmoothingData(**data, **({"root": str(tmp_path)} if name == "tsv" else {}))
    assert found.task == model["task"]
    assert found.num_labels == model.get("num_labels", 2)


@pytest.mark.parametrize("name", SMALL)
def test_small_tasks_keep_the_best_on_dev(name):
    """By a figure that the data's metric gives."""
    _, data, trainer = arguments(name)
    [callback] = trainer["callbacks"]
    figure = callback["init_args"]["monitor"].removeprefix("val/")
    assert figure in GLUE_METRICS[data["source"]]
    assert callback["init_args"]["mode"] == "max"


def test_weights_decide_what_is_built(tmp_path, capsys):
    """--weights takes the sizes and the tokenizer of the folder, and starts as the identity."""
    from transformers import DistilBertConfig, DistilBertModel

    small = {"vocab_size": 60, "dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 24}
    DistilBertModel(DistilBertConfig(**small)).save_pretrained(tmp_path)
    argv = ["fit", "--config", "glue-mnli", "--weights", str(tmp_path), "--fusion", "concat"]
    assert app.main([*argv, "--layers", "last:2", "--print_config"]) == 0
    parsed = yaml.safe_load(capsys.readouterr().out)
    made = FusionModule(**parsed["model"]["init_args"])
    assert made.net.config.backbone.model_type == "distilbert"
    assert (made.net.config.fusion, list(made.net.config.layers)) == ("concat", [2, 3])
    assert made.net.fusion.is_identity()


def test_the_demo_collapses_before_it_is_trained(tmp_path):
    """Its standard deviation is the one of section 9.2: gain 0.2 sqrt(32) = 1.1."""
    from tenfold.testing import quiet_trainer

    model, data, trainer = arguments("demo")
    assert trainer["max_steps"] >= 150
    made = FusionModule(**model)
    small = OversmoothingData(**data, val_size=32)
    [logged] = quiet_trainer(tmp_path).validate(made, small, verbose=False)
    assert logged["val/cosine_last"] > 0.98
