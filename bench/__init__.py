"""The ops beside eager and compiled PyTorch: ``rkfast bench ops``, or in a checkout ``python bench/run.py ops``."""
