"""The command line: parses arguments into requests, runs the workflow and prints the result."""
