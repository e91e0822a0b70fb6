"""Consume, COPY, commit: no guarantees, as short and as fast as a good engineer writes it."""

import os

import orjson
import psycopg
from confluent_kafka import Consumer

COPY = (
    'COPY pipeline.events (topic, partition, "offset", event_id, event_type, created_at, payload, '
    "key) FROM STDIN"
)


def main() -> None:
    """Read a number of records."""
    consumer = Consumer(
        {
            "bootstrap.servers": os.environ["BOOTSTRAP_SERVERS"],
            "group.id": os.environ["GROUP"],
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
        }
    )
    consumer.subscribe([os.environ["TOPIC"]])
    missing = int(os.environ["ROWS"])
    with psycopg.connect(os.environ["DSN"]) as connection, connection.cursor() as cursor:
        while missing > 0:
            messages = consumer.consume(10_000, 0.1)
            if not messages:
                continue
            with cursor.copy(COPY) as copy:
                for message in messages:
                    value = message.value() or b""
                    event = orjson.loads(value)
                    copy.write_row(
                        (
                            *(message.topic(), message.partition(), message.offset()),
                            *(event["id"], event["type"], event["created_at"]),
                            value.decode(),
                            message.key(),
                        )
                    )
            connection.commit()
            consumer.commit(asynchronous=True)
            missing -= len(messages)
    consumer.close()


if __name__ == "__main__":
    main()
