"""A block that forces a backend, or has numbers looked at, is of its own thread or task; a backward
keeps to its forward's.
"""

import asyncio
import os
import subprocess
import sys
import threading

import pytest
import torch

import ovseg_kernels as ok
from ovseg_kernels import _backends, _checking, _context, _library

pytestmark = pytest.mark.third_trial(3)
interpreted = pytest.mark.skipif(
    not _backends.interpreted(), reason="Triton runs on the CPU by its interpreter alone"
)


def on_a_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def chosen():
    return ok.explain("patch_text_similarity").backend


def test_a_forced_backend_is_of_its_own_thread():
    before = chosen()
    with ok.backend("reference"):
        assert chosen() == "reference" and on_a_thread(chosen) == before
        with ok.backend("cpu"):
            assert chosen() == "cpu"
        assert chosen() == "reference"
    assert chosen() == before
    with pytest.raises(KeyError), ok.backend("reference"):
        raise KeyError
    assert chosen() == before


def test_many_threads_force_different_backends():
    wrong, start = [], threading.Barrier(6)

    def force(name):
        start.wait()
        for _ in range(300):
            with ok.backend(name):
                wrong.extend([] if chosen() == name else [name])

    threads = [
        threading.Thread(target=force, args=(("reference", "cpu")[i % 2],)) for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_forced_backend_is_of_its_own_task():
    async def force(name):
        with ok.backend(name):
            for _ in range(3):
                await asyncio.sleep(0)
                assert chosen() == name

    async def both():
        await asyncio.gather(force("reference"), force("cpu"))

    before = chosen()
    asyncio.run(both())
    assert chosen() == before and _context.BACKEND._traced.value is None


def test_checking_is_of_its_own_thread(monkeypatch):
    x = torch.zeros(1, device="meta")
    monkeypatch.setattr(type(x), "device", torch.device("cuda"), raising=False)
    with ok.checking():
        assert _checking.looks_at_values(x) and not on_a_thread(
            lambda: _checking.looks_at_values(x)
        )
        with ok.checking(False):
            assert not _checking.looks_at_values(x)
    assert not _checking.looks_at_values(x)


@pytest.fixture
def calls(monkeypatch):
    """Which of Triton's kernels have been called; the definition's numbers in their place."""
    found = []
    for name in ("patch_text_similarity", "patch_text_similarity_backward"):

        def spy(*args, name=name):
            found.append(name)
            return _library.FALLBACKS[name](*args)

        monkeypatch.setitem(_backends.IMPLEMENTATIONS, name, spy)
    return found


@interpreted
def test_triton_answers_where_it_is_forced_and_nowhere_else(calls):
    """The dispatcher is one for all threads."""
    patches, texts = torch.randn(1, 2, 3), torch.randn(1, 3)
    expected = ok.patch_text_similarity(patches, texts)
    with ok.backend("triton"):
        here = ok.patch_text_similarity(patches, texts)
        assert calls == ["patch_text_similarity"]
        there = on_a_thread(lambda: ok.patch_text_similarity(patches, texts))
        with ok.backend("cpu"):
            inside = ok.patch_text_similarity(patches, texts)
    after = ok.patch_text_similarity(patches, texts)
    assert calls == ["patch_text_similarity"] and all(
        torch.equal(found, expected) for found in (there, inside, after)
    )
    torch.testing.assert_close(here, expected)


@interpreted
def test_a_backward_in_a_thread_of_its_own_runs_where_its_forward_ran(calls):
    patches = torch.randn(1, 2, 3, requires_grad=True)
    with ok.backend("triton"):
        out = ok.patch_text_similarity(patches, torch.randn(1, 3))
        on_a_thread(lambda: out.sum().backward())
    assert calls == ["patch_text_similarity", "patch_text_similarity_backward"]
    plain = ok.patch_text_similarity(patches, torch.randn(1, 3))
    with ok.backend("triton"):
        plain.sum().backward()
    assert calls[2:] == ["patch_text_similarity_backward"]  # where a backend is forced, it is that


def test_a_compiled_function_follows_the_block_around_it():
    def function(x):
        return x + (1 if _backends.forced() == "reference" else 2)

    torch._dynamo.reset()
    compiled, x = torch.compile(function, backend="eager", fullgraph=True), torch.zeros(1)
    assert compiled(x) == 2
    with ok.backend("reference"):
        assert compiled(x) == 1 and on_a_thread(lambda: compiled(x)) == 2
    assert compiled(x) == 2


@interpreted
def test_a_process_that_forces_triton_still_has_its_other_kernels():
    code = (
        "import torch, ovseg_kernels as ok\n"
        "x, t = torch.randn(1, 2, 3), torch.randn(1, 3)\n"
        "assert ok.explain('patch_text_similarity').backend == 'triton'\n"
        "ok._backends.IMPLEMENTATIONS['patch_text_similarity'] = None\n"
        "with ok.backend('cpu'): ok.patch_text_similarity(x, t)\n"
        "try: ok.patch_text_similarity(x, t)\n"
        "except TypeError: print('asked')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "OVSEG_BACKEND": "triton"},
    )
    assert done.stdout == "asked\n", done.stderr
