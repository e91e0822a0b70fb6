"""Read models and views are made as they are declared, and nothing of others is lost.

Each test is a later release: a catalogue in which something differs from what is installed.
"""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import Row

from pipeline import catalogue
from pipeline.errors import ConfigurationError
from pipeline.projection.loop import run_projection
from pipeline.projectors.orders import orders
from pipeline.projectors.users import users
from pipeline.readmodel import Children, EntityTable, date, integer, quantity, text, uuid
from pipeline.rebuild.rebuild import rebuild, rebuild_in_place
from pipeline.schema.migrate import migrate, planned
from tests.declared import with_field, with_models, with_more, without_field
from tests.given import Event, Given, event, order_event, some_id
from tests.servers import Postgres
from tests.servers.databases import Database, fresh_database, templates

FOLDER = Path(__file__).resolve().parents[2]

LETTERS = EntityTable(
    table="letters",
    comment="Letters.",
    events="LETTER.*",
    key=uuid("letter_id", "Id.", path="id"),
    fields=[text("stamp", "Stamp."), text("weight", "Grams.", indexed=True)],
    children=[
        Children(
            table="letter_pages",
            comment="Pages.",
            path="pages",
            fields=[text("words", "How many.", path="words")],
        )
    ],
)
PER_STAMP = """\
-- Personal data: none, reviewed 2026-11-29.
CREATE VIEW upvest.letters_per_stamp AS
SELECT stamp, count(*) AS letters FROM upvest.letters GROUP BY stamp;

COMMENT ON VIEW upvest.letters_per_stamp IS 'Letters by stamp.';
COMMENT ON COLUMN upvest.letters_per_stamp.stamp IS 'Stamp.';
COMMENT ON COLUMN upvest.letters_per_stamp.letters IS 'How many.';
"""
V1 = with_models(LETTERS, letters_per_stamp=PER_STAMP)
"""The release before."""

NUMBERS = replace(
    LETTERS,
    fields=[text("stamp", "Stamp."), quantity("weight", "Grams.")],
    children=[replace(LETTERS.children[0], fields=[integer("words", "How many.")])],
)
"""Columns have other types, in the child too, and an index goes."""
ANOTHER_KEY = replace(LETTERS, key=uuid("id", "Id."))
STATE = """
SELECT c.oid::regclass::text, c.relkind::text, coalesce(pg_get_viewdef(c.oid), ''),
       coalesce(obj_description(c.oid), ''), coalesce(a.attname, ''), coalesce(a.attnum, 0),
       coalesce(format_type(a.atttypid, a.atttypmod), ''), coalesce(a.attnotnull, false),
       coalesce(col_description(c.oid, a.attnum), ''),
       coalesce(pg_get_indexdef(c.oid), '')
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
WHERE n.nspname IN ('upvest', 'upvest_personal', 'bi') AND c.relkind IN ('r', 'v', 'm', 'i')
ORDER BY 1, 6
"""
RECORD = """
SELECT name, kind, definition, comment, details, made_as = to_regclass(name)
FROM pipeline.declared_objects ORDER BY name
"""


@pytest.fixture
def given(database) -> Iterator[Given]:
    made = Given(database)
    yield made
    made.close()


@pytest.fixture(scope="module")
def release_before(_servers, _templates) -> Callable[[Postgres], Database]:
    """A database of the release before, with letters."""

    def prepare(database: Database) -> None:
        migrate(database.url, V1)
        made = Given(database)
        made([letter(number) for number in range(30)]).project(LETTERS)
        made.close()

    return templates(_servers, prepare, _templates)


@pytest.fixture
def letters(postgres_server, release_before) -> Iterator[Given]:
    """A database of the release before, with letters, for one test."""
    with fresh_database(postgres_server, template=release_before(postgres_server)) as database:
        made = Given(database)
        yield made
        made.close()


@pytest.fixture
def anna(request) -> Iterator[psycopg.Connection]:
    """An analyst with a schema of her own, in the test's database."""
    given = request.getfixturevalue("letters" if "letters" in request.fixturenames else "given")
    name = f"anna_{given.database.name}"
    with given.database.connect() as db:
        db.execute(f"CREATE ROLE {name}")
        db.execute(f"CREATE SCHEMA bi AUTHORIZATION {name}")
        db.execute(f"GRANT USAGE ON SCHEMA upvest TO {name}")
        db.execute(f"GRANT SELECT, REFERENCES ON ALL TABLES IN SCHEMA upvest TO {name}")
        db.execute(f"SET ROLE {name}")
        yield db
        db.execute("RESET ROLE")
        db.execute(f"DROP OWNED BY {name} CASCADE")
        db.execute(f"DROP ROLE {name}")


