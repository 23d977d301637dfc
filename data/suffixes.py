"""What the names of images end in."""

from importlib.util import find_spec

# torchvision's ImageFolder, then what else Pillow reads; Apple's with the package for it
HEIF = (".heic", ".heif")
HAS_HEIF = find_spec("pillow_heif") is not None
EXTENSIONS = (
    ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp",
    ".gif", ".jfif", ".jpe", ".jp2", ".pnm", ".pbm", ".avif",
) + HEIF * HAS_HEIF  # fmt: skip


def is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)
