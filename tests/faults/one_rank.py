"""Run pretrain_cream.py with one rank that hangs in its data loader, or runs out of memory, at a step.

torchrun --nproc_per_node=2 tests/faults/one_rank.py stuck|memory RANK STEP flags of pretrain_cream.py
"""

import os
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pretrain_cream  # isort: skip

from megatron.training import get_args

get_batch = pretrain_cream.get_batch


def stuck_data_loader() -> None:
    """Hang, as on a file system that does not respond."""
    while True:
        time.sleep(3600)


def out_of_memory() -> None:
    """Raise MemoryError in a process that then never exits, as when NCCL waits for peer ranks."""
    threading.Thread(target=threading.Event().wait).start()
    raise MemoryError("nothing is left")


FAULTS = {"stuck": stuck_data_loader, "memory": out_of_memory}


def main() -> int:
    fault, rank, step = sys.argv[1:4]
    del sys.argv[1:4]

    def get_batch_or_fail(*args):
        if os.environ["RANK"] == rank and get_args().curr_iteration >= int(step):
            FAULTS[fault]()
        return get_batch(*args)

    pretrain_cream.get_batch = get_batch_or_fail
    return pretrain_cream.main()


if __name__ == "__main__":
    sys.exit(main())
