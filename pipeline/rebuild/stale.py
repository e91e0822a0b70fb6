"""Read models that another definition built are rebuilt beside the live tables, and swapped in.

Until then the projection leaves them out: their tables would mix two definitions. Of several
workers one rebuilds a read model, and the others include it afterwards.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import structlog
from sqlalchemy import Connection, Engine

from pipeline.db import transaction
from pipeline.errors import PipelineError, Server, TransientError
from pipeline.outages import OutageLog, OutagePolicy
from pipeline.projection import registry
from pipeline.rate_limit import without_numbers
from pipeline.readmodel.fingerprint import fingerprint
from pipeline.readmodel.model import Projector
from pipeline.rebuild.rebuild import RebuildRunsError, StoppedError, rebuild_if_stale

log = structlog.get_logger(__name__)

Database = Callable[[], AbstractContextManager[Engine]]

RECHECK_S = 10.0
"""How often a worker checks whether a read model must be rebuilt."""
CHECK_S = 2.0
"""How often a worker checks whether another one has finished a rebuild."""


class StaleModels:
    """Finds stale read models and rebuilds them.

    A read model is rebuilt only by a program whose definition of it ``pipeline migrate`` recorded
    last: so two releases that run at the same time do not undo each other's rebuilds.

    Args:
        engine: The database, for short queries.
        projectors: The read models of this program.
        declared: Reads the fingerprints that ``pipeline migrate`` recorded.
        rejected_max: Most events that may be rejected in one range.
        waits_forever: Whether an unavailable server is waited for without limit.
        outages: Where outages are logged, for a process that also does other work.
    """

    def __init__(
        self,
        engine: Engine,
        projectors: Sequence[Projector],
        declared: Callable[[Connection], Mapping[str, str]],
        *,
        rejected_max: int,
        waits_forever: bool,
        outages: OutageLog | None = None,
    ) -> None:
        self._engine = engine
        self._projectors = projectors
        self._declared = declared
        self._rejected_max = rejected_max
        self._outages = OutagePolicy(waits_forever=waits_forever, outages=outages)
        self._left: dict[str, str | None] = {}
        self._is_stale = False
        self._postponed: set[str] = set()

    def keep_current(self, database: Database, stop: threading.Event) -> None:
        """Rebuild what is stale, again and again, until ``stop`` is set.

        An error is left to the projection, which uses the same database and ends the command where
        it must end.
        """
        while not stop.is_set():
            try:
                self.rebuild(database, stop)
            except PipelineError as error:
                self._log_postponed(error)
            else:
                self._postponed.clear()
            stop.wait(RECHECK_S)

    def _log_postponed(self, error: PipelineError) -> None:
        """Log each cause once, and without a stale read model for debugging only."""
        cause = without_numbers(str(error))
        is_news = self._is_stale and cause not in self._postponed
        if is_news:
            self._postponed.add(cause)
        (log.warning if is_news else log.debug)(
            "rebuild_postponed", reason=str(error), effect=f"retried every {RECHECK_S:g} s"
        )

    def rebuild(self, database: Database, stop: threading.Event) -> None:
        """Rebuild what is stale; return when nothing is, or ``stop`` is set.

        What cannot be rebuilt is logged and left as it is, until its table is built otherwise.

        Args:
            database: Opens the database for statements that may take long.
            stop: Set it to end after the present ranges; the next call resumes.

        Raises:
            TransientError: The server stayed unavailable, unless it is waited for without limit.
        """
        while not stop.is_set():
            try:
                is_waiting = self._round(database, stop)
            except TransientError as error:
                stop.wait(self._outages.on_error(error))
            else:
                self._outages.on_success(Server.POSTGRESQL)
                if not is_waiting:
                    return
                stop.wait(CHECK_S)

    def _round(self, database: Database, stop: threading.Event) -> bool:
        """Whether something is stale that was not left as it is."""
        with transaction(self._engine) as db:
            built, declared = registry.fingerprints(db), self._declared(db)
        is_waiting = False
        stale = [
            model
            for model in self._projectors
            if (code := built.get(model.name)) not in (None, fingerprint(model))
            and self._left.get(model.name) != code
        ]
        self._is_stale = bool(stale)
        for model in stale:
            code, known = built.get(model.name), fingerprint(model)
            if declared.get(model.name, known) != known:
                self._leave(model, code, "another release ran `pipeline migrate` last")
            elif not stop.is_set():
                is_waiting = self._rebuild(database, model, code, stop) or is_waiting
        return is_waiting

    def _rebuild(
        self,
        database: Database,
        model: Projector,
        code: str | None,
        stop: threading.Event,
    ) -> bool:
        """Whether somebody else rebuilds the read model."""
        try:
            with database() as engine:
                rebuild_if_stale(engine, model, rejected_max=self._rejected_max, stop=stop)
        except RebuildRunsError:
            return True
        except StoppedError:
            return False
        except TransientError:
            raise
        except PipelineError as error:
            self._leave(model, code, str(error))
        return False

    def _leave(self, model: Projector, code: str | None, reason: str) -> None:
        self._left[model.name] = code
        log.error("rebuild_failed", projector=model.name, reason=reason)
