"""Mistakes on the command line: one line that names what came and what was expected, and the exit
code of docs/commands.md.
"""

import os

import numpy as np
import pytest
import torch
from PIL import Image

import ovseg
from ovseg.cli import main as cli
from ovseg.cli.main import exit_code, main, parsed
from ovseg.data.scenes import Scenes
from ovseg.errors import CheckpointError, DataError, InputError, NoCheckpoint, NoData
from ovseg.inference.sources import find_pictures
from ovseg.replacing import file_for, folder_for
from ovseg.training.recipe import load_recipe
from ovseg.training.trainer import train
from ovseg_kernels import BackendError

SEGMENT = ["segment", "s.png", "--labels", "grass,gravel", "-m", "pacl_tiny", "-o", "out"]
SCENES = ["train", "clip_scenes", "train.steps=1", "data.train_size=16", "run=run"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a picture, an empty file and an empty folder, which is the present one."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(Scenes("digits", "val", 1)[0].image).save("s.png")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "empty.yaml").write_bytes(b"# nothing\n")
    (tmp_path / "folder.yaml").write_text(
        "{model: {name: clip_dense_tiny}, data: {kind: folder, root: /nowhere}, train: {steps: 1}}"
    )
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loose").symlink_to("gone")
    return tmp_path


def case(what, line, code, message):
    return pytest.param(
        line,
        code,
        message,
        marks=pytest.mark.bad_input("command line", what),
        id=" ".join(line)[:60],
    )


@pytest.mark.parametrize(
    "line,code,message",
    [
        *(
            case(
                "a device that is not there",
                [*SEGMENT, "--device", name],
                2,
                f"device is '{name}', which torch cannot use here; expected",
            )
            for name in ("foo", "tpu", "meta", "", "mps", "xpu")
        ),
        *(
            case(
                "a device that is not there",
                [*SCENES, f"train.device={name}"],
                2,
                f"device is '{name}', which torch cannot use here",
            )
            for name in ("tpu", "meta")
        ),
        case(
            "a readout for a model without",
            [*SEGMENT, "--readout", "naclip"],
            2,
            "--readout is given and pacl_tiny is no clip_dense model",
        ),
        case(
            "a readout for a model without",
            [*SEGMENT, "--proxy", "vit"],
            2,
            "--proxy is given and pacl_tiny is no clip_dense model",
        ),
        case(
            "a readout for a model without",
            ["eval", "pacl_tiny", "--readout", "naclip", "--scenes", "1"],
            2,
            "--readout is given and",
        ),
        case(
            "a readout that does not exist",
            [*SEGMENT[:-3], "clip_dense_tiny", "--readout", "zzz"],
            2,
            "readout is 'zzz'; expected one of",
        ),
        case(
            "a readout that does not exist",
            [*SEGMENT[:-3], "clip_dense_tiny", "--readout", ""],
            2,
            "readout is ''; expected one of",
        ),
        case(
            "a name that nothing has",
            ["models", "zzz"],
            2,
            "pattern is 'zzz' and no name matches it",
        ),
        case("a name that nothing has", ["models", "vitb16"], 2, "did you mean ViT-B-16"),
        case("a name that nothing has", ["bench", "zzz"], 2, "op is 'zzz'"),
        case("a name that nothing has", ["bench", "--case", "zzz"], 2, "case is 'zzz'"),
        case(
            "a name that nothing has",
            ["convert", "empty", "zzz", "--out", "x"],
            2,
            "model is 'zzz', no path that exists",
        ),
        case(
            "a name that nothing has",
            ["eval", "pacl_tiny", "--protocol", "zzz"],
            2,
            "protocol is 'zzz'",
        ),
        case(
            "an empty path",
            ["segment", "", "--labels", "grass", "-m", "pacl_tiny"],
            2,
            "a picture's name is empty",
        ),
        case(
            "an empty path",
            ["segment", "s.png", "--labels", "grass", "-m", ""],
            2,
            "model is ''; expected a name or a path",
        ),
        case(
            "an empty path",
            ["segment", "s.png", "--labels-file", "", "-m", "pacl_tiny"],
            2,
            "--labels-file is ''; expected a file",
        ),
        case(
            "an empty path",
            ["segment", "s.png", "--labels", "grass", "-m", "pacl_tiny", "-o", ""],
            2,
            "--out is empty; expected a folder",
        ),
        case(
            "an empty path",
            ["eval", "pacl_tiny", "--out", ""],
            2,
            "--out is empty; expected a folder",
        ),
        case(
            "an empty path",
            ["eval", "pacl_tiny", "--root", ""],
            2,
            "--root '' does not exist; expected the folder",
        ),
        case("an empty path", ["bench", "--json", ""], 2, "--json is empty; expected a file"),
        case(
            "an empty path",
            ["convert", "", "segclip_tiny", "--out", "x"],
            2,
            "source is empty; expected a published checkpoint",
        ),
        case(
            "an empty path", ["data", "browse", "--out", ""], 2, "--out is empty; expected a file"
        ),
        case("an empty path", [*SCENES[:-1], "run="], 2, "run is empty; expected a folder"),
        case(
            "an override without a value",
            [*SCENES, "init.backbone="],
            2,
            "override 'init.backbone=' has no value; expected",
        ),
        case(
            "an override without a value",
            [*SCENES, "data.root="],
            2,
            "override 'data.root=' has no value",
        ),
        case(
            "an output that cannot be made",
            [*SEGMENT[:-1], "s.png"],
            2,
            "--out 's.png' is a file; expected a folder",
        ),
        case(
            "an output that cannot be made",
            [*SEGMENT[:-1], "s.png/x"],
            2,
            "/s.png' is a file; expected a folder in a folder",
        ),
        case("an output that cannot be made", [*SEGMENT[:-1], "fifo"], 2, "--out 'fifo' is a FIFO"),
        case(
            "an output that cannot be made",
            [*SEGMENT[:-1], "loose"],
            2,
            "--out 'loose' is a link to nothing",
        ),
        case(
            "an output that cannot be made",
            [*SEGMENT[:-1], "x" * 300],
            2,
            "cannot be looked at: File name too long",
        ),
        case(
            "an output that cannot be made",
            [*SEGMENT[:-1], "new/" + "x" * 300],
            2,
            "--out holds a name of 300 bytes",
        ),
        case(
            "an output that cannot be made",
            ["eval", "pacl_tiny", "--out", "s.png"],
            2,
            "--out 's.png' is a file; expected a folder",
        ),
        case(
            "an output that cannot be made",
            ["demo", "--out", "s.png"],
            2,
            "--out 's.png' is a file; expected a folder",
        ),
        case(
            "an output that cannot be made",
            [*SCENES[:-1], "run=s.png"],
            2,
            "run 's.png' is a file; expected a folder",
        ),
        case(
            "an output that cannot be made",
            ["convert", "empty", "segclip_tiny", "--out", "s.png"],
            2,
            "--out 's.png' is a file",
        ),
        case(
            "an output that cannot be made",
            ["bench", "--json", "folder"],
            2,
            "--json 'folder' is a folder; expected the name of",
        ),
        case(
            "an output that cannot be made",
            ["bench", "--json", "/dev/null"],
            2,
            "--json '/dev/null' is a device",
        ),
        case(
            "an output that cannot be made",
            ["data", "browse", "--out", "folder"],
            2,
            "--out 'folder' is a folder",
        ),
        case(
            "an output that cannot be made",
            ["data", "browse", "--out", "x.zzz"],
            2,
            "--out is 'x.zzz'; expected a picture's name",
        ),
        case(
            "data that are not there",
            ["eval", "pacl_tiny", "--data", "voc21", "--root", "/nowhere"],
            2,
            "--root '/nowhere' does not exist",
        ),
        case(
            "data that are not there",
            ["eval", "pacl_tiny", "--data", "imagefolder", "--root", "s.png"],
            2,
            "--root 's.png' is a file",
        ),
        case(
            "data that are not there",
            ["data", "check", "voc21", "--root", "/nowhere"],
            2,
            "root '/nowhere' does not exist",
        ),
        case(
            "data that are not there",
            ["train", "folder.yaml", "run=run"],
            2,
            "data.root '/nowhere' does not exist",
        ),
        case(
            "data that are not there",
            ["segment", "nowhere.png", "--labels", "grass", "-m", "pacl_tiny"],
            2,
            "does not exist",
        ),
        case("data that are not there", ["bench", "show", "nowhere.json"], 2, "nowhere.json"),
        case(
            "weights that are not there",
            ["convert", "nowhere.bin", "segclip_tiny", "--out", "x"],
            2,
            "nowhere.bin does not exist",
        ),
        case(
            "weights that are not there",
            ["convert", "folder", "--out", "x"],
            2,
            "folder has no config.json",
        ),
        case(
            "weights that are not there",
            ["segment", "s.png", "--labels", "grass", "-m", "folder"],
            2,
            "folder has no config.json",
        ),
        case(
            "weights that are not there",
            [*SCENES, "init.backbone=nowhere"],
            2,
            "init.backbone is 'nowhere'",
        ),
        case(
            "weights that hold nothing",
            ["convert", "empty", "segclip_vit_b16", "--out", "x"],
            1,
            "empty is empty, no complete",
        ),
        case(
            "weights that hold nothing",
            ["segment", "s.png", "--labels", "grass", "-m", "empty"],
            1,
            "empty is empty, no complete",
        ),
        case(
            "a model whose layout is not published",
            ["convert", "empty", "pacl_vit_b16", "--out", "x"],
            2,
            "published no checkpoint",
        ),
        case(
            "an empty recipe",
            ["train", "empty.yaml", "run=run"],
            2,
            "recipe empty.yaml is empty; expected a mapping",
        ),
        case(
            "an empty recipe",
            ["train", "empty", "run=run", "train.steps=1"],
            2,
            "recipe empty is empty; expected a mapping",
        ),
        case(
            "an option beside the wrong one",
            [*SCENES, "--allow", "optim.lr"],
            2,
            "--allow is given without --resume",
        ),
        case(
            "a number below its least",
            ["demo", "--scenes", "0"],
            2,
            "--scenes is 0; expected at least 1",
        ),
        case(
            "a number below its least",
            ["demo", "--steps", "5", "0", "5"],
            2,
            "--steps is 0; expected at least 1",
        ),
        case(
            "a number below its least",
            ["demo", "--train-scenes", "-5"],
            2,
            "--train-scenes is -5; expected at least 1",
        ),
        case(
            "a number below its least",
            ["demo", "--seed", "-1"],
            2,
            "--seed is -1; expected at least 0",
        ),
        case(
            "a number below its least",
            ["eval", "pacl_tiny", "--seed", "-1"],
            2,
            "--seed is -1; expected at least 0",
        ),
        case(
            "a number below its least",
            ["eval", "pacl_tiny", "--limit", "0"],
            2,
            "--limit is 0; expected at least 1",
        ),
        case(
            "a number below its least",
            ["bench", "--repeats", "0"],
            2,
            "--repeats is 0; expected at least 1",
        ),
        case(
            "a number below its least",
            ["data", "browse", "--seed", "-1"],
            2,
            "--seed is -1; expected at least 0",
        ),
    ],
)
def test_a_mistake_is_one_line_and_its_code(here, line, code, message, capsys):
    before = sorted(str(path) for path in here.rglob("*"))
    assert main(line) == code
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told and f"ovseg {line[0]}: " in told
    assert (
        sorted(
            str(path)
            for path in here.rglob("*")
            if path.name not in ("env.json", "config.yaml", "run")
        )
        == before
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU says")
@pytest.mark.bad_input("command line", "OVSEG_BACKEND that cannot run")
@pytest.mark.parametrize(
    "backend,message",
    [("cuda", "backend 'cuda' was asked for"), ("nothing", "OVSEG_BACKEND is 'nothing'")],
)
def test_a_backend_that_cannot_run(here, backend, message, monkeypatch, capsys):
    monkeypatch.setattr("ovseg_kernels._backends._forced", backend)  # what OVSEG_BACKEND says
    assert main(SEGMENT) == 2
    assert message in capsys.readouterr().err


@pytest.mark.bad_input("command line", "weights that are looked at before a model is built")
def test_convert_looks_at_the_file_first(here, monkeypatch):
    monkeypatch.setattr(
        "ovseg.systems.create_model", lambda *a, **k: pytest.fail("a model was built")
    )
    assert main(["convert", "empty", "segclip_vit_b16", "--out", "x"]) == 1


@pytest.mark.bad_input("command line", "outputs that are looked at before the work")
def test_no_work_is_done_for_an_output_that_cannot_be_made(here, monkeypatch):
    def work(*arguments, **options):
        pytest.fail("work was done")

    for name in (
        "ovseg.systems.from_pretrained",
        "ovseg.evaluation.evaluate.evaluate",
        "ovseg.training.trainer.train",
        "ovseg_benchmarks.run.run",
        "ovseg.data.check.check_set",
        "ovseg.weights.pickles.read_published",
    ):
        monkeypatch.setattr(name, work)
    for line in (
        SEGMENT[:-1],
        ["eval", "pacl_tiny", "--out"],
        ["demo", "--out"],
        ["convert", "empty", "segclip_tiny", "--out"],
        ["data", "check", "voc21", "--root", ".", "--out"],
    ):
        assert main([*line, "s.png"]) == 2
    for line in (
        ["bench", "--json"],
        ["data", "browse", "--out"],
        ["data", "superpixels", ".", "--out"],
        ["convert", "folder", "--out"],
    ):
        assert main([*line, "folder"]) == 2
    assert main([*SCENES[:-1], "run=s.png"]) == 2


def test_places_to_write_to(here):
    for good in ("folder", "new", "new/deep", "."):
        assert folder_for(good, "--out") == file_for(f"{good}/x.png", "--out").parent
    assert file_for("s.png", "--out").name == "s.png" and not (here / "new").exists()
    for path, message in (
        ("a\0b", "holds a NUL character"),
        ("/dev/null/x", "'/dev/null' is a device"),
        ("fifo/x", "is a FIFO"),
    ):
        with pytest.raises(InputError, match=message):
            file_for(path, "--out")
    with pytest.raises(InputError, match=r"folder 's\.png' is a file"):
        ovseg.save_pretrained(ovseg.create_model("pacl_tiny"), "s.png")
    result = ovseg.segment("s.png", ["grass", "gravel"], model="pacl_tiny")
    for save in (result.save, result.save_mask):
        with pytest.raises(InputError, match="path 'folder' is a folder"):
            save("folder")


@pytest.mark.bad_input("weights", "an empty name")
def test_an_empty_name_is_not_the_present_folder(here):
    ovseg.save_pretrained(ovseg.create_model("pacl_tiny"), ".")
    for ask in (
        ovseg.from_pretrained,
        ovseg.create_model,
        lambda name: ovseg.segment("s.png", ["grass"], model=name),
    ):
        with pytest.raises(InputError, match="model is ''; expected a name or a path"):
            ask("")
    with pytest.raises(InputError, match="run is empty; expected a folder"):
        train(load_recipe("clip_scenes"), "")
    with pytest.raises(InputError, match="folder is empty; expected a folder"):
        ovseg.save_pretrained(ovseg.create_model("pacl_tiny"), "")


def test_a_folder_that_may_not_be_written_to(here, monkeypatch):
    monkeypatch.setattr(
        os, "access", lambda path, mode: False
    )  # tests may run as root, who may everything
    with pytest.raises(
        InputError, match=r"--out 'new' cannot be written: .* may not be written to"
    ):
        folder_for("new", "--out")


@pytest.mark.parametrize(
    "error,code",
    [
        *(
            (kind("x"), 2)
            for kind in (
                InputError,
                BackendError,
                ValueError,
                FileNotFoundError,
                NoData,
                NoCheckpoint,
            )
        ),
        *((kind("x"), 1) for kind in (CheckpointError, DataError, ImportError, MemoryError)),
        *((kind("x"), None) for kind in (RuntimeError, KeyError, TypeError)),
        (OSError(28, "No space left on device"), 1),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), 1),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"), 1),
    ],
)
def test_codes_of_errors(error, code):
    assert exit_code(error) == code


