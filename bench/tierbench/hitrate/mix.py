"""The request mix: in which batches a server sees the tokens of a trace."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engram_client.errors import BadRequest
from tierbench.corpus import Ids, Offsets
from tierbench.policy.schedule import server_batches

ORDERS = ("document", "shuffled")
PREFIX_BLOCK_TOKENS = 16  # what a prefix cache keeps and compares


@dataclass(frozen=True)
class Mix:
    """How documents become requests. Sizes are in tokens; `prompt_share` of a document is its prompt."""

    order: str = "document"
    sessions: int = 1
    prefill_chunk: int = 512
    step: int = 1
    prompt_share: float = 1.0
    prefix_cache: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.sessions, self.prefill_chunk, self.step) < 1 or not 0 <= self.prompt_share <= 1:
            raise BadRequest(
                "need sessions, prefill chunk and step of 1 or more and a prompt share in 0..1; got "
                f"{self.sessions}, {self.prefill_chunk}, {self.step} and {self.prompt_share}"
            )


@dataclass(frozen=True)
class TokenStream:
    """A trace in the order of its requests.

    ids: uint32 [tokens of the trace]; document_starts: int64 [documents], ascending
    positions: int64 [tokens looked up], where in `ids` each stands, in the order in which they are looked up
    batch_ends: int64 [batches], ascending; where each batch ends among `positions`
    """

    ids: Ids
    document_starts: np.ndarray
    positions: np.ndarray
    batch_ends: np.ndarray

    @property
    def tokens(self) -> int:
        """Tokens looked up: all but what a prefix cache keeps away."""
        return self.positions.size


def token_stream(ids: Ids, off: Offsets, mix: Mix, batch_tokens_max: int | None = None) -> TokenStream:
    """The trace as this mix asks for it, in batches of at most `batch_tokens_max` tokens."""
    starts, lengths = off[:-1].copy(), np.diff(off)
    if mix.order == "shuffled":
        chosen = np.random.default_rng(mix.seed).permutation(starts.size)
        starts, lengths = starts[chosen], lengths[chosen]
    prompts = np.ceil(lengths * mix.prompt_share).astype(np.int64)
    if mix.prefix_cache:
        cached = cached_prefixes(ids, starts, lengths, prompts)
        starts, lengths, prompts = starts + cached, lengths - cached, prompts - cached
    positions, ends = server_batches(
        starts, prompts, lengths, sessions=mix.sessions, chunk=mix.prefill_chunk, step=mix.step
    )
    if batch_tokens_max is not None:
        ends = np.union1d(ends, _split(ends, batch_tokens_max))
    return TokenStream(ids, off[:-1], positions, ends)


def _split(ends: np.ndarray, tokens_max: int) -> np.ndarray:
    """Further ends inside batches of more than so many tokens."""
    sizes = np.diff(ends, prepend=0)
    cuts = [
        np.arange(e - s + tokens_max, e, tokens_max)
        for e, s in zip(ends, sizes, strict=True)
        if s > tokens_max
    ]
    return np.concatenate([np.zeros(0, np.int64), *cuts])


def cached_prefixes(ids: Ids, starts: np.ndarray, lengths: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """How many first tokens of each document an earlier one began with too, int64.

    As prefix caches of serving engines have it: in whole blocks, within the prompt, and never all of a
    document, as its last token is computed in any case. The cache holds everything that came before.
    """
    seen: set[int] = set()
    cached = np.zeros(starts.size, np.int64)
    for d, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        usable = min(int(prompts[d]), length - 1) // PREFIX_BLOCK_TOKENS
        name, matching = 0, True
        for block in range(length // PREFIX_BLOCK_TOKENS):
            at = start + block * PREFIX_BLOCK_TOKENS
            name = hash((name, ids[at : at + PREFIX_BLOCK_TOKENS].tobytes()))
            matching = matching and block < usable and name in seen
            cached[d] += PREFIX_BLOCK_TOKENS * matching
            seen.add(name)
    return cached
