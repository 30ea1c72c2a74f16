"""Import and export of Hugging Face folders, compared with transformers."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from megatron_cream.patches import platform

platform.setup()


from megatron_cream.checkpoint.convert import export_hf, import_hf
from megatron_cream.checkpoint.hf_folder import HfFolder
from megatron_cream.checkpoint.mapping import list_parameters
from megatron_cream.checkpoint.megatron_folder import MegatronCheckpoint
from megatron_cream.checkpoint.model import load_model
from megatron_cream.model.rotary import build_rope_scaling
from tests import forked_commands
from tests.evaluation_models import save_tokenizer
from tests.hf_models import MODELS, logits_of, relative, save_model, some_tokens
from tests.launch import ROOT, torchrun, train, write_documents
from tests.process_groups import leave_process_group

WINDOW = 128


@pytest.fixture(scope="module", autouse=True)
def no_process_group_is_left():
    yield
    leave_process_group()


def run_tool(*flags) -> subprocess.CompletedProcess:
    command = [*forked_commands.python(), str(ROOT / "tools" / "convert_hf.py"), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_bit_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(tmp_path, name):
    """Our logits match transformers', and the exported weights and config equal the imported ones bit for bit."""
    theirs = save_model(tmp_path / "hf", name)
    import_hf(HfFolder(tmp_path / "hf"), tmp_path / "ckpt")
    checkpoint = MegatronCheckpoint(tmp_path / "ckpt")

    tokens, ids = some_tokens(theirs)
    with torch.inference_mode():
        logits = load_model(checkpoint, torch.float32)(tokens, ids, None)
    assert logits.shape[-1] == theirs.config.vocab_size
    assert relative(logits, logits_of(theirs, tokens, ids)) < 1e-5

    export_hf(checkpoint, tmp_path / "out")
    assert_bit_equal(weights(tmp_path / "out"), weights(tmp_path / "hf"))
    before, after = (AutoConfig.from_pretrained(tmp_path / folder).to_dict() for folder in ("hf", "out"))
    before.pop("head_dim", None), after.pop("head_dim", None)  # explicit after the export
    assert after == before | {"_name_or_path": after.get("_name_or_path")} or after == before


@pytest.mark.parametrize("rope_type", ["none", "linear", "ntk", "yarn", "llama3"])
@pytest.mark.parametrize("name", ["llama-mha", "llama-gqa-odd-vocabulary"])
def test_exported_rope_is_the_trained_one(tmp_path, name, rope_type):
    """Our logits match those of transformers for an extended model, at positions up to the new length."""
    save_model(tmp_path / "hf", name)
    import_hf(HfFolder(tmp_path / "hf"), tmp_path / "ckpt")
    checkpoint = MegatronCheckpoint(tmp_path / "ckpt")
    scaling = build_rope_scaling(rope_type, 8.0, WINDOW)
    checkpoint.shape = replace(checkpoint.shape, rope_scaling=scaling, max_position_embeddings=8 * WINDOW)
    export_hf(checkpoint, tmp_path / "out")

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["max_position_embeddings"] == 8 * WINDOW
    assert config["rope_scaling"] == (None if rope_type in ("none", "ntk") else scaling)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert isinstance(theirs, LlamaForCausalLM)
    tokens, ids = some_tokens(theirs)
    with torch.inference_mode():
        ours = load_model(checkpoint, torch.float32)(tokens, ids, None)
    assert relative(ours, logits_of(theirs, tokens, ids)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types_are_kept_or_cast(tmp_path, dtype):
    save_model(tmp_path / "hf", "llama-mha", dtype)
    import_hf(HfFolder(tmp_path / "hf"), tmp_path / "kept")
    export_hf(MegatronCheckpoint(tmp_path / "kept"), tmp_path / "out")
    theirs = weights(tmp_path / "hf")
    assert_bit_equal(weights(tmp_path / "out"), theirs)
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == dtype

    import_hf(HfFolder(tmp_path / "hf"), tmp_path / "cast", dtype=torch.float32)
    export_hf(MegatronCheckpoint(tmp_path / "cast"), tmp_path / "wide")
    assert_bit_equal(weights(tmp_path / "wide"), {name: tensor.float() for name, tensor in theirs.items()})
    export_hf(MegatronCheckpoint(tmp_path / "cast"), tmp_path / "narrow", dtype=dtype)
    assert_bit_equal(weights(tmp_path / "narrow"), theirs)


def test_shards_in_and_out(tmp_path):
    """Sharded safetensors and pytorch_model.bin, one file or several, give the same; shard sizes are respected."""
    model = save_model(tmp_path / "hf", "qwen2", torch.bfloat16, shard_size="100KB")
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    for folder in ("one", "many"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text((tmp_path / "hf" / "config.json").read_text())
    torch.save(state, tmp_path / "one" / "pytorch_model.bin")
    parts = [dict(list(state.items())[start::3]) for start in range(3)]
    for i, part in enumerate(parts):
        torch.save(part, tmp_path / "many" / f"pytorch_model-{i}.bin")
    weight_map = {name: f"pytorch_model-{i}.bin" for i, part in enumerate(parts) for name in part}
    (tmp_path / "many" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))

    for folder in ("hf", "one", "many"):
        import_hf(HfFolder(tmp_path / folder), tmp_path / f"ckpt-{folder}")
        export_hf(MegatronCheckpoint(tmp_path / f"ckpt-{folder}"), tmp_path / f"out-{folder}", max_shard_bytes=100_000)
        files = sorted((tmp_path / f"out-{folder}").glob("*.safetensors"))
        index = json.loads((tmp_path / f"out-{folder}" / "model.safetensors.index.json").read_text())
        assert len(files) > 2 and {file.name for file in files} == set(index["weight_map"].values())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in state.values())
        assert_bit_equal(weights(tmp_path / f"out-{folder}"), state)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / f"out-{folder}", dtype=torch.bfloat16)
        assert_bit_equal(loaded.state_dict(), model.state_dict())


