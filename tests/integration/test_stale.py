"""Read models that another definition built are rebuilt once, and by nobody who must not."""

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import pytest
from sqlalchemy import Connection, Engine
from structlog.testing import capture_logs

from pipeline.db import open_engine
from pipeline.errors import ConfigurationError, TransientError
from pipeline.projection.loop import run_projection
from pipeline.projectors.orders import orders
from pipeline.projectors.users import users
from pipeline.readmodel import EntityTable, text, uuid
from pipeline.readmodel.fingerprint import fingerprint
from pipeline.rebuild import stale
from pipeline.rebuild.stale import StaleModels
from pipeline.schema.bookkeeping import check_tables
from pipeline.schema.migrate import migrate
from pipeline.schema.objects import declared_fingerprints
from tests.declared import with_models, without_field
from tests.given import Given, event, order_event, some_id

LETTERS = EntityTable(
    table="letters",
    comment="Letters.",
    events="LETTER.*",
    key=uuid("letter_id", "Id.", path="id"),
    fields=[text("stamp", "Stamp.")],
)
CHANGED = without_field(orders, "fit_acknowledged")
RELEASE = with_models(CHANGED)
BUILT = "SELECT fingerprint FROM pipeline.projectors WHERE projector = 'orders'"


def stale_models(given: Given, model) -> StaleModels:
    return StaleModels(
        given.engine, [model, users], declared_fingerprints, rejected_max=10, waits_forever=False
    )


@pytest.fixture
def projected(given: Given) -> Given:
    given([order_event("NEW", at=n, order=str(n)) for n in range(9)]).project(orders, users)
    return given


def rebuild_stale(given: Given, model) -> None:
    stale_models(given, model).rebuild(lambda: database(given), threading.Event())


@contextmanager
def database(given: Given) -> Iterator[Engine]:
    engine = open_engine(given.database.url, application="test")
    try:
        yield engine
    finally:
        engine.dispose()


def test_one_of_two_workers_rebuilds_and_both_use_the_new_definition(projected, capsys):
    migrate(projected.database.url, RELEASE)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: rebuild_stale(projected, CHANGED), range(2)))

    assert projected.scalar(BUILT) == fingerprint(CHANGED)
    assert capsys.readouterr().out.count("rebuilt ") == 1
    projected([order_event("NEW", at=99, order="new")]).project(CHANGED)
    assert len(projected.rows("orders")) == 10
    assert "fit_acknowledged" not in projected.rows("orders")[0]._fields


def test_a_worker_of_the_release_before_neither_writes_nor_rebuilds(projected):
    """Releases overlap while workers are replaced one by one."""
    migrate(projected.database.url, RELEASE)
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        old = pool.submit(run_projection, projected.engine, [orders], stop=stop)
        try:
            rebuild_stale(projected, CHANGED)
            projected([order_event("NEW", at=99, order="new")])
            rebuild_stale(projected, orders)

            projected.project(CHANGED)
        finally:
            stop.set()
        old.result()

    assert projected.scalar(BUILT) == fingerprint(CHANGED)
    assert len(projected.rows("orders")) == 10


def test_old_columns_do_not_stop_a_worker_from_starting(given):
    """Such as a key that the new definition lacks: it has a value in every row."""
    release = with_models(replace(LETTERS, key=uuid("number", "Id.", path="id")))
    migrate(given.database.url, with_models(LETTERS))
    given([event("LETTER.SENT", {"id": some_id("a letter")})]).project(LETTERS)

    migrate(given.database.url, release)

    check_tables(given.engine, catalogue=release)
    rebuild_stale(given, release.by_name["letters"])
    check_tables(given.engine, catalogue=release)
    assert given.scalar("SELECT number::text FROM upvest.letters") == some_id("a letter")


@pytest.mark.parametrize("is_stale", [True, False], ids=["stale", "current"])
def test_a_postponed_rebuild_is_logged_once_per_cause_and_only_if_a_read_model_is_stale(
    projected: Given, monkeypatch: pytest.MonkeyPatch, is_stale: bool
):
    monkeypatch.setattr(stale, "RECHECK_S", 0.0)
    stop, attempts = threading.Event(), []

    def refused_sometimes(db: Connection) -> Mapping[str, str]:
        attempts.append(1)
        if len(attempts) == 5:
            stop.set()
        if len(attempts) > 1:
            raise ConfigurationError(f"refused the login, attempt {len(attempts)}")
        return {}

    def refusing() -> AbstractContextManager[Engine]:
        raise TransientError("unavailable")

    model = CHANGED if is_stale else orders
    models = StaleModels(
        projected.engine, [model, users], refused_sometimes, rejected_max=10, waits_forever=True
    )
    with capture_logs() as lines:
        models.keep_current(refusing, stop)

    levels = [line["log_level"] for line in lines if line["event"] == "rebuild_postponed"]
    assert levels == (["warning"] if is_stale else ["debug"]) + ["debug"] * 3
