"""The training loop, top to bottom: recipe in, run folder out.

A run folder holds config.yaml, env.json, log.jsonl, loss.png, checkpoints/ and model/ (what ``from_pretrained`` reads).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import platform
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..data.batches import SceneBatches
from ..data.folders import FolderBatches
from ..data.scenes import Scenes
from ..environment import environment
from ..errors import ConfigError
from ..models import OVSegModel, create_model, from_pretrained, save_pretrained
from ..progress import bar
from . import checkpoint
from .plots import plot_loss
from .recipe import Recipe, save_recipe

_BAD_IN_A_ROW = 10  # steps without a finite loss before the run stops


class Interrupted(Exception):
    """SIGTERM or SIGINT came; the state is saved."""


def train(recipe: Recipe, run: str | Path, *, resume: bool = False, quiet: bool = False) -> OVSegModel:
    """Train by ``recipe`` into the folder ``run``; returns the model in eval mode.

    Args:
        resume: go on from the newest complete checkpoint, if there is one. N steps give the same weights, bit for bit on
            the CPU, however often they were interrupted.

    Raises:
        ConfigError: if the folder holds another run and ``resume`` is false, or the recipe cannot be followed.
        Interrupted: after a signal, once the state is saved.
        FloatingPointError: after ten steps in a row without a finite loss.
    """
    run = Path(run)
    checkpoints = run / "checkpoints"
    if (run / "log.jsonl").exists() and not resume:
        raise ConfigError(f"{run} holds a run already; expected a new folder, or resume to go on with it")
    run.mkdir(parents=True, exist_ok=True)
    _keep_freed_memory()
    torch.manual_seed(recipe.train.seed)
    device = _device(recipe.train.device)
    model = build_model(recipe).to(device).train()
    optimizer = build_optimizer(model, recipe)
    batches = build_batches(recipe, model, progress=not quiet)
    start = 0
    done = checkpoint.complete(checkpoints)
    if resume and done:
        start = checkpoint.restore(done[-1], model, optimizer)
        _forget_after(run / "log.jsonl", start)
    save_recipe(recipe, run / "config.yaml")
    (run / "env.json").write_text(json.dumps(environment(device), indent=2))

    cast = _autocast(recipe.train.precision, device)
    parameters = [p for _, p in model.trainable]
    bad, began, seen_time = 0, time.time(), time.time()
    with _signals() as stop, open(run / "log.jsonl", "a", buffering=1) as log:
        steps = bar(range(start, recipe.train.steps), show=not quiet, initial=start, total=recipe.train.steps, unit="step",
                    desc=recipe.model.name)
        for step in steps:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, step) * group["lr_scale"]
            batch = {key: value.to(device) for key, value in batches(step).items()}
            batch["images"] = model.backbone.normalize(batch["images"])
            with cast:
                losses = model.training_loss(batch)
            optimizer.zero_grad(set_to_none=True)
            losses["total"].backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, recipe.optim.clip_grad)
            loss = losses["total"].item()
            if math.isfinite(loss) and bool(norm.isfinite()):
                optimizer.step()
                model.after_step()
                bad = 0
            else:  # a step that would write NaN into the weights is left out and counted
                bad += 1
                log.write(json.dumps({"step": step, "skipped": True, "loss": str(loss), "grad_norm": str(norm.item())}) + "\n")
                if bad == _BAD_IN_A_ROW:
                    raise FloatingPointError(f"{bad} steps in a row up to step {step} had no finite loss or gradient; "
                                             f"see {run / 'log.jsonl'}. Lower optim.lr or look at the data")
                continue
            if step % recipe.log.every_steps == 0 or step + 1 == recipe.train.steps:
                parts = {name: value.item() for name, value in losses.items() if name != "total"}
                entry = {"step": step, "loss": loss, **parts, "lr": learning_rate(recipe, step), "grad_norm": norm.item(),
                         "seconds": round(time.time() - began, 3)}
                log.write(json.dumps(entry) + "\n")
                steps.set_postfix(loss=f"{loss:.3f}")
                if not quiet and not sys.stderr.isatty() and time.time() - seen_time > 20:
                    seen_time = time.time()
                    print(f"{recipe.model.name} step {step}/{recipe.train.steps} loss {loss:.3f}", file=sys.stderr, flush=True)
            last = step + 1 == recipe.train.steps
            if last or stop or (step + 1) % recipe.checkpoint.every_steps == 0:
                checkpoint.save(checkpoints, step + 1, model, optimizer, recipe.checkpoint.keep)
            if stop and not last:
                raise Interrupted(f"signal {stop[0]} at step {step}; saved in {checkpoints}, go on with resume")
    model.eval()
    save_pretrained(model, run / "model", seed=recipe.train.seed, steps=recipe.train.steps, data=recipe.data.form)
    plot_loss(run / "log.jsonl", run / "loss.png", title=recipe.model.name)
    return model


def build_model(recipe: Recipe) -> OVSegModel:
    """The model of a recipe, its CLIP taken over from ``model.clip_from`` where that is given."""
    model = create_model(recipe.model.name, **recipe.model.options)
    if recipe.model.clip_from:
        source = Path(recipe.model.clip_from)
        source = source / "model" if (source / "model").is_dir() else source
        try:
            model.backbone.load_state_dict(from_pretrained(source).backbone.state_dict())
        except RuntimeError as error:
            raise ConfigError(f"model.clip_from is {recipe.model.clip_from!r}: {error}") from error
    return model


def build_optimizer(model: OVSegModel, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW over the model's own groups."""
    if not model.trainable:
        raise ConfigError(f"model {recipe.model.name!r} has nothing to train")
    groups = model.optimizer_groups(recipe.optim.lr, recipe.optim.weight_decay, recipe.optim.lower_lr)
    return torch.optim.AdamW(groups, lr=recipe.optim.lr, betas=tuple(recipe.optim.betas), eps=recipe.optim.eps)


