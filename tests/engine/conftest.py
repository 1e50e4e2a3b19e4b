"""What the engine's tests share."""

from pathlib import Path

import pytest

from worker.engine.demo_model import ensure_demo_model

# Making the demo model takes some ten CPU seconds, which on a busy machine may become minutes.
MAKING_LIMIT_S = 600


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """demo/tiny-llama, made once a session."""
    return ensure_demo_model(tmp_path_factory.mktemp("models"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "demo_model" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(MAKING_LIMIT_S))
