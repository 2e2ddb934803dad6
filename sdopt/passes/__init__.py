"""The passes: one file, one class, one word on the command line each."""
