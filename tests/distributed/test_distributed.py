"""ovseg.distributed: what processes agree on, and where it reads who they are."""

import json
import re

import numpy as np
import pytest
import torch
from processes import run

from ovseg import distributed
from ovseg.cli.main import main
from ovseg.errors import ConfigError

_WHO = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "SLURM_PROCID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_LOCALID",
    "SLURM_NTASKS",
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM_STEP_NODELIST",
    "SLURM_JOB_ID",
    "LOCAL_WORLD_SIZE",
)


@pytest.fixture
def who(monkeypatch):
    for name in _WHO:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def collectives():
    me, world = distributed.rank(), distributed.world_size()
    found = {
        "flags": distributed.any_flag(me == 1, False),
        "sum": distributed.all_reduce_sum(np.array([[1, 2**60 + me]])).tolist(),
        "smallest": distributed.smallest(10 - me, me),
        "strings": distributed.gather_strings([f"rank {me}"] * me + ["é\n"]),
        "json": distributed.broadcast_json({"from": me, "x": [0.1]}),
    }
    one, some, none, scalar = (
        torch.nn.Parameter(torch.zeros(n, dtype=d))
        for n, d in (
            (3, torch.float64),
            (2, torch.float64),
            (2, torch.float32),
            ((), torch.float32),
        )
    )
    one.grad, scalar.grad = torch.full((3,), float(me), dtype=torch.float64), torch.tensor(2.0 * me)
    some.grad = torch.ones(2, dtype=torch.float64) if me == 0 else None
    distributed.average_gradients([one, some, none, scalar])
    found["gradients"] = [one.grad.tolist(), some.grad.tolist(), none.grad, scalar.grad.item()]
    distributed.barrier()
    distributed.close()
    print(json.dumps([me, world, found]))


def test_what_processes_agree_on():
    world = 3
    printed = [json.loads(text.splitlines()[-1]) for text in run(__file__, "collectives", world)]
    mean = sum(range(world)) / world
    strings = [s for me in range(world) for s in [f"rank {me}"] * me + ["é\n"]]
    for rank, (me, size, found) in enumerate(printed):
        assert (me, size) == (rank, world)
        assert found["flags"] == [True, False] and found["smallest"] == [11 - world, 0]
        assert found["sum"] == [[world, world * 2**60 + sum(range(world))]]
        assert found["strings"] == strings and found["json"] == {"from": 0, "x": [0.1]}
        assert found["gradients"] == [[mean] * 3, [pytest.approx(1 / world)] * 2, None, 2 * mean]


def test_one_process_needs_no_group(who):
    assert (
        distributed.rank(),
        distributed.world_size(),
        distributed.local_rank(),
        distributed.is_main(),
    ) == (0, 1, 0, True)
    assert distributed.group() is None and distributed.any_flag(True, False) == (True, False)
    assert distributed.gather_strings(["a"]) == ["a"] and distributed.broadcast_json({"a": 1}) == {
        "a": 1
    }
    distributed.average_gradients([torch.nn.Parameter(torch.zeros(1))])
    distributed.close()
    assert not torch.distributed.is_initialized()


def test_who_a_process_is(who):
    for name, value in {
        "SLURM_NTASKS": "8",
        "SLURM_PROCID": "0",
    }.items():  # the script of sbatch, outside of srun
        who.setenv(name, value)
    assert distributed.world_size() == 1 and distributed.rank() == 0
    for name, value in {
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
    }.items():
        who.setenv(name, value)
    assert (distributed.rank(), distributed.world_size(), distributed.local_rank()) == (
        5,
        8,
        1,
    ) and not distributed.is_main()
    for name, value in {
        "WORLD_SIZE": "4",
        "RANK": "3",
        "LOCAL_RANK": "2",
    }.items():  # torchrun started by srun
        who.setenv(name, value)
    assert (distributed.rank(), distributed.world_size(), distributed.local_rank()) == (3, 4, 2)
    with pytest.raises(ConfigError, match="names no MASTER_ADDR"):
        distributed.group()
    who.setenv("RANK", "first")
    with pytest.raises(ConfigError, match="RANK is 'first'"):
        distributed.rank()


