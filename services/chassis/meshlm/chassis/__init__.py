"""What every service stands on: configuration, errors, server life, channels, telemetry."""
