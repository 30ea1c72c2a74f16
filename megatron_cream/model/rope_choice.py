"""Choose the rotary embedding of a run from the model's config and the user's flags.

Pure functions of plain values, which read no files. The factor follows from the window that the *model* was pre-trained
with; --seq-length is only the length of the training samples. docs/method.md has the rules and their reasons.
"""

import math
from dataclasses import dataclass
from typing import Any

from megatron_cream.common.errors import UsageError
from megatron_cream.model.rotary import build_rope_scaling, compute_ntk_factor, compute_yarn_attention_factor

_SHORTEST_WINDOW = 2048
"""No Llama was pre-trained with a shorter window, so a linear scaling that implies one is read the other way."""


@dataclass(frozen=True, kw_only=True)
class ModelRope:
    """The rotary embedding in a model's configuration.

    theta: base of the frequencies.
    scaling: checked `rope_scaling`, or None.
    positions: max_position_embeddings.
    original: pre-trained window in tokens, if the configuration has it outside of `scaling`.
    """

    theta: float
    scaling: dict[str, Any] | None
    positions: int
    original: int | None = None


@dataclass(frozen=True, kw_only=True)
class RopeFlags:
    """The user's flags; None if a flag was not given.

    target: --target-length.
    window: --seq-length.
    type: --rope-scaling-type.
    factor: --rope-scaling-factor.
    original: --original-max-position-embeddings.
    theta: --rotary-base.
    saved_target: --target-length of the run that this one resumes; None if it starts anew.
    """

    target: int
    window: int
    type: str | None = None
    factor: float | None = None
    original: int | None = None
    theta: float | None = None
    saved_target: int | None = None


@dataclass(frozen=True, kw_only=True)
class Rope:
    """The rotary embedding of a run.

    original: pre-trained window in tokens, which `scaling` extends.
    lines: messages for the user: changes to the model's rotary embedding, and warnings.
    """

    theta: float
    scaling: dict[str, Any] | None
    original: int | None
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Windows:
    """Numbers of positions that a model was trained for.

    original: positions that the model was pre-trained with.
    reach: positions that its scaling serves.
    guessed: whether the configuration can be read in two ways.
    """

    original: int
    reach: int
    guessed: bool = False


def choose_rope(flags: RopeFlags, model: ModelRope | None, *, head_dim: int, default_theta: float) -> Rope:
    """Return the rotary embedding of a run: the model's, changed by the flags.

    Args:
        flags: the user's flags.
        model: None if no model is loaded.
        head_dim: dimensions of an attention head, for the warning about a target beyond the window.
        default_theta: base of a model that is trained from scratch.

    Raises:
        UsageError: the flags contradict each other.
        ValueError: a value is invalid for its type of scaling.
    """
    own = model.scaling["rope_type"] if model and model.scaling else None
    if (flags.type or own or "none") == "none":
        _reject_flags_without_scaling(flags)
    if flags.theta is not None and not 1 < flags.theta < math.inf:
        raise UsageError(f"--rotary-base {flags.theta:g}: must be a number above 1")
    if model is None:
        return _choose_without_model(flags, default_theta)
    windows = _find_windows(model, flags.original)
    lines = []
    theta = model.theta if flags.theta is None else flags.theta
    if theta != model.theta:
        lines.append(f"rope: theta changes from the model's {model.theta:g} to {theta:g} (--rotary-base)")
    if own is None:
        scaling, more = _add_scaling(flags, windows)
    elif flags.type in (None, own):
        widen = _convert_dynamic_scaling if own == "dynamic" else _widen_scaling
        scaling, more = widen(flags, model.scaling, windows)
    else:
        scaling, more = _replace_scaling(flags, model.scaling, windows)
    lines += more
    if windows.guessed and (flags.target > model.positions or flags.type not in (None, own)):
        lines.append(_warn_of_guess(model, windows))
    if scaling is None:
        lines += _warn_if_unscaled(flags, windows.original, (model.theta, theta), head_dim)
    return Rope(theta=theta, scaling=scaling, original=windows.original, lines=tuple(lines))


def count_served_positions(model: ModelRope) -> int:
    """Return the number of positions that a model's rotary embedding serves."""
    return _find_windows(model, None).reach


def compute_critical_theta(theta: float, window: int, target: int) -> float:
    """Return the theta at which the dimension that turns once within the window turns once within the target.

    Dimensions that turn more slowly have not been seen whole in training at the window; with a smaller theta their
    angles within the target go beyond those seen. This is the critical base of Liu et al., arXiv 2310.05209.

    Args:
        theta: the model's own.
        window: positions that the model was trained with under it; more than 2 pi.
        target: positions to serve; more than 2 pi.
    """
    return theta ** (math.log(target / (2 * math.pi)) / math.log(window / (2 * math.pi)))


