"""Limits that compiled kernels are held to, and the kernels that are held to less, with the reason.

A kernel that is not named here is held to everything: who writes one need not enter it anywhere. A
name that no kernel has any more fails the tests.
"""

from __future__ import annotations

# Operators that products bound: a block of 128 x 128 reads 64 operations for each 16-bit byte from
# L2, which an H100 needs to reach its product rate; one of 64 x 64 reads 32.
PRODUCT_OPERATORS = ("patch_text_similarity", "contrastive_loss")
WGMMA_ROWS = 64
WGMMA_COLUMNS = 128
FLOPS_PER_BYTE = 64
PROGRAMS = 132  # of a launch at the stated shapes: one for each multiprocessor of an H100

SPILLED = 16  # bytes of a thread
# Kernel -> bytes, why. float64 is for checking and may spill in every kernel.
TRITON_SPILLS: dict[str, tuple[int, str]] = {
    "patch_text_similarity_fwd_kernel": (24, "exact float32: products without tensor cores"),
    "patch_text_similarity_bwd_coefficients_kernel": (24, "exact float32, as the forward"),
    "dense_contrastive_loss_select_keys_kernel": (48, "noise drawn beside exact float32 products"),
}
FLOAT64_SPILLED = 256
# The same of CUDA kernels: the compiler spills rather than let fewer blocks share a multiprocessor.
CUDA_SPILLS: dict[str, tuple[int, str]] = {
    "patch_text_similarity_fwd_kernel": (72, "exact float32: three blocks of 168 registers"),
    "patch_text_similarity_bwd_texts_kernel": (
        56,
        "sums over images: four blocks of 128 registers",
    ),
    "center_assignment_bwd_few_kernel": (24, "two blocks of 256 threads on an SM"),
    "center_assignment_fwd_scores_kernel": (56, "any number of centers: four blocks"),
}

# Triton kernels of the product operators that are not held to wgmma's width, copies by descriptor
# and bytes from L2, and why.
SMALL_TILES: dict[str, str] = {
    "patch_text_similarity_fwd_kernel": "64 x 64",
    "patch_text_similarity_weights_kernel": "64 x 64",
    "patch_text_similarity_pooled_norms_kernel": "64 x 64",
    "patch_text_similarity_vectors_kernel": "64 x 64",
    "patch_text_similarity_bwd_coefficients_kernel": "64 x 64",
    "patch_text_similarity_bwd_patches_kernel": "64 x 64",
    "patch_text_similarity_bwd_texts_kernel": "64 x 64",
}
# For the few rows that need it; where there are none they leave at once.
RARE: dict[str, str] = {
    "patch_text_similarity_gram_cancelled_kernel": "rows whose |v|^2 has cancelled",
}
# Compiled for sm_90 alone; what answers elsewhere.
HOPPER: dict[str, str] = {
    "patch_text_similarity_gram_fwd_kernel": "patch_text_similarity_fwd_kernel",
    "patch_text_similarity_gram_cancelled_kernel": "patch_text_similarity_pooled_norms_kernel",
}
# Kernels with loads of two bytes, which ought to be wider.
NARROW_LOADS: dict[str, str] = {
    "patch_text_similarity_gram_bwd_patches_kernel": "16-bit rows beside float32 sums",
}
CHANNELS = 512 // 64  # turns of an inner loop for one tile, at the stated shapes
# Launches at the stated shapes that may have fewer programs than there are multiprocessors.
FEW_PROGRAMS: dict[str, str] = {
    "contrastive_loss_merge_kernel": "32 rows a program: a hundredth of what made them",
    "contrastive_loss_bwd_vectors_kernel": "256 rows a program: two numbers for each",
    "patch_text_similarity_gram_bwd_hessian_kernel": "one an image, whose largest number it needs",
}
