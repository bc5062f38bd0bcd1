"""The generation of a table: a tree digest over its header, its description and its pages.

    leaf i     = BLAKE2b-128 of the checksums (8 bytes each, as in the file) of the data pages
                 [i * leaf_pages, (i + 1) * leaf_pages)
    generation = BLAKE2b-128 of the first 4088 bytes of page 0 with the generation itself as
                 zeros, then the description, then all leaves, 16 bytes each

A page checksum stands for its page, so a leaf costs 8 bytes of hashing for each 4096 written.
Leaves depend only on their own pages: packing notes each in a journal and, when it was killed, goes
on from the last one without reading anything again.

Not promised: resistance to forgery. XXH64 is not cryptographic; the generation tells two packed
tables apart and finds accidents, it does not prove who made them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from hashlib import blake2b

import numpy as np

from tierstore.format.header import Header

DIGEST_BYTES = 16
NO_GENERATION = bytes(DIGEST_BYTES)


def leaf_digest(pages: np.ndarray) -> bytes:
    """Digest of the checksums in `pages`, uint64 [n, 512]."""
    return blake2b(np.ascontiguousarray(pages[:, -1]).tobytes(), digest_size=DIGEST_BYTES).digest()


def generation_of(header: Header, description: bytes, leaves: Iterable[bytes]) -> bytes:
    """The 16-byte generation; whatever generation `header` already states is ignored."""
    root = blake2b(replace(header, generation=NO_GENERATION).payload(), digest_size=DIGEST_BYTES)
    root.update(description)
    for leaf in leaves:
        root.update(leaf)
    return root.digest()


def leaf_count(header: Header) -> int:
    return -(-header.geometry.data_pages // header.leaf_pages)
