"""From a choice of replicas to a stream that outlives workers and connections."""
