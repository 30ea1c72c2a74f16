"""The planner's memory against real tensors, Megatron's optimizer and schedules, and transformers' models.

planning/test_measured.py compares it with measured runs.
"""

import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from megatron_cream.model import context_parallel
from megatron_cream.model.nf4 import Nf4Weight
from megatron_cream.planning import memory as planned
from megatron_cream.planning.memory import in_flight, parameters, predict
from megatron_cream.planning.run import Engine, Layout, Lora, Model
from megatron_cream.planning.weights import adapter_parameters, trained_parameters
from tests.planning.stand_ins import Attention, Launched, Norm
from tests.process_groups import leave_process_group

LLAMA2_7B = Model(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=11008,
    num_attention_heads=32,
    num_query_groups=32,
    kv_channels=128,
    padded_vocab_size=32000,
)


# Comparison with the real model.

SMALL = Model(
    num_layers=6,
    hidden_size=128,
    ffn_hidden_size=352,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=16,
    padded_vocab_size=384,
)
BASE = Layout(seq_length=32, micro_batch=2, global_batch=8)
REAL = {
    "plain": (BASE, 0),
    "TP": (replace(BASE, tensor=2), 0),
    "TP and SP": (replace(BASE, tensor=2, sequence_parallel=True), 0),
    "TP beyond the groups": (replace(BASE, tensor=8, sequence_parallel=True), 0),
    "query and key norms": (replace(BASE, tensor=2), 0),
    "CP": (replace(BASE, context=2), 0),
    "CP 8": (replace(BASE, context=8), 0),
    "CP and full": (replace(BASE, context=8, recompute="full"), 0),
    "CP and core_attn": (replace(BASE, context=8, recompute="selective", recompute_modules=("core_attn",)), 0),
    "first of PP": (replace(BASE, pipeline=3), 0),
    "middle of PP": (replace(BASE, pipeline=3), 1),
    "last of PP": (replace(BASE, pipeline=3), 2),
    "full": (replace(BASE, recompute="full"), 0),
    "full, by twos": (replace(BASE, recompute="full", recompute_layers=2), 0),
    "full, block": (replace(BASE, recompute="full", recompute_method="block", recompute_layers=2), 0),
    "full, scattered": (replace(BASE, recompute="full", tensor=2, scatter_saved=True), 0),
    "mlp": (replace(BASE, recompute="selective", recompute_modules=("mlp",)), 0),
    "core_attn": (replace(BASE, recompute="selective", recompute_modules=("core_attn",)), 0),
    "LoRA": (BASE, 0),
    "LoRA, few": (BASE, 0),
    "LoRA, full": (replace(BASE, recompute="full"), 0),
    "LoRA, mlp": (replace(BASE, recompute="selective", recompute_modules=("mlp",)), 0),
    "LoRA, few, mlp": (replace(BASE, recompute="selective", recompute_modules=("mlp", "core_attn")), 0),
    "LoRA, TP and SP": (replace(BASE, tensor=2, sequence_parallel=True), 0),
    "LoRA, NF4": (replace(BASE, tensor=2, sequence_parallel=True), 0),
}


