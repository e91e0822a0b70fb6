"""A topic into PostgreSQL by Quix Streams. Runs in an environment of its own."""

import os
from typing import Any

import orjson
from quixstreams import Application, message_context
from quixstreams.sinks.community.postgresql import PostgreSQLSink


def row(value: bytes, key: bytes, _timestamp: int, _headers: object) -> dict[str, Any]:
    """The table's row of a record."""
    event, message = orjson.loads(value), message_context()
    return {
        "topic": message.topic,
        "partition": message.partition,
        "offset": message.offset,
        "key": key,
        "event_id": event["id"],
        "event_type": event["type"],
        "created_at": event["created_at"],
        "payload": value.decode(),
    }


def main() -> None:
    """Read a number of records."""
    app = Application(
        broker_address=os.environ["BOOTSTRAP_SERVERS"],
        consumer_group=os.environ["GROUP"],
        auto_offset_reset="earliest",
        commit_every=10_000,
        state_dir=os.environ["STATE"],
        loglevel="ERROR",
    )
    topic = app.topic(os.environ["TOPIC"], value_deserializer="bytes", key_deserializer="bytes")
    sink = PostgreSQLSink(
        host=os.environ["DB_HOST"],
        port=int(os.environ["DB_PORT"]),
        dbname=os.environ["DB_NAME"],
        user=os.environ["DB_USER"],
        password=os.environ["DB_PASSWORD"],
        table_name="stored",
        schema_auto_update=False,
        on_conflict_do_nothing=True,
        include_metadata=False,
    )
    app.dataframe(topic).apply(row, metadata=True).sink(sink)
    app.run(count=int(os.environ["ROWS"]), collect=False)


if __name__ == "__main__":
    main()
