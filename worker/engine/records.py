"""step_samples.bin: the loss of each sample of each step, so that a spike in the curve can be opened and read.

`np.fromfile(path, SAMPLE_RECORD)` reads it; a sample is named by its global id (core.preflight). Where a step stands
twice after a resume, the last counts.
"""

from pathlib import Path

import numpy as np

from worker.engine.batches import StepBatch

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

    def append(self, batch: StepBatch, loss_sums: list[float]) -> None:
        samples = [sample for micro_batch in batch.batches for sample in micro_batch.sample_ids]
        records = np.zeros(len(samples), SAMPLE_RECORD)
        records["step"] = batch.work.step
        records["sample"] = samples
        records["targets"] = np.concatenate(
            [
                np.bincount(micro_batch.sample_of_target_T, minlength=len(micro_batch.sample_ids))
                for micro_batch in batch.batches
            ]
        )
        records["loss_sum"] = loss_sums
        self._file.write(records.tobytes())
        self._file.flush()
