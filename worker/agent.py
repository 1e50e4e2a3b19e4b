"""The host agent: one per host and data directory, what `pegbox worker` runs.

It tells the server what this host has and how it fares, keeps the two Celery consumers running, and looks after the
attempts that lost their supervisor. No training depends on it. Its children (consumers, inventory, profiles) die with
it, by the kernel's hand; supervisors are nobody's children and go on, through its end, its upgrade and its return.

Celery is a short cut. The reply to each beat lists what is dispatched to this host and not yet claimed, and what
profiles are wanted; without Redis the agent does them at once, with it only those that two beats in a row have named,
which means that their message was lost. A claim is granted once, so doing both is harmless.
"""

import fcntl
import json
import logging
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType

import psutil
from pydantic import ValidationError

from core import wire
from core.errors import UserError
from worker import tasks
from worker.adoption import FoundAttempt, adopt, devices_in_use, live_attempts, report_unknown, unfinished_attempts
from worker.delivery import FINISHED
from worker.gpus import sample_gpus
from worker.processes import ProcessId, dying_with_this_process
from worker.server import Away, Interrupted, Server, Stale, Unknown, insist
from worker.settings import WorkerSettings

log = logging.getLogger(__name__)

_RESTART_AFTER_S = (1.0, 30.0)  # first and longest pause before a consumer that died is started again
_CHILD_GRACE_S = 5.0


class Agent:
    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        self.host = settings.host_id()
        self.server = Server(settings)
        self.stopping = threading.Event()
        self.consumers = [Consumer(settings, "launch"), Consumer(settings, "prepare")]
        self.redis_url: str | None = None
        self.adoptions, self.launches, self.profiles = Chores("adopt"), Chores("launch"), Chores("prepare")
        self.named_before: frozenset[Hashable] = frozenset()

    def run(self, report: wire.HostReport) -> None:
        try:
            self._register(report)
            while not self.stopping.is_set():
                self._adopt_what_died()
                try:
                    self._obey(self.server.beat(self.host, self._beat()))
                except Away as error:
                    log.warning("the server is away: %s", error)
                except Unknown:
                    self._register(report)
                    continue
                self._tend_consumers()
        except Interrupted:
            pass
        finally:
            for consumer in self.consumers:
                consumer.ask_to_stop()
            for consumer in self.consumers:
                consumer.stop()
            # So that nothing is sent to a host that takes nothing any more.
            with suppress(Away, Unknown):
                self.server.beat(self.host, self._beat().model_copy(update={"is_leaving": True}))

    def stop(self) -> None:
        self.stopping.set()

    def _register(self, report: wire.HostReport) -> None:
        welcome = insist(
            lambda: self.server.register(report),
            is_unwanted=self.stopping.is_set,
            longest_back_off_s=self.settings.longest_back_off_s,
            note=lambda text: log.warning("the server is away: %s", text),
        )
        log.info("registered as %s (%s) with %d device(s)", report.name, welcome.host, len(report.devices))
        self.redis_url = welcome.redis_url

    def _tend_consumers(self) -> None:
        """Until the next beat is due."""
        until = time.monotonic() + self.settings.host_beat_s
        while time.monotonic() < until and not self.stopping.is_set():
            for consumer in self.consumers:
                consumer.tend(self.redis_url)
            self.stopping.wait(min(0.5, self.settings.host_beat_s))

    # -- what the host says ----------------------------------------------------------------------------------------
    def _beat(self) -> wire.HostBeat:
        return wire.HostBeat(
            load=tuple(
                wire.DeviceLoad(
                    id=f"gpu{gpu.index}",
                    utilisation=gpu.utilisation,
                    memory_used_bytes=gpu.memory_used_bytes,
                    temperature_c=gpu.temperature_c,
                )
                for gpu in sample_gpus()
            ),
            cpu_utilisation=psutil.cpu_percent(None) / 100,
            memory_used_bytes=psutil.virtual_memory().used,
            disk_free_bytes=shutil.disk_usage(self.settings.data_dir).free,
            attempts=tuple(found.attempt for found in live_attempts(self.settings)),
        )

    # -- what the host is told -------------------------------------------------------------------------------------
    def _obey(self, orders: wire.HostOrders) -> None:
        self.redis_url = orders.redis_url
        named = frozenset[Hashable]((*orders.launches, *orders.profiles))
        overdue = named if orders.redis_url is None else named & self.named_before
        self.named_before = named
        for attempt in orders.launches:
            if attempt in overdue and not self.settings.attempt_dir(attempt).exists():
                self.launches.begin(attempt, partial(self._launch, attempt))
        for profile in orders.profiles:
            if profile in overdue:
                self.profiles.begin(profile, partial(tasks.prepare, self.settings, profile))
        for attempt in orders.attempts:
            if attempt not in orders.launches:
                self._account_for(attempt)

    def _launch(self, attempt: wire.AttemptRef) -> None:
        answer = tasks.launch(self.settings, attempt)
        log.info("launch %s attempt %d over HTTP: %s", attempt.job, attempt.attempt, answer)

    def _account_for(self, attempt: wire.AttemptRef) -> None:
        """A supervisor makes its directory before it claims: what is said to be here and has none is gone."""
        directory = self.settings.attempt_dir(attempt)
        if not (directory / "supervisor.json").exists():
            with suppress(Stale, Away):  # it will be named again, if it still matters
                report_unknown(self.server, attempt)
        elif (directory / FINISHED).exists():
            # Told once, and the server has forgotten (a restored backup): the next round tells it again.
            (directory / FINISHED).unlink()

    # -- what lost its supervisor ----------------------------------------------------------------------------------
    def _adopt_what_died(self) -> None:
        for found in unfinished_attempts(self.settings):
            if not found.is_supervised:
                self.adoptions.begin(found.attempt, partial(self._adopt, found))

    def _adopt(self, found: FoundAttempt) -> None:
        with suppress(Interrupted):
            state = adopt(self.settings, self.server, found, self.stopping.is_set)
            log.info("%s attempt %d had lost its supervisor; now %s", found.attempt.job, found.attempt.attempt, state)


