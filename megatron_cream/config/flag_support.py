"""Tables of how far this project supports each flag of --help.

Every flag is in exactly one of three tables. TESTED flags work, and the named test runs them. UNTESTED flags are passed
on to Megatron, and no test here runs them. REJECTED flags end the run with one line that gives the reason. Names are
without leading dashes; `*` stands for any text. docs/make_flags.py generates docs/flags.md from these tables.
"""

import argparse
import fnmatch
import re
from typing import Any, NamedTuple

from megatron_cream.common.errors import UsageError


class Support(NamedTuple):
    """The support of one flag.

    kind: "tested", "untested" or "rejected".
    note: the test's file, why no test runs it, or why it is rejected.
    """

    kind: str
    note: str


# {test file: flags that it runs}
TESTED = {
    "config/test_parse.py": """
        config print-config num-layers hidden-size num-attention-heads num-query-groups group-query-attention
        seq-length micro-batch-size global-batch-size target-length position-sampler cream-sigma cream-variant
        no-overlap-grad-reduce no-overlap-param-gather rope-scaling-factor""",
    "training/test_parallel.py": """
        tensor-model-parallel-size pipeline-model-parallel-size context-parallel-size sequence-parallel
        use-distributed-optimizer overlap-grad-reduce overlap-param-gather ddp-num-buckets recompute-granularity
        recompute-method recompute-num-layers recompute-modules attention-backend eval-micro-batch-size ckpt-step save
        load save-interval pretrained-checkpoint fp32 train-iters eval-iters data-path split short-data-path short-share
        long-min-tokens""",
    "config/test_flag_support.py": """
        no-initialization cross-entropy-loss-fusion deterministic-mode no-masked-softmax-fusion no-bias-gelu-fusion
        no-bias-swiglu-fusion no-bias-dropout-fusion no-rope-fusion no-persist-layer-norm
        no-gradient-accumulation-fusion mlp-chunks-for-training recompute-activations norm-epsilon add-qkv-bias
        qk-layernorm init-method-std embedding-init-method-std rotary-base hidden-dropout
        attention-dropout weight-decay apply-wd-to-qk-layernorm clip-grad adam-beta1 adam-beta2 adam-eps optimizer
        sgd-momentum start-weight-decay end-weight-decay weight-decay-incr-style lr lr-decay-style lr-decay-iters
        lr-wsd-decay-style lr-wsd-decay-iters lr-warmup-fraction lr-warmup-iters lr-warmup-init min-lr decoupled-lr
        decoupled-min-lr manual-gc manual-gc-interval no-manual-gc-eval train-sync-interval empty-unused-memory-level
        dataloader-type log-params-norm log-throughput log-num-zeros-in-grad log-timers-to-tensorboard
        no-log-loss-scale-to-tensorboard log-validation-ppl-to-tensorboard log-world-size-to-tensorboard
        timing-log-level timing-log-option no-barrier-with-level-1-timing tensorboard-queue-size
        tensorboard-log-interval logging-level no-mmap-bin-files num-dataset-builder-threads eod-mask-loss
        no-create-attention-mask-in-dataloader no-one-logger disable-jit-fuser kv-channels
        decoder-first-pipeline-num-layers decoder-last-pipeline-num-layers pipeline-model-parallel-layout
        account-for-embedding-in-pipeline-split account-for-loss-in-pipeline-split use-tp-pp-dp-mapping
        ddp-bucket-size no-align-grad-reduce accumulate-allreduce-grads-in-fp32 start-eval-at-iter eval-interval
        eval-global-batch-size train-samples lr-decay-samples lr-warmup-samples exit-interval iterations-to-skip
        cream-relativity vocab-size log-interval swiglu untie-embeddings-and-output-weights exit-signal-handler
        cross-entropy-fusion-impl position-embedding-type position-mix cream-middle pose-chunks use-mcore-models
        enable-experimental exit-signal-handler-for-dataloader disable-msc no-check-for-nan-in-loss-and-grad
        exit-duration-in-mins decrease-batch-size-if-needed check-for-large-grads check-for-spiky-loss
        check-weight-hash-across-dp-replicas-interval ddp-pad-buckets-for-high-nccl-busbw""",
    "model/test_llama.py": "disable-bias-linear use-cpu-initialization make-vocab-size-divisible-by",
    "model/test_lora.py": "lora-targets lora-train lora-dropout",
    "training/test_lora_runs.py": """
        lora-rank lora-alpha lora-rslora lora-plus-ratio lora-base-dtype load-adapter adapter""",
    "optimizer/test_one_pass.py": "bf16 tensorboard-dir",
    "training/test_gpu.py": "cuda-graph-impl te-rng-tracker cp-comm-type optimizer-cpu-offload",
    "training/test_gpu_memory.py": "fine-grained-activation-offloading offload-modules min-offloaded-tensor-size",
    "checkpoint/test_pretrained.py": "load-hf save-hf ffn-hidden-size rope-scaling-type",
    "model/test_rope_scaling.py": "original-max-position-embeddings",
    "checkpoint/test_convert.py": "max-position-embeddings",
    "checkpoint/test_after_save.py": "async-save save-retain-interval most-recent-k save-hook save-hook-minutes",
    "training/test_faults.py": "timeout-minutes signal-exit-code no-save-optim no-load-optim no-load-rng",
    "config/test_bad_inputs.py": "seed no-checkpoint-checksums",
    "config/test_bad_data.py": "train-data-path valid-data-path data-args-path per-split-data-args-path",
    "data/test_data_cache.py": "data-cache-path",
    "data/test_dataset.py": "mask-segment-starts num-workers",
    "data/test_chat_data.py": "tokenizer-type tokenizer-model chat-loss",
    "training/test_determinism.py": "deterministic",
    "optimizer/test_finite.py": "nan-policy",
    "evaluation/test_perplexity.py": "eval-lengths eval-documents num-layers-per-virtual-pipeline-stage",
    "training/test_default_run.py": "embedded-data",
    "evaluation/test_long_evaluation_runs.py": """
        long-eval-interval long-eval-tasks long-eval-lengths long-eval-samples long-eval-share console skip-train""",
    "evaluation/test_long_evaluation.py": "long-eval-best",
}