def letter(number: int) -> Event:
    body = {
        "id": some_id(f"letter {number}"),
        "stamp": f"s{number % 3}",
        "weight": str(number),
        "pages": [{"words": str(words)} for words in range(2)],
    }
    return event("LETTER.SENT", body, at=number)


def state(given: Given) -> tuple[Sequence[Row[Any]], Sequence[Row[Any]]]:
    """Everything of the two schemas, and our record of it."""
    return given.query(STATE), given.query(RECORD)


def executed(given: Given, name: str) -> str:
    """The statements that `migrate` has kept for an object."""
    rows = given.query(
        "SELECT statements FROM pipeline.schema_changes WHERE object = :name ORDER BY change_id",
        name=name,
    )
    return "\n".join(statement for row in rows for statement in row.statements)


@contextmanager
def reading(given: Given, query: str) -> Iterator[list[str]]:
    """Readers that never stop; what went wrong for them."""
    stop, errors = threading.Event(), []

    def read() -> None:
        with given.database.connect() as db:
            while not stop.is_set():
                try:
                    db.execute(query.encode())
                except psycopg.Error as error:
                    errors.append(str(error))

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        try:
            yield errors
        finally:
            stop.set()
            for reader in readers:
                reader.result()


# --------------------------------------------------------------------------------- what is declared


def test_one_file_adds_a_read_model_and_one_file_a_view(given, tmp_path):
    (tmp_path / "letters.py").write_text(
        "from pipeline.readmodel import EntityTable, text, uuid\n"
        "letters = EntityTable(table='letters', comment='Letters.', events='LETTER.*',\n"
        "    key=uuid('letter_id', 'Id.', path='id'), fields=[text('stamp', 'Stamp.')])\n"
    )
    (tmp_path / "letters_per_stamp.sql").write_text(PER_STAMP)
    declared = catalogue.load((tmp_path,))

    due = planned(given.database.url, declared)
    done = migrate(given.database.url, declared)
    given([letter(number) for number in range(6)]).project(declared.by_name["letters"])

    assert [str(step) for step in due.steps] == [
        "upvest.letters: create table",
        "upvest.letters_per_stamp: create view",
    ]
    assert done.steps == due.steps
    assert given.query("SELECT * FROM upvest.letters_per_stamp ORDER BY 1") == [
        ("s0", 2),
        ("s1", 2),
        ("s2", 2),
    ]
    assert "CREATE TABLE upvest.letters (" in executed(given, "upvest.letters")
    assert "CREATE VIEW" in executed(given, "upvest.letters_per_stamp")
    assert migrate(given.database.url, declared).is_empty


SECRET = replace(LETTERS, fields=[*LETTERS.fields, text("street", "Where to.", personal=True)])
NONE = "-- Personal data: none, reviewed 2026-11-29.\nCREATE VIEW upvest.bad AS\nSELECT "
SHOWN = "-- Personal data: shown.\nCREATE VIEW upvest_personal.secret AS\nSELECT street FROM "
SHOWN += "upvest_personal.letters;\nCOMMENT ON VIEW upvest_personal.secret IS 'S.';\n"
SHOWN += "COMMENT ON COLUMN upvest_personal.secret.street IS 'S.';"
BAD_VIEWS = [
    ("stamp FRM upvest.letters", 'bad.sql:3: view upvest.bad cannot be created: syntax error'),
    ("stamp upvest.letters", 'near "."'),
    ("stamp,\n  wieght FROM upvest.letters", "bad.sql:4: view upvest.bad cannot be created: "
     'column "wieght" does not exist. Perhaps you meant to reference the column "letters.we'),
    ("stamp FROM upvest.leters", 'bad.sql:3: view upvest.bad cannot be created: relation "upvest.'),
    ("u.a FROM upvest_personal.usrs u", 'relation "upvest_personal.usrs" does not exist'),
    ("lenght(stamp) FROM upvest.letters", "bad.sql:3: view upvest.bad cannot be created: function"),
    ("stamp, weight FROM upvest.letters GROUP BY 1", "must appear in the GROUP BY clause"),
    ("CAST(stamp AS txt) FROM upvest.letters", 'type "txt" does not exist'),
    ("stamp + 1 FROM upvest.letters", "operator does not exist"),
    ("stamp FROM upvest.letters, upvest_personal.letters l", 'reference "stamp" is ambig'),
    ("stamp FROM upvest.letters; COMMENT ON COLUMN upvest.bad.stmp IS 'x'", '"stmp" of rel'),
    ("street FROM upvest_personal.letters", "reads personal data: upvest_personal.letters.street."),
    ("1 AS a FROM upvest_personal.letters WHERE street > ''", "upvest_personal.letters.street"),
    ("to_jsonb(l) AS l FROM upvest_personal.letters l", "whole rows of upvest_personal.letters"),
    ("street AS a FROM upvest_personal.secret", "reads personal data: upvest_personal.secret"),
    ("stamp FROM upvest.letters", "Add to the file: COMMENT ON VIEW upvest.bad IS '…'; "
     "COMMENT ON COLUMN upvest.bad.stamp IS '…';"),
    ("stamp FROM upvest.letters; COMMENT ON VIEW upvest.bad IS ' '", "COMMENT ON VIEW upvest.bad"),
]  # fmt: skip


