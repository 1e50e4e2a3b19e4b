"""demo/tiny-llama, the model that needs no download: made on first use, in seconds, on any machine.

A byte-level BPE and a Llama of about 1.4 M parameters, trained here on text that core.demo_data composes, with a chat
template that marks what the assistant says. It has read English-like sentences and a little of the dialogues' style,
so that its loss on `demo-dialogues` starts well under chance and a LoRA visibly brings it down.

Nothing of it is committed or fetched, so "the same bytes" has to come from the making: every draw has a seed, the
steps are counted and not timed, and all of it runs in a child process with one thread, whatever the caller uses, and
with the instruction set pinned as far as PyTorch and its matrix library allow. That gives the same bytes for the same
versions of torch, transformers and tokenizers on the same kind of CPU. It is not a promise over CPU makers or versions:
there floating point may round differently, the content hash differs, and so would a job's recorded model revision.

The folder appears whole or not at all: it is written under a temporary name and renamed. Of two processes at once the
second waits at a lock and finds the work done; what a killed one left is removed by the next.
"""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from core.chat import CHATML
from core.demo_data import DEMO_MODEL, dialogues, prose
from worker.job_directory import sync_folder

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT_LENGTH = 4096  # tokens
VOCABULARY = 4096
END_OF_TURN = "<|im_end|>"
START_OF_TURN = "<|im_start|>"
PAD = "<|endoftext|>"

# Other seeds than the data set's own, so that nothing of what a demo job learns was seen before.
PROSE_SEED = 11
DIALOGUES_SEED = 12
INITIAL_WEIGHTS_SEED = 13
NUM_TOKENIZER_PARAGRAPHS = 6000
NUM_TOKENIZER_DIALOGUES = 600
# One conversation to so many paragraphs: it shall know the shape of a dialogue, and leave the rest to the fine-tune.
PARAGRAPHS_PER_DIALOGUE = 6
STEPS = 80
SEQUENCES_PER_STEP = 4
SEQUENCE_LENGTH = 128  # tokens
PEAK_LEARNING_RATE = 4e-3
WARMUP_STEPS = 6
# The customary 0.02 suits widths of thousands: at 128 the layers would add next to nothing to the residual stream.
INITIAL_DEVIATION = 0.1

# A power of two, so that scaling by it rounds nothing.
INPUT_GAIN = 16.0

# What makes the arithmetic alike: one thread, and no choice of instructions by the CPU at hand. AVX2 is what every
# x86 server of the last ten years has; elsewhere these are ignored.
SAME_ARITHMETIC = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MKL_CBWR": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "CUDA_VISIBLE_DEVICES": "",
    "TOKENIZERS_PARALLELISM": "false",
}


def ensure_demo_model(model_root: Path) -> Path:
    """The folder of demo/tiny-llama below `model_root`, made if it is missing."""
    folder = model_root / DEMO_MODEL
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in folder.parent.glob(f".tmp-{folder.name}-*"):
            shutil.rmtree(leftover)
        if folder.is_dir():
            return folder
        temporary = folder.parent / f".tmp-{folder.name}-{os.getpid()}"
        temporary.mkdir()
        command = [sys.executable, "-m", "worker.engine.demo_model", "--make", str(temporary)]
        subprocess.run(command, check=True, env={**os.environ, **SAME_ARITHMETIC}, cwd=Path(__file__).parents[2])  # noqa: S603  our own module
        temporary.rename(folder)
        sync_folder(folder.parent)
    return folder


def make_demo_model(folder: Path) -> None:
    """Trains tokenizer and model and writes them into `folder`; `ensure_demo_model` runs it in a child process."""
    import torch
    import transformers

    from worker.engine.libraries import tame_deepspeed

    tame_deepspeed()
    torch.use_deterministic_algorithms(True)
    tokenizer = train_tokenizer()
    model = pretrain(tokenizer)
    enlarge_inputs(model, INPUT_GAIN)
    tokenizer.save_pretrained(folder)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes for its own user alone; a model root may be shared
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def train_tokenizer() -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = chain(
        islice(prose(PROSE_SEED), NUM_TOKENIZER_PARAGRAPHS),
        (
            message["content"]
            for row in dialogues(DIALOGUES_SEED, NUM_TOKENIZER_DIALOGUES)
            for message in row["messages"]
        ),
        [CHATML],
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        # A token for each digit, so that sums can be learned place by place.
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START_OF_TURN, END_OF_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token=PAD,
        additional_special_tokens=[START_OF_TURN],
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
        chat_template=CHATML,
    )


def pretrain(tokenizer: "PreTrainedTokenizerFast") -> "LlamaForCausalLM":
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.optimization import get_cosine_schedule_with_warmup

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(END_OF_TURN),
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
        initializer_range=INITIAL_DEVIATION,
        dtype="float32",
    )
    torch.manual_seed(INITIAL_WEIGHTS_SEED)
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP_STEPS, STEPS)
    model.train()
    for ids in islice(training_batches(tokenizer), STEPS):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def enlarge_inputs(model: "LlamaForCausalLM", gain: float) -> None:
    """The same function with inputs of all adapted layers `gain` times as large and their weights as much smaller.

    The usual learning rates come from models thousands wide, whose layers sum thousands of inputs; a step of the same
    size in an adapter of a layer 128 wide moves its output so much less that a demo of some fifty steps would show
    next to nothing. Measured with rank 16 at 2e-4 on demo-dialogues: the loss of step 25 is 2.97 so, and 3.21 without.
    """
    import torch

    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight *= gain
            # v_proj and up_proj hand their larger input on to o_proj and down_proj.
            for linear in (attention.q_proj, attention.k_proj, attention.o_proj, mlp.gate_proj, mlp.down_proj):
                linear.weight /= gain


def training_batches(tokenizer: "PreTrainedTokenizerFast") -> Iterator["torch.Tensor"]:
    """Token ids of shape [SEQUENCES_PER_STEP, SEQUENCE_LENGTH]: texts one after the other, cut where they are full."""
    import torch

    num_tokens = SEQUENCES_PER_STEP * SEQUENCE_LENGTH
    held: list[int] = []
    for text in training_texts(tokenizer):
        held += tokenizer.encode(text, add_special_tokens=False)
        while len(held) >= num_tokens:
            yield torch.tensor(held[:num_tokens]).view(SEQUENCES_PER_STEP, SEQUENCE_LENGTH)
            held = held[num_tokens:]


def training_texts(tokenizer: "PreTrainedTokenizerFast") -> Iterator[str]:
    paragraphs = prose(PROSE_SEED)
    for row in dialogues(DIALOGUES_SEED, count=1_000_000):
        yield from (paragraph + END_OF_TURN for paragraph in islice(paragraphs, PARAGRAPHS_PER_DIALOGUE))
        yield str(tokenizer.apply_chat_template(row["messages"], tokenize=False))


def main(arguments: list[str]) -> None:
    match arguments:
        case ["--make", folder]:
            make_demo_model(Path(folder))
        case [root]:
            print(ensure_demo_model(Path(root)))  # noqa: T201  # its output is for a person
        case _:
            sys.exit("usage: python -m worker.engine.demo_model MODEL_ROOT")


if __name__ == "__main__":
    main(sys.argv[1:])
