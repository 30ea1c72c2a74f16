"""The planner's times against Megatron's schedules, its rank order and closed forms; the output of plan.py."""

import json
from dataclasses import fields, replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cream.common.errors import UsageError
from megatron_cream.model.flops import flops_per_token
from megatron_cream.planning import communication, hardware, layouts, memory, picture, step_time, work
from megatron_cream.planning.communication import Transfer
from megatron_cream.planning.hardware import GPUS, Cluster
from megatron_cream.planning.run import Engine, Layout, Model
from megatron_cream.planning.step_time import Time, predict
from tests.planning.test_command import RECIPE, tool

H200 = GPUS["H200"]
CLUSTER = Cluster(gpu=H200, host=8, inside=H200.nvlink, between=H200.network)
ENGINE = Engine(transformer_engine=True)
LLAMA2_7B = Model(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=11008,
    num_attention_heads=32,
    num_query_groups=32,
    kv_channels=128,
    padded_vocab_size=32000,
)
BASE = Layout(seq_length=4096, micro_batch=1, global_batch=32)


# Computation.

SIZES = st.sampled_from([1, 2, 4])


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, SIZES, SIZES, st.booleans(), st.sampled_from([1, 4, 8]))
def test_flops_are_the_models(tensor, pipeline, context, data, tied, groups):
    """The products and attention of all ranks add up to the FLOPs of `progress`, which the step line prints."""
    model = replace(LLAMA2_7B, num_attention_heads=8, num_query_groups=groups, num_layers=8, tied=tied)
    layout = replace(
        BASE,
        tensor=tensor,
        pipeline=pipeline,
        context=context,
        data=data,
        global_batch=16,
        sequence_parallel=tensor > 1,
    )
    if groups < tensor:
        return
    forward = 0.0
    for stage in range(pipeline):
        shapes = work.layer_products(model, layout).values()
        layer = sum(2 * m * n * k for m, n, k in shapes) + work.attention_flops(model, layout)
        forward += memory.stage_layers(model, layout)[stage] * layer
    m, n, k = work.head_product(model, layout)
    whole = 3 * (forward + 2 * m * n * k) * layout.micro_batches * tensor * context * data
    expected = flops_per_token(
        num_layers=8,
        hidden_size=4096,
        ffn_hidden_size=11008,
        num_query_groups=groups,
        kv_channels=128,
        num_attention_heads=8,
        vocab_size=32000,
        seq_length=4096,
    )
    assert whole == pytest.approx(expected * 16 * 4096)


@pytest.mark.parametrize("pipeline, virtual, micro_batches", [(2, 1, 2), (4, 1, 8), (4, 2, 8), (2, 4, 4), (4, 4, 16)])
def test_bubble_as_in_megatrons_schedules(pipeline, virtual, micro_batches):
    """The bubble equals a simulation in which each rank follows Megatron's schedule as soon as inputs are ready."""
    forward, backward = 1.0, 2.0  # of all layers of a stage
    end = simulated(pipeline, virtual, micro_batches, [(forward, backward)] * pipeline)
    one = forward + backward
    assert end == pytest.approx(micro_batches * one + step_time.bubble([one] * pipeline, virtual))


@pytest.mark.parametrize("slow, over", [(3, 0.0), (1, 0.03), (0, 0.03)])
def test_bubble_of_unequal_stages(slow, over):
    """The bubble is exact if the last stage, which has the head, is the slowest; otherwise slightly too large."""
    times = [(1.0, 2.0)] * 4
    times[slow] = (1.2, 2.4)
    each = [sum(pair) for pair in times]
    end = simulated(4, 1, 16, times)
    assert end - 1e-9 <= 16 * max(each) + step_time.bubble(each, 1) <= end * (1 + over) + 1e-9


def simulated(pipeline: int, virtual: int, micro_batches: int, times: list[tuple[float, float]]) -> float:
    """Return the time when the last rank finishes.

    times: (forward, backward) of a micro-batch on each stage.
    """
    from megatron.core.pipeline_parallel import schedules

    orders = []
    for rank in range(pipeline):
        group = SimpleNamespace(size=lambda: pipeline, rank=lambda rank=rank: rank)
        steps = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None)
        _, _, warmup, _ = schedules.get_pp_rank_microbatches(micro_batches, virtual, pipeline, p2p_communicator=steps)
        table = schedules.get_schedule_table(micro_batches, virtual, pipeline)
        ahead = [(chunk, batch, True) for batch, chunk in table]
        back = [(virtual - 1 - chunk, batch, False) for batch, chunk in table]
        alternating = [each for pair in zip(ahead[warmup:], back) for each in pair]
        orders.append(ahead[:warmup] + alternating + back[len(back) - warmup :])
    done: dict[tuple, float] = {}
    clock, at = [0.0] * pipeline, [0] * pipeline
    while any(at[rank] < len(orders[rank]) for rank in range(pipeline)):
        for rank in range(pipeline):
            while at[rank] < len(orders[rank]):
                chunk, batch, ahead = orders[rank][at[rank]]
                place = chunk * pipeline + rank
                if ahead:
                    before = (place - 1, batch, True) if place else None
                else:
                    last = place == pipeline * virtual - 1
                    before = (place, batch, True) if last else (place + 1, batch, False)
                if before is not None and before not in done:
                    break
                start = max(clock[rank], done.get(before, 0.0))
                clock[rank] = start + times[rank][0 if ahead else 1] / virtual
                done[place, batch, ahead] = clock[rank]
                at[rank] += 1
    return max(clock)


