"""What a structured matrix is: factors, the map, its dense meaning, its best approximation, initialisation.

Single device.
"""
