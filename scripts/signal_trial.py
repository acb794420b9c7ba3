"""Signals to a run of two processes under torchrun, again and again; does it lose anything?

    python scripts/signal_trial.py --count 20 --seed 0

One run is left alone. Another is sent signals ``count`` times: at a random moment some of its
processes (torchrun, the two that train, those that read data) get one to three random signals each
within two seconds. After each time it goes on with ``--auto-resume``. Wanted: each time one
checkpoint more, exit code 143 of both processes, and in the end the same weights, optimizer, random
states and curve, bit for bit. ``--starting`` more times the signals come while the processes load;
those that torch's own start does not survive have nothing to save, so there it is asked only that
nobody stays behind and nothing is lost. Prints a table and ends with 1 if anything is not so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIGNALS = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2")
STEPS_A_TIME = 12  # at most, before the signals
_SETTINGS = [
    "data.style=shapes",
    "data.train_size=24",
    "data.workers=1",
    "train.batch_size=6",
    "log.every_steps=1",
    "checkpoint.every_steps=100000",
    "checkpoint.keep=100000",
    "train.device=cpu",
    "train.ema=0.9",
    "model.options={backbone: {width: 8, embed_dim: 8, local_depth: 1}}",
]
_COMPARED = ("model.safetensors", "optimizer.safetensors", "ema.safetensors", "ranks.jsonl")


def main() -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--count", type=int, default=20)
    options.add_argument("--starting", type=int, default=3)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument(
        "--out", type=Path, help="folder for the two runs and what they print (default: a new one)"
    )
    given = options.parse_args()
    for name in SIGNALS:  # a shell lets what it starts in the background ignore Ctrl-C
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    out = given.out or Path(tempfile.mkdtemp(prefix="signal_trial_"))
    steps = (given.count + given.starting) * (STEPS_A_TIME + 4)
    chance = random.Random(given.seed)
    print(f"{steps} steps, seed {given.seed}, in {out}", flush=True)
    assert finished(begin(out, "whole", steps), 600) == 0, (out / "whole.txt").read_text()
    rows = []
    print(
        "| time | moment | signals | exit codes | steps saved | right |\n|---|---|---|---|---|---|",
        flush=True,
    )
    for number in range(given.count + given.starting):
        rows.append(one(out, steps, chance, starting=number >= given.count))
        print(
            f"| {number + 1} | " + " | ".join(str(value) for value in rows[-1].values()) + " |",
            flush=True,
        )
    assert finished(begin(out, "stopped", steps), 600) == 0, (out / "stopped.txt").read_text()
    different = compare(out / "whole", out / "stopped")
    wrong = sum(row["right"] != "yes" for row in rows)
    print(
        f"\n{len(rows) - wrong} of {len(rows)} times as wanted; "
        f"{'the same bits at the end' if not different else f'different at the end: {different}'}"
    )
    return int(bool(wrong or different))


def begin(out: Path, name: str, steps: int) -> subprocess.Popen:
    """Start a life of a run under torchrun; each of its processes notes its exit code in a file."""
    for old in out.glob("code.*"):
        old.unlink()
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        __file__,
        "--child",
        str(out),
        "train",
        "clip_scenes",
        "--auto-resume",
        *_SETTINGS,
        f"train.steps={steps}",
        f"run={out / name}",
    ]
    out.mkdir(parents=True, exist_ok=True)
    with open(out / f"{name}.txt", "a") as printed:
        variables = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, env=variables, stdout=printed, stderr=printed)


def child(out: Path) -> None:
    """Run the command line as ``python -m ovseg`` does, and note how it ends."""
    from ovseg.cli.ending import program

    try:
        program()
    except SystemExit as ended:
        (out / f"code.{os.environ['RANK']}").write_text(str(ended.code))
        raise


def one(out: Path, steps: int, chance: random.Random, *, starting: bool) -> dict[str, object]:
    """Begin a life, send signals, wait for its end, and look at what is left."""
    run = out / "stopped"
    before = checkpoints(run)
    torchrun = begin(out, "stopped", steps)
    moment = wait_for_moment(run, torchrun, chance, starting)
    everyone = [torchrun.pid, *descendants(torchrun.pid)]
    names = [role(pid, torchrun.pid) for pid in everyone]
    chosen = sorted(chance.sample(range(len(everyone)), chance.randint(1, len(everyone))))
    told = sorted(
        (chance.choice([0.0, chance.uniform(0, 2)]), who, chance.choice(SIGNALS))
        for who in chosen
        for _ in range(chance.randint(1, 3))
    )
    began = time.time()
    for when, who, name in told:
        time.sleep(max(0.0, began + when - time.time()))
        with contextlib.suppress(ProcessLookupError):
            os.kill(everyone[who], getattr(signal, name))
    finished(torchrun, 90)
    while (
        any(map(alive, everyone[1:])) and time.time() < began + 90
    ):  # those whose torchrun was killed
        time.sleep(0.05)
    left = [names[i] for i, pid in enumerate(everyone) if i and alive(pid)]
    codes = [path.read_text() for path in sorted(out.glob("code.*"))]
    new = checkpoints(run)[len(before) :]
    right = not left and (len(new) <= 1 if starting else codes == ["143", "143"] and len(new) == 1)
    sent = ", ".join(f"{names[who]} {name[3:]} +{when:.1f}" for when, who, name in told)
    return {
        "moment": moment,
        "signals": sent,
        "codes": " ".join(codes),
        "saved": " ".join(new),
        "right": "yes" if right else f"no{', still there: ' if left else ''}{', '.join(left)}",
    }


def wait_for_moment(
    run: Path, torchrun: subprocess.Popen, chance: random.Random, starting: bool
) -> str:
    """Wait until the signals are due, some steps and a fraction or some seconds; returns when."""
    seconds, wanted = chance.uniform(0, 10), chance.randint(1, STEPS_A_TIME)
    if starting:
        time.sleep(seconds)
        return f"after {seconds:.1f} s"
    until, deadline = lines(run) + wanted, time.time() + 120
    while lines(run) < until and torchrun.poll() is None and time.time() < deadline:
        time.sleep(0.002)
    time.sleep(chance.uniform(0, 0.03))
    return f"after {wanted} steps"


def finished(process: subprocess.Popen, seconds: float) -> int:
    """Wait for a process, which is killed where it takes too long; returns its exit code."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def descendants(pid: int) -> list[int]:
    """Children and theirs, each before its own."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with contextlib.suppress(OSError):  # ended meanwhile
            for text in (task / "children").read_text().split():
                found += [int(text), *descendants(int(text))]
    return found


def role(pid: int, torchrun: int) -> str:
    """Say what a process does: ``torchrun``, ``rank 0`` trains, ``reader 0`` reads its data."""
    if pid == torchrun:
        return "torchrun"
    try:
        rank = next(
            (
                part[5:]
                for part in Path(f"/proc/{pid}/environ").read_text().split("\0")
                if part.startswith("RANK=")
            ),
            "?",
        )
        parent = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return "gone"
    return f"rank {rank}" if parent == torchrun else f"reader {rank}"


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def lines(run: Path) -> int:
    log = run / "log.jsonl"
    return len(log.read_bytes().splitlines()) if log.exists() else 0


def checkpoints(run: Path) -> list[str]:
    return [
        path.parent.name[5:].lstrip("0") for path in sorted(run.glob("checkpoints/step_*/COMPLETE"))
    ]


def compare(whole: Path, stopped: Path) -> list[str]:
    """Return which files of the last checkpoint, or the curve, are not the same."""
    last = [sorted(run.glob("checkpoints/step_*"))[-1] for run in (whole, stopped)]
    different = [
        name for name in _COMPARED if (last[0] / name).read_bytes() != (last[1] / name).read_bytes()
    ]
    curves = [
        [
            (entry["step"], entry["loss"])
            for entry in map(json.loads, (run / "log.jsonl").read_text().splitlines())
        ]
        for run in (whole, stopped)
    ]
    return different + (["log.jsonl"] if curves[0] != curves[1] else [])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        folder = Path(sys.argv[2])
        sys.argv = ["ovseg", *sys.argv[3:]]
        child(folder)
    sys.exit(main())
