"""The other side of core.wire, small: an in-memory ledger that enforces fences, watermarks and hashes, over real HTTP,
and a recorder that reads the real Redis stream."""

import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import redis
import uvicorn
from fastapi import APIRouter, FastAPI, HTTPException, Request, Response

from core import wire
from core.trial import AnyTrial

TOKEN = "a-worker-token"
T = TypeVar("T")


def wait_until(condition: Callable[[], T], *, timeout_s: float = 30.0) -> T:
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.02)
    return value


@dataclass
class LedgerAttempt:
    ref: wire.AttemptRef
    spec: dict[str, Any]
    data: tuple[wire.DataFile, ...] = ()
    adapter: tuple[wire.AdapterFile, ...] = ()
    resume_from: tuple[str, ...] = ()
    trial: AnyTrial | None = None
    current_fence: int = 0  # raised above the attempt's own by whoever takes the job away from it
    claims: int = 0
    desired: str = "run"
    checkpoint_request: int = 0
    events: list[wire.WireEvent] = field(default_factory=list)
    num_by_http: int = 0
    num_by_redis: int = 0
    heartbeats: list[wire.Heartbeat] = field(default_factory=list)
    uploads: dict[str, bytes] = field(default_factory=dict)
    finish: wire.Finish | None = None
    num_finishes: int = 0
    profiles: list[wire.MeasuredProfile] = field(default_factory=list)

    @property
    def acked_seq(self) -> int:
        return len(self.events)

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [event.data for event in self.events if event.kind == kind]

    def steps(self) -> list[int]:
        return [data["step"] for data in self.of_kind("step")]


