"""The two things that a worker is asked for by a message; the host agent calls the same functions over HTTP alone.

`launch` starts a supervisor and is done when that has claimed the attempt: a few hundred milliseconds, 5 s at most. So
it does not matter how often or how late Celery delivers it. `prepare` measures a data set with a model's tokenizer, in
a child that may crash, hang or eat memory without harm to anyone.
"""

import fcntl
import logging
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from core import wire
from core.errors import UserError
from worker.inputs import Downloads, find_model
from worker.job_directory import PREPARE_PROGRESS, PREPARE_SAMPLED, PrepareOrder, write_json
from worker.output import LineReader
from worker.processes import child_environment, dying_with_this_process, secrets_in, sweep
from worker.server import Away, Interrupted, Server, Stale, Unknown, insist
from worker.settings import WorkerSettings

log = logging.getLogger(__name__)

_RESULT_PATIENCE_S = 600.0  # how long a result is offered to a server that is away; the server asks again after that
_TAIL_BYTES = 1 << 14
_LOOK_S = 0.2  # how often the child is looked at


def launch(settings: WorkerSettings, attempt: wire.AttemptRef) -> str:
    """Starts the attempt's supervisor and returns its answer: "claimed", or "refused: why"."""
    settings.attempt_dir(attempt)  # refuses a job id that is no plain word, before it becomes an argument
    read_end, write_end = os.pipe()
    try:
        process = subprocess.Popen(  # noqa: S603  an argv list, no shell
            [
                *(sys.executable, "-m", "worker.supervisor", str(settings.data_dir)),
                *(attempt.job, str(attempt.attempt), str(attempt.fence), "--handshake", str(write_end)),
            ],
            pass_fds=(write_end,),
            cwd=settings.data_dir,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
    finally:
        os.close(write_end)
    try:
        answer = _read_line(read_end, settings.handshake_s)
    finally:
        os.close(read_end)
    try:
        process.wait(timeout=settings.handshake_s)  # the process that forked the supervisor, and ended
    except subprocess.TimeoutExpired:
        return "refused: the supervisor does not start"
    return answer or "refused: the supervisor did not answer"


def _read_line(file: int, timeout_s: float) -> str:
    deadline = time.monotonic() + timeout_s
    data = b""
    while not data.endswith(b"\n"):
        ready, _, _ = select.select([file], [], [], max(0.0, deadline - time.monotonic()))
        chunk = os.read(file, 4096) if ready else b""
        if not chunk:
            break
        data += chunk
    return data.decode(errors="replace").strip()


def prepare(settings: WorkerSettings, profile: str) -> None:
    """Claims a wanted profile, measures it, and posts the result or the reason why there is none."""
    with _one_at_a_time(settings.worker_dir / "prepare.lock"), Server(settings) as server:
        try:
            order = server.claim_profile(profile)
        except Stale:
            return  # someone else has it, or nobody wants it any more
        try:
            result = _measure(settings, server, order)
        except Stale as error:
            log.warning("profile %s: given up, it is another's by now: %s", profile, error)
            return
        except UserError as fault:
            result = wire.ProfileResult(error=str(fault), field=fault.field)
        deadline = time.monotonic() + _RESULT_PATIENCE_S
        try:
            insist(
                lambda: server.send_profile_result(profile, result),
                is_unwanted=lambda: time.monotonic() > deadline,
                longest_back_off_s=settings.longest_back_off_s,
            )
        except (Stale, Interrupted) as error:
            log.warning("profile %s: the result was not taken: %s", profile, error)


def _measure(settings: WorkerSettings, server: Server, order: wire.ProfileOrder) -> wire.ProfileResult:
    deadline = time.monotonic() + settings.prepare_limit_s
    too_slow = UserError("worker.prepare_slow", minutes=round(settings.prepare_limit_s / 60, 1))
    model = find_model(settings.model_roots, order.model)
    try:
        data = Downloads(settings, server, lambda: time.monotonic() > deadline).data(order.data)
    except Interrupted:
        raise too_slow from None
    with tempfile.TemporaryDirectory(prefix="prepare-", dir=settings.worker_dir) as folder:
        order_path, result_path, log_path = (Path(folder) / name for name in ("order.json", "result.json", "log"))
        write_json(
            order_path,
            PrepareOrder(
                model_path=str(model),
                model_name=order.model,
                chat_template=order.chat_template,
                data=data,
                format=order.format,
                train_on=order.train_on,
                multi_turn=order.multi_turn,
                cache_dir=str(settings.cache_dir),
                num_rows=order.num_rows,
            ),
        )
        mark = f"profile.{order.id}"
        with log_path.open("wb") as log:
            child = subprocess.Popen(  # noqa: S603  an argv list, no shell
                dying_with_this_process([*settings.prepare_argv, str(order_path), str(result_path)]),
                cwd=folder,
                env=child_environment(os.environ, mark, CUDA_VISIBLE_DEVICES=""),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            code = _wait_and_tell(child, _Teller(server, order.id, Path(folder), settings.prepare_tell_s), deadline)
        except subprocess.TimeoutExpired:
            raise too_slow from None
        finally:
            sweep(mark, timeout_s=settings.sweep_s)
            child.wait()
        try:
            return wire.ProfileResult.model_validate_json(result_path.read_bytes())
        except (FileNotFoundError, ValidationError) as error:
            raise UserError("worker.prepare_died", exit_code=code, log=_last_line(log_path)) from error


def _wait_and_tell(child: "subprocess.Popen[bytes]", teller: "_Teller", deadline: float) -> int:
    """The child's exit code. Raises TimeoutExpired at the deadline, Stale when its work is wanted no more."""
    while True:
        left_s = deadline - time.monotonic()
        try:
            return child.wait(timeout=max(0.0, min(_LOOK_S, left_s)))
        except subprocess.TimeoutExpired:
            if left_s <= _LOOK_S:
                raise
        teller.tell()


class _Teller:
    """Passes on what the child leaves in its folder: how far it is, every few seconds, and the sample's profile at once
    and until that has arrived. A server that is away misses some of it, and nothing else."""

    def __init__(self, server: Server, profile: str, folder: Path, every_s: float) -> None:
        self._server = server
        self._profile = profile
        self._folder = folder
        self._every_s = every_s
        self._has_told_sample = False
        self._is_away = False
        self._tells_at = 0.0

    def tell(self) -> None:
        """Raises Stale where the profile is not this host's any more."""
        sampled = None if self._has_told_sample else self._read(PREPARE_SAMPLED)
        now = time.monotonic()
        if now < self._tells_at and (sampled is None or self._is_away):
            return
        self._tells_at = now + self._every_s
        self._is_away = False
        try:
            self._server.send_profile_progress(
                self._profile, sampled or self._read(PREPARE_PROGRESS) or wire.ProfileProgress(fraction=0.0)
            )
        except (Away, Unknown) as error:  # unknown: a server of before there was progress
            log.info("profile %s: its progress was not taken: %s", self._profile, error)
            self._is_away = True
            return
        self._has_told_sample = self._has_told_sample or sampled is not None

    def _read(self, name: str) -> wire.ProfileProgress | None:
        try:
            return wire.ProfileProgress.model_validate_json((self._folder / name).read_bytes())
        except FileNotFoundError:
            return None


def _last_line(log: Path) -> str:
    reader = LineReader(secrets_in(os.environ))
    lines = [*reader.feed(log.read_bytes()[-_TAIL_BYTES:]), *reader.finish()]
    return lines[-1] if lines else "(no output)"


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """The consumer and the agent may both be asked; two tokenisers at once would only slow each other down."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
