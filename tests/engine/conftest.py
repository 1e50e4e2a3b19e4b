"""What the engine's tests share."""

from pathlib import Path

import pytest

from tests.engine import jobs
from worker.engine.demo_model import ensure_demo_model

# Making the demo model takes some ten CPU seconds, which on a busy machine may become minutes.
MAKING_LIMIT_S = 600


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """demo/tiny-llama, made once a session."""
    return ensure_demo_model(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama that knows chat. No test changes it."""
    return jobs.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations for it."""
    return jobs.make_data(tmp_path_factory.mktemp("data") / "rows.jsonl")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "demo_model" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(MAKING_LIMIT_S))
