"""Texts that are nearly the same: MinHash signatures, found among each other by locality-sensitive hashing.

Two texts are as alike as the sets of their shingles (runs of words): the Jaccard similarity, what both have over what
either has. A signature holds, for each of NUM_PERMUTATIONS orders of all shingles, the first that the text has; two
texts agree in such a place as often as they are alike (Broder, "On the resemblance and containment of documents",
1997). Only texts that agree in a whole band of places are compared at all (Leskovec, Rajaraman, Ullman, "Mining of
Massive Datasets", chapter 3), and of those only what is SIMILAR by all places counts, so a chance agreement in a band
is no duplicate. With 25 bands of 5 places a pair that is 0.8 alike is compared with a probability of 0.99995, one that
is 0.5 alike with 0.55, and then refused.

Of each place 16 bits are kept: two texts agree in one by chance once in 65,536. A sketch keeps a single bit of each (Li
and Koenig, "b-Bit Minwise Hashing", 2010), 16 bytes in all. Different texts agree in half of those, so a sketch tells
less, but it is small enough to travel with a profile, and finds what two data sets share.

Words are runs of letters, marks and digits, whatever their case; what stands between them does not count. Scripts that
write no spaces have no words to be found: there each character counts for itself, and more of them make a shingle.

All of it is deterministic, and works on whole batches at once.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from core.packing import IntArray

SIMILAR = 0.8  # share of shingles that two rows have in common; what the field takes for near duplicates
# 3 rather than the 5 of web pages: a row of instructions has a few dozen words, and a word changed in 40 then leaves
# 0.85 of its shingles where it would leave 0.76.
WORDS_A_SHINGLE = 3
CHARACTERS_A_SHINGLE = 5  # about three words of Chinese
NUM_PERMUTATIONS = 128  # an estimate of 0.8 is off by 0.035 (one standard deviation)
NUM_BANDS, PLACES_A_BAND = 25, 5
NUM_SKETCH_BANDS = 8  # of 16 bits: of pairs that are 0.8 alike 0.81 agree in one, of pairs that are 0.9 alike 0.99
MAX_CHARACTERS = 50_000  # of a text; two that are alike so far are alike
BATCH_CHARACTERS = 1 << 20  # which take some 60 MB
PAIRS_AT_A_TIME = 1 << 16
MOST_PAIRS = 20_000_000  # of sketches, which takes a second; rows that all look alike could make any number of them

Signatures = npt.NDArray[np.uint16]  # texts x NUM_PERMUTATIONS
Sketches = npt.NDArray[np.uint64]  # texts x 2; 0 0 has no words, and is like nothing
BoolArray = npt.NDArray[np.bool_]
_Hashes = npt.NDArray[np.uint64]

# Kinds of characters.
_BETWEEN, _WORD, _ALONE = 0, 1, 2
_WITHOUT_SPACES = (
    *((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF)),  # Thai, Lao; Burmese; Khmer
    *((0x3040, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF)),
)
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that it has an inverse modulo 2**64
_INVERSE = np.uint64(pow(0x9E3779B97F4A7C15, -1, 2**64))


# -- text -> signature -----------------------------------------------------------------------------------------------


def sign(texts: Sequence[str]) -> tuple[Signatures, BoolArray]:
    """A signature for each text, and whether it has any word to be told by; without one its signature says nothing."""
    signatures = np.zeros((len(texts), NUM_PERMUTATIONS), np.uint16)
    has_words = np.zeros(len(texts), np.bool_)
    for batch, cut in _batches(texts):
        shingles, of_text = _shingles(cut)
        signed, starts = np.unique(of_text, return_index=True)
        if len(signed):
            signatures[batch.start + signed] = _minima(shingles, starts)
            has_words[batch.start + signed] = True
    return signatures, has_words


def _batches(texts: Sequence[str]) -> Iterator[tuple[slice, list[str]]]:
    start, num_characters = 0, 0
    batch: list[str] = []
    for text in texts:
        batch.append(text[:MAX_CHARACTERS].lower())
        num_characters += len(batch[-1])
        if num_characters >= BATCH_CHARACTERS:
            yield slice(start, start + len(batch)), batch
            start, num_characters, batch = start + len(batch), 0, []
    yield slice(start, start + len(batch)), batch


def _shingles(texts: Sequence[str]) -> tuple[npt.NDArray[np.uint32], IntArray]:
    """The hash of each shingle, and of which text it is."""
    characters = np.frombuffer("\n".join([*texts, ""]).encode("utf-32-le", "surrogatepass"), "<u4")
    ends = np.cumsum([len(text) + 1 for text in texts])
    starts, hashes, is_alone = _units(characters)
    of_text = np.searchsorted(ends, starts, side="right")
    num_units = np.bincount(of_text, minlength=len(texts))
    num_alone = np.bincount(of_text, weights=is_alone, minlength=len(texts))
    first = np.cumsum(num_units) - num_units
    widths = np.where(2 * num_alone > num_units, CHARACTERS_A_SHINGLE, WORDS_A_SHINGLE)
    left = (first + num_units)[of_text] - np.arange(len(starts))  # units up to the text's end
    width = widths[of_text]
    shingles = hashes
    for offset in range(1, CHARACTERS_A_SHINGLE):
        following = np.append(hashes[offset:], np.zeros(min(offset, len(hashes)), np.uint64))
        shingles = np.where((left > offset) & (width > offset), _mix(shingles) + following, shingles)
    # A text shorter than a shingle is one.
    begins = (left >= width) | (np.arange(len(starts)) == first[of_text])
    return (_mix(shingles[begins]) >> np.uint64(32)).astype(np.uint32), of_text[begins]


def _units(characters: npt.NDArray[np.uint32]) -> tuple[IntArray, _Hashes, BoolArray]:
    """Start and hash of each word, and of each character that counts for itself."""
    kinds = _kinds()[np.minimum(characters, len(_kinds()) - 1)]
    is_alone = kinds == _ALONE
    is_word = kinds == _WORD
    before = np.concatenate(([False], is_word[:-1]))
    after = np.concatenate((is_word[1:], [False]))
    starts = np.flatnonzero(is_alone | (is_word & ~before))
    ends = np.flatnonzero(is_alone | (is_word & ~after)) + 1
    # The sum over a word of character * BASE**place: from sums up to its borders, moved to place 0.
    powers = _powers(_BASE, len(characters))
    sums = np.concatenate((np.zeros(1, np.uint64), np.cumsum(characters * powers, dtype=np.uint64)))
    hashes = (sums[ends] - sums[starts]) * _powers(_INVERSE, len(characters))[starts]
    return starts, _mix(hashes), is_alone[starts]


def _powers(base: np.uint64, count: int) -> _Hashes:
    factors = np.full(count, base, np.uint64)
    factors[:1] = 1
    return np.multiply.accumulate(factors)


def _mix(hashes: _Hashes) -> _Hashes:
    """Every bit comes to depend on every other: the end of SplitMix64 (Steele, Lea, Flood, 2014)."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))


