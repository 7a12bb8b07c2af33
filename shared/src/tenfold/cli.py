"""One command line for all packages: a table of plain functions, and Lightning's four verbs.

A package declares its commands in a dozen lines:

    app = App(
        name="ds-net-plus",
        package="ds_net_plus",
        description="One network that spends less compute on easy images.",
        model="ds_net_plus.module:SupernetModule",
        datamodule="ds_net_plus.data:ImageData",
        commands={"demo": Command("ds_net_plus.commands:demo", "train, compare and draw")},
        shortcuts={"route": "model.init_args.route"},
    )

    def main() -> int:
        return app.main()

Everything is named by strings "module:attribute" and imported when its command is run, so that
`--help` needs neither torch nor Lightning. Two kinds of command look alike to the person:

- a plain function: its signature is its command line, its docstring the help;
- fit, validate, test and predict: LightningCLI, dressed in `tenfold.verbs`.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import itertools
import json
import logging
import os
import re
import sys
import traceback
import warnings
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from tenfold.errors import UserError
from tenfold.recipes import recipe_files

E = TypeVar("E", bound=BaseException)

VERBS = {
    "fit": "train; --config NAME for a recipe, --resume auto to go on after an interruption",
    "validate": "measure on the validation data, with --ckpt FILE",
    "test": "measure on the test data, with --ckpt FILE",
    "predict": "run on new data, with --ckpt FILE",
}
RECIPES = "list the packaged recipes, or print one"


@dataclass(frozen=True)
class Command:
    """A plain function as a command.

    Attributes:
        target: The function as "module:name". It returns None or an exit status.
        help: What it does, in one line, for the table of commands.
    """

    target: str
    help: str


@dataclass(frozen=True)
class App:
    """The command line of one package.

    Attributes:
        name: The command, which is also the name of the distribution.
        package: The import package, where the folder `recipes` lies.
        description: What the package is for, in a line.
        model: The default LightningModule as "module:Class"; any other can be named by
            `--model CLASS_PATH`. Without it the app has only the plain functions.
        datamodule: The default LightningDataModule, likewise.
        commands: The plain functions.
        shortcuts: Short options of fit, validate, test and predict and what they stand for, such
            as {"route": "model.init_args.route"} for `--route 2`.
    """

    name: str
    package: str
    description: str
    model: str | None = None
    datamodule: str | None = None
    commands: dict[str, Command] = field(default_factory=dict)
    shortcuts: dict[str, str] = field(default_factory=dict)

    def main(self, argv: list[str] | None = None) -> int:
        """Run one command line, `sys.argv` by default, and return its exit status."""
        try:
            with warnings.catch_warnings():
                silence_noise()
                return self._dispatch(sys.argv[1:] if argv is None else argv)
        except BaseException as error:
            return exit_status(error)

    def _dispatch(self, argv: list[str]) -> int:
        command, *rest = argv or ["--help"]
        if command in ("-h", "--help"):
            print(self.help())
        elif command == "--version":
            print(self.name, metadata.version(self.name))
        elif command in self.commands:
            return run_function(f"{self.name} {command}", self.commands[command], rest)
        elif command in VERBS and self.model:
            from tenfold.verbs import run_verb

            return run_verb(self, command, rest)
        elif command == "recipes" and self.model:
            if {"-h", "--help"} & {*rest}:
                print(f"usage: {self.name} recipes [NAME ...]\n\n{RECIPES}")
            else:
                self.print_recipes(*rest)
        else:
            close = difflib.get_close_matches(command, self.table(), n=1)
            fix = f"did you mean {close[0]}?" if close else f"see {self.name} --help"
            raise UserError(f"there is no command {command!r}", fix=fix)
        return 0

    def table(self) -> dict[str, str]:
        """Every command with its line of help."""
        own = {name: command.help for name, command in self.commands.items()}
        return own | VERBS | {"recipes": RECIPES} | own if self.model else own

    def help(self) -> str:
        """What `--help` prints."""
        width = max(map(len, self.table()), default=0)
        rows = "\n".join(f"  {name:<{width}}  {line}" for name, line in self.table().items())
        return (
            f"usage: {self.name} COMMAND [OPTIONS]\n\n{self.description}\n\ncommands:\n{rows}\n\n"
            f"{self.name} COMMAND --help explains a command."
        )

    def recipes(self) -> dict[str, Path]:
        """The packaged recipes by name."""
        return recipe_files(self.package)

    def recipe(self, name: str) -> Path:
        """The file that `--config NAME` means: a path if there is such a file, else a recipe.

        Raises:
            UserError: if it is neither.
        """
        if Path(name).is_file():
            return Path(name)
        if name not in self.recipes():
            fix = f"the recipes are {', '.join(self.recipes()) or 'none'}"
            raise UserError(f"no recipe and no file is called {name!r}", fix=fix)
        return self.recipes()[name]

    def print_recipes(self, *names: str) -> None:
        """Print the named recipes, or the table of all with the first comment line of each."""
        for name in names:
            print(self.recipe(name).read_text(encoding="utf-8"), end="")
        width = max(map(len, self.recipes()), default=0)
        for name, path in {} if names else self.recipes().items():
            first = path.read_text(encoding="utf-8").partition("\n")[0]
            about = first.removeprefix("#").strip() if first.startswith("#") else ""
            print(f"{name:<{width}}  {about}".rstrip())


# -- exit status -------------------------------------------------------------------------------


def exit_status(error: BaseException) -> int:
    """Tell the person about an exception; 2 for their input, 130 for a signal, 1 for our bug.

    A file or folder that cannot be read or written counts as input.
    """
    if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
        error = error.__context__  # Lightning exits with 1 on Ctrl-C
    if type(error).__name__ == "SIGTERMException":  # Lightning's, a SystemExit without a code
        error = KeyboardInterrupt("interrupted by SIGTERM")
    if isinstance(error, SystemExit):
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if not isinstance(error, Exception):  # Ctrl-C, or tenfold.training.Interrupted
        print(str(error) or "interrupted", file=sys.stderr)
        return 130
    told = cause(error, UserError)
    if told is None and isinstance(error, OSError) and error.filename:  # a place of the person's
        told = UserError(error.strerror or "cannot be used", where=str(error.filename))
    if told is None or os.environ.get("TENFOLD_DEBUG") == "1":
        traceback.print_exception(error)
    if told is None:
        return 1
    print(f"error: {told}", file=sys.stderr)
    return 2


def cause(error: BaseException | None, kind: type[E]) -> E | None:
    """The first of a kind in the chain: jsonargparse wraps what a constructor raises."""
    while error is not None and not isinstance(error, kind):
        error = error.__cause__
    return error


def parse_error(error: argparse.ArgumentError, prog: str) -> UserError:
    """What a parser complains about, in one line."""
    return UserError(short_parse_error(str(error)), fix=f"see {prog} --help")


def short_parse_error(message: str) -> str:
    """The cause out of jsonargparse's indented account of everything that it tried."""
    keys, reasons, given = [], [], ""
    for line in (line.strip(" -") for line in message.splitlines()):
        if key := re.match(r'Parser key "([^"]+)":? ?(.*)', line):
            keys.append(key[1])
            line = key[2]
        if value := re.match(r"Given value: (?!Namespace|NestedArg)(.*)", line):
            given = given or value[1]
        noise = r"Does not validate|Subtypes:|Errors:|Given|Problem with|.*'NoneType'|.*a path but"
        if line and not re.match(noise, line):
            reasons.append(line.replace(". Got value: ", ", got "))
    reason = re.sub(r"<class '([\w.]+)'>|typing\.", r"\1", " or ".join(reasons))
    reason = re.sub("^Expected an? ", "expected ", reason.replace("or Expected a ", "or "))
    got = f", got {given}" if given and given not in reason else ""
    return (f"--{'.'.join(keys)}: " if keys else "") + reason + got


