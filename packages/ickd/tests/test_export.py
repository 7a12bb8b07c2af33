"""Exported files answer as the student does, opened by the runtimes that people use."""

import sys
import types
from pathlib import Path

import onnxruntime
import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from ickd import export as exporting
from ickd.commands import export
from ickd.commands.common import open_saved
from ickd.export import Exported, export_graph
from ickd.hub import save_pretrained
from ickd.module import Distiller
from ickd.networks import Input, Network, open_network
from tenfold.cli import App, Command
from tenfold.errors import UserError

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
STUDENT, SIZE = "embedded:gratings-student", 16
COMMANDS = {"export": Command("ickd.commands:export", "")}
app = App("ickd", "ickd", "", commands=COMMANDS)


def pixels(count: int, size: int) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(count))


def run(path: Path, x: Tensor) -> Tensor:
    """A file's answer, without the package's own reader."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(x)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.as_tensor(session.run(None, {"pixels": x.numpy()})[0])


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Largest deviation relative to the largest entry."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def unsettle(net: nn.Module) -> None:
    """Batch norms whose statistics and weights are not those of a new network."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)  # pyright: ignore[reportArgumentType]
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # pyright: ignore[reportArgumentType]
            nn.init.uniform_(module.weight, 0.5, 1.5)


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory) -> Path:
    """A checkpoint of Lightning, with a teacher and an embedding beside the student."""
    torch.manual_seed(3)
    options = {"mean": list(MEAN), "std": list(STD)}
    teacher = "embedded:gratings-teacher"
    module = Distiller(STUDENT, teacher, losses="ickd", num_classes=7, student_options=options)
    unsettle(module.net)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.strategy.connect(module)
    path = tmp_path_factory.mktemp("run") / "last.ckpt"
    trainer.save_checkpoint(path)
    return path


