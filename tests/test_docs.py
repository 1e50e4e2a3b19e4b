"""What the documentation promises to list, it lists."""

import re
from pathlib import Path

from app.settings import DEFAULTS
from core.events import KNOWN_KINDS
from core.spec import spec_fields
from launch.reference import PAGE, page

DOCS = PAGE.parent


def test_the_page_of_the_spec_is_what_the_spec_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run make docs"
    for key, _ in spec_fields():
        assert key == "spec_version" or f"`{key}`" in page(), key


def test_every_setting_is_documented() -> None:
    text = (DOCS / "settings.md").read_text(encoding="utf-8")
    for name in (*DEFAULTS, "PEGBOX_MODEL_ROOTS", "PEGBOX_WORKER_TOKEN", "PEGBOX_TOKEN"):
        assert f"| `{name}` |" in text, name


def test_every_event_and_each_of_its_fields_is_documented() -> None:
    text = (DOCS / "events.md").read_text(encoding="utf-8")
    for kind, event in KNOWN_KINDS.items():
        (row,) = re.findall(rf"^\| `{kind}` \|.*$", text, re.MULTILINE)
        for field in set(event.model_fields) - {"seq", "ts", "kind"}:
            assert f"`{field}`" in row, f"{kind}.{field}"


def test_links_between_pages_lead_somewhere() -> None:
    root = Path(__file__).resolve().parent.parent
    pages = [root / "README.md", *DOCS.rglob("*.md")]
    assert len(pages) > 8
    for page_ in pages:
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page_.read_text(encoding="utf-8")):
            assert (page_.parent / target).exists(), f"{page_.name}: {target}"
