"""Model folders by name: on the disk, from the Hub, and what is told where there is none."""

import pytest

from tenfold.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from tenfold.errors import UserError
from tenfold.hub import is_hub_id, model_folder


def test_a_folder_is_taken_as_it_is(tmp_path) -> None:
    assert model_folder(tmp_path, instead="") == tmp_path
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"a file, no model folder.*: open it otherwise"):
        model_folder(tmp_path / "file", instead="open it otherwise")
    with pytest.raises(UserError, match=r"no such model folder.*user/name"):
        model_folder(tmp_path / "none", instead="")


def test_names_of_the_hub() -> None:
    assert [is_hub_id(name) for name in ("a/b", "a-1.x/b_2", "a", "a/b/c", "/a/b")] == [
        *(True, True, False, False, False)
    ]


def test_the_hub_is_asked_for_what_is_needed(tmp_path, monkeypatch) -> None:
    asked = {}

    def download(name, **options):
        asked.update(name=name, **options)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(UserError, match=f"{CONFIG_FILE} is missing in the repository"):
        model_folder("me/mine", instead="")
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        (tmp_path / file).touch()
    assert model_folder("me/mine", instead="", further=["x.json"], revision="v1") == tmp_path
    wanted = [CONFIG_FILE, WEIGHTS_FILE, "x.json"]
    assert asked == {"name": "me/mine", "allow_patterns": wanted, "revision": "v1"}


def test_a_hub_out_of_reach_is_told_in_a_line(monkeypatch) -> None:
    def refuse(*_, **__):
        raise OSError("no route to host.\nand so on")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(UserError, match=r"the Hub gave none: no route to host .*check the name"):
        model_folder("me/mine", instead="")
