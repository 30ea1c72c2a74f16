"""What a person watching a run reads: one line a step, and how fast the hardware is used."""

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

    total_steps: the step the run ends at.
    tokens_per_step: over all ranks.
    ranks: GPUs (or CPU processes) that share the work.
    flops_per_token: see `flops_per_token`.
    stream: where to print.
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
        """Measure from the end of `step`: before it, kernels were compiled and memory allocated."""
        self.last_step, self.last_time = step, time.perf_counter()

    def leave_out(self, seconds: float) -> None:
        """Time that went by since `start` and was no training."""
        if self.last_time is not None:
            self.last_time += seconds

    def show(
        self, step: int, loss: float | None, learning_rate: float | None, grad_norm: float | None, memory: int
    ) -> None:
        """Args: memory: bytes, as `peak_memory` has them."""
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
            self._watch(step, loss)
        self.start(step)

    def _watch(self, step: int, loss: float) -> None:
        """Warn of a loss far above the newest hundred: 8 of their median deviations, and a tenth of their median."""
        if len(self.losses) >= 20:
            usual = statistics.median(self.losses)
            deviation = statistics.median(abs(x - usual) for x in self.losses)
            if loss > usual + max(8 * deviation, 0.1 * abs(usual)):
                print(
                    f"warning: step {step}: loss spike, {loss:.4f} where {usual:.4f} is usual",
                    file=self.stream,
                    flush=True,
                )
        if math.isfinite(loss):
            self.losses.append(loss)


def peak_memory() -> int:
    """Bytes that torch held at most, on the pipeline stage that holds most; on CPUs what the process holds now.

    Every rank calls this. What CUDA graphs use again and again counts to torch's allocator as reserved alone.
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
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def log_values(values: dict[str, float], step: int) -> None:
    """To TensorBoard and W&B, on the rank that writes to them."""
    from megatron.training import get_tensorboard_writer, get_wandb_writer

    if writer := get_tensorboard_writer():
        for name, value in values.items():
            writer.add_scalar(name, value, step)
    if wandb := get_wandb_writer():
        wandb.log(values, step)


@contextlib.contextmanager
def each_step(line: StepLine, interval: int) -> Iterator[None]:
    """Show `line` after Megatron's own log, every `interval` steps, on the rank that has the loss.

    Megatron has no call-back that is given the loss: its log function is wrapped while the run lasts.
    """
    from megatron.training.utils import is_last_rank

    def log(original, *args, **kwargs):
        loss_dict, _, learning_rate, iteration, _, _, _, grad_norm, *_ = args
        if iteration % interval == 0:
            # Megatron would add a launch's first step to the next interval: the log of a resumed run would show
            # another loss there than the log of a run that never stopped.
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
