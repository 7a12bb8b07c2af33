import gc
import itertools
import json
import math

import numpy as np
import pytest
import torch

from bert_oversmoothing.analysis import OversmoothingReport, analyze, result
from bert_oversmoothing.analysis.sample import choose
from bert_oversmoothing.families import FAMILIES, read_encoder
from bert_oversmoothing.report import Tables
from bert_oversmoothing.report.tables import HEAD_COLUMNS, LAYER_COLUMNS, TOKEN_COLUMNS

TEXTS = [
    "w5 w6 w7 w8 w9 w10 w11",
    "w20 w21",
    "w30 w5 w30 w5 w31",
    "w40",
    "w12 w13 w14 w15 w16 w17 w18 w19 w20 w21 w22",
    "w44 w45 w46 w44",
]
POST_TERMS = ("attention", "norm1", "feed_forward", "norm2")


# -- the slow truth: float64 loops over one text at a time ----------------------------------------


def cosine(h):
    u = [x / np.linalg.norm(x) for x in h]
    pairs = [float(a @ b) for a, b in itertools.permutations(u, 2)]
    return sum(pairs) / len(pairs)


def distance(h):
    total = sum(((a - b) ** 2).sum() for a in h for b in h)
    return math.sqrt(total / (2 * len(h)))


def effective_rank(h):
    s = np.linalg.svd(h, compute_uv=False)
    p = s[s > 1e-6 * s[0]] / s.sum()
    return math.exp(-(p * np.log(p)).sum())


def stable_rank(h):
    return (h**2).sum() / np.linalg.norm(h, 2) ** 2


def centred(h):
    return h - h.mean(0)


def top_share(h):
    square = (centred(h) ** 2).sum(1)
    return square.max() / square.sum()


def sigmas(h, eps):
    return [math.sqrt(x.var() + eps) for x in h]


def watch(modules):
    """What goes into and comes out of modules, by name, in the order of the calls."""
    seen = {name: [] for name in modules}

    def hook(name):
        def keep(module, args, output):
            seen[name].append((args[0], output))

        return keep

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    return seen, handles


def trace(model, inputs, norms):
    """States, norm inputs and outputs, and maps of one text alone, as float64 arrays."""
    model.set_attn_implementation("eager")
    seen, handles = watch(norms)
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True, output_attentions=True)
    for handle in handles:
        handle.remove()
    model.set_attn_implementation("sdpa")
    as_array = lambda x: x[0].double().numpy()  # noqa: E731
    states = [as_array(x) for x in output.hidden_states]
    inside = {name: [tuple(map(as_array, call)) for call in calls] for name, calls in seen.items()}
    return states, inside, [as_array(x) for x in output.attentions]


def ids_of(tokenizer, text):
    return {"input_ids": torch.tensor([tokenizer(text)["input_ids"]])}


@pytest.fixture(scope="module")
def bert(tiny, word_tokenizer):
    """A BERT, its report over the texts in batches of 4, and every text traced alone."""
    model, _ = tiny("bert")
    tokenizer = word_tokenizer()
    found = analyze(model, tokenizer, TEXTS, batch_size=4, per_token=True)
    norms = {
        f"{layer}.{place}": module
        for layer, block in enumerate(model.encoder.layer, 1)
        for place, module in enumerate((block.attention.output.LayerNorm, block.output.LayerNorm))
    }
    traces = [trace(model, ids_of(tokenizer, text), norms) for text in TEXTS]
    return model, found.tables, traces


SAMPLED = (
    "cosine_without_mean",
    "effective_rank",
    "effective_rank_centred",
    "stable_rank",
    "stable_rank_centred",
    "identity_cosine",
    "identity_accuracy",
    "v_tight",
    "v_paper",
)


def compare(tables, name, by_layer, first=0, rtol=2e-4, atol=1e-6, middle=np.mean):
    """A column and its spread with a list (layers) of lists (texts)."""
    wanted = {"": [middle(values) for values in by_layer]}
    wanted |= {"_std": [np.std(values) for values in by_layer]}
    quantiles = {"_p5": 0.05, "_p95": 0.95}
    wanted |= {end: [np.quantile(x, q) for x in by_layer] for end, q in quantiles.items()}
    for end, values in wanted.items():
        ours = tables.column(f"{name}{end}")
        assert all(math.isnan(x) for x in ours[:first])
        slack = atol + rtol * np.abs(values)
        if end == "_std":  # of values that are that precise
            slack += rtol * np.abs(wanted[""])
        elif end and name not in SAMPLED:
            # All texts go into bins: 0.27 %, of a cosine 1 minus it, of a logarithm 0.0027.
            size = np.abs(np.subtract(1, values) if name == "cosine" else values)
            slack += 0.0028 * (1 if name.startswith("log_") else size)
        assert (np.abs(np.subtract(ours[first:], values)) <= slack).all(), f"{name}{end}"


