"""The web service's settings: environment or .env, each with where it came from, for `pegbox doctor`."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

DEFAULTS: dict[str, str] = {
    "PEGBOX_DATA_DIR": "./data",
    "PEGBOX_HOST": "127.0.0.1",
    "PEGBOX_PORT": "8000",
    "PEGBOX_ROOT_PATH": "",
    "PEGBOX_DATABASE_URL": "",
    "PEGBOX_REDIS_URL": "",
    "PEGBOX_URL": "",
    "PEGBOX_PRICE_PER_GPU_HOUR": "",
    "PEGBOX_CURRENCY": "",
}


@dataclass(frozen=True)
class Settings:
    data_dir: Path
    host: str
    port: int
    root_path: str  # the path under which a proxy serves us, "" at the top
    database_url: str
    redis_url: str  # "" = no Redis: events and launches go by HTTP
    url: str  # how browsers and workers reach us
    price_per_gpu_hour: float | None = None  # None: nothing is said of money
    currency: str = ""
    values: Mapping[str, str] = field(default_factory=dict, compare=False)  # by the setting's name, as text
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def is_https(self) -> bool:
        return self.url.startswith("https://")

    @property
    def public_url(self) -> str:
        """The address of our root as a browser sees it."""
        return self.url if self.url.endswith(self.root_path) else self.url + self.root_path

    @property
    def blob_dir(self) -> Path:
        return self.data_dir / "blobs"


def read_dotenv(path: Path) -> dict[str, str]:
    """KEY=value lines; # starts a comment line; quotes around a value are taken off."""
    if not path.is_file():
        return {}
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    pairs = (line.partition("=") for line in lines if line and not line.startswith("#") and "=" in line)
    return {key.strip(): value.strip().strip("\"'") for key, _, value in pairs}


def _price(text: str) -> float | None:
    if not text:
        return None
    try:
        price = float(text)
    except ValueError:
        price = math.nan
    if not 0 <= price < math.inf:
        raise ValueError(f"PEGBOX_PRICE_PER_GPU_HOUR {text!r} is no price; write a number, such as 2.50")
    return price


def load_settings(environment: Mapping[str, str] | None = None, dotenv: Path = Path(".env")) -> Settings:
    """The environment wins over .env, .env over the default."""
    environment = os.environ if environment is None else environment
    file = read_dotenv(dotenv)
    values, sources = {}, {}
    for name, default in DEFAULTS.items():
        if environment.get(name):
            values[name], sources[name] = environment[name], "environment"
        elif file.get(name):
            values[name], sources[name] = file[name], str(dotenv)
        else:
            values[name], sources[name] = default, "default"
    data_dir = Path(values["PEGBOX_DATA_DIR"]).expanduser().resolve()
    host, port = values["PEGBOX_HOST"], int(values["PEGBOX_PORT"])
    return Settings(
        data_dir=data_dir,
        host=host,
        port=port,
        root_path=values["PEGBOX_ROOT_PATH"].rstrip("/"),
        database_url=values["PEGBOX_DATABASE_URL"] or f"sqlite:///{data_dir / 'pegbox.sqlite3'}",
        redis_url=values["PEGBOX_REDIS_URL"],
        price_per_gpu_hour=_price(values["PEGBOX_PRICE_PER_GPU_HOUR"]),
        currency=values["PEGBOX_CURRENCY"],
        url=(values["PEGBOX_URL"] or f"http://{host}:{port}").rstrip("/"),
        values=values,
        sources=sources,
    )
