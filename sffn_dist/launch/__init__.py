"""Who started this process, and how it ends: launcher variables, signals, exit codes, run lock, run identity.

No torch.
"""
