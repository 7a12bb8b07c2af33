"""Bad input and failure modes of an analysis, and its commands."""

import csv
import importlib
import json

import pytest
import torch
import transformers as hf

from bert_oversmoothing.analysis import analyze, result
from bert_oversmoothing.cli import app
from bert_oversmoothing.report import Tables
from bert_oversmoothing.theorem import check_theorem
from tenfold.errors import UserError

# The package has a function of the same name.
theorem_command = importlib.import_module("bert_oversmoothing.commands.theorem")

TEXTS = ["w5 w6 w7", "w8 w9", "w10 w11 w12 w13"]
STATES = ("cos", "dm")


@pytest.fixture
def bert(tiny):
    return tiny("bert")[0]


@pytest.fixture(scope="module")
def folder(tiny, word_tokenizer, tmp_path_factory):
    """A BERT with its tokenizer on the disk."""
    path = tmp_path_factory.mktemp("models") / "tiny-bert"
    tiny("bert")[0].save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures have tests of their own."""
    monkeypatch.setattr(result, "draw_all", lambda tables, folder: [])
    monkeypatch.setattr(result, "write_html", lambda tables, path, *_: path.touch())


def error_line(capsys, *argv):
    assert app.main([*map(str, argv)]) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("error: ")
    return err


# -- texts ----------------------------------------------------------------------------------------


def test_empty_and_one_token_texts_are_skipped_and_named(bert, word_tokenizer):
    tokenizer = word_tokenizer(special=False)
    texts = ["", *TEXTS, "  ", "w7"]
    report = analyze(bert, tokenizer, texts, metrics=STATES)
    counts = report.tables.run["texts"]
    assert (counts["given"], counts["used"]) == (6, 3)
    assert counts["empty"] == [0, 4]
    assert counts["single"] == [5]
    assert "2 of 6 texts empty" in report.summary()
    alone = analyze(bert, tokenizer, TEXTS, metrics=STATES).tables
    assert report.tables.column("cosine") == alone.column("cosine")


def test_no_text_left_is_an_error(bert, word_tokenizer):
    with pytest.raises(UserError, match="none of the 2 texts has two tokens or more"):
        analyze(bert, word_tokenizer(), ["", " "])
    with pytest.raises(UserError, match="there are no texts"):
        analyze(bert, word_tokenizer(), [])


def test_long_texts_are_cut_and_counted_or_an_error(bert, word_tokenizer):
    texts = [*TEXTS, " ".join(["w5 w6"] * 20)]
    report = analyze(bert, word_tokenizer(), texts, metrics=STATES)
    assert report.tables.run["texts"]["truncated"] == [3]
    assert report.tables.run["tokens"] == 5 + 4 + 6 + 24  # the model has 24 positions
    assert "1 of 4 texts cut" in report.summary()
    with pytest.raises(UserError, match="text 3 has 42 tokens, more than 24"):
        analyze(bert, word_tokenizer(), texts, on_long="error")
    cut = analyze(bert, word_tokenizer(), texts, metrics=STATES, max_length=5).tables.run
    assert cut["texts"]["truncated"] == [2, 3]


def test_an_empty_mask_row_counts_as_an_empty_text(bert):
    ids = torch.randint(4, 50, (3, 6))
    mask = torch.ones_like(ids)
    mask[1] = 0
    found = analyze(bert, None, [{"input_ids": ids, "attention_mask": mask}], metrics=STATES)
    assert found.tables.run["texts"]["empty"] == [1]
    rest = {"input_ids": ids[[0, 2]]}
    wanted = analyze(bert, None, [rest], metrics=STATES).tables
    assert found.tables.column("cosine") == pytest.approx(wanted.column("cosine"), abs=1e-6)


def test_special_tokens_of_batches_are_unknown(bert):
    batch = {"input_ids": torch.randint(4, 50, (3, 6))}
    with pytest.raises(UserError, match="batches do not tell which of their tokens are special"):
        analyze(bert, None, [batch], exclude_special=True)


def test_a_limit_takes_the_first_texts(bert, word_tokenizer):
    found = analyze(bert, word_tokenizer(), TEXTS, limit=2, metrics=STATES).tables.run
    assert found["texts"]["given"] == 2


def test_a_strange_tokenizer_is_told(bert, word_tokenizer):
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["much"])
    with pytest.raises(UserError, match="the tokenizer has id 50, the model knows 50 words"):
        analyze(bert, tokenizer, ["w5 much"])


# -- states ---------------------------------------------------------------------------------------


def poison(model, value, word=9, layer=2):
    """A word that makes the output of a block not finite."""
    ids = []
    model.embeddings.register_forward_pre_hook(
        lambda module, args, kwargs: ids.append(kwargs["input_ids"]), with_kwargs=True
    )

    def spoil(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden[ids[-1] == word] = value
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    model.encoder.layer[layer - 1].register_forward_hook(spoil)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nan_names_layer_and_text_or_is_skipped(bert, word_tokenizer, value):
    clean = analyze(bert, word_tokenizer(), [TEXTS[0], TEXTS[2]], metrics=STATES).tables
    poison(bert, value)
    with pytest.raises(UserError, match=r"layer 2 holds NaN or infinity \(text 1, 'w8 w9'\)"):
        analyze(bert, word_tokenizer(), TEXTS)
    report = analyze(bert, word_tokenizer(), TEXTS, on_nan="skip")
    found = report.tables
    assert found.run["texts"]["nan"] == [1]
    assert found.run["texts"]["used"] == 2
    assert found.column("cosine") == pytest.approx(clean.column("cosine"), abs=1e-6)
    assert 1 not in found.run["sample"]["texts"]
    with pytest.raises(UserError, match="every text gives NaN"):
        analyze(bert, word_tokenizer(), TEXTS[1:2], on_nan="skip")


def test_garbage_at_padding_is_not_a_nan(bert, word_tokenizer):
    wanted = analyze(bert, word_tokenizer(), TEXTS, batch_size=1, metrics=STATES).tables
    poison(bert, float("nan"), word=0, layer=3)
    found = analyze(bert, word_tokenizer(), TEXTS, metrics=STATES).tables
    assert found.column("cosine") == pytest.approx(wanted.column("cosine"), abs=1e-6)
    assert found.run["texts"]["used"] == 3


def test_zero_vectors_have_cosine_0_and_are_counted(bert, word_tokenizer):
    poison(bert, 0.0, word=8, layer=3)
    report = analyze(bert, word_tokenizer(), TEXTS[1:2], metrics=STATES)
    assert report.tables.run["notes"] == [
        "1 token states are zero, and have similarity 0 by definition"
    ]
    with torch.no_grad():
        ids = torch.tensor([word_tokenizer()(TEXTS[1])["input_ids"]])
        h = bert(input_ids=ids).last_hidden_state[0].double()
    u = h[[0, 2, 3]] / h[[0, 2, 3]].norm(dim=1, keepdim=True)
    wanted = ((u @ u.T).sum() - 3) / 12
    assert report.tables.column("cosine")[3] == pytest.approx(wanted.item(), abs=1e-6)


def test_collapsed_texts_have_no_logarithm(bert, word_tokenizer):
    """Equal rows behind block 2: their distance is 0, whatever their mean is rounded to."""

    def collapse(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden[:, :1].expand_as(hidden)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    bert.encoder.layer[1].register_forward_hook(collapse)
    tables = analyze(bert, word_tokenizer(), TEXTS).tables
    assert tables.column("distance")[2] == 0.0
    assert tables.column("cosine")[2] == pytest.approx(1.0, abs=1e-9)
    assert tables.layers[2]["left_out"] == 3
    assert tables.layers[2].get("log_contraction") is None
    assert tables.layers[1]["left_out"] == 0


def test_a_zero_row_mean_has_no_ratio_and_is_counted(bert, word_tokenizer):
    """Four tokens, of which two are minus the other two, behind block 2."""

    def mirror(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.shape[1] == 4:
            hidden = torch.cat([hidden[:, :2], -hidden[:, :2]], 1)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    bert.encoder.layer[1].register_forward_hook(mirror)
    tables = analyze(bert, word_tokenizer(), TEXTS, batch_size=1, metrics=STATES).tables
    assert tables.column("high_frequency_left_out") == [0, 0, 1, 0]
    rest = analyze(bert, word_tokenizer(), TEXTS[::2], batch_size=1, metrics=STATES).tables
    for name in ("high_frequency", "high_frequency_std", "high_frequency_p95"):
        assert tables.column(name)[2] == pytest.approx(rest.column(name)[2], rel=1e-6)
    alone = analyze(bert, word_tokenizer(), TEXTS[1:2], metrics=STATES).tables.layers[2]
    assert alone["high_frequency"] is alone["high_frequency_std"] is None
    assert alone["relative_distance"] == pytest.approx(1)


def test_encoders_that_change_shape_are_refused():
    config = hf.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2
    )
    model = hf.SwinModel(config).eval()
    with pytest.raises(UserError, match="states change shape at layer 1"):
        analyze(model, None, [{"pixel_values": torch.randn(1, 3, 16, 16)}])


# -- models ---------------------------------------------------------------------------------------


def gpt2():
    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    return hf.GPT2Model(config).eval()


def t5():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return hf.T5Model(hf.T5Config(vocab_size=50, **sizes)).eval()


def test_a_decoder_is_analysed_with_a_note(word_tokenizer):
    report = analyze(gpt2(), word_tokenizer(), TEXTS)
    assert "decoder: attention is causal, its rows still sum to 1" in report.summary()
    assert len(report.tables.heads) == 4
    assert report.tables.heads[0]["vo_norm"] is None
    model, ids = gpt2(), torch.tensor([word_tokenizer()(TEXTS[0])["input_ids"]])
    with torch.no_grad():
        h = model(input_ids=ids, output_hidden_states=True).hidden_states[1][0].double()
    u = h / h.norm(dim=1, keepdim=True)
    wanted = ((u @ u.T).sum() - len(u)) / (len(u) * (len(u) - 1))
    alone = analyze(model, word_tokenizer(), TEXTS[:1]).tables
    assert alone.column("cosine")[1] == pytest.approx(wanted.item(), abs=1e-6)


def test_of_an_encoder_decoder_the_encoder_is_analysed(word_tokenizer):
    model = t5()
    report = analyze(model, word_tokenizer(), TEXTS)
    assert "encoder-decoder: the encoder alone is analysed" in report.summary()
    # Its norm is a root mean square, whose sigma does not centre.
    with torch.no_grad():
        ids = torch.tensor([word_tokenizer()(TEXTS[0])["input_ids"]])
        h = model.encoder(ids, output_hidden_states=True).hidden_states[0][0].double()
    wanted = (h.square().mean(1) + model.config.layer_norm_epsilon).sqrt().min()
    alone = analyze(model, word_tokenizer(), TEXTS[:1]).tables
    assert alone.column("sigma1_min")[1] == pytest.approx(wanted.item(), rel=1e-5)


def test_without_attention_maps_the_rest_goes_on(word_tokenizer):
    found = analyze(gpt2(), word_tokenizer(), TEXTS, attn="recompute")
    assert found.tables.heads == []
    lines = [note for note in found.tables.run["notes"] if "graph and bound left out" in note]
    assert len(lines) == 1
    assert "attention maps unavailable" in lines[0]
    assert found.tables.column("effective_rank")[2] > 1


def test_attention_can_be_left_off(bert, word_tokenizer):
    found = analyze(bert, word_tokenizer(), TEXTS, attn="off").tables
    assert found.heads == []
    assert found.layers[1].get("v_tight") is None
    assert found.layers[1]["sigma1_min"] > 0


@pytest.mark.parametrize(
    ("metrics", "columns"),
    [
        (("cos",), {"cosine", "cosine_between", "cosine_without_mean"}),
        (("dm",), {"distance", "relative_distance", "mad", "high_frequency"}),
        (("rank",), {"effective_rank", "identity_accuracy"}),
        (("sigma",), {"sigma1_min", "sigma_product_median"}),
        (("who",), {"log_attention", "top_token_share"}),
        (("bound",), {"v_tight", "vacuous_share"}),
        (("graph",), set()),
    ],
)
def test_each_metric_alone(bert, word_tokenizer, metrics, columns):
    everything = analyze(bert, word_tokenizer(), TEXTS).tables
    found = analyze(bert, word_tokenizer(), TEXTS, metrics=metrics).tables
    assert columns <= {*found.layers[1]}
    for name in {*found.layers[1]} - {"layer", "texts", "left_out"}:
        # Without maps the sample runs through another kernel, and a cosine may be nearly 0.
        wanted = pytest.approx(everything.column(name)[1:], rel=1e-5, abs=1e-7)
        assert found.column(name)[1:] == wanted, name
    assert bool(found.heads) == (metrics == ("graph",))


def test_bad_options(bert, word_tokenizer):
    for options, line in (
        ({"metrics": ("cos", "heat")}, "no such metrics: heat"),
        ({"metrics": ()}, "no metrics"),
        ({"batch_size": 0}, "--batch-size must be 1 or more"),
        ({"sample": 0}, "--sample must be 1 or more"),
        ({"max_length": 1}, "--max-length must be 2 or more"),
        ({"images": True}, "a model of texts is given images"),
    ):
        with pytest.raises(UserError, match=line):
            analyze(bert, word_tokenizer(), TEXTS, **options)
    with pytest.raises(UserError, match="texts need a tokenizer"):
        analyze(bert, None, TEXTS)


# -- fusion ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", ["gate", "max"])
def test_the_fused_state_is_told_beside_the_layers(tiny, word_tokenizer, fusion):
    from bert_oversmoothing.model import FusionForSequenceClassification

    plain, _ = tiny("bert")
    model = FusionForSequenceClassification.from_encoder(plain, fusion, layers=[1, 3])
    with torch.no_grad():
        for parameter in model.fusion.parameters():
            parameter.normal_()
    found = analyze(model, word_tokenizer(), TEXTS, batch_size=2).tables
    cosines = []
    for text in TEXTS:
        ids = torch.tensor([word_tokenizer()(text)["input_ids"]])
        with torch.no_grad():
            output = model(input_ids=ids, output_hidden_states=True)
        u = output.fused_state[0].double()
        u = u / u.norm(dim=1, keepdim=True)
        cosines.append(((u @ u.T).sum() - len(u)) / (len(u) * (len(u) - 1)))
        if found.run["sample_text"]["text"].startswith(f"text {len(cosines) - 1},"):
            weights = output.fusion_weights
    assert found.run["fused_cosine"] == pytest.approx(float(sum(cosines) / 3), abs=1e-5)
    assert found.run["sample_text"]["layers"] == [1, 3]
    same = analyze(plain, word_tokenizer(), TEXTS).tables
    assert found.column("cosine") == pytest.approx(same.column("cosine"), abs=1e-6)
    if fusion == "gate":
        torch.testing.assert_close(
            torch.from_numpy(found.sample["gate_weights"]), weights[0], atol=1e-5, rtol=1e-4
        )
    else:
        assert "gate_weights" not in found.sample


# -- commands -------------------------------------------------------------------------------------


def test_analyze_writes_a_folder(folder, tmp_path, capsys, undrawn):
    (tmp_path / "t.txt").write_text("\n".join(TEXTS))
    out = tmp_path / "out"
    argv = ["analyze", folder, "w5 w6", "w7 w8 w9", "--file", tmp_path / "t.txt", "--out", out]
    assert app.main([*map(str, argv), "--per-token", "--metrics", "cos,dm,sigma,who"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"reading {folder}\n")
    assert "drawing the pictures\n" in told
    assert "over-smoothing" in told
    assert f"see {out / 'report.html'}" in told
    tables = Tables.load(out)
    assert tables.run["model"] == str(folder)
    assert tables.run["texts"]["given"] == 5
    assert tables.tokens
    assert tables.run["versions"]["transformers"] == hf.__version__


def test_analyze_reads_images(tiny, tmp_path, capsys, undrawn):
    from PIL import Image

    model, _ = tiny("vit")
    model.save_pretrained(tmp_path / "vit")
    hf.ViTImageProcessor(size={"height": 24, "width": 24}).save_pretrained(tmp_path / "vit")
    (tmp_path / "images").mkdir()
    for n in range(3):
        Image.effect_noise((30, 20), 60 + 40 * n).convert("RGB").save(
            tmp_path / "images" / f"{n}.png"
        )
    argv = ["analyze", tmp_path / "vit", "--images", tmp_path / "images", "--out", tmp_path / "out"]
    assert app.main([*map(str, argv)]) == 0
    tables = Tables.load(tmp_path / "out")
    assert tables.run["tokens"] == 30
    assert "promise" in capsys.readouterr().out
    line = error_line(capsys, *argv[:2], "a text", "--out", tmp_path / "other")
    assert "a model of images is given texts" in line
    argv[-1] = tmp_path / "other"
    assert "texts and images at once" in error_line(capsys, *argv[:2], "a text", *argv[2:])


def test_models_that_cannot_be_opened(folder, tmp_path, capsys):
    strange = tmp_path / "strange"
    strange.mkdir()
    config = {"model_type": "mine", "auto_map": {"AutoModel": "code.Model"}}
    (strange / "config.json").write_text(json.dumps(config))
    line = error_line(capsys, "analyze", strange, "a b")
    assert "needs code that comes with it" in line
    assert "--trust-remote-code" in line
    (strange / "config.json").write_text(json.dumps({"model_type": "mine"}))
    assert "transformers knows no mine" in error_line(capsys, "analyze", strange, "a b")
    assert "no such model folder" in error_line(capsys, "analyze", tmp_path / "no" / "m", "a b")
    hf.BertModel.from_pretrained(folder).save_pretrained(tmp_path / "bare")
    line = error_line(capsys, "analyze", tmp_path / "bare", "a b", "--out", tmp_path / "o")
    assert "no tokenizer there" in line
    assert "there are no texts" in error_line(capsys, "analyze", folder)


def test_an_unknown_name_is_told_in_one_line_at_once(tmp_path, capfd, monkeypatch):
    """Without a network: nothing is tried again, and nothing is told of requests."""
    from bert_oversmoothing.model import loading

    asked = []

    def ask(self, name, **options):
        asked.append((name, options))
        raise OSError("Name or service not known")

    monkeypatch.setattr(loading.HfApi, "model_info", ask)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("tried again"))
    argv = ["analyze", "nowhere", "a b", "--revision", "old", "--out", str(tmp_path / "out")]
    assert app.main(argv) == 2
    [line] = capfd.readouterr().err.splitlines()
    known = "no such folder, nor a model on the Hugging Face hub or in its cache (nowhere): check"
    assert line.startswith(f"error: {known}")
    assert [(name, options["revision"]) for name, options in asked] == [("nowhere", "old")]


@pytest.mark.parametrize("command", ["analyze", "compare", "probe", "theorem"])
def test_where_a_command_writes_is_checked_before_the_work(command, tmp_path, capsys):
    """No model is there: the place is told first."""
    models = {"analyze": ["no", "a b"], "compare": ["no", "none"], "theorem": ["--model", "no"]}
    full, file = tmp_path / "full", tmp_path / "full" / "file"
    full.mkdir()
    file.write_text("mine")
    mend = "choose another folder, or remove it"
    for out, told in (
        (full, f"there are files already ({full}): {mend}"),
        (file, f"there are files already ({file}): {mend}"),
        (file / "a" / "b", f"a file is in the way ({file}): choose another place to write"),
        ("/proc/none", "nothing can be written there, "),
    ):
        line = error_line(capsys, command, *models.get(command, ["no"]), "--out", out)
        assert line.startswith(f"error: {told}")
    assert file.read_text() == "mine"


def test_a_file_of_texts_has_two_names(tmp_path, capsys):
    for argv in (("compare", "a", "b"), ("theorem", "--model", "a")):
        files = ("--texts", tmp_path / "t.txt", "--file", tmp_path / "u.txt")
        line = error_line(capsys, *argv, *files, "--out", tmp_path / "out")
        assert "--texts and --file are the same" in line
    argv = ("compare", "a", "b", "--file", tmp_path / "u.txt", "--out", tmp_path / "out")
    assert f"no such file ({tmp_path / 'u.txt'})" in error_line(capsys, *argv)


def test_help_tells_how_texts_are_given(capsys):
    assert app.main(["analyze", "--help"]) == 0
    assert 'analyze MODEL "one text" "another"' in " ".join(capsys.readouterr().out.split())


def test_compare_lays_models_over_each_other(folder, tiny, word_tokenizer, tmp_path, capsys):
    other = tmp_path / "albert"
    tiny("albert")[0].save_pretrained(other)
    word_tokenizer().save_pretrained(other)
    file, out = tmp_path / "t.txt", tmp_path / "out"
    file.write_text("\n".join(TEXTS))
    assert app.main([*map(str, ("compare", folder, other, "--texts", file, "--out", out))]) == 0
    told = capsys.readouterr().out
    assert "tiny-bert" in told
    with (out / "compare.csv").open() as csv_file:
        rows = [*csv.DictReader(csv_file)]
    assert [row["model"] for row in rows] == ["tiny-bert"] * 4 + ["albert"] * 4
    saved = Tables.load(out / "albert")
    assert float(rows[5]["cosine"]) == saved.layers[1]["cosine"]
    assert (out / "compare.png").stat().st_size > 10_000
    assert "two or more" in error_line(capsys, "compare", folder, "--texts", file)
    assert "named twice" in error_line(capsys, "compare", folder, folder, "--texts", file)


def test_theorem_tries_random_blocks_and_models(folder, tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        theorem_command,
        "draw_theorem",
        lambda trials, path, blocks: drawn.append((trials, blocks)) or path,
    )
    assert app.main(["theorem", "--trials", "24", "--out", str(tmp_path / "a")]) == 0
    assert "24 trials, 0 violations" in capsys.readouterr().out
    argv = ["theorem", "--model", str(folder), "--limit", "4", "--out", str(tmp_path / "b")]
    assert app.main(argv) == 0
    told = capsys.readouterr().out
    assert "12 trials, 0 violations" in told
    with (tmp_path / "b" / "trials.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert all(float(row["ratio"]) < float(row["v_tight"]) for row in rows)
    assert [len(trials) for trials, _ in drawn] == [24, 12]
    assert drawn[0][1] is None
    assert drawn[1][1] == [1] * 4 + [2] * 4 + [3] * 4
    assert "largest ratio / bound: of the text" in told
    trials = drawn[1][0]
    largest = [max(t.ratio / t.v_tight for t in trials[4 * n : 4 * n + 4]) for n in range(3)]
    lines = [line.split() for line in told.splitlines()]
    found = [cells[-2] for cells in lines if cells[:1] and cells[0] in ("1", "2", "3")]
    assert found == [f"{value:.3f}" for value in largest]


def test_a_violation_is_listed_and_the_status_is_1(tmp_path, capsys, monkeypatch):
    from dataclasses import replace

    trials = check_theorem(4)
    trials[2] = replace(trials[2], ratio=2 * trials[2].v_tight)
    monkeypatch.setattr(theorem_command, "check_theorem", lambda *_, **__: trials)
    monkeypatch.setattr(theorem_command, "draw_theorem", lambda trials, path, blocks: path)
    assert app.main(["theorem", "--out", str(tmp_path)]) == 1
    told = capsys.readouterr().out
    assert "4 trials, 1 violations" in told
    assert f"{trials[2].ratio:.9g}" in told


def test_report_draws_again_and_tells_damage(bert, word_tokenizer, tmp_path, capsys, undrawn):
    analyze(bert, word_tokenizer(), TEXTS).tables.save(tmp_path)
    assert app.main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").is_file()
    capsys.readouterr()
    assert "no such folder" in error_line(capsys, "report", tmp_path / "none")
    (tmp_path / "figures").touch()
    assert "a file is in the way" in error_line(capsys, "report", tmp_path)
    (tmp_path / "figures").unlink()
    for name, content, line in (
        ("sample.npz", b"PK\3\4 no", "damaged"),
        ("run.json", b"[]", "holds no JSON object"),
        ("run.json", b"{", "damaged"),
        ("heads.csv", b"layer,head\n", "its columns are not those of an analysis"),
    ):
        kept = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content)
        assert line in error_line(capsys, "report", tmp_path)
        (tmp_path / name).write_bytes(kept)
    layers = (tmp_path / "layers.csv").read_text().splitlines()
    for lines, line in (
        (layers[:1], "the layers are not 0, 1, 2"),
        (layers[:2] + layers[3:], "the layers are not 0, 1, 2"),
        ([layers[0], layers[1] + ",1"], "line 2 has"),
        ([layers[0], layers[1].replace("0,", "0,x", 1)], "line 2: could not convert"),
        ([f"{layers[0]},heat", f"{layers[1]},1"], "its columns are not those of an analysis"),
        ([f"{layers[0]},layer", f"{layers[1]},0"], "its columns are not those of an analysis"),
        (["cosine", "0.5"], "the layers are not 0, 1, 2"),
        ([""], "the layers are not 0, 1, 2"),
    ):
        (tmp_path / "layers.csv").write_text("\n".join(lines))
        assert line in error_line(capsys, "report", tmp_path)
    (tmp_path / "layers.csv").unlink()
    assert "there is no layers.csv" in error_line(capsys, "report", tmp_path)


def test_an_older_analysis_has_fewer_columns(bert, word_tokenizer, tmp_path, capsys, undrawn):
    tables = analyze(bert, word_tokenizer(), TEXTS).tables
    tables.save(tmp_path)
    path = tmp_path / "layers.csv"
    with path.open(newline="") as file:
        names, *rows = csv.reader(file)
    newer = {n for n in names if n.startswith(("sigma1_p5_", "high_frequency_left_out"))}
    assert len(newer) == 4
    kept = [place for place, name in enumerate(names) if name not in newer]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([[row[place] for place in kept] for row in (names, *rows)])
    older = Tables.load(tmp_path)
    for row, whole in zip(older.layers, tables.layers, strict=True):
        assert {*row} == {*names}
        assert [row[name] for name in newer] == [None] * 4
        assert row["cosine_p95"] == whole["cosine_p95"]
        assert row["sigma1_p5"] == whole.get("sigma1_p5")
    assert app.main(["report", str(tmp_path)]) == 0
    assert "report.html" in capsys.readouterr().out
