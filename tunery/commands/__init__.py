"""The subcommands of `tunery`, a module for each group."""
