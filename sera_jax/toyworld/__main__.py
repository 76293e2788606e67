"""The door: `python -m sera_jax.toyworld`."""

from sera_jax.toyworld.door import main

if __name__ == "__main__":
    main()
