"""The default thread count heeds CPU quotas (of containers): the least of the process's cgroup and those above it."""

import contextlib
import math
import os
from pathlib import Path

import pytest
from subprocesses import run_script

import fastbn
from fastbn import _threads

V2, V1 = "0::{}\n", "12:memory:/elsewhere\n4:cpu,cpuacct:{}\n1:name=systemd:/elsewhere\n0::/elsewhere\n"

# (content of /proc/self/cgroup, files below /sys/fs/cgroup, CPUs)
TREES = {
    "no cgroups": (None, {}, math.inf),
    "no quota file": (V2.format("/"), {}, math.inf),
    "version 2, a container's own root": (V2.format("/"), {"cpu.max": "150000 100000\n"}, 1.5),
    "version 2, no limit": (V2.format("/"), {"cpu.max": "max 100000\n"}, math.inf),
    "version 2, nested": (V2.format("/a/b.slice/c"), {"a/b.slice/c/cpu.max": "200000 100000\n"}, 2),
    "version 2, a parent has less": (
        V2.format("/a/b/c"),
        {"a/cpu.max": "50000 100000", "a/b/cpu.max": "max 100000", "a/b/c/cpu.max": "300000 100000"},
        0.5,
    ),
    "version 2, a parent has more": (
        V2.format("/a/b"), {"a/cpu.max": "800000 100000", "a/b/cpu.max": "300000 100000"}, 3
    ),
    "version 2, another cgroup has less": (
        V2.format("/a/b"), {"a/b/cpu.max": "300000 100000", "a/c/cpu.max": "100000 100000"}, 3
    ),
    "version 2, the path is the host's": (V2.format("/host/docker/1f"), {"cpu.max": "250000 50000"}, 5),
    "version 2, a path with a colon": (V2.format("/a:b/c"), {"a:b/cpu.max": "70000 100000"}, 0.7),
    "version 2, nonsense": (V2.format("/a"), {"a/cpu.max": "what", "cpu.max": "-5 0 7"}, math.inf),
    "version 1": (
        V1.format("/"), {"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1.5
    ),
    "version 1, mounted by both names": (
        V1.format("/d"), {"cpu,cpuacct/d/cpu.cfs_quota_us": "70000", "cpu,cpuacct/d/cpu.cfs_period_us": "35000"}, 2
    ),
    "version 1, no limit": (
        V1.format("/"), {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, math.inf
    ),
    "version 1, a parent has less": (
        V1.format("/a/b"),
        {
            "cpu/a/cpu.cfs_quota_us": "100000", "cpu/a/cpu.cfs_period_us": "100000",
            "cpu/a/b/cpu.cfs_quota_us": "600000", "cpu/a/b/cpu.cfs_period_us": "100000",
        },
        1,
    ),
    "version 1, one file of two": (V1.format("/"), {"cpu/cpu.cfs_quota_us": "150000"}, math.inf),
    "version 1, a period of 0": (
        V1.format("/"), {"cpu/cpu.cfs_quota_us": "5", "cpu/cpu.cfs_period_us": "0"}, math.inf
    ),
    "version 1, the quota of another controller": (
        "3:cpuset:/\n", {"cpu/cpu.cfs_quota_us": "5", "cpu/cpu.cfs_period_us": "5"}, math.inf
    ),
    "nonsense": ("what\n", {"cpu.max": "1 1"}, math.inf),
}  # fmt: skip


@pytest.mark.parametrize("name", TREES)
def test_the_quota(name, tmp_path):
    content, files, cpus = TREES[name]
    if content is not None:
        files = {f"sys/fs/cgroup/{path}": text for path, text in files.items()} | {"proc/self/cgroup": content}
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert _threads.cpu_quota(tmp_path) == cpus


@pytest.mark.parametrize(
    ("quota", "variable", "threads"),
    [
        (0.01, None, 1), (1.0, None, 1), (1.01, None, 2), (3.5, None, 4), (8.0, None, 8), (math.inf, None, 8),
        (1.0, "8", 8),  # the user knows better
    ],
)  # fmt: skip
def test_the_default_thread_count(quota, variable, threads, monkeypatch):
    monkeypatch.setattr(_threads, "_most_threads", lambda: 8)
    monkeypatch.setattr(_threads, "cpu_quota", lambda: quota)
    monkeypatch.delenv("NUMBA_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("NUMBA_NUM_THREADS", variable)
    assert _threads.default_threads.__wrapped__() == threads


@contextlib.contextmanager
def a_cgroup():
    """A new cgroup with a quota of one CPU, below the top: its folder. Skips where that is not allowed."""
    top = Path("/sys/fs/cgroup")
    parent = next((p for p in (top, top / "cpu") if (p / "cgroup.procs").exists()), None)
    if parent is None:
        pytest.skip("this system has no cgroups")
    group = parent / f"fastbn-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"a cgroup cannot be made here: {error}")
    try:
        try:
            if parent == top:
                (group / "cpu.max").write_text("100000 100000")
            else:
                (group / "cpu.cfs_period_us").write_text("100000")
                (group / "cpu.cfs_quota_us").write_text("100000")
            inner = group / "inner"
            inner.mkdir()
        except OSError as error:
            pytest.skip(f"a cgroup cannot have a quota here: {error}")
        try:
            yield inner
        finally:
            inner.rmdir()
    finally:
        group.rmdir()


def test_the_quota_of_a_real_cgroup():
    if len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else [0]) < 2:
        pytest.skip("there is only one CPU")
    script = """
import os, sys
if len(sys.argv) > 1:
    with open(os.path.join(sys.argv[1], "cgroup.procs"), "w") as f:
        f.write(str(os.getpid()))
import fastbn
print(fastbn.get_num_threads())
"""
    outside = int(run_script(script, NUMBA_NUM_THREADS=None))
    if outside < 2:
        pytest.skip("these tests have a quota of one CPU themselves")
    with a_cgroup() as group:
        assert run_script(script, str(group), NUMBA_NUM_THREADS=None) == "1\n"


def test_no_quota_is_read_before_it_is_needed():
    """Small calls ask for no thread count."""
    script = """
import sys, numpy as np, fastbn
from fastbn import _threads
_threads.cpu_quota = lambda: sys.exit("read")
fastbn.batch_norm_train(np.ones((4, 2)))
print("done")
"""
    assert run_script(script, NUMBA_NUM_THREADS=None) == "done\n"


def test_it_is_within_what_numba_has():
    assert 1 <= fastbn.get_num_threads() <= _threads._most_threads()
