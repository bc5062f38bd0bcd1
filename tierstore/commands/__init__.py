"""One module for each subcommand of `tierstore`: `add_arguments(parser)` and `run(args) -> exit code`."""
