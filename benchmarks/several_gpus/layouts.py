"""The layouts that two_gpus.sh, four_gpus.sh and eight_gpus.sh run, by the number of GPUs, and the flags of each run."""

from dataclasses import dataclass

TP = {n: f"--tensor-model-parallel-size {n} --sequence-parallel" for n in (2, 4, 8)}
PP = {n: f"--pipeline-model-parallel-size {n}" for n in (2, 4, 8)}
CP = {n: f"--context-parallel-size {n}" for n in (2, 4, 8)}
DISTRIBUTED = "--use-distributed-optimizer"
OVERLAP = "--overlap-grad-reduce --overlap-param-gather"
NO_OVERLAP = "--no-overlap-grad-reduce --no-overlap-param-gather"
INTERLEAVED = "--num-layers-per-virtual-pipeline-stage 1"
"""Each pipeline stage has layers from several places of the model, so that it waits less."""
USER_BUFFERS = "--tp-comm-overlap"
RINGS = "--tp-comm-overlap-cfg megatron_cream/model/user_buffers.yaml --tp-comm-overlap-rs-dgrad"

# ---------------------------------------------------------------- losses

SMALL = (
    "--num-layers 4 --hidden-size 512 --ffn-hidden-size 1376 --num-attention-heads 8 --seq-length 512 "
    "--target-length 4096 --rope-scaling-type linear --micro-batch-size 1 --global-batch-size 8 --lr 3e-4 "
    "--embedded-data --eval-iters 0 --num-workers 1 --seed 7 --cuda-graph-impl none"
)
ONE = {"one": (1, ""), "one, micro-batch 4": (1, "--micro-batch-size 4")}
PARITY = {
    2: {
        "tp2": (2, "--tensor-model-parallel-size 2"),
        "tp2-sp": (2, TP[2]),
        "pp2": (2, PP[2]),
        "cp2": (2, f"{CP[2]} {DISTRIBUTED}"),
        "dp2": (2, f"{DISTRIBUTED} --no-overlap-grad-reduce"),
        "dp2, overlap": (2, f"{DISTRIBUTED} {OVERLAP}"),
    },
    4: {
        "tp4": (4, TP[4]),
        "pp4": (4, PP[4]),
        "cp4": (4, f"{CP[4]} {DISTRIBUTED}"),
        "dp4": (4, f"{DISTRIBUTED} {OVERLAP}"),
        "tp2 x pp2": (4, f"{TP[2]} {PP[2]}"),
        "tp2 x cp2": (4, f"{TP[2]} {CP[2]} {DISTRIBUTED}"),
        "tp2 x dp2": (4, f"{TP[2]} {DISTRIBUTED}"),
        "pp2 x cp2": (4, f"{PP[2]} {CP[2]} {DISTRIBUTED}"),
        "pp2 x dp2": (4, f"{PP[2]} {DISTRIBUTED}"),
        "cp2 x dp2": (4, f"{CP[2]} {DISTRIBUTED}"),
        "pp2 x dp2, interleaved": (4, f"{PP[2]} {DISTRIBUTED} {INTERLEAVED}"),
    },
    8: {
        "tp8": (8, TP[8]),
        "tp4 x dp2": (8, f"{TP[4]} {DISTRIBUTED}"),
        "tp2 x pp2 x dp2": (8, f"{TP[2]} {PP[2]} {DISTRIBUTED}"),
        "cp8": (8, f"{CP[8]} {DISTRIBUTED}"),
        "dp8": (8, f"{DISTRIBUTED} {OVERLAP}"),
    },
}
PRECISIONS = {
    "fp32": "--fp32 --attention-backend sdpa",
    "bf16": "--attention-backend flash",
    "bf16, te": "--attention-backend te",  # with its ring attention; one GPU and context parallelism only
}

# ---------------------------------------------------------------- the 7B

