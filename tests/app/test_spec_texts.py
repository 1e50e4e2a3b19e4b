"""What the panel offers to copy launches the job that the form would."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.pages.spec_texts import command_lines, curl_command, python_script, spec_yaml
from core.spec import parse_spec

HOSTILE = {"name": "it's '''$(id)''' \"all\" `here` \\n END_OF_SPEC 星期三", "notes": "first\nsecond 'third'"}
SPECS: list[dict[str, Any]] = [
    {"data": {"train": [{"dataset": "sums"}]}},
    {"data": {"train": [{"dataset": "sums"}]}, **HOSTILE, "schedule": {"learning_rate": 2e-4, "max_steps": 7}},
]
URL = "http://127.0.0.1:8000/below"


@pytest.mark.parametrize("given", SPECS)
def test_yaml_is_read_as_the_spec_that_it_was_made_of(given: dict[str, Any]) -> None:
    spec = parse_spec(given)
    assert parse_spec(yaml.safe_load(spec_yaml(spec))) == spec


def stand_in(folder: Path, command: str) -> str:
    """A PATH on which `command` only notes its arguments, a line each, in the file `said` where it is called."""
    commands = folder / "bin"
    commands.mkdir()
    (commands / command).write_text(f"#!{sys.executable}\nimport json, sys\n" + NOTE)
    (commands / command).chmod(0o755)
    return f"{commands}:{os.environ['PATH']}"


NOTE = "with open('said', 'a') as file: print(json.dumps(sys.argv[1:]), file=file)\n"


@pytest.mark.parametrize("given", SPECS)
def test_the_commands_write_the_file_and_name_it(given: dict[str, Any], tmp_path: Path) -> None:
    spec = parse_spec(given)
    environment = {"PATH": stand_in(tmp_path, "pegbox")}
    subprocess.run(["sh", "-c", command_lines(URL, spec)], cwd=tmp_path, env=environment, check=True)
    assert parse_spec(yaml.safe_load((tmp_path / "spec.yaml").read_text())) == spec
    said = [json.loads(line) for line in (tmp_path / "said").read_text().splitlines()]
    assert said == [
        ["preflight", "-f", "spec.yaml", "--server", URL],
        ["train", "-f", "spec.yaml", "--out", "run"],
    ]


@pytest.mark.parametrize("given", SPECS)
def test_curl_posts_the_spec(given: dict[str, Any], tmp_path: Path) -> None:
    spec = parse_spec(given)
    environment = {"PATH": stand_in(tmp_path, "curl"), "PEGBOX_TOKEN": "secret"}
    subprocess.run(["sh", "-c", curl_command(URL, spec)], cwd=tmp_path, env=environment, check=True)
    url, *options = json.loads((tmp_path / "said").read_text())
    assert url == f"{URL}/api/v1/jobs"
    assert options[:-1] == ["-H", "Authorization: Bearer secret", "-H", "Content-Type: application/json", "-d"]
    assert parse_spec(json.loads(options[-1])["spec"]) == spec


@pytest.mark.parametrize("given", SPECS)
def test_python_posts_the_spec(given: dict[str, Any], tmp_path: Path) -> None:
    posted: list[tuple[str, str | None, Any]] = []

    class Server(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            posted.append((self.path, self.headers["Authorization"], json.loads(body)))
            self.send_response(201)
            self.end_headers()
            self.wfile.write(b'{"id": "job_1"}')

        def log_message(self, *_: Any) -> None:
            return None

    script = tmp_path / "launch.py"
    spec = parse_spec(given)
    with HTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        script.write_text(python_script(f"http://127.0.0.1:{server.server_port}/below", spec), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, str(script)],
            env={**os.environ, "PEGBOX_TOKEN": "secret"},
            capture_output=True,
            text=True,
            check=False,
        )
        server.shutdown()
        thread.join()
    assert done.stdout.strip() == "job_1", done.stderr
    ((path, token, body),) = posted
    assert (path, token) == ("/below/api/v1/jobs", "Bearer secret")
    assert parse_spec(body["spec"]) == spec
