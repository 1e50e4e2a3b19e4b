"""The one template environment: autoescaped, strict about names, every text through gettext.

A page is one template; its fragments are named blocks of it, so the same markup answers a whole page and a swap of a
part. What each page needs beside its own context (who looks, the address of a static file) comes from here.

The reply's language is chosen here too, once there is a second one: until then the catalogue is the source text.
"""

import gettext
import hashlib
import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.responses import HTMLResponse
from fastapi.templating import Jinja2Templates
from jinja2 import Environment, FileSystemLoader, StrictUndefined, pass_context
from jinja2.runtime import Context

from app.auth.caller import Caller
from app.forms import CONTROLS
from app.knobs import OF_INPUT, TITLES
from app.pages import format
from app.vendor import ROOT, VENDOR
from core.errors import Reason, UserError

FORMATS: tuple[Callable[..., str], ...] = (
    format.count,
    format.exact,
    format.size,
    format.percent,
    format.loss,
    format.rate,
    format.duration,
    format.hours,
    format.money,
    format.deviation,
    format.ratio,
    format.moment,
    format.iso,
    format.short_hash,
)
_TRANSLATIONS = gettext.NullTranslations()
translate: Callable[[str], str] = _TRANSLATIONS.gettext


def told(said: UserError | Reason) -> str:
    """A core text in the reply's language, to follow a name and a colon: it may begin with a key or a value."""
    return said.text(translate)


def sentence(said: UserError | Reason) -> str:
    """The same where it stands alone."""
    text = said.text(translate)
    first = text.split(" ", 1)[0]
    return text[:1].upper() + text[1:] if first.isalpha() else text


@lru_cache(maxsize=64)
def _own_digest(path: Path, modified_ns: int, num_bytes: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


@lru_cache(maxsize=1)
def _vendor_digests(modified_ns: int) -> Mapping[str, str]:
    manifest = json.loads((VENDOR / "manifest.json").read_text(encoding="utf-8"))
    return {name: digest[:12] for name, digest in manifest["files"].items()}


def has_vendor_files() -> bool:
    return (VENDOR / "manifest.json").is_file()


@pass_context
def static(context: Context, name: str) -> str:
    """The address of a file in static/, with its content's digest: a browser keeps it, a release replaces it."""
    root_path = context["request"].scope.get("root_path", "")
    if name.startswith("vendor/"):
        manifest = VENDOR / "manifest.json"
        digests = _vendor_digests(manifest.stat().st_mtime_ns) if manifest.is_file() else {}
        digest = digests.get(name.removeprefix("vendor/"), "missing")
    else:
        path = ROOT / "static" / name
        found = path.stat()
        digest = _own_digest(path, found.st_mtime_ns, found.st_size)
    return f"{root_path}/static/{name}?v={digest}"


@pass_context
def path_to(context: Context, path: str) -> str:
    """A page of ours, also below a proxy's path."""
    return f"{context['request'].scope.get('root_path', '')}{path}"


def frame_context(request: Request) -> dict[str, Any]:
    caller = getattr(request.state, "caller", None)
    """What the frame of every page needs."""
    return {
        "request": request,
        "caller": caller if isinstance(caller, Caller) else None,
        "has_vendor_files": has_vendor_files(),
        "is_htmx": "hx-request" in request.headers,
    }


def build_templates() -> Jinja2Templates:
    environment = Environment(
        loader=FileSystemLoader(ROOT / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.i18n"],
    )
    environment.install_gettext_translations(_TRANSLATIONS, newstyle=True)  # type: ignore[attr-defined]
    environment.filters.update({function.__name__: function for function in FORMATS})
    environment.filters["sentence"] = sentence
    environment.filters["told"] = told
    # For texts of core, which are no templates: a percent sign in them stands for itself.
    environment.filters["translate"] = translate
    environment.globals.update(static=static, path_to=path_to, DASH=format.DASH, CONTROLS=CONTROLS)
    environment.globals.update(KNOB_OF_INPUT=OF_INPUT, KNOB_TITLES=TITLES)
    environment.globals["ui"] = environment.get_template("parts.html").module
    return Jinja2Templates(env=environment, context_processors=[frame_context])


def fragment(
    templates: Jinja2Templates, request: Request, name: str, block: str, context: dict[str, Any]
) -> HTMLResponse:
    """One named block of a page."""
    template = templates.get_template(name)
    values = frame_context(request) | context
    return HTMLResponse("".join(template.blocks[block](template.new_context(values))))
