"""The promise: a step is a set of samples, and however it is laid out, loss and gradient are the same.

Every layout that `pegbox certify` tries, on random models of nine families, each a whole trainer up to its third step,
held against each sample alone with eager attention. What several ranks and ZeRO make of it is in the second half; their
processes are started once."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from core import certify
from core.certify import Curve, Finding, Layout, compare, layouts, references, with_changes
from core.spec import JobSpec, parse_spec
from tests.engine import jobs
from tests.engine.test_ranks import Ground
from worker.engine import probe, train
from worker.engine.batches import Batch, make_batch
from worker.job_directory import LayoutTrial

STEPS = 3
# flex_attention has no backward pass on a CPU; its forward pass is held against eager in test_attention.
NOT_ON_A_CPU = {"packed, attention flex"}
# transformers offers these no sdpa.
WITHOUT_SDPA = frozenset({"gemma2"})
FAMILIES: dict[str, dict] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {},  # with a window shorter than most samples
    "gemma2": {},  # soft caps, and such a window on every other layer
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {"num_key_value_heads": 4},
    "gpt2": {},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
    },
}
SPEC = {
    "data": {"train": [{"dataset": "given"}], "validation": None, "max_length": 128},
    "packing": {"row_length": 256},
    "batch": {"samples_per_step": 7},
    "method": {"type": "full"},
    "schedule": {"learning_rate": 1e-3, "max_steps": 20},
    "compute": {"dtype": "fp32"},
    "seed": 3,
}


class Bench:
    """One model and one data set, on which layouts are tried in this process."""

    def __init__(self, root: Path, family: str, **changes: object) -> None:
        self.root = root
        self.model = jobs.make_model(root / "model", family, **{**FAMILIES.get(family, {}), **changes})
        self.data = uneven_data(root / "rows.jsonl")
        self.num_tried = 0

    def job(self, spec: JobSpec, layout: Layout, steps: int, name: str = "") -> Path:
        self.num_tried += 1
        parts = layout.apply(spec).model_dump(mode="json")
        trial = LayoutTrial(steps=steps, is_alone=layout.is_alone)
        return jobs.make_job(self.root / (name or f"job-{self.num_tried}"), self.model, self.data, **parts, trial=trial)

    def run(self, spec: JobSpec, layout: Layout, steps: int = STEPS) -> Curve | None:
        """None where the model can't be computed so."""
        job = self.job(spec, layout, steps)
        code = train.main(job)
        if code == 0:
            return curve_of(job)
        assert jobs.outcome_of(job).reason == "bad_spec", jobs.outcome_of(job)
        return None


def curve_of(job: Path) -> Curve:
    return Curve.model_validate_json((job / "trial.json").read_bytes())


def uneven_data(path: Path) -> Path:
    """Conversations of 25 to 120 tokens, a tenth to nine tenths of which are trained."""
    draw = random.Random(11)
    with path.open("w") as file:
        for number in range(40):
            asked, answered = draw.randint(1, 40), draw.randint(1, 40)
            turns = [
                {"role": "user", "content": "".join(draw.choices("abcdefgh", k=asked))},
                {"role": "assistant", "content": "".join(draw.choices("stuvwxyz", k=answered))},
            ]
            file.write(json.dumps({"messages": turns, "id": number}) + "\n")
    return path


def spec_of(**parts: object) -> JobSpec:
    return parse_spec({**SPEC, **parts})


def findings_of(bench: Bench, spec: JobSpec, steps: int = STEPS) -> tuple[Curve, dict[str, Finding], set[str]]:
    """The fp32 curve of each sample alone, what every layout made of it, and which layouts can't be."""
    alone = [bench.run(spec, layout, steps) for layout in references(spec.compute.dtype)]
    fp32, *rounded = [curve for curve in alone if curve is not None]
    assert len(rounded) == len(alone) - 1
    found, impossible = {}, set()
    for layout in layouts(spec, most_ranks=1):
        curve = bench.run(spec, layout, steps)
        if curve is None:
            impossible.add(layout.name)
        else:
            found[layout.name] = compare(layout.name, curve, fp32, rounded[0] if rounded else None)
    return fp32, found, impossible


