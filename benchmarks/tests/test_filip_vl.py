"""Scores of the emoji against loops, and tables against the committed results."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.filip_vl import claims, emoji, speed
from benchmarks.results import FOLDER
from filip_vl.data import FilipDataModule, eval_transform
from filip_vl.model import FilipModel
from filip_vl.tokenizers import WordTokenizer

CAPTIONS = [
    "man detective dark skin tone",
    "woman detective light skin tone",
    "woman detective medium-light skin tone",
    "lizard",
    "men holding hands medium skin tone",
    "hand medium-dark skin tone",
]


def test_scores_are_those_of_loops():
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 256, (48, 48, 3), np.uint8)) for _ in CAPTIONS]
    tones = ["light", "medium-light", "medium", "medium-dark", "dark"]
    tokenizer = WordTokenizer.train([*CAPTIONS, *tones, "women"])
    torch.manual_seed(0)
    model = FilipModel.from_config("filip_tiny", tokenizer=tokenizer).eval()
    pairs = list(zip(images, CAPTIONS, strict=True))
    data = FilipDataModule.from_pairs(
        pairs, test=pairs, image_size=48, context_length=24, tokenizer=tokenizer, eval_batch_size=4
    )
    found = emoji.score(model, data)

    @torch.no_grad()
    def both(image, caption):
        v = model.encode_image(eval_transform(48)(image)[None]).normalized()[0].double()
        text = model.encode_text([caption])
        s = v @ text.normalized()[0, text.mask[0]].double().T
        return float(s.amax(1).mean()), float(s.amax(0).mean())

    scores = np.array([[both(image, caption) for caption in CAPTIONS] for image in images])
    own = np.arange(len(CAPTIONS))
    for name, matrix in (("i2t", scores[:, :, 0]), ("t2i", scores[:, :, 1].T)):
        ranks = 1 + (matrix > matrix[own, own][:, None]).sum(1)
        for k in (1, 5, 10):
            assert found[f"{name}_r{k}"] == np.mean(ranks <= k)

    def share(rows, others):
        right = [sum(both(images[n], CAPTIONS[n])) > max(
            sum(both(images[n], other)) for other in others(CAPTIONS[n])
        ) for n in rows]  # fmt: skip
        return np.mean(right)

    def toned(caption):
        words = caption.split()
        place = words.index("skin") - 1
        return [" ".join([*words[:place], t, *words[place + 1 :]])
                for t in tones if t != words[place]]  # fmt: skip

    def gendered(caption):
        swap = {"man": "woman", "woman": "man", "men": "women"}
        return [" ".join(dict(swap).get(word) or word for word in caption.split())]

    assert found["skin_tone"] == share([0, 1, 2, 4, 5], toned)
    assert found["gender"] == share([0, 1, 2, 4], gendered)


def test_the_table_pairs_the_seeds():
    scores = {"FILIP": {"gender": [0.9, 0.8]}, "CLIP": {"gender": [0.6, 0.7]}}
    text = claims.table(scores, {"gender": "gender, of 2"}, {"gender": 0.5})
    half = 12.7062 * 10 / math.sqrt(2) * math.sqrt(2)  # Student's t of one degree of freedom
    row = f"| +20.0 [{20 - half:+.1f}, {20 + half:+.1f}] | +10.0 | 50.0 |"
    assert "| gender, of 2 | 85.0 ± 7.1 | 65.0 ± 7.1 " + row in text


@pytest.mark.parametrize(("kind", "module"), [("claims", claims), ("speed", speed)])
def test_the_readme_says_what_was_measured(kind, module):
    content = json.loads((FOLDER / kind / "filip-vl.json").read_text())
    text = module.tables(content)
    assert text == (FOLDER / kind / "filip-vl.md").read_text().strip()
    assert f"<!-- {kind} -->\n{text}\n<!-- /{kind} -->" in module.README.read_text()
