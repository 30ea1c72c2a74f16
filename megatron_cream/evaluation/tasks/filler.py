"""Long filler text, and prompts that fill a context length as far as their unit of filler allows."""

import ast
import re
import sysconfig
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import islice, pairwise
from pathlib import Path

from megatron_cream.common.errors import UsageError
from megatron_cream.data.embedded import source_files
from megatron_cream.evaluation.tasks.task import Tokenizer


class TooShort(UsageError):
    """A context length that is too short for a task."""


_PARAGRAPH_END = re.compile(r"\n\s*\n")
# A sentence ends after a full stop, unless the next word starts with a lower-case letter.
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[^a-z\s])")
_WITHOUT_STRINGS = {ast.Name, ast.Load, ast.Store, ast.Del}


def load_sentences(folder: Path | None = None) -> list[str]:
    """Return the sentences of a folder's .txt files, in the order of the files' names.

    Whitespace becomes single spaces. The published tests use Paul Graham's essays, which a user can put into
    such a folder. Without a folder the text is prose of the running Python's standard library: docstrings and
    help texts of its modules, about 1.1 million characters, which need no download.

    Raises:
        UsageError: the folder does not exist or has no text.
    """
    return list(_read_standard_library()) if folder is None else _read_folder(Path(folder))


def split_sentences(text: str) -> list[str]:
    """Split a text into sentences with single spaces between words."""
    return _SENTENCE_END.sub(lambda end: end.group().rstrip() + "\n", " ".join(text.split())).splitlines()


class Haystack:
    """Filler of any length: the sentences in order from number `start`, repeated from the first after the last."""

    def __init__(self, tokenizer: Tokenizer, sentences: Sequence[str], start: int = 0):
        self._tokenizer = tokenizer
        self._sentences, self._start = sentences, start
        self._words: list[str] = []
        # For each sentence taken so far and for the next one: words before it, tokens before it.
        self._starts, self._tokens = [0], [0]

    def estimate_words(self, tokens: int) -> int:
        """Return approximately how many words have that many tokens."""
        while self._tokens[-1] < tokens:
            self._take_sentence()
        return self._starts[bisect_left(self._tokens, tokens)]

    def split(self, words: int, depths: Sequence[float]) -> list[str]:
        """Cut the first `words` words near each depth; return len(depths) + 1 texts.

        Args:
            words: number of words in all texts together.
            depths: share of the tokens before each cut, ascending. A cut is at the nearest start of a
                sentence, or after the last word.
        """
        while self._starts[-1] < words:
            self._take_sentence()
        last = bisect_right(self._starts, words) - 1
        starts, tokens = self._starts[: last + 1], self._tokens[: last + 1]
        if starts[-1] < words:  # the last sentence is cut short
            share = (words - starts[-1]) / (self._starts[last + 1] - starts[-1])
            tokens.append(tokens[-1] + share * (self._tokens[last + 1] - tokens[-1]))
            starts.append(words)
        cuts = [0, *(starts[_find_nearest(tokens, depth * tokens[-1])] for depth in depths), words]
        return [" ".join(self._words[first:end]) for first, end in pairwise(cuts)]

    def _take_sentence(self) -> None:
        sentence = self._sentences[(self._start + len(self._starts) - 1) % len(self._sentences)]
        self._words += sentence.split()
        self._starts.append(len(self._words))
        self._tokens.append(self._tokens[-1] + len(self._tokenizer.encode(sentence)))


class LazyList[T]:
    """A list that draws its items on demand: `first(n)` always starts with the items of any smaller n."""

    def __init__(self, items: Iterator[T]):
        self._items, self._drawn = items, []

    def first(self, n: int) -> list[T]:
        """Return the first `n` items."""
        self._drawn += islice(self._items, max(0, n - len(self._drawn)))
        return self._drawn[:n]


