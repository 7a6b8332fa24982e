"""What the benchmarks share: arguments, timing, peak memory, workloads and reports."""