def has_other_rope(flags: RopeFlags, saved: ModelRope) -> bool:
    """Return whether the flags ask for another rotary embedding than the saved one."""
    scaling = saved.scaling or {"rope_type": "none", "factor": 1.0}
    given = (
        (flags.target, saved.positions),
        (flags.type, scaling["rope_type"]),
        (flags.factor, scaling.get("factor")),
        (flags.original, scaling.get("original_max_position_embeddings", saved.original)),
        (flags.theta, saved.theta),
    )
    return any(wanted is not None and value is not None and wanted != value for wanted, value in given)


def _reject_flags_without_scaling(flags: RopeFlags) -> None:
    given = (("--rope-scaling-factor", flags.factor), ("--original-max-position-embeddings", flags.original))
    for flag, value in given:
        if value is not None:
            raise UsageError(f"{flag} {value}: only with --rope-scaling-type linear, ntk, yarn or llama3")


def _choose_without_model(flags: RopeFlags, default_theta: float) -> Rope:
    window = flags.original or flags.window
    scaling, lines = _add_scaling(flags, _Windows(window, window))
    warnings = tuple(line for line in lines if line.startswith("warning"))
    theta = default_theta if flags.theta is None else flags.theta
    return Rope(theta=theta, scaling=scaling, original=window, lines=warnings)


def _add_scaling(flags: RopeFlags, windows: _Windows) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the scaling of a model that has none, and its lines."""
    if flags.type in (None, "none"):
        return None, []
    scaling = _build_scaling(flags, windows.original)
    if scaling is None:
        return None, [f"rope: not scaled: the target of {flags.target} positions fits the window of {windows.original}"]
    line = f"rope: {_describe(scaling)} from a window of {windows.original}, for a target of {flags.target} positions"
    return scaling, [line, *_warn_if_short(flags, scaling["factor"] * windows.original)]


def _replace_scaling(
    flags: RopeFlags, own: dict[str, Any], windows: _Windows
) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the scaling of another type than the model's, and its lines."""
    before = f"rope: the model's {_describe(own)} (window {windows.original}, {windows.reach} positions)"
    if flags.type == "none":
        return None, [f"{before} is removed (--rope-scaling-type none)"]
    scaling = _build_scaling(flags, windows.original)
    if scaling is None:
        return None, [f"{before} is removed: the target of {flags.target} positions fits the window"]
    line = (
        f"{before} is replaced by {_describe(scaling)} for a target of {flags.target} "
        f"(--rope-scaling-type {flags.type})"
    )
    return scaling, [line, *_warn_if_short(flags, scaling["factor"] * windows.original)]


def _build_scaling(flags: RopeFlags, original: int) -> dict[str, Any] | None:
    """Return the scaling that the flags name, or None if the target fits the window."""
    factor = flags.target / original if flags.factor is None else flags.factor
    if factor == 1.0 or (factor < 1 and flags.factor is None):
        return None
    return build_rope_scaling(flags.type, factor, original)


def _widen_scaling(flags: RopeFlags, own: dict[str, Any], windows: _Windows) -> tuple[dict[str, Any], list[str]]:
    """Return the model's scaling, with a larger factor if the target needs it, and its lines."""
    before = own["factor"]
    factor = flags.factor
    if factor is None:
        # For linear, ntk and yarn this is target / original. Llama 3.1 serves twice its factor x original: the ramp,
        # which depends on the original window, stays the same, and the divisor grows in proportion to the target.
        factor = before if flags.target <= windows.reach else before * flags.target / windows.reach
    scaling = dict(own)
    if factor != before:
        scaling |= {"factor": factor} | _widen_attention_factor(own, factor) | _widen_divisors(own, factor / before)
    if flags.original is not None and "original_max_position_embeddings" in own:
        scaling["original_max_position_embeddings"] = flags.original
    if scaling == own:
        return own, [f"rope: the model's own {_describe(own)} is kept: it serves {windows.reach} positions"]
    reach = windows.reach * factor / before
    return scaling, [
        f"rope: the model's {own['rope_type']} scaling changes from factor {before:g} ({windows.reach} positions) to "
        f"factor {factor:g} ({reach:.0f} positions), window {windows.original}",
        *_warn_if_short(flags, reach),
    ]


