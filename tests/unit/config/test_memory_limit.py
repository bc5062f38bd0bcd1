"""What the process may use, read from trees that look like /proc and /sys of several machines."""

from __future__ import annotations

from pathlib import Path

from tierstore.config import memory_limit

MEBI = 1024 * 1024
V2 = "30 24 0:27 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "31 24 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
V1_CPU = "32 24 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
PLAIN = "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw\n"


def machine(root: Path, cgroup: str, mountinfo: str, files: dict[str, str]) -> Path:
    """A tree with 1000 MiB of physical memory."""
    everything = {
        "proc/meminfo": "MemTotal:        1024000 kB\nMemFree:         1 kB\n",
        "proc/self/cgroup": cgroup,
        "proc/self/mountinfo": PLAIN + mountinfo,
        **files,
    }
    for name, text in everything.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_no_control_groups(tmp_path: Path) -> None:
    limit = memory_limit(machine(tmp_path, "", "", {}))
    assert (limit.bytes, limit.source) == (1000 * MEBI, "physical memory")


def test_files_of_old_kernels_missing(tmp_path: Path) -> None:
    root = machine(tmp_path, "", "", {})
    (root / "proc/self/cgroup").unlink()
    (root / "proc/self/mountinfo").unlink()
    assert memory_limit(root).bytes == 1000 * MEBI


def test_version_2_own_group(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/a/b/memory.max": f"{100 * MEBI}\n", "sys/fs/cgroup/a/memory.max": "max\n"}
    limit = memory_limit(machine(tmp_path, "0::/a/b\n", V2, files))
    assert limit.bytes == 100 * MEBI
    assert limit.source == "control group limit /sys/fs/cgroup/a/b/memory.max"


def test_version_2_parent_is_tighter(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/a/b/memory.max": f"{100 * MEBI}\n",
        "sys/fs/cgroup/a/memory.max": f"{60 * MEBI}\n",
        "sys/fs/cgroup/other/memory.max": "1\n",
    }
    limit = memory_limit(machine(tmp_path, "0::/a/b\n", V2, files))
    assert limit.source == "control group limit /sys/fs/cgroup/a/memory.max"


def test_version_2_root_of_a_container(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/memory.max": f"{70 * MEBI}\n"}
    assert memory_limit(machine(tmp_path, "0::/\n", V2, files)).bytes == 70 * MEBI


def test_version_2_group_outside_the_namespace(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/memory.max": f"{70 * MEBI}\n"}
    mount = V2.replace("0:27 / ", "0:27 /docker/abc ")
    assert memory_limit(machine(tmp_path, "0::/../other\n", mount, files)).bytes == 70 * MEBI


def test_version_2_mount_shows_a_part(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/in/memory.max": f"{50 * MEBI}\n"}
    mount = V2.replace("0:27 / ", "0:27 /docker/abc ")
    assert memory_limit(machine(tmp_path, "0::/docker/abc/in\n", mount, files)).bytes == 50 * MEBI


def test_version_1(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/memory/j/memory.limit_in_bytes": "9223372036854771712\n",  # none
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{80 * MEBI}\n",
        "sys/fs/cgroup/cpu/j/memory.limit_in_bytes": "1\n",  # another hierarchy, not asked
    }
    cgroup = "4:memory:/j\n1:cpu,cpuacct:/j\n"
    limit = memory_limit(machine(tmp_path, cgroup, V1_CPU + V1, files))
    assert limit.bytes == 80 * MEBI


def test_version_1_without_a_limit(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}
    assert memory_limit(machine(tmp_path, "4:memory:/\n", V1, files)).source == "physical memory"


def test_both_versions_mounted(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/memory/j/memory.limit_in_bytes": f"{90 * MEBI}\n"}
    mounts = V1 + V2.replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified")
    assert memory_limit(machine(tmp_path, "4:memory:/j\n0::/\n", mounts, files)).bytes == 90 * MEBI


def test_this_machine() -> None:
    limit = memory_limit()
    total = next(
        line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal")
    )
    assert 0 < limit.bytes <= int(total.split()[1]) * 1024