def test_every_measure_of_a_text_has_its_spread():
    """All columns but those of pairs of texts, of one token, and of counts."""
    alone = {"layer", "cosine_between", "cosine_excess", "sigma1_lowest", "sigma2_lowest"}
    alone |= {"vacuous_share", "texts", "left_out", "high_frequency_left_out"}
    measures = [name for name in LAYER_COLUMNS if f"{name}_std" in LAYER_COLUMNS]
    ends = ("", "_std", "_p5", "_p95")
    spread = [f"{name}{end}" for name in measures for end in ends]
    assert {"sigma1_p5", "sigma1_p5_p5", "sigma1_p5_p95"} <= {*spread}
    assert sorted([*alone, *spread]) == sorted(LAYER_COLUMNS)


def test_measures_of_states_are_the_loops(bert):
    _, tables, traces = bert
    by_layer = [*zip(*(states for states, *_ in traces), strict=True)]
    measures = {
        "cosine": cosine,
        "mad": lambda h: 1 - cosine(h),
        "distance": distance,
        "relative_distance": lambda h: distance(h) / np.linalg.norm(h),
        "high_frequency": lambda h: distance(h) / (len(h) ** 0.5 * np.linalg.norm(h.mean(0))),
    }
    for name, measure in measures.items():
        values = [[measure(h) for h in layer] for layer in by_layer]
        compare(tables, name, values, rtol=1e-4)
        np.testing.assert_allclose(tables.column(f"{name}_std"), np.std(values, axis=1), rtol=1e-3)
    assert tables.column("high_frequency_left_out") == [0, 0, 0, 0]


def test_ranks_and_identity_are_the_loops(bert):
    _, tables, traces = bert
    by_layer = [*zip(*(states for states, *_ in traces), strict=True)]
    for name, rank in (("effective_rank", effective_rank), ("stable_rank", stable_rank)):
        compare(tables, name, [[rank(h) for h in layer] for layer in by_layer])
        values = [[rank(centred(h)) for h in layer] for layer in by_layer]
        compare(tables, f"{name}_centred", values)

    def units(h):
        return h / np.linalg.norm(h, axis=1, keepdims=True)

    kept = [
        [(units(h) * units(o)).sum(1).mean() for h, o in zip(layer, by_layer[0], strict=True)]
        for layer in by_layer
    ]
    compare(tables, "identity_cosine", kept)
    hits = [
        [
            ((units(h) @ units(o).T).argmax(1) == np.arange(len(h))).mean()
            for h, o in zip(layer, by_layer[0], strict=True)
        ]
        for layer in by_layer
    ]
    compare(tables, "identity_accuracy", hits)
    singular = [np.linalg.svd(h, compute_uv=False) for h in by_layer[2]]
    wanted = np.mean([s[:3] / s[0] for s in singular], axis=0)
    spectrum = tables.sample["spectrum"]
    np.testing.assert_allclose(spectrum[2, :3], wanted, rtol=1e-4)
    longest = max(len(h) for h in by_layer[2])
    assert spectrum.shape[1] == min(longest, len(by_layer[2][0][0]))
    assert (np.diff(spectrum, axis=1) <= 1e-6).all()


def test_anisotropy_is_the_loop_over_all_pairs(bert):
    _, tables, traces = bert
    without = []
    for layer, row in enumerate(tables.layers):
        units = [
            h / np.linalg.norm(h, axis=1, keepdims=True) for h in (s[layer] for s, *_ in traces)
        ]
        pairs = [a @ b.T for a, b in itertools.permutations(units, 2)]
        between = sum(p.sum() for p in pairs) / sum(p.size for p in pairs)
        within = np.mean([cosine(s[layer]) for s, *_ in traces])
        assert row["cosine_between"] == pytest.approx(between, abs=1e-6)
        assert row["cosine_excess"] == pytest.approx(within - between, abs=1e-6)
        offset = np.concatenate([s[layer] for s, *_ in traces]).mean(0)
        without.append([cosine(s[layer] - offset) for s, *_ in traces])
    compare(tables, "cosine_without_mean", without, atol=1e-5)