def _convert_dynamic_scaling(
    flags: RopeFlags, own: dict[str, Any], windows: _Windows
) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the ntk scaling that dynamic scaling has at the target length, and its lines.

    Dynamic scaling has another base for each length; training uses that of the target.
    """
    before = f"rope: the model's {_describe(own)} from a window of {windows.original}"
    if flags.factor is not None:
        scaling = build_rope_scaling("ntk", flags.factor)
        warnings = _warn_if_short(flags, flags.factor * windows.original)
        return scaling, [f"{before} becomes {_describe(scaling)}", *warnings]
    if flags.target <= windows.original:
        return None, [f"{before} has no effect at {flags.target} positions: trained and exported without it"]
    factor = compute_ntk_factor(own | {"original_max_position_embeddings": windows.original}, flags.target)
    scaling = build_rope_scaling("ntk", factor)
    return scaling, [f"{before} becomes {_describe(scaling)}, which is equivalent at {flags.target} positions"]


def _widen_attention_factor(own: dict[str, Any], factor: float) -> dict[str, Any]:
    """Return YaRN's attention factor for a new factor, or {} if the model has its own."""
    if "attention_factor" not in own or own["rope_type"] != "yarn":
        return {}
    rest = {key: value for key, value in own.items() if key != "attention_factor"}
    if abs(own["attention_factor"] - compute_yarn_attention_factor(rest)) > 1e-3:
        return {}
    return {"attention_factor": compute_yarn_attention_factor(rest | {"factor": factor})}


def _widen_divisors(own: dict[str, Any], ratio: float) -> dict[str, Any]:
    """Return LongRoPE's long factors for a window that is `ratio` times as long.

    The factors come from a search, and no rule to widen them is published. Here each is raised to the same power: the
    largest is multiplied by `ratio`, and a factor of 1 stays 1.
    """
    if own["rope_type"] != "longrope":
        return {}
    largest = max(own["long_factor"])
    if largest <= 1:
        return {"long_factor": [divisor * ratio for divisor in own["long_factor"]]}
    power = 1 + math.log(ratio) / math.log(largest)
    return {"long_factor": [max(divisor, 1.0) ** power for divisor in own["long_factor"]]}


def _find_windows(model: ModelRope, original: int | None) -> _Windows:
    """Return the pre-trained and the served positions of a model.

    `original` is --original-max-position-embeddings, or None.
    """
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
        # Published models disagree on whether max_position_embeddings is the window before or after linear scaling.
        before = positions / scaling["factor"] < _SHORTEST_WINDOW
        own = positions if before else round(positions / scaling["factor"])
    return _Windows(own, round(own * scaling["factor"]), guessed)


def _warn_of_guess(model: ModelRope, windows: _Windows) -> str:
    taken, other = ("before", "after") if windows.original == model.positions else ("after", "before")
    instead = model.positions if other == "before" else round(model.positions / model.scaling["factor"])
    return (
        f"warning: config.json does not say whether max_position_embeddings {model.positions} is the window before or "
        f"after {_describe(model.scaling)}: taken as {taken}, a pre-trained window of {windows.original}. If it is "
        f"{other}: --original-max-position-embeddings {instead}"
    )


def _warn_if_short(flags: RopeFlags, reach: float) -> list[str]:
    if flags.factor is None or reach >= flags.target:
        return []
    warning = (
        f"warning: --rope-scaling-factor {flags.factor:g}: serves {reach:.0f} positions, fewer than the target of "
        f"{flags.target}"
    )
    if hint := _advise_resumed(flags):
        return [f"{warning}. {hint}"]
    return [f"{warning}. Leave out --rope-scaling-factor for a factor that fits"]


def _advise_resumed(flags: RopeFlags) -> str:
    """Return what a resumed run can do about a target that is too long, or "" if the run starts anew."""
    if flags.saved_target is None:
        return ""
    return (
        f"A resumed run keeps its rotary embedding: give --target-length {flags.saved_target}, or for a longer "
        "extension --pretrained-checkpoint in place of --load"
    )


def _warn_if_unscaled(flags: RopeFlags, window: int, thetas: tuple[float, float], head_dim: int) -> list[str]:
    """Return a warning if neither scaling nor a larger theta reaches the target.

    It advises the critical base. The least theta that reaches the target, ntk's, does badly near the target in
    examples/study_real.
    """
    (before, after), target = thetas, flags.target
    exponent = head_dim / (head_dim - 2) if head_dim > 2 else 1.0
    reach = window * (after / before) ** (1 / exponent)
    if target <= max(reach, window):
        return []
    needed = max(before * (target / window) ** exponent, compute_critical_theta(before, window, target))
    theta = f"--rotary-base {needed:.6g}" if after == before else f"--rotary-base {needed:.6g} instead of {after:g}"
    warning = (
        f"warning: the target of {target} positions is beyond the model's window of {window}, and its rotary embedding "
        f"is {'not scaled' if after == before else f'stretched to {reach:.0f} positions only'}"
    )
    if hint := _advise_resumed(flags):
        return [f"{warning}. {hint}"]
    return [f"{warning}. Add --rope-scaling-type yarn (or ntk, linear), or {theta}"]


def _describe(scaling: dict[str, Any]) -> str:
    return f"{scaling['rope_type']} scaling by {scaling['factor']:g}"
