"""Cells of the study's grid in the order in which they run, and the flags of pretrain_cream.py for each."""

import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from megatron_cream.checkpoint.families import read_config
from megatron_cream.model.rope_choice import compute_critical_theta

HERE = Path(__file__).resolve().parent

SCALINGS = ("theta", "yarn", "linear", "ntk")
CRITICAL = {"critical": 1.0, "4 critical": 4.0, "16 critical": 16.0}
"""Larger thetas that follow from the target, as multiples of its critical base (`compute_critical_theta`). They train at
the learning rate of `theta`."""
THETAS = ("theta", *CRITICAL)
LONG_END = "cream long end"
SAMPLERS = {
    "cream": [],
    "pose": ["--position-sampler", "pose"],
    "pi": ["--position-sampler", "pi"],
    "cream even": ["--cream-middle", "uniform"],
    "mix": ["--position-mix", "cream=0.6,pose=0.2,pi=0.2"],
    "randpos": ["--position-sampler", "randpos"],
    "full": ["--position-sampler", "full"],
    LONG_END: [],
    "cream lora": ["--lora-rank", "32"],
    "cream lora+8": ["--lora-rank", "32", "--lora-plus-ratio", "8"],
}
ADAPTERS = ("cream lora", "cream lora+8")
"""CREAM's positions, trained by LoRA in place of all weights; at the learning rate that all weights have."""
_LONG_SHARE, _LONG_COST = 0.3, 0.6
"""LONG_END trains on samples of the target length in its last part, and takes about as long as `cream`: that part is
this share of the time, and a step of it is assumed to take _LONG_COST x factor as long as one at the window."""
BEST = ("theta", "yarn")
"""The scalings with the best scores at the first seed: they get all samplers before the others do."""
WITHIN_SPREAD = ("pose", "pi", "mix", "cream even")
"""Samplers that one seed does not tell from `cream`."""


@dataclass(frozen=True)
class Settings:
    """Settings that `prepare.py` stores beside the data; see its flags.

    window: tokens of a sample, the model's original window.  factors: target lengths as multiples of the window,
    longest first.  theta: RoPE theta of the scaling `theta`.  rates: learning rates to choose from.
    shares: shares of short text of the cells `short`, which train at short_rate; none without short data.
    """

    window: int = 8192
    factors: tuple[int, ...] = (8, 4)
    steps: int = 115
    batch: int = 32
    micro_batch: int = 4
    model_theta: float = 1e5
    theta: float = 5e6
    rates: tuple[float, ...] = (5e-5, 2e-4, 8e-4, 1.6e-3, 3.2e-3)
    seeds: tuple[int, ...] = (1, 2, 3)
    lengths: tuple[int, ...] = (8192, 16384, 32768, 65536)
    extra: tuple[str, ...] = field(default=())
    shares: tuple[float, ...] = ()
    short_rate: float = 8e-4

    @staticmethod
    def read(folder: Path) -> "Settings":
        found = json.loads((folder / "settings.json").read_text())
        if "model_theta" not in found:  # prepared before it was kept
            found["model_theta"] = read_config(folder / "hf")[1].rope_theta
        return Settings(**{name: tuple(v) if isinstance(v, list) else v for name, v in found.items()})

    def write(self, folder: Path) -> None:
        (folder / "settings.json").write_text(json.dumps(asdict(self), indent=1) + "\n")


@dataclass(frozen=True)
class Cell:
    """One run: training, then evaluation. Sampler `base`: evaluate the original model under a scaling, untrained.

    rate: learning rate; None until the cells of `choosing` have decided it for the scaling.
    share: share of the samples that are packed short documents.
    """

    scaling: str
    sampler: str
    factor: int
    seed: int
    rate: float | None = None
    share: float = 0.0

    @property
    def name(self) -> str:
        rate = "" if self.rate is None else f" lr {self.rate:g}"
        share = f" short {self.share:g}" if self.share else ""
        words = f"{self.scaling} {self.sampler} s{self.factor} seed {self.seed}{rate}{share}"
        return re.sub(r"[^a-z0-9.]+", "_", words.lower().replace("e-0", "e"))

    @property
    def trains(self) -> bool:
        return self.sampler != "base"

    def with_rate(self, rate: float | None) -> "Cell":
        return self if self.rate is not None or not self.trains else replace(self, rate=rate)


