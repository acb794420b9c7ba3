"""Operations, bytes and instructions of every operator and pass, as formulas of the shape.

``B`` images, ``T`` texts, ``N`` patches, ``L`` tokens, ``G`` centers, ``C`` classes, ``D`` width;
sizes of tiles and chunks are those of the launchers. ``before`` is the reading of commit c002b1a:
shares of a rate, or times where there is no such rate.
"""

from __future__ import annotations

from collections.abc import Iterable

from .gpu_model import H200, Before, Pass, Work, counts

HALF = 2  # bytes of bfloat16
FLOAT = 4
LANES = 32
DEVIATION = "bfloat16 inverse standard deviation"


def tiled(
    kernel: str,
    form: str,
    tiles: float,
    steps: float,
    *,
    flops: float,
    l2: float,
    memory: float,
    launches: int = 1,
) -> Work:
    """Return the work of a kernel that takes ``steps`` turns of its main loop for each tile."""
    found = counts().get((kernel, form))
    instructions = 0.0
    mufu = 0.0
    if found is not None:
        warps = tiles * found["warps"]
        instructions = warps * done(found, "instructions", steps)
        mufu = warps * LANES * done(found, "mufu", steps)
    return Work(
        kernel,
        flops=flops,
        l2=l2,
        memory=memory,
        mufu=mufu,
        instructions=instructions,
        launches=launches,
    )


def done(found: dict, name: str, steps: float) -> float:
    """Return how many instructions a warp does for a tile; what it does sometimes counts fully."""
    return steps * (found["step"][name] + found["sometimes"][name]) + found["tile"][name]


def by_pixel(
    kernel: str, form: str, pixels: float, unit: int, *, memory: float, blocks: int = 0
) -> Work:
    """Return the work of a kernel whose main loop takes ``unit`` pixels of a class in one turn.

    What it does sometimes is for the pixels at which a thread passes a row of samples: 1 of 16. The
    rest is done once by each warp of ``blocks`` of 128 threads.
    """
    found = counts().get((kernel, form))
    turns = pixels / unit / LANES
    instructions = 0.0
    mufu = 0.0
    if found is not None:
        each = {name: found["step"][name] + found["sometimes"][name] / 16 for name in found["step"]}
        warps = blocks * 128 / LANES
        instructions = turns * each["instructions"] + warps * found["tile"]["instructions"]
        mufu = LANES * (turns * each["mufu"] + warps * found["tile"]["mufu"])
    return Work(kernel, memory=memory, mufu=mufu, instructions=instructions)


def library(flops: float, memory: float, launches: int = 1) -> Work:
    """Return the work of products that the library computes."""
    return Work("library", flops=flops, memory=memory, launches=launches, library=True)


def of_product(flops: float, *shares: tuple[str, float, float]) -> tuple[Before, ...]:
    """Return times from percent of the product rate, least and most, by backend."""
    ideal = 1e3 * flops / (H200.tflops["bfloat16"] * 1e12)
    return tuple(
        Before(backend, 100 * ideal / most, 100 * ideal / least) for backend, least, most in shares
    )


def of_copy(size: float, *shares: tuple[str, float, float]) -> tuple[Before, ...]:
    """Return times from percent of the copy rate, least and most, by backend."""
    ideal = 1e3 * size / (H200.copy * 1e12)
    return tuple(
        Before(backend, 100 * ideal / most, 100 * ideal / least) for backend, least, most in shares
    )


def contrastive_loss(B: int = 32768, D: int = 512) -> Iterable[Pass]:
    """Yield both passes of B images and as many texts: tiles of 128 x 128, chunks of 4096."""
    shape = f"{B} x {B} x {D}, bf16"
    form = "bfloat16 contrastive"
    tiles = (B / 128) ** 2
    chunks = B // 4096
    product = 2 * B * B * D
    features = HALF * B * D
    copies = Work(
        "contrastive_loss_scale_rows_kernel", memory=2 * 2 * features, launches=2
    )  # read and written, of both sides
    parts = 2 * 4 * FLOAT * B * B / 128  # four statistics of the rows and columns of every tile
    stats = tiled(
        "contrastive_loss_stats_kernel",
        form,
        tiles,
        D / 64,
        flops=product,
        l2=tiles * D * (128 + 128) * HALF,
        memory=(1 + chunks) * features + parts,
        launches=chunks,
    )
    merge = Work("contrastive_loss_merge_kernel", memory=parts, launches=2 * chunks)
    yield Pass(
        "contrastive_loss",
        "forward",
        "triton",
        shape,
        (copies, stats, merge),
        flops=product,
        before=of_product(product, ("cuda", 2, 2), ("triton", 6, 6)),
    )
    blocks = chunks * chunks
    coefficients = tiled(
        "contrastive_loss_coefficients_kernel",
        form,
        tiles,
        D / 64,
        flops=product,
        # The coefficients are written to L2, where the two products find them.
        l2=tiles * D * (128 + 128) * HALF + HALF * B * B,
        memory=blocks * 2 * 4096 * D * HALF,
        launches=blocks,
    )
    sums = 2 * FLOAT * blocks * 4096 * D  # float32, read and written by every block
    rows = Work(
        "contrastive_loss_bwd_rows_kernel", memory=2 * B * D * (FLOAT + 2 * HALF), launches=2
    )
    yield Pass(
        "contrastive_loss",
        "backward",
        "triton",
        shape,
        (copies, coefficients, library(2 * product, 2 * sums, 2 * blocks), rows),
        flops=3 * product,
        before=of_product(3 * product, ("cuda", 3, 4), ("triton", 7, 7)),
    )


