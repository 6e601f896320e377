"""The second job: PPO fine-tuning of a DDPM's own weights against a learned reward."""
