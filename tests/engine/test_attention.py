import itertools
from collections.abc import Callable
from dataclasses import replace
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from core.errors import UserError
from tests.engine import tiny
from worker.engine import attention
from worker.engine.attention import UnsupportedAttention, flexible_attention, segmented_attention
from worker.engine.batches import Batch
from worker.engine.model import LanguageModel, quiet_libraries
from worker.engine.segments import Segments

MODULE = SimpleNamespace(is_causal=True)


def cut(*rows: tuple[int, ...]) -> Segments:
    return Segments(rows, torch.device("cpu"))


def heads(length: int, num_heads: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, num_heads, length, 8, generator=torch.Generator().manual_seed(seed))


def by_hand(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    scaling: float = 8**-0.5,
) -> torch.Tensor:
    """One position at a time, over what it may see."""
    repeats = query.shape[1] // key.shape[1]
    out = torch.empty_like(query)
    for head in range(query.shape[1]):
        for position in range(query.shape[2]):
            first = 0 if window is None else max(0, position - window + 1)
            scores = key[0, head // repeats, first : position + 1] @ query[0, head, position] * scaling
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat((scores, sinks[head : head + 1]))
            weights = scores.softmax(0)[: position + 1 - first]
            out[0, head, position] = weights @ value[0, head // repeats, first : position + 1]
    return out.transpose(1, 2)


@pytest.mark.parametrize("window", [None, 1, 5, 16, 100])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # it is compiled on CUDA alone
def test_each_segment_is_what_a_position_by_position_sum_gives(
    window: int | None, softcap: float | None, with_sinks: bool
) -> None:
    lengths = (17, 1, 33, 5)
    query, key, value = heads(56), heads(56, 2, seed=1), heads(56, 2, seed=2)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0]) if with_sinks else None
    asked = {"sliding_window": window, "softcap": softcap, "s_aux": sinks}
    outputs = [
        attend(MODULE, query, key, value, None, segments=cut(lengths), **asked)[0]
        for attend in (segmented_attention, flexible_attention)
    ]
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        expected = by_hand(query[:, :, part], key[:, :, part], value[:, :, part], window, softcap, sinks)
        for out in outputs:
            torch.testing.assert_close(out[:, part], expected, rtol=1e-5, atol=1e-6)
        start += length


