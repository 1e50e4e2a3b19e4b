"""Stands in for worker.engine.prepare; the data set's first line tells how it should go."""

import json
import subprocess
import sys
import time
from pathlib import Path

from worker.job_directory import PrepareOrder

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
    case _:
        profile = {
            "num_rows": 1,
            "format": order.format,
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
        Path(sys.argv[2]).write_text(json.dumps({"profile": profile}))
