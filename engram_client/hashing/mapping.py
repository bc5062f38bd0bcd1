"""`NgramHashMapping`: token ids to n-gram keys and row ids, for all layers of a model.

For each position the last tokens t_0 (itself), t_1, ... are folded through the compressed
vocabulary (Engram) or taken raw (PLE) and mixed, `mix = t_0*m_0 ^ t_1*m_1 ^ ...`. The running
value after t_s is the n-gram key of order s+1: a 63-bit number all heads' rows follow from.

Where a shift would read before the sequence, across a dead position, or across an EOS (PLE), a
filler stands in: the folded pad id, or the EOS. At a dead position itself the whole n-gram is
filler, and the id there is neither read nor checked, since engines put placeholders at image
positions; its rows mean nothing and the gate is 0 there. Where they need not be fetched at all,
put -1 over the keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from engram_client.errors import BadRequest, IdOutOfRange, VocabularyMismatch
from engram_client.hashing import inputs, kernels
from engram_client.hashing.inputs import Int64Array
from engram_client.hashing.lookback import Lookback
from engram_client.hashing.rows import row_ids_from_keys
from engram_client.hashing.schemes import check_scheme, engram_schemes, ple_scheme
from engram_client.spec import HashScheme
from engram_client.tokenizer import vocabulary_digest

if TYPE_CHECKING:
    import torch

    from engram_client.hashing.device import DeviceHashMapping

_NO_HISTORY = np.zeros((0, 0), dtype=np.int64)
_NO_FOLD = np.zeros(0, dtype=np.int64)


class NgramHashMapping:
    """Hashes token ids by one or more layers' schemes. Immutable; safe to share between threads.

    layer_ids:   the layers it hashes for
    multipliers: layer_id -> int64 [max_ngram_size]
    head_sizes:  layer_id -> int64 [orders, heads], rows of each head
    raw_vocab_size: token ids must be below it

    Use the constructors `engram`, `ple`, `from_scheme` and `from_schemes`.
    """

    def __init__(self, schemes: Sequence[HashScheme], fold: Int64Array) -> None:
        self._schemes = {scheme.layer_id: scheme for scheme in schemes}
        self._fold = fold
        self.layer_ids = tuple(self._schemes)
        self.raw_vocab_size = len(fold) if fold.size else schemes[0].vocab_size
        self.max_ngram_size = max(scheme.max_ngram_size for scheme in schemes)
        self.multipliers = {s.layer_id: np.array(s.multipliers, dtype=np.int64) for s in schemes}
        self.head_sizes = {s.layer_id: np.array(s.head_sizes, dtype=np.int64) for s in schemes}
        self._limits = {s.layer_id: self._limits_of(s) for s in schemes}

    @classmethod
    def engram(
        cls,
        compressed_map: Any,
        *,
        layer_ids: Sequence[int],
        vocab_size_per_ngram: Sequence[int],
        n_head_per_ngram: int,
        max_ngram_size: int,
        pad_id: int,
        seed: int,
    ) -> NgramHashMapping:
        """By the published parameters of the Engram demo or of DeepSeek-V4.1.

        `compressed_map` is a CompressedTokenizer or its lookup table, integers [raw vocabulary];
        `vocab_size_per_ngram` has one entry per order (V4.1: [16000000] * 3); `pad_id` is a raw
        token id. Raises BadRequest.
        """
        fold = _as_fold(compressed_map)
        schemes = engram_schemes(
            compressed_vocab_size=int(fold.max()) + 1,
            layer_ids=layer_ids,
            vocab_size_per_ngram=vocab_size_per_ngram,
            n_head_per_ngram=n_head_per_ngram,
            max_ngram_size=max_ngram_size,
            pad_id=pad_id,
            seed=seed,
            vocabulary_digest=vocabulary_digest(fold),
        )
        return cls(schemes, fold)

    @classmethod
    def ple(
        cls,
        *,
        vocab_size: int,
        eos_token_id: int,
        ngram_size: int,
        heads_per_ngram: int,
        ngram_vocab_base: int,
        seed: int,
        layer_index: int,
    ) -> NgramHashMapping:
        """By the published parameters of Qwen PLE; its one layer id is `layer_index`."""
        scheme = ple_scheme(
            vocab_size=vocab_size,
            eos_token_id=eos_token_id,
            ngram_size=ngram_size,
            heads_per_ngram=heads_per_ngram,
            ngram_vocab_base=ngram_vocab_base,
            seed=seed,
            layer_index=layer_index,
        )
        return cls([scheme], _NO_FOLD)

    @classmethod
    def from_scheme(cls, scheme: HashScheme, compressed_map: Any = None) -> NgramHashMapping:
        """By a served table's scheme; see `from_schemes`."""
        return cls.from_schemes([scheme], compressed_map)

    @classmethod
    def from_schemes(cls, schemes: Sequence[HashScheme], compressed_map: Any = None) -> NgramHashMapping:
        """By the schemes of a model's served tables, one per layer, all of one vocabulary.

        Engram schemes need `compressed_map`, PLE schemes take none. Raises VocabularyMismatch
        where the map is not the one a table was trained with, FormatError for a scheme that
        cannot be hashed with, BadRequest for schemes that do not belong together.
        """
        _check_family(schemes)
        for scheme in schemes:
            check_scheme(scheme)
        if schemes[0].kind == "ple":
            if compressed_map is not None:
                raise BadRequest("PLE tables hash raw token ids; give no compressed_map")
            return cls(schemes, _NO_FOLD)
        if compressed_map is None:
            raise BadRequest(
                "Engram tables hash compressed token ids; give a CompressedTokenizer or its lookup_table"
            )
        fold = _as_fold(compressed_map)
        _check_vocabulary(schemes, fold)
        return cls(schemes, fold)

    def scheme(self, layer_id: int) -> HashScheme:
        """Everything about one layer's hashing. Raises BadRequest for another layer."""
        try:
            return self._schemes[layer_id]
        except KeyError:
            raise BadRequest(
                f"no hash scheme for layer {layer_id}; there are {list(self.layer_ids)}"
            ) from None

    def lookback(self, batch: int = 1) -> Lookback:
        """Fresh decode state for `batch` sequences; it serves all layers."""
        return Lookback(batch, self.max_ngram_size - 1, self.raw_vocab_size)

    def on_device(self, device: torch.device | str) -> DeviceHashMapping:
        """The same hashing for token ids that are torch tensors on `device`; needs torch.

        It never waits for the device. Raises what torch raises where there is no such device.
        """
        import torch

        from engram_client.hashing.device import DeviceHashMapping

        limits = {layer: tuple(numbers.tolist()) for layer, numbers in self._limits.items()}
        return DeviceHashMapping(self._schemes, limits, self._fold, torch.empty(0, device=device).device)

    def ngram_keys(
        self, token_ids: Any, layer_id: int, dead: Any = None, *, lookback: Lookback | None = None
    ) -> Int64Array:
        """N-gram keys int64 [B,T,orders] of token ids [B,T] (int64, int32 or uint32).

        [T] gives [T,orders]. `dead` is bool of the tokens' shape. With `lookback` the tokens
        continue what it has seen; it is read, not advanced. Raises IdOutOfRange for ids outside
        the vocabulary, with the position; BadRequest for another dtype or shape.
        """
        scheme = self.scheme(layer_id)
        tokens = inputs.as_tokens(token_ids)
        mask = inputs.NO_DEAD if dead is None else inputs.as_batch(inputs.as_dead(dead, tokens.shape))
        batched = inputs.as_batch(tokens)
        history = self._history(lookback, len(batched))
        keys = np.empty((*batched.shape, scheme.orders), dtype=np.int64)
        limits, multipliers = self._limits[layer_id], self.multipliers[layer_id]
        refused = kernels.hash_tokens(batched, mask, history, self._fold, limits, multipliers, keys)
        if refused >= 0:
            raise IdOutOfRange(
                f"token_ids{inputs.position(refused, tokens.shape)} is {tokens.flat[refused]}; "
                f"the vocabulary is 0..{self.raw_vocab_size - 1}"
            )
        return keys.reshape(*tokens.shape, scheme.orders)

    def row_ids(
        self, token_ids: Any, layer_id: int, dead: Any = None, *, lookback: Lookback | None = None
    ) -> Int64Array:
        """Row ids int64 [B,T,H], order-major, head offsets included; else as `ngram_keys`."""
        keys = self.ngram_keys(token_ids, layer_id, dead, lookback=lookback)
        return row_ids_from_keys(self.scheme(layer_id), keys)

    def _history(self, lookback: Lookback | None, batch: int) -> Int64Array:
        if lookback is None:
            return _NO_HISTORY
        return lookback.window_for(batch, self.max_ngram_size - 1, self.raw_vocab_size)

    def _limits_of(self, scheme: HashScheme) -> Int64Array:
        """What the kernel needs to know besides multipliers: vocabulary size, filler, EOS."""
        if scheme.kind == "ple":
            return np.array([self.raw_vocab_size, scheme.eos_token_id, scheme.eos_token_id], dtype=np.int64)
        if scheme.pad_id is None or scheme.pad_id >= self.raw_vocab_size:
            raise BadRequest(f"pad_id must be a token id below {self.raw_vocab_size}, got {scheme.pad_id}")
        return np.array([self.raw_vocab_size, self._fold[scheme.pad_id], -1], dtype=np.int64)


