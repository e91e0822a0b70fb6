"""What is right and wrong with an installation, on both sides, and which promises hold.

Nothing is changed, and no group is joined. What a broker does not report to its users (a managed
feed reports little) is shown as unknown, and is no error.
"""

from collections.abc import Iterator, Sequence

from pipeline.catalogue import Catalogue
from pipeline.db import open_engine, transaction
from pipeline.errors import PipelineError, TransientError
from pipeline.health import problems
from pipeline.health.check.database import check_database
from pipeline.health.check.kafka import Recorded, check_kafka
from pipeline.health.check.promises import Promise, PromiseState, PromiseStatus
from pipeline.health.check.result import NotExamined, Result, exit_code, promise_statuses
from pipeline.settings import Settings

__all__ = [
    "Promise",
    "PromiseState",
    "PromiseStatus",
    "Result",
    "exit_code",
    "promise_statuses",
    "run_checks",
]

# Not known while a server is unavailable.
_OF_DATABASE = (
    *(Promise.FAITHFUL_LOG, Promise.ONE_EFFECT, Promise.ONE_WRITER, Promise.CONVERGENCE),
    *(Promise.ONE_PROJECTION, Promise.DISPOSABLE, Promise.ONE_BAD_EVENT, Promise.SECRECY),
)
_OF_KAFKA = (
    *(Promise.FAITHFUL_LOG, Promise.NO_SILENT_LOSS, Promise.BOUNDED_MEMORY, Promise.SECRECY),
)


def run_checks(settings: Settings, catalogue: Catalogue) -> Iterator[Result]:
    """Examine everything; each result comes as soon as it is known.

    Args:
        settings: The configuration.
        catalogue: The read models and views of this program.
    """
    recorded: Recorded | None = None
    try:
        engine = open_engine(settings.database(), application="pipeline check")
        try:
            yield from check_database(engine, catalogue)
            with transaction(engine) as db:
                recorded = Recorded.of(db)
        finally:
            engine.dispose()
    except PipelineError as error:
        yield _failed("database", error, _OF_DATABASE)
    try:
        yield from check_kafka(settings, recorded)
    except PipelineError as error:
        yield _failed("kafka", error, _OF_KAFKA)


def _failed(subject: str, error: PipelineError, touched: Sequence[Promise]) -> Result:
    is_outage = isinstance(error, TransientError)
    kind = problems.SERVER_UNAVAILABLE if is_outage else problems.SERVER_ERROR
    problem = kind.of(subject, error=error)
    return NotExamined(subject, None, problem, error.exit_code, touched)
