"""From a folder of pictures with captions to a label map, by the commands of the README."""

import json

import numpy as np
from PIL import Image

from ovseg.cli.main import main
from ovseg.data.scenes import Scenes


def test_train_on_a_folder_and_segment(tmp_path, capsys):
    pairs = tmp_path / "pairs" / "some"
    pairs.mkdir(parents=True)
    for scene in Scenes("shapes", "train", 20):
        Image.fromarray(scene.image).resize((90, 60)).save(pairs / f"{scene.index:03}.png")
        (pairs / f"{scene.index:03}.txt").write_text("\n".join(caption.text for caption in scene.captions))
    (pairs / "bad.png").write_bytes(b"no picture")
    (pairs / "bad.txt").write_text("a red circle")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "model: {name: pacl_tiny, options: {backbone: {width: 16, embed_dim: 16, local_depth: 1}, trained: [embedder, vision, text]}}\n"
        f"data: {{kind: folder, root: {tmp_path / 'pairs'}, image_size: 48, workers: 1}}\n"
        "optim: {lr: 2.0e-3}\nschedule: {warmup_steps: 2}\n"
        "train: {steps: 8, batch_size: 7, device: cpu}\nlog: {every_steps: 1}\ncheckpoint: {every_steps: 4}\n")
    run = tmp_path / "run"
    assert main(["train", str(recipe), f"run={run}"]) == 0
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log if "loss" in row] == list(range(8)) and all(np.isfinite(row["loss"]) for row in log if "loss" in row)
    assert (run / "loss.png").stat().st_size > 1000 and (run / "model" / "model.safetensors").exists()
    capsys.readouterr()
    picture = pairs / "000.png"
    assert main(["segment", str(picture), "--labels", "a red circle,sand", "-m", str(run), "-o", str(tmp_path / "out"), "--format",
                 "mask", "--device", "cpu"]) == 0  # fmt: skip
    (mask,) = (tmp_path / "out").rglob("*.mask.png")
    assert Image.open(mask).size == (90, 60) and "%" in capsys.readouterr().out
