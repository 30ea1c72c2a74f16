"""A gradient that is no number: found on all ranks in the step it appears in, before any weight changes.

Megatron looks at every micro-batch's loss and at every bucket of gradients, waits for the device each time,
and raises on the rank that has the NaN, while the others hang. The norm of the whole gradient is known to
every rank anyway, and a loss that is no number leaves none that is.
"""

import math
from collections.abc import Callable, Iterable

import torch

from megatron_cream.common.errors import UsageError
from megatron_cream.distributed.rendezvous import first_reason
from megatron_cream.patches import hooks, registry


class NotFinite(RuntimeError):
    """Training stopped; the weights are those of the step before."""


class _Skipped(Exception):
    pass


class _Guard:
    policy = "stop"
    model: tuple[torch.nn.Module, ...] = ()
    report: Callable[[float], None]


_guard = _Guard()


def install(policy: str, report: Callable[[float], None]) -> None:
    """Look at the gradient's norm in each step of Megatron's optimizers.

    Args:
        policy: stop raises NotFinite on every rank; skip leaves the step out, as Megatron's `skipped
            iterations` are; rerun leaves the matter to Megatron's rerun state machine.
        report: is called on every rank with the norm before that.
    """
    _guard.policy, _guard.report = policy, report
    registry.install(hooks.CHECK_NORM, _look)
    registry.install(hooks.SKIP_STEP, _step)


def of_model(chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """For Megatron's `pre_wrap_hooks`: whose weights are looked at when a gradient is no number."""
    _guard.model = tuple(chunks)
    return chunks


def bad_weight() -> str:
    """Name the first weight that holds NaN or infinity, or "". On every rank; the same on every rank."""
    return first_reason(_weight_that_is_no_number())


def check_values(values: Iterable[float], what: str) -> None:
    """Raise UsageError, which begins with `what`, unless all are finite. On every rank, with the same values."""
    if all(map(math.isfinite, values)):
        return
    name = bad_weight()
    because = f"{name} holds NaN or infinite numbers" if name else "its losses are NaN or infinite"
    raise UsageError(f"{what}: {because}. Train, export or download the model again.")


def _look(original, self):
    norm = original(self)
    if _guard.policy == "rerun" or math.isfinite(norm):
        return norm
    _guard.report(float(norm))
    if name := bad_weight():
        raise NotFinite(f"the weights hold NaN or infinity ({name}), which no step mends: start from others")
    if _guard.policy == "skip":
        raise _Skipped
    raise NotFinite(f"the gradient's norm is {float(norm)}")


def _weight_that_is_no_number() -> str:
    """Came with what was loaded, or from a step before: then every gradient is so too, and skipping is no help."""
    names = [name for chunk in _guard.model for name, weight in chunk.named_parameters() if not weight.isfinite().all()]
    return names[0] if names else ""


def _step(original, self):
    try:
        return original(self)
    except _Skipped:
        return False, None, None
