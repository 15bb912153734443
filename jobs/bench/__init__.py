"""The benchmarks behind `jobs/benchmark.py`: what is measured, against whom, and when a figure holds."""
