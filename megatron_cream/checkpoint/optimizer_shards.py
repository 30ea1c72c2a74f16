"""Save and load the distributed optimizer at any layout without gathering it.

Megatron gathers the whole optimizer on each rank to cut it into tensors of the parameters' shapes. Here each rank saves
the slice that it has: a slice of a flattened tensor is at most a part of a row, whole rows and a part of a row, and
each of these is a block of the saved tensor. Names and shapes of the saved tensors are Megatron's, so that checkpoints
of either kind open with either code, at any layout. A rank also loads only its slices.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import KEEP_VARS_HINT
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from megatron_cream.patches import hooks, registry


def install() -> None:
    """Install the replacements; call before `pretrain`."""
    registry.install(hooks.OPTIMIZER_SLICES, _build_slices)
    registry.install(hooks.LOAD_OPTIMIZER_SLICES, _load_slices)


def split_into_blocks(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple, tuple]]:
    """Split elements `start` to `stop` of a flattened tensor into blocks, in order.

    Yields:
        offsets and sizes of a block of the tensor. The elements of a block are consecutive.
    """
    if start == stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows, if first < last
    if first > last:  # within one row
        for offsets, sizes in split_into_blocks(shape[1:], start - last * row, stop - last * row):
            yield (last, *offsets), (1, *sizes)
        return
    for offsets, sizes in split_into_blocks(shape[1:], start - (first - 1) * row, row) if start % row else ():
        yield (first - 1, *offsets), (1, *sizes)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    for offsets, sizes in split_into_blocks(shape[1:], 0, stop - last * row):
        yield (last, *offsets), (1, *sizes)


def _build_slices(original, self, model_sharded_state_dict, is_loading=False, metadata=None) -> dict:
    """Return {index of a slice: {kind of state: blocks}}, without data for loading."""
    weights, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
    of_parameter = {weight.data: weight for weight in nested_values(weights)}
    state = {}
    for index, (parameter, part) in enumerate(_iterate_slices(self)):
        if parameter not in of_parameter:
            raise ValueError(f"Model param {parameter} not in model_sharded_state_dict. Hint: {KEEP_VARS_HINT}")
        tensors = dict.fromkeys(("param", *self.optimizer_state_keys))
        if not is_loading:
            values = self._get_main_param_and_optimizer_states(parameter)
            tensors = {kind: _to_saved(self, values[kind]) for kind in tensors}
        whole = of_parameter[parameter]
        # The ranks that have the same parameter have different slices of it: none is a copy of another's.
        replica = (*whole.replica_id[:2], self.distributed_optimizer_instance_id)
        state[index] = {}
        for kind, data in tensors.items():
            named = replace(whole, key=f"optimizer.state.{kind}.{whole.key}")
            state[index][kind] = list(_build_blocks(named, part, data, replica))
    return state


@torch.no_grad()
def _load_slices(original, self, state_dict: dict) -> None:
    for index, (parameter, _) in enumerate(_iterate_slices(self)):
        joined = {kind: torch.cat([block.flatten() for block in blocks]) for kind, blocks in state_dict[index].items()}
        self._set_main_param_and_optimizer_states(parameter, joined)
    if isinstance(self.optimizer, HybridDeviceOptimizer):
        self.optimizer._sync_hdo_state_to_sub_optimizers()


def _iterate_slices(optimizer) -> Iterator[tuple[torch.nn.Parameter, slice]]:
    """Yield each parameter of which this rank has a slice, and the slice of its flattened tensor."""
    for of_type in optimizer.gbuf_ranges:
        for buckets in of_type.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, slice(ranges["param"].start, ranges["param"].end)


def _to_saved(optimizer, values: torch.Tensor) -> torch.Tensor:
    """Return flat float32 values, without a copy if possible."""
    if optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
        values = values.cpu()  # a copy that the optimizer made for this call, and memory of the GPU
    return values.detach().float().flatten()


def _build_blocks(
    sharded: ShardedTensor | ShardedTensorFactory, part: slice, data: torch.Tensor | None, replica: tuple[int, ...]
) -> Iterator[ShardedTensor]:
    """Yield the blocks of slice `part` of a parameter's local tensor."""
    for piece, begin in _find_pieces(sharded):
        shape, lead = tuple(piece.local_shape), piece.prepend_axis_num
        start, stop = max(part.start, begin), min(part.stop, begin + math.prod(shape))
        if start >= stop:
            continue
        for offsets, sizes in split_into_blocks(shape, start - begin, stop - begin):
            sizes = (1,) * lead + sizes
            values = None
            if data is not None:
                values = data[start - part.start :][: math.prod(sizes)].view(sizes)
                values = values if values.is_cuda else values.clone()  # a writer may share the memory
            start += math.prod(sizes)
            yield ShardedTensor(
                key=piece.key,
                data=values,
                dtype=torch.float32,
                local_shape=sizes,
                global_shape=piece.global_shape,
                global_offset=(
                    *piece.global_offset[:lead],
                    *(a + b for a, b in zip(piece.global_offset[lead:], offsets, strict=True)),
                ),
                axis_fragmentations=None,
                replica_id=replica,
                allow_shape_mismatch=piece.allow_shape_mismatch,
            )


def _find_pieces(sharded: ShardedTensor | ShardedTensorFactory) -> list[tuple[ShardedTensor, int]]:
    """Return the saved tensors that a parameter is split into, each with its first element in the parameter.

    The gate and up projections of an MLP are one parameter and two saved tensors.
    """
    if isinstance(sharded, ShardedTensor):
        return [(sharded, 0)]
    empty = torch.empty(sharded.data.shape, device="meta")
    pieces = list(nested_values(replace(sharded, data=empty).build()))
    for piece in pieces:
        if not piece.data.is_contiguous():
            raise ValueError(f"{piece.key}: its elements are not consecutive in the model's parameter")
    return [(piece, piece.data.storage_offset()) for piece in pieces]
