"""Import what a training needs, wait for a file, then run a script: the next run imports while one still trains.

torchrun ... warm.py FILE SCRIPT FLAGS...
"""

import os
import runpy
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def main() -> None:
    signal, script, *flags = sys.argv[1:]
    sys.argv = [script, *flags]
    sys.path[0] = ROOT
    import pretrain_cream  # noqa: F401  (imports Megatron, without a look at a GPU's memory)

    while not os.path.exists(signal):
        time.sleep(0.02)
    runpy.run_path(os.path.join(ROOT, script), run_name="__main__")


if __name__ == "__main__":
    main()
