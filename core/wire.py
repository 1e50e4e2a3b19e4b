"""Queue, stream, key and route names, and the messages, that the web service and its workers share.

The sure road is HTTP under `/worker/v1` with a worker token; every message is idempotent, and the server's clock alone
decides. The fast road is one Redis stream of event batches and Celery messages that hold ids only; Redis may be flushed
at any time. Whoever calls with an old fence gets 409 and stops.

    worker                                     server
    POST /hosts/register      HostReport    -> Welcome            once a start, again after a 404
    POST /hosts/{host}/beat   HostBeat      -> HostOrders         every 5 s; brings what the queue may have lost
    POST /attempts/{job}/{n}/claim  Claim   -> Assignment | 409   dispatching -> starting, granted once; a repeat is 200
    POST /attempts/{job}/{n}/heartbeat      -> AttemptOrders|409  every 2 s, from the supervisor
    POST /attempts/{job}/{n}/events         -> Recorded           the sure road of events; never refused for its fence
    POST /attempts/{job}/{n}/profile        -> {}                 what the trainer measured
    PUT  /attempts/{job}/{n}/artifacts/{sha256}?fence=            body = the file; hashed by the server
    POST /attempts/{job}/{n}/finish  Finish -> Finished|409|425   the attempt's end, in one transaction; a repeat is 200
    GET  /blobs/{sha256}      (Range)                             data files, adapters
    POST /profiles/{id}/claim               -> ProfileOrder | 409
    POST /profiles/{id}/progress   ProfileProgress -> {}          every few seconds; who is silent loses the claim
    POST /profiles/{id}/result ProfileResult-> {}
"""

from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from core.events import FailureReason
from core.profile import DataProfile, ModelProfile
from core.states import Outcome
from core.trial import Trial

PROTOCOL = 1

# -- Redis ---------------------------------------------------------------------------------------------------------
# The stream of event batches: each entry has the fields job, attempt, fence, batch (a JSON list of wire events).
EVENT_STREAM = "pegbox:events"
EVENT_GROUP = "recorder"
# Approximate cap; what is trimmed before it is read comes again by HTTP.
EVENT_STREAM_MAX_ENTRIES = 100_000
CELERY_KEY_PREFIX = "pegbox:celery:"
LAUNCH_TASK = "pegbox.launch"  # (job, attempt, fence)
PREPARE_TASK = "pegbox.prepare"  # (profile,)


def launch_queue(host: str) -> str:
    return f"host.{host}"


def prepare_queue(host: str) -> str:
    return f"prepare.{host}"


# -- time ----------------------------------------------------------------------------------------------------------
HOST_BEAT_S = 5.0
HEARTBEAT_S = 2.0
LEASE_S = 60.0  # without a heartbeat for so long an attempt is shown as unreachable
HOST_FRESH_S = 30.0  # a host silent for longer gets no new work
RELAY_PATIENCE_S = 10.0  # acked_seq stands still for so long: send by HTTP
DISPATCH_RESEND_S = 30.0  # a launch unclaimed for so long is sent again
DISPATCH_GIVE_UP_S = 120.0  # and then goes back to the queue under a new fence
STOP_GRACE_S = 60.0  # TERM to KILL
MAX_EVENTS_A_BATCH = 1000
WORKER_PREFIX = "/worker/v1"


class Message(BaseModel):
    # Ignores what it doesn't know: a newer worker or server may say more.
    model_config = ConfigDict(frozen=True, extra="ignore")


# -- hosts ---------------------------------------------------------------------------------------------------------
class Device(Message):
    id: str  # "gpu0", "cpu1"
    kind: Literal["gpu", "cpu"]
    name: str
    memory_bytes: int
    has_bf16: bool = False
    in_use_by_stranger: bool = False


class DeviceLoad(Message):
    id: str
    utilisation: float | None = None  # 0..1
    memory_used_bytes: int | None = None
    temperature_c: float | None = None


class HostReport(Message):
    protocol: int = PROTOCOL
    host: str  # a random id that the worker keeps in its data directory
    name: str = Field(max_length=253)
    devices: tuple[Device, ...]
    refused_devices: dict[str, str] = {}  # device -> why torch can't use it
    models: tuple[ModelProfile, ...]
    versions: dict[str, str]
    num_cpus: int
    memory_bytes: int
    reaches_hub: bool = False
    has_compiler: bool = True  # g++ and ninja, with which DeepSpeed compiles its CPU Adam; of older workers unknown


