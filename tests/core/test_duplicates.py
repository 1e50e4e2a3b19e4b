"""Near duplicates: signatures estimate what exact sets of shingles say, and what hangs together is found."""

import random
import re

import numpy as np
import pytest

from core.duplicates import (
    CHARACTERS_A_SHINGLE,
    MAX_CHARACTERS,
    NUM_PERMUTATIONS,
    SIMILAR,
    WORDS_A_SHINGLE,
    find_alike,
    group,
    sign,
    similarity,
    sketch,
)

WORDS = [f"{first}{second}" for first in ("ta", "ke", "mu", "lo", "si", "va") for second in ("rin", "do", "pel", "sha")]


def prose(source: random.Random, num_words: int = 80) -> str:
    return " ".join(f"{source.choice(WORDS)}{source.randrange(50)}" for _ in range(num_words))


def changed(text: str, share: float, source: random.Random) -> str:
    """Some of its words are others."""
    words = [word if source.random() >= share else f"new{source.randrange(10**9)}" for word in text.split()]
    return " ".join(words)


def jaccard(first: str, second: str) -> float:
    """By definition, of words between spaces."""

    def shingles(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[at : at + WORDS_A_SHINGLE]) for at in range(max(1, len(words) - WORDS_A_SHINGLE + 1))}

    one, other = shingles(first), shingles(second)
    return len(one & other) / len(one | other)


def alike(first: str, second: str) -> float:
    signatures, has_words = sign([first, second])
    assert has_words.all()
    return float(similarity(signatures[:1], signatures[1:])[0])


def test_signatures_estimate_the_jaccard_similarity_without_bias() -> None:
    source = random.Random(1)
    texts = [prose(source) for _ in range(600)]
    others = [changed(text, source.uniform(0, 0.2), source) for text in texts]
    exact = np.array([jaccard(*pair) for pair in zip(texts, others, strict=True)])
    assert exact.min() < 0.4 and exact.max() > 0.95
    errors = similarity(sign(texts)[0], sign(others)[0]) - exact
    expected = np.sqrt((exact * (1 - exact) / NUM_PERMUTATIONS).mean())
    assert abs(errors.mean()) < 4 * expected / np.sqrt(len(texts))
    assert 0.8 * expected < errors.std() < 1.2 * expected


def test_case_spaces_and_punctuation_do_not_count_and_words_do() -> None:
    assert alike("Boil the eggs, then peel them!", "boil THE eggs\n\nthen – peel them") == 1.0
    assert alike("Boil the eggs, then peel them", "Boil the eggs, then throw them away") < 0.8
    assert alike("naïve café", "naive cafe") == 0.0
    assert alike("नमस्ते दुनिया यह है", "नमसत दनय यह ह") == 0.0, "marks belong to their word"


def test_a_text_without_spaces_is_told_by_its_characters() -> None:
    text = "水对人类至关重要的原因有很多首先水是人体细胞和组织的主要组成部分"
    other = text.replace("原因", "理由")
    exact_of = [{each[at : at + CHARACTERS_A_SHINGLE] for at in range(len(each) - 4)} for each in (text, other)]
    exact = len(exact_of[0] & exact_of[1]) / len(exact_of[0] | exact_of[1])
    assert 0.5 < exact < 0.8
    assert abs(alike(text, other) - exact) < 0.15
    assert alike(text, text[::-1]) < 0.1


def test_short_texts_are_one_shingle_and_texts_without_words_are_like_nothing() -> None:
    signatures, has_words = sign(["yes", "Yes.", "no", "", "?!", "🦙"])
    assert has_words.tolist() == [True, True, True, False, False, False]
    assert group(signatures, has_words).tolist() == [0, 0, 2, 3, 4, 5]
    sketches = sketch(signatures, has_words)
    assert not sketches[3:].any()
    assert find_alike(sketches, sketches).is_alike.tolist() == [True, True, True, False, False, False]
    assert sign([])[0].shape == (0, NUM_PERMUTATIONS)
    assert group(*sign([])).tolist() == []


def test_a_signature_does_not_depend_on_what_it_is_made_with() -> None:
    source = random.Random(2)
    texts = [prose(source, source.randrange(1, 3000)) for _ in range(300)]
    assert sum(map(len, texts)) > 2 * (1 << 20), "several batches"
    together = sign(texts)[0]
    assert all((sign([text])[0][0] == row).all() for text, row in zip(texts[::37], together[::37], strict=True))
    long = "word " * (MAX_CHARACTERS // 5)
    assert alike(long + " the same so far", long + " and no more") == 1.0


def test_groups_are_what_hangs_together_by_similar_pairs() -> None:
    source = random.Random(3)
    texts = [prose(source) for _ in range(300)]
    origin = dict(enumerate(range(300)))
    for number in range(0, 300, 3):
        texts.append(changed(texts[number], 0.02, source))
        origin[len(texts) - 1] = number
    order = list(range(len(texts)))
    source.shuffle(order)
    texts = [texts[number] for number in order]
    signatures, has_words = sign(texts)
    first = group(signatures, has_words)
    # By every pair, without bands.
    every = (signatures[:, None, :] == signatures[None, :, :]).mean(axis=2) >= SIMILAR
    reached = every
    for _ in range(4):
        reached = (reached.astype(int) @ reached.astype(int)) > 0
    assert (first == reached.argmax(axis=1)).all()
    sizes = np.bincount(first)
    assert sizes.max() <= 3 and 80 <= (sizes > 1).sum() <= 100, "most of the hundred copies are that alike"


def test_a_thousand_rows_of_one_pattern_are_one_group() -> None:
    pattern = prose(random.Random(4), 120)
    signatures, has_words = sign([f"{pattern} {number}" for number in range(1000)])
    assert not group(signatures, has_words).any()


@pytest.mark.parametrize(("share", "least", "most"), [(0.0, 1.0, 1.0), (0.01, 0.9, 1.0), (0.2, 0.0, 0.01)])
def test_sketches_find_what_another_set_says_too(share: float, least: float, most: float) -> None:
    source = random.Random(5)
    texts = [prose(source) for _ in range(400)]
    known = sketch(*sign([*texts, *(prose(source) for _ in range(2000))]))
    asked = sketch(*sign([*(changed(text, share, source) for text in texts), *(prose(source) for _ in range(400))]))
    found = find_alike(asked, known)
    assert found.is_whole
    assert least <= found.is_alike[:400].mean() <= most
    assert found.is_alike[400:].sum() == 0


def test_a_sketch_estimates_the_similarity_too() -> None:
    source = random.Random(6)
    texts = [prose(source) for _ in range(400)]
    others = [changed(text, source.uniform(0, 0.15), source) for text in texts]
    exact = np.array([jaccard(*pair) for pair in zip(texts, others, strict=True)])
    differing = np.bitwise_count(sketch(*sign(texts)) ^ sketch(*sign(others))).sum(axis=1)
    errors = 1 - 2 * differing / NUM_PERMUTATIONS - exact
    assert abs(errors.mean()) < 0.02 and errors.std() < 0.1
