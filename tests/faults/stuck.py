"""pretrain_cream.py, but that one rank's data loader sleeps forever at a step: as on a file system that hangs.

torchrun --nproc_per_node=2 tests/faults/stuck.py RANK STEP flags of pretrain_cream.py
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pretrain_cream  # isort: skip

from megatron.training import get_args

get_batch = pretrain_cream.get_batch


def main() -> int:
    rank, step = sys.argv[1:3]
    del sys.argv[1:3]

    def stuck_data_loader(*args):
        while os.environ["RANK"] == rank and get_args().curr_iteration >= int(step):
            time.sleep(3600)
        return get_batch(*args)

    pretrain_cream.get_batch = stuck_data_loader
    return pretrain_cream.main()


if __name__ == "__main__":
    sys.exit(main())
