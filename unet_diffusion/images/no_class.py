"""Values in masks and labels that do not stand for a class."""

IGNORE_INDEX = 255  # mask pixels that no loss and no metric counts
NO_LABEL = -1  # an image without a class label
