"""What a keystroke in the form of a new job costs the server: `python -m bench.preflight`.

    --samples N    of the data set; 100,000 by default
    --rounds N     keystrokes in each field; 20 by default
    --short        10,000 samples, 5 rounds

The real application over a real database, called within this process: a data set that a host has measured, lengths as
instruction data have them, and a model of the shape of Llama 3.2 1B. Each keystroke sets one field to a value that was
not there before, as typing does, and the panel is worked out and rendered anew. Milliseconds, by the wall and of CPU.
"""

import argparse
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

import numpy as np
from starlette.testclient import TestClient

from app.auth import create_token, mint_login_link
from app.forms import state_of_spec
from app.main import create_app
from app.pages.new_job import form_pairs
from app.settings import load_settings
from bench.measure import median, print_table, test_bed
from core.architecture import Architecture, ParametersByKind
from core.profile import Column, DataProfile, ModelProfile
from core.wire import Device, HostReport

HOST = "host-of-the-bench"
DATASET = "instructions"
CONTEXT_LENGTH = 8192  # tokens
COLUMNS = ("a keystroke in", "median ms", "p95 ms", "median CPU ms")
# The n-th keystroke in a field.
TYPED: Mapping[str, Callable[[int], object]] = {
    "name": lambda nth: f"run {nth}",
    "schedule.learning_rate": lambda nth: (nth + 1) * 1e-5,
    "schedule.epochs": lambda nth: 1 + nth / 4,
    "method.rank": lambda nth: 4 + nth,
    "data.max_length": lambda nth: 2048 + 64 * nth,
    "packing.row_length": lambda nth: 4096 + 64 * nth,
    "batch.samples_per_step": lambda nth: 16 + nth,
    "batch.rows_per_step": lambda nth: 2 + nth,
    "parallel.devices": lambda nth: 2 + nth % 7,
    "seed": lambda nth: nth,
}


@dataclass(frozen=True)
class Taken:
    wall_ms: float
    cpu_ms: float


