"""`python -m worker.engine.prepare ORDER.json RESULT.json`: measures a data set with a tokenizer, within limits.

A chat template is a program that came with somebody's model, and a data file is what anybody uploaded. transformers'
sandbox keeps a template from touching the machine, but not from running for ever or filling the memory, so all of it
happens in a child process that sets limits on itself:

    one rendering   RENDERING_CPU_S by a timer whose signal ends the process, even inside a single long operation of C;
                    RENDERING_BYTES more memory than before, whose lack is a MemoryError
    the whole run   CPU_S by RLIMIT_CPU, MEMORY_BYTES over what the imports took by RLIMIT_AS, no core dump

The parent stays small. It waits and writes the result: the child's own, or the sentence that belongs to the signal the
child died of. The child dies with its parent.

ORDER.json is a `worker.job_directory.PrepareOrder`, RESULT.json a `core.wire.ProfileResult`. Whoever started this
limits its wall time. Beside the result the child leaves word of how far it is, and of a large file first what a sample
of its rows shows.
"""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from core.errors import UserError
from core.profile import DataProfile, TokenPreview
from core.wire import ProfileProgress, ProfileResult
from worker import dies_with_parent
from worker.job_directory import PREPARE_PROGRESS, PREPARE_SAMPLED, PrepareOrder, write_json

# The parent needs none of them, and each takes a second.
if TYPE_CHECKING:
    from worker.engine.data import Reading
    from worker.engine.samples import MeasuredSet
    from worker.engine.tokenizer import HfChatTokenizer

RENDERING_CPU_S = 2
RENDERING_BYTES = 512 * 2**20
CPU_S = 1800
MEMORY_BYTES = 16 * 2**30
NUM_PREVIEWED = 20  # rows
MAX_PREVIEWED_TOKENS = 4096  # of one sample
MOST_UNTRAINED_PREVIEWED = 3  # samples without a trained token that come further behind
TOKENISING_SHARE = 0.9  # of the work, as measured; the rest is looking for duplicates
PROGRESS_EVERY_S = 1.0

CHILD_ENVIRONMENT = {
    # Each thread's heap reserves 64 MB of addresses, which would count against the limit.
    "MALLOC_ARENA_MAX": "4",
    "CUDA_VISIBLE_DEVICES": "",
}


def prepare(order_path: Path, result_path: Path) -> None:
    """Runs the child and leaves a result, whatever becomes of it."""
    result_path.unlink(missing_ok=True)
    measuring = [sys.executable, "-m", "worker.engine.prepare", "--measure", str(order_path), str(result_path)]
    child = subprocess.run(  # noqa: S603  our own module
        [sys.executable, str(Path(dies_with_parent.__file__)), str(os.getpid()), *measuring],
        env={**os.environ, **CHILD_ENVIRONMENT},
        check=False,
    )
    if child.returncode != 0:
        write_json(result_path, _refusal(death_of_child(child.returncode)))


def death_of_child(code: int) -> UserError:
    """What a person is told about an exit code, negative for a signal."""
    match -code:
        case signal.SIGPROF:
            return UserError("chat.template_slow", "model.chat_template", limit_s=RENDERING_CPU_S)
        case signal.SIGXCPU:
            return UserError("profile.slow", "data.train", limit_s=CPU_S)
        case signal.SIGKILL | signal.SIGABRT | signal.SIGSEGV:  # the kernel short of memory, or Rust, or C
            return _out_of_memory()
    return UserError("profile.crashed", exit_code=code)


def _refusal(error: UserError) -> ProfileResult:
    return ProfileResult(error=error.text(), field=error.field)


