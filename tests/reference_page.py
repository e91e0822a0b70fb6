"""The page `docs/reference.md`, written from the declarations of the commands and settings.

``python -m tests.reference_page`` writes it, after a command or a setting has changed.
"""

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Le, MaxLen
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from pipeline.cli.command import COMMANDS, Command, declared
from pipeline.settings import Settings

IN_EVERY_COMMAND = ("wrong usage", "a setting, a right or the schema is wrong")

PAGE = Path(__file__).parent.parent / "docs" / "reference.md"

TEXT = """\
# Commands and settings

Written by `python -m tests.reference_page` from the program's declarations.
`pipeline COMMAND --help` shows all options with an example. What to do at each exit code is in
[Operations](operations.md#exit-codes).

## Commands

Every command also ends with 2 (wrong usage), 78 (a setting, a right or the schema is wrong) and
128 + N (ended by signal N).

| command | does | further exit codes |
|---|---|---|
{commands}

## Settings

The value comes from the first of these sources that has it: the environment
(`PIPELINE_BATCH_ROWS`), a file that the environment names (`PIPELINE_BATCH_ROWS_FILE`), a file of
that name in the folder `PIPELINE_SECRETS_DIR`, the TOML file of `--config` or `PIPELINE_CONFIG`
(`batch_rows = 10000`), the default.

| setting | default | allowed | meaning |
|---|---|---|---|
{settings}
"""


def page() -> str:
    """The whole page."""
    return TEXT.format(
        commands="\n".join(_command(found) for found in commands()),
        settings="\n".join(
            f"| `PIPELINE_{name.upper()}` | {_default(field)} | {_allowed(field)} | "
            f"{_escaped(field.description or '')} |"
            for name, field in Settings.model_fields.items()
        ),
    )


def commands() -> Iterator[tuple[str, Command]]:
    """Every command with its full name: ``gaps list``."""
    for name in COMMANDS:
        found = declared(name)
        if isinstance(found, Command):
            yield name, found
        else:
            yield from ((f"{name} {member.name}", member) for member in found.commands)


def _command(found: tuple[str, Command]) -> str:
    name, command = found
    does = (command.function.__doc__ or "").partition("\n")[0]
    exits = "; ".join(
        f"{int(code)} {meaning}"
        for code, meaning in sorted(command.exits.items())
        if meaning not in IN_EVERY_COMMAND
    )
    return f"| `pipeline {name}` | {_escaped(does)} | {_escaped(exits)} |"


def _default(field: FieldInfo) -> str:
    match field.default:
        case None | () | {}:
            return ""
        case bool(value):
            return f"`{value}`".lower()
        case int(value):
            return f"{value:,}"
        case tuple(values):
            return f"`{','.join(values)}`"
        case value:
            return f"`{value}`"


def _allowed(field: FieldInfo) -> str:
    bounds = {type(bound): bound for bound in field.metadata}
    if Ge in bounds and Le in bounds:
        return f"{bounds[Ge].ge:,} to {bounds[Le].le:,}"
    if choices := list(_choices(field.annotation)):
        choices = [f"`{choice}`" for choice in choices]
        return ", ".join([*choices, *(["a time"] if datetime in _types(field.annotation) else [])])
    if MaxLen in bounds:
        return f"up to {bounds[MaxLen].max_length} characters"
    if field.annotation is bool:
        return "`true`, `false`"
    return "secret" if SecretStr in _types(field.annotation) else "text"


def _choices(annotation: Any) -> Iterator[str]:
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
        return
    for part in get_args(annotation):
        yield from _choices(part)


def _types(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        yield from _types(part)


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page())
