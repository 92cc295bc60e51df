"""What a noise predictor minimises, and how images are made with it."""
