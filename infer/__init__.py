"""Programs that use a model: each is a module to run (`python -m infer.NAME`). Nothing imports them."""
