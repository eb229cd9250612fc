"""How many bits each pack gets: budgets, an exact solver, and the greedy one of the Pack-PTQ paper."""
