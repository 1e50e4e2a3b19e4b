"""What was tokenised is opened again: whole, by content, by several at once, within a limit."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from core.chat import Sample, Span
from core.profile import DataProfile
from worker.engine import token_cache
from worker.engine.samples import INDEX, MeasuredSet, SampleWriter
from worker.engine.token_cache import TokenCache, key_of

REPOSITORY = Path(__file__).parents[2]
SAMPLES = [(Sample((5, 6, 7), (Span(1, 3),), 1), 3), (Sample((8,), (), 0), 4), (Sample((9, 10), (Span(1, 2),), 1), 4)]
PROFILE = DataProfile(
    num_rows=3,
    format="messages",
    multi_turn="split",
    multi_turn_reason="",
    num_refused=1,
    refused=(),
    sample_row=[0, 1, 1],
    sample_length=[3, 1, 2],
    sample_trained=[2, 0, 1],
    sample_turns=[1, 0, 1],
    sample_hash=[2**64 - 1, 7, 7],
    sample_runs=[1, 0, 1],
    run_bounds=[1, 3, 1, 2],
)


class Maker:
    """Writes the three samples, in two batches, and counts how often."""

    def __init__(self) -> None:
        self.num_made = 0

    def __call__(self, folder: Path) -> None:
        self.num_made += 1
        with SampleWriter(folder) as writer:
            writer.write(SAMPLES[:1])
            writer.write(SAMPLES[1:])
            writer.finish(PROFILE)


def assert_whole(found: MeasuredSet) -> None:
    assert found.profile == PROFILE
    assert len(found.samples) == 3
    for index, (sample, line) in enumerate(SAMPLES):
        token_ids, trained = found.samples.sample(index)
        assert (token_ids.dtype.name, trained.dtype.name) == ("int32", "bool")
        assert tuple(token_ids.tolist()) == sample.token_ids
        assert tuple(trained.tolist()) == sample.trained
        assert found.samples.line(index) == line


def test_a_set_is_made_once_and_cannot_be_written_to(tmp_path: Path) -> None:
    make = Maker()
    assert_whole(TokenCache(tmp_path).get("key", make))
    again = TokenCache(tmp_path).get("key", make)
    assert_whole(again)
    assert make.num_made == 1
    TokenCache(tmp_path).get("other", make)
    assert make.num_made == 2
    for part in again.samples.sample(0):
        with pytest.raises(ValueError, match="read-only"):
            part[0] = 1


def test_a_key_depends_on_every_fact_and_on_the_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keys = {key_of("a", "b"), key_of("ab", ""), key_of("a", "c"), key_of("b", "a"), key_of("a")}
    assert len(keys) == 5
    before = key_of("a", "b")
    changed = tmp_path / "chat.py"
    changed.write_bytes((REPOSITORY / token_cache.MAKERS[0]).read_bytes() + b"\n")
    monkeypatch.setattr(token_cache, "MAKERS", (str(changed), *token_cache.MAKERS[1:]))
    assert key_of("a", "b") != before


def flip(position: int) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[position] ^= 1
        file.write_bytes(bytes(content))

    return damage


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("token_ids.bin", lambda file: file.write_bytes(file.read_bytes()[:-4])),
        ("trained.bin", lambda file: file.write_bytes(file.read_bytes() + b"\1")),
        ("lines.bin", Path.unlink),
        ("ends.bin", flip(8)),
        ("profile.json", flip(14)),
        (INDEX, lambda file: file.write_bytes(b"")),
        (INDEX, flip(-5)),
        (INDEX, lambda file: file.write_text("[]")),
    ],
)
def test_a_broken_set_is_told_and_made_anew(
    name: str, damage: Callable[[Path], object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make = Maker()
    TokenCache(tmp_path).get("key", make)
    damage(tmp_path / "tokens" / "key" / name)
    assert_whole(TokenCache(tmp_path).get("key", make))
    assert make.num_made == 2
    assert "the tokenised data key is broken and is made anew" in caplog.text


def test_one_that_fails_leaves_nothing_and_one_that_died_is_in_nobodys_way(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "token_ids.bin").write_bytes(b"half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        TokenCache(tmp_path).get("key", fail)
    assert [file.name for file in (tmp_path / "tokens").iterdir()] == [".lock-key"]
    left = tmp_path / "tokens" / ".tmp-key"
    left.mkdir()
    (left / "token_ids.bin").write_bytes(b"half")
    assert_whole(TokenCache(tmp_path).get("key", Maker()))
    assert not left.exists()


def test_of_two_at_once_the_second_waits_and_reads_what_the_first_has_made(tmp_path: Path) -> None:
    make, is_making, may_finish = Maker(), threading.Event(), threading.Event()

    def slow(folder: Path) -> None:
        is_making.set()
        assert may_finish.wait(60)
        make(folder)

    found: list[MeasuredSet] = []
    first = threading.Thread(target=lambda: found.append(TokenCache(tmp_path).get("key", slow)))
    first.start()
    assert is_making.wait(60)
    second = threading.Thread(target=lambda: found.append(TokenCache(tmp_path).get("key", make)))
    second.start()
    # Another set is nobody's to wait for, and what the first is making is not yet to be seen.
    TokenCache(tmp_path).get("other", make)
    assert not (tmp_path / "tokens" / "key").exists() and second.is_alive()
    may_finish.set()
    first.join(60)
    second.join(60)
    assert len(found) == 2
    assert make.num_made == 2  # key once, other once
    for each in found:
        assert_whole(each)


def test_sets_opened_longest_ago_go_first_and_an_open_one_never(tmp_path: Path) -> None:
    """A process of its own has one open: its lock is what keeps it."""
    make = Maker()
    cache = TokenCache(tmp_path)
    names = ("reader's", "old", "older", "newer")
    for age, name in enumerate(names):
        cache.get(name, make)
        os.utime(tmp_path / "tokens" / name / INDEX, (1000 - age, 1000 - age))
    os.utime(tmp_path / "tokens" / "newer" / INDEX, (2000, 2000))
    size = sum(file.stat().st_size for file in (tmp_path / "tokens" / "old").iterdir())
    program = (
        "import sys; from pathlib import Path; from worker.engine.token_cache import TokenCache\n"
        "held = TokenCache(Path(sys.argv[1])).get(\"reader's\", None); print('open', flush=True); sys.stdin.read()"
    )
    reader = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert reader.stdout is not None and reader.stdout.readline() == "open\n"
        os.utime(tmp_path / "tokens" / "reader's" / INDEX, (1, 1))  # the first to go, if it weren't open

        def there() -> set[str]:
            return {folder.name for folder in (tmp_path / "tokens").iterdir() if not folder.name.startswith(".")}

        assert there() == set(names)
        new = TokenCache(tmp_path, max_bytes=3 * size).get("new", make)
        assert there() == {"reader's", "newer", "new"}
        assert_whole(new)
        # What this process has open stays as well, and what it is about to return, even where nothing else fits.
        TokenCache(tmp_path, max_bytes=0).get("last", make)
        assert there() == {"reader's", "new", "last"}
    finally:
        reader.communicate("")
    TokenCache(tmp_path, max_bytes=0).get("very last", make)
    assert there() == {"new", "very last"}
    assert_whole(new)
