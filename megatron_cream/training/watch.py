"""Evaluation at the target lengths during training, and the best checkpoint."""

import contextlib
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict

import torch

from megatron_cream.checkpoint.best import BestCheckpoint
from megatron_cream.common.files import append_line, to_json
from megatron_cream.evaluation.long_evaluation import LongEvaluation, Result, Score, Settings
from megatron_cream.optimizer import finite
from megatron_cream.patches import hooks, registry
from megatron_cream.training.progress import StepLine, log_values

RECORD = "long_evaluation.jsonl"


class Watch:
    """The evaluations of one run.

    Args:
        evaluation: evaluates the model.
        settings: when to evaluate, and what to compare.
        best: the best checkpoint; None keeps none.
        step_line: shows the speed of training, without the time of evaluations; its stream gets the results.
    """

    def __init__(
        self, evaluation: LongEvaluation, settings: Settings, best: BestCheckpoint | None, step_line: StepLine
    ):
        self._evaluation, self._settings, self.best, self._step_line = evaluation, settings, best, step_line
        self._started, self._spent, self._cost = time.perf_counter(), 0.0, None

    def is_due(self, step: int) -> bool:
        """Return whether to evaluate after this step.

        All ranks must call it, and get the same answer.
        """
        if step == self._step_line.total_steps:
            return True
        if step % self._settings.interval:
            return False
        if not (affordable := _broadcast_from_rank_0(self._is_affordable())):
            self._say(
                f"step {step} | skipped: {self._spent:.1f} s, {100 * self._share_so_far():.1f} % of the time so far, "
                f"and --long-eval-share is {100 * self._settings.share:g} %"
            )
        return affordable

    def evaluate(
        self,
        model: list[torch.nn.Module],
        step: int,
        *,
        pause: AbstractContextManager | None = None,
        keep: Callable[[Score], None] | None = None,
        weights_flag: str = "",
    ) -> None:
        """Evaluate, keep the model if it is the best, log and record. All ranks must call it.

        Args:
            model: Megatron's model chunks.
            step: training steps that the model has had.
            pause: pauses training during the evaluation.
            keep: saves the model as the best checkpoint; None keeps none.
            weights_flag: the flag and value that named the weights; if given, a NaN raises UsageError, which begins
                with it.
        """
        began = time.perf_counter()
        with pause or contextlib.nullcontext(), _evaluation_mode(model):
            result = self._evaluation(model)
        if weights_flag:
            finite.check_values(result.flatten().values(), weights_flag)
        self._cost = time.perf_counter() - began
        score = result.score
        verdict, better = "", False
        if keep:
            self.best.undo_failed()
            best = Score(**self.best.score) if self.best.score else None
            known = f"{best} at step {self.best.step}" if best else "none"
            # Saving the same step again would overwrite its checkpoint.
            better = _broadcast_from_rank_0(step != self.best.step and score.is_better_than(best))
            if better:
                keep(score)
                better = self.best.step == step
            verdict = f": kept in {self.best.folder} (best before: {known})" if better else f" (best: {known})"
        seconds = time.perf_counter() - began
        self._spent += seconds
        self._step_line.exclude(seconds)
        parts = [f"step {step}", result.format_line(), *([f"mean {score}{verdict}"] if score else [])]
        self._say(" | ".join([*parts, f"{seconds:.1f} s, {100 * self._share_so_far():.1f} % of the time so far"]))
        self._record(step, result, score, better, seconds)

    def _is_affordable(self) -> bool:
        """Return whether one more evaluation stays within the share of time."""
        if self._cost is None:
            return True
        elapsed = time.perf_counter() - self._started
        return self._spent + self._cost <= self._settings.share * (elapsed + self._cost)

    def _share_so_far(self) -> float:
        """Return the share of the run's time that evaluations have taken."""
        return self._spent / (time.perf_counter() - self._started)

    def _say(self, text: str) -> None:
        if _is_last_rank():
            print(f"long evaluation | {text}", file=self._step_line.stream, flush=True)

    def _record(self, step: int, result: Result, score: Score | None, better: bool, seconds: float) -> None:
        values = result.flatten() | {"share of time": self._share_so_far()}
        if score:
            values[f"mean {score.name}"] = score.value
        log_values({f"long evaluation/{name}": value for name, value in values.items()}, step)
        if self._settings.folder is None or not _is_last_rank():
            return
        line = dict(iteration=step, seconds=round(seconds, 3), share=round(self._share_so_far(), 4))
        line |= {task: {n: asdict(value) for n, value in of.items()} for task, of in result.recalls.items()}
        line |= {"perplexity": result.perplexity} if result.perplexity else {}
        line |= {"score": asdict(score), "best": better} if score else {}
        append_line(self._settings.folder / RECORD, to_json(line))


@contextlib.contextmanager
def evaluate_during_training(watch: Watch | None, args: Namespace, weights: str) -> Iterator[None]:
    """Evaluate while the block trains; with --skip-train, evaluate the loaded model.

    Megatron's evaluation has its own interval, and its callback does not get the state that a checkpoint needs. The
    function that saves checkpoints at the end of each step does, so it is wrapped while the run lasts.

    Args:
        watch: evaluates when it is due; None evaluates nothing.
        args: Megatron's.
        weights: the flag and value that name the run's weights, for messages.
    """
    if watch is None:
        yield
        return
    from megatron.training import training

    def evaluate_loaded(original, *positional, **named):
        built = original(*positional, **named)
        if args.skip_train:
            watch.evaluate(built[0], args.iteration, weights_flag=weights)
        return built

    def evaluate_after(original, model, optimizer, scheduler, step, flops, context, data_iterator):
        state = (model, optimizer, scheduler, flops, context)
        # The run's own checkpoint comes first: after a signal there is little time.
        exits = original(model, optimizer, scheduler, step, flops, context, data_iterator)
        if not exits and watch.is_due(step):

            def keep(score: Score) -> None:
                with watch.best.saving(args, step, asdict(score)):
                    training.save_checkpoint_and_time(step, *state, train_data_iterator=data_iterator)

            pause = _paused(args, model, optimizer)
            watch.evaluate(model, step, pause=pause, keep=keep if watch.best else None)
        if watch.best and args.rank == 0:
            watch.best.remove_earlier()  # also of an asynchronous save, which may be complete only now
        return exits

    try:
        with (
            registry.override(hooks.MODEL_SETUP, evaluate_loaded),
            registry.override(hooks.END_OF_STEP, evaluate_after),
        ):
            yield
    finally:
        if watch.best and args.rank == 0:
            watch.best.remove_earlier()


@contextlib.contextmanager
def _paused(args: Namespace, model: list[torch.nn.Module], optimizer) -> Iterator[None]:
    """Pause the step timer and overlapped weight gathering, as Megatron's evaluation does."""
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
def _evaluation_mode(model: list[torch.nn.Module]) -> Iterator[None]:
    """Put the model into evaluation mode, without gradients, and back at the end."""
    was_training = model[0].training
    for chunk in model:
        chunk.eval()
    with torch.no_grad():
        yield
    for chunk in model:
        chunk.train(was_training)


def _broadcast_from_rank_0(value: bool) -> bool:
    """Return rank 0's value on all ranks; their clocks differ, and they must decide alike."""
    shared = torch.tensor([value], dtype=torch.int32, device=torch.cuda.current_device())
    torch.distributed.broadcast(shared, src=0)
    return bool(shared.item())


def _is_last_rank() -> bool:
    return torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
