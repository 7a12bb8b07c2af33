#!/usr/bin/env python3
"""Prints, as JSON, the folders whose tests a change calls for: `changed_packages.py [BASE]`.

A change inside packages/<name>/ calls for that package alone; the core, and every file that belongs
to no package, is everybody's. Without BASE all folders are printed.
"""

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path


def all_folders(root: Path) -> list[str]:
    """Returns the folder of the core and of each package, as `packages/<name>`."""
    found = sorted(file.parent.name for file in root.glob("packages/*/pyproject.toml"))
    return ["shared", *(f"packages/{name}" for name in found)]


def touched(paths: Iterable[str], folders: list[str]) -> list[str]:
    """Returns those of `folders` that a change of `paths` concerns."""
    owners = {"/".join(path.split("/")[:2]) for path in paths}
    packages = {folder for folder in folders if folder.startswith("packages/")}
    return sorted(owners) if owners and owners <= packages else folders


def main(args: list[str]) -> int:
    """Prints the folders for the change since the commit named in `args`, if one is."""
    folders = all_folders(Path(__file__).parents[2])
    if args:
        diff = ["git", "diff", "--name-only", "--no-renames", args[0]]
        listed = subprocess.run(diff, check=True, capture_output=True, encoding="utf-8")
        folders = touched(listed.stdout.splitlines(), folders)
    print(json.dumps(folders))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
