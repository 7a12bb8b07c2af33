"""The recipes with the commands of the README, against the table of the paper's settings."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from filip_vl.cli import app
from filip_vl.model import FilipModel
from filip_vl.module import FilipModule
from tenfold.recipes import recipe_parts

README = Path(__file__).parents[1] / "README.md"
PAPER = {
    # total batch, base rate, weight decay, epochs, optimizer (section 4 of the specification)
    "yfcc-base": (8192, 6e-3, 3e-2, 30, "lamb"),
    "filip340m-base": (40960, 2e-3, 3e-3, 30, "lamb"),
    "filip340m-large": (30720, 8e-4, 3e-3, 30, "lamb"),
    "retrieval-large": (5120, 2e-4, 3e-4, 3, "lamb"),
    "yfcc15m-declip": (4096, None, 0.5, None, "adamw"),
    "wukong-finetune": (64, None, 3e-4, 15, "lamb"),
}
OURS = ("demo", "demo-clip")
MORE = {
    **{name: {"warmup": 3000} for name in ("yfcc-base", "filip340m-base", "filip340m-large")},
    "yfcc15m-declip": {
        "lr": 5e-4,
        "start_lr": 0.2,
        "warmup": 2500,
        "betas": [0.9, 0.98],
        "fields": {"min_log_scale": 3.0, "max_log_scale": 6.0},
    },
    "wukong-finetune": {"lr": 5e-5, "eps": 1e-6, "label_smoothing": 0.1, "clip_each": 1.0},
}


def commands() -> dict[str, list[str]]:
    """What the README has behind `fit`, by recipe, in the section on the paper's scale."""
    section = README.read_text().partition("## At the paper's scale")[2].partition("\n## ")[0]
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", section, re.DOTALL)).replace("\\\n", " ")
    found = {}
    for line in blocks.splitlines():
        words = shlex.split(line, comments=True)
        if "fit" in words:
            words = words[words.index("fit") + 1 :]
            found[words[words.index("--config") + 1]] = words
    return found


def test_every_recipe_has_a_command():
    assert set(commands()) == set(PAPER)
    assert set(app.recipes()) == {*PAPER, *OURS}


def test_fine_tuning_takes_a_model_of_another_image_size(tmp_path):
    FilipModel.from_config("filip_tiny").save_pretrained(tmp_path)
    parts = recipe_parts("filip_vl", "retrieval-large")
    made = FilipModule(**{**parts["model"]["init_args"], "model": str(tmp_path)})
    assert made.model.config.image_size == parts["data"]["init_args"]["image_size"]


@pytest.mark.parametrize("recipe", PAPER)
def test_the_command_of_a_recipe_is_parsed_to_the_papers_settings(recipe, capsys):
    assert app.main(["fit", *commands()[recipe], "--print_config"]) == 0
    found = yaml.safe_load(capsys.readouterr().out)
    model, data, trainer = (found[part] for part in ("model", "data", "trainer"))
    model, data = model.get("init_args", model), data.get("init_args", data)
    batch, rate, decay, epochs, optimizer = PAPER[recipe]
    devices = 1 if trainer["devices"] == "auto" else int(trainer["devices"])
    assert data["batch_size"] * devices * trainer["num_nodes"] == batch
    assert model["base_lr"] == rate
    assert (model["weight_decay"], model["optimizer"]) == (decay, optimizer)
    assert trainer["max_epochs"] == epochs
    assert trainer["max_steps"] == (128_000 if recipe == "yfcc15m-declip" else -1)
    wanted = MORE.get(recipe, {})
    assert {name: model[name] for name in wanted} == wanted