def build_batches(recipe: Recipe, model: OVSegModel, *, progress: bool) -> SceneBatches | FolderBatches:
    data, size, seed = recipe.data, recipe.train.batch_size, recipe.train.seed
    tokenizer = model.backbone.tokenizer
    if data.form == "folder":
        if data.root is None:
            raise ConfigError("data.root is null; with data.form=folder expected a folder of images with .txt captions")
        return FolderBatches(data.root, tokenizer, size, seed, image_size=data.image_size, workers=data.workers,
                             superpixels=data.superpixels, patch=model.backbone.patch_size,
                             superpixel_labels=data.superpixel_labels)
    scenes = Scenes(data.form, "train", data.train_size, seed, data.image_size)
    patch = model.backbone.patch_size if data.superpixels else None
    return SceneBatches(scenes, tokenizer, size, seed, captions=data.captions, superpixel_patch=patch,
                        superpixel_labels=data.superpixel_labels, progress=progress)


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine to zero: the cosine runs from the first step, or with ``warmup_share`` from the warm-up's end."""
    optim, steps = recipe.optim, recipe.train.steps
    if optim.warmup_share is not None:
        done, share = (step + 1) / steps, optim.warmup_share
        return optim.lr * (done / share if done < share else 0.5 * (1 + math.cos(math.pi * (done - share) / (1 - share))))
    warm = min(1.0, (step + 1) / max(1, optim.warmup_steps))
    return optim.lr * warm * 0.5 * (1 + math.cos(math.pi * step / steps))


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"train.device is {name!r} and torch sees no GPU; expected 'cpu' or 'auto'")
    return torch.device(name)


def _autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that a first SIGTERM or SIGINT fills; a second one acts as usual. Only in the main thread."""
    received: list[int] = []
    previous: dict[int, Any] = {}

    def handle(number: int, frame: Any) -> None:
        received.append(number)
        for key, old in previous.items():
            signal.signal(key, old)

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, handle)
    except ValueError:  # not the main thread
        pass
    try:
        yield received
    finally:
        for key, old in previous.items():
            signal.signal(key, old)


def _forget_after(log: Path, step: int) -> None:
    """Drop log lines that a killed run wrote after its last checkpoint, and a half-written last line."""
    if not log.exists():
        return
    lines = []
    for line in log.read_text().splitlines():
        try:
            if json.loads(line)["step"] < step:
                lines.append(line)
        except (ValueError, KeyError):
            continue
    log.write_text("".join(line + "\n" for line in lines))


def _keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next step: returning it costs a fifth of a CPU step in page faults."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in ((-1, 2**31 - 1), (-3, 2**30)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            libc.mallopt(option, value)
