"""Tables of the claims against numbers worked out by hand."""

import json
import math

import pytest

from benchmarks.bert_oversmoothing import claims, minilm, speed
from benchmarks.results import FOLDER

RUN = {
    "seeds": 2,
    "em": {"last": [0.1, 0.3], "gate": [0.5, 0.5]},
    "cosine_last": {"last": [0.5, 0.7], "gate": [0.9, 0.9]},
    "cosine_fused": {"last": [0.5, 0.7], "gate": [0.2, 0.2]},
}
HALF = 12.7062 * 10  # Student's t of one degree of freedom, times the error of the mean of 40, 20


def test_the_table_pairs_the_seeds_and_has_the_best_head_first():
    head, _, first, second = claims.odd_run_table(RUN, "last").splitlines()
    assert "exact match | against last layer (baseline) | worst seed | p |" in head
    interval = f"+30.0 [{30 - HALF:+.1f}, {30 + HALF:+.1f}]"
    p = 1 - 2 * math.atan(3) / math.pi  # of t = 30 / 10, one degree of freedom
    assert first == (
        f"| gate | 50.0 ± 0.0 | {interval} | +20.0 | {p:.2g} | 0.90 ± 0.00 | 0.20 ± 0.00 |"
    )
    assert second.startswith("| last layer (baseline) | 20.0 ± 14.1 |  |  |  | 0.60 ± 0.14 |")


def test_one_seed_has_no_interval():
    assert claims.paired([0.5], [0.25]) == ["+25.0", "+25.0", ""]


def test_shared_attention_is_paired_with_the_seeds_that_both_have():
    shared = {"em": {"last": [0.2]}}
    assert "| last layer (baseline) | 10.0 | 20.0 | +10.0 | +10.0 |  |" in claims.shared_table(
        RUN, shared
    )


def test_blocks_are_the_mean_of_the_pilots():
    assert claims.layers_table([[0.1, 0.5], [0.2, 0.7]]).splitlines()[-1] == (
        "| exact match | 15.0 | 60.0 |"
    )


def test_of_blocks_that_are_alike_the_shallowest_is_chosen():
    assert claims.shallowest([[0.1, 0.596, 0.6], [0.2, 0.604, 0.602], [0.1, 0.6, 0.61]]) == 2
    assert claims.shallowest([[0.1, 0.58, 0.6]]) == 3
    runs = json.loads((FOLDER / "claims" / "bert-oversmoothing.json").read_text())["runs"]
    block = claims.shallowest([runs[f"layers/{seed}"] for seed in claims.PILOTS])
    assert f"best_layer({block})" == claims.SINGLE


def test_the_probe_is_compared_where_the_encoder_smooths_most():
    run = {
        "std": [0.1, 0.2],
        "cosine": [[0.5], [1.0]],
        "accuracy": {"gate": [[1.0], [0.8]], "last": [[0.9], [0.1]]},  # sorted, as a file has it
    }
    last, gate, similar = claims.probe_table(run).splitlines()[-3:]
    assert last == "| last layer (baseline) | 90.0 | 10.0 |  |"
    assert gate == "| gate | 100.0 | 80.0 | +70.0 |"
    assert similar == "| CosSim of the last layer | 0.50 | 1.00 |  |"


@pytest.mark.parametrize("parts", [[], ["odd-run"]])
def test_parts_that_were_not_run_have_no_table(parts):
    run = RUN | {
        name: values | {h: values["gate"] for h in ("concat", "max", "scalar_mix", claims.SINGLE)}
        for name, values in RUN.items()
        if name != "seeds"
    }
    text = claims.tables({"runs": dict.fromkeys(parts, run)})
    assert text.count("\n| --- |") == 2 * len(parts)


@pytest.mark.parametrize(("kind", "tables"), [("claims", claims.tables), ("speed", speed.tables)])
def test_the_readme_says_what_was_measured(kind, tables):
    content = json.loads((FOLDER / kind / "bert-oversmoothing.json").read_text())
    text = tables(content)
    assert text == (FOLDER / kind / "bert-oversmoothing.md").read_text().strip()
    assert f"<!-- {kind} -->\n{text}\n<!-- /{kind} -->" in claims.README.read_text()


def test_the_readme_says_what_minilm_is():
    runs = json.loads((FOLDER / "claims" / "bert-oversmoothing.json").read_text())["runs"]
    text = minilm.text(runs["minilm"])
    assert f"<!-- minilm -->\n{text}\n<!-- /minilm -->" in claims.README.read_text()
