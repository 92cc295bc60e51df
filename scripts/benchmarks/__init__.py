"""Speed, memory and load of our networks beside those of other libraries: `python -m scripts.benchmarks.NAME`."""
