"""Numbers with their nouns, for people: `1 record`, `2,304 records`."""


def count(number: int, noun: str, plural: str | None = None) -> str:
    """A number, and the noun in the form that agrees with it.

    Args:
        number: How many.
        noun: In the singular, with the verb where one follows: ``row is``.
        plural: Where it is not the singular and an ``s``: ``rows are``.
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
