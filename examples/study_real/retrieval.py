"""Retrieval by teacher forcing, with many answers in one forward pass, and held-out perplexity by length.

A prompt states facts ("The number of the quiet falcon is 48213.") at known depths of a long text, and repeats
several of them at its end. The repeated numbers are scored, each given all tokens before it, so that one pass over
64K tokens scores all questions of a prompt. Three tasks:

    needle    one fact in held-out text
    multikey  16 facts in held-out text, all asked for
    lines     facts only, hundreds to thousands; 16 of them are asked for

An answer counts as found if each of its tokens is the likeliest, so that greedy decoding would produce it.
"""

import itertools
import random
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

TASKS = ("needle", "multikey", "lines")
_ADJECTIVES = (
    "quiet rapid golden silver hollow gentle bitter ancient frozen broken clever crimson dusty eager faint fierce "
    "giant happy humble jolly keen lazy little lonely lucky mellow mighty misty modest narrow noble odd pale patient "
    "plain polite proud purple quick rare rough round rusty sacred salty sandy scarlet sharp shiny short silent simple "
    "sleepy slow small smooth solid sour spicy steep sticky stormy strange strong sunny sweet swift tall tame tidy"
).split()
_NOUNS = (
    "falcon river castle garden hammer island jacket kettle ladder magnet needle ocean palace quarry rabbit saddle "
    "tunnel umbrella valley wagon anchor basket candle desert engine feather glacier harbor insect jungle kitten "
    "lantern meadow nettle orchard pepper quilt ribbon shadow temple violin walnut yogurt zebra arrow bridge camel "
    "dragon eagle forest goblet helmet iceberg jewel kingdom lemon mirror noodle oyster pillow rocket spider turtle "
    "unicorn village whistle acorn button cactus dolphin"
).split()


@dataclass(frozen=True)
class Prompts:
    """Prompts of one task and length, and the places of their answers.

    tokens: uint16 [prompts, length].
    answers: int32 [prompts, questions, 3]: index of the answer's first token, index after its last, depth in 1/1000.
    """

    tokens: np.ndarray
    answers: np.ndarray


