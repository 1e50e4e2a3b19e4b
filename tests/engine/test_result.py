"""A saved result is what was trained, or the job does not succeed."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft.tuners.lora import Linear
from safetensors.torch import load_file, save_file

from tests.engine import tiny
from worker.engine import result
from worker.engine.batches import Batch
from worker.engine.loss import logits_of
from worker.engine.model import LanguageModel, relative_difference
from worker.engine.result import BrokenResult, bring_to, end_of_turn, verify_model

VARIANTS = [
    {},
    {"use_rslora": True},
    {"use_dora": True},
    {"modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj", "down_proj"]},
]


def trained(folder: Path, **method: object) -> LanguageModel:
    """A model whose weights have moved."""
    model = tiny.load(folder, method={"type": "lora", "rank": 4, **method})
    optimizer = torch.optim.AdamW(model.trainable().values(), lr=0.05)
    tiny.gradients(model, tiny.step_of(tiny.some_samples()))
    optimizer.step()
    model.model.eval()
    return model


def verify_adapter(folder: Path, model: LanguageModel, base: Path, method: str = "lora") -> None:
    result.verify_adapter(folder, model, base, tiny.spec_of(method={"type": method}).method)


def batch() -> Batch:
    return tiny.step_of(tiny.some_samples()).batches[0]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("method", VARIANTS, ids=lambda method: next(iter(method), "plain"))
def test_merged_equals_applied(tmp_path: Path, family: str, method: dict) -> None:
    if family != "llama" and "target_modules" in method:
        method = {"target_modules": ["c_attn"] if family == "gpt2" else ["q_proj"]}
    folder = tiny.save_base(tmp_path / "base", family)
    model = trained(folder, **method)
    before = logits_of(tiny.load(folder, method={"type": "full"}), batch())
    applied = logits_of(model, batch())
    assert relative_difference(before, applied) > 1e-2, "the adapter does something"
    model.model.merge_adapter()
    merged = logits_of(model, batch())
    model.model.unmerge_adapter()
    assert relative_difference(applied, merged) < 1e-5
    model.model.save_pretrained(tmp_path / "result", save_embedding_layers=False)
    verify_adapter(tmp_path / "result", model, tmp_path / "base")
    torch.testing.assert_close(logits_of(model, batch()), applied, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", VARIANTS, ids=lambda method: next(iter(method), "plain"))
def test_over_a_bf16_base_each_layer_merges_in_fp32(
    tmp_path: Path, method: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.save_base(tmp_path / "base")
    model = tiny.load(folder, method={"type": "lora", "rank": 4, **method}, compute={"dtype": "bf16"})
    with torch.no_grad():
        for name, weight in model.trainable().items():
            if "lora_B" in name:
                weight.normal_(0, 0.3)
    model.model.eval()
    model.model.save_pretrained(tmp_path / "result", save_embedding_layers=False)
    verify_adapter(tmp_path / "result", model, folder)
    real = Linear.merge
    monkeypatch.setattr(Linear, "merge", lambda self: (real(self), self.base_layer.weight.mul_(1.01)))
    with pytest.raises(BrokenResult, match="merged, differs"):
        verify_adapter(tmp_path / "result", model, folder)


def change(folder: Path, name: str, edit: object) -> None:
    tensors = load_file(folder / name)
    edit(tensors)
    save_file(tensors, folder / name)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: t.pop(next(iter(t))), "only in memory"),
        (lambda t: t.update({"more": torch.zeros(1)}), "only on disk"),
        (lambda t: t.update({next(iter(t)): torch.zeros(1)}), "not what was trained"),
        (lambda t: next(iter(t.values())).view(-1)[0].fill_(float("nan")), "a number that is none"),
        (lambda t: next(iter(t.values())).mul_(1.5), "not what was trained"),
    ],
)
def test_an_adapter_that_is_not_what_was_trained_is_found(tmp_path: Path, edit: object, said: str) -> None:
    model = trained(tiny.save_base(tmp_path / "base"))
    model.model.save_pretrained(tmp_path / "result", save_embedding_layers=False)
    verify_adapter(tmp_path / "result", model, tmp_path / "base")
    change(tmp_path / "result", "adapter_model.safetensors", edit)
    with pytest.raises(BrokenResult, match=said):
        verify_adapter(tmp_path / "result", model, tmp_path / "base")


def test_an_adapter_that_changes_nothing_is_no_result(tmp_path: Path) -> None:
    model = tiny.load(tiny.save_base(tmp_path / "base"), method={"type": "lora", "rank": 4})
    model.model.eval()
    model.model.save_pretrained(tmp_path / "result", save_embedding_layers=False)
    with pytest.raises(BrokenResult, match="changes nothing"):
        verify_adapter(tmp_path / "result", model, tmp_path / "base")


def test_a_config_that_scales_otherwise_gives_other_logits(tmp_path: Path) -> None:
    model = trained(tiny.save_base(tmp_path / "base"))
    model.model.save_pretrained(tmp_path / "result", save_embedding_layers=False)
    config = tmp_path / "result/adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 32', '"lora_alpha": 64'))
    with pytest.raises(BrokenResult, match="read back differs"):
        verify_adapter(tmp_path / "result", model, tmp_path / "base")


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: t.pop("model.norm.weight"), "does not open whole"),
        (lambda t: t["model.norm.weight"].mul_(1.5), "not what was trained"),
        (lambda t: t["model.norm.weight"][0].fill_(float("inf")), "a number that is none"),
    ],
)
def test_a_model_that_is_not_what_was_trained_is_found(tmp_path: Path, edit: object, said: str) -> None:
    model = tiny.load(tiny.save_base(tmp_path / "base"), method={"type": "full"})
    model.model.eval()
    model.base.save_pretrained(tmp_path / "result")
    verify_model(tmp_path / "result", model)
    shutil.copytree(tmp_path / "result", tmp_path / "changed")
    change(tmp_path / "changed", "model.safetensors", edit)
    with pytest.raises(BrokenResult, match=said):
        verify_model(tmp_path / "changed", model)


def test_a_model_in_bf16_is_saved_as_it_came_and_verifies(tmp_path: Path) -> None:
    tiny.tiny_base().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = tiny.load(tmp_path / "base", method={"type": "full"}, compute={"dtype": "bf16"})
    assert model.base.dtype == torch.float32
    bring_to(torch.bfloat16, model.base)
    model.model.eval()
    model.base.save_pretrained(tmp_path / "result")
    verify_model(tmp_path / "result", model)
    assert {tensor.dtype for tensor in load_file(tmp_path / "result/model.safetensors").values()} == {torch.bfloat16}


TOKENIZER = SimpleNamespace(all_special_ids=[2], added_tokens_decoder={2: "<end>"})


def ending_with(*last: int) -> tiny.Given:
    samples = tiny.some_samples(len(last)).contents
    for (token_ids, _), token in zip(samples, last, strict=True):
        token_ids[-1] = token
    return tiny.Given(samples)


def test_the_end_of_turn_is_the_special_token_with_which_nearly_every_sample_ends() -> None:
    ids = range(12)
    assert end_of_turn(ending_with(*[2] * 11, 9), ids, TOKENIZER) == 2
    assert end_of_turn(ending_with(*[2] * 8, *[9] * 4), ids, TOKENIZER) is None
    assert end_of_turn(ending_with(*[9] * 12), ids, TOKENIZER) is None, "a full stop is no end of turn"
