"""Keys and values in FP8: errors against float64, memory, log-probabilities and answers of both engines, the flag."""

import json
import re
import types

import pytest
import torch
from transformers import LlamaConfig

from megatron_cream.checkpoint.convert import import_hf
from megatron_cream.checkpoint.hf_folder import HfFolder
from megatron_cream.checkpoint.megatron_folder import MegatronCheckpoint
from megatron_cream.common.errors import UsageError
from megatron_cream.evaluation import fit
from megatron_cream.evaluation.comparison.sides import describe_differences, read_pairs
from megatron_cream.evaluation.engine_flags import read_vllm_settings
from megatron_cream.evaluation.flags import build_parser
from megatron_cream.evaluation.models.fp8_memory import Fp8Memory, ReadBuffer, count_bytes
from megatron_cream.evaluation.models.hf_model import HfModel, _new_cache
from megatron_cream.evaluation.models.language_model import Source
from megatron_cream.evaluation.models.megatron_model import MegatronModel
from megatron_cream.evaluation.models.sharded_cache import ShardedText
from megatron_cream.evaluation.models.static_cache import new_context
from megatron_cream.evaluation.ranks import Ranks
from megatron_cream.evaluation.results import SUMMARY
from tests.evaluation.test_comparison import needles, write_result
from tests.hf_models import save_model
from tests.process_groups import leave_process_group

GREEDY = dict(temperature=0.0, top_p=1.0)


def some_numbers(dtype: torch.dtype, size=(9, 3, 2, 64)) -> torch.Tensor:
    """Return numbers of very different magnitudes, with a channel that is large everywhere, as keys have."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(size, generator=generator) * torch.randn(size, generator=generator).mul(2).exp()
    x[..., 3] *= 100
    x[2], x[3, 0] = 0, x[3, 0] * 1e-6
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_read_is_near_what_was_written(dtype):
    """The error is at most |x| / 16, or 2**-17 of the largest magnitude of the same token and head."""
    x = some_numbers(dtype)
    memory = Fp8Memory.allocate((12, *x.shape[1:]), dtype, x.device, ReadBuffer())
    memory[1:4, 0:3, ...], memory[4:10, 0:3, ...] = x[:3], x[3:]  # as Megatron writes chunks
    read = memory[0:12, 0:3, ...]
    assert read.dtype == dtype and not read[0].any() and not read[10:].any()
    exact, error = x.double(), (read[1:10].double() - x.double()).abs()
    # A float16 below 2**-14 has fewer digits than FP8 keeps, and is rounded to them once more.
    least = 2**-25 if dtype == torch.float16 else 0
    assert (error <= torch.maximum(exact.abs() / 16, exact.abs().amax(-1, keepdim=True) / 2**17) + least).all()
    assert error.max() > 0
    part = memory.narrow(0, 4, 8).narrow(1, 2, 1)
    assert torch.equal(part[0:6, 0:1, ...].clone(), memory[4:10, 2:3, ...])


def test_numbers_that_are_not_finite_are_read_as_nan():
    """A model with broken keys must still end with the line about its logits, not with answers."""
    memory = Fp8Memory.allocate((2, 1, 1, 4), torch.float32, torch.device("cpu"), ReadBuffer())
    memory[0:2, 0:1, ...] = torch.tensor([[1.0, float("nan"), 2, 3], [1, 2, float("inf"), 3]])[:, None, None]
    assert memory[0:2, ...].isnan().all()


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """Return {engine: open(**options)} for one model with grouped keys."""
    folder = tmp_path_factory.mktemp("fp8")
    save_model(folder / "hf", "llama-gqa-odd-vocabulary")
    import_hf(HfFolder(folder / "hf"), folder / "ckpt")
    checkpoint = MegatronCheckpoint(folder / "ckpt")
    common = dict(dtype=torch.float32, tokenizer=None, stop_ids=frozenset(), max_positions=4096)
    yield {
        "transformers": lambda **options: HfModel(folder / "hf", **common, **options),
        "megatron": lambda **options: MegatronModel(checkpoint, **common, **options),
    }
    leave_process_group()


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 1003, (n,), generator=generator).tolist() for n in (41, 3, 17, 160)]


def compute_losses(model, prompts) -> torch.Tensor:
    return -model.log_probs(torch.tensor([prompts[-1]]), 1)[0]


def test_log_probs_are_near_those_without(engines, prompts):
    """The losses differ by at most a quarter of their standard deviation, on average by 5 %; engines and chunks agree.

    The model is random, with logits spread as in no trained model: docs/evaluation.md has a real one.
    """
    exact = compute_losses(engines["transformers"](prefill_chunk=4096), prompts)
    found = {
        (name, chunk): compute_losses(open_model(prefill_chunk=chunk, kv_cache_dtype="fp8"), prompts)
        for name, open_model in engines.items()
        for chunk in (16, 4096)
    }
    first = found["transformers", 16]
    error = (first - exact).abs() / exact.std()
    assert 1e-4 < error.mean() < 0.05 and error.max() < 0.25
    for losses in found.values():  # a key at the middle of two FP8 numbers may become another with other rounding
        assert ((losses - first).abs() / exact.std()).mean() < 0.1 * error.mean()


def test_answers_do_not_depend_on_batch_or_engine(engines, prompts):
    """Prompts of several lengths in one batch, with padding, and one by one through context parallelism's cache."""
    options = dict(seeds=[0] * 4, **GREEDY)
    models = {name: open_model(prefill_chunk=16, kv_cache_dtype="fp8") for name, open_model in engines.items()}
    answers = models["megatron"].generate(prompts, 6, **options)
    assert answers == models["transformers"].generate(prompts, 6, **options)
    for model in models.values():
        assert answers[:2] == [model.generate([prompt], 6, seeds=[0], **GREEDY)[0] for prompt in prompts[:2]]
    llama = models["megatron"]._model
    with torch.inference_mode():
        text = ShardedText(llama, "cpu", 16, room=6, kv_cache_dtype="fp8")
        logits = [text.prefill(prompts[:1])]
        for token in answers[0][:-1]:
            logits.append(text.step(torch.tensor([token])))
    for layer in llama.decoder.layers:
        layer.self_attention.core_attention.key_shard = None
    assert [int(step.argmax()) for step in logits] == answers[0]


