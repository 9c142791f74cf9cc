"""Plans: units, layouts and choices that say what is shared, and what that means per tensor. They hold no weight."""
