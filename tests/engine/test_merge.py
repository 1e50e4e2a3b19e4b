"""`pegbox merge`: what comes out is a model that anyone opens, and it is what was trained."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import pegbox
from core.errors import UserError
from tests.engine import jobs, tiny
from worker.engine import merge as merging
from worker.engine.loss import logits_of
from worker.engine.merge import merge
from worker.engine.model import LanguageModel, relative_difference
from worker.engine.result import BrokenResult, as_trained, probe_of

NEW = (96, 97)
CASES = [
    ("llama", torch.float32, {}, ()),
    ("llama", torch.bfloat16, {"type": "qlora"}, ()),
    ("llama", torch.bfloat16, {"use_dora": True, "use_rslora": True}, NEW),
    ("gpt2", torch.float32, {"modules_to_save": ["wte"]}, ()),
    ("gemma2", torch.float32, {}, NEW),
    ("mixtral", torch.bfloat16, {}, ()),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    AutoTokenizer.from_pretrained(jobs.make_model(folder / "model")).save_pretrained(folder / "result")
    GenerationConfig(eos_token_id=[2, 0]).save_pretrained(folder / "result")
    return folder / "result"


def an_adapter(
    folder: Path, tokenizer: Path, family: str, dtype: torch.dtype, method: dict, new: tuple[int, ...]
) -> tuple[LanguageModel, Path, Path]:
    """A trained model, the folder of its adapter, that of its base."""
    changes = {"num_local_experts": 4, "num_experts_per_tok": 2} if family == "mixtral" else {}
    tiny.tiny_base(family, **changes).to(dtype).save_pretrained(folder / "base")
    spec = {"type": "lora", "rank": 4, **method}
    compute = {"dtype": "bf16" if dtype is torch.bfloat16 else "fp32"}
    model = tiny.load(folder / "base", new_token_ids=new, method=spec, compute=compute)
    optimizer = torch.optim.AdamW(model.trainable().values(), lr=0.05)
    tiny.gradients(model, tiny.step_of(tiny.some_samples()))
    optimizer.step()
    model.model.eval()
    model.model.save_pretrained(folder / "result", save_embedding_layers=False)
    shutil.copytree(tokenizer, folder / "result", dirs_exist_ok=True)
    return model, folder / "result", folder / "base"


@pytest.mark.parametrize(("family", "dtype", "method", "new"), CASES, ids=str)
def test_a_merged_model_is_the_base_with_its_adapter(
    tmp_path: Path, tokenizer: Path, family: str, dtype: torch.dtype, method: dict, new: tuple[int, ...]
) -> None:
    model, adapter, base = an_adapter(tmp_path, tokenizer, family, dtype, method, new)
    merged = merge(adapter, base, tmp_path / "merged")
    assert merged.dtype == dtype and merged.effect > 0.1
    assert merged.rounding < (merged.effect / 4 if dtype is torch.bfloat16 else 1e-5)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto", output_loading_info=True)
    assert not any(report.values()) and again.dtype == dtype
    assert again.config.vocab_size == (104 if new else tiny.VOCABULARY)
    is_tied = again.get_input_embeddings().weight is again.get_output_embeddings().weight
    assert is_tied == (family in ("gpt2", "gemma2")) == again.config.tie_word_embeddings
    if method.get("type") != "qlora":  # which was trained over other numbers than it is merged into
        probe = probe_of(model)
        apart = relative_difference(logits_of(model, probe), logits_of(as_trained(again, model), probe))
        assert apart < (merged.effect / 4 if dtype is torch.bfloat16 else 1e-5)
    assert again.generation_config.eos_token_id == [2, 0]
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    assert "vllm serve" in (tmp_path / "merged/README.md").read_text()


def test_a_merge_that_lost_the_adapter_leaves_nothing_behind(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, adapter, base = an_adapter(tmp_path, tokenizer, "llama", torch.bfloat16, {}, ())
    monkeypatch.setattr(merging, "_folded", lambda model, dtype, was_tied: model.unload())
    with pytest.raises(BrokenResult, match="logits are off"):
        merge(adapter, base, tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "result"}


def test_the_command_finds_adapter_and_base_in_a_jobs_directory(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, base = an_adapter(tmp_path / "job", tokenizer, "llama", torch.float32, {}, ())
    made = jobs.make_job(tmp_path / "other", base, jobs.make_data(tmp_path / "rows.jsonl"))
    shutil.copy(made / "inputs.json", tmp_path / "job")
    command = ["merge", str(tmp_path / "job"), "--out", str(tmp_path / "merged")]
    assert pegbox.main(command) == 0
    assert "merged into float32" in capsys.readouterr().out.replace("merging", "merged")
    assert (tmp_path / "merged/model.safetensors").is_file()
    assert pegbox.main(command) == 65 and "exists already" in capsys.readouterr().err
    assert pegbox.main(["merge", str(base), "--out", str(tmp_path / "new")]) == 65
    assert "there is no adapter" in capsys.readouterr().err
    config = tmp_path / "job/result/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "no/such model"}))
    assert pegbox.main(["merge", str(tmp_path / "job/result"), "--out", str(tmp_path / "new")]) == 65
    assert "no/such model" in capsys.readouterr().err


def test_out_is_never_overwritten(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="name a new folder"):
        merge(tmp_path, tmp_path, tmp_path)
