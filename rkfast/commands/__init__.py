"""Commands on a network that the command line names."""
