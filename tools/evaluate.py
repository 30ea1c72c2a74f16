"""Does a long window hold what it promises? Long-context tests of a Hugging Face folder or a Megatron checkpoint.

`python tools/evaluate.py --help`; the code is megatron_cream/commands/evaluate.py.
"""

import os
import sys

# So that the file runs from a checkout that is not installed.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

from megatron_cream.common import entry

if __name__ == "__main__":
    entry.start()  # before the imports, which take seconds

from megatron_cream.commands.evaluate import main

if __name__ == "__main__":
    entry.run(main)
