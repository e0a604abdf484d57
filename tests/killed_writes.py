"""Write a checkpoint again and again, to be killed: python tests/killed_writes.py save|pull TARGET SOURCE SOURCE

Prints `ready`, then for each line on standard input, which is the number of a source, the process id of a child that
writes that one over the target, and its exit status. Sources are folders to save again, or repositories to pull.
"""

import os
import sys

from hf_spp import load_reordered
from hf_spp.conversion import save_reordered
from hf_spp.publishing import pull


def main(kind, target, *sources):
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    loaded = [load_reordered(source) for source in sources] if kind == "save" else []
    print("ready", file=answers)
    for line in sys.stdin:
        number = int(line)
        child = os.fork()
        if child == 0:
            if kind == "save":
                save_reordered(*loaded[number], sources[number], target, overwrite=True)
            else:
                pull(sources[number], target, overwrite=True)
            os._exit(0)
        print(child, file=answers)
        _, status = os.waitpid(child, 0)
        print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status), file=answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
