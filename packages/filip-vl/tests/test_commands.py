"""The commands as a person types them; their figures against loops over tokens."""

import csv
import inspect
import io
import json
import os
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.optimize import minimize
from torchmetrics.classification import MulticlassAccuracy

import filip_vl
from filip_vl import compat
from filip_vl.alignment import alignment_map
from filip_vl.cli import app
from filip_vl.commands import bench_loss as bench_loss_command
from filip_vl.commands.bench_loss import make_pairs, measure
from filip_vl.commands.data import reading
from filip_vl.commands.info import describe
from filip_vl.commands.probe import (
    Features,
    accuracy,
    fit_logistic,
    fit_sgd,
    mean_per_class,
)
from filip_vl.data import FilipDataModule, eval_transform, read_any, shape_pairs, write_shards
from filip_vl.data.pairs import Record
from filip_vl.data.shapes import shape_vocabulary
from filip_vl.export import ImageTower, TextTower, deviation_between, export_tower
from filip_vl.model import FilipModel
from filip_vl.synthetic import CLASS_NAMES, TEST_SEED, TRAIN_SEED, single_object
from filip_vl.tokenizers import BPETokenizer, WordTokenizer
from tenfold.cli import load
from tenfold.graphs import open_graph

NAMES = list(CLASS_NAMES[:3])
PROMPTS = ["a photo of a {}.", "{}"]
MERGES = ["t h", "th e</w>"]


def run(*argv: object) -> int:
    return app.main([str(word) for word in argv])


def fails(capsys, *argv: object) -> str:
    """The one line that a person's mistake gives."""
    capsys.readouterr()
    assert run(*argv) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if " done in " not in x]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model folder, class folders of images, their table, templates."""
    root = tmp_path_factory.mktemp("commands")
    torch.manual_seed(0)
    tokenizer = WordTokenizer.train([*shape_vocabulary(), "good photo ."])
    model = FilipModel.from_config("filip_tiny", tokenizer=tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(root / "model")
    rows = []
    for n in range(9):
        path = root / "images" / NAMES[n % 3].replace(" ", "_") / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(single_object(1, n % 3 + len(CLASS_NAMES) * (n // 3)).image).save(path)
        rows.append((f"images/{path.parent.name}/{n}.png", NAMES[n % 3], n % 3))
    for name, column in (("named.csv", 1), ("numbered.csv", 2)):
        lines = ["filepath,label", *(f"{row[0]},{row[column]}" for row in rows)]
        (root / name).write_text("\n".join(lines))
    (root / "templates.txt").write_text("\n".join(PROMPTS))
    return root


@pytest.fixture(scope="module")
def model(folder) -> FilipModel:
    return FilipModel.from_pretrained(folder / "model")


def pixels_of(path: str | Path) -> torch.Tensor:
    return eval_transform(48)(Image.open(path).convert("RGB"))


def token_rows(batch) -> list[np.ndarray]:
    """Unit vectors of every item, without padding, in float64."""
    found = []
    for tokens, mask in zip(batch.tokens.detach(), batch.mask, strict=True):
        rows = tokens[mask].double().numpy()
        found.append(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    return found


def i2t(image: np.ndarray, text: np.ndarray) -> float:
    return float((image @ text.T).max(1).mean())


def t2i(image: np.ndarray, text: np.ndarray) -> float:
    return i2t(text, image)


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


def test_the_public_names_are_those_of_the_specification():
    """Section 10, with what it says of their options."""
    for name in (
        *("late_interaction", "FilipLoss", "FilipModel", "TokenBatch", "ZeroShotClassifier"),
        *("TokenIndex", "alignment_map", "plot_alignment", "Lamb", "FilipDataModule"),
        *("FilipModule", "BPETokenizer", "WordTokenizer"),
    ):
        assert callable(getattr(filip_vl, name)), name
    for name in ("mindformers", "declip", "xclip"):
        assert callable(getattr(compat, name)), name
    given = inspect.signature(filip_vl.late_interaction).parameters
    wanted = {"impl": "auto", "reduce": "mean", "mask_padding": True, "return_argmax": False}
    wanted |= {"image_mask": None, "text_mask": None}
    assert {key: given[key].default for key in wanted} == wanted
    given = inspect.signature(filip_vl.FilipLoss).parameters
    wanted = {"token_fraction": 1.0, "select_sides": "both", "select_text_base": "padded"}
    wanted |= {"distributed": "rowblock", "label_smoothing": 0, "skip_tol": 0}
    assert {key: given[key].default for key in wanted} == wanted
    assert given["comm_dtype"].default == "float16"


def test_every_command_of_the_table_is_there():
    for name, command in app.commands.items():
        assert callable(load(command.target)), name
        assert command.target.endswith(":" + name.replace("-", "_"))


# -- convert and info --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """Weights under OpenAI's names, whose ids are those of a few merges."""
    torch.manual_seed(1)
    sizes = {"embed_dim": 48, "act": "quick_gelu", "vision_layers": 1, "text_layers": 1}
    clip = FilipModel.from_config("filip_tiny", tokenizer=BPETokenizer(MERGES), **sizes)
    path = tmp_path_factory.mktemp("published") / "clip.pt"
    torch.save(clip.state_dict(), path)
    (path.parent / "merges.txt").write_text("#version\n" + "\n".join(MERGES))
    return path


