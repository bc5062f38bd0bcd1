"""Typed configuration: defaults < TOML file < environment < flags, and where each value came from."""

from tierstore.config.arguments import add_config_arguments, config_from_arguments
from tierstore.config.load import LoadedConfig, load_config
from tierstore.config.memory_limit import MemoryLimit, memory_limit
from tierstore.config.rules import check_config
from tierstore.config.schema import (
    Config,
    Dram,
    Extent,
    Hbm,
    Limits,
    Log,
    Nvme,
    Prefetch,
    Serve,
    Shm,
    Training,
)

__all__ = [
    "Config",
    "Dram",
    "Extent",
    "Hbm",
    "Limits",
    "LoadedConfig",
    "Log",
    "MemoryLimit",
    "Nvme",
    "Prefetch",
    "Serve",
    "Shm",
    "Training",
    "add_config_arguments",
    "check_config",
    "config_from_arguments",
    "load_config",
    "memory_limit",
]