@pytest.mark.bad_input("command line", "no memory")
def test_no_memory_is_one_line(here, monkeypatch, capsys):
    def run(options):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: "
            "you tried to allocate 9\n"
            "frame #0: c10::ThrowEnforceNotMet\nframe #1: ..."
        )

    monkeypatch.setattr(cli.import_module("ovseg.cli.info"), "run", run)
    assert main(["info"]) == 1
    told = capsys.readouterr().err
    assert "can't allocate memory" in told and "frame" not in told and len(told.splitlines()) == 1


@pytest.mark.third_trial(15)
@pytest.mark.parametrize(
    "name", ["x" * 5000, "y" * 300, "d/" * 3000, "a\0b"], ids=["long", "300", "deep", "nul"]
)
@pytest.mark.parametrize(
    "line",
    [
        "segment s.png --labels grass -m {}",
        "segment s.png --labels grass -m pacl_tiny:{}",
        "segment s.png --labels grass -m ViT-B-16:{}",
        "segment s.png --classes {} -m pacl_tiny",
        "segment {}.png --labels grass -m pacl_tiny",
        "segment {}/*.png --labels grass -m pacl_tiny",
        "eval {} --scenes 1",
        "eval pacl_tiny --data {}",
        "eval pacl_tiny --protocol {}",
        "eval pacl_tiny --data voc21 --root {}",
        "train {} run=run",
        "train clip_scenes run={}",
        "train clip_scenes run=run init.backbone={}",
        "train clip_scenes run=run validation.every_steps=1 validation.data=voc21 "
        "validation.root={}",
        "convert {} segclip_vit_b16 --out o",
        "convert empty {} --out o",
        "bench show {}",
        "models {}",
        "data check {} --root folder",
    ],
)
def test_a_name_that_no_file_can_have(here, line, name, capsys):
    """Refused as any other unknown name, in a line that can be read."""
    assert main([word.replace("{}", name) for word in line.split()]) in (1, 2)
    told = capsys.readouterr().err.splitlines()
    assert (
        "Errno" not in told[-1]
        and told[-1].startswith(f"ovseg {line.split()[0]}: ")
        and len(told[-1]) < 1200
    )
    assert not (here / "o").exists()


