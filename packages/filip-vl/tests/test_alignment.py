"""Words and patches, against loops over hand-made tokens and the instance maps of the scenes."""

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from filip_vl import synthetic
from filip_vl.alignment import (
    Alignment,
    Grounding,
    GroundingMetrics,
    Word,
    align_tokens,
    alignment_map,
    attention_map,
    candidate_scores,
    caption_words,
    exchanged_attributes,
    label_positions,
    pair_scores,
    patch_objects,
    scene_grounding,
    share_of_first,
)
from filip_vl.alignment.attributes import SKIN_TONES
from filip_vl.data.shapes import shape_vocabulary
from filip_vl.model import FilipModel, TokenBatch
from filip_vl.tokenizers import BPETokenizer, WordTokenizer
from tenfold.contrastive import late_interaction
from tenfold.errors import UserError

BPE = BPETokenizer(["o o", "b a", "l l", "oo n</w>"])
SCENES = [synthetic.scene(7, n) for n in range(6)]
WORDS = WordTokenizer.train(shape_vocabulary())


def unit(x: Tensor) -> np.ndarray:
    return (x.double() / x.double().norm(dim=-1, keepdim=True)).numpy()


# -- words ----------------------------------------------------------------------------------------


def test_a_label_has_all_its_pieces():
    text = "A photo of a  Balloon."
    strings = BPE.tokens(text)
    at = label_positions(BPE, text, "balloon")
    assert "".join(strings[n] for n in at) == "balloon"
    assert len(at) == 3  # ba, ll, oon
    at = label_positions(BPE, text, "PHOTO  of")
    assert "".join(strings[n] for n in at) == "photoof"
    assert at[0] == 2  # behind the start and "a"
    assert label_positions(WORDS, "a red ring and a ring", "ring") == (3, 6)
    assert label_positions(WORDS, "a red ring and a ring", "red ring") == (2, 3)


def test_a_label_that_is_not_there_is_told_with_the_tokens():
    for label in ("cat", "ball", ""):  # ball is no whole word
        with pytest.raises(UserError, match=r"'ba' 'll' 'oon' '\.' '<end_of_text>'"):
            label_positions(BPE, "my balloon.", label)
    with pytest.raises(UserError):  # it is cut off
        label_positions(WORDS, "a red ring and a ring", "and", context_length=5)


def test_words_hold_all_tokens_but_start_and_end():
    text = "it's a Balloon, isn't it?! ''s \u00e9\u00e8"
    strings, words = BPE.tokens(text), caption_words(BPE, text)
    assert [word.text for word in words[:6]] == ["it's", "a", "balloon", ",", "isn't", "it"]
    positions = [n for word in words for n in word.positions]
    assert sorted(positions) == list(range(1, len(strings) - 1))
    assert "".join(strings[n] for n in words[2].positions) == "balloon"
    cut = caption_words(WORDS, "a red ring and a ring", context_length=5)
    assert cut == [Word("a", (1,)), Word("red", (2,)), Word("ring", (3,))]


# -- maps -----------------------------------------------------------------------------------------


