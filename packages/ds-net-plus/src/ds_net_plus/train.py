"""Both stages as functions: what `fit`, `train-gate`, `demo` and the benchmarks have in common."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ds_net_plus.data import ImageData
from ds_net_plus.evaluate import RouteTable, collect
from ds_net_plus.model import DynamicNet, reset_gate
from ds_net_plus.module import GateBatch, GateModule, SupernetModule
from ds_net_plus.recalibration import recalibrate
from tenfold.data import DataModule, TensorItems
from tenfold.progress import track
from tenfold.runs import begun, make_trainer


def train_supernet(
    module: SupernetModule,
    data: ImageData,
    folder: Path,
    *,
    epochs: int,
    recalibration: int = 25,
    accelerator: str = "auto",
    progress: bool = True,
) -> SupernetModule:
    """Stage I and recalibration of both copies; goes on from `folder`/last.ckpt if there is one."""
    checkpoint = begun(folder, module, epochs)  # before a trainer takes up the folder's log
    trainer = make_trainer(
        folder,
        epochs=epochs,
        seed=module.hparams["seed"],
        accelerator=accelerator,
        progress=progress,
    )
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    for net in (module.net, module.teacher):
        recalibrate(net, training_images(data, recalibration))
    return module.eval()


def training_images(data: ImageData, batches: int) -> Iterator[Tensor]:
    """Up to `batches` batches of training images, augmented as in training, in a fixed order."""
    for count, batch in enumerate(data.train_dataloader()):
        if count == batches:
            return
        yield batch.image


class CachedRoutes(DataModule):
    """Stage-II data computed once: what the gate reads and what every route answers."""

    def __init__(self, table: RouteTable, batch_size: int, seed: int) -> None:
        """Serves the rows of `table` in training batches.

        Where gates were read on several paths, each draw of an image takes one at random.
        """
        super().__init__(batch_size=batch_size, seed=seed)
        fields = GateBatch(table.gate_input, table.logits, table.labels)
        several = table.gate_input.ndim == 3
        self.items = TensorItems(fields, _one_path if several else None, seed)

    def train_dataset(self) -> TensorItems:
        """All rows."""
        return self.items


def _one_path(batch: GateBatch, generator: torch.Generator) -> GateBatch:
    """What the gates read on one of the paths, another for each image."""
    count, paths, _ = batch.gate_input.shape
    chosen = torch.randint(paths, (count,), generator=generator)
    return batch._replace(gate_input=batch.gate_input[torch.arange(count), chosen])


def cache_routes(
    net: DynamicNet, batches: Iterable, label: str, progress: bool, seed: int = 0
) -> RouteTable:
    """`collect` with progress; with several gates also what they read on a few mixed paths."""
    images = track(batches, label=label) if progress else batches
    return collect(net, images, upstream=upstream_paths(net, seed))


def upstream_paths(net: DynamicNet, seed: int, mixed: int = 4) -> list[tuple[int, ...]] | None:
    """Paths on which several gates learn to read: each route throughout, and `mixed` random ones.

    None for a single gate, which has nothing upstream.
    """
    if net.num_gates == 1:
        return None
    generator = torch.Generator().manual_seed(seed)
    space = torch.tensor(net.routing_space)
    draws = space[torch.randint(len(space), (mixed, net.num_gates), generator=generator)]
    uniform = [(route,) * net.num_gates for route in net.routing_space]
    return [*uniform, *(tuple(path) for path in draws.tolist())]


def train_gate(
    net: DynamicNet,
    data: DataModule,
    folder: Path,
    *,
    steps: int = 800,
    seed: int = 0,
    accelerator: str = "auto",
    progress: bool = True,
    **options: object,
) -> GateModule:
    """Stage II on a frozen supernet; goes on from `folder`/last.ckpt if there is one.

    Args:
        net: the supernet; copied, not changed.
        data: cached routes, or images.
        folder: where checkpoint and log go.
        steps: optimizer steps, rounded up to whole epochs.
        seed: of initialisation, order and noise.
        accelerator: Lightning's choice of device.
        progress: show it.
        **options: arguments of `GateModule`.
    """
    config = {**net.config, "gate_outputs": len(net.routing_space)}
    module = GateModule(arch=net.name, net=config, seed=seed, **options)  # pyright: ignore[reportArgumentType]
    module.net.load_state_dict(net.state_dict())
    module.net.routing_space = net.routing_space
    reset_gate(module.net, seed)
    epochs = -(-steps // max(len(data.train_dataloader()), 1))
    checkpoint = begun(folder, module, epochs)  # before a trainer takes up the folder's log
    trainer = make_trainer(
        folder,
        epochs=epochs,
        seed=seed,
        accelerator=accelerator,
        progress=progress,
    )
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    return module.eval()
