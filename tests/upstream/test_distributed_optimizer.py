"""Faults of Megatron's distributed optimizer when it saves and loads."""

import tempfile
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values

from tests.upstream import upstream_fault
from tests.upstream.small import DP_RESHARDABLE, FULLY_RESHARDABLE, WEIGHTS, build, counts, start_one_rank
from tests.upstream.unpatched import unpatched


@upstream_fault(
    "unpadded-buckets",
    "what the ranks have is joined without the padding of the buckets, and cut at places that count it",
)
def test_each_weight_is_saved_with_its_own_moments():
    saved = unpatched(_saved_moments)
    assert saved == {f"weight{i}": [(i + 1) / 10] * 2 for i in range(WEIGHTS)}


def _saved_moments() -> dict[str, list[float]]:
    """Return the minimum and maximum of the saved first moment of each weight."""
    start_one_rank()
    model, optimizer = build(steps=1, bucket_size=150)  # two weights, 200 elements, padded to 256
    state = optimizer.sharded_state_dict(model.sharded_state_dict(), metadata=FULLY_RESHARDABLE)
    moments = [tensors["exp_avg"] for tensors in state["param_state"].values()]
    return {
        tensor.key.rpartition(".")[2]: [round(edge.item(), 6) for edge in tensor.data.aminmax()] for tensor in moments
    }


@upstream_fault("unpadded-buckets", "the first script of docs/upstream.md, which reports it")
def test_the_script_of_the_report_passes():
    unpatched(_run_first_script)


def _run_first_script() -> None:
    script = Path("docs/upstream.md").read_text().partition("```python\n")[2].partition("```")[0]
    exec(compile(script, "docs/upstream.md", "exec"), {"__name__": "__main__"})


@upstream_fault(
    "state-before-loading",
    "the steps of torch's Adam are asked for before it has made one",
)
def test_a_new_optimizer_says_what_it_loads():
    unpatched(_plan_to_load)


def _plan_to_load() -> None:
    start_one_rank()
    model, optimizer = build(steps=0)
    optimizer.sharded_state_dict(model.sharded_state_dict(), is_loading=True, metadata=FULLY_RESHARDABLE)


@upstream_fault(
    "step-is-no-tensor",
    "the `step` of torch's Adam is looked up among the tensors that were saved",
    raises=KeyError,
)
def test_torch_adam_loads_what_it_saved():
    assert unpatched(_resumed_counts, FULLY_RESHARDABLE, False) == [3.0] * WEIGHTS


@upstream_fault(
    "step-is-no-tensor",
    "as it lies on the ranks, the new state's own count of steps takes the saved one's place",
)
def test_torch_adam_loads_its_count_of_steps():
    assert unpatched(_resumed_counts, DP_RESHARDABLE, True) == [3.0] * WEIGHTS


def _resumed_counts(metadata: dict, bf16: bool, distributed: bool = True) -> list[float]:
    """Return the step counts of an optimizer that loads the state of a distributed one after three steps.

    Args:
        distributed: whether the loading optimizer is distributed too.
    """
    start_one_rank()
    model, optimizer = build(steps=3, bf16=bf16)
    with tempfile.TemporaryDirectory() as folder:
        state = optimizer.sharded_state_dict(model.sharded_state_dict(), metadata=metadata)
        dist_checkpointing.save({"optimizer": state}, folder)
        model, optimizer = build(steps=1, bf16=bf16, distributed=distributed)
        wanted = optimizer.sharded_state_dict(model.sharded_state_dict(), is_loading=True, metadata=metadata)
        optimizer.load_state_dict(dist_checkpointing.load({"optimizer": wanted}, folder)["optimizer"])
    return counts(optimizer)


@upstream_fault(
    "own-steps",
    "all parameters share one tensor as their count, and each adds one to it",
)
def test_a_step_after_loading_counts_once():
    assert unpatched(_counts_after_loading) == [2.0] * WEIGHTS


def _counts_after_loading() -> list[float]:
    start_one_rank()
    _, optimizer = build(steps=1)
    optimizer.load_state_dict(optimizer.state_dict())
    for group in optimizer.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.optimizer.step()
    return counts(optimizer)


@upstream_fault(
    "load-without-autograd",
    "float32 weights are views of the model's own parameters, and this format alone is loaded under autograd",
    raises=RuntimeError,
)
def test_float32_weights_load_as_they_lie_on_the_ranks():
    unpatched(_resumed_counts, DP_RESHARDABLE, False)


@upstream_fault(
    "load-checkpoint",
    "parameter groups are matched by their learning rates too, before the schedule of this run replaces them",
    raises=KeyError,
)
def test_an_optimizer_loads_at_another_learning_rate():
    unpatched(_load_at_another_learning_rate)


def _load_at_another_learning_rate() -> None:
    start_one_rank()
    _, saved = build(steps=1, lr=0.1)
    _, resumed = build(steps=1, lr=0.2)
    resumed.load_state_dict(saved.state_dict())


@upstream_fault(
    "half-optimizer-shards half-optimizer-state",
    "the two kinds of optimizers save the float32 weights by different names",
)
def test_the_plain_optimizer_finds_the_weights_of_the_distributed():
    assert unpatched(_missing_names) == set()


def _missing_names() -> set[str]:
    """Return the names that the plain optimizer expects in a checkpoint and the distributed one does not save."""
    start_one_rank()
    model, distributed = build(steps=1, bf16=True)
    saved = _names(distributed.sharded_state_dict(model.sharded_state_dict(), metadata=FULLY_RESHARDABLE))
    model, plain = build(steps=0, bf16=True, distributed=False)
    return _names(plain.sharded_state_dict(model.sharded_state_dict(), True, FULLY_RESHARDABLE)) - saved


def _names(state: dict) -> set[str]:
    return {tensor.key for tensor in nested_values(state) if hasattr(tensor, "key")}


@upstream_fault(
    "float32-optimizer-state",
    "the distributed optimizer saves parameter groups and the count of steps elsewhere",
    raises=ValueError,
)
def test_the_plain_float32_optimizer_loads_what_the_distributed_saved():
    assert unpatched(_resumed_counts, FULLY_RESHARDABLE, False, False) == [3.0] * WEIGHTS
