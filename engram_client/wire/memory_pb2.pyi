from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Field(_message.Message):
    __slots__ = ("name", "dtype", "count")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    count: int
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., count: _Optional[int] = ...) -> None: ...

class RowLayout(_message.Message):
    __slots__ = ("fields", "global_scale")
    FIELDS_FIELD_NUMBER: _ClassVar[int]
    GLOBAL_SCALE_FIELD_NUMBER: _ClassVar[int]
    fields: _containers.RepeatedCompositeFieldContainer[Field]
    global_scale: float
    def __init__(self, fields: _Optional[_Iterable[_Union[Field, _Mapping]]] = ..., global_scale: _Optional[float] = ...) -> None: ...

class Order(_message.Message):
    __slots__ = ("head_sizes", "head_offsets")
    HEAD_SIZES_FIELD_NUMBER: _ClassVar[int]
    HEAD_OFFSETS_FIELD_NUMBER: _ClassVar[int]
    head_sizes: _containers.RepeatedScalarFieldContainer[int]
    head_offsets: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, head_sizes: _Optional[_Iterable[int]] = ..., head_offsets: _Optional[_Iterable[int]] = ...) -> None: ...

class HashScheme(_message.Message):
    __slots__ = ("kind", "layer_id", "multipliers", "orders", "vocab_size", "pad_id", "eos_token_id", "vocabulary_digest", "parameters_json")
    KIND_FIELD_NUMBER: _ClassVar[int]
    LAYER_ID_FIELD_NUMBER: _ClassVar[int]
    MULTIPLIERS_FIELD_NUMBER: _ClassVar[int]
    ORDERS_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAD_ID_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_JSON_FIELD_NUMBER: _ClassVar[int]
    kind: str
    layer_id: int
    multipliers: _containers.RepeatedScalarFieldContainer[int]
    orders: _containers.RepeatedCompositeFieldContainer[Order]
    vocab_size: int
    pad_id: int
    eos_token_id: int
    vocabulary_digest: str
    parameters_json: str
    def __init__(self, kind: _Optional[str] = ..., layer_id: _Optional[int] = ..., multipliers: _Optional[_Iterable[int]] = ..., orders: _Optional[_Iterable[_Union[Order, _Mapping]]] = ..., vocab_size: _Optional[int] = ..., pad_id: _Optional[int] = ..., eos_token_id: _Optional[int] = ..., vocabulary_digest: _Optional[str] = ..., parameters_json: _Optional[str] = ...) -> None: ...

