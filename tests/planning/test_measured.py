"""The planner against runs measured on GPUs, and its constants against the runs they were fitted to."""

from dataclasses import fields, replace

import pytest
from scipy.optimize import brentq

from megatron_cream.planning import communication, hardware, measured, step_time
from megatron_cream.planning.run import Layout
from megatron_cream.planning.step_time import Time, predict
from tests.planning.test_command import tool
from tests.planning.test_step_time import CLUSTER

MEASURED = measured.load_runs()


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: row["what"])
def test_measured_runs(row):
    """Throughput is within 9 %, peak memory within 5.1 %; rows with `off` explain a larger time error."""
    found = measured.check_run(row)
    assert abs(found.memory_error) < 0.051
    assert (abs(found.time_error) < 0.09) is ("off" not in row)


@pytest.mark.parametrize(
    "row", [row for row in MEASURED if row["what"].startswith(("1.1B", "135M"))], ids=lambda row: row["what"]
)
def test_small_models(row):
    """Throughput is within 5 % and peak memory within 0.5 %, with CUDA graphs and without."""
    found = measured.check_run(row)
    assert abs(found.time_error) < 0.05
    assert abs(found.memory_error) < 0.005


def named(fits: str, key: str = "fits") -> dict:
    (row,) = (row for row in MEASURED if row.get(key) == fits)
    return row


def untraced(row: dict, *kinds: str) -> float:
    """Return the profile's seconds of these kinds in a step, scaled from the traced to the timed step."""
    profile = row["profile"]
    return sum(profile[kind] for kind in kinds) / 1e3 * seconds(row) / (sum(profile.values()) / 1e3)


def seconds(row: dict) -> float:
    """Return the seconds of a step of eight samples of 4096 tokens."""
    return 8 * 4096 / row["tokens_per_second"]


def overlaps_among_more(layout: Layout) -> bool:
    """Return whether gradients, or user buffers without rings, are all that overlaps, among more than two GPUs."""
    alone = layout.tensor * layout.pipeline * layout.context == 1
    return (layout.tensor > 2 and layout.overlap_tensor and not layout.rings) or (layout.data > 2 and alone)


