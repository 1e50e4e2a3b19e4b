"""Measured facts: of a data set read with a tokenizer, and of a model.

A worker measures them once (`worker.engine.prepare`, or the trainer on its way) and posts them to the web service,
which keeps them by content; form, preview and trainer then plan from the same numbers.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RefusedRow(Facts):
    line: int
    code: str
    text: str


class TokenPreview(Facts):
    """One sample as the model sees it: `pieces` are the tokens as text, `trained` marks those with a loss."""

    line: int
    pieces: tuple[str, ...]
    trained: tuple[bool, ...]
    num_hidden: int = 0  # tokens of a very long sample that follow and are not shown


class DataProfile(Facts):
    """A data set x tokenizer x template x mask policy. The sample lists run parallel, one entry a sample, in the
    order of the rows; lengths are whole, before any limit."""

    num_rows: int
    format: str
    multi_turn: Literal["whole", "split"]
    multi_turn_reason: str
    num_fell_back: int = 0  # conversations split although `whole` was asked
    num_refused: int
    refused: tuple[RefusedRow, ...]  # the first 1,000
    sample_row: list[int]  # index of its row in the file
    sample_length: list[int]  # tokens
    sample_trained: list[int]  # targets: tokens with a loss, the first token never counts
    sample_turns: list[int]
    sample_hash: list[str]  # of its row's content (16 hex digits): the same row is on the same side of the split
    preview: tuple[TokenPreview, ...] = ()


class ModelProfile(Facts):
    name: str
    content_hash: str  # sha256 over the names and bytes of its files; names a revision of a local model
    architecture: str
    num_parameters: int
    context_length: int  # tokens
    vocabulary: int
    dtype: str
    has_chat_template: bool
    bytes: int
