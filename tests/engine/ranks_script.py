"""torchrun ... ranks_script.py ORDERS.json: whole jobs, one after the other, on the ranks that this process is one of.

Starting ranks costs seconds, a tiny job a fraction of one, so many jobs share a start. ORDERS.json lists them by
directory; what ended one is written to its raised.txt."""

import contextlib
import json
import sys
from pathlib import Path

from worker.engine.emit import Emitter, NoEmitter
from worker.engine.ranks import joined
from worker.engine.signals import Signals
from worker.engine.train import Run, train


def main(orders: Path) -> None:
    with joined(orders.parent) as ranks:
        for job in map(Path, json.loads(orders.read_text())):
            with contextlib.ExitStack() as stack:
                emitter = stack.enter_context(Emitter(job / "events.jsonl")) if ranks.is_first else NoEmitter()
                try:
                    train(Run(job, emitter, Signals(), ranks))
                except Exception as error:
                    (job / f"raised-{ranks.rank}.txt").write_text(f"{type(error).__name__}: {error}")
                    if not isinstance(error, ValueError):
                        raise


if __name__ == "__main__":
    main(Path(sys.argv[1]))
