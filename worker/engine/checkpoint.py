"""A run at a step border, whole on disk or not there at all.

    checkpoints/step-<n>/
      weights.safetensors   what is trained, fp32, by parameter name; frozen weights come from the base model again
      optimizer.pt          AdamW's moments; read back with weights_only=True alone, so no pickle ever runs
      shard-<rank>.safetensors   in place of both, under ZeRO 1 to 3: what a rank owns of each (worker.engine.pieces)
      rng-<rank>.pt         python's, numpy's and torch's generators of a rank (dropout draws from the last)
      manifest.json         `Manifest`: where the run stood, and name, size and sha256 of each file

It is written into .tmp-<step>-<random>/, every file fsynced, the manifest last, then renamed, then the parent fsynced:
whoever finds step-<n> finds it complete, a kill at any point leaves a .tmp folder that the next start removes. A disk
can still lie, so a resume checks every hash and falls back to an older one; and an older one is deleted only after the
new one has been read back and verified.

A save for which there is no room is no reason to stop training: the caller warns and goes on, a few times.
"""

import errno
import hashlib
import json
import os
import random
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from core.errors import UserError
from core.spec import JobSpec
from worker.engine.libraries import versions
from worker.engine.ranks import ALONE, Ranks
from worker.job_directory import sync_folder

WEIGHTS, OPTIMIZER, MANIFEST = "weights.safetensors", "optimizer.pt", "manifest.json"
SCALING = "loss_scaling"  # in optimizer.pt, beside its own keys: of fp16
MOST_TRIED = 3  # the newest and two older ones
FREE_SPACE_FACTOR = 2.2  # the old one stands until the new one verifies, and the job's result wants room too


