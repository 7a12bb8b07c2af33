"""The methods that timm's scripts and huggingface_hub's users expect of a network.

The folder format and what asks the registry for a class sit in `ds_net_plus.model.hub`, which is
imported when it is needed: it imports the networks, and Lightning, which takes a second to load.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch.nn.functional as F
from jaxtyping import Float
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from ds_net_plus.layers import DSLinear, NoClassifier, make_classifier
from ds_net_plus.model.features import TOKENS, default_maps
from tenfold.errors import UserError

Net = TypeVar("Net")

_BLOCKS = (
    (r"^blocks\.(\d+)\.first_block", (-1,)),
    (r"^blocks\.(\d+)\.residual_blocks\.(\d+)", None),
    (r"^stages\.(\d+)\.(\d+)", None),
    (r"^gates\.(\d+)", (-1,)),
    (r"^blocks\.(\d+)", None),
    (r"^norm", (99999,)),  # timm's sign for the group before
)
_STAGES = ((r"^(?:blocks|stages|gates)\.(\d+)", None), (r"^norm", (99999,)))


def normalisation(colours: int) -> dict[str, tuple[float, ...]]:
    """Mean and std of pixels in 0..1: ImageNet's, or those of the grey glyphs."""
    if colours == 1:
        return {"mean": (0.15,), "std": (0.3,)}
    return {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}


