"""Kill one rank in a step, and one during a checkpoint write; torchrun restarts all ranks.

python -m benchmarks.several_gpus.faults FOLDER RANKS    # prints its result as a line of JSON
"""

import json
import shutil
import sys
import time
from pathlib import Path

STEPS = 60


def main() -> int:
    from tests.faults import kill
    from tests.launch import write_documents

    folder, ranks = Path(sys.argv[1]), int(sys.argv[2])
    shutil.rmtree(folder, ignore_errors=True)  # from an earlier attempt
    folder.mkdir(parents=True)
    documents = write_documents(folder / "documents", documents=20)
    flags = ["--hidden-size", 256, "--ffn-hidden-size", 688, "--kv-channels", 64, "--attention-backend", "sdpa"]
    flags += ["--deterministic", "--save-interval", 20, "--micro-batch-size", 1]
    alone, killed, log = folder / "alone", folder / "killed", folder / "killed.txt"
    left_alone = kill.launch(
        documents, alone, STEPS, folder / "alone.txt", flags=[*flags, "--save", alone], ranks=ranks
    )
    flags += ["--save", killed]
    process = kill.launch(documents, killed, STEPS, log, "--max-restarts=4", flags=flags, ranks=ranks)
    known, kills, restarts = 0, [], []
    for place in ("step", "checkpoint"):
        kill.wait_for(lambda: kill.newest(killed) > known, process)
        if kills:
            restarts.append(round(time.monotonic() - kills[-1], 1))
        known = kill.newest(killed)
        if place == "step":
            time.sleep(0.05)
        else:
            kill.wait_for(lambda: kill.writing(killed, known), process)
        while not (running := kill.ranks(process)):
            time.sleep(0.1)
        running[-1].kill()
        kills.append(time.monotonic())
        print(f"killed one of {len(running)} ranks in a {place}, newest checkpoint {known}", flush=True)
    if process.wait() or left_alone.wait() or kill.newest(killed) != STEPS:
        print(log.read_text()[-3000:], "Error: the killed run did not end well", sep="\n")
        return 1
    kill.compare(alone, killed, STEPS)
    starts = len(list((killed / "runs").iterdir()))
    print(json.dumps(dict(ranks=ranks, starts=starts, same_bits=True, steps=STEPS, next_checkpoint_after=restarts)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
