"""Compare a Megatron checkpoint with a Hugging Face folder: checksums, tensors, logits."""

import gc
import os
from pathlib import Path

import psutil
import torch
from torch import Tensor

from megatron_cream.checkpoint import carried, output
from megatron_cream.checkpoint.convert import export_groups
from megatron_cream.checkpoint.hf_folder import HfFolder
from megatron_cream.checkpoint.mapping import list_parameters
from megatron_cream.checkpoint.megatron_folder import MegatronCheckpoint
from megatron_cream.checkpoint.model import load_model
from megatron_cream.common.errors import UsageError
from megatron_cream.common.progress_bar import TransferBar

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # relative error of logits; that of bf16 is from rounding


def verify(checkpoint: MegatronCheckpoint, folder: HfFolder, *, text: str) -> bool:
    """Compare both and print the largest differences.

    Returns: whether both are the same model.

    Raises:
        UsageError: the shapes differ, or a file has changed since it was written.
    """
    _verify_checksums(checkpoint, folder)
    same = _verify_tensors(checkpoint, folder)
    return _verify_logits(checkpoint, folder, text) and same


def _verify_checksums(checkpoint: MegatronCheckpoint, folder: HfFolder) -> None:
    with TransferBar("checksums: read") as progress:
        # The manifest of an imported checkpoint is in its top folder.
        of_checkpoint = checkpoint.path if checkpoint.step == "release" else checkpoint.folder
        hf = [checkpoint.hf_folder] if checkpoint.hf_folder else []
        for place in (of_checkpoint, *hf, folder.path):
            if not (place / output.MANIFEST).is_file():
                print(f"checksums: {place} has no {output.MANIFEST}")
            output.check_unchanged(place, progress, include_texts=True)
        for place in (*hf, folder.path):
            carried.check_files(place, vocabulary=checkpoint.shape.vocab_size)


def _verify_tensors(checkpoint: MegatronCheckpoint, folder: HfFolder) -> bool:
    if checkpoint.shape.vocab_size != folder.shape.vocab_size:
        raise UsageError(
            f"--hf-path {folder.path}: has a vocabulary of {folder.shape.vocab_size}, "
            f"but the checkpoint's is {checkpoint.shape.vocab_size}"
        )
    kinds = {row.names(layer)[0] for row, layer in list_parameters(folder.shape)}
    groups = export_groups(checkpoint, None)
    if kinds != {group.entries[0][0] for group in groups}:
        raise UsageError(f"--hf-path {folder.path}: not the same model as --checkpoint {checkpoint.path}")
    largest, where, equal, count, cast = 0.0, "", 0, 0, 0
    with TransferBar("tensors: compared") as progress:
        progress.expect(sum(group.nbytes for group in groups))
        for group in groups:
            for (name, _, shape), ours in zip(group.entries, group.produce(), strict=True):
                theirs = folder.get(name)
                if tuple(theirs.shape) != shape:
                    raise UsageError(
                        f"--hf-path {folder.path}: {name} has shape {list(theirs.shape)}, not {list(shape)}"
                    )
                count += 1
                cast += ours.dtype != theirs.dtype
                difference = _largest_difference(ours.reshape(shape), theirs)
                equal += difference == 0
                if difference > largest:
                    largest, where = difference, name
                progress(theirs.nbytes)
    kind = f"; {cast} have another dtype" if cast else ""
    print(
        f"tensors: {equal} of {count} equal{kind}; largest difference {largest:.3g}"
        + (f", in {where}" if where else "")
    )
    return equal == count


def _largest_difference(ours: Tensor, theirs: Tensor) -> float:
    if ours.dtype == theirs.dtype and torch.equal(
        ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8)
    ):
        return 0.0  # NaN equals NaN here
    parts = zip(ours.reshape(-1).split(1 << 24), theirs.reshape(-1).split(1 << 24))
    # Compare in the narrower dtype, so that a cast down of the same values is equal.
    kind = min(ours.dtype, theirs.dtype, key=lambda d: d.itemsize)
    return max((_largest(a.to(kind).double(), b.to(kind).double()) for a, b in parts), default=0.0)


def _largest(a: Tensor, b: Tensor) -> float:
    """Return the largest difference; that of NaN and another value is infinite, of two NaN 0."""
    same = (a == b) | (a.isnan() & b.isnan())
    infinity = float("inf")
    return (a - b).abs().nan_to_num_(nan=infinity, posinf=infinity).masked_fill_(same, 0.0).max().item()


def _verify_logits(checkpoint: MegatronCheckpoint, folder: HfFolder, text: str) -> bool:
    """Compare and print the logits of both models on the same tokens."""
    tokens = _tokenize(folder.path, text, checkpoint.shape.vocab_size)
    limit = checkpoint.shape.max_position_embeddings
    tokens = tokens[:, : min(limit, 2048)]
    dtype = _choose_dtype(checkpoint)
    theirs = _transformers_logits(folder.path, tokens, dtype)
    gc.collect()
    model = load_model(checkpoint, dtype)
    device = next(model.parameters()).device
    positions = torch.arange(tokens.shape[1], device=device)[None]
    with torch.inference_mode():
        ours = model(tokens.to(device), positions, None).float()[..., : theirs.shape[-1]].cpu()
    absolute = (ours - theirs).abs().max().item()
    relative = (torch.linalg.norm(ours - theirs) / torch.linalg.norm(theirs)).item()
    same_best = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
    print(
        f"logits: {tokens.shape[1]} tokens in {str(dtype).removeprefix('torch.')}: largest difference {absolute:.3g}, "
        f"relative error {relative:.3g}, same best token at {same_best:.1%}"
    )
    return relative <= _TOLERANCE[dtype]


def _choose_dtype(checkpoint: MegatronCheckpoint) -> torch.dtype:
    """Return float32 if a copy of the model fits into memory, else bfloat16."""
    groups = export_groups(checkpoint, None)
    elements = sum(torch.Size(size).numel() for group in groups for _, _, size in group.entries)
    return torch.float32 if 4 * elements + (2 << 30) < psutil.virtual_memory().available else torch.bfloat16


def _transformers_logits(folder: Path, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
    ).eval()
    with torch.inference_mode():
        return model(tokens).logits.float()


def _tokenize(folder: Path, text: str, vocab_size: int) -> Tensor:
    """Return token ids, int64 [1, n]; without a tokenizer, the bytes of the text."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoTokenizer

    try:
        ids = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)(text)["input_ids"]
    except Exception:  # the tokenizer is missing or incomplete
        ids = []
    if not ids:
        ids = list(text.encode())
    return torch.tensor([[i % vocab_size for i in ids]])
