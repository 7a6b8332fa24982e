"""Benchmarks of laplace_lora; ``python -m benchmarks`` lists them, README.md has their results."""
