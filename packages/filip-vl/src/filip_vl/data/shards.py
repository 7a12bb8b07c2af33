"""WebDataset shards: tar files in which KEY.jpg lies beside KEY.txt and KEY.json."""

import glob
import json
import logging
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext, tarfile_samples

from filip_vl.data.decoding import TarMember
from filip_vl.data.jsonl import CAPTION_KEY, captions_of
from filip_vl.data.pairs import Pairs, gather
from tenfold.errors import UserError
from tenfold.progress import track

log = logging.getLogger(__name__)

IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp")
TEXT_MEMBERS = ("txt", "json")
SIZES_FILE = "sizes.json"
"""Beside shards: the number of samples of each by its name, as open_clip writes it."""


class ShardSample(NamedTuple):
    """One sample of a shard, not decoded.

    Attributes:
        key: name of its members, without what follows the first point.
        image: bytes of the image file.
        captions: its texts.
    """

    key: str
    image: bytes
    captions: list[str]


def expand_shards(shards: str | Sequence[str], root: Path | None = None) -> list[str]:
    """The shards that a pattern names, in its order.

    Args:
        shards: names with brace ranges, as in `{00000..00331}.tar`, or wild cards, several of them
            joined by `::`; or a list of names. Addresses (`pipe:...`, `https:...`) stay as they
            are.
        root: folder that names start from; what is not there is looked for in the current one.

    Raises:
        UserError: a name that no file has.
    """
    names = expand_urls(shards) if isinstance(shards, str) else list(shards)
    found: list[str] = []
    for name in names:
        if is_remote(name):
            found.append(name)
            continue
        places = places_of(name, root)
        matches = (sorted(glob.glob(x)) if glob.has_magic(x) else [x] for x in places)
        there = next((files for files in matches if files and Path(files[0]).is_file()), None)
        if there is None:
            fix = "look at the range of the shards"
            raise UserError("no such shard", where=" or ".join(places), fix=fix)
        found += there
    return found


def places_of(name: str, root: Path | None) -> list[str]:
    """Where a name is looked for: in the root, then in the current folder."""
    return [*dict.fromkeys(str(folder / name) for folder in (root or Path(), Path()))]


def is_remote(shard: str) -> bool:
    """Whether a shard is an address that can only be read from its beginning to its end."""
    return shard.startswith("pipe:") or "://" in shard


def read_samples(shard: str, broken: Callable[[str, str], None]) -> Iterator[ShardSample | None]:
    """The samples of a shard, from its beginning to its end; None where one has no usable text.

    Args:
        shard: a file or an address.
        broken: told (key, reason) of what cannot be used; the key is "" where the tar file itself
            is damaged, which ends the shard.
    """

    def settle(error: Exception) -> bool:
        broken("", f"{type(error).__name__}: {error.args[0] if error.args else ''}")
        return True

    wanted = (*IMAGE_MEMBERS, *TEXT_MEMBERS)

    def select(name: str) -> bool:
        return (base_plus_ext(name)[1] or "").lower() in wanted

    for members in tarfile_samples([{"url": shard}], handler=settle, select_files=select):
        image = next((members[suffix] for suffix in IMAGE_MEMBERS if suffix in members), None)
        if image is None:
            continue
        key = members["__key__"]
        texts = {suffix: members[suffix] for suffix in TEXT_MEMBERS if suffix in members}
        try:
            yield ShardSample(key, image, _captions(texts, f"{shard}/{key}"))
        except (UserError, ValueError) as error:
            broken(key, str(error))
            yield None


def _captions(texts: Mapping[str, bytes], where: str) -> list[str]:
    """`captions` of KEY.json, else KEY.txt, else `caption` of KEY.json.

    Raises:
        UserError: neither a text nor texts in KEY.json.
        ValueError: no JSON, or no UTF-8.
    """
    content = json.loads(texts["json"]) if "json" in texts else {}
    if not isinstance(content, dict):
        raise UserError("no JSON object", where=f"{where}.json")
    if "txt" in texts:
        content = {CAPTION_KEY: texts["txt"].decode("utf-8").strip()} | {
            key: value for key, value in content.items() if key != CAPTION_KEY
        }
    return captions_of(content, CAPTION_KEY, f"{where}.json")


