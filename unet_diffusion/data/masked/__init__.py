"""Many images with masks: from what a user names to sets that training and validation read."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
