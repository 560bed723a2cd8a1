"""Training as the papers do it: their data, their recipes, and an engine for one process or many."""
