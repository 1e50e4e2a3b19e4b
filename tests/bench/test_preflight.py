"""The bench of the panel, at toy size: that each keystroke gets a whole panel of its own."""

from pathlib import Path

import pytest

from bench import preflight


def test_every_keystroke_is_answered_with_a_whole_panel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preflight.main(["--samples", "300", "--rounds", "2"])
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[1:]] == [*preflight.TYPED, "any of these"]
    assert all(float(cell) > 0 for row in rows[1:] for cell in row[1:])
