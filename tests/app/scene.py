"""What jobs need around them: a data set, a host that speaks /worker/v1, and the events that a trainer would emit."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
from fastapi.testclient import TestClient
from sqlmodel import col, select

from app.auth import create_token
from app.dispatcher import dispatch_once
from app.services import Services
from app.tables import Event, Job
from core.profile import ModelProfile
from core.wire import (
    AttemptRef,
    Device,
    EventBatch,
    Finish,
    HostBeat,
    HostReport,
    WireEvent,
)
from tests.app.conftest import House

MODEL = ModelProfile(
    name="demo/tiny-llama",
    content_hash="0" * 64,
    architecture="LlamaForCausalLM",
    num_parameters=1_000_000,
    context_length=4096,
    vocabulary=4096,
    dtype="float32",
    has_chat_template=True,
    bytes=4_000_000,
)
VERSIONS = {"torch": "2.13.0", "bitsandbytes": "0.50.2", "deepspeed": "0.19.8"}
ROW = b'{"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]}\n'
SPEC: dict[str, Any] = {"data": {"train": [{"dataset": "sums"}]}}


@dataclass
class Sent:
    """A launcher that keeps what it was told to send."""

    launches: list[tuple[str, AttemptRef]] = field(default_factory=list)

    def send_launch(self, host: str, job: str, attempt: int, fence: int) -> None:
        self.launches.append((host, AttemptRef(job=job, attempt=attempt, fence=fence)))

    def send_prepare(self, host: str, profile: str) -> None:
        return None


@dataclass
class FakeHost:
    """The server's view of a host: a token, a report, and calls over HTTP."""

    id: str
    client: TestClient
    services: Services

    def post(self, path: str, message: Any) -> httpx.Response:
        return self.client.post(f"/worker/v1{path}", json=message.model_dump(mode="json"))

    def register(self, num_slots: int = 2) -> httpx.Response:
        devices = tuple(Device(id=f"cpu{i}", kind="cpu", name="CPU slot", memory_bytes=2**30) for i in range(num_slots))
        report = HostReport(
            host=self.id,
            name=f"name of {self.id}",
            devices=devices,
            models=(MODEL,),
            versions=VERSIONS,
            num_cpus=2,
            memory_bytes=2**33,
        )
        return self.post("/hosts/register", report)

    def beat(self, *attempts: AttemptRef) -> httpx.Response:
        return self.post(f"/hosts/{self.id}/beat", HostBeat(attempts=attempts))

    def claim(self, launch: AttemptRef, fence: int | None = None) -> httpx.Response:
        body = {"host": self.id, "fence": launch.fence if fence is None else fence}
        return self.client.post(f"/worker/v1{path_of(launch)}/claim", json=body)

    def heartbeat(self, launch: AttemptRef) -> httpx.Response:
        return self.client.post(f"/worker/v1{path_of(launch)}/heartbeat", json={"fence": launch.fence, "last_seq": 0})

    def send(self, launch: AttemptRef, events: Iterable[WireEvent]) -> httpx.Response:
        return self.post(f"{path_of(launch)}/events", EventBatch(fence=launch.fence, events=tuple(events)))

    def finish(self, launch: AttemptRef, outcome: str, **more: Any) -> httpx.Response:
        message = Finish.model_validate({"fence": launch.fence, "outcome": outcome, "final_seq": 0} | more)
        return self.post(f"{path_of(launch)}/finish", message)

    def launched(self) -> AttemptRef:
        """Dispatches the one job that waits."""
        (launch,) = dispatch_once(self.services)
        return launch

    def running(self) -> AttemptRef:
        """Dispatches the one job that waits, claims it and makes its first step."""
        launch = self.launched()
        assert self.claim(launch).status_code == 200
        assert self.send(launch, [step(1, 1)]).status_code == 200
        return launch


def path_of(launch: AttemptRef) -> str:
    return f"/attempts/{launch.job}/{launch.attempt}"


def connect_host(house: House, id: str = "host_a", num_slots: int = 2) -> FakeHost:
    token = create_token(house.services.database, id, "worker")
    host = FakeHost(id, house.client(Authorization=f"Bearer {token}"), house.services)
    assert host.register(num_slots).status_code == 200
    return host


def put_data(house: House, name: str = "sums", content: bytes = ROW * 20) -> None:
    assert house.api("bob").put(f"/api/v1/datasets/{name}", content=content).status_code in (200, 201)


def submit(house: House, **spec: Any) -> str:
    """A job of bob's in the queue."""
    response = house.api("bob").post("/api/v1/jobs", json={"spec": SPEC | spec})
    assert response.status_code == 201, response.text
    return str(response.json()["id"])


def job_of(services: Services, job_id: str) -> Job:
    with services.database.read() as session:
        return session.get_one(Job, job_id)


def events_of(services: Services, job_id: str, attempt: int | None = None) -> list[Event]:
    statement = select(Event).where(Event.job == job_id).order_by(col(Event.id))
    if attempt is not None:
        statement = statement.where(Event.attempt == attempt)
    with services.database.read() as session:
        return list(session.exec(statement).all())


def states_of(services: Services, job_id: str) -> list[str]:
    """The states that the job went through."""
    return [event.data["state"] for event in events_of(services, job_id, 0) if event.kind == "state"]


def with_launcher(services: Services) -> tuple[Services, Sent]:
    sent = Sent()
    return replace(services, launcher=sent), sent


def wire(seq: int, kind: str, **data: Any) -> WireEvent:
    return WireEvent(seq=seq, ts=1_700_000_000.0 + seq, kind=kind, data=data)


def step(seq: int, step: int, **more: Any) -> WireEvent:
    data = {
        "step": step,
        "epoch": step / 10,
        "loss": 3.0 / step,
        "learning_rate": 1e-4,
        "grad_norm": 1.0,
        "trained_tokens": 100,
        "tokens": 200,
        "slots": 250,
        "rows": 4,
        "padding_efficiency": 0.8,
        "padded_efficiency": 0.4,
        "tokens_per_s": 1000.0,
        "step_s": 0.2,
        "wait_s": 0.0,
        "sample_hash": "abc",
    }
    return wire(seq, "step", **(data | more))


def log(seq: int, text: str, rank: int = 0) -> WireEvent:
    return wire(seq, "log", rank=rank, level="info", text=text)


def checkpoint(seq: int, step: int, best: bool = False) -> WireEvent:
    return wire(seq, "checkpoint", step=step, path=f"checkpoints/step-{step}", bytes=1000, best=best)


def wait_until(is_true: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)