def test_sigma_columns_are_the_loops(bert):
    model, tables, traces = bert
    eps = model.config.layer_norm_eps
    statistics = {
        "min": min,
        "p5": lambda s: np.quantile(s, 0.05),
        "median": np.median,
        "mean": np.mean,
    }
    by_place = {}
    for place in (0, 1):
        values = [
            [sigmas(inside[f"{layer}.{place}"][0][0], eps) for _, inside, _ in traces]
            for layer in (1, 2, 3)
        ]
        by_place[place] = values
        for name, statistic in statistics.items():
            wanted = [[statistic(s) for s in layer] for layer in values]
            compare(tables, f"sigma{place + 1}_{name}", wanted, first=1)
        lowest = [min(min(s) for s in layer) for layer in values]
        np.testing.assert_allclose(tables.column(f"sigma{place + 1}_lowest")[1:], lowest, rtol=1e-4)
        pooled = [np.concatenate(layer) for layer in values]
        wanted = [np.quantile(s, np.linspace(0, 1, 101)) for s in pooled]
        ours = tables.sample[f"sigma{place + 1}_quantiles"]
        np.testing.assert_allclose(ours, wanted, rtol=1e-4)
    for name, statistic in (("min", min), ("median", np.median)):
        wanted = [
            [statistic(a) * statistic(b) for a, b in zip(*pair, strict=True)]
            for pair in zip(by_place[0], by_place[1], strict=True)
        ]
        compare(tables, f"sigma_product_{name}", wanted, first=1)


def test_who_smooths_is_exact(bert):
    _, tables, traces = bert
    values = {name: [[], [], []] for name in ("contraction", "share", *POST_TERMS)}
    for states, inside, _ in traces:
        for layer in (1, 2, 3):
            first, second = inside[f"{layer}.0"][0], inside[f"{layer}.1"][0]
            chain = [states[layer - 1], *first, second[0], states[layer]]
            d = [distance(h) for h in chain]
            for name, a, b in zip(POST_TERMS, d[:-1], d[1:], strict=True):
                values[name][layer - 1].append(math.log(b / a))
            values["contraction"][layer - 1].append(d[-1] / d[0])
            values["share"][layer - 1].append(max(top_share(first[0]), top_share(second[0])))
    for name in POST_TERMS:
        compare(tables, f"log_{name}", values[name], first=1, atol=1e-5)
    logs = np.log(values["contraction"])
    compare(tables, "log_contraction", logs, first=1, atol=1e-5)
    compare(tables, "contraction", values["contraction"], first=1)
    compare(tables, "top_token_share", values["share"], first=1)
    total = sum(np.array(tables.column(f"log_{name}")[1:]) for name in POST_TERMS)
    np.testing.assert_allclose(tables.column("log_contraction")[1:], total, atol=1e-9)
    assert all(row.get("left_out") == 0 for row in tables.layers[1:])


def test_heads_are_the_loops(bert):
    model, tables, traces = bert
    assert [(row["layer"], row["head"]) for row in tables.heads] == [
        (layer, head) for layer in (1, 2, 3) for head in range(4)
    ]
    for row in tables.heads:
        layer, head = row["layer"] - 1, row["head"]
        maps = [maps[layer][head] for *_, maps in traces]
        lams = [np.linalg.norm(a - a.mean(0), 2) ** 2 for a in maps]
        assert row["lam"] == pytest.approx(np.mean(lams), rel=1e-4)
        assert row["self_mass"] == pytest.approx(
            np.mean([np.diag(a).mean() for a in maps]), rel=1e-4
        )
        firsts = np.mean([a.mean(0).argmax() == 0 for a in maps])
        assert row["sink_first"] == pytest.approx(firsts)
        block = model.encoder.layer[layer].attention
        rows = slice(8 * head, 8 * head + 8)
        vo = block.output.dense.weight[:, rows] @ block.self.value.weight[rows]
        wanted = np.linalg.norm(vo.detach().double().numpy(), 2)
        assert row["vo_norm"] == pytest.approx(wanted, rel=1e-5)


