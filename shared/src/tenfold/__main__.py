"""The command `tenfold`: what the core can tell about the machine."""

import sys

from tenfold.cli import App, Command

app = App(
    name="tenfold",
    package="tenfold",
    description="The shared core of the Tenfold packages.",
    commands={"doctor": Command("tenfold.device:doctor", "what will this machine run on?")},
)


def main() -> int:
    """Entry point."""
    return app.main()


if __name__ == "__main__":
    sys.exit(main())
