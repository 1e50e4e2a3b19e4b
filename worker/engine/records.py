"""step_samples.bin: the loss of each sample of each step, so that a spike in the curve can be opened and read.

`np.fromfile(path, SAMPLE_RECORD)` reads it; a sample is named by its global id (core.preflight). Where a step stands
twice after a resume, the last counts.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

# Little-endian, 16 bytes, appended step by step.
SAMPLE_RECORD = np.dtype([("step", "<u4"), ("sample", "<u4"), ("targets", "<u4"), ("loss_sum", "<f4")])


class SampleRecords:
    """step_samples.bin, appended by whole steps; a torn tail is cut off."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab")
        self._file.truncate(self._file.tell() - self._file.tell() % SAMPLE_RECORD.itemsize)

    def __enter__(self) -> "SampleRecords":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, step: int, sample_ids: Sequence[int], targets: Sequence[int], loss_sums: Sequence[float]) -> None:
        records = np.zeros(len(sample_ids), SAMPLE_RECORD)
        records["step"] = step
        records["sample"] = sample_ids
        records["targets"] = targets
        records["loss_sum"] = loss_sums
        self._file.write(records.tobytes())
        self._file.flush()
