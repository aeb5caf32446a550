"""What quantization costs: ``python -m benchmarks``."""
