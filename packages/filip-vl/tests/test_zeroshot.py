"""Prompts as the paper has them, and scores that do not depend on how they are computed."""

import itertools
import re
import time

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy import ndarray
from torch import Tensor
from torchvision.datasets import CIFAR10, Flowers102

from filip_vl import synthetic
from filip_vl.model import FilipModel, TokenBatch
from filip_vl.tokenizers import BPETokenizer, WordTokenizer
from filip_vl.zeroshot import (
    CaptionPrompt,
    ZeroShotClassifier,
    class_sets,
    compose,
    prompt_names,
    prompt_table,
    read_classes,
    read_templates,
    retrieval_prompts,
)
from filip_vl.zeroshot.forest import PromptForest, grow
from filip_vl.zeroshot.prompts import fill
from tenfold.errors import UserError

# -- prompts --------------------------------------------------------------------------------------


def test_a_prompt_drops_empty_parts_and_their_punctuation():
    assert compose("a photo of a", "cat", "a type of pet", "I like it") == (
        "a photo of a cat, a type of pet. I like it."
    )
    assert compose("a photo of a", "cat", suffix="It's cute") == "a photo of a cat. It's cute."
    assert compose("itap of a", "cat", "texture") == "itap of a cat, texture."
    assert compose("", "cat") == "cat."


def test_the_paper_has_so_many_prompts():
    counts = {name: len(prompt_table(name).templates()) for name in prompt_names()}
    assert counts == {
        "cifar10": 7 * 6,
        "cifar100": 7 * 6,
        "caltech101": 4 * 5,
        "stanford_cars": 4 * 2 * 6,
        "flowers102": 6 * 2 * 4,
        "imagenet": 5 * 6,
        "food101": 3 * 2 * 7,
        "sun397": 8 * 6,
        "dtd": 2 * 3 * 5,
        "aircraft": 4 * 3 * 5,
        "oxford_pets": 3 * 2 * 5,
        "eurosat": 5 * 2 * 4,
    }
    for name in prompt_names():
        templates = prompt_table(name).templates()
        assert len(set(templates)) == len(templates)
        assert all(template.count("{}") == 1 for template in templates)
        assert all(template.endswith(".") and ".." not in template for template in templates)


def test_some_prompts_by_hand():
    assert "itap of a {}. It's not common in daily life." in read_templates("ImageNet")
    assert "a photo of my {}, a type of dog or cat." in read_templates("Oxford-Pets")
    assert "a photo of many {}, a type of bloom. It's beautiful." in read_templates("flowers102")
    assert (
        "a painting of a {}, an example of aerial or satellite images. "
        "It's collected by imaging satellites." in read_templates("eurosat")
    )
    macro = [name for name in prompt_names() if prompt_table(name).average == "macro"]
    assert macro == ["caltech101", "flowers102", "aircraft", "oxford_pets"]


def test_prompts_around_captions():
    flickr, coco = retrieval_prompts("flickr30k"), retrieval_prompts("COCO")
    assert flickr.i2t.around("two dogs run .") == "a good photo of the two dogs run . I hate it."
    assert flickr.t2i.around(" two dogs") == "a good photo of two dogs"
    assert coco.i2t.around("two dogs") == "a good photo of two dogs. It is ugly."
    assert coco.t2i == CaptionPrompt()
    assert retrieval_prompts("none").i2t.around("two dogs") == "two dogs"
    with pytest.raises(UserError, match="flickr30k, coco, none"):
        retrieval_prompts("cc3m")


def test_templates_and_classes_from_files(tmp_path):
    (tmp_path / "templates.txt").write_text("a {}\n\n the {} {{}}\n")
    assert read_templates(tmp_path / "templates.txt") == ["a {}", "the {} {{}}"]
    assert fill("the {} {x}", "cat {}") == "the cat {} {x}"
    (tmp_path / "classes.txt").write_text("\ufeffcat\nhot dog\n", encoding="utf-8")
    assert read_classes(str(tmp_path / "classes.txt")) == ["cat", "hot dog"]
    for folder in ("n2/hot_dog", "n2/cat"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "n2/readme.txt").touch()
    assert read_classes(tmp_path / "n2") == ["cat", "hot dog"]
    with pytest.raises(UserError, match=r"no templates there.*imagenet"):
        read_templates("nowhere.txt")
    with pytest.raises(UserError, match=r"no class names there.*cifar10"):
        read_classes(tmp_path / "nothing.txt")


