"""What is kept of a comparison, so that an interrupted one goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tenfold.checkpoint import atomic_file
from tenfold.errors import UserError


class Kept:
    """Finished runs of a part in results.json of a folder, with their settings."""

    def __init__(self, out: Path | None, part: str, settings: dict[str, Any] | None) -> None:
        self._path = None if out is None else out / "results.json"
        self._part = part
        self._content: dict[str, Any] = {}
        if self._path is not None and self._path.is_file():
            self._content = _read(self._path)
        known = self.settings
        for name, value in (settings or {}).items():
            if known and known.get(name) != value:
                what = f"the folder holds results of {name} {known.get(name)}, not {value}"
                fix = f"take {name} {known.get(name)}, remove the folder, or choose another --out"
                raise UserError(what, where=str(self._path), fix=fix)
        if settings:
            self._content.setdefault(part, {"settings": settings, "runs": {}})

    @property
    def settings(self) -> dict[str, Any]:
        """Of what is there; none if nothing is."""
        return self._content.get(self._part, {}).get("settings", {})

    @property
    def runs(self) -> dict[str, Any]:
        """Finished runs by key."""
        return self._content[self._part]["runs"]

    def add(self, key: str, run: dict[str, Any]) -> None:
        """Keep a finished run."""
        self.runs[key] = run
        self.write()

    def write(self) -> None:
        """Write what is there, the settings too, complete or not at all."""
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(self._path) as file:
                file.write(json.dumps(self._content).encode())


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if all(part.keys() >= {"settings", "runs"} for part in content.values()):
            return content
    except (ValueError, AttributeError):
        pass
    raise UserError("no JSON of results", where=str(path), fix="remove it")