class TimmFace(nn.Module):
    """What timm asks of a classifier, for the network's `default_route`.

    With a static default route `forward` gives class logits, as timm's scripts expect; with None
    (the gates choose) a `DynamicOutput`. Final features and the vectors in front of the classifier
    always have the width of the widest route, zero beyond that of the route in use.

    Attributes:
        classifier: the last linear layer, or what stands for it where there are no classes.
        global_pool: what makes one vector of an image, "avg" over space or the class "token".
    """

    config: dict[str, object]
    num_classes: int
    in_channels: int
    image_size: int
    classifier: DSLinear | NoClassifier
    global_pool: str = "avg"
    _pretrained_cfg: Mapping[str, Any] | None = None

    @property
    def in_chans(self) -> int:
        """Colours of the images."""
        return self.in_channels

    @property
    def num_features(self) -> int:
        """Channels of `forward_features`."""
        return self._widths_of(None)[-1][1]

    @property
    def head_hidden_size(self) -> int:
        """Length of the vectors in front of the classifier."""
        return self.num_features

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Channels and stride of every feature map of the default route, the finest first."""
        return [
            {"num_chs": width, "reduction": stride, "module": f"features.{stride}"}
            for stride, width in self._widths_of(self.default_route)  # pyright: ignore[reportAttributeAccessIssue]
        ]

    def _widths_of(self, route: Any) -> list[tuple[int, int]]:
        """(stride, channels) of every map, the widest form's where the gates choose."""
        known = self.map_channels() if route is None else self.map_channels(route)  # pyright: ignore[reportCallIssue]
        return sorted(known.items())

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """Sizes, normalisation and layer names in timm's form: what `resolve_data_config` reads."""
        given = self._pretrained_cfg
        if given is None:
            registered = get_pretrained_cfg(self.name)  # pyright: ignore[reportArgumentType]
            given = registered.to_dict() if registered else {}
        if len(given.get("mean", ())) != self.in_channels:
            given = {**given, **normalisation(self.in_channels)}
        side = -(-self.image_size // self._widths_of(None)[-1][0])
        return {
            **given,
            "input_size": (self.in_channels, self.image_size, self.image_size),
            "num_classes": self.num_classes,
            "pool_size": (side, side) if self.global_pool == "avg" else None,
        }

    @pretrained_cfg.setter
    def pretrained_cfg(self, config: Mapping[str, Any]) -> None:
        self._pretrained_cfg = {
            key: tuple(value) if isinstance(value, list) else value for key, value in config.items()
        }

    @property
    def default_cfg(self) -> dict[str, Any]:
        """The older name of `pretrained_cfg`."""
        return self.pretrained_cfg

    @default_cfg.setter
    def default_cfg(self, config: Mapping[str, Any]) -> None:
        self.pretrained_cfg = config

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier for other classes; with 0 the network returns features.

        Tables of budgets are dropped: the classifier is part of the cost.

        Args:
            num_classes: outputs, 0 or more.
            global_pool: the network's own pool, "avg" or of a transformer "token".

        Raises:
            UserError: a negative number, or another pool.
        """
        self.check_pool(global_pool)
        if num_classes < 0:
            raise UserError(f"num_classes must be 0 or more, got {num_classes}")
        example = next(self.parameters())
        head = make_classifier(self.num_features, num_classes)
        self.classifier = head.to(example.device, example.dtype).train(self.training)
        self.num_classes = num_classes
        self.config = {**self.config, "num_classes": num_classes}
        self.budgets = []
        self._costs = {}

    def check_pool(self, global_pool: str | None) -> None:
        """Makes sure that no other pool is asked for.

        Raises:
            UserError: another pool than the network's own.
        """
        if global_pool not in (None, self.global_pool):
            raise UserError(f"the pool is {self.global_pool!r} and cannot become {global_pool!r}")

    def forward_features(
        self, x: Float[Tensor, "batch colours height width"]
    ) -> Float[Tensor, "batch ..."]:
        """The last feature map, or a transformer's tokens (batch, tokens, features)."""
        return self._final(default_maps(self, x))  # pyright: ignore[reportArgumentType]

    def _final(self, maps: dict[int, Tensor]) -> Tensor:
        last = maps[TOKENS if TOKENS in maps else max(maps)]
        missing = self.num_features - last.shape[1]
        if missing:
            last = F.pad(last, (0, 0) * (last.ndim - 2) + (0, missing))
        return last.transpose(1, 2) if TOKENS in maps else last

    def forward_head(
        self, x: Float[Tensor, "batch ..."], pre_logits: bool = False
    ) -> Float[Tensor, "batch outputs"]:
        """Class logits of final features.

        Args:
            x: what `forward_features` gave.
            pre_logits: stop in front of the classifier.
        """
        x = x[:, 0] if self.global_pool == "token" else x.mean((2, 3))
        dropout = getattr(self, "dropout", 0.0)
        if self.training and dropout and self.default_route == "largest":
            x = F.dropout(x, dropout)
        return x if pre_logits else self.classifier(x)

    def forward_intermediates(
        self,
        x: Float[Tensor, "batch colours height width"],
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Feature maps, those of a static route in its own widths.

        Args:
            x: normalised images.
            indices: of the maps among `feature_info`: the last n, these, or all.
            norm: a transformer's map is normalised in any case.
            stop_early: later layers run in any case.
            output_fmt: "NCHW", there is no other.
            intermediates_only: leave out the final features.

        Returns:
            The maps in the order of `indices`, with the final features in front of them unless
            `intermediates_only`.

        Raises:
            UserError: another format.
        """
        if output_fmt != "NCHW":
            raise UserError(f"maps come as NCHW, not {output_fmt}")
        maps = default_maps(self, x)  # pyright: ignore[reportArgumentType]
        strides = sorted(level for level in maps if level != TOKENS)
        chosen = [maps[strides[i]] for i in self._take(indices)]
        return chosen if intermediates_only else (self._final(maps), chosen)

    def _take(self, indices: int | Sequence[int] | None) -> list[int]:
        """Positions among `feature_info`.

        Raises:
            UserError: a map that does not exist.
        """
        known = self.feature_info
        positions = list(range(len(known)))
        if indices is None:
            return positions
        last = isinstance(indices, int)
        wanted = range(-indices, 0) if last else indices  # pyright: ignore[reportOperatorIssue]
        try:
            return [positions[i] for i in wanted]
        except IndexError as error:
            strides = ", ".join(str(info["reduction"]) for info in known)
            raise UserError(
                f"{'the last ' if last else ''}{indices} of the feature maps do not exist",
                where="out_indices",
                fix=f"choose from 0 to {len(known) - 1}, of stride {strides}",
            ) from error

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] | None = None,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drops the classifier, which feature maps do not need.

        Args:
            indices: as in `forward_intermediates`.
            prune_norm: the norm of a transformer stays in any case.
            prune_head: whether to drop it.

        Returns:
            The positions of the maps that `indices` stand for.
        """
        if prune_head:
            self.reset_classifier(0)
        return self._take(indices)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Names of the parameters from the input to the output, for a rate that grows with depth.

        Args:
            coarse: by stages instead of blocks.
        """
        return {
            "stem": r"^(?:conv_stem|conv1|bn1|stem|embedding)",
            "front": r"^front_layers\.(\d+)",
            "gate": r"^gate\.",
            "blocks": list(_STAGES if coarse else _BLOCKS),
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """There is none.

        Raises:
            UserError: if it is wanted.
        """
        if enable:
            raise UserError(
                "gradient checkpointing is not supported", fix="choose a smaller batch or route"
            )

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As in torch; of a training checkpoint's weights the moving average, else the student.

        So timm's `checkpoint_path` reads the checkpoints of both stages. A state dict does not say
        for which routes its gate was trained: `from_pretrained` and `load_net` know.
        """
        for prefix in ("teacher.", "net."):
            part = {
                key.removeprefix(prefix): value
                for key, value in state_dict.items()
                if key.startswith(prefix)
            }
            if part:
                return super().load_state_dict(part, strict, assign)
        return super().load_state_dict(state_dict, strict, assign)


class HubFace(nn.Module):
    """Model folders, on the disk and on the Hugging Face Hub.

    The methods have the names and arguments of huggingface_hub's `PyTorchModelHubMixin`.

    Example:
        >>> net.save_pretrained("my-net")
        >>> net.push_to_hub("user/my-net", private=True)
        >>> net = DynamicNet.from_pretrained("user/my-net")
    """

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        model_card_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> str | None:
        """Writes model.safetensors, config.json and, where there is none, README.md.

        Args:
            save_directory: made if need be.
            push_to_hub: afterwards also push.
            repo_id: where to; named as the folder where None.
            model_card_kwargs: metadata of the card, such as `license` or `datasets`.
            **options: of `push_to_hub`.

        Returns:
            The commit's address if pushed.
        """
        from ds_net_plus.model import hub

        hub.save_folder(self, save_directory, model_card_kwargs)  # pyright: ignore[reportArgumentType]
        if not push_to_hub:
            return None
        name = repo_id or Path(save_directory).resolve().name
        return self.push_to_hub(name, model_card_kwargs=model_card_kwargs, **options)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Push model using huggingface_hub.",
        private: bool | None = None,
        token: str | bool | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
        model_card_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> str:
        """Uploads a model folder; the repository is made if need be, and its own README.md stays.

        Args:
            repo_id: "user/name".
            commit_message: of the one commit.
            private: of a new repository.
            token: for the Hub; that of `hf auth login` where None.
            branch: to push to; main where None.
            create_pr: open a pull request instead.
            model_card_kwargs: metadata of the card, such as `license` or `datasets`.
            **options: of huggingface_hub's `upload_folder`.

        Returns:
            The commit's address.

        Raises:
            UserError: the Hub cannot be reached or refuses.
        """
        from ds_net_plus.model import hub

        upload = {"commit_message": commit_message, "revision": branch, "create_pr": create_pr}
        return hub.push(self, repo_id, private, token, model_card_kwargs, {**upload, **options})  # pyright: ignore[reportArgumentType]

    @classmethod
    def from_pretrained(
        cls: type[Net],
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **overrides: object,
    ) -> Net:
        """Reads a model folder, gate and budgets included, in eval mode.

        Args:
            pretrained_model_name_or_path: a folder of `save_pretrained`, or "user/name" on the Hub.
            revision: branch, tag or commit on the Hub.
            cache_dir: where downloads are kept.
            force_download: load again what is in the cache.
            local_files_only: take what is in the cache, and do not ask the Hub.
            token: for the Hub.
            **overrides: constructor arguments that the weights leave open, such as `dropout`.

        Raises:
            UserError: no such folder or repository, a damaged one, one of another program, or a
                network that is no `cls`.
        """
        from ds_net_plus.model import hub

        download = {
            "revision": revision,
            "cache_dir": cache_dir,
            "force_download": force_download,
            "local_files_only": local_files_only,
            "token": token,
        }
        net = hub.load_folder(pretrained_model_name_or_path, download, overrides)
        if not isinstance(net, cls):
            raise UserError(
                f"the network is a {type(net).__name__}, no {cls.__name__}",
                where=str(pretrained_model_name_or_path),
                fix=f"use {type(net).__name__}.from_pretrained or DynamicNet.from_pretrained",
            )
        return net
