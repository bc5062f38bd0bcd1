"""Every error a user of tierstore can meet, in one tree.

    TierstoreError
    ├── BadRequest (ValueError)         the caller's arguments; nothing was read
    │   ├── IdOutOfRange                a row id or key outside the table, or negative and not -1
    │   ├── ForeignIds                  row ids handed to `lookup_heads` that are not one n-gram's
    │   ├── BatchTooLarge               more than one request may ask for
    │   ├── NotFiniteGradient           a gradient holds an infinity or NaN; nothing was applied
    │   └── StepConflict                an update, commit or rollback does not fit the steps so far
    ├── UnknownTable (KeyError)         no table of that name is served
    ├── GenerationMismatch              the table was republished since the client learned of it
    ├── VocabularyMismatch              the tokenizer folds tokens differently from the table
    ├── DeadlineExceeded (TimeoutError) the rows were not there in time
    ├── Cancelled                       the handle was cancelled or its client closed
    ├── Unavailable (ConnectionError)   no daemon there, or it is draining
    ├── Overloaded                      a bounded queue or ring is full; try again later
    ├── StorageError                    the disk refused a read or a write
    │   └── DataCorrupt                 a page failed its checksum
    ├── FormatError                     a file is not what it should be: foreign, truncated, too new
    ├── ConfigError                     a configuration value is wrong
    └── StoreLocked                     another process owns the store directory

Each message says what, where, expected against got, and what to do. `code` names the class on the
wire, so that an error raised in the daemon is raised as the same class in the client.
"""


class TierstoreError(Exception):
    """Base of every error this project raises on purpose."""

    code = "internal"


class BadRequest(TierstoreError, ValueError):
    """The caller's arguments are wrong; nothing was read."""

    code = "bad_request"


class IdOutOfRange(BadRequest):
    """A row id or n-gram key lies outside the table, or is negative and not -1."""

    code = "id_out_of_range"


class ForeignIds(BadRequest):
    """Row ids given as one n-gram's heads do not belong to one n-gram."""

    code = "foreign_ids"


class BatchTooLarge(BadRequest):
    """One request asks for more than the configured limit."""

    code = "batch_too_large"


class NotFiniteGradient(BadRequest):
    """A gradient holds an infinity or NaN; nothing of the update was applied."""

    code = "not_finite_gradient"


class StepConflict(BadRequest):
    """An update, commit or rollback does not fit the steps there have been."""

    code = "step_conflict"


class UnknownTable(TierstoreError, KeyError):
    """No table of that name is served."""

    code = "unknown_table"

    def __str__(self) -> str:  # KeyError would print the repr
        return Exception.__str__(self)


class GenerationMismatch(TierstoreError):
    """The request names another generation of the table than the one served."""

    code = "generation_mismatch"


class VocabularyMismatch(TierstoreError):
    """The tokenizer's compressed vocabulary is not the one the table was trained with."""

    code = "vocabulary_mismatch"


class DeadlineExceeded(TierstoreError, TimeoutError):
    """The rows were not there in time; nothing partial is handed out."""

    code = "deadline_exceeded"


class Cancelled(TierstoreError):
    """The handle was cancelled, or its client was closed."""

    code = "cancelled"


class Unavailable(TierstoreError, ConnectionError):
    """The daemon cannot be reached, or it is draining."""

    code = "unavailable"


class Overloaded(TierstoreError):
    """A bounded queue or ring is full; try again later."""

    code = "overloaded"


class StorageError(TierstoreError):
    """The disk refused a read or a write."""

    code = "storage_error"


class DataCorrupt(StorageError):
    """A page failed its checksum: what was read is not what was packed."""

    code = "data_corrupt"


class FormatError(TierstoreError):
    """A file is not what it should be: foreign, truncated, or of a newer version."""

    code = "format_error"


class ConfigError(TierstoreError):
    """A configuration value is wrong; the message holds its path."""

    code = "config_error"


class StoreLocked(TierstoreError):
    """Another process owns the store directory."""

    code = "store_locked"


def _tree(root: type[TierstoreError]) -> list[type[TierstoreError]]:
    return [root, *(c for child in root.__subclasses__() for c in _tree(child))]


BY_CODE: dict[str, type[TierstoreError]] = {c.code: c for c in _tree(TierstoreError)}
