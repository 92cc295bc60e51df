"""How good a result is: scores of masks, distances of generated images, copies of training images."""
