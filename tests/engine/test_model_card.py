"""The card tells how to serve what was trained, and no server is promised what it cannot load."""

import pytest

from tests.engine import tiny
from worker.engine.model_card import AdapterFacts, Facts, model_card

FACTS = Facts("team/base", ("rows.jsonl",), 10, 1.0, 1000, 50, 1.5, None, 10, 1000)
RUN = {"schedule": {"learning_rate": 1e-4}, "data": {"train": [{"dataset": "rows.jsonl"}], "max_length": 64}}


def card(adapter: AdapterFacts | None, method: str = "lora") -> str:
    return model_card(tiny.spec_of(method={"type": method}, **RUN), FACTS, "AutoModelForCausalLM", adapter)


def test_a_plain_adapter_is_served_beside_its_base_or_merged() -> None:
    text = card(AdapterFacts(24, 48, is_plain=True, num_embeddings=None))
    assert "vllm serve team/base --enable-lora --max-lora-rank 32" in text
    assert "pegbox merge" in text and "ollama create" in text and "rank 24, alpha 48" in text
    assert "resize_token_embeddings" not in text


def test_an_adapter_that_servers_would_load_in_part_is_to_be_merged() -> None:
    text = card(AdapterFacts(16, 32, is_plain=False, num_embeddings=104), "qlora")
    assert "--enable-lora" not in text and "pegbox merge" in text
    assert "resize_token_embeddings(104" in text and "in 4 bits" in text


@pytest.mark.parametrize("served", ['vllm serve "PATH OF THIS FOLDER"', "FROM PATH OF THIS FOLDER"])
def test_a_whole_model_is_served_as_it_is(served: str) -> None:
    text = card(None, "full")
    assert served in text and "pegbox merge" not in text and "library_name: transformers" in text
