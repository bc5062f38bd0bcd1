"""The compressed vocabulary: token ids that read alike fold into one.

"Apple", " apple" and "APPLE" are three tokens of one word; the Engram models hash what is left
after case, accents and surrounding blanks are gone. Each token id is decoded alone. Where its
text is no valid UTF-8 by itself (it holds U+FFFD) the raw token string stands for it, otherwise
its normalized text does. Equal strings get one compressed id, in first-seen order. DeepSeek's
129,280 tokens become 99,092.

The map is built when the tokenizer is opened, in about a second, most of it spent reading the
file. Nothing is kept on disk: a stale map would hash every n-gram to a wrong row.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, normalizers

from engram_client.errors import BadRequest, FormatError

REPLACEMENT = "\ufffd"  # stands where bytes are no valid UTF-8
KEPT_SPACE = "\ue000"  # shields a lone space from stripping; a private-use character


def vocabulary_digest(lookup_table: npt.NDArray[np.int64]) -> str:
    """SHA-256, in hexadecimal, of a compressed map as little-endian int64."""
    return hashlib.sha256(np.ascontiguousarray(lookup_table, dtype="<i8").tobytes()).hexdigest()


class CompressedTokenizer:
    """A Hugging Face `tokenizer.json` with the compressed vocabulary the Engram models hash.

    lookup_table: int64 [raw vocabulary], compressed id of each raw token id; read-only
    vocab_size:   how many compressed ids there are
    digest:       SHA-256 of `lookup_table`, compared with a table's `vocabulary_digest`

    Raises FormatError where the file is missing or is no tokenizer.
    """

    def __init__(self, path_to_tokenizer_json: str | Path) -> None:
        self._tokenizer = _open(Path(path_to_tokenizer_json))
        self.lookup_table = _fold(self._tokenizer)
        self.lookup_table.setflags(write=False)
        self.vocab_size = int(self.lookup_table.max()) + 1
        self.digest = vocabulary_digest(self.lookup_table)

    @property
    def raw_vocab_size(self) -> int:
        """Token ids the tokenizer knows, special and added ones included."""
        return len(self.lookup_table)

    def encode(self, text: str) -> npt.NDArray[np.int64]:
        """Raw token ids of `text`, int64 [T], without special tokens around them."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def compress(self, ids: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Compressed ids of raw `ids`: int64, same shape. Raises BadRequest for unknown ids."""
        raw = np.asarray(ids)
        if raw.size == 0:
            return np.zeros(raw.shape, dtype=np.int64)
        if raw.dtype.kind not in "iu":
            raise BadRequest(f"token ids must be integers, got {raw.dtype}")
        if raw.min() < 0 or raw.max() >= self.raw_vocab_size:
            wrong = raw.min() if raw.min() < 0 else raw.max()
            raise BadRequest(f"token id {wrong} is outside the vocabulary 0..{self.raw_vocab_size - 1}")
        return np.take(self.lookup_table, raw)


def _open(path: Path) -> Tokenizer:
    if not path.is_file():
        raise FormatError(f"tokenizer {path}: no such file; give the path of a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise FormatError(f"tokenizer {path}: not a Hugging Face tokenizer.json ({error})") from error
    if tokenizer.get_vocab_size(with_added_tokens=True) == 0:
        raise FormatError(f"tokenizer {path}: its vocabulary is empty")
    return tokenizer


def _normalizer() -> normalizers.Normalizer:
    return normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex(r"^ $"), KEPT_SPACE),
            normalizers.Strip(),
            normalizers.Replace(KEPT_SPACE, " "),
        ]
    )


def _fold(tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
    """The compressed map, int64 [raw vocabulary]."""
    count = tokenizer.get_vocab_size(with_added_tokens=True)
    texts = tokenizer.decode_batch([[raw_id] for raw_id in range(count)], skip_special_tokens=False)
    normalize = _normalizer().normalize_str
    compressed: dict[str | None, int] = {}
    folded = np.empty(count, dtype=np.int64)
    for raw_id, text in enumerate(texts):
        key = tokenizer.id_to_token(raw_id) if REPLACEMENT in text else normalize(text) or text
        folded[raw_id] = compressed.setdefault(key, len(compressed))
    return folded
