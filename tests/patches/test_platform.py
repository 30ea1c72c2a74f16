"""The CPU platform: Megatron sees a device, torch still reports none, and nothing changes with CUDA."""

import os
import subprocess
import sys

import pytest
import torch

from megatron_cream.common import devices
from megatron_cream.patches import platform
from tests.launch import ROOT


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.skipif(devices.has_cuda(), reason="gpu: there is one")
def test_cuda_calls_run_on_the_cpu():
    platform.setup()  # tests/conftest.py has called it already
    assert not torch.cuda.is_available() and not devices.has_cuda()
    ask = {"__name__": "megatron.core.somewhere", "torch": torch}
    assert eval("torch.cuda.is_available()", ask)
    x = torch.ones(3, device="cuda")
    assert x.device.type == "cpu" and x.cuda() is x and x.to("cuda:0").device.type == "cpu"
    assert torch.empty(2, device=torch.cuda.current_device()).device.type == "cpu"
    assert x.bfloat16().type() == "torch.cuda.BFloat16Tensor" and x.long().type() == "torch.LongTensor"
    assert torch.nn.Linear(2, 2).cuda(0).weight.device.type == "cpu"
    assert torch.empty(2, device="meta").device.type == "meta"


def test_devices_inside_backward():
    """Allocation on 'cuda' works inside a backward pass, as recompute and collectives need."""

    class Allocates(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return torch.full(grad.shape, 2.0, device="cuda") * grad

    class Nested(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.detach() * 2

        @staticmethod
        def backward(ctx, grad):
            x = ctx.saved_tensors[0].detach().requires_grad_()
            with torch.enable_grad():
                y = Allocates.apply(x)
            torch.autograd.backward(y, grad)
            return x.grad

    x = torch.ones(3, requires_grad=True, device="cuda")
    (Allocates.apply(x) + Nested.apply(x)).sum().backward()
    assert torch.equal(x.grad.cpu(), torch.full((3,), 4.0))


def test_no_effect_where_there_is_cuda():
    """With a (pretended) CUDA device, setup replaces nothing in torch. Before, has_cuda tells the truth."""
    out = run(
        "import torch\n"
        "print(torch.cuda.is_available())\n"
        "torch.cuda.is_available = lambda: True\n"
        "before = dict(vars(torch.cuda)); engine = torch.autograd._engine_run_backward\n"
        "from megatron_cream.common import devices\n"
        "from megatron_cream.patches import platform\n"
        "platform.setup()\n"
        "changed = [k for k, v in vars(torch.cuda).items() if before.get(k) is not v]\n"
        "assert not changed, changed\n"
        "assert torch.autograd._engine_run_backward is engine and devices.has_cuda()\n"
        "from torch.overrides import _get_current_function_mode_stack as stack\n"
        "assert not stack()\n"
        "print('untouched')"
    )
    assert out.split() == [str(devices.has_cuda()), "untouched"]


@pytest.mark.skipif(devices.has_cuda(), reason="gpu: there is one")
def test_cuda_only_packages_look_uninstalled(tmp_path):
    """On a node without a GPU, such as a login node, Megatron must not run their kernels on CPU tensors."""
    for name in ("transformer_engine", "transformer_engine_torch", "amp_C", "flash_attn"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('needs a driver')\n")
    code = (
        "from megatron_cream.patches import platform; platform.setup()\n"
        "from megatron.core.optimizer import clip_grads\n"
        "from megatron_cream.model.attention import choose_backend, find_flash_attention, has_transformer_engine\n"
        "assert not has_transformer_engine() and find_flash_attention() is None\n"
        "assert choose_backend('auto', has_cuda=False, half=True).name == 'sdpa'\n"
        "print(clip_grads.multi_tensor_applier.__module__)\n"
    )
    environment = dict(os.environ) | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.split()[-1].startswith("megatron.core"), done.stderr[-2000:]
