"""The same training by us and by TRL's SFTTrainer, and what each takes: `python -m bench.throughput`.

    --data FILE      alpaca, sharegpt or messages rows; by default our own dialogues
    --model NAME     demo, wide (a vocabulary as large beside its width as real models have it), or a model's folder
    --pairs N        runs of each way, one way after the other; medians are shown
    --short          fewer conversations and one run: minutes instead of half an hour
    --without-peers  ours alone

See bench/training.py for what is equal. TRL is set in three ways: padded, eight conversations a batch; packed as it
comes when packing is switched on, eight packs a batch; and packed at its best, one pack a pass, with as many passes a
step as make its steps about as large as ours. Seconds are CPU seconds on one thread, once of the training steps alone
and once end to end, from the start of the process until the result is saved: what a run costs besides its steps counts
too. "Trained tokens a second" divides by those. The first table is the comparison, the second says that all learn the
same, and the third repeats it on short, long and mixed conversations.
"""

import argparse
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench import ours, peers
from bench.measure import ONE_THREAD, SCRATCH, ChildFailed, mebibytes, median, print_table, test_bed
from bench.models import find_model
from bench.training import (
    Run,
    Talk,
    Task,
    Way,
    make_adapter,
    planned_order,
    prepare_ours,
    read_talks,
    run_ours,
    run_trl,
    write_messages,
)
from core.packing import sample_hash

OURS = "Pegbox, packed"
PADDED_BATCH = 8  # conversations; TRL's default, and a divisor of samples_per_step


