"""The same data made ready by us and by TRL's SFTTrainer: `python -m bench.preprocess`.

    --data FILE        alpaca, sharegpt or messages rows; by default our own dialogues
    --model NAME       demo, or a model's folder; its template must mark what is generated, which TRL needs
    --conversations N  the data, repeated or cut to so many
    --pairs N          runs of each, one after the other; medians are shown
    --without-peers    ours alone

Both begin with a file of messages and end with tokens and masks on disk: ours in the job's cache, TRL's in its table.
Imports and the model's weights are not counted. Each sets its threads as it likes: seconds of wall are what a person
waits on this machine, CPU seconds are what it costs. That tokens and masks are the same is checked in every run; a
difference ends the bench. The second start of the same job is ours alone: it opens what the first has made.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np

from bench import peers
from bench.measure import SCRATCH, ChildFailed, median, print_table, run_child, test_bed
from bench.models import find_model
from bench.training import read_talks, write_messages
from core.spec import parse_spec
from worker.engine.data import load_corpus
from worker.engine.tokenizer import HfChatTokenizer
from worker.job_directory import InputFile, Inputs

PREPARE_TRL = Path(__file__).resolve().parent / "peer" / "preprocess_trl.py"
OFFLINE = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
LONGEST = 1 << 20  # tokens; nothing is left out
OURS, AGAIN, TRL = "Pegbox", "Pegbox, second start", "TRL"


@dataclass(frozen=True)
class Taken:
    wall_s: float
    cpu_s: float


def prepare_ours(asked: Path, result: Path, samples: Path) -> None:
    """In a process of its own: a job's first look at its data, and a second job's."""
    task = json.loads(asked.read_text())
    file = InputFile(dataset="data", path=task["data"], sha256="0" * 64)
    inputs = Inputs(model_path="", model_name="", data=(file,), cache_dir=str(result.parent / "cache"))
    spec = parse_spec({"data": {"train": [{"dataset": "data"}], "validation": None, "multi_turn": "whole"}})
    tokenizer = HfChatTokenizer.load(Path(task["model"]))
    taken = []
    for _ in range(2):
        began = time.perf_counter(), time.process_time()
        corpus = load_corpus(spec, inputs, tokenizer)
        taken.append({"wall_s": time.perf_counter() - began[0], "cpu_s": time.process_time() - began[1]})
    result.write_text(json.dumps(taken))
    each = [corpus.sample(number) for number in range(len(corpus))]
    np.savez(
        samples,
        token_ids=np.concatenate([token_ids for token_ids, _ in each]),
        trained=np.concatenate([trained for _, trained in each]),
        lengths=np.array([len(token_ids) for token_ids, _ in each]),
    )


def run(command: list[str | Path], asked: Path, folder: Path) -> tuple[list[Taken], Path]:
    folder.mkdir()
    result, samples = folder / "result.json", folder / "samples.npz"
    run_child([*command, asked, result, samples], OFFLINE, folder / "log")
    taken = json.loads(result.read_text())
    return [Taken(**each) for each in (taken if isinstance(taken, list) else [taken])], samples


def refuse_other_samples(ours: Path, theirs: Path) -> None:
    """Ends the bench where tokens or masks differ."""
    first, second = np.load(ours), np.load(theirs)
    for name in ("lengths", "token_ids", "trained"):
        if not np.array_equal(first[name], second[name]):
            sys.exit(f"the {name} differ between Pegbox and TRL")


def compare(asked: Path, pairs: int, folder: Path, *, has_peers: bool) -> tuple[dict[str, list[Taken]], str]:
    """Interleaved: ours, TRL's, ours again."""
    taken: dict[str, list[Taken]] = {OURS: [], AGAIN: []}
    problem = ""
    for number in range(pairs):
        (cold, warm), samples = run(
            [sys.executable, "-m", "bench.preprocess", "--child"], asked, folder / f"ours-{number}"
        )
        taken[OURS].append(cold)
        taken[AGAIN].append(warm)
        if has_peers and not problem:
            try:
                (theirs,), others = run([peers.python_of(peers.TRL), PREPARE_TRL], asked, folder / f"trl-{number}")
            except (peers.Missing, ChildFailed) as error:
                problem = str(error).splitlines()[-1]
                continue
            refuse_other_samples(samples, others)
            taken.setdefault(TRL, []).append(theirs)
    return taken, problem


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--conversations", type=int, default=2000)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--without-peers", action="store_true")
    options = parser.parse_args()

    model = find_model(options.model)
    talks = read_talks(options.data, model, LONGEST)
    chosen = list(islice(cycle(talks.kept), options.conversations))
    SCRATCH.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=SCRATCH, prefix="preprocess-"))
    try:
        write_messages(chosen, folder / "messages.jsonl")
        asked = folder / "asked.json"
        asked.write_text(json.dumps({"model": str(model), "data": str(folder / "messages.jsonl")}))
        taken, problem = compare(asked, options.pairs, folder, has_peers=not options.without_peers)
    finally:
        shutil.rmtree(folder)

    num_tokens, num_trained = sum(talk.length for talk in chosen), sum(talk.trained for talk in chosen)
    print(f"\n## Preprocessing ({test_bed()})\n")
    print(
        f"{len(chosen):,} conversations, {num_tokens:,} tokens, {num_trained:,} trained, from "
        f"{options.data.name if options.data else 'our own dialogues'}; medians of {options.pairs} interleaved runs\n"
    )
    columns = ("", "wall s", "conversations / s", "CPU s", "conversations / CPU s", "x TRL (wall)", "x TRL (CPU)")
    print_table(columns, [row(name, taken, len(chosen)) for name in (OURS, AGAIN, TRL) if name in taken])
    if problem:
        print(f"\nTRL is not to be had here: {problem}")
    elif TRL in taken:
        print("\nTokens and masks are the same in every run.")


def row(name: str, taken: dict[str, list[Taken]], num_conversations: int) -> list[str]:
    wall, cpu = (median(getattr(each, field) for each in taken[name]) for field in ("wall_s", "cpu_s"))
    cells = [f"{wall:.3f}", f"{num_conversations / wall:,.0f}", f"{cpu:.3f}", f"{num_conversations / cpu:,.0f}"]
    if TRL not in taken:
        return [name, *cells, "", ""]
    theirs = [median(getattr(each, field) for each in taken[TRL]) for field in ("wall_s", "cpu_s")]
    return [name, *cells, f"{theirs[0] / wall:.1f}", f"{theirs[1] / cpu:.1f}"]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        prepare_ours(*map(Path, sys.argv[2:]))
    else:
        main()
