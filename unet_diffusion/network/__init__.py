"""What networks are built of, and tiles for images of any size."""