HEADS = ("--vision-heads", 4, "--text-heads", 4)


def test_convert_keeps_all_weights_and_the_tokenizer(published, tmp_path, capsys):
    out, merges = tmp_path / "out", published.parent / "merges.txt"
    words = ("--from", "openai", "--out", out, "--tokenizer", merges, *HEADS)
    assert run("convert", published, *words) == 0
    told = capsys.readouterr().out
    state, copy = torch.load(published), FilipModel.from_pretrained(out)
    assert f"openai: {len(state)} keys matched" in told
    assert all(torch.equal(value, state[key]) for key, value in copy.state_dict().items())
    assert isinstance(copy.tokenizer, BPETokenizer)
    assert copy.tokenizer.merges == tuple(MERGES)
    assert (copy.config.vision_heads, copy.config.act) == (4, "quick_gelu")


def test_convert_to_another_width_tells_what_starts_anew(published, tmp_path, capsys):
    assert run("convert", published, "--embed-dim", 256, "--out", tmp_path / "out", *HEADS) == 0
    told = capsys.readouterr().out
    assert "re-initialised: text_projection, visual.proj\n" in told
    assert "--tokenizer PATH" in told
    assert FilipModel.from_pretrained(tmp_path / "out").config.embed_dim == 256


def test_convert_writes_nothing_where_a_tower_lacks_a_key(published, tmp_path, capsys):
    state = torch.load(published)
    del state["transformer.resblocks.0.ln_1.weight"]
    torch.save(state, tmp_path / "torn.pt")
    line = fails(capsys, "convert", tmp_path / "torn.pt", "--out", tmp_path / "out", *HEADS)
    assert "transformer.resblocks.0.ln_1.weight" in line
    assert not (tmp_path / "out").exists()
    assert "nowhere.pt" in fails(capsys, "convert", tmp_path / "nowhere.pt")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    assert "files already" in fails(capsys, "convert", published, "--out", tmp_path / "full")
    line = fails(capsys, "convert", published, "--image-size", 50, "--out", tmp_path / "x", *HEADS)
    assert "--image-size" in line


def test_a_published_clip_without_tokenizer_says_which_option(published, folder, tmp_path, capsys):
    run("convert", published, "--out", tmp_path / "out", *HEADS)
    words = ["zeroshot", "--ckpt", tmp_path / "out", "--images", folder / "images"]
    words += ["--classes", "cat,dog", "--templates", folder / "templates.txt"]
    line = fails(capsys, *words, "--out", tmp_path / "p.csv")
    assert "no tokenizer" in line
    assert "--tokenizer" in line
    words += ["--tokenizer", published.parent / "merges.txt"]
    line = fails(capsys, *words, "--tokenizer-layout", "declip")
    assert "517 ids, the network 516" in line
    assert run(*words, "--out", tmp_path / "p.csv") == 0
    assert len(read_csv(tmp_path / "p.csv")) == 9


def test_info_counts_what_the_specification_does():
    facts = describe(Path("filip_base_patch32_224"))
    assert facts["parameters"]["all"] == 150_949_633
    assert round(facts["parameters"]["image"] / 1e6, 2) == 87.65
    assert round(facts["parameters"]["text"] / 1e6, 2) == 63.30
    assert facts["image_tokens"] == 49
    assert {tower: round(count, 2) for tower, count in facts["gmacs"].items()} == {
        "image": 4.41,
        "text": 2.98,
    }


