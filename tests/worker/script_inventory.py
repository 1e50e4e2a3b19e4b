"""Stands in for worker.engine.inventory: what a host without GPUs would print."""

import json
import sys

slots = int(sys.argv[sys.argv.index("--cpu-slots") + 1]) if "--cpu-slots" in sys.argv else 1
print(
    json.dumps(
        {
            "devices": [
                {"id": f"cpu{number}", "kind": "cpu", "name": "a CPU", "memory_bytes": 1 << 30}
                for number in range(slots)
            ],
            "refused_devices": {"gpu0": "the driver is too old for torch"},
            "models": [],
            "versions": {"torch": "none"},
            "num_cpus": 2,
            "memory_bytes": 1 << 32,
        }
    )
)
