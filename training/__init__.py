"""Learning of solver tables and of models: predictors, their files, distillation, reinforcement learning."""
