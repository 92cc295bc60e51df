"""The values that stand for no class: in masks and in labels."""

IGNORE_INDEX = 255  # of mask pixels that neither a loss nor a metric counts
NO_LABEL = -1  # of an image without a class label
