"""Data sets: what was uploaded, what of it was refused and why, and how the model sees it."""

import json
import zlib
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from sqlalchemy import String, cast
from sqlmodel import Session, col, select

from app.datasets import store
from app.pages.job_row import read_rows
from app.services import AnyServices
from app.tables import Dataset, DatasetVersion, Job, Profile
from core.profile import DataProfile, TokenPreview

router = APIRouter(include_in_schema=False)

MOST_JOBS = 50
MOST_ROWS = 4
MOST_SAMPLES = 3
MOST_TOKENS = 1500  # of one sample


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
def dataset_page(request: Request, services: AnyServices, name: str, version: str = "") -> Response:
    with services.database.read() as session:
        found = store.find(session, f"{name}@{version}" if version else name)
        profile = _profile(session, found.version)
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
            "is_parquet": is_parquet,
            "num_refused": facts["num_refused"],
            "refused": facts["refused"],
            "jobs": read_rows(session, _jobs_that_used(session, found.dataset), services.clock()),
        }
    return services.templates.TemplateResponse(request, "dataset.html", context)


def _jobs_that_used(session: Session, dataset: Dataset) -> Sequence[Job]:
    """The newest; a stored spec names its data as NAME@VERSION."""
    mentions = cast(Job.spec, String).contains(f'"{dataset.name}@', autoescape=True)
    jobs = session.exec(select(Job).where(mentions).order_by(col(Job.created_at).desc()).limit(MOST_JOBS))
    return [job for job in jobs if dataset.name in store.names_in(job.spec)]


def _profile(session: Session, version: DatasetVersion) -> dict[str, Any] | None:
    """The newest measured one, whatever its model."""
    row = session.exec(
        select(Profile)
        .where(Profile.data_sha256 == version.sha256, Profile.state == "ready")
        .order_by(col(Profile.ready_at).desc())
    ).first()
    if row is None or row.result is None:
        return None
    profile = DataProfile.model_validate_json(zlib.decompress(row.result))
    num_tokens = sum(profile.sample_length)
    return {
        "model": row.model,
        "num_samples": len(profile.sample_length),
        "num_tokens": num_tokens,
        "trained_share": sum(profile.sample_trained) / num_tokens if num_tokens else None,
        "num_refused": profile.num_refused,
        "refused": profile.refused,
        "longest": max(profile.sample_length, default=0),
        "preview": [{"line": sample.line, "runs": list(runs(sample))} for sample in profile.preview[:MOST_SAMPLES]],
    }


def runs(sample: TokenPreview) -> Iterator[tuple[bool, str]]:
    """Neighbours that are all trained, or all not, as one text."""
    pairs = list(zip(sample.trained, sample.pieces, strict=True))[:MOST_TOKENS]
    for is_trained, group in groupby(pairs, key=lambda pair: pair[0]):
        yield is_trained, "".join(piece for _, piece in group)
