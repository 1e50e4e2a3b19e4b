"""What a person did that cannot be carried out, said so that they can mend it.

A `UserError` is a code with parameters; its sentence stands in the one catalogue below, marked for gettext, so that
the page, the API, the command line and a failed job's card all say the same and a second language needs no code.
Texts say what happened, the number, and what to change. A programmer's mistake is an `assert`, the world's is left
to rise; neither is a UserError.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Parameter = str | int | float
Translate = Callable[[str], str]


def N_(text: str) -> str:
    """Marks a text for extraction by Babel; it is translated where it is shown."""
    return text


# code -> text with {named} parameters. Keep each section sorted by code.
TEXTS: dict[str, str] = {
    # -- spec: a single field ------------------------------------------------------------------------------------
    "spec.alternatives": N_("{first} and {second} cannot both be given; they set the same thing, so keep one of them"),
    "spec.not_a_mapping": N_("a job spec is a mapping of keys to values, not {kind}"),
    "spec.one_of": N_("one of {names} is needed; give one of them a value"),
    "spec.choice": N_("{value} is not one of {choices}"),
    "spec.missing": N_("{field} is missing; give it a value"),
    "spec.number": N_("{value} is not a number; write for example {example}"),
    "spec.integer": N_("{value} is not a whole number; write for example {example}"),
    "spec.boolean": N_("{value} is neither true nor false"),
    "spec.at_least": N_("{value} is too small; set at least {limit}"),
    "spec.above": N_("{value} is too small; set a number above {limit}"),
    "spec.at_most": N_("{value} is too large; set at most {limit}"),
    "spec.below": N_("{value} is too large; set a number below {limit}"),
    "spec.too_long": N_("this has {length} characters; write at most {limit}"),
    "spec.too_many": N_("{length} entries are too many; give at most {limit}"),
    "spec.too_few": N_("at least {limit} is needed here"),
    "spec.text": N_("{value} is not a text"),
    "spec.kind": N_("{value} does not fit here; {expected} is expected"),
    "spec.control_character": N_("a control character stands at position {position}; remove it"),
    "spec.other_choice": N_(
        "{key} belongs to another choice of its part of the spec; leave it out or change the choice"
    ),
    "spec.unknown_key": N_("{key} is not a key of the job spec"),
    "spec.unknown_key_hint": N_("{key} is not a key of the job spec; did you mean {suggestion}?"),
    "spec.file": N_("{path} cannot be read: {problem}; give the path of a spec in YAML or JSON"),
    "spec.yaml": N_("this is not valid YAML: {problem}, line {line}"),
    # -- spec: two fields ----------------------------------------------------------------------------------------
    "spec.offload_needs_adamw": N_(
        "parallel.offload {offload} keeps the moments in CPU memory, where only adamw of 32 bits steps, not {name}; "
        "set optimizer.name to adamw, or parallel.offload to none"
    ),
    "spec.row_shorter_than_sample": N_(
        "packing.row_length {row_length} is below data.max_length {max_length}, so a long sample would fit no row; "
        "set packing.row_length to at least {max_length}, or data.max_length to at most {row_length}"
    ),
    "spec.warmup_longer_than_run": N_(
        "the warm-up of {warmup_steps} steps does not end within the run of {total_steps} steps; "
        "set schedule.warmup_steps below {total_steps}, or train longer"
    ),
    "spec.wrapped_needs_rows": N_(
        "packing.algorithm wrapped cuts samples across steps, so it needs batch.rows_per_step; "
        "give batch.rows_per_step in place of {given}, or choose packing.algorithm best_fit"
    ),
    "spec.adapter_needs_method": N_(
        "method.type full trains every weight and lays on no adapter, so model.adapter {adapter} would be left out; "
        "leave it empty, or set method.type to lora or qlora"
    ),
    "spec.algorithm_needs_packed": N_(
        "packing.algorithm {algorithm} applies to packing.mode packed only, not to {mode}; "
        "leave it out or choose packed"
    ),
    # -- spec: what this release does not run yet ----------------------------------------------------------------
    "spec.not_built": N_("{field} {value} is not built yet in this release; {remedy}"),
    # -- plan ----------------------------------------------------------------------------------------------------
    "plan.above_context": N_(
        "data.max_length {max_length} is above the model's context of {context_length} tokens; "
        "set at most {context_length}"
    ),
    "plan.compile_on_cpu": N_(
        "on a CPU compiled layers take minutes before the first step and are no faster after it; "
        "set compute.compile to false"
    ),
    "plan.flex_on_cpu": N_("flex_attention has no backward pass on a CPU; choose auto or flash in compute.attention"),
    "plan.offload_on_cpu": N_(
        "parallel.offload {offload} moves numbers to CPU memory, where a job on a CPU has them already; "
        "set parallel.offload to none"
    ),
    "plan.overlong": N_(
        "{num_dropped} of {num_samples} samples are longer than data.max_length {max_length} and would be dropped, "
        "with {share} of the trained tokens; raise data.max_length (the longest sample has {longest} tokens), "
        "or set data.overlong: truncate keeps the turns that fit, split makes several samples of one, drop accepts it"
    ),
    "plan.sample_too_long_for_row": N_(
        "data.max_length auto gives {max_length} tokens, above packing.row_length {row_length}; "
        "raise packing.row_length, or set data.max_length"
    ),
    "plan.overlong_context": N_(
        "{num_dropped} of {num_samples} samples are longer than the model's context of {max_length} tokens "
        "(the longest has {longest}) and would be dropped, with {share} of the trained tokens; "
        "choose a model with a longer context, or set data.overlong: truncate keeps the turns that fit, split makes "
        "several samples of one, drop accepts it"
    ),
    "plan.overlong_memory": N_(
        "{num_dropped} of {num_samples} samples are longer than data.max_length {max_length} and would be dropped, "
        "with {share} of the trained tokens; the longest has {longest}, and by estimate samples of at most {fits} fit "
        "{device}, so set data.overlong: truncate keeps the turns that fit, split makes several samples of one, drop "
        "accepts it"
    ),
    "plan.sample_longer_than_row": N_(
        "a sample of {length} tokens is longer than a row of {row_length}; set packing.row_length to at least {length}"
    ),
    "plan.no_runs": N_(
        "the data was measured by an earlier release, which did not note where its trained tokens lie, so it cannot be "
        "cut; upload it again, or choose drop and best_fit"
    ),
    "plan.no_samples": N_("no sample is left to train on: of {rows} rows, {reasons}"),
    "plan.wrapped_to_nothing": N_(
        "wrapped into rows of {row_length} tokens every trained token comes first in its piece, where nothing predicts "
        "it; choose packing.algorithm best_fit, or raise packing.row_length"
    ),
    # -- host: what no host that has the model can do ------------------------------------------------------------
    "host.all_alike": N_("what all hosts that could run it have"),
    "host.likeliest": N_("{host} is the likeliest to take it"),
    "host.looked_at": N_("to look at only: by itself the job would go to {host} ({device})"),
    "host.no_bitsandbytes": N_(
        "{field} {value} needs bitsandbytes, and no host that has this model has it installed ({hosts}); install it "
        "there and restart the worker, or do without: method.type lora, optimizer.name adamw"
    ),
    "host.no_compiler": N_(
        "parallel.offload {value} steps with DeepSpeed's CPU Adam, and no host that has this model can compile it "
        "({hosts}); install g++ and ninja there and restart the worker, or set parallel.offload to none"
    ),
    "host.no_deepspeed": N_(
        "parallel.zero_stage {value} shards with DeepSpeed, and no host that has this model has it installed "
        "({hosts}); install it there and restart the worker, or set parallel.zero_stage to 0"
    ),
    "host.starts": N_("it would start on {host} now"),
    "host.together": N_(
        "no single host that has this model offers all that the job asks for ({asked}): {hosts}; ask for less, or "
        "install what is missing"
    ),
    "host.too_few_cpus": N_(
        "parallel.devices {devices}: no host that has this model has more than {most} CPUs to run ranks on ({hosts}); "
        "set at most {most}"
    ),
    "host.too_few_gpus": N_(
        "parallel.devices {devices}: no host that has this model has more than {most} GPUs ({hosts}); set at most "
        "{most}"
    ),
    "host.unknown_device": N_("{name} is no device of a host that could run this job; known are: {known}"),
    # -- warm-up: where its number of steps comes from -----------------------------------------------------------
    "warmup.default": N_("3 % of {total_steps} steps, which is the default"),
    "warmup.default_short": N_("a short run of {total_steps} steps: 10 % of them, at most 10, which is the default"),
    "warmup.epochs": N_("{epochs} epochs of {steps_per_epoch} steps"),
    "warmup.ratio": N_("{ratio} of {total_steps} steps"),
    "warmup.single_step": N_("the run has a single step, so there is none to warm up on"),
    "warmup.steps": N_("as given, of {total_steps} steps"),
    # -- auto: what it became and why ----------------------------------------------------------------------------
    "auto.as_begun": N_("so the run began, and so it goes on from step {step}"),
    "auto.attention_cpu": N_("on a CPU, PyTorch's own flash kernel runs once for each sample: exact, O(N) memory"),
    "auto.attention_gpu": N_(
        "PyTorch's own flash attention takes all samples of a row in one call: exact, O(N) memory; "
        "tried on the model when the job starts"
    ),
    "auto.attention_gpu_one_by_one": N_(
        "in {dtype} on {device} there is no flash kernel for many samples in one call, so PyTorch's fused kernel "
        "runs once for each sample: exact, O(N) memory"
    ),
    "auto.checkpointing_needed": N_(
        "without, an estimated {otherwise} would be needed of a device's {available}; with it {needed}, for about a "
        "third more compute"
    ),
    "auto.checkpointing_none": N_(
        "without, an estimated {needed} are needed of a device's {available}, so nothing is computed twice"
    ),
    "auto.dtype_cpu": N_("a CPU computes fp32 best"),
    "auto.dtype_gpu": N_("{device} computes bf16"),
    "auto.dtype_old_gpu": N_("{device} has no bf16"),
    "auto.evaluation": N_("{times} times an epoch of {steps_per_epoch} steps, and after the last step"),
    "auto.learning_rate_adapter": N_("adapters on a model of {size} parameters: 2e-4 up to 13 B, 1e-4 above"),
    "auto.learning_rate_full": N_(
        "every weight of a model of {size} parameters: 2e-5 up to 3 B, 1e-5 to 8 B, falling to 2e-6 at 70 B"
    ),
    "auto.max_length": N_(
        "the shortest, in multiples of 64, that loses at most 0.5 % of the trained tokens; "
        "the longest sample has {longest}"
    ),
    "auto.max_length_context": N_("the model's context of {context_length} tokens, although some samples are longer"),
    "auto.max_length_row": N_("a row's capacity, packing.row_length {row_length}"),
    "auto.memory_short": N_(
        "by estimate nothing fits: even so {needed} are needed of a device's {available}, so expect it to run out of "
        "memory; take a shorter data.max_length or row, QLoRA, or more devices"
    ),
    "auto.memory_unknown": N_("the model's sizes are not known ({missing}), so memory cannot be planned"),
    "auto.offload_needed": N_(
        "without, an estimated {otherwise} would be needed of a device's {available}; with it {needed}, and steps "
        "wait for the way to the host and back"
    ),
    "auto.offload_none": N_("an estimated {needed} are needed of a device's {available}, so nothing has to leave it"),
    "auto.row_length": N_("the same as data.max_length"),
    "auto.validation": N_("{held_out} of {num_rows} rows are held out: 2 %, at least 50, at most 500"),
    "auto.validation_given": N_("{held_out} of {num_rows} rows are held out, as given"),
    "auto.validation_none": N_("{num_rows} rows are fewer than 500, so none is held out"),
    "auto.zero_fits": N_("with stage {stage} an estimated {needed} are needed of a device's {available}"),
    "auto.zero_needed": N_(
        "with less sharding an estimated {otherwise} would be needed of a device's {available}, with stage {stage} "
        "{needed}"
    ),
    "auto.zero_one_device": N_("with one device there is nothing to shard over"),
    # -- change: what a job changes against a baseline -----------------------------------------------------------
    "change.data": N_("it learns from other data"),
    "change.dropout": N_(
        "dropout {dropout} draws its masks for another layout, so losses differ by chance and by no more"
    ),
    "change.fewer_slots": N_("{ratio}x fewer slots an epoch"),
    "change.keep": N_("to keep the optimisation set {settings}"),
    "change.model": N_("the model is {after} instead of {before}"),
    "change.more_slots": N_("{ratio}x more slots an epoch"),
    "change.not_measured": N_("not compared: with {settings} the data would have to be measured anew"),
    "change.not_runnable": N_("not compared: {problem}"),
    "change.num_samples": N_("{after:,} samples are trained instead of {before:,}"),
    "change.order": N_("as many steps of as many samples, but other samples meet in a step"),
    "change.peak": N_("the learning rate rises to {after} instead of {before}"),
    "change.same": N_("the same {steps:,} steps on the same samples, with about as many slots"),
    "change.same_fewer_slots": N_("the same {steps:,} steps on the same samples, {ratio}x fewer slots"),
    "change.same_more_slots": N_("the same {steps:,} steps on the same samples, {ratio}x more slots"),
    "change.samples": N_("other samples are trained, or other parts of them"),
    "change.samples_per_step": N_("a step learns from {after} samples on average instead of {before}"),
    "change.steps": N_("{before:,} steps become {after:,}"),
    "change.steps_and_warmup": N_(
        "{before:,} steps become {after:,}, the warm-up {warmup_after:,} steps instead of {warmup_before:,}"
    ),
    "change.steps_per_epoch": N_("an epoch has {after:,} steps instead of {before:,}"),
    "change.trained_tokens": N_("{after:,} trained tokens in all instead of {before:,}"),
    "change.value": N_("{field} is {after} instead of {before}"),
    "change.warmup": N_("the warm-up is {warmup_after:,} steps instead of {warmup_before:,}"),
    # -- engine --------------------------------------------------------------------------------------------------
    "certify.broken": N_("{kind} between two layouts: {problem}"),
    "certify.by_rows": N_(
        "with batch.rows_per_step the layout decides which samples meet in a step, so another one makes other steps; "
        "with batch.samples_per_step they are compared too"
    ),
    "certify.differs": N_(
        "NOT equal: {num_differing} of {count} layouts make other steps ({names}); losses differ by up to {loss}, "
        "gradient norms by up to {norm}, where {allowed} is allowed. It is a bug: please report it with the spec"
    ),
    "certify.equal": N_(
        "Equal: {count} layouts make the same steps; losses differ by at most {loss}, gradient norms by at most "
        "{norm}, where {allowed} is allowed"
    ),
    "certify.failed": N_("{layout} does not run, so nothing can be held against it: {reason}"),
    "certify.fault": N_(
        "Not proven: {names} ended by a fault; the other {count} layouts make the same steps, losses differ by at most "
        "{loss}, gradient norms by at most {norm}"
    ),
    "certify.no_number": N_("its losses or gradient norms are no numbers"),
    "certify.nothing_packed": N_(
        "Equal, but packing was not tried, for no layout put two samples into one row: raise packing.row_length. "
        "Losses of the {count} layouts differ by at most {loss}, gradient norms by at most {norm}"
    ),
    "certify.one_device": N_("there is one device; on two or more they are compared too"),
    "certify.unexplained": N_("it ended with exit code {code} and no word of its own; its log is in {directory}"),
    "engine.adapter_missing": N_(
        "{folder} holds no adapter_config.json, so there is no adapter to start from; "
        "name the folder of a saved adapter"
    ),
    "engine.adapter_tokens": N_(
        "the adapter to start from knows {known} tokens that were added to its base, this job adds {added}; "
        "set model.chat_template to what the adapter was trained with"
    ),
    "engine.adapter_unfit": N_(
        "the adapter to start from does not fit this model: {problem}; name an adapter of the same base model"
    ),
    "engine.compile_sharded": N_(
        "compiled layers are unproven where ZeRO-3 gathers their weights; "
        "set compute.compile to false, or parallel.zero_stage to at most 2"
    ),
    "engine.no_layers": N_(
        "this model's layers cannot be told apart, so none can be compiled; set compute.compile to false"
    ),
    "engine.attention_refused": N_("{problem}; choose auto, which takes what runs on this model and says so"),
    "engine.fused_experts": N_(
        "{knob} cannot act on experts that share one tensor; leave it at its default, or add experts to "
        "method.exclude_modules, which trains the other layers alone"
    ),
    "engine.leak": N_(
        "this model lets packed samples see each other (changing one moves its neighbour's hidden states by "
        "{leak:.2g} of their scale), and with batch.rows_per_step steps are made of packed rows; "
        "give batch.samples_per_step, which then runs one sample a row, or set packing.mode to padded"
    ),
    "engine.no_checkpoint": N_("no checkpoint verifies: {problems}; start over, which trains from the first step"),
    "engine.no_device": N_("the job was given {device}, which torch cannot use here ({problem}); see pegbox doctor"),
    "engine.no_targets": N_("no layer is left for an adapter; name fewer in method.exclude_modules"),
    "engine.not_adaptable": N_(
        "{name} is a {kind}, which can bear no adapter; name linear layers, or list it in method.modules_to_save, "
        "which trains it in full"
    ),
    "engine.other_data": N_(
        "the checkpoint at step {step} was trained on other samples than this job's step {step} holds; "
        "keep data, batch, packing and seed as they were, or start over"
    ),
    "engine.other_model": N_(
        "the checkpoint does not fit: {problem}; keep model and method as they were, or start over"
    ),
    "engine.past_the_end": N_(
        "the checkpoint stands at step {step}, but this job has only {total_steps} steps; train longer, or start over"
    ),
    "engine.ranks": N_(
        "the spec asks for {devices} devices and the job was given {given}, but {ranks} processes are at work; start "
        "it with torchrun --standalone --nproc-per-node {devices}"
    ),
    "engine.quantised_base": N_(
        "the weights of this model are stored quantised ({kind}), which cannot be trained on exactly; choose the "
        "original model, which method.type qlora quantises when it loads it"
    ),
    "engine.tied_target": N_(
        "{names} shares its weight with another layer, so an adapter on it could not be merged; leave it out of "
        "method.target_modules and list it in method.modules_to_save, which trains both as one"
    ),
    "engine.too_few_quantised": N_(
        "only {share:.0%} of this model's weights outside of embeddings and head can be loaded in 4 bits, and "
        "{least:.0%} are expected: {num_kept:,} parameters would stay as they are, most of them in {kept}, about "
        "{num_bytes:,} bytes in all; choose method.type lora, or a model whose layers are linear ones"
    ),
    "engine.unknown_module": N_("no layer of this model is named {name}; its linear layers are {known}"),
    "engine.untied": N_(
        "head and embedding of this model share their weight, and training {names} would part them; leave it out of "
        "method.modules_to_save"
    ),
    # -- zero ----------------------------------------------------------------------------------------------------
    "zero.cpu_adam": N_(
        "parallel.offload {offload} steps on the CPU with DeepSpeed's own Adam, which could not be compiled here "
        "({problem}); install g++ and ninja, or set parallel.offload to none"
    ),
    "zero.expert_modules": N_(
        "the experts of this model are modules of their own, which ranks would gather out of step under ZeRO stage 3; "
        "choose parallel.zero_stage 2"
    ),
    "zero.experts": N_(
        "adapters on experts that share one tensor cannot be laid where ZeRO stage 3 has cut it; choose "
        "parallel.zero_stage 2"
    ),
    "zero.fp16": N_(
        "fp16 needs its loss scaled, which is exact here without ZeRO alone; choose bf16 or fp32, or "
        "parallel.zero_stage 0 instead of {stage}"
    ),
    "zero.new_tokens": N_(
        "this job adds {num_tokens} token(s) to the model, whose rows cannot be made where ZeRO stage 3 has cut the "
        "embedding; choose parallel.zero_stage 2, or the model's own chat template"
    ),
    "zero.offload_params": N_(
        "only stage 3 cuts weights up, so stage {stage} cannot offload them; set it to optimizer"
    ),
    "zero.offload_stage": N_("parallel.offload {offload} moves shards, of which stage 0 has none; choose stage 2 or 3"),
    "zero.other_cut": N_(
        "the moments of {name} were cut for {was} rank(s) and cannot be cut anew for {now}: they share scales in "
        "blocks; go on with as many devices and the same stage, or with adamw"
    ),
    "zero.qlora": N_(
        "QLoRA under ZeRO stage 3 trains differently from stage 2, for a reason not yet found; choose "
        "parallel.zero_stage 0, 1 or 2"
    ),
    "zero.vision": N_("a vision model is tuned on text under ZeRO stages 0 to 2 alone; choose parallel.zero_stage 2"),
    # -- merge: pegbox merge ------------------------------------------------------------------------------------
    "merge.no_adapter": N_(
        "there is no adapter in {folder}; name a job's directory, its result/, or another folder with "
        "adapter_config.json and adapter_model.safetensors"
    ),
    "merge.out_exists": N_("{folder} exists already; name a new folder"),
    # -- client: commands that ask a server ---------------------------------------------------------------------
    "client.no_server": N_(
        "there is no answer from {server} ({problem}); start the server with pegbox up, or name another with "
        "--server or PEGBOX_URL"
    ),
    "client.other_server": N_(
        "{server} answers {status} and is no Pegbox; name the server's address with --server or PEGBOX_URL"
    ),
    "client.token": N_(
        "{problem}; on the server pegbox tokens create makes one, which goes into PEGBOX_TOKEN or --token"
    ),
    # -- train: pegbox train by hand -----------------------------------------------------------------------------
    "train.data_is_no_path": N_(
        "{name} is not a file in {folder}; pegbox train takes a path (JSONL, JSON, CSV, Parquet) or hf:ORG/NAME as "
        "data set"
    ),
    "train.foreign_directory": N_("{out} holds files that are not a fine-tune's; choose an empty or a new folder"),
    "train.no_adapter": N_(
        "there is no adapter in {folder}; name the folder of a saved adapter, with adapter_config.json and "
        "adapter_model.safetensors"
    ),
    "train.no_out": N_("--out is missing; name the folder for checkpoints and result"),
    "train.no_data_file": N_(
        "there is no file {name} (seen from {folder}); give the path of a file of JSONL, JSON, CSV or Parquet"
    ),
    "train.no_model": N_("there is no model {name} below {looked}; give a folder with config.json and safetensors"),
    "train.other_spec": N_(
        "{out} was begun with another spec; choose another --out, or start it over with --fresh (its checkpoints go)"
    ),
    "train.too_few_gpus": N_(
        "parallel.devices asks for {asked} GPUs and {source} {there}; set it to at most {there}, or make more visible"
    ),
    # -- up: starting everything on one machine -------------------------------------------------------------------
    "up.not_ready": N_("the web service at {url} did not become ready; see {log}"),
    "up.port_busy": N_("port {port} on {host} is in use; choose another with --port"),
    "worker.no_token": N_(
        "a worker needs a token; make one on the server with pegbox tokens create --role worker, and set "
        "PEGBOX_WORKER_TOKEN"
    ),
    # -- wait: why a queued job does not run yet -----------------------------------------------------------------
    "wait.cpu_slot": N_("waits for a free device: {busy} of {total} CPU slots on {host} are busy"),
    "wait.device": N_("waits for a free device: {busy} of {total} on {num_hosts} hosts are busy"),
    "wait.devices": N_(
        "waits for {num_devices} free devices on one host: {busy} of {total} on {num_hosts} hosts are busy"
    ),
    "wait.excluded": N_("it failed to start on, or was kept from, each host that could run it: {hosts}"),
    "wait.features": N_("no host that has the model offers {features}"),
    "wait.gpu": N_("waits for a free device: {busy} of {total} GPUs on {host} are busy"),
    "wait.gpus": N_("waits for {num_devices} free devices: {busy} of {total} GPUs on {host} are busy"),
    "wait.host_full": N_("waits for host {host}, where its checkpoint is: {busy} of {total} devices there are busy"),
    "wait.host_gone": N_("waits for host {host}, where its checkpoint is; that host is silent or draining"),
    "wait.host_unfit": N_(
        "waits for host {host}, where its checkpoint is, but that host no longer has the model {model}, "
        "{num_devices} devices or a feature that it needs; mend the host, or start over elsewhere"
    ),
    "wait.kept": N_("free devices of {host} are kept for job {ahead}, which stands before it"),
    "wait.no_host": N_("no host is connected"),
    "wait.no_host_accepts": N_("each host that could run it is silent or draining: {hosts}"),
    "wait.no_model": N_("no host has the model {model}"),
    "wait.position": N_("position {position} in the queue: {reason}"),
    "wait.retry": N_("its host lost the attempt ({reason}); retry {retry} begins {seconds} s after that"),
    "wait.too_many_devices": N_("asks for {num_devices} devices, the largest host that could run it has {largest}"),
    # -- data: the file and its rows -----------------------------------------------------------------------------
    "data.array_broken": N_(
        "the JSON array breaks here: {problem}; the rows before are kept, nothing after is read, so mend it here"
    ),
    "data.array_row_too_deep": N_(
        "this row is nested too deep to be read; the rows before are kept, nothing after is read"
    ),
    "data.array_row_too_long": N_(
        "this row is longer than {limit:,} bytes; the rows before are kept, nothing after is read, "
        "so shorten it, or write one JSON object a line (JSONL), where reading goes on after a long row"
    ),
    "data.cell_broken": N_("{field} is not valid JSON: {problem}; this column holds the JSON text of a list"),
    "data.cell_not_utf8": N_("{field} is not UTF-8; save the file in UTF-8"),
    "data.csv_broken": N_(
        "the table breaks in the row that begins here: {problem}; the rows before are kept, nothing after is read, "
        'so mend it here (a cell that holds ", a line break or the delimiter stands in quotes, each " in it doubled)'
    ),
    "data.csv_cells": N_(
        "this row has {found} cells, the header has {expected}; a cell that holds the delimiter stands in quotes"
    ),
    "data.csv_no_column_name": N_("column {column} of the header has no name; each column needs one, in UTF-8"),
    "data.csv_row_too_long": N_(
        "the row that begins here is longer than {limit:,} bytes, perhaps because a quote does not close; "
        "the rows before are kept, nothing after is read"
    ),
    "data.csv_same_column_name": N_("column {column} of the header is named {name}, as one before it; rename one"),
    "data.gzip_broken": N_(
        "the gzip file is damaged here: {problem}; the rows before are kept, nothing after is read, so pack it again"
    ),
    "data.gzip_expands": N_(
        "{packed:,} bytes of gzip unpack to {unpacked:,} and more, over {limit} times as many, which no text does; "
        "upload it unpacked"
    ),
    "data.kind_not_built": N_("{kind} files are not read; give JSONL, JSON, CSV or Parquet, plain or packed with gzip"),
    "data.kind_unknown": N_(
        "the file begins with {start}; JSONL (one JSON object a line), a JSON array of objects, CSV with a header, "
        "each in UTF-8, or Parquet is expected"
    ),
    "data.parquet_broken": N_("this Parquet file cannot be read: {problem}; write it again"),
    "data.parquet_value": N_("{field} holds a {kind}; texts, numbers, lists and structs of these are read"),
    "data.row_broken": N_("this is not valid JSON: {problem}; one JSON object is expected on the line"),
    "data.row_half_character": N_(
        "a \\u escape stands for half a character (a lone surrogate); write the character itself or both halves"
    ),
    "data.row_not_finite": N_("{constant} is no number of JSON; write a finite number or null"),
    "data.row_not_object": N_("this row is {found}; a JSON object is expected"),
    "data.row_not_utf8": N_("byte {position} of this row is not UTF-8; save the file in UTF-8"),
    "data.rows_of_parquet": N_(
        "the rows of a Parquet file are read by a host alone; its preview with a model shows the first of them"
    ),
    "data.row_too_deep": N_("this row is nested too deep to be read; a conversation needs a few levels"),
    "data.row_too_long": N_("this row has {size:,} bytes; at most {limit:,} are allowed, so shorten or split it"),
    # -- data: what a row holds ----------------------------------------------------------------------------------
    "data.expected": N_("{field} is {found}; {expected} is expected"),
    "data.format_unknown": N_(
        "no known format fits: the rows have the keys {keys}. Expected is one of: {expected}. "
        "Rename the keys, or set data.format"
    ),
    "data.no_assistant": N_("{field} holds no assistant turn, so there is nothing to learn; add one or drop the row"),
    "data.no_good_row": N_("none of the {num_rows} rows of {file} can be used. The first: {reasons}"),
    "data.no_rows": N_("the data holds no row; one JSON object a row is expected"),
    "data.nothing_trained": N_("this row has no assistant turn that is trained; all of them have weight 0"),
    "data.result_without_call": N_(
        "{field} is a tool's result, but no assistant turn stands before it; put the call before its result"
    ),
    "data.two_systems": N_("{field} and the first turn both give a system text; keep one of them"),
    # -- hub: data sets that are elsewhere -----------------------------------------------------------------------
    "hub.bad_name": N_("{name} names no data set on a hub; write hf:ORG/NAME[/CONFIG][:SPLIT][@REVISION]"),
    "hub.not_here": N_(
        "{name} is on a hub, and this server fetches nothing from there; upload it as a file (Parquet, as hubs have "
        "it, is fine), or train on it with pegbox train"
    ),
    "hub.other_revision": N_(
        "{name} should be at commit {wanted}, and this machine has {found} of it; connect it to the hub once, or begin "
        "anew with --fresh"
    ),
    "hub.unknown": N_("the hub has no data set {name}, or not for you: {problem}; check its name, and HF_TOKEN"),
    "hub.unreachable": N_(
        "{name} is not on this machine, and the hub cannot be reached ({problem}); download it where it can, and give "
        "the path of the file"
    ),
    "hub.unusable": N_("{name} cannot be read: {problem}"),
    # -- chat ----------------------------------------------------------------------------------------------------
    "chat.no_border": N_(
        "the chat template rewrites what stands before turn {turn} when the turn is added, so nobody can say "
        "which tokens are the turn; set model.chat_template to chatml, or data.train_on to all"
    ),
    "chat.no_template": N_(
        "the model has no chat template, which conversations need; set model.chat_template to chatml"
    ),
    "chat.template_memory": N_(
        "rendering the chat template takes more than {limit_mb} MB of memory; mend the template, or set "
        "model.chat_template to chatml"
    ),
    "chat.template_refused": N_("the chat template refuses this conversation: {problem}"),
    "chat.template_slow": N_(
        "the chat template takes too long: one rendering used more than {limit_s} s of CPU; mend the template, or set "
        "model.chat_template to chatml"
    ),
    # -- model: what a host has ----------------------------------------------------------------------------------
    "model.broken_file": N_("{file} is not readable: {problem}; copy the model again"),
    "model.has_code": N_(
        "{name} brings code of its own ({found}), which would have to be executed; take a model of a family that "
        "transformers knows"
    ),
    "model.no_number": N_("the config.json of {name} gives no whole number for {key}; add it"),
    "model.no_tokenizer": N_("its tokenizer cannot be loaded: {problem}"),
    "model.no_weights": N_("{name} has a config.json and no safetensors file; copy the weights into its folder"),
    "model.pickled": N_(
        "{name} has its weights in {file}, a pickle, which may run code when it is opened; convert it to safetensors"
    ),
    "model.slow_tokenizer": N_("{kind} is no fast tokenizer, which this needs; add the model's tokenizer.json"),
    "model.template_broken": N_("the chat template is not valid: {problem}, line {line}"),
    "model.unknown_template": N_("{name} is not a built-in chat template; choose one of {choices}"),
    # -- profile: measuring a data set ---------------------------------------------------------------------------
    "profile.crashed": N_("measuring this data set ended with exit code {exit_code}; the worker's log says more"),
    "profile.memory": N_(
        "measuring this data set takes more than {limit_gb} GB of memory; split the file, or shorten its rows"
    ),
    "profile.slow": N_("measuring this data set takes more than {limit_s} s of CPU; split the file"),
    # -- app: who calls ------------------------------------------------------------------------------------------
    "auth.bad_token": N_("this token is unknown or revoked; an administrator makes a new one"),
    "auth.csrf": N_("the page's security token is missing or old; reload the page and try again"),
    "auth.forbidden": N_("the role {role} may not do this; ask an administrator"),
    "auth.foreign_origin": N_("this request was made by a page of another site, so it is refused"),
    "auth.password_common": N_("this password is among the first that are guessed; choose another"),
    "auth.password_long": N_("this password has {length} characters; at most {limit} are allowed"),
    "auth.password_short": N_("this password has {length} characters; at least {limit} are needed"),
    "auth.role": N_("{role} is no role; it is one of {roles}"),
    "auth.session_only": N_("only a person who is logged in can do this, not a token"),
    "auth.token_name": N_("a token needs a name that tells what it is for"),
    "auth.too_many_tries": N_("too many tries; wait {seconds} s"),
    "auth.who": N_("log in, or send a token as Authorization: Bearer"),
    "auth.wrong": N_("name or password is wrong"),
    "auth.wrong_current": N_("this is not the current password"),
    # -- app: data sets and models -------------------------------------------------------------------------------
    "data.line": N_("line {line}: {reason}"),
    "dataset.form": N_("send the file itself as the body, not a form that holds it (curl: -T FILE in place of -F)"),
    "dataset.in_use": N_("{name} is read by the job {job}, which is {state}; cancel that job first"),
    "dataset.name": N_(
        "{name} is no name for a data set: use lower-case letters, digits, dots, dashes and underscores, "
        "beginning with a letter or digit, at most 128"
    ),
    "model.none_known": N_("{name} is unknown: no host has reported its models yet; start a worker first"),
    "model.unknown": N_("no host has the model {name}; known are: {known}"),
    # -- app: jobs -----------------------------------------------------------------------------------------------
    "job.adapter_missing": N_(
        "the job {job} left no {file}, so there is no adapter of it to start from; name a job whose method is lora or "
        "qlora"
    ),
    "job.adapter_not_finished": N_(
        "the job {job} is {state}, so its adapter is not finished; wait until it has succeeded, or name another"
    ),
    "job.adapter_unknown": N_(
        "there is no job {job}, so no adapter to start from; give the id of a finished job (over the network no folder)"
    ),
    "job.illegal_action": N_("a job that is {state} does not take {action}; it takes: {legal}"),
    "job.no_dataset_at_all": N_("there is no data set {name}, and no other; upload one first"),
    "job.not_longer": N_(
        "{field} {after} is no more than the {before} that the job has trained; give the new total, above {before}"
    ),
    "job.other_length": N_("the job's length is given by {used}, not by {given}; extend it by {used}"),
    "job.unknown_dataset": N_("there is no data set {name}; known are: {known}"),
    "job.unknown_version": N_("the data set {name} has no version {version}; known are: {known}"),
    "metrics.max_points": N_("{value} points are outside of what is possible; ask for {least} to {most}"),
    "metrics.unknown_name": N_("{name} is no metric; known are: {known}"),
    # -- app: profiles and preflight -----------------------------------------------------------------------------
    "profile.failed": N_("{dataset} could not be measured: {error}"),
    "profile.no_device": N_("no host that has the model {name} offers a device; see the page of hosts for the reason"),
    "profile.taken": N_("the profile {profile} is {state} already"),
    "verdict.half_on_cpu": N_(
        "a CPU computes {dtype} slowly unless it has instructions for it: without, a product of two matrices took 80 "
        "times as long as in fp32; set compute.dtype to auto, which takes fp32 there"
    ),
    "verdict.host_draining": N_(
        "the only host that could run it, {host}, is being drained; the job waits until it is back"
    ),
    "verdict.host_lacks": N_(
        "{host} has free devices and the model, but not what this job asks for ({lacks}), so it waits for {hosts}"
    ),
    "verdict.host_silent": N_(
        "the only host that could run it, {host}, was last heard of {minutes} min ago; the job waits until it is back"
    ),
    "verdict.hosts_absent": N_(
        "each host that could run it is silent or draining ({hosts}); the job waits until one is back"
    ),
    "verdict.lock": N_("the optimisation is locked, and these settings change it: {what}"),
    "verdict.lock_unknown": N_("the optimisation is locked, but cannot be checked: {why}"),
    "verdict.memory_short": N_(
        "by estimate {needed} are needed of the {available} of {device}, so expect it to run out of memory in its "
        "first pass; take a shorter data.max_length, method.type qlora, more devices or a larger one"
    ),
    "verdict.no_bf16": N_(
        "{device} has no bf16 and emulates it, slower than fp32; set compute.dtype to auto, which takes what it has"
    ),
    "verdict.no_room_for_longer": N_(
        "the longest sample has {longest:,} tokens, and by estimate {device} has room for samples of {fits:,}, so no "
        "longer max_length is offered"
    ),
    "verdict.paged_on_cpu": N_(
        "a CPU has no memory to page out to, so paged_adamw_8bit runs as adamw_8bit there; set optimizer.name to that"
    ),
    "verdict.rows_beyond_max_samples": N_("{count:,} of {total:,} rows are left out by data.max_samples"),
    "verdict.rows_held_out": N_("{count:,} of {total:,} rows are held out for validation"),
    "verdict.calls_dropped": N_(
        "the chat template leaves out the tool calls of {count:,} of the {total:,} conversations with calls among the "
        "first rows: what was called is neither seen nor trained. Take a model whose template writes calls, or set "
        "model.chat_template to chatml, which does"
    ),
    "verdict.rows_refused": N_("{count:,} of {total:,} rows are refused; the data set's report names each"),
    "verdict.samples_cut_to_nothing": N_(
        "{count:,} of {total:,} samples have no trained token within max_length and are left out; "
        "a longer one keeps them"
    ),
    "verdict.samples_split": N_("{count:,} of {total:,} samples are longer than max_length and are split"),
    "verdict.samples_too_long": N_(
        "{count:,} of {total:,} samples are longer than max_length and are dropped; raise data.max_length, or set "
        "data.overlong to split"
    ),
    "verdict.samples_truncated": N_(
        "{count:,} of {total:,} samples are longer than max_length and are truncated; a longer one keeps them whole"
    ),
    "verdict.samples_without_trained_tokens": N_(
        "{count:,} of {total:,} samples have no token to learn and are dropped; see data.train_on if that is not meant"
    ),
    "verdict.targets_lost": N_(
        "{count:,} of {total:,} trained tokens are lost where samples are cut to max_length; a longer one keeps them"
    ),
    "verdict.targets_lost_at_row_ends": N_(
        "{count:,} of {total:,} trained tokens are lost an epoch where wrapped rows cut samples; set "
        "packing.algorithm to best_fit to lose none"
    ),
    "verdict.validation_equal": N_(
        "{count:,} of {total:,} validation rows equal a training row, so the validation loss looks better than it is; "
        "take them out of one of the files, or hold a fraction out instead, which keeps equal rows on one side"
    ),
    "verdict.validation_overlap": N_(
        "about {count:,} of {total:,} validation rows say what a training row says ({equal:,} are equal, about "
        "{alike:,} nearly), so the validation loss looks better than it is; take the duplicates out of the data, its "
        "page lists them, or validate on a data set that shares none with the training data"
    ),
    "verdict.warmup_most_of_run": N_(
        "the warm-up takes {warmup_steps:,} of {total_steps:,} steps, so most of the run stays below its peak; set "
        "schedule.warmup_steps to {default:,}"
    ),
    "verdict.warmup_one_step": N_(
        "the warm-up is a single step of {total_steps:,}, and that already runs at the peak; set "
        "schedule.warmup_steps to {default:,}, or to 0 if none is wanted"
    ),
    "verdict.whole_saves": N_(
        "Whole conversations are {whole:,} tokens; a sample for each turn would be {split:,}, {ratio} times as many."
    ),
    # -- knob: what one means for the job at hand -----------------------------------------------------------------
    "knob.adapter": N_("adapters of rank {rank} train {trained:,} of {total:,} parameters, {share}"),
    "knob.attention": N_(
        "in rows of {tokens:,} tokens a device takes {flash} by flash attention, {sdpa} under a dense mask and {eager} "
        "with scores written out, by estimate"
    ),
    "knob.methods": N_(
        "a device takes {lora} for LoRA, {qlora} for QLoRA and {full} for a full fine-tune, by estimate and with all "
        "else as it is (ZeRO stage {stage})"
    ),
    "knob.moments": N_("optimizer states take {moments} of the {total} that a device needs, by estimate"),
    "knob.packing": N_(
        "an epoch computes {slots:,} positions, {efficiency} of them tokens; plain padding, 8 to a batch, would be "
        "{padded_slots:,}, {padded_efficiency}"
    ),
    "knob.warmup": N_(
        "the rate rises for {warmup_steps:,} of {total_steps:,} steps to {peak}; meanwhile {tokens:,} tokens are seen"
    ),
    "knob.zero_fits": N_("stage {stage}: {size} of a device's {device}, {communication}x communication; it fits"),
    "knob.zero_one_device": N_("with one device nothing is shared out; set parallel.devices to 2 or more to compare"),
    "knob.zero_too_large": N_(
        "stage {stage}: {size} of a device's {device}, {communication}x communication; too large"
    ),
    # -- filter: the language that filters jobs -------------------------------------------------------------------
    "filter.close": N_("character {at}: this ) closes nothing; remove it, or open a ( before it"),
    "filter.field": N_("character {at}: {name} is no field; known are {known}. To look for it as text, quote it"),
    "filter.field_close": N_(
        "character {at}: {name} is no field; did you mean {close}? To look for it as text, quote it"
    ),
    "filter.no_value": N_(
        "character {at}: {name} is compared with nothing; write a value right behind the sign, without a space"
    ),
    "filter.nothing": N_(
        "character {at}: nothing stands here to look for; write a test such as state:running, or a text"
    ),
    "filter.number": N_("character {at}: {value} is no number, which {name} needs; write 2e-4, 64k or 97%"),
    "filter.open": N_("character {at}: this ( is never closed; write a ) behind what belongs together"),
    "filter.operator": N_("character {at}: {name} does not know {operator}; it takes {known}"),
    "filter.quote": N_('character {at}: this quote is never closed; write a " behind the text'),
    "filter.sort": N_("jobs are not sorted by {name}; choose one of {known}, with a - before it for the largest first"),
    "filter.span": N_("character {at}: {value} is no span of time, which {name} needs; write 90s, 30m, 12h, 7d or 2w"),
    "filter.time": N_(
        "character {at}: {value} is no time, which {name} needs; write a span before now such as 7d, or a day such as "
        "2026-11-24"
    ),
    "filter.too_deep": N_("character {at}: brackets and NOTs are nested deeper than {limit}; write it flatter"),
    "filter.too_long": N_("the filter has {length:,} characters; at most {limit:,} are read, so shorten it"),
    "filter.value": N_("character {at}: {name} is never {value}; it is one of {known}"),
    # -- forecast: time, cost, disk and place ---------------------------------------------------------------------
    "forecast.continues": N_("it goes on from the checkpoints of another job, which is not forecast"),
    "forecast.disk_short": N_(
        "up to {needed} will be written on {host}, where {free} are free; keep fewer checkpoints, or make room: the "
        "cache of tokens there can be deleted at any time"
    ),
    "forecast.disk_short_old": N_(
        "up to {needed} will be written on {host}, where {free} are free; keep fewer checkpoints, or make room: the "
        "cache of tokens there can be deleted at any time, and so can checkpoints of jobs that have ended, the largest "
        "of {names}"
    ),
    "forecast.formula_cpu": N_(
        "a formula, right within a factor of {factor}: the work at {pace} a process. The first job or dry run on "
        "{device} gives a measured pace"
    ),
    "forecast.formula_gpu": N_(
        "a formula, right within a factor of {factor}: the work at {percent} % of {peak}, the peak of {device} in "
        "{dtype}. The first job or dry run there gives a measured pace"
    ),
    "forecast.jobs": N_("the last {num_jobs} jobs like this on {device} ran at {pace}"),
    "forecast.learned": N_("the last {num_jobs} jobs like this took {ratio}x what was planned; that is included"),
    "forecast.learned_one": N_("the last job like this took {ratio}x what was planned; that is included"),
    "forecast.memory": N_("peak memory of the last {num_jobs} jobs like this was {percent} % of their plan"),
    "forecast.memory_one": N_("peak memory of the last job like this was {percent} % of its plan"),
    "forecast.no_peak": N_(
        "no forecast of time: no peak is known of {device}; the first job or dry run there gives a pace"
    ),
    "forecast.no_sizes": N_(
        "no forecast of time: the model's sizes are not known, so its work cannot be counted; the first job or dry run "
        "on {device} gives a pace"
    ),
    "forecast.not_measured": N_("its data had not been measured when it was launched, so nothing was forecast"),
    "forecast.one_job": N_("the last job like this on {device} ran at {pace}"),
    "forecast.starts": N_("starts at once on {devices} of {host}"),
    "forecast.trial": N_("a dry run of {steps} steps on {device} ran at {pace}"),
    # -- trial: a few steps for what they tell -------------------------------------------------------------------
    "trial.all_diverged": N_(
        "every rate diverged, also the smallest, {smallest}; probe again around {lower}, or look for what is wrong "
        "with the data"
    ),
    "trial.best_is_largest": N_(
        "{rate}, the largest rate that was tried, has the lowest loss over the last {steps} steps ({loss}), so the "
        "best may be larger still; probe again around it, or take it"
    ),
    "trial.best_is_smallest": N_(
        "{rate}, the smallest rate that was tried, has the lowest loss over the last {steps} steps ({loss}), so the "
        "best may be smaller still; probe again around it, or take it"
    ),
    "trial.best_lies_between": N_("{rate} has the lowest loss over the last {steps} steps ({loss})"),
    "trial.illegal_action": N_(
        "a trial does not take {action}, for nothing of it is kept; it takes: {legal}. Clone it for the whole job"
    ),
    "trial.rate_twice": N_("{rate} stands twice among the rates; give each once"),
    "trial.smaller_within_noise": N_(
        "{best} has the lowest loss over the last {steps} steps, but {rate} ({loss}) is within the noise of it, and of "
        "rates that a few steps do not tell apart the smaller is the safer in a long run"
    ),
    "trial.unknown_key": N_("{key} is no key of a trial of the kind {kind}; its keys are {known}"),
    # -- app: requests -------------------------------------------------------------------------------------------
    "app.internal": N_("the server failed; its log says why under the request id {request_id}"),
    "app.not_found": N_("there is no {thing} {name}"),
    "app.second_web": N_("process {pid} already serves {data_dir}; stop it, or give this one another PEGBOX_DATA_DIR"),
    "request.bad_key": N_("an Idempotency-Key has 1 to {limit} printable ASCII characters"),
    "request.host": N_("this server does not answer to the name {host}; set PEGBOX_URL to the address that you use"),
    "request.invalid": N_("{problem}"),
    "request.method": N_("{method} is not a method of {path}"),
    "request.no_route": N_("there is nothing at {path}"),
    "request.not_json": N_("the body is not valid JSON: {problem}"),
    "request.other_body": N_("the Idempotency-Key {key} was sent before with another body; take a new key"),
    "request.unknown_key": N_("{key} is not a key of this request"),
    "upload.disk_full": N_("the server's disk is full; nothing was stored. Free some space and upload again"),
    "upload.other_bytes": N_("the bytes received have the sha256 {found}, not {expected}; upload again"),
    "upload.too_large": N_("the body is larger than {limit:,} bytes, which is the most that is taken here"),
    # -- exit: how an attempt ended -------------------------------------------------------------------------------
    "exit.crashed": N_("the trainer crashed with {signal}; its last output: {log}"),
    "exit.crashed_rank": N_("rank {rank} crashed with {signal}, which ended all; its last output: {log}"),
    "exit.early": N_("stopped before the trainer was ready to write a checkpoint"),
    "exit.grace": N_(
        "the trainer did not stop within {grace_s} s and was killed; "
        "what it learned since its newest checkpoint is lost"
    ),
    "exit.hang": N_("nothing was heard of the trainer for {minutes} minutes, so it was killed as hung; {stacks}"),
    "exit.incomplete": N_("the trainer reported success without {missing}, so this does not count as one"),
    "exit.killed": N_("the trainer was ended by {signal} from outside; nobody asked this job to stop"),
    "exit.killed_by_kernel": N_(
        "the trainer was killed while the kernel's out-of-memory killer ended {num_kills} process(es) on this host: "
        "most likely the main memory ran out"
    ),
    "exit.killed_rank": N_(
        "rank {rank} was ended by {signal} from outside, which ended all; nobody asked this job to stop"
    ),
    "exit.no_directory": N_("the host knows nothing of this attempt; it ended before it began"),
    "exit.remedy_crashed": N_("a crash in native code often comes from a driver or library; the log tells more"),
    "exit.remedy_hang": N_("it is tried again from its newest checkpoint; look at the log if that happens twice"),
    "exit.remedy_host_memory": N_("run fewer jobs at a time on this host, or give it more main memory"),
    "exit.remedy_killed": N_("it is tried again from its newest checkpoint"),
    "exit.remedy_log": N_("the last lines of the log tell more"),
    "exit.stale": N_("another attempt of this job has taken over, so this one was ended"),
    "exit.supervisor_died": N_("the process that watched over the trainer died, so nobody knows how the trainer ended"),
    "exit.unexplained": N_("the trainer ended with code {code} and without a reason; its last output: {log}"),
    "exit.unexplained_rank": N_(
        "rank {rank} ended with code {code} and without a reason, which ended all; its last output: {log}"
    ),
    # -- worker: what a host cannot do for a job -----------------------------------------------------------------
    "worker.adapter_damaged": N_(
        "the adapter of job {job} arrives damaged from the server; see the server's disk, or leave model.adapter empty"
    ),
    "worker.adapter_gone": N_(
        "the server no longer has the adapter of job {job}; start from another, or leave model.adapter empty"
    ),
    "worker.artifact_missing": N_("{name} has not arrived (sha256 {sha256}); upload it, then finish again"),
    "worker.agent_runs": N_(
        "a worker already runs on the data directory {folder}; stop it, or give this one another PEGBOX_DATA_DIR"
    ),
    "worker.data_gone": N_("the server no longer has the data set {dataset}; upload it again"),
    "worker.data_damaged": N_("the data set {dataset} arrives damaged from the server; upload it again"),
    "worker.inventory": N_("this host's GPUs and models could not be listed: {problem}"),
    "worker.model_not_here": N_(
        "this host has no model {model} below {roots}; put its folder there and restart the worker, or choose another"
    ),
    "worker.prepare_died": N_("reading the data with the tokenizer failed with code {exit_code}: {log}"),
    "worker.prepare_slow": N_(
        "reading the data with the tokenizer took longer than {minutes} minutes and was ended; use a smaller data set"
    ),
    "worker.host_of_other_token": N_(
        "the host {host} registered with another token that is still valid; revoke that one first"
    ),
    "worker.not_recorded": N_("events are recorded up to {acked_seq}, the attempt ends at {final_seq}; send the rest"),
    "worker.protocol": N_("the worker speaks protocol {theirs}, this server {ours}; install the same release on both"),
    "worker.stale_fence": N_("this attempt is no longer the job's (its fence is {current_fence} now)"),
    "worker.token_of_other_host": N_("this token belongs to another host; make one for each host"),
    "worker.start_failed": N_("the trainer could not be started: {problem}"),
}


class UserError(Exception):
    """One fault of the input: `field` is the dotted spec key, form field or file it belongs to ("" = the whole)."""

    def __init__(self, code: str, field: str = "", **parameters: Parameter) -> None:
        assert code in TEXTS, f"no text for {code}"
        super().__init__(code, field, parameters)
        self.code = code
        self.field = field
        self.parameters = parameters

    def text(self, translate: Translate = str) -> str:
        """The sentence, in the language of `translate` (English by default)."""
        return translate(TEXTS[self.code]).format(**{"field": self.field, **self.parameters})

    def __str__(self) -> str:
        return self.text()

    @property
    def errors(self) -> tuple["UserError", ...]:
        return (self,)


@dataclass(frozen=True)
class Reason:
    """Why something was chosen, or has to wait: no fault, but told from the same catalogue."""

    code: str
    parameters: Mapping[str, Parameter]

    def __post_init__(self) -> None:
        assert self.code in TEXTS, f"no text for {self.code}"

    def text(self, translate: Translate = str) -> str:
        return translate(TEXTS[self.code]).format(**self.parameters)

    def __str__(self) -> str:
        return self.text()


class UserErrors(Exception):
    """Several faults found in one look, so that a person mends them in one go."""

    def __init__(self, errors: Sequence[UserError]) -> None:
        assert errors
        super().__init__(*errors)
        self.errors = tuple(errors)

    def __str__(self) -> str:
        return "\n".join(f"{error.field}: {error.text()}" if error.field else error.text() for error in self.errors)


USER_FAULTS = (UserError, UserErrors)
