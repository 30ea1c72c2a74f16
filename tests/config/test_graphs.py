"""CUDA graphs in the steps of parsing. tests/planning/test_graph_choice.py has the choice itself."""

import os
from argparse import Namespace

import pytest

from megatron_cream.config import describe, parse
from megatron_cream.training.summary import describe_run
from tests.bad_inputs import start
from tests.launch import TINY, write_documents


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    prefix = write_documents(tmp_path_factory.mktemp("data") / "documents")
    return [*TINY, "--data-path", str(prefix), "--train-iters", "2", "--split", "90,10,0"]


@pytest.mark.parametrize(
    "given, expected",
    [
        ([], "[(True, 'sdpa', 'none')] the reason local True layer None\n"),
        (["--cuda-graph-impl", "none"], "[] None none False none expandable_segments:True\n"),
    ],
)
def test_graphs_are_chosen_before_megatron_checks_the_flags(flags, given, expected, monkeypatch):
    """The choice gets filled-in flags, and is final before torch's allocator is configured."""
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    seen = []

    def choose(argv: list[str], args: Namespace) -> str:
        seen.append((argv == [*flags, *given], args.attention["name"], args.cuda_graph_impl))
        return "the reason"

    def main() -> None:
        parsed = parse.parse(None, choose)
        args, segments = parsed.args, os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
        scope = args.inference_cuda_graph_scope.name  # Megatron's check derives it
        print(seen, parsed.graphs, args.cuda_graph_impl, args.te_rng_tracker, scope, segments)
        shown = describe_run(args, parsed.origin, parsed.data, None, None, parsed.graphs)
        assert ("\ngraphs  the reason\n" in shown) == (not given) and ("graphs" in shown) == (not given)

    ended = start(main, "pretrain_cream.py", *flags, *given)()
    assert (ended.code, ended.out) == (0, expected), ended.error[-2000:]


def test_a_printed_configuration_leaves_graphs_to_the_run(flags):
    shown = describe.describe(parse.read([*flags, "--print-config"]))
    assert "graph" not in shown and "rng_tracker" not in shown
    assert "cuda_graph_impl: none\n" in describe.describe(parse.read([*flags, "--cuda-graph-impl", "none"]))
