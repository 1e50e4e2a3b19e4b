"""What the import contracts of `make check` can't see: other people's packages, and dangerous calls."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("app", "core", "worker", "client", "launch")
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))

# Modules whose processes must start fast and must not hold a GPU library.
WITHOUT_TORCH = ("app.main", "core.preflight", "worker.agent", "worker.supervisor", "worker.tasks", "pegbox")


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_a_fresh_interpreter_gets_no_torch_with(module: str) -> None:
    code = (
        f"import sys, {module}\n"
        "found = {'torch', 'transformers', 'tokenizers', 'peft', 'worker.engine'} & set(sys.modules)\n"
        "sys.exit(f'imported {found}' if found else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr


def test_only_the_plans_arrays_know_numpy_in_core() -> None:
    users = [
        path.name
        for path in (ROOT / "core").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Import) and any(name.name.startswith("numpy") for name in node.names))
        or (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("numpy"))
    ]
    of_lengths = {"arrangement.py", "bounds.py", "curve_report.py", "lengths.py", "packing.py", "selection.py"}
    of_rows = {"duplicates.py", "overlap.py", "sampled.py"}
    assert set(users) == of_lengths | of_rows


FORBIDDEN_CALLS = {
    "os.system": "a shell",
    "os.popen": "a shell",
    "pickle.load": "runs what it reads",
    "pickle.loads": "runs what it reads",
    "eval": "runs what it reads",
    "exec": "runs what it reads",
}


def _calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_shell_no_pickle_no_unsafe_load(path: Path) -> None:
    for name, call in _calls(ast.parse(path.read_text(encoding="utf-8"))):
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert name not in FORBIDDEN_CALLS, f"line {call.lineno}: {name} is {FORBIDDEN_CALLS.get(name)}"
        assert keywords.get("shell") != "True", f"line {call.lineno}"
        if name == "torch.load":
            assert keywords.get("weights_only") == "True", f"line {call.lineno}"
        if name.endswith("np.load"):
            assert keywords.get("allow_pickle", "False") == "False", f"line {call.lineno}"
        if name.endswith("yaml.load"):
            assert keywords.get("Loader") not in ("None", None, "yaml.Loader", "yaml.FullLoader"), f"line {call.lineno}"
        if name.endswith("from_pretrained") or name.endswith("from_config"):
            assert keywords.get("trust_remote_code", "False") == "False", f"line {call.lineno}"


def test_templates_never_switch_escaping_off() -> None:
    templates = sorted((ROOT / "templates").rglob("*.html"))
    assert templates
    for path in templates:
        text = path.read_text(encoding="utf-8")
        for word in ("|safe", "| safe", "autoescape", "hx-on", "javascript:", " style="):
            assert word not in text, f"{path.name}: {word}"