class Chores(threading.Thread):
    """What must not hold up the beat, one after the other; a daemon, so that none holds up the agent's end either."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._queue: queue.SimpleQueue[tuple[Hashable, Callable[[], None]]] = queue.SimpleQueue()
        self._known: set[Hashable] = set()  # waiting or under way
        self.start()

    def begin(self, key: Hashable, chore: Callable[[], None]) -> None:
        if key not in self._known:
            self._known.add(key)
            self._queue.put((key, chore))

    def run(self) -> None:
        while True:
            key, chore = self._queue.get()
            try:
                chore()
            except Exception:  # the border of a task: said, and tried again when it is named again
                log.exception("%s failed", key)
            self._known.discard(key)


class Consumer:
    """A Celery consumer as a child process: runs while there is a Redis, begun again when it dies."""

    def __init__(self, settings: WorkerSettings, name: str) -> None:
        self._settings = settings
        self._name = name
        self._process: subprocess.Popen[bytes] | None = None
        self._url: str | None = None
        self._pause_s, self._longest_pause_s = _RESTART_AFTER_S
        self._start_at = 0.0

    def tend(self, redis_url: str | None) -> None:
        """Called by the main thread: the child dies with the thread that started it."""
        if redis_url != self._url:
            self.stop()
            self._url, self._start_at = redis_url, 0.0
        if self._process is not None and (code := self._process.poll()) is not None:
            log.warning("the %s consumer ended with %d; it is started again in %g s", self._name, code, self._pause_s)
            self._process = None
            self._start_at = time.monotonic() + self._pause_s
            self._pause_s = min(self._pause_s * 2, self._longest_pause_s)
        if self._process is None and self._url is not None and time.monotonic() >= self._start_at:
            # The address holds a password, so it goes by the environment and not by the command line.
            self._process = subprocess.Popen(  # noqa: S603  an argv list, no shell
                dying_with_this_process(
                    [sys.executable, "-m", "worker.celery_app", str(self._settings.data_dir), self._name]
                ),
                env={
                    **os.environ,
                    "PEGBOX_REDIS_URL": self._url,
                    "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
                },
                stdin=subprocess.DEVNULL,
            )

    def ask_to_stop(self) -> None:
        if self._process is not None:
            self._process.terminate()

    def stop(self) -> None:
        if self._process is None:
            return
        self.ask_to_stop()
        try:
            self._process.wait(_CHILD_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None


# -- starting ------------------------------------------------------------------------------------------------------
def take_inventory(settings: WorkerSettings) -> wire.HostReport:
    """GPUs, models and versions, by a child: only the engine may import torch, and a broken driver ends the child."""
    argv = [*settings.inventory_argv, "--gpus", settings.gpus]
    argv += ["--hash-cache", str(settings.worker_dir / "model-hashes.json")]
    for root in settings.model_roots:
        argv += ["--model-root", str(root)]
    if settings.cpu_slots is not None:
        argv += ["--cpu-slots", str(settings.cpu_slots)]
    try:
        done = subprocess.run(  # noqa: S603  an argv list, no shell
            dying_with_this_process(argv),
            env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            timeout=settings.inventory_limit_s,
            check=True,
        )
        found = json.loads(done.stdout)
        report = wire.HostReport(host=settings.host_id(), name=socket.gethostname(), **found)
    except (subprocess.SubprocessError, ValidationError, ValueError) as error:
        raise UserError("worker.inventory", problem=str(error)) from error
    for name, problem in {**report.refused_devices, **found.get("refused_models", {})}.items():
        log.warning("%s is not offered: %s", name, problem)
    # What an attempt of ours holds through a restart of the agent looks like a stranger's from outside.
    ours = devices_in_use(settings)
    devices = tuple(
        device.model_copy(update={"in_use_by_stranger": False}) if device.id in ours else device
        for device in report.devices
    )
    return report.model_copy(update={"devices": devices})


def run(settings: WorkerSettings) -> None:
    """Until TERM or Ctrl-C. Raises UserError where this host cannot be a worker."""
    settings.worker_dir.mkdir(parents=True, exist_ok=True)
    with _only_agent_of(settings.worker_dir):
        report = take_inventory(settings)
        settings = settings.model_copy(update={"num_devices": len(report.devices)})
        settings.save()
        agent = Agent(settings)

        def stop(_number: int, _frame: FrameType | None) -> None:
            agent.stop()

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            agent.run(report)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def _only_agent_of(folder: Path) -> Iterator[None]:
    """Two agents of one directory would number the same journal."""
    with (folder / "agent.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError("worker.agent_runs", folder=str(folder.parent)) from None
        yield


def preempt_all(data_dir: Path, timeout_s: float | None = None) -> bool:
    """This host goes down in good order: every running attempt writes a checkpoint and goes back to the queue.

    Stop the agent first, so that nothing new starts, and the server last, so that it hears of it. False: after
    `timeout_s` some had to be told to leave without; the next start of a worker tells the server then."""
    try:
        settings = WorkerSettings.load(data_dir)
    except FileNotFoundError:
        return True  # no worker ever ran here
    if timeout_s is None:
        timeout_s = settings.stop_grace_s + 10.0
    asked = [found.process for found in live_attempts(settings) if found.process.send(signal.SIGTERM)]
    if _wait_for_end(asked, timeout_s):
        return True
    asked = [process for process in asked if process.send(signal.SIGTERM)]
    _wait_for_end(asked, _CHILD_GRACE_S)
    return False


def _wait_for_end(processes: list[ProcessId], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while any(process.is_alive() for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
