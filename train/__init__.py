"""Programs that train a model: each is a module to run (`python -m train.NAME`). Nothing imports them."""
