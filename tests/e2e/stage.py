"""A set for the browser tests of the pages: the real web service on a port, and one host that plays its part by hand
over the real worker routes, so that each state of a job stands still for as long as a test looks at it.

The scenes are made of what real runs send: a loss that falls with noise, rates from the schedule itself, lengths with
a long tail. Nothing here trains.
"""

import asyncio
import hashlib
import json
import math
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from sqlmodel import func, select

from app.auth import create_token, mint_login_link
from app.main import create_app
from app.services import Services
from app.settings import load_settings
from app.tables import Attempt, Job, Profile, User
from core.preflight import plan_job
from core.profile import AlikeRow, AlikeRows, DataProfile, Duplicates, ModelProfile, TokenPreview
from core.schedule import Schedule, lr_at
from core.spec import parse_spec
from core.wire import Device, HostReport
from tests.core.shapes import llama

HOST = "host-of-the-stage"
MODEL = ModelProfile(
    name="demo/tiny-llama",
    content_hash="a" * 64,
    architecture="LlamaForCausalLM",
    num_parameters=2_134_016,
    context_length=4096,
    vocabulary=4096,
    dtype="float32",
    has_chat_template=True,
    bytes=8_600_000,
    # Of a model that has something to plan.
    shape=llama(hidden=2048, layers=16, heads=32, key_value_heads=8, intermediate=8192, vocabulary=4096),
)
LIBRARIES = {"bitsandbytes": "0.50.2", "deepspeed": "0.19.8"}
DEVICES = tuple(
    Device(id=f"gpu{index}", kind="gpu", name="NVIDIA L40S", memory_bytes=48 * 2**30, has_bf16=True)
    for index in range(4)
)


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = 30.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {timeout_s} s in vain until {what}"
        time.sleep(0.02)
    return value


class Server(threading.Thread):
    """The application behind real sockets, in this process."""

    def __init__(self, data_dir: Path, port: int) -> None:
        super().__init__(daemon=True)
        self.settings = load_settings(
            {"PEGBOX_DATA_DIR": str(data_dir), "PEGBOX_PORT": str(port)}, dotenv=Path("/nonexistent")
        )
        self.app = create_app(self.settings)
        self._server = uvicorn.Server(
            uvicorn.Config(self.app, port=port, log_level="warning", timeout_graceful_shutdown=3)
        )

    def run(self) -> None:
        asyncio.run(self._server.serve())

    def begin(self) -> None:
        self.start()
        wait_until(lambda: self._server.started or not self.is_alive(), "the server listens")
        assert self._server.started

    def end(self) -> None:
        self._server.should_exit = True
        self.join(20)
        assert not self.is_alive(), "the server did not stop"


@dataclass
class Part:
    """An attempt that this stage plays."""

    job: str
    number: int
    fence: int
    seq: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)

    def say(self, kind: str, ts: float, **data: Any) -> None:
        self.seq += 1
        self.events.append({"seq": self.seq, "ts": ts, "kind": kind, "data": data})


