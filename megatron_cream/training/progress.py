"""The line of each logged step: loss, speed, hardware utilization, memory, time left."""

import contextlib
import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import torch

from megatron_cream.common import devices
from megatron_cream.common.devices import peak_flops
from megatron_cream.distributed import watchdog
from megatron_cream.patches import hooks, registry


@dataclass
class StepLine:
    """Prints a line for each logged step: loss, lr, gradient norm, speed, memory, time left.

    total_steps: the last step of the run.
    tokens_per_step: over all ranks.
    ranks: GPUs (or CPU processes) of the run.
    flops_per_token: floating-point operations, forward and backward.
    stream: where to print; default: standard output.
    """

    total_steps: int
    tokens_per_step: int
    ranks: int
    flops_per_token: float
    stream: object = None

    def __post_init__(self):
        self.stream = self.stream or sys.stdout
        self.peak = peak_flops()
        self.last_step = self.last_time = None
        self.losses: deque[float] = deque(maxlen=100)

    def start(self, step: int) -> None:
        """Start measuring after `step`, in which kernels were compiled and memory allocated."""
        self.last_step, self.last_time = step, time.perf_counter()

    def exclude(self, seconds: float) -> None:
        """Exclude time since `start` that was not spent on training steps."""
        if self.last_time is not None:
            self.last_time += seconds

    def show(
        self, step: int, loss: float | None, learning_rate: float | None, grad_norm: float | None, memory: int
    ) -> None:
        """Print the line of a step.

        Args:
            step: its number, from 1.
            loss: None where this rank has none.
            learning_rate: None where the optimizer reports none.
            grad_norm: before clipping; None where the optimizer reports none.
            memory: bytes, from `peak_memory`.
        """
        parts = [f"step {step}/{self.total_steps}"]
        if loss is not None:
            parts.append(f"loss {loss:.4f}")
        if learning_rate is not None:
            parts.append(f"lr {learning_rate:.2e}")
        if grad_norm is not None:
            parts.append(f"grad norm {grad_norm:.2f}")
        if self.last_step is not None and step > self.last_step:
            seconds = (time.perf_counter() - self.last_time) / (step - self.last_step)
            rate = self.tokens_per_step / seconds / self.ranks
            parts.append(f"{rate:,.0f} tokens/s/{'GPU' if devices.has_cuda() else 'rank'}")
            if self.peak:
                parts.append(f"MFU {100 * rate * self.flops_per_token / self.peak:.1f} %")
            parts.append(f"ETA {_duration((self.total_steps - step) * seconds)}")
        parts.append(f"{memory / 2**30:.1f} GiB")
        print(" | ".join(parts), file=self.stream, flush=True)
        if loss is not None:
            self._warn_of_spike(step, loss)
        self.start(step)

    def _warn_of_spike(self, step: int, loss: float) -> None:
        """Warn of a loss that is far above the median of the last hundred.

        Far is 8 times their median deviation, and at least a tenth of their median.
        """
        if len(self.losses) >= 20:
            usual = statistics.median(self.losses)
            deviation = statistics.median(abs(x - usual) for x in self.losses)
            if loss > usual + max(8 * deviation, 0.1 * abs(usual)):
                print(
                    f"warning: step {step}: loss spike: {loss:.4f}, median {usual:.4f}",
                    file=self.stream,
                    flush=True,
                )
        if math.isfinite(loss):
            self.losses.append(loss)


def peak_memory() -> int:
    """Return the peak bytes that torch allocated on the largest pipeline stage.

    On CPUs it is the memory of this process. All ranks must call it. With CUDA graphs it is the reserved memory: torch
    does not count theirs as allocated.
    """
    from megatron.core import parallel_state
    from megatron.training import get_args

    if not devices.has_cuda():
        used = psutil.Process().memory_info().rss
    elif get_args().cuda_graph_impl == "none":
        used = torch.cuda.max_memory_allocated()
    else:
        used = torch.cuda.max_memory_reserved()
    if (stages := parallel_state.get_pipeline_model_parallel_group()).size() == 1:
        return used
    most = torch.tensor(used, device="cuda")
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX, group=stages)
    return int(most)


def _duration(seconds: float) -> str:
    """Return a time as h:mm:ss or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def log_values(values: dict[str, float], step: int) -> None:
    """Write values to TensorBoard and W&B, on the rank that has their writers."""
    from megatron.training import get_tensorboard_writer, get_wandb_writer

    if writer := get_tensorboard_writer():
        for name, value in values.items():
            writer.add_scalar(name, value, step)
    if wandb := get_wandb_writer():
        wandb.log(values, step)


@contextlib.contextmanager
def print_steps(line: StepLine, interval: int) -> Iterator[None]:
    """Print `line` every `interval` steps, after Megatron's log, on the rank with the loss.

    Megatron has no callback that gets the loss, so its log function is wrapped while the run lasts.
    """
    from megatron.training.utils import is_last_rank

    def log(original, *args, **kwargs):
        loss_dict, _, learning_rate, iteration, _, _, _, grad_norm, *_ = args
        if iteration % interval == 0:
            # Megatron adds the first step after a start to the next interval, so a resumed run would log a different
            # loss there than an uninterrupted one.
            kwargs["is_first_iteration"] = False
        result = original(*args, **kwargs)
        watchdog.report_step()
        due = iteration % interval == 0
        memory = peak_memory() if due else 0
        if due and is_last_rank():
            loss = loss_dict.get("lm loss")
            line.show(iteration, None if loss is None else float(loss), learning_rate, grad_norm, memory)
        elif line.last_step is None:
            line.start(iteration)
        return result

    with registry.override(hooks.TRAINING_LOG, log):
        yield
