"""What rkfast costs beside eager and compiled PyTorch: ``rkfast bench ops``, or ``python bench/run.py ops`` in a checkout."""