def test_the_bound_is_the_formula(bert):
    model, tables, traces = bert
    norm = lambda w: np.linalg.norm(w.detach().double().numpy(), 2)  # noqa: E731
    lip = 0.5 * (1 + math.erf(1)) + math.sqrt(2) * math.exp(-1) / math.sqrt(2 * math.pi)
    tights, papers = [], []
    for layer, block in enumerate(model.encoder.layer, 1):
        w1, w2 = norm(block.intermediate.dense.weight), norm(block.output.dense.weight)
        gains = [
            float(n.weight.detach().abs().max())
            for n in (block.attention.output.LayerNorm, block.output.LayerNorm)
        ]
        vo = [row["vo_norm"] for row in tables.heads if row["layer"] == layer]
        tight, paper = [], []
        for _, inside, maps in traces:
            lam = [np.linalg.norm(a - a.mean(0), 2) ** 2 for a in maps[layer - 1]]
            least = [
                min(sigmas(inside[f"{layer}.{place}"][0][0], model.config.layer_norm_eps))
                for place in (0, 1)
            ]
            attention = 1 + sum(math.sqrt(x) * s for x, s in zip(lam, vo, strict=True))
            tight.append(math.prod(gains) * (1 + lip * w1 * w2) * attention / math.prod(least))
            s = max(w1, w2, *vo)
            chain = (1 + s**2) * (1 + math.sqrt(max(lam)) * 4 * s)
            paper.append(chain / math.prod(least))
        assert tables.layers[layer]["vacuous_share"] == np.mean([v >= 1 for v in tight])
        tights.append(tight)
        papers.append(paper)
    compare(tables, "v_tight", tights, first=1, rtol=1e-4, middle=np.median)
    compare(tables, "v_paper", papers, first=1, rtol=1e-4, middle=np.median)


def test_rows_of_tokens_are_those_of_the_texts(bert):
    model, tables, traces = bert
    assert len(tables.tokens) == sum(len(states[0]) for states, *_ in traces) * 4
    text = next(row for row in tables.tokens if row["text"] == 2 and row["position"] == 1)
    assert text["token"] == "w30"
    for row in tables.tokens[::17]:
        states, inside, _ = traces[row["text"]]
        h = states[row["layer"]]
        mean, own = h.mean(0), h[row["position"]]
        wanted = own @ mean / np.linalg.norm(own) / np.linalg.norm(mean)
        assert row["cosine_to_mean"] == pytest.approx(wanted, abs=1e-5)
        share = (centred(h)[row["position"]] ** 2).sum() / distance(h) ** 2
        assert row["distance_share"] == pytest.approx(share, rel=1e-3)
        if row["layer"]:
            before = inside[f"{row['layer']}.1"][0][0][row["position"]]
            wanted = math.sqrt(before.var() + model.config.layer_norm_eps)
            assert row["sigma2"] == pytest.approx(wanted, rel=1e-4)
        else:
            assert row["sigma1"] is row["sigma2"] is None


def test_likeness_of_layers_and_the_text_that_is_shown(bert):
    _, tables, traces = bert
    stacked = [np.concatenate([states[layer] for states, *_ in traces]) for layer in range(4)]
    x, y = centred(stacked[1]), centred(stacked[3])
    cka = (x.T @ y) ** 2
    wanted = cka.sum() / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)
    assert tables.sample["cka"][1, 3] == pytest.approx(wanted, abs=1e-6)
    shown = tables.run["sample_text"]
    number = int(shown["text"].split()[1].rstrip(","))
    h = traces[number][0][3]
    assert shown["tokens"] == ["[CLS]", *TEXTS[number].split(), "[SEP]"]
    u = h / np.linalg.norm(h, axis=1, keepdims=True)
    np.testing.assert_allclose(tables.sample["cosine_last"], u @ u.T, atol=1e-5)


# -- pre-norm: ViT and ModernBERT ---------------------------------------------------------------