class Bed:
    """An application with a host, and one data set that it has measured."""

    def __init__(self, client: TestClient, num_samples: int) -> None:
        self._client = client
        services = client.app.state.services  # type: ignore[attr-defined]
        self._worker = {"Authorization": f"Bearer {create_token(services.database, HOST, 'worker')}"}
        self._ask("POST", "/worker/v1/hosts/register", _host().model_dump(mode="json"))
        client.post(mint_login_link(services))
        found = re.search(r'name="_csrf" value="([^"]+)"', client.get("/jobs/new").text)
        assert found, "the log-in went wrong"
        self._csrf = found[1]
        row = b'{"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]}\n'
        headers = {"X-CSRF-Token": self._csrf}
        assert client.put(f"/api/v1/datasets/{DATASET}", content=row, headers=headers).is_success
        self.type({})
        orders = self._ask("POST", f"/worker/v1/hosts/{HOST}/beat", {})
        (profile,) = orders["profiles"]
        self._ask("POST", f"/worker/v1/profiles/{profile}/claim", None)
        facts = _profile(num_samples).model_dump(mode="json")
        self._ask("POST", f"/worker/v1/profiles/{profile}/result", {"profile": facts})

    def _ask(self, method: str, path: str, body: object) -> Any:
        reply = self._client.request(method, path, json=body, headers=self._worker)
        assert reply.is_success, f"{path}: {reply.status_code} {reply.text[:500]}"
        return reply.json()

    def type(self, fields: Mapping[str, object]) -> tuple[Taken, str]:
        """The panel of the form with these fields set; what it took, and its HTML."""
        spec: dict[str, Any] = {
            "model": {"base": MODEL.name},
            "data": {"train": [{"dataset": DATASET}], "overlong": "drop"},
        }
        for field, value in fields.items():
            part, name = field.split(".") if "." in field else ("", field)
            (spec.setdefault(part, {}) if part else spec)[name] = value
        pairs = dict([*form_pairs(state_of_spec(spec)), ("_csrf", self._csrf)])
        wall, cpu = time.perf_counter(), time.process_time()
        reply = self._client.post("/jobs/preflight", data=pairs, headers={"HX-Request": "true"})
        taken = Taken((time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3)
        assert reply.is_success, reply.text[:500]
        return taken, reply.text


def _host() -> HostReport:
    gpus = [
        Device(id=f"gpu{index}", kind="gpu", name="NVIDIA L40S", memory_bytes=48 * 2**30, has_bf16=True)
        for index in range(8)
    ]
    return HostReport(
        host=HOST, name="bench", devices=tuple(gpus), models=(MODEL,), versions={}, num_cpus=64, memory_bytes=2**39
    )


def _shape() -> Architecture:
    """Llama 3.2 1B."""
    hidden, layers, intermediate, vocabulary = 2048, 16, 8192, 128_256
    return Architecture(
        model_type="llama",
        hidden_size=hidden,
        num_layers=layers,
        num_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        intermediate_size=intermediate,
        is_gated=True,
        vocabulary=vocabulary,
        has_tied_head=True,
        num_unlimited_layers=layers,
        norms_per_layer=2,
        parameters=ParametersByKind(
            embedding=vocabulary * hidden,
            attention=layers * (2 * hidden * hidden + 2 * hidden * 512),
            mlp=layers * 3 * hidden * intermediate,
            norms=(2 * layers + 1) * hidden,
            head=0,
        ),
    )


MODEL = ModelProfile(
    name="team/one-billion",
    content_hash="1" * 64,
    architecture="LlamaForCausalLM",
    num_parameters=1_235_814_400,
    context_length=CONTEXT_LENGTH,
    vocabulary=128_256,
    dtype="bfloat16",
    has_chat_template=True,
    bytes=2_471_628_800,
    shape=_shape(),
)


def _profile(num_samples: int) -> DataProfile:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.2, 0.8, num_samples), 12, CONTEXT_LENGTH).astype(np.int64)
    trained = np.maximum(1, (lengths * 0.4).astype(np.int64))
    bounds = np.stack([lengths - trained, lengths], axis=1).ravel()
    return DataProfile(
        num_rows=num_samples,
        format="messages",
        multi_turn="whole",
        multi_turn_reason="the template leaves the history as it was",
        num_refused=0,
        refused=(),
        sample_row=Column(range(num_samples)),
        sample_length=Column(lengths.tolist()),
        sample_trained=Column(trained.tolist()),
        sample_turns=Column([1] * num_samples),
        sample_hash=Column(rng.integers(0, 2**63, num_samples).tolist()),
        sample_runs=Column([1] * num_samples),
        run_bounds=Column(bounds.tolist()),
    )


def rows(bed: Bed, rounds: int) -> Iterator[list[str]]:
    everything: list[Taken] = []
    for field, value in TYPED.items():
        bed.type({})  # as it stood before
        taken = []
        for nth in range(rounds):
            timed, html = bed.type({field: value(nth)})
            assert 'class="packing"' in html, f"no report with {field} {value(nth)}"
            taken.append(timed)
        everything += taken
        yield _row(field, taken)
    yield _row("any of these", everything)


def _row(name: str, taken: Sequence[Taken]) -> list[str]:
    walls = [each.wall_ms for each in taken]
    p95 = quantiles(walls, n=20, method="inclusive")[-1]
    return [name, f"{median(walls):.0f}", f"{p95:.0f}", f"{median(each.cpu_ms for each in taken):.0f}"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--short", action="store_true", help="10,000 samples, 5 rounds")
    options = parser.parse_args(arguments)
    samples, rounds = (10_000, 5) if options.short else (options.samples, options.rounds)
    print(f"{test_bed()}; {samples:,} samples, {rounds} keystrokes in each field\n")
    with tempfile.TemporaryDirectory() as folder:
        settings = load_settings({"PEGBOX_DATA_DIR": folder}, dotenv=Path("/nonexistent"))
        with TestClient(create_app(settings), base_url=settings.url, headers={"Origin": settings.url}) as client:
            print_table(COLUMNS, rows(Bed(client, samples), rounds))


if __name__ == "__main__":
    main()
