"""Preference models against transformers and torch: an export of either kind, asked by hand in both orders, from text,
answers as ours does; the averaging is NumPy's, in float64."""

import json

import numpy as np
import pytest

from sera_jax import config as configs
from sera_jax import policies, reward_model
from sera_jax.config import RewardModelConfig
from sera_jax.ledger import Ledger

torch = pytest.importorskip("torch", reason="parity with transformers needs torch: install the `parity` extra")
transformers = pytest.importorskip("transformers")

CHAT = "{% for m in messages %}<s> {{ m.content }} {% endfor %}{% if add_generation_prompt %}</s> dog {% endif %}"
ASKED = [
    ("the cat sees", "red ball", "blue box in the box"),
    ("it", "a dog", "dog"),
    (({"role": "user", "content": "cat"}, {"role": "assistant", "content": "dog"}), "green on", "runs runs runs"),
]


def exported(tiny, tmp_path, kind: str, *flags: str):
    """A model of the kind, trained for a while on the tiny pairs (tiny_config: meshes of one device)."""
    return reward_model.train(
        configs.parse(
            RewardModelConfig,
            [
                f"--kind={kind}",
                f"--run.dir={tmp_path / kind}",
                f"--model.path={tiny / 'model'}",
                "--model.weights=random",
                f"--data.pairs=[{tiny / 'pairs.jsonl'}]",
                "--data.max_length=64",
                "--data.max_prompt_length=24",
                "--optimizer.batch_size=16",
                "--optimizer.learning_rate=1e-2",
                "--run.compilation_cache=off",
                "--mesh.fsdp=1",
                *flags,
            ],
        )
    )


def asked_by_hand(tokenizer, prompt, first: str, second: str, labels: tuple[str, str]) -> str:
    """The question as a text, after the paper's format, with what stands around it."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    context = "".join(f"\n\n<turn> {turn['role']}\n {turn['content']}" for turn in turns)
    text = f"[CONTEXT] {context} [RESPONSE {labels[0]}] {first} [RESPONSE {labels[1]}] {second} \n"
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
    return text  # the tiny tokeniser begins no text with BOS


def test_a_generative_model_answers_alike(tiny, tiny_config, tmp_path, one_device):
    """Asked in plain text, and as the user's turn of a chat template."""
    export = exported(tiny, tmp_path, "preference", "--preference.labels=[red, blue]")
    told = json.loads((export / "config.json").read_text())
    assert told["architectures"] == ["LlamaForCausalLM"] and told["preference"]["labels"] == ["red", "blue"]
    plain = answers_alike(export, tmp_path / "plain", one_device, chat=False)
    (export / "chat_template.jinja").write_text(CHAT)
    assert np.abs(answers_alike(export, tmp_path / "chat", one_device, chat=True) - plain).max() > 1e-3


def answers_alike(export, ledger, mesh, *, chat: bool) -> np.ndarray:
    """Probabilities of ASKED that a generative model gives, compared with torch's."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    assert bool(tokenizer.chat_template) == chat
    theirs = transformers.AutoModelForCausalLM.from_pretrained(export, dtype=torch.float64).eval()
    red, blue = tokenizer.convert_tokens_to_ids(["red", "blue"])

    def p_first(*asked) -> float:
        ids = tokenizer(asked_by_hand(tokenizer, *asked, ("red", "blue")), add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = theirs(torch.tensor([ids])).logits[0, -1].numpy()
        two = np.exp(logits[[red, blue]] - logits[[red, blue]].max())
        return two[0] / two.sum()

    want = np.array([(p_first(c, one, other) + 1 - p_first(c, other, one)) / 2 for c, one, other in ASKED])
    places = np.array([[p_first(c, one, other), p_first(c, other, one)] for c, one, other in ASKED])
    folder, form = policies.open_preference_model(str(export), mesh, compute="float32")
    got, place = policies.folder_preferences(folder, form, ASKED, ledger=Ledger(ledger), label="asked")
    np.testing.assert_allclose(got, want, atol=1e-4)
    np.testing.assert_allclose(place, places, atol=1e-4)
    assert np.ptp(want) > 0.003 and np.abs(places - 0.5).max() > 0.01
    return got


def test_a_head_answers_alike(tiny, tiny_config, tmp_path, one_device):
    export = exported(tiny, tmp_path, "preference_head")
    told = json.loads((export / "config.json").read_text())
    assert told["architectures"] == ["LlamaForSequenceClassification"] and "preference" in told
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(export, dtype=torch.float64).eval()

    def scores(*asked) -> float:
        ids = tokenizer(asked_by_hand(tokenizer, *asked, ("A", "B")), add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            return float(theirs(torch.tensor([ids])).logits[0, 0])

    s = np.array([[scores(c, one, other), scores(c, other, one)] for c, one, other in ASKED])
    folder, form = policies.open_preference_model(str(export), one_device, compute="float32")
    got, _ = policies.folder_preferences(folder, form, ASKED, ledger=Ledger(tmp_path / "ledger"), label="asked")
    np.testing.assert_allclose(got, 1 / (1 + np.exp(-(s[:, 0] - s[:, 1]) / 2)), atol=1e-4)
    assert np.ptp(got) > 0.003
    swapped = [(c, other, one) for c, one, other in ASKED]
    back, _ = policies.folder_preferences(folder, form, swapped, ledger=Ledger(tmp_path / "other"), label="asked")
    np.testing.assert_allclose(got + back, 1, atol=1e-6)
