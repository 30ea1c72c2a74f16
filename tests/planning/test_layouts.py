"""The planner's choice of layouts: it finds all that fit and lists the best first."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cream.planning import layouts
from megatron_cream.planning import memory as planned
from megatron_cream.planning.hardware import GIB, GPUS, Cluster
from megatron_cream.planning.memory import in_flight, predict
from megatron_cream.planning.run import Engine, Layout, Model

MODELS = st.builds(
    lambda layers, heads, per_group, dim, ffn, tied: Model(
        num_layers=layers, hidden_size=heads * dim, ffn_hidden_size=ffn * 64, num_attention_heads=heads,
        num_query_groups=heads // per_group, kv_channels=dim, padded_vocab_size=1024, tied=tied,
    ),
    st.sampled_from([2, 6, 8]), st.sampled_from([4, 8, 16]), st.sampled_from([1, 2, 4]), st.sampled_from([16, 32]),
    st.integers(1, 9), st.booleans(),
)  # fmt: skip
ENGINES = st.builds(
    Engine, transformer_engine=st.booleans(), own_kernels=st.booleans(), fused_weight_gradients=st.booleans(),
    fp8=st.sampled_from([None, "delayed", "blockwise"]),
)  # fmt: skip


H100 = Cluster(gpu=GPUS["H100"], host=8, inside=GPUS["H100"].nvlink, between=GPUS["H100"].network)


@settings(max_examples=40, deadline=None)
@given(MODELS, ENGINES, st.sampled_from([1, 2, 4, 6, 8, 16]), st.sampled_from([8, 32, 48]), st.floats(0.0, 1.0))
def test_layouts_that_fit(model, engine, gpus, global_batch, share):
    base = Layout(seq_length=256, micro_batch=1, global_batch=global_batch)
    everything = layouts.find_fitting(model, base, engine, gpus, float("inf"), H100)
    limit = GIB * 1.4 + share * max((plan.memory.device for plan in everything), default=0) / 8
    found = layouts.find_fitting(model, base, engine, gpus, limit, H100)
    order = [layouts.rank_plan(plan) for plan in found]
    assert order == sorted(order)
    for plan in found:
        layout = plan.layout
        assert layout.gpus == gpus and layouts.find_conflict(model, layout) is None
        assert plan.memory == predict(model, layout, engine) and plan.memory.device <= limit
        assert layout.micro_batches * layout.micro_batch * layout.data == global_batch
    least = layouts.find_smallest(model, base, engine, gpus, H100.host)
    assert bool(found) == (least is not None and least[1].device <= limit)


@settings(max_examples=60, deadline=None)
@given(MODELS, ENGINES, st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]), st.sampled_from([1, 2, 4]))
def test_more_to_keep_is_never_less_memory(model, engine, tensor, pipeline, data):
    layout = Layout(
        seq_length=512, micro_batch=2, global_batch=64, tensor=tensor, pipeline=pipeline, data=data,
        sequence_parallel=tensor > 1,
    )  # fmt: skip

    def kept(layout: Layout) -> int:
        # Compare one stage, because the stage with the highest peak differs between layouts.
        layers = planned.stage_layers(model, layout)[0]
        return in_flight(layout, 0) * planned.saved_by_layers(model, layout, engine, layers)

    def optimizer(layout: Layout) -> int:
        return predict(model, layout, engine).optimizer

    mlp = replace(layout, recompute="selective", recompute_modules=("mlp",))
    blocks = [replace(layout, recompute="full", recompute_method="block", recompute_layers=n) for n in (1, 2)]
    full = replace(layout, recompute="full")
    assert kept(layout) > kept(mlp) > kept(full)
    assert kept(layout) > kept(blocks[0]) >= kept(blocks[1]) >= kept(full)
    assert kept(replace(layout, micro_batch=4)) == 2 * kept(layout)
    replicated = optimizer(replace(layout, distributed_optimizer=False))
    assert optimizer(layout) <= replicated <= data * optimizer(layout)
