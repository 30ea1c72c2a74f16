"""The table of docs/planner.md about 8, 64 and 512 GPUs is what tools/plan.py says."""

import json
import re
import shlex

from tests.launch import ROOT
from tests.planning.test_command import tool

DOC = (ROOT / "docs" / "planner.md").read_text()
SAMPLES = {"Llama-2-7B": 8, "70B": 4}


def flags_of(model: str) -> list[str]:
    if model == "Llama-2-7B":
        return ["--config", "llama2_7b_32k"]
    command = re.search(r"python tools/plan.py (--num-layers 80.*?)```", DOC, re.S)[1].replace("\\\n", " ")
    words = shlex.split(command)
    return [word for i, word in enumerate(words) if not {word, words[i - 1]} & {"--gpus", "--global-batch-size"}]


def test_docs_say_what_the_planner_says_of_many_gpus(monkeypatch, capsys):
    rows = re.findall(r"^\| (Llama-2-7B|70B) \| (.*) \|$", DOC, re.M)
    assert len(rows) == 5
    for model, cells in rows:
        gpus, *layout, gib, rate, mfu = cells.split(" | ")
        own = ["--gpus", gpus, "--gpu", "H200", "--global-batch-size", str(SAMPLES[model] * int(gpus)), "--json"]
        assert tool(monkeypatch, *flags_of(model), *own) == 0
        best = json.loads(capsys.readouterr().out)["layouts"][0]
        names = ("tensor", "pipeline", "context", "data", "micro_batch")
        assert [str(best["layout"][name]) for name in names] == layout
        said = (
            f"{best['memory']['device'] / 2**30:.1f}",
            f"{best['tokens_per_second']:,.0f}",
            f"{best['utilization']:.1%}",
        )
        assert said == (gib, rate, mfu.replace(" %", "%"))
