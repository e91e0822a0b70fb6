"""What all commands have in common: how they are declared, loaded, and which exit codes they have.

A command is a value: ``@command(…)`` over its function. Its module and its name are the same word,
so that the command line imports the module of the command that it runs, and no other. What a
command needs to work (database, Kafka, read models) is imported in its function: help and
completion show a command without it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pipeline.errors import ExitCode

COMMANDS = (
    *("demo", "migrate", "check", "run", "ingest", "project", "status", "events"),
    *("rebuild", "verify", "rewind", "dead-letters", "gaps", "simulate"),
)
"""In the order in which a newcomer meets them."""

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]

PLAIN: dict[str, Any] = {
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "rich_markup_mode": None,  # plain text keeps its examples, on a terminal of any width
}
"""How typer shows commands."""


class Servers(Enum):
    """The servers that a command connects to; what exit code 69 means for it."""

    NONE = None
    DATABASE = "the database is unavailable"
    KAFKA = "Kafka is unavailable"
    BOTH = "the database or Kafka is unavailable"


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: What people type.
        function: Its parameters are the options, its docstring is the help.
        exits: The exit codes that it can end with, and what each means.
        by_signal: What happens on a signal.
    """

    name: str
    function: Callable[..., None]
    exits: Mapping[ExitCode, str]
    by_signal: str

    @property
    def epilog(self) -> str:
        """The exit codes, for the help."""
        codes = [f"{int(code)} {meaning}" for code, meaning in sorted(self.exits.items())]
        return f"Exit codes: {'; '.join([*codes, self.by_signal])}."

    def add_to(self, app: typer.Typer) -> None:
        """Make it a command of typer's."""
        app.command(self.name, epilog=self.epilog)(self.function)


@dataclass(frozen=True)
class Family:
    """Several commands under one name, as ``gaps list`` and ``gaps accept``."""

    help: str
    commands: Sequence[Command]

    def add_to(self, app: typer.Typer) -> None:
        """Make them commands of typer's."""
        app.info.help = self.help
        app.info.no_args_is_help = True
        app.callback()(lambda: None)
        for member in self.commands:
            member.add_to(app)


def command(
    exits: Mapping[ExitCode, str],
    *,
    servers: Servers,
    by_signal: str = "128 + N ended by signal N before it was done",
    name: str | None = None,
) -> Callable[[Callable[..., None]], Command]:
    """Declare a command.

    Args:
        exits: What its own exit codes mean. Those that mean the same for all commands, wrong usage
            for example, are added.
        servers: What it connects to.
        by_signal: What happens on a signal.
        name: What people type, if it is not the function's name.
    """
    meanings: dict[ExitCode, str] = {
        ExitCode.USAGE: "wrong usage",
        ExitCode.CONFIGURATION: "a setting, a right or the schema is wrong",
        **({ExitCode.UNAVAILABLE: servers.value} if servers.value else {}),
        **exits,
    }

    def declare(function: Callable[..., None]) -> Command:
        return Command(name or function.__name__, function, meanings, by_signal)

    return declare


class Lazy(TyperGroup):
    """The commands of ``COMMANDS``, each imported when it is needed."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ANN401, ARG002 - typer's own type
        """Their names, for the help."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ANN401, ARG002 - typer's own type
        """One of them, or None."""
        return load(cmd_name) if cmd_name in COMMANDS else None


def declared(name: str) -> Command | Family:
    """The command or the family of commands of this name."""
    word = name.replace("-", "_")
    found: Command | Family = getattr(import_module(f"pipeline.cli.{word}"), word)
    return found


def load(name: str) -> Any:  # noqa: ANN401 - typer's own type
    """The command of this name, as typer runs it."""
    app = typer.Typer(name=name, **PLAIN)
    declared(name).add_to(app)
    return typer.main.get_command(app)
