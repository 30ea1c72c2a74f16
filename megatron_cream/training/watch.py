"""A training job evaluated at its target lengths: when, what that may cost, what is said, which checkpoint is kept."""

import contextlib
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

import torch

from megatron_cream.checkpoint.best import BestCheckpoint
from megatron_cream.checkpoint.output import TRACKER
from megatron_cream.common.cli import to_flag
from megatron_cream.common.files import append_line, to_json
from megatron_cream.evaluation.long_evaluation import LongEvaluation, Result, Score
from megatron_cream.optimizer import finite
from megatron_cream.patches import hooks, registry
from megatron_cream.training.progress import StepLine, log_values

RECORD = "long_evaluation.jsonl"


class Watch:
    """Of one run.

    Args:
        interval: steps between two evaluations.
        last_step: the run's, which is evaluated too.
        share: of the time since this was made, what evaluations and best checkpoints may take. The first
            evaluation, which tells what one costs, and the last step's are made in any case.
        score: of Score, what checkpoints are compared by; None compares none.
        best: where the best is kept.
        folder: where the record is written, or None.
        step_line: what shows the speed of training, and where a person reads.
    """

    def __init__(
        self,
        evaluation: LongEvaluation,
        *,
        interval: int,
        last_step: int,
        share: float,
        score: str | None,
        best: BestCheckpoint | None,
        folder: Path | None,
        step_line: StepLine,
    ):
        self._evaluation, self._interval, self._last_step, self._share = evaluation, interval, last_step, share
        self._score, self.best, self._folder, self._step_line = score, best, folder, step_line
        self._started, self._spent, self._cost = time.perf_counter(), 0.0, None

    def due(self, step: int) -> bool:
        """Whether to evaluate after this step; the same on every rank, all of which ask."""
        if step == self._last_step:
            return True
        if step % self._interval:
            return False
        if not (affordable := _as_rank_0(self._affordable())):
            self._say(
                f"step {step} | left out: {self._spent:.1f} s, {100 * self._share_so_far():.1f} % of the time so far, "
                f"and --long-eval-share is {100 * self._share:g} %"
            )
        return affordable

    def evaluate(
        self,
        model: list[torch.nn.Module],
        step: int,
        *,
        pause: AbstractContextManager | None = None,
        keep: Callable[[Score], None] | None = None,
        must_be_finite: str = "",
    ) -> None:
        """Measure, keep, say and record; on every rank.

        Args:
            model: Megatron's model chunks.
            step: training steps that the model has done.
            pause: what training needs around the measurement.
            keep: saves the model as the best checkpoint; None where none is kept.
            must_be_finite: where given, a NaN raises UsageError, which begins so: the flag that named the model.
        """
        began = time.perf_counter()
        with pause or contextlib.nullcontext(), _evaluating(model):
            result = self._evaluation(model)
        if must_be_finite:
            finite.check_values(result.flatten().values(), must_be_finite)
        self._cost = time.perf_counter() - began
        score = result.score(self._score) if self._score else None
        verdict, better = "", False
        if keep:
            self.best.undo_failed()
            best = Score(**self.best.score) if self.best.score else None
            known = f"{best} at step {self.best.step}" if best else "none"
            # A step that is kept already would be written over.
            better = _as_rank_0(step != self.best.step and score.is_better_than(best))
            if better:
                keep(score)
                better = self.best.step == step
            verdict = f": kept in {self.best.folder} (best before: {known})" if better else f" (best: {known})"
        seconds = time.perf_counter() - began
        self._spent += seconds
        self._step_line.leave_out(seconds)
        parts = [f"step {step}", result.format_line(), *([f"mean {score}{verdict}"] if score else [])]
        self._say(" | ".join([*parts, f"{seconds:.1f} s, {100 * self._share_so_far():.1f} % of the time so far"]))
        self._record(step, result, score, better, seconds)

    def _affordable(self) -> bool:
        if self._cost is None:
            return True
        elapsed = time.perf_counter() - self._started
        return self._spent + self._cost <= self._share * (elapsed + self._cost)

    def _share_so_far(self) -> float:
        return self._spent / (time.perf_counter() - self._started)

    def _say(self, text: str) -> None:
        if _is_last_rank():
            print(f"long evaluation | {text}", file=self._step_line.stream, flush=True)

    def _record(self, step: int, result: Result, score: Score | None, better: bool, seconds: float) -> None:
        values = result.flatten() | {"share of time": self._share_so_far()}
        if score:
            values[f"mean {score.name}"] = score.value
        log_values({f"long evaluation/{name}": value for name, value in values.items()}, step)
        if self._folder is None or not _is_last_rank():
            return
        line = dict(iteration=step, seconds=round(seconds, 3), share=round(self._share_so_far(), 4))
        line |= {task: {n: asdict(value) for n, value in of.items()} for task, of in result.recalls.items()}
        line |= {"perplexity": result.perplexity} if result.perplexity else {}
        line |= {"score": asdict(score), "best": better} if score else {}
        append_line(self._folder / RECORD, to_json(line))


