"""Starting and stopping: one web process a data directory, ready only once it is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.data_dir import hold_data_dir
from app.main import create_app
from core.errors import UserError
from tests.app.conftest import ORIGIN, House, settings_in


def test_a_second_web_process_is_refused_by_name_and_the_next_may_start(tmp_path: Path) -> None:
    with hold_data_dir(tmp_path):
        with pytest.raises(UserError) as refused, hold_data_dir(tmp_path):
            pass
        assert f"process {os.getpid()} already serves {tmp_path}" in str(refused.value)
    with hold_data_dir(tmp_path):
        pass


def test_a_lock_does_not_outlive_a_process_that_was_killed(tmp_path: Path) -> None:
    script = "import sys, pathlib\nfrom app.data_dir import hold_data_dir\nwith hold_data_dir(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(UserError), hold_data_dir(tmp_path):
            pass
        holder.kill()
    with hold_data_dir(tmp_path):
        pass


def test_it_is_ready_while_it_runs_with_all_its_loops_and_not_after(tmp_path: Path) -> None:
    app = create_app(settings_in(tmp_path))
    with TestClient(app, base_url=ORIGIN) as client:
        assert client.get("/readyz").json() == {"status": "ready"}
    stopped = TestClient(app, base_url=ORIGIN)  # without the start that `with` makes
    assert stopped.get("/readyz").status_code == 503
    assert stopped.get("/healthz").status_code == 200


def test_a_crash_is_told_by_its_id_and_nothing_else(house: House, caplog: pytest.LogCaptureFixture) -> None:
    @house.app.get("/api/v1/crash")
    def crash() -> None:
        raise RuntimeError("the secret is 42")

    client = house.client(Authorization=f"Bearer {house.tokens['bob']}", **{"X-Request-Id": "crash-1"})
    response = client.get("/api/v1/crash")
    assert response.status_code == 500
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["content-security-policy"].startswith("default-src 'none'")
    assert "crash-1" in response.json()["detail"]
    assert "42" not in response.text and "Traceback" not in response.text
    assert "the secret is 42" in caplog.text and "crash-1" in caplog.text


def test_the_web_service_never_imports_torch(tmp_path: Path) -> None:
    script = "import sys, app.main\nsys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'worker')))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
