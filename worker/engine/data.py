"""Data files -> samples of token ids, each row accounted for.

Every row of a file becomes one sample or several, or is refused with its line and the reason; a row is never skipped
in silence. The same function, `read_samples`, measures a data set for the form (worker.engine.prepare) and reads it
for training, so what was previewed is what is trained.

A file is read in a stream: its first good rows decide the format and whether conversations stay whole, then all rows
go through the tokenizer in batches. While one batch is encoded, which is Rust's work and needs no lock of Python's, the
next is parsed and rendered. Samples go to files as they come (worker.engine.samples), 5 bytes a token, and what the
profile says of each to columns of numbers: no object is kept for a row, so a million of them fit into any memory.
What was tokenised once is opened again by its content (worker.engine.token_cache).
"""

import hashlib
import json
import tempfile
from array import array
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import cast

import numpy as np

from core.chat import (
    CallsSeen,
    ChatTokenizer,
    Drafts,
    Encoding,
    MultiTurn,
    Sample,
    TrainOn,
    choose_multi_turn,
    look_for_calls,
)
from core.conversation import FORMAT_ROWS, Format, Parsed, detect_format, parse_row
from core.errors import UserError
from core.profile import Column, DataProfile, RefusedRow
from core.rows import FileType, Row, detect_file, read_rows
from core.rows import RefusedRow as UnreadRow
from core.spec import JobSpec, ValidationDataset
from worker.engine.parquet import read_parquet
from worker.engine.samples import BoolArray, IntArray, MeasuredSet, SampleWriter, open_set
from worker.engine.token_cache import TokenCache, key_of
from worker.engine.tokenizer import HfChatTokenizer
from worker.job_directory import InputFile, Inputs

CHUNK_BYTES = 1 << 20
# Good rows that decide the format, whether `auto` keeps conversations whole, and whether the template writes calls. A
# later conversation whose history doesn't stand is split by itself and counted.
NUM_DECIDING_ROWS = FORMAT_ROWS
ROWS_PER_BATCH = 256  # enough to keep the Rust tokenizer's threads busy
MAX_REFUSED_LISTED = 1000
NUM_REASONS_TOLD = 3
# These end the reading: the next row would meet them too.
NOT_THE_ROWS_FAULT = frozenset({"chat.no_template", "chat.template_memory"})

Batch = Sequence[Row | UnreadRow]
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


def measure(
    file: InputFile,
    tokenizer: HfChatTokenizer,
    reading: Reading,
    on_progress: OnProgress = lambda done, total: None,
    *,
    cache: TokenCache | None,
    is_ahead: bool = True,
) -> MeasuredSet:
    """`read_samples` of a data file, or what the cache has of it."""
    path = Path(file.path)
    if cache is None:
        return read_samples(path, tokenizer, reading, on_progress, is_ahead=is_ahead)

    def make(folder: Path) -> None:
        write_samples(path, folder, tokenizer, reading, on_progress, is_ahead=is_ahead)

    found = cache.get(cache_key(file, tokenizer, reading), make)
    size = path.stat().st_size
    on_progress(size, size)
    return found


def cache_key(file: InputFile, tokenizer: HfChatTokenizer, reading: Reading) -> str:
    return key_of(file.sha256, tokenizer.fingerprint, reading.format, reading.train_on, reading.multi_turn)


def read_samples(
    path: Path,
    tokenizer: ChatTokenizer,
    reading: Reading,
    on_progress: OnProgress = lambda done, total: None,
    *,
    is_ahead: bool = True,
    only: Container[int] | None = None,
) -> MeasuredSet:
    """All samples of a file, with its profile, kept nowhere: their files go with them. `only`: those of the rows with
    these indices, read as all would be; the profile then counts no other row."""
    with tempfile.TemporaryDirectory(prefix="samples-") as folder:
        write_samples(path, Path(folder), tokenizer, reading, on_progress, is_ahead=is_ahead, only=only)
        return open_set(Path(folder))


