"""`pegbox train`'s directory: made, found again, refused when it is somebody else's."""

import json
from pathlib import Path

import pytest

from core.errors import UserError
from core.spec import JobSpec, parse_spec
from worker.by_hand import prepare_directory, read_spec_file
from worker.job_directory import Inputs, OutcomeFile, write_json


@pytest.fixture
def model_root(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "team" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return tmp_path / "models"


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a"}\n')
    return parse_spec({"model": {"base": "team/tiny"}, "data": {"train": [{"dataset": str(data)}]}})


def inputs_of(directory: Path) -> Inputs:
    return Inputs.model_validate_json((directory / "inputs.json").read_bytes())


def test_a_new_directory_holds_the_spec_and_where_everything_lies(
    spec: JobSpec, model_root: Path, tmp_path: Path
) -> None:
    prepared = prepare_directory(spec, tmp_path / "out", (model_root,), tmp_path / "cache", fresh=False)
    assert not prepared.is_finished
    inputs = inputs_of(prepared.directory)
    assert inputs.model_path == str(model_root / "team" / "tiny") and inputs.resume == ()
    assert len(inputs.data[0].sha256) == 64
    assert parse_spec(json.loads((prepared.directory / "spec.json").read_bytes())) == spec


def test_the_same_spec_goes_on_from_its_newest_checkpoint(spec: JobSpec, model_root: Path, tmp_path: Path) -> None:
    out = prepare_directory(spec, tmp_path / "out", (model_root,), tmp_path / "cache", fresh=False).directory
    for step in (9, 10, 100):
        (out / "checkpoints" / f"step-{step}").mkdir(parents=True)
    prepare_directory(spec, out, (model_root,), tmp_path / "cache", fresh=False)
    assert [Path(path).name for path in inputs_of(out).resume] == ["step-100", "step-10", "step-9"]


def test_another_spec_is_refused_and_fresh_starts_over(spec: JobSpec, model_root: Path, tmp_path: Path) -> None:
    out = prepare_directory(spec, tmp_path / "out", (model_root,), tmp_path / "cache", fresh=False).directory
    (out / "checkpoints" / "step-5").mkdir(parents=True)
    other = spec.model_copy(update={"seed": 7})
    with pytest.raises(UserError, match="begun with another spec"):
        prepare_directory(other, out, (model_root,), tmp_path / "cache", fresh=False)
    assert (out / "checkpoints" / "step-5").exists()
    prepare_directory(other, out, (model_root,), tmp_path / "cache", fresh=True)
    assert not (out / "checkpoints").exists()


def test_a_folder_of_somebody_else_is_left_alone(spec: JobSpec, model_root: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("precious")
    for fresh in (False, True):
        with pytest.raises(UserError, match="not a fine-tune's"):
            prepare_directory(spec, tmp_path / "thesis", (model_root,), tmp_path / "cache", fresh=fresh)
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "precious"


def test_a_finished_directory_is_found_finished(spec: JobSpec, model_root: Path, tmp_path: Path) -> None:
    out = prepare_directory(spec, tmp_path / "out", (model_root,), tmp_path / "cache", fresh=False).directory
    write_json(out / "outcome.json", OutcomeFile(code=0))
    assert not prepare_directory(spec, out, (model_root,), tmp_path / "cache", fresh=False).is_finished, (
        "there is no result"
    )
    write_json(out / "outcome.json", OutcomeFile(code=0))
    (out / "result").mkdir()
    assert prepare_directory(spec, out, (model_root,), tmp_path / "cache", fresh=False).is_finished


@pytest.mark.parametrize(
    ("update", "field", "words"),
    [
        ({"model": {"base": "team/huge"}}, "model.base", "team/huge"),
        ({"data": {"train": [{"dataset": "./none.jsonl"}]}}, "data.train", "no file ./none.jsonl"),
        ({"data": {"train": [{"dataset": "alpaca"}]}}, "data.train", "takes the path"),
    ],
)
def test_what_is_missing_is_named(
    spec: JobSpec, model_root: Path, tmp_path: Path, update: dict[str, object], field: str, words: str
) -> None:
    wrong = parse_spec({**spec.model_dump(mode="json"), **update})
    with pytest.raises(UserError, match=words) as caught:
        prepare_directory(wrong, tmp_path / "out", (model_root,), tmp_path / "cache", fresh=False)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", "not valid YAML"),
        ("a: &x [1]\nb: *x\n", "aliases are not allowed"),
        ("!!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        ("- 1\n", "a mapping of keys to values"),
        ("x" * 1_000_001, "1000001 characters"),
    ],
)
def test_a_spec_file_that_is_none_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        read_spec_file(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_spec_file(tmp_path / "none.yaml")


def test_yaml_11_numbers_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("data: {train: [{dataset: d}]}\nschedule: {learning_rate: 2e-4}\n")
    assert read_spec_file(path).schedule.learning_rate == 2e-4
