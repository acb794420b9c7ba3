"""Addresses in place of paths: said to be none that is read, as they were given, wherever a path is
taken.
"""

from pathlib import Path

import pytest
from PIL import Image

import ovseg
from ovseg.cli.main import main
from ovseg.data.benchmark_sets import SegmentationSet, describe
from ovseg.data.class_lists import read_class_embeddings
from ovseg.data.entities import load_entities
from ovseg.data.images import read_image
from ovseg.data.labels import LabelSet
from ovseg.data.sources import ModelInputs, create_source, load_options
from ovseg.errors import ConfigError, DataError, InputError
from ovseg.inference.sources import find_pictures
from ovseg.paths import address, as_given, no_file
from ovseg.replacing import file_for, folder_for
from ovseg.training.recipe import load_recipe
from ovseg.weights.clip import find_clip
from ovseg.weights.pickles import read_published

pytestmark = pytest.mark.third_trial(10)
AT = "https://example.com/x"


@pytest.mark.parametrize(
    "name",
    [
        AT,
        "http://e.com/a b.png",
        "HTTPS://e.com/x",
        "s3://bucket/key",
        "gs://bucket/key",
        "hf://owner/name",
        "ftp://e.com/x",
        "data:image/png;base64,AAAA",
    ],
)
def test_what_is_an_address(name):
    assert "is an address, and only files are read: download it first" in address(name)
    assert "is an address" in no_file(name) and "is an address" in no_file(Path(name))
    assert as_given(Path(name)) == name


@pytest.mark.parametrize(
    "name",
    [
        "a.png",
        "C:/a.png",
        "a:b/c.png",
        "https",
        "clip_dense_vit_b16:openai",
        "hf-hub:owner/name",
        "/https:/",
        "",
    ],
)
def test_what_is_none(name):
    assert address(name) is None and as_given(name) == name


def test_a_folder_that_is_called_so_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "https:" / "e.com").mkdir(parents=True)
    assert address("https://e.com") is None


def test_a_file_by_its_address():
    with pytest.raises(
        InputError,
        match=r"'file:///tmp/x\.png' is an address; expected the path alone, which begins after file://",
    ):
        find_pictures(["file:///tmp/x.png"])


PAIRS = {"kind": "folder", "root": AT}
MASKS = {"kind": "masks", "set": "voc20", "root": AT}
READ = {
    "a picture": lambda: read_image(AT),
    "pictures": lambda: find_pictures([AT + ".png"]),
    "a pattern": lambda: find_pictures([AT + "/*.png"]),
    "a range": lambda: find_pictures([AT + "-{00..03}.tar"]),
    "a label file": lambda: LabelSet.read(AT + ".txt"),
    "a model": lambda: ovseg.from_pretrained(AT + ".pt"),
    "weights of a model": lambda: ovseg.from_pretrained("pacl_tiny:" + AT),
    "a published checkpoint": lambda: read_published(AT),
    "a CLIP": lambda: find_clip(AT, "ViT-B-16"),
    "a recipe": lambda: load_recipe(AT + ".yaml"),
    "pairs": lambda: create_source(load_options(PAIRS), ModelInputs(16)),
    "masks": lambda: create_source(load_options(MASKS), ModelInputs(16)),
    "a benchmark": lambda: SegmentationSet("voc20", AT),
    "a description": lambda: describe(AT + ".yaml"),
    "entities": lambda: load_entities(AT + ".yaml"),
    "embeddings": lambda: read_class_embeddings(AT + ".npy", 1, 1),
}


@pytest.mark.parametrize("what", READ)
def test_whatever_reads_says_so(what):
    with pytest.raises(
        (InputError, ConfigError),
        match=rf"{AT}.* is an address, and only files are read: download it first",
    ):
        READ[what]()


@pytest.mark.parametrize("make", [folder_for, file_for])
def test_whatever_writes_says_so(make):
    for name in ("s3://bucket/out", Path("s3://bucket/out")):
        with pytest.raises(InputError, match="-o 's3://bucket/out' is an address, and only local"):
            make(name, "-o")
    assert not Path("s3:").exists()


def test_a_list_of_addresses(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "list.txt").write_text(f"a.png\n{AT}.png\ns3://bucket/b.png\n")
    sources, problems = find_pictures([str(tmp_path / "list.txt")])
    assert len(sources) == 1 and [line.split(" is an")[0] for line in problems] == [
        f"'{AT}.png'",
        "'s3://bucket/b.png'",
    ]
    (tmp_path / "all.txt").write_text(f"{AT}.png\n")
    with pytest.raises(InputError, match=f"'{AT}.png' is an address"):
        find_pictures([str(tmp_path / "all.txt")])


@pytest.mark.parametrize(
    "command",
    [
        ["segment", AT, "--labels", "cat"],
        ["eval", "pacl_tiny", "--data", "voc20", "--root", AT],
        ["data", "check", "voc20", "--root", AT],
        ["data", "superpixels", AT, "--out", "x.safetensors"],
        ["data", "entities", AT + ".tsv", "--out", "x.tsv"],
        ["train", AT + ".yaml"],
        ["convert", AT + ".bin", "segclip_vit_b16", "--out", "x"],
    ],
)
def test_the_command_line(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    assert (
        AT in (told := capsys.readouterr().err)
        and "is an address" in told
        and not list(tmp_path.iterdir())
    )


def test_a_root_that_is_an_address_is_no_damaged_data():
    with pytest.raises(DataError) as found:
        SegmentationSet("voc20", AT)
    assert isinstance(found.value, InputError)  # exit code 2
