"""Stands in for worker.engine.prepare; the data set's first line tells how it should go."""

import json
import subprocess
import sys
import time
from pathlib import Path

from worker.job_directory import PREPARE_PROGRESS, PREPARE_SAMPLED, PrepareOrder

PROFILE = {
    "num_rows": 1,
    "format": "messages",
    "multi_turn": "whole",
    "multi_turn_reason": "as asked",
    "num_refused": 0,
    "refused": [],
    "sample_row": [0],
    "sample_length": [12],
    "sample_trained": [5],
    "sample_turns": [1],
    "sample_hash": ["00"],
}


def tell(name: str, **message: object) -> None:
    temporary = Path(sys.argv[2]).with_name(f".{name}")
    temporary.write_text(json.dumps(message))
    temporary.rename(temporary.with_name(name))


order = PrepareOrder.model_validate_json(Path(sys.argv[1]).read_bytes())
assert (Path(order.model_path) / "config.json").is_file()
match Path(order.data.path).read_text().strip():
    case "crash":
        raise MemoryError("no memory for the tokenizer")
    case "hang":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        time.sleep(600)
    case "refuse":
        Path(sys.argv[2]).write_text(json.dumps({"error": "no row is left", "field": "data.format"}))
    case "slow":
        # Goes on when the test has seen what is told.
        tell(PREPARE_SAMPLED, fraction=0.0, sampled=PROFILE)
        tell(PREPARE_PROGRESS, fraction=0.5)
        while not Path(f"{order.data.path}.go").exists():
            time.sleep(0.02)
        Path(sys.argv[2]).write_text(json.dumps({"profile": PROFILE | {"num_rows": order.num_rows}}))
    case _:
        Path(sys.argv[2]).write_text(json.dumps({"profile": PROFILE | {"format": order.format}}))