# {why no test runs these flags, or what they need: flags that are passed on to Megatron}
UNTESTED = {
    "needs a GPU; no GPU test sets it": """
        fp16 loss-scale initial-loss-scale min-loss-scale loss-scale-window hysteresis fp16-lm-cross-entropy
        grad-reduce-in-bf16 attention-softmax-in-fp32 apply-query-key-layer-scaling fp32-residual-connection
        disable-bf16-reduced-precision-matmul distributed-backend record-memory-history memory-snapshot-path profile
        record-shapes nvtx-ranges log-memory-to-tensorboard log-memory-interval log-device-memory-used log-energy
        gpu-sniff-test-interval flash-attention-version optimizer-offload-fraction
        use-torch-optimizer-for-cpu-offload overlap-cpu-optimizer-d2h-h2d no-pin-cpu-grads no-pin-cpu-params
        optimizer-cuda-graph cuda-graph-warmup-steps cuda-graph-modules cuda-graph-scope batch-invariant-mode""",
    "needs Transformer Engine's layers and a GPU": """
        fp8-* first-last-layers-bf16 num-layers-at-start-in-bf16 num-layers-at-end-in-bf16 fp4-* no-fp8-wgrad
        te-precision-config-file fused-residual-rmsnorm use-transformer-engine-op-fuser delay-wgrad-compute
        fine-grained-offloading-* delay-offload-until-cuda-graph
        delta-offload-bytes-across-pp-ranks activation-offload-fraction cpu-offloading-*
        reuse-grad-buf-for-mxfp8-param-ag symmetric-ar-type log-max-attention-logit use-precision-aware-optimizer
        main-grads-dtype main-params-dtype exp-avg-dtype exp-avg-sq-dtype tp-comm-* no-tp-comm-*
        hierarchical-context-parallel-sizes use-grouped-gemm-for-dense-mlp use-te-activation-func""",
    "only tools/plan.py reads it; training follows --attention-backend": "transformer-impl",
    "configures NCCL, on GPUs": """
        nccl-communicator-config-path use-sharp sharp-enabled-group high-priority-stream-groups distributed-timeout-*
        flight-recorder-* no-flight-recorder-* use-nccl-ub disable-symmetric-registration create-all-gather-group
        ddp-reduce-scatter-with-fp32-accumulation ddp-param-name-patterns-for-fp32-local-accumulation
        ddp-average-in-collective no-gradient-reduce-div-fusion num-distributed-optimizer-instances
        disable-gloo-process-groups use-ring-exchange-p2p""",
    "tunes pipeline and tensor parallelism": """
        defer-embedding-wgrad-compute wgrad-deferral-limit overlap-p2p-communication-warmup-flush
        microbatch-group-size-per-virtual-pipeline-stage no-overlap-p2p-communication no-align-param-gather
        overlap-param-gather-with-optimizer-step distribute-saved-activations no-clone-scatter-output-in-embedding
        tensor-parallel-num-weight-shards no-use-layer-wise-param-layout""",
    "needs a package that no test installs": """
        muon-* lion-* log-straggler straggler-* disable-straggler-on-startup wandb-* one-logger-* app-tag-*
        run-workload-inspector-server enable-msc pytorch-profiler-collect-chakra""",
    "run by hand, for two steps of a small model": """
        num-virtual-stages-per-pipeline-rank use-pytorch-profiler profile-step-start profile-step-end profile-ranks
        pytorch-profiler-collect-shapes pytorch-profiler-collect-callstack data-parallel-random-init
        inference-rng-tracker result-rejected-tracker-filename exit-signal-handler-for-training lazy-mpu-init
        null-tokenizer-eod-id null-tokenizer-pad-id local-rank""",
    "changes how Megatron writes and reads checkpoints": """
        finetune use-checkpoint-args use-mp-args-from-checkpoint-args no-use-tokenizer-model-from-checkpoint-args
        exit-on-missing-checkpoint load-main-params-from-ckpt auto-detect-ckpt-format ckpt-convert-*
        no-ckpt-fully-parallel-save use-persistent-ckpt-worker async-ckpt-* ckpt-fully-parallel-load*
        ckpt-fully-parallel-save-process-group ckpt-assume-constant-structure no-ckpt-load-validate-sharding-integrity
        dist-ckpt-strictness dist-ckpt-save-pre-mcore-014 dist-ckpt-optim-fully-reshardable
        no-dist-ckpt-optim-fully-reshardable distrib-optim-fully-reshardable-mem-efficient verify-integrity
        no-stream-ckpt-dequant no-save-rng override-ckpt-iteration dist-ckpt-workers save-params-interval
        save-activations-interval save-wgrads-interval save-dgrads-interval override-opt_param-scheduler
        use-checkpoint-opt_param-scheduler log-progress async-strategy ckpt-format""",
    "passed on to Megatron unchanged": """
        calculate-per-token-loss exit-signal step-batch-size-schedule lr-wsd-decay-samples no-weight-decay-cond-type
        dump-param-to-param-group-map test-data-path multiple-validation-sets full-validation validation-set-names
        phase-transition-iterations padded-vocab-size no-pad-vocab-size vocab-file merge-file tokenizer-metadata
        tokenizer-special-tokens tokenizer-sentencepiece-legacy tokenizer-hf-* no-tokenizer-* tiktoken-* chat-template
        error-injection-* rerun-mode fault-injector-* fake-process-group""",
}

