"""What `benchmarks.peers` is made of: environments, weights, processes, pairs of runs, and the report."""
