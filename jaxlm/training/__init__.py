"""Training: schedules, optimizers, the sharded step. The loss is an argument: nothing here knows a model."""
