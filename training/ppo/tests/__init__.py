"""Tests of training.ppo."""
