"""One step, many layouts: neither loss nor gradient may notice how its samples lie in memory."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from core import memory
from tests.engine import tiny

FAMILIES = list(tiny.FAMILIES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: tiny.save_base(root / family, family) for family in FAMILIES}


def reference(folder: Path, samples: tiny.Given) -> tuple[float, dict[str, torch.Tensor]]:
    """Each sample alone through transformers' eager attention and full logits: none of our code but the data."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    total = sum(samples.num_targets)
    loss = 0.0
    for token_ids, trained in samples.contents:
        ids = torch.from_numpy(token_ids.astype("int64"))[None]
        logits = model(input_ids=ids).logits[0, :-1]
        targets = ids[0, 1:].masked_fill(~torch.from_numpy(trained[1:]), -100)
        part = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / total
        part.backward()
        loss += float(part.detach())
    return loss, {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_step_equals_its_samples_alone(folders: dict[str, Path], family: str) -> None:
    samples = tiny.some_samples()
    step = tiny.step_of(samples)
    assert any(sum(length > 0 for length in batch.segments[0]) > 2 for batch in step.batches), (
        "rows hold several samples"
    )
    assert len(set(samples.num_targets)) > 3, "samples differ in their trained tokens"
    assert max(samples.lengths) > 3 * tiny.WINDOW, "a window is shorter than a sample"
    expected_loss, expected = reference(folders[family], samples)
    model = tiny.load(folders[family], method={"type": "full"})
    assert model.computes_head_apart and model.attention == "flash" and not model.warnings
    loss, gradient = tiny.gradients(model, step)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert tiny.difference(expected, gradient) < 1e-5


LAYOUTS = [
    ("packed", 60, 1),
    ("packed", 80, 2),
    ("packed", 80, 4),
    ("packed", 200, 1),
    ("padded", 60, 1),
    ("padded", 60, 4),
]


# transformers' sdpa has no soft cap; test_attention holds that it is refused for gemma2.
WAYS = [
    (family, attention)
    for family in ("llama", "qwen2", "mistral", "gemma2", "gpt2")
    for attention in ("flash", "sdpa", "eager")
    if (family, attention) != ("gemma2", "sdpa")
]


@pytest.mark.parametrize(("family", "attention"), WAYS)
def test_layouts_of_one_step_give_one_loss_and_one_gradient(
    folders: dict[str, Path], family: str, attention: str
) -> None:
    samples = tiny.some_samples()
    steps = [tiny.step_of(samples, *layout) for layout in LAYOUTS]
    slots = {layout: sum(batch.slots for batch in step.batches) for layout, step in zip(LAYOUTS, steps, strict=True)}
    assert slots["packed", 60, 1] == sum(samples.lengths), "a row alone has no pad"
    assert slots["padded", 60, 4] > 1.3 * slots["packed", 80, 4] > 1.3 * sum(samples.lengths), "both have pads here"
    model = tiny.load(folders[family], attention, method={"type": "full"})
    (first_loss, first), *others = (tiny.gradients(model, step) for step in steps)
    for loss, gradient in others:
        assert loss == pytest.approx(first_loss, rel=1e-5)
        assert tiny.norm(gradient) == pytest.approx(tiny.norm(first), rel=1e-5)
        assert tiny.difference(first, gradient) < 1e-5


def test_every_trained_token_weighs_the_same(folders: dict[str, Path]) -> None:
    samples = tiny.some_samples()
    model = tiny.load(folders["llama"], method={"type": "full"})
    loss, _ = tiny.gradients(model, tiny.step_of(samples, "padded", 60, 3))
    means = []
    for content in samples.contents:
        alone, _ = tiny.gradients(model, tiny.step_of(tiny.Given((content,))))
        means.append(alone)
    by_token = sum(mean * count for mean, count in zip(means, samples.num_targets, strict=True))
    assert loss == pytest.approx(by_token / sum(samples.num_targets), rel=1e-5)
    assert abs(loss - sum(means) / len(means)) > 1e-3, "the mean of means is another number here"


def test_chunks_of_the_loss_are_of_no_consequence(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    samples = tiny.some_samples()
    step = tiny.step_of(samples)
    model = tiny.load(folders["llama"], method={"type": "full"})
    whole_loss, whole = tiny.gradients(model, step)
    monkeypatch.setitem(memory.CHUNK_LOGITS_BYTES, "cpu", 4 * tiny.VOCABULARY * 5)
    assert memory.chunk_rows(tiny.VOCABULARY, on_gpu=False) == 5 < min(b.num_targets for b in step.batches)
    chunked_loss, chunked = tiny.gradients(model, step)
    assert chunked_loss == pytest.approx(whole_loss, rel=1e-6)
    assert tiny.difference(whole, chunked) < 1e-6


def test_gradient_checkpointing_changes_nothing(folders: dict[str, Path]) -> None:
    step = tiny.step_of(tiny.some_samples())
    plain = tiny.load(folders["mistral"], method={"type": "lora", "rank": 4})
    again = tiny.load(folders["mistral"], method={"type": "lora", "rank": 4}, compute={"gradient_checkpointing": True})
    assert any(getattr(module, "gradient_checkpointing", False) for module in again.base.modules())
    loss, gradient = tiny.gradients(plain, step)
    loss_again, gradient_again = tiny.gradients(again, step)
    assert loss_again == loss and tiny.difference(gradient, gradient_again) < 1e-6
    assert tiny.norm(gradient) > 0


def test_bf16_keeps_trained_weights_and_gradients_in_fp32(folders: dict[str, Path]) -> None:
    step = tiny.step_of(tiny.some_samples())
    exact, _ = tiny.gradients(tiny.load(folders["llama"], method={"type": "full"}), step)
    whole = {"type": "lora", "rank": 4, "modules_to_save": ["lm_head", "embed_tokens"]}
    for method in ({"type": "full"}, {"type": "lora", "rank": 4}, whole):
        model = tiny.load(folders["llama"], method=method, compute={"dtype": "bf16"})
        loss, gradient = tiny.gradients(model, step)
        assert loss != exact and loss == pytest.approx(exact, rel=2e-2)
        assert {part.dtype for part in gradient.values()} == {torch.float32}
        assert {weight.dtype for weight in model.trainable().values()} == {torch.float32}
