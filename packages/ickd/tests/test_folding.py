"""Folding batch norms into convolutions changes nothing that a teacher says."""

import copy

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.backends import cudnn

from ickd.folding import fold
from ickd.networks import Input, Network, open_network
from tenfold.distillation import Taps

ZOO = ["resnet8", "resnet8x4", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV1", "ShuffleV2"]
NETWORKS = {
    **{f"zoo:{name}": {} for name in ZOO},
    "embedded:gratings-teacher": {},
    "embedded:gratings-student": {},
    "embedded:blobs-teacher": {},
    "deeplab:resnet18": {"image_size": 33},
    "deeplab:mobilenet_v2": {"image_size": 33},
    "timm:resnet18": {"image_size": 32},
    "timm:test_resnet": {"image_size": 32},
    # norms of timm that end in an activation
    "timm:mobilenetv3_small_050": {"image_size": 32},
    "timm:test_efficientnet": {"image_size": 32},
    "torchvision:shufflenet_v2_x0_5": {"image_size": 32},
}
KEPT = {"zoo:wrn_16_1": 7}
"""Batch norms in front of convolutions stay: the first of six blocks, and the last of all."""


def trained(network: Network) -> Network:
    """Norms of which none is the identity, as after training."""
    generator = torch.Generator().manual_seed(5)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            shape = module.running_mean.shape
            module.running_mean.copy_(0.3 * torch.randn(shape, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(shape, generator=generator))
            if module.affine:
                module.weight.data = 0.6 + 0.8 * torch.rand(shape, generator=generator)
                module.bias.data = 0.3 * torch.randn(shape, generator=generator)
    return network.eval()


def norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


def pixels(network: Network, batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(6)
    return torch.rand(network.example(batch).shape, generator=generator)


def parts(taps: Taps) -> list[Tensor]:
    given = [*taps.maps, *taps.preacts, taps.last, taps.pooled, taps.logits]
    return [part for part in given if part is not None]


@torch.no_grad()
def assert_agree(ours: Network, theirs: Network, tolerance: float = 1e-5) -> None:
    """Everything that two networks say, to a share of the largest entry."""
    x = pixels(ours).to(ours.example(1).dtype)
    pairs = list(zip(parts(ours.taps(x)), parts(theirs.taps(x)), strict=True))
    pairs.append((ours(x), theirs(x)))
    for a, b in pairs:
        assert (a - b).abs().max() <= tolerance * a.abs().max()


@pytest.mark.parametrize("name", list(NETWORKS))
def test_a_folded_network_says_the_same(name):
    torch.manual_seed(0)
    network = trained(open_network(name, **NETWORKS[name])).requires_grad_(False)
    assert norms(network) > 0
    tolerance = 1e-5
    if name == "deeplab:mobilenet_v2":  # the roundings of fifty layers add up to 2e-5
        network, tolerance = network.double(), 1e-11
    folded = fold(network)
    assert norms(folded) == KEPT.get(name, 0)
    assert_agree(network, folded, tolerance)


def test_the_norms_of_these_tests_matter():
    network = trained(open_network("zoo:resnet8"))
    plain = copy.deepcopy(network)
    for name, module in list(plain.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            plain.set_submodule(name, nn.Identity())
    x = pixels(network)
    assert (plain(x) - network(x)).abs().max() > 0.1 * network(x).abs().max()


def test_the_original_stays_as_it_is():
    network = trained(open_network("zoo:resnet8")).train()
    state, kinds = copy.deepcopy(network.state_dict()), [type(m) for m in network.modules()]
    modes = [m.training for m in network.modules()]
    drawn = torch.get_rng_state()
    folded = fold(network)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert kinds == [type(m) for m in network.modules()]
    assert modes == [m.training for m in network.modules()]
    assert all(p.requires_grad for p in network.parameters())
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in state.items())
    assert network.net.conv1.weight.is_contiguous()
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    for each in (network, folded):
        assert not any(getattr(m, hook) for m in each.modules() for hook in hooks)
    assert not any(p.requires_grad for p in folded.parameters())
    assert not any(m.training for m in folded.modules())
    ours = {p.data_ptr() for p in network.parameters()}
    assert not ours & {p.data_ptr() for p in folded.parameters()}
    assert folded.net.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert (folded.name, folded.expects) == (network.name, network.expects)


def test_named_taps_of_a_folded_network():
    # bn1 becomes nothing and gives the same; conv2 is read itself, and so keeps its norm
    names = ["layer1.0.bn1", "layer2.0.conv2", "layer4"]
    network = trained(open_network("timm:test_resnet", taps=names, image_size=64))
    folded = fold(network)
    assert isinstance(folded.net.layer1[0].bn1, nn.Identity)
    assert norms(folded) == 1
    assert_agree(network, folded)


class Conv(nn.Module):
    """Convolution, batch norm and classifier; `forward` says what reads what."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem = nn.Conv2d(3, 6, 3)
        self.conv = nn.Conv2d(6, 6, 3, padding=1, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 3)

    def middle(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.middle(self.stem(x)).mean((2, 3)))


class ReadTwice(Conv):
    """What the convolution gives is read behind the norm too."""

    def middle(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y).relu() + y


class SharedConv(Conv):
    """One convolution runs twice, behind it two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.norm2 = nn.BatchNorm2d(6)

    def middle(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv(self.norm(self.conv(x)).relu())).relu()


class SharedNorm(Conv):
    """One norm runs behind two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2 = nn.Conv2d(6, 6, 1)

    def middle(self, x: Tensor) -> Tensor:
        return self.norm(self.conv2(self.norm(self.conv(x)).relu())).relu()


class Between(Conv):
    """Something lies between the convolution and the norm."""

    def middle(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x) * 2)


class TwoBlocks(nn.Module):
    """The first convolution's output is read twice, the second one's is not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = ReadTwice(), Conv()
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b.middle(self.a.middle(self.a.stem(x))).mean((2, 3)))


class OwnStatistics(Conv):
    """The norm knows no running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm2d(6)


class Scaled(nn.BatchNorm2d):
    """A norm that does more than its kind."""

    def forward(self, input: Tensor) -> Tensor:
        return 3 * super().forward(input)


class MoreThanANorm(Conv):
    def __init__(self) -> None:
        super().__init__()
        self.norm = Scaled(6)


def network_of(net: nn.Module, taps: tuple[str, ...] = ("norm",)) -> Network:
    return trained(Network(net, expects=Input((0.5,) * 3, (0.5,) * 3, 8), tap_names=taps))


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_a_plain_convolution_is_folded_by_hand(groups):
    network = network_of(Conv(groups))
    folded = fold(network)
    conv, norm = network.net.conv, network.net.norm
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(folded.net.conv.weight, conv.weight * scale.view(-1, 1, 1, 1))
    torch.testing.assert_close(folded.net.conv.bias, norm.bias - norm.running_mean * scale)
    assert isinstance(folded.net.norm, nn.Identity)
    assert_agree(network, folded)


@pytest.mark.parametrize(
    ("kind", "kept"),
    [
        (ReadTwice, 1),
        (SharedConv, 2),
        (SharedNorm, 1),
        (Between, 1),
        (OwnStatistics, 0),
        (MoreThanANorm, 1),
    ],
)
def test_where_folding_would_be_wrong_nothing_is_folded(kind, kept):
    network = network_of(kind(), ("stem",))
    folded = fold(network)
    assert norms(folded) == kept
    assert torch.equal(folded.net.conv.weight, network.net.conv.weight)
    assert_agree(network, folded)
    assert not folded.training
    assert folded is not network


def test_what_can_be_folded_is():
    network = network_of(TwoBlocks(), ("a.stem",))
    folded = fold(network)
    assert isinstance(folded.net.a.norm, nn.BatchNorm2d)
    assert isinstance(folded.net.b.norm, nn.Identity)
    assert_agree(network, folded)


def test_what_is_not_folded_is_told(caplog):
    fold(network_of(Conv()))
    assert not caplog.records
    for kind, told in ((ReadTwice, "1 of 1"), (MoreThanANorm, "1 of 1"), (TwoBlocks, "1 of 2")):
        tap = "a.stem" if kind is TwoBlocks else "stem"
        fold(network_of(kind(), (tap,)))
        assert caplog.messages[-1].startswith(f"{kind.__name__}: {told} batch norms are not folded")
    assert len(caplog.records) == 3


def test_convolutions_of_few_digits_are_folded_too(monkeypatch, caplog):
    """As on CUDA, where torch lets convolutions round to TF32 unless it is told not to."""
    exact = nn.Conv2d._conv_forward

    def rounding(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if cudnn.conv.fp32_precision != "ieee":
            x, weight = x.bfloat16().float(), weight.bfloat16().float()
        return exact(self, x, weight, bias)

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", rounding)
    monkeypatch.setattr(cudnn, "benchmark", True)
    network = trained(open_network("zoo:resnet8"))
    for tf32 in (True, False):
        monkeypatch.setattr(cudnn, "allow_tf32", tf32)
        before = flags()
        folded = fold(network)
        assert flags() == before
        assert norms(folded) == 0
    assert not caplog.records
    x = pixels(network)
    apart = (folded(x) - network(x)).abs().max() / network(x).abs().max()
    assert apart > 1e-3  # what rounding alone does


def flags() -> list[object]:
    found = [cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32]
    return [*found, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision]


def test_synchronised_norms_are_folded():
    network = trained(open_network("zoo:resnet8"))
    expected = fold(network)
    several = copy.deepcopy(network)
    several.net = nn.SyncBatchNorm.convert_sync_batchnorm(several.net)
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in several.modules()) == norms(network)
    folded = fold(several)
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in folded.modules())
    assert_agree(expected, folded, 0)
    assert_agree(network, folded)


def test_norms_without_parameters_and_transposed_convolutions():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, affine=False),
        nn.ConvTranspose2d(4, 5, 2, stride=2),
        nn.BatchNorm2d(5),
        nn.Flatten(),
        nn.LazyLinear(3),
    )
    net(torch.zeros(1, 3, 8, 8))
    network = network_of(net, ("3",))
    folded = fold(network)
    assert [type(m) for m in folded.net][1:4:2] == [nn.Identity, nn.BatchNorm2d]
    assert_agree(network, folded)


def test_a_norm_of_timm_leaves_its_activation_behind():
    network = trained(open_network("timm:mobilenetv3_small_050", image_size=64))
    folded = fold(network)
    assert type(network.net.bn1).__name__ == "BatchNormAct2d"
    assert type(folded.net.bn1) is type(network.net.bn1.act)
    assert isinstance(network.net.bn1, nn.BatchNorm2d)


def test_a_network_without_batch_norms_is_a_copy():
    net = timm.create_model("test_vit", depth=1)
    network = Network(net)
    assert_agree(network, fold(network))
