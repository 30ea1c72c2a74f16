"""The distributed optimizer is saved in the parts that the ranks have, as parts of whole tensors."""

import math
from argparse import Namespace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_cream.checkpoint import optimizer_shards

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@settings(deadline=None)
@given(SHAPES, st.data())
def test_blocks_are_the_elements_of_a_slice_in_order(shape, data):
    whole = torch.arange(math.prod(shape))
    start, stop = sorted(data.draw(st.integers(0, len(whole))) for _ in range(2))
    blocks = list(optimizer_shards.split_into_blocks(shape, start, stop))
    found = [
        whole.view(shape)[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))].flatten()
        for offsets, sizes in blocks
    ]
    assert torch.equal(torch.cat([whole[:0], *found]), whole[start:stop])
    assert len(blocks) <= 2 * len(shape) - 1


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.sets(st.integers(1, 41), max_size=3), st.booleans())
def test_slices_of_all_ranks_are_the_parameter(layer, tensor_rank, cuts, glu):
    """The second layer's 6 x 7 part of a parameter, with or without gate and up projections, on up to four ranks."""
    values = torch.arange(42.0)

    def build(key, data, replica, flattened_range):
        halves = torch.chunk(data, 2) if glu else [data]
        where = [((0, layer, 4), (1, tensor_rank + 4 * i, 4 * len(halves))) for i in range(len(halves))]
        return [
            ShardedTensor.from_rank_offsets(key, half, *place, replica_id=replica, prepend_axis_num=1)
            for half, place in zip(halves, where, strict=True)
        ]

    expected, found = torch.full((4, 24, 7), -1.0), torch.full((4, 24, 7), -1.0)
    for piece in build("weight", values.view(6, 7), (0, 0, 0), None):
        expected[tuple(_slices(piece))] = piece.data
    sharded = ShardedTensorFactory("weight", values.view(6, 7), build, lambda state: state, (0, 0, 1))
    borders = [0, *sorted(cuts), 42]
    for part in map(slice, borders, borders[1:]):
        for block in optimizer_shards._build_blocks(sharded, part, values[part], (0, 0, 0)):
            assert torch.all(found[tuple(_slices(block))] == -1)
            found[tuple(_slices(block))] = block.data
            assert (block.key, block.global_shape, block.replica_id) == ("weight", (4, 24, 7), (0, 0, 0))
    assert torch.equal(found, expected)


class Optimizer:
    """What one of several ranks has of a distributed optimizer. It has no method that gathers the rest."""

    optimizer_state_keys = ("exp_avg", "exp_avg_sq")
    distributed_optimizer_instance_id, optimizer = 0, None
    config = Namespace(use_precision_aware_optimizer_no_fp8_or_ds_fp8=False)

    def __init__(self, weights: list[torch.Tensor], start: int, stop: int):
        """Take elements `start` to `stop` of the joined weights."""
        self.parts, self.loaded, begin = {}, {}, 0
        for weight in weights:
            first, last = max(start - begin, 0), min(stop - begin, weight.numel())
            if first < last:
                self.parts[weight] = {"param": Namespace(start=first, end=last)}
            begin += weight.numel()
        self.gbuf_ranges = [{torch.float32: [{"param_map": self.parts}]}]

    def _get_main_param_and_optimizer_states(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        part = self.parts[weight]["param"]
        values = weight.detach().flatten()[part.start : part.end]
        return {"param": values, "exp_avg": values + 0.25, "exp_avg_sq": values + 0.5, "step": torch.tensor(3.0)}

    def _set_main_param_and_optimizer_states(self, weight: torch.Tensor, values: dict[str, torch.Tensor]) -> None:
        self.loaded[weight] = values


def test_ranks_load_what_other_ranks_saved():
    """Three ranks save two weights, and two ranks load them."""
    weights = [torch.arange(15.0).view(5, 3), torch.arange(20.0, 30.0)]
    replica = {"replica_id": (0, 0, 0)}
    model = {str(i): ShardedTensor.from_rank_offsets(str(i), weight, **replica) for i, weight in enumerate(weights)}
    saved = {}
    for borders in ((0, 4), (4, 13), (13, 25)):
        state = optimizer_shards._build_slices(None, Optimizer(weights, *borders), dict(model), False, {})
        for block in nested_values(state):
            whole = saved.setdefault(block.key, torch.full(block.global_shape, -1.0))
            whole[tuple(_slices(block))] = block.data
    assert saved.keys() == {
        f"optimizer.state.{kind}.{i}" for kind in ("param", "exp_avg", "exp_avg_sq") for i in (0, 1)
    }
    for borders in ((0, 14), (14, 25)):
        optimizer = Optimizer(weights, *borders)
        state = optimizer_shards._build_slices(None, optimizer, dict(model), True, {})
        dict_list_map_inplace(lambda block: saved[block.key][tuple(_slices(block))], state)
        optimizer_shards._load_slices(None, optimizer, state)
        assert optimizer.loaded.keys() == optimizer.parts.keys()
        for weight, loaded in optimizer.loaded.items():
            expected = optimizer._get_main_param_and_optimizer_states(weight)
            assert all(torch.equal(loaded[kind], expected[kind]) for kind in loaded) and len(loaded) == 3


def _slices(tensor: ShardedTensor) -> list[slice]:
    sizes = (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)
    return [slice(offset, offset + size) for offset, size in zip(tensor.global_offset, sizes, strict=True)]
