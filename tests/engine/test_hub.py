"""A hub's data set becomes a file of a known commit. There is no hub here: the library finds what it built earlier."""

import json
import shutil
from pathlib import Path

import datasets
import pytest

from core.errors import UserError
from core.hub import parse_hub_dataset
from tests.engine.test_data import TOKENIZER, conversation
from worker.engine.data import Reading, read_samples
from worker.engine.hub import fetch_hub_dataset
from worker.job_directory import InputFile

FIRST, SECOND = "1" * 40, "2" * 40


@pytest.fixture(autouse=True)
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The library's cache in a folder of ours, and no network."""
    cache = tmp_path / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return cache


def build(library: Path, commit: str, answers: list[str], config: str = "default") -> None:
    """What the library leaves of org/set at a commit."""
    rows = library.parent / "rows.jsonl"
    rows.write_text("".join(json.dumps(conversation(answer)) + "\n" for answer in answers))
    scratch = library.parent / "scratch"
    (built,) = {
        Path(file["filename"]).parent
        for file in datasets.load_dataset("json", data_files=str(rows), split="train", cache_dir=scratch).cache_files
    }
    place = library / "org___set" / config / "0.0.0" / commit
    shutil.copytree(built, place)
    (place / "json-train.arrow").rename(place / "set-train.arrow")
    info = json.loads((place / "dataset_info.json").read_text())
    info |= {"config_name": config, "dataset_name": "set", "builder_name": "set"}
    for split in info["splits"].values():
        split["dataset_name"] = "set"
    (place / "dataset_info.json").write_text(json.dumps(info))
    shutil.rmtree(scratch)


def fetch(name: str, folder: Path, commit: str | None = None) -> InputFile:
    wanted = parse_hub_dataset(name)
    assert wanted is not None
    return fetch_hub_dataset(name, wanted, folder, commit)


def refusal(name: str, folder: Path, commit: str | None = None) -> UserError:
    with pytest.raises(UserError) as caught:
        fetch(name, folder, commit)
    return caught.value


def test_a_data_set_is_a_file_of_a_commit_and_is_read_like_any_other(library: Path, tmp_path: Path) -> None:
    build(library, FIRST, ["one", "two", "three"])
    file = fetch("hf:org/set", tmp_path)
    assert (file.dataset, file.revision) == ("hf:org/set", FIRST)
    measured = read_samples(Path(file.path), TOKENIZER, Reading())
    assert (measured.profile.num_rows, measured.profile.format, len(measured.samples)) == (3, "messages", 3)
    assert [measured.samples.line(index) for index in range(3)] == [1, 2, 3]
    # The second job needs neither hub nor library.
    shutil.rmtree(library)
    assert fetch("hf:org/set", tmp_path, FIRST) == file
    assert fetch(f"hf:org/set@{FIRST}", tmp_path).path == file.path


def test_a_run_goes_on_with_the_commit_that_it_began_with(library: Path, tmp_path: Path) -> None:
    build(library, FIRST, ["one"])
    begun = fetch("hf:org/set", tmp_path)
    shutil.rmtree(library)
    build(library, SECOND, ["one", "two"])
    newest = fetch("hf:org/set", tmp_path)
    assert newest.revision == SECOND and newest.sha256 != begun.sha256
    assert fetch("hf:org/set", tmp_path, begun.revision) == begun
    shutil.rmtree(tmp_path / "hub")
    gone = refusal("hf:org/set", tmp_path, FIRST)
    assert gone.code == "hub.other_revision" and FIRST in gone.text() and SECOND in gone.text()


def test_what_cannot_be_had_says_why_and_what_to_do(library: Path, tmp_path: Path) -> None:
    nothing = refusal("hf:org/other", tmp_path)
    assert nothing.code == "hub.unreachable" and "hf:org/other is not on this machine" in nothing.text()
    build(library, FIRST, ["one"])
    split = refusal("hf:org/set:validation", tmp_path)
    assert split.code == "hub.unusable" and "validation" in split.text() and "train" in split.text()
    assert refusal("hf:org/set/french", tmp_path).code in ("hub.unusable", "hub.unreachable")
    assert not (tmp_path / "hub").exists()
