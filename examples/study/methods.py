"""Runs of the study, and the flags of pretrain_cream.py for each."""

import re
from dataclasses import dataclass
from pathlib import Path

from corpus import Corpus

HERE = Path(__file__).resolve().parent
WINDOW = 256

METHODS = {
    "pi": ["--position-sampler", "pi"],
    "randpos": ["--position-sampler", "randpos"],
    "pose": ["--position-sampler", "pose"],
    "cream": [],
    "cream, released": ["--cream-variant", "released"],
    "cream, no Gaussian": ["--cream-middle", "uniform"],
    "cream, no continuity": ["--cream-relativity", "1"],
    "cream, no relativity": ["--cream-relativity", "0"],
    "full": ["--position-sampler", "full"],
}
SIGMAS = {f"cream, sigma {sigma:g}": ["--cream-sigma", str(sigma)] for sigma in (1.0, 2.0, 5.0)}
"""Run at factor 8 only; `cream` itself has sigma 3."""

BASE_BLEND = {"text": 0.3, 2: 0.14, 4: 0.14, 8: 0.14, 16: 0.14, 32: 0.14}
EXTEND_BLEND = {"text": 0.6, 8: 0.1, 32: 0.15, 128: 0.15}
"""Shares of samples: from text, and from documents with that number of pairs."""


@dataclass(frozen=True)
class Run:
    """One extension, or with factor 1 a base."""

    method: str
    factor: int
    seed: int
    alone: bool = False
    """Run with nothing else on the GPU, so that its time can be reported."""

    @property
    def places(self) -> int:
        """Number of --jobs slots that this run's GPU memory takes."""
        return 3 if self.method == "full" else 1

    @property
    def name(self) -> str:
        return re.sub(r"[^a-z0-9]+", "_", f"{self.method} s {self.factor} seed {self.seed}".lower())


def base(seed: int) -> Run:
    return Run("base", 1, seed)


def extensions(seeds: list[int], factors: list[int]) -> list[Run]:
    """Return all extensions: first the timed ones of the first seed, last the untimed ones of `full`."""
    timed = [Run(method, s, seeds[0], alone=True) for s in factors for method in ("cream", "full")]
    done = {(run.method, run.factor, run.seed) for run in timed}
    others = [Run(method, s, seed) for seed in seeds for s in sorted(factors, reverse=True) for method in METHODS]
    others += [Run(method, 8, seed) for seed in seeds for method in SIGMAS if 8 in factors]
    others = [run for run in others if (run.method, run.factor, run.seed) not in done]
    return timed + sorted(others, key=lambda run: (run.method == "full", -run.factor, run.seed))


def flags(run: Run, folder: Path, corpus: Corpus) -> list[str]:
    """Return the flags of pretrain_cream.py for a run that saves into folder / run.name."""
    target = WINDOW * run.factor
    given = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(corpus.tokenizer)]
    given += [
        "--seed",
        str(1000 + run.seed),
        "--save",
        str(folder / run.name),
        "--data-cache-path",
        str(folder / "cache"),
    ]
    if run.method == "base":
        given = ["--config", str(HERE / "base.yaml"), "--load", str(folder / run.name), *given]
    else:
        lengths = [str(WINDOW * 2**i) for i in range(run.factor.bit_length())]
        given = ["--config", str(HERE / "extend.yaml"), *given, "--target-length", str(target)]
        given += [
            "--rope-scaling-factor",
            str(run.factor),
            "--pretrained-checkpoint",
            str(folder / base(run.seed).name),
        ]
        given += [
            "--valid-data-path",
            str(corpus.valid),
            "--eval-lengths",
            *lengths,
            *{**METHODS, **SIGMAS}[run.method],
        ]
    if run.method == "full":
        # The same number of samples, each of the target length; longer ones need a smaller micro-batch.
        given += ["--seq-length", str(target), "--micro-batch-size", str(min(64, 256 // run.factor))]
    blend = BASE_BLEND if run.method == "base" else EXTEND_BLEND
    weights = [str(part) for name, share in blend.items() for part in (share, _prefix(corpus, name))]
    return [*given, "--train-data-path", *weights]


def _prefix(corpus: Corpus, name: str | int) -> Path:
    return corpus.text if name == "text" else corpus.pairs(name)
