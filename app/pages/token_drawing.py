"""Samples as the model reads them, for a page: which tokens are trained, which are special, and what each one is.

A page holds twenty samples of thousands of tokens. So the first tokens of a sample are shown one by one, with their
ids, the next as runs of their kind, and the rest is counted."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from core.packing import as_lengths, best_fit
from core.profile import TokenPreview

MOST_WITH_IDS = 400  # tokens of a sample
MOST_TOKENS = 1500  # of a sample
NUM_OPEN = 3  # samples; the others are a click away
# Of a sample within a packed row, its ends:
HEAD_TOKENS, TAIL_TOKENS = 12, 8
WHOLE_TOKENS = 24  # one up to here is shown whole
MOST_TOLD = 5  # samples of a row; all are drawn


@dataclass(frozen=True)
class Run:
    """Neighbours of one kind."""

    text: str
    is_trained: bool
    is_special: bool
    title: str = ""  # ids and text of its tokens, where they are told


@dataclass(frozen=True)
class ShownSample:
    line: int
    runs: tuple[Run, ...]
    num_tokens: int
    num_trained: int
    num_hidden: int
    is_open: bool
    has_silent_turns: bool  # nothing is trained although a turn is: it is empty


def shown_samples(previews: Sequence[TokenPreview]) -> list[ShownSample]:
    return [_shown(sample, is_open=number < NUM_OPEN) for number, sample in enumerate(previews)]


def _shown(sample: TokenPreview, *, is_open: bool) -> ShownSample:
    return ShownSample(
        line=sample.line,
        runs=(*_single(sample, 0, MOST_WITH_IDS), *_grouped(sample, MOST_WITH_IDS, MOST_TOKENS)),
        num_tokens=sample.num_tokens,
        num_trained=_num_trained(sample),
        num_hidden=max(0, sample.num_tokens - MOST_TOKENS),
        is_open=is_open,
        has_silent_turns=bool(sample.num_turns),
    )


def _num_trained(sample: TokenPreview) -> int:
    return sum(sample.trained) if sample.num_trained is None else sample.num_trained


def _kinds(sample: TokenPreview, start: int, end: int) -> list[tuple[str, bool, bool, int | None]]:
    """Text, trained, special and id of the tokens from `start` to `end`; previews of before have no ids."""
    special = sample.special or (False,) * len(sample.pieces)
    ids = sample.ids or (None,) * len(sample.pieces)
    return list(zip(sample.pieces, sample.trained, special, ids, strict=True))[start:end]


def _single(sample: TokenPreview, start: int, end: int) -> Iterator[Run]:
    """Each token; the parts of a character, whose text stands with the last of them, together."""
    if not sample.ids:
        yield from _grouped(sample, start, end)
        return
    waiting: list[int | None] = []
    tokens = _kinds(sample, start, end)
    for number, (text, is_trained, is_special, token_id) in enumerate(tokens):
        waiting.append(token_id)
        is_last = number + 1 == len(tokens)
        if text or is_last or tokens[number + 1][1:3] != (is_trained, is_special):
            title = f"{' + '.join(map(str, waiting))}: {json.dumps(text, ensure_ascii=False)}"
            yield Run(text, is_trained, is_special, title)
            waiting = []


def _grouped(sample: TokenPreview, start: int, end: int) -> Iterator[Run]:
    for (is_trained, is_special), group in groupby(_kinds(sample, start, end), key=lambda token: token[1:3]):
        yield Run("".join(text for text, *_ in group), is_trained, is_special)


# -- as packed -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackedSample:
    """A sample in its row: it begins at place `start` of the row, and its own positions begin at 0."""

    line: int
    start: int
    length: int
    head: tuple[Run, ...]
    num_between: int
    tail: tuple[Run, ...]
    share: float  # of the row
    offset: float  # likewise


@dataclass(frozen=True)
class PackedRow:
    samples: tuple[PackedSample, ...]
    row_length: int
    num_free: int
    num_told: int = MOST_TOLD


def packed_row(previews: Sequence[TokenPreview], row_length: int) -> PackedRow | None:
    """Of the shown samples that are trained and fit, packed as a job packs all of them, the row with most of them.
    None where no two share a row."""
    fitting = [sample for sample in previews if _num_trained(sample) and sample.num_tokens <= row_length]
    packs = best_fit(as_lengths(sample.num_tokens for sample in fitting), row_length)
    fullest: list[int] = max((row.tolist() for row in packs), key=len, default=[])
    if len(fullest) < 2:
        return None
    samples = [fitting[place] for place in fullest]
    starts = [0]
    for sample in samples:
        starts.append(starts[-1] + sample.num_tokens)
    return PackedRow(
        samples=tuple(
            _packed(sample, start, row_length) for sample, (start, _) in zip(samples, pairwise(starts), strict=True)
        ),
        row_length=row_length,
        num_free=row_length - starts[-1],
    )


def _packed(sample: TokenPreview, start: int, row_length: int) -> PackedSample:
    length = sample.num_tokens
    head = length if length <= WHOLE_TOKENS else HEAD_TOKENS
    # The end of a very long sample is not in the preview.
    tail = 0 if sample.num_hidden or head == length else TAIL_TOKENS
    return PackedSample(
        line=sample.line,
        start=start,
        length=length,
        head=tuple(_grouped(sample, 0, head)),
        num_between=length - head - tail,
        tail=tuple(_grouped(sample, length - tail, length)),
        share=length / row_length,
        offset=start / row_length,
    )
