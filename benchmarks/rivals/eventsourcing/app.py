"""Orders by eventsourcing's ProjectionRunner. Runs in an environment of its own."""

import os
from typing import Any
from uuid import UUID

from eventsourcing.application import Application
from eventsourcing.persistence import Tracking
from eventsourcing.postgres import PostgresTrackingRecorder
from eventsourcing.projection import Projection, ProjectionRunner
from psycopg.types.json import Jsonb

UPSERT = os.environ["UPSERT"].encode()


class OrderEvent:
    """An event of an order, as Upvest published it, with its coordinates in Kafka."""

    originator_id: UUID
    originator_version: int
    payload: dict[str, Any]
    event_id: str
    created_at: str
    topic: str
    partition: int
    offset: int


class Orders(PostgresTrackingRecorder):
    """The read model: one statement per event, in one transaction with the position."""

    def put(self, event: OrderEvent, tracking: Tracking) -> None:
        """Write the order as of this event, unless a newer event has written it."""
        values = {**vars(event), "payload": Jsonb(event.payload)}
        with self.datastore.transaction(commit=True) as cursor:
            self._insert_tracking(cursor, tracking)
            cursor.execute(UPSERT, values, prepare=True)


class OrdersProjection(Projection[Orders]):
    """Passes each event to the read model."""

    def process_event(self, domain_event: OrderEvent, tracking: Tracking) -> None:
        """Project one event."""
        self.view.put(domain_event, tracking)


def main() -> None:
    """Project all events, and later ones."""
    with ProjectionRunner(
        application_class=Application, projection_class=OrdersProjection, view_class=Orders
    ) as runner:
        runner.run_forever()


if __name__ == "__main__":
    main()
