"""The tokenizer that training uses gives what a served model gets: the same text, the same tokens, no second BOS."""

import json
from bisect import bisect_left
from operator import itemgetter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from core.chat import CHATML, Rendering, build_samples
from core.conversation import PromptCompletion, RawText
from core.errors import UserError
from worker.engine.tokenizer import HfChatTokenizer

MESSAGES: list[dict[str, object]] = [
    {"role": "user", "content": " Hello 你好!"},
    {"role": "assistant", "content": "Good  day 🦙"},
]
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<end>"]
BOS_TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}"


def byte_level(**options: object) -> PreTrainedTokenizerFast:
    """A token for each byte and a few merges, as GPT-2, Llama 3 and Qwen have them."""
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "oo", "Ġd", "<tool>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    rust = Tokenizer(models.BPE(vocab=vocabulary, merges=[("o", "o"), ("Ġ", "d")]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    rust.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]),
        ]
    )
    # <end> and <tool> are added, but nobody flagged them as special.
    rust.add_tokens(["<end>", "<tool>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=rust,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        **options,
    )


def byte_fallback(**options: object) -> PreTrainedTokenizerFast:
    """Words with a leading mark for their space, other characters as bytes, as Llama 2 and Gemma have them."""
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "H", "e", "l", "o", "ll"]
    rust = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=[("l", "l")],
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    rust.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<s>", eos_token="</s>", **options)


def refusal(template: str, messages: list[dict[str, object]] = MESSAGES) -> UserError:
    with pytest.raises(UserError) as caught:
        HfChatTokenizer(byte_level(chat_template=template)).render(messages, None, False)
    return caught.value


# -- rendering -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("with_prompt", [False, True])
def test_text_and_tokens_are_those_of_apply_chat_template(with_prompt: bool) -> None:
    served = byte_level(chat_template=CHATML)
    tokenizer = HfChatTokenizer(served)
    rendering = tokenizer.render(MESSAGES, None, with_prompt)
    expected = served.apply_chat_template(
        MESSAGES,
        add_generation_prompt=with_prompt,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert list(tokenizer.encode(rendering.text).ids) == expected["input_ids"]
    assert "".join(rendering.text[start:end] for start, end in rendering.generated) == "Good  day 🦙<|im_end|>"
    assert sum(expected["assistant_masks"]) > 0


def test_a_template_without_marks_gives_none() -> None:
    tokenizer = HfChatTokenizer(byte_level(chat_template=BOS_TEMPLATE))
    assert not tokenizer.has_generation_marks
    assert tokenizer.render(MESSAGES[:1], None, False) == Rendering("<s>user: Hello 你好!</s>")


def test_tools_go_to_the_template_that_is_made_for_them() -> None:
    own = {"default": "plain", "tool_use": "{{ tools[0].function.name }}"}
    tokenizer = HfChatTokenizer(byte_level(chat_template=own))
    tools: list[dict[str, object]] = [{"type": "function", "function": {"name": "look_up"}}]
    assert tokenizer.render(MESSAGES, None, False).text == "plain"
    assert tokenizer.render(MESSAGES, tools, False).text == "look_up"
    assert HfChatTokenizer(byte_level(chat_template=CHATML)).render(MESSAGES, tools, False).text.count("look_up") == 1


def test_a_built_in_template_replaces_the_models_own() -> None:
    assert not HfChatTokenizer(byte_level()).has_template
    tokenizer = HfChatTokenizer(byte_level(chat_template="own"), "chatml")
    assert tokenizer.render(MESSAGES, None, False).text.startswith("<|im_start|>user\n Hello")
    with pytest.raises(UserError) as caught:
        HfChatTokenizer(byte_level(), "chatlm")
    assert (caught.value.code, caught.value.field) == ("model.unknown_template", "model.chat_template")
    assert "chatml" in caught.value.text()


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content }}", "has no element 7"),
        ("{{ messages[0].content + none }}", "NoneType"),
        ("{{ 1 // (messages | length - 2) }}", "by zero"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_what_a_template_refuses_is_a_refusal_of_the_conversation(template: str, problem: str) -> None:
    error = refusal(template)
    assert error.code == "chat.template_refused"
    assert problem in error.text()


def test_a_template_that_is_no_template_is_refused_at_once() -> None:
    with pytest.raises(UserError) as caught:
        HfChatTokenizer(byte_level(chat_template="line one\n{% if %}"))
    assert caught.value.code == "model.template_broken"
    assert caught.value.parameters["line"] == 2


# -- encoding ------------------------------------------------------------------------------------------------------
def test_offsets_keep_leading_spaces_and_cover_the_text() -> None:
    text = " a good  day 你"
    offsets = HfChatTokenizer(byte_level())._rust.encode(text).offsets
    spans = [text[start:end] for start, end in offsets]
    assert spans[:2] == [" ", "a"]
    assert " d" in spans  # one token, which its post-processor would have reported as "d"
    assert spans[-3:] == ["你", "你", "你"]
    starts = [start for start, _ in offsets]
    assert starts == sorted(starts)


def test_no_special_token_is_added_and_none_is_doubled() -> None:
    served = byte_level(chat_template=BOS_TEMPLATE)
    tokenizer = HfChatTokenizer(served)
    text = tokenizer.render(MESSAGES, None, False).text
    assert served(text).input_ids[:2] == [0, 0]  # what encoding the rendered text in the usual way would have done
    ids = list(tokenizer.encode(text).ids)
    assert ids.count(0) == 1
    assert ids == served.apply_chat_template(MESSAGES, return_dict=False)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)


