"""What is trained, and its moments, in a checkpoint: the same whoever wrote it.

One rank that holds all of it writes whole tensors (worker.engine.checkpoint.write_whole). Ranks that hold parts write
pieces: every rank, of each tensor, the values that it owns, flat, with the place in the whole at which they begin.
Readers ask for a tensor by its name and get it whole, so a run may go on under another stage, or another number of
ranks, than the one that wrote the checkpoint.
"""

import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from worker.engine.checkpoint import OPTIMIZER, WEIGHTS, Manifest, shard_name

# Of AdamW's state, what has the shape of the weight.
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """What a rank owns of a tensor of `shape`: `count` values from `start` of it, flattened. They lie from `at` in
    `flat`, which the optimizer takes for a weight."""

    name: str
    shape: tuple[int, ...]
    start: int
    count: int
    flat: Tensor
    at: int

    def of(self, flat: Tensor) -> Tensor:
        """Its own values in `flat`, or in a tensor that runs parallel."""
        return flat.detach()[self.at : self.at + self.count]


def write_pieces(path: Path, pieces: Iterable[Piece], state: dict[Tensor, dict[str, Any]]) -> None:
    """`state` is the optimizer's. Moments that are not AdamW's own (in 8 bits, say) are not written."""
    tensors: dict[str, Tensor] = {}
    facts: dict[str, dict[str, object]] = {}
    for piece in pieces:
        of_weight = state.get(piece.flat, {})
        tensors[f"weight/{piece.name}"] = piece.of(piece.flat).cpu()
        tensors |= {f"{key}/{piece.name}": piece.of(of_weight[key]).cpu() for key in MOMENTS if key in of_weight}
        facts[piece.name] = {"shape": piece.shape, "start": piece.start, "step": float(of_weight.get("step", 0))}
    save_file(tensors, path, metadata={"facts": json.dumps(facts)})


class Saved(Protocol):
    """The trained tensors of a checkpoint, by name."""

    shapes: dict[str, tuple[int, ...]]

    def weight(self, name: str) -> Tensor: ...

    def moments(self, name: str) -> dict[str, Tensor]:
        """MOMENTS; {} where there are none of AdamW's own."""

    def step(self, name: str) -> float:
        """Updates that the moments have seen."""


class Whole:
    """As a rank that held all of it wrote it. `order` names the weights as its optimizer counted them."""

    def __init__(self, folder: Path, order: Sequence[str]) -> None:
        from safetensors.torch import load_file

        self._weights = load_file(folder / WEIGHTS)
        self.shapes = {name: tuple(weight.shape) for name, weight in self._weights.items()}
        state = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)["state"]
        self._state = {name: state.get(number, {}) for number, name in enumerate(order)}

    def weight(self, name: str) -> Tensor:
        weight: Tensor = self._weights[name]
        return weight

    def moments(self, name: str) -> dict[str, Tensor]:
        return {key: self._state[name][key] for key in MOMENTS if key in self._state[name]}

    def step(self, name: str) -> float:
        return float(self._state[name].get("step", 0))


class Pieces:
    """As ranks that held parts wrote it: put together tensor by tensor, so that no more than one is in memory."""

    def __init__(self, folder: Path, manifest: Manifest, stack: ExitStack) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._steps: dict[str, float] = {}
        self._parts: dict[str, list[tuple[int, Any]]] = {}
        for rank in range(manifest.world):
            file = stack.enter_context(safe_open(folder / shard_name(rank), framework="pt"))
            for name, fact in json.loads(file.metadata()["facts"]).items():
                self.shapes[name] = tuple(fact["shape"])
                self._steps[name] = fact["step"]
                self._parts.setdefault(name, []).append((fact["start"], file))

    def weight(self, name: str) -> Tensor:
        return self._whole("weight", name)

    def moments(self, name: str) -> dict[str, Tensor]:
        _, file = self._parts[name][0]
        return {key: self._whole(key, name) for key in MOMENTS if f"{key}/{name}" in file.keys()}  # noqa: SIM118 (no mapping)

    def step(self, name: str) -> float:
        return self._steps[name]

    def _whole(self, key: str, name: str) -> Tensor:
        shape = self.shapes[name]
        flat = torch.empty(torch.Size(shape).numel())
        missing = flat.numel()
        for start, file in self._parts[name]:
            part = file.get_tensor(f"{key}/{name}")
            flat[start : start + part.numel()] = part
            missing -= part.numel()
        assert missing == 0, f"{key} of {name} lacks {missing} values"
        return flat.view(shape)


def open_saved(folder: Path, manifest: Manifest, order: Sequence[str], stack: ExitStack) -> Saved:
    """`stack` closes its files."""
    return Whole(folder, order) if manifest.zero_stage == 0 else Pieces(folder, manifest, stack)