def demand_real(fp32: Curve, found: dict[str, Finding]) -> None:
    """Nothing is shown by a case in which nothing is packed, padded, or of unequal weight."""
    packed, padded = found["packed, best_fit"].curve, found["padded, 4 samples a pass"].curve
    assert fp32.most_segments_in_a_row == padded.most_segments_in_a_row == 1
    assert packed.most_segments_in_a_row >= 3
    assert packed.slots == fp32.slots < padded.slots
    assert found["grouped, 4 samples a pass"].curve.slots < padded.slots
    assert found["padding_free, 4 samples a pass"].curve.most_segments_in_a_row == 4
    assert len(set(fp32.losses)) == len(set(fp32.grad_norms)) == len(fp32.losses)
    assert min(fp32.grad_norms) > 1e-3


def demand_equal(found: dict[str, Finding]) -> None:
    """Prints the largest deviation, for `pytest -rP`."""
    worst = max(found.values(), key=lambda finding: max(finding.loss_deviation, finding.norm_deviation))
    print(
        f"{len(found)} layouts, largest deviation: loss {max(f.loss_deviation for f in found.values()):.1e}, "
        f"gradient norm {max(f.norm_deviation for f in found.values()):.1e} ({worst.name})"
    )
    different = [finding for finding in found.values() if not finding.holds]
    assert not different, "\n".join(
        f"{finding.name}: loss {finding.loss_deviation:.1e}, norm {finding.norm_deviation:.1e}" for finding in different
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_makes_the_steps_of_each_sample_alone(family: str, tmp_path: Path) -> None:
    fp32, found, impossible = findings_of(Bench(tmp_path, family), spec_of())
    demand_real(fp32, found)
    assert impossible == NOT_ON_A_CPU | ({"packed, attention sdpa"} if family in WITHOUT_SDPA else set())
    used = {name: finding.curve.attention for name, finding in found.items()}
    assert all(name == f"packed, attention {kind}" for name, kind in used.items() if "attention" in name)
    demand_equal(found)


def test_steps_of_rows_equal_their_pieces_alone(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "gemma2")
    for algorithm in ("best_fit", "sequential", "wrapped"):
        packing = {"row_length": 128, "algorithm": algorithm}
        fp32, found, _ = findings_of(bench, spec_of(batch={"rows_per_step": 3}, packing=packing))
        assert found["the job as it is"].curve.most_segments_in_a_row >= 2
        assert found[f"packed, {algorithm}, 2 rows a pass"].curve.slots >= fp32.slots
        demand_equal(found)


def test_in_bf16_packing_is_no_further_from_fp32_than_twice_what_padding_is(tmp_path: Path) -> None:
    fp32, found, _ = findings_of(Bench(tmp_path, "llama"), spec_of(compute={"dtype": "bf16"}))
    demand_real(fp32, found)
    moved = max(finding.loss_deviation for finding in found.values())
    assert 1e-5 < moved < 0.05, "bf16 is no fp32, and no noise either"
    demand_equal(found)


def test_adapters_in_every_layout(tmp_path: Path) -> None:
    method = {"type": "lora", "rank": 4, "alpha": 8, "use_rslora": True}
    fp32, found, _ = findings_of(Bench(tmp_path, "qwen3"), spec_of(method=method))
    demand_real(fp32, found)
    demand_equal(found)


def test_twenty_steps_stay_together(tmp_path: Path) -> None:
    """Adam multiplies rounding: where a gradient is nearly 0 its sign decides a whole step."""
    bench, spec = Bench(tmp_path, "llama"), spec_of()
    alone = bench.run(spec, next(references("fp32")), steps=20)
    padded = Layout("padded", {"packing.mode": "padded", "batch.micro_batch_size": 3})
    for layout in (Layout("the job as it is"), padded):
        curve = bench.run(spec, layout, steps=20)
        assert alone is not None and curve is not None and len(curve.losses) == 20
        assert alone.losses[-1] < 0.95 * alone.losses[0], "it learns"
        assert curve.losses == pytest.approx(alone.losses, rel=1e-3)


def test_a_leak_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the cuts left out of a row, samples see their neighbours; nothing else in the run notices."""

    def without_cuts(rows: tuple, samples: object) -> Batch:
        batch = make_batch(rows, samples)  # type: ignore[arg-type]
        return replace(batch, segments=tuple((sum(row),) for row in batch.segments))

    bench, spec = Bench(tmp_path, "llama"), spec_of()
    alone = bench.run(spec, next(references("fp32")))
    monkeypatch.setattr("worker.engine.batches.make_batch", without_cuts)
    monkeypatch.setattr(train, "leaks", lambda model, leak: False)
    leaking = bench.run(spec, Layout("leaking"))
    assert alone is not None and leaking is not None
    finding = compare("leaking", leaking, alone, None)
    assert not finding.holds and finding.loss_deviation > 1e-4
    assert probe.LARGEST_HARMLESS  # and the probe, which was told to keep quiet, is there for it


# -- on two ranks ----------------------------------------------------------------------------------------------------

ON_RANKS = ("llama", "gemma2", "gpt2", "qwen3_moe")


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, tuple[Curve, Curve]]]:
    """By family: each layout's curve on two ranks beside each sample alone on one."""
    root = tmp_path_factory.mktemp("two-ranks")
    ground = Ground(root)
    ground.orders.clear()
    spec = spec_of()
    alone: dict[str, Curve] = {}
    ordered: dict[str, dict[str, Path]] = {}
    for family in ON_RANKS:
        bench = Bench(root / family, family)
        reference = bench.run(spec, next(references("fp32")))
        assert reference is not None
        alone[family] = reference
        ordered[family] = {}
        for layout in _on_ranks(spec, every=family == "llama"):
            job = bench.job(spec, layout, STEPS, layout.name)
            ordered[family][layout.name] = job
            ground.orders.append(job)
    ground.run()
    return lambda family: {name: (curve_of(job), alone[family]) for name, job in ordered[family].items()}


def _on_ranks(spec: JobSpec, *, every: bool) -> list[Layout]:
    """Packed under each stage; and for one family every mode and attention under DDP and under ZeRO-3."""
    chosen = [layout for layout in layouts(spec, most_ranks=2) if "ZeRO" in layout.name]
    assert len(chosen) == 4
    if every:
        others = [layout for layout in layouts(spec, most_ranks=1) if "padd" in layout.name or "eager" in layout.name]
        chosen += [
            Layout(
                f"{layout.name}, stage {stage}",
                {**layout.changes, "parallel.devices": 2, "parallel.zero_stage": stage, "parallel.offload": "none"},
            )
            for layout in others
            for stage in (0, 3)
        ]
    return chosen


@pytest.mark.parametrize("family", ON_RANKS)
def test_two_ranks_under_every_stage_make_the_steps_of_one(
    family: str, on_two_ranks: Callable[[str], dict[str, tuple[Curve, Curve]]]
) -> None:
    curves = on_two_ranks(family)
    assert len(curves) >= 4
    found = {name: compare(name, curve, alone, None) for name, (curve, alone) in curves.items()}
    assert all(curve.ranks == 2 for curve, _ in curves.values())
    assert any(curve.most_segments_in_a_row > 1 for curve, _ in curves.values())
    demand_equal(found)


def test_changes_of_a_spec_name_keys_that_there_are() -> None:
    spec = spec_of(method={"type": "lora", "dropout": 0.2})
    assert certify.certified(spec, "bf16").compute.dtype == "bf16"
    assert with_changes(spec, {"batch.micro_batch_size": 3}).batch.micro_batch_size == 3
    with pytest.raises(Exception, match="not a key"):
        with_changes(spec, {"batch.micro_size": 3})
