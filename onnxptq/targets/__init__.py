"""One file per deployment target: what is legal and where quantizers go."""
