"""The models that this host has: folders below its model roots, known by their headers, hashed once.

A model is a folder with a config.json and safetensors files; its name is its path below the root, as `demo/tiny-llama`.
Anything that would have to be executed to be loaded is refused with the reason: pickled weights, and configs that point
to code of their own. The content hash names the revision that a job ran on. Hashing reads every byte, so its result is
kept in a small file by path, size and time of change, and only a changed file is read again.

Parameters are counted from the headers of the safetensors, without loading a weight; a tied weight is stored once and
so counts once.
"""

import hashlib
import json
import logging
import math
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from huggingface_hub.errors import StrictDataclassError
from pydantic import BaseModel, ConfigDict, ValidationError
from transformers import AutoConfig

from core.architecture import TensorHeader, read_architecture
from core.errors import UserError
from core.profile import ModelProfile
from worker.job_directory import write_atomically

log = logging.getLogger(__name__)

MAX_HEADER_BYTES = 100 * 2**20  # safetensors' own limit
MAX_CONFIG_BYTES = 4 * 2**20
MAX_FRONT_MATTER_BYTES = 64 * 2**10
MAX_NAME_CHARACTERS = 100  # of a licence or a class
MAX_DEPTH = 4  # folders below a root: org/name, and room for one more grouping

TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
FRONT_MATTER = re.compile(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)
# Where the families keep their context, the first that is there: most, GPT-2, MPT, others of that time.
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
# What transformers saves of a tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class _Hashed(BaseModel):
    model_config = ConfigDict(frozen=True)

    size: int
    changed_ns: int
    sha256: str


@dataclass
class HashCache:
    """sha256 of files by path, size and time of change, kept in `path` (None: in memory alone)."""

    path: Path | None = None
    _known: dict[str, _Hashed] = field(default_factory=dict)
    _has_changed: bool = False

    @classmethod
    def load(cls, path: Path) -> "HashCache":
        """What is in the file; a missing or broken one only costs hashing again."""
        try:
            entries = json.loads(path.read_bytes())
            known = {name: _Hashed.model_validate(entry) for name, entry in entries.items()}
        except (FileNotFoundError, ValueError, AttributeError):
            known = {}
        return cls(path, known)

    def sha256(self, file: Path) -> str:
        status = file.stat()
        known = self._known.get(str(file))
        if known is None or (known.size, known.changed_ns) != (status.st_size, status.st_mtime_ns):
            with file.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
            known = _Hashed(size=status.st_size, changed_ns=status.st_mtime_ns, sha256=digest)
            self._known[str(file)] = known
            self._has_changed = True
        return known.sha256

    def save(self) -> None:
        """Writes what was learned, beside what others have meanwhile; files that are gone are forgotten."""
        if self.path is None or not self._has_changed:
            return
        known = {**HashCache.load(self.path)._known, **self._known}
        kept = {name: entry.model_dump() for name, entry in known.items() if Path(name).exists()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(kept, indent=1).encode())
        self._has_changed = False


def profile_with_hashes(path: Path, name: str, folder: Path) -> ModelProfile:
    """`profile_model` with the hashes that jobs on this host keep in `folder`: a model is read once, not at each start
    of a trainer."""
    cache = HashCache.load(folder / "model-hashes.json")
    profile = profile_model(path, name, cache)
    cache.save()
    return profile


@dataclass(frozen=True)
class FoundModels:
    models: tuple[ModelProfile, ...]
    refused: dict[str, str]  # name -> why it can't be used


def find_models(roots: Sequence[Path], cache: HashCache) -> FoundModels:
    """Every model below the roots; of two with the same name the first root's counts. Saves the cache."""
    models: dict[str, ModelProfile] = {}
    refused: dict[str, str] = {}
    for root in roots:
        for folder in _model_folders(root, MAX_DEPTH):
            name = folder.relative_to(root).as_posix()
            if name in models or name in refused:
                continue
            try:
                models[name] = profile_model(folder, name, cache)
            except UserError as error:
                refused[name] = error.text()
    cache.save()
    return FoundModels(tuple(models[name] for name in sorted(models)), refused)


def _model_folders(folder: Path, depth: int) -> Iterator[Path]:
    """Folders with a config.json, not looking inside them; hidden ones are somebody's half-written work."""
    if depth == 0 or not folder.is_dir():
        return
    for inner in sorted(folder.iterdir()):
        if inner.name.startswith(".") or not inner.is_dir():
            continue
        if (inner / "config.json").is_file():
            yield inner
        else:
            yield from _model_folders(inner, depth - 1)


def profile_model(path: Path, name: str, cache: HashCache | None = None) -> ModelProfile:
    """The facts of the model in `path`. Raises UserError model.* with the reason why it can't be used."""
    weights = sorted(path.glob("*.safetensors"))
    config = _read_config(path)
    _refuse_code(path, name, config, has_weights=bool(weights))
    tensors = {tensor: entry for file in weights for tensor, entry in _read_header(file).items()}
    text_config = _text_config(config)
    shape = read_architecture(text_config, tensors)
    architectures = config.get("architectures")
    return ModelProfile(
        name=name,
        content_hash=_content_hash(path, cache or HashCache()),
        architecture=str(architectures[0]) if isinstance(architectures, list) and architectures else "",
        num_parameters=shape.parameters.total,
        context_length=_context_length(name, text_config),
        vocabulary=_whole_number(name, text_config, "vocab_size"),
        dtype=_dtype(tensors),
        has_chat_template=_has_chat_template(path),
        bytes=sum(file.stat().st_size for file in weights),
        tokenizer_bytes=sum(file.stat().st_size for name in TOKENIZER_FILES if (file := path / name).is_file()),
        shape=shape,
        quantisation=_quantisation(config),
        license=_license(path, config),
        tokenizer=_text_of(_tokenizer_config(path), "tokenizer_class"),
    )


