"""benchmarks/several_gpus: its plans, its scheduler and its report, without GPUs."""

import json
from dataclasses import replace

import pytest

from benchmarks.several_gpus import layouts, plan, report, speed
from benchmarks.several_gpus.machine import Machine
from benchmarks.several_gpus.runs import Job, Runs


def timed(name: str, rate: float, **more) -> dict:
    run = dict(run=name, gpus=1, gpu="H100", tokens_per_second=rate, mfu=50.0, peak_gib=60.0, loss=9.0, flags=[])
    return run | dict(planned_tokens_per_second=round(rate), planned_gib=60.0) | more


def test_every_run_has_a_plan():
    plans = json.loads(plan.FILE.read_text())
    wanted = {plan.key(gpu, gpus, flags) for gpu in ("H100", "H200") for gpus, flags in layouts.list_runs()}
    assert plans.keys() == wanted, "run python -m benchmarks.several_gpus.plan"


@pytest.mark.parametrize("count", [4, 8])
@pytest.mark.parametrize("gpu, memory", [("H100", 79.6), ("H200", 140.4)])
def test_planned_runs_fit_and_need_no_planner(monkeypatch, tmp_path, count, gpu, memory):
    monkeypatch.setattr(plan, "_ask_planner", None)
    runs = Runs(tmp_path, Machine(count, gpu, memory, tuple("01234567"[:count])), [], 1e9)
    stages = speed.one, speed.seven_b, speed.tuning4, speed.long, speed.seventy_b
    jobs = [job for stage in stages for job in stage(runs)]
    names = [job.name for job in jobs]
    assert len(names) == len(set(names)) and ("7b one" in names) is (gpu == "H200")
    assert {f"full, cp{count}", f"{count} samples: cream, dp{count}"} <= set(names)


def test_jobs_wait_for_their_gpus_and_late_ones_are_killed(tmp_path):
    machine = Machine(2, "H100", names=("0", "1"))
    runs = Runs(tmp_path, machine, [], 1e9)
    times = "import time; print(time.monotonic()); {}; print(time.monotonic())"

    def read(text: str) -> dict:
        begin, end, *_ = text.splitlines()
        return dict(times=[float(begin), float(end)])

    def job(name: str, body: str, *gpus: int) -> Job:
        # `python -m timeit -s CODE` runs any code.
        return Job(name, 0, ["-n", "1", "-r", "1", "-s", body, "pass"], read, gpus, ("timeit",))

    jobs = [job("first", times.format("time.sleep(0.3)"), 0), job("second", times.format("0"), 0, 1)]
    late = replace(job("late", "import time; time.sleep(600)", 1), limit=0.2)
    runs.run([*jobs, late])
    assert runs.results["first"]["times"][1] < runs.results["second"]["times"][0]
    assert runs.failed == ["late"] and "late" not in runs.results
    again = Runs(tmp_path, machine, [], seconds=-1)
    again.run([*jobs, late])
    assert again.failed == ["late"]  # the others have their results


