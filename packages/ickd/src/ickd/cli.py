"""Entry point: the table of commands."""

from tenfold.cli import App

app = App(
    name="ickd",
    package="ickd",
    description="Distil a small network from a large one: ICKD and twenty other losses.",
)


def main() -> int:
    """Runs the command line."""
    return app.main()