def _as_fold(compressed_map: Any) -> Int64Array:
    """A compressed map as int64 [raw vocabulary] of its own, checked to be one."""
    table = inputs.as_array(getattr(compressed_map, "lookup_table", compressed_map), "compressed_map")
    if table.ndim != 1 or table.size == 0 or table.dtype.kind not in "iu" or table.min() < 0:
        raise BadRequest(
            "compressed_map must be a CompressedTokenizer or non-negative integers [raw vocabulary], "
            f"got {table.dtype} {list(table.shape)}"
        )
    return np.array(table, dtype=np.int64)


def _check_family(schemes: Sequence[HashScheme]) -> None:
    if not schemes:
        raise BadRequest("no hash scheme given; row-addressed tables are looked up by row ids")
    if len({scheme.layer_id for scheme in schemes}) != len(schemes):
        raise BadRequest(f"two hash schemes of one layer: {[scheme.layer_id for scheme in schemes]}")
    if len({(scheme.kind, scheme.vocab_size) for scheme in schemes}) != 1:
        kinds = [(scheme.kind, scheme.vocab_size) for scheme in schemes]
        raise BadRequest(f"hash schemes of different families or vocabularies cannot be mixed: {kinds}")


def _check_vocabulary(schemes: Sequence[HashScheme], fold: Int64Array) -> None:
    size, digest = int(fold.max()) + 1, vocabulary_digest(fold)
    for scheme in schemes:
        trained = scheme.vocabulary_digest
        if scheme.vocab_size != size or trained not in (None, digest):
            raise VocabularyMismatch(
                f"layer {scheme.layer_id} was trained with a compressed vocabulary "
                f"of {scheme.vocab_size} ids, digest {trained or 'unknown'}; the one given has {size} ids, "
                f"digest {digest}; use the tokenizer.json of the table's model"
            )
