"""Models whose frequencies depend on the longest position: both engines agree with transformers."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_cream.checkpoint.convert import import_hf
from megatron_cream.checkpoint.hf_folder import HfFolder
from megatron_cream.evaluation.models.language_model import find_model, load
from tests.evaluation_models import save_llama
from tests.process_groups import leave_process_group

SCALINGS = {
    "dynamic": {"max_position_embeddings": 64, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "longrope": {
        "max_position_embeddings": 256,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0] * 8,
            "long_factor": [1.0, 1, 2, 2, 3, 3, 4, 4],
            "original_max_position_embeddings": 64,
        },
    },
}


@pytest.fixture(autouse=True)
def no_process_group_is_left():
    yield
    leave_process_group()


@pytest.mark.parametrize("name", SCALINGS)
def test_log_probs_are_those_of_one_forward_pass(name, tmp_path):
    """Log-probabilities agree within the window of 64 and beyond it, with prefill_chunk=16.

    The scaling changes them, so the comparison can fail.
    """
    folder = save_llama(tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": None} | SCALINGS[name]))
    import_hf(HfFolder(folder), tmp_path / "ckpt")
    engines = [load(find_model(str(path), dtype="fp32"), prefill_chunk=16) for path in (folder, tmp_path / "ckpt")]
    for length in (40, 200):
        tokens = torch.randint(2, 2000, (1, length), generator=torch.Generator().manual_seed(length))
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.inference_mode():
            expected = theirs(tokens[:, :-1]).logits.log_softmax(-1)[0].gather(-1, tokens[0, 1:, None])[:, 0]
        for engine in engines:
            torch.testing.assert_close(engine.log_probs(tokens, 1)[0], expected, rtol=0, atol=1e-3)
    theirs.config.rope_parameters = {"rope_type": "default", "rope_theta": config["rope_parameters"]["rope_theta"]}
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)
    with torch.inference_mode():
        unscaled = theirs(tokens[:, :-1]).logits.log_softmax(-1)[0].gather(-1, tokens[0, 1:, None])[:, 0]
    assert (unscaled - expected).abs().max() > 0.01


@pytest.mark.parametrize("name", SCALINGS)
def test_answers_do_not_depend_on_other_texts(name, tmp_path):
    """Neither on those of the batch nor on earlier ones; a model that answers alone in a new process is the oracle."""
    folder = save_llama(tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": None} | SCALINGS[name]))
    import_hf(HfFolder(folder), tmp_path / "ckpt")
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(2, 2000, (length,), generator=generator).tolist() for length in (30, 90, 200)]
    sampling = dict(temperature=1.0, top_p=1.0)
    for path in (folder, tmp_path / "ckpt"):
        open_model = lambda path=path: load(find_model(str(path), dtype="fp32"), prefill_chunk=16)
        alone = [open_model().generate([prompts[i]], 12, seeds=[i], **sampling)[0] for i in range(3)]
        model = open_model()
        scores = model.log_probs(torch.tensor([prompts[1]]), 1)
        assert model.generate(prompts, 12, seeds=[0, 1, 2], **sampling) == alone
        assert model.generate(prompts[::-1], 12, seeds=[2, 1, 0], **sampling) == alone[::-1]
        torch.testing.assert_close(model.log_probs(torch.tensor([prompts[1]]), 1), scores, rtol=0, atol=1e-4)
