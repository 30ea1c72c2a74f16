"""Our Llama against transformers' Llama: equal weights give equal logits and losses at any position ids."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_cream.evaluation.perplexity import measure_perplexity
from megatron_cream.model.attention import choose_backend
from megatron_cream.model.llama import LlamaModelBuilder, LlamaModelConfig
from megatron_cream.model.lora_settings import LoraSettings
from megatron_cream.patches import cuda_graphs

SHAPE = dict(hidden_size=64, ffn_hidden_size=176, num_layers=3, num_attention_heads=4)
VOCABULARY, WINDOW, TARGET = 100, 48, 384


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    yield ProcessGroupCollection.use_mpu_process_groups()
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def megatron_llama(groups, *, kv_heads, tied, backend, scaling, lora=None, **options):
    config = TransformerConfig(
        **SHAPE,
        num_query_groups=kv_heads,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        bias_activation_fusion=True,
        masked_softmax_fusion=False,
        **options,
    )
    model = LlamaModelConfig(
        transformer=config,
        vocab_size=VOCABULARY,
        should_pad_vocab=True,
        make_vocab_size_divisible_by=128,
        share_embeddings_and_output_weights=tied,
        position_embedding_type="none",
        rotary_base=10000,
        rope_scaling_config=scaling,
        rope_max_positions=TARGET,
        real_vocab_size=VOCABULARY,
        attention=choose_backend(backend, has_cuda=False, half=False),
        lora=lora,
    )
    return LlamaModelBuilder(model).build_model(groups, pre_process=True, post_process=True)


def transformers_llama(ours, *, kv_heads, tied, scaling) -> LlamaForCausalLM:
    """Return transformers' Llama with our weights."""
    parameters = {"rope_type": "default", "rope_theta": 10000.0} | (scaling or {})
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        max_position_embeddings=TARGET,
        rope_parameters=parameters,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()
    ours = dict(ours.named_parameters())
    theirs = {
        "model.embed_tokens.weight": ours["embedding.word_embeddings.weight"][:VOCABULARY],
        "model.norm.weight": ours["decoder.final_layernorm.weight"],
    }
    if not tied:
        theirs["lm_head.weight"] = ours["output_layer.weight"][:VOCABULARY]
    for i in range(3):
        a, b = f"decoder.layers.{i}.", f"model.layers.{i}."
        # Megatron stores each key and value head together with the query heads that use them.
        qkv = ours[a + "self_attention.linear_qkv.weight"].view(kv_heads, 4 // kv_heads + 2, 16, 64)
        q, k, v = qkv.split([4 // kv_heads, 1, 1], dim=1)
        gate, up = ours[a + "mlp.linear_fc1.weight"].chunk(2)
        theirs |= {
            b + "self_attn.q_proj.weight": q.reshape(-1, 64),
            b + "self_attn.k_proj.weight": k.reshape(-1, 64),
            b + "self_attn.v_proj.weight": v.reshape(-1, 64),
            b + "self_attn.o_proj.weight": ours[a + "self_attention.linear_proj.weight"],
            b + "mlp.gate_proj.weight": gate,
            b + "mlp.up_proj.weight": up,
            b + "mlp.down_proj.weight": ours[a + "mlp.linear_fc2.weight"],
            b + "input_layernorm.weight": ours[a + "input_layernorm.weight"],
            b + "post_attention_layernorm.weight": ours[a + "pre_mlp_layernorm.weight"],
        }
    missing, unexpected = model.load_state_dict({k: v.detach().clone() for k, v in theirs.items()}, strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if tied else set())
    return model


YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": WINDOW}


@pytest.mark.parametrize("backend", ["sdpa", "local"])
@pytest.mark.parametrize(
    "kv_heads, tied, scaling",
    [(4, False, {"rope_type": "linear", "factor": 8.0}), (2, True, YARN), (1, False, None)],
    ids=["mha-untied-linear", "gqa-tied-yarn", "mqa-untied-none"],
)
def test_logits_losses_and_gradients(one_rank, backend, kv_heads, tied, scaling):
    torch.manual_seed(0)
    ours = megatron_llama(one_rank, kv_heads=kv_heads, tied=tied, backend=backend, scaling=scaling)
    for parameter in ours.parameters():  # give the norms weights other than 1
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5)
    theirs = transformers_llama(ours, kv_heads=kv_heads, tied=tied, scaling=scaling)
    tokens = torch.randint(0, VOCABULARY, (2, WINDOW))
    labels = torch.randint(0, VOCABULARY, (2, WINDOW))
    # Each sample has its own positions, with gaps, as in CREAM.
    ids = torch.stack([torch.randperm(TARGET)[:WINDOW].sort().values for _ in range(2)])
    # Without an explicit mask, transformers would take gaps in position ids for packed sequences.
    mask = torch.full((WINDOW, WINDOW), float("-inf")).triu(1)[None, None]

    logits = ours(tokens, ids, None)[..., :VOCABULARY]
    expected = theirs(tokens, position_ids=ids, attention_mask=mask.expand(2, 1, -1, -1)).logits
    assert relative(logits, expected) < 2e-5

    losses = ours(tokens, ids, None, labels=labels)
    reference = torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="none")
    assert relative(losses.flatten(), reference) < 1e-5
    losses.sum().backward()
    reference.sum().backward()
    ours_grad = ours.decoder.layers[0].mlp.linear_fc2.weight.grad
    assert relative(ours_grad, theirs.model.layers[0].mlp.down_proj.weight.grad) < 1e-4
    embedding = ours.embedding.word_embeddings.weight.grad[:VOCABULARY]
    assert relative(embedding, theirs.model.embed_tokens.weight.grad) < 1e-4


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4, alpha=8.0)], ids=["all weights", "adapters"])
@pytest.mark.parametrize("modules", [["core_attn"], ["mlp"], ["core_attn", "mlp"], None], ids=str)
def test_recompute_leaves_losses_and_gradients_alone(one_rank, modules, lora):
    """Every module that --recompute-modules can name with these layers, alone and together, and whole layers."""
    options = dict(kv_heads=2, tied=False, backend="sdpa", scaling=None, lora=lora)
    plain = megatron_llama(one_rank, **options)
    options |= dict(recompute_granularity="selective", recompute_modules=modules)
    if modules is None:
        options |= dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=2)
    recomputed = megatron_llama(one_rank, **options)
    for name, parameter in plain.named_parameters():  # B starts as zeros
        parameter.data.normal_(std=0.05)
        recomputed.get_parameter(name).data.copy_(parameter)
    tokens, labels = torch.randint(0, VOCABULARY, (2, 2, WINDOW))
    ids = torch.arange(WINDOW).expand(2, -1)
    losses = [model(tokens, ids, None, labels=labels) for model in (plain, recomputed)]
    assert torch.equal(*losses)
    for each in losses:
        each.sum().backward()
    for name, parameter in plain.named_parameters():
        grad = recomputed.get_parameter(name).grad
        assert grad is parameter.grad or torch.equal(grad, parameter.grad), name


