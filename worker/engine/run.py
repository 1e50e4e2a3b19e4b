"""A run as it stands: what a process knows of its job, and all that a step of it needs."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.preflight import JobPlan
from core.spec import JobSpec
from worker.engine.checkpoint import Progress
from worker.engine.data import Corpus
from worker.engine.emit import Emitter, NoEmitter
from worker.engine.learner import Learner
from worker.engine.model import LanguageModel
from worker.engine.ranks import ALONE, Ranks
from worker.engine.signals import Signals, Stopped
from worker.engine.tokenizer import HfChatTokenizer
from worker.engine.utilisation import Utilisation


@dataclass
class Measured:
    """Sums over the steps that this process made, for report.json."""

    steps: int = 0
    tokens: int = 0
    slots: int = 0
    rows: int = 0
    trained_tokens: int = 0
    step_s: float = 0.0
    wait_s: float = 0.0
    memory_peak_bytes: int = 0
    last_loss: float | None = None


@dataclass(frozen=True)
class Wishes:
    """What some rank was asked for, as all ranks have agreed: they act on it alike at the next border."""

    stop: bool
    checkpoint: bool
    clock: bool  # so much time has passed since the last checkpoint


@dataclass
class Run:
    """What a process knows of its job, filled as it goes; it outlives a failure, which then says where it happened."""

    directory: Path
    emitter: Emitter | NoEmitter
    signals: Signals
    ranks: Ranks = ALONE
    phase: str = "start"
    spec: JobSpec | None = None  # as far as it is resolved
    plan_fields: dict[str, Any] = field(default_factory=dict)
    plan: JobPlan | None = None  # that its steps are made by
    first_step: int = 1  # of those that this process makes
    progress: Progress = field(default_factory=Progress)
    saved_step: int = 0  # of the newest checkpoint that stands
    saved_at: float = field(default_factory=time.monotonic)
    failed_saves: int = 0
    steps_left_out: int = 0  # in a row, under fp16
    measured: Measured = field(default_factory=Measured)

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    def enter(self, phase: str, done: int = 0, total: int | None = None) -> None:
        self.phase = phase
        self.emitter.phase(phase, done, total)

    def obey(self) -> None:
        """Between two phases, where there is nothing to save."""
        if any(self.ranks.any(self.signals.stop_requested)):
            raise Stopped

    def let_stop_interrupt(self, may: bool) -> None:
        """Whether a stop may end the work at any line: never that of one of several ranks, for the others would wait
        for it in vain."""
        self.signals.interrupts = may and self.ranks.size == 1

    def own_wishes(self) -> tuple[bool, bool, bool]:
        minutes = self.spec.checkpoint.every_minutes if self.spec is not None else None
        clock = minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes
        return self.signals.stop_requested, self.signals.checkpoint_requested, clock

    def agree(self) -> Wishes:
        return Wishes(*self.ranks.any(*self.own_wishes()))


@dataclass(frozen=True)
class Ready:
    """All that a step needs, worked out and loaded."""

    plan: JobPlan
    model: LanguageModel
    learner: Learner
    corpus: Corpus
    tokenizer: HfChatTokenizer
    ends: list[int]  # tokens that end a text
    context_length: int  # tokens
    threads: int
    ranks: Ranks
    utilisation: Utilisation

    @property
    def spec(self) -> JobSpec:
        return self.plan.spec
