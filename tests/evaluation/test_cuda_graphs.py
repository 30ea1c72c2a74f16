"""Generation by CUDA graphs: its step on a CPU, its flags, and on a GPU the answers with and without."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_cream.checkpoint.convert import import_hf
from megatron_cream.checkpoint.hf_folder import HfFolder
from megatron_cream.checkpoint.megatron_folder import MegatronCheckpoint
from megatron_cream.commands import suite
from megatron_cream.common import devices
from megatron_cream.common.errors import UsageError
from megatron_cream.evaluation import engine_flags
from megatron_cream.evaluation.flags import build_parser
from megatron_cream.evaluation.models import generation, language_model, megatron_model
from megatron_cream.evaluation.models.fp8_memory import KV_CACHE_DTYPES
from megatron_cream.evaluation.models.megatron_model import MegatronModel
from megatron_cream.evaluation.ranks import Ranks
from megatron_cream.model.rotary import RotaryEmbedding
from tests.hf_models import save_model
from tests.process_groups import leave_process_group

GREEDY = dict(temperature=0.0, top_p=1.0)


@pytest.fixture(scope="module", autouse=True)
def no_process_group_is_left():
    yield
    leave_process_group()


def open_checkpoint(folder, name: str = "llama-gqa-odd-vocabulary", **options) -> MegatronCheckpoint:
    save_model(folder / "hf", name, **options)
    import_hf(HfFolder(folder / "hf"), folder / "ckpt")
    return MegatronCheckpoint(folder / "ckpt")


def make_prompts(lengths, vocabulary: int = 1003) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in lengths]


class Replay:
    """A Runner that does on a CPU what a CUDA graph does: it repeats the operations of one call on the same tensors.

    Whatever Python computes is that of the recorded call.
    """

    def __init__(self):
        self.operations: list[tuple] = []

    def __call__(self, function):
        if not self.operations:
            with _Recorder(self.operations):
                self.out = function()
            return self.out.clone()
        for operation, args, options, result in self.operations:
            for old, new in zip(tree_leaves(result), tree_leaves(operation(*args, **options)), strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)
        return self.out.clone()


aten = torch.ops.aten
_WAITING = (aten.item, aten._local_scalar_dense, aten.is_nonzero, aten.nonzero, aten.masked_select, aten.equal)


class _Recorder(TorchDispatchMode):
    def __init__(self, operations: list[tuple]):
        super().__init__()
        self._operations = operations

    def __torch_dispatch__(self, operation, _types, args=(), kwargs=None):
        assert operation.overloadpacket not in _WAITING, f"{operation}: the host waits for the device"
        result = operation(*args, **(kwargs or {}))
        self._operations.append((operation, args, kwargs or {}, result))
        return result


class Recorded:
    """A CachedBatch that records its logits, [b, vocabulary] for each step."""

    def __init__(self, batch):
        self.prefill, self._batch, self.logits = batch.prefill, batch, []

    def step(self, tokens):
        self.logits.append(self._batch.step(tokens))
        return self.logits[-1]


@pytest.mark.parametrize("kind", KV_CACHE_DTYPES)
def test_a_step_can_be_repeated_by_its_operations_alone(monkeypatch, tmp_path, kind):
    """The first step's operations, run again, give each later step's logits: only tensors change between steps."""
    options = dict(dtype=torch.float32, tokenizer=None, stop_ids=frozenset(), max_positions=4096, prefill_chunk=16)
    llama = MegatronModel(open_checkpoint(tmp_path), **options)._model
    monkeypatch.setattr(RotaryEmbedding, "_check_positions", lambda *_: None)  # on a CPU it reads the positions
    for lengths in ((41, 3, 17), (16,), (64, 64)):
        found = []
        for run in (None, Replay()):
            with torch.inference_mode():
                batch = Recorded(megatron_model._RightAlignedBatch(llama, "cpu", 16, 9, kind, run=run))
                seeds = [0] * len(lengths)
                answers = generation.generate(
                    batch, make_prompts(lengths), 9, stop_ids=(), seeds=seeds, temperature=1.0, top_p=1.0
                )
            found.append((answers, torch.stack(batch.logits)))
        assert found[0][0] == found[1][0] and len(found[0][0][0]) == 9
        assert torch.equal(found[0][1], found[1][1]) and not torch.equal(found[0][1][0], found[0][1][1])
        assert len(run.operations) > 100


def test_flags(monkeypatch):
    """--cuda-graphs is one line where there are none; suites hand both forms on to the tasks that generate."""
    parse = build_parser("").parse_args

    def check(*words, engine="megatron", gpu=True, rope="llama3", **ranks):
        monkeypatch.setattr(devices, "has_cuda", lambda: gpu)
        monkeypatch.setattr(engine_flags, "read_rope_type", lambda _source: rope)
        args = parse(["needle", "--model", "m", *words])
        args.ranks = Ranks(**ranks)
        engine_flags.check_cuda_graphs(args, language_model.Source(Path("m"), None, None, engine, torch.float32))

    check("--cuda-graphs")
    check("--no-cuda-graphs", engine="transformers", gpu=False)
    check(engine="vllm", gpu=False, rope="dynamic", world_size=2, tensor=2)
    for wrong, words in (
        (dict(gpu=False), "there is no GPU here"),
        (dict(engine="transformers"), "only with --engine megatron; this model runs in transformers"),
        (dict(world_size=2, context=2), "not for a model that several GPUs share"),
        (dict(rope="dynamic"), "the rope_type of --model m is dynamic"),
    ):
        with pytest.raises(UsageError, match=f"^--cuda-graphs: {words}"):
            check("--cuda-graphs", **wrong)
    for flag in ("--cuda-graphs", "--no-cuda-graphs"):
        args = parse(["suite", "long", "m", flag])
        assert suite._list_flags(args, "needle")[-1] == flag
        assert parse(["needle", *suite._list_flags(args, "needle")]).cuda_graphs == (flag == "--cuda-graphs")
        assert flag not in suite._list_flags(args, "harness") + suite._list_flags(args, "perplexity")


def test_who_generates_without_graphs(monkeypatch):
    """A CPU, --no-cuda-graphs, a model on several ranks, and frequencies that change while a text grows."""

    def uses_graphs(cuda_graphs=True, gpu=True, ranks=1, by_length=False):
        rotary = Namespace(depends_on_length=by_length)
        monkeypatch.setattr(devices, "has_cuda", lambda: gpu)
        monkeypatch.setattr(megatron_model, "load_model", lambda *_, **__: Namespace())
        shape = Namespace(rotary=lambda **_: rotary)
        monkeypatch.setattr(megatron_model, "replace", lambda *_, **__: shape)
        group = megatron_model.Group(None, 0, ranks, 1)
        options = dict(dtype=torch.bfloat16, prefill_chunk=1, tokenizer=None, stop_ids=frozenset(), max_positions=1)
        return MegatronModel(Namespace(shape=None), cuda_graphs=cuda_graphs, group=group, **options)._cuda_graphs

    assert uses_graphs()
    assert not any((uses_graphs(False), uses_graphs(gpu=False), uses_graphs(ranks=2), uses_graphs(by_length=True)))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KV_CACHE_DTYPES)
def test_graphs_change_no_answer(monkeypatch, tmp_path, kind):
    """Tokens are equal and logits close with and without graphs, for several lengths and batches, one after another.

    The memory of a batch and its graph is free again once it has answered.
    """
    shape = dict(hidden_size=1024, num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=8192)
    checkpoint = open_checkpoint(tmp_path, "llama-mha", **shape)
    common = dict(dtype=torch.bfloat16, prefill_chunk=1024, tokenizer=None, stop_ids=frozenset(), max_positions=8192)
    recorded, runners, original = [], [], generation.generate

    def record(batch, *args, **options):
        recorded.append(Recorded(batch))
        return original(recorded[-1], *args, **options)

    class Kept(megatron_model.GraphRunner):
        def __init__(self):
            super().__init__()
            runners.append(self)

    monkeypatch.setattr(generation, "generate", record)
    monkeypatch.setattr(megatron_model, "GraphRunner", Kept)
    model = {on: MegatronModel(checkpoint, kv_cache_dtype=kind, cuda_graphs=on, **common) for on in (False, True)}
    for lengths in ((700,), (5, 2999, 1024), (1500, 1500), (6000,), (3,)):
        answers, logits = {}, {}
        for on in (False, True):
            prompts, seeds = make_prompts(lengths, checkpoint.shape.vocab_size), [0] * len(lengths)
            answers[on] = model[on].generate(prompts, 20, seeds=seeds, **GREEDY)
            logits[on] = torch.stack(recorded.pop().logits).float()
            assert not recorded
            assert len(runners) == on and all(runner._graph is not None for runner in runners)
            runners.clear()
        assert answers[True] == answers[False], lengths
        difference = (logits[True] - logits[False]).abs().max()
        assert difference <= 0.02 * logits[False].std(), (lengths, difference)
        del logits
        before = torch.cuda.memory_allocated()
        model[True].generate(prompts, 4, seeds=seeds, **GREEDY)
        recorded.clear()
        runners.clear()
        assert torch.cuda.memory_allocated() <= before, "the graph's memory is still held"
