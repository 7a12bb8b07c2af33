"""cache-teacher: a teacher's features, computed once."""

from pathlib import Path
from typing import Any

from ickd.cache import TeacherCache
from ickd.commands.common import open_model
from ickd.module import make_data
from ickd.networks import load_weights
from tenfold.device import pick_device


def cache_teacher(
    *,
    teacher: str,
    teacher_ckpt: Path | None = None,
    recipe: str = "demo",
    data: dict[str, Any] | None = None,
    keep: str = "",
    device: str = "auto",
    out: Path = Path("teacher-cache.safetensors"),
) -> None:
    """Run a teacher over the training images and keep its features, for --model.teacher_cache.

    Only images that look the same in every epoch can be cached (--data.augment none).

    Args:
        teacher: a network by name, or a file of one.
        teacher_ckpt: file with its weights, where it was named.
        recipe: packaged recipe whose data are read, see ickd recipes.
        data: arguments of the data that differ from the recipe.
        keep: fields with commas between them, of logits, pooled, last, maps, preacts; all if left
            out.
        device: cpu, cuda, or auto.
        out: the file to write.
    """
    network = open_model(teacher)
    if teacher_ckpt is not None:
        for note in load_weights(network, teacher_ckpt):
            print(f"{teacher_ckpt}: {note}")
    images = make_data(recipe, data)
    fields = [field.strip() for field in keep.split(",") if field.strip()]
    network.to(pick_device(device))
    cache = TeacherCache.compute(network, images, keep=fields, progress=True)
    cache.write(out)
    size = out.stat().st_size / 2**20
    print(f"features of {len(cache)} images, {size:.1f} MiB: {out}")