class Stage:
    def __init__(self, server: Server) -> None:
        self.server = server
        self.services: Services = server.app.state.services
        self.url = server.settings.url
        worker = create_token(self.services.database, "stage host", "worker")
        with self.services.database.read() as session:
            user = session.exec(select(User.id).where(User.name == "admin")).one()
        admin = create_token(self.services.database, "stage", "admin", user)
        self.worker = httpx.Client(base_url=f"{self.url}/worker/v1", headers={"Authorization": f"Bearer {worker}"})
        self.api = httpx.Client(base_url=f"{self.url}/api/v1", headers={"Authorization": f"Bearer {admin}"})
        self.random = random.Random(7)

    def close(self) -> None:
        self.worker.close()
        self.api.close()

    def restart_server(self) -> None:
        """The web service goes and comes back at the same address, over the same data."""
        self.server.end()
        self.server = Server(self.server.settings.data_dir, self.server.settings.port)
        self.server.begin()
        self.services = self.server.app.state.services

    def login_link(self) -> str:
        return mint_login_link(self.services)

    # -- the host --------------------------------------------------------------------------------------------------
    def open_host(self) -> None:
        report = HostReport(
            host=HOST,
            name="ada",
            devices=DEVICES,
            refused_devices={"gpu4": "this torch needs a driver of 570 or newer, the host has 535"},
            models=(MODEL,),
            versions={"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2", "driver": "580.65"} | LIBRARIES,
            num_cpus=64,
            memory_bytes=512 * 2**30,
        )
        self._post("/hosts/register", report.model_dump(mode="json"))
        self.beat()

    def beat(self) -> dict[str, Any]:
        load = [
            {
                "id": device.id,
                "utilisation": 0.94 - 0.2 * index,
                "memory_used_bytes": (31 - 7 * index) * 2**30,
                "temperature_c": 61 - index,
            }
            for index, device in enumerate(DEVICES)
        ]
        beat = {"load": load, "cpu_utilisation": 0.21, "memory_used_bytes": 91 * 2**30, "disk_free_bytes": 3 * 2**40}
        orders: dict[str, Any] = self._post(f"/hosts/{HOST}/beat", beat)
        return orders

    def measure(self) -> None:
        """Answers every profile that is wanted."""
        for profile in self.beat()["profiles"]:
            self._post(f"/profiles/{profile}/claim")
            with self.services.database.read() as session:
                policy = session.get_one(Profile, profile).multi_turn
            facts = make_profile(self.random, "split" if policy == "split" else "whole")
            self._post(f"/profiles/{profile}/result", {"profile": facts.model_dump(mode="json")})

    # -- data and jobs ---------------------------------------------------------------------------------------------
    def upload(self, name: str, num_rows: int = 640, *, with_faults: bool = True) -> None:
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"How many minutes are {number} hours?"},
                    {"role": "assistant", "content": f"{number} hours are {number * 60} minutes."},
                ]
            }
            for number in range(1, num_rows + 1)
        ]
        lines = [json.dumps(row) for row in rows]
        if with_faults:
            lines[16] = '{"messages": [{"role": "user"'
            lines[94] = json.dumps({"messages": [{"role": "user", "content": "And without an answer?"}]})
        reply = self.api.put(f"/datasets/{name}", content="\n".join(lines).encode())
        assert reply.status_code in (200, 201), reply.text

    def launch(self, name: str, **spec: Any) -> str:
        body = {"spec": {"name": name, "data": {"train": [{"dataset": "demo-dialogues"}]}} | spec}
        reply = self.api.post("/jobs", json=body)
        assert reply.status_code == 201, reply.text
        return str(reply.json()["id"])

    def take(self, job_id: str) -> Part:
        """Waits for the dispatcher and claims the attempt."""

        def dispatched() -> Attempt | None:
            with self.services.database.read() as session:
                job = session.get_one(Job, job_id)
                return session.get(Attempt, (job_id, job.attempt)) if job.state == "dispatching" else None

        attempt = wait_until(dispatched, f"{job_id} is dispatched")
        part = Part(job_id, attempt.number, attempt.fence)
        self._post(f"/attempts/{part.job}/{part.number}/claim", {"host": HOST, "fence": part.fence})
        return part

    def send(self, part: Part) -> None:
        for start in range(0, len(part.events), 500):
            batch = {"fence": part.fence, "events": part.events[start : start + 500]}
            self._post(f"/attempts/{part.job}/{part.number}/events", batch)
        part.events.clear()
        self.heartbeat(part)

    def heartbeat(self, part: Part) -> dict[str, Any]:
        beat = {"fence": part.fence, "last_seq": part.seq}
        orders: dict[str, Any] = self._post(f"/attempts/{part.job}/{part.number}/heartbeat", beat)
        return orders

    def play_plan(self, part: Part, total_steps: int, started_at: float) -> Schedule:
        """Everything before the first step."""
        with self.services.database.read() as session:
            spec = parse_spec(session.get_one(Job, part.job).spec)
        profile = make_profile(random.Random(3), "whole")
        spec = spec.model_copy(
            update={"schedule": spec.schedule.model_copy(update={"epochs": None, "max_steps": total_steps})}
        )
        plan = plan_job(spec, {each.dataset: profile for each in spec.data.train}, MODEL, DEVICES[0])
        for offset, (name, total) in enumerate((("fetch", 1), ("load_model", None), ("tokenise", 640), ("plan", None))):
            part.say("phase", started_at + offset, name=name, done=total or 0, total=total)
            part.say("log", started_at + offset, rank=0, level="info", text=f"{name}: done in {0.3 + offset:.1f} s")
        model_facts = {
            "trainable_parameters": 98_304,
            "total_parameters": 2_232_320,
            "trainable_by_kind": {"q_proj": 32_768, "v_proj": 32_768, "down_proj": 32_768},
            "weight_bytes": {"bfloat16": 4_268_032, "float32": 393_216},
            "attention": "flash",
        }
        part.say("plan", started_at + 4, **plan.plan_event(), **model_facts)
        part.say("phase", started_at + 5, name="train", done=0, total=None)
        return plan.schedule

    def play_steps(
        self, part: Part, schedule: Schedule, first: int, last: int, began_at: float, step_s: float = 0.42
    ) -> None:
        for step in range(first, last + 1):
            ts = began_at + step * step_s
            decay = math.exp(-step / 140)
            loss = 0.62 + 1.9 * decay + self.random.gauss(0, 0.05 + 0.05 * decay)
            tokens = self.random.randint(7_400, 8_300)
            efficiency = min(0.998, self.random.gauss(0.972, 0.012))
            part.say(
                "step", ts,
                step=step, epoch=step / 200, loss=loss, learning_rate=lr_at(schedule, step),
                grad_norm=abs(self.random.gauss(0.9, 0.2)), trained_tokens=int(tokens * 0.38), tokens=tokens,
                slots=int(tokens / efficiency), rows=8, padding_efficiency=efficiency,
                padded_efficiency=max(0.2, self.random.gauss(0.61, 0.05)),
                tokens_per_s=tokens / step_s, step_s=step_s, wait_s=0.002, memory_peak_bytes=11 * 2**30,
                sample_hash=hashlib.sha256(str(step).encode()).hexdigest()[:16],
            )  # fmt: skip
            if step % 10 == 0:
                text = f"step {step} of {schedule.total_steps}: loss {loss:.4f}, {tokens / step_s:,.0f} tokens/s"
                part.say("log", ts, rank=0, level="info", text=text)
            if step % 100 == 0:
                eval_loss = 0.71 + 1.8 * decay
                part.say("eval", ts, step=step, eval_loss=eval_loss, perplexity=math.exp(eval_loss), token_accuracy=0.8)
                path = f"checkpoints/step-{step:08d}"
                part.say("checkpoint", ts, step=step, path=path, bytes=3_400_000, best=True)

    def end(self, part: Part, outcome: str, **told: Any) -> None:
        self.send(part)
        body = {"fence": part.fence, "outcome": outcome, "final_seq": part.seq} | told
        self._post(f"/attempts/{part.job}/{part.number}/finish", body)

    def succeed(self, part: Part, steps: int, ts: float) -> None:
        part.say("end", ts, outcome="succeeded", steps=steps, trained_tokens=steps * 3000, seconds=steps * 0.42)
        self.send(part)
        files = {
            "adapter_model.safetensors": b"weights" * 50_000,
            "adapter_config.json": b'{"r": 16}',
            "README.md": b"#",
        }
        artifacts = []
        for name, content in files.items():
            sha256 = hashlib.sha256(content).hexdigest()
            reply = self.worker.put(
                f"/attempts/{part.job}/{part.number}/artifacts/{sha256}?fence={part.fence}", content=content
            )
            assert reply.status_code == 204, reply.text
            artifacts.append({"name": name, "bytes": len(content), "sha256": sha256})
        self.end(part, "succeeded", artifacts=artifacts)

    def settle(self, job_id: str, **times: float) -> None:
        """Times of the past, which the server's clock can't have given."""
        with self.services.database.write() as session:
            job = session.get_one(Job, job_id)
            for name, value in times.items():
                setattr(job, name, value)

    def _post(self, path: str, body: Any = None) -> Any:
        reply = self.worker.post(path, json=body)
        assert reply.status_code == 200, f"{path}: {reply.status_code} {reply.text}"
        return reply.json()

    def num_jobs(self) -> int:
        with self.services.database.read() as session:
            return session.exec(select(func.count()).select_from(Job)).one()


