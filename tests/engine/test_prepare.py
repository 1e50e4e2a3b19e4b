"""Measuring happens in a child with limits: a hostile template ends with a sentence, a good file with its profile."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from core.chat import CHATML
from core.profile import DataProfile
from core.sampled import LEAST_ROWS, NUM_SAMPLED, spread_rows
from core.spec import parse_spec
from core.wire import ProfileProgress, ProfileResult
from tests.engine.test_data import TOKENIZER, conversation, write
from tests.engine.test_tokenizer import byte_level
from worker.engine.data import Reading, load_corpus, read_samples
from worker.engine.prepare import (
    MAX_PREVIEWED_TOKENS,
    MOST_UNTRAINED_PREVIEWED,
    NUM_PREVIEWED,
    death_of_child,
    preview,
)
from worker.engine.tokenizer import HfChatTokenizer
from worker.job_directory import (
    PREPARE_PROGRESS,
    PREPARE_SAMPLED,
    InputFile,
    Inputs,
    PrepareOrder,
    write_json,
)

REPOSITORY = Path(__file__).parents[2]


def order(tmp_path: Path, template: str, rows: list[object], **changes: str | int | None) -> ProfileResult:
    """What a worker gets back for these rows and a model with this template."""
    byte_level(chat_template=template).save_pretrained(tmp_path / "model")
    data = write(tmp_path / "rows.jsonl", rows)
    values = {"chat_template": None, "format": "auto", "train_on": "assistant", "multi_turn": "auto", **changes}
    written = PrepareOrder(
        model_path=str(tmp_path / "model"),
        model_name="tiny",
        data=InputFile(dataset="rows", path=str(data), sha256="0" * 64),
        cache_dir=str(tmp_path / "cache"),
        **values,
    )
    write_json(tmp_path / "order.json", written)
    result = tmp_path / "result.json"
    result.write_text("left by another run")
    command = [sys.executable, "-m", "worker.engine.prepare", str(tmp_path / "order.json"), str(result)]
    subprocess.run(command, cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    return ProfileResult.model_validate_json(result.read_bytes())


def text_of(profile: DataProfile, number: int = 0) -> str:
    return "".join(profile.preview[number].pieces)


def test_a_file_is_measured_and_previewed_as_the_model_sees_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[object] = [conversation("你好，世界 🦙", "第二个"), "{broken", conversation("short")]
    result = order(tmp_path, CHATML, rows)
    assert result.error == ""
    profile = result.profile
    assert profile is not None
    here = read_samples(tmp_path / "rows.jsonl", TOKENIZER, Reading()).profile
    for_the_form_alone = {"preview": (), "duplicates": None, "sample_group": None, "sample_sketches": None}
    assert profile.model_copy(update=for_the_form_alone) == here
    assert profile.duplicates is not None and profile.duplicates.num_groups == 0
    assert here.num_refused == 1
    assert [shown.line for shown in profile.preview] == [1, 3]
    assert text_of(profile).startswith(
        "<|im_start|>user\nquestion 0<|im_end|>\n<|im_start|>assistant\n你好，世界 🦙<|im_end|>"
    )
    shown = profile.preview[0]
    trained = "".join(piece for piece, is_trained in zip(shown.pieces, shown.trained, strict=True) if is_trained)
    assert trained == "你好，世界 🦙<|im_end|>第二个<|im_end|>"
    special = [piece for piece, is_special in zip(shown.pieces, shown.special, strict=True) if is_special]
    assert special == ["<|im_start|>", "<|im_end|>"] * 4
    assert "".join(TOKENIZER.tokenizer.convert_ids_to_tokens(shown.ids[:3])) == "<|im_start|>us"
    assert (shown.num_trained, shown.num_turns) == (sum(shown.trained), 2)
    assert not (tmp_path / PREPARE_SAMPLED).exists(), "it is a small file"

    # A trainer on this host opens what was made here, and tokenises nothing.
    monkeypatch.setattr(HfChatTokenizer, "encode_batch", None)
    file = InputFile(dataset="rows", path=str(tmp_path / "rows.jsonl"), sha256="0" * 64)
    inputs = Inputs(model_path="", model_name="", data=(file,), cache_dir=str(tmp_path / "cache"))
    spec = parse_spec({"data": {"train": [{"dataset": "rows"}], "validation": None}})
    corpus = load_corpus(spec, inputs, HfChatTokenizer.load(tmp_path / "model"))
    assert corpus.profiles["rows"] == here
    assert "".join(TOKENIZER.pieces(corpus.sample(0)[0].tolist())) == text_of(profile)


def test_of_a_large_file_a_sample_is_told_before_all_of_it(tmp_path: Path) -> None:
    rows: list[object] = [conversation(f"row {number} " + "long " * (number % 9)) for number in range(LEAST_ROWS)]
    rows[5] = "{broken"
    rows[4] = "{broken"  # which is row 1 of the sample
    result = order(tmp_path, CHATML, rows, num_rows=len(rows))
    exact = result.profile
    assert exact is not None and (exact.num_rows, exact.num_refused) == (LEAST_ROWS, 2)
    told = ProfileProgress.model_validate_json((tmp_path / PREPARE_SAMPLED).read_bytes())
    sampled = told.sampled
    assert sampled is not None and told.fraction == 0
    assert (sampled.num_rows, sampled.num_refused) == (NUM_SAMPLED, 1)
    # What is known of a row does not depend on which others are read.
    by_row = dict(zip(exact.sample_row, zip(exact.sample_hash, exact.sample_length, strict=True), strict=True))
    assert all(
        by_row[row] == facts
        for row, *facts_ in zip(sampled.sample_row, sampled.sample_hash, sampled.sample_length, strict=True)
        for facts in [tuple(facts_)]
    )
    assert set(sampled.sample_row) == {*spread_rows(LEAST_ROWS).tolist()} - {4}
    assert [shown.line for shown in sampled.preview[:3]] == [1, 9, 13]
    assert sampled.duplicates is None and exact.duplicates is not None
    progress = ProfileProgress.model_validate_json((tmp_path / PREPARE_PROGRESS).read_bytes())
    assert 0 < progress.fraction <= 1
    # What the cache holds needs no sample.
    (tmp_path / PREPARE_SAMPLED).unlink()
    again = order(tmp_path, CHATML, rows, num_rows=len(rows))
    assert again.profile == exact and not (tmp_path / PREPARE_SAMPLED).exists()


def test_a_sample_without_a_good_row_is_not_told(tmp_path: Path) -> None:
    rows: list[object] = [conversation("good") if number % 4 else "{broken" for number in range(LEAST_ROWS)]
    result = order(tmp_path, CHATML, rows, num_rows=len(rows))
    assert result.profile is not None and result.profile.num_refused == LEAST_ROWS // 4
    assert not (tmp_path / PREPARE_SAMPLED).exists()


@pytest.mark.parametrize(
    ("template", "code_says"),
    [
        # One operation of C that never comes back to Python.
        pytest.param("{{ (10 ** (10 ** 8)) % 7 }}", "takes too long", id="power"),
        # Constant, so that it is worked out when the template is compiled.
        pytest.param("{{ 'a' * 10**9 }}", "more than 512 MB of memory", id="constant"),
        pytest.param("{{ messages[0].content * 10**9 }}", "more than 512 MB of memory", id="text"),
    ],
)
def test_a_hostile_template_is_stopped_and_named(tmp_path: Path, template: str, code_says: str) -> None:
    result = order(tmp_path, template, [conversation("one")])
    assert result.profile is None
    assert code_says in result.error
    assert result.field == "model.chat_template"


def test_what_the_user_did_wrong_is_the_result(tmp_path: Path) -> None:
    result = order(tmp_path, CHATML, ["{"], chat_template="chatlm")
    assert (result.profile, result.field) == (None, "model.chat_template")
    assert "chatlm is not a built-in chat template" in result.error


def test_a_preview_shows_the_first_rows_by_their_longest_sample(tmp_path: Path) -> None:
    rows: list[object] = [conversation(f"first {number}", "second", "third") for number in range(NUM_PREVIEWED + 3)]
    measured = read_samples(write(tmp_path / "rows.jsonl", rows), TOKENIZER, Reading(multi_turn="split"))
    shown = preview(measured, TOKENIZER)
    assert [sample.line for sample in shown] == list(range(1, NUM_PREVIEWED + 1))
    assert all("first" in text and text.endswith("third<|im_end|>\n") for text in ("".join(s.pieces) for s in shown))
    assert all(sample.num_hidden == 0 for sample in shown)


def test_rows_in_which_nothing_is_trained_are_previewed_wherever_they_stand(tmp_path: Path) -> None:
    silent = conversation("question")
    silent["messages"][-1]["weight"] = 0
    rows: list[object] = [conversation(f"row {number}") for number in range(NUM_PREVIEWED + 40)]
    rows[NUM_PREVIEWED + 10 : NUM_PREVIEWED + 20] = [silent] * 10
    measured = read_samples(write(tmp_path / "rows.jsonl", rows), TOKENIZER, Reading())
    shown = preview(measured, TOKENIZER)
    behind = [NUM_PREVIEWED + 11 + number for number in range(MOST_UNTRAINED_PREVIEWED)]
    assert [sample.line for sample in shown] == [*range(1, NUM_PREVIEWED + 1), *behind]
    assert [(sample.num_trained, sample.num_turns) for sample in shown[NUM_PREVIEWED:]] == [(0, 0)] * len(behind)


def test_of_a_very_long_sample_the_preview_says_what_it_hides(tmp_path: Path) -> None:
    measured = read_samples(write(tmp_path / "rows.jsonl", [conversation("long " * 2000)]), TOKENIZER, Reading())
    (shown,) = preview(measured, TOKENIZER)
    assert len(shown.pieces) == len(shown.trained) == MAX_PREVIEWED_TOKENS
    assert shown.num_hidden == measured.profile.sample_length[0] - MAX_PREVIEWED_TOKENS > 0


@pytest.mark.parametrize(
    ("exit_code", "error_code"),
    [
        (-signal.SIGPROF, "chat.template_slow"),
        (-signal.SIGXCPU, "profile.slow"),
        (-signal.SIGKILL, "profile.memory"),
        (-signal.SIGABRT, "profile.memory"),
        (1, "profile.crashed"),
    ],
)
def test_each_death_of_the_child_has_its_sentence(exit_code: int, error_code: str) -> None:
    error = death_of_child(exit_code)
    assert error.code == error_code
    assert "{" not in error.text()


def test_limits_are_set_on_the_child_and_lifted_after_each_rendering() -> None:
    """In a process of its own: what a hard limit has once taken, nobody gets back."""
    program = """
import json, resource, signal
from worker.engine import prepare
prepare.limit_process()
outside = resource.getrlimit(resource.RLIMIT_AS)
with prepare.limited_rendering():
    inside = resource.getrlimit(resource.RLIMIT_AS), signal.getitimer(signal.ITIMER_PROF)[0]
after = resource.getrlimit(resource.RLIMIT_AS), signal.getitimer(signal.ITIMER_PROF)[0]
print(json.dumps([outside, inside, after, resource.getrlimit(resource.RLIMIT_CPU)]))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, check=True)
    outside, (inside, timer), (after, stopped), cpu = json.loads(done.stdout)
    assert 0 < inside[0] < outside[0] == outside[1] == inside[1]
    assert 0 < timer < 3
    assert (after, stopped) == (outside, 0)
    assert cpu[0] > 0
    assert resource.getrlimit(resource.RLIMIT_CPU)[0] != cpu[0]