class PromptWriter:
    """Writer of prompts with exact lengths.

    Args:
        encode: function from text to token ids, without special tokens.
        filler: integer arrays of held-out tokens, each longer than the longest prompt.
    """

    def __init__(self, encode, filler: list[np.ndarray]):
        self._encode, self._filler = encode, filler
        self._newlines = {token for token in (encode("\n")[-1], encode("\n\n")[-1], encode(".\n")[-1])}

    def prompts(self, task: str, length: int, count: int, questions: int) -> Prompts:
        """Return `count` prompts, equal for equal arguments; `needle` asks one question each, at even depths."""
        made = []
        for i in range(count):
            rng = random.Random(f"{task}/{length}/{i}")
            if task == "needle":
                depths = [(i % 5) / 4]
            else:
                depths = [(q + rng.random()) / questions for q in range(questions)]
            made.append(self._lines(rng, length, depths) if task == "lines" else self._text(rng, length, depths, i))
        tokens, answers = zip(*made)
        return Prompts(np.array(tokens, dtype=np.uint16), np.array(answers, dtype=np.int32))

    def _text(self, rng: random.Random, length: int, depths: list[float], number: int):
        facts = [self._fact(*names, rng) for names in self._names(rng, len(depths))]
        ending, places = self._questions(rng, facts, depths)
        stated = [[*self._encode("\n"), *lead, *answer, *self._encode(".\n")] for lead, answer in facts]
        room = length - len(ending) - sum(map(len, stated))
        source = self._filler[number % len(self._filler)]
        start = rng.randrange(len(source) - room)
        text = source[start : start + room].tolist()
        tokens, at = [], 0
        for depth, fact in zip(depths, stated):
            place = self._line_end(text, round(depth * room), at)
            tokens += text[at:place] + fact
            at = place
        tokens += text[at:] + ending
        return tokens, _shifted(places, length - len(ending))

    def _lines(self, rng: random.Random, length: int, depths: list[float]):
        every = [self._fact(*names, rng) for names in self._names(rng, len(_ADJECTIVES) * len(_NOUNS))]
        end = self._encode(".\n")
        most = max(len(lead) + len(answer) + len(end) for lead, answer in every)
        asked_room = len(depths) * most + len(self._encode(_ASKED))
        kept, used = [], 0
        for lead, answer in every:
            if used + len(lead) + len(answer) + len(end) > length - asked_room:
                break
            kept.append((lead, answer))
            used += len(lead) + len(answer) + len(end)
        chosen = sorted({min(int(depth * len(kept)), len(kept) - 1) for depth in depths})
        spare = [i for i in range(len(kept)) if i not in chosen]
        chosen = sorted(chosen + rng.sample(spare, len(depths) - len(chosen)))
        ending, places = self._questions(rng, [kept[i] for i in chosen], [i / len(kept) for i in chosen])
        body = [token for lead, answer in kept for token in (*lead, *answer, *end)]
        # Fill the few remaining tokens with text at the start.
        before = self._filler[0][: length - len(body) - len(ending)].tolist()
        return before + body + ending, _shifted(places, length - len(ending))

    def _questions(self, rng: random.Random, facts, depths):
        """Return the tokens of the questions in random order, and (first, end, depth) of each answer in them."""
        tokens, places = self._encode(_ASKED), []
        for i in rng.sample(range(len(facts)), len(facts)):
            lead, answer = facts[i]
            first = len(tokens) + len(lead)
            places.append((first, first + len(answer), round(1000 * depths[i])))
            tokens += [*lead, *answer, *self._encode(".\n")]
        return tokens, places

    def _fact(self, adjective: str, noun: str, rng: random.Random) -> tuple[list[int], list[int]]:
        number = rng.randint(10_000, 99_999)
        return self._encode(f"The number of the {adjective} {noun} is"), self._encode(f" {number}")

    @staticmethod
    def _names(rng: random.Random, count: int) -> list[tuple[str, str]]:
        return rng.sample(list(itertools.product(_ADJECTIVES, _NOUNS)), count)

    def _line_end(self, text: list[int], place: int, least: int) -> int:
        """Return the next index after a line end within 200 tokens from `place`, or else `place`."""
        place = max(place, least)
        for at in range(max(place, 1), min(place + 200, len(text))):
            if text[at - 1] in self._newlines:
                return at
        return place


_ASKED = "\n\nAll the numbers once more:\n"


def _shifted(places, by: int) -> list[tuple[int, int, int]]:
    return [(first + by, end + by, depth) for first, end, depth in places]


def save(path: Path, prompts: dict[tuple[str, int], Prompts], texts: dict[str, np.ndarray]) -> None:
    """Write prompts, and texts of each kind, uint16 [documents, longest length], to an .npz file."""
    arrays = {
        f"{task}/{n}/{name}": getattr(p, name) for (task, n), p in prompts.items() for name in ("tokens", "answers")
    }
    np.savez_compressed(path, **arrays, **{f"text/{kind}": array for kind, array in texts.items()})


