"""A GHN's files: where they come from, what is checked before they become a module, and how they are published."""
