"""What every template keeps: all its texts go through gettext, and nothing in it needs a hole in the CSP."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from jinja2 import Environment, nodes

from app.pages.environment import build_templates

ROOT = Path(__file__).parent.parent.parent
TEMPLATES = sorted((ROOT / "templates").glob("*.html"))
READ_ALOUD = {"title", "aria-label", "placeholder", "alt", "content", "data-empty", "data-done", "data-broken"}
# The product's name, formats that are names, and roles that are written as the command line takes them.
SAME_EVERYWHERE = {"Pegbox", "SHA-256", "JSON", "member", "viewer", "admin", "worker", "light dark"}
# Commands, settings of the browser, and a macro that gives attributes.
NO_TEXTS = ("curl ", "width=", '{"include', "aria-describedby")
EXPRESSION = "\N{OBJECT REPLACEMENT CHARACTER}"


class Texts(HTMLParser):
    """Collects what a reader would see or hear."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._inside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside.append(tag)
        self.found += [value or "" for name, value in attrs if name in READ_ALOUD]

    def handle_endtag(self, tag: str) -> None:
        if tag in self._inside:
            while self._inside.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        self.found.append(data)


def environment() -> Environment:
    return build_templates().env


def source_without_expressions(path: Path) -> str:
    """The template's own characters, each expression one placeholder."""
    tree = environment().parse(path.read_text(encoding="utf-8"))
    parts = []
    for output in tree.find_all(nodes.Output):
        parts += [each.data if isinstance(each, nodes.TemplateData) else EXPRESSION for each in output.nodes]
    return "".join(parts)


def bare_texts(source: str) -> list[str]:
    parser = Texts()
    parser.feed(source)
    texts = (text.replace(EXPRESSION, "").strip(" \n·/…,.()") for text in parser.found)
    return [
        text
        for text in texts
        if re.search(r"[A-Za-z]{2}", text) and text not in SAME_EVERYWHERE and not text.startswith(NO_TEXTS)
    ]


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_every_text_goes_through_gettext(path: Path) -> None:
    assert bare_texts(source_without_expressions(path)) == []


def test_a_bare_text_would_be_found() -> None:
    assert bare_texts('<p title="Hello">Good <b>day</b></p>') == ["Hello", "Good", "day"]


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_no_template_needs_a_hole_in_the_policy(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert not re.search(r"\sstyle\s*=|\son[a-z]+\s*=|hx-on|javascript:|<style|js:|\|\s*safe\b|autoescape", source)
    for script in re.findall(r"<script[^>]*>", source):
        assert "src=" in script, "a script has a file of its own"
    for trigger in re.findall(r'hx-trigger="([^"]*)"', source):
        assert "[" not in trigger, "a filter of a trigger is evaluated as code"


def test_no_page_trusts_a_text() -> None:
    for path in (ROOT / "app").rglob("*.py"):
        if path == ROOT / "app" / "knobs.py":
            continue  # it renders documents of ours, and nothing that anybody sent
        assert "Markup" not in path.read_text(encoding="utf-8"), path
    assert environment().autoescape is True


def test_the_style_sheet_stays_small_and_keeps_its_colours_in_one_place() -> None:
    sheet = (ROOT / "static" / "app.css").read_text(encoding="utf-8")
    assert len(sheet.encode()) <= 30_000
    after_tokens = sheet.split("@layer base {", 1)[1]
    assert re.findall(r"#[0-9a-f]{3,8}\b", re.sub(r"light-dark\([^)]*\)", "", after_tokens)) == ["#fff"]
