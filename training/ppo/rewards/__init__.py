"""Rewards: images in [0, 1] and prompts to raw scores."""