# Communication.


@settings(max_examples=40, deadline=None)
@given(SIZES, SIZES, SIZES, SIZES)
def test_ranks_lie_as_megatron_numbers_them(tensor, context, data, pipeline):
    from megatron.core.parallel_state import RankGenerator

    layout = replace(BASE, tensor=tensor, context=context, data=data, pipeline=pipeline)
    ranks = RankGenerator(tensor, 1, data, pipeline, context, "tp-cp-ep-dp-pp")
    for group, token in {"tp": "tp", "cp": "cp", "dp": "dp-cp", "pp": "pp"}.items():
        size, distance = communication.group_shape(layout, group)
        for members in ranks.get_ranks(token):
            assert members == [members[0] + i * distance for i in range(size)]


def test_a_ring_by_hand():
    """Calculated by hand: when eight ranks gather 8 GB, each link carries seven parts of 1 GB."""
    gather = Transfer("dp", "all_gather", 8e9, "weights")
    speed = hardware.LINKS["inside"] * H200.nvlink
    inside = communication.transfer_seconds(gather, replace(BASE, data=8), CLUSTER)
    assert inside == pytest.approx(7 * 1e9 / speed + 7 * hardware.HOP_INSIDE)
    reduced = communication.transfer_seconds(replace(gather, operation="all_reduce"), replace(BASE, data=8), CLUSTER)
    assert reduced == pytest.approx(2 * inside)


