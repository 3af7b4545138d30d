"""What the subcommands of ``rev-det`` do: one module each, with run(args) -> exit code.

Their arguments are in ``rev_det_cli``, the module beside this package.
"""
