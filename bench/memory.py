"""The memory plan beside a simulated step: `python -m bench.memory [--layers N] [--tokens N] [--only TEXT]`,
or `--shapes` for published models of half a billion to seventy billion parameters.

The engine's own passes run on fake tensors, which have shapes and no memory, while torch's tracker adds up what would
be held; so a model of any size fits. Two micro-batches after a first step, whose moments are there by then: the moment
of most that core.memory plans for. What a GPU's kernels keep is not in all places what a CPU's keep: see
docs/memory.md.
"""

import argparse
import itertools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from core.architecture import Architecture, TensorHeader, read_architecture
from core.memory import Load, MemoryPlan, estimate_memory
from core.spec import Adapter, JobSpec, parse_spec
from worker.engine import attention
from worker.engine.adapters import with_adapters
from worker.engine.batches import Batch, of_tokens
from worker.engine.lora_linear import fuse
from worker.engine.loss import backward
from worker.engine.model import ATTENTION_NAMES, TORCH_DTYPES, Head, LanguageModel, quiet_libraries
from worker.engine.optimizer import make_optimizer

CPU = torch.device("cpu")


def _sizes(
    hidden: int, intermediate: int, layers: int, heads: int, key_value_heads: int, vocabulary: int, **others: object
) -> dict[str, object]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": False,
        **others,
    }


# The shape of Llama 3.2 1B, with a vocabulary of 32,000 (its own of 128,256 hides everything else).
LLAMA = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 32_000,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
}
# As published, from half a billion to seventy billion parameters.
SHAPES: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "Qwen2 0.5B": ("qwen2", _sizes(896, 4864, 24, 14, 2, 151_936, tie_word_embeddings=True)),
    "Llama 3.2 1B": ("llama", {**LLAMA, "num_hidden_layers": 16, "vocab_size": 128_256}),
    "Qwen3 4B": ("qwen3", _sizes(2560, 9728, 36, 32, 8, 151_936, head_dim=128, tie_word_embeddings=True)),
    "Qwen2 7B": ("qwen2", _sizes(3584, 18_944, 28, 28, 4, 152_064)),
    "Mistral 7B": ("mistral", _sizes(4096, 14_336, 32, 32, 8, 32_000, sliding_window=4096)),
    "Llama 3.1 8B": ("llama", _sizes(4096, 14_336, 32, 32, 8, 128_256)),
    "Qwen3 30B-A3B": (
        "qwen3_moe",
        _sizes(2048, 6144, 48, 32, 4, 151_936, head_dim=128, moe_intermediate_size=768, num_experts=128)
        | {"num_experts_per_tok": 8},
    ),
    "Llama 3.1 70B": ("llama", _sizes(8192, 28_672, 80, 64, 8, 128_256)),
}
WAYS = (("full", False), ("full", True), ("lora", False), ("lora", True))  # method, checkpointing; bf16
TRAINED_SHARE = 0.5  # of the tokens


@dataclass(frozen=True)
class Simulated:
    weights: int
    gradients: int
    moments: int
    passing: int  # activations, logits, casts
    total: int


class Tracker(MemTracker):
    """torch's own puts hooks on every weight that it meets, and a frozen one takes none."""

    def _track_module_params_and_buffers(
        self, module: torch.nn.Module, install_grad_hooks: bool = True
    ) -> tuple[int, int]:
        is_trained = all(weight.requires_grad for weight in module.parameters())
        return super()._track_module_params_and_buffers(module, install_grad_hooks and is_trained)


def simulate(config: PreTrainedConfig, spec: JobSpec, samples: list[int]) -> tuple[Simulated, Architecture]:
    """Bytes at the peak of a step of two micro-batches, each a row of `samples` (tokens each)."""
    attention.register()
    dtype = TORCH_DTYPES[spec.compute.dtype]
    is_full = not isinstance(spec.method, Adapter)
    with torch.device("meta"):  # PEFT moves its layers, which fake tensors can't be
        base = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if is_full else dtype)
        base.config.use_cache = False
        shape = read_architecture(config.to_dict(), headers_of(base))
        model = base
        if isinstance(spec.method, Adapter):
            model = with_adapters(base, spec.method, None, lambda *_: None)
            fuse(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device=CPU)
        base.tie_weights()
        ready = LanguageModel(model, CPU, dtype)
        for weight in ready.trainable().values():
            weight.data = weight.data.float()
        # What the engine finds by trying, which fake tensors can't.
        ready.base.set_attn_implementation(ATTENTION_NAMES["flash"])
        ready.attention = "flash"
        ready._head = Head(base.get_output_embeddings(), 1.0, None)
        if spec.compute.gradient_checkpointing is True:
            with quiet_libraries():
                ready.base.gradient_checkpointing_enable({"use_reentrant": False})
        ready.model.train()
        optimizer = make_optimizer(ready.trainable(), spec, CPU, lambda *_: None)
        for weight in ready.trainable().values():
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tracker = Tracker()
        tracker.track_external(ready.model, optimizer)
        with tracker:
            for _ in range(2):
                backward(ready, batch_of(samples), 1)
                tracker.reset_mod_stats()
            optimizer.step()
    peak = {str(kind): size for kind, size in tracker.get_tracker_snapshot("peak")[CPU].items()}
    named = {key.rsplit(".", 1)[-1].upper(): size for key, size in peak.items()}
    weights = named.get("PARAM", 0) + named.get("BUFFER", 0)
    gradients, moments, total = named.get("GRAD", 0), named.get("OPT", 0), peak["Total"]
    return Simulated(weights, gradients, moments, total - weights - gradients - moments, total), shape