def test_class_names_are_those_of_the_data_sets():
    sizes = {name: len(read_classes(name)) for name in class_sets()}
    assert sizes == {
        "cifar10": 10,
        "cifar100": 100,
        "eurosat": 10,
        "dtd": 47,
        "oxford_pets": 37,
        "food101": 101,
        "flowers102": 102,
    }
    assert read_classes("Flowers102") == [name.rstrip("?") for name in Flowers102.classes]
    assert read_classes("cifar10")[1] == "automobile"
    assert CIFAR10.meta["key"] == "label_names"  # whose file has them in this order
    for name in ("cifar10", "cifar100", "dtd", "oxford_pets"):  # sorted, and so are the labels
        assert read_classes(name) == sorted(read_classes(name), key=str.lower)


@pytest.mark.parametrize(
    ("read", "bad", "message"),
    [
        (read_classes, [], "no class name"),
        (read_classes, ["cat", "dog", "Cat", "dog "], "'cat', 'dog'"),
        (read_templates, [], "no template"),
        (read_templates, ["a {}", "a cat", "a dog"], "'a cat', 'a dog'"),
    ],
)
def test_bad_lists_are_told(read, bad, message):
    with pytest.raises(ValueError, match=message):
        read(bad)


# -- the forest -----------------------------------------------------------------------------------


def by_loops(image: Tensor, mask: Tensor, tokens: list[Tensor]) -> Tensor:
    """s^I of every image and prompt, one patch at a time."""
    scores = torch.zeros(len(image), len(tokens), dtype=torch.float64)
    for i, j in itertools.product(range(len(image)), range(len(tokens))):
        bests = [
            max(float(patch.double() @ word.double()) for word in tokens[j])
            for patch in image[i, mask[i]]
        ]
        scores[i, j] = sum(bests) / len(bests)
    return scores


def token_of(ids: tuple[int, ...], dim: int = 5) -> Tensor:
    """A token that depends on all ids up to its own, as of a causal text tower."""
    generator = torch.Generator().manual_seed(hash(ids) % 2**62)
    return torch.randn(dim, generator=generator)


def sorted_prompts(prompts: list[tuple[int, ...]], drop_bos: int, drop_eos: int):
    """Ids, mask, and the tokens that count of every prompt."""
    rows = [(7, *prompt, 9) for prompt in sorted(prompts)]
    ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
    mask = np.zeros(ids.shape, bool)
    tokens = []
    for n, row in enumerate(rows):
        ids[n, : len(row)] = row
        mask[n, drop_bos : len(row) - drop_eos] = True
        tokens.append(torch.stack([token_of(row[: m + 1]) for m in np.flatnonzero(mask[n])]))
    return ids, mask, tokens


@given(
    prompts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple), min_size=1),
    drop_bos=st.integers(0, 1),
    drop_eos=st.integers(0, 1),
    shared=st.integers(0, 6),
)
@settings(max_examples=40, deadline=None)
def test_whatever_is_shared_the_scores_are_those_of_loops(prompts, drop_bos, drop_eos, shared):
    ids, mask, tokens = sorted_prompts(prompts[:12], drop_bos, drop_eos)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, 5, generator=generator)
    image_mask = torch.tensor([[True, True, True], [True, False, True]])
    forest = PromptForest(torch.cat(tokens), grow(ids, mask, np.full(len(ids), shared)))
    weights = image_mask / image_mask.sum(1, keepdim=True)
    want = by_loops(image, image_mask, tokens)
    torch.testing.assert_close(forest.scores(image, weights).double(), want, atol=1e-5, rtol=0)
    # as many nodes as there are beginnings that may be shared, and tokens that may not
    places = [
        (tuple(row[: m + 1]), m, n) for n, row in enumerate(ids) for m in np.flatnonzero(mask[n])
    ]
    distinct = {(start, -1 if m < shared else n) for start, m, n in places}
    assert forest.nodes == len(distinct)
    assert forest.prompts == len(ids)


def test_a_mask_with_holes_changes_what_is_shared():
    ids = np.array([[1, 2, 3], [1, 2, 3], [1, 2, 3]])
    mask = np.array([[True, True, False], [False, True, True], [True, True, True]])
    tokens = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    image = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(1))
    forest = PromptForest(tokens, grow(ids, mask, np.full(3, 3)))
    want = by_loops(image, torch.ones(1, 3, dtype=torch.bool), list(tokens.split([2, 2, 3])))
    scores = forest.scores(image, torch.full((1, 3), 1 / 3))
    torch.testing.assert_close(scores.double(), want, atol=1e-6, rtol=0)


def test_images_are_scored_in_chunks(monkeypatch):
    ids, mask, tokens = sorted_prompts([(1,), (1, 2), (2, 0, 1)], 0, 0)
    image = torch.randn(7, 3, 5, generator=torch.Generator().manual_seed(0)).half()
    weights = torch.full((7, 3), 1 / 3)
    forest = PromptForest(torch.cat(tokens), grow(ids, mask, np.full(3, 9)), torch.float16)
    whole = forest.scores(image, weights)
    assert whole.dtype == torch.float32
    for bytes_of_tile in (1, 100):
        monkeypatch.setattr("filip_vl.zeroshot.forest._CPU_TILE", bytes_of_tile)
        torch.testing.assert_close(forest.scores(image, weights), whole)


