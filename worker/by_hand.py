"""`pegbox train -f spec.yaml --out DIR`: a fine-tune with no server, no Redis and no database.

It makes the same directory that a supervisor makes for an attempt (see worker.job_directory) and leaves the rest to the
same trainer. Data sets that hold a slash or a file ending are paths, seen from where the command runs; a model is a
folder, or a name below a model root.
"""

import hashlib
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from core.demo_data import DEMO_MODEL
from core.errors import UserError
from core.preflight import plan_job
from core.spec import JobSpec, ValidationDataset, is_path, parse_spec
from worker.gpus import sample_gpus
from worker.job_directory import InputFile, Inputs, OutcomeFile, write_json

MAX_SPEC_BYTES = 1_000_000


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


def prepare_directory(spec: JobSpec, out: Path, model_roots: tuple[Path, ...], *, fresh: bool) -> Prepared:
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
    inputs = Inputs(
        model_path=str(_find_model(spec.model.base, model_roots)),
        model_name=spec.model.base,
        data=tuple(_find_data(name) for name in _dataset_names(spec)),
        resume=tuple(str(path) for path in _checkpoints(out)),
        devices=(_own_device(),),
        threads=int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1),
    )
    (out / "outcome.json").unlink(missing_ok=True)
    write_json(out / "inputs.json", inputs)
    write_json(spec_path, spec)
    return Prepared(out, is_finished=False)


def _refuse_foreign(out: Path) -> None:
    """A folder that holds files and no spec.json of ours is somebody's: nothing in it is touched."""
    if out.exists() and any(out.iterdir()) and not (out / "spec.json").exists():
        raise UserError("train.foreign_directory", "--out", out=str(out))


def _is_finished(out: Path) -> bool:
    try:
        outcome = OutcomeFile.model_validate_json((out / "outcome.json").read_bytes())
    except FileNotFoundError:
        return False
    return outcome.code == 0 and (out / "result").is_dir()


def _checkpoints(out: Path) -> list[Path]:
    found = (out / "checkpoints").glob("step-*")
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def _dataset_names(spec: JobSpec) -> list[str]:
    names = [part.dataset for part in spec.data.train]
    if isinstance(spec.data.validation, ValidationDataset):
        names.append(spec.data.validation.dataset)
    return list(dict.fromkeys(names))


def _find_data(name: str) -> InputFile:
    path = Path(name).expanduser()
    if not path.is_file():
        code = "train.no_data_file" if is_path(name) else "train.data_is_no_path"
        raise UserError(code, "data.train", name=name, folder=str(Path.cwd()))
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return InputFile(dataset=name, path=str(path.resolve()), sha256=digest)


def _own_device() -> str:
    """This machine's first GPU where it has one: one that torch can't use is an error then, never a slow CPU run.
    CUDA_VISIBLE_DEVICES="" asks for the CPU."""
    return "gpu0" if sample_gpus() and os.environ.get("CUDA_VISIBLE_DEVICES") != "" else "cpu0"


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


def print_plan(spec: JobSpec, model_roots: tuple[Path, ...]) -> int:
    """`--dry-run`: reads model and data as a run would, and prints what it would do, as one JSON object on stdout."""
    from worker.engine.data import load_corpus
    from worker.engine.device import find_device
    from worker.engine.models import profile_model
    from worker.engine.tokenizer import HfChatTokenizer

    model_path = _find_model(spec.model.base, model_roots)
    inputs = Inputs(
        model_path=str(model_path),
        model_name=spec.model.base,
        data=tuple(_find_data(name) for name in _dataset_names(spec)),
    )
    tokenizer = HfChatTokenizer.load(model_path, spec.model.chat_template)
    corpus = load_corpus(spec, inputs, tokenizer, lambda done, total: None)
    plan = plan_job(spec, corpus.profiles, profile_model(model_path, spec.model.base), find_device(_own_device())[1])
    shown = {**plan.plan_event(), "learning_rate": plan.learning_rates(), "spec": plan.spec.model_dump(mode="json")}
    sys.stdout.write(json.dumps(shown, ensure_ascii=False, indent=1) + "\n")
    return 0
