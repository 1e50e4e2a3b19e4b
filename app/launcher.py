"""Launches and profile orders as Celery messages: ids only, so whoever reads or forges them learns and gains nothing.

The message is sent after the commit that it tells of. When Redis is away the sender waits at most a second, says so in
the log and goes on: the host finds the same work in the reply to its next beat."""

import logging

from celery import Celery
from kombu.exceptions import OperationalError

from core.wire import CELERY_KEY_PREFIX, LAUNCH_TASK, PREPARE_TASK, launch_queue, prepare_queue

log = logging.getLogger(__name__)

PATIENCE_S = 1.0  # a request may wait on it


class CeleryLauncher:
    def __init__(self, redis_url: str) -> None:
        self._celery = Celery("pegbox", broker=redis_url, set_as_current=False)
        self._celery.conf.update(
            task_serializer="json",
            accept_content=["json"],
            task_ignore_result=True,
            broker_connection_timeout=PATIENCE_S,
            broker_transport_options={
                "global_keyprefix": CELERY_KEY_PREFIX,
                "socket_connect_timeout": PATIENCE_S,
                "socket_timeout": PATIENCE_S,
                "max_retries": 0,
            },
        )

    def send_launch(self, host: str, job: str, attempt: int, fence: int) -> None:
        self._send(LAUNCH_TASK, (job, attempt, fence), launch_queue(host))

    def send_prepare(self, host: str, profile: str) -> None:
        self._send(PREPARE_TASK, (profile,), prepare_queue(host))

    def _send(self, task: str, arguments: tuple[str | int, ...], queue: str) -> None:
        try:
            self._celery.send_task(task, args=arguments, queue=queue, retry=False, ignore_result=True)
        except (OperationalError, OSError) as error:
            log.warning("Redis does not take %s for %s (%s); the host will ask by HTTP", task, queue, error)
