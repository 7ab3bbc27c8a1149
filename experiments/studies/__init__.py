"""Studies: what is true of the coefficient, with the runs behind every claim."""
