"""Training of the papers' networks: data, recipes, and the engine behind ``rkfast train``."""