def test_info_of_a_folder_and_of_published_weights(folder, published, capsys):
    assert run("info", folder / "model", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["config"]["embed_dim"] == 32
    assert facts["image_tokens"] == 36
    assert "words learned" in facts["tokenizer"]
    assert run("info", published) == 0
    told = capsys.readouterr().out
    assert "a published checkpoint, openai" in told
    assert "keys matched" in told
    assert "no such model" in fails(capsys, "info", "nowhere")


# -- zeroshot ----------------------------------------------------------------------------------


def by_loops(model: FilipModel, paths: list[Path]) -> np.ndarray:
    """Mean s^I over the prompts of every class, by loops over tokens."""
    images = token_rows(model.encode_image(torch.stack([pixels_of(path) for path in paths])))
    scores = np.zeros((len(paths), len(NAMES)))
    for c, name in enumerate(NAMES):
        texts = token_rows(model.encode_text([p.replace("{}", name) for p in PROMPTS]))
        for n, image in enumerate(images):
            scores[n, c] = np.mean([i2t(image, text) for text in texts])
    return scores


def test_zeroshot_scores_and_accuracies_are_those_of_loops(folder, model, tmp_path, capsys):
    out = tmp_path / "preds.csv"
    words = ["zeroshot", "--ckpt", folder / "model", "--images", folder / "images"]
    words += ["--classes", ",".join(NAMES), "--templates", folder / "templates.txt"]
    assert run(*words, "--topk", 2, "--out", out) == 0
    told = capsys.readouterr().out
    rows = read_csv(out)
    paths = [folder / "images" / row["image"] for row in rows]
    truth = [NAMES.index(path.parent.name.replace("_", " ")) for path in paths]
    scores = by_loops(model, paths)
    order = np.argsort(-scores, axis=1)
    for n, row in enumerate(rows):
        assert row["label"] == NAMES[truth[n]]
        assert [row["class_1"], row["class_2"]] == [NAMES[k] for k in order[n, :2]]
        assert float(row["score_1"]) == pytest.approx(scores[n].max(), abs=1e-5)
        assert row["error"] == ""
    found = json.loads((tmp_path / "preds-metrics.json").read_text())
    right = [order[n, 0] == t for n, t in enumerate(truth)]
    assert found["accuracy"] == pytest.approx(np.mean(right))
    assert found["top2"] == pytest.approx(np.mean([t in order[n, :2] for n, t in enumerate(truth)]))
    for c, name in enumerate(NAMES):
        of_class = [r for r, t in zip(right, truth, strict=True) if t == c]
        assert found["per_class"][name] == pytest.approx(np.mean(of_class))
    assert f"{100 * np.mean(right):.2f} %" in told
    assert (tmp_path / "preds-confusion.png").stat().st_size > 10_000


PETS = ("Abyssinian", "Abyssinian", "Abyssinian", "american_bulldog", "basset_hound")
LAND = ("River", "River", "River", "Forest", "Highway")


def _eurosat(root: Path) -> None:
    for n, name in enumerate(LAND):
        path = root / "eurosat" / "2750" / name / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(single_object(2, 5 * n).image).save(path)


def _pets(root: Path) -> None:
    home = root / "oxford-iiit-pet"
    (home / "images").mkdir(parents=True)
    (home / "annotations").mkdir()
    lines = []
    for n, name in enumerate(PETS):
        lines.append(f"{name}_{n} {1 + sorted({*PETS}).index(name)} 1 1")
        Image.fromarray(single_object(2, 5 * n).image).save(home / "images" / f"{name}_{n}.jpg")
    (home / "annotations" / "test.txt").write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("dataset", "write", "average", "metric"),
    [("oxford_pets", _pets, "macro", "mean_per_class"), ("eurosat", _eurosat, "micro", "accuracy")],
)
def test_the_figure_of_a_set_is_that_of_its_protocol(
    folder, tmp_path, capsys, dataset, write, average, metric
):
    write(tmp_path)
    out = tmp_path / "p.csv"
    words = ["--images", tmp_path, "--dataset", dataset, "--out", out]
    words += ["--templates", folder / "templates.txt"]
    assert run("zeroshot", "--ckpt", folder / "model", *words) == 0
    rows = read_csv(out)
    names = sorted({row["label"] for row in rows})
    truth, best = (
        torch.tensor([names.index(row[key]) for row in rows]) for key in ("label", "class_1")
    )
    assert (truth == best).any()
    assert (truth != best).any()
    wanted = float(MulticlassAccuracy(len(names), average=average)(best, truth))
    found = json.loads((tmp_path / "p-metrics.json").read_text())
    assert found["protocol"] == metric
    assert found[metric] == pytest.approx(wanted, abs=1e-6)
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "CLIP's protocol" in x]
    assert line.startswith(metric.replace("_", " "))
    assert f"{100 * wanted:.2f} %" in line


@pytest.mark.parametrize("table", ["named.csv", "numbered.csv"])
def test_zeroshot_of_a_table_by_names_and_by_numbers(folder, tmp_path, table):
    (tmp_path / "classes.txt").write_text("\n".join(NAMES))
    out = tmp_path / "preds.csv"
    words = ["--images", folder / table, "--classes", tmp_path / "classes.txt"]
    words += ["--templates", folder / "templates.txt", "--ensemble", "none", "--out", out]
    assert run("zeroshot", "--ckpt", folder / "model", *words) == 0
    rows = read_csv(out)
    assert [row["label"] for row in rows] == [NAMES[n % 3] for n in range(9)]
    assert set(rows[0]) >= {"class_3", "score_3"}
    assert "class_4" not in rows[0]


