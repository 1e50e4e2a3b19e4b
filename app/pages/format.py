"""Numbers as people read them: with their unit, and no more digits than they carry."""

import math
from datetime import UTC, datetime

from core.schedule import rate_text

DASH = "–"
_MINUTE, _HOUR, _DAY = 60, 3600, 86_400


def significant(value: float, digits: int = 3) -> str:
    """1234.5 -> 1230, 0.012345 -> 0.0123, 2.0 -> 2.00."""
    if value == 0:
        return "0"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    # Rounding may carry into a digit more: 9.996 is 10.0, not 10.00.
    rounded = round(value, places)
    places = digits - 1 - math.floor(math.log10(abs(rounded)))
    return f"{rounded:.{max(places, 0)}f}"


def count(value: int | float | None) -> str:
    """Whole numbers: exact below 10,000, then 12.3 k, 1.20 M, 3.40 G."""
    if value is None:
        return DASH
    if abs(value) < 10_000:
        return f"{value:,.0f}"
    for unit, size in (("k", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12)):
        # 999,950 is 1.00 M, not 1000 k.
        if abs(value) < 999.5 * size or unit == "T":
            return f"{significant(value / size)} {unit}"
    raise AssertionError("the last unit takes all")


def exact(value: int | None) -> str:
    return DASH if value is None else f"{value:,}"


def size(num_bytes: int | float | None) -> str:
    """Bytes in binary units, as `ls -h` and nvidia-smi count."""
    if num_bytes is None:
        return DASH
    if num_bytes < 1024:
        return f"{num_bytes:.0f} B"
    for unit, factor in (("KiB", 2**10), ("MiB", 2**20), ("GiB", 2**30), ("TiB", 2**40)):
        if num_bytes < 999.5 * factor or unit == "TiB":
            return f"{significant(num_bytes / factor)} {unit}"
    raise AssertionError("the last unit takes all")


def percent(share: float | None) -> str:
    """0.9431 -> 94.3 %; only what is whole is 100 %."""
    if share is None:
        return DASH
    if share < 1.0 and round(share * 100, 1) == 100.0:
        return "99.9 %"
    return "100 %" if share == 1.0 else f"{share * 100:.1f} %"


def loss(value: float | None) -> str:
    return DASH if value is None else f"{value:.4f}" if abs(value) < 10 else significant(value, 4)


def rate(value: float | None) -> str:
    """A learning rate: 2e-4, 1.5e-5, 0."""
    return DASH if value is None else rate_text(value)


def duration(seconds: float | None) -> str:
    """The two largest units: 8.2 s, 4 min 10 s, 3 h 12 min, 2 d 5 h."""
    if seconds is None:
        return DASH
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < _MINUTE:
        return f"{whole} s"
    for unit, unit_s, part, part_s in (("min", _MINUTE, "s", 1), ("h", _HOUR, "min", _MINUTE), ("d", _DAY, "h", _HOUR)):
        amount, rest = divmod(round(whole / part_s), unit_s // part_s)
        if amount * unit_s < {"min": _HOUR, "h": _DAY}.get(unit, math.inf):
            return f"{amount} {unit} {rest} {part}" if rest else f"{amount} {unit}"
    raise AssertionError("days have no end")


def hours(value: float | None) -> str:
    """Of devices: 0.0123, 4.50, 1,230."""
    if value is None:
        return DASH
    return significant(value) if value < 1000 else f"{value:,.0f}"


def money(value: float | None, currency: str = "") -> str:
    """To the cent; less than one is told as that."""
    if value is None:
        return DASH
    amount = "< 0.01" if 0 < value < 0.005 else f"{value:,.2f}"
    return f"{amount} {currency}" if currency else amount


def deviation(share: float | None) -> str:
    """0.043 -> +4.3 %, 12.3 -> +1,230 %."""
    if share is None:
        return DASH
    if share == 0:
        return "0 %"
    # What is not 0 is not told as 0.
    places = 0 if abs(share) >= 1 else 1 if abs(share) >= 0.0005 else 3
    return f"{share * 100:+,.{places}f} %"


def ratio(value: float | None) -> str:
    """1.234 -> 123 %."""
    return DASH if value is None else f"{value * 100:,.0f} %"


def moment(seconds: float | None) -> str:
    """In UTC; the page's script writes it in the reader's own time zone."""
    return DASH if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def short_hash(digest: str) -> str:
    return digest[:12]
