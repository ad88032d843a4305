"""What merging an adapter into a base comes to, from headers alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.lora import CONFIG, Adapter, shards_to_change
from requant.tasks.checkpoint.writer import Layout
from requant.tasks.hub.revision import Revision
from requant.tasks.hub.sparse_checkout import create_placeholders, fetch_files


@dataclass(frozen=True)
class PlannedMerge:
    """The bytes of the shards that are written anew, and the peak memory of a merge without that of Python and torch.

    For each parameter of the largest matrix, memory holds three values of 4 bytes: the weight twice, and what is added.
    """

    size_bytes: int
    ram_bytes: int

    @classmethod
    def of(cls, adapter: Revision, base: Checkpoint) -> PlannedMerge:
        """Plan the merge of an adapter. Its config and the header of its weights are fetched.

        Raises CheckpointError if it cannot be merged into this base, HubError or HubUnavailable.
        """
        with TemporaryDirectory(prefix="requant-") as temporary:
            folder = create_placeholders(adapter, Path(temporary))
            fetch_files(adapter, folder, [CONFIG])
            updates = Adapter.open(folder).updates(base)
        sizes = Layout(shards_to_change(base, updates.values()), {}).sizes
        largest = max(math.prod(update.weight.shape) for update in updates.values())
        return cls(sum(sizes.values()), 12 * largest)