def write_samples(
    path: Path,
    folder: Path,
    tokenizer: ChatTokenizer,
    reading: Reading,
    on_progress: OnProgress = lambda done, total: None,
    *,
    is_ahead: bool = True,
    only: Container[int] | None = None,
) -> None:
    """Writes a file's samples and its profile into an empty folder. Raises UserError data.* where no row of it can be
    used. `is_ahead`: a thread encodes while this one renders on. `only`: as in `read_samples`."""
    type = detect_file(_chunks(path, lambda done, total: None))
    rows = _rows(path, type, on_progress)
    deciding = list(_until_good(rows, NUM_DECIDING_ROWS))
    good = [row for row in deciding if isinstance(row, Row)]
    if deciding and not good:
        # Nothing that could decide: say why, rather than that no format fits.
        refused = [row for row in deciding if isinstance(row, UnreadRow)]
        raise _no_good_row(path, type, len(refused), [_refuse(row.line, row.error) for row in refused])
    format = cast(Format, reading.format) if reading.format != "auto" else detect_format(row.value for row in good)
    with SampleWriter(folder) as writer:
        builder = _Builder(writer, tokenizer, format, cast(TrainOn, reading.train_on))
        multi_turn, why = builder.choose_multi_turn(good, reading.multi_turn)
        builder.look_for_calls(good)
        taken = (row for row in chain(deciding, rows) if only is None or row.index in only)
        builder.add_all(_batches(taken, ROWS_PER_BATCH), multi_turn, is_ahead=is_ahead)
        if not builder.num_samples:
            raise _no_good_row(path, type, builder.num_rows, builder.refused)
        writer.finish(builder.profile(multi_turn, why))


def rows_of_file(path: Path, on_progress: OnProgress) -> Iterator[Row | UnreadRow]:
    return _rows(path, detect_file(_chunks(path, lambda done, total: None)), on_progress)


