"""Write docs/flags.md from megatron_cream/config/flag_support.py: python docs/make_flags.py"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_cream.patches import platform

platform.setup()

from megatron_cream.config import flag_support
from megatron_cream.config.parser import build_parser

HEAD = """# Flags

What each flag of `--help` does with this project's Llama, by Megatron's groups of arguments. Made from
`megatron_cream/config/flag_support.py` by `python docs/make_flags.py`; a test runs every refused flag.

- **Tested**: works; the named file in `tests/` runs it.
- **Untested**: passed on to Megatron as it is; no test of this project runs it.
- **Refused**: ends the run with one line, which gives the reason, before anything is started. At its default
  value such a flag is accepted.

| | flags |
|---|---:|
"""
KINDS = {"tested": "Tested", "untested": "Untested", "refused": "Refused"}


def page() -> str:
    """Return the text of docs/flags.md."""
    parser = build_parser(recipe=False)
    support = flag_support.sort_flags(parser)
    parts = [HEAD]
    for kind, title in KINDS.items():
        parts.append(f"| {title.lower()} | {sum(each.kind == kind for each in support.values())} |\n")
    for group in parser._action_groups:
        names = [flag_support.name_of(action) for action in group._group_actions if action.dest != "help"]
        if names:
            parts.append(_section(group.title, {name: support[name] for name in names}))
    return "".join(parts)


def _section(title: str, support: dict[str, flag_support.Support]) -> str:
    lines = [f"\n## {title}\n"]
    for kind, heading in KINDS.items():
        by_words: dict[str, list[str]] = {}
        for name, (its_kind, words) in support.items():
            if its_kind == kind:
                by_words.setdefault(words, []).append(f"`--{name}`")
        lines += [f"- {heading}, {words}: {', '.join(names)}" for words, names in sorted(by_words.items())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "flags.md").write_text(page())
