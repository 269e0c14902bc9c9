"""The worker: a front process that speaks gRPC and an engine process that runs a model."""