class TableSpec(_message.Message):
    __slots__ = ("name", "generation", "uuid", "rows", "layout", "addressing", "scheme", "layer", "model")
    NAME_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    UUID_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    ADDRESSING_FIELD_NUMBER: _ClassVar[int]
    SCHEME_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    name: str
    generation: bytes
    uuid: bytes
    rows: int
    layout: RowLayout
    addressing: str
    scheme: HashScheme
    layer: int
    model: str
    def __init__(self, name: _Optional[str] = ..., generation: _Optional[bytes] = ..., uuid: _Optional[bytes] = ..., rows: _Optional[int] = ..., layout: _Optional[_Union[RowLayout, _Mapping]] = ..., addressing: _Optional[str] = ..., scheme: _Optional[_Union[HashScheme, _Mapping]] = ..., layer: _Optional[int] = ..., model: _Optional[str] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("request_ids_max", "reply_bytes_max", "message_bytes_max", "requests_max")
    REQUEST_IDS_MAX_FIELD_NUMBER: _ClassVar[int]
    REPLY_BYTES_MAX_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_BYTES_MAX_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_MAX_FIELD_NUMBER: _ClassVar[int]
    request_ids_max: int
    reply_bytes_max: int
    message_bytes_max: int
    requests_max: int
    def __init__(self, request_ids_max: _Optional[int] = ..., reply_bytes_max: _Optional[int] = ..., message_bytes_max: _Optional[int] = ..., requests_max: _Optional[int] = ...) -> None: ...

class ListTablesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListTablesResponse(_message.Message):
    __slots__ = ("tables", "limits")
    TABLES_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    tables: _containers.RepeatedCompositeFieldContainer[TableSpec]
    limits: Limits
    def __init__(self, tables: _Optional[_Iterable[_Union[TableSpec, _Mapping]]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ...) -> None: ...

class DescribeTableRequest(_message.Message):
    __slots__ = ("table",)
    TABLE_FIELD_NUMBER: _ClassVar[int]
    table: str
    def __init__(self, table: _Optional[str] = ...) -> None: ...

class DescribeTableResponse(_message.Message):
    __slots__ = ("table",)
    TABLE_FIELD_NUMBER: _ClassVar[int]
    table: TableSpec
    def __init__(self, table: _Optional[_Union[TableSpec, _Mapping]] = ...) -> None: ...

class HeadRange(_message.Message):
    __slots__ = ("start", "stop")
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    start: int
    stop: int
    def __init__(self, start: _Optional[int] = ..., stop: _Optional[int] = ...) -> None: ...

class LookupRequest(_message.Message):
    __slots__ = ("table", "generation", "ngram_keys", "row_ids", "heads")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    NGRAM_KEYS_FIELD_NUMBER: _ClassVar[int]
    ROW_IDS_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    table: str
    generation: bytes
    ngram_keys: bytes
    row_ids: bytes
    heads: HeadRange
    def __init__(self, table: _Optional[str] = ..., generation: _Optional[bytes] = ..., ngram_keys: _Optional[bytes] = ..., row_ids: _Optional[bytes] = ..., heads: _Optional[_Union[HeadRange, _Mapping]] = ...) -> None: ...

class LookupResponse(_message.Message):
    __slots__ = ("rows",)
    ROWS_FIELD_NUMBER: _ClassVar[int]
    rows: bytes
    def __init__(self, rows: _Optional[bytes] = ...) -> None: ...

class PrefetchResponse(_message.Message):
    __slots__ = ("accepted",)
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    accepted: bool
    def __init__(self, accepted: bool = ...) -> None: ...

class SetBudgetsRequest(_message.Message):
    __slots__ = ("dram_budget_bytes", "hbm_budget_bytes", "training_dram_bytes", "timeout_s")
    DRAM_BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    HBM_BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRAINING_DRAM_BYTES_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    dram_budget_bytes: int
    hbm_budget_bytes: int
    training_dram_bytes: int
    timeout_s: float
    def __init__(self, dram_budget_bytes: _Optional[int] = ..., hbm_budget_bytes: _Optional[int] = ..., training_dram_bytes: _Optional[int] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class SetBudgetsResponse(_message.Message):
    __slots__ = ("dram_budget_bytes", "hbm_budget_bytes", "training_dram_bytes")
    DRAM_BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    HBM_BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRAINING_DRAM_BYTES_FIELD_NUMBER: _ClassVar[int]
    dram_budget_bytes: int
    hbm_budget_bytes: int
    training_dram_bytes: int
    def __init__(self, dram_budget_bytes: _Optional[int] = ..., hbm_budget_bytes: _Optional[int] = ..., training_dram_bytes: _Optional[int] = ...) -> None: ...

class StatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatsResponse(_message.Message):
    __slots__ = ("counters",)
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    counters: _containers.ScalarMap[str, int]
    def __init__(self, counters: _Optional[_Mapping[str, int]] = ...) -> None: ...

class TrainedTable(_message.Message):
    __slots__ = ("spec", "optimizer_json", "committed_step", "updated_step", "partition_json", "initial_json", "not_finite", "training")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_JSON_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_STEP_FIELD_NUMBER: _ClassVar[int]
    UPDATED_STEP_FIELD_NUMBER: _ClassVar[int]
    PARTITION_JSON_FIELD_NUMBER: _ClassVar[int]
    INITIAL_JSON_FIELD_NUMBER: _ClassVar[int]
    NOT_FINITE_FIELD_NUMBER: _ClassVar[int]
    TRAINING_FIELD_NUMBER: _ClassVar[int]
    spec: TableSpec
    optimizer_json: str
    committed_step: int
    updated_step: int
    partition_json: str
    initial_json: str
    not_finite: str
    training: str
    def __init__(self, spec: _Optional[_Union[TableSpec, _Mapping]] = ..., optimizer_json: _Optional[str] = ..., committed_step: _Optional[int] = ..., updated_step: _Optional[int] = ..., partition_json: _Optional[str] = ..., initial_json: _Optional[str] = ..., not_finite: _Optional[str] = ..., training: _Optional[str] = ...) -> None: ...

class DescribeTrainingRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeTrainingResponse(_message.Message):
    __slots__ = ("tables", "update_bytes_max")
    TABLES_FIELD_NUMBER: _ClassVar[int]
    UPDATE_BYTES_MAX_FIELD_NUMBER: _ClassVar[int]
    tables: _containers.RepeatedCompositeFieldContainer[TrainedTable]
    update_bytes_max: int
    def __init__(self, tables: _Optional[_Iterable[_Union[TrainedTable, _Mapping]]] = ..., update_bytes_max: _Optional[int] = ...) -> None: ...

class UpdateRequest(_message.Message):
    __slots__ = ("table", "generation", "step", "row_ids", "dtype", "gradients", "learning_rate", "weight_decay", "rank", "world", "push", "part", "parts", "timeout_s")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ROW_IDS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_FIELD_NUMBER: _ClassVar[int]
    PUSH_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    table: str
    generation: bytes
    step: int
    row_ids: bytes
    dtype: str
    gradients: bytes
    learning_rate: float
    weight_decay: float
    rank: int
    world: int
    push: int
    part: int
    parts: int
    timeout_s: float
    def __init__(self, table: _Optional[str] = ..., generation: _Optional[bytes] = ..., step: _Optional[int] = ..., row_ids: _Optional[bytes] = ..., dtype: _Optional[str] = ..., gradients: _Optional[bytes] = ..., learning_rate: _Optional[float] = ..., weight_decay: _Optional[float] = ..., rank: _Optional[int] = ..., world: _Optional[int] = ..., push: _Optional[int] = ..., part: _Optional[int] = ..., parts: _Optional[int] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class UpdateResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CommitRequest(_message.Message):
    __slots__ = ("step", "timeout_s", "training")
    STEP_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    TRAINING_FIELD_NUMBER: _ClassVar[int]
    step: int
    timeout_s: float
    training: str
    def __init__(self, step: _Optional[int] = ..., timeout_s: _Optional[float] = ..., training: _Optional[str] = ...) -> None: ...

class CommitResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WaitDurableRequest(_message.Message):
    __slots__ = ("step", "timeout_s")
    STEP_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    step: int
    timeout_s: float
    def __init__(self, step: _Optional[int] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class WaitDurableResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RollbackRequest(_message.Message):
    __slots__ = ("step", "timeout_s")
    STEP_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    step: int
    timeout_s: float
    def __init__(self, step: _Optional[int] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class RollbackResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StepsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StepsResponse(_message.Message):
    __slots__ = ("steps",)
    STEPS_FIELD_NUMBER: _ClassVar[int]
    steps: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, steps: _Optional[_Iterable[int]] = ...) -> None: ...

class OpenStepRequest(_message.Message):
    __slots__ = ("step",)
    STEP_FIELD_NUMBER: _ClassVar[int]
    step: int
    def __init__(self, step: _Optional[int] = ...) -> None: ...

class OpenStepResponse(_message.Message):
    __slots__ = ("number", "step", "state", "tables_json")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    TABLES_JSON_FIELD_NUMBER: _ClassVar[int]
    number: int
    step: int
    state: bytes
    tables_json: str
    def __init__(self, number: _Optional[int] = ..., step: _Optional[int] = ..., state: _Optional[bytes] = ..., tables_json: _Optional[str] = ...) -> None: ...

class ReadStepRequest(_message.Message):
    __slots__ = ("number", "table", "row_ids")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    ROW_IDS_FIELD_NUMBER: _ClassVar[int]
    number: int
    table: int
    row_ids: bytes
    def __init__(self, number: _Optional[int] = ..., table: _Optional[int] = ..., row_ids: _Optional[bytes] = ...) -> None: ...

class ReadStepResponse(_message.Message):
    __slots__ = ("rows",)
    ROWS_FIELD_NUMBER: _ClassVar[int]
    rows: bytes
    def __init__(self, rows: _Optional[bytes] = ...) -> None: ...

class TouchedRowsRequest(_message.Message):
    __slots__ = ("number", "table", "first", "last")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    number: int
    table: int
    first: int
    last: int
    def __init__(self, number: _Optional[int] = ..., table: _Optional[int] = ..., first: _Optional[int] = ..., last: _Optional[int] = ...) -> None: ...

class TouchedRowsResponse(_message.Message):
    __slots__ = ("row_ids",)
    ROW_IDS_FIELD_NUMBER: _ClassVar[int]
    row_ids: bytes
    def __init__(self, row_ids: _Optional[bytes] = ...) -> None: ...

class CloseStepRequest(_message.Message):
    __slots__ = ("number",)
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    number: int
    def __init__(self, number: _Optional[int] = ...) -> None: ...

class CloseStepResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
