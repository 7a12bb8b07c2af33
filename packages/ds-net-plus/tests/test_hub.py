"""save_pretrained, from_pretrained and push_to_hub of every network; the Hub is replaced."""

import json
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError

from ds_net_plus.checkpoint import from_pretrained, load_net, save_pretrained
from ds_net_plus.model import DSConvNet, DSMobileNet, DSViT, DynamicNet, hub
from tenfold.errors import UserError


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def trained(randomize):
    net = randomize(DSConvNet(gate_outputs=3))
    net.gate_trained, net.gate_score, net.routing_space = True, "probability", (0, 1, 3)
    net.budgets = [(0.0, 5e5), (0.25, 4e5)]
    return net


def test_a_folder_round_trips(net, tmp_path):
    net.gate_trained, net.budgets = True, [(0.125, 1e6)]
    assert net.save_pretrained(tmp_path) is None
    loaded = DynamicNet.from_pretrained(tmp_path)
    assert type(loaded) is type(net)
    assert same(loaded, net)
    assert not loaded.training
    assert (loaded.name, loaded.config) == (net.name, net.config)
    assert loaded.gate_state() == net.gate_state()
    assert loaded.pretrained_cfg == net.pretrained_cfg
    assert same(type(net).from_pretrained(str(tmp_path)), net)
    assert same(from_pretrained(tmp_path), net)
    assert same(load_net(tmp_path), net)


def test_own_normalisation_and_free_arguments(trained, tmp_path):
    trained.pretrained_cfg = {**trained.pretrained_cfg, "mean": (0.5,), "std": (0.25,)}
    trained.save_pretrained(tmp_path)
    loaded = DSConvNet.from_pretrained(tmp_path, dropout=0.3)
    assert loaded.dropout == loaded.config["dropout"] == 0.3
    assert (loaded.pretrained_cfg["mean"], loaded.pretrained_cfg["std"]) == ((0.5,), (0.25,))
    with pytest.raises(UserError, match=r"do not fit.*classifier\.weight"):
        DSConvNet.from_pretrained(tmp_path, num_classes=3)


def test_the_class_must_be_that_of_the_folder(trained, families, tmp_path):
    families["vit"]().save_pretrained(tmp_path / "vit")
    trained.save_pretrained(tmp_path / "cnn")
    assert isinstance(DSViT.from_pretrained(tmp_path / "vit"), DSViT)
    with pytest.raises(UserError, match=r"is a DSConvNet, no DSViT.*use DSConvNet\.from"):
        DSViT.from_pretrained(tmp_path / "cnn")


def test_wrong_folders(trained, tmp_path):
    with pytest.raises(UserError, match=r"config\.json is missing"):
        DynamicNet.from_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no such model folder.*give a folder or user/name"):
        DynamicNet.from_pretrained(tmp_path / "absent")
    trained.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"a file, no model folder.*load_net"):
        DynamicNet.from_pretrained(tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{"architecture": "resnet50"}')
    with pytest.raises(UserError, match="does not describe a network of ds-net-plus, arch"):
        DynamicNet.from_pretrained(tmp_path)


def test_the_card(trained, families, tmp_path):
    save_pretrained(trained, tmp_path)
    path = tmp_path / "README.md"
    card = ModelCard.load(path)
    assert card.data.library_name == "ds-net-plus"
    assert card.data.license is None
    for text in (
        "A DSConvNet of",
        "10 classes, images of 1 x 32 x 32",
        "| 0 | 6 / 12 | 0.246 M | 0.004 M |",
        "chooses among routes 0, 1, 3",
        "| 0.25 | 0.400 M |",
        f'from_pretrained("{tmp_path.name}")',
        f'timm.create_model("local-dir:{tmp_path.name}", pretrained=True)',
        "@inproceedings{li2021dynamic,",
    ):
        assert text in card.text
    path.write_text("my own words")
    trained.save_pretrained(tmp_path)
    assert path.read_text() == "my own words"
    text = hub.model_card(families["resnet"](), "user/net", {"license": "mit"})
    assert ModelCard(text).data.license == "mit"
    assert 'timm.create_model("hf-hub:user/net"' in text
    assert "3 gates choose" in text
    assert "not known to be trained" in text


class FakeHub:
    """A Hub on the disk."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.calls = folder, []
        monkeypatch.setattr(HfApi, "create_repo", self.create_repo)
        monkeypatch.setattr(HfApi, "file_exists", self.file_exists)
        monkeypatch.setattr(HfApi, "upload_folder", self.upload_folder)
        monkeypatch.setattr("huggingface_hub.snapshot_download", self.snapshot_download)

    def create_repo(self, repo_id, **options):
        self.calls.append(options)
        (self.folder / repo_id).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=repo_id)

    def file_exists(self, repo_id, file, revision=None):
        return (self.folder / repo_id / file).exists()

    def upload_folder(self, repo_id, folder_path, **options):
        self.calls.append(options)
        source = {p.name: p.read_bytes() for p in hub.Path(folder_path).iterdir()}
        for name, content in source.items():
            (self.folder / repo_id / name).write_bytes(content)
        return f"https://hub/{repo_id}"

    def snapshot_download(self, repo_id, **options):
        self.calls.append(options)
        if not (self.folder / repo_id).exists():
            raise LocalEntryNotFoundError("the Hub is out of reach\nand more")
        return str(self.folder / repo_id)


def test_to_the_hub_and_back(trained, tmp_path, monkeypatch):
    fake = FakeHub(tmp_path / "hub", monkeypatch)
    url = trained.push_to_hub("user/net", private=True, commit_message="first", branch="dev")
    assert url == "https://hub/user/net"
    assert fake.calls[0]["private"] is True
    assert (fake.calls[1]["commit_message"], fake.calls[1]["revision"]) == ("first", "dev")
    files = {p.name for p in (tmp_path / "hub/user/net").iterdir()}
    assert files == {"model.safetensors", "config.json", "README.md"}
    assert json.loads((tmp_path / "hub/user/net/config.json").read_text())["arch"] == "ds_cnn_tiny"
    loaded = DynamicNet.from_pretrained("user/net", revision="v1", local_files_only=True)
    assert same(loaded, trained)
    assert loaded.gate_state() == trained.gate_state()
    assert fake.calls[-1]["revision"] == "v1"
    assert fake.calls[-1]["allow_patterns"] == ["config.json", "model.safetensors"]
    card = tmp_path / "hub/user/net/README.md"
    card.write_text("my own words")
    url = trained.save_pretrained(tmp_path / "net", push_to_hub=True, repo_id="user/net")
    assert url == "https://hub/user/net"
    assert card.read_text() == "my own words"
    trained.save_pretrained(tmp_path / "net", push_to_hub=True)
    assert same(DSConvNet.from_pretrained(tmp_path / "hub/net"), trained)


def test_the_hub_says_no(trained, tmp_path, monkeypatch):
    FakeHub(tmp_path / "hub", monkeypatch)
    with pytest.raises(UserError) as error:
        DSMobileNet.from_pretrained("user/absent")
    assert "the Hub is out of reach (user/absent): check" in str(error.value)
    (tmp_path / "hub/user/empty").mkdir(parents=True)
    with pytest.raises(UserError, match=r"config\.json is missing in the repository"):
        DynamicNet.from_pretrained("user/empty")

    def refuse(*_, **__):
        raise OSError("401 Client Error.\nInvalid username or password.")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(UserError, match=r"did not take the network: 401 Client Error.*hf auth"):
        trained.push_to_hub("user/net")
