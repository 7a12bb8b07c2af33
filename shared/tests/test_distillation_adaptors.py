"""The adaptors of the feature losses: published state dicts, shapes, and how they are chained."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tenfold.distillation import ABLoss, FTLoss, ReviewKDLoss
from tenfold.distillation.projectors import ABF, ConvReg, Paraphraser, Translator
from tenfold.distillation.reviewkd import hierarchical_context

REFERENCE = Path(__file__).parent / "reference" / "ickd"


def features(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def published(data: dict[str, np.ndarray]) -> dict[str, Tensor]:
    prefix = "param."
    pairs = ((k.removeprefix(prefix), v) for k, v in data.items() if k.startswith(prefix))
    return {key: torch.from_numpy(value) for key, value in pairs}


def adapted(name: str, data: dict[str, np.ndarray]) -> list[Tensor]:
    """What an adaptor with the published weights says of the inputs in0, in1, ..."""
    inputs = [torch.from_numpy(data[key]) for key in sorted(data) if key.startswith("in")]
    if name == "module_connector_ab":
        loss = ABLoss([(4, 8, 8), (6, 4, 4)], [(6, 8, 8), (6, 4, 4)]).eval()
        loss.load_state_dict(published(data))
        return [connector(x) for connector, x in zip(loss.connectors, inputs, strict=True)]
    modules = {
        "module_convreg_down2": ConvReg((4, 8, 8), (6, 4, 4)),
        "module_translator": Translator(4, 6),
        "module_reviewkd_abf": ABF(4, 5, 6),
    }
    module = modules[name].eval()
    module.load_state_dict(published(data))
    said = module(*inputs)
    return list(said) if isinstance(said, tuple) else [said]


@pytest.mark.parametrize(
    "name",
    ["module_convreg_down2", "module_connector_ab", "module_translator", "module_reviewkd_abf"],
)
def test_adaptor_loads_and_equals_the_published_program(name: str) -> None:
    with np.load(REFERENCE / f"{name}.npz") as file:
        data = dict(file)
    outputs = adapted(name, data)
    assert len(outputs) == sum(key.startswith("out") for key in data)
    for i, output in enumerate(outputs):
        expected = torch.from_numpy(data[f"out{i}"])
        atol = 1e-5 * expected.abs().max().item()
        torch.testing.assert_close(output.detach(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("shape_in", "shape_out", "conv", "kernel"),
    [
        ((2, 8, 8), (3, 4, 4), nn.Conv2d, (3, 3)),
        ((2, 4, 4), (3, 8, 8), nn.ConvTranspose2d, (4, 4)),
        ((2, 7, 7), (3, 4, 4), nn.Conv2d, (4, 4)),
        ((2, 7, 6), (3, 4, 4), nn.Conv2d, (4, 3)),
        ((2, 5, 5), (3, 5, 5), nn.Conv2d, (1, 1)),
        ((2, 8, 7), (3, 4, 4), nn.Conv2d, (3, 3)),  # the height chooses
    ],
)
def test_the_regressor_reaches_the_teachers_shape(
    shape_in: tuple[int, ...], shape_out: tuple[int, ...], conv: type, kernel: tuple[int, int]
) -> None:
    regressor = ConvReg(shape_in, shape_out)
    assert isinstance(regressor.conv, conv)
    assert regressor.conv.kernel_size == kernel
    assert regressor.conv.bias is not None
    said = regressor(torch.randn(2, *shape_in))
    assert said.shape == (2, *shape_out)
    assert said.min() == 0  # it ends in a ReLU


def test_reviewkd_carries_from_deep_to_shallow() -> None:
    torch.manual_seed(0)
    loss = ReviewKDLoss([3, 4, 5], [6, 7, 8]).double().eval()
    student = [features(63, 2, 3, 4, 4), features(64, 2, 4, 2, 2), features(65, 2, 5, 1, 1)]
    teacher = [features(66, 2, 6, 8, 8), features(67, 2, 7, 2, 2), features(68, 2, 8, 1, 1)]
    deep, middle, shallow = loss.abfs
    said, carried = deep(student[2])
    total = ((said - teacher[2]) ** 2).mean()
    x = middle.conv1(student[1])
    weight = torch.sigmoid(middle.att_conv[0](torch.cat([x, carried.expand_as(x)], 1)))
    x = x * weight[:, :1] + carried * weight[:, 1:]
    total = total + hierarchical_context(middle.conv2(x), teacher[1])
    y = shallow.conv1(student[0])
    carried = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    weight = torch.sigmoid(shallow.att_conv[0](torch.cat([y, carried], 1)))
    y = y * weight[:, :1] + carried * weight[:, 1:]
    y = y.repeat_interleave(2, 2).repeat_interleave(2, 3)  # the teacher's map is 8x8
    total = total + hierarchical_context(shallow.conv2(y), teacher[0])
    torch.testing.assert_close(loss(student, teacher), total)


def test_reviewkd_carries_at_most_512_channels() -> None:
    with torch.device("meta"):
        loss = ReviewKDLoss([16, 2048], [16, 4])
        assert [abf.get_parameter("conv1.0.weight").shape[0] for abf in loss.abfs] == [512, 512]
        loss = ReviewKDLoss([16, 64], [16, 4])
    assert [abf.get_parameter("conv1.0.weight").shape[0] for abf in loss.abfs] == [64, 64]
    assert [key for key in loss.state_dict() if "att_conv" in key] == [
        "abfs.1.att_conv.0.weight",
        "abfs.1.att_conv.0.bias",
    ]


def convolved(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """A 3x3 convolution that keeps the size, as nine shifted products."""
    height, width = x.shape[2:]
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    result = np.zeros((len(x), len(weight), height, width)) + bias[:, None, None]
    for i, j in np.ndindex(3, 3):
        shifted = padded[:, :, i : i + height, j : j + width]
        result += np.einsum("oc,bchw->bohw", weight[:, :, i, j], shifted)
    return result


def test_the_paraphraser_is_an_autoencoder_apart() -> None:
    torch.manual_seed(0)
    loss = FTLoss(3, 6).double()
    t = features(74, 2, 6, 4, 4)
    shapes = {k: tuple(v.shape[:2]) for k, v in loss.paraphraser.state_dict().items() if v.ndim > 1}
    assert shapes == {
        "encoder.0.weight": (6, 6),
        "encoder.3.weight": (3, 6),
        "encoder.6.weight": (3, 3),
        "decoder.0.weight": (3, 3),
        "decoder.3.weight": (3, 6),  # transposed: (in, out)
        "decoder.6.weight": (6, 6),
    }
    code = t.numpy()
    for i in (0, 3, 6):
        conv = loss.paraphraser.encoder[i]
        weight, bias = (conv.get_parameter(k).detach().numpy() for k in ("weight", "bias"))
        code = convolved(code, weight, bias)
        code = np.where(code > 0, code, 0.1 * code)
    torch.testing.assert_close(loss.paraphraser.factor(t).detach(), torch.from_numpy(code))
    error = loss.reconstruction(t)
    torch.testing.assert_close(error, ((loss.paraphraser(t) - t) ** 2).mean())
    error.backward()
    assert all(parameter.grad is not None for parameter in loss.paraphraser.parameters())
    assert all(parameter.grad is None for parameter in loss.translator.parameters())


def test_transfer_leaves_the_paraphraser_as_it_is() -> None:
    loss = FTLoss(3, 6)
    loss(torch.randn(2, 3, 4, 4), torch.randn(2, 6, 8, 8)).backward()
    assert all(parameter.grad is None for parameter in loss.paraphraser.parameters())
    assert all(parameter.grad is not None for parameter in loss.translator.parameters())
    with pytest.raises(ValueError, match=r"a rate of 0\.1 leaves no factor of 6 channels"):
        Paraphraser(6, 0.1)
