"""Implementations that our operators are compared with.

Each function of a case gives name to function of the inputs, the first is ours. In float32 "eager"
is the definition. In 16 bits the definition would compute in float32; there "eager" has the dtype's
own products, and softmax and losses in float32, as autocast gives them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import ovseg_kernels as ok
from ovseg_kernels.reference.center_assignment import center_assignment
from ovseg_kernels.reference.folded_center_assignment import folded_center_assignment
from ovseg_kernels.reference.patch_text_similarity import patch_text_similarity
from ovseg_kernels.reference.segclip_center_assignment import (
    grouped_linear,
    segclip_center_assignment,
)
from ovseg_kernels.reference.similarity_contrastive_loss import similarity_contrastive_loss

from .contrastive_baselines import contrastive
from .label_baselines import FUSED, Functions, mask_loss, upsampling, window_labels

if TYPE_CHECKING:
    from .registry import Case


def patch_text(case: Case) -> Functions:
    """Return ``patch_text_similarity`` and what plain torch has for it."""
    options = dict(case.options)
    pool, weight = options.get("pool", "vector"), options.get("weight", "softmax")
    scale, bias = (
        (1 / options.get("temperature", 1.0), 0.0) if weight == "softmax" else (10.0, -2.5)
    )

    def eager(patches, texts):
        if patches.dtype.itemsize == 2:
            return part_of(F.normalize(patches, dim=-1), patches, texts)
        return patch_text_similarity(patches, texts, None, scale, bias, pool, weight)

    def part_of(unit, patches, texts):
        """Return the definition for some texts, on patches that were normalised once."""
        q = F.normalize(texts, dim=-1)
        s = torch.einsum("bnd,td->btn", unit, q)
        if pool in ("max", "mean"):
            return s.amax(-1) if pool == "max" else s.mean(-1)
        a = (scale * s if weight == "softmax" else F.logsigmoid(scale * s + bias)).softmax(-1)
        if pool == "score":
            return (a * s).sum(-1)
        return torch.einsum(
            "btd,td->bt", F.normalize(torch.einsum("btn,bnd->btd", a, patches), dim=-1), q
        )

    def in_chunks(one_chunk):
        def run(patches, texts, step=32):
            unit = F.normalize(patches, dim=-1)
            parts = [
                checkpoint(one_chunk, unit, patches, part, use_reentrant=False)
                for part in texts.split(step)
            ]
            return torch.cat(parts, dim=1)

        return run

    def by_image(patches, texts):
        return torch.cat(
            [
                _gram(u, texts, scale, bias, weight) if pool == "vector" else eager(u[None], texts)
                for u in patches
            ]
        )

    return {
        FUSED: lambda patches, texts: ok.patch_text_similarity(patches, texts, **options),
        "eager": eager,
        "eager, chunks of 32 texts": in_chunks(part_of),
        "eager, one image at a time": by_image,
        "torch.compile": torch.compile(eager),
        "torch.compile, chunks of 32 texts": in_chunks(torch.compile(part_of)),
    }


def _gram(u, texts, scale, bias, weight):
    """Return one image by the Gram form, the fastest that plain torch does here."""
    q, r = F.normalize(texts, dim=-1), u.norm(dim=-1)
    s = q @ (u / r[:, None]).T
    a = (scale * s if weight == "softmax" else F.logsigmoid(scale * s + bias)).softmax(-1)
    return (a * s * r).sum(-1, keepdim=True).T / ((a @ (u @ u.T)) * a).sum(-1).sqrt()


def similarity_loss(case: Case) -> Functions:
    """Return ``similarity_contrastive_loss`` and what plain torch has for it."""

    def cross_entropy(similarity, logit_scale):
        z, target = (
            logit_scale * similarity,
            torch.arange(len(similarity), device=similarity.device),
        )
        return (F.cross_entropy(z, target) + F.cross_entropy(z.T, target)) / 2

    def soft_targets(similarity, logit_scale, positives):
        z = logit_scale * similarity
        p = positives.to(similarity.dtype)
        rows = p / p.sum(1, keepdim=True)
        columns = p / p.sum(0)
        return (F.cross_entropy(z, rows) + F.cross_entropy(z.T, columns.T)) / 2

    def definition(similarity, logit_scale, positives=None):
        return similarity_contrastive_loss(similarity, logit_scale, given=positives)

    torchs = soft_targets if case.name in ("positives", "weights") else cross_entropy
    return {
        FUSED: ok.similarity_contrastive_loss,
        "eager": definition,
        "F.cross_entropy twice": torchs,
        "torch.compile": torch.compile(torchs),
    }


def _assign(queries, keys, values, noise, scale=1.0, tau=1.0, normalizer="mean_plus_one"):
    """Return (pooled,), the definition of ``center_assignment`` in the dtype of its inputs.

    Its products are in that dtype.
    """
    if queries.dtype.itemsize > 2:
        return center_assignment(
            queries, keys, values, scale=scale, tau=tau, noise=noise, normalizer=normalizer
        )
    s = ((scale * (queries @ keys.transpose(1, 2)) + noise) / tau).softmax(1)
    a = torch.zeros_like(s).scatter_(1, s.argmax(1, keepdim=True), 1.0) + (s - s.detach())
    n = a.sum(-1, keepdim=True)
    n = {"mean": n.clamp(min=1), "mean_plus_one": n + 1}[normalizer].to(values.dtype)
    return ((a.to(values.dtype) @ values) / n,)


def _training(case: Case, operator: Callable, *definitions: tuple[str, Callable]) -> Functions:
    """Return a training step of the assignment, by the operator and by its definitions.

    The Gumbel noise is the same for all, drawn inside by ours and given to the others.
    """
    noises: dict[tuple, torch.Tensor] = {}

    def rng(x):
        return ok.philox.make_rng(7, device=x.device)

    def noise(x, tokens):
        shape = (x.shape[0], tokens.shape[1], x.shape[1])
        if (x.device, shape) not in noises:
            noises[x.device, shape] = ok.philox.gumbel(rng(x), shape).transpose(1, 2).contiguous()
        return noises[x.device, shape]

    def given(function):
        def call(queries, **others):
            tokens = others["tokens"] if "tokens" in others else others["keys"]
            return function(queries, **others, noise=noise(queries, tokens), **case.options)[0]

        return call

    return {
        FUSED: lambda queries, **others: operator(
            queries, **others, rng=rng(queries), **case.options
        )[0],
        **{name: given(function) for name, function in definitions},
        "torch.compile": given(torch.compile(definitions[0][1])),
    }


def assignment(case: Case) -> Functions:
    """Return ``center_assignment`` and what plain torch has for it."""
    return _training(case, ok.center_assignment, ("eager", _assign))


def folded_assignment(case: Case) -> Functions:
    """Return ``folded_center_assignment`` and what plain torch has for it."""

    def eager(queries, tokens, key_weight, value_weight, key_bias, value_bias, **options):
        if tokens.dtype.itemsize > 2:
            return folded_center_assignment(
                queries, tokens, key_weight, value_weight, key_bias, value_bias, **options
            )
        return _assign(
            queries,
            F.linear(tokens, key_weight, key_bias),
            F.linear(tokens, value_weight, value_bias),
            **options,
        )

    def batched(queries, tokens, key_weight, value_weight, key_bias, value_bias, noise, scale):
        """Return the same algebra in plain torch, the fastest that it does here."""
        z = (queries @ key_weight) @ tokens.transpose(1, 2) + (queries @ key_bias)[..., None]
        s = (scale * z + noise).softmax(1)
        a = torch.zeros_like(s).scatter_(1, s.argmax(1, keepdim=True), 1.0) + (s - s.detach())
        n = a.sum(-1, keepdim=True)
        return ((a.to(tokens.dtype) @ tokens) @ value_weight.T + n * value_bias) / (n + 1), None

    return _training(
        case, ok.folded_center_assignment, ("eager", eager), ("eager, folded", batched)
    )


def segclip_assignment(case: Case) -> Functions:
    """Return ``segclip_center_assignment`` and what plain torch has for it."""

    def convolutions(
        queries,
        tokens,
        key_weight,
        value_weight,
        norm_weight,
        norm_bias,
        key_norm_weight,
        key_norm_bias,
        **options,
    ):
        """Return the step as the modules of the system are written.

        They are Conv1d over channels, with the transposes it asks for.
        """
        D, groups = tokens.shape[-1:], tokens.shape[-1] // key_weight.shape[1]
        x = F.layer_norm(tokens, D, norm_weight, norm_bias).transpose(1, 2)
        keys, values = (
            F.conv1d(x, w[..., None], groups=groups).transpose(1, 2)
            for w in (key_weight, value_weight)
        )
        return _assign(
            queries, F.layer_norm(keys, D, key_norm_weight, key_norm_bias), values, **options
        )

    def eager(
        queries,
        tokens,
        key_weight,
        value_weight,
        norm_weight,
        norm_bias,
        key_norm_weight,
        key_norm_bias,
        **options,
    ):
        if tokens.dtype.itemsize > 2:
            weights = (
                key_weight,
                value_weight,
                norm_weight,
                norm_bias,
                key_norm_weight,
                key_norm_bias,
            )
            return segclip_center_assignment(queries, tokens, *weights, **options)
        x = F.layer_norm(tokens, tokens.shape[-1:], norm_weight, norm_bias)
        keys = F.layer_norm(
            grouped_linear(x, key_weight), tokens.shape[-1:], key_norm_weight, key_norm_bias
        )
        return _assign(queries, keys, grouped_linear(x, value_weight), **options)

    return _training(
        case, ok.segclip_center_assignment, ("eager", eager), ("eager, Conv1d", convolutions)
    )


def dense(case: Case) -> Functions:
    """Return ``dense_contrastive_loss`` and what plain torch has for it.

    Top-k positives and hard negatives, mean of log, both directions.
    """
    t = case.options["temperature"]

    def counts(pixels):
        B, N, _ = pixels.shape
        return min(case.options["k_pos"], N), min(case.options["k_neg"], (B - 1) * N)

    def loss(z_p, z_n, logits):
        z_p, z_n, logits = z_p.float(), z_n.float(), logits.float()
        text_to_pixel = (torch.logaddexp(z_p, z_n.logsumexp(1, keepdim=True)) - z_p).mean()
        target = torch.arange(len(z_p), device=z_p.device).repeat_interleave(z_p.shape[1])
        return text_to_pixel + F.cross_entropy(logits, target)

    def similarities(pixels, texts):
        p, q = F.normalize(pixels, dim=-1).flatten(0, 1), F.normalize(texts, dim=-1)
        return p, q, (q @ p.T).unflatten(1, pixels.shape[:2])

    def eager(pixels, texts):
        """Return the loss by all similarities, torch.topk, autograd."""
        k_pos, k_neg = counts(pixels)
        p, q, s = similarities(pixels, texts)
        mine = torch.arange(len(q), device=s.device)
        s_p, index = s[mine, mine].topk(k_pos, dim=1)
        eye = torch.eye(len(q), dtype=torch.bool, device=s.device)[..., None]
        s_n = s.masked_fill(eye, -torch.inf).flatten(1).topk(k_neg, dim=1)[0]
        chosen = p[(index + mine[:, None] * pixels.shape[1]).flatten()]
        return loss(s_p / t, s_n / t, chosen @ q.T / t)

    def sparse(pixels, texts):
        """Return the loss by autograd through the selected pixels alone.

        They are selected image by image, without a graph.
        """
        k_pos, k_neg = counts(pixels)
        with torch.no_grad():
            q, best, where = F.normalize(texts, dim=-1), None, None
            own = []
            for i, image in enumerate(pixels):
                s = q @ F.normalize(image, dim=-1).T
                own.append(s[i].topk(k_pos)[1] + i * len(image))
                s[i] = -torch.inf
                values, at = s.topk(min(k_neg, s.shape[1]), dim=1)
                at = at + i * len(image)
                if best is not None:
                    values, at = torch.cat([best, values], 1), torch.cat([where, at], 1)
                best, order = values.topk(min(k_neg, values.shape[1]), dim=1)
                where = at.gather(1, order)
            index = torch.cat([torch.stack(own), where], 1)
        q = F.normalize(texts, dim=-1)
        chosen = F.normalize(
            pixels.flatten(0, 1).index_select(0, index.flatten()), dim=-1
        ).unflatten(0, index.shape)
        z = torch.einsum("tkd,td->tk", chosen, q) / t
        return loss(z[:, :k_pos], z[:, k_pos:], chosen[:, :k_pos].flatten(0, 1) @ q.T / t)

    return {
        FUSED: lambda pixels, texts: ok.dense_contrastive_loss(pixels, texts, **case.options),
        "eager": eager,
        "eager, streaming top-k, sparse backward": sparse,
        "torch.compile": torch.compile(eager),
    }


BASELINES = {
    "patch_text_similarity": patch_text,
    "similarity_contrastive_loss": similarity_loss,
    "center_assignment": assignment,
    "folded_center_assignment": folded_assignment,
    "segclip_center_assignment": segclip_assignment,
    "contrastive_loss": contrastive,
    "dense_contrastive_loss": dense,
    "upsample_argmax": upsampling,
    "window_argmax": window_labels,
    "upsample_mask_loss": mask_loss,
}
