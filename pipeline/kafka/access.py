"""What this user may do with a topic or a group, and the right to request where one is missing."""

from enum import Enum

from pipeline.settings import Settings


class Access(Enum):
    """What Kafka shows of a topic."""

    VISIBLE = "visible"
    HIDDEN = "hidden"
    """Kafka refuses to describe it: the right is missing, and it may or may not exist."""
    ABSENT = "absent"
    """It does not exist, or no broker answered."""


def user_of(settings: Settings) -> str:
    """The user that Kafka sees, for messages."""
    return f"user {settings.kafka_username}" if settings.kafka_username else "this client"


def right_to_request(settings: Settings, operation: str, kind: str, name: str) -> str:
    """A right, with the command that grants it.

    Args:
        settings: The user who needs it.
        operation: Kafka's name, such as READ.
        kind: ``topic`` or ``group``.
        name: The name of that topic or group.
    """
    user = settings.kafka_username or "NAME"
    return (
        f"{operation} on {kind} {name}: kafka-acls.sh --add --allow-principal User:{user} "
        f"--operation {operation} --{kind} {name}"
    )


def why_not_readable(settings: Settings, topic: str) -> str:
    """The reason and the fix where Kafka shows a topic and refuses its records."""
    return (
        f"Kafka does not let {user_of(settings)} read topic {topic} (TOPIC_AUTHORIZATION_FAILED). "
        f"Ask for {right_to_request(settings, 'READ', 'topic', topic)}"
    )


def why_not_visible(settings: Settings, topic: str, access: Access) -> str:
    """The reason and the fix where Kafka does not show a topic."""
    if access is Access.HIDDEN:
        return (
            f"Kafka does not show topic {topic} to {user_of(settings)} "
            "(TOPIC_AUTHORIZATION_FAILED): the right DESCRIBE is missing, or the topic does not "
            f"exist. Ask for {right_to_request(settings, 'READ', 'topic', topic)}"
        )
    return f"Kafka has no topic {topic}, or hides it from {user_of(settings)}"
