"""Compare the schedule of a run's flags with the one in the checkpoint that it resumes from.

Megatron counts a schedule in samples: it multiplies --train-iters and other lengths in steps by the global batch size,
which by default grows with the number of ranks. The messages here have the units of the flags.
"""

from argparse import Namespace
from typing import Any

from megatron_cream.checkpoint.start import FoundCheckpoint, parse_step
from megatron_cream.common.cli import to_flag
from megatron_cream.common.errors import UsageError

_LENGTHS = ("lr_decay_steps", "wd_incr_steps", "lr_warmup_steps")
"""Megatron's keys of what it counts in samples."""


def check(args: Namespace, found: FoundCheckpoint) -> None:
    """Compare the schedule of these flags with the saved one.

    Raises:
        UsageError: they differ, and no flag chooses one.
    """
    saved = _read_saved(found)
    if saved is None or args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler:
        return
    theirs, ours = _name_differences(args, found.args, saved)
    if not ours:
        return
    step, name = _step_of(found), found.folder.name
    keep = ", or --use-checkpoint-opt-param-scheduler for the saved one"
    if _count_steps_after(args, saved, step, end=_end_of(saved)):
        keep = ""  # it would train the added steps at the minimum rate
    batch = "; a schedule counts samples" if "batch" in ours else ""
    raise UsageError(
        f"{found.flag} {found.folder.parent}: {name} was saved with {' '.join(theirs.values())}, but these flags set "
        f"{' '.join(ours.values())}{batch}. Give {_advise_saved(args, found, saved, theirs)}"
        f"--override-opt-param-scheduler{_advise_decay(args, saved, step, args.lr_decay_iters)} for the schedule of "
        f"these flags{keep}."
    )


def warn_of_minimum_rate(args: Namespace, found: FoundCheckpoint) -> str:
    """Return a warning if the chosen schedule ends before the run, though the flags did not ask for that, or ""."""
    saved = _read_saved(found)
    if saved is None or args.no_load_optim:
        return ""
    step, name = _step_of(found), found.folder.name
    if args.use_checkpoint_opt_param_scheduler and (late := _count_steps_after(args, saved, step, end=_end_of(saved))):
        # `fill.set_schedule` has replaced the --lr-decay-iters of these flags.
        return (
            f"warning: --use-checkpoint-opt-param-scheduler: the schedule in {name} ends before this run, whose last "
            f"{late} steps train at the minimum rate, --min-lr {saved['min_lr']:g}. Use --override-opt-param-scheduler"
            f"{_advise_decay(args, saved, step, None)} for the schedule of these flags"
        )
    if args.override_opt_param_scheduler and (add := _advise_decay(args, saved, step, args.lr_decay_iters)):
        ours = _compute_schedule(args) | {"num_steps": saved["num_steps"]}
        if late := _count_steps_after(args, ours, step, end=_end_of(ours)):
            return (
                f"warning: --override-opt-param-scheduler: {name} has seen {saved['num_steps']} samples, and the "
                f"schedule of these flags ends after {_end_of(ours):g}: the last {late} steps train at the minimum "
                f"rate, --min-lr {args.min_lr:g}. Add{add}"
            )
    return ""


def _read_saved(found: FoundCheckpoint) -> dict[str, Any] | None:
    """Return Megatron's state of the schedule, or None if there is none with the keys of this release."""
    saved = found.step and found.step.common.get("opt_param_scheduler")
    needed = {*_LENGTHS, "num_steps", "min_lr", "lr_decay_style"}
    return saved if isinstance(saved, dict) and needed <= saved.keys() else None


def _step_of(found: FoundCheckpoint) -> int:
    step = parse_step(found.folder)
    return step if isinstance(step, int) else 0


def _unit_of(args: Namespace) -> str:
    """Return the unit of a run's lengths: iters or samples. Megatron derives --train-iters from --train-samples."""
    return "samples" if getattr(args, "train_samples", None) else "iters"


def _compute_schedule(args: Namespace) -> dict[str, Any]:
    """Return the schedule of flags, with Megatron's keys and in samples."""
    found = {
        "max_lr": args.lr,
        "min_lr": args.min_lr,
        "lr_decay_style": args.lr_decay_style,
        "start_wd": args.start_weight_decay,
        "end_wd": args.end_weight_decay,
        "wd_incr_style": args.weight_decay_incr_style,
    }
    unit = _unit_of(args)
    samples = args.global_batch_size if unit == "iters" else 1
    total = getattr(args, f"train_{unit}")
    if not total or not samples:
        return found
    decay = (getattr(args, f"lr_decay_{unit}") or total) * samples
    fraction = args.lr_warmup_fraction
    warmup = getattr(args, f"lr_warmup_{unit}") * samples if fraction is None else fraction * decay
    return found | {"lr_decay_steps": decay, "wd_incr_steps": total * samples, "lr_warmup_steps": warmup}


def _name_differences(
    args: Namespace, saved_args: Namespace, saved: dict[str, Any]
) -> tuple[dict[str, str], dict[str, str]]:
    """Return {what differs: a flag and its value} of the saved schedule and of these flags."""
    ours = _compute_schedule(args)
    keys = [key for key in ours if key in saved and saved[key] != ours[key]]
    constant = saved.get("wd_incr_style") == args.weight_decay_incr_style == "constant"
    flags = {
        "max_lr": "--lr",
        "start_wd": "--weight-decay" if constant else "--start-weight-decay",
        "end_wd": "--weight-decay" if constant else "--end-weight-decay",
        "wd_incr_style": "--weight-decay-incr-style",
    }
    pairs = {}
    for key in keys:
        if key not in _LENGTHS:
            flag = flags.get(key, to_flag(key))
            pairs[flag] = (f"{flag} {saved[key]}", f"{flag} {ours[key]}")
    if set(keys) & set(_LENGTHS):
        pairs |= _name_lengths_that_differ(args, saved_args, saved, ours)
    return {key: pair[0] for key, pair in pairs.items()}, {key: pair[1] for key, pair in pairs.items()}