CONFIG = "llama_7b_width"
SEVEN_B = f"--num-layers 32 --micro-batch-size 1 --attention-backend flash --train-iters 5 --eval-iters 0 {DISTRIBUTED}"
MORE_STEPS = "--train-iters 10"
"""Pipeline stages are slower in their first steps."""
FP8 = "--fp8-format hybrid --fp8-recipe delayed --fp8-amax-history-len 16 --fp8-amax-compute-algo max"
BATCH, HALF = "--global-batch-size 32", "--global-batch-size 16"
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
BESIDE = (16, 8)
"""Layers of the one-GPU runs from which the time of the whole model is extrapolated where it does not fit."""
MICRO_BATCHES = (32, 16, 8, 4, 2, 1)


@dataclass(frozen=True)
class Timed:
    """A timed layout.

    name: its key in the results, without the micro-batch.
    flags: besides `SEVEN_B` and the global batch.
    largest: the largest micro-batch; the largest up to it that fits the memory runs. With tensor parallelism a larger
        micro-batch restores the size of each product.
    own_layers: whether Transformer Engine is hidden from the run.
    """

    name: str
    flags: str
    largest: int = 1
    own_layers: bool = False


SPEED = {
    2: [
        Timed("dp2", OVERLAP),
        Timed("tp2-sp, user buffers", f"{TP[2]} {USER_BUFFERS}", 8),
        Timed("pp2", PP[2]),
        Timed("tp2-sp", TP[2]),
        Timed("tp2-sp, CUDA graphs", f"{TP[2]} --cuda-graph-impl local --te-rng-tracker"),
        Timed("dp2, no overlap", NO_OVERLAP),
        Timed("tp2-sp, own layers", f"{TP[2]} --transformer-impl local", 4, own_layers=True),
        Timed("tp2-sp, micro-batches", TP[2], 4),
        Timed("tp2-sp, own layers, micro-batch 1", f"{TP[2]} --transformer-impl local", 1, own_layers=True),
        Timed("dp2, micro-batches", OVERLAP, 2),
    ],
    4: [
        Timed("dp4", OVERLAP),
        Timed("tp2 x dp2", f"{TP[2]} {USER_BUFFERS} {OVERLAP}", 4),
        Timed("pp2 x dp2", f"{PP[2]} {OVERLAP} {MORE_STEPS}"),
        Timed("pp2 x dp2, interleaved", f"{PP[2]} {INTERLEAVED} {OVERLAP} {MORE_STEPS}"),
        Timed("tp2 x dp2, larger", f"{TP[2]} {USER_BUFFERS} {OVERLAP}", 8),
    ],
    8: [
        Timed("dp8", OVERLAP),
        Timed("tp2 x dp4", f"{TP[2]} {USER_BUFFERS} {OVERLAP}", 8),
        Timed("tp8", f"{TP[8]} {USER_BUFFERS}", 32),
        Timed("tp4 x dp2", f"{TP[4]} {USER_BUFFERS} {OVERLAP}", 16),
        Timed("pp4 x dp2, interleaved", f"{PP[4]} {INTERLEAVED} {OVERLAP}"),
        Timed("pp8, interleaved", f"{PP[8]} {INTERLEAVED}"),
    ],
}

MORE = {
    8: [
        Timed("tp2 x pp2 x dp2", f"{TP[2]} {USER_BUFFERS} {PP[2]} {OVERLAP}", 2),
        Timed("tp8, rings", f"{TP[8]} {USER_BUFFERS} {RINGS}", 32),
        Timed("cp8", f"{CP[8]} {OVERLAP}", 8),
    ],
}
"""Layouts of the 7B that run after all else."""

TUNING = [
    # (TP 4, PP 4), which run beside each other if the machine has eight GPUs.
    (
        Timed("tp4, rings", f"{TP[4]} {USER_BUFFERS}", 8),
        Timed("pp4, interleaved by 1", f"{PP[4]} {INTERLEAVED} {MORE_STEPS}"),
    ),
    (
        Timed("tp4, rings, larger", f"{TP[4]} {USER_BUFFERS}", 16),
        Timed("pp4", f"{PP[4]} {MORE_STEPS}"),
    ),
    (
        Timed(
            "tp4, user buffers of Transformer Engine",
            f"{TP[4]} {USER_BUFFERS} --tp-comm-overlap-cfg benchmarks/user_buffers_of_te.yaml",
            8,
        ),
        Timed("pp4, interleaved by 1, larger", f"{PP[4]} {INTERLEAVED} {MORE_STEPS}", 2),
    ),
    (
        Timed("tp4", TP[4], 8),
        Timed("pp4, interleaved by 2", f"{PP[4]} --num-layers-per-virtual-pipeline-stage 2 {MORE_STEPS}"),
    ),
]

