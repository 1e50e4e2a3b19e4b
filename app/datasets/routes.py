"""/api/v1/datasets"""

from typing import Annotated, Any, Literal

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel

from app.auth import AnyCaller
from app.datasets import store
from app.datasets.examine import Examined, examine, read_page
from app.problems import Problem
from app.services import AnyServices
from app.times import Time
from core.errors import UserError

router = APIRouter(prefix="/api/v1/datasets", tags=["datasets"])

MAX_BYTES = 50 * 10**9
# Parsing is Python's work, one core at a time; more at once would only slow every request down.
_examining = CapacityLimiter(2)


class DatasetView(BaseModel):
    id: str
    name: str
    version: str  # the first digits of its sha256: NAME@VERSION in a spec
    sha256: str
    bytes: int
    kind: str
    format: str
    num_rows: int
    num_refused: int
    owner: str | None
    created_at: Time


class DatasetWithVersions(DatasetView):
    preview: list[dict[str, Any]]
    versions: list[str]


class DatasetList(BaseModel):
    data: list[DatasetView]
    next_cursor: None = None
    has_more: Literal[False] = False


class Refusal(BaseModel):
    line: int
    field: str
    code: str
    text: str


class Report(BaseModel):
    name: str
    version: str
    num_rows: int
    num_refused: int
    refused: list[Refusal]  # the first 1,000


class Rows(BaseModel):
    data: list[dict[str, Any]]
    next_cursor: str | None
    has_more: bool


def _view(found: store.Found) -> dict[str, Any]:
    version = found.version
    return {
        "id": found.dataset.id,
        "name": found.dataset.name,
        "version": version.sha256[: store.VERSION_DIGITS],
        "sha256": version.sha256,
        "bytes": version.bytes,
        "kind": version.kind,
        "format": version.format,
        "num_rows": version.num_rows,
        "num_refused": version.num_refused,
        "owner": found.owner,
        "created_at": version.created_at,
    }


@router.put("/{name}", status_code=201, responses={200: {"model": DatasetView}})
async def put_dataset(
    name: str, request: Request, response: Response, services: AnyServices, caller: AnyCaller
) -> DatasetView:
    """The file itself is the body. 201 with a new version, 200 where these bytes are one already."""
    store.check_name(name)
    if request.headers.get("content-type", "").startswith("multipart/"):
        raise Problem(415, UserError("dataset.form"))
    async with services.blobs.incoming(request.stream(), max_bytes=MAX_BYTES) as blob:
        found = await to_thread.run_sync(store.existing_version, services, name, blob.stored.sha256)
        if found is not None:
            response.status_code = 200
        else:

            def read() -> Examined:
                return examine(blob.read)

            examined = await to_thread.run_sync(read, limiter=_examining)
            found = await to_thread.run_sync(store.add_version, services, name, blob, examined, caller.user_id)
    return DatasetView(**_view(found))


@router.get("")
def list_datasets(services: AnyServices) -> DatasetList:
    with services.database.read() as session:
        return DatasetList(data=[DatasetView(**_view(found)) for found in store.newest_of_each(session)])


@router.get("/{name}")
def get_dataset(name: str, services: AnyServices) -> DatasetWithVersions:
    """`name` may be NAME or NAME@VERSION."""
    with services.database.read() as session:
        found = store.find(session, name)
        versions = [version.sha256[: store.VERSION_DIGITS] for version in store.versions_of(session, found.dataset)]
    return DatasetWithVersions(**_view(found), preview=found.version.preview, versions=versions)


@router.get("/{name}/report")
def get_report(name: str, services: AnyServices) -> Report:
    with services.database.read() as session:
        found = store.find(session, name)
    return Report(**_view(found), refused=[Refusal(**refusal) for refusal in found.version.refused])


@router.get("/{name}/rows")
def get_rows(
    name: str,
    services: AnyServices,
    offset: Annotated[int, Query(ge=0)] = 0,
    limit: Annotated[int, Query(ge=1, le=200)] = 20,
) -> Rows:
    """Rows as they stand in the file, long texts cut."""
    with services.database.read() as session:
        version = store.find(session, name).version
    rows = read_page(lambda: services.blobs.read(version.sha256), offset, limit)
    end = offset + len(rows)
    has_more = end < version.num_rows
    return Rows(data=rows, next_cursor=str(end) if has_more else None, has_more=has_more)


@router.delete("/{name}", status_code=204)
def delete_dataset(name: str, services: AnyServices) -> None:
    store.delete_dataset(services, name)