def hand_made(cls: bool = False) -> tuple[TokenBatch, TokenBatch]:
    """An image of 2 x 3 patches and a caption of 4 tokens, padded to 6; its start is masked."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 6 + cls, 5, generator=generator)
    text = torch.randn(1, 6, 5, generator=generator)
    mask = torch.tensor([[False, True, True, True, False, False]])
    strings = [["<start>", "red", "ring", "<end>"]]
    ones = torch.ones(1, 6 + cls, dtype=torch.bool)
    return TokenBatch(image, ones, (2, 3)), TokenBatch(text, mask, strings=strings)


@pytest.mark.parametrize("cls", [False, True])
def test_an_alignment_is_what_loops_find(cls):
    image, text = hand_made(cls)
    words = [Word("red", (1,)), Word("ring", (2,))]
    found = align_tokens(image, text, words, label=(2,))
    v, t = unit(image.tokens[0]), unit(text.tokens[0])
    for row in range(2):
        for column in range(3):
            patch = v[cls + 3 * row + column]
            products = {m: patch @ t[m] for m in (1, 2, 3)}
            best = max(products, key=products.__getitem__)
            assert found.index[row, column] == best
            assert float(found.similarity[row, column]) == pytest.approx(products[best], abs=1e-6)
            assert bool(found.on_label[row, column]) == (best == 2)
            for n, word in enumerate(words):
                want = products[word.positions[0]]
                assert float(found.word_maps[n, row, column]) == pytest.approx(want, abs=1e-6)
    best_patch = {m: max(float(patch @ t[m]) for patch in v) for m in (1, 2, 3)}
    shares = found.word_shares
    assert list(shares) == ["<start>", "red", "ring", "<end>"]
    want = {"red": best_patch[1] / 3, "ring": best_patch[2] / 3, "<end>": best_patch[3] / 3}
    assert shares == pytest.approx({"<start>": 0.0, **want}, abs=1e-6)
    i2t, t2i = late_interaction(image.normalized(), text.normalized(), None, text.mask)
    assert found.s_i2t == pytest.approx(float(i2t), abs=1e-6)
    assert found.s_t2i == pytest.approx(float(t2i), abs=1e-6) == sum(shares.values())


def test_shares_of_repeated_words_are_told_apart():
    image, text = hand_made()
    found = align_tokens(image, text, [Word("a", (1,)), Word("a", (2,))])
    assert list(found.word_shares) == ["<start>", "a", "a (2)", "<end>"]
    assert found.label == ()
    assert not found.on_label.any()


def test_the_json_of_an_alignment_is_plain():
    image, text = hand_made()
    found = align_tokens(image, text, [], (2,))
    read = json.loads(json.dumps(found.to_json()))
    assert read["tokens"] == ["<start>", "red", "ring", "<end>"]
    assert read["label"] == [2]
    patch = read["patches"][1][2]
    assert patch["index"] == int(found.index[1, 2])
    assert patch["token"] == read["tokens"][patch["index"]]
    assert patch["similarity"] == pytest.approx(float(found.similarity[1, 2]), abs=1e-5)


def test_only_patches_of_one_image_are_aligned():
    image, text = hand_made()
    with pytest.raises(ValueError, match="no patches"):
        align_tokens(image._replace(grid=None), text, [])
    with pytest.raises(ValueError, match="one image and one caption"):
        align_tokens(image, text._replace(strings=None), [])


def tiny(**overrides) -> FilipModel:
    torch.manual_seed(0)
    return FilipModel.from_config("filip_tiny", tokenizer=WORDS, **overrides).eval()


def picture(scene: synthetic.Scene) -> Tensor:
    return torch.from_numpy(scene.image).permute(2, 0, 1) / 127.5 - 1


@pytest.mark.parametrize("overrides", [{}, {"pooled": True}, {"include_cls": True}])
def test_the_map_of_a_model(overrides):
    model, scene = tiny(**overrides), SCENES[0]
    noun = scene.objects[0].shape
    found = alignment_map(model, picture(scene), scene.caption, noun)
    assert isinstance(found, Alignment)
    assert found.similarities.shape == (len(found.strings), 6, 6)
    assert {found.strings[n] for n in found.label} == {noun}
    assert [word.text for word in found.words] == scene.caption.split()
    v = unit(model.image_tokens(picture(scene)[None]).tokens[0, -36:].detach())
    t = unit(model.text_tokens([scene.caption]).tokens[0].detach())[: len(found.strings)]
    np.testing.assert_array_equal(found.index.flatten(), (v @ t.T).argmax(1))
    with pytest.raises(UserError, match="'banana' is not in the text"):
        alignment_map(model, picture(scene), scene.caption, "banana")
    model.tokenizer = None
    with pytest.raises(ValueError, match="tokenizer"):
        alignment_map(model, picture(scene), scene.caption)


def test_attention_is_the_mean_over_heads_and_chosen_patches():
    model, pixels = tiny(), picture(SCENES[0])
    patches = torch.zeros(6, 6, dtype=torch.bool)
    patches[1, 2] = patches[4, 0] = True
    weights = model.visual.last_attention(pixels[None])[0]
    rows = [1 + 1 * 6 + 2, 1 + 4 * 6]
    want = torch.stack([weights[head, row, 1:] for head in range(4) for row in rows]).mean(0)
    found = attention_map(model, pixels, patches)
    torch.testing.assert_close(found, want.view(6, 6).detach())
    with pytest.raises(UserError, match="no patch chose the label"):
        attention_map(model, pixels, torch.zeros(6, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match="grid"):
        attention_map(model, pixels, torch.ones(3, 12, dtype=torch.bool))


# -- metrics --------------------------------------------------------------------------------------


def test_an_object_has_the_patches_that_it_covers():
    instances = torch.zeros(4, 10, dtype=torch.int64)
    instances[:2, 5:9] = 1  # 8 of 10 pixels
    instances[2:, :2] = 2  # 4 of 10
    instances[2, 5:8] = 1  # 3 of 10, too few
    assert patch_objects(instances, (2, 2)).tolist() == [[0, 1], [2, 0]]
    assert patch_objects(instances, (2, 2), covered=0.3).tolist() == [[0, 1], [2, 1]]
    instances[2:, 2:4], instances[3, 4] = 3, 3  # 5 of 10 beside the 4 of object 2
    assert patch_objects(instances, (2, 2)).tolist() == [[0, 1], [3, 0]]
    with pytest.raises(ValueError, match="4x10 pixels do not divide into 3x2"):
        patch_objects(instances, (3, 2))


def test_the_truth_of_a_scene():
    for scene in SCENES:
        truth = scene_grounding(scene, WORDS, 24)
        strings = WORDS.tokens(scene.caption)
        for shape, phrase, noun in zip(scene.objects, truth.phrases, truth.nouns, strict=True):
            article = "an" if shape.colour == "orange" else "a"
            assert [strings[n] for n in phrase] == [article, shape.colour, shape.shape]
            assert [strings[n] for n in noun] == [shape.shape]
        content = sorted(strings[n] for n in truth.content)
        assert content == sorted(x for s in scene.objects for x in (s.colour, s.shape))
        assert truth.instances.tolist() == scene.instances.tolist()


def loops(image: TokenBatch, text: TokenBatch) -> dict[str, list[bool]]:
    """The three metrics over all scenes, patch by patch and pixel by pixel."""
    found: dict[str, list[bool]] = {name: [] for name in GroundingMetrics.names}
    v, t = unit(image.tokens), unit(text.tokens)
    for b, scene in enumerate(SCENES):
        words = scene.caption.split()
        owner: dict[int, int] = {}  # of the caption's words, by position
        for n, phrase in enumerate(scene.phrases):
            for start, _ in phrase:
                owner[1 + len(scene.caption[:start].split())] = n + 1
        content = {n + 1 for n, word in enumerate(words) if word in synthetic.COLOURS}
        content |= {n + 1 for n, word in enumerate(words) if word in synthetic.SHAPES}
        valid = range(len(words) + 2)
        for k in range(36):
            row, column = divmod(k, 6)
            pixels = scene.instances[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            for n in range(1, len(scene.objects) + 1):
                if np.mean(pixels == n) >= 0.4:
                    best = max(valid, key=lambda m: v[b, k] @ t[b, m])
                    found["alignment_all"].append(owner.get(best) == n)
                    best = max(content, key=lambda m: v[b, k] @ t[b, m])
                    found["alignment_content"].append(owner.get(best) == n)
        for n, phrase in enumerate(scene.phrases):
            noun = 1 + len(scene.caption[: phrase.shape[0]].split())
            k = max(range(36), key=lambda k: v[b, k] @ t[b, noun])
            row, column = divmod(k, 6)
            pixels = scene.instances[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            found["pointing"].append(bool((pixels == n + 1).any()))
    return found


@pytest.mark.parametrize("cls", [False, True])
def test_the_metrics_are_those_of_loops(cls):
    texts = [scene.caption for scene in SCENES]
    ids, lengths = WORDS.encode(texts, 24)
    mask = torch.arange(24) < lengths[:, None]
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(6, 36, 8, generator=generator)
    text = TokenBatch(torch.randn(6, 24, 8, generator=generator), mask)
    truth = [scene_grounding(scene, WORDS, 24) for scene in SCENES]
    for b, known in enumerate(truth):
        # half of the patches see their object
        for k, n in enumerate(patch_objects(known.instances, (6, 6)).flatten().tolist()):
            if n and k % 2:
                patches[b, k] = 2 * text.tokens[b, known.nouns[n - 1][0]]
    assert ids.shape == mask.shape
    tokens = torch.cat([torch.randn(6, 1, 8, generator=generator), patches], 1) if cls else patches
    image = TokenBatch(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool), (6, 6))
    metrics = GroundingMetrics()
    for part in (slice(0, 4), slice(4, 6)):
        metrics.update(
            TokenBatch(image.tokens[part], image.mask[part], image.grid),
            TokenBatch(text.tokens[part], text.mask[part]),
            truth[part],
        )
    want = loops(image._replace(tokens=patches), text)
    assert metrics.compute() == {name: pytest.approx(np.mean(x)) for name, x in want.items()}
    assert 0.2 < metrics.compute()["alignment_content"] < 0.9
    with pytest.raises(ValueError, match="no patches"):
        metrics.update(image._replace(grid=None), text, truth)


def test_tokens_that_do_not_count_are_no_candidates():
    image = TokenBatch(torch.ones(1, 4, 3), torch.ones(1, 4, dtype=torch.bool), (2, 2))
    tokens = torch.tensor([[[1.0, 1, 1], [1, 0, 0], [1, 0.5, 0]]])
    text = TokenBatch(tokens, torch.tensor([[False, True, True]]))
    instances = torch.tensor([[1, 1], [0, 0]])
    truth = Grounding(instances, ((2,),), ((2,),), (1,))
    metrics = GroundingMetrics()
    metrics.update(image, text, [truth])
    assert metrics.compute() == {"alignment_all": 1, "alignment_content": 0, "pointing": 1}


def test_objects_that_are_not_there_are_not_asked():
    image = TokenBatch(torch.ones(1, 4, 3), torch.ones(1, 4, dtype=torch.bool), (2, 2))
    text = TokenBatch(torch.ones(1, 3, 3), torch.ones(1, 3, dtype=torch.bool))
    truth = Grounding(torch.zeros(2, 2, dtype=torch.int64), ((1,), ()), ((1,), ()), ())
    metrics = GroundingMetrics()
    metrics.update(image, text, [truth])
    assert all(np.isnan(value) for value in metrics.compute().values())


# -- captions that are nearly true ----------------------------------------------------------------


def test_pairs_are_scored_one_by_one():
    generator = torch.Generator().manual_seed(0)
    image_mask = torch.tensor([[True, False, True], [True, True, True]])
    text_mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    image = TokenBatch(torch.randn(2, 3, 5, generator=generator), image_mask)
    text = TokenBatch(torch.randn(2, 4, 5, generator=generator), text_mask)
    i2t, t2i = late_interaction(
        image.normalized().double(), text.normalized().double(), image_mask, text_mask
    )
    want = (i2t + t2i).diagonal()
    torch.testing.assert_close(pair_scores(image, text).double(), want, atol=1e-6, rtol=0)


def test_candidates_are_scored_with_their_own_image():
    model = tiny()
    candidates = [
        [scene.caption, *([false] if (false := synthetic.exchanged_caption(scene)) else [])]
        for scene in SCENES
    ]
    image = model.encode_image(torch.stack([picture(scene) for scene in SCENES]))
    scores = candidate_scores(model, image, candidates, batch_size=5)
    assert [len(row) for row in scores] == [len(texts) for texts in candidates]
    for n, texts in enumerate(candidates):
        for found, caption in zip(scores[n], texts, strict=True):
            text = model.encode_text([caption])
            i2t, t2i = late_interaction(
                image.normalized()[n : n + 1], text.normalized(), None, text.mask
            )
            assert found.item() == pytest.approx((i2t + t2i).item(), abs=1e-5)
    with pytest.raises(ValueError, match="candidates of 1 images for 6"):
        candidate_scores(model, image, candidates[:1])


def test_only_a_better_first_candidate_wins():
    rows = [[1.0, 0.5, 0.9], [1.0, 1.0], [0.0], [0.2, 0.1], [0.2, 0.1, 0.3]]
    assert share_of_first([torch.tensor(row) for row in rows]) == 2 / 4
    assert np.isnan(share_of_first([torch.tensor([1.0])]))


@pytest.mark.parametrize(
    ("caption", "skin_tone", "gender"),
    [
        (
            "woman detective medium skin tone",
            "woman detective {} skin tone",
            "man detective medium skin tone",
        ),
        ("ear with hearing aid medium-light skin tone", "ear with hearing aid {} skin tone", None),
        (
            "kiss man man light skin tone dark skin tone",
            None,
            "kiss woman woman light skin tone dark skin tone",
        ),
        ("woman and man holding hands", None, None),
        ("men with bunny ears", None, "women with bunny ears"),
        ("merman medium-dark skin tone", "merman {} skin tone", None),
        ("flag Isle of Man", None, None),
        ("light bulb", None, None),
    ],
)
def test_exchanged_attributes(caption, skin_tone, gender):
    found = exchanged_attributes(caption)
    want = {}
    if skin_tone:
        want["skin_tone"] = [s for t in SKIN_TONES if (s := skin_tone.format(t)) != caption]
        assert len(want["skin_tone"]) == 4
    if gender:
        want["gender"] = [gender]
    assert found == want