def test_a_view_that_cannot_be_made_or_shown_is_refused_before_anything_changes(given):
    """By a plan too: the views are tried over empty tables as declared, and not as they are."""
    migrate(given.database.url, V1)
    before = state(given)
    refused: dict[str, set[str]] = {}

    for query, _ in BAD_VIEWS:
        release = with_models(SECRET, bad=f"{NONE}{query};", secret=SHOWN, aaa=OF_BAD)
        for command in (planned, migrate):
            with pytest.raises(ConfigurationError) as error:
                command(given.database.url, release)
            refused.setdefault(query, set()).add(str(error.value))

    assert {query: text for query, text in refused.items() if len(text) > 1} == {}
    missing = [
        (query, refused[query]) for query, what in BAD_VIEWS if what not in min(refused[query])
    ]
    assert missing == []
    assert state(given) == before


OF_BAD = (
    "-- Personal data: none, reviewed.\nCREATE VIEW upvest.aaa AS SELECT 1 AS n FROM upvest.bad;\n"
    "COMMENT ON VIEW upvest.aaa IS 'A.';\nCOMMENT ON COLUMN upvest.aaa.n IS 'N.';"
)
"""A view that reads the bad one: the bad one is named."""


def test_a_view_that_the_rebuilt_table_would_not_allow_is_refused_at_once(letters):
    """The sum of what is a text from the next rebuild on."""
    total = PER_STAMP.replace("count(*)", "sum(weight)")
    migrate(letters.database.url, with_models(NUMBERS))
    rebuild(letters.engine, NUMBERS)
    numbers = with_models(NUMBERS, letters_per_stamp=total)
    migrate(letters.database.url, numbers)

    with pytest.raises(
        ConfigurationError, match=r"letters_per_stamp\.sql:3: .* function sum\(text\)"
    ):
        migrate(letters.database.url, with_models(LETTERS, letters_per_stamp=total))

    assert planned(letters.database.url, numbers).is_empty


def test_views_that_read_each_other_are_made_in_any_order(given):
    views = {
        "aaa": PER_STAMP.replace("letters_per_stamp", "aaa").replace(
            "upvest.letters ", "upvest.z "
        ),
        "z": "-- Personal data: none, reviewed 2026-11-29.\n"
        "CREATE VIEW upvest.z AS SELECT stamp FROM upvest.letters;\n"
        "COMMENT ON VIEW upvest.z IS 'Z.';\nCOMMENT ON COLUMN upvest.z.stamp IS 'Stamp.';\n",
    }

    migrate(given.database.url, with_models(LETTERS, **views))

    assert given.scalar("SELECT count(*) FROM upvest.aaa") == 0


@pytest.mark.parametrize("table", ["letters", "letter_pages"])
def test_a_table_that_was_dropped_by_hand_is_recreated_and_filled(letters, table):
    before = state(letters)[0], letters.rows(table), letters.query("TABLE upvest.holdings")
    letters.execute(f"DROP TABLE upvest.{table} CASCADE")
    letters.execute("DROP VIEW upvest.holdings CASCADE")

    migrate(letters.database.url, V1)
    letters.project(LETTERS)

    assert (
        state(letters)[0],
        letters.rows(table),
        letters.query("TABLE upvest.holdings"),
    ) == before
    assert migrate(letters.database.url, V1).is_empty


