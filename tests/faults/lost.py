"""pretrain_cream.py, but that one rank runs out of memory at a step, and its Python would then wait forever to end.

torchrun --nproc_per_node=2 tests/faults/lost.py RANK STEP flags of pretrain_cream.py
"""

import os
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pretrain_cream  # isort: skip

from megatron.training import get_args

get_batch = pretrain_cream.get_batch


def main() -> int:
    rank, step = sys.argv[1:3]
    del sys.argv[1:3]

    def out_of_memory(*args):
        if os.environ["RANK"] == rank and get_args().curr_iteration >= int(step):
            threading.Thread(target=threading.Event().wait).start()  # as NCCL waits for collectives that none enters
            raise MemoryError("nothing is left")
        return get_batch(*args)

    pretrain_cream.get_batch = out_of_memory
    return pretrain_cream.main()


if __name__ == "__main__":
    sys.exit(main())
