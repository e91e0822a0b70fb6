"""Tables and views of ours that somebody dropped or changed are found by every command."""

import pytest

from pipeline import catalogue
from pipeline.health.check.database import check_database
from pipeline.health.status import read_status
from pipeline.health.verify import verify_declared
from pipeline.projectors.orders import orders
from pipeline.schema.migrate import migrate
from tests.given import order_event

CHANGES = {
    "DROP VIEW upvest.holdings CASCADE": "upvest.holdings",
    "DROP VIEW upvest.users CASCADE": "upvest.users",
    "DROP TABLE upvest.positions CASCADE": "upvest.positions",
    "ALTER TABLE upvest.orders DROP COLUMN fit_acknowledged": "upvest.orders",
    "ALTER TABLE upvest.orders ALTER COLUMN execution_flow TYPE varchar(99)": "upvest.orders",
}


def found(given) -> dict[str, set[str]]:
    declared = catalogue.load()
    status = read_status(given.engine, declared).problems
    check = [result.problem for result in check_database(given.engine, declared) if result.problem]
    verify = [drift.problem for drift in verify_declared(given.engine, declared) if drift.problem]
    return {
        name: {problem.subject for problem in problems if "`pipeline migrate`" in problem.fix}
        for name, problems in (("status", status), ("check", check), ("verify", verify))
    }


@pytest.mark.parametrize(("change", "name"), CHANGES.items())
def test_a_dropped_or_changed_object_is_reported_until_migrate_repairs_it(given, change, name):
    given([order_event("NEW", at=1)]).project(orders)
    before = found(given)

    given.execute(change)
    after = found(given)
    migrate(given.database.url)
    repaired = found(given)

    assert set().union(*before.values()) == set()
    assert all(name in names for names in after.values()), after
    assert set().union(*repaired.values()) == set()
