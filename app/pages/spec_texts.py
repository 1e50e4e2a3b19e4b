"""A job as texts to copy: the spec as YAML, and what launches it from a terminal or a program."""

import json
import shlex
from dataclasses import dataclass

import yaml

from app.forms import written_spec
from app.services import Services
from core.errors import N_
from core.spec import JobSpec

FILE = "spec.yaml"


@dataclass(frozen=True)
class SpecText:
    title: str
    text: str


def spec_texts(services: Services, spec: JobSpec) -> list[SpecText]:
    url = f"{services.settings.url}{services.settings.root_path}"
    return [
        SpecText(N_("YAML"), spec_yaml(spec)),
        SpecText(N_("Command line"), command_lines(url, spec)),
        SpecText(N_("curl"), curl_command(url, spec)),
        SpecText(N_("Python"), python_script(url, spec)),
    ]


def spec_yaml(spec: JobSpec) -> str:
    text: str = yaml.safe_dump(written_spec(spec), sort_keys=False, allow_unicode=True, width=100)
    return text


def command_lines(url: str, spec: JobSpec) -> str:
    """Writes the spec's file, asks the server what it would do, and trains without one on the machine at hand."""
    return (
        f"cat > {FILE} <<'END_OF_SPEC'\n{spec_yaml(spec)}END_OF_SPEC\n"
        f"pegbox preflight -f {FILE} --server {shlex.quote(url)}\n"
        f"pegbox train -f {FILE} --out run"
    )


def curl_command(url: str, spec: JobSpec) -> str:
    body = json.dumps({"spec": written_spec(spec)}, ensure_ascii=False, indent=1)
    return (
        f"curl {shlex.quote(f'{url}/api/v1/jobs')} \\\n"
        f'  -H "Authorization: Bearer $PEGBOX_TOKEN" -H "Content-Type: application/json" \\\n'
        f"  -d {shlex.quote(body)}"
    )


def python_script(url: str, spec: JobSpec) -> str:
    text = json.dumps(written_spec(spec), ensure_ascii=False, indent=4)
    return (
        "import json\n"
        "import os\n\n"
        "import httpx\n\n"
        f"spec = json.loads({_raw(text)})\n"
        "reply = httpx.post(\n"
        f"    {url + '/api/v1/jobs'!r},\n"
        '    headers={"Authorization": f"Bearer {os.environ[\'PEGBOX_TOKEN\']}"},\n'
        '    json={"spec": spec},\n'
        ")\n"
        "reply.raise_for_status()\n"
        'print(reply.json()["id"])\n'
    )


def _raw(text: str) -> str:
    """As a literal over several lines. JSON has no bare quote but its own, so three in a row end it alone."""
    return f"r'''{text}'''" if "'''" not in text else repr(text)
