"""Statistics measured anew, against their plain mean."""

import pytest
import torch

from ds_net_plus.layers import SwitchableBN
from ds_net_plus.model import check_statistics
from ds_net_plus.recalibration import recalibrate
from tenfold.errors import UserError


def test_recalibrated_statistics_are_the_mean_over_batches(net):
    torch.manual_seed(2)
    shape = (4, net.in_channels, net.image_size, net.image_size)
    batches = [torch.randn(shape) * (k + 1) for k in range(3)]
    seen: dict[str, list[torch.Tensor]] = {}
    names = {bn: name for name, bn in net.named_modules() if isinstance(bn, SwitchableBN)}

    def record(layer, args):
        values = args[0].transpose(0, 1).flatten(1)  # channel by channel
        seen.setdefault(f"{names[layer]}.{args[0].shape[1]}", []).append(
            torch.stack([values.mean(1), values.var(1)])
        )

    counters = {k: v.clone() for k, v in net.state_dict().items() if v.dtype == torch.int64}
    hooks = [bn.register_forward_pre_hook(record) for bn in names]
    assert recalibrate(net, batches) == (3 if names else 0)
    for hook in hooks:
        hook.remove()
    assert not net.training
    for bn, name in names.items():
        for width, layer in zip(bn.widths, bn.aux_bn, strict=True):
            if f"{name}.{width}" not in seen:  # behind one gate in the block only two are in use
                assert getattr(net, "gate_position", "stage") == "in_block"
                continue
            values = seen[f"{name}.{width}"]
            first = values[:: len(values) // 3]  # later visits of a batch do not count
            mean = torch.stack(first).mean(0)
            assert layer.momentum == 0.1
            assert torch.allclose(layer.running_mean, mean[0], rtol=1e-4, atol=1e-5)
            assert torch.allclose(layer.running_var, mean[1], rtol=1e-4, atol=1e-5)
    for key, value in counters.items():
        assert torch.equal(net.state_dict()[key], value)
    check_statistics(net, [*range(net.num_routes), "largest"])
    if names:
        with pytest.raises(UserError, match="at least one batch"):
            recalibrate(net, [])


def test_routes_that_are_left_out_keep_their_statistics(net):
    torch.manual_seed(3)
    images = [torch.randn(4, net.in_channels, net.image_size, net.image_size)]
    last = net.num_routes - 1
    rest = {k: v.clone() for k, v in net.materialize_rest(last).state_dict().items()}
    recalibrate(net, images, routes=[0, 1])
    after = net.materialize_rest(last).state_dict()
    assert all(torch.equal(after[k], v) for k, v in rest.items())
    check_statistics(net, [0, 1, "largest"])
