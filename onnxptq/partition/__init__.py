"""From a graph to blocks, from blocks to scores, from scores to packs."""
