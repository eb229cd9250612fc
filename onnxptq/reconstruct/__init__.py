"""From a plan to its solution: ranges of weights, corrected biases, learnt roundings."""
