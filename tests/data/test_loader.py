"""The loader: one global batch whatever the ranks and workers, positions that can be gone back to,
an end without hanging.
"""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loading import INPUTS, joined, pairs, same
from PIL import Image

import ovseg
import ovseg.data.loader_workers as loader_module
from ovseg.data.loader import Loader
from ovseg.data.scenes import Scenes
from ovseg.data.sources import ModelInputs, create_source, load_options
from ovseg.data.sources.folder import FolderPairs
from ovseg.data.sources.folder import Options as FolderOptions
from ovseg.data.sources.scenes import Options as SceneOptions
from ovseg.data.sources.scenes import ScenePairs
from ovseg.errors import ConfigError, DataError
from ovseg.systems.objective import create_objective


@pytest.fixture(scope="module")
def scenes():
    return ScenePairs(
        Scenes("shapes", "train", 40), INPUTS, SceneOptions(captions=2, superpixels=True)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    pairs(root, 23)
    (root / "004.png").write_bytes(
        b"no picture"
    )  # replaced by one that (seed, epoch, index) chooses
    (root / "009.txt").write_text("\n")
    return FolderPairs(root, INPUTS, FolderOptions(image_size=32))


def take(loader, count):
    with loader:
        return list(itertools.islice(loader, count))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_do_not_depend_on_workers(folder, workers):
    torch.manual_seed(workers)  # nor on torch's generator
    batches, reference = (
        take(Loader(folder, 5, seed=2, workers=workers), 11),
        take(Loader(folder, 5, seed=2), 11),
    )
    assert len(batches) == 11 and all(map(same, batches, reference))
    assert sum(len(batch.skipped) for batch in batches) >= 2
    assert not same(batches[0], take(Loader(folder, 5, seed=3), 1)[0])


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("drop_last", [True, False])
def test_ranks_share_one_batch(scenes, folder, ranks, drop_last):
    for source, size in ((scenes, 7), (folder, 5)):
        how = {"seed": 1, "drop_last": drop_last}
        whole = take(Loader(source, size, **how), 2 * len(source) // size)
        parts = [
            take(Loader(source, size, rank=rank, ranks=ranks, **how), len(whole))
            for rank in range(ranks)
        ]
        for batch, *slices in zip(whole, *parts, strict=True):
            assert same(batch, joined(slices))


def test_an_epoch_holds_every_picture_and_the_rest_of_it_on_demand(scenes):
    for drop_last, sizes in ((True, [12] * 3), (False, [12] * 3 + [4])):
        loader = Loader(scenes, 12, epochs=2, drop_last=drop_last)
        batches = list(loader)
        assert [len(batch) for batch in batches] == sizes * 2 and len(loader) == len(batches)
        first = torch.cat([batch.image_ids for batch in batches[: len(sizes)]])
        assert len(first.unique()) == sum(sizes)
        assert not torch.equal(
            first, torch.cat([batch.image_ids for batch in batches[len(sizes) :]])
        )


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_ranks_end_together(scenes, ranks):
    for size in (9, 13, 40):
        if 0 < 40 % size < ranks:
            continue
        made = [
            Loader(scenes, size, epochs=2, drop_last=False, rank=rank, ranks=ranks)
            for rank in range(ranks)
        ]
        counts = [[len(batch) for batch in loader] for loader in made]
        assert (
            len({len(count) for count in counts}) == 1
            and min(map(min, counts)) >= 1
            and sum(map(sum, counts)) == 80
        )


def test_augmentation_differs_between_epochs(folder):
    loader = Loader(folder, 23, shuffle=False)
    first, second = take(loader, 2)
    assert not torch.equal(first.images[0], second.images[0])


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), drop_last=st.booleans(), ranks=st.integers(1, 3))
def test_resume_equals_no_resume(scenes, data, drop_last, ranks):
    size, total = data.draw(st.integers(3, 20)), 14
    if not drop_last and 0 < 40 % size < ranks:
        drop_last = True
    rank = data.draw(st.integers(0, ranks - 1))
    made = [
        Loader(scenes, size, seed=5, rank=rank, ranks=ranks, drop_last=drop_last) for _ in range(3)
    ]
    whole = take(made[0], total)
    stops = sorted(data.draw(st.sets(st.integers(0, total), max_size=4)))
    found, state = [], made[1].state_dict()
    for stop in [*stops, total]:
        loader = Loader(scenes, size, seed=5, rank=rank, ranks=ranks, drop_last=drop_last)
        loader.load_state_dict(state)
        found += take(loader, stop - len(found))
        state = loader.state_dict()
    assert all(map(same, whole, found)) and len(found) == total


