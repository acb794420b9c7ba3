"""Which backend answers each pass of an operator on a GPU, and why: a table to be read.

A pass is a schema of ``torch.ops.ovseg``: a forward, a part of one, or a backward. All backends
read and write the same saved statistics, so that the passes of an operator are chosen one by one.
The reasons are those of a model (docs/gpu.md) until a file in benchmarks/results says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """The backends of a pass, best first, on GPUs from a compute capability on.

    ``float64`` rules are for tensors of that dtype alone.
    """

    order: tuple[str, ...]
    why: str
    since: tuple[int, int] = (0, 0)
    float64: bool = False


_NO_KERNEL = Rule((), "no kernel for a GPU was written")
_PRODUCTS = Rule(
    ("triton", "cuda"),
    "products bound by tensor cores and L2, where Triton's tiles are larger than CUDA's 64 x 64",
)
_EXACT_PRODUCTS = Rule(
    ("cuda", "triton"),
    "float64, for which Triton has no tiles of tensor cores",
    float64=True,
)
_BIG_PRODUCTS = Rule(
    ("triton",),
    "products bound by tensor cores and L2: tiles of 128 x 128, and the library's products",
)
_ONE_READ = Rule(
    ("cuda", "triton"),
    "bound by memory: CUDA reads every element once, in 16 bytes, whatever the sizes",
)
_GROUPED = Rule(
    ("triton",),
    "bound by memory: one kernel in which the projections never leave the registers",
)
_LISTS = Rule(
    ("cuda", "triton"),
    "lists in shared memory: CUDA keeps the best of a row without sorting chunks",
)
_PIXELS = Rule(
    ("cuda", "triton"),
    "bound by instructions: CUDA works out places and weights outside of the loop over classes",
)

# The first rule that fits holds; the last one of a row fits everything.
TABLE: dict[str, tuple[Rule, ...]] = {
    "patch_text_similarity": (_EXACT_PRODUCTS, _PRODUCTS),
    "patch_text_similarity_backward": (_EXACT_PRODUCTS, _PRODUCTS),
    "contrastive_stats": (_BIG_PRODUCTS,),
    "contrastive_loss_backward": (_BIG_PRODUCTS,),
    "similarity_contrastive_stats": (_ONE_READ,),
    "similarity_contrastive_loss_backward": (_ONE_READ,),
    "center_assignment": (_ONE_READ,),
    "center_assignment_backward": (_ONE_READ,),
    "grouped_inverse_std": (_GROUPED,),
    "grouped_inverse_std_backward": (_GROUPED,),
    "dense_contrastive_select": (_LISTS,),
    "dense_contrastive_gather": (_ONE_READ,),
    "dense_contrastive_gather_backward": (_ONE_READ,),
    "upsample_argmax": (_PIXELS,),
    "window_argmax": (_PIXELS,),
    "upsample_mask_loss": (_PIXELS,),
    "upsample_mask_loss_backward": (_PIXELS,),
}


def rule(name: str, capability: tuple[int, int], float64: bool = False) -> Rule:
    """Return the rule of a pass for a GPU of this capability."""
    rows = (*TABLE.get(name, ()), _NO_KERNEL)
    return next(row for row in rows if capability >= row.since and (float64 or not row.float64))


def backends_of(name: str) -> set[str]:
    """Return the GPU backends that have a kernel of a pass."""
    return {other for row in TABLE.get(name, ()) for other in row.order}
