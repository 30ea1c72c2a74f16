"""Cases of bad Hugging Face folders: the damage, the command line to run, the expected error message.

More cases, for the converter, are in checkpoint/test_convert_faults.py.
"""

from pathlib import Path

import torch

from tests.bad_input_cases import (
    EVALUATE,
    EXPORT,
    FROM_CKPT,
    FROM_HF,
    IMPORT,
    NORM,
    PREPARE,
    START,
    VERIFY,
)
from tests.bad_inputs import (
    also,
    bin_of,
    config,
    cut,
    header,
    malicious_bin,
    put,
    remove,
    sharded,
    tensors,
    without_checksums,
)


def own_code(w: Path) -> None:
    (w / "hf/code.py").write_text(f"open({str(w / 'pwned')!r}, 'w')\nclass C: pass\nclass M: pass\n")


# name: (damage, command line, words that the error message must contain)
FOLDERS = {
    "index out of the folder": (sharded({NORM: "../data.bin"}), FROM_HF, ["'../data.bin'", "beside the index"]),
    "absolute index": (sharded({NORM: "/etc/passwd"}), FROM_HF, ["'/etc/passwd'", "beside the index"]),
    "index out of the folder, evaluated": (sharded({NORM: "../data.bin"}), EVALUATE, ["'../data.bin'", "beside"]),
    "index of a name that none can have": (sharded({NORM: "a" * 5000}), IMPORT, ["aaaa", "beside the index"]),
    "index of numbers": (sharded({NORM: 5}), IMPORT, ["5: must be the name of a file"]),
    "index empty": (sharded({}), IMPORT, ["must have a weight_map"]),
    "index nested deep": (
        also(sharded({}), put("hf/model.safetensors.index.json", "[" * 200_000)), IMPORT, ["not a readable index of shards"],
    ),
    "index names no shard": (sharded({NORM: "b.safetensors"}), EVALUATE, ["b.safetensors, which does not exist"]),
    "index of half the tensors": (sharded({NORM: "a.safetensors"}), FROM_HF, ["tensor", "is missing"]),
    "pickle with code": (malicious_bin, FROM_HF, ["pytorch_model.bin: not a readable file of tensors"]),
    "pickle with code to import": (malicious_bin, IMPORT, ["pytorch_model.bin: not a readable file of tensors"]),
    "pickle with code to evaluate": (malicious_bin, EVALUATE, ["pytorch_model.bin: not a readable file of tensors"]),
    "pickle of a list": (bin_of(lambda s: [*s.values()]), IMPORT, ["contains something other than named tensors"]),
    "pickle of numbers for names": (bin_of(lambda s: s | {5: s[NORM]}), FROM_HF, ["other than named tensors"]),
    "pickle of a sparse tensor": (bin_of(lambda s: s | {NORM: s[NORM].to_sparse()}), IMPORT, ["other than named"]),
    "pickle of a tensor without elements": (bin_of(lambda s: s | {NORM: s[NORM].to("meta")}), IMPORT, ["other than"]),
    "tensor missing": (tensors(lambda s: s.pop(NORM)), FROM_HF, [f"tensor {NORM} is missing"]),
    "tensor missing, evaluated": (tensors(lambda s: s.pop(NORM)), EVALUATE, [NORM, "missing"]),
    "tensor of another shape": (tensors(lambda s: s.update({NORM: torch.ones(3)})), FROM_HF, [NORM, "shape [3]"]),
    "tensor of whole numbers": (
        tensors(lambda s: s.update({NORM: s[NORM].to(torch.int32)})), FROM_HF, [NORM, "only float32, bfloat16"],
    ),
    "weights cut": (cut("hf/model.safetensors", 1000), FROM_HF, ["model.safetensors: not a readable file of tensors"]),
    "weights cut, evaluated": (cut("hf/model.safetensors", 1000), EVALUATE, ["model.safetensors: not a readable file of"]),
    "weights empty": (put("hf/model.safetensors", b""), IMPORT, ["model.safetensors: not a readable file of tensors"]),
    "header of exabytes": (header(lambda h: 1 << 62), IMPORT, ["model.safetensors: not a readable file of tensors"]),
    "header longer than the file": (header(lambda h: 90_000_000), EVALUATE, ["model.safetensors: not a readable file of"]),
    "tensors overlap": (
        header(lambda h: h[NORM].update(data_offsets=[0, h[NORM]["data_offsets"][1] - h[NORM]["data_offsets"][0]])),
        IMPORT, ["model.safetensors: not a readable file of tensors"],
    ),
    "tensor beyond the file": (
        header(lambda h: h[NORM].update(data_offsets=[1 << 40, (1 << 40) + 256])), IMPORT, ["not a readable file of tensors"],
    ),
    "config is no JSON": (put("hf/config.json", "{,"), FROM_HF, ["config.json", "not a readable model configuration"]),
    "config is no text": (put("hf/config.json", b"\xff\xfe\x00"), IMPORT, ["config.json", "not a readable model configuration"]),
    "config nested deep": (put("hf/config.json", '{"a":' * 100_000), IMPORT, ["config.json", "not a readable model configuration"]),
    "config is a folder": (
        also(remove("hf/config.json"), lambda w: (w / "hf/config.json").mkdir()), FROM_HF, ["config.json: not a file"],
    ),
    "layers are negative": (config(num_hidden_layers=-2), FROM_HF, ["num_hidden_layers -2", "from 1"]),
    "layers are text": (config(num_hidden_layers="two"), FROM_HF, ["num_hidden_layers 'two'", "whole number"]),
    "layers are a fraction": (config(num_hidden_layers=2.5), IMPORT, ["num_hidden_layers 2.5"]),
    "layers without end": (config(num_hidden_layers=10**12), IMPORT, ["num_hidden_layers 1000000000000"]),
    "heads are true": (config(num_attention_heads=True), IMPORT, ["num_attention_heads True"]),
    "width without end": (config(hidden_size=10**15), IMPORT, ["hidden_size 1000000000000000"]),
    "heads of another width": (config(head_dim=10), IMPORT, ["shape"]),
    "no epsilon": (config(rms_norm_eps="small"), IMPORT, ["rms_norm_eps 'small'"]),
    "architectures is a number": (config(architectures=3), IMPORT, ["architectures 3"]),
    "model type is a list": (config(model_type=["llama"]), FROM_HF, ["model_type ['llama']"]),
    "another family": (config(model_type="gpt2"), FROM_HF, ["model_type 'gpt2'"]),
    "unknown rope scaling": (
        config(rope_parameters=None, rope_scaling={"rope_type": "spiral", "factor": 2.0}), FROM_HF, ["spiral"],
    ),
    "rope scaling is text": (config(rope_scaling="linear"), FROM_HF, ["rope_scaling 'linear'"]),
    "rope factor is negative": (
        config(rope_parameters={"rope_type": "linear", "factor": -2.0, "rope_theta": 1e4}), FROM_HF, ["factor", "-2.0"],
    ),
    "rope theta is text": (
        config(rope_parameters={"rope_type": "default", "rope_theta": "big"}), IMPORT, ["config.json"],
    ),
    "no tokenizer": (
        also(remove("hf/tokenizer.json"), remove("hf/tokenizer_config.json")), EVALUATE, ["no tokenizer"],
    ),
    "tokenizer is no JSON": (put("hf/tokenizer.json", "{"), EVALUATE, ["the tokenizer cannot be loaded"]),
    "tokenizer cut, training": (cut("hf/tokenizer.json", 9000), FROM_HF, ["hf/tokenizer.json: not readable JSON"]),
    "tokenizer cut, imported": (cut("hf/tokenizer.json", 9000), IMPORT, ["hf/tokenizer.json: not readable JSON"]),
    "tokenizer cut, exported": (cut("ckpt/hf/tokenizer.json", 9000), EXPORT, ["ckpt/hf/tokenizer.json: not readable JSON"]),
    "tokenizer lost, exported": (remove("ckpt/hf/tokenizer.json"), EXPORT, ["ckpt/hf/tokenizer.json: missing"]),
    "tokenizer cut, verified": (
        without_checksums(cut("exported/tokenizer.json", 9000)), VERIFY, ["exported/tokenizer.json: not readable JSON"],
    ),
    "chat template cut, trained from": (
        put("ckpt/hf/chat_template.jinja", "{% for m in"), FROM_CKPT, ["chat_template.jinja: not a readable chat template"],
    ),
    "type of the weights": (config(torch_dtype="int4"), IMPORT, ["torch_dtype 'int4': must be one of auto"]),
    "tokenizer is no JSON, preprocessing": (put("hf/tokenizer.json", "{"), PREPARE, ["--tokenizer-model"]),
    "tokenizer with code": (
        also(
            put("hf/tokenizer_config.json", '{"tokenizer_class": "C", "auto_map": {"AutoTokenizer": ["code.C", ""]}}'),
            own_code, remove("hf/tokenizer.json"),
        ),
        EVALUATE, ["--model"],
    ),
    "model with code": (
        also(
            config(model_type="mine", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}),
            own_code,
        ),
        EVALUATE, ["--model"],
    ),
    "layers without end, evaluated": (config(num_hidden_layers=10**9), EVALUATE, ["num_hidden_layers 1000000000"]),
    "negative layers, evaluated": (config(num_hidden_layers=-1), EVALUATE, ["num_hidden_layers -1"]),
    "chat template with a fault": (put("hf/chat_template.jinja", "{% for"), (*EVALUATE, "--chat"), ["chat template"]),
    "no such folder": (also(), (*START, "--load-hf", "{0}/none"), ["--load-hf", "no such folder"]),
    "folder is a file": (also(), (*START, "--load-hf", "{0}/data.bin"), ["--load-hf", "no such folder"]),
    "save into what is there": (also(), (*FROM_HF, "--save-hf", "{0}/exported"), ["--save-hf", "is not empty"]),
}  # fmt: skip
