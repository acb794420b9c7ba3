"""Draw docs/photographs.png: scikit-image's own photographs, labelled by the bundled model.

    python scripts/photographs_page.py docs/photographs.png

Each is asked for what it shows and for the same thirty distractors. The photographs are in
scikit-image's wheel: Chelsea (Stefan van der Walt), coffee (Rachel Michetti) and rocket (SpaceX)
are CC0, the astronaut (NASA) is in the public domain.
"""

import sys

import skimage.data
from PIL import Image

import ovseg

SHOWN = {
    "chelsea": ["cat", "wall"],
    "coffee": ["cup"],
    "astronaut": ["person"],
    "rocket": ["sky", "tower", "grass"],
}
DISTRACTORS = """
    car bus bicycle dog horse sheep cow bird elephant giraffe sofa chair bed toaster bottle pizza
    cake laptop book train boat aeroplane motorbike toilet umbrella skateboard surfboard kite
    refrigerator clock
"""
HEIGHT = 360
GAP = 4


def at_width(image: Image.Image, width: int) -> Image.Image:
    size = (width, round(image.height * width / image.width))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def main(out: str) -> None:
    model = ovseg.from_pretrained("pacl_lite0:photos")
    columns = []
    for name, words in SHOWN.items():
        picture = getattr(skimage.data, name)()
        found = ovseg.segment(picture, [*words, *DISTRACTORS.split()], model=model)
        largest = sorted(found.areas.items(), key=lambda item: -item[1])[:3]
        print(f"{name}: {', '.join(f'{label} {share:.0%}' for label, share in largest)}")
        width = round(picture.shape[1] * HEIGHT / picture.shape[0])
        columns.append(
            [at_width(Image.fromarray(picture), width), at_width(found.overlay(), width)]
        )
    tallest = max(column[1].height for column in columns)
    page_width = sum(column[0].width + GAP for column in columns) - GAP
    page = Image.new("RGB", (page_width, HEIGHT + GAP + tallest), "white")
    left = 0
    for column in columns:
        page.paste(column[0], (left, 0))
        page.paste(column[1], (left, HEIGHT + GAP))
        left += column[0].width + GAP
    page.quantize(192, dither=Image.Dither.FLOYDSTEINBERG).save(out, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
