"""The simplest way to get a topic into the log: poll one record, insert it, commit. No guarantees.

Configured as the pipeline is, by its environment; ends when killed.
"""

import os

import orjson
import psycopg
from confluent_kafka import Consumer

INSERT = """
INSERT INTO pipeline.events (topic, "partition", "offset", event_id, event_type, created_at,
    entity_id, payload, key, kafka_timestamp, kafka_timestamp_type)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, to_timestamp(%s / 1000.0), %s)
"""


def main() -> None:
    """Consume and insert."""
    consumer = Consumer(
        {
            "bootstrap.servers": os.environ["PIPELINE_KAFKA_BOOTSTRAP_SERVERS"],
            "group.id": os.environ["PIPELINE_GROUP_ID"],
            "auto.offset.reset": "earliest",
        }
    )
    topic = os.environ["PIPELINE_TOPICS"]
    consumer.subscribe([topic])
    with psycopg.connect(os.environ["PIPELINE_DATABASE_URL"], autocommit=True) as connection:
        connection.execute(
            "SELECT * FROM pipeline.make_segment(%s, 0, 10000000)", [topic], prepare=False
        )
        while True:
            message = consumer.poll(1.0)
            if message is None or message.error():
                continue
            value = message.value() or b""
            event = orjson.loads(value)
            kind, milliseconds = message.timestamp()
            connection.execute(
                INSERT,
                [
                    topic,
                    message.partition(),
                    message.offset(),
                    event["id"],
                    event["type"],
                    event["created_at"],
                    event["object"]["id"],
                    value.decode(),
                    message.key(),
                    milliseconds,
                    kind,
                ],
            )


if __name__ == "__main__":
    main()