def test_a_view_that_was_changed_by_hand_is_restored(letters):
    before = state(letters)
    letters.execute(
        "CREATE OR REPLACE VIEW upvest.letters_per_stamp AS "
        "SELECT 'x'::text AS stamp, 1::bigint AS letters"
    )

    steps = migrate(letters.database.url, V1).steps

    assert [str(step) for step in steps] == [
        "upvest.letters_per_stamp: replace view: somebody changed it"
    ]
    assert state(letters) == before


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE upvest.letters ALTER COLUMN weight TYPE varchar(9)",
        "ALTER TABLE upvest.letters DROP COLUMN weight",
    ],
)
def test_a_table_that_was_changed_by_hand_is_rebuilt_as_declared(letters, change):
    rows = letters.rows("letters")
    letters.execute(change)

    steps = migrate(letters.database.url, V1).steps
    marked = letters.scalar("SELECT fingerprint FROM pipeline.projectors")
    rebuild(letters.engine, LETTERS)

    assert [step.name for step in steps][:1] == ["upvest.letters"]
    assert marked == "changed by hand"
    assert sorted(
        map(str, letters.query("SELECT letter_id, stamp, weight FROM upvest.letters"))
    ) == (sorted(str((row.letter_id, row.stamp, row.weight)) for row in rows))
    assert migrate(letters.database.url, V1).is_empty


# ----------------------------------------------------------------------------------------- in place


def test_an_additive_change_is_made_in_place_under_an_analysts_view(letters, anna):
    anna.execute("CREATE VIEW bi.mine AS SELECT * FROM upvest.letters")
    before = letters.scalar("SELECT 'upvest.letters'::regclass::oid")
    changed = replace(
        with_more(LETTERS, date("sent_on", "Day.", path="sent_on")), comment="Letters sent."
    )
    changed = with_field(changed, "stamp", indexed=True, comment="Its stamp.")
    changed = with_field(changed, "weight", indexed=False)
    release = with_models(changed, letters_per_stamp=PER_STAMP)

    done = migrate(letters.database.url, release)
    rebuild(letters.engine, changed)

    assert letters.scalar("SELECT 'upvest.letters'::regclass::oid") == before
    assert anna.execute("SELECT count(*) FROM bi.mine").fetchone() == (30,)
    assert letters.scalar("SELECT obj_description('upvest.letters'::regclass)") == "Letters sent."
    comment = "SELECT col_description('upvest.letters'::regclass, 2)"
    assert letters.scalar(comment) == "Its stamp."
    assert [row.indexname for row in letters.query(INDEXES)] == [
        "letters_pkey",
        "letters_stamp_idx",
    ]
    assert "CREATE INDEX CONCURRENTLY letters_stamp_idx" in executed(letters, "upvest.letters")
    assert [step.what for step in done.steps if step.name == "upvest.letters"] == [
        "add sent_on, comment of stamp, comment",
        "drop index letters_weight_idx",
        "create index letters_stamp_idx",
    ]
    assert migrate(letters.database.url, release).is_empty


INDEXES = "SELECT indexname FROM pg_indexes WHERE tablename = 'letters' ORDER BY 1"


def test_an_index_that_a_kill_left_invalid_is_recreated(letters):
    letters.execute(
        "UPDATE pg_index SET indisvalid = false "
        "WHERE indexrelid = 'upvest.letters_weight_idx'::regclass"
    )

    steps = migrate(letters.database.url, V1).steps

    assert [step.what for step in steps] == [
        "drop index letters_weight_idx",
        "create index letters_weight_idx",
    ]
    assert letters.scalar(
        "SELECT indisvalid FROM pg_index WHERE indexrelid = 'upvest.letters_weight_idx'::regclass"
    )
    assert migrate(letters.database.url, V1).is_empty


# ------------------------------------------------------------------------------------- by a rebuild


