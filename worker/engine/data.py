"""Data files -> samples of token ids, each row accounted for.

Every row of a file becomes one sample or several, or is refused with its line and the reason; a row is never skipped
in silence. The same function, `read_samples`, measures a data set for the form (worker.engine.prepare) and reads it
for training, so what was previewed is what is trained.

A file is read in a stream: its first good rows decide the format and whether conversations stay whole, then all rows
go through the tokenizer in batches. Samples lie in flat arrays (4 bytes a token for ids, 1 for the mask), not as
Python objects: 100 million tokens take half a gigabyte.
"""

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from core.chat import ChatTokenizer, MultiTurn, Sample, TrainOn, build_samples_many, choose_multi_turn
from core.conversation import FORMAT_ROWS, Format, Parsed, detect_format, parse_row
from core.errors import UserError
from core.profile import Column, DataProfile, RefusedRow
from core.rows import RefusedRow as UnreadRow
from core.rows import Row, detect_file, read_rows
from core.spec import JobSpec, ValidationDataset
from worker.engine.parquet import read_parquet
from worker.job_directory import Inputs

CHUNK_BYTES = 1 << 20
# Good rows that decide the format, and whether `auto` keeps conversations whole. A later conversation whose history
# doesn't stand is split by itself and counted.
NUM_DECIDING_ROWS = FORMAT_ROWS
ROWS_PER_BATCH = 256  # enough to keep the Rust tokenizer's threads busy
MAX_REFUSED_LISTED = 1000
NUM_REASONS_TOLD = 3
# These end the reading: the next row would meet them too.
NOT_THE_ROWS_FAULT = frozenset({"chat.no_template", "chat.template_memory"})

IntArray = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]
OnProgress = Callable[[int, int], None]  # bytes read, bytes in all


@dataclass(frozen=True)
class Reading:
    """How a file is to be read; the values are the spec's."""

    format: str = "auto"
    train_on: str = "assistant"
    multi_turn: str = "auto"

    @classmethod
    def of(cls, spec: JobSpec) -> "Reading":
        return cls(spec.data.format, spec.data.train_on, spec.data.multi_turn)


class SampleStore:
    """Samples side by side in flat arrays."""

    def __init__(self) -> None:
        self._token_ids = array("i")
        self._trained = bytearray()
        self._ends = array("q", [0])
        self._lines = array("q")

    def __len__(self) -> int:
        return len(self._lines)

    def append(self, sample: Sample, line: int) -> None:
        self._token_ids.extend(sample.token_ids)
        self._trained.extend(sample.trained)
        self._ends.append(len(self._token_ids))
        self._lines.append(line)

    def sample(self, index: int) -> tuple[IntArray, BoolArray]:
        """Token ids and which of them are trained; both read-only views."""
        start, end = self._ends[index], self._ends[index + 1]
        token_ids = np.frombuffer(self._token_ids, dtype=np.int32, count=end - start, offset=4 * start)
        trained = np.frombuffer(self._trained, dtype=np.bool_, count=end - start, offset=start)
        token_ids.flags.writeable = False
        trained.flags.writeable = False
        return token_ids, trained

    def line(self, index: int) -> int:
        return self._lines[index]


@dataclass(frozen=True)
class MeasuredSet:
    profile: DataProfile
    samples: SampleStore


def read_samples(
    path: Path, tokenizer: ChatTokenizer, reading: Reading, on_progress: OnProgress = lambda done, total: None
) -> MeasuredSet:
    """All samples of a file, with its profile. Raises UserError data.* where no row of it can be used."""
    rows = _rows(path, on_progress)
    deciding = list(_until_good(rows, NUM_DECIDING_ROWS))
    good = [row for row in deciding if isinstance(row, Row)]
    if deciding and not good:
        # Nothing that could decide: say why, rather than that no format fits.
        refused = [row for row in deciding if isinstance(row, UnreadRow)]
        raise _no_good_row(path, len(refused), [_refuse(row.line, row.error) for row in refused])
    format = cast(Format, reading.format) if reading.format != "auto" else detect_format(row.value for row in good)
    builder = _Builder(tokenizer, format, cast(TrainOn, reading.train_on))
    multi_turn, why = builder.choose_multi_turn(good, reading.multi_turn)
    for batch in _batches(chain(deciding, rows), ROWS_PER_BATCH):
        builder.add(batch, multi_turn)
    if not builder.samples:
        raise _no_good_row(path, builder.num_rows, builder.refused)
    return MeasuredSet(builder.profile(multi_turn, why), builder.samples)


