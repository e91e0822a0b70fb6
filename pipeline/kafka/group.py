"""Requests to the brokers about our consumer group: its members, its commits, our rights on it."""

import time
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple, TypeVar
from uuid import UUID

import structlog
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, ConsumerGroupDescription

from pipeline.errors import TransientError
from pipeline.kafka.client import COMMIT_METADATA_PATTERN, REQUEST_S_MAX
from pipeline.kafka.reports import ClientReports
from pipeline.partitions import Partition

log = structlog.get_logger(__name__)

COORDINATOR_S_MAX = 15.0
"""Maximum wait for a broker to coordinate the group; a young cluster needs a few seconds."""
COORDINATOR_RETRY_S = 0.2
"""Pause between two requests while there is no coordinator."""
MEMBERS_S_MAX = 5.0
"""Maximum wait for the members of the group."""

_Answer = TypeVar("_Answer")


class GroupCommit(NamedTuple):
    """What the last commit of a partition contains about the worker that made it.

    Attributes:
        installation: The identity of the database that it writes to.
        heartbeat: Rises while that worker writes to its database.
        member: Kafka's id of that worker.
    """

    installation: UUID
    heartbeat: int
    member: str


class Member(NamedTuple):
    """A member of the consumer group, as the brokers list it.

    Attributes:
        client: Its ``client.id``.
        host: Its address.
        instance: Its ``group.instance.id``; None for a member without one.
    """

    client: str
    host: str
    instance: str | None


class ConsumerGroup:
    """Answers about one consumer group, without being a member of it.

    Args:
        group_id: The group.
        admin: A client for requests about the group.
        consumer: A client of that group that never joins it.
        reports: Where the clients report errors.
    """

    def __init__(
        self, group_id: str, admin: AdminClient, consumer: Consumer, reports: ClientReports
    ) -> None:
        self._group_id = group_id
        self._admin = admin
        self._consumer = consumer
        self._reports = reports

    def operations(self) -> frozenset[str]:
        """Kafka's names of what this user may do with the group; no member notices the request.

        Empty where the broker does not answer that; ``NONE`` where nothing is allowed. READ, the
        right to join, includes DESCRIBE, the right to send this request.

        Raises:
            TransientError: The brokers did not answer in time.
        """
        try:
            described = self._with_coordinator(self._describe)
        except KafkaException as error:
            refusal = error.args[0]
            if refusal.code() == KafkaError.GROUP_AUTHORIZATION_FAILED:
                return frozenset({"NONE"})
            if refusal.code() == KafkaError._UNSUPPORTED_FEATURE:  # noqa: SLF001 - public
                return frozenset()
            raise self._reports.translated(refusal) from None
        return frozenset(right.name for right in described.authorized_operations or ())

    def _describe(self) -> ConsumerGroupDescription:
        answers = self._admin.describe_consumer_groups(
            [self._group_id], include_authorized_operations=True, request_timeout=REQUEST_S_MAX
        )
        description: ConsumerGroupDescription = answers[self._group_id].result()
        return description

    def last_commits(self, partitions: Collection[Partition]) -> Mapping[Partition, GroupCommit]:
        """The last commit of each partition, of those that a worker of ours made.

        Raises:
            ConfigurationError: This user may not use the group.
            TransientError: The brokers did not answer in time.
        """
        if not partitions:
            return {}
        requested = [TopicPartition(*partition) for partition in partitions]
        try:
            found = self._reports.request(
                lambda: self._with_coordinator(
                    lambda: self._consumer.committed(requested, REQUEST_S_MAX)
                )
            )
        except TransientError:
            # The client looks for a coordinator until the time is up, also where Kafka refuses it.
            if self.operations() == {"NONE"}:
                refusal = KafkaError(KafkaError.GROUP_AUTHORIZATION_FAILED)
                raise self._reports.translated(refusal) from None
            raise
        return {
            Partition(commit.topic, commit.partition): GroupCommit(
                UUID(named[1]), int(named[2] or 0), named[3] or ""
            )
            for commit in found
            if (named := COMMIT_METADATA_PATTERN.fullmatch(commit.metadata or ""))
        }

    def members(self) -> Mapping[str, Member] | None:
        """The members of the group by id; None if the brokers do not list them.

        READ on the group suffices. A member that died is listed until its session times out.
        """
        answers = self._admin.describe_consumer_groups(
            [self._group_id], request_timeout=MEMBERS_S_MAX
        )
        try:
            listed = answers[self._group_id].result().members
        except KafkaException as error:
            log.debug("members_unknown", group=self._group_id, error=error.args[0].name())
            return None
        return {
            member.member_id: Member(
                member.client_id, member.host.lstrip("/"), member.group_instance_id
            )
            for member in listed
        }

    @staticmethod
    def _with_coordinator(send: Callable[[], _Answer]) -> _Answer:
        """Send a request, and repeat it while no broker coordinates the group."""
        deadline = time.monotonic() + COORDINATOR_S_MAX
        while True:
            try:
                return send()
            except KafkaException as error:
                if "COORDINATOR" not in error.args[0].name() or time.monotonic() > deadline:
                    raise
            time.sleep(COORDINATOR_RETRY_S)
