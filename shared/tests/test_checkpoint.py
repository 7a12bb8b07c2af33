"""Checkpoints: what loads, what is refused, what survives a kill."""

import argparse
import json
import os
import pickle
import signal
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from tenfold.checkpoint import (
    AtomicCheckpointIO,
    atomic_file,
    compare_keys,
    extract_state_dict,
    load_model_files,
    load_state,
    rename_keys,
    save_model,
    strip_prefix,
)
from tenfold.errors import UserError

needs_fork = pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere a process with threads cannot fork safely"
)


def weights() -> dict[str, Tensor]:
    return {"conv.weight": torch.randn(4, 3, 3, 3), "bn.num_batches_tracked": torch.tensor(7)}


def official(state: dict[str, Tensor], ema: dict[str, Tensor]) -> dict[str, object]:
    """The layout of the file that the authors of DS-Net published."""
    return {
        "epoch": 3,
        "arch": "slimmable_mbnet_v1_bn_uniform",
        "state_dict": {f"module.{k}": v for k, v in state.items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "args": argparse.Namespace(lr=0.1, model="slimmable", mean=(0.5, 0.5), resume=None),
        "version": 2,
        "state_dict_ema": {f"module.{k}": v for k, v in ema.items()},
        "metric": 74.6,
    }


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert list(a) == list(b)
    for key in a:
        assert a[key].dtype == b[key].dtype
        assert torch.equal(a[key], b[key]), key


# Loading


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["released.pth.tar", "weights.pt", "last.ckpt"])
def test_official_file_loads_and_gives_its_average(tmp_path: Path, zipped: bool, name: str) -> None:
    state, ema = weights(), weights()
    path = tmp_path / name
    torch.save(official(state, ema), path, _use_new_zipfile_serialization=zipped)
    raw = load_state(path)
    assert raw["args"].model == "slimmable"
    assert raw["metric"] == 74.6
    found, which = extract_state_dict(raw)
    assert which == "state_dict_ema"
    assert_same(strip_prefix(found, "module."), ema)
    found, which = extract_state_dict(raw, prefer=("state_dict",))
    assert which == "state_dict"
    assert_same(strip_prefix(found), state)


def test_allowing_namespace_is_not_left_behind(tmp_path: Path) -> None:
    torch.save(official(weights(), weights()), tmp_path / "a.pt")
    load_state(tmp_path / "a.pt")
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_safetensors_and_bare_state_dicts_load(tmp_path: Path) -> None:
    state = weights()
    save_model(tmp_path, state, {})
    torch.save(state, tmp_path / "bare.pth")
    for path in (tmp_path / "model.safetensors", tmp_path / "bare.pth"):
        found, which = extract_state_dict(load_state(path))
        assert which == ""
        assert sorted(found) == sorted(state)
        assert all(torch.equal(found[k], state[k]) for k in state)


def test_missing_average_falls_through(tmp_path: Path) -> None:
    state = weights()
    found, which = extract_state_dict({"state_dict_ema": None, "model": state, "epoch": 1})
    assert which == "model"
    assert_same(found, state)
    with pytest.raises(UserError, match=r"no weights under .*keys: epoch, args"):
        extract_state_dict({"epoch": 1, "args": {}})


class Evil:
    def __reduce__(self):
        return os.system, ("touch /nonexistent/evil",)


def cut_zip(path: Path) -> None:
    torch.save(weights(), path)
    path.write_bytes(path.read_bytes()[:-200])


def cut_legacy(path: Path) -> None:
    torch.save(weights(), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-200])


def cut_safetensors(path: Path) -> None:
    save_model(path.parent, weights(), {})
    path.write_bytes((path.parent / "model.safetensors").read_bytes()[:-8])


def garble(path: Path) -> None:
    torch.save(weights(), path)
    data = bytearray(path.read_bytes())
    start = data.index(b"data.pkl") + 8
    data[start : start + 200] = bytes(200)
    path.write_bytes(data)


def bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        archive.writestr("archive/data/0", bytes(10_000_000))


BAD_FILES = {
    "absent.pth": (lambda path: None, "no such checkpoint"),
    "folder.pth": (lambda path: path.mkdir(), "a folder, not a checkpoint"),
    "empty.pth": (lambda path: path.touch(), "an empty file"),
    "page.pth": (lambda path: path.write_text("\n<!DOCTYPE html><p>404"), "a web page"),
    "page.safetensors": (lambda path: path.write_text("<html><p>404"), "a web page"),
    "pointer.pth": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
        "a Git LFS pointer",
    ),
    "cut.pth": (cut_zip, "the checkpoint is cut short"),
    "cut.tar": (cut_legacy, "damaged"),
    "cut.safetensors": (cut_safetensors, "the checkpoint is damaged"),
    "garbled.pth": (garble, "damaged"),
    "bomb.pth": (bomb, "a compressed archive"),
    "noise.pth": (lambda path: path.write_bytes(bytes(range(256)) * 40), "damaged"),
    "noise.safetensors": (lambda path: path.write_bytes(bytes(range(256)) * 40), "damaged"),
    "text.pth": (lambda path: path.write_text("hello " * 100), "damaged"),
    "evil.pth": (lambda path: torch.save({"x": Evil()}, path), "would run code, "),
    "whole.pth": (lambda path: torch.save(nn.Linear(1, 1), path), "would run code, torch.nn"),
    "list.pth": (lambda path: torch.save([1], path), "a list, not a dict"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_one_clear_line(tmp_path: Path, name: str) -> None:
    make, message = BAD_FILES[name]
    path = tmp_path / name
    make(path)
    with pytest.raises(UserError) as caught:
        load_state(path)
    line = str(caught.value)
    assert message in line
    assert name in line
    assert "\n" not in line


def test_every_truncation_of_a_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"w": torch.arange(40.0)}, path)
    whole = path.read_bytes()
    for length in range(1, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError):
            load_state(path)


# Keys


def test_rename_applies_all_rules_in_order() -> None:
    state = {"backbone.0.weight": torch.ones(1), "fc.bias": torch.zeros(1)}
    renamed = rename_keys(state, [(r"^backbone\.(\d+)", r"stages.\1"), (r"^stages", "net.stages")])
    assert list(renamed) == ["net.stages.0.weight", "fc.bias"]
    assert renamed["fc.bias"] is state["fc.bias"]
    assert list(state) == ["backbone.0.weight", "fc.bias"]
    with pytest.raises(ValueError, match=r"'a\.w' and 'b\.w' would both be called 'w'"):
        rename_keys({"a.w": torch.ones(1), "b.w": torch.ones(1)}, [(r"^[ab]\.", "")])


def test_strip_prefix_takes_it_off_the_front_only() -> None:
    state = {"module.a": torch.ones(1), "b.module.c": torch.ones(1), "modules.d": torch.ones(1)}
    assert list(strip_prefix(state)) == ["a", "b.module.c", "modules.d"]
    # The dot is a dot and not any character.
    assert list(strip_prefix({"moduleXa": torch.ones(1)})) == ["moduleXa"]


def test_key_report_agrees_with_strict_loading() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    state = dict(model.state_dict())
    assert compare_keys(state, model.state_dict()).fits
    assert compare_keys(state, model.state_dict()).summary() == "all keys fit"

    del state["1.running_mean"]
    state |= {f"extra.{i}": torch.zeros(1) for i in range(5)}
    state["0.weight"] = torch.zeros(2, 4)
    report = compare_keys(state, model.state_dict())
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        told = str(error)
    else:
        pytest.fail("strict loading took a state that does not fit")
    assert all(key in told for key in (*report.missing, *report.unexpected))
    assert report.missing == ("1.running_mean",)
    assert report.unexpected == tuple(f"extra.{i}" for i in range(5))
    assert report.mismatched == (("0.weight", (2, 4), (2, 3)),)
    assert report.summary() == (
        "1 missing (1.running_mean); 5 unexpected (extra.0, extra.1, extra.2, ...); "
        "1 misshapen (0.weight: (2, 4) instead of (2, 3))"
    )


