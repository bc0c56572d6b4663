"""The command line, clusters, sweeps, reports. Read first: launch/cli.py."""
