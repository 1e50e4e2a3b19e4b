"""Guessing passwords is slowed down before any is hashed: per account and address, and per address alone.

A try is counted before its password is looked at, so a thousand tries at once cost as few hashes as a thousand in a
row. The counts live in memory (there is one web process) and the oldest are forgotten first."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from app.problems import Problem
from core.errors import UserError

FREE_TRIES_AN_ACCOUNT = 5
FREE_TRIES_AN_ADDRESS = 20
FIRST_DELAY_S = 2.0
LONGEST_DELAY_S = 900.0
MAX_KEYS = 10_000


@dataclass
class _Tries:
    count: int = 0
    not_before: float = 0.0


class LoginThrottle:
    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._tries: OrderedDict[tuple[str, str], _Tries] = OrderedDict()

    def count_try(self, account: str, address: str) -> None:
        """Raises Problem 429 when it is too early. Called from the event loop alone, so it needs no lock."""
        now = self._clock()
        keys = (((account.casefold(), address), FREE_TRIES_AN_ACCOUNT), (("", address), FREE_TRIES_AN_ADDRESS))
        wait_s = max(self._tries[key].not_before - now if key in self._tries else 0.0 for key, _ in keys)
        if wait_s > 0:
            seconds = int(wait_s) + 1
            raise Problem(429, UserError("auth.too_many_tries", "", seconds=seconds), {"Retry-After": str(seconds)})
        for key, free_tries in keys:
            tries = self._tries.setdefault(key, _Tries())
            self._tries.move_to_end(key)
            tries.count += 1
            if tries.count >= free_tries:
                tries.not_before = now + min(FIRST_DELAY_S * 2.0 ** min(tries.count - free_tries, 30), LONGEST_DELAY_S)
        while len(self._tries) > MAX_KEYS:
            self._tries.popitem(last=False)

    def forgive(self, account: str, address: str) -> None:
        """After a log-in that succeeded."""
        self._tries.pop((account.casefold(), address), None)
        self._tries.pop(("", address), None)
