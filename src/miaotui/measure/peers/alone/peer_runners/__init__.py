"""One small program for each engine that `benchmarks.peers` compares, each run by that engine's own Python."""
