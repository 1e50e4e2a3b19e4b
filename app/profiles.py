"""Data profiles: wanted here, measured by a host, kept by what they depend on.

The web service never tokenises. Whoever needs a data set's facts with a model (the form, a preflight, a submit) asks
`want_profiles`; what isn't known yet becomes a row in state `wanted`, an order to a host that has the model, and a
line in the reply to that host's beats until it claims it.

    wanted -> running (claimed by a host) -> ready | failed
    running, and its host silent for longer than PATIENCE_S -> may be claimed again: it died, or its child hangs
    failed for longer than FAILED_KEPT_S -> wanted again by whoever asks next

A profile's key is a hash of the data's and the model's content and of what the masks depend on, so nothing is ever
measured twice, and nothing old is taken for new. A trainer measures the same on its way; what it posts is kept under
the same key.

Of a large file the host first tells what a sample of its rows shows. That serves people who wait and nobody else: no
program gets it for an answer, and no job is refused by it."""

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from sqlmodel import Session, col, select

from app.datasets.references import data_of, find_version, references
from app.ids import new_id
from app.models import KnownModel, known_models, resolve_model
from app.problems import Problem, not_found
from app.prospects import look_out
from app.services import Services
from app.tables import Blob, DatasetVersion, Host, Job, Profile
from core.errors import USER_FAULTS, UserError, UserErrors
from core.preflight import JobPlan, plan_job
from core.profile import DataProfile
from core.sampled import stretch
from core.spec import JobSpec, parse_spec
from core.unbuilt import refuse_unbuilt
from core.wire import HOST_FRESH_S, DataFile, Device, HostReport, ProfileOrder

RESEND_S = 30.0  # an order unclaimed for so long goes to any host that has the model
PATIENCE_S = 600.0
FAILED_KEPT_S = 60.0
# Of what is measured; a higher one measures everything anew. 2: the runs of trained tokens. 3: duplicates.
# 4: tool calls that the template leaves out
FACTS_VERSION = 4


def topic_of_profile(profile: str) -> str:
    """What waits for its result."""
    return f"profile:{profile}"


@dataclass(frozen=True)
class Wanted:
    """A spec's facts as far as they are known: a profile for each data set that it names, and its model."""

    profiles: Mapping[str, Profile]
    model: KnownModel

    @property
    def is_ready(self) -> bool:
        return all(profile.state == "ready" for profile in self.profiles.values())

    @property
    def data(self) -> dict[str, DataProfile]:
        return {name: read_result(profile) for name, profile in self.profiles.items()}

    @property
    def progress(self) -> dict[str, float]:
        """The share of the work that is done, of each that a host is at."""
        return {name: row.progress for name, row in self.profiles.items() if row.progress is not None}

    def refuse_failed(self) -> None:
        """Raises UserErrors with what the host said of each data set that can't be measured."""
        failed = [(name, profile) for name, profile in self.profiles.items() if profile.state == "failed"]
        if failed:
            raise UserErrors(
                [
                    UserError("profile.failed", "data.train", dataset=name, error=row.error or "?")
                    for name, row in failed
                ]
            )


# -- asking --------------------------------------------------------------------------------------------------------
def want_profiles(services: Services, spec: JobSpec) -> Wanted:
    """Finds or orders a profile for each data set of the spec. Raises UserErrors on a model or data set that isn't
    there."""
    now = services.clock()
    with services.database.read() as session:
        wanted = _find(session, spec)
    if all(_is_settled(profile, now) for profile in wanted.profiles.values()):
        return wanted
    ordered: list[Profile] = []
    with services.database.write() as session:
        wanted = _find(session, spec)
        for profile in wanted.profiles.values():
            if not _is_settled(profile, now):
                host = _choose_host(session, wanted.model, now)
                profile.state, profile.error, profile.progress, profile.sampled = "wanted", None, None, None
                profile.host, profile.wanted_at, profile.sent_at = host, now, now if host else None
                session.add(profile)
                ordered.append(profile)
    for profile in ordered:
        if profile.host is not None:
            services.launcher.send_prepare(profile.host, profile.id)
    return wanted


def _find(session: Session, spec: JobSpec) -> Wanted:
    """The rows that there are, and new ones (state "", not added) for what was never asked."""
    model = resolve_model(session, spec.model.base)
    faults: list[UserError] = []
    profiles: dict[str, Profile] = {}
    for field, reference in references(spec):
        try:
            version = find_version(session, reference, field).version
        except UserError as fault:
            faults.append(fault)
        else:
            profiles[reference] = _find_one(session, spec, reference, version, model.profile.content_hash)
    if faults:
        raise UserErrors(faults)
    return Wanted(profiles, model)


