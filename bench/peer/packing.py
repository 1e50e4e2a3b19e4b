"""How another system packs lengths, in an environment that has nothing of ours: `python packing.py NAME ASKED.npz`.

ASKED.npz holds `lengths` and `capacity`. Each is called where its own trainer calls it, with its own defaults, on
lengths in the order of the data; what it drops before it packs is dropped here too. The clock runs over that call
alone: no imports, no compilation, no making of arguments. One JSON object is printed: rows, samples and tokens that
found a place, CPU seconds.
"""

import importlib.util
import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np

Rows = list[list[int]]  # per row the lengths of its samples


def clocked(pack: Callable[[], Rows]) -> tuple[Rows, float]:
    began = time.process_time()
    rows = pack()
    return rows, time.process_time() - began


def trl(lengths: np.ndarray, capacity: int) -> tuple[Rows, float]:
    """pack_dataset as SFTTrainer calls it: the data set's map gives it 1,000 samples at a time. Tokens here are one
    byte and in one column, where a trainer's are two columns of eight, so it moves less than in a real run."""
    import datasets
    import pyarrow as pa
    from trl import pack_dataset

    datasets.disable_progress_bars()
    pieces = []  # a list column counts its elements in 32 bits
    for part in np.array_split(lengths, max(1, int(lengths.sum() >> 30) + 1)):
        offsets = np.concatenate(([0], np.cumsum(part))).astype(np.int32)
        pieces.append(pa.ListArray.from_arrays(offsets, pa.array(np.zeros(offsets[-1], dtype=np.int8))))
    data = datasets.Dataset(pa.table({"input_ids": pa.chunked_array(pieces)}))
    began = time.process_time()
    packed = pack_dataset(data, capacity, "bfd")
    seconds = time.process_time() - began
    return packed.with_format(None)["seq_lengths"][:], seconds


def ms_swift(lengths: np.ndarray, capacity: int) -> tuple[Rows, float]:
    """PackingDataset's own loop with packing_strategy binpack: windows of 1,000, the last pack joins the next. A sample
    above max_length was deleted before (truncation_strategy delete)."""
    module = load_from_file("swift", "dataset/packing.py", "swift.template", "swift.utils")
    rows: Rows = []

    class Queue:
        def put(self, item: tuple[int, list[list[tuple[int, int]]], int]) -> None:
            rows.extend([length for _, length in pack] for pack in item[1])

    fitting = lengths[lengths <= capacity].tolist()

    def pack() -> Rows:
        module.PackingDataset.create_packed_idx(0, 0, fitting, Queue(), capacity, "binpack")
        return rows

    return clocked(pack)


def llama_factory(lengths: np.ndarray, capacity: int) -> tuple[Rows, float]:
    """greedy_knapsack as its packed processor calls it: per preprocessing batch of 1,000, longer samples dropped."""
    module = load_from_file("llamafactory", "data/processor/processor_utils.py")
    windows = [lengths[start : start + 1000] for start in range(0, len(lengths), 1000)]
    fitting = [window[window <= capacity].tolist() for window in windows]
    return clocked(lambda: [row for window in fitting for row in module.greedy_knapsack(window, capacity)])


def axolotl(lengths: np.ndarray, capacity: int) -> tuple[Rows, float]:
    """pack_parallel as MultipackBatchSampler calls it, in one process: groups of 100,000, at most 200 samples a pack,
    samples above sequence_len dropped before. Axolotl counts its steps by packing four times more; once counts here."""
    file = "utils/samplers/multipack.py"
    module = load_from_file("axolotl", file, "axolotl.utils.distributed", "axolotl.utils.logging")
    fitting = lengths[lengths <= capacity].astype(np.int32)

    def pack(given: np.ndarray) -> Rows:
        return module.pack_parallel(given, capacity, group_size=100_000, bin_size=200, num_processes=1, safe_mode=True)

    pack(fitting[:10])  # numba compiles
    packs, seconds = clocked(lambda: pack(fitting))
    return [fitting[row].tolist() for row in packs], seconds


def load_from_file(package: str, path: str, *stand_ins: str) -> ModuleType:
    """A module of a package without the package's own import, which would load a whole framework. `stand_ins`: modules
    of theirs that it imports names from and that packing does not call; any name is found in them."""

    class StandIn(ModuleType):
        def __getattr__(self, name: str) -> object:
            if name.startswith("__"):
                raise AttributeError(name)
            return lambda *_: logging.getLogger(name)

    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    file = Path(next(iter(spec.submodule_search_locations))) / path
    parents = {".".join(name.split(".")[:count]) for name in stand_ins for count in range(1, name.count(".") + 1)}
    sys.modules.update({name: StandIn(name) for name in {*parents, *stand_ins}})
    found = importlib.util.spec_from_file_location(file.stem, file)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[file.stem] = module
    found.loader.exec_module(module)
    return module


PEERS = {"TRL": trl, "ms-swift": ms_swift, "LLaMA-Factory": llama_factory, "Axolotl": axolotl}


def main(name: str, asked: Path) -> None:
    with np.load(asked) as given:
        lengths, capacity = given["lengths"], int(given["capacity"])
    rows, cpu_s = PEERS[name](lengths, capacity)
    placed = [length for row in rows for length in row]
    assert max(sum(row) for row in rows) <= capacity
    print(json.dumps({"rows": len(rows), "samples": len(placed), "tokens": sum(placed), "cpu_s": cpu_s}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
