"""Stop one rank of two with SIGSTOP, and check how and when the job ends.

    python tests/faults/stop.py FOLDER [--timeout-minutes 0.2]

The other rank must print where it waits within the time-out plus a few seconds; torchrun gives the stopped rank 30
seconds to answer, then kills it.
"""

import argparse
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.faults.kill import launch, newest, ranks, wait_for
from tests.launch import write_documents


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--timeout-minutes", type=float, default=0.2)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    documents, save, log = (
        write_documents(args.folder / "documents", documents=20),
        args.folder / "run",
        args.folder / "log",
    )
    flags = ["--save", save, "--load", save, "--save-interval", 2, "--timeout-minutes", args.timeout_minutes]
    process = launch(documents, save, 100_000, log, flags=flags)
    wait_for(lambda: newest(save) >= 4, process)
    running, stopped = ranks(process), time.monotonic()
    running[1].send_signal(signal.SIGSTOP)
    wait_for(lambda: "its stacks follow" in log.read_text(), process)
    shown = time.monotonic() - stopped
    assert process.wait(timeout=600) != 0
    ended = time.monotonic() - stopped
    assert not any(rank.is_running() for rank in running)
    assert "[rank 0] thread MainThread:" in log.read_text()
    print(f"stacks after {shown:.1f} s, the job's end after {ended:.1f} s")
    assert shown < 60 * args.timeout_minutes + 10
    return 0


if __name__ == "__main__":
    sys.exit(main())
