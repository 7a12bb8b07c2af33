#!/usr/bin/env python3
"""Keeps uv.lock free of registry addresses, so that one lock serves every mirror.

Without arguments this is the git clean filter: the lock comes in, its neutral form goes out.
`--check` fails unless the staged lock is neutral and pins what the working copy pins.
`--install` sets the filter and the pre-commit hook up in this clone, and stages the lock through it
so that git knows the size of the working copy: `git status` is clean while the lock says the same.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

INSTALL = {
    "filter.neutral-lock.clean": "python3 .github/scripts/neutral_lock.py",
    "filter.neutral-lock.smudge": "cat",  # a required filter without one fails every checkout
    "filter.neutral-lock.required": "true",
    "core.hooksPath": ".githooks",
}
MEND = "run `python3 .github/scripts/neutral_lock.py --install` and `git add --renormalize uv.lock`"


def neutral(lock: str) -> str:
    """Returns the lock without the [options] block, registry addresses and download addresses."""
    lock = re.sub(r"^\[options[^\]]*\]\n(?:.+\n)*\n*", "", lock, flags=re.MULTILINE)
    lock = re.sub(r'\bregistry = "[^"]*"', 'registry = "default"', lock)
    files = r'^(sdist = \{ |    \{ )url = "[^"?#]*/([^"/?#]+)[^"]*"'
    return re.sub(files, r'\1path = "\2"', lock, flags=re.MULTILINE)


def pins(lock: str) -> list[str]:
    """Returns the name and version lines: what must not drift, whichever uv wrote the lock."""
    return re.findall(r"^(?:name|version) = .*", lock, flags=re.MULTILINE)


def complaint(staged: str, working: str) -> str | None:
    """Says in one line what is wrong with the staged lock, or returns None."""
    if staged != neutral(staged) or "://" in staged:
        at = next((n for n, line in enumerate(staged.splitlines(), 1) if "://" in line), None)
        where = f"line {at} holds an address" if at else "it has an [options] block or a registry"
        return f"uv.lock is not neutral in git ({where}): {MEND}"
    if pins(staged) != pins(working):
        return "uv.lock in git is out of date: run `uv lock` and `git add uv.lock`"
    return None


def git(*args: str) -> str:
    """Returns what a git command prints."""
    return subprocess.run(["git", *args], check=True, capture_output=True, encoding="utf-8").stdout


def main(args: list[str]) -> int:
    """Runs as a filter, a check or an installer; returns the exit status."""
    if args == ["--install"]:
        for key, value in INSTALL.items():
            git("config", key, value)
        git("add", "--renormalize", "uv.lock")
        return 0
    if args == ["--check"]:
        top = Path(git("rev-parse", "--show-toplevel").strip())
        problem = complaint(git("show", ":uv.lock"), (top / "uv.lock").read_text("utf-8"))
        print(problem or "uv.lock: neutral and up to date", file=sys.stderr if problem else None)
        return int(problem is not None)
    if args:
        print(__doc__, file=sys.stderr)
        return 2
    sys.stdout.buffer.write(neutral(sys.stdin.buffer.read().decode()).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
