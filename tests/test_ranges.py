"""Byte ranges: which a cut keeps, which are read as one, and how they come from a Hub that fails."""

import itertools
import os
import shutil

import pytest
import torch
from hub_client import scripted
from hub_server import serving
from hypothesis import given
from hypothesis import strategies as st

from hf_spp.byte_ranges import coalesced, divided, kept_ranges, length_of, missing

RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)).map(lambda one: (one[0], one[0] + one[1])))


def covered(ranges):
    return {at for start, stop in ranges for at in range(start, stop)}


@given(RANGES, RANGES, st.integers(0, 10), st.integers(1, 7))
def test_arithmetic_of_ranges(wanted, present, gap, largest):
    joined = coalesced(wanted, gap)
    assert covered(joined) >= covered(wanted)
    assert all(after[0] - before[1] >= max(gap, 1) for before, after in itertools.pairwise(joined))
    assert covered(coalesced(wanted, 0)) == covered(wanted)
    assert length_of(coalesced(wanted, 0)) == len(covered(wanted))
    assert covered(missing(joined, present)) == covered(joined) - covered(present)
    parts = divided(joined, largest)
    assert covered(parts) == covered(joined)
    assert all(0 < stop - start <= largest for start, stop in parts)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data(), st.sampled_from([torch.uint8, torch.float32]))
def test_kept_ranges_hold_the_bytes_of_the_cut_tensor(shape, data, dtype):
    tensor = torch.arange(torch.Size(shape).numel()).to(dtype).reshape(shape)
    kept = {
        dim: torch.tensor(sorted(data.draw(st.sets(st.integers(0, length - 1), min_size=1))))
        for dim, length in enumerate(shape)
        if data.draw(st.booleans())
    }
    whole = tensor.numpy().tobytes()
    for dim, places in kept.items():
        tensor = tensor.index_select(dim, places)
    ranges = kept_ranges(shape, tensor.element_size(), kept)
    assert b"".join(whole[start:stop] for start, stop in ranges) == tensor.contiguous().numpy().tobytes()
    assert ranges == sorted(ranges)


# --- from a Hub ------------------------------------------------------------------------------------------------------