def test_a_shared_prefix_is_four_times_faster_than_padding():
    """Prompts of ImageNet's templates, of 13 tokens in a context of 77 (section 12.7)."""
    labels = [(100 + n, *([200 + n] * (n % 2))) for n in range(16)]
    numbers: dict[str, int] = {}
    rows, starts = [], []
    for template, label in itertools.product(prompt_table("imagenet").templates(), labels):
        before, after = (re.findall(r"\w+|[^\w\s]", part) for part in template.split("{}"))
        start, end = (
            [numbers.setdefault(w, len(numbers)) for w in part] for part in (before, after)
        )
        rows.append((1000, *start, *label, *end, 1001))
        starts.append(1 + len(start))
    order = sorted(range(len(rows)), key=rows.__getitem__)
    rows, shared = [rows[n] for n in order], np.array(starts)[order]
    mask = np.arange(77) < np.array([len(row) for row in rows])[:, None]
    ids = np.zeros(mask.shape, np.int64)
    ids[mask] = [number for row in rows for number in row]
    vectors = torch.nn.functional.normalize(torch.randn(2000, 256), dim=-1)
    text, image = vectors[torch.from_numpy(ids)], vectors[: 8 * 49].view(8, 49, 256)
    text_mask, weights = torch.from_numpy(mask), torch.full((8, 49), 1 / 49)
    forest = PromptForest(text[text_mask], grow(ids, mask, shared))

    def padded() -> Tensor:
        s = torch.einsum("bnd,cmd->bcnm", image, text)
        return s.masked_fill(~text_mask[:, None], -torch.inf).amax(3).mean(2)

    def seconds(score) -> float:
        times = []
        for _ in range(3):
            begun = time.process_time()
            score()
            times.append(time.process_time() - begun)
        return min(times)

    torch.testing.assert_close(forest.scores(image, weights), padded(), atol=1e-6, rtol=0)
    assert seconds(padded) > 4 * seconds(lambda: forest.scores(image, weights))


def test_the_reference_arrays(reference):
    arrays = np.load(reference / "reference_late_interaction.npz")
    image, text = (
        torch.nn.functional.normalize(torch.from_numpy(arrays[f"{side}_tokens"]), dim=-1)
        for side in ("image", "text")
    )
    mask = arrays["text_mask"]
    levels = grow(np.zeros(mask.shape, np.int64), mask, np.zeros(len(mask), np.int64))
    forest = PromptForest(text[torch.from_numpy(mask)], levels)
    scores = forest.scores(image, torch.full(image.shape[:2], 1 / image.shape[1]))
    by_class = scores.unflatten(1, (4, 2)).mean(2)
    np.testing.assert_allclose(by_class, arrays["prompt_class_scores"], atol=1e-6)


# -- the classifier -------------------------------------------------------------------------------

CLASSES = ("red ring", "red cross", "white circle", "cyan ring")
TEMPLATES = ("a photo of a {}", "{} it is", "a photo of a {} there is a {}", "a photo of the {}")
TEXTS = [fill(template, name) for name in CLASSES for template in TEMPLATES]


