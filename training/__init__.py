"""Learning of solver tables and of models: predictors, their files, distillation, reinforcement learning."""

from interrupts import end_at_once_where_started

end_at_once_where_started()
