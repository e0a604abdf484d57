import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_spp import hub
from hf_spp.errors import CheckpointError, HubError
from hf_spp.hub.failures import explained


def test_file_of_local_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "config.json").write_text("{}")
    assert hub.resolve_file(tmp_path, "sub/config.json") == tmp_path / "sub" / "config.json"
    assert hub.resolve_file(str(tmp_path), "sub/config.json") == tmp_path / "sub" / "config.json"


def test_local_folder_without_the_file_says_what_it_holds(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"no file 'config.json'; it holds notes\.txt\."):
        hub.resolve_file(tmp_path, "config.json")


@pytest.mark.parametrize("filename", ["../secret.json", "/etc/hostname", "a/../../b", ""])
def test_file_name_stays_inside(tmp_path, filename):
    with pytest.raises(CheckpointError, match="does not stay inside"):
        hub.resolve_file(tmp_path, filename)


def test_neither_folder_nor_repository():
    with pytest.raises(HubError, match="neither a folder on this machine nor a repository id"):
        hub.resolve_file("./no/such/folder", "config.json")


def answer(kind, message="refused"):
    # The constructors want a response of the HTTP client, which differs between versions of huggingface_hub.
    error = kind.__new__(kind)
    error.args = (message,)
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (answer(RepositoryNotFoundError), "'user/model' was not found on the Hub"),
        (answer(GatedRepoError), "'user/model' is gated"),
        (answer(RevisionNotFoundError), "no revision None"),
        (answer(RemoteEntryNotFoundError), "'user/model' has no file 'config.json'"),
        (answer(HfHubHTTPError, "status 503"), "could not be read: status 503"),
        (OSError("disk full"), "could not be read: disk full"),
        (RuntimeError("connection reset"), "could not be read: connection reset"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_refusals_of_the_hub(monkeypatch, error, message):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(HubError, match=message) as caught:
        hub.resolve_file("user/model", "config.json")
    assert "Accepted:" in str(caught.value)
    assert caught.value.__cause__ is error


def test_offline_without_cached_file(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        HubError,
        match=r"The Hub cannot be reached, and the local cache lacks the file 'config\.json' of 'user/model'.*Unset",
    ):
        hub.resolve_file("user/model", "config.json", cache_dir=tmp_path)


def test_a_lost_connection_is_not_called_offline_mode(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with (
        pytest.raises(HubError, match="Connect and try again, or pass") as caught,
        explained("a/b", None, "files"),
    ):
        raise LocalEntryNotFoundError("lost")
    assert "HF_HUB_OFFLINE" not in str(caught.value)


def test_offline_with_cached_file(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    commit = "0" * 40
    repo = tmp_path / "models--user--model"
    for folder in (repo / "refs", repo / "snapshots" / commit):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots" / commit / "config.json").write_text("{}")
    assert hub.resolve_file("user/model", "config.json", cache_dir=tmp_path).read_text() == "{}"
    with pytest.raises(HubError, match=r"lacks the file 'other.json' of 'user/model' \(revision 'main'\)"):
        hub.resolve_file("user/model", "other.json", revision="main", cache_dir=tmp_path)


def test_files_of_a_folder_are_found_by_pattern(tmp_path):
    for name in ("tokenizer.json", "tokenizer/inner.json", "1_Pooling/config.json", "other.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    found = hub.find_files(tmp_path, ["tokenizer*", "[0-9]_*/*", "missing"])
    assert found == {name: tmp_path / name for name in ("tokenizer.json", "1_Pooling/config.json")}


def test_files_of_a_repository_that_is_not_there_are_refused(tmp_path):
    with pytest.raises(HubError, match="'not a repository' is neither a folder on this machine nor a repository id"):
        hub.find_files("not a repository", ["*"])