@pytest.mark.third_trial(15)
def test_the_closest_name_of_a_long_one(here, capsys):
    assert main(["segment", "s.png", "--labels", "grass", "-m", "pacl_tiny" + "y" * 6]) == 2
    assert "did you mean pacl_tiny" in capsys.readouterr().err
    for ask in (ovseg.from_pretrained, ovseg.create_model):
        with pytest.raises(InputError, match=r"no known name|expected one of"):
            ask("x" * 5000)


@pytest.mark.third_trial(15)
def test_a_long_pattern_is_expanded(here):
    """Braces and brackets are read though no file could be called so."""
    names = ",".join(f"{i:03}" for i in range(100))
    Image.open("s.png").save("042.png")
    assert [source.name for source in find_pictures([f"{{{names}}}.png"])[0]] == [
        f"{i:03}" for i in range(100)
    ]
    assert [source.name for source in find_pictures(["[" + "0" * 300 + "]42.png"])[0]] == ["042"]


@pytest.mark.bad_input("inference", "a picture whose results would have too long names")
def test_long_names(here, capsys):
    image = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    (here / "in").mkdir()
    names = [
        "a" * 225,
        "b" * 239,
        "c" * 246,
        "short",
    ]  # of 255 bytes; the temporary name of the second is longer, the third's result too
    for name in names:
        image.save(here / "in" / f"{name}.png")
    line = [
        "segment",
        "in",
        "--labels",
        "grass,gravel",
        "-m",
        "pacl_tiny",
        "-o",
        "out",
        "--format",
        "mask,overlay",
    ]
    assert main(line) == 3
    printed = capsys.readouterr()
    assert (
        "3 pictures into out, 1 skipped" in printed.out
        and "names of its results are too long" in printed.err
    )
    assert {path.name for path in (here / "out").glob("*.overlay.png")} == {
        f"{name}.overlay.png" for name in names if name[0] != "c"
    }
    assert not list((here / "out").glob(".part*"))
    assert main(["segment", f"in/{names[2]}.png", *line[2:]]) == 2


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(
            kind, marks=pytest.mark.bad_input("inference", f"a result of an earlier run: {kind}")
        )
        for kind in ("empty", "cut", "missing")
    ],
)
def test_a_damaged_result_is_not_taken_for_done(here, damage, capsys):
    (here / "in").mkdir()
    for i in range(4):
        Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(here / "in" / f"{i}.png")
    line = [
        "segment",
        "in",
        "--labels",
        "grass,gravel",
        "-m",
        "pacl_tiny",
        "-o",
        "out",
        "--format",
        "mask,json",
    ]
    assert main(line) == 0
    path = here / "out" / "2.json"
    whole = path.read_bytes()
    {
        "empty": lambda: path.write_bytes(b""),
        "cut": lambda: path.write_bytes(whole[:-5]),
        "missing": path.unlink,
    }[damage]()
    capsys.readouterr()
    assert main(line) == 0 and "1 pictures into out, 3 done before" in capsys.readouterr().out
    assert path.read_bytes() == whole
    assert (
        main([*line[:-1], "rle"]) == 0
        and main(line) == 0
        and "4 done before" in capsys.readouterr().out
    )  # formats one after another


@pytest.mark.bad_input("command line", "arguments on both sides of an option")
def test_positional_arguments_on_both_sides_of_an_option(capsys):
    both = parsed(
        [
            "train",
            "clip_scenes",
            "optim.lr=1",
            "--resume",
            "run=x",
            "--allow",
            "optim.lr",
            "train.seed=1",
        ]
    )
    assert (
        both.recipe == "clip_scenes"
        and both.overrides == ["optim.lr=1", "run=x", "train.seed=1"]
        and both.resume
    )
    assert parsed(["eval", "a", "--data", "voc20", "b"]).models == ["a", "b"]
    assert parsed(["segment", "--labels", "x", "a.png", "--crop", "3", "b.png"]).images == [
        "a.png",
        "b.png",
    ]
    for wrong in (["train", "x", "--resum", "y", "--nothing", "z"], ["info", "more"]):
        with pytest.raises(SystemExit) as stopped:
            parsed(wrong)
        assert stopped.value.code == 2 and "unrecognized arguments" in capsys.readouterr().err
