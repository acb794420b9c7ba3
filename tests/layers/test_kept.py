"""What is kept between calls: of its own tensors in every thread, made again when they have
changed, and keeping none alive.
"""

import gc
import pickle
import sys
import threading
import weakref

import pytest
import torch

from ovseg.nn.tensors import Kept, Version

pytestmark = pytest.mark.third_trial(3)


def test_threads_get_what_was_made_of_their_own_tensors():
    kept, wrong, start = Kept(), [], threading.Barrier(4)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def ask(number):
        tensors = [torch.zeros(1) for _ in range(50)]
        start.wait()
        with torch.no_grad():
            for _ in range(1000):
                found = kept(tensors, lambda: number)
                wrong.extend([] if found == number else [(number, found)])

    try:
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not wrong


def test_a_version_knows_its_tensors_and_keeps_none():
    x, y = torch.zeros(4), torch.ones(2, 2)
    version = Version([x, y], "facts")
    assert version.holds([x, y], "facts") and version.holds(iter([x, y]), "facts")
    assert (
        not version.holds([x, y], "others")
        and not version.holds([x], "facts")
        and not version.holds([y, x], "facts")
    )
    assert not version.holds([x, y.clone()], "facts") and not pickle.loads(
        pickle.dumps(version)
    ).holds([], None)
    x.add_(1)
    assert not version.holds([x, y], "facts")
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool])
def test_a_write_that_torch_does_not_count(dtype):
    for shape in ((), (1,), (3, 5), (0,)):
        x = torch.zeros(shape, dtype=dtype)
        version = Version([x])
        assert version.holds([x])
        x.data.fill_(1)
        assert version.holds([x]) == (x.numel() == 0)