@pytest.mark.parametrize("window", [None, 3])
def test_rows_of_a_batch_and_equal_segments_make_no_difference(window: int | None) -> None:
    query, key, value = (heads(30, count, seed=seed).expand(2, -1, -1, -1) for count, seed in ((4, 0), (2, 1), (2, 2)))
    assert cut((10, 10, 10), (10, 10, 10)).are_equal and not cut((10, 10, 10), (10, 20)).are_equal

    def out(*rows: tuple[int, ...]) -> torch.Tensor:
        return segmented_attention(MODULE, query, key, value, None, segments=cut(*rows), sliding_window=window)[0]

    equal, unequal = out((10, 10, 10), (10, 10, 10)), out((10, 10, 10), (10, 20))
    torch.testing.assert_close(equal[0], equal[1], rtol=0, atol=0)
    torch.testing.assert_close(equal[0], unequal[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(equal[1, :10], unequal[1, :10], rtol=1e-5, atol=1e-6)
    assert (equal[1, 20:] - unequal[1, 20:]).abs().max() > 1e-3, "here they see more"


@pytest.mark.parametrize(
    "asked",
    [{"position_bias": torch.zeros(1)}, {"alibi": torch.zeros(1)}, {"is_causal": False}, {"segments": None}],
)
def test_what_it_does_not_compute_it_refuses(asked: dict) -> None:
    query = heads(4)
    with pytest.raises(UnsupportedAttention):
        segmented_attention(MODULE, query, query, query, None, **{"segments": cut((4,)), **asked})
    with pytest.raises(UnsupportedAttention):
        segmented_attention(MODULE, query, query, query, torch.zeros(1, 1, 4, 4), segments=cut((4,)))


def test_what_is_without_effect_is_accepted() -> None:
    query = heads(4)
    out, _ = segmented_attention(
        MODULE, query, query, query, None, segments=cut((4,)), position_ids=torch.arange(4), use_cache=False, alibi=None
    )
    assert out.shape == (1, 4, 4, 8)


# -- the calls that only a GPU computes: what they are told ----------------------------------------------------------


def by_cuts(query, key, value, cuts_query, cuts_key, longest_query, longest_key, *, scale, window):
    """What the varlen kernels say that they compute, a segment at a time, on a CPU."""
    assert cuts_query is cuts_key and cuts_query.dtype == torch.int32
    assert longest_query == longest_key == int(cuts_query.diff().max()) and cuts_query[-1] == query.shape[0]
    outputs = []
    for start, end in itertools.pairwise(cuts_query.tolist()):
        part = (tensor[start:end].transpose(0, 1)[None] for tensor in (query, key, value))
        outputs.append(by_hand(*part, window=window, scaling=scale)[0])
    return torch.cat(outputs)


def of_torch_2_10(*args, is_causal=False, return_aux=None):
    assert is_causal and args[0].shape[1] == args[1].shape[1]
    return by_cuts(*args, scale=args[0].shape[-1] ** -0.5, window=None)


def of_torch_2_11(*args, return_aux=None, scale=None, window_size=(-1, -1)):
    assert args[0].shape[1] == args[1].shape[1] and window_size[1] == 0, "causal"
    return by_cuts(*args, scale=scale, window=None if window_size[0] < 0 else window_size[0] + 1)


def of_torch_2_13(*args, return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False):
    assert enable_gqa and window_size[1] == 0
    return by_cuts(*args, scale=scale, window=None if window_size[0] < 0 else window_size[0] + 1)


def of_flash_attn_2(*args, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0):
    assert causal and window_size in {(-1, -1), (4, 0)} and not softcap
    return by_cuts(*args, scale=softmax_scale, window=None if window_size[0] < 0 else window_size[0] + 1)


# 2.10 knows no window, so choose_kernel doesn't take it where there is one.
@pytest.mark.parametrize(
    ("kernel", "window"),
    [(of_torch_2_10, None), *itertools.product((of_torch_2_11, of_torch_2_13, of_flash_attn_2), (None, 5))],
)
def test_varlen_kernels_of_every_version_are_told_cuts_window_and_scale(
    kernel: Callable[..., torch.Tensor], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    segments = cut((17, 1, 10), (20, 8))
    query, key, value = (torch.randn(2, count, 28, 8) for count in (4, 2, 2))
    asked = {"sliding_window": window, "scaling": 0.3}
    expected, _ = segmented_attention(MODULE, query, key, value, None, segments=segments, **asked)
    knows = frozenset(signature(kernel).parameters)
    run = attention.take_all_at_once
    if kernel is of_flash_attn_2:
        run = attention.FlashPackage(kernel, knows).run
    monkeypatch.setattr(attention, "VARLEN_KNOWS", knows)
    monkeypatch.setattr(attention.varlen, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "choose_kernel", lambda *_: attention.Kernel("varlen", "told", run))
    out, _ = segmented_attention(MODULE, query, key, value, None, segments=segments, **asked)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    assert ("varlen", "told") in segments.used


def test_the_flash_attn_package_is_asked_only_for_what_its_version_knows() -> None:
    knows = frozenset(signature(of_flash_attn_2).parameters)
    package = attention.FlashPackage(of_flash_attn_2, knows)
    plain = attention.Asked(1.0, 0.0, None, None, None)
    assert package.computes(plain) and package.computes(replace(plain, softcap=30.0, window=4, dropout=0.1))
    assert not package.computes(replace(plain, sinks_H=torch.zeros(4)))
    assert attention.FlashPackage(of_flash_attn_2, knows | {"s_aux"}).computes(replace(plain, sinks_H=torch.zeros(4)))


# -- whole models ----------------------------------------------------------------------------------------------------

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_local_experts": 4}
# Which of transformers' own ways keep packed samples apart; of gemma2 there is no sdpa, and gpt_oss leaks in eager.
FAMILIES: dict[str, tuple[dict, tuple[str, ...]]] = {
    "llama": ({}, ("sdpa", "eager")),
    "qwen2": ({}, ("sdpa", "eager")),
    "qwen3": ({}, ("sdpa", "eager")),
    "mistral": ({}, ("sdpa", "eager")),
    "gemma2": ({}, ("eager",)),
    "gemma3_text": (
        {"sliding_window": tiny.WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
        ("sdpa", "eager"),
    ),
    "phi3": ({"sliding_window": tiny.WINDOW, "pad_token_id": 0}, ("sdpa", "eager")),
    "gpt2": ({}, ("sdpa", "eager")),
    "qwen3_moe": (MOE, ("sdpa", "eager")),
    "gpt_oss": ({**MOE, "sliding_window": tiny.WINDOW}, ()),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_every_way_equals_eager_attention_over_samples_alone(tmp_path: Path, family: str) -> None:
    changes, ways = FAMILIES[family]
    samples = tiny.some_samples(8)
    alone, packed = tiny.step_of(samples, "padded", 60, 1), tiny.step_of(samples, "packed", 80, 2)
    assert all(batch.segments == ((batch.slots,),) for batch in alone.batches), "a row each and no pad"
    assert max(len(row) for batch in packed.batches for row in batch.segments) > 2, "several samples in a row"
    assert max(len(batch.segments) for batch in packed.batches) == 2, "several rows in a batch"
    assert max(samples.lengths) > 3 * tiny.WINDOW, "a window is shorter than a sample"
    model = tiny.load(tiny.save_base(tmp_path, family, **changes), "eager", method={"type": "full"})
    expected_loss, expected = tiny.gradients(model, alone)
    assert tiny.norm(expected) > 1e-2

    def assert_equal() -> None:
        loss, gradient = tiny.gradients(model, packed)
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert tiny.difference(expected, gradient) < 1e-5

    for way in ("flash", *ways):
        model.choose_attention(way, lambda code, text: None)
        assert model.attention == way
        assert_equal()
    assert model.base.supports_gradient_checkpointing
    with quiet_libraries():
        model.base.gradient_checkpointing_enable({"use_reentrant": False})
    model.choose_attention("flash", lambda code, text: None)
    assert_equal()

    features = [features_of(model, batch) for batch in packed.batches]
    model.base.set_attn_implementation(attention.FLEX)  # choose_attention refuses it for want of a gradient
    model.attention = "flex"
    for batch, by_flash in zip(packed.batches, features, strict=True):
        torch.testing.assert_close(features_of(model, batch), by_flash, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def features_of(model: LanguageModel, batch: Batch) -> torch.Tensor:
    return model.features(batch)


def test_flex_is_refused_for_training_on_a_cpu_with_what_to_choose_instead(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        tiny.load(tiny.save_base(tmp_path), "flex", method={"type": "lora", "rank": 4})
    assert error.value.code == "engine.attention_refused"
    assert "does not support backward on CPU" in str(error.value) and "choose auto" in str(error.value)


def test_what_was_chosen_has_a_reason_and_a_cost(tmp_path: Path) -> None:
    llama = tiny.load(tiny.save_base(tmp_path / "llama"), "auto", method={"type": "full"})
    assert llama.attention == "flash" and "on a CPU" in llama.attention_reason and not llama.warnings
    gemma2 = tiny.load(tiny.save_base(tmp_path / "gemma2", "gemma2"), "auto", method={"type": "full"})
    assert gemma2.attention == "flash" and "soft caps" in gemma2.attention_reason
    assert "L x L" in gemma2.attention_reason
    eager = tiny.load(tmp_path / "llama", "eager", method={"type": "full"})
    assert "N x N" in eager.attention_reason


def test_an_attention_asked_by_name_that_does_not_run_is_refused_with_what_the_model_said(tmp_path: Path) -> None:
    folder = tiny.save_base(tmp_path / "gemma2", "gemma2")
    with pytest.raises(UserError) as error:
        tiny.load(folder, "sdpa", method={"type": "full"})
    assert error.value.code == "engine.attention_refused" and "Gemma2ForCausalLM does not support" in str(error.value)


def test_auto_goes_on_where_flash_does_not_run_and_says_what_it_costs(tmp_path: Path) -> None:
    # Bloom adds its positions to the scores and computes attention by itself.
    config = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": tiny.VOCABULARY}
    from transformers import BloomConfig, BloomForCausalLM

    BloomForCausalLM(BloomConfig(**config)).save_pretrained(tmp_path)
    model = tiny.load(tmp_path, "auto", method={"type": "full"})
    assert model.attention != "flash"
    ((_, text),) = [warning for warning in model.warnings if warning[0] == "attention"]
    assert "N x N" in text and "flash does not run" in text
