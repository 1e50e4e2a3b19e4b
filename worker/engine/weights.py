"""What a loaded model is made of: weights by what becomes of them, bytes by type, what is trained by kind of layer."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from bitsandbytes.nn.modules import Params4bit
from torch import Tensor, nn

# Parts of PEFT's names for what it lays on a layer, not kinds of layers.
_WRAPPINGS = frozenset(
    {"weight", "bias", "default", "base_layer", "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"}
    | {"lora_magnitude_vector", "modules_to_save", "token_adapter", "trainable_tokens_delta", "original_module"}
)


@dataclass(frozen=True)
class WeightReport:
    """Numbers of parameters; weight_bytes counts what the weights take on their device, by the type they lie in."""

    total: int
    trainable: int
    quantised: int
    weight_bytes: Mapping[str, int]
    trainable_by_kind: Mapping[str, int]

    def plan_event(self) -> dict[str, object]:
        """As fields of core.events.Plan."""
        return {
            "trainable_parameters": self.trainable,
            "total_parameters": self.total,
            "quantised_parameters": self.quantised,
            "trainable_by_kind": dict(self.trainable_by_kind),
            "weight_bytes": dict(self.weight_bytes),
        }


def report_weights(model: nn.Module) -> WeightReport:
    """A weight that two layers share counts once; one that ZeRO has parted counts whole."""
    bytes_by_type: Counter[str] = Counter()
    trainable_by_kind: Counter[str] = Counter()
    total = quantised = 0
    for name, weight in model.named_parameters():
        count = num_parameters(weight)
        total += count
        if weight.requires_grad:
            trainable_by_kind[_kind(name)] += count
        if isinstance(weight, Params4bit):
            quantised += count
            bytes_by_type[weight.quant_type] += sum(tensor.nbytes for tensor in _stored(weight))
        else:
            bytes_by_type[str(weight.dtype).removeprefix("torch.")] += count * weight.element_size()
    return WeightReport(total, trainable_by_kind.total(), quantised, dict(bytes_by_type), dict(trainable_by_kind))


def num_parameters(weight: nn.Parameter) -> int:
    """Numbers that the weight stands for: two of them share a byte in 4 bits, and ZeRO-3 leaves none in place."""
    if isinstance(weight, Params4bit):
        return int(weight.quant_state.shape.numel())
    return int(getattr(weight, "ds_numel", weight.numel()))


def _stored(weight: Params4bit) -> Iterator[Tensor]:
    """The packed numbers, and the scales of their blocks, which are quantised themselves."""
    state = weight.quant_state
    yield weight.data
    yield state.absmax
    if state.nested:
        yield state.state2.absmax


def _kind(name: str) -> str:
    """The layer's own name, without its place in the model: q_proj, experts, embed_tokens."""
    return next(part for part in reversed(name.split(".")) if part not in _WRAPPINGS)
