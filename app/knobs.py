"""What each knob does, why, and what it costs: the pages of docs/knobs as HTML, for the form and to read."""

import re
from collections.abc import Mapping
from functools import lru_cache

from markdown_it import MarkdownIt
from markupsafe import Markup

from app.services import ROOT
from core.errors import N_

LINK = re.compile(r"\[(?P<text>[^\]]+)\]\((?P<target>[^)]+)\)")
# The policy forbids styles in HTML, and what is wider than the page scrolls by itself, by keys too.
_AS_OURS = {
    ' style="text-align:right"': ' class="num"',
    "<table>": '<div class="scroll" tabindex="0"><table>',
    "</table>": "</table></div>",
    "<pre>": '<pre class="code" tabindex="0">',
}
_MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable("table")

FOLDER = ROOT / "docs" / "knobs"
# In the order of the form.
TITLES: Mapping[str, str] = {
    "packing": N_("Packing"),
    "lora": N_("LoRA, and full fine-tuning beside it"),
    "qlora": N_("QLoRA"),
    "full": N_("Full fine-tuning"),
    "zero": N_("ZeRO"),
    "warmup": N_("Warm-up and the learning-rate curve"),
    "optimizer": N_("Optimizer"),
    "attention": N_("Attention"),
}
# The input of the form beside which a page is offered.
OF_INPUT: Mapping[str, str] = {
    "packing.mode": "packing",
    "batch": "packing",
    "method.type": "lora",
    "parallel.zero_stage": "zero",
    "schedule.learning_rate": "warmup",
    "schedule.warmup": "warmup",
    "optimizer.name": "optimizer",
    "compute.attention": "attention",
}


@lru_cache(maxsize=len(TITLES))
def knob_html(name: str, base: str) -> Markup:
    """A page without its title, as HTML. `base` is where the pages of knobs stand; other
    documents are not served, so that of a link to one only its text stays."""
    assert name in TITLES
    _title, _, text = (FOLDER / f"{name}.md").read_text(encoding="utf-8").partition("\n")

    def settled(link: re.Match[str]) -> str:
        page = link["target"].removesuffix(".md")
        return f"[{link['text']}]({base}/{page})" if page in TITLES else link["text"]

    html: str = _MARKDOWN.render(LINK.sub(settled, text))
    for written, ours in _AS_OURS.items():
        html = html.replace(written, ours)
    return Markup(html)  # noqa: S704  our own documents
