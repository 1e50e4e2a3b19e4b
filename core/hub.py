"""Data sets on the Hugging Face hub, as a spec names them: hf:ORG/NAME, with a configuration, a split, a revision.

hf:ORG/NAME[/CONFIG][:SPLIT][@REVISION]        hf:HuggingFaceH4/no_robots:test@0123abc
"""

import re
from dataclasses import dataclass

from core.errors import UserError

PREFIX = "hf:"
DEFAULT_SPLIT = "train"
REFERENCE = re.compile(
    r"hf:(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(/(?P<config>[\w-][\w.-]*))?"
    r"(:(?P<split>[\w-][\w.-]*))?(@(?P<revision>[\w-][\w./-]*))?",
    re.ASCII,
)


@dataclass(frozen=True)
class HubDataset:
    repository: str  # ORG/NAME
    config: str | None  # of its configurations; None = the only one, or its default
    split: str
    revision: str | None  # branch, tag or commit; None = the newest


def parse_hub_dataset(dataset: str, field: str = "") -> HubDataset | None:
    """None where the name is no hub's. Raises UserError hub.bad_name."""
    if not dataset.startswith(PREFIX):
        return None
    match = REFERENCE.fullmatch(dataset)
    if match is None:
        raise UserError("hub.bad_name", field, name=dataset[:200])
    return HubDataset(match["repository"], match["config"], match["split"] or DEFAULT_SPLIT, match["revision"])
