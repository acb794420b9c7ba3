"""k steps, SIGKILL, resume equals no kill, bit for bit: ten random moments of one process and ten
of two, workers of the data included.

One host process loads everything once and forks each life of the training; it runs alone, as
pytest's process has threads and may not fork.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
from processes import environment, free_port, run

from ovseg import distributed
from ovseg.training import state
from ovseg.training.recipe import load_recipe
from ovseg.training.trainer import train

STEPS, KILLS = 90, 10


def recipe(system):
    small = [
        "data.style=shapes",
        "data.train_size=24",
        "data.workers=1",
        "train.batch_size=6",
        f"train.steps={STEPS}",
        "log.every_steps=1",
        "checkpoint.every_steps=2",
        "train.device=cpu",
        "train.ema=0.9",
    ]
    options = {
        "clip": "model.options={backbone: {width: 8, embed_dim: 8, local_depth: 1}}",
        "segclip": "model.options={backbone: {width: 8, embed_dim: 8, local_depth: 1}, decoder: "
        "{width: 8, depth: 1, heads: 2}}",
    }
    return load_recipe(f"{system}_scenes", [*small, options[system]])


def begin(folder, system, world):
    """Fork one life of the run: a child for each rank."""
    port, children = free_port(), []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.setpgid(0, 0)  # a group with its workers, so that they can be killed with it
                os.environ |= environment(rank, world, port)
                train(recipe(system), folder, resume="auto", quiet=True)
                distributed.close()
                code = 0
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
            finally:
                os._exit(code)
        children.append(child)
    return children


def lines(folder):
    path = Path(folder) / "log.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def lives(folder, system, world, seed):
    """Kill a run again and again, let it end, and compare with one that was left alone."""
    world, chance, ended = int(world), random.Random(int(seed)), []
    for name in ("whole", "killed"):
        path = f"{folder}/{name}"
        for _ in range(KILLS if name == "killed" else 0):
            children = begin(path, system, world)
            # So many new lines, then any moment of the step after, or of the checkpoint that it
            # writes.
            until, deadline = max(0, lines(path) - 2) + chance.randint(1, 7), time.time() + 60
            while lines(path) < until and time.time() < deadline:
                time.sleep(0.0005)
            time.sleep(chance.uniform(0, 0.02))
            victim = chance.choice(children)
            os.kill(victim, signal.SIGKILL)
            for child in [victim, *(c for c in children if c != victim)]:
                if child != victim:
                    os.kill(child, signal.SIGKILL)  # as torchrun does with the others
                _, status = os.waitpid(child, 0)
                assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (
                    f"a process was not killed: status {status}"
                )
                os.killpg(child, signal.SIGKILL) if alive(child) else None
            ended.append(lines(path))
        statuses = [os.waitpid(child, 0)[1] for child in begin(path, system, world)]
        assert statuses == [0] * world, statuses
    different = []
    last = [state.complete(Path(folder) / name / "checkpoints")[-1] for name in ("whole", "killed")]
    assert last[0].name == last[1].name == f"step_{STEPS:08d}"
    for file in ("model.safetensors", "optimizer.safetensors", "ema.safetensors", "ranks.jsonl"):
        different += (
            [file] if (last[0] / file).read_bytes() != (last[1] / file).read_bytes() else []
        )
    curves = [
        [
            (e["step"], e["loss"])
            for e in map(json.loads, (Path(folder) / name / "log.jsonl").read_text().splitlines())
        ]
        for name in ("whole", "killed")
    ]
    print(
        json.dumps(
            {
                "different": different,
                "curves": curves[0] == curves[1],
                "steps": len(curves[1]),
                "ended": ended,
            }
        )
    )


def alive(process_group):
    try:
        os.killpg(process_group, 0)
        return True
    except ProcessLookupError:
        return False


@pytest.mark.parametrize("world,system", [(1, "segclip"), (2, "clip")])
def test_ten_kills_change_nothing(tmp_path, world, system):
    printed = run(__file__, "lives", 1, tmp_path, system, world, 7 + world, seconds=300)[0]
    found = json.loads(printed.splitlines()[-1])
    assert found["different"] == [] and found["curves"] and found["steps"] == STEPS, printed
    assert len(found["ended"]) == KILLS and max(found["ended"]) < STEPS
