"""Predict GPU memory, time and cost of a run, and the layouts that fit. No GPU is needed.

`python tools/plan.py --help`; the code is megatron_cream/commands/plan.py.
"""

import os
import sys

# Lets the file run from a checkout that is not installed.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

from megatron_cream.common import entry

if __name__ == "__main__":
    entry.start()  # before the imports, which take seconds

from megatron_cream.commands.plan import main

if __name__ == "__main__":
    entry.run(main)
