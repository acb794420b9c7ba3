"""MGCA's objective against its definitions in plain torch: values and gradients in float64,
sampling, warm-up, ids, options.
"""

from dataclasses import replace

import pytest
import torch

import ovseg
import ovseg_kernels as ok
from ovseg.data.batches import PairBatch
from ovseg.errors import ConfigError
from ovseg.nn.units import cluster, mean_weights
from ovseg.systems.mgca import reference as mgca_reference
from ovseg.systems.objective import Progress, create_objective

B, SIDE = 5, 24
BACKBONE = {"width": 16, "embed_dim": 16, "local_depth": 1, "depth": 2, "text_depth": 1}
LATE = Progress(step=9, steps=10, seed=3)
SAMPLINGS = {
    "topk": {},
    "window": {"sampling": "topk", "skip": 7},
    "semi": {"sampling": "semi", "margin": 0.05},
    "gumbel": {"sampling": "gumbel", "sampling_temperature": 0.2},
    "random": {"sampling": "random"},
}


def an_objective(**training):
    torch.manual_seed(2)
    model = ovseg.create_model(
        "mgca_tiny", backbone=dict(BACKBONE), trained=["decoder", "scale"], hidden=8
    ).double()
    with torch.no_grad():
        for layer in model.decoder.layers:  # it begins as nothing
            layer.leave.weight.normal_(std=0.1)
    small = {"regions": 4, "positives": 5, "negatives": 9}
    return create_objective(model.train(), **{**small, **training})


def a_batch(captions=2):
    g = torch.Generator().manual_seed(4)
    tokens = torch.randint(3, 20, (B * captions, 6), generator=g)
    tokens[:, 0], tokens[:, -1] = 1, 2
    ids = torch.tensor([0, 0, 2, 3, 4])  # two pictures of one id
    return PairBatch(
        torch.rand(B, 3, SIDE, SIDE, generator=g, dtype=torch.float64),
        tokens,
        ids,
        ids.repeat_interleave(captions),
    )


def rows_of(objective, batch):
    """Leaves in float64 in place of what the model gives."""
    with torch.no_grad():
        return {
            name: x.double().detach().requires_grad_()
            for name, x in objective.encode(batch, LATE).items()
        }


def expected(objective, rows, batch, rng=None):
    """The three losses by ``mgca_reference``."""
    o, tokens, text = objective.options, rows["tokens"], rows["text"]
    own, scale = batch.text_ids[:, None] == batch.image_ids, objective.model.logit_scale
    return {
        "object": mgca_reference.object_loss(
            tokens, text, own, scale, objective.model.options.temperature
        ),
        "region": mgca_reference.region_loss(tokens, text, own, scale, o.regions),
        "pixel": mgca_reference.dense_loss(tokens, text, own, scale, o, rng),
    }


def check(objective, batch):
    rng = (
        LATE.rng("cpu", "negatives") if objective.options.sampling in ("gumbel", "random") else None
    )
    rows, scale = rows_of(objective, batch), objective.model.log_scale
    found, right = objective.loss(rows, batch, LATE, None), expected(objective, rows, batch, rng)
    leaves = [rows["tokens"], rows["text"], scale]
    for name, value in right.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-10), name
        ours, theirs = (
            torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (found[name], value)
        )
        for a, b in zip(ours, theirs, strict=True):
            assert (
                float((a - b).abs().max()) < 1e-10 * max(1.0, float(b.abs().max()))
                and float(b.abs().max()) > 1e-8
            ), name
    assert found["total"].item() == pytest.approx(
        sum(objective.weights[name] * x.item() for name, x in right.items()), rel=1e-10
    )


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_losses_and_gradients_are_those_of_the_definitions(sampling, backend):
    with ok.backend(backend):
        check(an_objective(**SAMPLINGS[sampling]), a_batch())


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "log_of_sum"},
        {"terms": "text_to_pixel"},
        {"terms": "pixel_to_text"},
        {"weights": {"object": 0.5, "region": 2.0, "pixel": 3.0}},
        {"regions": 1},
        {"positives": 400, "negatives": 999},
    ],
    ids=str,
)
def test_options_are_those_of_the_definitions(options):
    check(an_objective(**options), a_batch())


def means_of(x, labels, count):
    return mean_weights(labels, count, x.dtype).transpose(1, 2) @ x


