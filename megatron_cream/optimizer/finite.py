"""Detect NaN and infinite gradients on all ranks before any weight changes.

Megatron checks the loss of every micro-batch and every gradient bucket, waits for the device each time, and raises
only on the rank that has the NaN, while the others hang. Here the norm of the whole gradient is checked, which every
rank knows anyway: a non-finite loss makes it non-finite.
"""

import math
from collections.abc import Callable, Iterable

import torch

from megatron_cream.common.errors import UsageError
from megatron_cream.distributed.rendezvous import find_first_reason
from megatron_cream.patches import hooks, registry


class NonFiniteError(RuntimeError):
    """A NaN or infinite gradient stopped training before its step changed any weight."""


class _SkipStep(Exception):
    """Leaves Megatron's optimizer step before it changes a weight."""


class _Guard:
    policy = "stop"
    model: tuple[torch.nn.Module, ...] = ()
    report: Callable[[float], None]


_guard = _Guard()


def install(policy: str, report: Callable[[float], None]) -> None:
    """Check the gradient norm in each step of Megatron's optimizers.

    Args:
        policy: "stop" raises NonFiniteError on every rank; "skip" skips the step, which Megatron counts in
            `skipped iterations`; "rerun" leaves the decision to Megatron's rerun state machine.
        report: called on every rank with a non-finite norm, before the policy is applied.
    """
    _guard.policy, _guard.report = policy, report
    registry.install(hooks.CHECK_NORM, _check_norm)
    registry.install(hooks.SKIP_STEP, _run_or_skip_step)


def watch_model(chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """Set the model whose weights are checked. For Megatron's `pre_wrap_hooks`."""
    _guard.model = tuple(chunks)
    return chunks


def find_bad_weight() -> str:
    """Return the name of the first weight that is NaN or infinite, or "".

    All ranks must call it, and get the same name. Weights are NaN if they were loaded or updated so. Then every
    gradient is NaN, and skipping steps does not help.
    """
    names = [name for chunk in _guard.model for name, weight in chunk.named_parameters() if not weight.isfinite().all()]
    return find_first_reason(names[0] if names else "")


def check_values(values: Iterable[float], source: str) -> None:
    """Check that all values are finite. All ranks must call it, with the same values.

    Args:
        values: losses or results of a model.
        source: the flag and path of the model, with which the error begins.

    Raises:
        UsageError: a value is NaN or infinite.
    """
    if all(map(math.isfinite, values)):
        return
    name = find_bad_weight()
    problem = f"{name} holds NaN or infinite numbers" if name else "its losses are NaN or infinite"
    raise UsageError(f"{source}: {problem}. Train, export or download the model again.")


def _check_norm(original, self):
    norm = original(self)
    if _guard.policy == "rerun" or math.isfinite(norm):
        return norm
    _guard.report(float(norm))
    if name := find_bad_weight():
        raise NonFiniteError(f"{name} holds NaN or infinite numbers. Training cannot recover; load different weights.")
    if _guard.policy == "skip":
        raise _SkipStep
    raise NonFiniteError(f"the gradient's norm is {float(norm)}")


def _run_or_skip_step(original, self):
    try:
        return original(self)
    except _SkipStep:
        return False, None, None
