"""The command line, workflow files, and submission to a cluster."""
