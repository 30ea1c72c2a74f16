"""Checkpoints of runs with CUDA graphs have the states of random generators as tensors."""

import io
from types import SimpleNamespace

import torch
from megatron.core import tensor_parallel
from megatron.training import checkpointing

from megatron_cream.common.safe_pickle import check_pickled_names
from megatron_cream.patches import rng_states


class Tracker:
    """The tracker of a run with graphs: its states are generators."""

    def __init__(self, states: dict):
        self.states = states

    def get_states(self) -> dict:
        return dict(self.states)


def test_generators_are_saved_as_their_states(monkeypatch):
    monkeypatch.setattr(checkpointing, "get_args", lambda: SimpleNamespace(data_parallel_random_init=False))
    monkeypatch.setattr(checkpointing, "get_rng_state", checkpointing.get_rng_state)  # restored afterwards
    rng_states.install()
    generator = torch.Generator()
    generator.manual_seed(5)
    tensor = torch.get_rng_state()
    monkeypatch.setattr(
        tensor_parallel, "get_cuda_rng_tracker", lambda: Tracker({"graphs": generator, "plain": tensor})
    )
    alone = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
    found = checkpointing.get_rng_state("torch_dist", *4 * [alone])
    saved = found.data[0]["rng_tracker_states"]
    assert torch.equal(saved["graphs"], generator.get_state()) and torch.equal(saved["plain"], tensor)
    file = io.BytesIO()
    torch.save(saved, file)
    check_pickled_names(io.BytesIO(file.getvalue()))
    other = torch.Generator()
    other.set_state(torch.load(io.BytesIO(file.getvalue()), weights_only=True)["graphs"])
    assert torch.equal(torch.rand(3, generator=other), torch.rand(3, generator=generator))
