"""What codistillation is compared with, each on the same step and loop."""
