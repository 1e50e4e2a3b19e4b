"""A memo gives what was made before, and never what was made of something else."""

import gc

import pytest

from core.memo import Memo


class Made(list[int]):
    """What a memo is asked for: counts how often it had to be made."""

    def __call__(self) -> str:
        self.append(len(self))
        return f"answer {len(self)}"


def test_the_same_settings_and_sources_are_made_once() -> None:
    memo, make, source = Memo(4), Made(), object()
    assert [memo.get(("rows", 3), (source,), make) for _ in range(3)] == ["answer 1"] * 3


@pytest.mark.parametrize("changed", ["settings", "source"])
def test_another_setting_or_another_source_of_equal_value_is_made_anew(changed: str) -> None:
    memo, make, source = Memo(4), Made(), [1, 2]
    memo.get(("rows", 3), (source,), make)
    settings, sources = (("rows", 4), (source,)) if changed == "settings" else (("rows", 3), ([1, 2],))
    assert memo.get(settings, sources, make) == "answer 2"
    assert memo.get(("rows", 3), (source,), make) == "answer 1", "the first is still known"


def test_the_one_longest_not_asked_for_makes_room() -> None:
    memo, make = Memo(2), Made()
    memo.get("a", (), make)
    memo.get("b", (), make)
    memo.get("a", (), make)
    memo.get("c", (), make)
    assert memo.get("a", (), make) == "answer 1"
    assert memo.get("b", (), make) == "answer 4"


def test_a_source_that_is_gone_is_not_taken_for_a_new_one_at_its_place() -> None:
    memo, make = Memo(1000), Made()
    for _ in range(500):  # objects of one size, each of which would lie where the last one lay
        memo.get("rows", (bytearray(64),), make)
        gc.collect(0)
    assert len(make) == 500


def test_what_fails_is_tried_again() -> None:
    memo = Memo(4)

    def fail() -> str:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        memo.get("rows", (), fail)
    assert memo.get("rows", (), lambda: "made") == "made"
