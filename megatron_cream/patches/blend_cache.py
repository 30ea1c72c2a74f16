"""Let several jobs share the cached index of a blend of data sets."""

from megatron_cream.data.blend_cache import build_index
from megatron_cream.patches import registry
from megatron_cream.patches.registry import Patch

BLEND_CACHE = Patch(
    "blend-cache",
    "megatron.core.datasets.blended_dataset:BlendedDataset._build_indices",
    "Megatron writes an index under its final name: another job that starts meanwhile reads a truncated file.",
    parameters="self",
)


def install() -> None:
    """Install the patch. Call before data sets are built."""
    registry.install(BLEND_CACHE, build_index)
