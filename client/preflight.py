"""`pegbox preflight -f spec.yaml`: asks a server what a job would do, without launching it.

The server answers 202 while a host measures the data; then this waits, with a line on stderr that says how far it is.
The report goes to stdout, as text or as the JSON that the API gives; what is wrong with the spec goes to stderr.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import yaml

from core.errors import UserError
from core.fix import told

SERVER = "http://127.0.0.1:8000"
TIMEOUT_S = 60.0  # of one answer: a million samples take some seconds to plan
BAD_SPEC, UNAVAILABLE, NOT_ALLOWED = 65, 69, 77  # as sysexits.h has them

Report = Mapping[str, Any]


@dataclass(frozen=True)
class Asked:
    file: Path
    form: Literal["text", "json"]
    server: str | None = None
    token: str | None = None
    device: str = ""  # to plan for; empty: the likeliest


class Refused(Exception):
    """The server's problem, or that there is no server; `code` is what the command ends with."""

    def __init__(self, code: int, *sentences: str) -> None:
        super().__init__(*sentences)
        self.code = code
        self.sentences = sentences


def preflight(asked: Asked) -> int:
    """Raises UserError where the file is none that can be sent."""
    spec = read_spec(asked.file)
    try:
        report = ask(asked, spec)
    except Refused as refused:
        sys.stderr.writelines(f"{sentence}\n" for sentence in refused.sentences)
        return refused.code
    text = json.dumps(report, ensure_ascii=False) if asked.form == "json" else "\n".join(lines_of(report))
    sys.stdout.write(f"{text}\n")
    return 0


def read_spec(path: Path) -> dict[str, Any]:
    """The mapping of a YAML or JSON file, maybe below `spec:` as the API takes it; its server judges it."""
    try:
        spec = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise UserError("spec.file", "-f", path=str(path), problem=error.strerror or str(error)) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = str(getattr(error, "problem", None) or error)
        raise UserError("spec.yaml", "-f", problem=problem, line=mark.line + 1 if mark else 0) from error
    if isinstance(spec, dict) and set(spec) == {"spec"}:
        spec = spec["spec"]
    if not isinstance(spec, dict):
        raise UserError("spec.not_a_mapping", "-f", kind=type(spec).__name__)
    return spec


# -- asking ----------------------------------------------------------------------------------------------------------


def ask(asked: Asked, spec: Mapping[str, Any]) -> Report:
    """The report, however long its data takes to be measured. Raises Refused."""
    server = (asked.server or os.environ.get("PEGBOX_URL") or SERVER).rstrip("/")
    token = asked.token or os.environ.get("PEGBOX_TOKEN", "")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    waits = Waits()
    try:
        with httpx.Client(base_url=server, headers=headers, timeout=TIMEOUT_S) as client:
            while True:
                reply = client.post("/api/v1/jobs/preflight", json={"spec": spec, "device": asked.device})
                if reply.status_code != httpx.codes.ACCEPTED:
                    return _report_of(reply)
                waits.say(reply.json())
                time.sleep(float(reply.headers.get("Retry-After", "1")))
    except (httpx.TransportError, httpx.InvalidURL) as error:
        said = UserError("client.no_server", server=server, problem=str(error) or type(error).__name__)
        raise Refused(UNAVAILABLE, said.text()) from error
    finally:
        waits.end()


def _report_of(reply: httpx.Response) -> Report:
    try:
        body = reply.json()
    except ValueError:
        body = None
    if reply.status_code == httpx.codes.OK and isinstance(body, dict):
        return body
    if not isinstance(body, dict) or "errors" not in body:
        said = UserError("client.other_server", server=str(reply.url.join("/")), status=reply.status_code)
        raise Refused(UNAVAILABLE, said.text())
    match reply.status_code:
        case httpx.codes.UNPROCESSABLE_ENTITY | httpx.codes.BAD_REQUEST:
            raise Refused(BAD_SPEC, *(line for error in body["errors"] for line in _lines_of_fault(error)))
        case httpx.codes.UNAUTHORIZED | httpx.codes.FORBIDDEN:
            raise Refused(NOT_ALLOWED, UserError("client.token", problem=body["detail"]).text())
    raise Refused(UNAVAILABLE, body["detail"])


