"""Whole runs of main(), from a job directory to its result."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.engine import jobs
from worker.engine import checkpoint
from worker.engine.batches import Batch
from worker.engine.learner import Replica
from worker.engine.records import SAMPLE_RECORD


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model: Path, data: Path) -> Path:
    """The run that nothing disturbed."""
    job = jobs.make_job(tmp_path_factory.mktemp("finished"), model, data)
    with pytest.MonkeyPatch.context() as patch:
        assert jobs.run(job, patch) == 0
    return job


def curve(job: Path) -> dict[int, tuple]:
    """What was computed, by step; where one stands twice, the last counts."""
    names = ("loss", "grad_norm", "learning_rate", "trained_tokens", "tokens", "slots", "epoch", "sample_hash")
    return {event["step"]: tuple(event[name] for name in names) for event in jobs.events_of(job, "step")}


def assert_equal_runs(first: Path, second: Path) -> None:
    assert curve(first) == curve(second)
    last = checkpoint.checkpoints_in(first / "checkpoints")[0]
    weights = load_file(last / checkpoint.WEIGHTS)
    others = load_file(second / "checkpoints" / last.name / checkpoint.WEIGHTS)
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    result = "adapter_model.safetensors"
    assert (first / "result" / result).read_bytes() == (second / "result" / result).read_bytes()
    evaluations = [
        {event["step"]: (event["eval_loss"], event["token_accuracy"]) for event in jobs.events_of(job, "eval")}
        for job in (first, second)
    ]
    assert evaluations[0] == evaluations[1]


# PEFT 0.21 asks transformers 5.23 by an old name.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_a_lora_run_tells_what_it_does_and_hands_out_an_adapter(finished: Path, model: Path) -> None:
    assert jobs.outcome_of(finished).code == 0
    told = jobs.events_of(finished)
    phases = list(dict.fromkeys(event["name"] for event in told if event["kind"] == "phase"))
    before = ["tokenise", "plan", "load_model", "probe", "longest_batch"]
    assert phases == [*before, "train", "save_checkpoint", "evaluate", "save_result"]
    (plan,) = jobs.events_of(finished, "plan")
    steps = jobs.events_of(finished, "step")
    assert [step["step"] for step in steps] == list(range(1, plan["total_steps"] + 1)) == [1, 2, 3, 4, 5, 6]
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert steps[0]["padding_efficiency"] == 1.0 > steps[0]["padded_efficiency"]
    assert [event["step"] for event in jobs.events_of(finished, "eval")] == [3, 6]
    assert told[-1]["kind"] == "end" and told[-1]["outcome"] == "succeeded" and told[-1]["steps"] == 6
    assert told[-1]["trained_tokens"] == sum(step["trained_tokens"] for step in steps)
    report = json.loads((finished / "report.json").read_bytes())
    assert report["plan"]["total_steps"] == report["measured"]["steps"] == 6 and report["outcome"]["code"] == 0
    assert report["plan"]["planned_peak_bytes"] == plan["planned_peak_bytes"] > 0
    assert report["measured"]["memory_peak_bytes"] == max(step["memory_peak_bytes"] for step in steps) > 0
    ((dataset, profile),) = [pair.values() for pair in json.loads((finished / "profiles.json").read_bytes())]
    assert dataset == "given" and profile["num_rows"] == 24

    result = finished / "result"
    base = AutoModelForCausalLM.from_pretrained(model)
    ids = torch.tensor([[5, 6, 7, 8]])
    before = base(input_ids=ids).logits
    adapted = PeftModel.from_pretrained(base, result)
    after = adapted(input_ids=ids).logits
    assert (before - after).abs().max() > 1e-3
    merged = adapted.merge_and_unload()(input_ids=ids).logits
    torch.testing.assert_close(merged, after, rtol=1e-5, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(result)
    assert tokenizer.chat_template
    ends = GenerationConfig.from_pretrained(result).eos_token_id
    assert ends == [tokenizer.convert_tokens_to_ids(jobs.END), 0], "the end of turn that was trained comes first"
    assert "tests/tiny" in (result / "README.md").read_text()
    assert json.loads((result / "adapter_config.json").read_bytes())["base_model_name_or_path"] == "tests/tiny"


def test_the_losses_of_each_samples_add_up_to_the_steps(finished: Path) -> None:
    records = np.fromfile(finished / "step_samples.bin", SAMPLE_RECORD)
    for step in jobs.events_of(finished, "step"):
        mine = records[records["step"] == step["step"]]
        assert len(mine) in (3, 4) and mine["targets"].sum() == step["trained_tokens"]
        assert mine["loss_sum"].sum() / step["trained_tokens"] == pytest.approx(step["loss"], rel=1e-5)


def test_a_full_run_hands_out_a_model(tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = jobs.make_job(
        tmp_path / "job", model, data, method={"type": "full"}, schedule={"learning_rate": 1e-3, "max_steps": 3}
    )
    assert jobs.run(job, monkeypatch) == 0
    (plan,) = jobs.events_of(job, "plan")
    assert plan["trainable_parameters"] == plan["total_parameters"]
    trained = load_file(job / "checkpoints/step-3" / checkpoint.WEIGHTS)
    saved = AutoModelForCausalLM.from_pretrained(job / "result").state_dict()
    assert all(torch.equal(saved[name], weight) for name, weight in trained.items())
    assert AutoTokenizer.from_pretrained(job / "result").chat_template
    assert "fine-tuned in full" in (job / "result/README.md").read_text()


def test_killed_at_several_steps_twice_in_a_row_it_ends_as_if_undisturbed(
    tmp_path: Path, model: Path, data: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs.make_job(tmp_path / "job", model, data)
    for step in (1, 4, 4, 6):
        with pytest.raises(jobs.Killed):
            jobs.run(job, monkeypatch, jobs.kill_before(step))
        assert not (job / "outcome.json").exists()
    assert jobs.run(job, monkeypatch) == 0
    made = [event["step"] for event in jobs.events_of(job, "step")]
    assert made == [1, 2, 3, 4, 5, 5, 6], "a step behind the newest checkpoint was made again"
    assert_equal_runs(finished, job)


def test_a_stop_is_obeyed_at_the_next_border_and_a_resume_goes_on_in_another_directory(
    tmp_path: Path, model: Path, data: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs.make_job(tmp_path / "a1", model, data)

    def stop(event: dict) -> None:
        if event["kind"] == "step" and event["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    assert jobs.run(job, monkeypatch, stop) == 75
    outcome = jobs.outcome_of(job)
    assert outcome.reason == "stopped" and "step 3" in outcome.text
    assert jobs.events_of(job)[-1]["outcome"] == "stopped"
    assert [event["step"] for event in jobs.events_of(job, "eval")] == [], (
        "the evaluation due here comes after the resume"
    )
    found = checkpoint.checkpoints_in(job / "checkpoints")
    assert [path.name for path in found] == ["step-3", "step-2"]
    second = jobs.make_job(tmp_path / "a2", model, data, resume=tuple(found))
    assert jobs.run(second, monkeypatch) == 0
    assert [event["step"] for event in jobs.events_of(second, "step")] == [4, 5, 6]
    with (second / "events.jsonl").open("rb") as events:
        assert b'"eval"' in events.read()
    whole = curve(finished)
    assert {**curve(job), **curve(second)} == whole
    assert [event["step"] for event in jobs.events_of(second, "eval")] == [3, 6]
    result = "result/adapter_model.safetensors"
    assert (second / result).read_bytes() == (finished / result).read_bytes()


@pytest.mark.parametrize("phase", ["tokenise", "load_model", "longest_batch", "save_result"])
def test_a_stop_outside_the_steps_is_obeyed_at_once(
    tmp_path: Path, model: Path, data: Path, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs.make_job(tmp_path / "job", model, data, schedule={"learning_rate": 0.01, "max_steps": 2})

    def stop(event: dict) -> None:
        if event["kind"] == "phase" and event["name"] == phase:
            os.kill(os.getpid(), signal.SIGTERM)

    assert jobs.run(job, monkeypatch, stop) == 75
    assert jobs.outcome_of(job).reason == "stopped" and not (job / "result").exists()
    assert not list(job.glob(".tmp-*"))
    steps_before = len(jobs.events_of(job, "step"))
    assert steps_before == (2 if phase == "save_result" else 0)
    assert jobs.run(job, monkeypatch) == 0
    assert len(jobs.events_of(job, "step")) == 2


def test_usr1_asks_for_a_checkpoint_at_the_next_border_and_the_run_goes_on(
    tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs.make_job(
        tmp_path / "job", model, data, checkpoint={"every_epoch": False, "keep_best": 0, "keep_last": 9}
    )

    def ask(event: dict) -> None:
        if event["kind"] == "step" and event["step"] == 4:
            os.kill(os.getpid(), signal.SIGUSR1)

    assert jobs.run(job, monkeypatch, ask) == 0
    assert [event["step"] for event in jobs.events_of(job, "checkpoint")] == [4, 6]


def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, model: Path, data: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs.make_job(tmp_path / "job", model, data)
    with pytest.raises(jobs.Killed):
        jobs.run(job, monkeypatch, jobs.kill_before(5))
    newest, older, *_ = checkpoint.checkpoints_in(job / "checkpoints")
    assert newest.name == "step-4"
    (newest / checkpoint.OPTIMIZER).write_bytes(b"half")
    assert jobs.run(job, monkeypatch) == 0
    (warning,) = jobs.events_of(job, "warning")
    assert warning["code"] == "checkpoint" and "step-4: optimizer.pt has 4 bytes" in warning["text"]
    assert [event["step"] for event in jobs.events_of(job, "step")][4:] == list(range(int(older.name[5:]) + 1, 7))
    assert_equal_runs(finished, job)


def test_a_finished_directory_answers_at_once(finished: Path) -> None:
    before = (finished / "events.jsonl").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        assert jobs.run(finished, patch) == 0
    assert (finished / "events.jsonl").read_bytes() == before


def test_a_loss_that_is_no_number_ends_the_run_and_saves_nothing_over_the_good_checkpoints(
    tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs.make_job(
        tmp_path / "job",
        model,
        data,
        schedule={"learning_rate": 9.0, "decay": "constant", "max_steps": 6},
        method={"type": "full"},
        optimizer={"max_grad_norm": None},
    )
    real = Replica.backward

    def poisoned(self: Replica, batch: Batch, num_targets: int, *, is_last: bool) -> torch.Tensor:
        losses = real(self, batch, num_targets, is_last=is_last)
        return losses * float("nan") if len(jobs.events_of(job, "step")) == 2 else losses

    monkeypatch.setattr(Replica, "backward", poisoned)
    assert jobs.run(job, monkeypatch) == 72
    steps = jobs.events_of(job, "step")
    assert [step["step"] for step in steps] == [1, 2, 3] and steps[-1]["loss"] is None
    (failure,) = jobs.events_of(job, "failure")
    assert failure["reason"] == "nan" and "step 3" in failure["text"] and "9" in failure["remedy"]
    (newest,) = checkpoint.checkpoints_in(job / "checkpoints")
    assert newest.name == "step-2" and checkpoint.verify(newest)


def test_out_of_memory_comes_before_the_first_step_with_numbers_to_change(
    tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs.make_job(tmp_path / "job", model, data, batch={"samples_per_step": 8, "micro_batch_size": 4})

    def allocate(*args: object, **named: object) -> None:
        torch.empty(1 << 60)

    monkeypatch.setattr(Replica, "backward", allocate)
    assert jobs.run(job, monkeypatch) == 71
    (failure,) = jobs.events_of(job, "failure")
    assert "longest_batch" in failure["text"] and not jobs.events_of(job, "step")
    assert "micro_batch_size 4 -> 2" in failure["remedy"] and "max_length 256 -> 128" in failure["remedy"]


@pytest.mark.parametrize(
    ("parts", "code", "said"),
    [
        ({"method": {"type": "lora", "target_modules": ["q_prj"]}}, 65, "q_proj"),
        ({"schedule": {"learning_rate": 1e-3, "epochs": 1, "warmup_steps": 50}}, 65, "warm-up of 50 steps"),
        ({"data": {"train": [{"dataset": "given"}], "max_length": 9999}}, 65, "512"),
        ({"data": {"train": [{"dataset": "given"}], "format": "alpaca"}}, 66, "instruction"),
    ],
)
def test_what_a_person_can_mend_is_said_with_its_own_exit_code(
    tmp_path: Path, model: Path, data: Path, parts: dict, code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs.make_job(tmp_path / "job", model, data, **parts)
    assert jobs.run(job, monkeypatch) == code
    outcome = jobs.outcome_of(job)
    assert outcome.code == code and said in outcome.text
    (failure,) = jobs.events_of(job, "failure")
    assert failure["text"] == outcome.text


def test_what_nobody_can_mend_is_internal_and_its_traceback_is_logged(
    tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from worker.engine import train as train_module

    def broken(*args: object) -> None:
        raise ZeroDivisionError("what now")

    monkeypatch.setattr(train_module, "lr_at", broken)
    job = jobs.make_job(tmp_path / "job", model, data)
    assert jobs.run(job, monkeypatch) == 70
    assert "ZeroDivisionError in the phase train: what now" in jobs.outcome_of(job).text
    assert "Traceback" in caplog.text


def test_tool_calls_that_the_template_leaves_out_are_warned_of(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = jobs.make_model(tmp_path / "model")
    written = (model / "chat_template.jinja").read_text()
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    rows = tmp_path / "rows.jsonl"
    rows.write_text(data.read_text() + json.dumps({"messages": [{"role": "user", "content": "1+2?"}, call]}) + "\n")
    plain = (
        "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
        "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    )
    told = {}
    for name, template in (("written", written), ("left out", plain)):
        (model / "chat_template.jinja").write_text(template)
        job = jobs.make_job(tmp_path / name, model, rows, schedule={"max_steps": 1}, evaluation={"every_steps": None})
        assert jobs.run(job, monkeypatch) == 0, jobs.outcome_of(job).text
        told[name] = [event["text"] for event in jobs.events_of(job, "warning") if event["code"] == "calls_dropped"]
    assert told["written"] == [] and "1 of the 1 conversations" in told["left out"][0]


def test_a_disk_without_room_is_a_warning_twice_and_then_the_end(
    tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **named: object) -> None:
        raise checkpoint.NoSpace("10 bytes are free, 1,000 are wanted")

    monkeypatch.setattr(checkpoint, "save", full)
    job = jobs.make_job(tmp_path / "job", model, data, evaluation={"every_steps": None, "per_epoch": None})
    assert jobs.run(job, monkeypatch) == 73
    assert [event["code"] for event in jobs.events_of(job, "warning")] == ["disk_full", "disk_full"]
    assert len(jobs.events_of(job, "step")) == 6, "steps 2, 4 and 6 had no room"
    assert "1,000 are wanted" in jobs.outcome_of(job).text


def test_a_run_that_gets_worse_stops_and_hands_out_its_best(
    tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs.make_job(
        tmp_path / "job",
        model,
        data,
        schedule={"learning_rate": 0.5, "decay": "constant", "max_steps": 30},
        evaluation={"every_steps": 1, "early_stopping_patience": 2},
        checkpoint={"every_epoch": False, "keep_last": 1},
    )
    assert jobs.run(job, monkeypatch) == 0
    losses = {event["step"]: event["eval_loss"] for event in jobs.events_of(job, "eval")}
    best = min(losses, key=losses.__getitem__)
    assert len(losses) == best + 2 < 30
    assert {path.name for path in checkpoint.checkpoints_in(job / "checkpoints")} == {
        f"step-{best}",
        f"step-{best + 2}",
    }
    (warning,) = jobs.events_of(job, "warning")
    assert f"step-{best}" in warning["text"]
    saved = load_file(job / "result/adapter_model.safetensors")
    kept = load_file(job / "checkpoints" / f"step-{best}" / checkpoint.WEIGHTS)
    assert all(torch.equal(saved[name.replace(".default", "")], weight) for name, weight in kept.items())


def test_sample_prompts_are_answered_at_each_evaluation(
    tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs.make_job(
        tmp_path / "job",
        model,
        data,
        schedule={"learning_rate": 0.03, "max_steps": 4},
        evaluation={"every_steps": 2, "sample_prompts": ["3 twice?", "4 twice?"]},
    )
    assert jobs.run(job, monkeypatch) == 0
    asked = [(event["step"], event["prompt"]) for event in jobs.events_of(job, "sample")]
    assert asked == [(step, prompt) for step in (2, 4) for prompt in ("3 twice?", "4 twice?")]


def test_the_same_steps_whatever_the_layout(
    tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    layouts = [
        {"packing": {"mode": "packed"}, "batch": {"samples_per_step": 8, "micro_batch_size": 1}},
        {"packing": {"mode": "packed", "row_length": 512}, "batch": {"samples_per_step": 8, "micro_batch_size": 2}},
        {"packing": {"mode": "padded"}, "batch": {"samples_per_step": 8, "micro_batch_size": 8}},
        {"packing": {"mode": "padded"}, "batch": {"samples_per_step": 8}, "compute": {"attention": "eager"}},
    ]
    method = {"type": "lora", "rank": 4}
    for number, layout in enumerate(layouts):
        job = jobs.make_job(tmp_path / str(number), model, data, method=method, **layout)
        assert jobs.run(job, monkeypatch) == 0
        runs.append(jobs.events_of(job, "step"))
    assert sum(step["slots"] for step in runs[2]) > 1.5 * sum(step["slots"] for step in runs[0])
    for other in runs[1:]:
        for mine, theirs in zip(runs[0], other, strict=True):
            assert mine["sample_hash"] == theirs["sample_hash"]
            assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-4)
            assert theirs["grad_norm"] == pytest.approx(mine["grad_norm"], rel=1e-3)


def test_a_model_that_leaks_runs_one_sample_a_row_and_says_so(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaky = jobs.make_model(tmp_path / "lfm2", "lfm2", layer_types=["conv", "full_attention"], conv_L_cache=3)
    method = {"type": "lora", "rank": 4}
    job = jobs.make_job(tmp_path / "samples", leaky, data, method=method)
    assert jobs.run(job, monkeypatch) == 0
    (warning,) = jobs.events_of(job, "warning")
    assert warning["code"] == "leak" and "rows an epoch" in warning["text"]
    assert [step["rows"] for step in jobs.events_of(job, "step")] == [4, 4, 4, 4, 3, 4], "as many as samples"
    job = jobs.make_job(tmp_path / "rows", leaky, data, method=method, batch={"rows_per_step": 2})
    assert jobs.run(job, monkeypatch) == 65
    assert "rows_per_step" in jobs.outcome_of(job).text


def test_a_longer_spec_goes_on_from_a_finished_jobs_checkpoint(
    tmp_path: Path, model: Path, data: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = checkpoint.checkpoints_in(finished / "checkpoints")[0]
    job = jobs.make_job(
        tmp_path / "more", model, data, resume=(newest,), schedule={"learning_rate": 0.01, "max_steps": 8}
    )
    assert jobs.run(job, monkeypatch) == 0
    assert [event["step"] for event in jobs.events_of(job, "step")] == [7, 8]
    other_seed = jobs.make_job(tmp_path / "seed", model, data, resume=(newest,), seed=8)
    assert jobs.run(other_seed, monkeypatch) == 65
    assert "other samples" in jobs.outcome_of(other_seed).text
    other_rank = jobs.make_job(tmp_path / "rank", model, data, resume=(newest,), method={"type": "lora", "rank": 2})
    assert jobs.run(other_rank, monkeypatch) == 65
    assert "4 x 32 there and 2 x 32 here" in jobs.outcome_of(other_rank).text


def test_a_process_of_its_own_is_kept_out_by_another_and_killed_for_good(
    tmp_path: Path, model: Path, data: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real thing once: `python -m`, kill -9 in the middle, a second trainer at the door."""
    job = jobs.make_job(tmp_path / "job", model, data)
    process = subprocess.Popen(
        [sys.executable, "-m", "worker.engine.train", str(job)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )

    def has_told(text: bytes) -> bool:
        log = job / "events.jsonl"
        return process.poll() is not None or (log.exists() and text in log.read_bytes())

    jobs.wait_until(lambda: has_told(b'"kind":"phase"'))
    assert jobs.run(job, monkeypatch) == 70, "one trainer a directory"
    jobs.wait_until(lambda: has_told(b'"kind":"step","step":3'))
    process.kill()
    stdout, _ = process.communicate()
    assert stdout == b""
    assert process.returncode == -signal.SIGKILL and not (job / "outcome.json").exists()
    assert jobs.run(job, monkeypatch) == 0
    assert_equal_runs(finished, job)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "mistral", "qwen2"])
