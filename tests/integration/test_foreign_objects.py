"""What others made in our schemas stays theirs; access to personal data is closed first."""

import os
import signal
import subprocess
import sys

import psycopg
import pytest

from pipeline.errors import ConfigurationError
from pipeline.projectors.orders import orders
from pipeline.projectors.users import users
from pipeline.rebuild.rebuild import rebuild
from pipeline.schema.migrate import migrate
from tests.declared import with_field, with_models, without_field
from tests.given import order_event
from tests.integration.test_roles import Cast, outcome

KINDS = {
    "table": "TABLE {} (x int)",
    "view": "VIEW {} AS SELECT 1 AS x",
    "materialized view": "MATERIALIZED VIEW {} AS SELECT 1 AS x",
    "sequence": "SEQUENCE {}",
    "type": "TYPE {} AS (x int)",
    "function": "FUNCTION {}(boolean) RETURNS int LANGUAGE sql AS 'SELECT 1'",
}
NAMES = (
    "pipeline.make_segment",
    "pipeline.others",
    "pipeline_segments.others",
    "pipeline_shadow.others",
    "upvest.notes",
    "upvest.letters",
)
STATE = """
SELECT c.oid, c.relowner, c.relacl::text, pg_get_viewdef(c.oid) FROM pg_class c
WHERE c.relowner = to_regrole(%(owner)s)
UNION ALL
SELECT p.oid, p.proowner, p.proacl::text, p.prosrc FROM pg_proc p
WHERE p.proowner = to_regrole(%(owner)s) ORDER BY 1
"""
READ = "SELECT execution_flow FROM upvest.orders"


@pytest.fixture
def cast(given):
    made = Cast(given.database)
    made.make()
    yield made
    made.end()


ORDERS = with_models(with_field(orders, "execution_flow", personal=True))
"""A release that declares one more column personal."""


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_an_object_of_another_owner_is_unchanged(given, cast, kind):
    anna = cast.login("analyst")
    with given.database.connect() as db:
        for name in NAMES:
            if kind == "function" or name != "pipeline.make_segment":
                db.execute(f"CREATE {KINDS[kind].format(name)}".encode())
                what = f"FUNCTION {name}(boolean)" if kind == "function" else f"{kind} {name}"
                db.execute(f"ALTER {what} OWNER TO {anna}".encode())
        before = db.execute(STATE, {"owner": anna}).fetchall()
        given([order_event("NEW", at=1)]).project(orders)

        migrate(given.database.url)
        migrate(given.database.url, with_roles=True)
        rebuild(given.engine, orders)
        given.execute("TRUNCATE upvest.orders")

        assert before
        assert db.execute(STATE, {"owner": anna}).fetchall() == before


@pytest.mark.parametrize("kind", ["table", "view", "materialized view"])
def test_an_object_with_the_name_of_a_plain_view_is_named_and_kept(given, cast, kind):
    anna = cast.login("analyst")
    given.execute("DROP VIEW upvest.users")
    with given.database.connect() as db:
        db.execute(f"CREATE {KINDS[kind].format('upvest.users')}".encode())
        db.execute(f"ALTER {kind} upvest.users OWNER TO {anna}".encode())
        before = db.execute(STATE, {"owner": anna}).fetchall()

        with pytest.raises(ConfigurationError, match=rf"upvest.users exists.* {anna}"):
            migrate(given.database.url)

        assert db.execute(STATE, {"owner": anna}).fetchall() == before


def test_a_view_replaced_by_hand_under_our_name_is_not_ours(given, cast):
    given.execute("DROP VIEW upvest.users")
    given.execute("CREATE VIEW upvest.users AS SELECT * FROM upvest_personal.users")

    with pytest.raises(ConfigurationError, match=r"upvest.users exists"):
        migrate(given.database.url)


def test_tables_and_views_are_recognised_after_a_restore(given, cast):
    """What is restored has another oid, and its comment."""
    given([order_event("NEW", at=1)]).project(orders)
    given.execute("UPDATE pipeline.declared_objects SET made_as = 1")

    again = migrate(given.database.url)
    changed = migrate(given.database.url, with_models(without_field(orders, "fit_acknowledged")))
    rebuild(given.engine, without_field(orders, "fit_acknowledged"))

    assert (again.steps, again.grants) == ([], [])
    assert [step.name for step in changed.steps] == ["upvest.orders"]
    assert given.scalar("SELECT count(*) FROM upvest.order_book") == 1


def test_views_of_analysts_on_a_plain_view_survive_and_show_nothing(given, cast):
    changed = with_models(with_field(users, "status", personal=True))
    anna = cast.login("analyst")
    given.execute("CREATE SCHEMA bi")
    given.execute(f"GRANT ALL ON SCHEMA bi TO {anna}")
    with psycopg.connect(cast.url_of(anna), autocommit=True) as db:
        db.execute("CREATE VIEW bi.mine AS SELECT user_id, status FROM upvest.users")

        migrate(given.database.url, changed)
        again = migrate(given.database.url, changed)
        shown = given.scalar("SELECT pg_get_viewdef('upvest.users'::regclass)")
        mine = outcome(db, "SELECT * FROM bi.mine")
        direct = outcome(db, "SELECT status FROM upvest_personal.users")
    given.execute("DROP SCHEMA bi CASCADE")

    assert again.steps == []
    assert "NULL::text AS status" in shown
    assert mine is None
    assert str(direct).startswith("42501")


@pytest.mark.faults
@pytest.mark.parametrize("to", ["PUBLIC", "a role of the DBA", "one column"])
def test_access_that_was_granted_otherwise_is_revoked_too(given, cast, to):
    login = cast.login()
    whom = "PUBLIC" if to == "PUBLIC" else login
    columns = "(execution_flow)" if to == "one column" else ""
    given.execute(f"GRANT USAGE ON SCHEMA upvest TO {login}")
    given.execute(f"GRANT SELECT {columns} ON upvest.orders TO {whom}")

    migrate(given.database.url, ORDERS)

    assert not given.scalar(
        "SELECT has_column_privilege(:login, 'upvest_personal.orders', 'execution_flow', 'SELECT')",
        login=login,
    )


@pytest.mark.faults
def test_a_personal_column_is_hidden_although_migrate_is_killed(given, cast):
    script = (
        "import os, sys; from pipeline import failpoints; from pipeline.schema import migrate; "
        "from tests.integration.test_foreign_objects import ORDERS; "
        "failpoints.arm(os.environ); migrate.migrate(sys.argv[1], ORDERS)"
    )
    armed = {"PIPELINE_ENABLE_FAILPOINTS": "1", "PIPELINE_FAILPOINT": "after_closing:kill"}

    done = subprocess.run(
        [sys.executable, "-c", script, given.database.url],
        env={**os.environ, **armed},
        check=False,
        timeout=120,
    )

    assert done.returncode == -signal.SIGKILL
    with cast.connect("analyst") as db:
        assert str(outcome(db, READ)).startswith("42501")
        assert outcome(db, "SELECT order_id FROM upvest.orders") is None
