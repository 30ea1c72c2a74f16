"""Fixtures of evaluation tests. The helpers of evaluation_models.py are also used where pytest is not installed."""

import pytest
import torch

from megatron_cream.checkpoint.convert import import_hf
from megatron_cream.checkpoint.hf_folder import HfFolder
from tests.evaluation_models import save_llama
from tests.process_groups import leave_process_group


@pytest.fixture(scope="module", autouse=True)
def alone():
    """Use one thread, which is fastest for small models, and remove the process group afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    leave_process_group()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return {"hf": Hugging Face folder, "ckpt": Megatron checkpoint of the same model}."""
    folder = tmp_path_factory.mktemp("models")
    save_llama(folder / "hf", "llama-gqa-odd-vocabulary")
    import_hf(HfFolder(folder / "hf"), folder / "ckpt")
    return {"hf": folder / "hf", "ckpt": folder / "ckpt"}