# Model folders


def test_model_folder_keeps_every_bit(tmp_path: Path) -> None:
    base = torch.randn(6, 4)
    state = {
        "tied.a": base,
        "tied.b": base,
        "view": base[::2, 1:].t(),
        "half": torch.randn(3).bfloat16(),
        "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
        "count": torch.tensor(12345678901),
        "flag": torch.tensor([True, False]),
        "none": torch.empty(0, 3),
        "double": torch.randn(2, dtype=torch.float64).requires_grad_(),
    }
    config = {"widths": [1, 2], "name": "tiny", "rate": 0.1, "gate": None}
    save_model(tmp_path / "new" / "folder", state, config)
    found, found_config = load_model_files(tmp_path / "new" / "folder")
    assert found_config == config
    assert sorted(found) == sorted(state)
    for key, tensor in state.items():
        assert found[key].dtype == tensor.dtype
        assert found[key].shape == tensor.shape
        data = tensor.detach().contiguous().flatten().view(torch.uint8)
        assert torch.equal(found[key].flatten().view(torch.uint8), data), key
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


class Net(nn.Module, PyTorchModelHubMixin):
    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 3)


def test_hub_mixin_and_model_folders_understand_each_other(tmp_path: Path) -> None:
    net = Net(width=5)
    save_model(tmp_path / "ours", net.state_dict(), {"width": 5})
    theirs = Net.from_pretrained(tmp_path / "ours")
    assert_same(dict(theirs.state_dict()), dict(net.state_dict()))

    net.save_pretrained(tmp_path / "theirs")
    state, config = load_model_files(tmp_path / "theirs")
    assert config == {"width": 5}
    Net(**config).load_state_dict(state)


@pytest.mark.parametrize("config", [{"net": object()}, {"rate": float("nan")}])
def test_config_that_is_no_json_leaves_nothing(tmp_path: Path, config: dict[str, object]) -> None:
    with pytest.raises((TypeError, ValueError)):
        save_model(tmp_path / "model", weights(), config)
    assert not (tmp_path / "model").exists()


def test_bad_model_folder_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json is missing"):
        load_model_files(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"model\.safetensors is missing"):
        load_model_files(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="not valid JSON"):
        load_model_files(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="not a JSON object"):
        load_model_files(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        load_model_files(tmp_path)


def test_config_is_readable_text(tmp_path: Path) -> None:
    save_model(tmp_path, weights(), {"name": "größe"})
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) == {"name": "größe"}


# Atomic writing


