"""A run with reorderings that is killed and resumed ends with the weights of one that was not, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).parent / "killed_script.py"
STEPS = 60


def start(folder, kind, checkpoint=None):
    command = [sys.executable, SCRIPT, folder, kind, *filter(None, [checkpoint])]
    paths = [str(SCRIPT.parent.parent), str(SCRIPT.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    with (folder / "output.txt").open("w") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)


def finish(process, folder):
    code = process.wait(120)
    assert code == 0, (folder / "output.txt").read_text()[-3000:]
    return load_file(folder / "final.safetensors")


def last_whole_checkpoint(folder):
    """The last checkpoint that was written to its end: the state of the Trainer comes last."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1])):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        return checkpoint
    return None


@pytest.mark.distributed
@pytest.mark.parametrize(("kind", "kills"), [("plain", 20), ("adapted", 6)])
def test_killed_and_resumed_run_ends_the_same(kind, kills, tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = finish(start(tmp_path / "whole", kind), tmp_path / "whole")
    folder, draw = tmp_path / "killed", random.Random(0)
    at = sorted(draw.sample(range(2, STEPS - 1), kills))
    seen = []
    for step in at:
        (folder / "step").write_text("-1")
        process = start(folder, kind, last_whole_checkpoint(folder))
        while int((folder / "step").read_text() or -1) < step:
            assert process.poll() is None, (folder / "output.txt").read_text()[-3000:]
            time.sleep(0.002)
        # Anywhere in the step: in the pause, the forward pass, the reordering or the writing of a checkpoint.
        time.sleep(draw.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        seen.append(last_whole_checkpoint(folder))
    assert len({one for one in seen if one is not None}) > kills // 4
    resumed = finish(start(folder, kind, last_whole_checkpoint(folder)), folder)
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], one) for name, one in whole.items())
