"""Resume with the saved schedule of learning rate and weight decay, or with this run's.

Megatron fails on a schedule that differs from the saved one, unless a flag chooses one of the two. It also finds
the saved optimizer state of a parameter by its group's learning rates, and finds none if they differ. So the learning
rates of the saved groups, or those of this run, have to be changed before.
"""

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from megatron_cream.common.cli import to_flag
from megatron_cream.common.errors import UsageError
from megatron_cream.patches import hooks, registry

_ALWAYS = (
    "lr",
    "min_lr",
    "decoupled_lr",
    "decoupled_min_lr",
    "lr_decay_style",
    "lr_warmup_init",
    "lr_warmup_fraction",
    "lr_wsd_decay_style",
    "weight_decay",
    "weight_decay_incr_style",
)
_LENGTHS = ("lr_decay", "lr_warmup", "lr_wsd_decay")
"""Each is one flag in steps and one in samples; --train-iters or --train-samples of the run decides which."""


def check_schedule(args: Namespace, common: dict[str, Any], checkpoint: str, step: str) -> None:
    """Compare the schedule of these flags with the saved one.

    Args:
        args: Megatron's flags of this run.
        common: Megatron's state beside the tensors.
        checkpoint: flag and folder, for messages.
        step: name of the step folder.

    Raises:
        UsageError: they differ, and no flag chooses one.
    """
    saved = common.get("opt_param_scheduler")
    if args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler or not isinstance(saved, dict):
        return
    for (key, name), value in _schedule_of_flags(args).items():
        if key in saved and saved[key] != value:
            raise UsageError(
                f"{checkpoint}: {to_flag(name)}: {step} was saved with {key} {saved[key]}, but these flags "
                f"set {value}. Give the saved value, or --override-opt-param-scheduler for the schedule of these "
                "flags, or --use-checkpoint-opt-param-scheduler for the saved one."
            )


def _schedule_of_flags(args: Namespace) -> dict[tuple[str, str], Any]:
    """Return {(Megatron's key in a checkpoint, name of the flag): value}."""
    found = {
        ("max_lr", "lr"): args.lr,
        ("min_lr", "min_lr"): args.min_lr,
        ("lr_decay_style", "lr_decay_style"): args.lr_decay_style,
        ("start_wd", "weight_decay"): args.start_weight_decay,
        ("end_wd", "weight_decay"): args.end_weight_decay,
        ("wd_incr_style", "weight_decay_incr_style"): args.weight_decay_incr_style,
    }
    kind, samples = ("iters", args.global_batch_size) if args.train_iters else ("samples", 1)
    total = getattr(args, f"train_{kind}")
    if not total or not samples:
        return found
    decay = getattr(args, f"lr_decay_{kind}") or total
    found["lr_decay_steps", f"lr_decay_{kind}"] = decay * samples
    found["wd_incr_steps", f"train_{kind}"] = total * samples
    if args.lr_warmup_fraction is None:
        found["lr_warmup_steps", f"lr_warmup_{kind}"] = getattr(args, f"lr_warmup_{kind}") * samples
    else:
        found["lr_warmup_steps", "lr_warmup_fraction"] = args.lr_warmup_fraction * (decay * samples)
    return found


def adopt_saved(args: Namespace, saved: Namespace) -> None:
    """Set the schedule flags of `args` to the saved ones."""
    kind = "iters" if args.train_iters else "samples"
    names = [*_ALWAYS, *(f"{name}_{kind}" for name in _LENGTHS if getattr(saved, f"train_{kind}", None))]
    for name in names:
        if hasattr(saved, name):
            setattr(args, name, getattr(saved, name))
    # Megatron accepts these two only if weight decay changes, and fills them in otherwise.
    changes = args.weight_decay_incr_style != "constant"
    for name in ("start_weight_decay", "end_weight_decay"):
        setattr(args, name, getattr(saved, name) if changes else None)


def install() -> None:
    """Install the replacements; call before `pretrain`."""
    registry.install(hooks.LOAD_CHECKPOINT, _match_learning_rates)
    registry.install(hooks.LOAD_SCHEDULE, _load_and_apply)


def _match_learning_rates(original, load_dir, args, *others, **kwargs):
    """Set the learning rates of the saved parameter groups to this run's.

    Megatron 0.19 matches parameter groups by `max_lr` and `min_lr` too.
    """
    state, *rest = original(load_dir, args, *others, **kwargs)
    groups = list(_iterate_groups(state.get("optimizer"))) if state else []
    if groups and state.get("args"):  # an imported checkpoint has no optimizer, and no learning rates
        ours = dict(zip(_learning_rates(state["args"]), _learning_rates(args), strict=True))
        for group in groups:
            pair = (group.get("max_lr"), group.get("min_lr"))
            group["max_lr"], group["min_lr"] = ours.get(pair, pair)
    return state, *rest


def _learning_rates(args: Namespace) -> Iterator[tuple[float, float]]:
    """Yield (max_lr, min_lr) of the embeddings and of B in LoRA, which may have their own, then of the rest."""
    least = args.min_lr if args.decoupled_min_lr is None else args.decoupled_min_lr
    yield args.decoupled_lr, least
    ratio, rates = getattr(args, "lora_plus_ratio", None), (args.lr, args.min_lr)
    has_own = ratio and args.lr is not None  # --skip-train needs no learning rate
    yield (args.lr * ratio, args.min_lr * ratio) if has_own else rates
    yield rates


def _iterate_groups(state: Any) -> Iterator[dict[str, Any]]:
    """Yield the parameter groups of one optimizer, or of several chained ones."""
    if isinstance(state, dict):
        for key, value in state.items():
            if key == "param_groups":
                yield from (group for group in value if "max_lr" in group)
            else:
                yield from _iterate_groups(value)


def _load_and_apply(original, self, state_dict) -> None:
    """Load the schedule, then apply its learning rate and weight decay.

    Megatron applies them before it has read the whole schedule, so they would be right only one step later.
    """
    original(self, state_dict)
    self.step(0)