def test_zeroshot_goes_on_where_an_image_cannot_be_read(folder, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.png").write_bytes(b"no picture")
    Image.fromarray(single_object(1, 0).image).save(images / "b.png")
    out = tmp_path / "p.csv"
    words = ["--classes", "a,b", "--templates", folder / "templates.txt", "--out", out]
    assert run("zeroshot", "--ckpt", folder / "model", "--images", images, *words) == 0
    broken, whole = read_csv(out)
    assert "a.png" in broken["error"]
    assert broken["class_1"] == ""
    assert (whole["error"], whole["label"]) == ("", "")
    assert "1 images cannot be read" in capsys.readouterr().out
    assert not (tmp_path / "p-metrics.json").exists()


def test_zeroshot_refuses_what_it_cannot_classify(folder, tmp_path, capsys):
    def told(*words: object) -> str:
        given = dict(zip(words[::2], words[1::2], strict=True))
        usual = {"--ckpt": folder / "model", "--images": folder / "images", "--classes": "a,b"}
        pairs = usual | {"--out": tmp_path / "p.csv"} | given
        return fails(capsys, "zeroshot", *(word for pair in pairs.items() for word in pair))

    (tmp_path / "empty.txt").touch()
    (tmp_path / "bare.txt").write_text("a photo")
    (tmp_path / "wrong.csv").write_text("filepath,label\na.png,9")
    assert "no such model (nowhere)" in told("--ckpt", "nowhere")
    assert "no such folder, image or table (nowhere)" in told("--images", "nowhere")
    assert "there is no class name" in told("--classes", tmp_path / "empty.txt")
    assert "more than once: 'cat'" in told("--classes", "cat,dog,Cat")
    many = ",".join(f"kind {n}" for n in range(1000))  # longer than a path can be
    assert "more than once: 'kind 0'" in told("--classes", f"{many},kind 0")
    assert "templates without {}" in told("--templates", tmp_path / "bare.txt")
    assert "the label '9' is no class" in told("--images", tmp_path / "wrong.csv")
    assert "--topk must be 1 or more" in told("--topk", 0)
    line = told("--classes", "cat")
    assert "No such file or directory (cat)" in line
    assert "a single name needs a comma behind it: cat," in line
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no picture")
    assert "no image can be read" in told("--images", tmp_path / "broken")
    assert "is missing" in told("--device", "cuda:77")


# -- align -------------------------------------------------------------------------------------


def test_align_prints_the_grid_that_loops_give(folder, model, tmp_path, capsys):
    image = folder / "images" / NAMES[0].replace(" ", "_") / "0.png"
    words = ["align", "--ckpt", folder / "model", "--image", image, "--label", NAMES[0]]
    assert run(*words, "--out", tmp_path / "a.png", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    text = f"a photo of a {NAMES[0]}."
    (patches,) = token_rows(model.encode_image(pixels_of(image)[None]))
    (tokens,) = token_rows(model.encode_text([text]))
    assert found["tokens"][1:-1] == [*text.removesuffix(".").split(), "."]
    assert [found["tokens"][n] for n in found["label"]] == NAMES[0].split()
    for n, patch in enumerate(patches):
        cell = found["patches"][n // 6][n % 6]
        values = tokens @ patch
        assert cell["similarity"] == pytest.approx(values.max(), abs=1e-5)
        assert cell["token"] == found["tokens"][cell["index"]]
        assert values[cell["index"]] == pytest.approx(values.max(), abs=1e-5)
    assert found["s_i2t"] == pytest.approx(i2t(patches, tokens), abs=1e-5)
    with Image.open(tmp_path / "a.png") as drawn:
        assert min(drawn.size) > 200


def test_align_draws_where_words_look(folder, model, tmp_path, capsys):
    image = folder / "images" / NAMES[0].replace(" ", "_") / "0.png"
    text = "a photo of a red circle and a blue ring"
    found = alignment_map(model, pixels_of(image), text)
    chosen = {n for row in found.index.tolist() for n in row}
    alone = [word for word in found.words if [w.text for w in found.words].count(word.text) == 1]
    taken = [word.text for word in alone if chosen & {*word.positions}]
    left = [word.text for word in alone if not chosen & {*word.positions}]
    assert taken
    assert left
    words = ["align", "--ckpt", folder / "model", "--image", image, "--text", text, "--mode"]
    for name, more in {"heat": [], "attention": ["--label", taken[0]]}.items():
        assert run(*words, name, *more, "--out", tmp_path / f"{name}.png") == 0
        with Image.open(tmp_path / f"{name}.png") as drawn:
            assert min(drawn.size) > 200
    line = fails(capsys, *words, "attention", "--label", left[0], "--out", tmp_path / "no.png")
    assert "no patch chose the label" in line
    assert not (tmp_path / "no.png").exists()


def test_align_refuses_what_it_cannot_find(folder, tmp_path, capsys):
    image = folder / "images" / NAMES[0].replace(" ", "_") / "0.png"
    words = ["align", "--ckpt", folder / "model", "--out", tmp_path / "a.png", "--image"]
    line = fails(capsys, *words, image, "--text", "a red ring", "--label", "dog")
    assert "'dog' is not in the text" in line
    assert "'red' 'ring'" in line
    assert "--label" in fails(capsys, *words, image, "--text", "a ring", "--mode", "attention")
    assert "nothing to align" in fails(capsys, *words, image)
    assert "no words to align" in fails(capsys, *words, image, "--text", " ")
    jpeg = [*words[:3], "--out", tmp_path / "a.jpg", "--image", image, "--label", "ring"]
    assert "pictures are written as .png" in fails(capsys, *jpeg)
    assert "nowhere.png" in fails(capsys, *words, "nowhere.png", "--label", "ring")
    assert not (tmp_path / "a.png").exists()


# -- retrieve ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def karpathy(folder) -> Path:
    """Nine test images with one or two captions, and one of training."""
    entries = []
    for n in range(9):
        name = NAMES[n % 3]
        texts = [f"a {name}", f"there is a {CLASS_NAMES[n]}"][: 1 + n % 2]
        entry = {"filepath": f"images/{name.replace(' ', '_')}", "filename": f"{n}.png"}
        entries.append({**entry, "split": "test", "sentences": [{"raw": t} for t in texts]})
    entries.append({**entries[0], "split": "train"})
    path = folder / "dataset_coco.json"
    path.write_text(json.dumps({"images": entries}))
    return path


def recalls(model: FilipModel, karpathy: Path, before: tuple[str, str], after: str):
    """Both directions by loops, with what stands around captions in each: recalls, then ranks."""
    entries = [e for e in json.loads(karpathy.read_text())["images"] if e["split"] == "test"]
    paths = [karpathy.parent / e["filepath"] / e["filename"] for e in entries]
    images = token_rows(model.encode_image(torch.stack([pixels_of(p) for p in paths])))
    captions = [(n, s["raw"]) for n, e in enumerate(entries) for s in e["sentences"]]
    home = np.array([n for n, _ in captions])
    found, all_ranks = {}, {}
    for direction, score, prefix, suffix in (
        ("i2t", i2t, before[0], after),
        ("t2i", t2i, before[1], ""),
    ):
        texts = token_rows(model.encode_text([f"{prefix}{t}{suffix}" for _, t in captions]))
        s = np.array([[score(image, text) for text in texts] for image in images])
        right = np.arange(len(images))[:, None] == home
        if direction == "t2i":
            s, right = s.T, right.T
        ranks = [1 + sum(row[~r] > row[r].max()) for row, r in zip(s, right, strict=True)]
        found |= {f"{direction}_r{k}": float(np.mean(np.array(ranks) <= k)) for k in (1, 5, 10)}
        all_ranks[direction] = ranks
    keys = [f"{e['filepath']}/{e['filename']}" for e in entries]
    rows = [("i2t", key, "", rank) for key, rank in zip(keys, all_ranks["i2t"], strict=True)]
    for (n, text), rank in zip(captions, all_ranks["t2i"], strict=True):
        rows.append(("t2i", keys[n], text, rank))
    return found, rows


@pytest.mark.parametrize(
    ("prompts", "before", "after"),
    [("none", ("", ""), ""), ("coco", ("a good photo of ", ""), ". It is ugly.")],
)
def test_retrieve_recalls_what_loops_do(
    folder, model, karpathy, tmp_path, capsys, prompts, before, after
):
    words = ["--karpathy", karpathy, "--prompts", prompts, "--out", tmp_path, "--batch-size", 4]
    assert run("retrieve", "--ckpt", folder / "model", *words) == 0
    found = json.loads((tmp_path / "metrics.json").read_text())
    wanted, rows = recalls(model, karpathy, before, after)
    assert {key: found[key] for key in wanted} == pytest.approx(wanted)
    assert found["rsum"] == pytest.approx(sum(wanted.values()))
    assert (found["images"], found["captions"]) == (9, 13)
    assert f"rsum {100 * found['rsum']:.2f}" in capsys.readouterr().out
    assert (tmp_path / "failures.png").is_file()
    told = [tuple(row.values()) for row in read_csv(tmp_path / "ranks.csv")]
    assert told == [tuple(map(str, row)) for row in rows]


def test_retrieve_refuses_what_is_no_set_of_pairs(folder, karpathy, tmp_path, capsys):
    words = ["retrieve", "--ckpt", folder / "model", "--out", tmp_path / "out"]
    assert "give --karpathy or --data" in fails(capsys, *words)
    assert "nothing of the split val" in fails(
        capsys, *words, "--karpathy", karpathy, "--split", "val"
    )
    assert "nowhere.tsv" in fails(capsys, *words, "--data", "nowhere.tsv")
    assert "no captions" in fails(capsys, *words, "--data", folder / "images")
    table = tmp_path / "t.csv"
    table.write_text(f"filepath,title\n{folder}/named.csv,a ring\n")
    line = fails(capsys, *words, "--data", table)
    assert "1 of 1 images cannot be read" in line
    assert "--max-bad-fraction" in line


def test_retrieve_tells_captions_that_read_alike(folder, tmp_path, capsys):
    names = ["a red ring", "a red ring and a zebra", "a red ring and a giraffe", "a blue cross"]
    rows = [
        f"{path},{text}"
        for path, text in zip(sorted((folder / "images").rglob("*.png")), names, strict=False)
    ]
    (tmp_path / "t.csv").write_text("\n".join(["filepath,title", *rows]))
    words = ["--ckpt", folder / "model", "--data", tmp_path / "t.csv", "--out", tmp_path / "out"]
    assert run("retrieve", *words) == 0
    told = capsys.readouterr().err
    assert "1 captions read like one of another image" in told
    assert "zebra, giraffe" in told


# -- data --------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["jsonl", "csv", "webdataset"])
def test_data_is_read_back_by_the_command_that_it_prints(format, tmp_path, capsys):
    out = tmp_path / "shapes"
    assert run("data", "--format", format, "--out", out, "--train", 5, "--test", 3) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    words = shlex.split(line)
    assert words == ["filip-vl", "fit", *reading(out, format, 5)]
    options = {
        name.removeprefix("--data."): value
        for name, value in zip(words[2::2], words[3::2], strict=True)
        if name.startswith("--data.")
    }
    numbers = {n: int(options.pop(n)) for n in ("image_size", "context_length", "batch_size")}
    data = FilipDataModule(**options, **numbers)
    for split, seed, count in (("train", TRAIN_SEED, 5), ("test", TEST_SEED, 3)):
        pairs, made = data.pairs(split), shape_pairs(seed, count)
        assert pairs is not None
        assert list(map(list, pairs.captions)) == list(made.captions)
    item = data.test_dataset()[1]
    wanted = eval_transform(48)(Image.fromarray(shape_pairs(TEST_SEED, 3).images[1]))
    torch.testing.assert_close(item.image, wanted)
    assert "files already" in fails(capsys, "data", "--out", out)
    assert "--train must be 1" in fails(capsys, "data", "--out", tmp_path / "x", "--train", 0)


# -- export ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def thin() -> FilipModel:
    torch.manual_seed(2)
    sizes = {"vision_layers": 1, "text_layers": 1, "image_size": 16}
    return FilipModel.from_config("filip_tiny", **sizes).eval()


def test_an_exported_tower_answers_as_the_model(thin, tmp_path):
    done = export_tower(thin, "image", tmp_path / "image.pt2", "pt2")
    assert done.deviation is not None
    assert done.deviation <= 1e-5
    tokens, mask = open_graph(done.path, "pt2")(torch.full((4, 3, 16, 16), 0.5))
    mean, std = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    pixels = torch.tensor([(0.5 - m) / s for m, s in zip(mean, std, strict=True)])
    right = thin.encode_image(pixels.view(1, 3, 1, 1).expand(4, 3, 16, 16))
    norms = right.tokens.norm(dim=2, keepdim=True)
    torch.testing.assert_close(tokens, right.tokens / norms, rtol=0, atol=1e-5)
    assert mask.all()


def test_a_tower_that_answers_otherwise_is_not_written(thin, tmp_path, monkeypatch):
    module, tower = sys.modules["filip_vl.export"], ImageTower(thin)

    def off(pixels):
        tokens, mask = tower(pixels)
        return tokens + 1e-3, mask

    monkeypatch.setattr(torch.export, "export", lambda *_, **__: None)
    monkeypatch.setattr(module, "write_graph", lambda _, path, *__: path.write_bytes(b"graph"))
    monkeypatch.setattr(module, "open_graph", lambda *_: off)
    with pytest.raises(RuntimeError, match=r"differs from the network by 0\.001"):
        export_tower(thin, "image", tmp_path / "image.pt2", "pt2")
    assert not list(tmp_path.iterdir())
    assert deviation_between(ImageTower(thin), lambda x: (x, x), thin, "image") == float("inf")


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_export_writes_both_towers(folder, model, tmp_path, capsys, format):
    out = tmp_path / "out"
    assert run("export", folder / "model", "--format", format, "--out", out) == 0
    texts = ["a red ring", "a photo of a blue circle and a green square"]
    ids = model.tokenizer.encode(texts, 24).ids
    tokens, mask = open_graph(out / f"text.{format}", format)(ids)
    right = model.encode_text(texts)
    width = right.tokens.shape[1]
    assert torch.equal(mask[:, :width], right.mask)
    assert not mask[:, width:].any()
    wanted = right.normalized() * right.mask[..., None]
    torch.testing.assert_close(tokens[:, :width], wanted, rtol=0, atol=1e-4)
    assert (out / "tokenizer.json").read_text() == model.tokenizer.to_json()
    assert "image" in capsys.readouterr().out


def test_export_to_a_model_folder(folder, model, tmp_path, capsys):
    out = tmp_path / "out"
    words = ("--format", "safetensors", "--out")
    assert run("export", folder / "model", *words, out) == 0
    assert "differs by 0.0e+00" in capsys.readouterr().out
    copy = FilipModel.from_pretrained(out)
    assert deviation_between(TextTower(model), TextTower(copy), model, "text") == 0
    assert "files already" in fails(capsys, "export", folder / "model", *words, out)


# -- bench-loss --------------------------------------------------------------------------------


def test_both_forms_of_the_loss_cost_what_loops_give():
    given = make_pairs(5, 4, 6, 4, 8)
    assert given.mask.any(1).all()
    images = token_rows(type("Batch", (), {"tokens": given.image, "mask": torch.ones(5, 4) > 0}))
    texts = token_rows(type("Batch", (), {"tokens": given.text, "mask": given.mask}))
    rows = np.exp(2.659) * np.array([[i2t(v, t) for t in texts] for v in images])
    columns = np.exp(2.659) * np.array([[t2i(v, t) for t in texts] for v in images])
    loss = np.mean(np.log(np.exp(rows).sum(1)) - np.diag(rows))
    loss = (loss + np.mean(np.log(np.exp(columns).sum(0)) - np.diag(columns))) / 2
    naive, tiled = (measure(given, impl) for impl in ("naive", "tiled"))
    assert naive.loss == pytest.approx(loss, abs=1e-4)
    assert tiled.loss == pytest.approx(naive.loss, abs=1e-5)
    for a, b in zip(naive.gradients, tiled.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_bench_loss_leaves_out_what_memory_cannot_hold(tmp_path, capsys, monkeypatch):
    sizes = ("--batch", 8, "--patches", 4, "--words", 6, "--mean-words", 4, "--dim", 8)
    home = sys.modules[bench_loss_command.__module__]
    drawn, draw = {}, home.cost_curves
    monkeypatch.setattr(home, "cost_curves", lambda costs, unit: drawn.update(costs) or draw(costs))
    out = tmp_path / "costs.png"
    assert run("bench-loss", *sizes, "--device", "cpu", "--out", out) == 0
    assert "naive " in capsys.readouterr().out
    assert {impl: [x.batch for x in row] for impl, row in drawn.items()} == {
        "naive": [2, 4, 8],
        "tiled": [2, 4, 8],
    }
    with Image.open(out) as picture:
        assert min(picture.size) > 200
    monkeypatch.setattr(home, "_available", lambda device: 1000.0)
    assert run("bench-loss", *sizes, "--device", "cpu") == 0
    told = capsys.readouterr().out
    assert "left out the naive form" in told
    assert "tiled " in told
    assert "--batch must be 1" in fails(capsys, "bench-loss", "--batch", 0)


# -- filter and augment-text -------------------------------------------------------------------


def test_filter_counts_by_rule_and_keeps_the_rest(tmp_path, capsys):
    sizes = {"ok": (220, 240), "small": (100, 300), "long": (200, 700)}
    for name, size in sizes.items():
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    texts = [("ok", "a dog on grass"), ("small", "a cat"), ("long", "a road"), ("ok", "img_0.jpg")]
    texts += [("ok", "the same text")] * 3 + [("gone", "a house"), ("ok", "собака")]
    lines = ["filepath\ttitle", *(f"{name}.png\t{text}" for name, text in texts)]
    source, out, report = tmp_path / "in.tsv", tmp_path / "kept.tsv", tmp_path / "r" / "r.json"
    source.write_text("\n".join(lines), encoding="utf-8")
    words = ["filter", source, "--out", out, "--max-repeats", 2, "--report", report]
    assert run(*words) == 0
    assert out.read_text() == "filepath\ttitle\nok.png\ta dog on grass\n"
    found = json.loads(report.read_text())
    assert (found["pairs"], found["kept"]) == (9, 1)
    assert {rule: n for rule, n in found["dropped"].items() if n} == {
        "frequent text": 3,
        "meaningless text": 1,
        "other language": 1,
        "unreadable image": 1,
        "small image": 1,
        "long image": 1,
    }
    assert "frequent text" in capsys.readouterr().out
    (tmp_path / "words.txt").write_text("dog\n")
    line = fails(capsys, *words, "--sensitive", tmp_path / "words.txt")
    assert "no pair is left" in line
    assert "is what is read" in fails(capsys, "filter", source, "--out", source)
    assert "nowhere.tsv" in fails(capsys, "filter", "nowhere.tsv", "--out", out)
    assert "module:function" in fails(capsys, *words, "--language", "nothing")


def test_filter_takes_shards_and_functions_of_ones_own(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "def german(text):\n    return text.startswith('ein')\n"
    code += "def nameless(text):\n    return text.replace('Anna', '<person>')\n"
    Path("filter_plugin.py").write_text(code)
    texts = ["ein Hund", "a dog", "ein Bild von Anna", "ein böser Hund"]
    picture = Image.new("RGB", (210, 210))
    write_shards(
        (Record(picture, [text], str(n)) for n, text in enumerate(texts)), Path("in"), per_shard=2
    )
    Path("words.txt").write_text("Böser\n")
    words = ["filter", "in/train-{00000..00001}.tar", "--out", "out", "--sensitive", "words.txt"]
    words += ["--language", "filter_plugin:german", "--rewrite", "filter_plugin:nameless"]
    assert run(*words) == 0
    kept = read_any("out")
    assert [list(record.captions) for record in kept] == [["ein Hund"], ["ein Bild von <person>"]]
    told = capsys.readouterr().out
    assert re.search(r"other language\s+1\b", told)
    assert re.search(r"sensitive word\s+1\b", told)
    sys.modules.pop("filter_plugin")


def test_augment_text_adds_what_the_function_gives(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "def loud(texts):\n    return [[t.upper(), t + '!'] for t in texts]\n"
    Path("commands_plugin.py").write_text(code)
    Path("in.tsv").write_text("filepath\ttitle\na.png\ta dog\nb.png\ta cat\n")
    words = ["augment-text", "in.tsv", "--function", "commands_plugin:loud", "--out"]
    assert run(*words, "out.jsonl") == 0
    assert "2 images, 2 captions and 4 variants" in capsys.readouterr().out
    rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [os.path.basename(row["filename"]) for row in rows] == ["a.png", "b.png"]
    assert rows[0]["captions"] == ["a dog", "A DOG", "a dog!"]
    assert ".jsonl" in fails(capsys, *words, "out.tsv")
    words[3] = "commands_plugin:quiet"
    assert "'quiet'" in fails(capsys, *words, "out.jsonl")
    Path("commands_plugin_2.py").write_text("def broken(texts):\n    raise KeyError('oh')\n")
    words[3] = "commands_plugin_2:broken"
    line = fails(capsys, *words, "new.jsonl")
    assert "the function raised KeyError: 'oh', for ['a dog', 'a cat']" in line
    assert "(commands_plugin_2:broken)" in line
    assert not Path("new.jsonl").exists()
    sys.modules.pop("commands_plugin")


# -- probe -------------------------------------------------------------------------------------


def test_logistic_regression_is_that_of_scipy():
    generator = np.random.default_rng(0)
    labels = np.arange(60) % 3
    x = generator.normal(size=(60, 4)) * [1, 5, 0.1, 2] + labels[:, None] * [1, -3, 0.05, 0] + 7
    known = Features(torch.from_numpy(x), torch.from_numpy(labels))
    found = fit_logistic(known, 3, l2=0.05)
    z = (x - x.mean(0)) / x.std(0)

    def cost(flat: np.ndarray) -> float:
        w, b = flat[:12].reshape(3, 4), flat[12:]
        logits = z @ w.T + b
        peak = logits.max(1)
        total = peak + np.log(np.exp(logits - peak[:, None]).sum(1))
        return float(np.mean(total - logits[np.arange(60), labels]) + 0.025 * (w**2).sum())

    best = minimize(cost, np.zeros(15), tol=1e-10).x
    np.testing.assert_allclose(found.weight.numpy(), best[:12].reshape(3, 4), atol=1e-4)
    logits = z @ best[:12].reshape(3, 4).T
    logits += best[12:]
    right = logits.argmax(1) == labels
    assert accuracy(found, known) == pytest.approx(right.mean())
    each = [right[labels == c].mean() for c in range(3)]
    assert mean_per_class(found, known) == pytest.approx(np.mean(each))


def test_the_classifier_of_imagenet_is_that_of_a_loop():
    """Momentum, warm-up, cosine and batch norm written out; one batch, so that no order counts."""
    generator = np.random.default_rng(1)
    labels = np.arange(30) % 3
    x = generator.normal(size=(30, 4)) * [1, 5, 0.1, 2] + labels[:, None] * [1, -3, 0.05, 0] + 7
    epochs, warmup, lr = 9, 3, 0.1
    z = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    parameters = np.zeros((3, 5))
    speed = np.zeros_like(parameters)
    for step in range(epochs):
        exponents = np.exp(z @ parameters[:, :4].T + parameters[:, 4])
        error = (exponents / exponents.sum(1, keepdims=True) - np.eye(3)[labels]) / 30
        speed = 0.9 * speed + np.c_[error.T @ z, error.sum(0)]
        share = (step + 1) / warmup
        if step >= warmup:
            share = 0.5 * (1 + np.cos(np.pi * (step - warmup) / (epochs - warmup)))
        parameters = parameters - lr * share * speed
    known = Features(torch.from_numpy(x), torch.from_numpy(labels))
    found = fit_sgd(known, 3, epochs=epochs, warmup=warmup, lr=lr)
    np.testing.assert_allclose(found.weight.numpy(), parameters[:, :4], atol=1e-12)
    np.testing.assert_allclose(found.bias.numpy(), parameters[:, 4], atol=1e-12)
    np.testing.assert_allclose(found.mean.numpy(), x.mean(0))
    np.testing.assert_allclose(found.scale.numpy(), np.sqrt(x.var(0, ddof=1) + 1e-5))
    # batches of the same size, whose means have the mean of all
    several = fit_sgd(known, 3, batch_size=14, epochs=40)
    np.testing.assert_allclose(several.mean.numpy(), x.mean(0))
    assert accuracy(several, known) > 0.8


def test_probe_learns_classes_of_images(folder, tmp_path, capsys):
    words = ["probe", "--ckpt", folder / "model", "--images", folder / "images"]
    out = tmp_path / "probe.json"
    assert run(*words, "--test", folder / "images", "--l2", 1e-6, "--out", out) == 0
    found = json.loads(out.read_text())
    # nine points in 32 dimensions can be told apart
    assert (found["train"], found["test"], found["classes"]) == (1.0, 1.0, sorted(NAMES))
    assert "9 training and 9 test images of 3 classes, 32 features" in capsys.readouterr().out
    line = fails(capsys, *words)
    assert "no folders train and test" in line
    Image.new("RGB", (8, 8)).save(_made(tmp_path / "test" / "dog") / "a.png")
    assert "without training images: dog" in fails(capsys, *words, "--test", tmp_path / "test")
    for name in ("a", "b"):
        (_made(tmp_path / "bad" / name) / "x.png").write_bytes(b"no picture")
    words_of_bad = ["--images", tmp_path / "bad", "--test", tmp_path / "bad"]
    every = ["--max-bad-fraction", 1]
    line = fails(capsys, "probe", "--ckpt", folder / "model", *words_of_bad, *every)
    assert "no image can be read" in line
    assert "--l2" in fails(capsys, *words, "--l2", -1)
    words += ["--test", folder / "images", "--solver", "sgd", "--out", out]
    assert run(*words, "--lr", 1) == 0
    found = json.loads(out.read_text())
    assert (found["train"], found["test"]) == (1.0, 1.0)
    assert "--warmup 10 leaves none" in fails(capsys, *words, "--epochs", 10)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder
