"""Runs of the study, and the flags of pretrain_cream.py for each."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from corpus import Corpus

from megatron_cream.model.rope_choice import compute_critical_theta

HERE = Path(__file__).resolve().parent
WINDOW = 256
THETA = 10_000.0
"""RoPE theta of a base."""

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
LONG_END = "cream, long end"
BEYOND = {
    "mix": ["--position-mix", "cream=0.6,pose=0.2,pi=0.2"],
    "cream + randpos": ["--position-mix", "cream=0.75,randpos=0.25"],
    "pose, 8 chunks": ["--position-sampler", "pose", "--pose-chunks", "8"],
    LONG_END: [],
}
"""Methods of the part `scalings` alone. LONG_END trains its last steps on samples of the target length."""
ALL = {**METHODS, **SIGMAS, **BEYOND}

PUBLISHED, WIDE, WIDER = "linear", "wide theta", "4 wide theta"
SCALINGS = (PUBLISHED, "theta", WIDE, WIDER, "yarn")
THETAS = ("theta", WIDE, WIDER)
"""Scalings that raise RoPE theta and scale nothing; all take the learning rate chosen for `theta`."""
RATE = 3e-4
"""Learning rate of the part `samplers`."""
RATES = (1.5e-4, 3e-4, 6e-4, 1.2e-3, 2.4e-3)
"""Learning rates that the part `scalings` chooses from for each of TRIED."""
TRIED = (PUBLISHED, "theta", "yarn")

BASE_BLEND = {"text": 0.3, 2: 0.14, 4: 0.14, 8: 0.14, 16: 0.14, 32: 0.14}
EXTEND_BLEND = {"text": 0.6, 8: 0.1, 32: 0.15, 128: 0.15}
"""Shares of samples: from text, and from documents with that number of pairs."""

_BATCH, _STEPS = 64, 200
_LAST_STEPS = 50
"""Of LONG_END, with samples of the target length: fewer samples, for the same number of tokens."""


@dataclass(frozen=True)
class Run:
    """One extension, or with factor 1 a base.

    alone: run with nothing else on the GPU, so that its time can be reported.
    """

    method: str
    factor: int
    seed: int
    alone: bool = False
    scaling: str = PUBLISHED
    rate: float = RATE

    @property
    def places(self) -> int:
        """Number of --jobs slots that this run's GPU memory takes."""
        return 3 if self.method == "full" else 1

    @property
    def name(self) -> str:
        scaling = "" if self.scaling == PUBLISHED else f"{self.scaling} "
        rate = "" if self.rate == RATE else f" lr {self.rate:g}"
        return re.sub(r"[^a-z0-9]+", "_", f"{scaling}{self.method} s {self.factor} seed {self.seed}{rate}".lower())


def base(seed: int) -> Run:
    return Run("base", 1, seed)


def extensions(seeds: list[int], factors: list[int]) -> list[Run]:
    """Return the part `samplers`: first the timed ones of the first seed, last the untimed ones of `full`."""
    timed = [Run(method, s, seeds[0], alone=True) for s in factors for method in ("cream", "full")]
    done = {(run.method, run.factor, run.seed) for run in timed}
    others = [Run(method, s, seed) for seed in seeds for s in sorted(factors, reverse=True) for method in METHODS]
    others += [Run(method, 8, seed) for seed in seeds for method in SIGMAS if 8 in factors]
    others = [run for run in others if (run.method, run.factor, run.seed) not in done]
    return timed + sorted(others, key=lambda run: (run.method == "full", -run.factor, run.seed))


def choosing(scaling: str, seed: int, factors: list[int]) -> list[Run]:
    """Return the runs whose results choose the learning rate of a scaling."""
    factor = 8 if 8 in factors else factors[0]
    return [Run("cream", factor, seed, scaling=scaling, rate=rate) for rate in RATES]


def scaled(seeds: list[int], factors: list[int], rates: dict[str, float]) -> list[Run]:
    """Return the part `scalings`, most informative runs first. `rates` has the learning rate of each scaling."""
    plain = ["pose", "pi", "cream, no Gaussian", "mix"]
    blocks = [
        ([PUBLISHED, "theta", "yarn"], ["cream"]),
        ([WIDE, WIDER], ["cream"]),
        (["yarn"], [LONG_END, "cream + randpos", "pose", "pi"]),
        (["theta"], [LONG_END, "cream + randpos"]),
        (["yarn"], ["pose, 8 chunks", "cream, no Gaussian", "mix"]),
        ([PUBLISHED, "theta"], ["pose, 8 chunks", *plain]),
        ([WIDE, WIDER], [LONG_END, "cream + randpos", "pose, 8 chunks", *plain]),
        ([PUBLISHED], [LONG_END, "cream + randpos"]),
    ]
    order = sorted(factors, key=lambda factor: (factor != 8, -factor))
    return [
        Run(method, factor, seed, scaling=scaling, rate=rates[scaling])
        for scalings, methods in blocks
        for factor in order
        for method in methods
        for scaling in scalings
        for seed in seeds
    ]


def theta(scaling: str, factor: int) -> float:
    """Return the RoPE theta of a scaling that raises it.

    `theta` is 50 times the base's at a factor of 8, as in the recipes and the study of a real model, and the same
    power of the factor at others. WIDE is the critical base (`compute_critical_theta`), and WIDER four times that.
    """
    if scaling == "theta":
        return float(f"{THETA * 50 ** math.log(factor, 8):.3g}")
    critical = compute_critical_theta(THETA, WINDOW, WINDOW * factor)
    return float(f"{critical * (4 if scaling == WIDER else 1):.3g}")


def stages(run: Run, folder: Path, corpus: Corpus) -> list[list[str]]:
    """Return the flags of pretrain_cream.py for each training of a run; the last saves into folder / run.name."""
    if run.method != LONG_END:
        return [flags(run, folder, corpus)]
    first = folder / f"{run.name}.first"
    before = [*flags(run, folder, corpus), "--save", str(first), "--lr-decay-style", "constant"]
    before += ["--train-iters", str(_STEPS - _LAST_STEPS)]
    after = [*flags(run, folder, corpus), "--pretrained-checkpoint", str(first), "--position-sampler", "full"]
    after += ["--seq-length", str(WINDOW * run.factor), "--train-iters", str(_LAST_STEPS)]
    batch = str(max(1, _BATCH // run.factor))
    return [before, [*after, "--micro-batch-size", batch, "--global-batch-size", batch]]


def flags(run: Run, folder: Path, corpus: Corpus) -> list[str]:
    """Return the flags of pretrain_cream.py for a run in one training that saves into folder / run.name."""
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
            *_scaling(run),
            "--lr",
            f"{run.rate:g}",
            "--min-lr",
            f"{run.rate / 10:g}",
            "--pretrained-checkpoint",
            str(folder / base(run.seed).name),
        ]
        given += [
            "--valid-data-path",
            str(corpus.valid),
            "--eval-lengths",
            *lengths,
            *ALL[run.method],
        ]
    if run.method == "full":
        # The same number of samples, each of the target length; longer ones need a smaller micro-batch.
        given += ["--seq-length", str(target), "--micro-batch-size", str(min(64, 256 // run.factor))]
    blend = BASE_BLEND if run.method == "base" else EXTEND_BLEND
    weights = [str(part) for name, share in blend.items() for part in (share, _prefix(corpus, name))]
    return [*given, "--train-data-path", *weights]


def _scaling(run: Run) -> list[str]:
    if run.scaling in THETAS:
        return ["--rope-scaling-type", "none", "--rotary-base", f"{theta(run.scaling, run.factor):.0f}"]
    return ["--rope-scaling-type", run.scaling, "--rope-scaling-factor", str(run.factor)]


def _prefix(corpus: Corpus, name: str | int) -> Path:
    return corpus.text if name == "text" else corpus.pairs(name)
