"""Training: recipes, the trainer, gradients, checkpoints and what happens beside them."""
