"""Corrections to megatron-core 0.19, each with its reason. Delete what a newer release no longer needs."""

import functools
from argparse import Namespace
from types import SimpleNamespace

import torch

from megatron_cream import platform


def apply(args: Namespace) -> None:
    """Call before `pretrain`; again for another run in the same process."""
    _one_command_line(args)
    if platform.has_cuda():
        _weight_gradients_without_apex()
        _torch_adam_in_one_kernel()
    _distributed_optimizer_resumes_with_torch_adam()


def _one_command_line(args: Namespace) -> None:
    """`pretrain` parses sys.argv once more for its fault tolerance, with a parser that knows no recipe."""
    from megatron.training import ft_integration

    ft_integration.arguments = SimpleNamespace(parse_args=lambda **_: args)


def _weight_gradients_without_apex() -> None:
    """Megatron's linear layers add weight gradients to float32 in the GEMM only with an extension of apex's."""
    from megatron.core.tensor_parallel import layers

    from megatron_cream.model.kernels import weight_gradient

    if not layers._grad_accum_fusion_available:
        layers.fused_weight_gradient_mlp_cuda = weight_gradient
        layers._grad_accum_fusion_available = True


def _torch_adam_in_one_kernel() -> None:
    """Without Transformer Engine and apex Megatron takes torch's AdamW, and its slow form."""
    from megatron.core import optimizer

    if not optimizer.USING_PYTORCH_OPTIMIZER or hasattr(torch.optim.AdamW.__init__, "__wrapped__"):
        return

    def fused(original, self, *args, **kwargs):
        original(self, *args, **{"fused": True, **kwargs})

    for cls in (torch.optim.AdamW, torch.optim.Adam):
        _wrap(cls, "__init__", fused)


def _distributed_optimizer_resumes_with_torch_adam() -> None:
    """Resuming with the distributed optimizer and torch's Adam (no Transformer Engine, no apex).

    Their Adam counts steps once for a parameter group; torch's keeps a `step` in the state of
    each parameter, and three places of the loading path do not reckon with that:
    the count is asked for before there is one (an assertion fails); the tensors to set are
    looked up by every key of the state, `step` among them, which a checkpoint does not hold
    (KeyError); and all parameters are given one and the same tensor as their count, so
    that each later step would count once for every parameter.
    """
    from megatron.core.optimizer import distrib_optimizer

    cls = distrib_optimizer.DistributedOptimizer
    if distrib_optimizer.HAVE_APEX_OR_TE or hasattr(cls.sharded_state_dict, "__wrapped__"):
        return

    def state_first(original, self, model_sharded_state_dict, is_loading=False, *args, **kwargs):
        if is_loading and not self.optimizer.state:
            self._init_optimizer_states_with_dummy_values()
        return original(self, model_sharded_state_dict, is_loading, *args, **kwargs)

    def step_apart(original, self, model_param, tensors):
        return original(self, model_param, {"step": None, **tensors})

    def a_step_each(original, self, state_dict):
        original(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    _wrap(cls, "sharded_state_dict", state_first)
    _wrap(cls, "_set_main_param_and_optimizer_states", step_apart)
    _wrap(cls, "load_state_dict", a_step_each)


def _wrap(cls: type, name: str, wrapper) -> None:
    """Replace method `name` of `cls` by `wrapper`, which is given the original first."""
    original = getattr(cls, name)

    @functools.wraps(original)
    def method(*args, **kwargs):
        return wrapper(original, *args, **kwargs)

    setattr(cls, name, method)
