"""A process that is killed while it saves or pulls a checkpoint leaves the old one or the new one, whole."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub_server import serving
from test_publishing import content, make

from hf_spp.sums import check_sums

SCRIPT = Path(__file__).parent / "killed_writes.py"
KILLS = 50


@contextlib.contextmanager
def writer(environment, *words):
    paths = os.pathsep.join([str(SCRIPT.parent.parent), str(SCRIPT.parent)])
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *words],
        env={**environment, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.stdin.close()


def write(process, number, wait=None):
    """Let a child write, and kill it after a while; its exit status and how long it took."""
    begun = time.perf_counter()
    process.stdin.write(f"{number}\n")
    process.stdin.flush()
    child = int(process.stdout.readline())
    if wait is not None:
        time.sleep(wait)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    return int(process.stdout.readline()), time.perf_counter() - begun


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["save", "pull"])
def test_killed_at_any_moment(kind, tmp_path, capsys):
    sources = [make(tmp_path / "one", 0, hidden_size=96), make(tmp_path / "two", 1, hidden_size=96)]
    with contextlib.ExitStack() as stack:
        names, environment = [str(source) for source in sources], dict(os.environ)
        if kind == "pull":
            server = stack.enter_context(serving(tmp_path / "hub", lfs_threshold=2000))
            names = ["tester/one", "tester/two"]
            for name, source in zip(names, sources, strict=True):
                server.add_repository(name, source)
            environment = server.environment("read")
        target = tmp_path / "target" / "out"
        process = stack.enter_context(writer(environment, kind, str(target), *names))
        _, duration = write(process, 0)
        states = [content(target)]
        assert write(process, 1)[0] == 0
        states.append(content(target))
        draw, killed, found, held = random.Random(0), 0, [0, 0], 1
        while killed < KILLS:
            if kind == "pull":
                # Otherwise all but the first would come from the cache.
                shutil.rmtree(Path(environment["HF_HOME"]) / "hub", ignore_errors=True)
            status, _ = write(process, 1 - held, wait=draw.random() * duration)
            killed += status == signal.SIGKILL
            check_sums(target)
            left = content(target)
            assert left in states, [name for name in left if left[name] not in (one.get(name) for one in states)]
            now = states.index(left)
            found[now != held] += 1
            held = now
        assert write(process, 1 - held)[0] == 0
        assert content(target) == states[1 - held]
    assert found[0] > KILLS // 4, "the kills came too late to hit anything"
    with capsys.disabled():
        print(f"\n{kind}: killed {killed} times; old {found[0]}, new {found[1]}, between 0")
