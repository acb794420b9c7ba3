"""Shards as they are found: cut off anywhere, put together, with names twice, hostile headers;
ranges of their names.
"""

import io
import os
import tarfile
import time

import numpy as np
import pytest
from PIL import Image

from ovseg.cli.main import main
from ovseg.data.shards import expand_braces, read_shard
from ovseg.errors import InputError
from ovseg.inference.sources import find_pictures


def picture(seed=0):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (30, 40, 3), np.uint8)).save(
        buffer, "PNG"
    )
    return buffer.getvalue()


def archive(members, **options):
    """The bytes of a .tar of (name, data) or TarInfo, or what ``change`` of (name, data, change)
    makes of its header.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            for change in member[2:]:
                change(info)
            tar.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


MEMBERS = [(f"{i}.png", picture(i)) for i in range(4)]
WHOLE = archive(MEMBERS)
SIZES = [512 + -(-len(data) // 512) * 512 for _, data in MEMBERS]  # with header and padding
STARTS = [sum(SIZES[:i]) for i in range(4)]  # of the headers
END = sum(SIZES)


def named(name, kind):
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = "0.png"
    return info


def header_of_size(field):
    """A member whose header gives its size by twelve bytes of ours."""
    info = tarfile.TarInfo("9.png")
    raw = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    raw[124:136] = field
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


CUT = {  # bytes, pictures that can be used, what is said
    "in a later header": (WHOLE[: STARTS[2] + 100], 2, "a header is cut off at byte"),
    "at a boundary": (WHOLE[: STARTS[2]], 2, "the block that ends an archive is missing"),
    "behind the last member": (WHOLE[:END], 4, "the block that ends an archive is missing"),
    "in the data of a member": (WHOLE[: STARTS[2] + 700], 2, "ends .* bytes behind the file"),
    "in the padding of the last member": (WHOLE[: END - 3], 4, "unexpected end of data"),
    "in the first header": (WHOLE[:100], 0, "cut off after 0 pictures"),
    "empty": (b"", 0, "empty file"),
    "with a damaged header": (
        WHOLE[: STARTS[2]] + b"x" * 512 + WHOLE[STARTS[2] + 512 :],
        2,
        "the header at byte .* is damaged",
    ),
    "put together by cat": (
        WHOLE + archive([("9.png", picture(9))]),
        4,
        "more follows its end .* put together by cat",
    ),
    "gzipped under the name of a .tar": (
        b"\x1f\x8b" + bytes(600),
        0,
        "expected an uncompressed .tar",
    ),
    "no archive": (b"<html>not found</html>" * 99, 0, "damaged or cut off after 0"),
    "a size below zero": (
        WHOLE[: STARTS[2]] + header_of_size(b"\xff" * 10 + b"\xfc\x00") + WHOLE[STARTS[2] :],
        2,
        "header at byte",
    ),
    "a size of 2^63": (
        WHOLE[: STARTS[2]] + header_of_size(b"\x80\0\0\0\x7f" + b"\xff" * 7),
        2,
        "bytes behind the file",
    ),
    "a chain of long names": (
        WHOLE[: STARTS[2]] + archive([named("././@LongLink", tarfile.GNUTYPE_LONGNAME)] * 5000),
        2,
        "off after 2",
    ),
}


@pytest.mark.parametrize(
    "what",
    [pytest.param(what, marks=pytest.mark.bad_input("shards", what), id=what) for what in CUT],
)
def test_damaged_shards_are_named_and_the_rest_is_used(tmp_path, what):
    data, pictures, message = CUT[what]
    (tmp_path / "s.tar").write_bytes(data)
    began = time.time()
    shard = read_shard(tmp_path / "s.tar")
    assert [str(member.name) for member in shard.members] == [
        f"{i}.png" for i in range(pictures)
    ] and time.time() - began < 5
    assert len(shard.bad) == 1 and not shard.whole and str(tmp_path / "s.tar") in shard.bad[0]
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(shard.bad[0])


@pytest.mark.parametrize("what", ["in a later header", "at a boundary"])
def test_the_command_goes_on_and_says_so(tmp_path, what, capsys):
    (tmp_path / "s.tar").write_bytes(CUT[what][0])
    command = [
        "segment",
        str(tmp_path / "s.tar"),
        "-m",
        "pacl_tiny",
        "--labels",
        "gravel,grass",
        "--format",
        "json",
    ]
    assert main([*command, "-o", str(tmp_path / "out")]) == 3
    printed = capsys.readouterr()
    assert "2 pictures into" in printed.out and printed.err.count("cut off after 2 pictures") == 1
    assert len(list((tmp_path / "out").rglob("*.json"))) == 2


def test_whole_shards_have_nothing_wrong(tmp_path):
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        long = "d/" * 60 + "größe.png"
        (tmp_path / "s.tar").write_bytes(
            archive(
                [*MEMBERS, (long, picture(5)), ("0.txt", b"a caption")]
                if form != tarfile.USTAR_FORMAT
                else MEMBERS,
                format=form,
            )
        )
        shard = read_shard(tmp_path / "s.tar")
        assert (
            shard.bad == []
            and shard.whole
            and len(shard.members) == (4 if form == tarfile.USTAR_FORMAT else 5)
        )
        source = find_pictures([str(tmp_path / "s.tar")])[0][3]
        assert source.read() == MEMBERS[3][1]
    (tmp_path / "long.tar").write_bytes(WHOLE + bytes(1 << 20))  # zeros behind the end are an end
    assert read_shard(tmp_path / "long.tar").bad == []


def sparse(info):
    info.pax_headers = {
        "GNU.sparse.major": "0",
        "GNU.sparse.minor": "1",
        "GNU.sparse.size": "9999",
        "GNU.sparse.map": "0,10",
    }


ODD = {  # a member beside four good ones -> what is said
    "a link": (named("x.png", tarfile.SYMTYPE), "a link, which is not followed"),
    "a hard link": (named("x.png", tarfile.LNKTYPE), "a link, which is not followed"),
    "a folder named like a picture": (
        named("x.png", tarfile.DIRTYPE),
        "a folder that is named like a picture",
    ),
    "a FIFO": (named("x.png", tarfile.FIFOTYPE), "no regular file"),
    "a name that leaves the folder": (
        ("../../x.png", b"x"),
        "the name leaves the folder of the results",
    ),
    "an absolute name": (("/etc/x.png", b"x"), "the name leaves the folder of the results"),
    "a format that is not read": (("x.heic", b"x"), "pictures that end in .heic are not read"),
    "a sparse member": (("x.png", b"x", sparse), r"stored with holes \(sparse\)"),
}


@pytest.mark.parametrize(
    "what",
    [
        pytest.param(what, marks=pytest.mark.bad_input("shards", f"holds {what}"), id=what)
        for what in ODD
    ],
)
def test_odd_members_are_named(tmp_path, what):
    member, message = ODD[what]
    (tmp_path / "s.tar").write_bytes(
        archive([*MEMBERS[:2], member, *MEMBERS[2:]], format=tarfile.PAX_FORMAT)
    )
    shard = read_shard(tmp_path / "s.tar")
    assert len(shard.members) == 4 and shard.whole and len(shard.bad) == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(shard.bad[0])


@pytest.mark.parametrize(
    "again",
    [
        pytest.param("0.png", marks=pytest.mark.bad_input("shards", "a member that stands twice")),
        pytest.param(
            "./0.png",
            marks=pytest.mark.bad_input("shards", "a member that stands twice, spelt otherwise"),
        ),
    ],
)
def test_of_a_member_that_stands_twice_the_last_counts(tmp_path, again, capsys):
    (tmp_path / "s.tar").write_bytes(archive([*MEMBERS, (again, picture(7))]))
    found, problems = find_pictures([str(tmp_path / "s.tar")])
    assert (
        sorted(source.name for source in found) == ["s/0", "s/1", "s/2", "s/3"] and problems == []
    )
    assert {source.name: source for source in found}["s/0"].read() == picture(7)
    assert "1 names stand twice, of which the last counts: 0.png" in capsys.readouterr().err
    command = [
        "segment",
        str(tmp_path / "s.tar"),
        "-m",
        "pacl_tiny",
        "--labels",
        "gravel",
        "--format",
        "json",
        "-o",
        str(tmp_path / "out"),
    ]
    assert main(command) == 0


@pytest.mark.bad_input("shards", "hidden members (._name)")
def test_hidden_members(tmp_path, capsys):
    (tmp_path / "s.tar").write_bytes(
        archive([("a/._0.png", b"x"), ("__MACOSX/0.png", b"x"), ("./a/0.png", picture())])
    )
    assert [source.name for source in find_pictures([str(tmp_path / "s.tar")])[0]] == ["s/a/0"]
    assert "2 hidden members are left out" in capsys.readouterr().err


def test_names_that_get_into_each_others_way(tmp_path):
    """a.png and a.jpg keep their suffix; a_png.jpg is then in the way of one of them."""
    for name in ("a.png", "a.jpg", "a_png.jpg", "b.png"):
        (tmp_path / name).write_bytes(picture())
    assert sorted(source.name for source in find_pictures([str(tmp_path)])[0]) == [
        "a_jpg",
        "a_png",
        "a_png_jpg",
        "b",
    ]


def test_ranges_are_expanded(tmp_path):
    assert expand_braces("shard-{00000..00002}.tar") == [f"shard-0000{i}.tar" for i in range(3)]
    assert expand_braces("{a,b}/{8..10}.tar") == [f"{x}/{i}.tar" for x in "ab" for i in (8, 9, 10)]
    assert expand_braces("{08..10}") == ["08", "09", "10"] and expand_braces("{0..1}") == ["0", "1"]
    assert expand_braces("a{1}{}.png") == ["a{1}{}.png"]
    for i in range(3):
        (tmp_path / f"s-{i:03}.tar").write_bytes(archive([(f"{i}.png", picture(i))]))
    names = ["s-000/0", "s-001/1", "s-002/2"]
    assert [
        source.name for source in find_pictures([str(tmp_path / "s-{000..002}.tar")])[0]
    ] == names
    (tmp_path / "list.txt").write_text("s-{000..002}.tar\n")
    assert [source.name for source in find_pictures([str(tmp_path / "list.txt")])[0]] == names
    found, problems = find_pictures(
        [str(tmp_path / "s-{001..003}.tar")]
    )  # one is missing: named, and the others are done
    assert len(found) == 2 and len(problems) == 1 and "s-003.tar' does not exist" in problems[0]
    (tmp_path / "s-{0..1}.png").write_bytes(picture())  # a file of that very name is meant
    assert find_pictures([str(tmp_path / "s-{0..1}.png")])[0][0].name == "s-{0..1}"


@pytest.mark.parametrize(
    "name,message",
    [
        pytest.param(
            "s-{5..2}.tar",
            "counts from 5 to 2",
            marks=pytest.mark.bad_input("shards", "a range that counts down"),
        ),
        pytest.param(
            "s-{0..999999999}.tar",
            "stands for 1000000000 names",
            marks=pytest.mark.bad_input("shards", "a range without end"),
        ),
        pytest.param(
            "s-{0..999}{0..999}.tar",
            "stands for 1000000 names",
            marks=pytest.mark.bad_input("shards", "ranges without end"),
        ),
        pytest.param(
            "s-{0..3}.tar",
            "s-0.tar' does not exist",
            marks=pytest.mark.bad_input("shards", "a range of which nothing is there"),
        ),
        pytest.param(
            "s.tar.gz",
            "is compressed; expected an uncompressed .tar",
            marks=pytest.mark.bad_input("shards", "compressed"),
        ),
        pytest.param(
            "fifo.tar", "fifo.tar' is a FIFO", marks=pytest.mark.bad_input("shards", "a FIFO")
        ),
        pytest.param(
            "link.tar",
            "link.tar' is a link to nothing",
            marks=pytest.mark.bad_input("shards", "a link to nothing"),
        ),
    ],
)
def test_names_of_shards_that_cannot_be(tmp_path, name, message):
    os.mkfifo(tmp_path / "fifo.tar")
    (tmp_path / "link.tar").symlink_to("gone.tar")
    with pytest.raises(InputError, match=message):
        find_pictures([str(tmp_path / name)])


@pytest.mark.bad_input("data", "a list of pictures in which some lines lead nowhere")
def test_lists_and_patterns_go_on_past_what_cannot_be(tmp_path):
    (tmp_path / "good.png").write_bytes(picture())
    (tmp_path / "a b.png").write_bytes(picture())
    (tmp_path / "empty.tar").write_bytes(archive([("a.txt", b"x")]))
    (tmp_path / "s.tar").write_bytes(WHOLE)
    (tmp_path / "no").mkdir()
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "list.txt").write_text(
        "good.png\na b.png\nempty.tar\nno\n*.webp\nlost.tar\n" + "x" * 300 + ".tar\ns.tar\n"
    )
    found, problems = find_pictures([str(tmp_path / "list.txt")])
    assert [source.name for source in found] == ["good", "a b", "s/0", "s/1", "s/2", "s/3"] and len(
        problems
    ) == 5
    assert "File name too long" in problems[-1]
    found, problems = find_pictures([str(tmp_path / "*")])
    assert len(found) == 6 and sorted(problem.split("/")[-1] for problem in problems)[
        -1
    ].startswith("fifo.png is a FIFO")
    assert any("empty.tar' holds no picture" in problem for problem in problems)


@pytest.mark.bad_input("data", "a list of pictures that is not UTF-8")
def test_a_list_that_is_not_utf_8(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"a.png\ncaf\xe9.png\n")
    with pytest.raises(InputError, match=r"list .*list\.txt' is no UTF-8 text, line 2"):
        find_pictures([str(tmp_path / "list.txt")])