def loaded_from(args: Namespace) -> str:
    """The flag and value that named a run's weights, for messages."""
    resumed = args.load and (Path(args.load) / TRACKER).is_file()
    for name in (["load"] if resumed else []) + ["load_hf", "pretrained_checkpoint"]:
        if value := getattr(args, name, None):
            return f"{to_flag(name)} {value}"
    return "--skip-train"


@contextlib.contextmanager
def watching(watch: Watch | None, args: Namespace) -> Iterator[None]:
    """Evaluate while the block trains; with --skip-train, evaluate the loaded model.

    Megatron's evaluation has its own interval, and its call-back does not get what a checkpoint holds; the
    function that saves checkpoints at the end of each step does, and so that is wrapped while the run lasts.

    Args:
        watch: evaluates when it is due; None evaluates nothing.
        args: Megatron's.
    """
    if watch is None:
        yield
        return
    from megatron.training import training

    def evaluate_after(original, model, optimizer, scheduler, step, flops, context, data_iterator):
        state = (model, optimizer, scheduler, flops, context)
        # First the run's own checkpoint: a signal to end leaves little time.
        leaves = original(model, optimizer, scheduler, step, flops, context, data_iterator)
        if watch.best and args.rank == 0:
            watch.best.remove_earlier()
        if not leaves and watch.due(step):

            def keep(score: Score) -> None:
                with watch.best.saving(args, step, asdict(score)):
                    training.save_checkpoint_and_time(step, *state, train_data_iterator=data_iterator)
                if args.rank == 0:
                    watch.best.remove_earlier()

            pause = _paused(args, model, optimizer)
            watch.evaluate(model, step, pause=pause, keep=keep if watch.best else None)
        return leaves

    def evaluate_loaded(original, *positional, **named):
        built = original(*positional, **named)
        if args.skip_train:
            watch.evaluate(built[0], args.iteration, must_be_finite=loaded_from(args))
        return built

    try:
        with (
            registry.override(hooks.END_OF_STEP, evaluate_after),
            registry.override(hooks.MODEL_SETUP, evaluate_loaded),
        ):
            yield
    finally:
        if watch.best and args.rank == 0:
            watch.best.remove_earlier()


@contextlib.contextmanager
def _paused(args: Namespace, model: list[torch.nn.Module], optimizer) -> Iterator[None]:
    """As Megatron does around its own evaluation: the clock of its steps, and weights gathered while it computes."""
    from megatron.training import get_timers, training

    overlapped = training.should_disable_forward_pre_hook(args)
    get_timers()("interval-time").stop()
    if overlapped:
        training.disable_forward_pre_hook(model, optimizer=optimizer)
    yield
    if overlapped:
        training.enable_forward_pre_hook(model)
    get_timers()("interval-time", log_level=0).start(barrier=True)


@contextlib.contextmanager
def _evaluating(model: list[torch.nn.Module]) -> Iterator[None]:
    was_training = model[0].training
    for chunk in model:
        chunk.eval()
    with torch.no_grad():
        yield
    for chunk in model:
        chunk.train(was_training)


def _as_rank_0(value: bool) -> bool:
    """Clocks differ, and all ranks must do the same."""
    shared = torch.tensor([value], dtype=torch.int32, device=torch.cuda.current_device())
    torch.distributed.broadcast(shared, src=0)
    return bool(shared.item())


def _is_last_rank() -> bool:
    return torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
