"""A trainer without a model: the same files, signals and exit codes as worker.engine.train, and many ways to misbehave.

What it does stands in the spec's notes, as words: `steps=20 pause=0.01 at=5 then=exit:71`; at=0 is before the first
step. In a layout of a certificate, `only=layout-3` makes that one misbehave and `differs=layout-3` gives it other losses.
Under torchrun it is one of several ranks: rank 0 emits, each prints into its own file, `who=1` makes rank 1 the
one that misbehaves, and the first to end writes outcome.json.
"""

import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from worker.dies_with_parent import die_with
from worker.job_directory import write_atomically

PID_FILE = "pid-{}"


def main() -> None:
    directory = Path(sys.argv[1])
    rank = int(os.environ.get("RANK", "0"))
    if "RANK" in os.environ:
        die_with(os.getppid())
        log = os.open(directory / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        print(f"rank {rank} begins", flush=True)
    faulthandler.register(signal.SIGUSR2)
    spec = json.loads((directory / "spec.json").read_text())
    inputs = json.loads((directory / "inputs.json").read_text())
    told = dict(word.split("=", 1) for word in spec["notes"].split())
    num_steps, pause_s = int(told.get("steps", 20)), float(told.get("pause", 0.01))
    at, then = int(told.get("at", 0)), told.get("then", "")
    events = os.open(directory / "events.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    num_events = 0

    def emit(kind: str, **fields: object) -> None:
        nonlocal num_events
        if rank != 0:
            return
        num_events += 1
        event = {"seq": num_events, "ts": time.time(), "kind": kind, **fields}
        os.write(events, json.dumps(event).encode() + b"\n")

    def end(code: int, reason: str | None, text: str) -> None:
        outcome = {"code": code, "reason": reason, "text": text, "remedy": ""}
        if not (directory / "outcome.json").exists():
            write_atomically(directory / "outcome.json", json.dumps(outcome).encode())
        os._exit(code)

    def checkpoint(step: int) -> None:
        print(f"rank {rank} saves at step {step}", flush=True)
        if rank != 0:
            return
        folder = directory / "checkpoints" / f"step-{step}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps({"step": step}))
        emit("checkpoint", step=step, path=str(folder), bytes=1, best=False)

    def misbehave() -> None:
        if rank != int(told.get("who", "0")) or told.get("only", directory.name) != directory.name:
            return
        match then.split(":"):
            case ["refuse"]:
                end(65, "bad_spec", "this model has no such attention")
            case ["exit", code]:
                emit("failure", reason="oom", text="CUDA out of memory", remedy="smaller rows")
                end(int(code), "oom", "CUDA out of memory")
            case ["raise"]:
                raise RuntimeError("a bug in the trainer")
            case ["segfault"]:
                os.kill(os.getpid(), signal.SIGSEGV)
            case ["hang"]:
                while True:
                    time.sleep(1)
            case ["chat"]:
                while True:
                    print("still here", flush=True)
                    time.sleep(0.1)
            case ["grandchild"]:
                # In a session of its own, deaf, and holding the output open: what killpg leaves behind.
                subprocess.Popen([sys.executable, "-c", _DEAF], start_new_session=True)
            case ["print", num_lines]:
                print("\x1b[31mred\x1b[0m and \x07bell", "10 %\r50 %\r100 %", "secret-token-value", sep="\n")
                print("x" * 5000)
                for number in range(int(num_lines)):
                    print("line", number, flush=False)
                sys.stdout.flush()

    signals: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
    signal.signal(signal.SIGUSR1, lambda number, _: signals.append(number))
    (directory / "argv.json").write_text(json.dumps(sys.argv[1:]))
    (directory / "environ.json").write_text(json.dumps(dict(os.environ)))
    (directory / PID_FILE.format(rank)).write_text(str(os.getpid()))
    # A barrier: no rank makes a step before all have their handlers.
    while not all(
        (directory / PID_FILE.format(other)).exists() for other in range(int(os.environ.get("WORLD_SIZE", "1")))
    ):
        time.sleep(0.01)

    begin = 1
    if inputs["resume"]:
        begin = 1 + int(Path(inputs["resume"][0]).name.removeprefix("step-"))
        print(f"resuming at step {begin}", flush=True)
    emit("phase", name="load_model", done=0, total=None)
    for _ in range(10 * int(told.get("chat", 0))):
        print("still here", flush=True)
        time.sleep(0.1)
    if at == 0:
        misbehave()
    emit("phase", name="train", done=0, total=num_steps)
    for step in range(begin, num_steps + 1):
        emit("step", step=step, epoch=0.1, loss=1 / step, step_s=pause_s)
        time.sleep(pause_s)
        if step == at:
            misbehave()
        if signal.SIGUSR1 in signals:
            signals.remove(signal.SIGUSR1)
            checkpoint(step)
        if signal.SIGTERM in signals and told.get("term") != "ignore":
            checkpoint(step)
            emit("end", outcome="stopped", steps=step, trained_tokens=step, seconds=1.0)
            end(75, "stopped", f"stopped after step {step} with a checkpoint")
    if rank != 0:
        return
    if inputs["trial"] is not None and inputs["trial"]["kind"] == "layout":
        losses = [3.0 - 0.1 * step for step in range(inputs["trial"]["steps"])]
        if told.get("differs") == directory.name:
            losses[-1] *= 1.01
        is_alone = inputs["trial"]["is_alone"]
        curve = {"losses": losses, "grad_norms": [1.0] * len(losses), "slots": 100, "ranks": inputs["ranks"]}
        more = {"most_segments_in_a_row": 1 if is_alone else 3, "attention": "flash", "seconds": 0.1}
        (directory / "trial.json").write_text(json.dumps(curve | more))
    elif inputs["trial"] is not None:
        if told.get("report") != "none":
            (directory / "report.json").write_text("{}")
    elif told.get("result") != "none":
        (directory / "result" / "deep").mkdir(parents=True)
        (directory / "result" / "adapter_model.safetensors").write_bytes(b"weights of " + spec["name"].encode())
        (directory / "result" / "deep" / "empty.json").write_bytes(b"")
    if told.get("end") != "none":
        emit("end", outcome="succeeded", steps=num_steps, trained_tokens=num_steps, seconds=1.0)
    end(0, None, "done")


_DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"

if __name__ == "__main__":
    main()
