"""Choose a run's rotary embedding from what its model says of itself and what the user asks for.

Pure functions of plain values: no file and no namespace is read here. The factor follows from the window that the
*model* was pre-trained with; --seq-length is only the length of the training samples. docs/method.md has the rules
and their reasons.
"""

import math
from dataclasses import dataclass
from typing import Any

from megatron_cream.common.errors import UsageError
from megatron_cream.model.rotary import dynamic_as_ntk, rope_scaling_dict, yarn_attention_factor

_SHORTEST_WINDOW = 2048
"""No Llama was pre-trained with less: a linear scaling that would mean so is read the other way."""


@dataclass(frozen=True, kw_only=True)
class ModelRope:
    """What a model says of its rotary embedding.

    theta: its base.
    scaling: its checked `rope_scaling`, or None.
    positions: its max_position_embeddings.
    original: the window it was pre-trained with, where it says so outside of `scaling`.
    """

    theta: float
    scaling: dict[str, Any] | None
    positions: int
    original: int | None = None


@dataclass(frozen=True, kw_only=True)
class RopeFlags:
    """What the user asks for; None where a flag was not given.

    target: --target-length.
    window: --seq-length.
    """

    target: int
    window: int
    type: str | None = None
    factor: float | None = None
    original: int | None = None
    theta: float | None = None


@dataclass(frozen=True, kw_only=True)
class Rope:
    """The rotary embedding of a run.

    original: the pre-trained window that `scaling` stretches.
    lines: what a user should read of it: changes to the model's own, and warnings.
    """

    theta: float
    scaling: dict[str, Any] | None
    original: int | None
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Windows:
    """original: positions the model was pre-trained with. reach: positions its scaling serves. guessed: the config
    may be read in two ways."""

    original: int
    reach: int
    guessed: bool = False


def choose_rope(flags: RopeFlags, model: ModelRope | None, *, head_dim: int, default_theta: float) -> Rope:
    """Return the rotary embedding that the flags make of the model's own.

    Args:
        flags: what the user asks for.
        model: None where nothing is loaded.
        head_dim: of the attention, for the warning of a target beyond the window.
        default_theta: of a model that starts from nothing.

    Raises:
        UsageError: the flags contradict each other.
        ValueError: a value that the type of scaling cannot take.
    """
    own = model.scaling["rope_type"] if model and model.scaling else None
    if (flags.type or own or "none") == "none":
        _reject_details_of_nothing(flags)
    if flags.theta is not None and not 1 < flags.theta < math.inf:
        raise UsageError(f"--rotary-base {flags.theta:g}: must be a number above 1")
    if model is None:
        return _without_model(flags, default_theta)
    windows = _windows(model, flags.original)
    lines = []
    theta = model.theta if flags.theta is None else flags.theta
    if theta != model.theta:
        lines.append(f"rope: theta changes from the model's {model.theta:g} to {theta:g} (--rotary-base)")
    if own is None:
        scaling, more = _new(flags, windows)
    elif flags.type in (None, own):
        widen = _fixed if own == "dynamic" else _widened
        scaling, more = widen(flags, model.scaling, windows)
    else:
        scaling, more = _replaced(flags, model.scaling, windows)
    lines += more
    if windows.guessed and (flags.target > model.positions or flags.type not in (None, own)):
        lines.append(_guess(model, windows))
    if scaling is None:
        lines += _unscaled(flags.target, windows.original, (model.theta, theta), head_dim)
    return Rope(theta=theta, scaling=scaling, original=windows.original, lines=tuple(lines))


def reach(model: ModelRope) -> int:
    """Return how many positions a model's rotary embedding serves."""
    return _windows(model, None).reach


def contradicts(flags: RopeFlags, saved: ModelRope) -> bool:
    """Return whether a run that resumes asks for another rotary embedding than it was saved with."""
    scaling = saved.scaling or {"rope_type": "none", "factor": 1.0}
    given = (
        (flags.target, saved.positions),
        (flags.type, scaling["rope_type"]),
        (flags.factor, scaling.get("factor")),
        (flags.original, scaling.get("original_max_position_embeddings", saved.original)),
        (flags.theta, saved.theta),
    )
    return any(asked is not None and has is not None and asked != has for asked, has in given)


