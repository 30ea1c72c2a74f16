"""Draw which positions and distances between tokens a position sampler trains.

python tools/plot_positions.py --output positions.png
python tools/plot_positions.py --seq-length 4096 --target-length 32768 --samplers cream pose randpos --sigmas 1 3 10
python tools/plot_positions.py --middles gaussian uniform --pose-chunks 2 4 --mixes cream=0.6,pose=0.2,pi=0.2

Many samples are drawn from each sampler (for cream, one curve for each middle, sigma and variant). The picture shows,
over the target window, how often each position is trained, how often by the middle segment, and how often each
distance between two tokens occurs. The model never learns a distance that no sample has.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from megatron_cream.common.cli import OneLineParser, path, positive, program_name
from megatron_cream.common.errors import UsageError
from megatron_cream.common.files import check_picture, convert_disk_errors, save_picture
from megatron_cream.config.samplers import read_shares
from megatron_cream.positions import SAMPLERS, build_sampler
from megatron_cream.positions.coverage import Coverage, coverage
from megatron_cream.positions.cream import MIDDLES

MAX_SAMPLES = 10_000_000


def main() -> int:
    args = parser().parse_args()
    try:
        check_picture(args.output, "--output")
        if args.samples > MAX_SAMPLES:
            raise UsageError(f"--samples {args.samples}: must be {MAX_SAMPLES} or less")
        measured = {name: measure(args, options) for name, options in curves(args).items()}
        draw(measured, args)
    except (UsageError, ValueError, OSError) as error:
        print(f"{program_name()}: error: {error}", file=sys.stderr)
        return 2
    show(measured, args)
    print(f"Picture: {args.output}")
    return 0


def curves(args) -> dict[str, dict]:
    """Return {name of the curve: options of `build_sampler`}."""
    result = {}
    for name in args.samplers:
        if name == "pose":
            for chunks in args.pose_chunks:
                result[name if chunks == 2 else f"pose, {chunks} chunks"] = dict(name=name, chunks=chunks)
            continue
        if name != "cream":
            result[name] = dict(name=name)
            continue
        for variant in args.variants:
            end = f", {variant}" if len(args.variants) > 1 else ""
            options = dict(name="cream", variant=variant)
            for sigma in args.sigmas if "gaussian" in args.middles else []:
                result[f"cream, sigma {sigma:g}{end}"] = options | dict(sigma=sigma)
            for middle in args.middles:
                if middle != "gaussian":
                    result[f"cream, {middle}{end}"] = options | dict(middle=middle)
    return result | {text: dict(name="mix", shares=read_shares(text)) for text in args.mixes}


def measure(args, options: dict) -> Coverage:
    """Draw samples with these options of `build_sampler`, and count positions and distances."""
    sampler = build_sampler(**options, window=args.seq_length, target=args.target_length, seed=args.seed)
    length = args.document_length or args.target_length
    return coverage(sampler, target=args.target_length, samples=args.samples, document_length=length)


def show(measured: dict[str, Coverage], args) -> None:
    """Print the table of shares."""
    table = Table(title=f"{args.samples} samples of {args.seq_length} tokens, target window {args.target_length}")
    for column in ("sampler", "positions ever trained", "distances ever seen", "distances in 1 sample of 10"):
        table.add_column(column, justify="left" if column == "sampler" else "right")
    for name, found in measured.items():
        shares = (found.position > 0).mean(), (found.distance > 0).mean(), (found.distance >= 0.1).mean()
        table.add_row(name, *(f"{share:.1%}" for share in shares))
    Console().print(table)


def draw(measured: dict[str, Coverage], args) -> None:
    """Draw the curves, and save the picture to --output."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {
        "position": ("position id", "samples that train it"),
        "middle": ("position id", "samples whose middle holds it"),
        "distance": ("distance between two tokens", "samples that have it"),
    }
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.4), layout="constrained")
    for panel, (field, (x, y)) in zip(axes, panels.items(), strict=True):
        for name, found in measured.items():
            values = getattr(found, field)
            if field == "middle" and not values.any():
                continue
            panel.plot(*binned(values), label=name, linewidth=1.4)
        panel.axvline(args.seq_length, color="0.6", linewidth=1, linestyle="--", zorder=0)
        panel.set_xlim(0, args.target_length)
        panel.set_ylim(bottom=0)
        panel.set_xlabel(x)
        panel.set_ylabel(y)
        panel.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=9)
    axes[0].set_title(f"dashed: the trained window, {args.seq_length}", fontsize=9, loc="left", color="0.4")
    with convert_disk_errors(args.output, "--output"):
        save_picture(figure, args.output)
    plt.close(figure)


def binned(values: np.ndarray, bins: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Return the centres of equal parts of the positions, and the mean value in each."""
    parts = np.array_split(values, min(bins, len(values)))
    edges = np.cumsum([0, *map(len, parts)])
    return (edges[:-1] + edges[1:]) / 2, np.array([part.mean() for part in parts])


def parser() -> argparse.ArgumentParser:
    result = OneLineParser(
        prog=program_name(),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = result.add_argument
    add("--seq-length", type=int, default=4096, metavar="N", help="the trained window (default 4096)")
    add("--target-length", type=int, default=32768, metavar="L", help="the window to extend to (default 32768)")
    single = [name for name in SAMPLERS if name != "mix"]
    add("--samplers", nargs="+", choices=single, default=["cream", "pose", "randpos", "pi"])
    add("--sigmas", nargs="+", type=float, default=[3.0], help="of cream; one curve each (default 3)")
    add("--middles", nargs="+", choices=list(MIDDLES), default=["gaussian"], help="of cream; one curve each")
    add("--pose-chunks", nargs="+", type=int, default=[2], metavar="K", help="of pose; one curve each (default 2)")
    add("--mixes", nargs="+", default=[], metavar="SHARES", help="mixtures, such as cream=0.6,pose=0.4; one curve each")
    add("--variants", nargs="+", choices=["paper", "released"], default=["paper"], help="of cream; one curve each")
    add("--samples", type=positive, default=1000, help="drawn for each curve (default 1000)")
    add("--document-length", type=positive, help="of every document, in tokens (default: --target-length)")
    add("--seed", type=int, default=1234)
    add("--output", type=path, default=Path("positions.png"), help="the picture (default positions.png)")
    return result
