"""What is learnt: each task says its batches, loss, validation and what is saved."""