@pytest.mark.parametrize("workers", [1, 2])
def test_resume_with_workers_goes_on_after_what_was_handed_out(folder, workers):
    whole = take(Loader(folder, 4, seed=8), 12)
    loader = Loader(folder, 4, seed=8, workers=workers, prefetch=4)
    first = take(loader, 4)  # up to eight more have been read by now
    state = loader.state_dict()
    assert (state["epoch"], state["step"]) == (0, 4)
    again = Loader(folder, 4, seed=8, workers=workers)
    again.load_state_dict(state)
    assert all(map(same, whole, first + take(again, 8)))


def test_iterating_again_goes_on(scenes):
    loader = Loader(scenes, 10)
    whole = take(Loader(scenes, 10), 6)
    assert all(map(same, whole, [*take(loader, 3), *take(loader, 3)]))


@pytest.mark.bad_input("data", "a position of other data")
def test_a_position_of_other_data_is_refused(scenes):
    state = Loader(scenes, 10, seed=3).state_dict() | {"epoch": 2, "step": 2}
    for other, name in (
        ({"batch_size": 5}, "batch_size 10, and batch_size is 5"),
        ({"seed": 4}, "seed 3"),
        ({"drop_last": False}, "drop_last"),
    ):
        loader = Loader(scenes, **({"batch_size": 10, "seed": 3} | other))
        with pytest.raises(ConfigError, match=f"saved with {name}"):
            loader.load_state_dict(state)
    loader = Loader(scenes, 5, seed=3)
    loader.load_state_dict(state, strict=False)  # half of the third epoch, in batches of 5
    assert (loader.epoch, loader.step) == (2, 4)


def test_what_training_draws_is_left_alone(scenes):
    before = torch.get_rng_state()
    take(Loader(scenes, 10, workers=1), 3)
    take(Loader(scenes, 10), 3)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "arguments,message",
    [
        (
            {"batch_size": 0},
            "batch_size is 0; expected at least one picture for each of 1 processes and at most 40",
        ),
        ({"batch_size": 41}, "batch_size is 41"),
        ({"batch_size": 2, "rank": 0, "ranks": 3}, "for each of 3 processes"),
        (
            {"batch_size": 13, "ranks": 3, "drop_last": False},
            "the last batch of an epoch holds 1 of 40 pictures, too few for 3",
        ),
        ({"batch_size": 13, "ranks": 3, "rank": 3}, "rank is 3; expected 0 to 2"),
    ],
)
@pytest.mark.bad_input("data", "arguments of the loader that cannot be")
def test_bad_arguments(scenes, arguments, message):
    with pytest.raises(ValueError, match=message):
        Loader(scenes, **arguments)


class Slow(FolderPairs):
    """Takes its time in the workers."""

    seconds = 0.02

    def read(self, index, rng):
        time.sleep(self.seconds)
        return super().read(index, rng)


def test_waiting_is_measured(folder):
    slow = Slow(folder.root, INPUTS, FolderOptions(image_size=16))
    loader = Loader(slow, 4)
    take(loader, 4)
    assert loader.waiting.share > 0.8 and loader.waiting.seconds > 3 * 4 * 0.02
    loader = Loader(slow, 4, workers=2)
    with loader:
        for _ in itertools.islice(loader, 6):
            time.sleep(0.12)  # two workers need 40 ms a batch
    assert loader.waiting.share < 0.3


@pytest.mark.slow
def test_a_step_of_pacl_tiny_does_not_wait_for_two_workers(tmp_path):
    for i, scene in enumerate(Scenes("shapes", "train", 64)):
        Image.fromarray(scene.image).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("\n".join(caption.text for caption in scene.captions))
    model = ovseg.create_model("pacl_tiny")
    objective = create_objective(model)
    source = create_source(
        load_options({"kind": "folder", "root": str(tmp_path)}), ModelInputs.of(model)
    )
    shares = []
    with Loader(source, 64, workers=2) as loader:
        batches = iter(loader)
        while (
            len(shares) < 3 and min(shares, default=1) >= 0.05
        ):  # other processes may take the cores
            loader.waiting.restart()
            for batch in itertools.islice(batches, 8):
                objective(batch)["total"].backward()
            shares.append(loader.waiting.share)
    assert min(shares) < 0.05, shares


