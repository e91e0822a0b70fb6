"""Whatever the log holds, no command lets it play tricks on a terminal, and JSON stays JSON."""

import json
import unicodedata

import pytest

from pipeline.projectors.orders import orders
from tests.commands import Commands, InProcess
from tests.given import event, order_event

# Escapes, C1 controls, lines of their own, turns of direction, invisible ones; and SQL, and length.
HOSTILE = [
    "\x1b[2J\x1b]0;title\x07",
    "\x9b2J\x85\x7f",
    "\u2028\u2029\r\n",
    "\u202egnp.exe\u2066\u200f\u061c",
    "\u200b\ufeff\U000e0041",
    "'; DROP TABLE pipeline.events; --",
    "%s {0} [bold]\\",
    "x" * 70,
]


@pytest.fixture
def run(monkeypatch, capsys, given):
    commands = Commands(database_url=given.database.dsn)
    here = InProcess(monkeypatch, capsys)
    return lambda *arguments: here(commands, *arguments)


@pytest.fixture
def hostile(given):
    """A log whose every text is hostile, with dead letters, a gap and a partition that stands."""
    for number, text in enumerate(HOSTILE):
        given(
            [
                event(f"ORDER.{text}", {**body(), "status": text, "fee": text}, at=number),
                event(text, {"id": text}),
                order_event(text, at=number, order=text, client_reference=text),
                json.dumps({text: text}).encode(),
                text.encode(),
            ],
            topic=f"topic {text}",
        )
    given.project(orders)
    with given.database.connect() as db:
        for text in HOSTILE:
            db.execute(
                "UPDATE pipeline.consumer_offsets SET problem = %s, problem_fix = %s, "
                "owner_group = %s, owner_member = %s, owner_host = %s WHERE topic = %s",
                [*[text] * 5, f"topic {text}"],
            )
            db.execute(
                'INSERT INTO pipeline.gaps (topic, "partition", first_offset, end_offset, reason) '
                "VALUES (%s, 0, 5, 6, %s)",
                [f"topic {text}", text],
            )
    return given


def body():
    return order_event("NEW", at=0)["object"]


COMMANDS = [
    ["events", "-n", "100"],
    ["events", "-n", "100", "--payload"],
    ["events", "--bad"],
    ["dead-letters", "list"],
    ["status"],
    ["gaps", "list"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_no_command_prints_control_characters(hostile, run, command):
    for_people, for_programs = run(*command), run(*command, "--json")

    assert for_people.out.count("topic ") >= len(HOSTILE)
    for output in (for_people.out, for_people.err, for_programs.out, for_programs.err):
        assert fooling(output) == set()
    documents = [json.loads(line) for line in for_programs.out.split("\n") if line]
    assert "topic \x1b[2J\x1b]0;title\x07" in json.dumps(documents, ensure_ascii=False).replace(
        "\\u001b", "\x1b"
    ).replace("\\u0007", "\x07")


def test_a_dead_letter_of_a_hostile_event_is_shown_in_full(hostile, run):
    letters = run("dead-letters", "list", "--json").json
    assert len(letters) >= len(HOSTILE)

    for letter in letters:
        coordinates = f"{letter['topic']}:{letter['partition']}:{letter['offset']}"
        shown = run("dead-letters", "show", coordinates, "--payload")
        assert shown.code == 0, shown.err
        assert fooling(shown.out + shown.err) == set()
        assert run("dead-letters", "show", coordinates, "--json").json["rejections"]


def fooling(output: str) -> set[str]:
    """Controls, invisible characters and separators of lines, but for the end of a line."""
    return {
        character
        for character in output
        if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    } - {"\n"}
