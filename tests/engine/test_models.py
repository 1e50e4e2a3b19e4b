"""What a host says about its models comes from their files, and what would run code is refused."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from core.errors import UserError
from tests.engine.tiny import CONTEXT, VOCABULARY, save_base, tiny_base
from worker.engine.models import HashCache, find_models, profile_model, profile_with_hashes


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, family in (("org/first", "llama"), ("second", "gpt2")):
        (tmp_path / name).mkdir(parents=True)
        save_base(tmp_path / name, family)
    return tmp_path


def refusal(folder: Path) -> UserError:
    with pytest.raises(UserError) as caught:
        profile_model(folder, folder.name)
    return caught.value


def test_models_are_named_by_their_path_below_the_root(root: Path) -> None:
    (root / ".tmp-half-written").mkdir()
    (root / ".tmp-half-written" / "config.json").write_text("{}")
    found = find_models([root, root / "no such root"], HashCache())
    assert [model.name for model in found.models] == ["org/first", "second"]
    assert found.refused == {}


def test_parameters_are_counted_as_the_loaded_model_counts_them(root: Path) -> None:
    for name, family in (("org/first", "llama"), ("second", "gpt2")):
        profile = profile_model(root / name, name)
        assert profile.num_parameters == tiny_base(family).num_parameters()
        assert (profile.context_length, profile.vocabulary, profile.dtype) == (CONTEXT, VOCABULARY, "float32")
        assert profile.bytes == (root / name / "model.safetensors").stat().st_size
        assert not profile.has_chat_template
    assert profile.architecture == "GPT2LMHeadModel"


def test_a_tied_weight_counts_once(tmp_path: Path) -> None:
    for name, tied in (("tied", True), ("untied", False)):
        save_base(tmp_path / name, "llama", tie_word_embeddings=tied)
    tied, untied = (profile_model(tmp_path / name, name).num_parameters for name in ("tied", "untied"))
    assert untied - tied == tiny_base("llama").get_input_embeddings().weight.numel()


def test_shards_are_added_up_and_the_common_type_is_told(root: Path) -> None:
    folder = root / "second"
    before = profile_model(folder, "second")
    save_file({"extra": torch.zeros(1000, 1000, dtype=torch.bfloat16)}, folder / "model-2.safetensors")
    after = profile_model(folder, "second")
    assert after.num_parameters - before.num_parameters == 1_000_000
    assert (before.dtype, after.dtype) == ("float32", "bfloat16")
    assert after.content_hash != before.content_hash


def test_a_file_is_hashed_once_and_again_when_it_has_changed(root: Path, tmp_path: Path) -> None:
    kept = tmp_path / "worker" / "model-hashes.json"
    first = find_models([root], HashCache.load(kept)).models
    weights = root / "second" / "model.safetensors"
    entries = json.loads(kept.read_bytes())
    # A planted hash shows that an unchanged file isn't read again.
    entries[str(weights)]["sha256"] = "0" * 64
    kept.write_text(json.dumps(entries))
    planted = find_models([root], HashCache.load(kept)).models
    assert planted[0].content_hash == first[0].content_hash
    assert planted[1].content_hash != first[1].content_hash
    os.utime(weights, ns=(0, 1))
    assert find_models([root], HashCache.load(kept)).models == first


def test_trainers_share_their_hashes_and_lose_none_of_another(root: Path, tmp_path: Path) -> None:
    kept = tmp_path / "model-hashes.json"
    late = HashCache.load(kept)
    first = profile_with_hashes(root / "org" / "first", "first", tmp_path)
    weights = root / "second" / "model.safetensors"
    late.sha256(weights)
    late.save()  # it began before the first was known
    entries = json.loads(kept.read_bytes())
    assert {str(weights), str(root / "org" / "first" / "model.safetensors")} <= set(entries)
    entries[str(root / "org" / "first" / "model.safetensors")]["sha256"] = "0" * 64
    kept.write_text(json.dumps(entries))
    assert profile_with_hashes(root / "org" / "first", "first", tmp_path).content_hash != first.content_hash


def test_a_broken_cache_costs_only_the_hashing(root: Path, tmp_path: Path) -> None:
    kept = tmp_path / "model-hashes.json"
    kept.write_text("[1, 2")
    assert find_models([root], HashCache.load(kept)).models == find_models([root], HashCache()).models
    assert json.loads(kept.read_bytes())


def test_renaming_a_file_is_another_revision(root: Path) -> None:
    before = profile_model(root / "second", "second")
    (root / "second" / "generation_config.json").rename(root / "second" / "other.json")
    assert profile_model(root / "second", "second").content_hash != before.content_hash


def test_code_and_pickles_are_refused_with_the_reason(root: Path) -> None:
    folder = root / "second"
    (folder / "modeling_own.py").write_text("")
    assert refusal(folder).parameters["found"] == "modeling_own.py"
    (folder / "modeling_own.py").unlink()
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "own.Config"}}))
    assert refusal(folder).code == "model.has_code"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert refusal(folder).code == "model.pickled"
    assert "pytorch_model.bin" in refusal(folder).text()
    (folder / "pytorch_model.bin").unlink()
    assert refusal(folder).code == "model.no_weights"
    found = find_models([root], HashCache())
    assert [model.name for model in found.models] == ["org/first"]
    assert list(found.refused) == ["second"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "cut off"),
        (struct.pack("<Q", 1 << 40) + b"{}", "cut off"),
        (struct.pack("<Q", 4) + b"{}", "cut off"),
        (struct.pack("<Q", 4) + b"{..}", "double quotes"),
        (struct.pack("<Q", 14) + b'{"a": {"b":1}}', "no tensors"),
    ],
)
def test_a_broken_header_is_named(root: Path, content: bytes, problem: str) -> None:
    (root / "second" / "model.safetensors").write_bytes(content)
    error = refusal(root / "second")
    assert error.code == "model.broken_file"
    assert problem in error.text()


def test_a_broken_config_is_named(root: Path) -> None:
    config = root / "second" / "config.json"
    for content, code in (("{", "model.broken_file"), ("[]", "model.broken_file"), ("{}", "model.no_number")):
        config.write_text(content)
        assert refusal(root / "second").code == code


@pytest.mark.parametrize(
    ("card", "license"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n# A model\n", "apache-2.0"),
        ("---\r\nlicense: other\r\nlicense_name: llama3.1\r\n---\r\ntext", "llama3.1"),
        ("---\nlicense: other\n---", "other"),
        ("---\nlicense: [mit, apache-2.0]\n---\n", "mit, apache-2.0"),
        ("---\nlicense: 7\n---\n", None),
        ("---\nlicense: {broken\n---\n", None),
        ("---\n- license\n---\n", None),
        ("---\nlicense: mit\n", None),  # which never ends
        ("# license: mit\n", None),
        ("---\nlicense: " + "x" * 500 + "\n---\n", "x" * 100),
        (None, None),
    ],
)
def test_the_licence_is_the_model_cards(root: Path, card: str | None, license: str | None) -> None:
    folder = root / "second"
    if card is not None:
        (folder / "README.md").write_bytes(card.encode())
    assert profile_model(folder, "second").license == license


def test_without_a_card_the_licence_is_the_configs_and_the_tokenizers_class_its_files(root: Path) -> None:
    folder = root / "second"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"license": "gemma"}))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer", "chat_template": "{{ 1 }}"}')
    profile = profile_model(folder, "second")
    assert (profile.license, profile.tokenizer, profile.has_chat_template) == ("gemma", "Qwen2Tokenizer", True)
    (folder / "tokenizer_config.json").write_text("[]")
    assert (profile_model(folder, "second").tokenizer, profile_model(folder, "second").has_chat_template) == (
        None,
        False,
    )