def _lines_of_fault(error: Mapping[str, Any]) -> Iterator[str]:
    field = error["pointer"].removeprefix("/spec").strip("/").replace("/", ".")
    yield f"{field}: {error['detail']}" if field else error["detail"]
    for fix in error.get("fixes", ()):
        yield f"    fix: {told(fix)}"


class Waits:
    """One line on stderr that is written over; on no terminal a line for each that is new."""

    def __init__(self) -> None:
        self._said = ""
        self._is_terminal = sys.stderr.isatty()

    def say(self, waiting: Mapping[str, Any]) -> None:
        text = "measuring the data: " + ", ".join(_measured(waiting))
        if text != self._said:
            sys.stderr.write(f"\r\033[K{text}" if self._is_terminal else f"{text}\n")
            sys.stderr.flush()
        self._said = text

    def end(self) -> None:
        if self._said and self._is_terminal:
            sys.stderr.write("\r\033[K")


def _measured(waiting: Mapping[str, Any]) -> Iterator[str]:
    for name, state in waiting["profiles"].items():
        share = waiting.get("progress", {}).get(name)
        yield f"{name} {state}" if share is None else f"{name} {share:.0%}"


# -- the report as text ----------------------------------------------------------------------------------------------


def lines_of(report: Report) -> Iterator[str]:
    width = max(len(title) for title, _ in _facts(report))
    for title, said in _facts(report):
        yield f"{title:{width}}  {said}"
    for level, title in (("warning", "Warnings"), ("info", "Notes")):
        remarks = [remark for remark in report["verdict"] if remark["level"] == level]
        if remarks:
            yield f"\n{title}"
        for remark in remarks:
            yield f"  {remark['field']}: {remark['text']}"
            for fix in remark["fixes"]:
                yield f"      fix: {told(fix)}"


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    rates = report["learning_rate"]
    yield "Steps", f"{report['total_steps']:,}, {report['steps_per_epoch']:,} an epoch"
    yield "Warm-up", f"{report['warmup_steps']:,} steps, up to a learning rate of {max(rates):.3g}"
    yield "Samples", f"{report['samples']:,}, of at most {report['max_length']:,} tokens; {_held_out(report)}"
    yield "Tokens", f"{report['tokens']:,} an epoch, {report['trained_tokens']:,} of them trained"
    yield (
        "Packing",
        f"{report['padding_efficiency']:.1%} of all positions are tokens ({report['padded_efficiency']:.1%} with plain "
        f"padding), {report['rows']:,} rows an epoch of at most {report['row_length']:,}",
    )
    yield "Memory", _memory(report["memory"])
    planned = report["planned_for"]
    yield "Planned for", f"{planned['device']} ({', '.join(planned['hosts'])}): {planned['why']}"
    forecast = report["forecast"]
    if forecast["seconds"] is not None:
        low, high = (_duration(forecast[name]) for name in ("low_s", "high_s"))
        yield "Time", f"about {_duration(forecast['seconds'])}, between {low} and {high}"
    yield "Starts", forecast["place"]


def _held_out(report: Report) -> str:
    count = report["validation_samples"]
    return f"{count:,} more are held out" if count else "none is held out"


def _memory(memory: Report) -> str:
    if memory["unknown"] is not None:
        return str(memory["unknown"])
    chosen = next(way for way in memory["ways"] if way["is_chosen"])
    parts = [f"ZeRO stage {chosen['zero_stage']}"] if memory["ranks"] > 1 else []
    parts += [] if chosen["offload"] == "none" else [f"offload {chosen['offload']}"]
    parts += ["gradient checkpointing"] if chosen["gradient_checkpointing"] else []
    way = f" with {', '.join(parts)}" if parts else ""
    fits = "fits" if chosen["fits"] else "does not fit"
    return f"{_gib(chosen['total_bytes'])} of {_gib(memory['device_bytes'])} by estimate{way}: it {fits}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"
