"""One image: from its file to an array, from stored values to [-1, 1] and back, and to figures."""
