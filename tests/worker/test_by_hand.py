"""`pegbox train`'s directory: made, found again, refused when it is somebody else's."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from core.errors import UserError
from core.hub import HubDataset
from core.spec import JobSpec, parse_spec
from core.wire import ADAPTER_FILES
from tests.worker import script_trainer
from tests.worker.ledger import wait_until
from worker import by_hand
from worker.by_hand import own_devices, prepare_directory, read_spec_file, train_ranks
from worker.engine.hub import _place
from worker.gpus import GpuSample
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


def test_a_hubs_data_set_stays_at_the_commit_that_the_run_began_with(model_root: Path, tmp_path: Path) -> None:
    """Without a hub: what is of a known commit is found where the first start has put it."""
    first, second, cache = "1" * 40, "2" * 40, tmp_path / "cache"
    for commit in (first, second):
        kept = _place(cache, HubDataset("org/set", None, "test", None), commit)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(commit)
    name = f"hf:org/set:test@{first}"
    spec = parse_spec({"model": {"base": "team/tiny"}, "data": {"train": [{"dataset": name}]}})
    out = prepare_directory(spec, tmp_path / "out", (model_root,), cache, fresh=False).directory
    (file,) = inputs_of(out).data
    assert (file.dataset, file.revision, Path(file.path).read_text()) == (name, first, first)
    # As if the spec had named a branch, and the branch had been there.
    inputs = inputs_of(out)
    moved = inputs.model_copy(update={"data": (file.model_copy(update={"revision": second}),)})
    write_json(out / "inputs.json", moved)
    prepare_directory(spec, out, (model_root,), cache, fresh=False)
    assert inputs_of(out).data[0].revision == second


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
        ({"data": {"train": [{"dataset": "alpaca"}]}}, "data.train", "takes a path"),
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


def test_ranks_on_a_cpu_share_its_threads(
    spec: JobSpec, model_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    three = parse_spec({**spec.model_dump(mode="json"), "parallel": {"devices": 3}})
    out = prepare_directory(three, tmp_path / "out", (model_root,), tmp_path / "cache", fresh=False).directory
    inputs = inputs_of(out)
    assert (inputs.ranks, inputs.devices, inputs.threads) == (3, ("cpu0",), 2)
    assert inputs.cache_dir == str(tmp_path / "cache")
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    prepare_directory(three, out, (model_root,), tmp_path / "cache", fresh=False)
    assert inputs_of(out).threads == 4, "as torchrun has it: for each rank"


@pytest.fixture
def with_gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """This machine has none; NVML is the outermost edge."""

    def have(number: int) -> None:
        samples = tuple(GpuSample(index, 0.0, 0, 1, 40.0) for index in range(number))
        monkeypatch.setattr(by_hand, "sample_gpus", lambda: samples)

    return have


@pytest.mark.parametrize(
    ("visible", "num_ranks", "devices"),
    [
        (None, 1, ("gpu0",)),
        (None, 2, ("gpu0", "gpu1")),
        ("3,1", 2, ("gpu3", "gpu1")),
        ("GPU-aa, GPU-bb", 1, ("gpuGPU-aa",)),
        ("", 2, ("cpu0",)),
        ("-1", 2, ("cpu0",)),
    ],
)
def test_the_first_visible_gpus_are_taken(
    with_gpus: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    visible: str | None,
    num_ranks: int,
    devices: tuple[str, ...],
) -> None:
    with_gpus(4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert own_devices(num_ranks) == devices


def test_too_few_gpus_are_counted(with_gpus: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(UserError, match=r"asks for 3 GPUs and this machine has 2; set it to at most 2") as caught:
        own_devices(3)
    assert caught.value.field == "parallel.devices"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES names 1"):
        own_devices(2)


def test_an_adapter_is_a_folder_here(spec: JobSpec, model_root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    wanting = parse_spec({**spec.model_dump(mode="json"), "model": {"base": "team/tiny", "adapter": str(folder)}})
    with pytest.raises(UserError, match="there is no adapter in") as caught:
        prepare_directory(wanting, tmp_path / "out", (model_root,), tmp_path / "cache", fresh=False)
    assert caught.value.field == "model.adapter"
    folder.mkdir()
    for name in ADAPTER_FILES:
        (folder / name).write_bytes(b"")
    out = prepare_directory(wanting, tmp_path / "out", (model_root,), tmp_path / "cache", fresh=False).directory
    assert inputs_of(out).adapter_path == str(folder)


SCRIPT = (sys.executable, script_trainer.__file__)


def run_two_ranks(directory: Path, notes: str) -> None:
    directory.mkdir()
    (directory / "spec.json").write_text(json.dumps({"name": "a job", "notes": notes}))
    write_json(directory / "inputs.json", Inputs(model_path="", model_name="", data=(), ranks=2))


def test_ranks_by_hand_print_here_and_end_with_their_own_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_two_ranks(tmp_path / "out", "steps=5 who=1 at=2 then=exit:71")
    assert train_ranks(tmp_path / "out", SCRIPT) == 71, "torchrun itself ends with 1"
    printed = capsys.readouterr().err
    assert "rank 0 begins\n" in printed and "[rank 1] rank 1 begins\n" in printed
    assert "ChildFailedError" not in printed


def test_ctrl_c_reaches_the_ranks_and_nothing_is_left(tmp_path: Path) -> None:
    """From a process of its own, as a terminal's Ctrl-C does."""
    run_two_ranks(tmp_path / "out", "steps=100000")
    code = (
        "import sys; from pathlib import Path; from worker.by_hand import train_ranks;"
        "sys.exit(train_ranks(Path(sys.argv[1]), tuple(sys.argv[2:])))"
    )
    argv = [sys.executable, "-c", code, str(tmp_path / "out"), *SCRIPT]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        pids = [int(wait_until(lambda name=name: read(tmp_path / "out" / name))) for name in ("pid-0", "pid-1")]
        process.send_signal(signal.SIGUSR1)
        wait_until(lambda: (tmp_path / "out" / "rank-1.log").read_text().count("saves") == 1)
        os.killpg(process.pid, signal.SIGINT)
        _, printed = process.communicate(timeout=60)
    assert process.returncode == 75
    assert printed.count("rank 0 saves") == 2 and printed.count("[rank 1] rank 1 saves") == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_ranks_by_hand_die_with_their_caller(tmp_path: Path) -> None:
    run_two_ranks(tmp_path / "out", "steps=100000")
    code = f"from pathlib import Path; from worker.by_hand import train_ranks; train_ranks(Path({str(tmp_path / 'out')!r}), {SCRIPT!r})"
    with subprocess.Popen([sys.executable, "-c", code], start_new_session=True) as process:
        pids = [int(wait_until(lambda name=name: read(tmp_path / "out" / name))) for name in ("pid-0", "pid-1")]
        process.kill()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""
