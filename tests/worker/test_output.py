import itertools

from hypothesis import given
from hypothesis import strategies as st

from worker.output import BURST_LINES, LINES_A_SECOND, LineReader, Throttle


def lines_of(*pieces: bytes, secrets: tuple[str, ...] = ()) -> list[str]:
    reader = LineReader(secrets)
    return [line for piece in pieces for line in reader.feed(piece)] + list(reader.finish())


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=5))
def test_how_the_bytes_arrive_changes_nothing(output: bytes, cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(output)]
    pieces = [output[begin:end] for begin, end in itertools.pairwise(edges)]
    assert lines_of(*pieces) == lines_of(output)


@given(st.binary(max_size=300))
def test_no_control_character_gets_through(output: bytes) -> None:
    for line in lines_of(output):
        assert all(character == "\t" or character >= " " for character in line)
        assert not any("\x7f" <= character <= "\x9f" for character in line)


def test_colours_titles_and_progress_bars_leave_their_text() -> None:
    output = b"\x1b[1;32mgreen\x1b[0m\n\x1b]0;title\x07after\n  5%|#   |\r 50%|##  |\r100%|####|\r\n\n\tkept\n"
    assert lines_of(output) == ["green", "after", "100%|####|", "\tkept"]


def test_bytes_that_are_no_utf8_are_shown_as_such() -> None:
    assert lines_of("héllo 世界\n".encode(), b"\xff\xfe!\n") == ["héllo 世界", "\ufffd\ufffd!"]


def test_a_line_without_an_end_is_not_kept_for_ever() -> None:
    reader = LineReader()
    (line,) = reader.feed(b"x" * 100_000)
    assert line.endswith("[cut, 100000 characters]")
    assert list(reader.finish()) == []


def test_secrets_are_hidden() -> None:
    assert lines_of(b"token: hf_abcdefgh.\n", secrets=("hf_abcdefgh",)) == ["token: [hidden]."]


def test_a_flood_is_thinned_and_counted() -> None:
    now = 0.0
    throttle = Throttle(clock=lambda: now)
    admitted = sum(throttle.admits() for _ in range(BURST_LINES + 50))
    assert admitted == BURST_LINES
    assert throttle.take_dropped() == 0, "not while it goes on"
    now = 1.0
    assert throttle.take_dropped() == 50
    assert throttle.take_dropped() == 0
    assert sum(throttle.admits() for _ in range(BURST_LINES)) == LINES_A_SECOND
    assert throttle.take_dropped(is_last=True) == BURST_LINES - LINES_A_SECOND