def underscored(argv: list[str]) -> list[str]:
    """Options as jsonargparse knows them, --target_madds for --target-madds."""
    return [re.sub(r"^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), a) for a in argv]


# -- plain functions ---------------------------------------------------------------------------


def run_function(prog: str, command: Command, argv: list[str]) -> int:
    """Run a plain function with arguments from the command line or from `--config FILE`.

    Parameters without a default are positional arguments (options, if keyword-only), all others
    options; `--flag` alone sets a bool. A trailing underscore is not part of an option's name, and
    a name of one letter may have one dash.

    Raises:
        UserError: if the arguments do not fit the signature.
    """
    from jsonargparse import (
        ActionConfigFile,  # pyright: ignore[reportPrivateImportUsage] (it is in __all__)
        ArgumentParser,
    )

    class DashParser(ArgumentParser):
        def format_help(self, *args: Any, **kwargs: Any) -> str:
            text = super().format_help(*args, **kwargs)
            return re.sub(r"--\w+", lambda flag: flag[0].replace("_", "-"), text)

    function = load(command.target)
    about = (inspect.getdoc(function) or command.help).partition("\n\n")[0]
    parser = DashParser(prog=prog, description=about, exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file of these options")
    parser.add_function_arguments(function, as_group=False, as_positional=True, sub_configs=True)
    for action in parser._actions:
        if isinstance(action.default, bool):
            action.nargs, action.const = "?", True
        for flag in [flag for flag in action.option_strings if flag.endswith("_")]:
            # a parameter that would be a word of Python's, from_ for --from
            action.option_strings = [flag.rstrip("_")]
            parser._option_string_actions[flag.rstrip("_")] = action
        for flag in [flag for flag in action.option_strings if re.fullmatch("--[a-z]", flag)]:
            action.option_strings = [*action.option_strings, flag[1:]]
            parser._option_string_actions[flag[1:]] = action
    try:
        values = parser.parse_args(gathered(function, placed(function, underscored(argv))))
    except argparse.ArgumentError as error:
        raise parse_error(error, prog) from error
    except UnicodeDecodeError as error:  # of a --config that is a picture, say
        raise UserError(f"--config: not a text file, {error}") from error
    values = parser.instantiate(values)
    values.pop("config", None)
    status = function(**values)
    return status if isinstance(status, int) else 0


def placed(function: Any, argv: list[str]) -> list[str]:
    """Bare words in front, one for each parameter that is not keyword-only.

    `zoo show resnet20` means `zoo show --name=resnet20` where only the first has no default. A
    `list[str]` takes all words that are left: `compare a b` means `compare '["a", "b"]'`.
    """
    parameters = inspect.signature(function).parameters.values()
    words = [*itertools.takewhile(lambda word: not word.startswith("-"), argv)]
    rest, named = argv[len(words) :], []
    for parameter in parameters:
        if not words or parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
            break
        word = words.pop(0)
        if re.match(r"list\[str\]", str(parameter.annotation)):
            word, words = json.dumps([word, *words]), []
        named.append(word if parameter.default is parameter.empty else f"--{parameter.name}={word}")
    return [*named, *words, *rest]


def gathered(function: Any, argv: list[str]) -> list[str]:
    """`--input 3 224 224` as `--input [3,224,224]`, for parameters that are lists of numbers."""
    words = list(argv)
    for parameter in inspect.signature(function).parameters.values():
        if not re.search(r"list\[(int|float)\]", str(parameter.annotation)):
            continue
        if (flag := f"--{parameter.name}") in words:
            start = words.index(flag) + 1
            is_number = re.compile(r"[+-]?\.?\d[\d.eE+-]*").fullmatch
            numbers = list(itertools.takewhile(is_number, words[start:]))
            words[start : start + len(numbers)] = [f"[{','.join(numbers)}]"] if numbers else []
    return words


def load(target: str) -> Any:
    """What "module:attribute" names."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


# -- noise -------------------------------------------------------------------------------------


def silence_noise() -> None:
    """Hide what Lightning says in every run and nobody can act on; every other warning stays."""
    for message in (
        "LightningCLI's args parameter",  # on purpose: ours are rewritten
        "Experiment logs directory",  # of the run that is resumed
        "Checkpoint directory",
        "The dirpath has changed",  # test writes beside the checkpoints of fit
        "The .* does not have many workers",
        "The number of training batches",  # is smaller than the logging interval
        ".*LeafSpec",
        "Found .* module.s. in eval mode",  # frozen nets and teachers stay so on purpose
        "Total length of `list` across ranks",  # a data module without validation data
    ):
        warnings.filterwarnings("ignore", message)
    for name in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"lightning.pytorch.{name}").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    noise = "Tip:|PU available: False|to estimate number|`weights_only` was not set"
    return not re.search(noise, record.getMessage())
