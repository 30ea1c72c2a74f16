"""List all patches.

`python -m megatron_cream.patches.table` compares each with the installed releases.
"""

import importlib
import pkgutil
import sys

from megatron_cream import patches
from megatron_cream.common.errors import UsageError
from megatron_cream.patches import platform, registry
from megatron_cream.patches.registry import Patch


def collect_patches() -> list[Patch]:
    """Return the patches that the modules of this package declare. Imports Megatron."""
    names = [module.name for module in pkgutil.iter_modules(patches.__path__)]
    modules = [importlib.import_module(f"{patches.__name__}.{name}") for name in names if name != "table"]
    return [value for module in modules for value in vars(module).values() if isinstance(value, Patch)]


def check_all() -> None:
    """Check the target of each patch. Call before anything is replaced or written.

    Raises:
        UsageError: a target differs from the record; names the first.
    """
    for patch in collect_patches():
        registry.check(patch)


def main() -> int:
    """Print each patch with its target, or with the error if the installed target differs."""
    platform.setup()
    code = 0
    for patch in collect_patches():
        try:
            registry.check(patch)
            print(f"{patch.name:26} {patch.target}")
        except UsageError as error:
            code = 1
            print(f"{patch.name:26} {error}")
    return code


if __name__ == "__main__":
    sys.exit(main())
