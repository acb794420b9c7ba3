"""Breaks the kernels, and the systems built on them, on purpose, one fault at a time, and shows that the suite notices each.

    python scripts/plant_faults.py             # all; half a minute a fault and more
    python scripts/plant_faults.py mask norm   # those whose name holds one of the words
    python scripts/plant_faults.py system      # those in the systems, inference and evaluation
    python scripts/plant_faults.py data:       # those in the loader, the sources and the augmentation
    python scripts/plant_faults.py --green     # the suite was seen green on this tree: begin with the first fault
    python scripts/plant_faults.py --green --from "wrong tail"    # go on with this one

Works on a copy of the tracked files. A fault that no test notices, or whose line is no longer in the source, makes the
exit status 1. The list is part of docs/testing.md.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAUNCH = "csrc/patch_text_similarity/patch_text_similarity_launch.cuh"
FORWARD = "csrc/patch_text_similarity/patch_text_similarity_fwd.cuh"
BACKWARD = "csrc/patch_text_similarity/patch_text_similarity_bwd.cuh"
TILE = "csrc/common/tile.cuh"
ASSIGNMENT = "csrc/center_assignment/center_assignment_launch.cuh"
CONTRASTIVE = "csrc/contrastive_loss/contrastive_loss_{}"
WINDOWS = "csrc/window_argmax/window_argmax_{}"
MASK_LOSS = "csrc/upsample_mask_loss/upsample_mask_loss_{}"
DENSE = "csrc/dense_contrastive_loss/dense_contrastive_loss_{}"
TRITON = "ovseg_kernels/triton/patch_text_similarity.py"
CPU = "csrc/patch_text_similarity/patch_text_similarity_cpu.cpp"


@dataclass(frozen=True)
class Fault:
    """In ``file``, the first ``right`` after ``after`` becomes ``wrong``; tests that match ``tests`` must go red."""

    name: str
    file: str
    right: str
    wrong: str
    tests: str = "emulated"
    after: str = ""
    folder: str = "tests/ops"


FAULTS = (
    Fault("dropped mask", FORWARD, "if (n < width && p.kept(b, w0 + n)) {", "if (n < width) {"),
    Fault("missing rescale", FORWARD, "total[row] = total[row] * factor + sum;", "total[row] = total[row] + sum;"),
    Fault("swapped stride", FORWARD, "patch_n, patch_d, N, D, mask", "patch_d, patch_n, N, D, mask"),
    Fault("missing barrier", TILE, "    __syncthreads();\n    if constexpr (kFlush)", "    if constexpr (kFlush)"),
    Fault("wrong tail", TILE, "return row < rows && k < depth &&", "return row < rows && k <= depth &&"),
    Fault("wrong norm", FORWARD, "norm = sqrt(quad[row]) * longest / total[row];", "norm = quad[row] * longest / total[row];"),
    Fault("cancelled rows with half their norm", "csrc/patch_text_similarity/patch_text_similarity_cancelled.cuh",
          "sqrt(squared) / kUnit * longest;", "sqrt(squared) / (2 * kUnit) * longest;", "emulated and cancel"),
    Fault("lost text tile", LAUNCH, "unsigned tiles(int64_t n) { return static_cast<unsigned>(ceil_div(n, kTile)); }",
          "unsigned tiles(int64_t n) { return static_cast<unsigned>(n > kTile ? n / kTile : 1); }"),
    Fault("int32 offset", FORWARD, "return {patches + b * patch_b, patch_n",
          "return {patches + static_cast<int32_t>(b * patch_b), patch_n"),
    Fault("wrong sign in one gradient term", BACKWARD, "A(0) : -g * phi * rho", "A(0) : g * phi * rho"),
    Fault("uninitialised accumulator", BACKWARD, "*out = p.first == 0 ? acc[k] : *out + acc[k];", "*out = *out + acc[k];"),
    # The same kinds of fault elsewhere.
    Fault("assignment: straight-through mean lost", ASSIGNMENT, "d[g] = z[g] * (d[g] - mean) / p.tau;", "d[g] = z[g] * d[g] / p.tau;"),
    Fault("assignment: count off by one", ASSIGNMENT, "return count + A(1);", "return count + A(2);"),
    Fault("assignment: noise of another element", ASSIGNMENT, "(b * p.L + l) * p.G + g", "(b * p.L + l) * p.G + g + 1"),
    Fault("stale asynchronous copy", TILE, "wait_copies<1>();", "wait_copies<2>();"),
    Fault("race between columns and sums", "csrc/common/block.cuh", "  shared[threadIdx.x] = mine;\n  __syncthreads();",
          "  shared[threadIdx.x] = mine;", "emulated and similarity_contrastive and not contract", after="block_merge"),
    Fault("loss: lost weight", "csrc/common/info_nce.cuh", "weight * exp(z - log_sum_exp)", "exp(z - log_sum_exp)",
          "emulated and contrastive_loss and not dense and not contract"),
    Fault("Triton: dropped mask", TRITON, "keep = keep & (tl.load(mask", "keep = keep | (tl.load(mask", "interpreted"),
    Fault("Triton: missing rescale", TRITON, "total = total * factor + tl.sum(e, 1)", "total = total + tl.sum(e, 1)", "interpreted"),
    Fault("Triton: wrong sign", TRITON, "tl.store(factors + i * T + t, -g * back", "tl.store(factors + i * T + t, g * back", "interpreted"),
    Fault("CPU: dropped mask", CPU, "a[n] = keep[n] != A(0) ? e : A(0);", "a[n] = e;", "cpu"),
    Fault("CPU: wrong projection", CPU, "add_scaled(row, -w.colsum[n]", "add_scaled(row, w.colsum[n]", "cpu"),
    Fault("assignment: half of a wide load twice", ASSIGNMENT, "to_float(v[k].x[part * P::kPart + j])", "to_float(v[k].x[j])",
          "emulated and assignment and not contract"),
    Fault("assignment: bias without gradient", ASSIGNMENT, "p.grad_bias[i] = sum;", "p.grad_bias[i] = 0;", "emulated and assignment"),
    Fault("assignment: NaN of a softmax is dropped", ASSIGNMENT, "x.spoiled[flag] = bad != 0;", "x.spoiled[flag] = 0;",
          "emulated and hides_nothing"),
    Fault("assignment: infinity stays in its center", "csrc/center_assignment/center_assignment_cpu.cpp", "if (bad > own)", "if (bad > G)",
          "hides_nothing and cpu"),
    Fault("contrastive: first chunk of texts alone", CONTRASTIVE.format("cuda.cu"), "p.T, p.D, c.first > 0);", "p.T, p.D, false);",
          "emulated and contrastive"),
    Fault("contrastive: lost share of columns", CONTRASTIVE.format("cuda.cu"), "merge(all, x.parts[split",
          "if (split > 1) merge(all, x.parts[split", "emulated and contrastive"),
    Fault("contrastive, Triton: first chunk alone", "ovseg_kernels/triton/contrastive_loss.py", "ADD=first > 0", "ADD=False",
          "interpreted and contrastive"),
    Fault("contrastive, CPU: missing rescale", CONTRASTIVE.format("cpu.cpp"), "sum[j] * exp_fast(top[j] - now);", "sum[j];",
          "cpu and contrastive"),
    Fault("dense: tie to the larger index", DENSE.format("cuda.cu"), "indices[i] < indices[j]", "indices[i] > indices[j]",
          "emulated and dense and not contract"),
    Fault("dense: a chunk forgets the ones before", DENSE.format("cuda.cu"), "c.first > 0 ? side.lengths[j] : 0", "0",
          "emulated and dense and not contract"),
    Fault("dense: what equals the worst pushes it out", DENSE.format("cuda.cu"), "if (keys[k] > threshold) {",
          "if (keys[k] >= threshold) {", "emulated and dense and not contract"),
    Fault("dense: a race in the sort", DENSE.format("cuda.cu"), "best.swap(low, high);\n      }\n      __syncthreads();",
          "best.swap(low, high);\n      }", "emulated and dense and not contract"),
    Fault("dense, CPU: own images as negatives", DENSE.format("cpu.cpp"), "if (!own(p, i, j)) continue;  // (3)", "continue;  // (3)",
          "cpu and contrastive"),
    Fault("pruning: the floor is too high", "csrc/common/candidates.cuh", "floor -= 16 * epsilon", "floor += A(0.1)",
          "emulated and (upsample or window)"),
    Fault("upsampling, CPU: wrong lower row", "csrc/upsample_argmax/upsample_argmax_cpu.cpp", "weighted(y.to_high, bottom[at + cell])",
          "weighted(y.to_high, top[at + cell])", "cpu and upsample"),
    Fault("windows, CPU: upper bound without the other windows", WINDOWS.format("cpu.cpp"), "most + y : larger(most, y);",
          "most + y : y;", "any_windows"),
    Fault("windows, CPU: softmax bounded by the wrong sum", WINDOWS.format("cpu.cpp"), "return bent(x, window.least_norm);",
          "return bent(x, window.most_norm);", "windows_disagree and cpu"),
    Fault("windows: groups of the first window only", WINDOWS.format("cuda.cu"), "p.values[(k * p.G + (g", "p.values[(0 * p.G + (g",
          "emulated and window"),
    Fault("windows, Triton: a window too wide", "ovseg_kernels/triton/window_argmax.py", "(x >= 0) & (x < wc)", "(x >= 0) & (x <= wc)",
          "interpreted and window"),
    Fault("mask loss, CPU: the last row of cells is lost", MASK_LOSS.format("cpu.cpp"), "  spread(p, plane, last, ws);\n}", "}",
          "cpu and mask_loss"),
    Fault("mask loss: pixels of the upper neighbour only", MASK_LOSS.format("cuda.cu"), "first_output<A>(sample + 1, p.h, p.H)",
          "first_output<A>(sample, p.h, p.H)", "emulated and mask_loss"),
    Fault("mask loss, Triton: too few taps", "ovseg_kernels/triton/upsample_mask_loss.py", "5 * W // (2 * w) + 4", "2 * (W // w)",
          "interpreted and mask_loss and golden"),
    Fault("dense, Triton: noise of another pixel", "ovseg_kernels/triton/dense_contrastive_loss.py", "* pixels_in_all + x",
          "* pixels_in_all + x + 1", "interpreted and contrastive"),
    Fault("waits: numbers of a GPU read in every call", "ovseg_kernels/_checking.py", '_on if inside is None else inside', "True",
          "no_operator_reads"),
    Fault("waits: a seed copied from the host", "ovseg_kernels/philox.py", "torch.arange(2, device=rng.device)",
          "torch.tensor([0, 1], device=rng.device)", "goes_with_the_operators"),
    Fault("waits: selections read in the backward", "ovseg_kernels/reference/dense_contrastive_loss.py", "if d_pixels.numel():",
          "if bool(there.any()):", "no_closed_form_reads"),
    Fault("pruning: no class is left", "csrc/common/candidates.cuh", "list[0] = 0, counts[kPruningThreads] = 1;", ";",
          "some_class and emulated"),
)


def _system(name: str, file: str, right: str, wrong: str, folder: str, tests: str = "") -> Fault:
    return Fault(f"system: {name}", f"ovseg/{file}", right, wrong, tests, folder=folder)


_MAPS, _METRICS = "tests/inference/test_label_maps.py", "tests/evaluation/test_metrics.py"
_SETS, _SEGCLIP = "tests/evaluation/test_segmentation_sets.py", "tests/models/test_segclip.py"
_EVALUATE, _SOURCES = "tests/evaluation/test_evaluate.py", "tests/inference/test_sources.py"
_PATCHES, _GROUPS = "inference/decisions/patches.py", "inference/decisions/groups.py"
_VALUES, _BATCHES = "tests/inference/test_three_values.py", "tests/inference/test_batches.py"
_CALLS = "tests/inference/test_calls.py"
FAULTS += (
    _system("window of another width", "layers/readout.py", "(2 * std * std)", "(std * std)", "tests/layers"),
    _system("group table of all classes", _GROUPS, "logits.softmax(-1) * (logits", "(logits", _MAPS, "group"),
    _system("entropy the wrong way", _PATCHES, "high.bool()", "~high.bool()", _MAPS, "entropy"),
    _system("a patch for the short side", "inference/windows.py", "int(exact / patch + 0.5)", "int(exact / patch + 1.5)",
            "tests/inference/test_limits.py", "shape"),
    _system("cut labels are not looked for", "models/texts.py", "found[i] += is_cut", "found[i] += 0",
            "tests/inference/test_values_that_cannot_be.py", "cut"),
    _system("small classes kept", _PATCHES, "small = area <= self", "small = area < 0 * self", _MAPS, "area"),
    _system("stale texts", "inference/remembered_texts.py", "queries = replace(queries, templates=queries.templates_for(model))",
            "queries = Queries(queries.labels)", _VALUES, "follow"),
    _system("texts of earlier weights", "inference/remembered_texts.py", "version is None or not version.holds(*_made_of(model))",
            "version is None", _CALLS, "weights"),
    _system("labels of another call", "inference/predictor.py", "self._asked(call.queries), call.decision", "self._asked(), call.decision",
            _CALLS, "threads"),
    _system("stale view", "inference/predictor.py", "seen.view == call.view and seen.version", "seen.version", _VALUES, "another"),
    _system("allowed ignored", "inference/queries.py", "base.masked_fill(~allowed, -torch.inf)", "base", _VALUES, "allowed"),
    _system("windows of another picture", "inference/windows.py", "at += count", "at += 0", _BATCHES, "single_calls"),
    _system("threshold is background", "evaluation/metrics.py", 'side="right"', 'side="left"', _METRICS, "sweep"),
    _system("contour past the border", "evaluation/metrics.py", '"cval": -2', '"cval": 0', _METRICS, "boundary"),
    _system("no sum over processes", "distributed.py", "dist.all_reduce(total, group=everyone)", "pass", _EVALUATE, "two_processes"),
    _system("shift not seen", "data/check.py", "< _CLEARLY * misfit[0]", "< 0", _SETS, "shifted"),
    _system("removed values counted", "data/set_masks.py", "while value in removed:", "while False:", _SETS, "layout"),
    _system("cut member taken", "data/shards.py", "+ stored > whole:", "+ stored > 10 * whole:", _SOURCES, "shards"),
    _system("superpixels detached", "objectives/superpixel.py", "sums[rows]", "sums.detach()[rows]", _SEGCLIP, "superpixel_loss"),
    _system("slope of QuickGELU", "layers/quick_gelu.py", ".mul_(1.702)", ".mul_(1.0)", _SEGCLIP, "training_step"),
    _system("assignment without noise", "layers/semantic_groups.py", "z if noise is None else z + noise", "z", _SEGCLIP, "training_step"),
)

_OVSEGMENTOR, _GROUPVIT, _MASK = (f"tests/models/test_{name}.py" for name in ("ovsegmentor", "groupvit", "mask_consistency"))
_OBJECTIVE = "objectives/ovsegmentor.py"
FAULTS += (
    _system("places in packed texts", "layers/packing.py", "self.rows % self.shape[1]", "self.rows % (self.shape[1] + 1)", _OVSEGMENTOR,
            "texts"),
    _system("value bias left out", "layers/grouping_block.py", ".flatten(2) + self.attn.v_proj.bias", ".flatten(2)", "tests/layers"),
    _system("maps of two stages", "layers/grouping_vit.py", "soft = stage.soft @ soft", "soft = stage.soft @ (0.9 * soft)", _GROUPVIT,
            "own_model"),
    _system("q and k exchanged", "models/groupvit/published.py", 'for letter in "qkv"]', 'for letter in "kqv"]', _GROUPVIT, "own_model"),
    _system("nouns of another picture", "objectives/groupvit.py", "image_ids=batch.image_ids,", "image_ids=batch.image_ids + 1,", _GROUPVIT,
            "multi_label"),
    _system("decoder sees padding", _OBJECTIVE, "None if published else seen", "None", _OVSEGMENTOR, "padding"),
    _system("spared groups trained", _OBJECTIVE, "marked.detach(), marked", "marked, marked", _OVSEGMENTOR, "training_step"),
    _system("extremes at half the corners", "objectives/mask_consistency.py", " or cell[row] != cell[row + 1]", "", _MASK, "full_size"),
    _system("matching the wrong way", "objectives/mask_consistency.py", "(2 - 2 * cosine)", "(2 + 2 * cosine)", _MASK, "permutation"),
    _system("any class is a stub", "checkpoints/stubs.py", "known = all(", "known = True or all(", _OVSEGMENTOR, "run_no_code"),
)


def _data(name: str, file: str, right: str, wrong: str, folder: str, tests: str = "") -> Fault:
    return Fault(f"data: {name}", f"ovseg/data/{file}", right, wrong, tests, folder=f"tests/data/{folder}.py")


FAULTS += (
    _data("masks are not mirrored", "transforms.py", "return tuple(functional().horizontal_flip(item) for item in items)",
          "return (functional().horizontal_flip(items[0]), *items[1:])", "test_transforms", "stay_on"),
    _data("crops without antialias", "transforms.py", "antialias=True", "antialias=False", "test_transforms", "antialiased"),
    _data("ignored pixels are a class", "mask_transforms.py", "counts[self.ignore_index] = 0", "pass", "test_transforms", "ignored"),
    _data("padding is black", "mask_transforms.py", "[round(255 * channel)", "[0 * round(255 * channel)", "test_transforms", "padding"),
    _data("hue turned the other way", "mask_transforms.py", "hue.int() + integer", "hue.int() - integer", "test_transforms", "photometric"),
    _data("no cycle walking", "order.py", "while len(beyond):", "while False:", "test_order", "every_picture_once"),
    _data("ranks overlap", "order.py", "(rank + 1) * size // ranks)", "(rank + 1) * size // ranks + 1)", "test_loader", "ranks_share"),
    _data("epochs are alike", "loader.py", "mix(self.order.seed, epoch, i)", "mix(self.order.seed, 0, i)", "test_loader", "differs"),
    _data("a step is left out on resume", "loader.py", "+ self.step + 1, self", "+ self.step + 2, self", "test_loader", "resume_equals"),
    _data("the loader draws a seed", "loader.py", "generator=torch.Generator().manual_seed(self.seed), ", "", "test_loader", "left_alone"),
    _data("a signal ends the workers", "loader.py", "signal.signal(signal.SIGTERM, _last_minute)", "pass", "test_loader", "signal_to_all"),
    _data("any picture as a replacement", "sources/base.py", "mix(rng_seed, index, attempt) % len(self)",
          "int(torch.randint(len(self), ()))", "test_loader", "depend_on_workers"),
    _data("the last word is cut off", "pairs.py", "int(used[-1]) + 1", "int(used[-1])", "test_data_sources", "padding"),
    _data("the end of a shard is not looked at", "shards.py", "if len(block) < _BLOCK:", "if False:", "test_shards", "damaged"),
    _data("hidden files are pictures", "folders.py", 'name.startswith(".")', "False", "test_folders", "hidden"),
    _data("numbers of labels are not sorted", "label_files.py", "sorted(numbered, key=lambda pair: pair[0])", "list(numbered)",
          "test_label_files", "forms"),
    _data("32-bit integers are taken for 16", "images.py", 'if mode == "I" and kind', "if False and kind", "test_images", "scale"),
    _data("segments of the whole picture", "sources/folder.py", "patch_labels(crops[0][0].numpy()", "patch_labels(maps[0]",
          "test_data_sources", "segments_are"),
)


def _train(name: str, file: str, right: str, wrong: str, tests: str, folder: str = "training/test_trainer") -> Fault:
    return Fault(f"training: {name}", f"ovseg/{file}", right, wrong, tests, folder=f"tests/{folder}.py")


_GRADIENTS, _TOGETHER = "distributed/test_gradients", "distributed/test_together"
FAULTS += (
    _train("a chunk draws anew in its second pass", "training/gradients.py", "_set_random_state(states[i])", "pass",
           "draw_the_same", _GRADIENTS),
    _train("the norm of one shard", "training/gradients.py", "dist.all_reduce(square, group=distributed.group())", "pass", "equal_one",
           _GRADIENTS),
    _train("scalars are not averaged", "training/gradients.py", "distributed.average_gradients(self._by_hand)", "pass",
           "equal_one", _GRADIENTS),
    _train("chunks see their own rank", "training/gradients.py", "losses = self.objective.loss(rows, batch, progress, self.group)",
           "losses = self.objective.loss(rows, batch, progress, None)", "equal_one", _GRADIENTS),
    _train("each process decides alone", "distributed.py", "    all_reduce_sum(found)\n    return tuple", "    return tuple",
           "not_finite or error", _TOGETHER),
    _train("bad pictures of one process", "training/trainer.py", "self.state.skips.add(distributed.gather_strings(list(skipped)))",
           "self.state.skips.add(skipped)", "bad_pictures", _TOGETHER),
    _train("steps that are not finite are done", "training/trainer.py", "if not infinite:", "if True:", "finite"),
    _train("no seed of its own for a rank", "training/trainer.py", "distributed.seed_for(recipe.train.seed, distributed.rank())",
           "recipe.train.seed", "random_numbers", _TOGETHER),
    _train("data begin anew", "training/state.py", 'state.loader.load_state_dict(mine["loader"])', "pass", "six_steps"),
    _train("the average begins anew", "training/state.py", 'state.average.n_averaged.fill_(facts["averaged"])', "pass", "average"),
    _train("moments begin anew", "training/state.py", "fill(entry[key], value)", "pass", "six_steps"),
    _train("any recipe goes on", "training/stages.py", "[] if old is None else differences(old, plain)", "[]", "refused"),
    _train("a damaged checkpoint goes on", "training/state.py", "if file_hash(path / name) != expected:", "if False:", "intact",
           "training/test_damaged_runs"),
    _train("the clock of the curve", "training/schedule.py", "(done - warm) / max", "done / max", "schedule"),
    _train("a stage begins with its own weights", "training/stages.py", "            own[name].copy_(value)", "            pass", "stage"),
)


def _zegclip(name: str, file: str, right: str, wrong: str, tests: str, folder: str = "models/test_zegclip_training") -> Fault:
    return Fault(f"zegclip: {name}", f"ovseg/{file}", right, wrong, tests, folder=f"tests/{folder}.py")


_ZEGCLIP = "models/test_zegclip"
FAULTS += (
    _zegclip("class token once", "models/zegclip/model.py", "class_weight: float = 2.0", "class_weight: float = 1.0", "features", _ZEGCLIP),
    _zegclip("positions with antialias", "models/zegclip/model.py", "backbone.antialias_positions = False", "pass", "features", _ZEGCLIP),
    _zegclip("prompts of the block before", "layers/prompts.py", "zip(blocks, prefixes, strict=True)",
             "zip(blocks, [prefixes[0], *prefixes[:-1]], strict=True)", "queries", _ZEGCLIP),
    _zegclip("stale prompts", "layers/kept.py", "a is not b or x != y", "a is not b", "kept", _ZEGCLIP),
    _zegclip("halves of the descriptor swapped", "layers/class_decoder.py", "of_both, of_text = weight", "of_text, of_both = weight",
             "queries", _ZEGCLIP),
    _zegclip("mask without the key's bias", "layers/class_decoder.py", "(q @ attn.k.bias)", "(0 * q @ attn.k.bias)", "probabilities",
             _ZEGCLIP),
    _zegclip("prompts in another order", "models/zegclip/published.py", "torch.cat([first, deep])", "torch.cat([deep, first])",
             "blocks", _ZEGCLIP),
    _zegclip("the CLIP in every file", "models/frozen_clip.py", "del found[name]", "pass", "alone", _ZEGCLIP),
    _zegclip("unseen pixels are the first class", "objectives/zegclip.py", "(len(names),), _NONE)", "(len(names),), 0)", "published"),
    _zegclip("self-training on what is labelled", "objectives/zegclip.py", "torch.where(hidden[index] & known,", "torch.where(known,",
             "self_training"),
    _zegclip("guesses among all classes", "objectives/zegclip.py", "[:, self.unseen], (masks", "[:, : len(self.unseen)], (masks",
             "unseen_classes_alone"),
    _zegclip("dice of absent classes", "objectives/zegclip.py", "(dice * present).sum()", "dice.sum()", "alone"),
    _zegclip("masks of one rank", "objectives/zegclip.py", "dist.all_reduce(whole, group=group)", "pass", "equal_one", _GRADIENTS),
    _zegclip("dropout of the first step", "objectives/base.py", "torch.manual_seed(self._number(use, self.rank, self.chunk))",
             "torch.manual_seed(0)", "dropout"),
)


def _mgca(name: str, file: str, right: str, wrong: str, tests: str, folder: str = "training/test_mgca_objective") -> Fault:
    return Fault(f"mgca: {name}", f"ovseg/{file}", right, wrong, tests, folder=f"tests/{folder}.py")


_UNITS = "inference/test_units"
FAULTS += (
    _mgca("noise of each rank", "objectives/mgca.py", "replace(progress, rank=0)", "progress", "noise"),
    _mgca("sums for means", "layers/units.py", "return weights / weights.sum(1, keepdim=True)", "return weights", "clusters"),
    _mgca("pixels from the first step", "objectives/mgca.py", "(share - start) / ramp", "share / ramp", "wait"),
    _mgca("pixels of one rank", "objectives/mgca.py", "group is not None:\n            pixels", "False:\n            pixels", "equal_one",
          _GRADIENTS),
    _mgca("attention in the last block", "models/mgca/model.py", 'readout: str = "maskclip"', 'readout: str = "clip"', "begins",
          "models/test_mgca"),
    _mgca("units that do not touch", "layers/units.py", "index[:-1], index[1:]", "index[:-1], index[1:].flip(0)", "linkage", _UNITS),
    _mgca("single link", "layers/units.py", "sums / count.clamp(min=1)", "sums / 1", "linkage", _UNITS),
    _mgca("the weight of the unit turned round", "inference/decisions/units.py", "lerp(of_patches, of_units,", "lerp(of_units, of_patches,",
          "mixture", _UNITS),
)

def copy_tree(to: Path) -> None:
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, files):
        if (ROOT / name).exists():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    for path in (ROOT / "ovseg_kernels").glob("_C_*.so"):
        shutil.copy2(path, to / "ovseg_kernels" / path.name)


def build_cpu(tree: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests'); from native_build import cmake; from pathlib import Path\n"
        "cmake(Path('build/cpu')); import shutil; shutil.copy2('build/cpu/lib/_C_cpu.so', 'ovseg_kernels/_C_cpu.so')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tree, check=True, capture_output=True)


def suite(tree: Path, folder: str, tests: str) -> tuple[bool, str]:
    """(green, the first failure) of the tests of ``folder`` in ``tree``."""
    command = [sys.executable, "-m", "pytest", folder, "-x", "-q", "-p", "no:cacheprovider", "--no-header", "-k", tests]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if done.returncode not in (0, 1, 5) or (done.returncode == 1 and not failed):
        raise RuntimeError(f"the suite did not run:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.returncode != 1, failed.group(1) if failed else ""


def selections(fault: Fault) -> list[str]:
    """The tests of the operator that is broken, which mostly notice, and then all."""
    operator = re.match(r"(?:csrc/|ovseg_kernels/\w+/)(\w+)(?:/|\.py)", fault.file)
    own = fault.folder == "tests/ops" and operator is not None and operator[1] != "common"
    return ([" and ".join(filter(None, (f"({fault.tests})" if fault.tests else "", operator[1])))] if own else []) + [fault.tests]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="faults whose name holds one of them; all if there is none")
    parser.add_argument("--green", action="store_true", help="do not run the suite without a fault first")
    parser.add_argument("--from", dest="first", metavar="NAME", help="leave out the faults before this one")
    options = parser.parse_args(arguments)
    chosen = [f for f in FAULTS if not options.words or any(word.lower() in f.name.lower() for word in options.words)]
    if options.first is not None:
        names = [fault.name for fault in chosen]
        if options.first not in names:
            parser.error(f"--from is {options.first!r}; expected one of {', '.join(names)}")
        chosen = chosen[names.index(options.first) :]
    missed = 0
    with tempfile.TemporaryDirectory() as copy:
        tree = Path(copy)
        copy_tree(tree)
        for folder, tests in sorted(set() if options.green else {(f.folder, f.tests) for f in chosen}):
            green, failed = suite(tree, folder, tests)
            if not green:
                print(f"the suite is red before any fault is planted: {failed}")
                return 1
        for fault in chosen:
            path, began = tree / fault.file, time.perf_counter()
            source = path.read_text()
            start = source.index(fault.after) if fault.after else 0
            at = source.find(fault.right, start)
            if at < 0:
                print(f"{fault.name:34} NOT PLANTED: {fault.file} no longer holds {fault.right!r}")
                missed += 1
                continue
            path.write_text(source[:at] + fault.wrong + source[at + len(fault.right):])
            if fault.file.endswith("_cpu.cpp"):
                build_cpu(tree)
            for tests in selections(fault):
                green, failed = suite(tree, fault.folder, tests)
                if not green:
                    break
            print(f"{fault.name:34} {'MISSED' if green else 'caught by ' + failed} ({time.perf_counter() - began:.0f} s)", flush=True)
            missed += green
            path.write_text(source)
            if fault.file.endswith("_cpu.cpp"):
                build_cpu(tree)
    print(f"{len(chosen) - missed} of {len(chosen)} caught")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
