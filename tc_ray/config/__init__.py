"""Configuration: strict typed sections and how they are loaded."""