@pytest.mark.third_trial(8)
@pytest.mark.parametrize(
    "variables,message",
    [
        ("WORLD_SIZE=4", "WORLD_SIZE is 4 in the environment and RANK is missing"),
        ("RANK=0", "RANK is '0' in the environment and WORLD_SIZE is missing"),
        ("LOCAL_RANK=0", "LOCAL_RANK is '0' in the environment and WORLD_SIZE is missing"),
        (
            "RANK=5 WORLD_SIZE=2",
            "RANK is 5 in the environment and WORLD_SIZE is 2; expected 0 to 1",
        ),
        ("RANK=1 WORLD_SIZE=1", "RANK is 1 in the environment and WORLD_SIZE is 1"),
        (
            "RANK=-1 WORLD_SIZE=2",
            "RANK is '-1' in the environment; expected a whole number from 0 on",
        ),
        ("RANK=1.0 WORLD_SIZE=2", "RANK is '1.0' in the environment; expected a whole number"),
        (
            "RANK=0 WORLD_SIZE=0",
            "WORLD_SIZE is '0' in the environment; expected a whole number from 1 on",
        ),
        (
            "RANK=0 WORLD_SIZE=",
            "WORLD_SIZE is '' in the environment; expected a whole number from 1 on",
        ),
        ("RANK= WORLD_SIZE=2", "RANK is '' in the environment"),
        (
            "RANK=1 WORLD_SIZE=4 LOCAL_RANK=2",
            "LOCAL_RANK is 2 in the environment and RANK is 1; expected 0 to 1",
        ),
        ("RANK=1 WORLD_SIZE=4 LOCAL_RANK=one", "LOCAL_RANK is 'one' in the environment"),
        (
            "RANK=3 WORLD_SIZE=4 LOCAL_RANK=2 LOCAL_WORLD_SIZE=2",
            "expected LOCAL_RANK < LOCAL_WORLD_SIZE <= WORLD_SIZE",
        ),
        (
            "RANK=0 WORLD_SIZE=2 LOCAL_WORLD_SIZE=4",
            "expected LOCAL_RANK < LOCAL_WORLD_SIZE <= WORLD_SIZE",
        ),
        (
            "WORLD_SIZE=2 SLURM_PROCID=1 SLURM_STEP_NUM_TASKS=2",
            "RANK is missing; SLURM_PROCID beside WORLD_SIZE is not read",
        ),
        (
            "RANK=1 SLURM_PROCID=1 SLURM_STEP_NUM_TASKS=2",
            "RANK is '1' in the environment and WORLD_SIZE is missing",
        ),
        (
            "SLURM_STEP_NUM_TASKS=2",
            "SLURM_STEP_NUM_TASKS is 2 in the environment and SLURM_PROCID is missing",
        ),
        (
            "SLURM_STEP_NUM_TASKS=2 SLURM_PROCID=2",
            "SLURM_PROCID is 2 in the environment and SLURM_STEP_NUM_TASKS is 2",
        ),
        (
            "SLURM_PROCID=3",
            "SLURM_PROCID is '3' in the environment and SLURM_STEP_NUM_TASKS is missing",
        ),
    ],
)
def test_variables_that_do_not_fit_are_refused(who, variables, message):
    for pair in variables.split():
        who.setenv(*pair.split("=", 1))
    for ask in (
        distributed.rank,
        distributed.world_size,
        distributed.local_rank,
        distributed.is_main,
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            ask()


@pytest.mark.third_trial(8)
def test_variables_that_fit(who):
    who.setenv("WORLD_SIZE", "1")
    assert distributed.place() == (0, 1, 0)  # one process needs no rank
    who.setenv("WORLD_SIZE", "4")
    who.setenv("RANK", "3")
    assert distributed.place() == (3, 4, 3)  # by hand, on one machine
    for name, value in {
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "SLURM_PROCID": "1",
        "SLURM_STEP_NUM_TASKS": "2",
    }.items():
        who.setenv(name, value)  # torchrun on each of two machines, started by srun
    assert distributed.place() == (3, 4, 1)


@pytest.mark.third_trial(8)
@pytest.mark.parametrize("port", [None, "", "abc", "0", "70000"])
def test_a_port_that_is_none(who, port):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        who.setenv(name, value)
    if port is not None:
        who.setenv("MASTER_PORT", port)
    with pytest.raises(ConfigError, match="MASTER_PORT is"):
        distributed.group()


@pytest.mark.third_trial(8)
@pytest.mark.parametrize(
    "line",
    [
        "segment p.png --labels a -m pacl_tiny",
        "train clip_scenes run=run",
        "eval pacl_tiny --scenes 1",
        "demo --out out",
    ],
)
def test_commands_refuse_them_before_any_work(who, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    who.setenv("WORLD_SIZE", "4")
    assert main(line.split()) == 2
    assert "WORLD_SIZE is 4 in the environment and RANK is missing" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "nodes,first",
    [
        ("gpu07", "gpu07"),
        ("gpu[07-09,12]", "gpu07"),
        ("a1,b2", "a1"),
        ("rack-2-n[3,5]", "rack-2-n3"),
    ],
)
def test_the_first_node_of_srun(who, nodes, first):
    who.setenv("SLURM_STEP_NODELIST", nodes)
    who.setenv("SLURM_JOB_ID", "41234567")
    assert distributed._meeting_place() == (first, 20000 + 41234567 % 20000)


def test_devices():
    assert distributed.device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="device is 'potato'"):
        distributed.device("potato")
    if not torch.cuda.is_available():
        assert distributed.device("auto") == torch.device("cpu")
        with pytest.raises(ConfigError, match="torch sees no GPU"):
            distributed.device("cuda")


def test_seeds_differ_by_rank_and_seed():
    seeds = {distributed.seed_for(seed, rank) for seed in range(4) for rank in range(8)}
    assert (
        len(seeds) == 32
        and all(0 <= s < 2**63 for s in seeds)
        and distributed.seed_for(3, 2) == distributed.seed_for(3, 2)
    )
