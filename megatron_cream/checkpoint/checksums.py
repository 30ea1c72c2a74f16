"""Write the SHA-256 of the files of each saved checkpoint into its manifest.

A conversion writes the same manifest. Each writer hashes its shard right after writing it, while it is still in the
page cache; with `--async-save` in the background. When all ranks have written, the first rank merges the checksums.
"""

import contextlib
import functools
import json
from collections.abc import Callable
from pathlib import Path

from megatron_cream.checkpoint.output import MANIFEST, hash_file
from megatron_cream.common.errors import one_line
from megatron_cream.common.files import atomic_write
from megatron_cream.patches import hooks, registry


def install() -> None:
    """Write an `integrity.json` for each `torch_dist` checkpoint that this process saves."""
    registry.install(hooks.HASH_SHARDS, _hash_shards)
    registry.install(hooks.COLLECT_CHECKSUMS, _collect_checksums)


def _hash_shards(original, self):
    write, preload, arguments = original(self)
    return (functools.partial(_write_and_hash, write) if write else None), preload, arguments


def _write_and_hash(write: Callable, rank: int, buckets: list, results) -> None:
    """Write the shards and their checksums, in the writer process.

    The checksums are in `.sha256.RANK`, which the first rank reads.
    """
    first = Path(buckets[0][0])
    sums = first.with_name(f".sha256.{rank}")
    write(rank, buckets, results)
    try:
        digests = {name: hash_file(Path(path)) for path, name, _ in buckets}
        sums.write_text(json.dumps(digests))
    except OSError:  # full disk: a failed save reports itself, and a successful one has no manifest
        with contextlib.suppress(OSError):
            sums.unlink()


def _collect_checksums(original, self, metadata, results) -> None:
    """Merge the checksums of all ranks into the manifest; runs on the first rank.

    It must not raise, because the other ranks wait for it.
    """
    original(self, metadata, results)
    folder = Path(self.checkpoint_dir)
    written = {result.storage_data.relative_path for of_rank in results for result in of_rank}
    try:
        digests: dict[str, str] = {}
        for sums in folder.glob(".sha256.*"):
            digests |= json.loads(sums.read_text())
            sums.unlink()
        if not written <= digests.keys():
            return
        files = {name: digests[name] for name in sorted(written)} | {".metadata": hash_file(folder / ".metadata")}
        with atomic_write(folder / MANIFEST) as file:
            json.dump({"algorithm": "sha256", "files": files}, file, indent=2)
    except (OSError, ValueError) as error:
        print(f"{folder}: saved without checksums: {one_line(error)}", flush=True)
