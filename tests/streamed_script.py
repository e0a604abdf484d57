"""Reorder a checkpoint again and again, to be killed: python tests/streamed_script.py SOURCE TARGET [once]

Prints `ready`. A line on standard input starts a child that does it and prints its process id, the next line waits for
it and prints its exit status or the signal that ended it. With `once` it does it itself and prints the bytes of
resident memory that this took at its peak.
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
        # The process id is the child's own until it has been waited for.
        sys.stdin.readline()
        _, status = os.waitpid(child, 0)
        print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