def test_a_table_with_changed_types_is_built_separately_and_swapped_in_under_readers(letters):
    release = with_models(NUMBERS, letters_per_stamp=PER_STAMP)
    letters.execute("GRANT SELECT ON upvest.letters_per_stamp, upvest.letters TO pg_monitor")
    with reading(letters, "SELECT 1 / sign(sum(letters)) FROM upvest.letters_per_stamp") as errors:
        steps = migrate(letters.database.url, release).steps
        unchanged = letters.scalar("SELECT pg_typeof(weight)::text FROM upvest.letters LIMIT 1")
        difference = rebuild(letters.engine, NUMBERS)

    assert unchanged == "text"
    assert {step.name for step in steps} == {"upvest.letters", "upvest.letter_pages"}
    assert (errors, difference.is_replaced, difference.rows) == ([], True, 90)
    assert letters.scalar("SELECT sum(weight) FROM upvest.letters") == sum(range(30))
    assert letters.scalar("SELECT sum(words) FROM upvest.letter_pages") == 30
    assert [row.indexname for row in letters.query(INDEXES)] == ["letters_pkey"]
    for name in ("letters", "letters_per_stamp"):
        may = f"SELECT has_table_privilege('pg_monitor', 'upvest.{name}', 'SELECT')"
        assert letters.scalar(may)
    letters.execute("TRUNCATE upvest.letters")
    assert len(letters.project(NUMBERS)) == 30
    assert migrate(letters.database.url, release).is_empty


@pytest.mark.parametrize("changed", [ANOTHER_KEY, without_field(LETTERS, "weight")])
def test_a_table_with_another_key_or_a_removed_column_is_swapped_in(letters, changed):
    release = with_models(changed, letters_per_stamp=PER_STAMP)

    migrate(letters.database.url, release)
    with pytest.raises(ConfigurationError, match=r"Run `pipeline rebuild letters`"):
        rebuild_in_place(letters.engine, changed)
    difference = rebuild(letters.engine, changed)

    assert difference.is_replaced
    columns = {column.name for column in changed.tables[0].columns}
    assert set(letters.rows("letters")[0]._fields) == columns
    assert letters.scalar("SELECT sum(letters) FROM upvest.letters_per_stamp") == 30
    assert migrate(letters.database.url, release).is_empty


def test_a_view_that_needs_a_rebuilt_table_is_created_after_the_rebuild(letters):
    query = "SELECT stamp, count(*) AS letters FROM"
    declared = PER_STAMP.replace(query, "SELECT stamp, sum(weight)::bigint AS letters FROM")
    per_word = declared.replace("letters_per_stamp", "weighed").replace("sum(weight)", "sum(grams)")
    changed = replace(
        LETTERS, fields=[text("stamp", "Stamp."), quantity("grams", "Grams.", path="weight")]
    )
    changed = replace(changed, key=uuid("id", "Id."))
    release = with_models(
        changed, letters_per_stamp=per_word.replace("weighed", "letters_per_stamp")
    )

    migrate(letters.database.url, release)
    before = letters.scalar("SELECT sum(letters) FROM upvest.letters_per_stamp")
    rebuild(letters.engine, changed)

    assert before == 30
    # Added in place, and so empty until the rebuild; or in the view only after the swap.
    assert letters.scalar("SELECT sum(letters) FROM upvest.letters_per_stamp") == sum(range(30))
    assert migrate(letters.database.url, release).is_empty


OF_OTHERS = {
    "view bi.mine": "CREATE VIEW bi.mine AS SELECT weight FROM upvest.letters",
    "materialized view bi.copy": "CREATE MATERIALIZED VIEW bi.copy AS TABLE upvest.letters",
    "view bi.over": "CREATE VIEW bi.over AS TABLE upvest.letters_per_stamp",
    "function bi.f()": "CREATE FUNCTION bi.f() RETURNS bigint BEGIN ATOMIC "
    "SELECT count(*) FROM upvest.letters; END",
    "column a_row of table bi.rows": "CREATE TABLE bi.rows (a_row upvest.letters)",
    "constraint ref_id_fkey on table bi.ref": "CREATE TABLE bi.ref "
    "(id uuid REFERENCES upvest.letters)",
    "index upvest.mine": "CREATE INDEX mine ON upvest.letters (weight, stamp)",
    "column mine of upvest.letters": "ALTER TABLE upvest.letters ADD COLUMN mine text",
    "trigger mine on table upvest.letters": "CREATE FUNCTION bi.t() RETURNS trigger "
    "LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'; CREATE TRIGGER mine AFTER INSERT "
    "ON upvest.letters EXECUTE FUNCTION bi.t()",
}


