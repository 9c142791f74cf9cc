"""Reports: tables, figures, and what becomes of the paper's claims."""