def test_a_vision_transformer_is_the_loops(tiny):
    model, batch = tiny("vit")
    tables = analyze(model, None, [batch]).tables
    norms = {
        f"{layer}.{place}": module
        for layer, block in enumerate(model.layers, 1)
        for place, module in enumerate((block.layernorm_before, block.layernorm_after))
    } | {"final": model.layernorm}
    traces = [trace(model, {"pixel_values": image[None]}, norms) for image in batch["pixel_values"]]
    by_layer = [*zip(*(states for states, *_ in traces), strict=True)]
    compare(tables, "cosine", [[cosine(h) for h in layer] for layer in by_layer])
    names = ("log_attention", "log_feed_forward", "sigma1_min", "sigma2_min", "top_token_share")
    values = {name: [[], [], []] for name in names}
    final = []
    for states, inside, _ in traces:
        for layer in (1, 2, 3):
            before, middle = inside[f"{layer}.0"][0][0], inside[f"{layer}.1"][0][0]
            np.testing.assert_allclose(before, states[layer - 1], atol=1e-6)
            d = [distance(h) for h in (before, middle, states[layer])]
            values["log_attention"][layer - 1].append(math.log(d[1] / d[0]))
            values["log_feed_forward"][layer - 1].append(math.log(d[2] / d[1]))
            values["top_token_share"][layer - 1].append(max(top_share(before), top_share(middle)))
            for name, h in (("sigma1_min", before), ("sigma2_min", middle)):
                values[name][layer - 1].append(min(sigmas(h, model.config.layer_norm_eps)))
        given, made = inside["final"][0]
        final.append(math.log(distance(made) / distance(given)))
    for name in names:
        compare(tables, name, values[name], first=1, atol=1e-5)
    assert tables.column("log_final_norm")[3] == pytest.approx(np.mean(final), abs=1e-5)
    assert all(map(math.isnan, tables.column("log_final_norm")[:3] + tables.column("log_norm1")))
    assert all(v >= 1 for v in tables.column("v_tight")[1:])
    assert "never promise contraction" in tables.run["verdict"]["sentence"]


def test_a_modernbert_is_measured_before_its_final_norm_and_has_no_bound(tiny, word_tokenizer):
    model, _ = tiny("modernbert")
    tokenizer = word_tokenizer()
    report = analyze(model, tokenizer, TEXTS)
    tables = report.tables
    last = []
    handle = model.layers[-1].register_forward_hook(
        lambda module, args, output: last.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        for text in TEXTS:
            model(**ids_of(tokenizer, text))
    handle.remove()
    wanted = np.mean([cosine(h[0].double().numpy()) for h in last])
    assert tables.column("cosine")[3] == pytest.approx(wanted, abs=1e-5)
    assert all(map(math.isnan, tables.column("v_tight")))
    # Block 1 has no first norm.
    sigma = tables.column("sigma1_min")
    assert math.isnan(sigma[1])
    assert sigma[2] > 0
    assert len(tables.heads) == 12
    assert all(row["vo_norm"] > 0 for row in tables.heads)
    assert "gated" in report.summary()


@pytest.mark.parametrize(
    "family",
    [*FAMILIES, "albert-groups", "deberta-v2-conv", "dinov2-swiglu", "beit-plain", "bert-decoder"],
)
def test_every_family_is_analysed(tiny, family):
    model, batch = tiny(family)
    tables = analyze(model, None, [batch]).tables
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states
    masks = batch.get("attention_mask", torch.ones(states[0].shape[:2])).bool()
    # The last state of ModernBERT has been normed.
    shown = states[:-1] if family == "modernbert" else states
    wanted = [
        np.mean([cosine(h[m].double().numpy()) for h, m in zip(state, masks, strict=True)])
        for state in shown
    ]
    assert tables.column("cosine")[: len(shown)] == pytest.approx(wanted, abs=2e-5)
    parts = [f"log_{name}" for name in POST_TERMS]  # those of pre-norm blocks are among them
    for row in tables.layers[1:]:
        total = sum(row[name] for name in parts if row.get(name) is not None)
        assert row["log_contraction"] == pytest.approx(total, abs=1e-9)
        # Jensen: the mean of the logarithms is no more than that of the factors.
        assert row["log_contraction"] <= math.log(row["contraction"]) + 1e-9
        assert row["sigma2_min"] > 0
    assert len(tables.heads) == 4 * (len(states) - 1)


# -- what must not matter -----------------------------------------------------------------------


def same(a, b, rtol=2e-4):
    for name in LAYER_COLUMNS:
        base, _, end = name.rpartition("_")
        # A value between two bins of a histogram may go to either.
        binned = end in ("p5", "p95") and base in LAYER_COLUMNS and base not in SAMPLED
        step = 0.0055 if binned else 0
        np.testing.assert_allclose(
            a.column(name), b.column(name), rtol=rtol + step, atol=2e-5 + step, err_msg=name
        )
    for x, y in zip(a.heads, b.heads, strict=True):
        for name in HEAD_COLUMNS:
            assert x[name] == pytest.approx(y[name], rel=rtol, abs=2e-5), name


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_batches_do_not_matter(bert, batch_size, word_tokenizer):
    model, tables, _ = bert
    same(analyze(model, word_tokenizer(), TEXTS, batch_size=batch_size).tables, tables)


def test_order_does_not_matter(bert, word_tokenizer):
    model, tables, _ = bert
    same(analyze(model, word_tokenizer(), TEXTS[::-1], batch_size=3).tables, tables)


def test_the_padding_side_of_a_tokenizer_does_not_matter(bert, word_tokenizer):
    model, tables, _ = bert
    tokenizer = word_tokenizer(padding_side="left")
    same(analyze(model, tokenizer, TEXTS, batch_size=3).tables, tables)


@pytest.mark.parametrize("side", ["left", "right"])
def test_ready_batches_are_exact_wherever_their_padding_lies(tiny, side, word_tokenizer):
    """Positions are given, so that padding on the left moves none."""
    model, _ = tiny("bert")
    tokenizer = word_tokenizer(padding_side=side)
    made = [tokenizer(some, padding=True, return_tensors="pt") for some in (TEXTS[:4], TEXTS[4:])]
    batches = [
        {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0),
        }
        for batch in made
    ]
    wanted = analyze(model, tokenizer, TEXTS, batch_size=1).tables
    same(analyze(model, None, batches).tables, wanted)