def _find_one(session: Session, spec: JobSpec, reference: str, version: DatasetVersion, model_hash: str) -> Profile:
    template, policy = spec.model.chat_template, spec.data
    facts = (FACTS_VERSION, version.sha256, model_hash, template, policy.format, policy.train_on, policy.multi_turn)
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    found = session.exec(select(Profile).where(Profile.key == key)).first()
    return found or Profile(
        id=new_id("prof"),
        key=key,
        data_sha256=version.sha256,
        dataset=reference,
        model=spec.model.base,
        model_hash=model_hash,
        chat_template=template,
        format=policy.format,
        train_on=policy.train_on,
        multi_turn=policy.multi_turn,
        state="",
        wanted_at=0.0,
    )


def _is_settled(profile: Profile, now: float) -> bool:
    """Whether nobody needs to be asked for it (again)."""
    match profile.state:
        case "ready":
            return True
        case "failed":
            return now - (profile.ready_at or 0.0) < FAILED_KEPT_S
        case "running":
            return now - (profile.sent_at or 0.0) < PATIENCE_S
        case "wanted":
            return profile.host is None or now - (profile.sent_at or 0.0) < RESEND_S
    return False


def _choose_host(session: Session, model: KnownModel, now: float) -> str | None:
    """The host heard of last, if lately; none: whoever beats first and has the model takes it."""
    host = session.get_one(Host, model.hosts[0])
    return host.id if now - host.beat_at < HOST_FRESH_S else None


# -- the host's side -----------------------------------------------------------------------------------------------
def wanted_profiles(session: Session, host_id: str) -> tuple[str, ...]:
    """What this host, which is beating right now, may claim."""
    host = session.get_one(Host, host_id)
    models = {model.content_hash for model in HostReport.model_validate(host.report).models}
    rows = session.exec(
        select(Profile).where(col(Profile.state).in_(["wanted", "running"])).order_by(col(Profile.wanted_at))
    )
    return tuple(row.id for row in rows if row.model_hash in models and _may_claim(row, host_id, host.beat_at))


def _may_claim(profile: Profile, host_id: str, now: float) -> bool:
    if profile.state == "running":
        return now - (profile.sent_at or 0.0) >= PATIENCE_S
    return profile.host in (None, host_id) or now - (profile.sent_at or 0.0) >= RESEND_S


def claim_profile(session: Session, profile_id: str, host_id: str, now: float) -> ProfileOrder:
    """Gives the order to one host; a repeat by the same host gets it again. Raises Problem 404, or 409 when another
    host has it or it is done."""
    profile = session.get(Profile, profile_id)
    if profile is None:
        raise not_found("profile", profile_id)
    is_repeat = profile.state == "running" and profile.host == host_id
    if not is_repeat:
        if profile.state not in ("wanted", "running") or not _may_claim(profile, host_id, now):
            raise Problem(409, UserError("profile.taken", "", profile=profile.id, state=profile.state))
        profile.state, profile.host, profile.sent_at = "running", host_id, now
        profile.progress, profile.sampled = 0.0, None
        session.add(profile)
    return ProfileOrder(
        id=profile.id,
        model=profile.model,
        chat_template=profile.chat_template,
        data=DataFile(
            dataset=profile.dataset,
            sha256=profile.data_sha256,
            bytes=session.get_one(Blob, profile.data_sha256).bytes,
        ),
        format=profile.format,
        train_on=profile.train_on,
        multi_turn=profile.multi_turn,
        num_rows=_num_rows(session, profile),
    )


def _num_rows(session: Session, profile: Profile) -> int:
    """Of the file; 0 where no data set has it any more."""
    version = session.exec(select(DatasetVersion).where(DatasetVersion.sha256 == profile.data_sha256)).first()
    return version.num_rows if version is not None else 0


def store_progress(
    session: Session, profile_id: str, host_id: str, *, fraction: float, packed: bytes | None, now: float
) -> None:
    """Notes how far the host is that has claimed it, and that it is alive. Raises Problem 404, or 409 when it is
    another's or done."""
    profile = session.get(Profile, profile_id)
    if profile is None:
        raise not_found("profile", profile_id)
    if profile.host != host_id or profile.state != "running":
        raise Problem(409, UserError("profile.taken", "", profile=profile.id, state=profile.state))
    profile.sent_at = now
    profile.progress = max(profile.progress or 0.0, fraction)  # messages may overtake each other
    profile.sampled = packed or profile.sampled
    session.add(profile)


def packed_facts(facts: DataProfile) -> bytes:
    """As the database keeps them. Takes a second for a million samples: not within a transaction."""
    return zlib.compress(facts.model_dump_json().encode(), 1)


