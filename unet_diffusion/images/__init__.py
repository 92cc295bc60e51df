"""One image: from its file to an array, from stored values to [-1, 1] and back, and to figures."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
