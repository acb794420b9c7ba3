"""The threads of a command: set before torch is imported, unless the user has; the cores that
affinity and container grant.
"""

import json
import os
import subprocess
import sys

import pytest

from ovseg.cli import ending as threads
from ovseg.cli.ending import cpu_quota, granted_cores

pytestmark = pytest.mark.third_trial(17)

_NAMES = (
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "KMP_BLOCKTIME",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
)


@pytest.fixture
def fresh(monkeypatch):
    """A process that has not imported torch, without any of the variables."""
    for name in _NAMES:
        monkeypatch.setenv(name, "")  # so that what is set is taken away again
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(threads, "granted_cores", lambda: 3)
    return monkeypatch


def said():
    return {name: os.environ[name] for name in _NAMES if name in os.environ}


def test_what_is_set(fresh):
    threads.set_up()
    assert said() == {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "3"}


@pytest.mark.parametrize(
    "name,value,others",
    [
        ("OMP_WAIT_POLICY", "ACTIVE", {"OMP_NUM_THREADS": "3"}),
        ("GOMP_SPINCOUNT", "0", {"OMP_NUM_THREADS": "3"}),
        ("KMP_BLOCKTIME", "1", {"OMP_NUM_THREADS": "3"}),
        ("OMP_NUM_THREADS", "1", {"OMP_WAIT_POLICY": "PASSIVE"}),
        ("MKL_NUM_THREADS", "2", {"OMP_WAIT_POLICY": "PASSIVE"}),
    ],
)
def test_what_the_user_has_set_stays(fresh, name, value, others):
    fresh.setenv(name, value)
    threads.set_up()
    assert said() == {name: value, **others}


def test_a_program_that_has_torch_is_left_alone(fresh):
    fresh.setitem(sys.modules, "torch", object())
    threads.set_up()
    assert said() == {}


def test_it_takes_effect():
    """torch's own OpenMP library says what it read. As a library the package sets nothing."""
    code = """
import json, os
before = dict(os.environ)
import ovseg
assert before == dict(os.environ)
from ovseg.cli.main import main
assert main(["info"]) == 0
import torch
print(json.dumps(torch.get_num_threads()))
"""
    environment = {name: value for name, value in os.environ.items() if name not in _NAMES}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**environment, "OMP_DISPLAY_ENV": "true"},
    )
    assert json.loads(done.stdout.splitlines()[-1]) == granted_cores()
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr


def test_cores(monkeypatch, tmp_path):
    """Cores of the affinity are granted, hyperthreads once, or a quota that is below them."""
    if hasattr(os, "sched_getaffinity"):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(threads, "_CPUS", tmp_path)
    monkeypatch.setattr(threads, "_own_groups", lambda: "0::/me\n")
    monkeypatch.setattr(threads, "_CGROUPS", tmp_path / "groups")
    assert granted_cores() == 4  # nothing says which are one core
    for cpu in range(4):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 2},{cpu % 2 + 2}\n")
    assert granted_cores() == 2
    for quota, cores in ((150000, 1), (20000, 1), (800000, 2)):
        (tmp_path / "groups" / "me").mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / "me" / "cpu.max").write_text(f"{quota} 100000\n")
        assert granted_cores() == cores


@pytest.mark.parametrize(
    "groups,files,expected",
    [
        (
            "0::/a/b\n",
            {"a/b/cpu.max": "max 100000", "a/cpu.max": "250000 100000"},
            2.5,
        ),  # the level above limits too
        ("0::/a\n", {"a/cpu.max": "400000 100000", "cpu.max": "300000 100000"}, 3.0),
        (
            "0::/docker/of/the/host\n",
            {"cpu.max": "150000 100000"},
            1.5,
        ),  # the container's own group is the root
        (
            "4:cpu,cpuacct:/x\n0::/\n",
            {
                "cpu,cpuacct/x/cpu.cfs_quota_us": "50000",
                "cpu,cpuacct/x/cpu.cfs_period_us": "100000",
            },
            0.5,
        ),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2.0),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("3:cpuset:/\n2:cpuacct:/\n", {"cpuset/cpu.max": "1 100000"}, None),
        ("0::/\n", {"cpu.max": "nonsense"}, None),
        ("0::/\n", {"cpu.max": "1 0"}, None),
        ("0::/\n", {}, None),
        ("", {}, None),
    ],
)
def test_quotas(tmp_path, groups, files, expected):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert cpu_quota(groups, tmp_path) == expected