def make_profile(source: random.Random, multi_turn: Any, num_samples: int = 638) -> DataProfile:
    lengths = [min(1000, int(source.lognormvariate(5.2, 0.7)) + 12) for _ in range(num_samples)]
    pieces = (
        "<|user|>", "\n", "How", " many", " minutes", " are", " 3", " hours", "?", "<|end|>", "\n", "<|assistant|>", "\n",
        "3", " hours", " are", " 180", " minutes", ".", "<|end|>", "\n",
    )  # fmt: skip
    trained = tuple(index in range(13, 20) for index in range(21))
    sample = TokenPreview(
        line=1,
        pieces=pieces,
        trained=trained,
        ids=tuple(range(200, 221)),
        special=tuple(piece.startswith("<|") for piece in pieces),
        num_trained=7,
        num_turns=1,
    )
    silent = sample.model_copy(update={"line": 5, "trained": (False,) * 21, "num_trained": 0, "num_turns": 0})
    longer = sample.model_copy(update={"line": 9, "num_hidden": 80})
    alike = AlikeRows(
        rows=(
            AlikeRow(line=7, similarity=1, is_equal=True),
            AlikeRow(line=90, similarity=0.93, is_equal=False),
            AlikeRow(line=102, similarity=1, is_equal=True),
        ),
        num_rows=3,
    )
    return DataProfile(
        num_rows=num_samples + 2,
        format="messages",
        multi_turn=multi_turn,
        multi_turn_reason="the template leaves the history as it was",
        num_refused=2,
        refused=(),
        sample_row=list(range(num_samples)),
        sample_length=lengths,
        sample_trained=[max(1, int(length * 0.38)) for length in lengths],
        sample_turns=[1] * num_samples,
        sample_hash=[hashlib.sha256(str(row).encode()).hexdigest()[:16] for row in range(num_samples)],
        duplicates=Duplicates(num_equal=1, num_alike=1, num_groups=1, groups=(alike,)),
        preview=(sample, silent, longer),
    )