def test_rotary_follows_position_ids(one_rank):
    """Shifting all ids changes nothing (rotary is relative); stretching them changes the logits."""
    torch.manual_seed(0)
    model = megatron_llama(one_rank, kv_heads=4, tied=False, backend="sdpa", scaling=None)
    tokens = torch.randint(0, VOCABULARY, (1, WINDOW))
    ids = torch.arange(WINDOW)[None]
    plain = model(tokens, ids, None)
    assert relative(model(tokens, ids + 200, None), plain) < 1e-4
    assert relative(model(tokens, ids * 3, None), plain) > 1e-3


def test_a_cuda_graph_reads_new_angles(one_rank):
    """The angles are among each layer's inputs: Megatron copies only inputs into a graph before its replay."""
    from megatron.core.transformer.cuda_graphs import _CudaGraphRunner

    model = megatron_llama(one_rank, kv_heads=4, tied=False, backend="sdpa", scaling=None)
    given = []
    for layer in model.decoder.layers:
        layer.register_forward_pre_hook(lambda _, args, kwargs: given.append((args, kwargs)), with_kwargs=True)
    ids = torch.randint(0, TARGET, (2, WINDOW))
    model(torch.randint(0, VOCABULARY, (2, WINDOW)), ids, None)
    assert len(given) == SHAPE["num_layers"]
    for args, kwargs in given:
        found = _CudaGraphRunner.get_tensors(None, args, kwargs)
        assert any(x.shape == (2, *ids.shape, 16) and torch.equal(x[1], model.rotary.cos_sin(ids)[1]) for x in found)


