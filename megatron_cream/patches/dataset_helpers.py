"""Take the dataset helpers as the wheel of megatron-core has them."""

from megatron_cream.patches import registry
from megatron_cream.patches.registry import Patch

COMPILE_HELPERS = Patch(
    "compile-helpers",
    "megatron.core.datasets.utils:compile_helpers",
    "Megatron runs `make` for helpers that its wheel has built already, in a folder that may be read-only.",
    parameters="",
)


def install() -> None:
    """Call before `pretrain`."""
    try:
        from megatron.core.datasets import helpers_cpp  # noqa: F401
    except ImportError:  # built from source, without them
        return
    registry.install(COMPILE_HELPERS, lambda original: None)