def _out_of_memory() -> UserError:
    return UserError("profile.memory", "data.train", limit_gb=MEMORY_BYTES // 2**30)


# -- the child -----------------------------------------------------------------------------------------------------
def measure(order_path: Path, result_path: Path) -> None:
    order = PrepareOrder.model_validate_json(order_path.read_bytes())
    import transformers.models.auto  # noqa: F401  what is imported before limits are set doesn't count

    limit_process()
    try:
        result = ProfileResult(profile=measure_profile(order, Told(result_path.parent)))
    except UserError as error:
        result = _refusal(error)
    except MemoryError:
        result = _refusal(_out_of_memory())
    write_json(result_path, result)


class Told:
    """What others are told while this works, in files of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._told_at = time.monotonic()

    def tell_sample(self, profile: DataProfile) -> None:
        write_json(self._folder / PREPARE_SAMPLED, ProfileProgress(fraction=0.0, sampled=profile))

    def tell(self, fraction: float) -> None:
        if time.monotonic() - self._told_at >= PROGRESS_EVERY_S:
            write_json(self._folder / PREPARE_PROGRESS, ProfileProgress(fraction=fraction))
            self._told_at = time.monotonic()


def measure_profile(order: PrepareOrder, told: Told) -> DataProfile:
    from core.sampled import LEAST_ROWS
    from worker.engine.data import Reading, cache_key
    from worker.engine.data import measure as measure_file
    from worker.engine.duplicates import with_duplicates
    from worker.engine.token_cache import TokenCache
    from worker.engine.tokenizer import HfChatTokenizer

    tokenizer = HfChatTokenizer.load(Path(order.model_path), order.chat_template, limited_rendering)
    reading = Reading(order.format, order.train_on, order.multi_turn)
    cache = TokenCache(Path(order.cache_dir)) if order.cache_dir else None
    is_known = cache is not None and cache.holds(cache_key(order.data, tokenizer, reading))
    if order.num_rows >= LEAST_ROWS and not is_known:
        sampled = measure_sample(order, tokenizer, reading)
        if sampled is not None:
            told.tell_sample(sampled)
    # The limits on a rendering are the process's: no other thread may spend them.
    measured = measure_file(
        order.data,
        tokenizer,
        reading,
        lambda done, total: told.tell(TOKENISING_SHARE * done / total),
        cache=cache,
        is_ahead=False,
    )
    profile = with_duplicates(
        measured,
        Path(order.data.path),
        lambda done, total: told.tell(TOKENISING_SHARE + (1 - TOKENISING_SHARE) * done / total),
    )
    return profile.model_copy(update={"preview": preview(measured, tokenizer)})


def measure_sample(order: PrepareOrder, tokenizer: "HfChatTokenizer", reading: "Reading") -> DataProfile | None:
    """Of rows spread over the file; None where none of them is good, which reading all of it says better."""
    from core.sampled import spread_rows
    from worker.engine.data import read_samples

    only = frozenset(spread_rows(order.num_rows).tolist())
    try:
        measured = read_samples(Path(order.data.path), tokenizer, reading, is_ahead=False, only=only)
    except UserError:
        return None
    return measured.profile.model_copy(update={"preview": preview(measured, tokenizer)})


def preview(measured: "MeasuredSet", tokenizer: "HfChatTokenizer") -> tuple[TokenPreview, ...]:
    """The first rows as the model sees them, of a row that became several samples the last, which holds most; and the
    first samples behind those in which nothing is trained."""
    profile = measured.profile
    last_of_row: dict[int, int] = {}
    for index, row in enumerate(profile.sample_row):
        if row not in last_of_row and len(last_of_row) == NUM_PREVIEWED:
            break
        last_of_row[row] = index
    shown = [*last_of_row.values()]
    untrained = (index for index, trained in enumerate(profile.sample_trained) if not trained and index > shown[-1])
    shown += islice(untrained, MOST_UNTRAINED_PREVIEWED)
    return tuple(_preview(measured, tokenizer, index) for index in shown)


def _preview(measured: "MeasuredSet", tokenizer: "HfChatTokenizer", index: int) -> TokenPreview:
    token_ids, trained = measured.samples.sample(index)
    shown = token_ids[:MAX_PREVIEWED_TOKENS].tolist()
    return TokenPreview(
        line=measured.samples.line(index),
        pieces=tokenizer.pieces(shown),
        trained=tuple(trained[: len(shown)].tolist()),
        num_hidden=len(token_ids) - len(shown),
        ids=tuple(shown),
        special=tokenizer.are_special(shown),
        num_trained=measured.profile.sample_trained[index],
        num_turns=measured.profile.sample_turns[index],
    )


def limit_process() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 10))
    limit = _lowered(resource.RLIMIT_AS, _address_space_bytes() + MEMORY_BYTES)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _lowered(kind: int, limit: int) -> int:
    """`limit`, or the hard limit that is in force already if that is less."""
    hard = resource.getrlimit(kind)[1]
    return limit if hard == resource.RLIM_INFINITY else min(limit, hard)


def _address_space_bytes() -> int:
    return int(Path("/proc/self/statm").read_bytes().split()[0]) * resource.getpagesize()


@contextmanager
def limited_rendering() -> Iterator[None]:
    """Bounds what runs within: too long ends the process by SIGPROF, too much memory raises UserError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = _lowered(resource.RLIMIT_AS, _address_space_bytes() + RENDERING_BYTES)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    signal.setitimer(signal.ITIMER_PROF, RENDERING_CPU_S)
    try:
        yield
    except MemoryError as error:
        raise UserError("chat.template_memory", "model.chat_template", limit_mb=RENDERING_BYTES // 2**20) from error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def main(arguments: list[str]) -> None:
    match arguments:
        case ["--measure", order, result]:
            measure(Path(order), Path(result))
        case [order, result]:
            prepare(Path(order), Path(result))
        case _:
            sys.exit("usage: python -m worker.engine.prepare ORDER.json RESULT.json")


if __name__ == "__main__":
    main(sys.argv[1:])
