"""Patches taught by masks, and the files of text vectors that models on photographs begin with."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import ovseg
from ovseg.data.batches import MaskBatch
from ovseg.data.entities import Entities
from ovseg.errors import CheckpointError, ConfigError, InputError
from ovseg.systems.objective import Progress, create_objective
from ovseg.systems.pacl.patch_labels import labelled_pixels, patch_loss
from ovseg.weights.teachers import read_teacher, write_teacher

CLASSES = ["background", "cat", "dog"]
WORDS = ("cat", "dog", "grass", "sky", "sofa")
TEXT = {"kind": "vectors", "width": 8, "words": {word: [] for word in WORDS}}


def model(**options):
    torch.manual_seed(0)
    return ovseg.create_model(
        "pacl_lite0",
        architecture="test_efficientnet",
        weights=None,
        image_size=64,
        stages=[2, 4],
        last=False,
        text=TEXT,
        **options,
    )


def batch(masks):
    images = torch.randint(0, 255, (len(masks), 3, 64, 64), dtype=torch.uint8)
    return MaskBatch(images=images, masks=masks)


def masks(count=3, seed=0):
    rng = torch.Generator().manual_seed(seed)
    found = torch.randint(0, 3, (count, 64, 64), generator=rng)
    return found.masked_fill(torch.rand(found.shape, generator=rng) < 0.2, 255)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_pixels_are_counted(grid):
    """Of every patch and class, whether the sides are whole patches or not."""
    truth = masks()
    found = labelled_pixels(batch(truth), grid, 3)
    expected = torch.zeros(3, *grid, 3)
    for b, y, x in np.ndindex(3, 64, 64):
        if truth[b, y, x] != 255:
            expected[b, y * grid[0] // 64, x * grid[1] // 64, truth[b, y, x]] += 1
    assert torch.equal(found, expected.flatten(1, 2))


def test_the_loss_is_the_cross_entropy_of_the_pixels():
    """Each pixel has the probabilities of its patch; several words are the background."""
    truth = masks()
    pixels = labelled_pixels(batch(truth), (4, 4), 3).double()
    scores = torch.randn(3, 16, 5, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    own = [slice(2, None), slice(0, 1), slice(1, 2)]
    found = patch_loss(scores, pixels, own, scale)
    p = (scale * scores).softmax(2)
    of_class = torch.stack([p[:, :, 2:].sum(2), p[:, :, 0], p[:, :, 1]], 1).unflatten(2, (4, 4))
    whole = F.interpolate(of_class.log(), (64, 64), mode="nearest")
    for i in range(3):
        known = truth[i] != 255
        expected = F.nll_loss(whole[i][:, known].T, truth[i][known])
        torch.testing.assert_close(found[i], expected)
    assert torch.autograd.gradcheck(lambda s, t: patch_loss(s, pixels, own, t), (scores, scale))
    nothing = patch_loss(scores, torch.zeros_like(pixels), own, scale)
    assert nothing.tolist() == [0, 0, 0]


def test_the_objective():
    """It learns masks, on all patches or some; the trunk and the background's name stay out."""
    objective = create_objective(model(), classes=CLASSES, stuff=["grass", "sky"], patches=9)
    assert objective.classes.own == [slice(2, None), slice(0, 1), slice(1, 2)]
    assert len(objective.classes.token_ids) == 4
    truth = torch.zeros(2, 64, 64, dtype=torch.int64)
    truth[0, :, :32] = 1
    truth[1, 32:] = 2
    given = batch(truth)
    optimizer = torch.optim.AdamW(objective.model.parameters(), 1e-2)
    losses = []
    for step in range(30):
        loss = objective(given, Progress(step, 30))["total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    features = objective.seen(given)
    rows = objective.encode(given, Progress())
    assert rows["tokens"].shape == (2, 9, 8) and rows["pixels"].shape == (2, 9, 3)
    assert features.tokens.shape[1] > 9


@pytest.mark.bad_input("systems", "masks for PACL")
def test_what_cannot_be_taught():
    ours = model()
    with pytest.raises(ConfigError, match=r"classes has 'unicorn', which the model does not know"):
        create_objective(ours, classes=["cat", "unicorn"])
    with pytest.raises(ConfigError, match=r"which has a background, and objective.options.stuff"):
        create_objective(ours, classes=CLASSES)
    objective = create_objective(ours, classes=["cat", "dog"])
    with pytest.raises(InputError, match=r"batch.masks holds 2; expected 0 to 1, or 255"):
        objective(batch(masks()))

    class Given:
        batch_type = MaskBatch
        classes = ("dog", "cat")

    with pytest.raises(ConfigError, match=r"data gives 2 classes \(dog, cat.* expected the same"):
        objective.check_source(Given)
    with pytest.raises(ConfigError, match=r"objective.options.classes is null; expected pictures"):
        create_objective(ours).check_source(Given)


def test_a_teacher_is_made_of_arrays(tmp_path):
    """Names behind a hyphen are folded, names of several files too; the center is the mean."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((4, 6)).astype(np.float16)
    b = rng.standard_normal((2, 6)).astype(np.float32)
    np.save(tmp_path / "a.npy", a)
    np.save(tmp_path / "b.npy", b)
    tables = [
        (["wall-brick", "Cat", "wall-other", "door-stuff"], tmp_path / "a.npy"),
        (["cat", "tv monitor"], tmp_path / "b.npy"),
    ]
    write_teacher(tmp_path / "t.npz", tables, 6)
    teacher = read_teacher(tmp_path / "t.npz", 6)
    units = [F.normalize(torch.from_numpy(x.astype(np.float32)), dim=1) for x in (a, b)]
    expected = {
        "wall": (units[0][0] + units[0][2]) / 2,
        "cat": (units[0][1] + units[1][0]) / 2,
        "door": units[0][3],
        "tv monitor": units[1][1],
    }
    expected = {name: F.normalize(x, dim=0) for name, x in expected.items()}
    assert list(teacher.vectors) == list(expected)
    for name, vector in expected.items():
        torch.testing.assert_close(teacher.vectors[name], vector)
    center = torch.stack(list(expected.values())).mean(0)
    torch.testing.assert_close(teacher.center, center)
    words = Entities({"tv monitor": ["tv"], "wall": []})
    torch.testing.assert_close(teacher.rows_for(words)[1], expected["wall"] - center)
    with pytest.raises(InputError, match=r"expected floats of \[4, 5\]"):
        write_teacher(tmp_path / "t.npz", tables, 5)
    np.save(tmp_path / "b.npy", 0 * b)
    with pytest.raises(CheckpointError, match=r"b.npy holds a row of zeros; expected text emb"):
        write_teacher(tmp_path / "t.npz", tables, 6)