def _rows(path: Path, on_progress: OnProgress) -> Iterator[Row | UnreadRow]:
    type = detect_file(_chunks(path, lambda done, total: None))
    if type.kind == "parquet":
        return read_parquet(path, is_gzip=type.is_gzip, on_progress=on_progress)
    return read_rows(_chunks(path, on_progress))


def _chunks(path: Path, on_progress: OnProgress) -> Iterator[bytes]:
    total = path.stat().st_size
    done = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk
            done += len(chunk)
            on_progress(done, total)


def _until_good(rows: Iterator[Row | UnreadRow], num_good: int) -> Iterator[Row | UnreadRow]:
    while num_good and (row := next(rows, None)) is not None:
        yield row
        num_good -= isinstance(row, Row)


def _batches(rows: Iterable[Row | UnreadRow], size: int) -> Iterator[list[Row | UnreadRow]]:
    source = iter(rows)
    while batch := list(islice(source, size)):
        yield batch


class _Builder:
    """Takes rows in their order and keeps what DataProfile lists."""

    def __init__(self, tokenizer: ChatTokenizer, format: Format, train_on: TrainOn) -> None:
        self._tokenizer = tokenizer
        self._format = format
        self._train_on = train_on
        self.samples = SampleStore()
        self.num_rows = 0
        self.num_refused = 0
        self.num_fell_back = 0
        self.refused: list[RefusedRow] = []
        self._sample_row = array("I")
        self._sample_length = array("I")
        self._sample_trained = array("I")
        self._sample_turns = array("I")
        self._sample_hash = array("Q")
        self._sample_runs = array("I")
        self._run_bounds = array("I")

    def choose_multi_turn(self, rows: Sequence[Row], asked: str) -> tuple[MultiTurn, str]:
        """Whole or split, and why."""
        if asked != "auto":
            return cast(MultiTurn, asked), "as the spec asks"
        parsed = (self._parse(row) for row in rows)
        choice = choose_multi_turn([row for row in parsed if not isinstance(row, UserError)], self._tokenizer)
        return choice.mode, choice.reason

    def add(self, rows: Sequence[Row | UnreadRow], multi_turn: MultiTurn) -> None:
        parsed = [row.error if isinstance(row, UnreadRow) else self._parse(row) for row in rows]
        conversations = [conversation for conversation in parsed if not isinstance(conversation, UserError)]
        built = iter(build_samples_many(conversations, self._tokenizer, train_on=self._train_on, multi_turn=multi_turn))
        for row, conversation in zip(rows, parsed, strict=True):
            self._add_row(row, conversation if isinstance(conversation, UserError) else next(built))

    def _parse(self, row: Row) -> Parsed | UserError:
        try:
            return parse_row(row.value, self._format)
        except UserError as error:
            return error

    def _add_row(self, row: Row | UnreadRow, samples: list[Sample] | UserError) -> None:
        self.num_rows += 1
        if isinstance(samples, UserError) and samples.code in NOT_THE_ROWS_FAULT:
            raise samples
        if not samples:
            samples = UserError("data.nothing_trained")
        if isinstance(samples, UserError):
            self.num_refused += 1
            if len(self.refused) < MAX_REFUSED_LISTED:
                self.refused.append(_refuse(row.line, samples))
            return
        assert isinstance(row, Row)
        digest = int(hash_row(row.value), 16)
        self.num_fell_back += samples[0].fell_back
        for sample in samples:
            self.samples.append(sample, row.line)
            self._sample_row.append(row.index)
            self._sample_length.append(len(sample.token_ids))
            self._sample_trained.append(sample.num_trained)
            self._sample_turns.append(sample.num_turns)
            self._sample_hash.append(digest)
            bounds = np.flatnonzero(np.diff(np.array(sample.trained, dtype=np.int8), prepend=0, append=0)).tolist()
            self._sample_runs.append(len(bounds) // 2)
            self._run_bounds.extend(bounds)

    def profile(self, multi_turn: MultiTurn, why: str) -> DataProfile:
        return DataProfile(
            num_rows=self.num_rows,
            format=self._format,
            multi_turn=multi_turn,
            multi_turn_reason=why,
            num_fell_back=self.num_fell_back,
            num_refused=self.num_refused,
            refused=tuple(self.refused),
            sample_row=Column(self._sample_row),
            sample_length=Column(self._sample_length),
            sample_trained=Column(self._sample_trained),
            sample_turns=Column(self._sample_turns),
            sample_hash=Column(self._sample_hash),
            sample_runs=Column(self._sample_runs),
            run_bounds=Column(self._run_bounds),
        )


def _refuse(line: int, error: UserError) -> RefusedRow:
    return RefusedRow(line=line, code=error.code, text=error.text())


def _no_good_row(path: Path, num_rows: int, refused: Sequence[RefusedRow]) -> UserError:
    reasons = "; ".join(f"line {row.line}: {row.text}" for row in refused[:NUM_REASONS_TOLD])
    return UserError("data.no_good_row", "data.train", file=path.name, num_rows=num_rows, reasons=reasons)


def hash_row(value: dict[str, object]) -> str:
    """16 hex digits of the sha256 of a row's canonical JSON: whatever its spacing and the order of its keys were."""
    canonical = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


# -- of a job ------------------------------------------------------------------------------------------------------
class Corpus:
    """All samples of a job under the global ids of core.preflight: the training sets in the spec's order, then the
    validation set. A set that is named twice is read once and has ids for each time."""

    def __init__(self, order: Sequence[str], sets: dict[str, MeasuredSet]) -> None:
        self.profiles = {name: measured.profile for name, measured in sets.items()}
        self._stores = [sets[name].samples for name in order]
        self._names = list(order)
        self._first_ids = np.cumsum([0, *(len(store) for store in self._stores)])

    def __len__(self) -> int:
        return int(self._first_ids[-1])

    def sample(self, sample_id: int) -> tuple[IntArray, BoolArray]:
        place, index = self._find(sample_id)
        return self._stores[place].sample(index)

    def row_line(self, sample_id: int) -> int:
        """The line, in its file, of the row that the sample comes from."""
        place, index = self._find(sample_id)
        return self._stores[place].line(index)

    def dataset(self, sample_id: int) -> str:
        return self._names[self._find(sample_id)[0]]

    def _find(self, sample_id: int) -> tuple[int, int]:
        assert 0 <= sample_id < len(self), f"no sample {sample_id} of {len(self)}"
        place = int(np.searchsorted(self._first_ids, sample_id, side="right")) - 1
        return place, sample_id - int(self._first_ids[place])


def load_corpus(
    spec: JobSpec, inputs: Inputs, tokenizer: ChatTokenizer, on_progress: OnProgress = lambda done, total: None
) -> Corpus:
    """Reads every data file of the job. Progress counts bytes over all of them."""
    order = [part.dataset for part in spec.data.train]
    if isinstance(spec.data.validation, ValidationDataset):
        order.append(spec.data.validation.dataset)
    paths = {file.dataset: Path(file.path) for file in inputs.data}
    total = sum(paths[name].stat().st_size for name in set(order))
    sets: dict[str, MeasuredSet] = {}
    done = 0
    for name in dict.fromkeys(order):
        before = done

        def report(bytes_read: int, _size: int, before: int = before) -> None:
            on_progress(before + bytes_read, total)

        sets[name] = read_samples(paths[name], tokenizer, Reading.of(spec), report)
        done += paths[name].stat().st_size
    return Corpus(order, sets)