LONG = {2: 32768, 4: 131072, 8: 262144}
"""Tokens of a sample of full length, by the number of GPUs."""

SEVENTY_B = (
    "--hidden-size 8192 --ffn-hidden-size 28672 --num-attention-heads 64 --group-query-attention "
    "--num-query-groups 8 --global-batch-size 16"
)
SEVENTY_B_LAYOUTS = {
    2: {"tp2": f"{TP[2]} {USER_BUFFERS} --micro-batch-size 2"},
    4: {
        "tp4": f"{TP[4]} {USER_BUFFERS} --micro-batch-size 2",
        "tp2 x pp2": f"{TP[2]} {PP[2]} {USER_BUFFERS}",
        "tp4, FP8": f"{TP[4]} {USER_BUFFERS} {FP8} --micro-batch-size 2",
        "tp2 x pp2, FP8": f"{TP[2]} {PP[2]} {USER_BUFFERS} {FP8}",
    },
    8: {
        "tp8, rings": f"{TP[8]} {USER_BUFFERS} {RINGS} --micro-batch-size 2",
        "tp8": f"{TP[8]} {USER_BUFFERS} --micro-batch-size 2",
    },
}
LORA = "--lora-rank 16 --lora-alpha 32"
SEVENTY_B_LORA = {
    8: {
        "tp8, LoRA": f"{TP[8]} {LORA} --micro-batch-size 4",
        "tp4 x dp2, LoRA": f"{TP[4]} {OVERLAP} {LORA}",  # as in the recipe llama2_70b_32k_lora_8x80gb
    },
}
"""Layouts of a whole 70B with adapters."""
DEPTHS = (80, 72, 64, 60, 56, 52, 48, 44, 40, 36, 32, 28, 24, 20, 16, 12, 8)


def list_runs() -> list[tuple[int, str]]:
    """Return (GPUs, flags) of all runs that the scripts for four and eight GPUs can start."""
    found = [(1, f"{SEVEN_B} {HALF}"), *((1, f"{SEVEN_B} {HALF} --num-layers {layers}") for layers in BESIDE)]
    for count in (4, 8):
        layouts = [(count, timed) for timed in SPEED[count] + MORE.get(count, [])]
        layouts += [(4, timed) for pair in TUNING for timed in pair]
        found += [(ranks, flags) for ranks, timed in layouts for _, flags in list_sizes(timed)]
        found.append((count, f"{SEVEN_B} --global-batch-size {count} {OVERLAP}"))
        found += [(count, long_flags(count, how[count])) for how in (CP, TP)]
        found += [
            (count, seventy_b_flags(how, layers)) for how in SEVENTY_B_LAYOUTS[count].values() for layers in DEPTHS
        ]
        found += [(count, seventy_b_flags(how, DEPTHS[0])) for how in SEVENTY_B_LORA.get(count, {}).values()]
    return list(dict.fromkeys(found))


def list_sizes(timed: Timed) -> list[tuple[int, str]]:
    """Return (micro-batch, flags) of each micro-batch that may run, largest first."""
    sizes = [size for size in MICRO_BATCHES if size <= timed.largest]
    return [(size, f"{SEVEN_B} {BATCH} {timed.flags} --micro-batch-size {size}") for size in sizes]


def long_flags(count: int, layout: str) -> str:
    tokens = LONG[count]
    sizes = f"--seq-length {tokens} --target-length {tokens} --position-sampler full --global-batch-size 1"
    return f"{SEVEN_B} --train-iters 2 {sizes} {RECOMPUTE} {layout}"


def seventy_b_flags(layout: str, layers: int) -> str:
    return f"{SEVEN_B} --train-iters 4 {SEVENTY_B} {layout} --num-layers {layers}"
