"""SHA-256 of what training saves: made beside each checkpoint, in the manifest that a conversion writes too.

Whoever writes a shard hashes it when it is on the disk and still in memory, in the background where the
save is (`--async-save`). When all have written, the first rank puts the sums together.
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
    """Each `torch_dist` checkpoint that this process saves gets an `integrity.json`."""
    registry.install(hooks.HASH_SHARDS, _hash_shards)
    registry.install(hooks.COLLECT_CHECKSUMS, _collect_checksums)


def _hash_shards(original, self):
    write, preload, arguments = original(self)
    return (functools.partial(_write_and_hash, write) if write else None), preload, arguments


def _write_and_hash(write: Callable, rank: int, buckets: list, results) -> None:
    """In the process that writes: the shards, then `.sha256.RANK` beside them, for the first rank to read."""
    first = Path(buckets[0][0])
    sums = first.with_name(f".sha256.{rank}")
    write(rank, buckets, results)
    try:
        digests = {name: hash_file(Path(path)) for path, name, _ in buckets}
        sums.write_text(json.dumps(digests))
    except OSError:  # the disk is full: a save that failed says so itself, and one that did not has no manifest
        with contextlib.suppress(OSError):
            sums.unlink()


def _collect_checksums(original, self, metadata, results) -> None:
    """On the first rank, when all have written; the others wait for it, so that nothing may be raised here."""
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
