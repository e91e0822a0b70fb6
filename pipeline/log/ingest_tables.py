"""The tables that an ingest uses: objects of others on them may change what it writes."""

from pipeline.db.locks import locks
from pipeline.log.gaps import gaps
from pipeline.log.installation import installation
from pipeline.log.segments import segments
from pipeline.log.tables import consumer_offsets, events
from pipeline.log.workers import ingest_workers

INGEST_TABLES = (consumer_offsets, events, gaps, ingest_workers, installation, locks, segments)
