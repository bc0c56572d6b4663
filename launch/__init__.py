"""The command line, clusters, sweeps, reports. Read first: launch/cli.py."""

import trivet

# Here, since `python -m launch.train` puts the folder where one stands before everything that is installed.
trivet.refuse_foreign_packages()
