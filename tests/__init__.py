"""Tests of the floors below training.ppo, and of the command lines."""
