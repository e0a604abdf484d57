"""Training runs in several processes on CPU, started from a test."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

WORLD_SIZES = {"plain": 1, "ddp": 2, "fsdp2": 2, "zero2": 2, "zero3": 2}
_TESTS = Path(__file__).parent
_DEFAULTS: dict[str, Any] = {
    "steps": 6,
    "seed": 0,
    "model": "vit",
    "head": None,
    "changes": {},
    "frozen": None,
    "dtype": "float32",
    "optim": "adamw_torch",
    "arguments": {},
    "callback": None,
    "leave_behind": False,
    "lora": None,
    "resume": None,
}


def run_training(setup: str, folder: Path, *, limit: float = 240.0, **settings: Any) -> dict[str, Any]:
    """Train a tiny model with the stock Trainer, and return what rank 0 found.

    Args:
        setup: `plain` (one process), `ddp`, `fsdp2`, `zero2` or `zero3` (two each).
        folder: The run's `output_dir`.
        limit: Seconds before the run is stopped.
        settings: Any of `steps`; `seed` of weights, data and training; `model` and `head` as in
            `conftest.build_model`, with `changes` of the config; `frozen`, a regular expression of the parameters that
            are not trained; `dtype`, `float32` or `float64` (ZeRO: `float32`); `optim`; `arguments`, more
            TrainingArguments; `callback`, keyword arguments of `SPPCallback` with the fields of its `config` as a
            dict; `resume`, a checkpoint's folder.

    Returns:
        `losses`, one for each step of this run, at full precision, means over the ranks; `world_size`; `wrapper`, the
        class that Trainer calls; `dtensor` for FSDP2; `zero_stage` for ZeRO.

    Raises:
        AssertionError: A process failed, or the run took too long.
    """
    unknown = settings.keys() - _DEFAULTS.keys()
    assert not unknown, f"unknown settings {sorted(unknown)}; known are {sorted(_DEFAULTS)}"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "settings.json"
    file.write_text(json.dumps({**_DEFAULTS, **settings, "setup": setup, "output_dir": str(folder)}, default=str))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={WORLD_SIZES[setup]}"]
    command = [sys.executable, *(launcher if WORLD_SIZES[setup] > 1 else []), _TESTS / "training_script.py", file]
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=_environment())
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = f"none within {limit:.0f} s"
        finally:
            _stop(process)
    tail = (folder / "output.txt").read_text()[-6000:]
    assert code == 0, f"{setup} ended with exit status {code}:\n{tail}"
    return json.loads((folder / "result.json").read_text())


def _environment() -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))}
    paths = [str(_TESTS.parent), str(_TESTS), *filter(None, [inherited.get("PYTHONPATH")])]
    return {
        **inherited,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
    }


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the launcher, which ends its processes when it is asked to, but not when it is killed."""
    process.terminate()
    try:
        process.wait(40)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
