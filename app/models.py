"""Base models: what hosts report below their model roots. The server itself has none."""

import difflib
from dataclasses import dataclass
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel
from sqlmodel import Session, col, select

from app.services import AnyServices
from app.tables import Host
from core.errors import UserError
from core.profile import ModelProfile
from core.wire import HostReport

router = APIRouter(prefix="/api/v1/models", tags=["models"])


@dataclass(frozen=True)
class KnownModel:
    profile: ModelProfile
    hosts: tuple[str, ...]  # ids, the one heard of last first


def known_models(session: Session) -> list[KnownModel]:
    """By name. Where two hosts have different files under one name, those of the host heard of last count."""
    profiles: dict[str, ModelProfile] = {}
    hosts: dict[str, list[str]] = {}
    for host in session.exec(select(Host).order_by(col(Host.beat_at).desc(), col(Host.id))):
        for model in HostReport.model_validate(host.report).models:
            if profiles.setdefault(model.name, model).content_hash == model.content_hash:
                hosts.setdefault(model.name, []).append(host.id)
    return [KnownModel(profiles[name], tuple(hosts[name])) for name in sorted(profiles)]


def resolve_model(session: Session, base: str) -> KnownModel:
    """Raises UserError model.base, which lists what there is."""
    known = {model.profile.name: model for model in known_models(session)}
    if base in known:
        return known[base]
    if not known:
        raise UserError("model.none_known", "model.base", name=base)
    close = difflib.get_close_matches(base, known, n=3, cutoff=0.5)
    names = close + [name for name in known if name not in close]
    listed = ", ".join(names[:20]) + (" ..." if len(names) > 20 else "")
    raise UserError("model.unknown", "model.base", name=base, known=listed)


class ModelView(ModelProfile):
    hosts: tuple[str, ...]


class ModelList(BaseModel):
    data: list[ModelView]
    next_cursor: None = None
    has_more: Literal[False] = False


@router.get("")
def list_models(services: AnyServices) -> ModelList:
    with services.database.read() as session:
        known = known_models(session)
    return ModelList(data=[ModelView(**model.profile.model_dump(), hosts=model.hosts) for model in known])