def test_cuda_graphs_are_of_training_and_end_before_nccl(one_rank, monkeypatch):
    from megatron.core.transformer.cuda_graphs import _CudaGraphRunner

    layer = megatron_llama(one_rank, kv_heads=4, tied=False, backend="sdpa", scaling=None).decoder.layers[0]
    monkeypatch.setattr(type(layer), "_should_call_local_cudagraph", type(layer)._should_call_local_cudagraph)

    def make(self, base_module, mempool, fwd_graph_input_args, fwd_graph_input_kwargs, func, need_backward):
        torch.nn.Module.__init__(self)

    monkeypatch.setattr(_CudaGraphRunner, "__init__", make)
    cuda_graphs.install()
    layer.cudagraph_manager = torch.nn.Identity()
    assert layer.train()._should_call_local_cudagraph() and not layer.eval()._should_call_local_cudagraph()
    runner, ended = _CudaGraphRunner(*6 * [None]), []
    runner.fwd_graph, runner.bwd_graph = SimpleNamespace(reset=lambda: ended.append("forward")), None
    cuda_graphs.reset_graphs()
    assert ended == ["forward"]


def test_casting_the_model_leaves_the_angles_alone(one_rank):
    model = megatron_llama(one_rank, kv_heads=4, tied=False, backend="sdpa", scaling=None)
    ids = torch.randint(0, TARGET, (1, 7))
    before = model.rotary.cos_sin(ids)
    model.bfloat16()
    assert all(torch.equal(a, b) for a, b in zip(before, model.rotary.cos_sin(ids)))


def test_backend_choice_gives_its_reason():
    assert choose_backend("auto", has_cuda=False, half=True).reason == "no CUDA device"
    with pytest.raises(ValueError, match="--attention-backend flash: needs a CUDA device"):
        choose_backend("flash", has_cuda=False, half=True)


def relative(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return (torch.linalg.norm(ours - expected) / torch.linalg.norm(expected)).item()


def test_perplexity_against_a_plain_loop(one_rank):
    """Perplexities equal those of transformers on the same windows, one by one."""
    torch.manual_seed(0)
    scaling = {"rope_type": "linear", "factor": 8.0}
    ours = megatron_llama(one_rank, kv_heads=2, tied=False, backend="sdpa", scaling=scaling).eval()
    for parameter in ours.parameters():  # make the predictions less uniform
        if parameter.dim() > 1:
            parameter.data *= 8
    theirs = transformers_llama(ours, kv_heads=2, tied=False, scaling=scaling)
    documents = [np.random.default_rng(i).integers(0, VOCABULARY, size=96) for i in range(3)]
    with torch.no_grad():
        measured = measure_perplexity([ours], documents, [24, 48, 96], scored=12)
        for n, value in measured.items():
            losses = []
            for document in documents:
                window = torch.from_numpy(document[96 - n :])[None]
                logits = theirs(window[:, :-1]).logits[0]
                losses.append(torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="none")[-12:])
            assert value == pytest.approx(torch.cat(losses).double().mean().exp().item(), rel=1e-4)