@lru_cache(maxsize=1)
def _kinds() -> npt.NDArray[np.uint8]:
    """Of each code point."""
    kinds = np.fromiter((unicodedata.category(chr(code))[0] in "LNM" for code in range(0x40000)), np.uint8, 0x40000)
    for first, last in _WITHOUT_SPACES:
        kinds[first : last + 1] *= _ALONE
    return kinds


@lru_cache(maxsize=1)
def _permutations() -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
    """Factor and summand of each: x -> factor * x + summand modulo 2**32, which for odd factors leaves no x out."""
    drawn = np.random.PCG64(np.random.SeedSequence(1997)).random_raw(2 * NUM_PERMUTATIONS).astype(np.uint32)
    return drawn[:NUM_PERMUTATIONS] | np.uint32(1), drawn[NUM_PERMUTATIONS:]


def _minima(shingles: npt.NDArray[np.uint32], starts: IntArray) -> Signatures:
    """The low bits of the first shingle in each order; the high ones are zero in every long text."""
    minima = np.empty((len(starts), NUM_PERMUTATIONS), np.uint16)
    for place, (factor, summand) in enumerate(zip(*_permutations(), strict=True)):
        minima[:, place] = np.minimum.reduceat(shingles * factor + summand, starts).astype(np.uint16)
    return minima


# -- who is like whom ------------------------------------------------------------------------------------------------


def similarity(first: Signatures, second: Signatures) -> npt.NDArray[np.float64]:
    """The estimated Jaccard similarity of each pair."""
    shares: npt.NDArray[np.float64] = (first == second).mean(axis=1)
    return shares


def group(signatures: Signatures, has_words: BoolArray) -> IntArray:
    """For each text the first of those that it hangs together with by pairs that are SIMILAR; its own number where
    there is none. What shares a band is compared with its neighbour and with the first of the band, so that a thousand
    rows of one pattern make two thousand comparisons and not half a million."""
    texts = np.flatnonzero(has_words)
    first = np.arange(len(signatures))
    keys = _band_hashes(signatures[texts], 0) if len(texts) else np.zeros(0, np.uint64)
    for band in range(NUM_BANDS):
        following = _band_hashes(signatures[texts], (band + 1) % NUM_BANDS) if len(texts) else keys
        # Within a band those that share the next one too are neighbours.
        order = np.argsort((keys << np.uint64(32)) | following, kind="stable")
        in_order = keys[order]
        begins = np.concatenate(([True], in_order[1:] != in_order[:-1]))[: len(order)]
        head = np.flatnonzero(begins)[np.cumsum(begins) - 1]
        place = np.flatnonzero(~begins)
        pairs = np.concatenate((np.stack((place, place - 1), 1), np.stack((place, head[place]), 1)))
        _join(first, texts[order[pairs]], signatures)
        keys = following
    return first


