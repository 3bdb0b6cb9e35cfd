"""One optimizer a file; spec/optimizers.py lists them."""