def choosing(settings: Settings, scaling: str) -> list[Cell]:
    """Return the cells whose results choose a scaling's learning rate."""
    scaling = "theta" if scaling in THETAS else scaling
    return [Cell(scaling, "cream", settings.factors[0], settings.seeds[0], rate) for rate in settings.rates]


def theta(settings: Settings, scaling: str, factor: int) -> float:
    """Return the RoPE theta of one of THETAS, to three digits where it follows from the target."""
    if scaling == "theta":
        return settings.theta
    critical = compute_critical_theta(settings.model_theta, settings.window, settings.window * factor)
    return float(f"{CRITICAL[scaling] * critical:.3g}")


def short(settings: Settings) -> list[Cell]:
    """Return the cells that differ in their share of short text."""
    longest = settings.factors[0]
    return [
        Cell("yarn", "cream", longest, seed, settings.short_rate, share)
        for seed in settings.seeds
        for share in settings.shares
    ]


def order(settings: Settings) -> list[Cell]:
    """Return all cells, most informative first, so that a grid that is cut off is still useful."""
    longest, first, later = settings.factors[0], settings.seeds[0], settings.seeds[1:]
    cells = [cell for scaling in SCALINGS for cell in choosing(settings, scaling)]
    cells += [Cell(scaling, "base", longest, 0) for scaling in ("none", *SCALINGS)]

    def block(scalings, samplers, seeds, factor=longest) -> Iterator[Cell]:
        return (Cell(scaling, sampler, factor, seed) for seed in seeds for scaling in scalings for sampler in samplers)

    cells += block((*BEST, "linear"), ["cream"], settings.seeds)
    cells += block(BEST, WITHIN_SPREAD, [first])
    for factor in settings.factors[1:]:
        cells += block(BEST, ["full"], [first], factor)
    cells += block(BEST, WITHIN_SPREAD, later)
    for factor in settings.factors[1:]:
        cells += block((*BEST, "linear"), ["cream"], settings.seeds, factor)
        cells += block(BEST, WITHIN_SPREAD, settings.seeds, factor)
        cells += block(BEST, ["full"], later, factor)
    for factor in settings.factors:
        windows = [sampler for sampler in SAMPLERS if sampler not in ("full", LONG_END, *ADAPTERS)]
        cells += block(SCALINGS, windows, settings.seeds, factor)
        cells += block(CRITICAL, ["cream"], settings.seeds, factor)
        cells += block(BEST, [LONG_END], settings.seeds, factor)
    cells += block(BEST[:1], ADAPTERS, settings.seeds)
    return list(dict.fromkeys(cells + short(settings)))


def stages(cell: Cell, settings: Settings, data: Path, runs: Path) -> list[list[str]]:
    """Return the flags of each training of a run; the last saves into runs / cell.name."""
    if cell.sampler != LONG_END:
        return [flags(cell, settings, data, runs)]
    first, cache = runs / f"{cell.name}.first", runs / f"{cell.name}.cache"
    last = max(1, round(_LONG_SHARE * settings.steps / (_LONG_COST * cell.factor)))
    start = {"--load-hf": None, "--pretrained-checkpoint": first}
    trainings = [
        ("cream", round((1 - _LONG_SHARE) * settings.steps), {"--save": first, "--lr-decay-style": "constant"}),
        ("full", last, {"--save": runs / cell.name, "--lr-warmup-iters": last // 5, "--log-interval": 1, **start}),
    ]
    return [
        flags(
            replace(cell, sampler=sampler),
            *(settings, data, runs),
            {"--train-iters": steps, "--save-interval": steps, "--data-cache-path": cache, **changes},
        )
        for sampler, steps, changes in trainings
    ]


def flags(cell: Cell, settings: Settings, data: Path, runs: Path, changes: dict | None = None) -> list[str]:
    """Return the flags of pretrain_cream.py for a run in one training on the prepared `data`.

    It saves into runs / cell.name. `changes` has other values for some flags, None for one to leave out.
    """
    window, target = settings.window, settings.window * cell.factor
    full = cell.sampler == "full"
    longer = cell.factor if full else 1  # samples of the target length: fewer, for the same number of tokens
    given = {
        "--config": HERE / "extend.yaml",
        "--load-hf": data / "hf",
        "--train-data-path": data / "tokens" / "train",
        "--save": runs / cell.name,
        "--data-cache-path": runs / f"{cell.name}.cache",
        "--seq-length": window * longer,
        "--target-length": target,
        "--global-batch-size": max(settings.batch // longer, 1),
        "--micro-batch-size": max(settings.micro_batch // longer, 1),
        "--train-iters": settings.steps,
        "--save-interval": settings.steps,
        "--lr": cell.rate,
        "--seed": 1000 + cell.seed,
        "--rope-scaling-type": "none" if cell.scaling in THETAS else cell.scaling,
    }
    if cell.scaling in THETAS:
        given["--rotary-base"] = theta(settings, cell.scaling, cell.factor)
    else:
        given |= {"--rope-scaling-factor": cell.factor, "--original-max-position-embeddings": window}
    if cell.share:
        given |= {"--short-data-path": data / "tokens" / "short", "--short-share": cell.share}
    given = {flag: value for flag, value in (given | (changes or {})).items() if value is not None}
    texts = [text for pair in given.items() for text in map(str, pair)]
    return [*texts, *SAMPLERS[cell.sampler], *settings.extra]


def model_folder(scaling: str, data: Path, factor: int | None = None) -> Path:
    """Return the Hugging Face folder that `write_models` made; `none` and `theta` do not depend on the factor."""
    return data / "models" / (scaling if factor is None or scaling in ("none", "theta") else f"{scaling}_{factor}")


def write_models(settings: Settings, data: Path) -> None:
    """Write the folders to evaluate untrained: the original model (`none`), and one with a config.json per scaling."""
    from megatron_cream.model.rotary import build_rope_scaling

    source = data / "hf"
    config = json.loads((source / "config.json").read_text())
    config.pop("rope_parameters", None)
    longest = settings.window * settings.factors[0]
    variants = {"none": {"rope_theta": settings.model_theta}, "theta": {"rope_theta": settings.theta}}
    for factor in settings.factors:
        for scaling in ("yarn", "ntk", "linear"):
            parameters = build_rope_scaling(scaling, float(factor), settings.window)
            variants[f"{scaling}_{factor}"] = {"rope_theta": settings.model_theta, "rope_scaling": parameters}
    for name, change in variants.items():
        folder = data / "models" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for file in source.iterdir():
            if file.name != "config.json":
                (folder / file.name).symlink_to(file.resolve())
        positions = settings.window if name == "none" else longest
        (folder / "config.json").write_text(
            json.dumps(config | change | {"max_position_embeddings": positions}, indent=1)
        )


def chosen_rate(settings: Settings, scaling: str, evaluated: dict[str, dict]) -> float | None:
    """Return the learning rate with the lowest score among the scaling's evaluated `choosing` cells."""
    scores = {cell.rate: score(evaluated[cell.name]) for cell in choosing(settings, scaling) if cell.name in evaluated}
    finite = {rate: value for rate, value in scores.items() if math.isfinite(value)}
    return min(finite, key=finite.get) if finite else None


def score(result: dict) -> float:
    """Return the score by which learning rates are chosen, in nats per token (lower is better).

    It is the mean loss of the answers over tasks and lengths, plus the mean log perplexity of held-out text over
    kinds and lengths.
    """
    losses = [of_length["loss"] for task in result["tasks"].values() for of_length in task.values()]
    texts = [math.log(value) for kind in result["perplexity"].values() for value in kind.values()]
    return sum(losses) / len(losses) + sum(texts) / len(texts)