class Progress(BaseModel):
    """Where a run stands after `step` steps."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int = 0
    epoch: float = 0.0  # epochs that are behind
    consumed: int = 0  # samples, counted each time
    trained_tokens: int = 0
    sample_hash: str = ""  # of the last step's samples: a resume under other data is noticed
    evaluated_step: int = 0
    eval_loss: float | None = None  # at evaluated_step
    best_eval_loss: float | None = None
    evaluations_since_best: int = 0

    @property
    def loss_here(self) -> float | None:
        """The held-out loss of exactly these weights, where it was measured."""
        return self.eval_loss if self.evaluated_step == self.step else None


class SavedFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    size: int  # bytes
    sha256: str


class Manifest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    format: int = 1
    progress: Progress
    world: int = 1  # ranks
    zero_stage: int = 0
    # None in a checkpoint from before these were told.
    offload: str | None = None
    gradient_checkpointing: bool | None = None
    has_whole_moments: bool = True  # False: each rank's moments are of use to ranks of the same parts alone
    threads: int
    versions: dict[str, str]
    spec_hash: str
    files: tuple[SavedFile, ...]

    # Said once more at the top level, for whoever lists checkpoints without knowing the trainer.
    step: int
    consumed: int

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)


class NoSpace(Exception):
    """The disk has no room for a checkpoint."""


class Unverified(Exception):
    """What is wrong with a checkpoint on disk."""


# -- writing ---------------------------------------------------------------------------------------------------------


class Written(Protocol):
    """What of a run goes into files: worker.engine.learner."""

    @property
    def checkpoint_bytes(self) -> int: ...

    def write(self, folder: Path) -> list[Path]: ...


def save(
    folder: Path,
    learner: Written,
    progress: Progress,
    *,
    spec: JobSpec,
    threads: int,
    ranks: Ranks = ALONE,
) -> Path:
    """Writes folder/step-<n> and returns it, verified. All ranks call it; each writes its own files into one staging
    folder, the first does the rest. Raises NoSpace on all of them, and then leaves nothing behind."""
    staging = folder / ranks.from_first(f".tmp-{progress.step}-{secrets.token_hex(4)}")
    final = folder / f"step-{progress.step}"
    recomputes = spec.compute.gradient_checkpointing
    try:
        with _all_have_room(ranks):
            if ranks.is_first:
                _demand_room(folder, learner.checkpoint_bytes)
                staging.mkdir()
        with _all_have_room(ranks):
            own = [*learner.write(staging), _write_rng(staging, ranks.rank)]
            saved = [_synced(path) for path in own]
        files = [file for of_rank in ranks.gather(saved) for file in of_rank]
        with _all_have_room(ranks):
            if ranks.is_first:
                manifest = Manifest(
                    progress=progress,
                    world=ranks.size,
                    zero_stage=0 if spec.parallel.zero_stage == "auto" else spec.parallel.zero_stage,
                    offload=None if spec.parallel.offload == "auto" else spec.parallel.offload,
                    gradient_checkpointing=None if recomputes == "auto" else recomputes,
                    has_whole_moments=spec.optimizer.name == "adamw",
                    threads=threads,
                    versions=versions(),
                    spec_hash=spec_hash(spec),
                    files=tuple(files),
                    step=progress.step,
                    consumed=progress.consumed,
                )
                _publish(staging, final, manifest)
    finally:
        if ranks.is_first:
            shutil.rmtree(staging, ignore_errors=True)
    return final


def _demand_room(folder: Path, size: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < FREE_SPACE_FACTOR * size:
        raise NoSpace(f"{free:,} bytes are free, {round(FREE_SPACE_FACTOR * size):,} are wanted")


def _publish(staging: Path, final: Path, manifest: Manifest) -> None:
    with (staging / MANIFEST).open("w") as file:
        json.dump(manifest.model_dump(mode="json"), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(staging)
    if final.exists():  # damaged and passed over, or saved before its evaluation
        hide(final)
    staging.rename(final)
    sync_folder(final.parent)
    verify(final)
    remove_leftovers(final.parent)


@contextmanager
def _all_have_room(ranks: Ranks) -> Iterator[None]:
    """Where one rank has no room, all raise NoSpace: none may go on alone. It is also the point at which all have done
    what is inside."""
    problem: NoSpace | None = None
    try:
        yield
    except NoSpace as error:
        problem = error
    except (OSError, SafetensorError, RuntimeError) as error:
        if not is_want_of_space(error):
            raise
        problem = NoSpace(str(error))
        problem.__cause__ = error
    (anyone,) = ranks.any(problem is not None)
    if anyone:
        raise problem or NoSpace("another rank had no room")


def write_whole(
    folder: Path,
    weights: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaling: Mapping[str, Any] | None = None,
) -> list[Path]:
    """What is trained and its moments, for a rank that holds all of it."""
    save_file({name: weight.detach().cpu().contiguous() for name, weight in weights.items()}, folder / WEIGHTS)
    torch.save({**optimizer.state_dict(), SCALING: scaling or {}}, folder / OPTIMIZER)
    return [folder / WEIGHTS, folder / OPTIMIZER]


def _write_rng(folder: Path, rank: int) -> Path:
    path = folder / rng_name(rank)
    torch.save(rng_state(), path)
    return path


def rng_name(rank: int) -> str:
    return f"rng-{rank}.pt"


def shard_name(rank: int) -> str:
    return f"shard-{rank}.safetensors"


def moments_name(rank: int) -> str:
    return f"moments-{rank}.pt"


def is_want_of_space(error: BaseException) -> bool:
    # safetensors and torch tell it in words only.
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)


def _synced(path: Path) -> SavedFile:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return SavedFile(name=path.name, size=path.stat().st_size, sha256=digest)


def spec_hash(spec: JobSpec) -> str:
    return hashlib.sha256(spec.model_dump_json().encode()).hexdigest()


def hide(checkpoint: Path) -> None:
    """Out of sight, to be removed: half a checkpoint is never found under its name."""
    checkpoint.rename(checkpoint.with_name(f".tmp-old-{secrets.token_hex(4)}"))


def remove_leftovers(folder: Path) -> None:
    """What a killed trainer was writing or deleting."""
    for leftover in folder.glob(".tmp-*"):
        shutil.rmtree(leftover)


def prune(folder: Path, keep_last: int, keep_best: int) -> None:
    """Deletes all but the newest and the best by held-out loss."""
    newest_first = checkpoints_in(folder)
    losses = [(loss, path) for path in newest_first if (loss := _loss_of(path)) is not None]
    best = [path for _, path in sorted(losses, key=lambda pair: pair[0])[:keep_best]]
    for path in newest_first[keep_last:]:
        if path not in best:
            hide(path)
    remove_leftovers(folder)


def best_in(folder: Path) -> Path | None:
    """The checkpoint with the lowest held-out loss."""
    losses = [(loss, path) for path in checkpoints_in(folder) if (loss := _loss_of(path)) is not None]
    return min(losses, key=lambda pair: pair[0])[1] if losses else None


def _loss_of(path: Path) -> float | None:
    try:
        return read_manifest(path).progress.loss_here
    except Unverified:
        return None


def checkpoints_in(folder: Path) -> list[Path]:
    """Newest first."""
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda path: -int(path.name.removeprefix("step-")))


# -- reading ---------------------------------------------------------------------------------------------------------


def read_manifest(path: Path) -> Manifest:
    try:
        return Manifest.model_validate_json((path / MANIFEST).read_bytes())
    except (OSError, ValidationError) as error:
        raise Unverified(f"{path.name}: its manifest cannot be read ({type(error).__name__})") from error


def files_of(manifest: Manifest) -> set[str]:
    """What a checkpoint of this stage and so many ranks consists of."""
    of_ranks = [rng_name]
    if manifest.zero_stage > 0:
        of_ranks.append(shard_name)
        if not manifest.has_whole_moments:
            of_ranks.append(moments_name)
    names = {name(rank) for name in of_ranks for rank in range(manifest.world)}
    return names | {WEIGHTS, OPTIMIZER} if manifest.zero_stage == 0 else names


def verify(path: Path) -> Manifest:
    """Raises Unverified where a file is missing, cut or changed."""
    manifest = read_manifest(path)
    if {file.name for file in manifest.files} != files_of(manifest):
        raise Unverified(f"{path.name}: its manifest names other files")
    for saved in manifest.files:
        try:
            with (path / saved.name).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != saved.size:
                    raise Unverified(f"{path.name}: {saved.name} has {size} bytes, {saved.size} were written")
                if hashlib.file_digest(file, "sha256").hexdigest() != saved.sha256:
                    raise Unverified(f"{path.name}: {saved.name} has changed since it was written")
        except OSError as error:
            raise Unverified(f"{path.name}: {saved.name} cannot be read ({error.strerror})") from error
    return manifest


def newest_verified(candidates: Sequence[Path], warn: Callable[[str, str], None]) -> tuple[Path, Manifest] | None:
    """The first of `candidates` (newest first) that verifies, or two that follow it; None where there is none to try.

    Raises UserError engine.no_checkpoint where there are some and none verifies."""
    problems: list[str] = []
    for path in candidates[:MOST_TRIED]:
        try:
            return path, verify(path)
        except Unverified as problem:
            problems.append(str(problem))
            warn("checkpoint", f"a checkpoint is passed over: {problem}")
    if problems:
        raise UserError("engine.no_checkpoint", problems="; ".join(problems))
    return None


def load_weights(path: Path, step: int, weights: Mapping[str, nn.Parameter]) -> None:
    """Raises UserError engine.other_model where names or shapes differ."""
    saved = load_file(path / WEIGHTS)
    refuse_other_shapes(_shapes(saved), _shapes(weights), step)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(saved[name])


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def refuse_other_shapes(
    saved: Mapping[str, tuple[int, ...]], trained: Mapping[str, tuple[int, ...]], step: int
) -> None:
    """Raises UserError engine.other_model where names or shapes differ."""
    problem = _mismatch(saved, trained)
    if problem:
        raise UserError("engine.other_model", "model.base", step=step, problem=problem)


def _mismatch(saved: Mapping[str, tuple[int, ...]], trained: Mapping[str, tuple[int, ...]]) -> str:
    for name in sorted(saved.keys() ^ trained.keys()):
        where = "the checkpoint" if name in saved else "this job"
        return f"only {where} trains {name}"
    for name, shape in trained.items():
        if saved[name] != shape:
            return f"{name} is {_by(saved[name])} there and {_by(shape)} here"
    return ""


def _by(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


def load_optimizer(file: Path, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its moments; the numbers of its groups (weight decay, betas) stay those of this job's spec. What stands there of
    the loss scaling is returned."""
    given = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    state = torch.load(file, map_location="cpu", weights_only=True)
    scaling: dict[str, Any] = state.pop(SCALING, {})
    optimizer.load_state_dict(state)
    for group, values in zip(optimizer.param_groups, given, strict=True):
        group.update(values)
    return scaling


# -- random numbers --------------------------------------------------------------------------------------------------


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """All generators, in types that torch.load reads without unpickling."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": {"name": name, "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)), "position": position}
        | {"has_gauss": has_gauss, "gauss": gauss},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    numpy = state["numpy"]
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state((numpy["name"], keys, numpy["position"], numpy["has_gauss"], numpy["gauss"]))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def load_rng(path: Path, rank: int) -> None:
    set_rng_state(torch.load(path / rng_name(rank), map_location="cpu", weights_only=True))
