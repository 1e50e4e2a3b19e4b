"""`pegbox train -f spec.yaml --out DIR`: a fine-tune with no server, no Redis and no database.

It makes the same directory that a supervisor makes for an attempt (see worker.job_directory) and leaves the rest to the
same trainer. Data sets that hold a slash or a file ending are paths, seen from where the command runs; a model is a
folder, or a name below a model root; so is an adapter to start from a folder.

On one device the trainer is this process itself. On several its ranks are torchrun's children, which print here, are
told to stop by Ctrl-C or TERM (a second one ends all at once), and die with this process, however it ends.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import yaml

from core.demo_data import DEMO_MODEL
from core.errors import UserError
from core.hub import parse_hub_dataset
from core.preflight import plan_job
from core.spec import JobSpec, ValidationDataset, is_path, parse_spec
from core.states import Outcome
from core.wire import ADAPTER_FILES
from worker.diagnosis import Evidence, diagnose, num_oom_kills
from worker.gpus import sample_gpus
from worker.inputs import device_environment
from worker.job_directory import InputFile, Inputs, read_outcome, write_json
from worker.processes import own_environment, secrets_in, sweep
from worker.settings import TRAINER_ARGV
from worker.trainer import Line, Trainer

MAX_SPEC_BYTES = 1_000_000
_LOOK_EVERY_S = 0.2
_SWEEP_S = 30.0


@dataclass(frozen=True)
class Prepared:
    directory: Path
    is_finished: bool  # it already holds a result: nothing is left to do


def read_spec_file(path: Path) -> JobSpec:
    """YAML (or JSON, which is YAML) becomes a spec.

    Raises UserError spec.yaml, spec.file, and all that parse_spec raises."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError("spec.file", "-f", path=str(path), problem=error.strerror or str(error)) from error
    if len(text) > MAX_SPEC_BYTES:
        raise UserError("spec.too_long", "-f", length=len(text), limit=MAX_SPEC_BYTES)
    try:
        return parse_spec(yaml.load(text, Loader=_PlainLoader))  # noqa: S506  a SafeLoader that also refuses aliases
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        raise UserError("spec.yaml", "-f", problem=str(problem), line=mark.line + 1 if mark else 0) from error


class _PlainLoader(yaml.SafeLoader):
    """Without aliases, a few lines of which can stand for gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]  # PyYAML
            raise yaml.constructor.ConstructorError(None, None, "aliases are not allowed", mark)
        return super().compose_node(parent, index)


def prepare_directory(
    spec: JobSpec, out: Path, model_roots: tuple[Path, ...], cache_dir: Path, *, fresh: bool
) -> Prepared:
    """Makes `out` ready for the trainer, or finds it finished. The same spec goes on from its newest checkpoint.

    Raises UserError train.other_spec where `out` was begun with another spec, and where model or data are missing."""
    if fresh and out.exists():
        _refuse_foreign(out)
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    spec_path = out / "spec.json"
    stored = spec.model_dump(mode="json")
    if spec_path.exists():
        if json.loads(spec_path.read_bytes()) != stored:
            raise UserError("train.other_spec", "--out", out=str(out))
    else:
        _refuse_foreign(out)
    if _is_finished(out):
        return Prepared(out, is_finished=True)
    inputs = gather(spec, model_roots, cache_dir, resume=tuple(map(str, _checkpoints(out))), revisions=_revisions(out))
    (out / "outcome.json").unlink(missing_ok=True)
    write_json(out / "inputs.json", inputs)
    write_json(spec_path, spec)
    return Prepared(out, is_finished=False)


def gather(
    spec: JobSpec,
    model_roots: tuple[Path, ...],
    cache_dir: Path,
    resume: tuple[str, ...] = (),
    revisions: Mapping[str, str] | None = None,
) -> Inputs:
    """Where everything that the spec names lies on this machine. `revisions` are those at which data sets on a hub were
    taken before. Raises UserError for what does not lie here."""
    return Inputs(
        model_path=str(_find_model(spec.model.base, model_roots)),
        model_name=spec.model.base,
        data=tuple(_find_data(name, cache_dir, (revisions or {}).get(name)) for name in _dataset_names(spec)),
        adapter_path=_find_adapter(spec),
        resume=resume,
        devices=own_devices(spec.parallel.devices),
        ranks=spec.parallel.devices,
        cache_dir=str(cache_dir),
        threads=_threads_per_rank(spec.parallel.devices),
    )


def _refuse_foreign(out: Path) -> None:
    """A folder that holds files and no spec.json of ours is somebody's: nothing in it is touched."""
    if out.exists() and any(out.iterdir()) and not (out / "spec.json").exists():
        raise UserError("train.foreign_directory", "--out", out=str(out))


def _is_finished(out: Path) -> bool:
    outcome = read_outcome(out)
    return outcome is not None and outcome.code == 0 and (out / "result").is_dir()