def _reject_details_of_nothing(flags: RopeFlags) -> None:
    given = (("--rope-scaling-factor", flags.factor), ("--original-max-position-embeddings", flags.original))
    for flag, value in given:
        if value is not None:
            raise UsageError(f"{flag} {value}: only with --rope-scaling-type linear, ntk, yarn or llama3")


def _without_model(flags: RopeFlags, default_theta: float) -> Rope:
    window = flags.original or flags.window
    scaling, lines = _new(flags, _Windows(window, window))
    warnings = tuple(line for line in lines if line.startswith("warning"))
    theta = default_theta if flags.theta is None else flags.theta
    return Rope(theta=theta, scaling=scaling, original=window, lines=warnings)


def _new(flags: RopeFlags, windows: _Windows) -> tuple[dict[str, Any] | None, list[str]]:
    """Scaling of a model that has none."""
    if flags.type in (None, "none"):
        return None, []
    scaling = _scaling(flags, windows.original)
    if scaling is None:
        return None, [f"rope: not scaled: the target of {flags.target} positions fits the window of {windows.original}"]
    line = f"rope: {_shown(scaling)} from a window of {windows.original}, for a target of {flags.target} positions"
    return scaling, [line, *_too_short(flags, scaling["factor"] * windows.original)]


def _replaced(flags: RopeFlags, own: dict[str, Any], windows: _Windows) -> tuple[dict[str, Any] | None, list[str]]:
    """Scaling of another type than the model's, from the window that the model was pre-trained with."""
    before = f"rope: the model's {_shown(own)} (window {windows.original}, {windows.reach} positions)"
    if flags.type == "none":
        return None, [f"{before} is removed (--rope-scaling-type none)"]
    scaling = _scaling(flags, windows.original)
    if scaling is None:
        return None, [f"{before} is removed: the target of {flags.target} positions fits the window"]
    line = (
        f"{before} is replaced by {_shown(scaling)} for a target of {flags.target} (--rope-scaling-type {flags.type})"
    )
    return scaling, [line, *_too_short(flags, scaling["factor"] * windows.original)]


def _scaling(flags: RopeFlags, original: int) -> dict[str, Any] | None:
    """The dict of a type that the user names; None where the target needs none."""
    factor = flags.target / original if flags.factor is None else flags.factor
    if factor == 1.0 or (factor < 1 and flags.factor is None):
        return None
    return rope_scaling_dict(flags.type, factor, original)


def _widened(flags: RopeFlags, own: dict[str, Any], windows: _Windows) -> tuple[dict[str, Any], list[str]]:
    """The model's own scaling: as it is where the target fits, else of the same type with a larger factor."""
    before = own["factor"]
    factor = flags.factor
    if factor is None:
        # For linear, ntk and yarn this is target / original. Llama 3.1 serves twice its factor x original: its
        # ramp, which depends on the original window, stays, and all it divides is divided by as much again.
        factor = before if flags.target <= windows.reach else before * flags.target / windows.reach
    scaling = dict(own)
    if factor != before:
        scaling |= {"factor": factor} | _attention(own, factor) | _divisors(own, factor / before)
    if flags.original is not None and "original_max_position_embeddings" in own:
        scaling["original_max_position_embeddings"] = flags.original
    if scaling == own:
        return own, [f"rope: the model's own {_shown(own)} is kept: it serves {windows.reach} positions"]
    reach = windows.reach * factor / before
    return scaling, [
        f"rope: the model's {own['rope_type']} scaling goes from factor {before:g} ({windows.reach} positions) to "
        f"factor {factor:g} ({reach:.0f} positions), window {windows.original}",
        *_too_short(flags, reach),
    ]


def _fixed(flags: RopeFlags, own: dict[str, Any], windows: _Windows) -> tuple[dict[str, Any] | None, list[str]]:
    """Dynamic scaling, which has another base for each length: trained with that of the target."""
    before = f"rope: the model's {_shown(own)} from a window of {windows.original}"
    if flags.factor is not None:
        scaling = rope_scaling_dict("ntk", flags.factor)
        return scaling, [f"{before} becomes {_shown(scaling)}", *_too_short(flags, flags.factor * windows.original)]
    if flags.target <= windows.original:
        return None, [f"{before} has no effect at {flags.target} positions: trained and exported without it"]
    factor = dynamic_as_ntk(own | {"original_max_position_embeddings": windows.original}, flags.target)
    scaling = rope_scaling_dict("ntk", factor)
    return scaling, [f"{before} becomes {_shown(scaling)}, which it amounts to at {flags.target} positions"]


