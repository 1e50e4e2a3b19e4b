"""Tokenised data by content, shared by the jobs of a host: made once, then opened in a moment.

    <cache>/tokens/<key>/          a set of samples (worker.engine.samples)
    <cache>/tokens/.lock-<key>     whoever makes a set holds it; it stays, as an empty file
    <cache>/tokens/.tmp-<key>/     a set in the making

The key is a hash of all that the samples depend on: the bytes of the data, the tokenizer and its templates, how the
data is to be read, and the code that reads it. So nothing in here is ever out of date, and nothing needs to be cleared.

A set is written to a folder of another name, made durable, and renamed: what stands under a key is whole, whoever died.
Two that want the same set meet at the lock; the second waits and then opens what the first has made. An index that
doesn't fit its files (a disk that lost them, somebody's hand) is taken for no set at all, and it is made anew.

Whoever has a set open holds a shared lock on its index.json until the process ends or forgets it. When a new set brings
the cache over MAX_CACHE_BYTES, those that were opened longest ago go, but none that is open: the lock tells.
"""

import fcntl
import hashlib
import logging
import os
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from worker.engine.samples import INDEX, Broken, MeasuredSet, open_set
from worker.job_directory import sync_folder

log = logging.getLogger(__name__)

MAX_CACHE_BYTES = 50 * 10**9  # 10 billion tokens

# What makes samples of rows. A change to any of these makes other keys, so that nobody has to think of it.
MAKERS = (
    *("core/chat.py", "core/conversation.py", "core/parquet.py", "core/profile.py", "core/rows.py"),
    *("worker/engine/data.py", "worker/engine/parquet.py", "worker/engine/samples.py", "worker/engine/tokenizer.py"),
)


def key_of(*facts: str) -> str:
    """`facts` are what a set depends on beside our own code."""
    whole = hashlib.sha256()
    for fact in (*facts, _code_version()):
        whole.update(hashlib.sha256(fact.encode()).digest())
    return whole.hexdigest()[:32]


def _code_version() -> str:
    root = Path(__file__).resolve().parents[2]
    return "\n".join(hashlib.sha256((root / name).read_bytes()).hexdigest() for name in MAKERS)


class TokenCache:
    def __init__(self, folder: Path, max_bytes: int = MAX_CACHE_BYTES) -> None:
        self._folder = folder / "tokens"
        self._max_bytes = max_bytes

    def get(self, key: str, make: Callable[[Path], object]) -> MeasuredSet:
        """The set of this key; `make` writes it into the given empty folder where there is none yet."""
        found = self._open(key)
        if found is not None:
            return found
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._making(key):
            found = self._open(key) or self._make(key, make)
        self._evict()
        return found

    def holds(self, key: str) -> bool:
        return (self._folder / key / INDEX).exists()

    @contextmanager
    def _making(self, key: str) -> Iterator[None]:
        with (self._folder / f".lock-{key}").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make(self, key: str, make: Callable[[Path], object]) -> MeasuredSet:
        target, temporary = self._folder / key, self._folder / f".tmp-{key}"
        for folder in (temporary, target):  # what a killed process left; what is broken
            shutil.rmtree(folder, ignore_errors=True)
        temporary.mkdir()
        try:
            make(temporary)
            # Open, and so locked, before anybody else can see it.
            found = open_set(temporary, keeper=self._lock(temporary, fcntl.LOCK_SH))
            temporary.rename(target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_folder(self._folder)
        return found

    def _open(self, key: str) -> MeasuredSet | None:
        folder = self._folder / key
        lock = self._lock(folder, fcntl.LOCK_SH)
        if lock is None:
            return None
        os.utime(lock.file)
        try:
            return open_set(folder, keeper=lock)
        except Broken as error:
            log.warning("the tokenised data %s is broken and is made anew: %s", key, error)
            lock.release()
            return None

    @staticmethod
    def _lock(folder: Path, operation: int) -> "_Lock | None":
        """The set's index, locked; None where there is none, or `operation` doesn't block and others have it."""
        path = folder / INDEX
        try:
            lock = _Lock(path, operation)
        except (FileNotFoundError, BlockingIOError):
            return None
        try:
            # Whoever held it may have been removing it.
            if os.path.samestat(os.fstat(lock.file), path.stat()):
                return lock
        except FileNotFoundError:
            pass
        lock.release()
        return None

    def _evict(self) -> None:
        """Removes sets until the rest is within the limit; the ones opened longest ago first, no open one."""
        sets = [folder for folder in self._folder.iterdir() if not folder.name.startswith(".")]
        sizes = {folder: _num_bytes(folder) for folder in sets}
        total = sum(sizes.values())
        for folder in sorted(sets, key=_last_opened):
            if total <= self._max_bytes:
                return
            lock = self._lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock is None and (folder / INDEX).exists():
                continue
            shutil.rmtree(folder, ignore_errors=True)
            total -= sizes[folder]
            if lock is not None:
                lock.release()


class _Lock:
    """A lock on a file until `release`, or until nobody refers to it any more."""

    def __init__(self, path: Path, operation: int) -> None:
        self.file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.release = weakref.finalize(self, os.close, self.file)
        try:
            fcntl.flock(self.file, operation)
        except BaseException:
            self.release()
            raise


def _last_opened(folder: Path) -> float:
    try:
        return (folder / INDEX).stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _num_bytes(folder: Path) -> int:
    """0 of one that somebody else is removing."""
    try:
        return sum(file.stat().st_size for file in folder.iterdir())
    except FileNotFoundError:
        return 0
