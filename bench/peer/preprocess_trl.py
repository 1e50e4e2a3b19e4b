"""One preparation of data by TRL's SFTTrainer, in an environment that has nothing of ours: `python preprocess_trl.py
ASKED.json RESULT.json SAMPLES.npz`.

ASKED.json names model and data. Everything is TRL's default, but for what changes samples: no limit of length, and the
answers alone are trained. Only SFTTrainer's own `_prepare_dataset` is timed: rendering, tokens, masks, labels.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

IGNORED = -100


class Timed(SFTTrainer):
    taken: dict[str, float]

    def _prepare_dataset(self, *arguments: Any, **options: Any) -> Any:
        began = time.perf_counter(), time.process_time()
        prepared = super()._prepare_dataset(*arguments, **options)
        self.taken = {"wall_s": time.perf_counter() - began[0], "cpu_s": time.process_time() - began[1]}
        return prepared


def main(asked_path: Path, result_path: Path, samples_path: Path) -> None:
    asked = json.loads(asked_path.read_text())
    # A cache of its own, so that nothing is found that an earlier run has prepared.
    data = load_dataset("json", data_files=asked["data"], split="train", cache_dir=str(result_path.parent / "cache"))
    config = SFTConfig(
        output_dir=str(result_path.parent / "trl"),
        max_length=None,
        packing=False,
        assistant_only_loss=True,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Timed(
        model=AutoModelForCausalLM.from_pretrained(asked["model"]),
        args=config,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(asked["model"]),
    )
    result_path.write_text(json.dumps(trainer.taken))
    prepared = trainer.train_dataset.with_format("numpy")
    token_ids = [np.asarray(ids, dtype=np.int32) for ids in prepared["input_ids"]]
    labels = np.concatenate([np.asarray(each) for each in prepared["labels"]])
    np.savez(
        samples_path,
        token_ids=np.concatenate(token_ids),
        trained=labels != IGNORED,
        lengths=np.array([len(ids) for ids in token_ids]),
    )


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