def test_files_copied_along(tmp_path):
    """Tokenizer, templates and generation config are copied through a checkpoint; code and adapters are not."""
    save_model(tmp_path / "hf", "llama-mha", vocab_size=2048)
    save_tokenizer(tmp_path / "hf")
    (tmp_path / "hf" / "additional_chat_templates").mkdir()
    (tmp_path / "hf" / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
    (tmp_path / "hf" / "LICENSE").write_text("free")
    kept = {file.relative_to(tmp_path / "hf") for file in (tmp_path / "hf").rglob("*")}
    for name in ("modeling.py", "adapter_config.json"):
        (tmp_path / "hf" / name).write_text("{}")
    import_hf(HfFolder(tmp_path / "hf"), tmp_path / "ckpt")
    export_hf(MegatronCheckpoint(tmp_path / "ckpt"), tmp_path / "out")
    found = {file.relative_to(tmp_path / "out") for file in (tmp_path / "out").rglob("*")}
    assert found == kept | {Path("integrity.json")}
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "hf" / "tokenizer.json").read_bytes()


# From folders on the Hub: the dtype to load; a default rope given twice; the names of Llama 1 without newer keys;
# a model with code.
WORDS = [
    {"torch_dtype": "auto"},
    {"dtype": "auto", "torch_dtype": None},
    {"dtype": "torch.half"},
    {"rope_parameters": None, "rope_scaling": {"type": "default", "rope_type": "default"}},
    {"rope_scaling": {}},
    {"architectures": ["LLaMAForCausalLM"], "num_key_value_heads": None, "head_dim": None, "pad_token_id": -1},
    {"auto_map": {"AutoModelForCausalLM": "modeling_flash_llama.LlamaForCausalLM"}},
]