def test_the_memory_is_half_of_bf16(engines):
    """FP8 and a byte for each token and head, as the line before loading counts it, beside one layer's buffers."""
    llama = engines["megatron"](prefill_chunk=16)._model
    (layers, groups, channels), (batch, length) = (3, 2, 24), (4, 50)
    numbers = 2 * length * batch * groups * channels
    context = new_context(llama, batch, length, "fp8")
    memories = [memory for pair in context.key_value_memory_dict.values() for memory in pair]
    kept = sum(memory.nbytes for memory in memories)
    assert kept == layers * (numbers + numbers // channels) < 0.53 * 2 * layers * numbers
    buffers = {id(memory._buffer): memory._buffer.flat.numel() for memory in memories}
    assert len(buffers) == 2 and sum(buffers.values()) == numbers
    assert count_bytes(layers, numbers, channels, torch.bfloat16, "fp8") == kept + 2 * numbers
    cache = _new_cache(engines["transformers"](prefill_chunk=16)._model.config, length, "fp8")
    for layer in range(layers):
        states = torch.ones(batch, groups, 7, channels, dtype=torch.bfloat16)
        keys, _ = cache.update(states, states, layer)
        assert torch.equal(keys, states)
    assert sum(memory.nbytes for layer in cache.layers for memory in layer.memories) == kept
    assert len({memory._buffer for layer in cache.layers for memory in layer.memories}) == 2


def test_a_model_without_long_attention_is_one_line(tmp_path):
    """All layers of this Mistral attend to a sliding window, so its keys and values are few."""
    save_model(tmp_path, "mistral", sliding_window=32)
    options = dict(dtype=torch.float32, tokenizer=None, stop_ids=frozenset(), max_positions=512, prefill_chunk=16)
    with pytest.raises(UsageError, match=r"^--kv-cache-dtype fp8: no layer of this model .* Leave the flag out\.$"):
        HfModel(tmp_path, kv_cache_dtype="fp8", **options)


@pytest.fixture(scope="module")
def llama2_7b(tmp_path_factory):
    """Return a Source of Llama-2-7B's shape, with any dtype of keys and values."""
    folder = tmp_path_factory.mktemp("7b")
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(folder)  # the defaults are those of Llama-2-7B
    return lambda kind: Source(folder, None, None, "megatron", torch.bfloat16, kv_cache_dtype=kind)


@pytest.mark.parametrize(
    "tokens, batch, gib, advice, right",
    [
        (262144, 1, 139, "Use --kv-cache-dtype fp8, which halves keys and values, or torchrun --nproc_per_node=2", 1),
        (200000, 2, 140, "Use --batch-size 1.", 1),
        (131072, 4, 60, "Use --kv-cache-dtype fp8 --batch-size 1, which halves keys and values, or torchrun", 1),
        (8388608, 1, 300, "--tensor-model-parallel-size 8 --kv-cache-dtype fp8, which halves keys and values.", 8),
    ],
)
def test_what_is_advised_fits(llama2_7b, tokens, batch, gib, advice, right):
    """Llama-2-7B at 256K takes 128 GiB for keys and values, in FP8 68.5 GiB with the buffers of one layer."""
    options = dict(tokens=tokens, memory=gib * fit.GIB)
    with pytest.raises(UsageError) as caught:
        fit.describe_fit(llama2_7b("auto"), Ranks(), batch=batch, **options)
    assert advice in str(caught.value), caught.value
    kind = "fp8" if "fp8" in advice else "auto"
    batch = 1 if "--batch-size 1" in advice else batch
    line = fit.describe_fit(llama2_7b(kind), Ranks(0, right, right), batch=batch, **options)
    if tokens == 262144:
        assert "12.6 GiB of weights and 68.5 GiB of keys and values in FP8 (262,144 tokens x 1)" in line
    elif kind == "fp8" and right == 1:
        assert re.search(r"or torchrun --nproc_per_node=\d with --tensor-model-parallel-size", str(caught.value))


def test_the_flag_reaches_the_identity_and_vllm(llama2_7b):
    """Results without the flag keep the identity that earlier versions wrote."""
    identities = [llama2_7b(kind).identity() for kind in ("auto", "fp8")]
    assert identities[1] == identities[0] | {"kv_cache_dtype": "fp8"} and "kv_cache_dtype" not in identities[0]
    for kind in ("auto", "fp8"):
        words = ["needle", "--model", "m", "--engine", "vllm", "--kv-cache-dtype", kind]
        source = types.SimpleNamespace(engine="vllm", max_positions=4096)
        settings = read_vllm_settings(build_parser("").parse_args(words), source, 1000)
        assert settings.engine_arguments(4096, 512).get("kv_cache_dtype", "auto") == kind


def test_a_comparison_says_that_the_dtypes_differ(tmp_path):
    for name in ("base", "extended"):
        write_result(tmp_path / name, "needle", needles(lambda length, i: i % 2), model=name)
    summary = json.loads((tmp_path / "extended" / SUMMARY).read_text())
    summary["model"]["kv_cache_dtype"] = "fp8"
    (tmp_path / "extended" / SUMMARY).write_text(json.dumps(summary))
    pairs = read_pairs(tmp_path / "base", tmp_path / "extended")
    assert describe_differences(pairs) == [
        "The base model ran with kv_cache_dtype auto, the extended model with kv_cache_dtype fp8."
    ]
    assert pairs[0].base.dtype == "float32" and pairs[0].extended.dtype == "float32 with keys and values in fp8"
