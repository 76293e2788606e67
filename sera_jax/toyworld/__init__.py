"""A synthetic preference world with a known gold reward: `python -m sera_jax.toyworld --out DIR`.

A prompt asks for facts about people; a good response states each of them, truly, once and in the order asked:

    prompt    please tell : tom colour pet ; ann town ?
    response  well tom likes amber and truly keeps rabbit , i think ann visits minsk .

What is asked has to be copied from the prompt, what is true looked up in a fixed table (`truth`). Authors know one
part of the table and mostly get the other part wrong in one and the same way (`lure`), so that a model which imitates
them is right here and wrong there, samples the truth everywhere, and has something to learn from preferences. Filler
words cost and earn nothing: length is the easy cue, content the hard feature. The emphasis "truly" is the trap: one or
two make a response better, and no author writes more; every further one makes it worse.

facts    the words, the truth, the gold reward        ← read this first
authors  prompts, and who writes responses: the plain author, the stranger
labels   annotators: noise, flips, cues; responses → pairs
folder   the model's folder: tokenizer and config of a small Llama, no weights
door     the command line: writes a world; labels candidates of a model

Written into DIR: model/, sft.jsonl, pairs.jsonl, prompts.jsonl, tuning_prompts.jsonl, eval_prompts.jsonl. `--label
CANDIDATES --out PAIRS` labels what `sera_jax.generate` wrote. The gold reward is `sera_jax.toyworld:gold` wherever a
config takes "module:function".
"""

from sera_jax.toyworld.authors import STRANGER, Author, compose, write_prompts
from sera_jax.toyworld.door import ToyworldConfig, label_candidates, main, write_world
from sera_jax.toyworld.facts import asked, gold, lure, statements, truth, vocabulary
from sera_jax.toyworld.folder import model_config, parameter_count, tokenizer, write_model
from sera_jax.toyworld.labels import Annotator, annotate

__all__ = [
    "STRANGER",
    "Annotator",
    "Author",
    "ToyworldConfig",
    "annotate",
    "asked",
    "compose",
    "gold",
    "label_candidates",
    "lure",
    "main",
    "model_config",
    "parameter_count",
    "statements",
    "tokenizer",
    "truth",
    "vocabulary",
    "write_model",
    "write_prompts",
    "write_world",
]
