"""The commands of `saekit`: a public module here is a command by being there.

A command has a `run(argv)`, and its docstring's first line is the help that `saekit --help` shows.
It imports what it needs when it is run, so that `saekit --help` answers at once.
"""