class Welcome(Message):
    host: str
    redis_url: str | None


class AttemptRef(Message):
    job: str
    attempt: int
    fence: int


class HostBeat(Message):
    load: tuple[DeviceLoad, ...] = ()
    cpu_utilisation: float | None = None
    memory_used_bytes: int | None = None
    disk_free_bytes: int | None = None
    attempts: tuple[AttemptRef, ...] = ()  # whose supervisor is alive on this host
    is_leaving: bool = False  # the agent stops in good order: no new work until it registers again


class HostOrders(Message):
    redis_url: str | None
    launches: tuple[AttemptRef, ...] = ()  # dispatched to this host and not yet claimed
    profiles: tuple[str, ...] = ()  # wanted and not yet claimed
    # Attempts that the server believes to be on this host: those that the host knows to be dead, it reports.
    attempts: tuple[AttemptRef, ...] = ()


# -- attempts ------------------------------------------------------------------------------------------------------
class DataFile(Message):
    dataset: str  # as the spec names it
    sha256: str
    bytes: int


AdapterFileName = Literal["adapter_config.json", "adapter_model.safetensors"]
ADAPTER_FILES: tuple[AdapterFileName, ...] = get_args(AdapterFileName)


class AdapterFile(Message):
    """A file of the adapter that a job starts from; only these names become a path."""

    name: AdapterFileName
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: int


class Claim(Message):
    host: str
    fence: int


class Assignment(Message):
    spec: dict[str, Any]  # the stored JobSpec, parsed again by the worker: an unknown key is refused there
    data: tuple[DataFile, ...]
    devices: tuple[str, ...]  # GPUs, one a rank; on a CPU one slot, in which all ranks run
    adapter: tuple[AdapterFile, ...] = ()  # of the job that spec.model.adapter names
    # Jobs whose checkpoints may be resumed from, on this host, newest attempt first; the job's own comes first.
    resume_from: tuple[str, ...] = ()
    lease_s: float = LEASE_S
    redis_url: str | None = None
    acked_seq: int = 0
    trial: Trial | None = None  # the job is to be tried, not to be done


class Heartbeat(Message):
    fence: int
    last_seq: int
    step: int = 0
    total_steps: int | None = None


class AttemptOrders(Message):
    lease_s: float
    desired: Literal["run", "stop", "cancel"]
    acked_seq: int
    redis_url: str | None = None
    checkpoint_request: int = 0  # counts up: the supervisor asks the trainer for a checkpoint when it sees a new number


class WireEvent(Message):
    seq: int = Field(ge=1)
    ts: float
    kind: str = Field(max_length=64)
    data: dict[str, Any]  # the event's own fields


class EventBatch(Message):
    fence: int
    events: tuple[WireEvent, ...] = Field(max_length=MAX_EVENTS_A_BATCH)


class Recorded(Message):
    acked_seq: int  # every event up to here is stored; a gap in what was sent stops there


class Artifact(Message):
    name: str = Field(max_length=512)  # relative to result/
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Finish(Message):
    fence: int
    outcome: Outcome
    reason: FailureReason | None = None
    exit_code: int | None = None
    text: str = ""
    remedy: str = ""
    final_seq: int  # 425 until the recorder has stored so far
    artifacts: tuple[Artifact, ...] = ()  # of a success


class Finished(Message):
    state: str


# -- profiles ------------------------------------------------------------------------------------------------------
class ProfileOrder(Message):
    id: str
    model: str
    chat_template: str | None
    data: DataFile
    format: str
    train_on: str
    multi_turn: str
    num_rows: int = 0  # of the file, as the server counted them; 0: it didn't


class MeasuredProfile(Message):
    """A data set's profile as a trainer measured it, on its way."""

    dataset: str
    profile: DataProfile


class ProfileProgress(Message):
    """How far a host is. What it says of a sample of the rows, it says once."""

    fraction: float = Field(ge=0, le=1)  # of the work
    sampled: DataProfile | None = None  # measured of some rows of the file alone; the exact one follows as the result


class ProfileResult(Message):
    profile: DataProfile | None = None
    error: str = ""
    field: str = ""