@dataclass
class Scenes:
    """The jobs that stand on the stage."""

    succeeded: str
    failed: str
    running: str
    starting: str
    waiting: str
    paused: str
    part: Part  # of the running one
    schedule: Schedule
    began_at: float
    next_step: int  # of the running one


def play(stage: Stage) -> Scenes:
    """A working day: three jobs with hundreds of steps, one that starts, one that waits, one that was paused."""
    now = time.time()
    stage.open_host()
    stage.upload("demo-dialogues")
    stage.upload("support-tickets", 900, with_faults=False)

    succeeded = stage.launch(
        "support tone, rank 16", tags=["prod", "support"], notes="The baseline that the next runs have to beat."
    )
    part = stage.take(succeeded)
    schedule = stage.play_plan(part, 600, now - 7200)
    stage.play_steps(part, schedule, 1, 600, now - 7190)
    stage.succeed(part, 600, now - 6900)
    stage.settle(succeeded, created_at=now - 7300, started_at=now - 7195, ended_at=now - 6900)

    failed = stage.launch("long context, full", method={"type": "full"}, tags=["ablation"])
    part = stage.take(failed)
    schedule = stage.play_plan(part, 600, now - 3600)
    stage.play_steps(part, schedule, 1, 237, now - 3590)
    text = "CUDA is out of memory in step 238: 46.9 GiB were in use and 2.1 GiB more were asked for"
    part.say("log", now - 3400, rank=0, level="warning", text="memory is nearly full: 46.2 of 47.5 GiB")
    part.say("log", now - 3399, rank=0, level="error", text=f"torch.OutOfMemoryError: {text}")
    part.say("failure", now - 3399, reason="oom", text=text, remedy="set data.max_length to at most 1024")
    told = {"text": text, "remedy": "set data.max_length to at most 1024, or compute.gradient_checkpointing to true"}
    stage.end(part, "failed", reason="oom", exit_code=71, **told)
    stage.settle(failed, created_at=now - 3700, started_at=now - 3595, ended_at=now - 3399)

    paused = stage.launch("arithmetic, 3 epochs", schedule={"learning_rate": 3e-4, "epochs": 3})
    part = stage.take(paused)
    schedule = stage.play_plan(part, 600, now - 1800)
    stage.play_steps(part, schedule, 1, 120, now - 1790)
    stage.send(part)
    assert stage.api.post(f"/jobs/{paused}/stop").status_code == 200
    assert stage.heartbeat(part)["desired"] == "stop"
    stage.end(part, "stopped", exit_code=75)

    running = stage.launch("support tone, rank 64", method={"rank": 64, "alpha": 64}, tags=["support"])
    part = stage.take(running)
    schedule = stage.play_plan(part, 600, now - 200)
    stage.play_steps(part, schedule, 1, 353, now - 150)
    stage.send(part)

    starting = stage.launch("padded for comparison", packing={"mode": "padded"}, batch={"micro_batch_size": 8})
    other = stage.take(starting)
    other.say("phase", now, name="tokenise", done=412, total=640)
    other.say("log", now, rank=0, level="info", text="tokenising demo-dialogues with demo/tiny-llama")
    stage.send(other)

    for name in ("seed 1", "seed 2"):
        stage.take(stage.launch(name))
    waiting = stage.launch("seed 3", tags=["a-rather-long-tag-for-a-narrow-screen"])
    wait_until(lambda: _wait_code(stage, waiting), "the dispatcher has said why it waits")
    return Scenes(succeeded, failed, running, starting, waiting, paused, part, schedule, now - 150, 354)


def _wait_code(stage: Stage, job_id: str) -> str | None:
    with stage.services.database.read() as session:
        return session.get_one(Job, job_id).wait_code


@contextmanager
def raised(data_dir: Path, port: int) -> Iterator[Stage]:
    server = Server(data_dir, port)
    server.begin()
    stage = Stage(server)
    try:
        yield stage
    finally:
        stage.close()
        stage.server.end()
