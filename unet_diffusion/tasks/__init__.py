"""The tasks that a network can learn: each has its batches, loss and validation, and saves what users load."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
