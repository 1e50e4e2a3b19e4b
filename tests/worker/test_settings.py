import stat
from pathlib import Path

import pytest

from core.wire import AttemptRef
from worker.settings import ServerAddress, WorkerSettings, settings_path


def test_the_environment_says_where_everything_is(tmp_path: Path) -> None:
    settings = WorkerSettings.from_environment(
        {
            "PEGBOX_DATA_DIR": str(tmp_path),
            "PEGBOX_URL": "https://pegbox.example",
            "PEGBOX_WORKER_TOKEN": "t",
            "PEGBOX_MODEL_ROOTS": f"{tmp_path}/a:{tmp_path}/b",
        }
    )
    assert settings.data_dir == tmp_path
    assert (settings.server, settings.token) == ("https://pegbox.example", "t")
    assert settings.model_roots == (tmp_path / "a", tmp_path / "b")


def test_an_empty_variable_is_no_setting() -> None:
    empty = dict.fromkeys(("PEGBOX_DATA_DIR", "PEGBOX_URL", "PEGBOX_MODEL_ROOTS"), "")
    settings = WorkerSettings.from_environment(empty)
    assert settings == WorkerSettings.from_environment({})
    assert settings.model_roots == (settings.data_dir / "models",)
    assert settings.data_dir == Path("data").resolve()


@pytest.fixture
def settings(tmp_path: Path) -> WorkerSettings:
    settings = WorkerSettings(data_dir=tmp_path, server="http://one", token="a", model_roots=())
    settings.save()
    return settings


def test_what_is_kept_for_the_children_is_the_users_alone(settings: WorkerSettings) -> None:
    assert WorkerSettings.load(settings.data_dir) == settings
    assert stat.S_IMODE(settings_path(settings.data_dir).stat().st_mode) == 0o600


def test_a_new_address_and_token_reach_who_is_running(settings: WorkerSettings) -> None:
    address = ServerAddress(settings)
    assert address.url_and_token() == ("http://one", "a")
    settings.model_copy(update={"server": "http://two", "token": "b"}).save()
    assert address.url_and_token() == ("http://two", "b")
    settings_path(settings.data_dir).unlink()
    assert address.url_and_token() == ("http://two", "b"), "a folder that was tidied up stops nobody"


def test_a_host_keeps_its_id(settings: WorkerSettings) -> None:
    assert settings.host_id() == WorkerSettings.load(settings.data_dir).host_id()


@pytest.mark.parametrize("job", ["..", "a/b", "", ".", "a b", "é", "x" * 65, "a\n"])
def test_only_a_plain_word_is_a_job_id(settings: WorkerSettings, job: str) -> None:
    with pytest.raises(ValueError, match="is not a job id"):
        settings.attempt_dir(AttemptRef(job=job, attempt=1, fence=1))


def test_every_attempt_has_a_directory_of_its_own(settings: WorkerSettings) -> None:
    directory = settings.attempt_dir(AttemptRef(job="j-1", attempt=2, fence=9))
    assert directory == settings.data_dir / "worker" / "jobs" / "j-1" / "a2"