class Ledger:
    def __init__(self, redis_url: str | None = None) -> None:
        self.redis_url = redis_url
        self.attempts: dict[tuple[str, int], LedgerAttempt] = {}
        self.blobs: dict[str, bytes] = {}
        self.served_ranges: list[str | None] = []
        self.reports: list[wire.HostReport] = []
        self.beats: list[wire.HostBeat] = []
        self.orders = wire.HostOrders(redis_url=redis_url)
        self.knows_host = True
        self.profile_orders: dict[str, wire.ProfileOrder] = {}
        self.profile_results: dict[str, wire.ProfileResult] = {}
        self.profile_progress: list[wire.ProfileProgress] = []
        self.on_progress: Callable[[wire.ProfileProgress], None] = lambda message: None  # may raise the answer
        self.requests: list[str] = []
        self.cut_blob_after: int | None = None  # bytes after which a download breaks off, once
        self._lock = threading.Lock()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._app = FastAPI()
        self._app.include_router(self._routes())
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self._recorder_stop = threading.Event()
        self._recorder: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    # -- up and down -----------------------------------------------------------------------------------------------
    def start(self) -> None:
        assert self._server is None
        self._server = uvicorn.Server(
            uvicorn.Config(self._app, host="127.0.0.1", port=self.port, log_level="critical", ws="none", lifespan="off")
        )
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        wait_until(lambda: self._server is not None and self._server.started)
        self.start_recorder()

    def stop(self) -> None:
        if self._server is not None:
            self._server.should_exit = True
            self._server.force_exit = True
            assert self._thread is not None
            self._thread.join()
            self._server = None
        self.stop_recorder()

    def start_recorder(self) -> None:
        if self.redis_url:
            self._recorder_stop.clear()
            self._recorder = threading.Thread(target=self._record, args=(self.redis_url,), daemon=True)
            self._recorder.start()

    def stop_recorder(self) -> None:
        if self._recorder is not None:
            self._recorder_stop.set()
            self._recorder.join()
            self._recorder = None

    # -- jobs ------------------------------------------------------------------------------------------------------
    def dispatch(self, job: str, spec: dict[str, Any], attempt: int = 1, fence: int = 1, **more: Any) -> LedgerAttempt:
        ref = wire.AttemptRef(job=job, attempt=attempt, fence=fence)
        entry = LedgerAttempt(ref=ref, spec=spec, current_fence=fence, **more)
        self.attempts[job, attempt] = entry
        return entry

    def put_blob(self, content: bytes, dataset: str = "d") -> wire.DataFile:
        sha256 = hashlib.sha256(content).hexdigest()
        self.blobs[sha256] = content
        return wire.DataFile(dataset=dataset, sha256=sha256, bytes=len(content))

    def put_adapter_file(self, name: wire.AdapterFileName) -> wire.AdapterFile:
        file = self.put_blob(f"{name} of job_before".encode())
        return wire.AdapterFile(name=name, sha256=file.sha256, bytes=file.bytes)

    def store(self, entry: LedgerAttempt, events: tuple[wire.WireEvent, ...]) -> int:
        """The recorder's rule: skip what is known, apply what follows without a gap. Returns how many were new."""
        with self._lock:
            before = entry.acked_seq
            for event in events:
                if event.seq == entry.acked_seq + 1:
                    entry.events.append(event)
            return entry.acked_seq - before

    def _record(self, url: str) -> None:
        client = redis.Redis.from_url(url)
        last = "0"
        while not self._recorder_stop.is_set():
            try:
                reply = client.xread({wire.EVENT_STREAM: last}, count=100, block=50)
            except redis.RedisError:
                time.sleep(0.05)
                continue
            for _, entries in reply or ():
                for last, fields in entries:  # noqa: B007  the last id read is where the next read begins
                    key = (fields[b"job"].decode(), int(fields[b"attempt"]))
                    events = tuple(wire.WireEvent.model_validate(each) for each in json.loads(fields[b"batch"]))
                    if key in self.attempts:
                        self.attempts[key].num_by_redis += self.store(self.attempts[key], events)
        client.close()

    # -- routes ----------------------------------------------------------------------------------------------------
    def _attempt(self, job: str, n: int, fence: int | None = None) -> LedgerAttempt:
        entry = self.attempts.get((job, n))
        if entry is None:
            raise HTTPException(404, "no such attempt")
        if fence is not None and fence != entry.current_fence:
            raise HTTPException(409, "stale fence")
        return entry

    def _routes(self) -> APIRouter:
        router = APIRouter(prefix=wire.WORKER_PREFIX)

        def allow(request: Request) -> None:
            self.requests.append(f"{request.method} {request.url.path}")
            if request.headers.get("authorization") != f"Bearer {TOKEN}":
                raise HTTPException(401, "who are you?")

        @router.post("/hosts/register")
        def register(request: Request, report: wire.HostReport) -> wire.Welcome:
            allow(request)
            self.reports.append(report)
            self.knows_host = True
            return wire.Welcome(host=report.host, redis_url=self.redis_url)

        @router.post("/hosts/{host}/beat")
        def beat(request: Request, host: str, message: wire.HostBeat) -> wire.HostOrders:
            allow(request)
            if not self.knows_host:
                raise HTTPException(404, "no such host")
            self.beats.append(message)
            return self.orders

        @router.post("/attempts/{job}/{n}/claim")
        def claim(request: Request, job: str, n: int, message: wire.Claim) -> wire.Assignment:
            allow(request)
            entry = self._attempt(job, n, message.fence)
            entry.claims += 1
            return wire.Assignment(
                spec=entry.spec,
                data=entry.data,
                devices=("cpu0",),
                adapter=entry.adapter,
                resume_from=entry.resume_from,
                trial=entry.trial,
                redis_url=self.redis_url,
                acked_seq=entry.acked_seq,
            )

        @router.post("/attempts/{job}/{n}/heartbeat")
        def heartbeat(request: Request, job: str, n: int, message: wire.Heartbeat) -> dict[str, Any]:
            allow(request)
            entry = self._attempt(job, n, message.fence)
            entry.heartbeats.append(message)
            return {
                "lease_s": 60.0,
                "desired": entry.desired,
                "acked_seq": entry.acked_seq,
                "redis_url": self.redis_url,
                "checkpoint_request": entry.checkpoint_request,
            }

        @router.post("/attempts/{job}/{n}/events")
        def events(request: Request, job: str, n: int, message: wire.EventBatch) -> wire.Recorded:
            allow(request)
            entry = self._attempt(job, n)
            entry.num_by_http += self.store(entry, message.events)
            return wire.Recorded(acked_seq=entry.acked_seq)

        @router.post("/attempts/{job}/{n}/profile")
        def profile(request: Request, job: str, n: int, message: wire.MeasuredProfile) -> dict[str, str]:
            allow(request)
            self._attempt(job, n).profiles.append(message)
            return {}

        @router.put("/attempts/{job}/{n}/artifacts/{sha256}", status_code=204)
        async def artifact(request: Request, job: str, n: int, sha256: str, fence: int) -> None:
            allow(request)
            entry = self._attempt(job, n, fence)
            content = await request.body()
            if hashlib.sha256(content).hexdigest() != sha256:
                raise HTTPException(422, "the hash is another")
            entry.uploads[sha256] = content

        @router.post("/attempts/{job}/{n}/finish")
        def finish(request: Request, job: str, n: int, message: wire.Finish) -> wire.Finished:
            allow(request)
            entry = self._attempt(job, n, message.fence)
            if entry.acked_seq < message.final_seq:
                raise HTTPException(425, "events are missing")
            assert all(artifact.sha256 in entry.uploads for artifact in message.artifacts)
            entry.num_finishes += 1
            if entry.finish is None:
                entry.finish = message
            return wire.Finished(state=str(entry.finish.outcome))

        @router.get("/blobs/{sha256}")
        def blob(request: Request, sha256: str) -> Response:
            allow(request)
            if sha256 not in self.blobs:
                raise HTTPException(404, "no such file")
            content, wanted = self.blobs[sha256], request.headers.get("range")
            self.served_ranges.append(wanted)
            offset = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
            rest = content[offset:]
            if self.cut_blob_after is not None:
                cut, self.cut_blob_after = self.cut_blob_after, None

                def broken() -> Any:
                    yield rest[:cut]
                    raise ConnectionResetError

                from fastapi.responses import StreamingResponse

                return StreamingResponse(broken(), headers={"content-length": str(len(rest))})
            return Response(rest, status_code=206 if wanted else 200)

        @router.post("/profiles/{profile}/claim")
        def claim_profile(request: Request, profile: str) -> wire.ProfileOrder:
            allow(request)
            order = self.profile_orders.pop(profile, None)
            if order is None:
                raise HTTPException(409, "claimed already")
            return order

        @router.post("/profiles/{profile}/progress")
        def profile_progress(request: Request, profile: str, message: wire.ProfileProgress) -> dict[str, str]:
            allow(request)
            self.profile_progress.append(message)
            self.on_progress(message)
            return {}

        @router.post("/profiles/{profile}/result")
        def profile_result(request: Request, profile: str, message: wire.ProfileResult) -> dict[str, str]:
            allow(request)
            self.profile_results[profile] = message
            return {}

        return router
