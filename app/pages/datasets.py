"""Data sets: what was uploaded, what of it was refused and why, and how the model sees it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from sqlalchemy import String, cast
from sqlmodel import Session, col, select

from app.datasets import store
from app.models import known_models
from app.pages.job_row import read_rows
from app.pages.packing_drawing import CutTable, draw_cuts
from app.pages.token_drawing import PackedRow, packed_row, shown_samples
from app.profiles import read_result, read_sampled
from app.services import AnyServices
from app.tables import Dataset, DatasetVersion, Job, Profile
from core.lengths import compare_cuts
from core.presets import refuse_above_context
from core.profile import DataProfile

router = APIRouter(include_in_schema=False)

MOST_JOBS = 50
MOST_ROWS = 4
MOST_GROUPS = 10  # of rows that are alike


@router.get("/datasets")
def datasets_page(request: Request, services: AnyServices) -> Response:
    with services.database.read() as session:
        datasets = [
            {
                "name": found.dataset.name,
                "owner": found.owner,
                "newest": found.version,
                "num_versions": len(store.versions_of(session, found.dataset)),
            }
            for found in store.newest_of_each(session)
        ]
    context = {"datasets": datasets, "api_url": f"{services.settings.url}{services.settings.root_path}"}
    return services.templates.TemplateResponse(request, "datasets.html", context)


@router.get("/datasets/{name}")
def dataset_page(
    request: Request,
    services: AnyServices,
    name: str,
    *,
    version: str = "",
    max_length: Annotated[int | None, Query(ge=1)] = None,  # tokens
    stage: str = "",
) -> Response:
    """`stage` is what a page that waits for a host already shows; it gets how far the host is, or what is new."""
    with services.database.read() as session:
        found = store.find(session, f"{name}@{version}" if version else name)
        measured = _measured(session, found.version)
        profile = _view(measured) if measured and measured.facts else None
        # The rows of Parquet are read by a host, so which of them are refused is known once it has measured them.
        is_parquet = found.version.kind.startswith("parquet")
        facts = profile if is_parquet and profile else found.version.model_dump()
        context = {
            "dataset": found.dataset,
            "version": found.version,
            "versions": store.versions_of(session, found.dataset),
            "rows": [
                (shown["line"], json.dumps(shown["row"], ensure_ascii=False, indent=2))
                for shown in found.version.preview[:MOST_ROWS]
            ],
            "profile": profile,
            "cuts": (cuts := _cuts(measured, max_length) if measured and measured.facts else None),
            "packed": _packed(measured, cuts) if measured and measured.facts and cuts else None,
            "waiting": measured if measured and not measured.is_exact else None,
            "asked_version": version,
            "asked_length": max_length,
            "is_parquet": is_parquet,
            "num_refused": facts["num_refused"],
            "refused": facts["refused"],
            "jobs": read_rows(session, _jobs_that_used(session, found.dataset), services.clock()),
        }
    if "hx-request" in request.headers:
        waiting = context["waiting"]
        is_new = waiting is None or waiting.stage != stage
        part = "dataset_news.html" if is_new else "dataset_progress.html"
        return services.templates.TemplateResponse(request, part, context)
    return services.templates.TemplateResponse(request, "dataset.html", context)


def _jobs_that_used(session: Session, dataset: Dataset) -> Sequence[Job]:
    """The newest; a stored spec names its data as NAME@VERSION."""
    mentions = cast(Job.spec, String).contains(f'"{dataset.name}@', autoescape=True)
    jobs = session.exec(select(Job).where(mentions).order_by(col(Job.created_at).desc()).limit(MOST_JOBS))
    return [job for job in jobs if dataset.name in store.names_in(job.spec)]


@dataclass(frozen=True)
class Measured:
    """The newest profile of a data set, whatever its model: exact; or of a sample of the rows, or nothing yet, while a
    host is at it."""

    model: str
    context_length: int | None  # tokens; None where no host has these files of the model any more
    facts: DataProfile | None  # of as many rows as the file has
    sampled: DataProfile | None = None  # of those rows alone
    num_rows: int = 0
    progress: float | None = None  # the share of the work that is done
    is_exact: bool = True

    @property
    def stage(self) -> str:
        """What a page shows of it."""
        if self.is_exact:
            return "exact"
        return "waiting" if self.sampled is None else "sampled"


def _measured(session: Session, version: DatasetVersion) -> Measured | None:
    rows = session.exec(
        select(Profile)
        .where(Profile.data_sha256 == version.sha256, col(Profile.state).in_(["ready", "running", "wanted"]))
        .order_by(col(Profile.state) != "ready", col(Profile.ready_at).desc(), col(Profile.wanted_at).desc())
    )
    row = rows.first()
    if row is None:
        return None
    model = next((m.profile for m in known_models(session) if m.profile.content_hash == row.model_hash), None)
    context_length = None if model is None else model.context_length
    if row.state == "ready":
        return Measured(row.model, context_length, read_result(row))
    sampled = read_sampled(session, row)
    return Measured(
        row.model,
        context_length,
        None if sampled is None else sampled.stretched,
        sampled=None if sampled is None else sampled.facts,
        num_rows=version.num_rows,
        progress=row.progress,
        is_exact=False,
    )


def _view(measured: Measured) -> dict[str, Any]:
    facts = measured.facts
    assert facts is not None
    num_tokens = sum(facts.sample_length)
    return {
        "model": measured.model,
        "is_exact": measured.is_exact,
        "context_length": measured.context_length,
        "num_samples": len(facts.sample_length),
        "num_tokens": num_tokens,
        "trained_share": sum(facts.sample_trained) / num_tokens if num_tokens else None,
        "num_refused": facts.num_refused,
        "refused": facts.refused,
        "longest": max(facts.sample_length, default=0),
        "preview": shown_samples(facts.preview),
        "duplicates": facts.duplicates,
        "groups": facts.duplicates.groups[:MOST_GROUPS] if facts.duplicates else (),
    }


def _cuts(measured: Measured, asked: int | None) -> CutTable | None:
    """Raises UserError plan.above_context, as a job with that limit would."""
    assert measured.facts is not None
    if asked is not None and measured.context_length is not None:
        refuse_above_context(asked, measured.context_length)
    also = () if asked is None else (asked,)
    return draw_cuts(compare_cuts(measured.facts, measured.context_length, also), asked)


def _packed(measured: Measured, cuts: CutTable) -> PackedRow | None:
    """Rows as long as the limit that the page shows."""
    assert measured.facts is not None
    row_length: int = cuts.stops[cuts.chosen]["length"]
    return packed_row(measured.facts.preview, row_length)
