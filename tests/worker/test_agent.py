"""A real host agent as a process, with real Celery consumers where there is a Redis."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from celery import Celery

from core import wire
from core.errors import UserError
from core.states import Outcome
from tests.worker.conftest import Host
from tests.worker.ledger import Ledger, wait_until
from worker import agent
from worker.adoption import live_attempts, unfinished_attempts
from worker.processes import mark_of, marked

RUN = """
import logging, sys
from pathlib import Path
from worker import agent
logging.basicConfig(level=logging.INFO)
from worker.settings import WorkerSettings
agent.run(WorkerSettings.load(Path(sys.argv[1])))
"""
HERE = Path(__file__).parent


class AgentProcess:
    def __init__(self, host: Host) -> None:
        self.host = host
        self.log = host.settings.data_dir / "agent.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", RUN, str(host.settings.data_dir)],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def consumers(self) -> list[psutil.Process]:
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # ended meanwhile, or a zombie
                if "worker.celery_app" in child.cmdline():
                    found.append(child)
        return found

    def wait_for_consumers(self) -> list[psutil.Process]:
        return wait_until(lambda: self.consumers() if len(self.consumers()) == 2 else [])

    def wait_for_beats(self, num_beats: int = 1) -> None:
        seen = len(self.host.ledger.beats)
        wait_until(lambda: len(self.host.ledger.beats) >= seen + num_beats)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout=30)


@pytest.fixture
def start_agent() -> Iterator[Callable[[Host], AgentProcess]]:
    agents: list[AgentProcess] = []

    def start(host: Host) -> AgentProcess:
        agents.append(AgentProcess(host))
        return agents[-1]

    yield start
    for each in agents:
        each.stop(signal.SIGKILL)


def make_worker(make_host: Callable[..., Host], ledger: Ledger) -> Host:
    return make_host(
        ledger,
        cpu_slots=2,
        inventory_argv=(sys.executable, str(HERE / "script_inventory.py")),
        prepare_argv=(sys.executable, str(HERE / "script_prepare.py")),
    )


@pytest.fixture
def worker(make_host: Callable[..., Host], ledger: Ledger) -> Host:
    return make_worker(make_host, ledger)


@pytest.fixture
def redis_worker(make_host: Callable[..., Host], redis_ledger: Ledger) -> Host:
    return make_worker(make_host, redis_ledger)


def test_a_host_says_what_it_has_and_how_it_fares(worker: Host, start_agent: Callable[[Host], AgentProcess]) -> None:
    process = start_agent(worker)
    wait_until(lambda: worker.ledger.beats)
    (report,) = worker.ledger.reports
    assert report.host == worker.settings.host_id()
    assert [device.id for device in report.devices] == ["cpu0", "cpu1"]
    assert report.refused_devices == {"gpu0": "the driver is too old for torch"}
    beat = worker.ledger.beats[-1]
    assert beat.memory_used_bytes
    assert beat.disk_free_bytes
    assert process.consumers() == [], "there is no Redis, so there is no Celery"
    worker.ledger.knows_host = False
    wait_until(lambda: len(worker.ledger.reports) == 2)
    assert worker.ledger.reports[1].host == report.host
    assert process.stop() == 0
    assert "gpu0 is not offered: the driver is too old for torch" in process.log.read_text()


def test_without_redis_launches_and_profiles_come_with_the_beat(
    worker: Host, start_agent: Callable[[Host], AgentProcess]
) -> None:
    entry = worker.dispatch("steps=20")
    worker.ledger.profile_orders["p1"] = wire.ProfileOrder(
        id="p1",
        model="demo/tiny-llama",
        chat_template=None,
        data=worker.ledger.put_blob(b"good"),
        format="text",
        train_on="all",
        multi_turn="auto",
    )
    worker.ledger.orders = wire.HostOrders(redis_url=None, launches=(entry.ref,), profiles=("p1",))
    start_agent(worker)
    worker.wait_for_finish(entry)
    assert entry.finish is not None
    assert entry.finish.outcome == Outcome.SUCCEEDED
    assert entry.claims == 1
    assert wait_until(lambda: worker.ledger.profile_results)["p1"].profile is not None


def test_a_message_by_celery_launches_an_attempt_once(
    redis_worker: Host, start_agent: Callable[[Host], AgentProcess]
) -> None:
    entry = redis_worker.dispatch("steps=100 pause=0.02")
    process = start_agent(redis_worker)
    sender = Celery(broker=redis_worker.ledger.redis_url, set_as_current=False)
    sender.conf.broker_transport_options = {"global_keyprefix": wire.CELERY_KEY_PREFIX}
    queue = wire.launch_queue(redis_worker.settings.host_id())
    with sender.connection_for_write() as connection:
        for _ in range(3):
            sender.send_task(
                wire.LAUNCH_TASK, (entry.ref.job, 1, 1), queue=queue, connection=connection, ignore_result=True
            )
        sender.send_task(wire.LAUNCH_TASK, ("../evil", 1, 1), queue=queue, connection=connection, ignore_result=True)
    redis_worker.wait_for_finish(entry)
    assert entry.finish is not None
    assert entry.finish.outcome == Outcome.SUCCEEDED
    wait_until(lambda: process.log.read_text().count("refused: it has a supervisor") == 2)
    wait_until(lambda: "is not a job id" in process.log.read_text())
    assert entry.claims == 1
    assert len(process.consumers()) == 2, "what was wrong with one message stops nobody"


def test_a_message_that_redis_lost_is_made_up_for_by_the_beat(
    redis_worker: Host, start_agent: Callable[[Host], AgentProcess]
) -> None:
    entry = redis_worker.dispatch("steps=5")
    redis_worker.ledger.orders = wire.HostOrders(redis_url=redis_worker.ledger.redis_url, launches=(entry.ref,))
    start_agent(redis_worker)
    redis_worker.wait_for_finish(entry)
    assert entry.claims == 1


def test_a_consumer_that_dies_is_started_again(redis_worker: Host, start_agent: Callable[[Host], AgentProcess]) -> None:
    process = start_agent(redis_worker)
    before = process.wait_for_consumers()
    before[0].kill()
    wait_until(lambda: len(process.consumers()) == 2 and before[0] not in process.consumers())
    assert before[1] in process.consumers()


def test_a_killed_agent_disturbs_no_training_and_its_successor_finds_it(
    redis_worker: Host, start_agent: Callable[[Host], AgentProcess]
) -> None:
    entry, directory = redis_worker.start("steps=100000")
    trainer = int(wait_until(lambda: (directory / "pid-0").exists() and (directory / "pid-0").read_text()))
    supervisor = redis_worker.supervisor_pid()
    for _ in range(2):
        process = start_agent(redis_worker)
        consumers = process.wait_for_consumers()
        process.wait_for_beats(2)
        assert redis_worker.ledger.beats[-1].attempts == (entry.ref,)
        process.stop(signal.SIGKILL)
        wait_until(lambda consumers=consumers: not any(consumer.is_running() for consumer in consumers))
    assert redis_worker.supervisor_pid() == supervisor
    assert psutil.pid_exists(trainer)
    entry.desired = "stop"
    redis_worker.wait_for_finish(entry)
    assert entry.finish is not None
    assert entry.finish.outcome == Outcome.STOPPED
    assert entry.steps() == list(range(1, entry.of_kind("checkpoint")[0]["step"] + 1))


def test_term_to_the_agent_ends_its_children_and_leaves_the_training(
    redis_worker: Host, start_agent: Callable[[Host], AgentProcess]
) -> None:
    entry, _ = redis_worker.start("steps=100000")
    process = start_agent(redis_worker)
    consumers = process.wait_for_consumers()
    wait_until(entry.steps)
    assert process.stop() == 0
    assert not any(consumer.is_running() for consumer in consumers)
    (found,) = live_attempts(redis_worker.settings)
    assert found.attempt == entry.ref
    seen = len(entry.steps())
    wait_until(lambda: len(entry.steps()) > seen + 5)
    entry.desired = "stop"
    redis_worker.wait_for_finish(entry)


def test_a_supervisor_that_dies_while_the_agent_runs_is_reported(
    worker: Host, start_agent: Callable[[Host], AgentProcess]
) -> None:
    entry, _ = worker.start("steps=100000 at=2 then=grandchild")
    wait_until(entry.steps)
    start_agent(worker).wait_for_beats()
    os.kill(worker.supervisor_pid(), signal.SIGKILL)
    wait_until(lambda: entry.finish is not None)
    assert entry.finish is not None
    assert entry.finish.outcome == Outcome.LOST
    assert entry.finish.reason == "lost"
    wait_until(lambda: not unfinished_attempts(worker.settings))
    assert marked(mark_of(entry.ref)) == []


def test_an_attempt_that_never_began_here_is_reported(
    worker: Host, start_agent: Callable[[Host], AgentProcess]
) -> None:
    gone = worker.ledger.dispatch("gone", worker.spec())
    worker.ledger.orders = wire.HostOrders(redis_url=None, attempts=(gone.ref,))
    start_agent(worker)
    wait_until(lambda: gone.finish is not None)
    assert gone.finish is not None
    assert gone.finish.outcome == Outcome.LOST


def test_an_end_that_the_server_forgot_is_told_again(worker: Host, start_agent: Callable[[Host], AgentProcess]) -> None:
    entry, _ = worker.start("steps=5")
    worker.wait_for_finish(entry)
    # A restored backup: the attempt is alive there, and its events are gone.
    restored = worker.ledger.dispatch(worker.job, entry.spec)
    assert restored.finish is None
    worker.ledger.orders = wire.HostOrders(redis_url=None, attempts=(entry.ref,))
    start_agent(worker)
    wait_until(lambda: restored.finish is not None)
    assert restored.finish == entry.finish
    assert restored.steps() == entry.steps()


def test_a_data_directory_has_one_agent(worker: Host, start_agent: Callable[[Host], AgentProcess]) -> None:
    start_agent(worker).wait_for_beats()
    with pytest.raises(UserError, match="already runs"):
        agent.run(worker.settings)


def test_a_host_whose_inventory_fails_says_why(make_host: Callable[..., Host], ledger: Ledger) -> None:
    host = make_host(ledger, inventory_argv=(sys.executable, "-c", "print('no json')"))
    with pytest.raises(UserError, match="could not be listed"):
        agent.run(host.settings)
    assert not ledger.reports
