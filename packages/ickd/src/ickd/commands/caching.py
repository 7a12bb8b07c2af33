"""cache-teacher: a teacher's features, computed once."""

from pathlib import Path
from typing import Any

from ickd.cache import TeacherCache
from ickd.commands.common import open_model
from ickd.module import make_data
from ickd.networks import load_weights
from tenfold.device import pick_device
from tenfold.recipes import recipe_parts


def cache_teacher(
    root: str | None = None,
    *,
    teacher: str,
    teacher_ckpt: Path | None = None,
    recipe: str = "demo",
    data: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    keep: str = "",
    device: str = "auto",
    out: Path = Path("teacher-cache.safetensors"),
) -> None:
    """Run a teacher over the training images and keep its features, for --model.teacher_cache.

    Only images that look the same in every epoch can be cached (--data.augment none).

    Args:
        root: folder of the images, of class folders unless data tells another source; the
            recipe's images if left out.
        teacher: a network by name, or a file of one.
        teacher_ckpt: file with its weights, where it was named.
        recipe: packaged recipe that will use them, see ickd recipes: its images are read, and it
            says how a named teacher is built.
        data: arguments of the data that differ from the recipe.
        options: how a named teacher is built, over the recipe's teacher_options, such as taps,
            num_classes, mean, std and image_size; as in fit.
        keep: what to keep, with commas between, of logits, pooled, last, maps, preacts, or a single
            map such as maps.3; all if left out, which of a large network are many GiB.
        device: cpu, cuda, or auto.
        out: the file to write.
    """
    network = open_model(teacher, **{**_options(recipe), **(options or {})})
    if teacher_ckpt is not None:
        for note in load_weights(network, teacher_ckpt):
            print(f"{teacher_ckpt}: {note}")
    named = {} if root is None else {"source": "imagefolder", "root": root}
    images = make_data(recipe, {**named, **(data or {})})
    fields = [field.strip() for field in keep.split(",") if field.strip()]
    network.to(pick_device(device))
    cache = TeacherCache.compute(network, images, keep=fields, progress=True)
    cache.write(out)
    size = out.stat().st_size / 2**20
    print(f"features of {len(cache)} images, {size:.1f} MiB: {out}")


def _options(recipe: str) -> dict[str, Any]:
    """How the Distiller of a recipe builds its teacher."""
    given: dict[str, Any] = recipe_parts("ickd", recipe)["model"]["init_args"]
    taps = [pair[1] for pair in given.get("pairs") or ()]
    usual = {"num_classes": given.get("num_classes"), "taps": taps}
    return usual | (given.get("teacher_options") or {})
