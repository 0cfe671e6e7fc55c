"""Larger images scaled down before they are stored, where a user asks for it."""

import cv2
import simplejpeg

from tlrunner.data.decode import Encoded, StoredImage, encode_jpeg, encode_png


def shrunk(image: StoredImage, max_side: int | None) -> StoredImage:
    """An image whose longer side is at most `max_side` pixels; a smaller one is given back as is.

    JPEG stays JPEG, at quality 95 and with full colour resolution; PNG stays PNG.

    Raises:
        BadImage: its bytes are not what was once stored.
    """
    if max_side is None or max(image.width, image.height) <= max_side:
        return image
    scale = max_side / max(image.width, image.height)
    width, height = (max(1, round(side * scale)) for side in (image.width, image.height))
    pixels, _ = Encoded(image.data).decode_for((height, width))
    pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    is_jpeg = simplejpeg.is_jpeg(image.data)
    return StoredImage(encode_jpeg(pixels) if is_jpeg else encode_png(pixels), width, height)
