import pytest

from core.architecture import ParametersByKind
from core.layout import lay_out
from core.packing import PlanSettings, Segment, Step
from core.preflight import StepWork
from tests.engine import tiny
from worker.engine.utilisation import Utilisation


def test_utilisation_is_the_steps_flops_over_what_all_ranks_could_do() -> None:
    shape = tiny.SHAPE.model_copy(update={"parameters": ParametersByKind(mlp=1000)})
    segments = (Segment(0, 0, 10), Segment(1, 5, 10))
    layout = lay_out(Step(1, 0, 1, segments), PlanSettings("packed", 32, "samples", 2, 1))
    work = StepWork(1, 1.0, segments, {segments[0]: 9, segments[1]: 4}, layout)
    flops = 6 * (15 * 1000 + 13 * 8 * 10) + 12 * 8 * 2 * (55 + 15)
    assert Utilisation(shape, None, 1e6, 2).of(work, 0.5) == pytest.approx(flops / 1e6)
    assert Utilisation(None, None, 1e6, 2).of(work, 0.5) is None
    assert Utilisation(shape, None, None, 2).of(work, 0.5) is None