def test_a_plain_text_gets_the_tokenizers_own_begin_once() -> None:
    tokenizer = HfChatTokenizer(byte_level())
    (sample,) = build_samples(RawText("good"), tokenizer, train_on="assistant", multi_turn="whole")
    assert (sample.token_ids[0], sample.token_ids[-1]) == (0, 1)
    assert sample.trained == (False, True, True, True, True)  # <s> g oo d </s>
    (pair,) = build_samples(PromptCompletion("<s>a", "b"), tokenizer, train_on="assistant", multi_turn="whole")
    assert list(pair.token_ids).count(0) == 1
    # Llama 2's kind is asked for a BOS by its post-processor alone; this one has none.
    assert HfChatTokenizer(byte_fallback()).bos_id is None


def test_special_tokens_are_those_flagged_and_those_that_end_a_turn(tmp_path: Path) -> None:
    byte_level().save_pretrained(tmp_path)
    text = "a<|im_end|><end><tool></s>"
    assert special(HfChatTokenizer.load(tmp_path), text) == [False, True, False, False, True]
    end = byte_level().convert_tokens_to_ids("<end>")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, end]}))
    assert special(HfChatTokenizer.load(tmp_path), text) == [False, True, True, False, True]


def special(tokenizer: HfChatTokenizer, text: str) -> list[bool]:
    encoding = tokenizer.encode(text)
    return [encoding.is_special(index) for index in range(len(encoding.ids))]


def test_a_batch_is_encoded_as_one_by_one() -> None:
    tokenizer = HfChatTokenizer(byte_level(model_max_length=4))
    texts = ["a", "", "a good day 你好 <|im_end|>" * 40]
    assert [encoding.ids for encoding in tokenizer.encode_batch(texts)] == [tokenizer.encode(t).ids for t in texts]
    assert len(tokenizer.encode(texts[2]).ids) > 400  # and never cut


# -- pieces --------------------------------------------------------------------------------------------------------
BYTE_LEVEL, BYTE_FALLBACK = HfChatTokenizer(byte_level()), HfChatTokenizer(byte_fallback())


