"""Reorder a checkpoint again and again, to be killed: python tests/streamed_script.py SOURCE TARGET [once]

Prints `ready`, then for each line on standard input the process id of a child that does it, and its exit status. With
`once` it does it itself and prints the peak of resident memory in bytes that this took.
"""

import os
import sys
from pathlib import Path

from hf_spp import SPPConfig, reorder_checkpoint


def peak():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def main(source, target, once=None):
    if once:
        before = peak()
        reorder_checkpoint(source, target, SPPConfig(metric="l1"))
        print(peak() - before)
        return
    print("ready", flush=True)
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            reorder_checkpoint(source, target, SPPConfig(metric="l1"), overwrite=True)
            os._exit(0)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
