"""Clock, memory, error, and the check that stands before them. Each returns one block of a record."""