# {reason in the error message: flags}
REJECTED = {
    # Flags that have a replacement here.
    "use --rope-scaling-type llama3": "use-rope-scaling",
    "use --rope-scaling-type linear": "rotary-seq-len-interpolation-factor",
    "use --rope-scaling-type yarn": "yarn-* no-yarn-correction-range-round-to-int rope-type",
    "use --position-sampler, which sets position ids": "reset-position-ids",
    "use --short-data-path, which packs documents and keeps attention within each": """
        reset-attention-mask dataloader-inter-document-masking""",
    "use --attention-backend, which chooses the layer spec": "spec use-flash-attn",
    "use --config": "yaml-cfg",
    "use tools/preprocess_data.py and --data-path": "sft sft-tokenizer-prompt-format",
    "use --embedded-data": "mock-data",
    "use torchrun --max-restarts": "inprocess-*",
    "use --timeout-minutes and torchrun --max-restarts": "enable-ft-package calc-ft-timeouts ft-num-warmup-iters",
    "use --save-interval": "non-persistent-* replication replication-jump replication-factor",
    "use --cuda-graph-impl local": "enable-cuda-graph",
    "use --cuda-graph-impl local; this one cannot replay position ids that change": "external-cuda-graph",
    "use a tokenizer without custom code": "trust-remote-code",
    "use --use-distributed-optimizer; this project's optimizer and checkpoints are not tested with FSDP": """
        use-megatron-fsdp use-torch-fsdp2 torch-fsdp2-no-reshard-after-forward megatron-fsdp-* fsdp-*
        data-parallel-sharding-strategy outer-dp-sharding-strategy suggested-communication-unit-size
        keep-fp8-transpose-cache enable-full-sharding-in-hsdp no-strict-fsdp-dtensor-load""",
    "it works only with Megatron's FSDP, which is not supported here; use --no-initialization": """
        init-model-with-meta-device""",
    "use --context-parallel-size; samples here have one length": "hybrid-context-parallel max-seqlen-per-dp-cp-rank",
    "use --save and --most-recent-k; this is an obsolete flag of Megatron": """
        use-dist-ckpt dist-ckpt-format ckpt-fully-parallel-save""",
    "use --micro-batch-size": "batch-size",
    "use --lr-warmup-iters or --lr-warmup-fraction": "warmup",
    "use --tensor-model-parallel-size": "model-parallel-size",
    "use --recompute-granularity": "checkpoint-activations",
    "megatron-core 0.19 no longer reads it": "rampup-batch-size",
    "use tools/evaluate.py, which generates text": """
        inference-dynamic-* inference-batch-* inference-max-* inference-cuda-* inference-fuse-* inference-disable-*
        inference-grouped-* inference-moe-* inference-logging-* inference-text-* inference-wandb-*
        inference-coordinator-port inference-use-* inference-shards max-tokens-to-oom use-legacy-static-engine
        decode-only-cuda-graphs enable-chunked-prefill num-speculative-tokens flash-decode mlp-chunks-for-prefill
        nccl-all-reduce-for-prefill use-same-sampling-seed-across-dp-ranks""",
    "use --data-path; this project's data set does not read it": """
        per-dataset-sequences-path dataloader-fast-cache-load dataloader-defer-npy-index-mmap
        object-storage-cache-path mid-level-dataset-surplus allow-ambiguous-pad-tokens fim-*""",
    "use --seq-length and --num-layers; this is for encoders and decoders": """
        encoder-seq-length decoder-seq-length encoder-num-layers decoder-num-layers""",
    # Features that a Llama does not have.
    "Llama's rotary embedding rotates the two halves of a head, with the same angles in every layer": """
        rotary-interleaved no-rope-freq mrope-section rotary-percent""",
    "Llama's positions are rotary": """
        no-position-embedding use-rotary-position-embeddings relative-attention-num-buckets
        relative-attention-max-distance""",
    "Llama's MLP is SwiGLU": """
        openai-gelu squared-relu quick-geglu glu-linear-offset activation-func-clamp-value
        use-fused-weighted-squared-relu""",
    "Llama's layers apply RMSNorm with plain weights before attention and MLP": """
        apply-residual-connection-post-layernorm apply-layernorm-1p qk-l2-norm normalization""",
    "Llama's attention is a plain softmax over the whole context": """
        softmax-type window-size window-attn-skip-freq attention-output-gate qk-clip qk-clip-alpha qk-clip-threshold
        use-kitchen-attention kitchen-attention-backend""",
    "Llama's attention is grouped-query attention": """
        multi-latent-attention experimental-attention-variant dsa-* no-dsa-* linear-* q-lora-rank kv-lora-rank
        qk-head-dim qk-pos-emb-head-dim v-head-dim rotary-scaling-factor mscale mscale-all-dim cache-mla-latents
        mla-down-proj-fusion""",
    "Llama and its config.json have no muP multipliers": "use-mup mup-*",
    "Llama predicts one token ahead": "mtp-*",
    "this project's Llama is dense: it has no experts": """
        num-experts moe-* expert-* overlap-moe-expert-parallel-comm overlap-dispatch-backward-with-experts-wgrad
        ep-overlap-early-attn-memory-release high-priority-a2a-comm-stream use-grouped-gemm-for-shared-expert
        save-tokens-per-expert-interval""",
    "this project's model is a Llama, without Mamba or other types of layers": """
        mamba-* disable-mamba-mem-eff-path is-hybrid-model hybrid-layer-pattern hybrid-override-pattern
        heterogeneous-*""",
    "this is for reinforcement learning, which this project does not have": """
        rl-* grpo-* perform-rl-step langrl-* refit-method""",
    "this is for distillation, which this project does not have": "logits-*",
    "this is for BERT, T5 and retrieval": """
        bert-* mask-prob short-seq-prob sample-rate vocab-extra-ids output-bert-embeddings ict-* biencoder-*
        titles-data-path query-in-block-prob use-one-sent-docs evidence-data-path retriever-* block-data-path
        embedding-path indexer-*""",
    "this is for vision": """
        num-classes img-h img-w num-channels patch-dim classes-fraction data-per-class-fraction no-data-sharding
        head-lr-mult vision-* swin-backbone-type mask-type mask-factor iter-per-epoch dino-*""",
    # Flags that break the run or do nothing.
    "it freezes every weight, so nothing is trained; use --skip-train": "freeze-all-layers",
    "megatron-core 0.19 cannot write it, because it copies process groups": "config-logger-dir",
    "use NCCL, the default": "pipeline-model-parallel-comm-backend",
    "it needs a package that only NVIDIA's own clusters have": "adlr-*",
    "megatron-core 0.19 fails, because it sets a field that its configuration does not have": """
        init-method-xavier-uniform""",
    "only Megatron's own tests use it": "test-mode",
    "this is for export to ONNX, which this project does not have": "onnx-safe",
}


