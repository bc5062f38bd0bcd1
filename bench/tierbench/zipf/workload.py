"""A workload's parameters, the file they are kept in, and the trace that they stand for.

    {"schema": 1, "kind": "tierbench zipf workload", "knobs": {"exponent": 0.97, ...},
     "document_tokens": [12, ..., 48211], "tokens": 5018318, "vocabulary": 99000, "fitted_to": {...} or null}

`document_tokens` are lengths of documents at equal steps from the shortest to the longest. There are numbers
in it and nothing else: no token, no n-gram and no text can be had back.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engram_client.errors import BadRequest, FormatError, StorageError
from tierbench.corpus import Ids, Offsets
from tierbench.policy.phrases import FIRST_TOKEN, KNOBS, write_phrases

SCHEMA, KIND = 1, "tierbench zipf workload"
QUANTILES = 33
TOKENS_MAX = 2**31


@dataclass(frozen=True)
class Knob:
    """One parameter: its name, what it does, its default, and the range that it may have."""

    name: str
    help: str
    default: float
    low: float
    high: float
    by_factors: bool = False  # looked for on a logarithmic scale


# In the order of tierbench.policy.phrases.
ALL = (
    Knob("exponent", "of Zipf's law: rank r is drawn with probability ~ r^-exponent", 1.0, 0.1, 2.5),
    Knob("population", "phrases that Zipf's law is about", 1e6, 10, 1e9, True),
    Knob("drift", "share of the ranks that change hands in a million tokens", 0.0, 0, 1e4, True),
    Knob("cold", "share of phrases that are new", 0.0, 0, 0.95),
    Knob("session", "share of phrases that repeat one of the same document", 0.0, 0, 0.95),
    Knob("session_exponent", "of how far back in the document", 1.0, 0.1, 3.0),
    Knob("recent", "share of phrases that repeat one of the whole past", 0.0, 0, 0.95),
    Knob("recent_exponent", "of how far back in the past", 1.0, 0.1, 3.0),
    Knob("follow", "chance that a repetition goes on with the phrase that came next then", 0.0, 0, 0.995),
    Knob("phrase_tokens", "mean tokens of a phrase", 8.0, 1.05, 200, True),
    Knob("openers", "tokens that phrases begin with", 200, 1, 1e5, True),
    Knob("opener_exponent", "of how popular these are", 1.0, 0, 2.5),
)
assert len(ALL) == KNOBS
CHOICES = ("cold", "session", "recent")  # together no more than all


@dataclass(frozen=True)
class Workload:
    """What a trace is made from. `knobs` by name; `document_tokens` are quantiles. Raises BadRequest."""

    knobs: dict[str, float]
    document_tokens: tuple[int, ...]
    tokens: int
    vocabulary: int
    fitted_to: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for knob in ALL:
            value = self.knobs.get(knob.name, math.nan)
            if not knob.low <= value <= knob.high:
                raise BadRequest(f"{knob.name} {value:g}: need {knob.low:g} to {knob.high:g}; {knob.help}")
        if (together := sum(self.knobs[name] for name in CHOICES)) > 1:
            raise BadRequest(f"{', '.join(CHOICES)} are shares of all phrases, together {together:g}: over 1")
        if not 1 <= self.tokens <= TOKENS_MAX:
            raise BadRequest(f"{self.tokens} tokens: need 1 to {TOKENS_MAX}")
        if not 2 <= self.vocabulary <= 2**32 - FIRST_TOKEN:
            raise BadRequest(f"a vocabulary of {self.vocabulary}: need 2 to {2**32 - FIRST_TOKEN}")
        steps = np.diff(self.document_tokens)
        if not self.document_tokens or self.document_tokens[0] < 1 or (steps < 0).any():
            raise BadRequest("document_tokens: need lengths of 1 and more, the shortest first")

    def with_tokens(self, tokens: int) -> Workload:
        return dataclasses.replace(self, tokens=tokens)

    def make(self, seed: int) -> tuple[Ids, Offsets]:
        """A trace: ids uint32 [tokens], and where documents start, int64."""
        off = self._document_starts(seed)
        ids, past = np.empty(self.tokens, np.uint32), np.empty(self.tokens, np.int64)
        values = np.array([self.knobs[knob.name] for knob in ALL], np.float64)
        write_phrases(values, np.diff(off), seed, self.vocabulary, ids, past)
        return ids, off

    def _document_starts(self, seed: int) -> Offsets:
        """Of documents as long as the quantiles have them, each length once, shuffled; the last one cut."""
        random, known = np.random.default_rng(seed), np.array(self.document_tokens, np.float64)
        steps = np.linspace(0, 1, known.size)
        mean = np.interp((np.arange(1024) + 0.5) / 1024, steps, known).mean()
        count = max(1, round(self.tokens / mean))
        at, ends = 0, [np.zeros(1, np.int64)]
        while at < self.tokens:
            drawn = np.interp((random.permutation(count) + 0.5) / count, steps, known)
            ends.append(at + np.cumsum(np.maximum(1, drawn.astype(np.int64))))
            at = int(ends[-1][-1])
        starts = np.concatenate(ends)
        return np.append(starts[starts < self.tokens], self.tokens)


def length_quantiles(off: Offsets) -> tuple[int, ...]:
    """Of the documents of a trace that are not empty."""
    lengths = np.diff(off)
    steps = np.quantile(lengths[lengths > 0], np.linspace(0, 1, QUANTILES))
    return tuple(np.maximum(1, np.round(steps)).astype(int).tolist())


def save_workload(path: Path, workload: Workload) -> None:
    """Raises StorageError."""
    text = json.dumps({"schema": SCHEMA, "kind": KIND, **dataclasses.asdict(workload)}, indent=2) + "\n"
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error


def load_workload(path: Path) -> Workload:
    """Raises FormatError where the file is something else, StorageError where it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise FormatError(f"{path}: not a file of parameters: {error}") from error
    if not isinstance(found, dict) or found.get("kind") != KIND or found.get("schema") != SCHEMA:
        raise FormatError(
            f"{path}: expected the parameters that `tierbench zipf fit` writes, schema {SCHEMA}"
        )
    try:
        knobs = {str(name): float(value) for name, value in found["knobs"].items()}
        lengths = tuple(int(length) for length in found["document_tokens"])
        return Workload(
            knobs, lengths, int(found["tokens"]), int(found["vocabulary"]), found.get("fitted_to")
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"{path}: a parameter is missing or no number: {error!r}") from error
    except BadRequest as error:
        raise FormatError(f"{path}: {error}") from error