@pytest.mark.parametrize("words", WORDS)
def test_config_values_without_effect(tmp_path, words):
    save_model(tmp_path / "hf", "llama-mha")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config.pop("dtype", None)
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | words))
    import_hf(HfFolder(tmp_path / "hf"), tmp_path / "ckpt")
    export_hf(MegatronCheckpoint(tmp_path / "ckpt"), tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32
    exported = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "auto_map" not in exported and exported["architectures"] == ["LlamaForCausalLM"]


def test_old_buffers_and_tied_heads(tmp_path):
    """Buffers of old releases are ignored, and so is a saved tied head that equals the embedding."""
    model = save_model(tmp_path / "hf", "llama-mqa-tied")
    (tmp_path / "hf" / "model.safetensors").unlink()
    state = dict(model.state_dict())
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    assert "lm_head.weight" in state
    torch.save(state, tmp_path / "hf" / "pytorch_model.bin")
    import_hf(HfFolder(tmp_path / "hf"), tmp_path / "ckpt")
    export_hf(MegatronCheckpoint(tmp_path / "ckpt"), tmp_path / "out")
    expected = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert_bit_equal(weights(tmp_path / "out"), expected)


def test_keys_are_those_of_the_model(tmp_path):
    """The table has the names and shapes of Megatron's distributed checkpoint of the model."""
    save_model(tmp_path / "hf", "qwen3")
    import_hf(HfFolder(tmp_path / "hf"), tmp_path / "ckpt")
    checkpoint = MegatronCheckpoint(tmp_path / "ckpt")
    model = load_model(checkpoint, torch.float32)
    saved = checkpoint._metadata.state_dict_metadata
    wanted = {}
    for entry in model.sharded_state_dict().values():
        for part in entry.build() if hasattr(entry, "build") else [entry]:
            for tensor in part.values() if isinstance(part, dict) else [part]:
                wanted[getattr(tensor, "unique_key", tensor.key) if "_extra_state" in tensor.key else tensor.key] = (
                    tensor
                )
    assert wanted.keys() <= saved.keys()
    for key, tensor in wanted.items():
        if not key.startswith(("embedding", "output_layer")) and hasattr(saved[key], "size"):
            assert tuple(saved[key].size) == tuple(tensor.global_shape), key
    assert len({row.key for row, _ in list_parameters(checkpoint.shape)}) == sum(
        hasattr(s, "size") for s in saved.values()
    )


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A model, its import, and the flags and losses of a run that starts from the import."""
    folder = tmp_path_factory.mktemp("start")
    # Tied and with biases, to cover every kind of parameter under TP and PP.
    save_model(folder / "hf", "qwen2", max_position_embeddings=96)
    result = run_tool("import", "--hf-path", folder / "hf", "--output", folder / "ckpt")
    assert result.returncode == 0, result.stderr
    documents = write_documents(folder / "documents")
    # The shape is not among these flags, because it comes from the model.
    flags = f"--data-path {documents} --split 90,10,0 --train-iters 3 --num-workers 0 --eval-iters 1"
    flags += " --seq-length 96 --target-length 384 --rope-scaling-type linear --micro-batch-size 2"
    flags += " --global-batch-size 4 --lr 1e-3 --tokenizer-type NullTokenizer --seed 7"
    flags = flags.split()
    return folder, flags, train(1, folder / "tb1", *flags, "--pretrained-checkpoint", folder / "ckpt", base=())


LAYOUTS = {
    "tp2": "--tensor-model-parallel-size 2 --sequence-parallel",
    "dp2": "--use-distributed-optimizer",
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("source", ["--pretrained-checkpoint", "--load-hf"])
def test_any_layout_starts_from_an_import(start, layout, source):
    folder, flags, reference = start
    path = folder / ("hf" if source == "--load-hf" else "ckpt")
    losses = train(2, folder / f"{layout}{source}", *flags, *LAYOUTS[layout].split(), source, path, base=())
    assert max(abs(losses[step] - reference[step]) / reference[step] for step in reference) < 1e-5


def test_from_hugging_face_to_hugging_face(start):
    """--load-hf and --save-hf in one run, without a visible Megatron checkpoint, and with PP."""
    folder, flags, reference = start
    flags = [*flags, "--num-layers", 3, "--decoder-first-pipeline-num-layers", 1, "--pipeline-model-parallel-size", 2]
    losses = train(2, folder / "pp2", *flags, "--load-hf", folder / "hf", "--save-hf", folder / "out", base=())
    assert max(abs(losses[step] - reference[step]) / reference[step] for step in reference) < 1e-5
    assert [path.name for path in folder.glob(".out*")] == []
    config = json.loads((folder / "out" / "config.json").read_text())
    assert config["max_position_embeddings"] == 384
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    ours, theirs = weights(folder / "out"), weights(folder / "hf")
    assert ours.keys() == theirs.keys()
    moved = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert len(moved) == len(ours)
    assert all(relative(ours[name], theirs[name]) < 0.1 for name in ours)


@pytest.mark.parametrize("layers", ["local", "transformer_engine"])
def test_classic_format(start, layers):
    """`--format torch` loads as Megatron's older checkpoint at the layout it was written for, by either layers' names."""
    folder, flags, reference = start
    layout = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 1".split()
    options = [*layout, "--format", "torch", "--transformer-impl", layers]
    result = run_tool("import", "--hf-path", folder / "hf", "--output", folder / layers, *options)
    assert result.returncode == 0, result.stderr
    assert len(list((folder / layers / "release").glob("mp_rank_*/model_optim_rng.pt"))) == 2
    load = ["--load", folder / layers, "--ckpt-format", "torch", *layout]
    losses = train(2, folder / f"tb-{layers}", *flags, *load, base=())
    assert max(abs(losses[step] - reference[step]) / reference[step] for step in reference) < 1e-5


def test_classic_files_of_another_model_are_refused(start):
    """Megatron would train with the initial weights in place of those that a file lacks, of any rank."""
    folder, flags, _ = start
    layout = "--tensor-model-parallel-size 2".split()
    made = run_tool("import", "--hf-path", folder / "hf", "--output", folder / "holes", *layout, "--format", "torch")
    assert made.returncode == 0, made.stderr
    file = folder / "holes" / "release" / "mp_rank_01" / "model_optim_rng.pt"
    state = torch.load(file, weights_only=False)
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    state["model"]["another"] = state["model"].pop(name)
    torch.save(state, file)
    (folder / "holes" / "release" / "integrity.json").unlink()  # Megatron's own folders have none
    ended = torchrun(2, *flags, "--pretrained-checkpoint", folder / "holes", "--ckpt-format", "torch", *layout)
    wanted = f"lacks 1 weights, such as {name}, and has 1 that the model has not, such as another"
    assert ended.returncode and f"error: rank 1: the checkpoint is not of this model: it {wanted}" in ended.stderr
    said = [line for line in ended.stderr.splitlines() if line.startswith("pretrain_cream.py: ")]
    assert all(wanted in line or "rank 0: lost a peer rank" in line for line in said)
