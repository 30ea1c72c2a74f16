"""The planner's count of LoRA: what trains, and what it costs."""

from dataclasses import replace

import pytest

from megatron_cream.common.errors import UsageError
from megatron_cream.planning import step_time
from megatron_cream.planning.flags import run_from_flags
from megatron_cream.planning.layouts import find_conflict
from megatron_cream.planning.memory import predict
from megatron_cream.planning.run import Engine, Layout, Lora
from megatron_cream.planning.weights import trained_parameters
from tests.planning.test_memory import BASE, LLAMA2_7B, SMALL
from tests.planning.test_step_time import CLUSTER


def test_lora_on_llama2_7b():
    """The number of trained parameters is the one that peft prints; frozen weights cost two bytes each."""
    lora = Lora(rank=8, embeddings=False, norms=False)
    model = replace(LLAMA2_7B, lora=lora)
    assert trained_parameters(model, BASE, 0) == 19_988_480
    assert trained_parameters(replace(model, lora=replace(lora, targets=("q_proj", "v_proj"))), BASE, 0) == 4_194_304
    found = predict(model, BASE, Engine(transformer_engine=True))
    assert found.parameters == 2 * (6_738_415_616 + 19_988_480)
    assert (found.gradients, found.optimizer) == (4 * 19_988_480, 12 * 19_988_480)


@pytest.mark.parametrize("changes", [{}, dict(tied=True), dict(qk_norm=True)], ids=["plain", "tied", "norms of heads"])
def test_what_trains_adds_up(changes):
    """Embeddings and norms train as --lora-train says, and ranks share the adapters' wide sides."""
    model = replace(SMALL, **changes)
    table = 384 * 128 * (1 if model.tied else 2)
    norms = 13 * 128 + (6 * 2 * 16 if model.qk_norm else 0)
    adapters = trained_parameters(replace(model, lora=Lora(rank=4, embeddings=False, norms=False)), BASE, 0)
    for embeddings, norm in ((False, True), (True, False), (True, True)):
        each = replace(model, lora=Lora(rank=4, embeddings=embeddings, norms=norm))
        assert trained_parameters(each, BASE, 0) == adapters + embeddings * table + norm * norms
    stages = [trained_parameters(each, replace(BASE, pipeline=3), stage) for stage in range(3)]
    assert sum(stages) == adapters + table + norms + (384 * 128 if model.tied else 0)  # a copy on the last stage
    # On two ranks each has the narrow side of A or B whole, and half of the wide one.
    halves = trained_parameters(
        replace(model, lora=Lora(rank=4, embeddings=False, norms=False)), replace(BASE, tensor=2), 0
    )
    heads, groups = 8 * 16, 4 * 16
    whole = 6 * 4 * 7 * 128
    assert 2 * (halves - whole) + whole == adapters and adapters - whole == 6 * 4 * (2 * heads + 2 * groups + 3 * 352)


def test_lora_needs_less_time_and_memory():
    layout = Layout(seq_length=4096, micro_batch=1, global_batch=8, recompute="full")
    engine = Engine(transformer_engine=False)
    full = step_time.predict(LLAMA2_7B, layout, engine, CLUSTER)
    times = {}
    for rank in (8, 64):
        model = replace(LLAMA2_7B, lora=Lora(rank=rank, embeddings=False))
        times[rank] = step_time.predict(model, layout, engine, CLUSTER).time
        assert predict(model, layout, engine).allocated < predict(LLAMA2_7B, layout, engine).allocated / 4
    # The weights' gradients are a third of the products; adapters take little.
    assert 0.6 * full.time.products < times[8].products < times[64].products < full.time.products
    assert times[8].optimizer < 0.02 * full.time.optimizer


def test_flags_of_lora():
    recipe = ["--config", "llama2_7b_32k_lora_24gb"]
    assert run_from_flags(recipe, 1).model.lora == Lora(rank=16)
    flags = "--lora-targets q_proj,v_proj --lora-train none --lora-dropout 0.1".split()
    few = Lora(rank=16, targets=("q_proj", "v_proj"), embeddings=False, norms=False, dropout=True)
    assert run_from_flags([*recipe, *flags], 1).model.lora == few
    with pytest.raises(UsageError, match="--lora-targets query: query: choose from q_proj"):
        run_from_flags([*recipe, "--lora-targets", "query"], 1)


def test_adapters_need_whole_groups_on_each_rank():
    model, layout = replace(SMALL, num_query_groups=2), replace(BASE, tensor=4)
    assert find_conflict(model, layout) is None
    conflict = find_conflict(replace(model, lora=Lora(rank=4)), layout)
    assert conflict == "--tensor-model-parallel-size 4: must divide --num-query-groups 2 with --lora-rank"


@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_the_optimizer_on_the_host(fraction):
    """--optimizer-cpu-offload moves 12 bytes a parameter from the GPU, and costs time and 16 bytes on the host."""
    flags = "--config llama_7b_width --use-precision-aware-optimizer".split()
    offload = ["--optimizer-cpu-offload", "--optimizer-offload-fraction", str(fraction)]
    plain, moved = run_from_flags(flags, 1), run_from_flags([*flags, *offload], 1)
    count = trained_parameters(moved.model, moved.layout, 0)
    needed = predict(moved.model, moved.layout, moved.engine)
    assert (needed.optimizer, needed.host) == ((1 - fraction) * 12 * count, fraction * 16 * count)
    times = [step_time.predict(run.model, run.layout, run.engine, CLUSTER).time for run in (plain, moved)]
    assert times[1].optimizer - times[0].optimizer == pytest.approx(fraction * 0.7e-9 * count, rel=0.5)
    with pytest.raises(UsageError, match="--optimizer-cpu-offload: needs --use-precision-aware-optimizer; add it"):
        run_from_flags(["--config", "llama_7b_width", "--optimizer-cpu-offload"], 1)
