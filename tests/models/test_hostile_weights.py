"""Folders and files of weights that somebody else made: no code of theirs runs, nothing absurd is
built, nothing is read without an end."""

import copy
import json
import os

import numpy as np
import pytest
import torch
from hub_stand_in import CONFIG
from safetensors.torch import save_file

import ovseg
from ovseg.cli.main import main
from ovseg.errors import CheckpointError, ConfigError, InputError, first_line
from ovseg.systems.sizes import SizeError
from ovseg.weights.transformers_layout import folder_weights


@pytest.fixture(scope="module")
def clip():
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    torch.manual_seed(2)
    return open_clip.CLIP(**CONFIG)


class Evil:
    def __reduce__(self):
        return print, ("this must never run",)


@pytest.mark.third_trial(12)
@pytest.mark.parametrize("old", [False, True])
def test_nobody_is_told_to_run_the_code_of_a_file(tmp_path, capsys, old):
    torch.save(
        {"a": torch.ones(1), "b": Evil()},
        tmp_path / "evil.pt",
        _use_new_zipfile_serialization=not old,
    )
    assert (
        main(
            [
                "convert",
                str(tmp_path / "evil.pt"),
                "segclip_vit_b16",
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 1
    )
    said = capsys.readouterr()
    assert "cannot be read without running code" in said.err and "never" not in said.out
    assert old or "it names builtins.print; expected names and tensors alone" in said.err
    np.save(tmp_path / "rows.npy", np.array([{}], dtype=object), allow_pickle=True)
    from ovseg.data.class_lists import read_class_embeddings

    with pytest.raises(
        InputError, match=r"rows\.npy cannot be read: .*; expected a \.npy file \[1, 2\]"
    ) as rows:
        read_class_embeddings(tmp_path / "rows.npy", 1, 2)
    (tmp_path / "junk.npy").write_bytes(b"junk")
    with pytest.raises(InputError, match="cannot be read") as junk:
        read_class_embeddings(tmp_path / "junk.npy", 1, 2)
    advice = first_line(
        ValueError(
            "Please pass the argument `trust_remote_code=True` to allow custom code to be run."
        )
    )
    for text in (said.err, str(rows.value), str(junk.value), advice):
        assert not any(
            word in text
            for word in ("weights_only", "allow_pickle", "trust_remote_code", "unsafely")
        )
    os.mkfifo(tmp_path / "fifo.npy")
    with pytest.raises(InputError, match="it is a FIFO"):
        read_class_embeddings(tmp_path / "fifo.npy", 1, 2)


@pytest.mark.third_trial(12)
def test_a_folder_cannot_ask_for_its_code_to_be_run(tmp_path, monkeypatch):
    """transformers asks on the terminal unless it is told; a configuration must not tell it
    either."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from ovseg.weights.tokenizers import ClipTokenizer, clip_tokenizer

    ran = tmp_path / "ran"
    (tmp_path / "words.py").write_text(f"open({str(ran)!r}, 'w')\nclass Words: pass\n")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["words.Words", None]}})
    )
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks on the terminal"))
    text = {**CONFIG["text_cfg"], "hf_tokenizer_name": str(tmp_path)}
    with pytest.raises(
        InputError,
        match=r"the tokenizer of .* cannot be loaded .*ValueError: it holds code, which is not run",
    ):
        ClipTokenizer({**CONFIG, "text_cfg": text})("a cat")
    with pytest.raises(
        CheckpointError, match="tokenizer_kwargs holds 'trust_remote_code'; expected some of"
    ):
        clip_tokenizer(
            {**CONFIG, "text_cfg": {**text, "tokenizer_kwargs": {"trust_remote_code": True}}}
        )
    assert not ran.exists()
    config = {
        "model_cfg": {
            **CONFIG,
            "text_cfg": {**CONFIG["text_cfg"], "hf_model_name": "somebody/model"},
        },
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match="has transformers' 'somebody/model' as text tower; expected one of"
    ):
        ovseg.from_pretrained(str(tmp_path))


TINY = ["clip_dense", "groupvit", "mgca", "ovsegmentor", "pacl", "segclip", "zegclip"]
ABSURD = [
    10**9,
    2**63 - 1,
    10**400,
    -1,
    0,
    1e18,
    "9" * 30,
    "1_000_000_000",
    [1],
    {"a": 1},
    "wide",
]  # the last one last


@pytest.mark.third_trial(12)
@pytest.mark.parametrize("system", TINY)
def test_absurd_sizes_are_refused_before_anything_is_made(system, tmp_path, monkeypatch):
    from ovseg.systems import registry

    name = f"{system}_tiny"
    folder = ovseg.save_pretrained(ovseg.create_model(name), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    made = []
    kind = registry.system_type(system)
    begin = kind.__init__

    def counted(self, options):
        made.append(torch.empty(0).device.type)
        begin(self, options)

    monkeypatch.setattr(kind, "__init__", counted)
    layers = "depths" if system in ("groupvit", "ovsegmentor") else "depth"
    for key in ("width", "heads", layers, "image_size"):
        for value in ABSURD:
            if key == layers and value in (0, [1], {"a": 1}, "wide"):  # none is a depth too
                continue
            value = [value] * 3 if key == "depths" else value
            options = config["options"]
            changed = {**options, "backbone": {**options["backbone"], key: value}}
            (folder / "config.json").write_text(json.dumps({**config, "options": changed}))
            made.clear()
            with pytest.raises((CheckpointError, ConfigError, ValueError)) as found:
                ovseg.from_pretrained(folder)
            # What is no number is refused by its kind, where a real one begins to be built.
            assert len(str(found.value)) < 1000 and (value == "wide" or "cpu" not in made), (
                key,
                value,
            )


@pytest.mark.third_trial(12)
def test_a_configuration_larger_than_its_weights_is_refused(tmp_path, capsys):
    folder = ovseg.save_pretrained(ovseg.create_model("pacl_tiny"), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    for sizes, message in (
        (
            {"width": 16384},
            r"config\.json is damaged: options of pacl_tiny make a model of .* numbers; expected "
            r"at most 5",
        ),
        (
            {"heads": 10**9},
            r"config\.json is damaged: options of pacl_tiny: backbone\.heads is 1000000000; expected "
            r"at most 1000000",
        ),
        ({"depth": 5000}, "depth is 5000; expected at most 1000"),
    ):
        options = {**config["options"], "backbone": {**config["options"]["backbone"], **sizes}}
        (folder / "config.json").write_text(json.dumps({**config, "options": options}))
        with pytest.raises(CheckpointError, match=message):
            ovseg.from_pretrained(folder)
        assert main(["segment", "--demo", "-m", str(folder), "-o", str(tmp_path / "out")]) == 1
    with pytest.raises(SizeError, match=r"make a model of .* numbers; expected at most 2e"):
        ovseg.create_model("pacl_tiny", width=65536, depth=100)
    capsys.readouterr()


@pytest.mark.third_trial(12)
@pytest.mark.parametrize(
    "part,key,value",
    [
        ("vision_cfg", "layers", 10**9),
        ("vision_cfg", "width", 2**63 - 1),
        ("vision_cfg", "image_size", 10**6),
        ("vision_cfg", "width", "a"),
        ("text_cfg", "heads", 10**9),
        ("text_cfg", "context_length", 60000),
        ("text_cfg", "vocab_size", 10**9),
        ("text_cfg", "layers", -1.5),
        ("vision_cfg", "head_width", 0),
        ("vision_cfg", "patch_size", 0),
        ("text_cfg", "width", [1]),
    ],
)
def test_configurations_of_open_clip_are_bounded_too(clip, tmp_path, part, key, value):
    config = copy.deepcopy(
        {"model_cfg": CONFIG, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    )
    config["model_cfg"][part][key] = value
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    save_file(clip.state_dict(), tmp_path / "open_clip_model.safetensors")
    with pytest.raises((CheckpointError, ValueError)):
        ovseg.from_pretrained(str(tmp_path))


@pytest.mark.third_trial(12)
@pytest.mark.parametrize("kind", ["clip", "siglip", "groupvit"])
def test_configurations_of_transformers_are_bounded_too(kind, tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "spiece.model").write_text("")
    for key, value in (
        ("hidden_size", 0),
        ("hidden_size", 10**9),
        ("num_hidden_layers", 10**7),
        ("num_attention_heads", "8"),
        ("intermediate_size", -4),
        ("image_size", 2.5),
        ("patch_size", True),
    ):
        for part in ("vision_config", "text_config"):
            (tmp_path / "config.json").write_text(
                json.dumps({"model_type": kind, part: {key: value}})
            )
            with pytest.raises(
                CheckpointError, match=rf"{part}\.{key} is .*; expected 1 to 1000000"
            ):
                ovseg.from_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "vision_config": [1]}))
    with pytest.raises(
        CheckpointError, match=r"vision_config is '\[1\]'; expected names and values"
    ):
        ovseg.from_pretrained(str(tmp_path))


@pytest.mark.third_trial(12)
@pytest.mark.parametrize("name", ["config.json", "open_clip_config.json"])
def test_configurations_are_plain_files_of_bounded_length(tmp_path, name, monkeypatch):
    from ovseg.weights import files as json_files

    path = tmp_path / name
    if name == "config.json":
        os.mkfifo(path)
        with pytest.raises(CheckpointError, match="is a FIFO"):
            ovseg.from_pretrained(str(tmp_path))
        path.unlink()
    for text in ("[" * 100_000, '{"model": ' + "[" * 100_000, '{"a":1}' + " " * 300, "9" * 5000):
        monkeypatch.setattr(json_files, "MOST", 200 if text.endswith(" ") else json_files.MOST)
        path.write_text(text)
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            ovseg.from_pretrained(str(tmp_path))


@pytest.mark.third_trial(12)
@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**63]}},
        {"a": {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}},
        {"a": []},
        [],
    ],
)
def test_headers_of_safetensors_that_lie(tmp_path, header):
    text = json.dumps(header).encode()
    (tmp_path / "w.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(CheckpointError, match=r"w\.safetensors"):
        ovseg.create_model("pacl_tiny", str(tmp_path / "w.safetensors"))
    (tmp_path / "w.safetensors").write_bytes((2**40).to_bytes(8, "little") + text)
    with pytest.raises(CheckpointError, match=r"w\.safetensors"):
        ovseg.create_model("pacl_tiny", str(tmp_path / "w.safetensors"))


@pytest.mark.third_trial(12)
def test_an_index_names_files_beside_it(tmp_path):
    for index in (
        {},
        {"weight_map": {"a": "../../x.safetensors"}},
        {"weight_map": {"a": 3}, "b": 1},
        {"weight_map": []},
    ):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=r"index\.json is damaged|3 does not exist"):
            folder_weights(tmp_path)
