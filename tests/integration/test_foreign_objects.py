"""What others made in our schemas stays theirs; access to personal data is closed first."""

import os
import signal
import subprocess
import sys

import psycopg
import pytest

from pipeline import catalogue
from pipeline.errors import ConfigurationError
from pipeline.projectors.orders import orders
from pipeline.rebuild.rebuild import rebuild
from pipeline.schema.migrate import migrate, set_up
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
    "upvest.notes_masked",
    "upvest.letters",
)
STATE = """
SELECT c.oid, c.relowner, c.relacl::text, pg_get_viewdef(c.oid) FROM pg_class c
WHERE c.relowner = to_regrole(%(owner)s)
UNION ALL
SELECT p.oid, p.proowner, p.proacl::text, p.prosrc FROM pg_proc p
WHERE p.proowner = to_regrole(%(owner)s) ORDER BY 1
"""
READ = "SELECT client_reference FROM upvest.orders"


@pytest.fixture
def cast(given):
    made = Cast(given.database)
    made.make()
    yield made
    made.end()


@pytest.fixture
def personal():
    """A release that declares one more column personal."""
    column = orders.tables[0].columns["client_reference"]
    column.info["personal"] = True
    yield
    column.info["personal"] = False


@pytest.mark.parametrize("kind", KINDS)
def test_an_object_of_somebody_else_is_unchanged(given, cast, kind):
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
        set_up(given.database.url, with_roles=True)
        rebuild(given.engine, orders)
        given.execute("TRUNCATE upvest.orders")

        assert before
        assert db.execute(STATE, {"owner": anna}).fetchall() == before


@pytest.mark.parametrize("kind", ["table", "view", "materialized view"])
def test_what_has_the_name_of_a_masked_view_is_named_and_kept(given, cast, personal, kind):
    anna = cast.login("analyst")
    with given.database.connect() as db:
        db.execute(f"CREATE {KINDS[kind].format('upvest.orders_masked')}".encode())
        db.execute(f"ALTER {kind} upvest.orders_masked OWNER TO {anna}".encode())
        before = db.execute(STATE, {"owner": anna}).fetchall()

        with pytest.raises(ConfigurationError, match=rf"upvest.orders_masked .* {anna}"):
            migrate(given.database.url)

        assert db.execute(STATE, {"owner": anna}).fetchall() == before
    with cast.connect("analyst") as db:
        assert str(outcome(db, READ)).startswith("42501")


def test_a_view_replaced_by_hand_under_our_name_is_not_ours(given, cast):
    given.execute("DROP VIEW upvest.users_masked")
    given.execute("CREATE VIEW upvest.users_masked AS SELECT * FROM upvest.users")

    with pytest.raises(ConfigurationError, match=r"upvest.users_masked exists"):
        migrate(given.database.url)


def test_a_masked_view_is_recognised_after_a_restore(given, cast):
    """A restored view has another oid, and its comment."""
    given.execute("UPDATE pipeline.own_views SET made_as = 1")

    assert set_up(given.database.url).grants == []
    assert given.scalar("SELECT count(*) FROM pipeline.own_views WHERE made_as = 1") == 0


def test_views_of_analysts_on_a_masked_view_survive_and_show_nothing(given, cast):
    column = next(
        t for one in catalogue.load().models for t in one.tables if t.name == "users"
    ).columns["status"]
    anna = cast.login("analyst")
    given.execute("CREATE SCHEMA bi")
    given.execute(f"GRANT ALL ON SCHEMA bi TO {anna}")
    with psycopg.connect(cast.url_of(anna), autocommit=True) as db:
        db.execute("CREATE VIEW bi.mine AS SELECT user_id, status FROM upvest.users_masked")
        column.info["personal"] = True
        try:
            migrate(given.database.url)
            migrate(given.database.url)
            shown = given.scalar("SELECT pg_get_viewdef('upvest.users_masked'::regclass)")
            mine = outcome(db, "SELECT * FROM bi.mine")
            direct = outcome(db, "SELECT status FROM upvest.users")
        finally:
            column.info["personal"] = False
    given.execute("DROP SCHEMA bi CASCADE")

    assert "NULL::text AS status" in shown
    assert mine is None
    assert str(direct).startswith("42501")


@pytest.mark.parametrize("to", ["PUBLIC", "a role of the DBA", "one column"])
def test_access_given_by_other_ways_is_closed_too(given, cast, personal, to):
    login = cast.login()
    whom = "PUBLIC" if to == "PUBLIC" else login
    columns = "(client_reference)" if to == "one column" else ""
    given.execute(f"GRANT USAGE ON SCHEMA upvest TO {login}")
    given.execute(f"GRANT SELECT {columns} ON upvest.orders TO {whom}")

    migrate(given.database.url)

    assert not given.scalar(
        "SELECT has_column_privilege(:login, 'upvest.orders', 'client_reference', 'SELECT')",
        login=login,
    )


def test_a_column_is_closed_although_migrate_is_killed(given, cast):
    script = (
        "import os, sys; from pipeline import failpoints; from pipeline.schema import migrate; "
        "from pipeline.projectors.orders import orders; "
        "orders.tables[0].columns['client_reference'].info['personal'] = True; "
        "failpoints.arm(os.environ); migrate.migrate(sys.argv[1])"
    )
    armed = {"PIPELINE_ENABLE_FAILPOINTS": "1", "PIPELINE_FAILPOINT": "after_closing:kill"}

    done = subprocess.run(
        [sys.executable, "-c", script, given.database.url],
        env={**os.environ, **armed},
        check=False,
        timeout=60,
    )

    assert done.returncode == -signal.SIGKILL
    with cast.connect("analyst") as db:
        assert str(outcome(db, READ)).startswith("42501")
        assert outcome(db, "SELECT order_id FROM upvest.orders") is None
