"""The `afa` command, one file per subcommand."""