def test_a_foreign_object_on_a_table_that_must_be_replaced_is_named_and_nothing_changes(
    letters, anna
):
    release = with_models(NUMBERS, letters_per_stamp=PER_STAMP)
    for name, statement in OF_OTHERS.items():
        on_ours = name.startswith(("index", "column mine", "trigger"))
        anna.execute("RESET ROLE" if on_ours else f"SET ROLE anna_{letters.database.name}")
        anna.execute(statement.encode())
    before = state(letters)

    with pytest.raises(ConfigurationError, match=r"upvest\.letters must be replaced") as refused:
        migrate(letters.database.url, release)

    assert state(letters) == before
    assert [name for name in OF_OTHERS if f"{name}" not in str(refused.value)] == []
    assert f"view bi.mine (owner anna_{letters.database.name})" in str(refused.value)
    anna.execute("RESET ROLE")
    letters.execute("DROP SCHEMA bi CASCADE; DROP INDEX upvest.mine")
    letters.execute("ALTER TABLE upvest.letters DROP COLUMN mine")
    letters.execute("CREATE SCHEMA bi")
    migrate(letters.database.url, release)
    letters.execute("CREATE VIEW bi.late AS TABLE upvest.letters")
    with pytest.raises(ConfigurationError, match=r"others have made objects.*view bi\.late"):
        rebuild(letters.engine, NUMBERS)
    assert letters.scalar("SELECT count(*) FROM bi.late") == 30
    letters.execute("DROP VIEW bi.late")
    assert rebuild(letters.engine, NUMBERS).is_replaced


def test_a_view_with_other_columns_on_which_others_depend_is_named_and_nothing_changes(
    letters, anna
):
    anna.execute("CREATE VIEW bi.over AS TABLE upvest.letters_per_stamp")
    renamed = PER_STAMP.replace(" letters FROM", " number FROM").replace(
        "stamp.letters", "stamp.number"
    )
    longer = PER_STAMP.replace("AS letters FROM", "AS letters, max(weight) AS heaviest FROM")
    longer += "COMMENT ON COLUMN upvest.letters_per_stamp.heaviest IS 'Grams.';\n"
    more = with_more(LETTERS, date("sent_on", "Day."))
    before = state(letters)

    with pytest.raises(ConfigurationError, match=r"letters_per_stamp has other columns.*bi\.over"):
        migrate(letters.database.url, with_models(more, letters_per_stamp=renamed))
    unchanged = state(letters)
    migrate(letters.database.url, with_models(LETTERS, letters_per_stamp=longer))

    assert unchanged == before
    assert anna.execute("SELECT count(*) FROM bi.over").fetchone() == (3,)
    with pytest.raises(ConfigurationError, match=r"letters_per_stamp has other columns"):
        migrate(letters.database.url, V1)
    anna.execute("DROP VIEW bi.over")
    letters.execute("GRANT SELECT ON upvest.letters_per_stamp TO pg_monitor")
    migrate(letters.database.url, with_models(LETTERS, letters_per_stamp=renamed))
    may = "SELECT has_table_privilege('pg_monitor', 'upvest.letters_per_stamp', 'SELECT')"
    assert letters.scalar(may)


# ------------------------------------------------------------------------------------ personal data


def test_a_table_moves_schema_when_a_column_becomes_personal_and_back(letters, anna):
    secret = with_models(with_field(LETTERS, "weight", personal=True), letters_per_stamp=PER_STAMP)
    anna.execute("CREATE VIEW bi.mine AS SELECT weight FROM upvest.letters")
    before = state(letters)

    moved = migrate(letters.database.url, secret)
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        anna.execute("SELECT * FROM bi.mine")
    shown = letters.query("SELECT * FROM upvest.letters LIMIT 1")[0]._fields
    assert migrate(letters.database.url, secret).is_empty
    anna.execute("DROP VIEW bi.mine")
    letters.execute("GRANT SELECT ON upvest.letters_per_stamp TO pg_monitor")
    migrate(letters.database.url, V1)

    [named] = [step.what for step in moved.steps if step.name == "upvest_personal.letters"][:1]
    assert f"no longer readable: bi.mine (owner anna_{letters.database.name})" in named
    assert "weight" not in shown
    assert "stamp" in shown
    letters.execute("DROP SCHEMA bi CASCADE")
    assert [row for row in state(letters)[0] if "bi." not in row[0]] == [
        row for row in before[0] if "bi." not in row[0]
    ]
    may = "SELECT has_table_privilege('pg_monitor', 'upvest.letters_per_stamp', 'SELECT')"
    assert letters.scalar(may)
    assert migrate(letters.database.url, V1).is_empty