def small(seed: int = 0, **overrides) -> FilipModel:
    """A model whose every parameter is random, and a tokenizer that cuts words into pieces."""
    torch.manual_seed(seed)
    tokenizer = BPETokenizer(["r e", "i n", "in g</w>", "p h", "o t"])
    overrides = {"context_length": 77, "image_size": 16, **overrides}
    model = FilipModel.from_config("filip_tiny", tokenizer=tokenizer, **overrides).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def pixels(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def padded_scores(model: FilipModel, image: TokenBatch, texts: list[str]) -> ndarray:
    """The padded einsum in float64."""
    text = model.encode_text(texts)
    s = torch.einsum("bnd,cmd->bcnm", image.normalized().double(), text.normalized().double())
    s = s.masked_fill(~text.mask[:, None], -torch.inf).amax(3)
    return (s * image.mask[:, None]).sum(2).div(image.mask.sum(1)[:, None]).detach().numpy()


@pytest.mark.parametrize("sharing", ["none", "prefix", "tree"])
@pytest.mark.parametrize(
    "overrides", [{}, {"drop_bos": True}, {"drop_eos": True}, {"include_cls": True}]
)
def test_the_classifier_averages_similarities_of_prompts(sharing, overrides):
    model = small(**overrides)
    classifier = ZeroShotClassifier(model, CLASSES, TEMPLATES, sharing=sharing, batch_size=5)
    assert classifier.prompts == TEXTS
    image = model.encode_image(pixels())
    want = padded_scores(model, image, TEXTS)
    np.testing.assert_allclose(classifier.prompt_scores(pixels()), want, atol=1e-6)
    by_class = want.reshape(3, len(CLASSES), len(TEMPLATES)).mean(2)
    np.testing.assert_allclose(classifier.scores(pixels()), by_class, atol=1e-6)
    np.testing.assert_allclose(classifier.scores(image), by_class, atol=1e-6)


def test_sharing_saves_tokens(monkeypatch):
    model = small()
    stored = {}
    for sharing in ("none", "prefix", "tree"):
        (forest,) = ZeroShotClassifier(model, CLASSES, TEMPLATES, sharing=sharing)._forests
        stored[sharing] = forest.nodes
    ids, lengths = model.tokenizer.encode(TEXTS, 77)
    rows = [tuple(row[:length].tolist()) for row, length in zip(ids, lengths, strict=True)]
    assert stored["none"] == int(lengths.sum())
    assert stored["tree"] == len({row[:n] for row in rows for n in range(1, len(row) + 1)})
    assert stored["tree"] < stored["prefix"] < stored["none"]
    monkeypatch.setattr("filip_vl.zeroshot.classifier._BLOCK", 3)
    blocks = ZeroShotClassifier(model, CLASSES, TEMPLATES)
    assert len(blocks._forests) == 6
    want = padded_scores(model, model.encode_image(pixels()), TEXTS)
    np.testing.assert_allclose(blocks.prompt_scores(pixels()), want, atol=1e-6)


def test_a_pooled_model_scores_by_cosine():
    model = small(pooled=True)
    image, text = model.encode_image(pixels()), model.encode_text(TEXTS)
    cosine = torch.nn.functional.cosine_similarity(
        image.tokens[:, 0, None].double(), text.tokens[None, :, 0].double(), dim=-1
    )
    for sharing in ("none", "prefix", "tree"):
        classifier = ZeroShotClassifier(model, CLASSES, TEMPLATES, sharing=sharing)
        np.testing.assert_allclose(classifier.prompt_scores(pixels()), cosine.detach(), atol=1e-6)


def test_half_precision_storage_and_autocast_move_scores_little():
    model = small()
    full = ZeroShotClassifier(model, CLASSES, TEMPLATES)
    half = ZeroShotClassifier(model, CLASSES, TEMPLATES, dtype=torch.float16)
    assert {tokens.dtype for forest in half._forests for tokens in forest.tokens} == {torch.float16}
    image = model.encode_image(pixels())
    torch.testing.assert_close(half.scores(image), full.scores(image), atol=5e-4, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(full.scores(image), full.scores(image), atol=0, rtol=0)


def test_the_best_classes_and_a_single_template():
    model = small()
    alone = ZeroShotClassifier(model, CLASSES, TEMPLATES, ensemble="none")
    assert alone.prompts == [f"a photo of a {name}" for name in CLASSES]
    top = alone.top(pixels(), k=3)
    order = np.argsort(-alone.scores(pixels()).numpy(), axis=1, kind="stable")[:, :3]
    np.testing.assert_array_equal(top.classes, order)
    assert top.names == [[CLASSES[n] for n in row] for row in order]
    assert (top.scores.diff(dim=1) <= 0).all()
    assert alone.top(pixels(), k=99).classes.shape == (3, 4)


def test_bad_options_of_the_classifier(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    model = small()
    with pytest.raises(ValueError, match="ensemble must be"):
        ZeroShotClassifier(model, CLASSES, TEMPLATES, ensemble="mean")
    with pytest.raises(ValueError, match="sharing must be"):
        ZeroShotClassifier(model, CLASSES, TEMPLATES, sharing="all")
    with pytest.raises(ValueError, match="without"):
        ZeroShotClassifier(model, CLASSES, ["a photo"])
    model.tokenizer = None
    with pytest.raises(ValueError, match="tokenizer"):
        ZeroShotClassifier(model, CLASSES, TEMPLATES)


def test_the_classes_of_the_embedded_task():
    captions = [synthetic.scene(0, n).caption for n in range(60)]
    tokenizer = WordTokenizer.train([*captions, *synthetic.CLASS_NAMES])
    model = FilipModel.from_config("filip_tiny", tokenizer=tokenizer).eval()
    classifier = ZeroShotClassifier(model, synthetic.CLASS_NAMES, [synthetic.CLASS_TEMPLATE])
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    scores = classifier.scores(images)
    assert scores.shape == (2, 48)
    want = padded_scores(model, model.encode_image(images), classifier.prompts)
    np.testing.assert_allclose(scores, want, atol=1e-6)
