import pytest

from worker.engine import libraries


def test_what_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert libraries.TOLD[0] in libraries.versions()
    monkeypatch.setattr(libraries, "TOLD", ("numpy", "no-such-package"))
    assert libraries.versions().keys() - {"cuda"} == {"python", "numpy", "torch"}
