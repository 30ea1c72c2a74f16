"""Cases of bad checkpoints: the damage, the command line to run, the expected error message.

The command lines are also those of bad_folder_cases.py, bad_setting_cases.py and advice_cases.py.
"""

import pickle
import shutil
from pathlib import Path

import torch

from megatron_cream.checkpoint.opening import open_step
from tests.bad_inputs import (
    MODEL,
    RUN,
    TRAINER,
    Malice,
    also,
    config,
    cut,
    entry,
    flip,
    flip_in_entry,
    metadata,
    put,
    remove,
    saved,
    without_checksums,
)

NORM, NORM_KEY = "model.norm.weight", "decoder.final_layernorm.weight"
STEP = "run/iter_0000002"
SHARD = f"{STEP}/__0_0.distcp"
CLASSIC = "classic/release/mp_rank_00/model_optim_rng.pt"
TRACKER = "latest_checkpointed_iteration.txt"

# Command lines to run on a world, {0}. The trainer starts from random weights, resumes, starts from a checkpoint, or
# starts from Hugging Face weights.
NEW = (TRAINER, *RUN, "--data-path", "{0}/data", "--save", "{0}/new", "--tensorboard-dir", "{0}/tb")
NEW_WITHOUT_DATA = (TRAINER, *RUN, "--save", "{0}/new")
RESUME = (*NEW, "--load", "{0}/run")
SGD = (*(part for part in RESUME if part != "--use-distributed-optimizer"), "--optimizer", "sgd")
FP16 = (*(part for part in RESUME if part != "--fp32"), "--fp16")
GO_ON = (*RESUME, "--save", "{0}/run", "--train-iters", "4")
START = (TRAINER, *MODEL, "--data-path", "{0}/data", "--tokenizer-type", "NullTokenizer", "--save", "{0}/new")
FROM_CKPT, FROM_HF = (*START, "--pretrained-checkpoint", "{0}/ckpt"), (*START, "--load-hf", "{0}/hf")
FROM_EXPORT, FROM_CLASSIC = (*START, "--load-hf", "{0}/exported"), (*START, "--pretrained-checkpoint", "{0}/classic")
RECIPE = (TRAINER, "--config", "{0}/recipe.yaml", "--data-path", "{0}/data", "--save", "{0}/new")
IMPORT = ("tools/convert_hf.py", "import", "--hf-path", "{0}/hf", "--output", "{0}/new")
EXPORT = ("tools/convert_hf.py", "export", "--checkpoint", "{0}/ckpt", "--hf-path", "{0}/new")
EXPORT_RUN = ("tools/convert_hf.py", "export", "--checkpoint", "{0}/run", "--hf-path", "{0}/new")
VERIFY = ("tools/convert_hf.py", "verify", "--checkpoint", "{0}/ckpt", "--hf-path", "{0}/exported")
VERIFY_RUN = ("tools/convert_hf.py", "verify", "--checkpoint", "{0}/run", "--hf-path", "{0}/exported")
PREPARE = (
    "tools/preprocess_data.py", "--input", "{0}/texts.jsonl", "--output-prefix", "{0}/new",
    "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "{0}/hf",
)  # fmt: skip
KV = ("tools/evaluate.py", "kv", "--keys", "3", "--samples", "1", "--output", "{0}/new", "--model")
EVALUATE, EVALUATE_CKPT, EVALUATE_RUN = ((*KV, f"{{0}}/{folder}") for folder in ("hf", "ckpt", "run"))
PERPLEXITY = (
    "tools/evaluate.py", "perplexity", "--lengths", "64", "--stride", "32", "--output", "{0}/new", "--model", "{0}/hf",
    "--dataset", "{0}/texts.jsonl",
)  # fmt: skip
PLAN = ("tools/plan.py", "--gpus", "2", *MODEL, "--tokenizer-type", "NullTokenizer", "--data-path", "{0}/data")

FLIPPED = flip_in_entry(STEP, "common_state")


def evil(w: Path) -> Malice:
    return Malice(w / "pwned")


def state(name: str, value):
    """Build an entry as its usual list of one dict, with `value(world)` in the dict."""
    return lambda w: [{name: value(w)}]


