"""`python -m benchmarks claims|speed [name] [--seeds N] [--only PART] [--fresh]`.

Claims go on where they were interrupted. After a change of the code, --fresh forgets what is there.
"""

import argparse
import importlib
import shutil
import sys

from benchmarks.results import Results, work_folder
from tenfold.cli import exit_status
from tenfold.errors import UserError

PACKAGES = ("bert-oversmoothing", "ds-net-plus", "filip-vl", "ickd")


def main(argv: list[str] | None = None) -> int:
    """Runs one kind of benchmark for the named package, or for all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("kind", choices=("claims", "speed"))
    parser.add_argument("name", nargs="?", help=f"one of {', '.join(PACKAGES)}; all if left out")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of every claim")
    parser.add_argument("--only", help="one part of the benchmark, such as tiny")
    parser.add_argument(
        "--fresh", action="store_true", help="forget earlier results and trainings of the claims"
    )
    options = parser.parse_args(argv)
    try:
        if options.name not in (None, *PACKAGES):
            raise UserError(f"no benchmark of {options.name!r}", fix=f"there is {PACKAGES}")
        for name in [options.name] if options.name else PACKAGES:
            if options.fresh and options.kind == "claims":
                shutil.rmtree(work_folder(name), ignore_errors=True)
                Results("claims", name).path.unlink(missing_ok=True)
            module = importlib.import_module(f"benchmarks.{name.replace('-', '_')}.{options.kind}")
            module.run(seeds=options.seeds, only=options.only)
    except BaseException as error:
        return exit_status(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
