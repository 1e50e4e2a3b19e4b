"""Who calls, and what their role may do."""

from dataclasses import dataclass
from typing import Literal, cast

Role = Literal["viewer", "member", "admin", "worker"]
# viewer reads; member and admin may change. A worker stands apart: it speaks /worker/v1 and nothing else.
RANK: dict[str, int] = {"viewer": 1, "member": 2, "admin": 3}


@dataclass(frozen=True)
class Caller:
    kind: Literal["session", "token"]
    id: str  # the token's, or the sha256 of the session's
    user_id: str | None  # none for a token made on the server's command line
    name: str
    role: Role
    csrf: str = ""  # a session's; forms and scripts send it back

    @property
    def owner(self) -> str:
        """Whose requests these are, over sessions and restarts: the scope of an Idempotency-Key."""
        return self.user_id or self.id

    def may(self, role: Role) -> bool:
        if role == "worker" or self.role == "worker":
            return self.role == role
        return RANK[self.role] >= RANK[role]


def weaker(first: str, second: str) -> Role:
    """A person's token never may more than the person."""
    if "worker" in (first, second):
        return "worker"
    return cast(Role, min(first, second, key=RANK.__getitem__))
