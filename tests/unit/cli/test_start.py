"""Start-up imports what a command needs, and no more; what help says of exit codes is true."""

import ast
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from pipeline.cli.command import COMMANDS, Command, declared
from pipeline.cli.simulate import KeyBy
from pipeline.errors import ExitCode
from pipeline.sandbox.simulator import Keying

SLOW = ["alembic", "confluent_kafka", "pydantic_settings", "psycopg", "rich", "sqlalchemy"]
SLOW += ["structlog", "pipeline.sandbox"]
CLI = Path(import_module("pipeline.cli").__file__ or "").parent

HELP = """
import contextlib, io, json, sys
from pipeline.cli import main
for arguments in json.loads(sys.argv[1]):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        main(arguments)
print(json.dumps(sorted(sys.modules)))
"""


def modules_after(*calls, **environment):
    """The modules that are imported when these commands have run in one process."""
    done = subprocess.run(
        [sys.executable, "-c", HELP, json.dumps(calls)],
        capture_output=True,
        text=True,
        check=True,
        env={"LC_ALL": "C.UTF-8", **environment},
    )
    return set(json.loads(done.stdout))


def test_help_imports_nothing_that_only_work_needs():
    members = [["gaps", "list"], ["gaps", "accept"], ["dead-letters", "show"]]
    calls = [[*command, "--help"] for command in [[], *([name] for name in COMMANDS), *members]]

    imported = modules_after(*calls)

    assert imported.isdisjoint(SLOW)


def test_the_list_of_commands_needs_no_pydantic():
    """Typer imports it to read the arguments of a command, not to list commands."""
    imported = modules_after(["--help"])

    assert "pydantic" not in imported


def test_completion_imports_nothing_that_only_work_needs():
    asking = {"_PIPELINE_COMPLETE": "complete_bash", "COMP_WORDS": "pipeline re", "COMP_CWORD": "1"}
    program = (
        "import sys\nfrom pipeline.cli.app import app\n"
        "try: app(prog_name='pipeline')\n"
        "finally: print(*sorted(sys.modules), file=sys.stderr)"
    )

    done = subprocess.run(
        [sys.executable, "-c", program], env=asking, capture_output=True, text=True, check=False
    )

    assert done.stdout.split() == ["rebuild", "rewind"]
    assert set(done.stderr.split()).isdisjoint(SLOW)


def test_only_the_commands_that_start_the_sandbox_import_it():
    """All others run here as far as they get without settings: up to the exit with 78."""
    arguments = {"rebuild": ["--all"], "rewind": ["Notifications", "--to", "earliest"]}
    arguments |= {"dead-letters": ["list"], "gaps": ["list"]}
    calls = [
        [name, *arguments.get(name, [])] for name in COMMANDS if name not in {"demo", "simulate"}
    ]

    imported = modules_after(*calls)

    assert {"sqlalchemy", "pipeline.settings"} <= imported
    assert "pipeline.sandbox" not in imported


def commands_of(name):
    """The commands of a name: one, or those of a family."""
    found = declared(name)
    return [found] if isinstance(found, Command) else list(found.commands)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_exit_code_that_a_command_names_is_in_its_help(name):
    tree = ast.parse((CLI / f"{name.replace('-', '_')}.py").read_text())
    exits = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "typer.Exit"
    ]
    named = {
        ExitCode[node.attr]
        for call in exits
        for node in ast.walk(call)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "ExitCode"
    }

    shown = {code for command in commands_of(name) for code in command.exits}

    assert named <= shown
    for command in commands_of(name):
        assert {ExitCode.DONE, ExitCode.USAGE, ExitCode.CONFIGURATION} <= set(command.exits)
        assert all(f"{int(code)} {text}" in command.epilog for code, text in command.exits.items())


def test_the_option_json_and_the_line_of_exit_codes_are_written_once():
    texts = {path.name: path.read_text() for path in CLI.glob("*.py")}

    assert [name for name, text in texts.items() if '"--json"' in text] == ["command.py"]
    assert sorted(name for name, text in texts.items() if "Exit codes:" in text) == [
        "app.py",
        "command.py",
    ]


def test_simulate_offers_every_keying_of_the_simulator():
    assert [key.value for key in KeyBy] == [keying.value for keying in Keying]
