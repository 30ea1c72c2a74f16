"""Read distributed checkpoints without running code from their pickles.

Checkpoints are also checked when a run starts. These patches cover every later read.
"""

from megatron_cream.common.safe_pickle import check_pickled_names, declare_names_of_other_versions, load_metadata
from megatron_cream.patches import registry
from megatron_cream.patches.registry import Patch

_TORCH = "torch 2.11 to 2.14"

READ_METADATA = Patch(
    "read-metadata",
    "torch.distributed.checkpoint:FileSystemReader.read_metadata",
    "torch unpickles the metadata of a checkpoint, and runs the code that the pickle names.",
    parameters="self, *args, **kwargs",
    written_for=_TORCH,
)
LOAD_BYTES = Patch(
    "load-bytes",
    "torch.distributed.checkpoint:DefaultLoadPlanner.load_bytes",
    "torch unpickles each bytes entry, and runs the code that the pickle names.",
    parameters="self, read_item, value",
    written_for=_TORCH,
)


def install() -> None:
    """Install the patches. Call before a checkpoint is read."""
    declare_names_of_other_versions()
    _declare_rerun_state()
    registry.install(READ_METADATA, _read_metadata)
    registry.install(LOAD_BYTES, _load_bytes)


def _declare_rerun_state() -> None:
    """Let torch load what the rerun state machine saves before it ends a run; Megatron does not declare its tuples."""
    import torch
    from megatron.core import rerun_state_machine as machine

    torch.serialization.add_safe_globals([machine.Call, machine.Caller])


def _read_metadata(original, self, *args, **kwargs):
    from torch.distributed.checkpoint.metadata import StorageMeta

    with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as file:
        metadata = load_metadata(file.read())
    metadata.storage_meta = getattr(metadata, "storage_meta", None) or StorageMeta()
    metadata.storage_meta.load_id = self.load_id
    return metadata


def _load_bytes(original, self, read_item, value) -> None:
    import torch
    from torch.distributed.checkpoint._nested_dict import set_element

    check_pickled_names(value)
    value.seek(0)
    plain, key = torch.load(value, weights_only=True), read_item.dest_index.fqn
    if self.flatten_state_dict:
        set_element(self.original_state_dict, self.mappings[key], plain)
    else:
        self.state_dict[key] = plain