def _rows(path: Path, type: FileType, on_progress: OnProgress) -> Iterator[Row | UnreadRow]:
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
    """Takes rows in their order, writes their samples and keeps what DataProfile lists."""

    def __init__(self, writer: SampleWriter, tokenizer: ChatTokenizer, format: Format, train_on: TrainOn) -> None:
        self._writer = writer
        self._tokenizer = tokenizer
        self._format = format
        self._train_on = train_on
        self.num_rows = 0
        self.num_refused = 0
        self.num_fell_back = 0
        self.num_tokens_if_split = 0
        self.calls = CallsSeen(0, 0)
        self.refused: list[RefusedRow] = []
        self._sample_row = array("I")
        self._sample_length = array("I")
        self._sample_trained = array("I")
        self._sample_turns = array("I")
        self._sample_hash = array("Q")
        self._sample_runs = array("I")
        self._run_bounds = array("I")

    @property
    def num_samples(self) -> int:
        return len(self._sample_row)

    def choose_multi_turn(self, rows: Sequence[Row], asked: str) -> tuple[MultiTurn, str]:
        """Whole or split, and why."""
        if asked != "auto":
            return cast(MultiTurn, asked), "as the spec asks"
        choice = choose_multi_turn(self._conversations(rows), self._tokenizer)
        return choice.mode, choice.reason

    def look_for_calls(self, rows: Sequence[Row]) -> None:
        self.calls = look_for_calls(self._conversations(rows), self._tokenizer)

    def _conversations(self, rows: Sequence[Row]) -> Iterator[Parsed]:
        parsed = (self._parse(row) for row in rows)
        return (conversation for conversation in parsed if not isinstance(conversation, UserError))

    def add_all(self, batches: Iterable[Batch], multi_turn: MultiTurn, *, is_ahead: bool) -> None:
        if not is_ahead:
            for batch in batches:
                work = self._render(batch, multi_turn)
                self._add(work, self._tokenizer.encode_batch(work.drafts.texts))
            return
        with ThreadPoolExecutor(1, "encode") as encoder:
            waiting: tuple[_Work, Future[Sequence[Encoding]]] | None = None
            for batch in batches:
                work = self._render(batch, multi_turn)
                encoding = encoder.submit(self._tokenizer.encode_batch, work.drafts.texts)
                if waiting is not None:
                    self._add(waiting[0], waiting[1].result())
                waiting = work, encoding
            if waiting is not None:
                self._add(waiting[0], waiting[1].result())

    def _render(self, rows: Batch, multi_turn: MultiTurn) -> "_Work":
        parsed = [row.error if isinstance(row, UnreadRow) else self._parse(row) for row in rows]
        conversations = [conversation for conversation in parsed if not isinstance(conversation, UserError)]
        return _Work(
            rows,
            [conversation if isinstance(conversation, UserError) else None for conversation in parsed],
            Drafts(conversations, self._tokenizer, train_on=self._train_on, multi_turn=multi_turn),
        )

    def _add(self, work: "_Work", encodings: Sequence[Encoding]) -> None:
        built = iter(work.drafts.finish(encodings))
        taken: list[tuple[Sample, int]] = []
        for row, fault in zip(work.rows, work.faults, strict=True):
            samples = self._add_row(row, next(built) if fault is None else fault)
            taken += [(sample, row.line) for sample in samples]
        self._writer.write(taken)

    def _parse(self, row: Row) -> Parsed | UserError:
        try:
            return parse_row(row.value, self._format)
        except UserError as error:
            return error

    def _add_row(self, row: Row | UnreadRow, samples: list[Sample] | UserError) -> list[Sample]:
        """Counts a row; its samples, if it isn't refused."""
        self.num_rows += 1
        if isinstance(samples, UserError) and samples.code in NOT_THE_ROWS_FAULT:
            raise samples
        if not samples:
            samples = UserError("data.nothing_trained")
        if isinstance(samples, UserError):
            self.num_refused += 1
            if len(self.refused) < MAX_REFUSED_LISTED:
                self.refused.append(_refuse(row.line, samples))
            return []
        assert isinstance(row, Row)
        digest = int(hash_row(row.value), 16)
        self.num_fell_back += samples[0].fell_back
        for sample in samples:
            self.num_tokens_if_split += sample.num_tokens_if_split
            self._sample_row.append(row.index)
            self._sample_length.append(len(sample.token_ids))
            self._sample_trained.append(sample.num_trained)
            self._sample_turns.append(sample.num_turns)
            self._sample_hash.append(digest)
            self._sample_runs.append(len(sample.runs))
            for run in sample.runs:
                self._run_bounds.extend(run)
        return samples

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
            num_tokens_if_split=self.num_tokens_if_split,
            num_new_tokens=len(self._tokenizer.added_ids),
            num_with_calls=self.calls.num_conversations,
            num_calls_dropped=self.calls.num_dropped,
        )


@dataclass(frozen=True)
class _Work:
    """A batch whose conversations are rendered."""

    rows: Batch
    faults: list[UserError | None]  # of each row that didn't become a conversation
    drafts: Drafts


def _refuse(line: int, error: UserError) -> RefusedRow:
    return RefusedRow(line=line, code=error.code, text=error.text())


def _no_good_row(path: Path, type: FileType, num_rows: int, refused: Sequence[RefusedRow]) -> UserError:
    reasons = "; ".join(f"{type.row_word} {row.line}: {row.text}" for row in refused[:NUM_REASONS_TOLD])
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
    spec: JobSpec,
    inputs: Inputs,
    tokenizer: HfChatTokenizer,
    on_progress: OnProgress = lambda done, total: None,
) -> Corpus:
    """Reads every data file of the job, or opens what the cache has of it. Progress counts bytes over all files."""
    order = [part.dataset for part in spec.data.train]
    if isinstance(spec.data.validation, ValidationDataset):
        order.append(spec.data.validation.dataset)
    cache = TokenCache(Path(inputs.cache_dir)) if inputs.cache_dir else None
    files = {file.dataset: file for file in inputs.data}
    sizes = {name: Path(files[name].path).stat().st_size for name in dict.fromkeys(order)}
    sets: dict[str, MeasuredSet] = {}
    done = 0
    for name, size in sizes.items():

        def report(bytes_read: int, _size: int, before: int = done) -> None:
            on_progress(before + bytes_read, sum(sizes.values()))

        sets[name] = measure(files[name], tokenizer, Reading.of(spec), report, cache=cache)
        done += size
    return Corpus(order, sets)