@pytest.mark.parametrize(
    "length, own_kernels",
    [(32, True), (512, True), (32, False)],  # weight gradients dominate; activations dominate
    ids=["short", "long", "torch alone"],
)
@pytest.mark.parametrize("name", REAL)
def test_saved_tensors_and_peak(monkeypatch, no_process_group_is_left, name, length, own_kernels):
    """The bytes of the floating-point tensors saved for the backward pass are exact.

    With this project's kernels (stand-ins that compute nothing here) the peak of a micro-batch's forward and backward
    pass is compared as well.
    """
    layout, stage = replace(REAL[name][0], seq_length=length), REAL[name][1]
    engine = Engine(transformer_engine=False, own_kernels=own_kernels)
    changes = {"TP beyond the groups": dict(num_query_groups=2), "query and key norms": dict(qk_norm=True)}
    changes |= dict.fromkeys(("CP 8", "CP and full", "CP and core_attn"), dict(num_query_groups=8))
    few = dict(lora=Lora(rank=4, targets=("q_proj", "v_proj"), embeddings=False, norms=False))
    changes |= dict.fromkeys(("LoRA, few", "LoRA, few, mlp"), few)
    is_nf4 = name == "LoRA, NF4"
    with_lora = dict(lora=Lora(rank=4, nf4=is_nf4)) if name.startswith("LoRA") else {}
    model = replace(SMALL, **changes.get(name, with_lora))
    if is_nf4:
        pytest.importorskip("torchao")
    net = build(monkeypatch, model, layout, stage, own_kernels)
    whole = parameters(model, layout, stage) + adapter_parameters(model, layout, stage)
    packed = [module.packed for module in net.modules() if isinstance(module, Nf4Weight)]
    assert sum(p.numel() for p in [*net.parameters(), *packed]) == whole
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert trained == trained_parameters(model, layout, stage)
    saved, peak = run(monkeypatch, net, model, layout, stage)
    layers = planned.stage_layers(model, layout)[stage]
    expected = planned.saved_by_layers(model, layout, engine, layers) + planned.angle_bytes(model, layout)
    if stage == layout.pipeline - 1:
        expected += sum(planned.saved_at_loss(model, layout, engine).values())
    assert saved == expected
    if own_kernels:
        one = replace(layout, global_batch=layout.micro_batch)  # one micro-batch in flight
        predicted = planned._stage(model, one, engine, stage)
        held = [x for each in packed for x in (getattr(each, name) for name in each.__tensor_flatten__()[0])]
        assert sum(x.nbytes for x in [*net.parameters(), *held]) == pytest.approx(predicted.parameters, rel=0.01)
        gathered = predicted.buffers - planned.WORKSPACE
        total = predicted.activations + predicted.loss + predicted.working + gathered
        assert peak == pytest.approx(total, rel=0.01)


@pytest.fixture
def no_process_group_is_left():
    yield
    leave_process_group()


def build(monkeypatch, model: Model, layout: Layout, stage: int, own_kernels: bool):
    """Build one rank's part of the real model in bf16, with collectives that do nothing."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    from megatron_cream.model.attention import SdpaCoreAttention, choose_backend
    from megatron_cream.model.kernels import support
    from megatron_cream.model.llama import LlamaModelBuilder, LlamaModelConfig
    from megatron_cream.model.lora_settings import LoraSettings

    start(layout)
    parallel_state.initialize_model_parallel(
        layout.tensor, layout.pipeline, context_parallel_size=layout.context, create_gloo_process_groups=False
    )
    model_parallel_cuda_manual_seed(1)
    monkeypatch.setattr(support, "can_use_kernels", lambda x: own_kernels)
    if own_kernels:
        triton = pytest.importorskip("triton")
        from megatron_cream.model.kernels import cross_entropy, nf4, rotary, swiglu

        for module in (cross_entropy, nf4, rotary, swiglu):
            for kernel in (name for name, value in vars(module).items() if isinstance(value, triton.JITFunction)):
                monkeypatch.setattr(module, kernel, Launched())
    # Save the tensors that GPU kernels save; torch's CPU fallbacks save others.
    monkeypatch.setattr(torch.nn.functional, "rms_norm", lambda x, shape, weight, eps: Norm.apply(x, weight))
    if layout.context > 1:
        monkeypatch.setattr(SdpaCoreAttention, "attend", lambda self, q, k, v: Attention.apply(q, k, v))
    recompute = {}
    if layout.recompute != "none":
        full = layout.recompute == "full"
        recompute = dict(
            recompute_granularity=layout.recompute,
            recompute_modules=list(layout.recompute_modules),
            recompute_method=layout.recompute_method if full else None,
            recompute_num_layers=layout.recompute_layers if full else None,
            distribute_saved_activations=layout.scatter_saved,
        )
    config = TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        qk_layernorm=model.qk_norm,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        bias_activation_fusion=not own_kernels,
        use_te_activation_func=own_kernels,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        sequence_parallel=layout.sequence_parallel,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        bf16=True,
        **recompute,
    )
    lora = None
    if model.lora is not None:
        trained = ("embeddings",) * model.lora.embeddings + ("norms",) * model.lora.norms
        base = "nf4" if model.lora.nf4 else "model"
        lora = LoraSettings(rank=model.lora.rank, alpha=8, targets=model.lora.targets, trained=trained, base_dtype=base)
    llama = LlamaModelConfig(
        transformer=config,
        vocab_size=model.padded_vocab_size,
        should_pad_vocab=False,
        share_embeddings_and_output_weights=model.tied,
        position_embedding_type="none",
        rotary_base=10000,
        rope_scaling_config=None,
        rope_max_positions=512,
        real_vocab_size=model.padded_vocab_size,
        attention=choose_backend("sdpa", has_cuda=False, half=True),
        lora=lora,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    ends = dict(pre_process=stage == 0, post_process=stage == layout.pipeline - 1)
    return LlamaModelBuilder(llama).build_model(groups, **ends).bfloat16()


def start(layout: Layout) -> None:
    """Initialize rank 0 of a process group whose other ranks do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=layout.gpus)


