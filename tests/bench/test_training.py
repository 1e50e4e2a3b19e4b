"""The benches that train, at toy size and without peers: that they run, and that their figures are of what ran."""

import json
from pathlib import Path
from types import ModuleType

import pytest

from bench import throughput
from bench.gpu import memory, mfu, packing, rig
from bench.gpu import throughput as gpu_throughput
from bench.measure import ONE_THREAD, ChildFailed, run_child
from bench.training import Talk, read_talks, write_messages
from tests.engine.jobs import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Alpaca rows of unequal length: some too long, one that is no row, one with tools."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows: list[dict[str, object]] = [
        {"instruction": "again " * (1 + number % 7), "output": "so " * (1 + number % 5)} for number in range(12)
    ]
    rows += [{"instruction": "x" * 300, "output": "y"}, {"instruction": 7, "output": "y"}]
    rows += [{"instruction": "call", "output": "done", "tools": [{"name": "f", "parameters": {}}]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_conversations_that_the_two_would_read_differently_are_left_out_and_counted(model: Path, data: Path) -> None:
    talks = read_talks(data, model, max_length=200)
    assert len(talks.kept) == 12
    assert talks.left_out == {"not readable": 1, "with tools": 1, "above 200 tokens": 1}
    assert len({talk.length for talk in talks.kept}) > 1 and all(0 < talk.trained < talk.length for talk in talks.kept)


def test_ours_is_trained_whole_and_its_figures_are_of_its_steps(
    model: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**ONE_THREAD, "CUDA_VISIBLE_DEVICES": ""}.items():  # the bench sets them; undone afterwards
        monkeypatch.setenv(name, value)
    size = ["--max-length", "200", "--samples-per-step", "8", "--pairs", "1", "--without-peers", "--without-mixes"]
    throughput.main(["--data", str(data), "--model", str(model), *size])
    printed = capsys.readouterr().out
    talks = read_talks(data, model, max_length=200).kept[:8]
    (row,) = (line for line in printed.splitlines() if line.startswith("| Pegbox, packed | 1 "))
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    # One step of eight samples, packed: a slot for each token and none more.
    assert cells[2] == f"{sum(talk.length for talk in talks):,}"
    assert cells[3] == f"{sum(talk.trained for talk in talks):,}"
    assert float(cells[8]) > 0  # from the start of the process to its end


def test_a_mix_is_whole_steps_of_the_lengths_that_it_is_named_for() -> None:
    talks = [Talk((), length, 1) for length in range(10, 310)]
    sets = throughput.mixes(talks, samples_per_step=8, tokens=4000)
    assert all(len(part) % 8 == 0 and part for part in sets.values())
    assert max(talk.length for talk in sets["short"]) < min(talk.length for talk in sets["long"])
    lengths = {talk.length for talk in sets["mixed"]}
    assert min(lengths) < 110 and max(lengths) >= 210


@pytest.mark.parametrize("bench", [memory, mfu, packing, gpu_throughput], ids=lambda bench: bench.__name__)
def test_without_a_gpu_a_gpu_bench_says_so_in_one_line(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"^this bench needs an NVIDIA GPU[^\n]*$"):
        rig.run_bench(bench.__doc__, lambda *_: pytest.fail("it measured"), [], bench.add_options)


def test_joined_dialogues_have_the_length_that_they_are_said_to_have(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rig, "demo_model", lambda: model)
    talks = rig.long_talks(rig.Rig("cuda", tmp_path, steps=1), 12, 4000)
    assert len({talk.length for talk in talks}) > 6 and max(talk.length for talk in talks) <= 4000
    assert any(sum(message["role"] == "user" for message in talk.messages) > 6 for talk in talks)
    write_messages(talks, tmp_path / "talks.jsonl")
    again = read_talks(tmp_path / "talks.jsonl", model, 4000).kept
    assert [(talk.length, talk.trained) for talk in again] == [(talk.length, talk.trained) for talk in talks]


def test_a_child_that_fails_tells_what_it_printed_last(tmp_path: Path) -> None:
    with pytest.raises(ChildFailed, match="no such thing"):
        run_child(["sh", "-c", "echo no such thing; exit 3"], {}, tmp_path / "log.txt")