def test_recomputed_maps_give_the_same(bert, word_tokenizer):
    model, tables, _ = bert
    same(analyze(model, word_tokenizer(), TEXTS, attn="recompute").tables, tables)


def test_half_precision_is_promoted(tiny, word_tokenizer):
    """The square of a feature of 300 does not fit into half precision."""
    model, _ = tiny("bert")
    with torch.no_grad():
        for block in model.encoder.layer:
            block.output.LayerNorm.weight.fill_(300)
    options = {"metrics": ("cos", "dm", "sigma", "who")}
    half = analyze(model.half(), word_tokenizer(), TEXTS, **options).tables
    full = analyze(model.float(), word_tokenizer(), TEXTS, **options).tables
    assert full.column("distance")[-1] ** 2 > 65504
    for name in ("cosine", "distance", "relative_distance", "sigma1_min", "contraction"):
        np.testing.assert_allclose(half.column(name), full.column(name), rtol=0.02, atol=0.005)


def test_special_tokens_can_be_left_out(bert, word_tokenizer):
    model, _, traces = bert
    texts = [text for text in TEXTS if len(text.split()) > 1]
    found = analyze(model, word_tokenizer(), texts, exclude_special=True, batch_size=3).tables
    kept = [t for t, text in zip(traces, TEXTS, strict=True) if len(text.split()) > 1]
    for layer, row in enumerate(found.layers):
        wanted = np.mean([cosine(states[layer][1:-1]) for states, *_ in kept])
        assert row["cosine"] == pytest.approx(wanted, abs=1e-5)
    least = [
        min(sigmas(inside["1.0"][0][0][1:-1], model.config.layer_norm_eps)) for _, inside, _ in kept
    ]
    assert found.layers[1]["sigma1_min"] == pytest.approx(np.mean(least), rel=1e-4)
    # graph and bound see all tokens
    lams = [np.linalg.norm(m[0][0] - m[0][0].mean(0), 2) ** 2 for *_, m in kept]
    assert found.heads[0]["lam"] == pytest.approx(np.mean(lams), rel=1e-4)
    assert found.tokens == []


def test_the_model_is_left_as_it_was(tiny, word_tokenizer):
    model, _ = tiny("bert")
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    analyze(model, word_tokenizer(), TEXTS[:2])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_memory_does_not_grow_with_the_texts(tiny, word_tokenizer):
    """Tensors that are alive in the last layer of the last batch, with 136 and with 392 texts."""
    model, _ = tiny("bert")
    tokenizer, metrics = word_tokenizer(), ("cos", "dm", "sigma", "who")

    def alive(batches):
        calls, numbers = itertools.count(1), []

        def keep(*_):
            if next(calls) == batches:
                gc.collect()
                tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor]
                numbers.extend((len(tensors), sum(x.numel() for x in tensors)))

        handle = model.encoder.layer[-1].register_forward_hook(keep)
        analyze(model, tokenizer, TEXTS[:1] * 8 * batches, batch_size=8, metrics=metrics, sample=1)
        handle.remove()
        return numbers

    # Sums are taken every 16 batches: both stop one batch behind that.
    assert alive(17) == alive(49)


