"""The mesh as one thing: the `meshlm` command, the Python client, and the launcher for one machine."""
