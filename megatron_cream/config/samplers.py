"""Flags of the position samplers: their defaults, and the arguments of `build_sampler`."""

from argparse import Namespace
from typing import Any

from megatron_cream.common.cli import to_flag
from megatron_cream.common.errors import UsageError

OWN_FLAGS = {
    "cream": ("cream_sigma", "cream_variant", "cream_relativity", "cream_middle"),
    "pose": ("pose_chunks",),
}
"""{sampler: variables of the flags that only this sampler has}."""


def fill(args: Namespace) -> None:
    """Set the defaults of the flags of the run's samplers.

    Raises:
        UsageError: --position-mix cannot be parsed, or contradicts --position-sampler.
    """
    if args.position_mix is not None:
        if args.position_sampler not in ("cream", "mix"):  # cream is the default
            raise UsageError(f"--position-mix with --position-sampler {args.position_sampler}: give one of the two")
        args.position_sampler = "mix"
    elif args.position_sampler == "mix":
        raise UsageError("--position-sampler mix: needs --position-mix, such as cream=0.6,pose=0.4")
    names = sampler_names(args)
    if "cream" in names:
        args.cream_middle = args.cream_middle or "gaussian"
        if args.cream_middle == "gaussian" and args.cream_sigma is None:
            args.cream_sigma = 3.0
        args.cream_variant = args.cream_variant or "paper"
        args.cream_relativity = 0.5 if args.cream_relativity is None else args.cream_relativity
    if "pose" in names:
        args.pose_chunks = 2 if args.pose_chunks is None else args.pose_chunks


def sampler_names(args: Namespace) -> tuple[str, ...]:
    """Return the names of the samplers that the run uses: one, or those of the mixture."""
    return tuple(_read_mix(args)) if args.position_sampler == "mix" else (args.position_sampler,)


def sampler_options(args: Namespace) -> dict[str, Any]:
    """Return the keyword arguments of `build_sampler`, without the seed."""
    options = dict(name=args.position_sampler, window=args.seq_length, target=args.target_length)
    if args.position_sampler == "mix":
        own = {name: _own_options(args, name) for name in sampler_names(args)}
        return options | dict(shares=_read_mix(args), options={name: own for name, own in own.items() if own})
    return options | _own_options(args, args.position_sampler)


def check_own_flags(args: Namespace) -> None:
    """Raise UsageError for a flag of a sampler that the run does not use, after `fill`."""
    used = sampler_names(args)
    for sampler, names in OWN_FLAGS.items():
        for name in names:
            value = getattr(args, name)
            if value is not None and sampler not in used:
                raise UsageError(
                    f"{to_flag(name)} {value}: only with --position-sampler {sampler}, not {', '.join(used)}"
                )
    if args.cream_sigma is not None and args.cream_middle != "gaussian":
        raise UsageError(
            f"--cream-sigma {args.cream_sigma}: only with --cream-middle gaussian, not {args.cream_middle}"
        )


def _own_options(args: Namespace, sampler: str) -> dict[str, Any]:
    given = {name.partition("_")[2]: getattr(args, name) for name in OWN_FLAGS.get(sampler, ())}
    # The default is left out, because the options are part of the name of the data's cached index.
    if given.get("middle") == "gaussian":
        del given["middle"]
    return {name: value for name, value in given.items() if value is not None and (name, value) != ("chunks", 2)}


def _read_mix(args: Namespace) -> dict[str, float]:
    """Return {sampler: share} from --position-mix."""
    try:
        return read_shares(args.position_mix)
    except ValueError as error:
        raise UsageError(f"--position-mix {args.position_mix}: {error}") from error


def read_shares(text: str) -> dict[str, float]:
    """Parse shares from text such as `cream=0.6,pose=0.2,pi=0.2`.

    Raises:
        ValueError: a part has no number, or a name occurs twice. One line.
    """
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, _, share = (word.strip() for word in part.partition("="))
        try:
            value = float(share)
        except ValueError:
            raise ValueError(f"{part.strip()!r} is not NAME=SHARE, such as cream=0.6") from None
        if name in shares:
            raise ValueError(f"{name} is listed twice")
        shares[name] = value
    return shares
