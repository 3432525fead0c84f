"""How well hyperparameters transfer across width: runs, optima, pictures."""