@dataclass
class Results:
    """The runs of each way, or why it has none."""

    runs: dict[str, list[Run]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    steps: list[tuple[int, ...]] = field(default_factory=list)  # our plan: row numbers of each step

    def of(self, name: str, figure: str) -> float:
        return median(_figure(run, figure) for run in self.runs[name])


def _figure(run: Run, name: str) -> float:
    match name:
        case "loop_cpu_s":
            return run.loop_cpu_s
        case "loop_wall_s":
            return run.loop_wall_s
        case "cpu_s":
            return run.usage.cpu_s
        case "wall_s":
            return run.usage.wall_s
        case "peak":
            return run.usage.peak_bytes
        case "training_bytes":
            return max(0, run.usage.peak_bytes - run.rss_before_bytes)
    raise AssertionError(name)


def trl_ways(task: Task, talks: Sequence[Talk]) -> tuple[Way, ...]:
    assert task.samples_per_step % PADDED_BATCH == 0
    per_pack = task.max_length * len(talks) / sum(talk.length for talk in talks)  # conversations that a pack can hold
    packs_a_step = max(1, round(task.samples_per_step / per_pack))
    return (
        Way("TRL, padded", False, PADDED_BATCH, task.samples_per_step // PADDED_BATCH, follows_our_order=True),
        Way("TRL, packing as it comes", True, 8, 1),
        Way("TRL, packing, one pack a pass", True, 1, packs_a_step),
    )


def compare(task: Task, ways: Sequence[Way], pairs: int, folder: Path) -> Results:
    """Interleaved: each way once, then each way again."""
    results = Results()
    results.steps = planned_order(prepare_ours(task, folder / "plan"))
    order = [row for step in results.steps for row in step]
    for number in range(pairs):
        results.runs.setdefault(OURS, []).append(run_ours(task, folder / f"ours-{number}"))
        events = ours.read_steps(folder / f"ours-{number}" / "job")
        assert [event["sample_hash"] for event in events] == [sample_hash(step) for step in results.steps]
        for way in ways:
            if way.name in results.problems:
                continue
            at = folder / f"{way.name.replace(' ', '-').replace(',', '')}-{number}"
            try:
                results.runs.setdefault(way.name, []).append(run_trl(task, way, at, order))
            except (peers.Missing, ChildFailed) as problem:
                results.problems[way.name] = str(problem)
                del results.runs[way.name]
            shutil.rmtree(at, ignore_errors=True)
    return results


def print_cost(results: Results) -> None:
    def row(name: str) -> list[str]:
        if name in results.problems:
            return [name, f"not to be had here: {results.problems[name].splitlines()[-1]}", *[""] * 11]
        run = results.runs[name][0]
        loop, whole = results.of(name, "loop_cpu_s"), results.of(name, "cpu_s")
        return [
            name,
            f"{len(run.losses):,}",
            f"{run.slots:,}",
            f"{run.trained_tokens:,}",
            f"{loop:.1f}",
            f"{run.trained_tokens / loop:,.0f}",
            f"{run.trained_tokens / results.of(name, 'loop_wall_s'):,.0f}",
            _times(results, name, "loop_cpu_s"),
            f"{whole:.1f}",
            f"{run.trained_tokens / whole:,.0f}",
            _times(results, name, "cpu_s"),
            mebibytes(results.of(name, "peak")),
            mebibytes(results.of(name, "training_bytes")),
        ]

    columns = (
        "way",
        "steps",
        "slots",
        "trained tokens",
        "steps: CPU s",
        "tokens / CPU s",
        "tokens / s",
        "ours is",
        "end to end: CPU s",
        "tokens / CPU s",
        "ours is",
        "peak MiB",
        "of it training",
    )
    print_table(columns, [row(name) for name in (*results.runs, *results.problems)])


def _times(results: Results, name: str, figure: str) -> str:
    """How many times less of it ours takes for one trained token."""
    mine, theirs = results.runs[OURS][0].trained_tokens, results.runs[name][0].trained_tokens
    if name == OURS:
        return ""
    return f"{results.of(name, figure) / theirs * mine / results.of(OURS, figure):.2f}x"


def print_curves(results: Results, ways: Sequence[Way]) -> None:
    follows = {way.name for way in ways if way.follows_our_order}
    mine = results.runs[OURS][0].losses

    def row(name: str) -> list[str]:
        losses = results.runs[name][0].losses
        difference = ""
        if name in follows:
            assert len(losses) == len(mine)
            difference = f"{max(abs(a - b) for a, b in zip(mine, losses, strict=True)):.1e}"
        return [name, results.runs[name][0].attention, f"{losses[0]:.6f}", f"{losses[-1]:.6f}", difference]

    columns = ("way", "attention", "first loss", "last loss", "largest difference from ours, the same samples a step")
    print_table(columns, [row(name) for name in results.runs])


def mixes(talks: Sequence[Talk], samples_per_step: int, tokens: int) -> dict[str, list[Talk]]:
    """Each of about so many tokens, in whole steps: the shorter third of the conversations, the longer third, and of
    each two short ones a long one."""
    by_length = sorted(talks, key=lambda talk: talk.length)
    third = len(by_length) // 3
    short, long = by_length[:third], by_length[-third:]
    mixed = [talk for pair in zip(short[::2], short[1::2], long, strict=False) for talk in pair]

    def cut(pool: list[Talk]) -> list[Talk]:
        mean = sum(talk.length for talk in pool) / len(pool)
        count = max(1, min(len(pool), round(tokens / mean)) // samples_per_step) * samples_per_step
        stride = max(1, len(pool) // count)
        return pool[::stride][:count]

    return {"short": cut(short), "long": cut(long), "mixed": cut(mixed)}


def print_mixes(task: Task, sets: dict[str, list[Talk]], folder: Path, with_peers: bool) -> None:
    rows = []
    for name, talks in sets.items():
        at = folder / f"mix-{name}"
        at.mkdir()
        of_mix = replace(task, data=at / "messages.jsonl")
        write_messages(talks, of_mix.data)
        ways = trl_ways(of_mix, talks) if with_peers else ()
        results = compare(of_mix, ways, 1, at)
        lengths = [talk.length for talk in talks]
        about = f"{name}: {len(talks)} of {min(lengths)} to {max(lengths)} tokens"
        for way in (*results.runs, *results.problems):
            if way in results.problems:
                rows.append([about, way, "not to be had here", "", "", "", ""])
                continue
            rows.append(
                [
                    about,
                    way,
                    f"{results.runs[way][0].slots:,}",
                    f"{results.of(way, 'loop_cpu_s'):.1f}",
                    _times(results, way, "loop_cpu_s"),
                    f"{results.of(way, 'cpu_s'):.1f}",
                    _times(results, way, "cpu_s"),
                ]
            )
    print_table(("conversations", "way", "slots", "steps: CPU s", "ours is", "end to end: CPU s", "ours is"), rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--count", type=int, default=576, help="conversations, at most")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens, of a conversation and of a row")
    parser.add_argument("--samples-per-step", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--method", choices=("lora", "full"), default="lora")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--without-mixes", action="store_true")
    parser.add_argument("--without-peers", action="store_true")
    parser.add_argument("--short", action="store_true")
    options = parser.parse_args(arguments)
    if options.short:
        options.pairs, options.count = 1, min(options.count, 96)
    # Also here, where job directories get their number of threads. This bench is of CPUs; bench/gpu has the others.
    os.environ.update(ONE_THREAD, CUDA_VISIBLE_DEVICES="")

    SCRATCH.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="throughput-", dir=SCRATCH))
    try:
        measure(options, folder)
    finally:
        shutil.rmtree(folder)


def measure(options: argparse.Namespace, folder: Path) -> None:
    model = find_model(options.model)
    talks = read_talks(options.data, model, options.max_length)
    whole_steps = min(options.count, len(talks.kept)) // options.samples_per_step
    chosen = talks.kept[: whole_steps * options.samples_per_step]
    assert chosen, f"{len(talks.kept)} conversations make no step of {options.samples_per_step}"
    task = Task(
        model=model,
        data=folder / "messages.jsonl",
        max_length=options.max_length,
        samples_per_step=options.samples_per_step,
        epochs=options.epochs,
        learning_rate=options.learning_rate,
        method=options.method,
        adapter=make_adapter(model, folder / "adapter", 42) if options.method == "lora" else None,
    )
    write_messages(chosen, task.data)
    ways = () if options.without_peers else trl_ways(task, chosen)

    print(f"{test_bed()}; medians of {options.pairs}, interleaved; fp32, one thread")
    if not options.without_peers:
        try:
            print(peers.versions(peers.TRL))
        except peers.Missing as missing:
            print(f"TRL is not to be had here: {missing}")
    tokens = sum(talk.length for talk in chosen)
    left_out = "; ".join(f"{count} left out: {reason}" for reason, count in talks.left_out.items())
    print(
        f"{options.method} on {options.model}; {len(chosen):,} conversations of "
        f"{options.data.name if options.data else 'our own dialogues'}, {tokens:,} tokens, "
        f"{sum(talk.trained for talk in chosen):,} trained, {options.epochs} epochs, "
        f"{options.samples_per_step} a step{'; ' + left_out if left_out else ''}\n"
    )
    results = compare(task, ways, options.pairs, folder)
    print_cost(results)
    print()
    print_curves(results, ways)
    for name, problem in results.problems.items():
        print(f"\n{name}: {problem}")
    if not options.without_mixes:
        print()
        sets = mixes(talks.kept, options.samples_per_step, tokens // 3)
        print_mixes(task, sets, folder, not options.without_peers)


if __name__ == "__main__":
    main()
