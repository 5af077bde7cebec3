"""Layouts of published data sets: each a function from a record of a container to its turns."""
