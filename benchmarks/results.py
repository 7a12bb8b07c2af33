"""Results on disk: one JSON a package and kind, resumable, and the tables made from it."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from tenfold.checkpoint import atomic_file
from tenfold.device import report
from tenfold.errors import UserError

FOLDER = Path(__file__).parent / "results"


def work_folder(name: str) -> Path:
    """Where the runs of a package's claims lie, so that interrupted ones go on."""
    return Path("runs/benchmarks") / name


class Results:
    """A JSON file of runs by key, and the machine of each; a finished run is never done again."""

    def __init__(self, kind: str, name: str, folder: Path = FOLDER, *, fresh: bool = False) -> None:
        """Opens folder/<kind>/<name>.json, or begins it anew."""
        self.kind = kind
        self.path = folder / kind / f"{name}.json"
        self.content: dict[str, Any] = {"machine": report(), "runs": {}}
        if self.path.is_file() and not fresh:
            self.content = json.loads(self.path.read_text(encoding="utf-8"))

    @property
    def runs(self) -> dict[str, Any]:
        """Finished runs by key."""
        return self.content["runs"]

    def once(self, key: str, work: Callable[[], Any]) -> Any:
        """The result of `work`, done now unless the file has it; written at once."""
        if key not in self.runs:
            self.runs[key] = work()
            self.content.setdefault("machines", {})[key] = _machine()
            self.write()
        return self.runs[key]

    def write(self) -> None:
        """Writes the file, complete or not at all; runs that others added meanwhile stay."""
        if self.path.is_file():
            theirs = json.loads(self.path.read_text(encoding="utf-8"))
            for part in ("runs", "machines"):
                self.content[part] = theirs.get(part, {}) | self.content.get(part, {})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.content, indent=1, sort_keys=True) + "\n"
        with atomic_file(self.path) as file:
            file.write(text.encode())

    def publish(self, readme: Path, text: str) -> None:
        """Writes the tables beside the results and into their block of a README, and prints them.

        Raises:
            UserError: the README has no such block.
        """
        self.path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
        replace_block(readme, self.kind, text)
        print(text)


def _machine() -> str:
    """Where a run was made, in a line."""
    here = report()
    versions = f"torch {here['versions']['torch']}, lightning {here['versions']['lightning']}"
    return f"{here['cpu']}, {here['simd']}, {here['cores']} cores, {versions}"


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean and Student's confidence interval over seeds; infinite for one value."""
    data = np.asarray(values, dtype=float)
    mean = float(data.mean())
    if len(data) < 2:
        return mean, -np.inf, np.inf
    half = float(stats.t.ppf(0.5 + confidence / 2, len(data) - 1) * stats.sem(data))
    return mean, mean - half, mean + half


def cell(values: Sequence[float], digits: int = 2) -> str:
    """The mean with its interval over seeds, signed."""
    mean, low, high = mean_interval(values)
    if len(values) < 2:
        return f"{mean:+.{digits}f}"
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def plain(values: Sequence[float], digits: int = 1) -> str:
    """The mean and the standard deviation over seeds."""
    data = np.asarray(values, dtype=float)
    spread = f" ± {data.std(ddof=1):.{digits}f}" if len(data) > 1 else ""
    return f"{data.mean():.{digits}f}{spread}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def replace_block(path: Path, name: str, text: str) -> None:
    """Puts `text` between the lines <!-- name --> and <!-- /name --> of a file.

    Raises:
        UserError: the file has no such lines.
    """
    content = path.read_text(encoding="utf-8")
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if not (start in content and end in content):
        raise UserError("no place for the table", where=str(path), fix=f"add {start} and {end}")
    before, rest = content.split(start, 1)
    after = rest.split(end, 1)[1]
    path.write_text(f"{before}{start}\n{text}\n{end}{after}", encoding="utf-8")
