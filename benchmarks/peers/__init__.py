"""One file per other tool. Each runs as ``python -m benchmarks.peers.<file>`` and imports numpy and its tool only."""
