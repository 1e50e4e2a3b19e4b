"""One whole Pegbox for all end-to-end tests: starting it, with the demo model, is what takes the time."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.house import House, running_house


@pytest.fixture(scope="session")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder: Path = tmp_path_factory.mktemp("house")
    with running_house(folder / "data", folder / "models") as running:
        yield running
