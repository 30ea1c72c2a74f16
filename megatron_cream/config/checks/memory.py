"""Checks of the flags that save GPU memory: recompute of single modules, offload to the host."""

from argparse import Namespace

from megatron_cream.common.cli import to_flag
from megatron_cream.common.errors import UsageError

RECOMPUTED = ("core_attn", "layernorm", "mlp")
"""Modules of a dense Llama that --recompute-modules can name; Megatron also accepts others, which have no effect."""

OFFLOADED = ("attn_norm", "attn_proj", "core_attn", "mlp_norm", "qkv_linear")
"""The same for --offload-modules."""


def check_each(args: Namespace, has_cuda: bool) -> None:
    """Raise UsageError for a flag that would have no effect, or that this machine cannot run.

    Args:
        args: the parsed flags.
        has_cuda: whether the run has GPUs.
    """
    _check_names("--recompute-modules", args.recompute_modules, RECOMPUTED)
    _check_names("--offload-modules", args.offload_modules, OFFLOADED)
    selective = args.recompute_granularity == "selective" or args.recompute_activations
    if args.recompute_modules and not selective:
        modules = " ".join(args.recompute_modules)
        raise UsageError(f"--recompute-modules {modules}: only with --recompute-granularity selective; add it")
    if args.offload_modules and not args.fine_grained_activation_offloading:
        modules = " ".join(args.offload_modules)
        raise UsageError(f"--offload-modules {modules}: only with --fine-grained-activation-offloading; add it")
    if "attn_proj" in (args.offload_modules or []) and "core_attn" not in args.offload_modules:
        raise UsageError("--offload-modules attn_proj: needs core_attn too, whose output is its input; add core_attn")
    if args.optimizer_cpu_offload:
        _check_optimizer_offload(args, has_cuda)


def _check_names(flag: str, names: list[str] | None, known: tuple[str, ...]) -> None:
    for name in names or []:
        if name not in known:
            raise UsageError(f"{flag} {name}: choose from {', '.join(known)}")


def _check_optimizer_offload(args: Namespace, has_cuda: bool) -> None:
    """Raise UsageError if Megatron's HybridDeviceOptimizer cannot run.

    It offloads CUDA tensors only: on a CPU its maps of parameters stay empty, and its first step fails.
    """
    if not has_cuda:
        raise UsageError("--optimizer-cpu-offload: needs a GPU, and this machine has none; leave it out")
    for name in ("use_precision_aware_optimizer", "use_distributed_optimizer"):
        if not getattr(args, name):
            raise UsageError(f"--optimizer-cpu-offload: needs {to_flag(name)}; add it")
