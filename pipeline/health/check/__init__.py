"""What is right and wrong with an installation, on both sides, and which guarantees hold.

Nothing is changed, and no group is joined. What a broker does not tell its users (a managed feed
tells little) is said so, and is no fault.
"""

from collections.abc import Iterator, Sequence

from pipeline.db import open_engine, transaction
from pipeline.errors import PipelineError, TransientError
from pipeline.health.check.database import look_at_database
from pipeline.health.check.findings import Finding, exit_code, worth
from pipeline.health.check.kafka import Recorded, look_at_kafka
from pipeline.health.check.promises import Promise, Standing, Worth
from pipeline.readmodel import Projector
from pipeline.settings import Settings

__all__ = ["Finding", "Promise", "Standing", "Worth", "examine", "exit_code", "worth"]

# What is not known of while a side is away.
_OF_DATABASE = (
    *(Promise.FAITHFUL_LOG, Promise.ONE_EFFECT, Promise.ONE_WRITER, Promise.CONVERGENCE),
    *(Promise.ONE_PROJECTION, Promise.DISPOSABLE, Promise.ONE_BAD_EVENT, Promise.SECRECY),
)
_OF_KAFKA = (
    *(Promise.FAITHFUL_LOG, Promise.NO_SILENT_LOSS, Promise.BOUNDED_MEMORY, Promise.SECRECY),
)


def examine(settings: Settings, projectors: Sequence[Projector]) -> Iterator[Finding]:
    """Look at everything; each finding comes as soon as it is known.

    Args:
        settings: What is configured.
        projectors: The read models of this program.
    """
    recorded: Recorded | None = None
    try:
        engine = open_engine(settings.database(), application="pipeline check")
        try:
            yield from look_at_database(engine, projectors)
            with transaction(engine) as db:
                recorded = Recorded.of(db)
        finally:
            engine.dispose()
    except PipelineError as error:
        yield _failed("database", error, _OF_DATABASE)
    try:
        yield from look_at_kafka(settings, recorded)
    except PipelineError as error:
        yield _failed("kafka", error, _OF_KAFKA)


def _failed(area: str, error: PipelineError, touched: Sequence[Promise]) -> Finding:
    remedy = None
    if isinstance(error, TransientError):
        remedy = "see that the server runs and is to be reached from here"
    # A wrong setting, right or schema says itself what is to be done.
    return Finding("wrong", area, str(error), remedy, error.exit_code, touched)
