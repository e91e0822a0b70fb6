"""A time means the same in the log, which Python reads, and in the read models, which SQL reads."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import HealthCheck, example, settings
from hypothesis import given as over
from hypothesis import strategies as st

from pipeline.projectors.orders import orders
from pipeline.rfc3339 import micros
from tests.given import Given, order_event
from tests.records import rfc3339_times

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
BY_CAST = """
    SELECT (extract(epoch FROM pipeline.rfc3339_time(given.text)) * 1000000)::bigint
    FROM unnest(CAST(:texts AS text[])) WITH ORDINALITY AS given(text, number)
    ORDER BY given.number
"""
LIMITS = [
    *(f"{year}-01-01T00:00:00Z" for year in ("0000", "0001", "9999")),
    *("0000-12-31", "0001-01-01", "9999-12-31", "2026-02-29", "2024-02-29", "2026-01-12 "),
    *(f"2026-01-12T24:00:{end}" for end in ("00Z", "00.0000005Z", "00.0000006Z", "01Z", "60Z")),
    *(f"2026-01-12T23:59:{end}" for end in ("60Z", "60.9999999Z", "59.9999995Z", "61Z")),
    *(f"2026-01-12T10:00:00{zone}" for zone in ("+15:59", "-15:59", "+16:00", "+15:60", "-00:00")),
    *(f"2026-01-12T10:00:00.{'0' * digits}5Z" for digits in range(13)),
    *(f"2026-01-12T10:00:00.{'9' * digits}Z" for digits in range(1, 13)),
    *(f"2026-01-12{sep}10:00:00.{'1' * n}Z" for sep in "T " for n in range(120, 135)),
    *(f"2026-01-12{sep}10:00:00.{'1' * n}+01:00" for sep in "t " for n in range(115, 130)),
]


@pytest.mark.both_postgres
def test_python_reads_a_time_as_postgresql_does(given: Given):
    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @over(st.lists(rfc3339_times(), min_size=40, max_size=80))
    @example(LIMITS)
    def same(texts) -> None:
        by_cast = [row[0] for row in given.query(BY_CAST, texts=texts)]

        by_python = [micros(text) for text in texts]
        read = zip(texts, by_python, by_cast, strict=True)
        assert [triple for triple in read if triple[1] != triple[2]] == []

    same()


@pytest.mark.both_postgres
def test_the_log_a_read_model_and_a_view_have_the_same_time(given: Given):
    times = [text for text in LIMITS if micros(text) is not None]
    sent = [
        {**order_event("NEW", at=0, order=text, updated_at=text), "created_at": text}
        for text in times
    ]

    rows = given(sent).project(orders)

    logged = given.query('SELECT created_at FROM pipeline.events ORDER BY "offset"')
    expected = sorted(EPOCH + timedelta(microseconds=micros(text) or 0) for text in times)
    assert sorted(row.created_at for row in logged) == expected
    assert sorted(row.updated_at for row in rows) == expected
    history = given.query("SELECT reached_at FROM upvest.order_status_history")
    assert sorted(row.reached_at for row in history) == expected
