from .cli.ending import program

program()
