"""What several keys of the configuration must fulfil together, and what the machine must allow."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping

from engram_client.errors import ConfigError
from tierstore.config.memory_limit import MemoryLimit
from tierstore.config.schema import Config, Nvme, Serve
from tierstore.config.units import format_bytes

PAGE_BYTES = 4096
MAILBOX_FIXED_BYTES = 80 << 10  # of a client, beside its response memory and its ring of touches
HBM_SHADOW_SHARE = 12  # what is known in DRAM of the HBM arena takes at most this part of its bytes
EXTENT_INDEX_SHARE = 100  # the index of an extent takes at most this part of its bytes, in memory
UNIX_PATH_BYTES_MAX = 107  # sun_path of Linux is 108 bytes with its closing zero


def check_config(config: Config, memory: MemoryLimit, origins: Mapping[str, str] | None = None) -> None:
    """Raises ConfigError for the first rule that is broken, naming the keys and their origins."""
    origins = origins or {}
    _check_reads(config.nvme, origins)
    _check_unix(config.serve, origins)
    _check_tcp(config.serve, origins)
    _check_budgets(config, memory, origins)


def _at(key: str, origins: Mapping[str, str]) -> str:
    return f"$.{key} ({origins[key]})" if key in origins else f"$.{key}"


def _check_reads(nvme: Nvme, origins: Mapping[str, str]) -> None:
    if nvme.coalesce_gap_pages >= nvme.run_pages_max:
        raise ConfigError(
            f"{_at('nvme.coalesce_gap_pages', origins)}: expected less than "
            f"{_at('nvme.run_pages_max', origins)} = {nvme.run_pages_max}, got {nvme.coalesce_gap_pages}"
        )
    longest_bytes = nvme.run_pages_max * PAGE_BYTES
    if nvme.staging_bytes < longest_bytes:
        raise ConfigError(
            f"{_at('nvme.staging_bytes', origins)}: expected room for one read of "
            f"{_at('nvme.run_pages_max', origins)} = {nvme.run_pages_max} pages, "
            f"{format_bytes(longest_bytes)}, got {format_bytes(nvme.staging_bytes)}"
        )


def _check_unix(serve: Serve, origins: Mapping[str, str]) -> None:
    length = len(os.fsencode(serve.unix))
    if length > UNIX_PATH_BYTES_MAX:
        raise ConfigError(
            f"{_at('serve.unix', origins)}: expected a path of at most {UNIX_PATH_BYTES_MAX} bytes "
            f"(a limit of the kernel), got {length}: {serve.unix}; choose a shorter one"
        )


def _check_tcp(serve: Serve, origins: Mapping[str, str]) -> None:
    if not serve.tcp:
        return
    where = _at("serve.tcp", origins)
    host, colon, port = serve.tcp.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or not host or not port.isdecimal() or int(port) > 65535 or (":" in host and not bracketed):
        raise ConfigError(f"{where}: expected HOST:PORT or [IPV6]:PORT, got {serve.tcp!r}")
    if not serve.allow_remote and not _is_loopback(host.strip("[]")):
        raise ConfigError(
            f"{where}: {host} can be reached from other machines, which get every row without a password; "
            f"serve on 127.0.0.1:{port}, or set serve.allow_remote = true if that is what you want"
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name may resolve to anything


def _check_budgets(config: Config, memory: MemoryLimit, origins: Mapping[str, str]) -> None:
    sizes = {"dram.budget_bytes": config.dram.budget_bytes, "nvme.staging_bytes": config.nvme.staging_bytes}
    if config.extent.budget_bytes:
        sizes["extent.write_buffer_bytes"] = config.extent.write_buffer_bytes
        sizes["extent.budget_bytes"] = config.extent.budget_bytes // EXTENT_INDEX_SHARE
    if config.hbm.budget_bytes:
        sizes["hbm.staging_bytes"] = 2 * config.hbm.staging_bytes
        sizes["hbm.budget_bytes"] = config.hbm.budget_bytes // HBM_SHADOW_SHARE
    if config.training.enabled:
        training = config.training
        sizes["training.dram_bytes"] = training.dram_bytes
        sizes["training.queue_bytes"] = training.queue_bytes
        sizes["training.staging_bytes"] = 2 * training.staging_bytes  # for updates, and for reads
        sizes["training.pending_bytes_max"] = training.pending_bytes_max
    if config.shm.enabled and config.serve.unix:
        each_bytes = config.shm.response_bytes + config.shm.touch_ring_bytes + MAILBOX_FIXED_BYTES
        sizes["shm.clients_max"] = config.shm.clients_max * each_bytes
    needed = sum(sizes.values())
    if needed <= memory.bytes:
        return
    told = [_told(key, size, config, origins) for key, size in sizes.items()]
    raise ConfigError(
        f"{', '.join(told[:-1])} and {told[-1]} are more than this process may use: "
        f"expected at most {memory.bytes} bytes together ({memory.source}), got {needed}; "
        "lower them, or raise the limit"
    )


def _told(key: str, size: int, config: Config, origins: Mapping[str, str]) -> str:
    if key == "extent.budget_bytes":
        return f"1 % of {_at(key, origins)} = {size} bytes"
    if key == "hbm.budget_bytes":
        return f"a twelfth of {_at(key, origins)} = {size} bytes"
    if key == "shm.clients_max":
        return f"{_at(key, origins)} = {config.shm.clients_max} clients with {format_bytes(size)}"
    return f"{_at(key, origins)} = {format_bytes(size)}"
