"""Resume with the saved schedule of learning rate and weight decay, or with this run's.

Megatron fails on a schedule that differs from the saved one, unless a flag chooses one of the two. It also finds
the saved optimizer state of a parameter by its group's learning rates, and finds none if they differ. So the learning
rates of the saved groups, or those of this run, have to be changed before.
"""

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from megatron_cream.patches import hooks, registry


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