class Allocations(TorchDispatchMode):
    """Counter of the bytes of all live tensors created while it is active."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage)
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return result

    def add(self, nbytes: int) -> None:
        self.now += nbytes
        self.peak = max(self.peak, self.now)


def run(monkeypatch, net, model: Model, layout: Layout, stage: int) -> tuple[int, int]:
    """Return the bytes of floating-point tensors saved for the backward pass, and the peak of both passes."""
    samples, length = layout.micro_batch, layout.seq_length // layout.context
    tokens = torch.randint(0, model.padded_vocab_size, (samples, length))
    positions = torch.arange(length).expand(samples, -1).contiguous()
    between = length // layout.tensor if layout.sequence_parallel else length
    shape = (between, samples, model.hidden_size)
    for parameter in (p for p in net.parameters() if p.requires_grad):  # like Megatron's hook, which frees it
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    kept: list[torch.Tensor] = []
    pack = context_parallel._Regather.pack

    def keep(again, tensor):  # this class has its own hooks, hidden from the ones below
        packed = pack(again, tensor)
        kept.extend([packed] if packed is tensor else [])
        return packed

    monkeypatch.setattr(context_parallel._Regather, "pack", keep)
    allocations = Allocations()
    for parameter in net.parameters():
        allocations.known.add(parameter.untyped_storage())
    with allocations:
        if stage > 0:
            net.set_input_tensor(torch.empty(shape, dtype=torch.bfloat16).requires_grad_())
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda x: x):
            out = net(tokens, positions, None, labels=tokens)
        own = {p.untyped_storage().data_ptr() for p in net.parameters()}
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept if t.is_floating_point()}
        kept.clear()
        out.backward(torch.ones_like(out))
    return sum(nbytes for pointer, nbytes in storages.items() if pointer not in own), allocations.peak


@pytest.mark.parametrize("distributed", [True, False])
def test_gradients_and_optimizer(monkeypatch, no_process_group_is_left, distributed):
    """Predictions match Megatron's gradient buffers and optimizer state after a step on four data-parallel ranks."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    layout = replace(BASE, data=4, distributed_optimizer=distributed)
    net = build(monkeypatch, SMALL, layout, 0, own_kernels=False)
    options = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=distributed)
    chunk = DistributedDataParallel(net.config, options, net)
    config = OptimizerConfig(
        optimizer="adam",
        lr=1e-4,
        bf16=True,
        params_dtype=torch.bfloat16,
        clip_grad=1.0,
        use_distributed_optimizer=distributed,
    )
    optimizer = get_megatron_optimizer(config, [chunk], use_gloo_process_groups=False)
    for parameter in net.parameters():
        parameter.main_grad.fill_(0.01)
    optimizer.step()
    inner = optimizer.chained_optimizers[0].optimizer
    masters = [p for group in inner.param_groups for p in group["params"]]
    states = [x for state in inner.state.values() for x in state.values() if torch.is_tensor(x) and x.dim()]
    held = sum(
        x.untyped_storage().nbytes() for x in {x.untyped_storage().data_ptr(): x for x in masters + states}.values()
    )
    predicted = predict(SMALL, layout, Engine(transformer_engine=False))
    assert held == pytest.approx(predicted.optimizer, rel=0.01)  # buckets are padded
    gradients = {
        p.main_grad.untyped_storage().data_ptr(): p.main_grad.untyped_storage().nbytes() for p in net.parameters()
    }
    assert sum(gradients.values()) == pytest.approx(predicted.gradients, rel=0.01)
    assert sum(p.numel() * p.element_size() for p in net.parameters()) == predicted.parameters


