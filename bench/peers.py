"""The systems that benches compare with, in an environment of their own: `python -m bench.peers` makes it and lists it.

It lies under .bench/, is made once, and is made anew when what stands here or in constraints.txt changes. torch comes
first and pinned, then TRL with the libraries that we use ourselves, in our versions, so that only the trainers differ.
Of ms-swift, LLaMA-Factory and Axolotl nothing is wanted but how they pack; they come without the hundreds of packages
that they name, and with what their packing imports. One that cannot be had is remembered with the reason, which the
tables print in its place.
"""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".bench" / "peers"
CONSTRAINTS = ROOT / "constraints.txt"
PYTHON = HOME / "venv" / "bin" / "python"

# Each is one call of pip; the peers behind the first two lean on them.
COMMON = (("torch",), ("transformers", "datasets", "peft", "accelerate"))


@dataclass(frozen=True)
class Peer:
    name: str
    installs: tuple[tuple[str, ...], ...]  # arguments of pip install, one call each
    shown: tuple[str, ...]  # distributions whose versions a table names


TRL = Peer("TRL", (("trl==1.16.*",),), ("trl", "torch", "transformers", "datasets", "peft"))
MS_SWIFT = Peer("ms-swift", (("--no-deps", "ms-swift==4.6.*"), ("binpacking",)), ("ms-swift", "binpacking"))
LLAMA_FACTORY = Peer("LLaMA-Factory", (("--no-deps", "llamafactory==0.9.*"),), ("llamafactory",))
# Axolotl's newest release wants another Python than ours; its multipack has been the same for long.
AXOLOTL = Peer("Axolotl", (("--no-deps", "axolotl"), ("numba",)), ("axolotl", "numba"))
PEERS = (TRL, MS_SWIFT, LLAMA_FACTORY, AXOLOTL)


class Missing(Exception):
    """The peer cannot be had here; the text says why."""


def python_of(peer: Peer) -> Path:
    """The interpreter in which `peer` can be imported. Makes the environment on first use; raises Missing."""
    problem = _state()[peer.name]
    if problem:
        raise Missing(problem)
    return PYTHON


def versions(peer: Peer) -> str:
    """Raises Missing."""
    code = "import sys, importlib.metadata as m; print(', '.join(f'{n} {m.version(n)}' for n in sys.argv[1:]))"
    done = subprocess.run(
        [python_of(peer), "-c", code, *peer.shown], capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout.strip()


def _state() -> dict[str, str]:
    """Per peer the reason why it is missing, "" for none."""
    wanted = hashlib.sha256(repr((COMMON, PEERS)).encode() + CONSTRAINTS.read_bytes()).hexdigest()
    path = HOME / "state.json"
    if path.exists():
        state = json.loads(path.read_bytes())
        if state["wanted"] == wanted:
            return dict(state["problems"])
    problems = _install()
    path.write_text(json.dumps({"wanted": wanted, "problems": problems}, indent=1))
    return problems


def _install() -> dict[str, str]:
    HOME.mkdir(parents=True, exist_ok=True)
    print(f"making the environment of the other systems in {PYTHON.parent.parent}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", PYTHON.parent.parent], check=True, timeout=300)
    for arguments in COMMON:
        if problem := _pip(*arguments):
            return {peer.name: problem for peer in PEERS}
    return {peer.name: _first_problem(peer) for peer in PEERS}


def _first_problem(peer: Peer) -> str:
    return next((problem for arguments in peer.installs if (problem := _pip(*arguments))), "")


def _pip(*arguments: str) -> str:
    """The reason why it failed, "" where it did not."""
    # Only pip's own variables and the machine's: an environment of ours must not leak into the new one.
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    command = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(CONSTRAINTS)]
    try:
        done = subprocess.run(
            [*command, *arguments], env=environment, capture_output=True, text=True, check=False, timeout=1800
        )
    except subprocess.TimeoutExpired:
        return f"pip install {' '.join(arguments)} took over half an hour"
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
    return f"pip install {' '.join(arguments)}: {lines[0] if lines else f'exit code {done.returncode}'}"


def main() -> None:
    for peer in PEERS:
        try:
            print(f"{peer.name}: {versions(peer)}")
        except Missing as problem:
            print(f"{peer.name}: not to be had here: {problem}")


if __name__ == "__main__":
    main()
