"""The worker's front process: gRPC, text, and the care of the engine process."""
