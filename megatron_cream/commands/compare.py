"""`evaluate.py compare BASE EXTENDED`: one page of what an extension gained and cost, from finished results."""

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_cream.checkpoint import card, output
from megatron_cream.common.cli import program_name
from megatron_cream.common.errors import UsageError
from megatron_cream.common.files import convert_disk_errors
from megatron_cream.evaluation.comparison import measures, page
from megatron_cream.evaluation.comparison.sides import EXTENDED, Result, find_unpaired, read_pairs
from megatron_cream.evaluation.models.language_model import compute_digest

_ROOM = 16 << 20  # for the page and its pictures


def run_compare(args) -> None:
    """Compare the results in args.base and args.extended; write the page, and the results into the model card."""
    if args.suite:
        args.base, args.extended = args.base / args.suite, args.extended / args.suite
    pairs = read_pairs(args.base, args.extended, args.tasks)
    for name, side in find_unpaired(args.base, args.extended).items():
        print(f"{program_name()}: {name} is not compared: only {side} has it", file=sys.stderr)
    folder_of_card = _find_card(args.card, pairs[0].extended)
    output.check_target(args.output.absolute(), flag="--output", overwrite=args.overwrite)
    comparison = measures.compare(pairs)
    with output.new_folder(args.output, flag="--output", overwrite=args.overwrite, needs_bytes=_ROOM) as folder:
        page.write_page(comparison, folder)
        output.write_manifest(folder, {})
    if folder_of_card:
        with convert_disk_errors(folder_of_card, "--card", f"the page is in {args.output}"):
            card.fill_in_results(folder_of_card, page.format_card_results(comparison))
    _print_overview(comparison)
    print(f"{args.output}: {page.PAGE}, {page.HTML}, {page.DATA}")
    if folder_of_card:
        print(f"{folder_of_card / card.CARD}: results filled in")
    else:
        print("no model card was filled in: give --card, the folder that --save-hf or convert_hf.py export wrote")


def _find_card(given: Path | None, extended: Result) -> Path | None:
    """Return the folder whose model card gets the results: --card, or that of the evaluated model.

    Raises:
        UsageError: --card has no such card, or is another model.
    """
    folder = given or Path(extended.summary["model_path"])
    is_folder_of_model = extended.model["format"] == "huggingface"
    if given is None and not (is_folder_of_model and folder.is_dir() and card.has_place_for_results(folder)):
        return None
    if not card.has_place_for_results(folder):
        raise UsageError(
            f"--card {folder}: its {card.CARD} has no place for results. Give a folder that --save-hf or "
            "convert_hf.py export wrote from a run's checkpoint"
        )
    if is_folder_of_model and compute_digest([folder]) != extended.model["digest"]:
        if given is None:
            print(f"{program_name()}: {folder}: the model was changed after its evaluation", file=sys.stderr)
            return None
        raise UsageError(
            f"--card {folder}: not the model of {EXTENDED} {extended.folder}. Give the folder of that model"
        )
    return folder


def _print_overview(comparison: measures.Comparison) -> None:
    first = comparison.pairs[0]
    table = Table(title=f"{first.base.model_name} and {first.extended.model_name}")
    for name in ("", "examples", "base", "extended", "change", "95 % interval", ""):
        table.add_column(name, justify="right" if name else "left")
    for rows in (comparison.beyond, comparison.within):
        for row in rows:
            table.add_row(*page.format_cells(row))
        table.add_section()
    Console().print(table)