def _band_hashes(signatures: Signatures, band: int) -> _Hashes:
    """32 bits of a hash of the band's places."""
    hashes = np.full(len(signatures), band, np.uint64)
    for place in range(band * PLACES_A_BAND, (band + 1) * PLACES_A_BAND):
        hashes = _mix(hashes + signatures[:, place])
    return hashes >> np.uint64(32)


def _join(first: IntArray, pairs: IntArray, signatures: Signatures) -> None:
    """Notes in `first` what hangs together by those of the pairs that are similar."""
    pairs = pairs[first[pairs[:, 0]] != first[pairs[:, 1]]]
    found = [
        some[similarity(signatures[some[:, 0]], signatures[some[:, 1]]) >= SIMILAR]
        for some in np.split(pairs, range(PAIRS_AT_A_TIME, len(pairs), PAIRS_AT_A_TIME))
    ]
    ones, others = np.concatenate(found).T
    while True:
        lower = np.minimum(first[ones], first[others])
        if (first[ones] == lower).all() and (first[others] == lower).all():
            return
        # The head of each component moves below the lower one, and whoever pointed to it follows.
        np.minimum.at(first, first[ones], lower)
        np.minimum.at(first, first[others], lower)
        while (first[first] != first).any():
            first[:] = first[first]


# -- sketches --------------------------------------------------------------------------------------------------------


def sketch(signatures: Signatures, has_words: BoolArray) -> Sketches:
    """A bit of each place."""
    bits = np.packbits((signatures >> np.uint16(15)).astype(np.bool_), axis=1, bitorder="little")
    sketches = np.ascontiguousarray(bits).view("<u8").astype(np.uint64)
    sketches[~has_words] = 0
    return sketches


@dataclass(frozen=True, eq=False)
class Alike:
    """Which of one set's sketches are like any of another's. They are compared as far as MOST_PAIRS reach."""

    is_alike: BoolArray
    is_whole: bool  # every pair that shares a band was compared


def find_alike(sketches: Sketches, others: Sketches) -> Alike:
    """Texts as alike as SIMILAR agree in 0.9 of a sketch's bits: in all that agree, and in half of the rest."""
    distinct, of_sketch = np.unique(sketches, axis=0, return_inverse=True)
    others = others[_have_words(others)]
    found: BoolArray = np.zeros(len(distinct), np.bool_)
    num_left, is_whole = MOST_PAIRS, True
    for band in range(NUM_SKETCH_BANDS):
        asked = np.flatnonzero(_have_words(distinct) & ~found)
        pairs = _Pairs.of(distinct[asked], others, band)
        is_whole = is_whole and len(pairs) <= num_left
        num_compared = min(len(pairs), num_left)
        for start in range(0, num_compared, PAIRS_AT_A_TIME):
            mine, theirs = pairs.at(np.arange(start, min(start + PAIRS_AT_A_TIME, num_compared)))
            differing = np.bitwise_count(distinct[asked[mine]] ^ others[theirs]).sum(axis=1)
            found[asked[mine[differing <= (1 - SIMILAR) / 2 * NUM_PERMUTATIONS]]] = True
        num_left -= num_compared
    return Alike(found[of_sketch.reshape(-1)], is_whole)


def _have_words(sketches: Sketches) -> BoolArray:
    have: BoolArray = (sketches[:, 0] | sketches[:, 1]) != 0
    return have


@dataclass(frozen=True, eq=False)
class _Pairs:
    """All pairs of two sets that agree in a band, without a list of them: `others[i]` agrees with num_pairs[i] of the
    first set, which stand side by side in `order` from begins[i] on."""

    order: IntArray
    others: IntArray
    begins: IntArray
    ends: IntArray  # in the line of all pairs
    num_pairs: IntArray

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    @classmethod
    def of(cls, sketches: Sketches, others: Sketches, band: int) -> "_Pairs":
        keys, other_keys = _sketch_keys(sketches, band), _sketch_keys(others, band)
        is_wanted = np.zeros(1 << 16, np.bool_)
        is_wanted[keys] = True
        candidates = np.flatnonzero(is_wanted[other_keys])  # few: a look at each is all that most of them cost
        order = np.argsort(keys, kind="stable")
        begins = np.searchsorted(keys[order], other_keys[candidates], side="left")
        num_pairs = np.searchsorted(keys[order], other_keys[candidates], side="right") - begins
        return cls(order, candidates, begins, np.cumsum(num_pairs), num_pairs)

    def at(self, places: IntArray) -> tuple[IntArray, IntArray]:
        """Of these pairs, in the line of all, the number in the first set and in the other."""
        which = np.searchsorted(self.ends, places, side="right")
        nth = places - (self.ends - self.num_pairs)[which]
        return self.order[self.begins[which] + nth], self.others[which]


def _sketch_keys(sketches: Sketches, band: int) -> IntArray:
    keys: IntArray = ((sketches[:, band // 4] >> np.uint64(band % 4 * 16)) & np.uint64(0xFFFF)).astype(np.int64)
    return keys
