"""The tokenizer that a person names: learned from captions, or from files."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from filip_vl.tokenizers import BPETokenizer, Tokenizer, WordTokenizer, from_json
from filip_vl.tokenizers.bpe import Layout
from tenfold.errors import UserError

WORD = "word"
"""Name of a tokenizer that is learned from the captions."""

_OWN_FILE = "tokenizer.json"


def open_tokenizer(
    name: str,
    captions: Callable[[], Iterable[str]],
    layout: Layout = "clip",
    max_vocab: int = 8192,
) -> Tokenizer:
    """A tokenizer by name.

    Args:
        name: "word", to learn words from `captions`; a model folder or `tokenizer.json` of this
            package; or CLIP's merges: the released file, or a folder of Hugging Face.
        captions: gives the texts to learn from.
        layout: of the ids behind CLIP's merges; "declip" has a mask symbol there.
        max_vocab: ids of "word", see `WordTokenizer.train`.

    Raises:
        UserError: nothing there, or no tokenizer.
    """
    if name == WORD:
        return WordTokenizer.train(captions(), max_vocab)
    path = Path(name)
    if not path.exists():
        fix = f"give {WORD}, CLIP's merges file, or a folder with {_OWN_FILE}"
        raise UserError("no such tokenizer", where=name, fix=fix)
    own = path / _OWN_FILE if path.is_dir() else path
    if own.suffix == ".json" and own.is_file() and _is_own(own):
        return from_json(own.read_text(encoding="utf-8"))
    return BPETokenizer(path, layout=layout)


def _is_own(file: Path) -> bool:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # whatever it is, the reader of merges tells it
    return isinstance(content, dict) and content.get("type") in ("word", "bpe")
