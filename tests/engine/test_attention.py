from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from core.errors import UserError
from tests.engine import tiny
from worker.engine.attention import UnsupportedAttention, segmented_attention

MODULE = SimpleNamespace(is_causal=True)


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
def test_each_segment_is_what_a_position_by_position_sum_gives(
    window: int | None, softcap: float | None, with_sinks: bool
) -> None:
    lengths = (17, 1, 33, 5)
    query, key, value = heads(56), heads(56, 2, seed=1), heads(56, 2, seed=2)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0]) if with_sinks else None
    out, _ = segmented_attention(
        MODULE, query, key, value, None, segments=(lengths,), sliding_window=window, softcap=softcap, s_aux=sinks
    )
    start = 0
    for length in lengths:
        cut = slice(start, start + length)
        expected = by_hand(query[:, :, cut], key[:, :, cut], value[:, :, cut], window, softcap, sinks)
        torch.testing.assert_close(out[:, cut], expected, rtol=1e-5, atol=1e-6)
        start += length


@pytest.mark.parametrize(
    "asked",
    [{"position_bias": torch.zeros(1)}, {"alibi": torch.zeros(1)}, {"is_causal": False}, {"segments": None}],
)
def test_what_it_does_not_compute_it_refuses(asked: dict) -> None:
    query = heads(4)
    with pytest.raises(UnsupportedAttention):
        segmented_attention(MODULE, query, query, query, None, **{"segments": ((4,),), **asked})
    with pytest.raises(UnsupportedAttention):
        segmented_attention(MODULE, query, query, query, torch.zeros(1, 1, 4, 4), segments=((4,),))


def test_what_is_without_effect_is_accepted() -> None:
    query = heads(4)
    out, _ = segmented_attention(
        MODULE, query, query, query, None, segments=((4,),), position_ids=torch.arange(4), use_cache=False, alibi=None
    )
    assert out.shape == (1, 4, 4, 8)


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
