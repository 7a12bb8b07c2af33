"""Tokenizers as text inside a checkpoint, so that it needs no folder and no hub."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer


def tokenizer_files(tokenizer: Any) -> dict[str, str]:
    """What a tokenizer of transformers saves of itself: text by file name."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_text("utf-8") for path in sorted(Path(folder).glob("*.*"))}


def tokenizer_from(files: dict[str, str]) -> Any:
    """The tokenizer that `tokenizer_files` was given."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            Path(folder, name).write_text(text, "utf-8")
        return AutoTokenizer.from_pretrained(folder)
