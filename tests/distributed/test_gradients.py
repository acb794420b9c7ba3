"""Several processes equal one: the loss and every gradient in float64, through DDP and FSDP2, of
uneven batches, whole and in chunks.
"""

import itertools
import json
import os
from dataclasses import dataclass, replace

import pytest
import torch
from processes import run
from torch.distributed.tensor import DTensor

import ovseg
from ovseg import distributed
from ovseg.data.batches import CrossEntityBatch, MaskBatch, NounBatch, TagBatch
from ovseg.data.words import WordTokenizer
from ovseg.systems.objective import Progress, create_objective
from ovseg.training.gradients import Gradients, LossScaler, clip
from ovseg_kernels import philox

# With "+tags" on pictures with words, a vocabulary that all processes share.
SYSTEMS = (
    "pacl",
    "pacl+tags",
    "segclip",
    "clip_dense",
    "groupvit",
    "ovsegmentor",
    "zegclip",
    "mgca",
    "mgca+tags",
)
TINY = {"width": 16, "embed_dim": 16, "local_depth": 1, "depth": 1, "text_depth": 1}
GROUPING = {
    "width": 16,
    "heads": 2,
    "hidden": 32,
    "embed_dim": 16,
    "projector": 24,
    "local_depth": 1,
    "text": {"kind": "words", "width": 16, "heads": 2, "hidden": 32, "depth": 1},
}
BACKBONE = {
    "pacl": TINY,
    "segclip": TINY,
    "clip_dense": TINY,
    "zegclip": TINY,
    "mgca": TINY,
    "groupvit": {**GROUPING, "depths": [1, 1, 1], "group_tokens": [12, 5, 0], "groups": [8, 4]},
    "ovsegmentor": {**GROUPING, "depths": [1, 1], "group_tokens": [12, 0], "groups": [8]},
}
OPTIONS = {
    "pacl": {"trained": ["embedder", "scale", "vision", "text"]},
    "segclip": {"decoder": {"width": 16, "depth": 1, "heads": 2}, "second_stage": 1},
    "clip_dense": {},
    "groupvit": {"multi_label": True},
    "ovsegmentor": {"stage": 2, "entity_heads": 2},
    "zegclip": {"dropout": 0.0, "prompts": 3},
    "mgca": {"trained": ["decoder", "scale"], "hidden": 8},
}
TRAINING = {
    "groupvit": {"multi_label": 0.5},
    "ovsegmentor": {"weights": {"mask": 1.0}, "mask_scale": 4},
    "zegclip": {"setting": "transductive"},
    "mgca": {
        "regions": 3,
        "positives": 4,
        "negatives": 12,
        "sampling": "gumbel",
        "pixel_start": 0.0,
    },
}
TRAINING["mgca+tags"] = TRAINING["mgca"]
TRAINING["pacl+tags"] = {
    "patches": 20,
    "self_training": 0.5,
    "keep": 0.6,
    "stuff": ["grass", "water"],
    "penalty": 0.05,
}
VOCABULARY = ["a red one", "water", "grass", "a blue six", "sand", "four"]
BOUNDS = {1: [0, 7], 2: [0, 4, 7], 3: [0, 3, 6, 7]}  # of the pictures of each process
NOISY = ("segclip", "groupvit", "ovsegmentor")
PICTURES, CAPTIONS, WORDS, GROUPS, PATCHES = 7, 2, 6, 8, 36


@dataclass
class Everything(CrossEntityBatch, NounBatch):
    """What any objective asks for."""


def an_objective(system):
    torch.manual_seed(3)
    name = system.removesuffix("+tags")
    model = ovseg.create_model(f"{name}_tiny", backbone=dict(BACKBONE[name]), **OPTIONS[name])
    for name, parameter in model.named_parameters():
        if name.endswith("leave.weight"):  # MGCA's decoder begins as nothing
            torch.nn.init.normal_(parameter, std=0.1)
    return create_objective(model.double().train(), **TRAINING.get(system, {}))