def draw_distinct[T](draw: Callable[[], T]) -> Iterator[T]:
    """Yield the values of `draw` without repetition, without end."""
    seen = set()
    while True:
        if (item := draw()) not in seen:
            seen.add(item)
            yield item


def fit(
    tokenizer: Tokenizer,
    prompt: Callable[[int], str],
    *,
    task: str,
    length: int,
    max_new_tokens: int,
    least: int,
    guess: int | None = None,
) -> int:
    """Return the most units of filler with which prompt and answer fit in `length`.

    Args:
        tokenizer: the model's tokenizer.
        prompt: returns the prompt with n units of filler; it must grow with n.
        task: the task's name, for the message.
        length: maximum tokens of the prompt and the longest answer together.
        max_new_tokens: tokens of the longest answer.
        least: minimum number of units.
        guess: approximate result, if known; it only saves time.

    Returns: n >= least for which the prompt fits, while that with n + 1 units does not.

    Raises:
        TooShort: not even `least` units fit.
    """
    budget = length - max_new_tokens

    def count(n: int) -> int:
        return len(tokenizer.encode(prompt(n)))

    fits, fits_tokens = least, count(least)
    if fits_tokens > budget:
        raise TooShort(
            f"context length {length}: too short for {task}, which takes {fits_tokens + max_new_tokens} tokens or more"
        )
    over, over_tokens, tries = None, 0, 0
    n = max(guess or 0, 2 * least, least + 8)
    while over is None or over - fits > 1:
        tokens = count(n)
        slope = max((tokens - fits_tokens) / (n - fits), 1e-3)
        if tokens > budget:
            over, over_tokens = n, tokens
        else:
            fits, fits_tokens = n, tokens
        tries += 1
        if over is None:
            n = fits + min(int((budget - fits_tokens) / slope) + 1, 8 * fits)
        else:
            share = (budget - fits_tokens) / (over_tokens - fits_tokens)
            # Halving at every fourth try limits the number of tries for any text.
            n = (fits + over) // 2 if tries % 4 == 0 else fits + int(share * (over - fits))
            n = min(max(n, fits + 1), over - 1)
    return fits


@cache
def _read_standard_library() -> tuple[str, ...]:
    found: dict[str, None] = {}  # a set that keeps the order
    for path in source_files(Path(sysconfig.get_path("stdlib"))):
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:  # test files with intentional errors
            continue
        for string in find_strings(tree):
            for paragraph in _PARAGRAPH_END.split(string):
                if _is_prose(text := " ".join(paragraph.split())):
                    found |= dict.fromkeys(split_sentences(text))
    return tuple(found)


def find_strings(tree: ast.AST) -> Iterator[str]:
    """Yield the strings of a syntax tree in the order of ast.walk, which takes four times as long."""
    nodes = [tree]
    for node in nodes:  # it grows
        if type(node) is ast.Constant:
            if isinstance(node.value, str):
                yield node.value
            continue
        for name in node._fields:
            value = getattr(node, name)
            if type(value) is list:
                nodes += [each for each in value if isinstance(each, ast.AST)]
            elif isinstance(value, ast.AST) and type(value) not in _WITHOUT_STRINGS:
                nodes.append(value)


def _is_prose(text: str) -> bool:
    return text[:1].isupper() and text.endswith(".") and ">>>" not in text and text.count(" ") >= 7


def _read_folder(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise UsageError(f"--haystack {folder}: no such folder. Give a folder with .txt files.")
    found = []
    for path in sorted(folder.glob("*.txt")):
        try:
            found += split_sentences(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--haystack {path}: not a text file in UTF-8 ({error})") from error
    if not found:
        raise UsageError(f"--haystack {folder}: there is no text in .txt files")
    return found


def _find_nearest(ascending: Sequence[float], value: float) -> int:
    """Return the index of the entry nearest to `value`."""
    i = bisect_left(ascending, value)
    if i == len(ascending) or (i > 0 and value - ascending[i - 1] <= ascending[i] - value):
        return i - 1
    return i
