"""Its command line."""

from tenfold.cli import App, Command

app = App(
    name="tenfold",  # an installed distribution, for --version
    package="toy",
    description="A toy.",
    model="toy.module:Line",
    datamodule="toy.data:Rows",
    commands={
        "work": Command("toy.commands:work", "do some work"),
        "fail": Command("toy.commands:fail", "fail in many ways"),
        "show": Command("toy.commands:show", "show something"),
        "several": Command("toy.commands:several", "take many words"),
    },
    shortcuts={"route": "model.init_args.route"},
)
