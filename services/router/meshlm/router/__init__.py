"""The router: the mesh's front door. `pipeline.py` reads as the way of a request."""