@pytest.mark.parametrize("method", [{"type": "lora", "rank": 4}, {"type": "full"}], ids=lambda method: method["type"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_families_methods_and_precisions_reach_a_verified_result(
    tmp_path: Path, data: Path, family: str, method: dict, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"n_positions": 512} if family == "gpt2" else {}
    base = jobs.make_model(tmp_path / "base", family, **changes)
    job = jobs.make_job(
        tmp_path / "job",
        base,
        data,
        method=method,
        schedule={"learning_rate": 0.01, "max_steps": 2},
        compute={"dtype": dtype, "gradient_checkpointing": dtype == "bf16"},
    )
    assert jobs.run(job, monkeypatch) == 0, jobs.outcome_of(job).text
    assert not jobs.events_of(job, "warning")
    assert {path.name for path in (job / "result").iterdir()} >= {"README.md", "generation_config.json"}


def test_where_no_checkpoint_verifies_nothing_is_begun_anew_in_silence(
    tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs.make_job(tmp_path / "job", model, data)
    with pytest.raises(jobs.Killed):
        jobs.run(job, monkeypatch, jobs.kill_before(5))
    for path in checkpoint.checkpoints_in(job / "checkpoints"):
        (path / checkpoint.MANIFEST).write_text("{}")
    assert jobs.run(job, monkeypatch) == 70
    assert "no checkpoint verifies" in jobs.outcome_of(job).text and "start over" in jobs.outcome_of(job).text
