"""What a config means, without torch: keys, validation, tensors and their split, counts, schedule, memory,
plan.
"""
