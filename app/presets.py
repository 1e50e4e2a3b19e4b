"""/api/v1/presets: named starting points, each a part of a spec."""

from collections.abc import Mapping
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel

from core.presets import PRESETS

router = APIRouter(prefix="/api/v1/presets", tags=["presets"])


class PresetView(BaseModel):
    key: str
    title: str
    help: str
    spec: Mapping[str, Any]  # what it leaves out keeps its default


class PresetList(BaseModel):
    data: list[PresetView]
    next_cursor: None = None
    has_more: Literal[False] = False


@router.get("")
def list_presets() -> PresetList:
    return PresetList(
        data=[PresetView(key=each.key, title=each.title, help=each.help, spec=each.spec) for each in PRESETS]
    )