def _quantisation(config: dict[str, object]) -> str | None:
    stored = config.get("quantization_config")
    return None if stored is None else str(stored.get("quant_method", "?") if isinstance(stored, dict) else stored)


def _text_config(config: dict[str, object]) -> dict[str, object]:
    """The language model's part of a config, which in a vision model stands by itself. Where transformers knows the
    class, with what files leave out because the class has it as its default."""
    try:
        filled: dict[str, object] = AutoConfig.for_model(**config).get_text_config().to_dict()
    except (ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as problem:
        log.info("transformers does not read the config of a %s: %s", config.get("model_type"), problem)
        part = config.get("text_config")
        return part if isinstance(part, dict) else config
    return filled


def _refuse_code(path: Path, name: str, config: dict[str, object], *, has_weights: bool) -> None:
    scripts = sorted(file.name for file in path.glob("*.py"))
    if scripts or "auto_map" in config:
        raise UserError("model.has_code", "model.base", name=name, found=scripts[0] if scripts else "auto_map")
    if not has_weights:
        pickled = sorted(file.name for pattern in PICKLED for file in path.glob(pattern))
        if pickled:
            raise UserError("model.pickled", "model.base", name=name, file=pickled[0])
        raise UserError("model.no_weights", "model.base", name=name)


def _read_config(path: Path) -> dict[str, object]:
    file = path / "config.json"
    if file.stat().st_size > MAX_CONFIG_BYTES:
        raise UserError("model.broken_file", "model.base", file=file.name, problem="it is too large")
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError("model.broken_file", "model.base", file=file.name, problem=str(error)) from error
    if not isinstance(config, dict):
        raise UserError("model.broken_file", "model.base", file=file.name, problem="it holds no JSON object")
    return config


def _read_header(file: Path) -> dict[str, TensorHeader]:
    """8 bytes of length, little-endian, then JSON (safetensors' own format)."""
    with file.open("rb") as content:
        prefix = content.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, file.stat().st_size - 8):
            raise UserError("model.broken_file", "model.base", file=file.name, problem="its header is cut off")
        text = content.read(length)
    try:
        header = json.loads(text)
    except ValueError as error:
        raise UserError("model.broken_file", "model.base", file=file.name, problem=str(error)) from error
    try:
        return {name: TensorHeader.model_validate(entry) for name, entry in header.items() if name != "__metadata__"}
    except (AttributeError, ValidationError) as error:
        problem = "its header names no tensors"
        raise UserError("model.broken_file", "model.base", file=file.name, problem=problem) from error


def _content_hash(path: Path, cache: HashCache) -> str:
    """Over names and contents of the folder's files in the order of their names; hidden files don't belong to it."""
    whole = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.is_file() and not file.name.startswith("."):
            whole.update(f"{file.name}\0{cache.sha256(file)}\n".encode())
    return whole.hexdigest()


def _context_length(name: str, config: dict[str, object]) -> int:
    key = next((key for key in CONTEXT_KEYS if key in config), CONTEXT_KEYS[0])
    return _whole_number(name, config, key)


def _whole_number(name: str, config: dict[str, object], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise UserError("model.no_number", "model.base", name=name, key=key)
    return value


def _dtype(tensors: dict[str, TensorHeader]) -> str:
    """The type that holds the most values."""
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + math.prod(tensor.shape)
    largest = max(sizes, key=lambda kind: sizes[kind], default="")
    return TORCH_NAMES.get(largest, largest.lower())


def _has_chat_template(path: Path) -> bool:
    if (path / "chat_template.jinja").is_file() or (path / "chat_template.json").is_file():
        return True
    return bool(_tokenizer_config(path).get("chat_template"))


def _tokenizer_config(path: Path) -> dict[str, object]:
    """Nothing where there is none that can be read: the tokenizer itself says what is wrong when it is used."""
    file = path / "tokenizer_config.json"
    if not file.is_file() or file.stat().st_size > MAX_CONFIG_BYTES:
        return {}
    try:
        config = json.loads(file.read_bytes())
    except ValueError:
        return {}
    return config if isinstance(config, dict) else {}


def _license(path: Path, config: dict[str, object]) -> str | None:
    """Of the model card's front matter, where `other` has a name beside it, else of the config; None: unknown."""
    card = _front_matter(path / "README.md")
    found = _text_of(card, "license")
    if found == "other":
        found = _text_of(card, "license_name") or found
    return found or _text_of(config, "license")


def _front_matter(file: Path) -> dict[str, object]:
    """The YAML between the two lines of dashes that a model card begins with; nothing where there is none."""
    if not file.is_file():
        return {}
    with file.open("rb") as content:
        text = content.read(MAX_FRONT_MATTER_BYTES).decode("utf-8", "replace")
    match = FRONT_MATTER.match(text)
    try:
        values = yaml.safe_load(match[1]) if match else None
    except (yaml.YAMLError, ValueError) as problem:  # a date that is none is a ValueError
        log.info("the front matter of %s is not read: %s", file, problem)
        return {}
    return values if isinstance(values, dict) else {}


def _text_of(values: dict[str, object], key: str) -> str | None:
    """A text, or the texts of a list, as far as a page has room for them."""
    value = values.get(key)
    texts = [part for part in value if isinstance(part, str)] if isinstance(value, list) else [value]
    text = ", ".join(part.strip() for part in texts if isinstance(part, str))
    return text[:MAX_NAME_CHARACTERS] or None
