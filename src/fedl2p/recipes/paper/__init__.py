"""The recipes of the paper's tables, the settings that they share, and the tables."""