def test_constants_are_the_profiles(monkeypatch):
    """Fitting each constant of `hardware` again to its documented run gives the same value."""
    bf16, fp8 = named("all of bf16"), named("products in FP8")

    def fitted(set_, value, wanted: float, most: float = 1.0) -> float:
        def miss(x: float) -> float:
            set_(x)
            return value() - wanted

        result = brentq(miss, 1e-4, most)
        set_(result)
        return result

    def share(table: dict, key: str):
        return lambda x: monkeypatch.setitem(table, key, x)

    def part(row: dict, *names: str):
        run = measured.build_run(row)
        assert run.layout.global_batch * run.layout.seq_length == 8 * 4096

        def value() -> float:
            time = predict(run.model, run.layout, run.engine, CLUSTER).time
            return sum(getattr(time, name) for name in names)

        return value

    moved = set(bf16["profile"]) - {"GEMM", "attention", "idle"}
    passes = fitted(
        lambda x: monkeypatch.setattr(step_time, "PASSES", x), part(bf16, "passes", "optimizer"), untraced(bf16, *moved)
    )
    assert passes == pytest.approx(hardware.PASSES, rel=0.01)
    expected = dict(hardware.ATTENTION), dict(hardware.PRODUCTS)
    attention = fitted(share(step_time.ATTENTION, "flash"), part(bf16, "attention"), untraced(bf16, "attention"))
    assert attention == pytest.approx(expected[0]["flash"], rel=0.01)
    assert expected[0]["te"] == pytest.approx(attention * 1.84 / 2.06, rel=0.01)
    assert expected[0]["sdpa"] == pytest.approx(attention * 1.84 / 3.41, rel=0.01)
    products = fitted(share(step_time.PRODUCTS, "bf16"), part(bf16, "products"), untraced(bf16, "GEMM"))
    assert products == pytest.approx(expected[1]["bf16"], rel=0.01)
    assert untraced(bf16, "idle") == pytest.approx(hardware.IDLE, rel=0.01)
    every = [field.name for field in fields(Time)]
    assert fitted(share(step_time.PRODUCTS, "fp8"), part(fp8, *every), seconds(fp8)) == pytest.approx(
        expected[1]["fp8"], rel=0.01
    )
    slow = named("FP8 parameters")
    cast = fitted(lambda x: monkeypatch.setattr(step_time, "FP8_PARAMETERS", x), part(slow, *every), seconds(slow))
    assert cast == pytest.approx(hardware.FP8_PARAMETERS, rel=0.01)

    def a_step(row: dict):
        """Return the predicted step time (as a function) and the measured one, in seconds."""
        run = measured.build_run(row)
        tokens = run.layout.global_batch * run.layout.seq_length
        return (
            lambda: predict(run.model, run.layout, run.engine, measured.build_cluster(row)).time.step,
            tokens / row["tokens_per_second"] / row.get("gpus", 1),
        )

    h100 = hardware.GPUS["H100"]
    faster = fitted(
        lambda x: monkeypatch.setitem(measured.GPUS, "H100", replace(h100, products=x)),
        *a_step(named("products of an H100")),
        most=2.0,
    )
    assert faster == pytest.approx(h100.products, rel=0.01)
    blockwise = fitted(share(step_time.PRODUCTS, "fp8 blockwise"), *a_step(named("products in blockwise FP8")))
    assert blockwise == pytest.approx(expected[1]["fp8 blockwise"], rel=0.01)
    table = dict(hardware.HOST)
    for launch, fits in {"tensor parallel": "the host", "FP8": "the host, FP8", "alone": "the host, alone"}.items():
        host = fitted(share(step_time.HOST, launch), *a_step(named(fits)))
        assert host == pytest.approx(table[launch], rel=0.01)
    table = dict(hardware.HOST_ADAPTER)
    adapter = fitted(share(step_time.HOST_ADAPTER, "tensor parallel"), *a_step(named("the host, adapters")))
    assert adapter == pytest.approx(table["tensor parallel"], rel=0.01)
    links = dict(hardware.LINKS)
    among_four = fitted(share(communication.LINKS, "inside"), *a_step(named("transfers among four")))
    assert among_four == pytest.approx(links["inside"], rel=0.01)
    even = [row for row in MEASURED if "slow" not in row]  # no GPU of the host keeps the others waiting
    in_rings = [row for row in even if measured.build_run(row).layout.rings]
    mean_error = lambda: sum(measured.check_run(row).time_error for row in in_rings) / len(in_rings)
    cost = fitted(lambda x: monkeypatch.setattr(step_time, "RINGS_OVERLAP_COST", x), mean_error, 0.0)
    assert len(in_rings) >= 10
    assert cost == pytest.approx(hardware.RINGS_OVERLAP_COST, rel=0.01)
    overlap = dict(hardware.OVERLAP_COST)
    pair = fitted(share(step_time.OVERLAP_COST, "pair"), *a_step(named("transfers beside products")))
    assert pair == pytest.approx(overlap["pair"], rel=0.01)
    among_more = [row for row in even if overlaps_among_more(measured.build_run(row).layout)]
    mean_error = lambda: sum(measured.check_run(row).time_error for row in among_more) / len(among_more)
    more = fitted(share(step_time.OVERLAP_COST, "more"), mean_error, 0.0)
    assert len(among_more) >= 10
    assert more == pytest.approx(overlap["more"], rel=0.01)
    totals = {
        "HALF_RATE": "attention at 32K",
        "RING": "attention in a ring",
    }
    for name, fits in totals.items():
        found = fitted(lambda x: monkeypatch.setattr(step_time, name, x), *a_step(named(fits)), most=1e4)
        assert found == pytest.approx(getattr(hardware, name), rel=0.01)


def test_check_shows_every_run(monkeypatch, capsys):
    assert tool(monkeypatch, "--check") == 0
    text = capsys.readouterr().out
    for row in MEASURED:
        assert f"{row['tokens_per_second']:,}" in text and f"{row['peak_gib']:.1f}" in text
