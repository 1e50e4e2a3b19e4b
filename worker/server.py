"""The sure road: the routes of /worker/v1 as methods, and what their answers mean to a worker.

Three answers matter. `Stale`: this attempt is no longer ours (409, or 404 from the service itself), stop working for
it. `TooEarly`: the recorder lacks events, send them. `Away`: everything else, from a refused connection to a proxy's
502 or a token that was revoked: nothing is wrong with the training, so wait and try again. Every message is idempotent,
therefore repeating it is always right.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self, TypeVar
from urllib.parse import urlsplit

import httpx
from pydantic import BaseModel

from core import wire
from worker.settings import ServerAddress, WorkerSettings

_Answer = TypeVar("_Answer", bound=BaseModel)
_T = TypeVar("_T")
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


class ServerError(Exception):
    pass


class Away(ServerError):
    """No useful answer; try again later."""


class Stale(ServerError):
    """The attempt, the profile or the host is not (or no longer) what the caller believes."""


class Unknown(Stale):
    """The service says that there is no such thing."""


class TooEarly(ServerError):
    """`finish` came before the recorder had stored every event."""


class Server:
    """Safe to share between threads."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._address = ServerAddress(settings)
        self._settings = settings
        self._client: httpx.Client | None = None
        self._client_url = ""
        self._lock = threading.Lock()
        logging.getLogger("httpx").setLevel(logging.WARNING)  # else one line a heartbeat

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- hosts -----------------------------------------------------------------------------------------------------
    def register(self, report: wire.HostReport) -> wire.Welcome:
        return self._post("/hosts/register", report, wire.Welcome)

    def beat(self, host: str, beat: wire.HostBeat) -> wire.HostOrders:
        return self._post(f"/hosts/{host}/beat", beat, wire.HostOrders)

    # -- attempts --------------------------------------------------------------------------------------------------
    def claim(self, attempt: wire.AttemptRef, host: str) -> wire.Assignment:
        claim = wire.Claim(host=host, fence=attempt.fence)
        return self._post(f"{_path(attempt)}/claim", claim, wire.Assignment)

    def heartbeat(self, attempt: wire.AttemptRef, heartbeat: wire.Heartbeat) -> wire.AttemptOrders:
        return self._post(f"{_path(attempt)}/heartbeat", heartbeat, wire.AttemptOrders)

    def send_events(self, attempt: wire.AttemptRef, events: tuple[wire.WireEvent, ...]) -> int:
        """Returns acked_seq. An empty batch only asks for it."""
        batch = wire.EventBatch(fence=attempt.fence, events=events)
        return self._post(f"{_path(attempt)}/events", batch, wire.Recorded).acked_seq

    def send_profile(self, attempt: wire.AttemptRef, profile: wire.MeasuredProfile) -> None:
        self._request("POST", f"{_path(attempt)}/profile", json_body=profile)

    def upload(self, attempt: wire.AttemptRef, sha256: str, path: Path) -> None:
        with path.open("rb") as file:
            self._request(
                "PUT",
                f"{_path(attempt)}/artifacts/{sha256}",
                params={"fence": str(attempt.fence)},
                content=iter(lambda: file.read(1 << 20), b""),
                headers={"Content-Length": str(path.stat().st_size)},
                timeout_s=self._settings.upload_timeout_s,
            )

    def finish(self, attempt: wire.AttemptRef, finish: wire.Finish) -> wire.Finished:
        return self._post(f"{_path(attempt)}/finish", finish, wire.Finished)

    # -- data ------------------------------------------------------------------------------------------------------
    @contextmanager
    def open_blob(self, sha256: str, offset: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        """The file's bytes, and the offset at which they begin: 0 where the server does not know ranges."""
        client, headers = self._open()
        if offset:
            headers["Range"] = f"bytes={offset}-"
        with _as_away(), client.stream("GET", f"/blobs/{sha256}", headers=headers) as response:
            if response.is_error:
                response.read()
            _raise_for(response)
            yield (offset if response.status_code == httpx.codes.PARTIAL_CONTENT else 0), response.iter_bytes()

    # -- profiles --------------------------------------------------------------------------------------------------
    def claim_profile(self, profile: str) -> wire.ProfileOrder:
        return self._post(f"/profiles/{profile}/claim", None, wire.ProfileOrder)

    def send_profile_progress(self, profile: str, progress: wire.ProfileProgress) -> None:
        self._request("POST", f"/profiles/{profile}/progress", json_body=progress)

    def send_profile_result(self, profile: str, result: wire.ProfileResult) -> None:
        self._request("POST", f"/profiles/{profile}/result", json_body=result)

    # -- the wire --------------------------------------------------------------------------------------------------
    def _post(self, path: str, message: BaseModel | None, answer: type[_Answer]) -> _Answer:
        content = self._request("POST", path, json_body=message)
        try:
            return answer.model_validate_json(content)
        except ValueError as error:  # a proxy's friendly page with status 200
            raise Away(f"POST {path}: the answer is not a {answer.__name__}") from error

    def _request(
        self,
        method: str,
        path: str,
        *,
        json_body: BaseModel | None = None,
        content: Iterator[bytes] | None = None,
        params: dict[str, str] | None = None,
        headers: dict[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> bytes:
        client, authorization = self._open()
        body = content
        if json_body is not None:
            body = json_body.model_dump_json().encode()  # type: ignore[assignment]  # httpx takes either
            authorization["Content-Type"] = "application/json"
        with _as_away():
            response = client.request(
                method,
                path,
                content=body,
                params=params,
                headers={**authorization, **(headers or {})},
                timeout=timeout_s or self._settings.http_timeout_s,
            )
        _raise_for(response)
        return response.content

    def _open(self) -> tuple[httpx.Client, dict[str, str]]:
        url, token = self._address.url_and_token()
        with self._lock:
            if self._client is None or url != self._client_url:
                # The old client is left to its requests under way. A proxy has no business on the loopback.
                self._client = httpx.Client(
                    base_url=url.rstrip("/") + wire.WORKER_PREFIX,
                    timeout=self._settings.http_timeout_s,
                    trust_env=urlsplit(url).hostname not in _LOOPBACK,
                )
                self._client_url = url
            return self._client, {"Authorization": f"Bearer {token}"}

    def close(self) -> None:
        with self._lock:
            if self._client is not None:
                self._client.close()
                self._client = None


def _path(attempt: wire.AttemptRef) -> str:
    return f"/attempts/{attempt.job}/{attempt.attempt}"


@contextmanager
def _as_away() -> Iterator[None]:
    try:
        yield
    except httpx.HTTPError as error:
        raise Away(f"{type(error).__name__}: {error}") from error


def _raise_for(response: httpx.Response) -> None:
    if response.is_success:
        return
    text = f"{response.request.method} {response.request.url.path}: {response.status_code} {response.text[:500]}"
    # A 404 of a proxy in front of a service that is down must not end a training; the service itself answers in JSON.
    is_ours = response.headers.get("content-type", "").partition(";")[0].endswith("json")
    match response.status_code:
        case 409 if is_ours:
            raise Stale(text)
        case 404 if is_ours:
            raise Unknown(text)
        case 425:
            raise TooEarly(text)
        case _:
            raise Away(text)


class Interrupted(Exception):
    """What was being waited for is no longer wanted."""


def insist(
    call: Callable[[], _T],
    *,
    is_unwanted: Callable[[], bool],
    longest_back_off_s: float,
    note: Callable[[str], None] = lambda text: None,
) -> _T:
    """Calls until the server is there, with growing pauses; `note` hears of the first failure of a series."""
    pause_s = min(0.2, longest_back_off_s)
    has_failed = False
    while True:
        if is_unwanted():
            raise Interrupted
        try:
            return call()
        except Away as error:
            if not has_failed:
                note(str(error))
            has_failed = True
        deadline = time.monotonic() + pause_s
        while time.monotonic() < deadline and not is_unwanted():
            time.sleep(0.05)
        pause_s = min(pause_s * 2, longest_back_off_s)
