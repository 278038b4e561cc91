"""The command line: one file a command, each a thin call into the package. Imports what a command needs only when it runs."""