def _checkpoints(out: Path) -> list[Path]:
    found = (out / "checkpoints").glob("step-*")
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def _dataset_names(spec: JobSpec) -> list[str]:
    names = [part.dataset for part in spec.data.train]
    if isinstance(spec.data.validation, ValidationDataset):
        names.append(spec.data.validation.dataset)
    return list(dict.fromkeys(names))


def _revisions(out: Path) -> dict[str, str]:
    """What an earlier start of the same run has taken from a hub: the hub may have moved on, the run may not."""
    try:
        inputs = Inputs.model_validate_json((out / "inputs.json").read_bytes())
    except FileNotFoundError:
        return {}
    return {file.dataset: file.revision for file in inputs.data if file.revision}


def _find_data(name: str, cache_dir: Path, commit: str | None = None) -> InputFile:
    hub_dataset = parse_hub_dataset(name, "data.train")
    if hub_dataset is not None:
        from worker.engine.hub import fetch_hub_dataset

        return fetch_hub_dataset(name, hub_dataset, cache_dir, commit)
    path = Path(name).expanduser()
    if not path.is_file():
        code = "train.no_data_file" if is_path(name) else "train.data_is_no_path"
        raise UserError(code, "data.train", name=name, folder=str(Path.cwd()))
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return InputFile(dataset=name, path=str(path.resolve()), sha256=digest)


def visible_gpus() -> list[str]:
    """Numbers or UUIDs of the GPUs that this process may use."""
    gpus = [str(sample.index) for sample in sample_gpus()]
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not gpus or named is None:
        return gpus
    # As CUDA reads it: up to the first that is none, so that "" or -1 asks for the CPU.
    return list(takewhile(lambda name: name not in ("", "-1"), map(str.strip, named.split(","))))


def own_devices(num_ranks: int) -> tuple[str, ...]:
    """The first GPUs that this process may see, one a rank; without any it is the CPU, on which all ranks run. A GPU
    that torch can't use is an error later, never a slow CPU run.

    Raises UserError train.too_few_gpus."""
    gpus = visible_gpus()
    if not gpus:
        return ("cpu0",)
    if len(gpus) < num_ranks:
        source = "this machine has" if "CUDA_VISIBLE_DEVICES" not in os.environ else "CUDA_VISIBLE_DEVICES names"
        raise UserError("train.too_few_gpus", "parallel.devices", asked=num_ranks, source=source, there=len(gpus))
    return tuple(f"gpu{name}" for name in gpus[:num_ranks])


