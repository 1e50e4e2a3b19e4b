"""torchrun ... ranks_script.py ORDERS.json: whole jobs, one after the other, on the ranks that this process is one of.

Starting ranks costs seconds, a tiny job a fraction of one, so many jobs share a start. ORDERS.json lists them by
directory; what ended one is written to its raised.txt. A memory_bytes.json in a job's directory says how much each rank
finds its device to have."""

import contextlib
import json
import sys
from pathlib import Path
from unittest import mock

from worker.engine import train as engine
from worker.engine.device import find_device
from worker.engine.emit import Emitter, NoEmitter
from worker.engine.ranks import joined
from worker.engine.signals import Signals
from worker.engine.train import Run, train


def main(orders: Path) -> None:
    with joined(orders.parent) as ranks:
        for job in map(Path, json.loads(orders.read_text())):
            with contextlib.ExitStack() as stack:
                stack.enter_context(devices_of(job, ranks.rank))
                emitter = stack.enter_context(Emitter(job / "events.jsonl")) if ranks.is_first else NoEmitter()
                try:
                    train(Run(job, emitter, Signals(), ranks))
                except Exception as error:
                    (job / f"raised-{ranks.rank}.txt").write_text(f"{type(error).__name__}: {error}")
                    if not isinstance(error, ValueError):
                        raise


def devices_of(job: Path, rank: int) -> contextlib.AbstractContextManager[object]:
    try:
        memory_bytes = json.loads((job / "memory_bytes.json").read_text())[rank]
    except FileNotFoundError:
        return contextlib.nullcontext()

    def find(name: str, place: int, cpu_slots: int) -> tuple[object, object]:
        device, facts = find_device(name, place, cpu_slots)
        return device, facts.model_copy(update={"memory_bytes": memory_bytes})

    return mock.patch.object(engine, "find_device", find)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
