"""From a folder to a model: vision models tuned on text, tokens that a model never saw, weights that really move."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from core.errors import UserError
from tests.engine import jobs, tiny
from worker.engine import result
from worker.engine.loading import auto_class, make_room_for, read_config
from worker.engine.model import LanguageModel
from worker.engine.probe import measure_leak

TEXT = {"vocab_size": tiny.VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2} | {
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512
}  # fmt: skip
SMALL = {"hidden_size": 16, "intermediate_size": 24}
ENCODER = {**SMALL, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
BLOCKS = {**SMALL, "depth": 1, "num_heads": 2, "out_hidden_size": 32, "patch_size": 8}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
QWEN_TOKENS = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 3, "vision_end_token_id": 4}
VISION: dict[str, dict] = {
    "gemma3": {
        "text_config": {"sliding_window": tiny.WINDOW, "query_pre_attn_scalar": 8},
        "vision_config": ENCODER,
        "mm_tokens_per_image": 4,
        "image_token_index": 5,
        "boi_token_index": 3,
        "eoi_token_index": 4,
    },
    "llava": {
        "text_config": {"model_type": "llama"},
        "vision_config": {**ENCODER, "model_type": "clip_vision_model", "projection_dim": 16},
        "image_token_index": 5,
    },
    "qwen2_5_vl": {"text_config": MROPE, "vision_config": {**BLOCKS, "fullatt_block_indexes": [0]}, **QWEN_TOKENS},
}


def save_vision(folder: Path, family: str, vocabulary: int = tiny.VOCABULARY, **changes: object) -> Path:
    """A random model with a tower, in bf16 as they come."""
    values = VISION[family]
    text = {**TEXT, "vocab_size": vocabulary, "eos_token_id": 0, **values["text_config"], **changes}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**values, "text_config": text})
    AutoModelForImageTextToText.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", VISION)
@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_of_a_vision_model_the_text_part_is_trained_and_the_tower_handed_out_as_it_came(
    tmp_path: Path, family: str, method: str
) -> None:
    folder = save_vision(tmp_path / "base", family)
    before = load_file(folder / "model.safetensors")
    model = tiny.load(folder, method={"type": method})
    assert model.computes_head_apart and model.attention == "flash" and model.warnings == []
    inside = {id(weight) for weight in model.base.get_decoder().parameters()}
    inside |= {id(weight) for weight in model.base.get_output_embeddings().parameters()}
    assert all(id(weight) in inside for weight in model.trainable().values())
    assert len(inside) < len(list(model.base.parameters())), "there is a tower"
    assert measure_leak(model, seed=1) == 0.0
    _, packed = tiny.gradients(tiny.moved(model), tiny.step_of(tiny.some_samples()))
    _, padded = tiny.gradients(model, tiny.step_of(tiny.some_samples(), "padded", 60, 4))
    assert tiny.difference(packed, padded) < 1e-5
    if method != "full":
        model.model.save_pretrained(tmp_path / "result", save_embedding_layers=False)
        result.verify_adapter(tmp_path / "result", model, folder, tiny.spec_of(method={"type": method}).method)
        return
    result.bring_to(torch.bfloat16, model.base)
    model.base.save_pretrained(tmp_path / "result")
    result.verify_model(tmp_path / "result", model)
    after = load_file(tmp_path / "result/model.safetensors")
    assert after.keys() == before.keys() and {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    tower = [name for name in before if "vis" in name or "projector" in name]
    assert tower and all(torch.equal(before[name], after[name]) for name in tower)
    assert not any(torch.equal(before[name], after[name]) for name in before if "mlp" in name and name not in tower)


def test_a_vision_model_keeps_its_class_and_a_text_model_of_its_family_does_not_grow_a_tower(tmp_path: Path) -> None:
    llava = read_config(save_vision(tmp_path / "llava", "llava"))
    assert auto_class(llava) is AutoModelForImageTextToText
    assert auto_class(tiny.tiny_config("gemma3_text")) is AutoModelForCausalLM
    assert auto_class(tiny.tiny_config("llama")) is AutoModelForCausalLM


def test_a_whole_job_on_a_vision_model_is_served_with_its_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    donor = jobs.make_model(tmp_path / "donor")
    folder = save_vision(tmp_path / "model", "llava", vocabulary=259)
    for file in donor.glob("*token*"):
        shutil.copy(file, folder / file.name)
    shutil.copy(donor / "chat_template.jinja", folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}')
    data = jobs.make_data(tmp_path / "rows.jsonl", 12)
    job = jobs.make_job(tmp_path / "job", folder, data, method={"type": "full"}, schedule={"max_steps": 2})
    assert jobs.run(job, monkeypatch) == 0, jobs.outcome_of(job).text
    (plan,) = jobs.events_of(job, "plan")
    assert 0 < plan["trainable_parameters"] < plan["total_parameters"]
    assert plan["weight_bytes"].keys() == {"float32", "bfloat16"}, "the tower lies in its own type"
    assert (job / "result/preprocessor_config.json").is_file()
    assert "AutoModelForImageTextToText" in (job / "result/README.md").read_text()
    config = json.loads((job / "result/config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"] and "vision_config" in config


# -- tokens that the model never saw -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "new", "rows"),
    # Of 96 rows 8 is the largest of the multiples that they are; of the last case the rows are there already.
    [("llama", (96, 97), 104), ("gemma2", (96, 97), 104), ("llama", (94, 95), 96)],
    ids=["untied", "tied", "rows to spare"],
)
@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_new_tokens_begin_at_the_mean_and_are_trained(
    tmp_path: Path, family: str, new: tuple[int, int], rows: int, method: str
) -> None:
    folder = tiny.save_base(tmp_path / "base", family)
    base = tiny.tiny_base(family)
    own = base.get_input_embeddings().weight.detach().clone()
    make_room_for(base, new)
    embedding = base.get_input_embeddings().weight
    assert embedding.shape[0] == base.get_output_embeddings().weight.shape[0] == rows
    assert torch.equal(embedding[: new[0]], own[: new[0]])
    torch.testing.assert_close(embedding[list(new)], own[: new[0]].mean(dim=0).expand(2, -1))

    model = tiny.load(folder, new_token_ids=new, method={"type": method})
    assert model.vocabulary == rows
    samples = tiny.some_samples()
    for token_ids, trained in samples.contents:
        token_ids[:2], token_ids[-1] = new, new[1]
        assert trained[-1]
    _, gradient = tiny.gradients(model, tiny.step_of(samples))
    trained = {name: grad for name, grad in gradient.items() if "token" in name or "lm_head" in name}
    assert len(trained) == (1 if family == "gemma2" else 2)
    for grad in trained.values():
        assert all(row.any() for row in (grad if method != "full" else grad[list(new)]))
    if method != "full":
        assert all(grad.shape[0] == 2 for grad in trained.values()), "the rows of the new tokens alone"
        tiny.moved(model)
        model.model.save_pretrained(tmp_path / "result", save_embedding_layers=False)
        result.verify_adapter(tmp_path / "result", model, folder, tiny.spec_of(method={"type": method}).method)
        again = tiny.load(
            folder, new_token_ids=new, method={"type": method}, model={"adapter": str(tmp_path / "result")}
        )
        assert all(torch.equal(weight, again.trainable()[name]) for name, weight in model.trainable().items())
        with pytest.raises(UserError, match="tokens that were added"):
            tiny.load(folder, method={"type": method}, model={"adapter": str(tmp_path / "result")})


def test_a_base_model_without_template_learns_where_its_turn_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """chatml on a tokenizer that has none of its marks: added, trained, saved, and written when a turn ends."""
    folder = jobs.make_model(tmp_path / "model", knows_chat=False)
    assert "<|im_end|>" not in AutoTokenizer.from_pretrained(folder).get_vocab()
    data = tmp_path / "rows.jsonl"
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
    data.write_text((json.dumps(row) + "\n") * 16)
    job = jobs.make_job(
        tmp_path / "job",
        folder,
        data,
        model={"chat_template": "chatml"},
        data={"train": [{"dataset": "given"}], "validation": None},
        method={"type": "lora", "rank": 8, "alpha": 16},
        schedule={"learning_rate": 0.02, "max_steps": 24},
        evaluation={"every_steps": 24, "sample_prompts": ["hi"]},
    )
    assert jobs.run(job, monkeypatch) == 0, jobs.outcome_of(job).text
    (sample,) = jobs.events_of(job, "sample")
    assert sample["text"] == "yo", "and nothing after it"
    tokenizer = AutoTokenizer.from_pretrained(job / "result")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    generation = json.loads((job / "result/generation_config.json").read_text())
    assert end == 258 and generation["eos_token_id"][0] == end
    assert tokenizer.chat_template and tokenizer.encode("<|im_end|>", add_special_tokens=False) == [end]
    assert "resize_token_embeddings(" in (job / "result/README.md").read_text()


# -- full: masters in fp32 ---------------------------------------------------------------------------------------------


def test_small_steps_move_weights_under_bf16_as_they_do_under_fp32(tmp_path: Path) -> None:
    """A base saved in bf16 and a learning rate of 1e-5, which is below half a unit in the last place of most weights."""
    tiny.tiny_base().to(torch.bfloat16).save_pretrained(tmp_path)
    step, num_steps, rate = tiny.step_of(tiny.some_samples()), 5, 1e-5

    def change(model: LanguageModel, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        optimizer = torch.optim.AdamW(weights.values(), lr=rate, weight_decay=0.0)
        for _ in range(num_steps):
            for weight, grad in zip(weights.values(), tiny.gradients(model, step)[1].values(), strict=True):
                weight.grad = grad.to(weight.dtype)
            optimizer.step()
        return torch.cat([(weight.detach() - before[name]).float().flatten() for name, weight in weights.items()])

    exact, masters = (
        change(model, model.trainable())
        for model in (
            tiny.load(tmp_path, method={"type": "full"}, compute={"dtype": dtype}) for dtype in ("fp32", "bf16")
        )
    )
    model = tiny.load(tmp_path, method={"type": "full"}, compute={"dtype": "bf16"})
    pure = change(model, {name: weight.detach().bfloat16() for name, weight in model.trainable().items()})
    assert float((pure != 0).float().mean()) < 0.5, "in bf16 alone most of them stand still"
    assert float(((masters != 0) == (exact != 0)).float().mean()) > 0.999, "with masters what has a gradient moves"
    assert float(masters.abs().mean() / exact.abs().mean()) == pytest.approx(1.0, abs=0.05)
    assert float(torch.nn.functional.cosine_similarity(masters, exact, dim=0)) > 0.9
