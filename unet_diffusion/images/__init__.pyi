from .decoding import decode_image as decode_image
from .palette import mask_image as mask_image
from .palette import overlay as overlay
from .pixel_range import PixelRange as PixelRange