@pytest.mark.parametrize("is_personal", [False, True], ids=["moves in", "moves out"])
def test_a_move_that_also_needs_a_replacement_is_refused_before_anything_moves(
    letters, anna, is_personal
):
    secret = with_field(LETTERS, "weight", personal=True)
    if is_personal:
        migrate(letters.database.url, with_models(secret, letters_per_stamp=PER_STAMP))
    anna.execute("RESET ROLE")
    table = "upvest_personal.letters" if is_personal else "upvest.letters"
    anna.execute(f"CREATE VIEW bi.mine AS SELECT weight FROM {table}".encode())
    changed = NUMBERS if is_personal else with_field(NUMBERS, "weight", personal=True)
    release = with_models(changed, letters_per_stamp=PER_STAMP)
    before = state(letters)

    for command in (planned, migrate):
        with pytest.raises(ConfigurationError, match=r"letters must be replaced.*bi\.mine"):
            command(letters.database.url, release)

    assert state(letters) == before
    anna.execute("DROP VIEW bi.mine")
    due = planned(letters.database.url, release)
    assert migrate(letters.database.url, release).steps == due.steps
    rebuild(letters.engine, changed)
    assert migrate(letters.database.url, release).is_empty


def test_a_name_that_a_move_needs_and_somebody_else_has_is_refused_before_anything_moves(letters):
    letters.execute("CREATE TABLE upvest_personal.letters (mine text)")
    secret = with_models(with_field(LETTERS, "weight", personal=True), letters_per_stamp=PER_STAMP)
    before = state(letters)

    with pytest.raises(ConfigurationError, match=r"upvest_personal\.letters exists, and"):
        migrate(letters.database.url, secret)

    assert state(letters) == before


HEAVY = """\
-- Personal data: shown
CREATE VIEW upvest_personal.heavy AS SELECT weight FROM upvest_personal.letters;
COMMENT ON VIEW upvest_personal.heavy IS 'Weights.';
COMMENT ON COLUMN upvest_personal.heavy.weight IS 'Grams.';
"""


def test_a_dbas_grants_stay_where_data_is_personal_no_more_and_go_where_it_becomes_personal(
    letters, anna
):
    role = f"anna_{letters.database.name}"
    views = {"letters_per_stamp": PER_STAMP, "heavy": HEAVY}
    secret = with_models(with_field(LETTERS, "weight", personal=True), **views)
    shown = HEAVY.replace("upvest_personal", "upvest").replace("shown", "none, reviewed 2026-11-29")
    public = with_models(LETTERS, **{**views, "heavy": shown})
    names = ("letters", "letters_per_stamp", "heavy")
    anna.execute("RESET ROLE")
    migrate(letters.database.url, secret)
    anna.execute(f"GRANT SELECT ON upvest_personal.heavy TO {role}".encode())
    anna.execute(f"GRANT SELECT ON upvest.letters, upvest.letters_per_stamp TO {role}".encode())

    migrate(letters.database.url, public)
    anna.execute(f"SET ROLE {role}".encode())
    read = [anna.execute(f"SELECT count(*) FROM upvest.{name}".encode()) for name in names]
    found = [rows.fetchone() for rows in read]
    anna.execute("RESET ROLE")
    migrate(letters.database.url, secret)

    assert found == [(30,), (3,), (30,)]
    may = f"SELECT has_table_privilege('{role}', :name, 'SELECT')"
    assert not letters.scalar(may, name="upvest_personal.heavy")
    assert not letters.scalar(may, name="upvest_personal.letters")
    assert letters.scalar(may, name="upvest.letters_per_stamp")
    assert migrate(letters.database.url, secret).is_empty