def flagged(w: Path):
    """Build a common state whose flags contain code."""
    from argparse import Namespace

    return [{"args": Namespace(num_layers=2, tricks=evil(w)), "iteration": 2}]


def placed_at(path: str):
    """Change the metadata so that all data is in this file."""

    def change(w: Path, found) -> None:
        for info in found.storage_data.values():
            info.relative_path = path

    return change


def without_common_state(w: Path, found) -> None:
    for index in [index for index in found.storage_data if "common" in index.fqn]:
        del found.storage_data[index]


def as_it_lies(w: Path):
    """Build the common state of a run with --no-dist-ckpt-optim-fully-reshardable and TP 2."""
    common = open_step(w / STEP, "--load").common
    vars(common["args"]).update(dist_ckpt_optim_fully_reshardable=False, tensor_model_parallel_size=2)
    return common


def astray(w: Path) -> None:
    (w / "run" / TRACKER).unlink()
    (w / "run" / TRACKER).symlink_to("/nowhere")


def untracked(w: Path) -> None:
    shutil.copytree(w / STEP, w / "run/iter_0000004")
    (w / "run" / TRACKER).unlink()


# name: (damage, command line, words that the error message must contain)
CHECKPOINTS = {
    "metadata runs code": (metadata(STEP, lambda w, m: evil(w)), RESUME, ["--load", "open", "none of it was run"]),
    "metadata's planner data runs code": (
        metadata(STEP, lambda w, m: setattr(m, "planner_data", evil(w))), RESUME, ["none of it was run"],
    ),
    "metadata asks for os.system": (
        without_checksums(put(f"{STEP}/.metadata", b"cposix\nsystem\n(S'touch pwned'\ntR.")),
        RESUME, ["posix.system"],
    ),
    "common state runs code": (
        entry(STEP, "common_state", state("args", evil)), RESUME, ["open", "none of it was run"],
    ),
    "flags in the common state run code": (entry(STEP, "common_state", flagged), RESUME, ["none of it was run"]),
    "common.pt runs code": (
        lambda w: (w / STEP / "common.pt").write_bytes(saved({"args": evil(w)})), RESUME, ["none of it was run"],
    ),
    "random state runs code": (entry(STEP, "rng_state", lambda w: [evil(w)]), RESUME, ["rng_state", "open"]),
    "rerun state runs code": (
        entry(STEP, "rerun_state_machine", lambda w: [evil(w)]), RESUME, ["rerun_state_machine", "open"],
    ),
    "extra state runs code": (entry(STEP, "decoder", lambda w: [evil(w)]), RESUME, ["_extra_state", "open"]),
    "a pickle within an extra state runs code": (
        entry(STEP, "decoder", lambda w: [torch.frombuffer(bytearray(pickle.dumps(evil(w))), dtype=torch.uint8)]),
        RESUME, ["_extra_state", "open"],
    ),
    "extra state of an imported model runs code": (
        entry("ckpt/release", "decoder", lambda w: [evil(w)]), FROM_CKPT, ["--pretrained-checkpoint", "_extra_state"],
    ),
    "a common state for the converter runs code": (
        entry("ckpt/release", "common_state", lambda w: [evil(w)]), EXPORT, ["--checkpoint", "none of it was run"],
    ),
    "metadata for the converter runs code": (
        metadata("ckpt/release", lambda w, m: evil(w)), EXPORT, ["--checkpoint", "none of it was run"],
    ),
    "metadata for evaluation runs code": (
        metadata("ckpt/release", lambda w, m: evil(w)), EVALUATE_CKPT, ["--model", "none of it was run"],
    ),
    "mp_rank file runs code": (
        without_checksums(lambda w: (w / CLASSIC).write_bytes(saved({"args": evil(w)}))),
        FROM_CLASSIC, ["mp_rank_00/model_optim_rng.pt", "none of it was run"],
    ),
    "mp_rank file is a bare pickle": (
        without_checksums(lambda w: (w / CLASSIC).write_bytes(pickle.dumps(evil(w)))),
        FROM_CLASSIC, ["mp_rank_00/model_optim_rng.pt"],
    ),
    "mp_rank file cut": (without_checksums(cut(CLASSIC, 700)), FROM_CLASSIC, ["mp_rank_00/model_optim_rng.pt"]),
    "mp_rank file of another layout": (
        remove(CLASSIC), FROM_CLASSIC, ["release has no mp_rank_00"],
    ),
    "shard missing": (remove(SHARD), RESUME, ["--load", "__0_0.distcp is missing"]),
    "shard cut": (cut(SHARD, 5000), RESUME, ["__0_0.distcp", "is truncated"]),
    "shard empty": (put(SHARD, b""), RESUME, ["__0_0.distcp is truncated: it has 0 of"]),
    "a bit of a shard": (flip(SHARD), RESUME, ["__0_0.distcp", "damaged or changed since it was written"]),
    "a bit of the other rank's shard": (flip(f"{STEP}/__1_0.distcp", 0.3), RESUME, ["__1_0.distcp", "SHA-256"]),
    "a bit of the metadata": (flip(f"{STEP}/.metadata", 0.5), RESUME, ["iter_0000002/.metadata", "SHA-256"]),
    "a bit of the common state": (FLIPPED, RESUME, ["--load", "__0_0.distcp", "SHA-256"]),
    "a bit of the common state to export": (FLIPPED, EXPORT_RUN, ["--checkpoint", "__0_0.distcp", "SHA-256"]),
    "a bit of the common state to verify": (FLIPPED, VERIFY_RUN, ["--checkpoint", "__0_0.distcp", "SHA-256"]),
    "a bit of the common state to evaluate": (FLIPPED, EVALUATE_RUN, ["--model", "__0_0.distcp", "SHA-256"]),
    "a bit of the common state without checksums": (
        without_checksums(FLIPPED), EXPORT_RUN, ["run: iter_0000002/__0_0.distcp cannot be read: Unsupported operand"],
    ),
    "a bit of a random state": (
        flip_in_entry(STEP, "rng_state"), RESUME, ["--load", "__0_0.distcp", "SHA-256"],
    ),
    "a bit of a random state without checksums": (
        without_checksums(flip_in_entry(STEP, "rng_state")), RESUME, ["iter_0000002/__0_0.distcp", "rng_state"],
    ),
    "a bit of an extra state without checksums": (
        without_checksums(flip_in_entry(STEP, "decoder")), RESUME, ["iter_0000002/__", "_extra_state"],
    ),
    "a bit of an imported shard": (flip("ckpt/release/__0_1.distcp", 0.7), FROM_CKPT, ["__0_1.distcp", "SHA-256"]),
    "a bit of a shard to export": (flip("ckpt/release/__0_1.distcp", 0.7), EXPORT, ["__0_1.distcp", "SHA-256"]),
    "a bit of a run's shard to export": (flip(SHARD, 0.2), EXPORT_RUN, ["__0_0.distcp", "SHA-256"]),
    "a bit of a shard to verify": (flip("ckpt/release/__0_0.distcp"), VERIFY, ["__0_0.distcp", "SHA-256"]),
    "a bit of an exported shard to verify": (flip("exported/model.safetensors"), VERIFY, ["model.safetensors", "SHA"]),
    "a bit of a shard to evaluate": (flip("ckpt/release/__0_0.distcp"), EVALUATE_CKPT, ["__0_0.distcp", "SHA-256"]),
    "a bit of exported weights": (flip("exported/model.safetensors"), FROM_EXPORT, ["model.safetensors", "SHA-256"]),
    "a bit of exported weights to import": (
        also(flip("exported/model.safetensors"), remove("hf"), lambda w: (w / "exported").rename(w / "hf")),
        IMPORT, ["model.safetensors", "SHA-256"],
    ),
    "a manifest out of its folder": (
        put(f"{STEP}/integrity.json", '{"files": {"../../data.bin": "00"}}'), RESUME, ["integrity.json", "../../data"],
    ),
    "a manifest of a name that none can have": (
        put(f"{STEP}/integrity.json", '{"files": {"%s": "00"}}' % ("a" * 5000)), RESUME, ["names 'aaaa"],
    ),
    "a manifest that is none": (put(f"{STEP}/integrity.json", "["), RESUME, ["integrity.json", "not a readable manifest"]),
    "a manifest of a file that is not there": (
        put(f"{STEP}/integrity.json", '{"files": {"x.distcp": "00"}}'), RESUME, ["x.distcp: missing"],
    ),
    "metadata out of its folder": (
        metadata(STEP, placed_at("../../data.bin")), RESUME, ["'../../data.bin'", "must be the name of a file"],
    ),
    "absolute path in the metadata": (
        metadata("ckpt/release", placed_at("/etc/passwd")), EXPORT, ["'/etc/passwd'", "must be the name of a file"],
    ),
    "no metadata": (remove(f"{STEP}/.metadata"), RESUME, ["it has no .metadata"]),
    "metadata cut": (without_checksums(cut(f"{STEP}/.metadata", 900)), RESUME, ["iter_0000002/.metadata cannot be read"]),
    "metadata empty": (
        without_checksums(put(f"{STEP}/.metadata", b"")), RESUME, ["iter_0000002/.metadata cannot be read"],
    ),
    "metadata is text": (
        without_checksums(put(f"{STEP}/.metadata", "hello")), RESUME, ["iter_0000002/.metadata cannot be read"],
    ),
    "no metadata.json": (remove(f"{STEP}/metadata.json"), RESUME, ["it has no metadata.json"]),
    "metadata.json is none": (put(f"{STEP}/metadata.json", "{"), RESUME, ["iter_0000002/metadata.json cannot be read"]),
    "metadata.json of another format": (
        put(f"{STEP}/metadata.json", '{"sharded_backend": "zarr"}'), RESUME, ["metadata.json", "torch_dist"],
    ),
    "no common state": (
        metadata(STEP, without_common_state), RESUME, ["common state with the saved flags is missing"],
    ),
    "common state without flags": (entry(STEP, "common_state", lambda w: [{"args": None}]), RESUME, ["common state"]),
    "common state is a number": (entry(STEP, "common_state", lambda w: [7]), RESUME, ["common state"]),
    "tracker empty": (put(f"run/{TRACKER}", ""), RESUME, [TRACKER, "''", "must be a number"]),
    "tracker is text": (put(f"run/{TRACKER}", "newest"), RESUME, ["'newest'", "must be a number"]),
    "tracker out of its folder": (put(f"run/{TRACKER}", "../../x"), RESUME, ["'../../x'", "must be a number"]),
    "tracker huge": (put(f"run/{TRACKER}", "9" * 5000), RESUME, [TRACKER, "must be a number"]),
    "tracker negative": (put(f"run/{TRACKER}", "-2"), RESUME, ["'-2'", "must be a number"]),
    "tracker is no text": (put(f"run/{TRACKER}", b"\xff\xfe"), RESUME, [TRACKER, "must be a number"]),
    "tracker names no folder": (put(f"run/{TRACKER}", "77"), RESUME, ["has no iter_0000077"]),
    "tracker missing": (remove(f"run/{TRACKER}"), RESUME, ["--load", f"it has no {TRACKER}"]),
    "tracker is a folder": (
        also(remove(f"run/{TRACKER}"), lambda w: (w / "run" / TRACKER).mkdir()), RESUME, [TRACKER],
    ),
    "step folder missing": (remove(STEP), RESUME, ["has no iter_0000002"]),
    "a step under another's name": (
        also(lambda w: (w / STEP).rename(w / "run/iter_0000004"), put(f"run/{TRACKER}", "4")),
        RESUME, ["--load", "contains step 2, but the folder is named iter_0000004"],
    ),
    "step that is not there": (also(), (*RESUME, "--ckpt-step", "9"), ["has no iter_0000009"]),
    "tracker for export": (put(f"run/{TRACKER}", "1e5"), EXPORT_RUN, ["'1e5'", "must be a number"]),
    "load is a file": (also(), (*NEW, "--load", "{0}/data.bin"), ["--load", "data.bin: no such folder"]),
    "pretrained holds none": (also(), (*NEW, "--pretrained-checkpoint", "{0}/hf"), ["contains no checkpoint"]),
    "more layers": (also(), (*RESUME, "--num-layers", "3"), ["--num-layers 2, but these flags set 3"]),
    "wider": (also(), (*RESUME, "--hidden-size", "64"), ["--hidden-size 32", "these flags set 64"]),
    "another feed-forward": (also(), (*RESUME, "--ffn-hidden-size", "96"), ["--ffn-hidden-size 88", "these flags set 96"]),
    "other query groups": (also(), (*RESUME, "--num-query-groups", "4"), ["--num-query-groups 2", "these flags set 4"]),
    "another vocabulary": (also(), (*RESUME, "--vocab-size", "120"), ["--vocab-size 100", "these flags set 120"]),
    "norms of queries": (also(), (*RESUME, "--qk-layernorm"), ["--qk-layernorm False", "these flags set True"]),
    "another rope": (also(), (*RESUME, "--rotary-base", "5e5"), ["--rotary-base 10000", "these flags set 500000"]),
    "another scaling": (also(), (*RESUME, "--rope-scaling-type", "ntk"), ["--rope-scaling-type", "linear", "ntk"]),
    "another factor": (also(), (*RESUME, "--target-length", "768"), ["--rope-scaling-type", "4.0", "8.0"]),
    "another learning rate": (also(), (*RESUME, "--lr", "1e-3"), ["--lr", "0.01", "0.001", "--override-opt-param"]),
    "a learning rate of the embeddings' own": (
        also(), (*RESUME, "--decoupled-lr", "1e-3"), ["--decoupled-lr None", "these flags set 0.001", "--no-load-optim"],
    ),
    "other betas": (also(), (*RESUME, "--adam-beta2", "0.9"), ["--adam-beta2 0.999", "these flags set 0.9", "--no-load-optim"]),
    "the folder of a step": (also(), (*NEW, "--load", "{0}/" + STEP), ["Give --load", "run --ckpt-step 2"]),
    "another layout than the optimizer lies in": (
        entry(STEP, "common_state", lambda w: [as_it_lies(w)]), RESUME,
        ["--tensor-model-parallel-size 2", "these flags set 1", "--no-load-optim"],
    ),
    "another optimizer": (also(), SGD, ["--optimizer adam", "these flags set sgd", "--no-load-optim"]),
    "another precision": (also(), FP16, ["--fp16 False", "these flags set True", "--no-load-optim"]),
    "another norm": (also(), (*RESUME, "--norm-epsilon", "1e-3"), ["--norm-epsilon 1e-05", "these flags set 0.001"]),
    "another warm-up": (also(), (*RESUME, "--lr-warmup-fraction", "0.5"), ["--lr-warmup-iters 0", "set --lr-warmup-fraction 0.5"]),
    "a tracker that leads nowhere": (astray, GO_ON, ["--load", TRACKER, "--ckpt-step"]),
    "checksums that lead nowhere": (
        also(remove(f"{STEP}/integrity.json"), lambda w: (w / STEP / "integrity.json").symlink_to("/nowhere")),
        RESUME, ["iter_0000002/integrity.json", "No such file"],
    ),
    "two checkpoints without a tracker": (untracked, GO_ON, ["--load", "iter_0000002, iter_0000004", "--ckpt-step"]),
    "more steps": (also(), (*RESUME, "--train-iters", "9"), ["--train-iters 2", "set --train-iters 9", "--override-opt-param-scheduler"]),
    "a parameter of another shape": (
        metadata(STEP, lambda w, m: setattr(m.state_dict_metadata[NORM_KEY], "size", torch.Size([7]))),
        RESUME, ["--load", NORM_KEY, "[7]"],
    ),
    "a parameter missing": (
        metadata(STEP, lambda w, m: m.state_dict_metadata.pop(NORM_KEY) and None),
        RESUME, ["--load", NORM_KEY, "is missing"],
    ),
    "layers of another import": (also(), (*FROM_CKPT, "--num-layers", "3"), ["--num-layers 3", "has 2"]),
    "a bit of a classic file": (flip(CLASSIC, 0.5), FROM_CLASSIC, ["mp_rank_00/model_optim_rng.pt", "SHA-256"]),
    "a step of a release": (also(), (*FROM_CKPT, "--ckpt-step", "7"), ["--ckpt-step 7", "a converted model without steps"]),
    "Megatron's own check without checksums": (
        remove(f"{STEP}/integrity.json"), (*RESUME, "--verify-integrity"), ["--verify-integrity", "integrity.json"],
    ),
    "hf/config.json of another model": (config("ckpt/hf", vocab_size=9000), EXPORT, ["shape", "its flags require"]),
    "export into what is there": (also(), (*EXPORT[:-1], "{0}/hf"), ["is not empty"]),
}  # fmt: skip
