"""Convert between Hugging Face folders and Megatron checkpoints.

Runs in one process, without GPU and torchrun.

`python tools/convert_hf.py --help`; the code is megatron_cream/commands/convert.py.
"""

import os
import sys

# Lets the file run from a checkout that is not installed.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

from megatron_cream.common import entry

if __name__ == "__main__":
    entry.start()  # before the imports, which take seconds

from megatron_cream.commands.convert import main

if __name__ == "__main__":
    entry.run(main)