def _threads_per_rank(num_ranks: int) -> int:
    """OMP_NUM_THREADS counts for each rank, as torchrun has it; else they share the CPUs that this process may use."""
    return int(os.environ.get("OMP_NUM_THREADS") or max(1, len(os.sched_getaffinity(0)) // num_ranks))


def _find_adapter(spec: JobSpec) -> str:
    if spec.model.adapter is None:
        return ""
    folder = Path(spec.model.adapter).expanduser()
    if not all((folder / name).is_file() for name in ADAPTER_FILES):
        raise UserError("train.no_adapter", "model.adapter", folder=str(folder.absolute()))
    return str(folder.resolve())


def find_adapter(folder: Path, base: str | None, model_roots: tuple[Path, ...]) -> tuple[Path, Path]:
    """For `pegbox merge`: the adapter in `folder`, a job's directory or its result, and the model that it belongs to:
    `base` where it is given, else the one that it names.

    Raises UserError merge.no_adapter and train.no_model."""
    adapter = folder / "result" if (folder / "result").is_dir() else folder
    if not all((adapter / name).is_file() for name in ADAPTER_FILES):
        raise UserError("merge.no_adapter", folder=str(folder))
    named = json.loads((adapter / "adapter_config.json").read_bytes()).get("base_model_name_or_path")
    if base is None and (folder / "inputs.json").is_file():
        base = Inputs.model_validate_json((folder / "inputs.json").read_bytes()).model_path
    return adapter, _find_model(base or str(named), model_roots)


def _find_model(base: str, model_roots: tuple[Path, ...]) -> Path:
    folder = Path(base).expanduser()
    for candidate in (folder, *(root / base for root in model_roots)):
        if (candidate / "config.json").is_file():
            return candidate.resolve()
    if base == DEMO_MODEL:
        from worker.engine.demo_model import ensure_demo_model

        return ensure_demo_model(model_roots[0])
    looked = ", ".join(str(root) for root in (Path.cwd(), *model_roots))
    raise UserError("train.no_model", "model.base", name=base, looked=looked)


@dataclass
class _Wishes:
    """What signals have asked of a run."""

    num_stops: int = 0
    num_checkpoints: int = 0
    num_questions: int = 0  # where its ranks stand

    @contextmanager
    def heard(self) -> Iterator[None]:
        def stop(*_: object) -> None:
            self.num_stops += 1

        def checkpoint(*_: object) -> None:
            self.num_checkpoints += 1

        def question(*_: object) -> None:
            self.num_questions += 1

        handlers = {
            signal.SIGINT: stop,
            signal.SIGTERM: stop,
            signal.SIGUSR1: checkpoint,
            signal.SIGUSR2: question,
        }
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def train_ranks(
    directory: Path, argv: Sequence[str] = TRAINER_ARGV, *, mark: str | None = None, is_quiet: bool = False
) -> int:
    """Runs the ranks of a prepared directory to their end and returns the exit code: outcome.json's, or 128 and the
    signal that ended a rank. What they print, and why they failed, goes to stderr, or nowhere where it `is_quiet`.

    All but this process that carries the `mark` is killed at the end; None is one of their own."""
    inputs = Inputs.model_validate_json((directory / "inputs.json").read_bytes())
    mark = mark or f"train.{uuid.uuid4().hex}"
    environment = own_environment(
        os.environ, mark, OMP_NUM_THREADS=str(inputs.threads), **_gpu_environment(inputs.devices)
    )
    num_oom_kills_before = num_oom_kills()
    wishes, num_checkpoints, num_questions = _Wishes(), 0, 0
    show = _pass_over if is_quiet else _show
    with wishes.heard():
        trainer = Trainer(argv, directory.resolve(), environment, secrets_in(environment), inputs.ranks)
        while (returncode := trainer.poll()) is None:
            trainer.wait_for_output(_LOOK_EVERY_S)
            show(trainer.read_lines())
            if wishes.num_stops > 1:
                trainer.kill()
            elif wishes.num_stops:
                trainer.ask_to_stop()
            elif wishes.num_checkpoints > num_checkpoints:
                num_checkpoints = wishes.num_checkpoints
                trainer.send(signal.SIGUSR1)
            elif wishes.num_questions > num_questions:
                num_questions = wishes.num_questions
                trainer.send(signal.SIGUSR2)
        left = sweep(mark, timeout_s=_SWEEP_S)
        show(trainer.read_rest())
    outcome = read_outcome(directory)
    death = trainer.death()
    end = diagnose(
        Evidence(
            returncode=returncode if death is None else death.returncode,
            outcome=outcome,
            # Nobody is told more here than the trainer's own word.
            has_end_event=True,
            has_result=(directory / "result").is_dir() or inputs.trial is not None,
            wish="stop" if wishes.num_stops else "run",
            deed="none",
            log_tail=trainer.last_words(death),
            num_oom_kills=num_oom_kills() - num_oom_kills_before,
            grace_s=0.0,
            rank=None if death is None else death.rank,
        )
    )
    trainer.close()
    if left:
        sys.stderr.write(f"processes {left} could not be killed and may still hold their devices\n")
    if outcome is None:
        show(Line(0, text) for text in trainer.launcher_tail())
    if not is_quiet and (outcome is None or end.text != outcome.text):
        # Nobody tries it again here.
        remedy = "the same command goes on from its newest checkpoint" if end.outcome is Outcome.LOST else end.remedy
        sys.stderr.write(f"{end.text}; {remedy}\n" if remedy else f"{end.text}\n")
    assert end.exit_code is not None
    return end.exit_code


def _show(lines: Iterable[Line]) -> None:
    for line in lines:
        sys.stderr.write(f"{line.text}\n" if line.rank == 0 else f"[rank {line.rank}] {line.text}\n")


def _pass_over(lines: Iterable[Line]) -> None:
    for _ in lines:  # read, or the pipe fills up
        pass


def _gpu_environment(devices: Sequence[str]) -> dict[str, str]:
    """Of what a person made visible, the part that is used, under the names that they gave."""
    if os.environ.get("CUDA_VISIBLE_DEVICES"):
        return {"CUDA_VISIBLE_DEVICES": ",".join(device.removeprefix("gpu") for device in devices)}
    return device_environment(devices)


def print_plan(spec: JobSpec, model_roots: tuple[Path, ...], cache_dir: Path) -> int:
    """`--dry-run`: reads model and data as a run would, and prints what it would do, as one JSON object on stdout."""
    from worker.engine.data import load_corpus
    from worker.engine.device import find_device
    from worker.engine.models import profile_with_hashes
    from worker.engine.tokenizer import HfChatTokenizer

    model_path = _find_model(spec.model.base, model_roots)
    inputs = Inputs(
        model_path=str(model_path),
        model_name=spec.model.base,
        data=tuple(_find_data(name, cache_dir) for name in _dataset_names(spec)),
        cache_dir=str(cache_dir),
    )
    tokenizer = HfChatTokenizer.load(model_path, spec.model.chat_template)
    corpus = load_corpus(spec, inputs, tokenizer, lambda done, total: None)
    plan = plan_job(
        spec,
        corpus.profiles,
        profile_with_hashes(model_path, spec.model.base, cache_dir),
        find_device(own_devices(spec.parallel.devices)[0])[1],
    )
    shown = {**plan.plan_event(), "learning_rate": plan.learning_rates(), "spec": plan.spec.model_dump(mode="json")}
    sys.stdout.write(json.dumps(shown, ensure_ascii=False, indent=1) + "\n")
    return 0