# -- the report ---------------------------------------------------------------------------------


def test_the_report_is_saved_and_read_again(bert, tmp_path, monkeypatch):
    _, tables, _ = bert
    monkeypatch.setattr(result, "draw_all", lambda tables, folder: [folder / "a.png"])
    drawn = []
    monkeypatch.setattr(
        result, "write_html", lambda tables, path, files: drawn.extend(files) or path.touch()
    )
    files = [path.relative_to(tmp_path) for path in OversmoothingReport(tables).save(tmp_path)]
    names = ["layers.csv", "heads.csv", "tokens.csv", "run.json", "sample.npz"]
    assert [*map(str, files)] == [*names, "figures/a.png", "report.html"]
    assert drawn == [tmp_path / "figures" / "a.png"]  # not drawn again
    again = Tables.load(tmp_path)
    for name in LAYER_COLUMNS:
        np.testing.assert_array_equal(again.column(name), tables.column(name))
    for row, other in zip(again.tokens, tables.tokens, strict=True):
        assert row == {name: other.get(name) for name in TOKEN_COLUMNS}
    assert json.loads((tmp_path / "run.json").read_text())["verdict"] == tables.run["verdict"]
    for name, array in tables.sample.items():
        np.testing.assert_array_equal(again.sample[name], array)


def test_the_report_has_a_frame_a_picture_and_a_verdict(bert):
    _, tables, _ = bert
    report = OversmoothingReport(tables)
    assert report.layers.loc[3, "cosine"] == tables.layers[3]["cosine"]
    assert report.plot().axes
    lines = report.summary().splitlines()
    assert lines[0].split()[0] == "layer"
    assert "mild < 0.3" in report.summary()
    assert report.verdict in lines


def test_verdicts_follow_the_thresholds(tiny):
    from bert_oversmoothing.analysis.verdict import verdict

    encoder = read_encoder(tiny("bert")[0])
    for last, word in ((0.29, "none"), (0.31, "mild"), (0.49, "mild"), (0.51, "strong")):
        rows = [{"layer": n, "cosine": c} for n, c in enumerate((0.3, 0.2, 0.25, last))]
        found = verdict(rows, encoder)
        assert found["word"] == word
        assert (found["smallest"], found["at_layer"], found["last"]) == (0.2, 1, last)
    assert found["sentence"].startswith("similarity 0.20 at layer 1 -> 0.51 at layer 3")
    rows = [{"layer": n, "cosine": c} for n, c in enumerate((0.3, 0.2, 0.01))]
    found = verdict(rows, encoder)
    assert (found["word"], found["at_layer"]) == ("none", 2)
    assert found["sentence"].startswith("least alike in the last layer, 0.01")


def test_a_final_norm_is_none_of_the_norms_of_blocks(tiny):
    from bert_oversmoothing.analysis.verdict import verdict

    terms = {"log_attention": 0.1, "log_feed_forward": -0.2}
    rows = [{"layer": 0}, {"layer": 1} | terms, {"layer": 2, "log_final_norm": 2.5} | terms]
    sentence = verdict(rows, read_encoder(tiny("vit")[0]))["sentence"]
    told = "attention contributes +0.2 of ln d_M, feed-forward -0.4; "
    assert sentence.startswith(f"{told}final norm, behind the last layer, +2.5")
    assert "norms contribute" not in sentence
    terms |= {"log_norm1": -1.0, "log_norm2": 0.25}
    rows = [{"layer": 0}, {"layer": 1} | terms, {"layer": 2} | terms]
    sentence = verdict(rows, read_encoder(tiny("bert")[0]))["sentence"]
    assert sentence.startswith("norms contribute -1.5 of ln d_M, attention +0.2")
    assert "final norm" not in sentence


def test_a_sample_is_spread_evenly():
    assert choose([*range(100, 0, -1)], 4) == [1, 34, 67, 100]
    assert choose([3, 1, 2], 5) == [1, 2, 3]
    rows = choose(range(9613), 64)
    assert len({*rows}) == 64
    assert {b - a for a, b in itertools.pairwise(rows)} <= {152, 153}
