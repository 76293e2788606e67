"""The door: `python -m sera_jax.train`."""

from sera_jax.train.loop import main

if __name__ == "__main__":
    main()
