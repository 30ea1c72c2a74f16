"""Download the files of a model that a conversion reads from the Hugging Face Hub."""

from pathlib import Path

from megatron_cream.checkpoint import carried
from megatron_cream.checkpoint.hf_folder import CONFIG, WEIGHTS, read_index
from megatron_cream.common.errors import UsageError, one_line


def locate(path: str, *, flag: str) -> Path:
    """Return the local folder of a model.

    Args:
        path: a folder, or the name of a model on the Hugging Face Hub, which is downloaded or cached.
        flag: the flag that gave `path`, for messages.

    Raises:
        UsageError: there is no such folder, and no such model can be downloaded.
    """
    if Path(path).is_dir():
        return Path(path)
    if Path(path).exists() or path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise UsageError(f"{flag} {path}: no such folder")
    try:
        return _fetch(path)
    except UsageError:
        raise
    except Exception as error:  # of many types: no network, no such model, no permission
        reason = one_line(error, 200)
        raise UsageError(
            f"{flag} {path}: no such folder, and cannot be downloaded from the Hugging Face Hub: {reason}"
        ) from None


def _fetch(name: str) -> Path:
    """Download the files that a conversion reads, and return their folder.

    A repository may have the same weights three times: safetensors, .bin, and Meta's .pth in `original/`.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    try:
        listed = [file.rfilename for file in HfApi().model_info(name).siblings]
    except Exception:  # no network: use the cache, if the model is in it
        folder = _find_cached(name)
        if folder is None:
            raise
        return folder
    wanted = [CONFIG, *(file for file in listed if carried.is_carried(file))]
    weights = next(((file, is_index) for file, is_index in WEIGHTS if file in listed), None)
    if weights is not None:
        wanted.append(weights[0])
        if weights[1]:
            index = Path(hf_hub_download(name, weights[0]))
            wanted += sorted({shard.name for shard in read_index(index, complete=False).values()})
    return Path(snapshot_download(name, allow_patterns=[_escape(file) for file in wanted]))


def _find_cached(name: str) -> Path | None:
    from huggingface_hub import snapshot_download

    try:  # only config.json: snapshot_download would fail on files of the repository that were never fetched
        folder = Path(snapshot_download(name, local_files_only=True, allow_patterns=[CONFIG]))
    except Exception:  # never fetched
        return None
    return folder if any((folder / file).is_file() for file, _ in WEIGHTS) else None


def _escape(name: str) -> str:
    """Return the fnmatch pattern that matches only `name`."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
