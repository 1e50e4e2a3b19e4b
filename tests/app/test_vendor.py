"""Whether the installed browser files are those that package-lock.json wants."""

import shutil
from pathlib import Path

from app.vendor import FILES, VENDOR, is_current


def test_a_file_that_was_changed_or_is_gone_is_noticed(tmp_path: Path) -> None:
    copy = tmp_path / "vendor"
    assert not is_current(copy)
    shutil.copytree(VENDOR, copy)
    assert is_current(copy)
    for name in FILES:
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content + b" ")
        assert not is_current(copy), name
        (copy / name).unlink()
        assert not is_current(copy), name
        (copy / name).write_bytes(content)
    assert is_current(copy)


def test_the_extension_comes_in_the_same_file_as_htmx() -> None:
    text = (VENDOR / "htmx.js").read_text(encoding="utf-8")
    assert 'registerExtension("sse"' in text and "sourceMappingURL" not in text
