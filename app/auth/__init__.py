"""Who may do what: see admission.py for the rule, sessions.py and tokens.py for what a caller shows."""

from app.auth.admission import (
    Admin,
    AnyCaller,
    Member,
    Worker,
    admit,
    caller_or_nobody,
    get_caller,
    needs,
)
from app.auth.caller import Caller, Role
from app.auth.sessions import link_if_nobody_can_log_in, mint_login_link, owner_of_this_machine
from app.auth.tokens import create_token, revoke_token, token_id

__all__ = [
    "Admin",
    "AnyCaller",
    "Caller",
    "Member",
    "Role",
    "Worker",
    "admit",
    "caller_or_nobody",
    "create_token",
    "get_caller",
    "link_if_nobody_can_log_in",
    "mint_login_link",
    "needs",
    "owner_of_this_machine",
    "revoke_token",
    "token_id",
]
