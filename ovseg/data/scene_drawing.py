"""The pixels of a scene: textures, shapes, digit cards. A drawn pixel belongs to one class."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

COLOURS = {
    "red": (205, 40, 40),
    "green": (40, 160, 60),
    "blue": (45, 75, 215),
    "orange": (240, 145, 20),
    "purple": (135, 50, 165),
    "white": (235, 235, 235),
    "yellow": (235, 210, 40),
}


_DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


# Mean colour of the photo textures, which scikit-image ships in grey.
_PHOTO_TINT = {"brick": (150, 92, 72), "grass": (88, 128, 62), "gravel": (128, 124, 120)}


def background(
    form: str, stuff: str, size: int, split: str, rng: np.random.Generator
) -> np.ndarray:
    """Draw a texture, uint8 [size, size, 3]."""
    if form == "digits":
        return _photo(stuff, size, split, rng)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    noise = rng.normal(0, 1, (size, size, 1)).astype(np.float32)
    phase = rng.uniform(0, 6.28)
    if stuff == "grass":
        base = np.array([84, 132, 62]) + 26 * noise
    elif stuff == "water":
        wave = np.sin(y / size * 50 + 2.0 * np.sin(x / size * 19 + phase))
        base = np.array([92, 142, 178]) + 16 * wave[..., None] + 5 * noise
    elif stuff == "sand":
        ripple = np.sin((0.5 * x + y) / size * 60 + phase)
        base = np.array([214, 184, 132]) + 9 * ripple[..., None] + 7 * noise
    elif stuff == "night":
        stars = (rng.random((size, size, 1)) < 0.012) * 190.0
        base = np.array([12, 20, 36]) + 4 * noise + stars
    else:
        raise ValueError(f"stuff is {stuff!r}; expected grass, water, sand or night")
    return np.clip(base * rng.uniform(0.88, 1.12), 0, 255).astype(np.uint8)


def place(
    form: str,
    image: np.ndarray,
    occupied: np.ndarray,
    colour: str,
    kind: str,
    split: str,
    rng: np.random.Generator,
) -> np.ndarray | None:
    """Draw one object into ``image`` where nothing is yet.

    Args:
        form: ``digits`` or ``shapes``.
        image: uint8 [H, H, 3], which is drawn into.
        occupied: bool [H, H], likewise.
        colour: name of a colour.
        kind: name of a shape or digit.
        split: whose handwriting is used.
        rng: what is random comes from it.

    Returns:
        Its mask; None when no place was free.
    """
    size = image.shape[0]
    for _ in range(30):
        low, high = (0.20, 0.32) if form == "shapes" else (0.22, 0.30)
        radius = size * rng.uniform(low, high)
        cy, cx = rng.uniform(0.8 * radius, size - 0.8 * radius, 2)
        angle = rng.uniform(-0.3, 0.3) if form == "digits" else rng.uniform(-0.45, 0.45)
        y, x = np.mgrid[0:size, 0:size] + 0.5
        # The object's own axes, -1 .. 1.
        v = ((y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)) / radius
        u = ((y - cy) * np.sin(angle) + (x - cx) * np.cos(angle)) / radius
        area = _inside("card" if form == "digits" else kind, u, v)
        if not area.any() or (area & occupied).any():
            continue
        ink = np.array(COLOURS[colour], np.float32) * rng.uniform(0.82, 1.12) + rng.normal(0, 8, 3)
        pixels = np.broadcast_to(ink, (int(area.sum()), 3)).astype(np.float32)
        pixels = pixels * (1.0 + 0.12 * (u + v)[area][:, None])  # light from one side
        if form == "digits":
            stroke = _digit(kind, u[area], v[area], split, rng)[:, None]
            pixels = pixels * (1 - stroke) + np.float32(rng.uniform(5, 40)) * stroke
        image[area] = np.clip(pixels + rng.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)
        occupied |= area
        return area
    return None


def _inside(kind: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    if kind == "circle":
        return u * u + v * v < 0.85
    if kind == "square":
        return np.maximum(abs(u), abs(v)) < 0.8
    if kind == "triangle":
        return (v < 0.75) & (v > -0.95) & (abs(u) < 0.55 * (v + 0.95))
    if kind == "cross":
        return (np.minimum(abs(u), abs(v)) < 0.32) & (np.maximum(abs(u), abs(v)) < 0.95)
    if kind == "card":
        return (abs(u) < 0.85) & (abs(v) < 1.0)
    raise ValueError(f"kind is {kind!r}; expected circle, square, triangle, cross or card")


@lru_cache(maxsize=1)
def _handwriting() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images / 16.0).astype(np.float32), data.target


@lru_cache(maxsize=8)
def _photo_pixels(stuff: str) -> np.ndarray:
    import skimage.data

    grey = getattr(skimage.data, stuff)().astype(np.float32)
    return grey / grey.mean()


def _photo(stuff: str, size: int, split: str, rng: np.random.Generator) -> np.ndarray:
    """Cut out of the photograph; rows 0-351 are for training and the rest for validation."""
    first, end = (0, 352) if split == "train" else (352, 512)
    grey = _photo_pixels(stuff)
    crop = min(2 * size, end - first)  # twice the picture's size, halved: photographs are coarse
    top = rng.integers(first, end - crop + 1)
    left = rng.integers(0, grey.shape[1] - crop + 1)
    index = (np.arange(size) + 0.5) * crop / size
    at = np.clip(index.astype(int), 0, crop - 1)
    patch = grey[top : top + crop, left : left + crop]
    patch = 0.25 * (
        patch[np.ix_(at, at)]
        + patch[np.ix_(at - 1, at)]
        + patch[np.ix_(at, at - 1)]
        + patch[np.ix_(at - 1, at - 1)]
    )
    if rng.random() < 0.5:
        patch = patch[:, ::-1]
    tint = np.array(_PHOTO_TINT[stuff], np.float32) * rng.uniform(0.85, 1.15) + rng.normal(0, 4, 3)
    return np.clip(patch[..., None] * tint, 0, 255).astype(np.uint8)


def _digit(
    kind: str, u: np.ndarray, v: np.ndarray, split: str, rng: np.random.Generator
) -> np.ndarray:
    """Return the ink of a handwritten digit at card coordinates, bilinear; 0 off the digit.

    Args:
        kind: the digit in words.
        u: across, -1 .. 1.
        v: down, -1 .. 1.
        split: whose handwriting is used.
        rng: chooses the writer.
    """
    images, target = _handwriting()
    # Of 1797 digits in file order the first are for training, the rest for validation.
    border = 1200
    every = np.flatnonzero(target == _DIGIT_WORDS.index(kind))
    pool = every[every < border] if split == "train" else every[every >= border]
    glyph = np.pad(images[pool[rng.integers(len(pool))]], 1)
    gy = np.clip((v / 0.92 + 1) * 4 + 0.5, 0, 8.999)
    gx = np.clip((u / 0.80 + 1) * 4 + 0.5, 0, 8.999)
    y0 = gy.astype(int)
    x0 = gx.astype(int)
    fy = gy - y0
    fx = gx - x0
    ink = (
        glyph[y0, x0] * (1 - fy) * (1 - fx)
        + glyph[y0, x0 + 1] * (1 - fy) * fx
        + glyph[y0 + 1, x0] * fy * (1 - fx)
        + glyph[y0 + 1, x0 + 1] * fy * fx
    )
    return np.clip(1.6 * ink, 0, 1).astype(np.float32)
