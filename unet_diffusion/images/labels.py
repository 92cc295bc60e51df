"""The values that stand for no class, in masks and in labels."""

IGNORE_INDEX = 255  # mask pixels that no loss and no metric counts
NO_LABEL = -1  # an image without a class label