def children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_workers_end_with_the_consumer(folder):
    before = set(children())
    loader = Loader(folder, 4, workers=2)
    with loader:
        next(iter(loader))
        assert len(set(children()) - before) == 2
    assert set(children()) == before
    for _ in loader:
        break  # the generator is left without a word; the loader still knows it
    loader.close()
    assert set(children()) == before


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
@pytest.mark.bad_input("data", "a worker that is killed")
def test_a_killed_worker_is_an_error(folder):
    before = set(children())
    loader = Loader(
        Slow(folder.root, INPUTS, FolderOptions(image_size=16)), 4, workers=1, prefetch=1
    )
    with (
        loader,
        pytest.raises(
            (DataError, RuntimeError),
            match=r"DataLoader worker.*(killed by signal|exited unexpectedly)",
        ),
    ):
        iterator = iter(loader)
        next(iterator)
        os.kill((set(children()) - before).pop(), signal.SIGKILL)
        for _ in range(100):
            next(iterator)
    assert set(children()) == before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
@pytest.mark.bad_input("data", "a worker that hangs")
def test_a_worker_that_does_not_answer_is_given_up(folder):
    before = set(children())
    slow = Slow(folder.root, INPUTS, FolderOptions(image_size=16))
    slow.seconds = 30
    with (
        Loader(slow, 2, workers=1, timeout=0.5) as loader,
        pytest.raises(DataError, match="DataLoader timed out after 0"),
    ):
        next(iter(loader))
    assert set(children()) == before


class Wrong(FolderPairs):
    """Has a bug."""

    def read(self, index, rng):
        raise RuntimeError("shape of the bug")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bug_of_a_source_stays_what_it_is(folder, workers):
    with (
        Loader(Wrong(folder.root, INPUTS), 2, workers=workers) as loader,
        pytest.raises(RuntimeError, match="shape of the bug") as caught,
    ):
        next(iter(loader))
    assert not isinstance(caught.value, DataError)


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_a_signal_to_all_processes_leaves_the_workers_at_work(folder):
    before = set(children())
    with Loader(folder, 4, workers=2) as loader:
        iterator = iter(loader)
        next(iterator)
        for pid in set(children()) - before:
            os.kill(pid, signal.SIGINT)
            os.kill(pid, signal.SIGTERM)
        for _ in range(12):  # past what was read before
            next(iterator)


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_a_signal_finds_workers_that_only_start(folder, monkeypatch):
    def slow_start(number):
        time.sleep(0.5)
        start(number)

    start = loader_module._start_worker
    monkeypatch.setattr(loader_module, "_start_worker", slow_start)
    before = set(children())
    sent = []

    def send():
        while len(started := set(children()) - before) < 2:
            time.sleep(0.01)
        for pid in started:
            os.kill(pid, signal.SIGTERM)
            sent.append(pid)

    sender = threading.Thread(target=send)
    with Loader(folder, 4, workers=2) as loader:
        sender.start()
        iterator = iter(loader)
        for _ in range(12):
            next(iterator)
    sender.join()
    assert len(sent) == 2


@pytest.mark.bad_input("data", "an error in a worker")
def test_an_error_of_the_data_crosses_as_it_is(tmp_path):
    pairs(tmp_path, 4)
    for path in tmp_path.glob("*.png"):
        path.write_bytes(b"no picture")
    source = FolderPairs(tmp_path, INPUTS)
    for workers in (0, 1):
        with (
            Loader(source, 2, workers=workers) as loader,
            pytest.raises(DataError, match="32 pictures in a row cannot be used"),
        ):
            next(iter(loader))


def test_a_process_that_forgets_to_close_ends(tmp_path):
    pairs(tmp_path, 8)
    code = (
        "import sys; sys.path.insert(0, 'tests/data')\n"
        "from loading import INPUTS\n"
        "from ovseg.data.loader import Loader\n"
        "from ovseg.data.sources.folder import FolderPairs\n"
        f"it = iter(Loader(FolderPairs({str(tmp_path)!r}, INPUTS), 4, workers=2))\n"
        "next(it); raise SystemExit(7)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.returncode == 7


def test_from_a_recipe_to_a_batch():
    options = load_options({"kind": "scenes", "style": "shapes", "train_size": 10, "val_size": 6})
    assert len(create_source(options, INPUTS)) == 10
    source = create_source(options, INPUTS, split="val")
    batch = take(
        Loader(source, 6, shuffle=False, workers=options.workers, prefetch=options.prefetch), 1
    )[0]
    assert batch.image_ids.tolist() == list(range(6)) and batch.images.dtype == torch.uint8
