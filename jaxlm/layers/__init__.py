"""The parts of a block: each file has `spec(cfg) -> tree of Param` beside `apply(params, cfg, x, ...)`."""
