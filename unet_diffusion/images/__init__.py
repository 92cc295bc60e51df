"""One image: from a file to an array, from stored values to [-1, 1] and back, and shown."""
