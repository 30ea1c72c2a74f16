"""A model's parameters are overwritten by the weights that it starts from."""

from argparse import Namespace
from types import MethodType

import torch

from megatron_cream.checkpoint import base_weights
from megatron_cream.checkpoint.mapping import list_parameters, megatron_shape
from megatron_cream.checkpoint.model import fill_model
from tests.hf_models import save_model


def make_parameter(size: tuple[int, ...], is_quantized: bool) -> torch.nn.Parameter:
    """Return a random parameter; if it is quantized, with Transformer Engine's methods and a copy in bf16."""
    parameter = torch.nn.Parameter(torch.randn(size))
    if is_quantized:
        parameter._high_precision_init_val = parameter.detach().bfloat16()
        parameter.get_high_precision_init_val = MethodType(lambda self: self._high_precision_init_val, parameter)
    return parameter


def test_the_float32_weights_of_fp8_parameters_are_those_of_the_model(tmp_path):
    """Megatron makes them from the initial value, which was the random one. This needs no GPU and no FP8."""
    save_model(tmp_path / "hf")
    base = base_weights.open_folder(tmp_path / "hf")
    parameters = {
        row.module_name(layer, True): make_parameter(megatron_shape(row, base.shape, base.shape.vocab_size), kept)
        for kept, (row, layer) in ((layer is not None, (row, layer)) for row, layer in list_parameters(base.shape))
    }
    model = Namespace(
        named_parameters=parameters.items,
        named_modules=lambda: [],
        pg_collection=Namespace(tp=Namespace(rank=lambda: 0, size=lambda: 1)),
        decoder=Namespace(layers=[]),
    )
    fill_model(model, base.shape, base.read)
    for row, layer in list_parameters(base.shape):
        parameter = parameters[row.module_name(layer, True)]
        assert torch.equal(parameter, base.read(row, layer, torch.empty(parameter.shape))), row.key
        if layer is not None:
            assert torch.equal(parameter.get_high_precision_init_val(), parameter.bfloat16()), row.key