def read_shards(shards: Sequence[str]) -> Pairs:
    """All samples of shards, by their place in the tar files: images are read when wanted.

    A sample whose text is damaged has no caption; how many there are is logged.

    Args:
        shards: uncompressed tar files.

    Raises:
        UserError: a file that is none, or ends too early, or no image at all.
    """
    damaged: list[str] = []
    pairs = gather(_indexed(shards, damaged))
    if damaged:
        log.warning("%d samples have no readable caption, first %s", len(damaged), damaged[0])
    if not len(pairs):
        raise UserError("no image in the shards", where=shards[0] if shards else None)
    return pairs


def _indexed(
    shards: Sequence[str], damaged: list[str]
) -> Iterator[tuple[TarMember, list[str], str]]:
    for shard in track(shards, label="reading shards"):
        with open_shard(shard) as tar:
            for key, members in grouped_members(tar):
                image = _image_of(members)
                if image is None:
                    continue
                texts = {name: members[name] for name in TEXT_MEMBERS if name in members}
                content = {name: _read(tar, info) for name, info in texts.items()}
                try:
                    captions = _captions(content, f"{shard}/{key}")
                except (UserError, ValueError) as error:
                    damaged.append(f"{shard}/{key}: {error}")
                    captions = []
                place = TarMember(shard, image.name, image.offset_data, image.size)
                yield place, captions, f"{Path(shard).name}/{key}"


def count_samples(shards: Sequence[str]) -> list[int]:
    """How many images every shard holds.

    Taken from `sizes.json` beside the shards, or img2dataset's `NAME_stats.json`, where they are
    there: else the headers of the tar files are read, a second for some ten thousand members.

    Raises:
        UserError: an address, or a file that is no tar file.
    """
    known: dict[Path, dict[str, int]] = {}
    return [_count(shard, known) for shard in track(shards, label="counting samples of shards")]


def _count(shard: str, known: dict[Path, dict[str, int]]) -> int:
    if is_remote(shard):
        fix = "say how many samples an epoch has: --data.train_size"
        raise UserError("samples behind an address cannot be counted", where=shard, fix=fix)
    path = Path(shard)
    sizes = known.setdefault(path.parent, _json(path.parent / SIZES_FILE))
    successes = _json(path.with_name(f"{path.stem}_stats.json")).get("successes")
    size = sizes.get(path.name, successes)
    if isinstance(size, int):
        return size
    with open_shard(shard) as tar:
        return sum(_image_of(members) is not None for _, members in grouped_members(tar))


def _json(file: Path) -> dict[str, int]:
    try:
        content = json.loads(file.read_text()) if file.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"not the sizes of shards: {error}", where=str(file)) from error
    return content if isinstance(content, dict) else {}


def open_shard(shard: str) -> tarfile.TarFile:
    """A shard that can be read in any order.

    Raises:
        UserError: no uncompressed tar file.
    """
    try:
        return tarfile.open(shard, "r:")
    except (OSError, tarfile.TarError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"not an uncompressed tar file: {why}", where=shard) from error


def grouped_members(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Members of one key after the other, by their suffixes.

    Raises:
        UserError: the file ends too early.
    """
    named = ((base_plus_ext(info.name), info) for info in tar if info.isreg())
    try:
        for key, group in groupby(named, key=lambda entry: entry[0][0]):
            members = {suffix.lower(): info for (_, suffix), info in group if suffix}
            if key is not None:
                yield key, members
        _check_end(tar)
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"damaged tar file: {error}", where=str(tar.name)) from error


def _check_end(tar: tarfile.TarFile) -> None:
    """Tarfile takes half a header for the end of the file."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError("unexpected end of data")


def _image_of(members: Mapping[str, tarfile.TarInfo]) -> tarfile.TarInfo | None:
    return next((members[suffix] for suffix in IMAGE_MEMBERS if suffix in members), None)


def _read(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(info)
    return b"" if file is None else file.read()
