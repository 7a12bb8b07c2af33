"""Packaged recipes: settings of a run as YAML files in a package's folder `recipes`."""

from importlib import resources
from pathlib import Path
from typing import Any

from tenfold.errors import UserError


def recipe_files(package: str) -> dict[str, Path]:
    """The recipes of an import package by name, sorted."""
    folder = Path(str(resources.files(package) / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def recipe_parts(package: str, name: str) -> dict[str, Any]:
    """A packaged recipe as a dict: model and data arguments, trainer settings.

    Commands read recipes this way, since nothing imports the `cli` of a package.

    Args:
        package: the import package.
        name: of the recipe.

    Raises:
        UserError: no such recipe.
    """
    import yaml  # here, so that --help does not pay for it

    files = recipe_files(package)
    if name not in files:
        fix = f"choose from {', '.join(files) or 'none'}"
        raise UserError(f"no recipe is called {name!r}", fix=fix)
    return yaml.safe_load(files[name].read_text(encoding="utf-8"))
