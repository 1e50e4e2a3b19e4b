"""`pegbox demo`: from nothing to a finished fine-tune, over the same REST API that a script would use."""

import time
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from app.auth import mint_login_link
from app.services import build_services
from core.presets import PRESETS
from core.states import TERMINAL, JobState
from launch.up import Launch, free_port, is_free

HOST_READY_S = 300.0  # the first start makes the model


def run_demo(*, gpus: str, cpu_slots: int | None, exits: bool) -> int:
    """0 when the job succeeded (with `exits`: and everything has stopped again)."""
    import os

    from app.settings import load_settings

    console = Console()
    settings = load_settings()
    if not is_free(settings.host, settings.port):
        os.environ["PEGBOX_PORT"] = str(free_port())
        console.print(f"port {settings.port} is busy; the demo takes {os.environ['PEGBOX_PORT']}")
    with Launch(gpus=gpus, cpu_slots=cpu_slots, quiet=True) as launch:
        console.print(f"starting web, worker and Valkey; their logs are in {launch.settings.data_dir / 'logs'}")
        launch.start()
        token = launch.api_token()
        try:
            with httpx.Client(
                base_url=f"{launch.local_url}/api/v1", headers={"Authorization": f"Bearer {token}"}, timeout=30
            ) as api:
                job = _launch_job(api, launch, console)
                state = _follow(api, launch, job, console) if job else None
        finally:
            launch.revoke(token)
        succeeded = state == JobState.SUCCEEDED
        if exits or state is None:
            return 0 if succeeded else 1
        console.print(f"the dashboard: {launch.settings.url}")
        console.print(f"log in once with: {mint_login_link(build_services(launch.settings))}", soft_wrap=True)
        console.print("Ctrl-C stops everything")
        launch.wait()
        return 0 if succeeded else 1


def _launch_job(api: httpx.Client, launch: Launch, console: Console) -> str | None:
    spec = next(preset.spec for preset in PRESETS if preset.key == "demo")
    deadline = time.monotonic() + HOST_READY_S
    with console.status("the worker makes demo/tiny-llama and registers"):
        while launch.tend() and time.monotonic() < deadline:
            if any(
                model["name"] == spec["model"]["base"] for model in api.get("/models").raise_for_status().json()["data"]
            ):
                break
            time.sleep(0.3)
    reply = api.post("/jobs", json={"spec": spec}, headers={"Idempotency-Key": f"demo-{time.time_ns()}"})
    if reply.status_code != 201:
        console.print(f"the job was refused: {reply.json().get('detail')}", markup=False)
        for error in reply.json().get("errors", []):
            console.print(f"  {error['pointer']}: {error['detail']}", markup=False)
        return None
    job = reply.json()["id"]
    console.print(f"launched {job}: LoRA on {spec['model']['base']}, packed")
    return str(job)


def _follow(api: httpx.Client, launch: Launch, job: str, console: Console) -> str | None:
    """Shows the job until it ends, and returns its state; None when somebody stopped us before."""
    columns = (
        TextColumn("{task.fields[state]:<11}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} steps"),
        TextColumn("loss {task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=1, state="queued", loss="-")
        while launch.tend():
            current = api.get(f"/jobs/{job}").raise_for_status().json()
            summary: dict[str, Any] = current.get("summary") or {}
            loss = summary.get("loss")
            progress.update(
                bar,
                total=summary.get("total_steps") or 1,
                completed=summary.get("step") or 0,
                state=current["state"],
                loss="-" if loss is None else f"{loss:.3f}",
            )
            if JobState(current["state"]) in TERMINAL:
                break
            time.sleep(0.3)
        else:
            return None
    _print_end(current, console)
    return str(current["state"])


def _print_end(job: dict[str, Any], console: Console) -> None:
    summary = job.get("summary") or {}
    console.print(f"{job['id']} {job['state']}")
    if job["state"] == JobState.FAILED:
        console.print(f"{job.get('text')} {job.get('remedy') or ''}", markup=False)
    elif summary.get("padding_efficiency") and summary.get("padded_efficiency"):
        console.print(
            f"padding efficiency {summary['padding_efficiency']:.1%}; "
            f"the same samples padded, 8 to a batch: {summary['padded_efficiency']:.1%}"
        )
