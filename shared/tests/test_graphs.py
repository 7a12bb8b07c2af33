"""Traced networks as files; ONNX itself is met in the packages' tests of their exports."""

import pytest
import torch
from torch import nn

from tenfold.errors import UserError
from tenfold.graphs import check_graph_format, open_graph, write_graph


class Two(nn.Module):
    """Two outputs."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * 2, x.sum(1)


def test_an_exported_program_answers_for_any_batch(tmp_path) -> None:
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(Two(), (torch.ones(2, 3),), dynamic_shapes=shapes)
    write_graph(program, tmp_path / "g.pt2", "pt2", ["x"], ["a", "b"])
    x = torch.arange(12.0).view(4, 3)
    doubled, summed = open_graph(tmp_path / "g.pt2", "pt2")(x)
    assert torch.equal(doubled, 2 * x)
    assert torch.equal(summed, x.sum(1))


def test_what_a_format_needs_is_told(monkeypatch) -> None:
    with pytest.raises(UserError, match=r"unknown format 'tflite' of a graph.*choose onnx, pt2"):
        check_graph_format("tflite", "mine")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_graph_format("pt2", "mine")
    with pytest.raises(UserError, match=r'needs onnx, onnxscript, onnxruntime.*"mine\[export\]"'):
        check_graph_format("onnx", "mine")