def test_failed_save_leaves_the_former_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run" / "last.ckpt"
    plugin = AtomicCheckpointIO()
    plugin.save_checkpoint({"step": 1}, path)
    former = path.read_bytes()

    def half(checkpoint, file) -> None:
        file.write(former[: len(former) // 2])
        file.flush()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(KeyboardInterrupt):
            plugin.save_checkpoint({"step": 2}, path)
    assert path.read_bytes() == former
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]
    plugin.save_checkpoint({"step": 2}, path)
    assert plugin.load_checkpoint(path) == {"step": 2}


def kill_while(child, *, wait: float = 0.0) -> None:
    """Run ``child(tell)`` in another process and SIGKILL it after it has told, and ``wait``."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            child(lambda: os.write(write, b"x"))
        finally:
            os._exit(1)
    os.close(write)  # so that reading ends if the child dies early
    try:
        assert os.read(read, 1) == b"x"
        time.sleep(wait)
    finally:
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        os.close(read)
    assert os.WTERMSIG(status) == signal.SIGKILL


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_half_way_through_the_former_checkpoint_stays(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    plugin = AtomicCheckpointIO()
    plugin.save_checkpoint({"step": 1, "w": torch.ones(1000)}, path)

    def save_and_hang(tell) -> None:
        with atomic_file(path) as file:
            file.write(bytes(4_000_000))
            file.flush()
            tell()
            time.sleep(60)

    kill_while(save_and_hang)
    leftovers = [p for p in tmp_path.iterdir() if p != path]
    assert [p.stat().st_size for p in leftovers] == [4_000_000]
    assert load_state(path)["step"] == 1
    # The next save tidies up.
    plugin.save_checkpoint({"step": 2}, path)
    assert list(tmp_path.iterdir()) == [path]


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_at_any_moment_a_whole_checkpoint_is_there(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    plugin = AtomicCheckpointIO()
    step = 0
    plugin.save_checkpoint({"step": step, "w": torch.full((20_000,), step)}, path)

    def save_for_ever(tell) -> None:
        for n in range(step + 1, 10**9):
            plugin.save_checkpoint({"step": n, "w": torch.full((20_000,), n)}, path)
            tell()

    for wait in (0.0, 0.003, 0.011, 0.017, 0.031):
        kill_while(save_for_ever, wait=wait)
        found = load_state(path)
        assert found["step"] > step
        assert torch.equal(found["w"], torch.full((20_000,), found["step"]))
        step = found["step"]


def test_atomic_file_is_flushed_before_it_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, events = tmp_path / "a.bin", []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("sync"), fsync(fd)))
    monkeypatch.setattr(Path, "replace", lambda a, b: (events.append("rename"), replace(a, b))[1])
    with atomic_file(path) as file:
        file.write(b"content")
        assert not path.exists()
    assert path.read_bytes() == b"content"
    assert events == ["sync", "rename", "sync"]  # the file, the new name, the folder


def test_atomic_files_with_brackets_and_two_writers(tmp_path: Path) -> None:
    path = tmp_path / "epoch=[1]*.ckpt"
    for content in (b"one", b"two"):
        with atomic_file(path) as file:
            file.write(content)
    threads = [
        threading.Thread(target=_write, args=(tmp_path / f"{i}", b"%d" % i)) for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() == b"two"
    assert [(tmp_path / f"{i}").read_bytes() for i in range(4)] == [b"0", b"1", b"2", b"3"]
    assert len(list(tmp_path.iterdir())) == 5


def _write(path: Path, content: bytes) -> None:
    with atomic_file(path) as file:
        file.write(content)


def test_lightning_saves_through_the_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning.pytorch import Trainer
    from lightning.pytorch.demos.boring_classes import BoringModel

    plugin = AtomicCheckpointIO()
    trainer = Trainer(
        default_root_dir=tmp_path,
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        plugins=[plugin],
    )
    model = BoringModel()
    trainer.fit(model)
    assert trainer.strategy.checkpoint_io is plugin
    renamed: list[str] = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda a, b: (renamed.append(b.name), replace(a, b))[1])
    trainer.save_checkpoint(tmp_path / "deep" / "end.ckpt")
    assert renamed == ["end.ckpt"]
    state, which = extract_state_dict(load_state(tmp_path / "deep" / "end.ckpt"))
    assert which == "state_dict"
    assert_same(state, dict(model.state_dict()))


def test_storage_options_are_refused_as_by_lightning(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="storage_options"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "a.ckpt", storage_options={})


@pytest.mark.parametrize("home", ["numpy._core.multiarray", "numpy.core.multiarray"])
def test_a_numpy_number_inside_is_read(tmp_path: Path, home: str) -> None:
    # NumPy 1 wrote the second name, and many published files are that old
    path = tmp_path / "best.pth.tar"
    saved = {"state_dict": {"w": torch.ones(2)}, "best_pred": np.float64(0.75)}
    torch.save(saved, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    assert b"numpy._core.multiarray" in content
    path.write_bytes(content.replace(b"numpy._core.multiarray", home.encode()))
    assert load_state(path)["best_pred"] == 0.75
