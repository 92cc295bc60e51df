"""The tasks that a network can learn: each has its batches, loss and validation, and saves what users load."""