def a_batch(system="pacl"):
    """Seven pictures of 24 pixels with two captions each; 0 and 1 show the same; noise is given, so
    that any division sees the same.
    """
    g = torch.Generator().manual_seed(5)

    def draw(*shape):
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    def texts(count):
        tokens = torch.randint(3, 20, (count, WORDS), generator=g)
        tokens[:, 0], tokens[:, -1] = 1, 2
        return tokens

    tokens = texts(PICTURES * CAPTIONS)
    ids = torch.tensor([0, 0, 2, 3, 4, 5, 6])
    gumbel = lambda n: -(-draw(PICTURES, GROUPS, n).clamp(1e-6, 1 - 1e-6).log()).log()  # noqa: E731
    entities = (draw(PICTURES * CAPTIONS, 5) > 0.6).byte()
    if system == "zegclip":  # masks; of the last picture no pixel is labelled
        masks = (
            torch.randint(0, 23, (PICTURES, 6, 6), generator=g)
            .repeat_interleave(4, 1)
            .repeat_interleave(4, 2)
        )
        masks[-1] = 255
        return MaskBatch(draw(PICTURES, 3, 24, 24) - 0.5, masks)
    if system.endswith("+tags"):
        states = torch.randint(0, 3, (PICTURES, len(VOCABULARY)), generator=g)
        states[:, 0] = torch.tensor([2, 2, 0, 2, 0, 2, 2])  # each has a word that is true
        states[[2, 4], 1] = 2
        vocabulary = WordTokenizer()(VOCABULARY)
        return TagBatch(
            draw(PICTURES, 3, 24, 24) - 0.5,
            vocabulary,
            states == 2,
            states > 0,
            draw(len(VOCABULARY)),
        )
    noise = {
        "groups": gumbel(PATCHES),
        "kept_groups": gumbel(int(37 * 0.25) - 1),
        "masking": draw(PICTURES, PATCHES),
    }
    noise |= {"groups_0": gumbel(PATCHES), "groups_1": gumbel(GROUPS)[:, :4]}
    question, answer, prompt = texts(3 * PICTURES).chunk(3)
    question[2, 4:], answer[3, 3:] = 0, 0
    return Everything(
        draw(PICTURES, 3, 24, 24) - 0.5,
        tokens,
        ids,
        ids.repeat_interleave(CAPTIONS),
        entities.unflatten(0, (PICTURES, CAPTIONS)).amax(1),
        entities,
        torch.randint(0, 4, (PICTURES, PATCHES), generator=g),
        noise,
        partner=draw(PICTURES, 3, 24, 24) - 0.5,
        entity_ids=ids,
        question_ids=question,
        answer_ids=answer,
        answer_entities=entities[::CAPTIONS],
        entity_token_ids=prompt,
        noun_ids=texts(3 * PICTURES).view(PICTURES, 3, -1),
    )


def share_of(batch, rank, world):
    """The rank's pictures; the last rank has fewest: 4 and 3 of 7, or 3, 3 and 1."""
    bounds = BOUNDS[world][rank : rank + 2]
    per_text = {"token_ids", "text_ids", "text_entities"}
    shared = {"token_ids", "weights"} if isinstance(batch, TagBatch) else set()

    def rows(name, x):
        start, stop = (n * CAPTIONS if name in per_text else n for n in bounds)
        return x[start:stop]

    values = {
        name: rows(name, x)
        for name, x in vars(batch).items()
        if isinstance(x, torch.Tensor) and name not in shared
    }
    noise = {name: x[slice(*bounds)] for name, x in getattr(batch, "noise", {}).items()}
    return replace(batch, **values, **({"noise": noise} if noise else {}))


def found(objective, batch, parallel, chunk, first=0):
    gradients = Gradients(objective, parallel, chunk)
    losses = gradients(batch, Progress(3, 10, 1, distributed.rank(), first=first))
    whole = copies(objective)
    norm = float(clip(objective.parameters(), 0.1))
    return {name: float(x) for name, x in losses.items()}, whole, norm, copies(objective)


