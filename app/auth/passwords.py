"""Passwords: argon2id with OWASP's parameters (m = 19 MiB, t = 2, p = 1), two at a time.

A hash costs 19 MiB and some 50 ms of one core on purpose, so they are made in a pool of two threads of their own: a
flood of log-ins waits there and leaves the other requests their threads. An unknown user and one without a password
are checked against a hash of nobody's password, so that the time tells nothing."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from argon2 import PasswordHasher
from argon2.exceptions import VerificationError
from argon2.low_level import Type

from core.errors import UserError

MIN_PASSWORD_LENGTH = 12
MAX_PASSWORD_LENGTH = 1024
# Twelve characters or more that are guessed first anyway.
COMMON_PASSWORDS = frozenset(
    {
        "123456789012",
        "1234567890123",
        "administrator",
        "changemeplease",
        "correcthorsebatterystaple",
        "iloveyouiloveyou",
        "letmeinletmein",
        "password1234",
        "password12345",
        "password123456",
        "passwordpassword",
        "pegboxpegbox",
        "qwertyqwerty",
        "qwertyuiop123",
        "qwertyuiopasdf",
    }
)

_hasher = PasswordHasher(time_cost=2, memory_cost=19 * 1024, parallelism=1, type=Type.ID)
_pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="argon2")
# Of a random password that nobody knows, with the parameters above.
NOBODYS_HASH = "$argon2id$v=19$m=19456,t=2,p=1$6cPz77FMq8zvIHyPvZf5sg$ITZCxGp92407Fc+geYJ9G1IaZm7BkdTv9TK1P/h3NNE"


async def hash_password(password: str) -> str:
    """Raises UserError on a password that would be guessed."""
    if len(password) < MIN_PASSWORD_LENGTH:
        raise UserError("auth.password_short", "password", length=len(password), limit=MIN_PASSWORD_LENGTH)
    if len(password) > MAX_PASSWORD_LENGTH:
        raise UserError("auth.password_long", "password", length=len(password), limit=MAX_PASSWORD_LENGTH)
    if password.lower() in COMMON_PASSWORDS or len(set(password)) < 4:
        raise UserError("auth.password_common", "password")
    return await asyncio.get_running_loop().run_in_executor(_pool, _hasher.hash, password)


async def is_password(password_hash: str | None, password: str) -> bool:
    matches = await asyncio.get_running_loop().run_in_executor(
        _pool, _matches, password_hash or NOBODYS_HASH, password[:MAX_PASSWORD_LENGTH]
    )
    return matches and password_hash is not None


def _matches(password_hash: str, password: str) -> bool:
    try:
        return _hasher.verify(password_hash, password)
    except VerificationError:
        return False
