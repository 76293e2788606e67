"""The door: `python -m sera_jax.compile_check`."""

from sera_jax.compile_check.door import main

if __name__ == "__main__":
    main()
