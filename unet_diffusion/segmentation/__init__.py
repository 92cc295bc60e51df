"""What a segmentation step minimises, how good masks are, and masks from a trained network."""
