"""Hugging Face folders: a model's weights written as one, and such folders read as weights.

Needs no transformers to do either.
"""