def copies(objective):
    named = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    return {
        name: (g.full_tensor() if isinstance(g, DTensor) else g).clone()
        for name, g in named.items()
    }


def compare_with(folder):
    """In one of several processes: all systems and chunk sizes against what one process found."""
    worst, first = {}, BOUNDS[distributed.world_size()][distributed.rank()]
    given = [(system, system, chunk) for system in SYSTEMS for chunk in (None, 2)]
    drawn = [(f"{system}-drawn", system, 2) for system in NOISY]
    for parallel, (name, system, chunk) in itertools.product(("ddp", "fsdp"), (*given, *drawn)):
        expected = torch.load(f"{folder}/{name}.pt")
        objective, batch = an_objective(system), a_batch(system)
        batch = batch if name == system else replace(batch, noise={})
        mine = share_of(batch, distributed.rank(), distributed.world_size())
        losses, gradients, norm, clipped = found(objective, mine, parallel, chunk, first)
        assert gradients.keys() == expected[1].keys(), set(gradients) ^ set(expected[1])
        difference = max(abs(losses[key] - value) for key, value in expected[0].items())
        for key, value in expected[1].items():
            size = max(
                1.0, float(value.abs().max())
            )  # statistics of few rows make some gradients large
            difference = max(difference, float((gradients[key] - value).abs().max()) / size)
            difference = max(difference, float((clipped[key] - expected[3][key]).abs().max()))
        worst[f"{parallel} {name} {chunk}"] = max(difference, abs(norm / expected[2] - 1))
    distributed.close()
    print(json.dumps(worst), flush=True)
    os._exit(0)  # gloo's threads may still run when the interpreter ends, and then abort it


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    for system in SYSTEMS:
        torch.save(
            found(an_objective(system), a_batch(system), "ddp", None), folder / f"{system}.pt"
        )
    for system in NOISY:  # with the noise of the grouping drawn, not given
        batch = replace(a_batch(system), noise={})
        torch.save(found(an_objective(system), batch, "ddp", None), folder / f"{system}-drawn.pt")
    return folder


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_equal_one(one_process, world):
    """By DDP and by FSDP2, one after the other in the same processes."""
    for printed in run(__file__, "compare_with", world, one_process, seconds=300):
        worst = json.loads(printed.splitlines()[-1])
        assert len(worst) == 2 * (2 * len(SYSTEMS) + len(NOISY)) and max(worst.values()) < 1e-10, (
            worst
        )


@pytest.mark.parametrize("system", SYSTEMS)
def test_chunks_equal_the_whole_batch(system, one_process):
    expected = torch.load(one_process / f"{system}.pt")
    for chunk in (1, 3, 100):
        losses, gradients, norm, _ = found(an_objective(system), a_batch(system), "ddp", chunk)
        assert losses == pytest.approx(expected[0], abs=1e-10) and norm == pytest.approx(
            expected[2], rel=1e-10
        )
        assert gradients.keys() == expected[1].keys()
        assert (
            max(
                float((gradients[name] - value).abs().max() / value.abs().max().clamp(min=1))
                for name, value in expected[1].items()
            )
            < 1e-10
        )


@pytest.mark.third_trial(14)
@pytest.mark.parametrize("system", NOISY)
def test_chunks_draw_the_noise_of_the_whole_batch(system, one_process):
    """Of each picture its own, by its row, also where a row begins amid a block of four numbers."""
    expected = torch.load(one_process / f"{system}-drawn.pt")
    batch = replace(a_batch(system), noise={})
    losses, gradients, _, _ = found(an_objective(system), batch, "ddp", 3)
    assert losses == pytest.approx(expected[0], abs=1e-10)
    assert (
        max(
            float((gradients[name] - value).abs().max() / value.abs().max().clamp(min=1))
            for name, value in expected[1].items()
        )
        < 1e-10
    )
    other = found(an_objective(system), batch, "ddp", None, first=1)[0]
    assert other["total"] != pytest.approx(
        expected[0]["total"], abs=1e-6
    )  # noise has its part in it


