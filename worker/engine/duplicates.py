"""What a data file says twice, word for word or nearly, and what of it can be compared with other files.

It is measured for the form alone, once the samples are there, in a reading of the file of its own: a training has no
use for it and does not wait for it. Equal rows are told by the hash that every sample carries. Of the others the words
of the conversation count, not those of a system prompt or a list of tools, which whole data sets share.

Memory is 256 bytes a row for the signatures, and about twice that while they are compared: a million rows need 0.7 GB.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from core.conversation import Conversation, Format, Parsed, PromptCompletion, RawText, parse_row
from core.duplicates import NUM_PERMUTATIONS, BoolArray, Signatures, group, sign, similarity, sketch
from core.profile import AlikeRow, AlikeRows, Column, DataProfile, Duplicates
from core.rows import Row
from worker.engine.data import OnProgress, rows_of_file
from worker.engine.samples import MeasuredSet

ROWS_PER_BATCH = 1024
MOST_GROUPS_LISTED = 50
MOST_ROWS_LISTED = 10  # of a group

IntArray = npt.NDArray[np.int64]


def with_duplicates(
    measured: MeasuredSet, path: Path, on_progress: OnProgress = lambda done, total: None
) -> DataProfile:
    """The profile of the file's samples, and which of its rows are alike."""
    rows = _Rows.of(measured)
    signatures, has_words = _sign(rows, path, cast(Format, measured.profile.format), on_progress)
    first = group(signatures, has_words)
    numbers = _number_groups(first)
    of_sample = rows.distinct[rows.of_sample]
    return measured.profile.model_copy(
        update={
            "duplicates": _count(rows, signatures, first),
            "sample_group": Column(numbers[of_sample].astype(np.uint64).data),
            "sample_sketches": Column(sketch(signatures, has_words)[of_sample].reshape(-1).data),
        }
    )


@dataclass(frozen=True, eq=False)
class _Rows:
    """The rows that gave a sample, in the order of the file. Those of equal content have the same number in
    `distinct`; numbers count up in the order in which contents come first."""

    indices: IntArray  # in the file
    lines: IntArray
    distinct: IntArray
    first_of: IntArray  # for each content the row that has it first
    of_sample: IntArray

    @classmethod
    def of(cls, measured: MeasuredSet) -> "_Rows":
        profile = measured.profile
        indices, first, of_sample = np.unique(
            np.asarray(profile.sample_row.numbers), return_index=True, return_inverse=True
        )
        hashes = np.asarray(profile.sample_hash.numbers)[first]
        _, first_of, place = np.unique(hashes, return_index=True, return_inverse=True)
        order = np.argsort(first_of)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        lines = np.array([measured.samples.line(index) for index in first.tolist()], np.int64)
        return cls(indices.astype(np.int64), lines, rank[place], first_of[order], of_sample)


def _sign(rows: _Rows, path: Path, format: Format, on_progress: OnProgress) -> tuple[Signatures, BoolArray]:
    """Of each distinct content."""
    signatures, has_words = bytearray(), bytearray()  # which grow in place
    for texts in _batches(rows, path, format, on_progress):
        signed, have_words = sign(texts)
        signatures += signed.tobytes()
        has_words += have_words.tobytes()
    return np.frombuffer(signatures, np.uint16).reshape(-1, NUM_PERMUTATIONS), np.frombuffer(has_words, np.bool_)


def _batches(rows: _Rows, path: Path, format: Format, on_progress: OnProgress) -> Iterator[list[str]]:
    """The words of each content, from the row that has it first."""
    wanted = iter(rows.indices[rows.first_of].tolist())
    index = next(wanted, None)
    batch: list[str] = []
    for row in rows_of_file(path, on_progress):
        if row.index != index:
            continue
        assert isinstance(row, Row), "it gave a sample"
        batch.append(words_of(parse_row(row.value, format)))
        if len(batch) == ROWS_PER_BATCH:
            yield batch
            batch = []
        index = next(wanted, None)
    assert index is None, "the file is the one that was measured"
    yield batch


def words_of(row: Parsed) -> str:
    match row:
        case RawText(text):
            return text
        case PromptCompletion(prompt, completion):
            return f"{prompt}\n{completion}"
        case Conversation(messages):
            return "\n".join(
                part
                for message in messages
                if message.role != "system"
                for part in (
                    message.reasoning_content or "",
                    message.content,
                    *(_words_of_call(call.name, call.arguments) for call in message.tool_calls),
                )
            )


def _words_of_call(name: str, arguments: dict[str, object] | str) -> str:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False, sort_keys=True)
    return f"{name} {text}"


def _number_groups(first: IntArray) -> IntArray:
    """From 1, in the order of their first text; 0 for what is alone."""
    sizes = np.bincount(first, minlength=len(first))
    heads = np.flatnonzero(sizes > 1)
    numbers = np.zeros(len(first), np.int64)
    numbers[heads] = np.arange(1, len(heads) + 1)
    return numbers[first]


def _count(rows: _Rows, signatures: Signatures, first: IntArray) -> Duplicates:
    head = first[rows.distinct]  # of each row, the content that its group begins with
    sizes = np.bincount(head, minlength=len(first))
    heads = np.flatnonzero(sizes > 1)
    order = np.argsort(head, kind="stable")
    begins = np.cumsum(sizes) - sizes
    listed = [order[begins[each] : begins[each] + sizes[each]] for each in heads[:MOST_GROUPS_LISTED].tolist()]
    num_equal = len(rows.distinct) - len(first)
    return Duplicates(
        num_equal=num_equal,
        num_alike=int((first != np.arange(len(first))).sum()),
        num_groups=len(heads),
        groups=tuple(AlikeRows(rows=_list(members, rows, signatures), num_rows=len(members)) for members in listed),
    )


def _list(members: IntArray, rows: _Rows, signatures: Signatures) -> tuple[AlikeRow, ...]:
    shown = members[:MOST_ROWS_LISTED]
    contents = rows.distinct[shown]
    alike: Sequence[float] = similarity(signatures[contents], signatures[contents[:1]]).tolist()
    return tuple(
        AlikeRow(line=line, similarity=round(share, 3), is_equal=content == contents[0])
        for line, share, content in zip(rows.lines[shown].tolist(), alike, contents.tolist(), strict=True)
    )
