"""Entity tags: which state of a document a caller has seen."""

from datetime import UTC, datetime, timedelta

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def tag(version: int, updated_at: datetime) -> str:
    """A text that no two states of a document share.

    The version alone would not do: it begins at 1 again when a document is deleted and made anew.
    """
    return f"{version}-{(updated_at - _EPOCH) // timedelta(microseconds=1):x}"