@pytest.mark.parametrize(
    "tensor, adapters",
    [(1, 8), (2, 4), (8, 1)],  # adapters of the group's ranks in one host
)
def test_a_ring_across_hosts_uses_the_adapters_of_its_ranks(tensor, adapters):
    layout = replace(BASE, tensor=tensor, data=64 // tensor)
    found = communication.transfer_seconds(Transfer("dp", "all_gather", 64e9, "weights"), layout, CLUSTER)
    speed = min(hardware.LINKS["inside"] * H200.nvlink, adapters * hardware.LINKS["between"] * H200.network)
    others = layout.data - 1
    assert found == pytest.approx(others * (64e9 / layout.data / speed + hardware.HOP_BETWEEN))


def test_one_gpu_has_no_communication():
    time = predict(LLAMA2_7B, BASE, ENGINE, CLUSTER).time
    assert time.tensor == time.context == time.pipeline == time.bubble == time.data == 0


# The whole step.

LAYOUTS = st.builds(
    lambda tensor, pipeline, context, data, virtual: replace(
        BASE,
        tensor=tensor,
        pipeline=pipeline,
        context=context,
        data=data,
        sequence_parallel=tensor > 1,
        virtual_pipeline=virtual if pipeline > 1 else 1,
        global_batch=64,
    ),
    SIZES,
    SIZES,
    SIZES,
    SIZES,
    st.sampled_from([1, 2]),
)


@settings(max_examples=80, deadline=None)
@given(LAYOUTS, st.booleans())
def test_less_work_is_never_slower(layout, gathers):
    engine = replace(ENGINE, attention="flash" if gathers else "te")

    def step(layout=layout, cluster=CLUSTER, **changes) -> float:
        return predict(LLAMA2_7B, replace(layout, **changes), engine, cluster).time.step

    def rising(*steps: float) -> bool:
        return all(a <= b * (1 + 1e-9) for a, b in pairwise(steps))  # ignore rounding of sums

    plain = step()
    assert rising(plain, step(recompute="selective", recompute_modules=("mlp",)), step(recompute="full"))
    assert rising(step(recompute="full", recompute_method="block", recompute_layers=2), step(recompute="full"))
    assert rising(step(overlap_grad_reduce=True, overlap_param_gather=True), plain)
    assert rising(plain, step(cluster=replace(CLUSTER, inside=H200.pcie)))
    assert rising(plain, step(cluster=replace(CLUSTER, host=2)))
    others = [step(cluster=replace(CLUSTER, gpu=GPUS[name])) for name in ("H100", "A100")]
    assert rising(plain, *others)
    parts = predict(LLAMA2_7B, layout, engine, CLUSTER).time
    assert all(getattr(parts, field.name) >= 0 for field in fields(Time))
    # The time of one GPU, divided evenly among all, is the lower bound.
    alone = predict(LLAMA2_7B, replace(BASE, global_batch=64), engine, CLUSTER).time
    assert parts.products * layout.gpus > 0.95 * alone.products
    if layout.pipeline == 1:
        share = hardware.RING if layout.context > 1 and not gathers else 1.0
        assert parts.attention * layout.gpus * share == pytest.approx(alone.attention)


def test_fp8_needs_a_gpu_that_has_it():
    fp8 = replace(ENGINE, fp8="delayed")
    assert predict(LLAMA2_7B, BASE, fp8, CLUSTER).time.step < predict(LLAMA2_7B, BASE, ENGINE, CLUSTER).time.step
    with pytest.raises(UsageError, match="A100.*has no FP8"):
        predict(LLAMA2_7B, BASE, fp8, replace(CLUSTER, gpu=GPUS["A100"]))


def test_the_fastest_layout_is_first():
    found = layouts.find_fitting(LLAMA2_7B, BASE, ENGINE, 16, layouts.usable(80 * hardware.GIB), CLUSTER)
    times = [plan.speed.time.step for plan in found]
    assert len(times) > 5 and times == sorted(times)
    for plan in found:
        assert plan.speed == predict(LLAMA2_7B, plan.layout, ENGINE, CLUSTER)


# The command line.


def as_json(monkeypatch, capsys, *arguments: str) -> dict:
    assert tool(monkeypatch, *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_a_runs_cost(monkeypatch, capsys):
    flags = ("--config", RECIPE, "--gpus", "16", "--gpu", "H200")
    found = as_json(monkeypatch, capsys, *flags)
    assert found["steps"] == 1000 and found["own"]["layout"]["data"] == 8
    hours = 1000 * found["own"]["time"]["step"] / 3600
    parts = [value for name, value in found["own"]["time"].items() if name != "step"]
    assert sum(parts) == pytest.approx(found["own"]["time"]["step"])
    assert tool(monkeypatch, *flags, "--price", "2.5") == 0
    text = capsys.readouterr().out
    assert f"{hours * 16:,.1f} GPU-hours, {hours * 16 * 2.5:,.2f} at 2.5 a GPU-hour" in text
    for word in ("assumed:", "H200", "450 GB/s", "50 GB/s of network", "tokens/s/GPU"):
        assert word in text


def test_full_length_stands_beside_cream(monkeypatch, capsys):
    """The comparison equals a plan of full-length training."""
    cream = as_json(monkeypatch, capsys, "--config", RECIPE, "--gpus", "8", "--gpu", "H200")
    long = ("--position-sampler", "full", "--seq-length", "32768")
    full = as_json(monkeypatch, capsys, "--config", RECIPE, "--gpus", "8", "--gpu", "H200", *long)
    assert cream["full"] == full["layouts"] and full["full"] == []
    ratio = full["layouts"][0]["time"]["step"] / cream["layouts"][0]["time"]["step"]
    assert ratio > 8  # equal samples, eight times as long
    assert tool(monkeypatch, "--config", RECIPE, "--gpus", "8", "--gpu", "H200") == 0
    assert f"{ratio:,.1f} times as long as layout 1" in capsys.readouterr().out


def test_a_picture_of_the_layouts(monkeypatch, tmp_path):
    assert tool(monkeypatch, "--config", RECIPE, "--gpus", "16", "--picture", str(tmp_path / "layouts.png")) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["layouts.png"]
    assert (tmp_path / "layouts.png").read_bytes().startswith(b"\x89PNG")
    parts = [part for _, names, _ in picture.PIECES for part in names]
    assert sorted(parts) == sorted(field.name for field in fields(Time))  # every part is drawn exactly once


def test_full_length_that_does_not_fit_is_reported(monkeypatch, capsys):
    flags = ("--config", RECIPE, "--target-length", "1048576", "--gpus", "2", "--gpu", "H100")
    assert tool(monkeypatch, *flags) == 0
    assert "at full length (1,048,576 tokens) no layout fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, changed",
    [
        (["--host-link", "pcie"], {"inside": 64e9}),
        (["--host-link", "100"], {"inside": 100e9}),
        (["--network", "200"], {"between": 25e9}),
        (["--gpus-per-host", "4"], {"host": 4}),
        (["--gpu", "A100"], {"inside": 300e9, "between": 25e9}),
    ],
    ids=" ".join,
)
def test_link_speeds_can_be_given(monkeypatch, capsys, flags, changed):
    usual = as_json(monkeypatch, capsys, "--config", RECIPE, "--gpus", "16")
    found = as_json(monkeypatch, capsys, "--config", RECIPE, "--gpus", "16", *flags)
    for name, value in changed.items():
        assert found["cluster"][name] == value != usual["cluster"][name]
    assert found["own"]["time"]["step"] >= usual["own"]["time"]["step"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--gpu", "T4"], "--gpu: invalid choice: 'T4'"),
        (["--host-link", "fast"], "--host-link: 'fast': must be a number above 0"),
        (["--network", "0"], "--network: '0': must be a number above 0"),
        (["--price", "-1"], "--price"),
        (["--picture", "nowhere/at/all.png"], "the folder nowhere/at does not exist"),
        (["--picture", "layouts.txt"], "must end in .png, .svg or .pdf"),
        (["--gpu", "A100", "--fp8-format", "hybrid"], "--fp8-format: an A100 (SXM, 80 GB) has no FP8"),
    ],
    ids=" ".join,
)
def test_bad_input_prints_one_line(monkeypatch, capsys, flags, message):
    assert tool(monkeypatch, "--config", RECIPE, "--gpus", "2", *flags) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