@pytest.mark.third_trial(14)
@pytest.mark.parametrize("each", [(3, 5), (4, 6), (1,)])
def test_rows_draw_the_same_wherever_they_fall(each):
    whole = Progress(2, seed=5).gumbel("cpu", "groups", (7, *each))
    for first, count in ((0, 7), (1, 3), (4, 2), (6, 1)):
        place = Progress(2, seed=5, rank=3, chunk=1, first=first)
        assert torch.equal(
            place.gumbel("cpu", "groups", (count, *each)), whole[first : first + count]
        )
        noise = place.noise("cpu", "groups", (count, *each))
        drawn = noise if noise.is_floating_point() else philox.gumbel(noise, (count, *each))
        assert torch.equal(drawn, whole[first : first + count])


def test_both_passes_of_a_chunk_draw_the_same():
    """Noise by the chunk's number, dropout by the random state kept for it."""
    objective, seen = an_objective("segclip"), []
    encode, dropout = objective.encode, torch.nn.Dropout(0.5)

    def watched(batch, progress):
        rows = encode(replace(batch, noise={}), progress)
        rows["image"] = dropout(rows["image"])
        seen.append({name: x.detach().clone() for name, x in rows.items()})
        return rows

    objective.encode = watched
    torch.manual_seed(0)
    Gradients(objective, chunk=3)(a_batch(), Progress(step=4))
    assert len(seen) == 6
    for first, second in zip(seen[:3], seen[3:], strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(seen[0]["image"] == 0, seen[1]["image"][: len(seen[0]["image"])] == 0)


def test_chunks_in_bf16_reach_every_weight():
    """Autocast keeps copies of weights; those of the pass without a graph would be of no use in the
    other.
    """
    sizes = []
    for chunk in (None, 3):
        objective = an_objective("clip_dense").float()
        batch = replace(a_batch(), images=a_batch().images.float())
        Gradients(objective, chunk=chunk, cast=lambda: torch.autocast("cpu", torch.bfloat16))(
            batch, Progress()
        )
        sizes.append(
            {
                name: float(p.grad.norm())
                for name, p in objective.named_parameters()
                if p.grad is not None
            }
        )
    assert sizes[0].keys() == sizes[1].keys() and all(
        size == pytest.approx(sizes[0][name], rel=0.1) for name, size in sizes[1].items()
    )


def test_noise_differs_by_rank_step_and_chunk():
    shown = {
        tuple(Progress(step, 10, seed, rank, chunk).rng("cpu", use).tolist())
        for step in (0, 1)
        for seed in (0, 1)
        for rank in (0, 1, 2)
        for chunk in (0, 1)
        for use in ("groups", "masking")
    }
    assert len(shown) == 48
    objective = an_objective("segclip")
    batch = replace(a_batch(), noise={})
    reconstruction = [
        float(objective(batch, Progress(first=first))["reconstruction"].detach())
        for first in (0, 0, 7)
    ]
    assert reconstruction[0] == reconstruction[1] != reconstruction[2]


def test_loss_scaler():
    scaler, weight = LossScaler(True, 8.0, patience=2), torch.nn.Parameter(torch.ones(1))
    weight.grad = torch.full((1,), 16.0)
    scaler.unscale([weight])
    assert weight.grad.item() == 2.0
    assert scaler.update(False) and scaler.scale == 4.0
    assert not scaler.update(True) and not scaler.update(True) and scaler.scale == 8.0
    other = LossScaler(True)
    other.load_state_dict(scaler.state_dict())
    assert (
        other.scale == 8.0
        and not LossScaler(False).update(False)
        and LossScaler(False).scale == 1.0
    )
    scaler.scale = 1.0
    assert not scaler.update(False)  # no factor left to blame
