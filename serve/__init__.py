"""The generator over HTTP, on Ray Serve."""
