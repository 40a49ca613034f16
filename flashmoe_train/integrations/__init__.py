"""One folder a framework: all knowledge of it and of its versions lives there and nowhere else."""
