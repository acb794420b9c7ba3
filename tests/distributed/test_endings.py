"""How processes end: signals save once and leave with 143, whoever is left by a dead one says so.

One host process loads everything once and forks each life of the command line, as test_resume.py
does. The same under torchrun, twenty times and more: scripts/signal_trial.py.
"""

import contextlib
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import matplotlib.figure  # noqa: F401  for the children: what they import is loaded once
import pytest
from PIL import Image
from processes import environment, free_port, run

import ovseg.cli.main
import ovseg.evaluation.scenes
import ovseg.training.trainer  # noqa: F401  as above
from ovseg.cli import ending
from ovseg.data import superpixels
from ovseg.training import state

STEPS, TIMES = 30, 2
SMALL = [
    "data.style=shapes",
    "data.train_size=24",
    "data.workers=1",
    "train.batch_size=6",
    f"train.steps={STEPS}",
    "log.every_steps=1",
    "checkpoint.every_steps=1000",
    "checkpoint.keep=100",
    "train.device=cpu",
    "train.ema=0.9",
    "model.options={backbone: {width: 8, embed_dim: 8, local_depth: 1}}",
]
SENT = [
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
]


class Lives:
    """Processes of one command line; ``printed``: what each wrote to stderr."""

    def __init__(self, folder, name, command, ranks=(0, 1), out=None, shut=None, **variables):
        self.folder, self.name, port, self.pids = Path(folder), name, free_port(), []
        for rank in ranks:
            child = os.fork()
            if child == 0:
                if shut is not None:
                    os.close(shut)
                self._live(rank, command, {**environment(rank, 2, port), **variables}, out)
            self.pids.append(child)

    def _live(self, rank, command, variables, out):
        code = 70
        try:
            os.setpgid(0, 0)  # a group with what it starts, as a terminal makes one
            os.environ |= variables
            for number, kind in ((1, "out"), (2, "err")):
                written = os.open(self._path(rank, kind), os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
                os.dup2(
                    written if out is None or (number == 2 and not os.isatty(out)) else out, number
                )
            # As a process begins: the old ones know where they led.
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
            sys.argv = ["ovseg", *command]
            ending.program()
        except SystemExit as ended:
            code = ended.code
        except BaseException:
            self._path(rank).write_text(traceback.format_exc())
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            os._exit(code)

    def _path(self, rank, kind="err"):
        return self.folder / f"{self.name}.{rank}.{kind}"

    def printed(self, rank):
        return self._path(rank).read_text()

    def wait(self, seconds=60):
        """Exit codes, negative for a signal; who takes too long is killed."""
        codes, deadline = [], time.time() + seconds
        for pid in self.pids:
            while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
                if time.time() > deadline:
                    os.kill(pid, signal.SIGKILL)
                time.sleep(0.01)
            codes.append(os.waitstatus_to_exitcode(ended[1]))
        return codes


def train(folder, name, run, *more, resume="--auto-resume", **options):
    return Lives(
        folder,
        name,
        ["train", "clip_scenes", resume, *SMALL, *more, f"run={folder}/{run}"],
        **options,
    )


def readers(pid):
    return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def lines(folder):
    path = Path(folder) / "log.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def until_lines(folder, more):
    wanted, deadline = lines(folder) + more, time.time() + 60
    while lines(folder) < wanted and time.time() < deadline:
        time.sleep(0.001)


def saved(folder):
    return len(state.complete(Path(folder) / "checkpoints"))


def stopped_again_and_again(folder, chance):
    """Codes and new checkpoints of each life, and what at the end differs from a run left alone."""
    found = {"codes": [], "new": []}
    assert train(folder, "whole", "whole").wait() == [0, 0]
    for _ in range(TIMES):
        before = saved(f"{folder}/stopped")
        lives = train(folder, "stopped", "stopped")
        until_lines(f"{folder}/stopped", chance.randint(1, 8))
        everyone = [*lives.pids, *(reader for pid in lives.pids for reader in readers(pid))]
        for pid in chance.sample(everyone, chance.randint(1, len(everyone))):
            for _ in range(chance.randint(1, 3)):
                os.kill(pid, chance.choice(SENT))
        found["codes"].append(lives.wait())
        found["new"].append(saved(f"{folder}/stopped") - before)
    assert train(folder, "stopped", "stopped").wait() == [0, 0]
    last = [
        state.complete(Path(folder) / name / "checkpoints")[-1] for name in ("whole", "stopped")
    ]
    found["different"] = [
        file
        for file in ("model.safetensors", "optimizer.safetensors", "ema.safetensors", "ranks.jsonl")
        if (last[0] / file).read_bytes() != (last[1] / file).read_bytes()
    ]
    return found


def a_rank_dies(folder, name, *more):
    lives = train(folder, name, name, "checkpoint.every_steps=2", *more)
    until_lines(f"{folder}/{name}", 5)
    os.kill(lives.pids[1], signal.SIGKILL)
    began = time.time()
    return {"codes": lives.wait(), "printed": lives.printed(0), "seconds": time.time() - began}


def a_rank_stands_still(folder):
    lives = train(folder, "still", "still", OVSEG_RANK_TIMEOUT="2")
    until_lines(f"{folder}/still", 3)
    os.kill(lives.pids[1], signal.SIGSTOP)
    began = time.time()
    while (
        readers(lives.pids[0]) and time.time() < began + 30
    ):  # the survivor ends them when it leaves
        time.sleep(0.01)
    seconds = time.time() - began
    os.kill(lives.pids[1], signal.SIGKILL)
    return {"codes": lives.wait(), "printed": lives.printed(0), "seconds": seconds}


def a_reader_dies(folder):
    lives = train(folder, "reader", "reader")
    until_lines(f"{folder}/reader", 3)
    reader = readers(lives.pids[1])[0]
    os.kill(reader, signal.SIGKILL)
    codes = lives.wait()
    found = {
        "codes": codes,
        "printed": [lives.printed(rank) for rank in (0, 1)],
        "pid": reader,
        "saved": saved(f"{folder}/reader"),
    }
    found["again"] = train(folder, "reader", "reader", resume="--resume").wait()
    last = [
        state.complete(Path(folder) / name / "checkpoints")[-1] / "model.safetensors"
        for name in ("whole", "reader")
    ]
    return {**found, "same": last[0].read_bytes() == last[1].read_bytes()}


def nobody_comes(folder, rank):
    began = time.time()
    command = ["eval", "pacl_tiny", "--scenes", "2", "--device", "cpu"]
    lives = Lives(folder, f"alone{rank}", command, ranks=(rank,), OVSEG_START_TIMEOUT="2")
    return {"codes": lives.wait(), "printed": lives.printed(rank), "seconds": time.time() - began}


def a_signal_while_the_others_do_not_come(folder):
    waiting = train(folder, "early", "early", ranks=(0,), OVSEG_START_TIMEOUT="2")
    time.sleep(1)
    os.kill(waiting.pids[0], signal.SIGUSR1)
    return [waiting.wait(), waiting.printed(0)]


def alone(folder, name, command, **more):
    return Lives(folder, name, command, ranks=(0,), WORLD_SIZE="1", **more)


def nobody_reads(folder):
    """Codes and stderr of commands whose stdout leads to a program that has ended."""
    found = {}
    for name, command in {
        "help": ["--help"],
        "recipes": ["train", "list"],
    }.items():
        reading, writing = os.pipe()
        os.close(reading)
        process = alone(folder, name, command, out=writing)
        os.close(writing)
        found[name] = [process.wait(), process.printed(0)]
    return found


def ctrl_c(folder):
    """Codes and stderr of commands that Ctrl-C finds at work."""
    (pictures := Path(folder) / "pictures").mkdir()
    Image.new("RGB", (64, 64)).save(pictures / "0.png")
    for i in range(1, 2000):
        os.link(pictures / "0.png", pictures / f"{i}.png")
    found = {}
    for name, command in {
        "eval": ["eval", "pacl_tiny", "--scenes", "5000", "--device", "cpu"],
        "segment": [
            "segment",
            str(pictures),
            "-m",
            "pacl_tiny",
            "--labels",
            "grass,sand",
            "--device",
            "cpu",
            "-o",
            f"{folder}/o",
        ],
    }.items():
        process = alone(folder, name, command)
        time.sleep(2)
        os.killpg(process.pids[0], signal.SIGINT)
        found[name] = [process.wait(), process.printed(0)]
    return found


def the_terminal_is_closed(folder):
    terminal, seen = os.openpty()
    process = alone(
        folder,
        "closed",
        ["train", "clip_scenes", *SMALL, f"run={folder}/closed"],
        out=seen,
        shut=terminal,
    )
    os.close(seen)
    until_lines(f"{folder}/closed", 3)
    os.close(terminal)
    os.kill(process.pids[0], signal.SIGHUP)
    return [process.wait(), saved(f"{folder}/closed")]


def the_parent_of_a_pool_dies(folder):
    """Whether the processes that cut up pictures end with the one that they work for."""
    superpixels._cut = _sleep
    child = os.fork()
    if child == 0:
        superpixels.write_superpixels(
            [(str(i), Path("none")) for i in range(64)],
            Path(folder) / "s.safetensors",
            superpixels.SuperpixelOptions(workers=2),
        )
    deadline = time.time() + 30
    while len(workers := readers(child)) < 2 and time.time() < deadline:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.time() < deadline:
        time.sleep(0.01)
    left = [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return [len(workers), len(left)]


def _sleep(job):
    time.sleep(60)


def lives(folder, seed):
    chance = random.Random(int(seed))
    found = {
        "stopped": stopped_again_and_again(folder, chance),
        "dead": a_rank_dies(folder, "dead"),
        "sharded": a_rank_dies(folder, "sharded", "train.parallel=fsdp"),
        "still": a_rank_stands_still(folder),
        "reader": a_reader_dies(folder),
        "alone": [nobody_comes(folder, rank) for rank in (0, 1)],
        "early": a_signal_while_the_others_do_not_come(folder),
        "unread": nobody_reads(folder),
        "ctrl_c": ctrl_c(folder),
        "closed": the_terminal_is_closed(folder),
        "pool": the_parent_of_a_pool_dies(folder),
    }
    print(json.dumps(found))


@pytest.fixture(scope="module")
def met(tmp_path_factory):
    if sys.platform != "linux":
        pytest.skip("looks at /proc")
    folder = tmp_path_factory.mktemp("signals")
    return json.loads(run(__file__, "lives", 1, folder, 3, seconds=240)[0].splitlines()[-1])


@pytest.mark.third_trial(7)
def test_signals_to_any_of_the_processes_save_once_and_change_nothing(met):
    found = met["stopped"]
    assert (
        found["codes"] == [[143, 143]] * TIMES
        and found["new"] == [1] * TIMES
        and found["different"] == []
    )


def one_sentence(printed):
    """The line that the command says at its end, which is all that it says."""
    said = [line for line in printed.splitlines() if line and "Warning" not in line]
    assert "Traceback" not in printed and "gloo" not in printed, printed
    assert len([line for line in said if line.startswith("ovseg ")]) == 1 and said[-1].startswith(
        "ovseg "
    ), printed
    return said[-1]


@pytest.mark.third_trial(7)
@pytest.mark.parametrize("kind", ["dead", "sharded"])
def test_who_is_left_by_a_dead_process_says_one_sentence(met, kind):
    found = met[kind]
    assert found["codes"] == [1, -signal.SIGKILL] and found["seconds"] < 20
    said = one_sentence(found["printed"])
    assert (
        said.startswith("ovseg train: another of 2 processes ended or stopped answering (")
        and "--resume goes on from " in said
    )
    assert f"{kind}/checkpoints/step_0000000" in said


@pytest.mark.third_trial(7)
def test_a_process_that_stands_still_ends_the_run_after_the_limit(met):
    found = met["still"]
    assert found["codes"] == [1, -signal.SIGKILL] and 1.5 < found["seconds"] < 20
    said = one_sentence(found["printed"])
    assert (
        "stopped answering (" in said
        and "no checkpoint was written yet, --auto-resume begins anew" in said
    )


@pytest.mark.third_trial(7)
def test_a_reader_that_dies_is_named_by_all_and_what_is_trained_is_saved(met):
    found = met["reader"]
    assert (
        found["codes"] == [1, 1]
        and found["saved"] == 1
        and found["again"] == [0, 0]
        and found["same"]
    )
    for printed in found["printed"]:
        said = one_sentence(printed)
        assert (
            f"worker 0 of process 1 (pid {found['pid']}) was killed by signal 9 (SIGKILL)" in said
            and "--resume goes on" in said
        )


@pytest.mark.third_trial(7)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_the_others_do_not_join_ends_soon(met, rank):
    found = met["alone"][rank]
    assert found["codes"] == [1] and found["seconds"] < 12
    assert one_sentence(found["printed"]).startswith(
        "ovseg eval: the 2 processes did not come together ("
    )


@pytest.mark.third_trial(7)
def test_a_signal_before_all_have_come_leaves_with_143(met):
    codes, printed = met["early"]
    assert codes == [143]
    assert one_sentence(printed).startswith(
        "ovseg train: signal 10 (SIGUSR1) before the first step"
    )


@pytest.mark.third_trial(7)
def test_a_reader_of_stdout_that_has_left_leaves_no_traceback(met):
    for codes, printed in met["unread"].values():
        assert codes == [ending.NO_READER] and printed == ""


@pytest.mark.third_trial(7)
@pytest.mark.parametrize("verb", ["eval", "segment"])
def test_ctrl_c_leaves_no_traceback(met, verb):
    codes, printed = met["ctrl_c"][verb]
    assert codes == [130] and "Traceback" not in printed and "KeyboardInterrupt" not in printed, (
        printed
    )


@pytest.mark.third_trial(7)
def test_a_closed_terminal_saves_and_leaves_with_143(met):
    assert met["closed"] == [[143], 1]


@pytest.mark.third_trial(7)
def test_processes_that_cut_up_pictures_end_with_the_one_they_work_for(met):
    assert met["pool"] == [2, 0]
