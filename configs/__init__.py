"""What you change: a file per configuration, each with one `config()`; its docstring says what it is for."""