def test_clusters_and_their_means():
    x = torch.randn(
        3,
        40,
        6,
        generator=torch.Generator().manual_seed(0),
        dtype=torch.float64,
        requires_grad=True,
    )
    labels = cluster(x, 5)
    assert torch.equal(labels, mgca_reference.clusters(x, 5))
    torch.testing.assert_close(means_of(x, labels, 5), mgca_reference.region_units(x, labels, 5))
    means_of(x, labels, 5).square().sum().backward()
    assert x.grad.abs().sum(-1).gt(0).all()
    few = cluster(
        x[:, :3], 5
    )  # fewer pixels than groups: the rest is empty, and its mean that of all
    assert int(few.max()) == 2
    torch.testing.assert_close(means_of(x[:, :3], few, 5)[:, 3], x[:, :3].mean(1))
    same = torch.ones(1, 9, 4)
    assert means_of(same, cluster(same, 3), 3).isfinite().all()


def test_pixels_wait_for_the_other_levels():
    objective, batch = (
        an_objective(pixel_start=0.3, pixel_ramp=0.4, weights={"pixel": 2.0}),
        a_batch(),
    )
    assert [
        round(objective.pixel_weight(share), 6) for share in (0.0, 0.3, 0.4, 0.5, 0.7, 1.0)
    ] == [0.0, 0.0, 0.5, 1.0, 2.0, 2.0]
    early, late = objective(batch, Progress(2, 10)), objective(batch, Progress(5, 10))
    assert set(early) == {"total", "object", "region"} and set(late) == {*early, "pixel"}
    assert late["total"].item() == pytest.approx(
        (late["object"] + late["region"] + late["pixel"]).item()
    )
    assert an_objective(pixel_start=0.0, pixel_ramp=0.0).pixel_weight(0.0) == 1.0


@pytest.mark.parametrize("level", ["object", "region", "pixel"])
def test_each_level_alone_trains_the_decoder(level):
    weights = {name: float(name == level) for name in ("object", "region", "pixel")}
    objective = an_objective(weights=weights)
    losses = objective(a_batch(), LATE)
    assert set(losses) == {"total", level}
    losses["total"].backward()
    assert all(float(p.grad.abs().max()) > 0 for p in objective.model.parts()["decoder"])
    assert all(p.grad is None for p in objective.model.backbone.parameters())


def test_equal_ids_are_no_negatives():
    """The text of the first picture pulls the second, which has its id, and pushes the others."""
    objective, batch = (
        an_objective(weights={"object": 0.0, "region": 0.0}, terms="text_to_pixel", negatives=999),
        a_batch(1),
    )
    rows = rows_of(objective, batch)
    rows["text"] = rows["text"][:1].detach().requires_grad_()
    given = replace(
        batch,
        image_ids=torch.tensor([0, 0, 8, 9, 10]),
        text_ids=torch.tensor([0]),
        token_ids=batch.token_ids[:1],
    )
    (gradient,) = torch.autograd.grad(
        objective.loss(rows, given, LATE, None)["total"], rows["tokens"]
    )
    q = torch.nn.functional.normalize(rows["text"][0], dim=0)
    assert bool((gradient[1] @ q <= 1e-12).all()) and bool((gradient[2:] @ q >= -1e-12).all())


def test_noise_is_of_the_step_and_not_of_the_rank():
    objective, batch = an_objective(sampling="random"), a_batch()
    values = [
        float(objective(batch, replace(LATE, **at))["pixel"].detach())
        for at in ({}, {"rank": 1}, {"seed": 4}, {"step": 8})
    ]
    assert values[0] == values[1] and len(set(values)) == 3


def test_scale_stays_below_100():
    objective = an_objective()
    objective.model.log_scale.data.fill_(9.0)
    objective.after_step(LATE)
    assert objective.model.logit_scale.item() == pytest.approx(100.0)


@pytest.mark.bad_input("training", "an objective's option that means nothing")
@pytest.mark.parametrize(
    "options,message",
    [
        ({"weights": {"part": 1.0}}, r"weights names \['part'\]; expected some of"),
        ({"weights": {"pixel": -1.0}}, r"weights\.pixel is -1"),
        ({"sampling": "hard"}, "sampling is 'hard'; expected one of"),
        ({"reduction": "mean"}, "reduction is 'mean'"),
        ({"terms": "one"}, "terms is 'one'"),
        ({"regions": 0}, "regions is 0; expected 1 or more"),
        ({"negatives": 0}, "negatives is 0"),
        ({"positives": 0}, "positives is 0"),
        ({"skip": -1}, "skip is -1; expected 0 or more"),
        ({"margin": 0.0}, "margin is"),
        ({"sampling_temperature": 0.0}, "sampling_temperature is"),
        ({"pixel_start": 1.5}, r"pixel_start is 1\.5; expected 0 to 1"),
        ({"region": 3}, "region: unknown key, did you mean objective mgca.regions"),
    ],
)
def test_options_that_mean_nothing(options, message):
    with pytest.raises(ConfigError, match=message):
        create_objective(ovseg.create_model("mgca_tiny"), **options)
