"""`python -m launch.reference`: writes docs/spec.md from the spec itself. A test keeps the two equal."""

import json
from pathlib import Path
from typing import Any, get_args

from pydantic.fields import FieldInfo

from core.spec import GROUPS, spec_fields
from core.unbuilt import UNBUILT

PAGE = Path(__file__).resolve().parent.parent / "docs" / "spec.md"

HEAD = """# The job spec

Every knob of a fine-tune, with its default. The form, the REST API and `pegbox train` take the same spec; unknown keys
are refused with the key that was probably meant. This page is written by `make docs` from `core/spec.py`.

`auto` is resolved before launch from the method, the model and the data; the value and the reason are shown and stored
with the job. Three sets of keys are alternatives, of which one may be given: `batch.samples_per_step`,
`tokens_per_step`, `rows_per_step`; `schedule.epochs`, `max_steps`; `schedule.warmup_ratio`, `warmup_steps`,
`warmup_epochs`. `evaluation.every_steps` and `per_epoch` likewise.

"""


def page() -> str:
    fields = {group: [] for group in GROUPS}  # type: dict[str, list[str]]
    for key, field in spec_fields():
        if key == "spec_version":
            continue
        extra = field.json_schema_extra
        assert isinstance(extra, dict)
        unit = f" ({extra['unit']})" if extra["unit"] else ""
        fields[str(extra["group"])].append(
            f"| `{key}` | {_default(field)} | {_values(field)} | {field.title}{unit}. {field.description} |"
        )
    parts = [HEAD]
    for group, rows in fields.items():
        parts.append(f"## {group}\n\n| key | default | values | what it does |\n|---|---|---|---|\n")
        parts.append("\n".join(rows) + "\n\n")
    parts.append("## Refused in this release\n\nNot built yet; a spec that asks for one is told so at once.\n\n")
    parts.append("| key | values | instead |\n|---|---|---|\n")
    for key, _, lacking, remedy in UNBUILT:
        values = ", ".join(sorted(str(value).lower() for value in lacking))
        parts.append(f"| `{key}` | {values} | {remedy} |\n")
    parts.append("| `model.revision` | any | leave it empty |\n")
    return "".join(parts).rstrip() + "\n"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return f"`{json.dumps(field.default, default=str)}`"


def _values(field: FieldInfo) -> str:
    choices = [str(value) for value in _literals(field.annotation)]
    limits = {"ge": "from", "gt": "above", "le": "up to", "lt": "below"}
    bounds = [
        f"{word} {getattr(limit, name)}"
        for limit in _metadata(field.annotation, field.metadata)
        for name, word in limits.items()
        if getattr(limit, name, None) is not None
    ]
    return ", ".join([*choices, " ".join(bounds)] if bounds else choices)


def _literals(annotation: Any) -> list[object]:
    found: list[object] = []
    for argument in get_args(annotation):
        if isinstance(argument, str | int) and not isinstance(argument, bool):
            found.append(argument)
        elif get_args(argument):
            found += _literals(argument)
    return list(dict.fromkeys(found))


def _metadata(annotation: Any, own: list[Any]) -> list[Any]:
    """The bounds of the field and of the first branch of its union that has some."""
    found = list(own)
    for argument in getattr(annotation, "__metadata__", ()):
        found += getattr(argument, "metadata", [argument])
    if not found:
        for argument in get_args(annotation):
            found = _metadata(argument, [])
            if found:
                break
    return found


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
