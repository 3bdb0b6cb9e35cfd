"""A trained model at work: held-out evaluation and generation."""
