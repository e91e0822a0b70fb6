"""The input of rivals of rebuild: the events of orders, and the statement for one event."""

from benchmarks.projection import COLUMNS, OBJECT, VALUES

VERSION = "_version_time, _version_rank, _version_created, _topic, _partition, _offset"
FIELDS = ("payload", "event_id", "created_at", "topic", "partition", "offset")
"""The values of an event that the statement uses."""
_PAIRS = [f"'{name}', e.\"{name}\"" for name in FIELDS]
EVENT = f"jsonb_build_object({', '.join(_PAIRS)})"
EVENTS = "pipeline.events AS e WHERE e.event_type LIKE 'ORDER.%' AND e.repeat_of IS NULL"
UPSERT = f"""
INSERT INTO benchmark.orders AS orders ({", ".join(COLUMNS)})
SELECT {VALUES}
FROM (
    SELECT {{payload}}::jsonb AS payload, {{event_id}}::uuid AS event_id,
        {{created_at}}::timestamptz AS created_at, {{topic}}::text AS topic,
        {{partition}}::int AS partition, {{offset}}::bigint AS "offset"
) AS e CROSS JOIN LATERAL {OBJECT}
ON CONFLICT (order_id) DO UPDATE SET {", ".join(f"{name} = excluded.{name}" for name in COLUMNS)}
WHERE ({", ".join(f"excluded.{name}" for name in VERSION.split(", "))})
    > ({", ".join(f"orders.{name}" for name in VERSION.split(", "))})
"""
"""Writes the order as of one event, unless a newer event has; a format for placeholders."""
