"""One run: a Hugging Face checkpoint and preference pairs in, an aligned Hugging Face checkpoint out.

world    what a config becomes: files read, trees made, programs built
loop     the walk, start to export                                     ← read this first
select   score → margins → select, over the given pairs
fresh    sample → reward → pairs, from the policy's own samples
update   what the updates of a stage take; the SFT stage
rounds   sample → reward → update at once: policy gradients, rejection sampling; in the place of the three above
outcome  what an iteration leaves: files, evaluation, summary, export
check    what is in the data of a config; instead of a run

python -m sera_jax.train --config configs/x.yaml [--loss.beta 0.2 ...] [--data.check true]
"""

from sera_jax.train.loop import main, train

__all__ = ["main", "train"]
