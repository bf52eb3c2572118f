"""Tables, figures and reports of evaluated runs, and the matrix of runs that the paper's tables need."""
