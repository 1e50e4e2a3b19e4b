"""The Celery app of a worker: it carries launches and profiles to a host, as ids, and is believed in nothing.

    python -m worker.celery_app DATA_DIR launch|prepare       with PEGBOX_REDIS_URL in the environment

A message is acknowledged before it runs and never repeated by Celery: with late acknowledgement on Redis a task that
outlives the visibility time-out is started several times over (measured: four starts of one task). The database is the
queue, it sends again what nobody claimed, and a claim is granted once. Prefetch is off for the same reason: what lies
reserved in a busy worker is as good as lost when that dies. Nothing is stored as a result, nothing is controlled from
afar, and only JSON is read, so that whoever can write to Redis can at most cause a claim that the server refuses.
"""

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Literal

from celery import Celery
from celery.platforms import SecurityWarning

from core import wire
from worker import tasks
from worker.settings import WorkerSettings

log = logging.getLogger("worker.celery_app")  # not __main__, which it is when run as a consumer

Consumer = Literal["launch", "prepare"]


def make_app(redis_url: str) -> Celery:
    app = Celery("pegbox", broker=redis_url, set_as_current=False)
    app.conf.update(
        accept_content=["json"],
        task_serializer="json",
        task_ignore_result=True,
        result_backend=None,
        task_acks_late=False,
        worker_disable_prefetch=True,
        worker_prefetch_multiplier=1,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "global_keyprefix": wire.CELERY_KEY_PREFIX,
            # A connection that a firewall dropped is noticed, not waited on.
            "socket_timeout": 30,
            "socket_keepalive": True,
            "health_check_interval": 25,
        },
    )
    return app


def consume(settings: WorkerSettings, consumer: Consumer, redis_url: str) -> None:
    """Runs until TERM. One task at a time, in this process: a launch is short, and profiles queue by themselves."""
    app = make_app(redis_url)

    @app.task(name=wire.LAUNCH_TASK)  # type: ignore[untyped-decorator]  # celery has no types
    def launch(job: str, attempt: int, fence: int) -> None:
        ref = wire.AttemptRef(job=job, attempt=attempt, fence=fence)
        log.info("launch %s attempt %d: %s", job, attempt, tasks.launch(settings, ref))

    @app.task(name=wire.PREPARE_TASK)  # type: ignore[untyped-decorator]
    def prepare(profile: str) -> None:
        tasks.prepare(settings, profile)

    # Celery warns root of pickled messages; this app reads JSON only, and in a container root is the rule.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    host = settings.host_id()
    queue = wire.launch_queue(host) if consumer == "launch" else wire.prepare_queue(host)
    app.worker_main(
        [
            *("--quiet", "worker", "--queues", queue, "--hostname", f"{consumer}@{host}"),
            *(
                "--pool",
                "solo",
                "--concurrency",
                "1",
                "--without-gossip",
                "--without-mingle",
                "--without-heartbeat",
                "--loglevel",
                "WARNING",
            ),
        ]
    )


def main(argv: list[str]) -> None:
    data_dir, name = argv
    logging.getLogger("worker").setLevel(logging.INFO)  # Celery sets the root's to its own, and has much to say
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s worker.{name}: %(message)s")
    consumer: Consumer = "launch" if name == "launch" else "prepare"
    consume(WorkerSettings.load(Path(data_dir)), consumer, os.environ["PEGBOX_REDIS_URL"])


if __name__ == "__main__":
    main(sys.argv[1:])
