"""The HTTP endpoint on Ray Serve. Not built yet: see the README, "What it cannot do yet"."""