def headers_of(model: torch.nn.Module) -> dict[str, TensorHeader]:
    return {name: TensorHeader(dtype="F32", shape=tuple(weight.shape)) for name, weight in model.named_parameters()}


def batch_of(samples: list[int]) -> Batch:
    batch = of_tokens([[[1] * length for length in samples]])
    num_targets = int(sum(samples) * TRAINED_SHARE)
    return replace(
        batch,
        target_index_T=torch.arange(num_targets),
        targets_T=torch.ones(num_targets, dtype=torch.long),
        sample_of_target_T=torch.zeros(num_targets, dtype=torch.long),
    )


def plan_of(shape: Architecture, spec: JobSpec, samples: list[int]) -> MemoryPlan:
    assert spec.compute.dtype != "auto"
    return estimate_memory(
        Load(
            shape=shape,
            method=spec.method,
            dtype=spec.compute.dtype,
            attention="flash",
            optimizer=spec.optimizer.name,
            gradient_checkpointing=spec.compute.gradient_checkpointing is True,
            num_ranks=1,
            zero_stage=0,
            offload="none",
            tokens=sum(samples),
            longest_row=sum(samples),
            longest_sample=max(samples),
            on_gpu=False,
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--only", default="", help="run the lines that hold this text, such as 'lora bf16'")
    parser.add_argument("--shapes", action="store_true", help="published models, totals alone, in bf16")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    if arguments.shapes:
        compare_shapes(arguments.tokens, arguments.only)
    else:
        compare_parts(arguments)


def compare_shapes(num_tokens: int, only: str) -> None:
    samples = [num_tokens // 2] * 2
    print("| model | method | checkpointing | planned, MiB | simulated, MiB | planned / simulated |")
    print("|---|---|---|---:|---:|---:|")
    for (name, (family, sizes)), (method, checkpointing) in itertools.product(SHAPES.items(), WAYS):
        if only not in f"{name} {method}":
            continue
        config = AutoConfig.for_model(family, **sizes)
        simulated, shape = simulate(config, spec_of(method, "bf16", checkpointing), samples)
        plan = plan_of(shape, spec_of(method, "bf16", checkpointing), samples)
        planned = plan.total - plan.terms["process"]
        columns = (name, method, "yes" if checkpointing else "no", _mib(planned), _mib(simulated.total))
        print("|", " | ".join(columns), f"| {planned / simulated.total:.2f} |", flush=True)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f}"


def spec_of(method: str, dtype: str, checkpointing: bool) -> JobSpec:
    compute = {"dtype": dtype, "gradient_checkpointing": checkpointing}
    return parse_spec({"data": {"train": [{"dataset": "d"}]}, "method": {"type": method}, "compute": compute})


def compare_parts(arguments: argparse.Namespace) -> None:
    config = AutoConfig.for_model("llama", num_hidden_layers=arguments.layers, **LLAMA)
    samples = [arguments.tokens // 2] * 2
    print("| method | checkpointing | part | planned, MiB | simulated, MiB | planned / simulated |")
    print("|---|---|---|---:|---:|---:|")
    for method, dtype, checkpointing in itertools.product(("full", "lora"), ("bf16", "fp32"), (False, True)):
        line = f"{method} {dtype}"
        if arguments.only not in line:
            continue
        spec = spec_of(method, dtype, checkpointing)
        simulated, shape = simulate(config, spec, samples)
        terms = plan_of(shape, spec, samples).terms
        planned = {part: terms[part] for part in ("weights", "gradients", "moments")}  # type: ignore[index]
        planned["passing"] = terms["activations"] + terms["working"] + terms["casts"]
        planned["total"] = sum(planned.values())
        for part, size in planned.items():
            real = getattr(simulated, part)
            columns = (line, "yes" if checkpointing else "no", part, _mib(size), _mib(real))
            print("|", " | ".join(columns), f"| {size / max(1, real):.2f} |", flush=True)


if __name__ == "__main__":
    main()