def test_the_most_memory_of_each_gpu_is_kept(monkeypatch, tmp_path):
    """As nvidia-smi shows it, whose order is that of the names; a job has its own GPUs' only."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        f"""#!/bin/sh
        cd {tmp_path}
        [ "$*" = "--query-gpu=memory.used --format=csv,noheader,nounits -i 2,5" ] || exit 1
        if [ -e a.runs ] && [ -e b.runs ] && [ ! -e seen ]; then printf '4096\\n1024\\n'; touch seen
        else printf '2048\\n512\\n'; fi"""
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr("benchmarks.several_gpus.runs.SECONDS_BETWEEN_LOOKS", 0.1)
    runs = Runs(tmp_path, Machine(2, "H100", names=("2", "5")), [], 1e9)
    body = "import os, time\nopen('{0}/{1}.runs', 'w')\nwhile not os.path.exists('{0}/seen'): time.sleep(0.05)"
    jobs = {name: ["-n", "1", "-r", "1", "-s", body.format(tmp_path, name), "pass"] for name in "ab"}
    runs.run(
        [Job(name, 0, words, lambda text: {}, (gpu,), ("timeit",)) for gpu, (name, words) in enumerate(jobs.items())]
    )
    assert (runs.results["a"]["device_gib"], runs.results["b"]["device_gib"]) == (4.0, 1.0)
    assert Machine(2).read_used_memory() == []


def test_one_gpu_is_extrapolated_where_the_model_does_not_fit():
    """A layer takes 0.25 s and everything else 1 s: 32 layers take 9 s."""
    rate = {layers: 16 * 4096 / (1 + 0.25 * layers) for layers in (8, 16, 32)}
    found = {name: timed(name, rate[int(name.split()[0])]) for name in ("8 layers one", "16 layers one")}
    assert report.one_gpu(found)[0] == pytest.approx(rate[32])
    found["7b dp8"] = timed("7b dp8", rate[32] / 2, gpus=8)
    assert "| 7b dp8 | 3,641 | 0.500 |" in "\n".join(report.tables(found))
    found |= {
        name: timed(name, rate) for name, rate in {"7b one": 5.0, "7b one, GPU 3": 6.0, "7b one, FP8": 9.0}.items()
    }
    assert report.one_gpu(found) == (5.5, "measured on 2")


def test_prompts_run_on_gpus_and_have_a_table(tmp_path):
    on_cpus, on_gpus = Machine(8), Machine(8, "H200", 140.4, tuple("01234567"))
    assert speed.evaluation(Runs(tmp_path, on_cpus, [], 1e9)) == []
    jobs = speed.evaluation(Runs(tmp_path, on_gpus, [], 1e9))
    assert [job.flags for job in jobs] == [
        ["--tensor-model-parallel-size", 8, "--length", 262144],
        ["--context-parallel-size", 8, "--length", 262144],
    ]
    said = dict(length=262144, seconds_to_read=9.68, ms_each_token_after=60.1, peak_gib=17.77, loss=10.4321, answer=[1])
    log = "warning\n" + json.dumps(said) + "\n[rank1]: the end\n"
    found = {job.name: {"run": job.name, **job.read(log)} for job in jobs}
    assert "| tp8 | 262,144 | 9.68 s | 60.1 ms | 17.77 | 10.4321 |" in report.tables(found)


def test_measured_runs_are_rows_of_the_planner(monkeypatch, tmp_path):
    file = tmp_path / "measured_runs.json"
    file.write_text('[\n  {\n    "what": "old"\n  }\n]\n')
    monkeypatch.setattr(report, "MEASURED", file)
    flags = (
        "--num-layers 32 --train-iters 5 --num-layers 16 --data-path /tmp/x --pipeline-model-parallel-size 4".split()
    )
    found = {"7b dp8": timed("7b dp8", 12000.4, gpus=8, flags=flags, planned_tokens_per_second=9000)}
    found |= {"faults": {"run": "faults"}, "8 layers one, GPU 3": timed("8 layers one, GPU 3", 1.0)}
    for _ in range(2):  # the second adds nothing
        report.add_measured(found, "2026-11-27, eight GPUs")
    old, row = json.loads(file.read_text())
    assert row["what"] == "7b dp8, 8 H100s" and (row["gpus"], row["tokens_per_second"]) == (8, 12000)
    assert row["flags"] == ["--num-layers", "16", "--pipeline-model-parallel-size", "4"]
    assert "stage" not in row and "faster" in row["off"]  # the step line has the fullest stage's memory


def test_steps_are_read_from_a_log():
    first = "step 1/3 | loss 9.9 | lr 1.00e-04 | grad norm 9.10 | 70.0 GiB"
    line = "step {}/3 | loss 9.5 | lr 1.00e-04 | grad norm 9.10 | {} tokens/s/GPU | MFU 56.0 % | {}70.1 GiB"
    second, third = line.format(2, "12,000", "ETA 0:02 | "), line.format(3, "13,000", "")
    assert speed.read_steps("\n".join(["header", first, second, third])) == [(13000.0, 56.0, 70.1)]
    assert speed.read_steps("\n".join([first, second])) == [(12000.0, 56.0, 70.1)]  # a run of two long steps