@pytest.mark.parametrize(
    "pipeline, virtual, micro_batches, group",
    [(2, 1, 8, None), (4, 1, 8, None), (8, 1, 4, None), (4, 2, 8, None), (2, 4, 4, None), (4, 2, 16, 8), (2, 4, 8, 3)],
)
def test_micro_batches_in_flight_as_in_megatrons_schedules(pipeline, virtual, micro_batches, group):
    from types import SimpleNamespace

    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

    layout = replace(
        BASE, pipeline=pipeline, virtual_pipeline=virtual, global_batch=2 * micro_batches, micro_batch_group=group
    )
    for stage in range(pipeline):
        ranks = SimpleNamespace(size=lambda: pipeline, rank=lambda stage=stage: stage)
        steps = SimpleNamespace(pp_group=ranks, virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None)
        total, _, warmup, remaining = get_pp_rank_microbatches(
            micro_batches, virtual, group or pipeline, p2p_communicator=steps
        )
        assert in_flight(layout, stage) * virtual == min(warmup + 1, total)


# Sizes of real models.


def test_llama2_7b():
    """The number of parameters equals that of Touvron et al. 2023 and of the model's files."""
    assert parameters(LLAMA2_7B, BASE, 0) == 6_738_415_616
    assert predict(LLAMA2_7B, BASE, Engine(transformer_engine=True)).optimizer == 12 * 6_738_415_616


@pytest.mark.parametrize(
    "config, changes",
    [
        (LlamaConfig(tie_word_embeddings=True, num_key_value_heads=2), dict(tied=True)),
        (Qwen2Config(tie_word_embeddings=False, num_key_value_heads=2), dict(qkv_bias=True)),
        (Qwen3Config(tie_word_embeddings=False, num_key_value_heads=2, head_dim=24), dict(qk_norm=True)),
    ],
    ids=["tied", "biases", "query and key norms"],
)
def test_parameters_of_transformers_models(config, changes):
    config.update(
        dict(num_hidden_layers=4, hidden_size=64, intermediate_size=96, num_attention_heads=4, vocab_size=256)
    )
    head_dim = getattr(config, "head_dim", None) or 16
    if not isinstance(config, Qwen3Config):
        head_dim = config.head_dim = 16
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config)
    model = Model(
        num_layers=4,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=head_dim,
        padded_vocab_size=256,
        **changes,
    )
    count = sum(p.numel() for p in theirs.parameters())
    assert parameters(model, BASE, 0) == count
    stages = replace(BASE, pipeline=2)
    copy = 256 * 64 if model.tied else 0  # the embedding is copied on the last stage
    assert sum(parameters(model, stages, stage) for stage in (0, 1)) == count + copy
