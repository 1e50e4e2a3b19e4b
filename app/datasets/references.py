"""Data sets as a spec names them: NAME, its newest version, or NAME@VERSION."""

import difflib
from collections.abc import Iterator

from sqlmodel import Session

from app.datasets.store import VERSION_DIGITS, Found, find, newest_of_each, versions_of
from app.problems import Problem
from app.tables import DatasetVersion
from core.errors import UserError
from core.hub import parse_hub_dataset
from core.spec import DATASET_REFERENCE, JobSpec, ValidationDataset


def data_of(session: Session, spec: JobSpec) -> list[tuple[str, DatasetVersion]]:
    """Each data set of a stored spec, as the spec names it, once."""
    names = dict.fromkeys(reference for _, reference in references(spec))
    return [(name, find_version(session, name).version) for name in names]


def references(spec: JobSpec) -> Iterator[tuple[str, str]]:
    """(field, NAME or NAME@VERSION)"""
    for index, part in enumerate(spec.data.train):
        yield f"data.train.{index}.dataset", part.dataset
    if isinstance(spec.data.validation, ValidationDataset):
        yield "data.validation.dataset", spec.data.validation.dataset


def find_version(session: Session, reference: str, field: str = "") -> Found:
    """`NAME` is its newest version. Raises UserError, which lists what there is, or says how a hub's data set comes
    here: the server fetches nothing, and a host reads what it is given by content."""
    if parse_hub_dataset(reference, field) is not None:
        raise UserError("hub.not_here", field, name=reference)
    try:
        return find(session, reference)
    except Problem:
        match = DATASET_REFERENCE.fullmatch(reference)
        name, version = (match["name"], match["version"]) if match else (reference, None)
    known = {found.dataset.name: found.dataset for found in newest_of_each(session)}
    if version is not None and name in known:
        there = ", ".join(each.sha256[:VERSION_DIGITS] for each in versions_of(session, known[name])[:10])
        raise UserError("job.unknown_version", field, name=name, version=version, known=there)
    if not known:
        raise UserError("job.no_dataset_at_all", field, name=name)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    listed = ", ".join((close + [each for each in known if each not in close])[:10])
    raise UserError("job.unknown_dataset", field, name=name, known=listed)
