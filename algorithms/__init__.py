"""Reward fine-tuning algorithms, one file each."""
