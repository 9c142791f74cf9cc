"""Model families: where they keep their heads and neurons. Knows names and shapes only."""
