"""Many recipes beside each other."""
