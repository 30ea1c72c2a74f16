"""Text of files and flags inside Markdown that this project writes."""

import re
from collections.abc import Iterable


def escape_markdown(text: str) -> str:
    """Make one line of plain text that Markdown shows as it is, in a table too."""
    return re.sub(r"([\\`*_{}\[\]<>|#~])", r"\\\1", " ".join(text.split()))


def format_row(cells: Iterable[str]) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"