@pytest.mark.parametrize("failpoint", ["after_closing", "mid_read_models"])
def test_a_personal_column_is_hidden_although_migrate_is_killed(given, anna, failpoint):
    """Of a table that has personal columns already: its plain view shows NULL from then on."""
    given([event("USER.CREATED", {"id": some_id("u"), "status": "ACTIVE"})]).project(users)
    anna.execute("CREATE VIEW bi.mine AS SELECT status FROM upvest.users")
    release = "with_models(with_field(users, 'status', personal=True))"
    before = anna.execute("SELECT status FROM bi.mine").fetchall()

    killed = migrate_in_a_process(given, release, PIPELINE_FAILPOINT=f"{failpoint}:kill")
    after = anna.execute("SELECT status FROM bi.mine").fetchall()
    migrate(given.database.url, with_models(with_field(users, "status", personal=True)))

    assert killed.wait() == -signal.SIGKILL
    assert (before, after) == ([("ACTIVE",)], [(None,)])
    assert anna.execute("SELECT status FROM bi.mine").fetchall() == [(None,)]


# -------------------------------------------------------------------------------- killed, two, live


def migrate_in_a_process(
    given: Given, release: str, **environment: str
) -> "subprocess.Popen[bytes]":
    script = (
        "import os, sys; from pipeline import failpoints; from pipeline.schema.migrate import *; "
        "from tests.migrations.test_read_models import *; "
        f"failpoints.arm(os.environ); migrate(sys.argv[1], {release})"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, given.database.url],
        env={**os.environ, "PIPELINE_ENABLE_FAILPOINTS": "1", **environment},
        cwd=FOLDER,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    if "PIPELINE_FAILPOINT" in environment:
        process.wait(120)
    return process


BIG = with_models(
    with_field(with_more(LETTERS, date("sent_on", "Day.")), "weight", indexed=False, personal=True),
    with_field(orders, "side", indexed=True, comment="Its side."),
    with_field(users, "status", personal=True),
    letters_per_stamp=PER_STAMP.replace("count(*)", "count(letter_id)"),
)
"""A release with a change of each kind that is made in place."""


KILLING = """
import os, sys
from pipeline import failpoints
from pipeline.schema.migrate import migrate
from tests.migrations.test_read_models import BIG

code = -1
while code:
    child = os.fork()
    if not child:
        failpoints.arm({"PIPELINE_ENABLE_FAILPOINTS": "1",
                        "PIPELINE_FAILPOINT": "mid_read_models@2:kill"})
        migrate(sys.argv[1], BIG)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(code)
"""
"""Each process ends one step and is killed in the next one, before its commit."""


def test_migrate_killed_in_each_step_ends_like_an_undisturbed_migrate(
    letters, postgres_server, release_before
):
    with fresh_database(postgres_server, template=release_before(postgres_server)) as database:
        undisturbed = Given(database)
        steps = migrate(database.url, BIG).steps

        killed = subprocess.run(
            [sys.executable, "-c", KILLING, letters.database.url],
            cwd=FOLDER,
            capture_output=True,
            text=True,
            check=True,
            timeout=100,
        )

        ends = [int(line) for line in killed.stdout.splitlines() if re.fullmatch(r"-?\d+", line)]
        # An index stays although the process was killed after its statement.
        indexes = sum(not step.in_transaction for step in steps)
        assert ends == [-signal.SIGKILL] * (len(steps) - 1 - indexes) + [0]
        assert state(letters)[0] == state(undisturbed)[0]
        assert comparable(letters) == comparable(undisturbed)
        assert migrate(letters.database.url, BIG).is_empty
        undisturbed.close()


def comparable(given: Given) -> object:
    return [(row.name, row.kind, row.definition) for row in given.query(RECORD)]


def test_two_concurrent_migrations_change_read_models_once_while_workers_run(letters):
    stop = threading.Event()

    def project() -> None:
        run_projection(letters.engine, [LETTERS, orders], stop=stop)

    with ThreadPoolExecutor(3) as pool:
        worker = pool.submit(project)
        letters([order_event("NEW", at=1)], partition=1)
        try:
            both = list(pool.map(lambda _: migrate(letters.database.url, BIG), range(2)))
        finally:
            stop.set()
        worker.result()
        letters([letter(99)], partition=1)

    assert sorted(done.is_empty for done in both) == [False, True]
    changed = BIG.by_name["letters"]
    rebuild(letters.engine, changed)
    letters.project(changed)
    assert letters.scalar("SELECT count(*) FROM upvest_personal.letters") == 31
