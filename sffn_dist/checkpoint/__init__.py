"""Checkpoints: named tensor fragments in safetensors and one manifest, readable by any layout."""
