"""Settings of runs and options of commands. Imports neither torch nor an engine.

``schema`` and ``draft`` declare the settings of a run, ``options`` those of the other commands, with ``field`` and
``allowed``. ``compose`` reads YAML files and the command line, ``rules`` checks values, ``derived`` holds values that
follow from several settings, and ``describe`` reads documentation out of the declarations.
"""