def _name_lengths_that_differ(
    args: Namespace, saved_args: Namespace, saved: dict[str, Any], ours: dict[str, Any]
) -> dict[str, tuple[str, str]]:
    """Return {what differs: (flag and value of the saved run, of this run)} of the lengths of a schedule."""
    if not _is_schedule_of(saved_args, saved):
        # The saved run had itself kept the schedule of an earlier one, which no flag of it describes.
        return {"schedule": (_describe_lengths(saved), _describe_lengths(ours))}
    theirs, these = _name_lengths(saved_args), _name_lengths(args)
    names = [name for name in theirs if name in these and theirs[name] != these[name]]
    follows = [flags["decay"].split()[1] == flags["train"].split()[1] for flags in (theirs, these)]
    if all(follows) and "train" in names:
        names.remove("decay")
    if "warmup" in names and saved["lr_warmup_steps"] == ours["lr_warmup_steps"] == 0:
        names.remove("warmup")
    pairs = {name: (theirs[name], these[name]) for name in names}
    if "batch" in pairs and args.global_batch_size == args.micro_batch_size * args.data_parallel_size:
        ranks = f"--micro-batch-size {args.micro_batch_size} x {args.data_parallel_size} data-parallel ranks"
        pairs["batch"] = (theirs["batch"], f"{these['batch']} ({ranks})")
    return pairs


def _is_schedule_of(saved_args: Namespace, saved: dict[str, Any]) -> bool:
    """Return whether saved flags describe the lengths of the saved schedule."""
    try:
        described = _compute_schedule(saved_args)
    except (AttributeError, TypeError):  # flags of another program, or of another release of Megatron
        return False
    return all(described.get(key) == saved.get(key) for key in _LENGTHS)


def _describe_lengths(schedule: dict[str, Any]) -> str:
    decay, total, warmup = (f"{schedule[key]:g}" for key in _LENGTHS)
    return f"a schedule of {decay} samples (warm-up {warmup}, weight decay {total})"


def _name_lengths(args: Namespace) -> dict[str, str]:
    """Return {length of a schedule: the flag and its value}."""
    unit = _unit_of(args)
    total = getattr(args, f"train_{unit}")
    named = {"batch": f"--global-batch-size {args.global_batch_size}"} if unit == "iters" else {}
    named["train"] = f"--train-{unit} {total}"
    named["decay"] = f"--lr-decay-{unit} {getattr(args, f'lr_decay_{unit}') or total}"
    named["warmup"] = f"--lr-warmup-{unit} {getattr(args, f'lr_warmup_{unit}')}"
    if args.lr_warmup_fraction is not None:
        named["warmup"] = f"--lr-warmup-fraction {args.lr_warmup_fraction}"
    return named


def _advise_saved(args: Namespace, found: FoundCheckpoint, saved: dict[str, Any], theirs: dict[str, str]) -> str:
    """Return the flags that make the schedule the saved one, or "" if they leave nothing to train or are unknown."""
    is_finished = saved["num_steps"] >= saved["wd_incr_steps"]
    if "schedule" in theirs or ("train" in theirs and is_finished):
        return ""
    flags = dict(theirs)
    if batch := flags.pop("batch", None):  # last, because its advice may be longer
        flags["batch"] = batch + _advise_layout(args, found.args.global_batch_size)
    return f"{' '.join(flags.values())} for the saved schedule, or "


def _advise_layout(args: Namespace, batch: int) -> str:
    """Return what else a global batch of this size needs at this run's number of ranks."""
    ranks = max(n for n in range(1, args.data_parallel_size + 1) if batch % n == 0)
    micro = max(n for n in range(1, args.micro_batch_size + 1) if batch // ranks % n == 0)
    smaller = f" --micro-batch-size {micro}" if micro < args.micro_batch_size else ""
    if ranks == args.data_parallel_size:
        return smaller
    return f"{smaller} on {ranks} data-parallel {'rank' if ranks == 1 else 'ranks'}"


def _advise_decay(args: Namespace, saved: dict[str, Any], step: int, decay: int | None) -> str:
    """Return the --lr-decay-iters with which the decay ends with the run, or "" if it does without.

    The flags' schedule counts this run's batches from step 0, and the saved position counts those before, which may
    have been larger or smaller.

    Args:
        args: flags of this run.
        saved: the saved schedule.
        step: step of the checkpoint.
        decay: --lr-decay-iters; None if it was not given.
    """
    last: int = decay or args.train_iters or 0
    if _unit_of(args) == "samples" or saved["num_steps"] == step * args.global_batch_size or last <= step:
        return ""
    needed = -(-saved["num_steps"] // args.global_batch_size) + last - step
    return f" --lr-decay-iters {needed}" if needed > (args.lr_warmup_iters or 0) else ""


def _end_of(schedule: dict[str, Any]) -> float:
    """Return the sample until which a run meant to train; steps at the minimum rate before it are its own choice."""
    return max(schedule["lr_decay_steps"], schedule["wd_incr_steps"])


def _count_steps_after(args: Namespace, schedule: dict[str, Any], step: int, end: float) -> int:
    """Return how many steps of the resumed run train at the minimum rate because they begin at this sample or later."""
    if schedule["lr_decay_style"] == "constant":
        return 0
    seen, batch = schedule["num_steps"], args.global_batch_size
    left = -(-(args.train_samples - seen) // batch) if _unit_of(args) == "samples" else args.train_iters - step
    before = max(0, -int(-(end - seen) // batch))
    return max(0, left - before)
