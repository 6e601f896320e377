"""Reinforcement learning of EPD solver tables; isolated: only command lines and training.ddpm import it."""
