"""Seconds since the epoch inside, RFC 3339 in UTC in every reply."""

from datetime import UTC, datetime
from typing import Annotated

from pydantic import PlainSerializer


def rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


Time = Annotated[float, PlainSerializer(rfc3339, return_type=str, when_used="json")]
