"""Tokens made on the server's machine."""

import subprocess
import sys
from pathlib import Path

import pytest

from app.auth.tokens import find_token
from app.services import build_services
from app.settings import Settings, load_settings
from launch.tokens import make_token


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings({"PEGBOX_DATA_DIR": str(tmp_path / "data")}, tmp_path / "none.env")


def test_a_persons_token_works_in_the_name_of_the_administrator_with_its_own_role(settings: Settings) -> None:
    token = make_token(settings, "script", "member")
    services = build_services(settings)
    caller = find_token(services.database, token, 0.0)
    assert caller is not None and caller.role == "member" and caller.user_id is not None
    worker = find_token(services.database, make_token(settings, "gpu-1", "worker"), 0.0)
    assert worker is not None and worker.role == "worker" and worker.user_id is None
    services.database.close()


def test_the_command_prints_the_token_alone(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pegbox", "tokens", "create", "--name", "x", "--data-dir", str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("pegbox_") and done.stdout.count("\n") == 1


def test_it_needs_nothing_of_a_worker() -> None:
    code = "import sys, launch.tokens; sys.exit(bool({'psutil', 'torch', 'worker'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False, timeout=60)
    assert done.returncode == 0
