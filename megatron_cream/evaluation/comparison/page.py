"""The page of a comparison: Markdown, and the same as one HTML file that holds its pictures."""

import base64
import html
import re
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

from megatron_cream.common.files import atomic_write, to_json
from megatron_cream.common.markdown import escape_markdown, format_row
from megatron_cream.evaluation.comparison import pictures
from megatron_cream.evaluation.comparison.bootstrap import LEVEL, RESAMPLES, SEED, Interval
from megatron_cream.evaluation.comparison.measures import FEW, Comparison, Row, format_tokens
from megatron_cream.evaluation.comparison.sides import Pair, describe_differences

PAGE, HTML, DATA = "comparison.md", "comparison.html", "comparison.json"
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; color: #111 }
img { max-width: 100% }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { border-bottom: 1px solid #ccc; padding: .25rem .7rem; text-align: left }
td { font-variant-numeric: tabular-nums }
code { background: #f2f2f2; padding: 0 .2rem }
"""


def write_page(comparison: Comparison, folder: Path) -> None:
    """Write the Markdown, the HTML, the numbers as JSON, and the pictures into an empty folder."""
    text = _build_page(comparison, _draw_pictures(comparison, folder))
    contents = {PAGE: text, HTML: _to_html(text, _make_title(comparison), folder), DATA: _to_data(comparison)}
    for name, content in contents.items():
        with atomic_write(folder / name) as file:
            file.write(content)


def format_results(comparison: Comparison) -> str:
    """Return the tables of gain and cost as Markdown, for the page and for a model card."""
    window, parts = comparison.window, []
    if comparison.beyond:
        title = f"Gain: beyond the base model's {format_tokens(window)} tokens" if window else "All lengths"
        parts.append(f"### {title}\n\n{format_table(('what',), comparison.beyond)}")
    elif window:
        parts.append(f"### Gain\n\nNot measured: no example is longer than the base model's {window:,} tokens.")
    if comparison.within:
        title = f"Cost: up to {format_tokens(window)} tokens, and short tasks" if window else "Short tasks"
        parts.append(f"### {title}\n\n{format_table(('what',), comparison.within)}")
    elif window:
        parts.append(f"### Cost\n\nNot measured: no example fits into {window:,} tokens, and no short task was run.")
    return "\n\n".join([*parts, _HOW_TO_READ])


def format_card_results(comparison: Comparison) -> str:
    """Return the results as Markdown for the extended model's card: the models, how they ran, gain and cost."""
    base, extended = comparison.pairs[0].base, comparison.pairs[0].extended
    devices = ", ".join(sorted({pair.extended.gpu for pair in comparison.pairs}))
    how = escape_markdown(f"{extended.model.get('engine')} in {extended.dtype} on {devices}")
    about = (
        f"Compared with {escape_markdown(base.model_name)} (digest `{str(base.model['digest'])[:12]}`) on the same "
        f"examples. The extended model ran with {how}."
    )
    notes = [escape_markdown(sentence) for sentence in describe_differences(comparison.pairs)]
    return "\n\n".join([" ".join([about, *notes]), format_results(comparison)])


_HOW_TO_READ = (
    f"Scores are in %, changes of a score in points, changes of a perplexity (ppl) in %. The interval of a change is a "
    f"{LEVEL:.0%} percentile bootstrap over pairs of the same example ({RESAMPLES:,} resamples, seed {SEED}). *Better* "
    f"and *worse*: the interval excludes 0. Of 20 intervals without a true change about one does so by chance. *Few "
    f"examples*: fewer than {FEW}, no claim is made. *All alike*: every example changed by the same amount, so the "
    "bootstrap has no spread; with n examples, up to about 3/n of all such examples may still behave otherwise."
)


def format_table(headings: tuple[str, ...], rows: list[Row]) -> str:
    """Return a Markdown table of rows."""
    names = [*headings, "examples", "base", "extended", "change", f"{LEVEL:.0%} interval", ""]
    lines = [format_row(names), format_row(["---"] * len(headings) + ["---:"] * 5 + ["---"])]
    lines += [format_row([escape_markdown(cell) for cell in format_cells(row)]) for row in rows]
    return "\n".join(lines)


def format_cells(row: Row) -> list[str]:
    """Return a row as text: names, examples, base, extended, change, interval, verdict."""
    unit = " %" if row.kind == "perplexity" else ""
    interval = (
        "all alike"
        if row.is_uniform
        else f"{_format_change(row.change.low)} to {_format_change(row.change.high)}{unit}"
    )
    means = [_format_mean(row, row.base), _format_mean(row, row.extended)]
    return [*row.names, f"{row.examples:,}", *means, f"{_format_change(row.change.mean)}{unit}", interval, row.verdict]


def _build_page(comparison: Comparison, drawn: dict[str, list[str]]) -> str:
    pairs = comparison.pairs
    parts = [
        f"# {escape_markdown(_make_title(comparison))}",
        "The same examples, answered by the base model and by the extended model.",
        _build_model_table(comparison),
        *(f"Note: {escape_markdown(sentence)}" for sentence in describe_differences(pairs)),
        "## In short",
        format_results(comparison),
        *_link_pictures(drawn[""]),
    ]
    for pair in pairs:
        parts.append(f"## {escape_markdown(pair.title)}")
        parts += _link_pictures(drawn[pair.title])
        for table in comparison.tables[pair.title]:
            parts.append(f"### {pair.task} {table.title}\n\n{format_table(table.headings, table.rows)}")
        if left_out := _find_left_out(pair):
            names = escape_markdown(", ".join(left_out))
            parts.append(f"Not compared, as they have no score from 0 to 1 for each question: {names}.")
        settings = {name: value for name, value in pair.base.settings.items() if name != "command" and _is_set(value)}
        listed = ", ".join(f"{name} {to_json(value, ensure_ascii=False)}" for name, value in settings.items())
        parts.append(f"Settings of both: {escape_markdown(listed)}")
    newest = pairs[0].extended.summary.get("versions", {})
    versions = ", ".join(f"{name} {version}" for name, version in newest.items())
    versions = escape_markdown(f"The extended model's results of {pairs[0].title}: {versions}.")
    parts.append(f"## Versions\n\n{versions}")
    return "\n\n".join(parts) + "\n"


def _is_set(value: Any) -> bool:
    return value is not None and value is not False and value != []


def _build_model_table(comparison: Comparison) -> str:
    first, several = comparison.pairs[0], len(comparison.pairs) > 1
    sides, windows = (first.base, first.extended), (comparison.window, comparison.extended_window)
    cells = {
        "model": [escape_markdown(side.model_name) for side in sides],
        "window": [f"{window:,} tokens" if window else "unknown" for window in windows],
        "step": [escape_markdown(str(side.model.get("step") or "-")) for side in sides],
        "digest": [f"`{str(side.model['digest'])[:12]}`" for side in sides],
        "ran with": [escape_markdown(f"{side.model.get('engine')}, {side.dtype}") for side in sides],
        "results": [escape_markdown(str(side.folder.parent if several else side.folder)) for side in sides],
    }
    rows = [format_row(["", "base", "extended"]), format_row(["---"] * 3)]
    return "\n".join(rows + [format_row([name, *values]) for name, values in cells.items()])


def _find_left_out(pair: Pair) -> list[str]:
    """Return a harness run's tasks and groups of tasks that gave no records."""
    if pair.task != "harness":
        return []
    there = {record["part"].partition("/")[0] for record in pair.base.records.values()}
    found = pair.base.summary.get("results") or {}
    return [name for name in found if name not in there]


def _draw_pictures(comparison: Comparison, folder: Path) -> dict[str, list[str]]:
    """Draw all pictures; return the names of their files by the title of their section, "" for the first."""
    pairs, window = comparison.pairs, comparison.window
    drawn: dict[str, list[str]] = {"": []} | {pair.title: [] for pair in pairs}

    def add(title: str, name: str) -> Path:
        drawn[title].append(name)
        return folder / name

    if scores := [row for row in comparison.beyond + comparison.within if row.kind == "score"]:
        pictures.draw_changes(scores, add("", "changes.png"))
    for number, pair in enumerate(pairs):
        found, stem = comparison.tables[pair.title], pair.task if pair.title == pair.task else f"{pair.task}_{number}"
        if pair.task in ("harness", "longbench"):
            if found:
                pictures.draw_changes(found[0].rows, add(pair.title, f"{stem}.png"))
            continue
        if found:
            pictures.draw_lines(found[0], window, add(pair.title, f"{stem}.png"))
        for table in found[1:]:
            if len(table.headings) == 2 and pair.task != "ruler":
                pictures.draw_cells(table, add(pair.title, f"{stem}_cells.png"))
    return drawn


def _link_pictures(names: list[str]) -> list[str]:
    return [f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in names]


def _to_html(text: str, title: str, folder: Path) -> str:
    body = MarkdownIt("js-default").render(text)  # shows HTML in the text as text

    def inline(match: re.Match) -> str:
        data = base64.b64encode((folder / match[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{data}"'

    body = re.sub(r'src="(\w+\.png)"', inline, body)
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n{body}</body></html>\n'


def _to_data(comparison: Comparison) -> str:
    def plain(row: Row) -> dict[str, Any]:
        means = {name: vars(getattr(row, name)) for name in ("base", "extended", "change")}
        return {"names": row.names, "kind": row.kind, "examples": row.examples, **means, "verdict": row.verdict}

    first = comparison.pairs[0]
    value = {
        "models": {side: getattr(first, side).summary["model"] for side in ("base", "extended")},
        "bootstrap": {"level": LEVEL, "resamples": RESAMPLES, "seed": SEED},
        "beyond_base_window": [plain(row) for row in comparison.beyond],
        "within_base_window": [plain(row) for row in comparison.within],
        "tasks": {
            title: {table.title: [plain(row) for row in table.rows] for table in some}
            for title, some in comparison.tables.items()
        },
    }
    return to_json(value, indent=2, ensure_ascii=False) + "\n"


def _make_title(comparison: Comparison) -> str:
    first = comparison.pairs[0]
    return f"Before and after: {first.base.model_name} and {first.extended.model_name}"


def _format_mean(row: Row, interval: Interval) -> str:
    if row.kind == "perplexity":
        return f"{interval.mean:,.2f} ppl" if interval.mean < 1e6 else f"{interval.mean:.3g} ppl"
    return f"{interval.mean:.1f}"


def _format_change(value: float) -> str:
    return f"{value:+,.1f}"
