"""Reports of comparisons: tables, figures, and a check of the paper's claims."""
