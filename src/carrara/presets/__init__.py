"""The shapes of published models, by name: what a checkpoint is recognised by, and what a recipe may start from."""
