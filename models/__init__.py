"""Programs that do real work with tinytape: `python -m models.char_lm`."""
