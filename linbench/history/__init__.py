"""A metric over commits: where it moved, and whether the code, the method, the machine or chance moved it."""
