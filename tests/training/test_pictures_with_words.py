"""Objectives on pictures with words, against their formulas written out one pair at a time."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import ovseg
import ovseg_kernels as ok
from ovseg.data.batches import PairBatch, TagBatch
from ovseg.errors import ConfigError
from ovseg.systems.objective import Progress, create_objective

BACKBONE = {"width": 16, "embed_dim": 16, "local_depth": 1, "depth": 1, "text_depth": 1}
WORDS = ["a red one", "water", "grass", "a blue six", "sand"]
TRUE = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 1, 0], [1, 1, 0, 1, 0]], dtype=torch.bool)
COUNTED = torch.tensor([[1, 1, 1, 0, 1], [1, 1, 0, 1, 1], [1, 1, 1, 1, 0]], dtype=torch.bool)
STUFF = ["grass", "water"]


def an_objective(name="pacl_tiny", objective=None, **options):
    torch.manual_seed(1)
    model = ovseg.create_model(name, backbone=dict(BACKBONE)).double()
    return create_objective(model.train(), objective, **options)


def a_batch(objective):
    g = torch.Generator().manual_seed(2)
    images = torch.rand(3, 3, 24, 24, generator=g, dtype=torch.float64)
    return TagBatch(images, objective.model.tokenizer(WORDS), TRUE, COUNTED)


ALIKE = (1.0,) * len(WORDS)


def contrast(z, weights=ALIKE):
    """Rows and columns apart, a pair at a time."""
    sides = []
    p = TRUE * torch.tensor(weights, dtype=torch.float64)
    for scores, shares, counted in ((z, p, COUNTED), (z.T, p.T, COUNTED.T)):
        terms = []
        for row, share, known in zip(scores, shares, counted, strict=True):
            if share.any():
                mean = (share * row).sum() / share.sum()
                terms.append(torch.logsumexp(row[known], 0) - mean)
        sides.append(sum(terms) / len(terms))
    return sum(sides) / 2


def test_pacl_contrasts_several_true_words():
    objective = an_objective()
    batch = a_batch(objective)
    model = objective.model
    tokens = model(batch.images).tokens
    text = model.encode_text(batch.token_ids)
    phi = ok.patch_text_similarity(tokens, text, temperature=model.temperature)
    found = objective(batch)
    assert found.keys() == {"total"}
    expected = contrast(model.logit_scale * phi.detach())
    assert found["total"].item() == pytest.approx(expected.item(), 1e-10)
    weights = torch.tensor([0.5, 1.0, 0.1, 2.0, 1.0], dtype=torch.float64)
    weighted = objective(replace(batch, weights=weights))["total"].item()
    expected = contrast(model.logit_scale * phi.detach(), weights.tolist())
    assert weighted == pytest.approx(expected.item(), 1e-10)


def test_the_image_level_contrast_takes_them_for_any_model():
    objective = an_objective(objective="clip_dense")
    batch = a_batch(objective)
    model = objective.model
    cosines = (
        F.normalize(model(batch.images).embedding, dim=-1)
        @ F.normalize(model.encode_text(batch.token_ids), dim=-1).mT
    )
    expected = contrast(model.logit_scale * cosines)
    assert float(objective(batch)["total"]) == pytest.approx(float(expected), 1e-10)


def self_training(objective, batch, keep, penalty, counted=False):
    """Equations (2) and (3) of the objective, a patch at a time."""
    model = objective.model
    tokens = F.normalize(model(batch.images).tokens, dim=-1)
    text = F.normalize(model.encode_text(batch.token_ids), dim=-1)
    stuff = {WORDS.index(word) for word in STUFF}
    pictures = []
    for i, patches in enumerate(tokens):
        said = set(TRUE[i].nonzero().flatten().tolist())
        candidates = sorted(said | stuff)
        over = set(COUNTED[i].nonzero().flatten().tolist()) if counted else set()
        over = sorted(over | set(candidates))
        found = []
        for patch in patches:
            scores = patch @ text.T
            lower = [scores[j] - penalty * (j in stuff - said) for j in candidates]
            label = candidates[int(torch.stack(lower).argmax())]
            log = F.log_softmax(model.logit_scale * scores[over], 0)[over.index(label)]
            found.append(log)
        surest = sorted(found, key=float, reverse=True)[: round(keep * len(found))]
        pictures.append(-torch.stack(surest).mean())
    return torch.stack(pictures).mean()


@pytest.mark.parametrize(("penalty", "rivals"), [(0.0, "candidates"), (0.3, "counted")])
def test_self_training_is_its_formula(penalty, rivals):
    options = {"self_training": 0.7, "keep": 0.5, "stuff": STUFF, "penalty": penalty}
    options["rivals"] = rivals
    objective = an_objective(**options)
    batch = a_batch(objective)
    found = objective(batch)
    expected = self_training(objective, batch, 0.5, penalty, rivals == "counted")
    assert float(found["self_training"]) == pytest.approx(float(expected), 1e-10)
    assert float(found["total"]) == pytest.approx(
        float(found["contrast"] + 0.7 * found["self_training"]), 1e-12
    )
    found["total"].backward()
    gradients = [p.grad for p in objective.model.embedder.parameters()]
    assert all(g is not None and bool(g.isfinite().all()) for g in gradients)


def test_some_patches_of_each_picture_take_part():
    objective = an_objective(patches=7)
    batch = a_batch(objective)
    seen = [objective.encode(batch, Progress(step))["tokens"] for step in (0, 0, 1)]
    assert seen[0].shape == (3, 7, 16)
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
    whole = objective.model(batch.images).tokens
    for some, all_ in zip(seen[0], whole, strict=True):  # each is a patch of its own picture, once
        near = torch.cdist(some, all_).argmin(1)
        assert len(near.unique()) == 7
        assert torch.allclose(some, all_[near])
    last = objective.encode(replace(batch, images=batch.images[2:]), Progress(0, first=2))
    assert torch.allclose(last["tokens"][0], seen[0][2])  # whichever process a picture falls to
    everything = an_objective(patches=1000).encode(batch, Progress())["tokens"]
    assert everything.shape == whole.shape


def test_mgca_draws_a_true_word_for_its_pixels():
    options = {"regions": 2, "positives": 3, "negatives": 5, "pixel_start": 0.0}
    objective = an_objective("mgca_tiny", **options)
    batch = a_batch(objective)
    found = objective(batch, Progress(9, 10))
    assert found.keys() == {"total", "object", "region", "pixel"}
    found["total"].backward()
    steps = {float(objective(batch, Progress(step, 10))["pixel"].detach()) for step in (7, 8, 9)}
    assert len(steps) > 1  # drawn anew in every step


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stuff": ["grass", "zebra"]}, "stuff has 'zebra', which the model does not know"),
        ({"stuff": 3}, "stuff is 3; expected a list of entities"),
        ({"stuff": "no_such_list"}, "no_such_list"),
        ({"keep": 0.0}, "keep is 0.0"),
        ({"self_training": -1.0}, "self_training is -1.0"),
        ({"patches": 0}, "patches is 0"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        an_objective(**options)


def test_self_training_needs_words():
    class Pairs:
        batch_type = PairBatch

    an_objective().check_source(Pairs())
    with pytest.raises(ConfigError, match=r"expected 0, or pictures with words"):
        an_objective(self_training=1.0).check_source(Pairs())