def store_result(
    session: Session, profile_id: str, host_id: str, *, packed: bytes | None, error: str, now: float
) -> None:
    """Keeps what the host that claimed it found. Raises Problem 404 for another host. What is ready stays ready."""
    profile = session.get(Profile, profile_id)
    if profile is None or profile.host != host_id:
        raise not_found("profile", profile_id)
    if profile.state == "ready":
        return
    if packed is not None:
        _keep(profile, packed, now)
    else:
        profile.state, profile.error, profile.ready_at = "failed", error or "no reason was given", now
        profile.progress, profile.sampled = None, None
    session.add(profile)


def store_measured(session: Session, job: Job, dataset: str, packed: bytes, now: float) -> None:
    """Keeps what a trainer measured on its way, if the model that it measured with is still known."""
    spec = parse_spec(job.spec)
    version = dict(data_of(session, spec)).get(dataset)
    if version is None:
        raise not_found("data set", dataset)
    model = next((m for m in known_models(session) if m.profile.name == spec.model.base), None)
    if model is None or job.host not in model.hosts:
        return
    profile = _find_one(session, spec, dataset, version, model.profile.content_hash)
    if profile.state != "ready":
        profile.host = job.host
        profile.wanted_at = profile.wanted_at or now
        _keep(profile, packed, now)
        session.add(profile)


def _keep(profile: Profile, packed: bytes, now: float) -> None:
    profile.state, profile.error, profile.ready_at = "ready", None, now
    profile.progress, profile.sampled, profile.result = None, None, packed


def read_result(profile: Profile) -> DataProfile:
    assert profile.state == "ready" and profile.result is not None
    return _unpack(profile.result)


@dataclass(frozen=True)
class SampledFacts:
    """What some rows of a file show, while all of it is still measured."""

    packed: bytes
    num_rows: int  # of the file

    @property
    def facts(self) -> DataProfile:
        """Of the sampled rows alone."""
        return _unpack(self.packed)

    @property
    def stretched(self) -> DataProfile:
        """As if the whole file were of their like."""
        return _stretch(self.packed, self.num_rows)


def read_sampled(session: Session, profile: Profile) -> SampledFacts | None:
    """None where nothing was sampled, or everything is known."""
    if profile.sampled is None:
        return None
    return SampledFacts(profile.sampled, _num_rows(session, profile))


@lru_cache(maxsize=4)
def _stretch(packed: bytes, num_rows: int) -> DataProfile:
    return stretch(_unpack(packed), num_rows)


@lru_cache(maxsize=4)  # the form asks for the same few, once a keystroke; a million samples are 60 MB here
def _unpack(result: bytes) -> DataProfile:
    return DataProfile.model_validate_json(zlib.decompress(result))


# -- the plan ------------------------------------------------------------------------------------------------------
def plan_for(services: Services, spec: JobSpec, device: Device | None = None) -> JobPlan | Wanted:
    """The job worked out for `device`, or the likeliest; or, while a host still measures its data, what is being waited
    for. Raises UserError or UserErrors: a spec that doesn't fit its hosts, model or data, data that can't be
    measured."""
    refuse_unbuilt(spec)
    device = device or look_out(services, spec).device
    wanted = want_profiles(services, spec)
    wanted.refuse_failed()
    if not wanted.is_ready:
        return wanted
    return plan_job(spec, wanted.data, wanted.model.profile, device, services.planned)


@dataclass(frozen=True)
class Estimate:
    """A plan whose data is known by a sample of its rows: of the right size, exact in nothing."""

    plan: JobPlan
    num_sampled: int  # rows
    num_rows: int  # of these files


def estimate_plan(services: Services, spec: JobSpec, wanted: Wanted) -> Estimate | None:
    """What `plan_for` will find, about; None as long as nothing is known of some data set, or where no job fits what
    is known, which only exact numbers may say."""
    data: dict[str, DataProfile] = {}
    num_sampled = num_rows = 0
    with services.database.read() as session:
        for name, profile in wanted.profiles.items():
            sampled = read_sampled(session, profile)
            if profile.state == "ready":
                data[name] = read_result(profile)
            elif sampled is not None:
                data[name] = sampled.stretched
                num_sampled += sampled.facts.num_rows
                num_rows += sampled.num_rows
            else:
                return None
    try:
        device = look_out(services, spec).device
        plan = plan_job(spec, data, wanted.model.profile, device)
    except USER_FAULTS:
        return None
    return Estimate(plan, num_sampled, num_rows)


def plan_if_measured(services: Services, spec: JobSpec) -> JobPlan | None:
    """The same where every profile happens to be there; None where one isn't, and nobody is asked for it."""
    device = look_out(services, spec).device
    with services.database.read() as session:
        wanted = _find(session, spec)
    if not wanted.is_ready:
        return None
    return plan_job(spec, wanted.data, wanted.model.profile, device, services.planned)
