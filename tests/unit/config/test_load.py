"""Layers, origins and errors of the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engram_client.errors import ConfigError
from tierstore.config import Config, Dram, LoadedConfig, MemoryLimit, Nvme, load_config
from tierstore.config.schema import KEYS
from tierstore.config.values import value_type

MIB = 1 << 20
GIB = 1 << 30
ROOMY = MemoryLimit(64 * GIB, "a test")


def load(
    tmp_path: Path, toml: str | None = None, environ: dict[str, str] | None = None, **flags: object
) -> LoadedConfig:
    """Flags are written section__name=value."""
    file = None
    if toml is not None:
        file = tmp_path / "t.toml"
        file.write_text(toml)
    named = {key.replace("__", "."): value for key, value in flags.items()}
    return load_config(file=file, environ=environ or {}, flags=named, memory=ROOMY)


def message(
    tmp_path: Path, toml: str | None = None, environ: dict[str, str] | None = None, **flags: object
) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, toml, environ, **flags)
    return str(caught.value)


class TestLayers:
    def test_defaults(self, tmp_path: Path) -> None:
        loaded = load(tmp_path)
        assert loaded.config == Config()
        assert loaded.config.dram.budget_bytes == GIB
        assert set(loaded.origins.values()) == {"default"}

    def test_each_layer_wins_over_the_one_before(self, tmp_path: Path) -> None:
        toml = "[nvme]\nread_threads = 2\nrun_pages_max = 16\nstaging_bytes = '1MiB'\n"
        environ = {"TIERSTORE_NVME_RUN_PAGES_MAX": "17", "TIERSTORE_NVME_STAGING_BYTES": "2MiB"}
        loaded = load(tmp_path, toml, environ, nvme__staging_bytes="3MiB")
        nvme = loaded.config.nvme
        assert (nvme.read_threads, nvme.run_pages_max, nvme.staging_bytes) == (2, 17, 3 * MIB)
        assert loaded.origins["nvme.coalesce_gap_pages"] == "default"
        assert loaded.origins["nvme.read_threads"] == f"file {tmp_path / 't.toml'}"
        assert loaded.origins["nvme.run_pages_max"] == "env TIERSTORE_NVME_RUN_PAGES_MAX"
        assert loaded.origins["nvme.staging_bytes"] == "flag --set nvme.staging_bytes"

    def test_a_flag_with_a_name_of_its_own_is_the_origin(self) -> None:
        loaded = load_config(
            file=None,
            environ={},
            flags={"serve.unix": "/x"},
            flag_names={"serve.unix": "--unix"},
            memory=ROOMY,
        )
        assert loaded.origins["serve.unix"] == "flag --unix"

    @pytest.mark.parametrize(("text", "value"), [("true", True), ("on", True), ("0", False), ("No", False)])
    def test_truth_values_as_text(self, tmp_path: Path, text: str, value: bool) -> None:
        loaded = load(tmp_path, environ={"TIERSTORE_SERVE_ALLOW_REMOTE": text})
        assert loaded.config.serve.allow_remote is value

    @pytest.mark.parametrize(
        "toml", ["drain_timeout_s = 2", "drain_timeout_s = 2.0", "drain_timeout_s = '2000ms'"]
    )
    def test_times(self, tmp_path: Path, toml: str) -> None:
        assert load(tmp_path, "[serve]\n" + toml).config.serve.drain_timeout_s == 2.0

    def test_other_variables_are_left_alone(self, tmp_path: Path) -> None:
        environ = {"TIERSTORE_KERNEL_CACHE": "/x", "PATH": "/bin", "XTIERSTORE_A": "1"}
        assert load(tmp_path, environ=environ).config == Config()

    def test_every_key_can_be_set_by_its_variable(self, tmp_path: Path) -> None:
        for key, section in KEYS.items():
            kind = value_type(section, key.split(".")[1])
            assert kind.meaning, f"{key} has no meaning"
            default: Any = load(tmp_path).value(key)
            variable = "TIERSTORE_" + key.upper().replace(".", "_")
            loaded = load(tmp_path, environ={variable: str(default).lower()})
            assert loaded.value(key) == default
            assert loaded.origins[key] == f"env {variable}"


class TestErrors:
    def test_wrong_type_in_a_file(self, tmp_path: Path) -> None:
        assert message(tmp_path, "[nvme]\nread_threads = 'many'\n") == (
            f"$.nvme.read_threads (file {tmp_path / 't.toml'}): "
            "expected a whole number of at least 1 and at most 1024, got 'many'"
        )

    def test_a_truth_value_is_no_number(self, tmp_path: Path) -> None:
        assert "got True" in message(tmp_path, "[nvme]\nread_threads = true\n")

    @pytest.mark.parametrize("raw", [-1, "-1", "-5 MiB"])
    def test_negative_size(self, tmp_path: Path, raw: object) -> None:
        says = message(tmp_path, dram__budget_bytes=raw)
        assert says.startswith("$.dram.budget_bytes (flag --set dram.budget_bytes): expected a size")
        assert "at least 0" in says

    def test_unit_that_is_none(self, tmp_path: Path) -> None:
        says = message(tmp_path, environ={"TIERSTORE_DRAM_BUDGET_BYTES": "8G"})
        assert "$.dram.budget_bytes (env TIERSTORE_DRAM_BUDGET_BYTES)" in says
        assert "write GiB or GB" in says

    @pytest.mark.parametrize("text", ["", "1.5", "0x10", "many"])
    def test_text_that_is_no_whole_number(self, tmp_path: Path, text: str) -> None:
        assert "expected a whole number" in message(tmp_path, prefetch__workers=text)

    def test_infinite_time(self, tmp_path: Path) -> None:
        assert "at most 3600" in message(tmp_path, "[serve]\ndrain_timeout_s = inf\n")
        assert "expected a time" in message(tmp_path, "[serve]\ndrain_timeout_s = nan\n")

    def test_choice(self, tmp_path: Path) -> None:
        assert "expected one of auto, on, off, got 'maybe'" in message(tmp_path, "[nvme]\ndirect = 'maybe'\n")

    def test_unknown_key_names_near_ones(self, tmp_path: Path) -> None:
        says = message(tmp_path, "[dram]\nbuget_bytes = 5\n")
        assert "$.dram.buget_bytes" in says
        assert "did you mean dram.budget_bytes or hbm.budget_bytes?" in says

    def test_unknown_section(self, tmp_path: Path) -> None:
        assert "did you mean nvme?" in message(tmp_path, "[nvmee]\ndirect = 'on'\n")

    def test_section_that_is_no_table(self, tmp_path: Path) -> None:
        assert "expected a table [dram], got 5" in message(tmp_path, "dram = 5\n")

    def test_unknown_variable(self, tmp_path: Path) -> None:
        says = message(tmp_path, environ={"TIERSTORE_DRAM_BUDGET": "8GiB"})
        assert "TIERSTORE_DRAM_BUDGET names no configuration key" in says
        assert "TIERSTORE_DRAM_BUDGET_BYTES" in says

    @pytest.mark.parametrize("key", ["dram", "dram.budget", "", "a.b.c"])
    def test_unknown_flag(self, tmp_path: Path, key: str) -> None:
        with pytest.raises(ConfigError, match="unknown key"):
            load_config(file=None, environ={}, flags={key: "1"}, memory=ROOMY)

    def test_file_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"none\.toml cannot be read: No such file"):
            load_config(file=tmp_path / "none.toml", environ={}, flags={}, memory=ROOMY)

    @pytest.mark.parametrize("content", [b"[dram\n", b"\xff\xfe"])
    def test_file_that_is_no_toml(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "bad.toml").write_bytes(content)
        with pytest.raises(ConfigError, match=r"bad\.toml is not valid TOML"):
            load_config(file=tmp_path / "bad.toml", environ={}, flags={}, memory=ROOMY)


class TestEmbedded:
    def test_sections_check_themselves(self) -> None:
        with pytest.raises(ConfigError, match=r"^\$\.dram\.budget_bytes: expected a size .* got -1"):
            Dram(budget_bytes=-1)
        with pytest.raises(ConfigError, match=r"^\$\.nvme\.direct: expected one of"):
            Nvme(direct="yes")  # type: ignore[arg-type]

    def test_a_changed_copy(self) -> None:
        assert Config(dram=Dram(budget_bytes=5)).dram.budget_bytes == 5
        with pytest.raises(AttributeError):
            Config().dram.budget_bytes = 5  # type: ignore[misc]


class TestRules:
    def test_budgets_over_the_limit_name_both(self) -> None:
        with pytest.raises(ConfigError) as caught:
            load_config(
                file=None,
                environ={"TIERSTORE_NVME_STAGING_BYTES": "1GiB"},
                flags={"dram.budget_bytes": "2GiB"},
                memory=MemoryLimit(3 * GIB - 1, "control group limit /x"),
            )
        says = str(caught.value)
        assert "$.dram.budget_bytes (flag --set dram.budget_bytes) = 2GiB" in says
        assert "$.nvme.staging_bytes (env TIERSTORE_NVME_STAGING_BYTES) = 1GiB" in says
        assert f"at most {3 * GIB - 1} bytes together (control group limit /x), got {3 * GIB}" in says

    def test_budgets_at_the_limit(self) -> None:
        limit = MemoryLimit(GIB + 64 * MIB, "a test")
        assert load_config(file=None, environ={}, flags={}, memory=limit).config == Config()

    @pytest.mark.parametrize("tcp", ["127.0.0.1:50051", "localhost:0", "[::1]:80", "127.9.9.9:1"])
    def test_loopback(self, tmp_path: Path, tcp: str) -> None:
        assert load(tmp_path, serve__tcp=tcp).config.serve.tcp == tcp

    @pytest.mark.parametrize("tcp", ["0.0.0.0:50051", "[::]:1", "10.0.0.1:1", "example.org:80"])
    def test_remote_wants_to_be_allowed(self, tmp_path: Path, tcp: str) -> None:
        assert "set serve.allow_remote = true" in message(tmp_path, serve__tcp=tcp)
        assert load(tmp_path, serve__tcp=tcp, serve__allow_remote="true").config.serve.tcp == tcp

    @pytest.mark.parametrize(
        "tcp", ["50051", ":50051", "localhost:", "localhost:http", "::1:80", "localhost:65536"]
    )
    def test_no_address(self, tmp_path: Path, tcp: str) -> None:
        assert "expected HOST:PORT" in message(tmp_path, serve__tcp=tcp)

    def test_socket_path_too_long(self, tmp_path: Path) -> None:
        assert "at most 107 bytes" in message(tmp_path, serve__unix="/" + "é" * 54)
        assert load(tmp_path, serve__unix="/" + "e" * 106).config.serve.unix

    def test_staging_holds_the_longest_read(self, tmp_path: Path) -> None:
        says = message(tmp_path, nvme__staging_bytes="64KiB")
        assert "32 pages, 128KiB, got 64KiB" in says

    def test_gap_shorter_than_a_read(self, tmp_path: Path) -> None:
        assert "less than $.nvme.run_pages_max" in message(tmp_path, nvme__coalesce_gap_pages=32)