# One client for all tests, because it takes seconds to start. Waits between attempts are written down, not waited.
CLIENT = """
import contextlib, json, os, sys, time, types
time.sleep = lambda seconds: waits.append(seconds)
import huggingface_hub
from huggingface_hub import constants
from hf_spp import hub
from hf_spp.errors import SPPError
from hf_spp.hub import ranges as module

class Answer:
    def __init__(self, inner):
        self.inner, self.status_code = inner, 200 if kind == "whole" else inner.status_code
        self.headers = {name.title(): value for name, value in inner.headers.items()}
        self.headers.update({"other": {"Content-Range": "bytes 1-1000/1000000"}, "packed": {"Content-Encoding": "gzip"}}
            .get(kind, {}))
    def __getattr__(self, name):
        return getattr(self.inner, name)

class Session:
    @contextlib.contextmanager
    def stream(self, *arguments, **options):
        with huggingface_hub.get_session().stream(*arguments, **options) as inner:
            yield Answer(inner)

def run(repo, name, ranges, cache, revision=None, offline=False, **options):
    constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = cache, offline
    module.get_session = Session if kind else huggingface_hub.get_session
    commit = hub.resolve_commit(repo, revision)
    file = hub.open_file(repo, name, commit)
    if not isinstance(file, hub.RemoteFile):
        return {"whole": file.read_bytes().hex()}
    moved = hub.fetch_ranges({file: [tuple(one) for one in ranges]}, **options)
    found = []
    for start, stop in ranges:
        buffer = bytearray(stop - start)
        file.read_into(start, memoryview(buffer))
        found.append(buffer.hex())
    return {"bytes": moved.bytes, "requests": moved.requests, "read": found}

for line in sys.stdin:
    waits, command = [], json.loads(line)
    kind = command.pop("kind", None)
    try:
        if "upload" in command:
            huggingface_hub.upload_file(**command["upload"], token=command["token"])
            result = {}
        elif "download" in command:
            constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = command["cache"], False
            huggingface_hub.snapshot_download(command["download"])
            result = {}
        else:
            result = run(**command)
    except SPPError as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps({**result, "waits": waits}), flush=True)
"""
REPO, NAME = "tester/model", "model.safetensors"
SIZE = 1_000_000
SPREAD = [(0, 1000), (100_000, 101_000), (101_500, 102_000), (900_000, SIZE)]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A server, and a function that lets the client run a command."""
    with serving(tmp_path_factory.mktemp("hub")) as server, scripted(server, CLIENT, "read") as run:
        yield server, run
        assert server.violations == []


class Repository:
    """A repository of one large file on the server, and an empty cache of the client."""

    def __init__(self, hub, folder):
        self.server, self.run = hub
        self.cache, self.content = folder / "cache", b"\0" + os.urandom(SIZE - 1)  # the server takes it for binary
        where = self.server._place("model", REPO)
        shutil.rmtree(where, ignore_errors=True)
        (folder / "files").mkdir()
        (folder / "files" / NAME).write_bytes(self.content)
        (folder / "files" / "small.txt").write_text("abc" * 100)
        (folder / "files" / "config.json").write_text("{}")
        self.server.add_repository(REPO, folder / "files")
        self.server.faults.clear()
        self.server.requests.clear()

    def read(self, ranges, name=NAME, **options):
        return self.run(repo=REPO, name=name, ranges=ranges, cache=self.cache, **options)

    def parts(self, ranges):
        return [self.content[start:stop].hex() for start, stop in ranges]

    def asked(self):
        """Requests for ranges since the last look."""
        found = [one for one in self.server.requests if one.range and one.method == "GET"]
        self.server.requests.clear()
        return found


@pytest.fixture
def repository(hub, tmp_path):
    return Repository(hub, tmp_path)


def test_ranges_are_read_once_and_then_come_from_the_cache(repository):
    found = repository.read(SPREAD, request_bytes=1000)
    assert found["read"] == repository.parts(SPREAD)
    assert (found["bytes"], found["requests"]) == (103_000, 3)
    asked = repository.asked()
    assert {(one.origin, one.token, one.status) for one in asked} == {("storage", None, 206)}
    assert sorted(one.range for one in asked) == ["bytes=0-999", "bytes=100000-101999", "bytes=900000-999999"]
    again = repository.read(SPREAD, offline=True)
    assert (again["read"], again["bytes"], again["requests"]) == (found["read"], 0, 0)
    assert repository.server.requests == []
    # Only what is not there yet is asked for.
    more = [(0, 2000), (899_000, SIZE)]
    assert repository.read(more)["read"] == repository.parts(more)
    assert sorted(one.range for one in repository.asked()) == ["bytes=1000-1999", "bytes=899000-899999"]


def test_gaps_that_cost_less_than_a_request_are_read_along(repository):
    found = repository.read(SPREAD)
    assert found["read"] == repository.parts(SPREAD)
    assert (found["bytes"], found["requests"]) == (202_000, 2)


def test_files_of_the_hubs_own_origin_are_asked_for_with_the_token(repository):
    assert repository.read([(3, 9)], name="small.txt")["read"] == [b"abcabc".hex()]
    assert [(one.origin, one.token) for one in repository.asked()] == [("hub", "read")]


def test_other_bytes_under_the_same_name_are_read_anew(repository):
    assert repository.read([(0, 50)])["read"] == repository.parts([(0, 50)])
    first, other = repository.server.refs(REPO)["refs/heads/main"], b"\0" + os.urandom(SIZE - 1)
    (repository.cache / "other").write_bytes(other)
    upload = {"path_or_fileobj": str(repository.cache / "other"), "path_in_repo": NAME, "repo_id": REPO}
    assert repository.run(upload=upload, token=repository.server.tokens["write"]) == {"waits": []}
    assert repository.read([(0, 50)])["read"] == [other[:50].hex()]
    # The first commit's bytes are still there, under their own ETag.
    assert repository.read([(0, 50)], offline=True, revision=first)["read"] == repository.parts([(0, 50)])


def test_a_file_that_was_downloaded_whole_is_used(repository):
    repository.run(download=REPO, cache=repository.cache)
    assert repository.read([(0, 50)])["whole"] == repository.content.hex()
    assert repository.asked() == []


@pytest.mark.parametrize("kind", ["429", "500", "503", "drop_before", "drop_after", "truncate"])
@pytest.mark.parametrize("target", ["HEAD", "GET"])
def test_what_passes_is_asked_for_again(repository, kind, target):
    path = "resolve/.*safetensors" if target == "HEAD" else "/contents/"
    fault = repository.server.faults.add(kind, method=target, path=path, times=2, seconds=7)
    found = repository.read(SPREAD)
    assert found["read"] == repository.parts(SPREAD)
    assert fault.struck == 2 or target == "HEAD"
    if kind == "truncate" and target == "HEAD":  # such an answer has no body
        return
    assert fault.struck == 2
    assert len(found["waits"]) == 2
    assert kind != "429" or found["waits"] == [7, 7]


@pytest.mark.parametrize("kind", ["429", "500", "drop_after", "truncate"])
def test_what_does_not_pass_is_one_error_and_the_rest_stays(repository, kind):
    fault = repository.server.faults.add(kind, method="GET", path="/contents/", nth=2, times=1000)
    found = repository.read(SPREAD, request_bytes=1000)
    assert found["error"].startswith("HubError: The bytes "), found
    assert "could not be read" in found["error"]
    assert fault.struck >= 5
    repository.server.faults.clear()
    repository.asked()
    assert repository.read(SPREAD, request_bytes=1000)["read"] == repository.parts(SPREAD)
    assert len(repository.asked()) == 2


@pytest.mark.parametrize(
    ("kind", "message", "attempts"),
    [
        ("whole", "answers with the whole of model.safetensors", 1),
        ("other", "instead of 'bytes 0-999/1000000'", 5),
        ("packed", "(gzip) instead of 1000", 5),
    ],
)
def test_answers_with_other_bytes_are_refused(repository, kind, message, attempts):
    found = repository.read([(0, 1000)], kind=kind)
    assert found["error"].startswith("HubError")
    assert message in found["error"]
    assert len(repository.asked()) == attempts
    assert list(repository.cache.rglob("0-1000")) == []


def test_a_signed_address_that_expired_is_asked_for_again(repository, monkeypatch):
    real, signatures = repository.server._signature, []

    def signature(path):
        signatures.append(path)
        return real(path) if len(signatures) != 1 else "expired"

    monkeypatch.setattr(repository.server, "_signature", signature)
    assert repository.read([(5, 10)])["read"] == repository.parts([(5, 10)])
    assert [one.status for one in repository.asked()] == [403, 206]


def test_offline_without_the_bytes(repository):
    repository.read([(0, 10)])
    found = repository.read([(500_000, 500_010)], offline=True)
    assert "The Hub cannot be reached" in found["error"]
    assert found["waits"] == []


def test_what_is_not_there_is_asked_for_once(repository):
    found = repository.read([(0, 10)], name="none.safetensors")
    assert found["error"].startswith("HubError: Repository 'tester/model'")
    assert "has no file 'none.safetensors'" in found["error"]
    assert found["waits"] == []
    assert repository.read([(0, 10)], name="../up")["error"].startswith("CheckpointError")


def test_damaged_cache_entries_are_not_used(repository):
    repository.read([(0, 1000)])
    (segment,) = repository.cache.rglob("0-1000")
    segment.write_bytes(repository.content[:500])
    for name in ("7-3", "x", "0-99999999", "900-1000"):
        (segment.parent / name).write_bytes(b"?")
    (note,) = repository.cache.rglob(f"{NAME}.json")
    note.write_text('{"etag": 3}')
    assert repository.read([(0, 1000)])["read"] == repository.parts([(0, 1000)])
