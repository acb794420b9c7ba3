"""``train.cache`` in two processes: each encodes its share, both read all; what fails in one of
them fails in both.
"""

import json
import sys
from pathlib import Path

import pytest
from processes import run

from ovseg import distributed
from ovseg.data import feature_store
from ovseg.errors import DataError
from ovseg.training import trainer
from ovseg.training.feature_cache import Tower
from ovseg.training.recipe import load_recipe
from ovseg.training.trainer import train

TOWERS = "backbone: {width: 16, embed_dim: 16, local_depth: 1}"
SMALL = [
    "data.style=shapes",
    "data.train_size=33",
    "train.batch_size=9",
    "train.steps=5",
    "schedule.warmup_steps=0",
    "log.every_steps=1",
    "train.device=cpu",
]
MODELS = {
    "pacl_scenes": [f"model.options={{{TOWERS}, trained: [embedder, scale]}}"],
    "mgca_scenes": [
        f"model.options={{{TOWERS}, hidden: 8, trained: [decoder, scale]}}",
        "objective.options={weights: {region: 0, pixel: 0}}",
    ],
}


def recipe(name, cache, *more):
    return load_recipe(name, [*SMALL, *MODELS[name], f"train.cache={cache}", *more])


def curve(folder):
    lines = (Path(folder) / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def scenarios(folder):
    folder = Path(folder)
    calls = []
    encode = Tower.encode
    Tower.encode = lambda self, images: calls.append(len(images)) or encode(self, images)
    real = feature_store._write_at
    trainer.plot_loss = lambda *args, **options: None

    def full(file, data, at):
        if len(data) > 1 and distributed.rank() == 1:
            raise OSError(28, "No space left on device")
        real(file, data, at)

    failure = ""
    feature_store._write_at = full
    try:
        train(recipe("pacl_scenes", folder / "cache"), folder / "pacl", quiet=True)
    except DataError as error:
        failure = str(error)
    feature_store._write_at = real
    shares = []
    for name, more in (
        ("pacl", []),
        ("mgca", ["train.chunk=2"]),
        ("pacl fsdp", ["train.parallel=fsdp"]),
    ):
        del calls[:]
        cached = recipe(f"{name[:4]}_scenes", folder / "cache", *more)
        train(cached, folder / name, quiet=True)
        shares.append(sum(calls))
    distributed.close()
    sys.stdout.write(json.dumps([failure, shares]) + "\n")


@pytest.fixture(scope="module")
def met(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cached")
    printed = run(__file__, "scenarios", 2, folder, seconds=120)
    return folder, [json.loads(text.splitlines()[-1]) for text in printed]


@pytest.mark.bad_input("several processes", "a disk that is full for one of them")
def test_a_disk_that_is_full_for_one_ends_both(met):
    one, other = (failure for failure, _ in met[1])
    assert one == other and "No space left on device" in one
    assert "; 5 of 33 pictures are in the cache and stay" in one


def test_each_encodes_its_share_and_both_follow_one(met, tmp_path):
    shares = [shares for _, shares in met[1]]
    # The main process looks at one picture more; five rows were whole before. The last is read.
    assert shares == [[1 + 14, 1 + 16, 1], [14, 17, 0]]
    for name in ("pacl", "mgca"):
        train(recipe(f"{name}_scenes", tmp_path / "cache"), tmp_path / name, quiet=True)
        assert curve(met[0] / name) == pytest.approx(curve(tmp_path / name), rel=1e-4)
    assert curve(met[0] / "pacl fsdp") == pytest.approx(curve(tmp_path / "pacl"), rel=1e-4)
    names = [sorted(path.name for path in (at / "cache").iterdir()) for at in (met[0], tmp_path)]
    assert names[0] == names[1], "the key does not depend on processes, chunks or shards"