def student_of(ckpt: Path) -> nn.Module:
    """The student as a function of pixels, put together by hand."""
    state = torch.load(ckpt, weights_only=False)["state_dict"]
    net = open_network(STUDENT, num_classes=7).net.eval()
    prefix = "student.net."
    net.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if prefix in k})
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))

    class Normalised(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return net((x - mean) / std)

    return Normalised()


@pytest.mark.parametrize(("format", "limit"), [("onnx", "0.0001"), ("pt2", "1e-05")])
@torch.no_grad()
def test_the_graph_equals_the_student_on_raw_pixels(ckpt, tmp_path, format, limit, capsys):
    out = tmp_path / "new" / f"small.{format}"
    assert app.main(["export", str(ckpt), "--format", format, "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert f"{STUDENT}: pixels in 0..1 (batch, 3, 16, 16) -> logits" in told
    assert f"(limit {limit}) of the largest output at batch sizes 1, 3" in told
    student = student_of(ckpt)
    for count in (1, 2, 5):
        x = pixels(count, SIZE)
        close(run(out, x), student(x))
    assert [path.name for path in out.parent.iterdir()] == [out.name]


@torch.no_grad()
def test_a_model_folder_opens_again(ckpt, capsys):
    assert app.main(["export", str(ckpt), "--format", "safetensors"]) == 0
    folder = ckpt.with_name("student")
    assert f"wrote {folder}: differs by 0.0e+00" in capsys.readouterr().out
    opened = open_saved(folder)
    assert opened.network.name == STUDENT
    assert opened.network.options == {"num_classes": 7}
    assert opened.network.expects == Input(MEAN, STD, None)
    x = pixels(3, SIZE)
    assert torch.equal(opened.network(x), student_of(ckpt)(x))
    names = {path.name for path in folder.iterdir()}
    assert names == {"model.safetensors", "config.json"}


def test_a_folder_of_a_run_and_another_size(ckpt, capsys):
    arguments = ["--format", "pt2", "--image-size", "24", "--check", "false"]
    assert app.main(["export", str(ckpt.parent), *arguments]) == 0
    told = capsys.readouterr().out
    out = ckpt.with_name("student.pt2")
    assert "(batch, 3, 24, 24)" in told
    assert f"wrote {out}: not compared with the network" in told
    with torch.no_grad():
        close(run(out, pixels(2, 24)), student_of(ckpt)(pixels(2, 24)))


def resized(network: Network, x: Tensor, size: int) -> Tensor:
    """What the network inside says of pixels that are resized and normalised."""
    x = nn.functional.interpolate(x, (size, size), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in network.expects[:2])
    return network.net((x - mean) / std)


@torch.no_grad()
def test_the_resolution_is_part_of_the_graph(tmp_path):
    torch.manual_seed(0)
    network = open_network(STUDENT, image_size=SIZE).eval()
    unsettle(network.net)
    x = pixels(3, 12)
    done = export_graph(network, tmp_path / "g.pt2", "pt2", 12)
    assert done.image_size == 12
    close(run(done.path, x), resized(network, x, SIZE))


@torch.no_grad()
def test_logits_of_every_pixel_and_what_the_graph_says(tmp_path):
    network = open_network("embedded:blobs-student", image_size=24).eval()
    done = export_graph(network, tmp_path / "b.onnx", "onnx", 20)
    x = pixels(3, 20)
    said = resized(network, x, 24)
    said = nn.functional.interpolate(said, (20, 20), mode="bilinear", align_corners=True)
    close(run(done.path, x), said)
    session = onnxruntime.InferenceSession(str(done.path), providers=["CPUExecutionProvider"])
    (into,), (out,) = session.get_inputs(), session.get_outputs()
    assert (into.name, into.shape[1:], into.type) == ("pixels", [3, 20, 20], "tensor(float)")
    assert isinstance(into.shape[0], str)  # a free dimension has a name
    assert (out.name, out.shape[1:]) == ("logits", [6, 20, 20])


def test_the_network_is_left_alone(tmp_path):
    network = open_network(STUDENT).double().train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    export_graph(network, tmp_path / "g.pt2", "pt2", 16)
    assert network.training
    assert all(p.requires_grad and p.dtype == torch.float64 for p in network.parameters())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_a_file_that_answers_differently_does_not_take_its_place(tmp_path, monkeypatch):
    network, path = open_network(STUDENT).eval(), tmp_path / "g.pt2"
    path.write_text("the former one")
    honest = exporting._trace

    def corrupt(network: Network, size: int):
        biased = open_network(STUDENT).eval()
        biased.load_state_dict(network.state_dict())
        biased.net.fc.bias.data += 1e-2
        return honest(biased, size)

    monkeypatch.setattr(exporting, "_trace", corrupt)
    with pytest.raises(RuntimeError, match="the pt2 file differs from the network by"):
        export_graph(network, path, "pt2", 16)
    assert path.read_text() == "the former one"
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_exported(tmp_path, monkeypatch):
    network = open_network(STUDENT)
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"onnx, onnxscript, onnxruntime.*ickd\[export\]"):
            export_graph(network, tmp_path / "g.onnx")

    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return y if y.sum() > 0 else -y

    moody = Network(Moody(), "moody", tap_names=["conv"])
    with pytest.raises(UserError, match=r"cannot trace moody on 8x8 pixels.*safetensors"):
        export_graph(moody, tmp_path / "m.pt2", "pt2", 8)
    assert list(tmp_path.iterdir()) == []


def test_lines_for_bad_input(ckpt, tmp_path, capsys):
    for arguments, line in [
        (["nowhere.ckpt"], "error: no such checkpoint (nowhere.ckpt)"),
        ([str(ckpt), "--out", "x.bin"], "error: --out must end in .onnx (x.bin)"),
        ([str(ckpt), "--image-size", "0"], "error: --image-size must be 1 or more, got 0"),
        ([str(tmp_path)], "error: a folder without a network"),
        ([str(ckpt), "--format", "tflite"], "error: --format: expected"),
    ]:
        assert app.main(["export", *arguments]) == 2
        assert capsys.readouterr().err.startswith(line)


def test_a_network_of_ones_own(tmp_path, monkeypatch):
    """A module by its import path is exported like any other."""
    mine = types.ModuleType("mine")

    def build(num_classes: int = 2) -> nn.Module:
        pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), pool, nn.Linear(4, num_classes))

    mine.build = build  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "mine", mine)
    network = open_network("python:mine:build", num_classes=5).eval()
    save_pretrained(network, tmp_path)
    export(tmp_path, format="pt2", image_size=10)
    x = pixels(2, 10)
    with torch.no_grad():
        close(run(tmp_path / "student.pt2", x), network(x))


def test_an_exported_file_prints_as_one_line():
    item = Exported("onnx", Path("s.onnx"), 32, 2.04e-7)
    told = "differs by 2.0e-07 (limit 0.0001) of the largest output at batch sizes 1, 3"
    assert str(item) == f"s.onnx: {told}"