@given(
    st.text(st.sampled_from("Hello o d你好🦙\n<>\u0301") | st.characters(exclude_categories=["Cs"]), max_size=20),
    st.booleans(),
)
def test_a_token_is_found_by_its_character_as_in_a_list_of_all_offsets(text: str, has_turn: bool) -> None:
    text = f"<|im_start|>{text}<|im_end|>\n" if has_turn else text
    for tokenizer in (BYTE_LEVEL, BYTE_FALLBACK):
        encoding = tokenizer.encode(text)
        offsets = tokenizer._rust.encode(text, add_special_tokens=False).offsets
        for character in range(len(text)):
            assert encoding.first_from(character) == bisect_left(offsets, character, key=itemgetter(0))
        assert [encoding.end_of(index) for index in range(len(offsets))] == [end for _, end in offsets]


def test_a_character_of_several_tokens_stands_whole_in_the_last_piece() -> None:
    for tokenizer in (BYTE_LEVEL, BYTE_FALLBACK):
        ids = list(tokenizer.encode("Hello 你好").ids)
        pieces = tokenizer.pieces(ids)
        assert len(pieces) == len(ids)
        assert pieces[-6:] == ("", "", "你", "", "", "好")


@given(st.text(max_size=40))
def test_pieces_joined_are_the_text(text: str) -> None:
    assert "".join(BYTE_LEVEL.pieces(list(BYTE_LEVEL.encode(text).ids))) == text


@given(st.text(alphabet="Hello 你🦙x", max_size=20))
def test_pieces_joined_are_what_is_decoded_with_byte_fallback(text: str) -> None:
    ids = list(BYTE_FALLBACK.encode(text).ids)
    assert "".join(BYTE_FALLBACK.pieces(ids)) == BYTE_FALLBACK.tokenizer.decode(ids)


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    ids = list(BYTE_LEVEL.encode("o你").ids)[:-1]
    assert BYTE_LEVEL.pieces(ids)[0] == "o"
    assert "".join(BYTE_LEVEL.pieces(ids)) == BYTE_LEVEL.tokenizer.decode(ids)


# -- loading -------------------------------------------------------------------------------------------------------
def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError) as caught:
        HfChatTokenizer.load(tmp_path)
    assert caught.value.code == "model.no_tokenizer"


def test_code_that_comes_with_a_tokenizer_is_not_run(tmp_path: Path) -> None:
    byte_level().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_bytes())
    config |= {
        "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]},
        "tokenizer_class": "OwnTokenizer",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    try:
        HfChatTokenizer.load(tmp_path)
    except UserError as error:
        assert error.code == "model.no_tokenizer"
    assert not ran.exists()


# -- turn marks of a built-in template ---------------------------------------------------------------------------------


def plain(*known: str) -> PreTrainedTokenizerFast:
    tokens = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *known]
    rust = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=rust, eos_token="</s>", additional_special_tokens=list(known))


@pytest.mark.parametrize(
    ("known", "added"), [((), (257, 258)), (("<|im_end|>",), (258,)), (("<|im_start|>", "<|im_end|>"), ())]
)
def test_turn_marks_that_a_tokenizer_lacks_become_tokens(known: tuple[str, ...], added: tuple[int, ...]) -> None:
    own = plain(*known)
    assert HfChatTokenizer(own, None).added_ids == () and len(own) == 257 + len(known)
    tokenizer = HfChatTokenizer(own, "chatml")
    assert tokenizer.added_ids == added and len(own) == 259
    encoding = tokenizer.encode(tokenizer.render(MESSAGES, None, False).text)
    ends = [number for number in encoding.ids if own.convert_ids_to_tokens(number) == "<|im_end|>"]
    assert len(ends) == len(MESSAGES), "one token for each end of a turn"
    assert "<|im_end|>" not in own.decode(encoding.ids, skip_special_tokens=True)
    assert HfChatTokenizer(own, "chatml").added_ids == (), "nothing is added twice"
