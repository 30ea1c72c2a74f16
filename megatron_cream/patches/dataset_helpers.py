"""Use the compiled dataset helpers of the megatron-core wheel."""

from megatron_cream.patches import registry
from megatron_cream.patches.registry import Patch

COMPILE_HELPERS = Patch(
    "compile-helpers",
    "megatron.core.datasets.utils:compile_helpers",
    "Megatron runs `make` for helpers that its wheel contains already, in a folder that may be read-only.",
    parameters="",
)


def install() -> None:
    """Install the patch. Call before `pretrain`."""
    try:
        from megatron.core.datasets import helpers_cpp  # noqa: F401
    except ImportError:  # a source build without the helpers
        return
    registry.install(COMPILE_HELPERS, lambda original: None)