def _attention(own: dict[str, Any], factor: float) -> dict[str, Any]:
    """YaRN's temperature follows the factor, unless the model has one of its own making."""
    if "attention_factor" not in own or own["rope_type"] != "yarn":
        return {}
    rest = {key: value for key, value in own.items() if key != "attention_factor"}
    if abs(own["attention_factor"] - yarn_attention_factor(rest)) > 1e-3:
        return {}
    return {"attention_factor": yarn_attention_factor(rest | {"factor": factor})}


def _divisors(own: dict[str, Any], ratio: float) -> dict[str, Any]:
    """LongRoPE's long factors for a window that is `ratio` times as long: the largest is multiplied by it, a 1 stays.

    They come from a search, and no rule is published to widen them. This one takes the same power of each.
    """
    if own["rope_type"] != "longrope":
        return {}
    largest = max(own["long_factor"])
    if largest <= 1:
        return {"long_factor": [divisor * ratio for divisor in own["long_factor"]]}
    power = 1 + math.log(ratio) / math.log(largest)
    return {"long_factor": [max(divisor, 1.0) ** power for divisor in own["long_factor"]]}


def _windows(model: ModelRope, original: int | None) -> _Windows:
    """What the model was pre-trained with and what it serves; `original` is the user's word on the former."""
    scaling, positions = model.scaling, model.positions
    if scaling is None:
        window = original or positions
        return _Windows(window, max(window, positions))
    own = original or scaling.get("original_max_position_embeddings") or model.original
    if scaling["rope_type"] == "llama3":
        reach = positions if positions > own else int(own * scaling["factor"])
        return _Windows(own, reach)
    guessed = own is None and scaling["factor"] > 1
    if own is None:
        # Folders disagree on whether max_position_embeddings is the window before linear scaling or after it.
        before = positions / scaling["factor"] < _SHORTEST_WINDOW
        own = positions if before else round(positions / scaling["factor"])
    return _Windows(own, round(own * scaling["factor"]), guessed)


def _guess(model: ModelRope, windows: _Windows) -> str:
    taken, other = ("before", "after") if windows.original == model.positions else ("after", "before")
    instead = model.positions if other == "before" else round(model.positions / model.scaling["factor"])
    return (
        f"warning: config.json does not say whether max_position_embeddings {model.positions} is the window before or "
        f"after {_shown(model.scaling)}: taken as {taken}, a pre-trained window of {windows.original}. If it is "
        f"{other}: --original-max-position-embeddings {instead}"
    )


def _too_short(flags: RopeFlags, reach: float) -> list[str]:
    if flags.factor is None or reach >= flags.target:
        return []
    return [
        f"warning: --rope-scaling-factor {flags.factor:g}: serves {reach:.0f} positions, fewer than the target of "
        f"{flags.target}. Leave the flag out for a factor that fits"
    ]


def _unscaled(target: int, window: int, thetas: tuple[float, float], head_dim: int) -> list[str]:
    """A target beyond the window, without scaling, is what a larger theta is for."""
    before, after = thetas
    exponent = head_dim / (head_dim - 2) if head_dim > 2 else 1.0
    reach = window * (after / before) ** (1 / exponent)
    if target <= max(reach, window):
        return []
    needed = before * (target / window) ** exponent
    theta = f"--rotary-base {needed:.6g}" if after == before else f"--rotary-base {needed:.6g} instead of {after:g}"
    return [
        f"warning: the target of {target} positions is beyond the model's window of {window}, and its rotary embedding "
        f"is {'not scaled' if after == before else f'stretched to {reach:.0f} positions only'}. Add "
        f"--rope-scaling-type yarn (or ntk, linear), or {theta}"
    ]


def _shown(scaling: dict[str, Any]) -> str:
    return f"{scaling['rope_type']} scaling by {scaling['factor']:g}"
