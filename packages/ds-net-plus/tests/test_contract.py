"""The contract of every package (`tenfold.testing`), kept by both training stages."""

import torch

from ds_net_plus.data import ImageData
from ds_net_plus.model import DynamicNet
from ds_net_plus.module import GateModule, NetModule, SupernetModule
from ds_net_plus.recalibrate import recalibrate
from tenfold.testing import PackageContract


def ready(net: DynamicNet) -> None:
    """Measured statistics and a gate that uses several routes: what dynamic inference needs."""
    shape = (16, net.in_channels, net.image_size, net.image_size)
    recalibrate(net, [torch.randn(shape)])
    torch.nn.init.normal_(net.gate_parameters()[-1])
    net.gate_trained = True


class TestContract(PackageContract):
    cli = "ds_net_plus.cli:app"
    modules = ("supernet", "gate")

    def supernet(self) -> NetModule:
        module = SupernetModule(lr=0.05, warmup=0, cooldown=0, ema=0.9)
        for net in (module.net, module.teacher):
            ready(net)
        return module

    def gate(self) -> NetModule:
        module = GateModule()
        ready(module.net)
        return module

    def data(self) -> ImageData:
        return ImageData(batch_size=8, train_size=32, val_size=8, test_size=16)

    def exported(self):
        net = self.supernet().net
        return net.materialize(2), (torch.randn(2, 1, 32, 32),)