def patch_text_similarity(
    B: int = 4096, T: int = 4096, N: int = 196, D: int = 512
) -> Iterable[Pass]:
    """Yield the passes with 128 texts and all patches, in 128 + 64 + 16 columns, to a tile."""
    shape = f"{B} x {T} x {N} x {D}, bf16"
    P = 208
    tiles = B * T / 128
    forward_chunks = -(-B // ((64 << 20) // (2 * P * (D + P))))
    cosines = 2 * B * T * P * D
    patches = HALF * B * N * D
    copies = HALF * B * P * D
    grams = HALF * B * P * P
    outputs = 3 * FLOAT * B * T
    rows = Work(
        "patch_text_similarity_rows_kernel", memory=patches + copies, launches=forward_chunks
    )
    gram = Work(
        "patch_text_similarity_gram_kernel",
        flops=2 * B * 0.75 * 256 * 256 * D,
        l2=B * 3 * (128 + 128) * D * HALF,
        memory=copies + grams,
        launches=forward_chunks,
    )
    # P G of one text: the blocks on and above the diagonal.
    half = 128 * 128 + 128 * 64 + 64 * 64 + 128 * 16 + 64 * 16 + 16 * 16
    for pool, name in ((0, "forward, vector"), (1, "forward, score")):
        squares = 2 * B * T * half if pool == 0 else 0
        forward = tiled(
            "patch_text_similarity_gram_fwd_kernel",
            f"bfloat16 pool {pool} weight 0{' masked' if pool else ''}",
            tiles,
            D / 64,
            flops=cosines + squares,
            l2=tiles * HALF * (D * (128 + P) + (half if pool == 0 else 0)),
            memory=copies + outputs + (grams if pool == 0 else 0),
            launches=forward_chunks,
        )
        repair = Work("patch_text_similarity_gram_cancelled_kernel", launches=forward_chunks)
        useful = 2 * B * T * N * (D + N if pool == 0 else D)
        yield Pass(
            "patch_text_similarity",
            name,
            "triton",
            shape,
            (rows, gram, forward, repair) if pool == 0 else (rows, forward),
            flops=useful,
            before=of_product(useful, ("cuda", 8, 10), ("triton", *((8, 10), (17, 21))[pool])),
        )
    table = HALF * B * T * P  # of P, P G or the coefficients
    chunks = -(-B // ((448 << 20) // (6 * T * P + 10 * P * D + 8 * P * P)))
    weights = tiled(
        "patch_text_similarity_gram_bwd_weights_kernel",
        "bfloat16 pool 0 weight 0",
        tiles,
        D / 64,
        flops=cosines,
        l2=tiles * HALF * D * (128 + P),
        memory=copies + table,
        launches=chunks,
    )
    coefficients = tiled(
        "patch_text_similarity_gram_bwd_coefficients_kernel",
        "bfloat16 pool 0 weight 0",
        tiles,
        D / 64,
        flops=cosines,
        l2=tiles * HALF * D * (128 + P),
        memory=copies + 4 * table,
        launches=chunks,
    )
    narrow = 2 * B * T * P * P
    backward = 2 * B * T * N * (3 * D + 2 * N)
    yield Pass(
        "patch_text_similarity",
        "backward, vector",
        "triton",
        shape,
        (
            rows,
            gram,
            weights,
            library(narrow, 2 * table + grams, chunks),  # P G
            coefficients,
            library(cosines, table + copies, chunks),  # d texts
            library(cosines, table + FLOAT * B * P * D, chunks),  # d patches along the texts
            library(narrow, 2 * table, chunks),  # the Hessians of |v|^2
            library(2 * B * P * P * D, copies + FLOAT * B * P * D, chunks),
            Work(
                "patch_text_similarity_gram_bwd_patches_kernel",
                memory=B * P * D * (2 * FLOAT + 2 * HALF),
                launches=chunks,
            ),
        ),
        flops=backward,
        before=of_product(backward, ("cuda", 3, 5), ("triton", 9, 11)),
    )


def center_assignment(B: int = 768, L: int = 196, G: int = 8, D: int = 768) -> Iterable[Pass]:
    """Yield both passes with keys and values apart; every token is read once a pass."""
    shape = f"{B} x {L} x {G} x {D}, bf16"
    tokens = HALF * B * L * D
    small = HALF * B * G * D
    index = 8 * B * L
    forward = 2 * tokens + 2 * small + index
    backward = 4 * tokens + 4 * small + index
    yield Pass(
        "center_assignment",
        "forward",
        "cuda",
        shape,
        (Work("center_assignment_fwd_few_kernel", memory=forward),),
        bytes=forward,
        before=of_copy(forward, ("cuda", 35, 50), ("triton", 55, 55)),
    )
    yield Pass(
        "center_assignment",
        "backward",
        "cuda",
        shape,
        (Work("center_assignment_bwd_few_kernel", memory=backward),),
        bytes=backward,
        before=of_copy(backward, ("cuda", 12, 18), ("triton", 35, 35)),
    )


def segclip_center_assignment(
    B: int = 768, L: int = 196, G: int = 8, D: int = 768, groups: int = 12
) -> Iterable[Pass]:
    """Yield both passes of the chain: norm of the tokens, deviations of the keys, assignment."""
    shape = f"{B} x {L} x {G} x {D}, {groups} groups, bf16"
    tokens = HALF * B * L * D
    rows = FLOAT * B * L
    product = 2 * B * L * D * D // groups
    small = HALF * B * G * D
    folds = Work("torch, [B, G, D]", memory=12 * small, launches=12)
    forward = (
        Work("torch, layer norm", memory=2 * tokens),
        tiled(
            "segclip_center_assignment_fwd_std_kernel",
            DEVIATION,
            B * L / 128,
            groups,
            flops=product,
            l2=B * L / 128 * HALF * D * (128 + D // groups),
            memory=tokens + rows,
        ),
        folds,
        Work("center_assignment_fwd_few_kernel", memory=tokens + 2 * rows + 2 * small),
    )
    least = 2 * tokens + tokens  # the norm is kept for the backward, and read by the assignment
    yield Pass(
        "segclip_center_assignment",
        "forward",
        "triton, cuda",
        shape,
        forward,
        bytes=least,
        before=of_copy(least, ("both", 3, 4)),
    )
    backward = (
        Work("center_assignment_bwd_few_kernel", memory=2 * tokens + 3 * rows + 4 * small),
        tiled(
            "segclip_center_assignment_bwd_tokens_kernel",
            DEVIATION,
            B * L / 128,
            groups,
            flops=2 * product,
            l2=B * L / 128 * HALF * D * (128 + D // groups),
            memory=2 * tokens + 3 * rows,
        ),
        tiled(
            "segclip_center_assignment_bwd_weight_kernel",
            DEVIATION,
            528,  # programs, which share the tokens of each group
            B * L / 128 * groups / 528,
            flops=2 * product,
            l2=tokens,
            memory=tokens,
        ),
        replace_launches(folds, 24),
        Work("torch, sum of both gradients", memory=3 * tokens),
        Work("torch, layer norm backward", memory=3 * tokens, launches=3),
    )
    least = 4 * tokens
    yield Pass(
        "segclip_center_assignment", "backward", "triton, cuda", shape, backward, bytes=least
    )


def replace_launches(work: Work, launches: int) -> Work:
    """Return ``work`` twice as much, in another number of launches."""
    return Work(work.kernel, memory=2 * work.memory, launches=launches)


def dense_contrastive_loss(B: int = 128, N: int = 784, D: int = 512) -> Iterable[Pass]:
    """Yield the selection, which is most of the forward, and the gradients of what it chose."""
    shape = f"{B} texts x {B * N} pixels x {D}, bf16"
    chosen = 96
    product = 2 * B * B * N * D
    pixels = HALF * B * N * D
    similarities = FLOAT * B * B * N
    gathered = 2 * HALF * B * chosen * D
    yield Pass(
        "dense_contrastive_loss",
        "forward",
        "cuda",
        shape,
        (
            Work("dense_contrastive_loss_select_norms_kernel", memory=pixels),
            # The texts are float32: a high and a low half of 16 bits, whose products are added
            # where they are read.
            library(2 * product, pixels + 2 * similarities),
            Work("dense_contrastive_loss_select_best_kernel", memory=2 * similarities, launches=2),
            Work("dense_contrastive_loss_fwd_gather_kernel", memory=gathered),
        ),
        bytes=pixels,
        before=(Before("cuda", 0.9, 0.9), Before("triton", 1.5, 2.0)),
    )
    yield Pass(
        "dense_contrastive_loss",
        "backward",
        "cuda",
        shape,
        (
            Work("zeros of d pixels", memory=pixels),
            Work("dense_contrastive_loss_bwd_pixels_kernel", memory=3 * gathered, launches=3),
        ),
        bytes=pixels,
    )


def similarity_contrastive_loss(B: int = 4096, T: int = 4096) -> Iterable[Pass]:
    """Yield both passes over a matrix that is there."""
    shape = f"{B} x {T}, float32"
    matrix = FLOAT * B * T
    kernel = "similarity_contrastive_loss_fwd_kernel"
    yield Pass(
        "similarity_contrastive_loss",
        "forward",
        "cuda",
        shape,
        (Work(kernel, memory=matrix, mufu=2 * B * T, launches=2),),
        bytes=matrix,
    )
    yield Pass(
        "similarity_contrastive_loss",
        "backward",
        "cuda",
        shape,
        (Work("similarity_contrastive_loss_bwd_kernel", memory=2 * matrix, mufu=2 * B * T),),
        bytes=2 * matrix,
    )


def label_operators() -> Iterable[Pass]:
    """Yield what makes labels of logits.

    Of smooth maps, as those of the benchmark's case ``structured``, 3 of 150 classes can win in a
    cell on average; of independent numbers, all.
    """
    side = 1024
    pixels = side * side
    for name, classes in (("forward", 3), ("forward, of noise", 150)):
        yield Pass(
            "upsample_argmax",
            name,
            "cuda",
            "150 x 32 x 32 to 1024 x 1024, float32",
            (
                by_pixel(
                    "upsample_argmax_fwd_kernel",
                    "float",
                    classes * pixels,
                    4,  # two classes of two pixels
                    memory=FLOAT * 150 * 32 * 32 + 8 * pixels,
                    blocks=32 * 32,
                ),
            ),
            bytes=8 * pixels,
            before=(Before("cuda", 0.075, 0.125), Before("triton", 0.11, 0.11))
            if classes == 3
            else (),
        )
    pixels = 2 * 512 * 512
    yield Pass(
        "window_argmax",
        "forward",
        "cuda",
        "2 windows of 171 x 32 x 32, 683 x 512 to 640 x 480, float32",
        (
            by_pixel(
                "window_argmax_fwd_kernel",
                "float",
                171 * pixels,
                1,
                memory=FLOAT * 171 * 2 * 32 * 32 + 8 * 640 * 480,
            ),
        ),
        bytes=8 * 640 * 480,
        before=(Before("cuda", 1.0, 3.0), Before("triton", 1.0, 3.0)),
    )


def upsample_mask_loss(B: int = 4, C: int = 156, h: int = 32, H: int = 512) -> Iterable[Pass]:
    """Yield both passes: every class of every pixel, whose label all classes read."""
    shape = f"{B} x {C} x {h} x {h} to {H} x {H}, float32"
    pixels = B * H * H
    maps = FLOAT * B * C * h * h
    codes = FLOAT * pixels
    # The backward adds to the gradient where a block of 128 columns passes a row of samples.
    passed = B * C * h * H // 128
    for name, kernel, unit, written, blocks, before in (
        ("forward", "upsample_mask_loss_fwd_kernel", 4, 0, 0, (Before("cuda", 2.0, 3.0),)),
        ("backward", "upsample_mask_loss_bwd_kernel", 1, maps, passed, ()),
    ):
        moved = maps + codes + written
        work = by_pixel(kernel, "float", C * pixels, unit, memory=moved, blocks=blocks)
        # Labels come from L2 once for every class.
        work = Work(
            kernel,
            l2=C * codes,
            memory=work.memory,
            mufu=work.mufu,
            instructions=work.instructions,
        )
        finish = Work("upsample_mask_loss_finish_kernel", memory=FLOAT * 5 * B * C)
        kernels = (work, finish) if name == "forward" else (work,)
        yield Pass(
            "upsample_mask_loss",
            name,
            "cuda",
            shape,
            kernels,
            bytes=moved,
            before=before,
        )


def passes() -> list[Pass]:
    """Return every operator and pass at the shapes at which they are judged."""
    return [
        *contrastive_loss(),
        *patch_text_similarity(),
        *center_assignment(),
        *segclip_center_assignment(),
        *dense_contrastive_loss(),
        *similarity_contrastive_loss(),
        *label_operators(),
        *upsample_mask_loss(),
    ]
