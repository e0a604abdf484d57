"""A process with the real Hub client, which carries out one order after another: importing it once is enough.

    with client(server) as ask:
        assert ask("push", folder=str(folder), repo_id="tester/model")["files"] == 7

Waits between tries are not waited. An order that raises gives {"error": class, "ours": whether it is an SPPError, …}.
"""

import contextlib
import json
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).parent.parent


@contextlib.contextmanager
def client(server, token="write", xet=False, **variables):
    """Start a process that speaks to a server; gives the function that sends it orders."""
    paths = f"{ROOT}:{ROOT / 'tests'}"
    environment = {**server.environment(token, xet=xet), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **variables}
    process = subprocess.Popen(
        [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def ask(order, **arguments):
        process.stdin.write(json.dumps([order, arguments]) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    try:
        yield ask
    finally:
        process.stdin.close()
        process.wait(60)
        process.stdout.close()


@contextlib.contextmanager
def scripted(server, script, token):
    """Start a process that runs a script; gives the function that sends it a line of JSON and gives its answer."""
    with (server.folder / "errors.txt").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", script], env=server.environment(token), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
        )  # fmt: skip

        def run(**command):
            process.stdin.write(json.dumps(command, default=str) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            assert line, (server.folder / "errors.txt").read_text()
            return json.loads(line)

        with process:
            yield run


def push(folder, repo_id, **options):
    from hf_spp.publishing import push_checkpoint

    return vars(push_checkpoint(folder, repo_id, **options))


def push_model(folder, repo_id, benchmarks=None, widths=None, **options):
    from hf_spp import Benchmark, WidthReport, load_reordered, push_to_hub

    if widths is not None:
        options["evaluation"] = [WidthReport.load(one) for one in widths] + options.get("evaluation", [])
    options["benchmarks"] = {name: Benchmark(**one) for name, one in (benchmarks or {}).items()}
    return vars(push_to_hub(repo_id, *load_reordered(folder), **options))


def pull(repo_id, target, cache=None, **options):
    from hf_spp.publishing import pull

    with _cache(cache):
        return {"folder": str(pull(repo_id, target, **options))}


def load(repo_id, cache=None, offline=False, **options):
    from huggingface_hub import constants

    from hf_spp import load_reordered

    with _cache(cache):
        constants.HF_HUB_OFFLINE = offline
        try:
            model, reordering = load_reordered(repo_id, **options)
        finally:
            constants.HF_HUB_OFFLINE = False
    return {"digest": reordering.digest, "class": type(model).__name__, "name": model.name_or_path}


def info(repo_id, **options):
    from hf_spp.inspection import inspect_checkpoint

    return {**vars(inspect_checkpoint(repo_id, **options)), "reordering": None}


def slice_of(repo_id, width, **options):
    from hf_spp import load_subnetwork, plan_read

    report = plan_read(repo_id, width, **options)
    model = load_subnetwork(repo_id, width, **options)
    return {"class": type(model).__name__, "report": str(report)}


@contextlib.contextmanager
def _cache(folder):
    from huggingface_hub import constants

    before, constants.HF_HUB_CACHE = constants.HF_HUB_CACHE, folder or constants.HF_HUB_CACHE
    try:
        yield
    finally:
        constants.HF_HUB_CACHE = before


def answer(order, arguments):
    from hf_spp import SPPError

    try:
        return {**ORDERS[order](**arguments), "error": None}
    except Exception as error:
        return {
            "error": type(error).__name__,
            "ours": isinstance(error, SPPError),
            "message": str(error),
            "trace": traceback.format_exc(),
        }


ORDERS = {"push": push, "push_model": push_model, "pull": pull, "load": load, "info": info, "slice": slice_of}

if __name__ == "__main__":
    import time

    time.sleep = lambda seconds: None
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        print(json.dumps(answer(*json.loads(line)), default=str), file=answers, flush=True)
