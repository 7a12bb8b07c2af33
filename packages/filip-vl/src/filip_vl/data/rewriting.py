"""The rows of a file that are left, and their texts, written in the file's own format."""

import csv
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filip_vl.data import jsonl, parquet, table
from filip_vl.data.filtering import FilterReport, FilterRules, Kept, filter_pairs
from filip_vl.data.pairs import Pairs
from filip_vl.data.shards import IMAGE_MEMBERS, grouped_members, open_shard
from filip_vl.data.sources import IMAGES, Location, SplitName, files_of, read_any, source_of
from filip_vl.data.writers import text_file, write_jsonl
from tenfold.checkpoint import atomic_file
from tenfold.errors import UserError
from tenfold.images import load_parquet


def filter_file(
    path: str | Path,
    out: Path,
    rules: FilterRules | None = None,
    at: Location | None = None,
    *,
    split: SplitName = "train",
    threads: int = 8,
) -> FilterReport:
    """Filter a file, or shards, and write what is left in the same format.

    >>> report = filter_file("cc3m/train.tsv", Path("cc3m/kept.tsv"))

    Args:
        path: see `read_any`.
        out: see `write_kept`.
        rules: the paper's if left out.
        at: how to read `path`; its format is told by the name where left out.
        split: of Karpathy's JSON.
        threads: that look at images.

    Returns:
        How many pairs each rule dropped.

    Raises:
        UserError: nothing there, nothing that can be read, nothing left, or `out` is what is read.
    """
    at = at or Location(source_of(path))
    if at.source == IMAGES:
        raise UserError("images without captions are nothing to filter", where=str(path))
    files = files_of(path, at.source)
    if out.absolute() in {place for file in map(Path, files) for place in (file, file.parent)}:
        raise UserError("this is what is read", where=str(out), fix="write to another place")
    pairs = read_any(path, at, split)
    kept, report = filter_pairs(pairs, rules, threads)
    if not kept:
        raise UserError("no pair is left", where=str(path), fix="; ".join(report.lines()))
    write_kept(files, at, pairs, kept, out)
    return report


def write_kept(
    files: Sequence[str], at: Location, pairs: Pairs, kept: Kept, out: Path
) -> list[Path]:
    """Write what a filter left.

    Tables, JSON lines, shards and Parquet files keep their format and everything else that their
    rows hold; other sources become JSON lines.

    Args:
        files: what the pairs were read from.
        at: how.
        pairs: the pairs, as read.
        kept: texts that are left, by row.
        out: a file; for shards a folder.

    Returns:
        The files written.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    if at.source == "csv":
        _write_table(Path(files[0]), at, kept, out)
    elif at.source == "jsonl":
        _write_lines(Path(files[0]), at, kept, out)
    elif at.source == "webdataset":
        return _write_shards(files, kept, out)
    elif at.source == "parquet":
        _write_parquet(files, at, kept, out)
    else:
        write_jsonl((pairs[row]._replace(captions=texts) for row, texts in kept.items()), out)
    return [out]


def _write_table(file: Path, at: Location, kept: Kept, out: Path) -> None:
    caption = at.caption_column or table.CAPTION_COLUMN
    with file.open(encoding="utf-8-sig") as stream:
        separator = at.separator or table.separator_of(stream.readline())
    with text_file(out) as stream:
        writer = None
        for number, (row, _) in enumerate(table.read_rows(file, separator, caption)):
            if writer is None:
                writer = csv.DictWriter(stream, list(row), delimiter=separator, lineterminator="\n")
                writer.writeheader()
            if number in kept:
                writer.writerow(row | {caption: kept[number][0]})


def _write_lines(file: Path, at: Location, kept: Kept, out: Path) -> None:
    caption = at.caption_column or jsonl.CAPTION_KEY
    with atomic_file(out) as stream:
        for number, (content, _) in enumerate(jsonl.read_lines(file)):
            if number in kept:
                changed = _with_texts(content, caption, kept[number])
                stream.write((json.dumps(changed, ensure_ascii=False) + "\n").encode())


def _with_texts(content: Mapping[str, Any], caption: str, texts: list[str]) -> dict[str, Any]:
    """An object with other texts, at the same place and in the same shape."""
    key = jsonl.CAPTIONS_KEY if jsonl.CAPTIONS_KEY in content else caption
    single = isinstance(content.get(key), str)
    return {**content, key: texts[0] if single else texts}


def _write_shards(shards: Sequence[str], kept: Kept, out: Path) -> list[Path]:
    """All members of the samples that are left, in shards of the same names."""
    out.mkdir(parents=True, exist_ok=True)
    written, number = [], 0
    for shard in shards:
        written.append(out / Path(shard).name)
        with (
            open_shard(shard) as tar,
            atomic_file(written[-1]) as stream,
            tarfile.open(fileobj=stream, mode="w") as copy,
        ):
            for _, members in grouped_members(tar):
                if not any(suffix in members for suffix in IMAGE_MEMBERS):
                    continue
                if number in kept:
                    _copy_sample(tar, copy, members, kept[number])
                number += 1
    return written


def _copy_sample(
    tar: tarfile.TarFile,
    copy: tarfile.TarFile,
    members: Mapping[str, tarfile.TarInfo],
    texts: list[str],
) -> None:
    for suffix, info in members.items():
        file = tar.extractfile(info)
        content = b"" if file is None else file.read()
        if suffix == "json":
            known = json.loads(content)
            changed = _with_texts(known, jsonl.CAPTION_KEY, texts)
            held = jsonl.CAPTIONS_KEY in known or jsonl.CAPTION_KEY in known
            content = json.dumps(changed if held else known, ensure_ascii=False).encode()
        elif suffix == "txt":
            content = texts[0].encode()
        member = tarfile.TarInfo(info.name)
        member.size, member.mtime, member.mode = len(content), info.mtime, info.mode
        copy.addfile(member, io.BytesIO(content))


def _write_parquet(files: Sequence[str], at: Location, kept: Kept, out: Path) -> None:
    image = at.image_column or parquet.IMAGE_COLUMN
    caption = at.caption_column or parquet.CAPTION_COLUMN
    whole = load_parquet([str(file) for file in files], image=image, caption=caption)
    rows = list(kept)
    chosen = whole.select(rows)
    single = all(value is None or isinstance(value, str) for value in chosen[caption])
    texts = [kept[row][0] if single else kept[row] for row in rows]
    names = chosen.column_names
    chosen = chosen.remove_columns(caption).add_column(caption, texts)
    chosen.select_columns(names).to_parquet(str(out))