def evaluate(model: torch.nn.Module, path: Path, longest: int, scored: int = 4096) -> dict:
    """Evaluate everything that `save` wrote to `path`, up to `longest` tokens; return fields of results.jsonl.

    Args:
        model: from `load_model`, with no limit on positions.
        scored: number of tokens at the end of each text that perplexity counts; at most half of the shortest length.
    """
    file = np.load(path)
    keys = [name.rpartition("/")[0] for name in file.files if name.endswith("/tokens")]
    lengths = sorted({int(key.split("/")[1]) for key in keys if int(key.split("/")[1]) <= longest})
    tasks = {
        task: {
            str(n): _of_prompts(model, Prompts(file[f"{task}/{n}/tokens"], file[f"{task}/{n}/answers"]))
            for n in lengths
            if f"{task}/{n}" in keys
        }
        for task in TASKS
    }
    scored = min(scored, lengths[0] // 2)
    perplexity = {}
    for kind in (name.partition("/")[2] for name in file.files if name.startswith("text/")):
        texts = file[f"text/{kind}"][:, : lengths[-1]]
        perplexity[kind] = {str(n): _perplexity(model, texts[:, texts.shape[1] - n :], scored) for n in lengths}
    return {"tasks": {task: found for task, found in tasks.items() if found}, "perplexity": perplexity}


def save_short(path: Path, documents: dict[str, list[np.ndarray]]) -> None:
    """Write short documents of each kind to an .npz file: their tokens, one after the other, and their lengths."""
    arrays = {f"{kind}/tokens": np.concatenate(texts).astype(np.uint16) for kind, texts in documents.items()}
    lengths = {f"{kind}/lengths": np.array([len(text) for text in texts]) for kind, texts in documents.items()}
    np.savez_compressed(path, **arrays, **lengths)


def evaluate_short(model: torch.nn.Module, path: Path) -> dict[str, float]:
    """Return the perplexity of each kind of short documents, each alone and from position 0."""
    file, found = np.load(path), {}
    for kind in (name.partition("/")[0] for name in file.files if name.endswith("/tokens")):
        total, count = 0.0, 0
        for tokens in np.split(file[f"{kind}/tokens"], np.cumsum(file[f"{kind}/lengths"])[:-1]):
            marks = np.ones(len(tokens), dtype=np.float32)
            marks[-1] = 0.0
            total += float(_scores(model, tokens, marks)[0].sum())
            count += len(tokens) - 1
        found[kind] = round(float(np.exp(min(total / count, 50.0))), 4)
    return found


def _of_prompts(model, prompts: Prompts) -> dict:
    """Return accuracy and loss per answer token: in all, by tenths of depth, and for each prompt."""
    rows = []  # (prompt, depth in tenths, found, loss)
    for i, (tokens, answers) in enumerate(zip(prompts.tokens, prompts.answers)):
        marks = np.zeros(len(tokens), dtype=np.float32)
        for first, end, _ in answers:
            marks[first - 1 : end - 1] = 1.0
        losses, likeliest = _scores(model, tokens, marks)
        at = 0
        for first, end, depth in sorted(answers.tolist()):
            part = slice(at, at + end - first)
            rows.append((i, min(depth // 100, 9), float(likeliest[part].min()), float(losses[part].mean())))
            at += end - first
    by = lambda column, value, of: [row[of] for row in rows if row[column] == value]
    tenths, numbers = sorted({row[1] for row in rows}), range(len(prompts.tokens))
    mean = lambda values: round(statistics.fmean(values), 4)
    return {
        "accuracy": mean([row[2] for row in rows]),
        "loss": mean([row[3] for row in rows]),
        "answers": len(rows),
        "by_depth": {str(d): [mean(by(1, d, 2)), mean(by(1, d, 3)), len(by(1, d, 2))] for d in tenths},
        "by_prompt": [[mean(by(0, i, 2)), mean(by(0, i, 3))] for i in numbers],
    }


def _perplexity(model, texts: np.ndarray, scored: int) -> float:
    total = 0.0
    for tokens in texts:
        marks = np.zeros(len(tokens), dtype=np.float32)
        marks[-scored - 1 : -1] = 1.0
        total += float(_scores(model, tokens, marks)[0].sum())
    return round(float(np.exp(min(total / (scored * len(texts)), 50.0))), 4)


@torch.inference_mode()
def _scores(model, tokens: np.ndarray, marks: np.ndarray) -> np.ndarray:
    """Return float [2, k] for the k marked labels: their losses, and 1 where the label is the likeliest token."""
    from megatron_cream.evaluation.teacher_forced import score_batch

    ids = tokens.astype(np.int64)
    arrays = dict(tokens=ids, labels=np.append(ids[1:], 0), loss_mask=marks, position_ids=np.arange(len(ids)))
    device = torch.cuda.current_device()
    batch = {name: torch.from_numpy(array)[None].to(device) for name, array in arrays.items()}
    return score_batch(model, batch).float().cpu().numpy()