def sort_flags(parser: argparse.ArgumentParser) -> dict[str, Support]:
    """Return {flag: support} for all flags of the parser, by their first name without dashes.

    Raises:
        ValueError: a flag is in no table or in several, or an entry matches no flag.
    """
    entries = [
        (Support(kind, note), pattern)
        for kind, table in (("tested", TESTED), ("untested", UNTESTED), ("rejected", REJECTED))
        for note, patterns in table.items()
        for pattern in patterns.split()
    ]
    names = [name_of(action) for action in parser._actions if action.dest != "help"]
    found: dict[str, Support] = {}
    for support, pattern in entries:
        matches = fnmatch.filter(names, pattern)
        if not matches:
            raise ValueError(f"{pattern} matches no flag")
        if duplicates := found.keys() & set(matches):
            raise ValueError(f"{pattern}: {', '.join(sorted(duplicates))} is in the tables already")
        found |= dict.fromkeys(matches, support)
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"not sorted: {' '.join(missing)}")
    return found


def name_of(action: argparse.Action) -> str:
    """Return the first name of a flag, without its dashes."""
    return action.option_strings[0].removeprefix("--")


def reject_when_parsing(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Make `parser.parse_args` raise UsageError for a rejected flag with a non-default value.

    Returns: the values of a command line without flags.
    """
    names = {action: name_of(action) for action in parser._actions if action.option_strings}
    rejected = {}
    for reason, patterns in REJECTED.items():
        matches = re.compile("|".join(map(fnmatch.translate, patterns.split()))).match  # 100 times faster than fnmatch
        rejected |= {action: reason for action, name in names.items() if matches(name)}
    parse_args = parser.parse_args
    defaults = parse_args([])

    def parse(*args, **kwargs) -> argparse.Namespace:
        parsed = parse_args(*args, **kwargs)
        for action, reason in rejected.items():
            value = getattr(parsed, action.dest)
            if value != getattr(defaults, action.dest) and action.const in (None, value):
                raise UsageError(f"{_format_flag(action, value)}: not supported here; {reason}")
        return parsed

    parser.parse_args = parse
    return defaults


def _format_flag(action: argparse.Action, value: Any) -> str:
    """Return the flag and its value as a user would write them."""
    words = [action.option_strings[0]]
    if action.nargs != 0:
        words += map(str, value) if isinstance(value, list) else [str(value)]
    return " ".join(words)
