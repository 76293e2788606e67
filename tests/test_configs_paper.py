"""configs/paper: every model goes with every data set, every value says where it comes from, and data in the form that
was published is read.
"""

import json
import pathlib
import re
import typing

import jax
import pytest
import yaml

from sera_jax import config as configs
from sera_jax import data, hf
from sera_jax import model as decoder
from sera_jax.compile_check import chips, door
from sera_jax.records import Pair
from sera_jax.train import loop

ROOT = pathlib.Path(__file__).parents[1]
PAPER = ROOT / "configs" / "paper"
MODELS = [
    "llama-3-8b", "mistral-7b", "phi-2", "pythia-1b", "pythia-2.8b", "pythia-410m", "pythia-6.9b", "tinyllama-1.1b",
]  # fmt: skip
SETS_OF_PAIRS = ["hh", "tldr", "ultrafeedback"]
LABELS = ("published", "inferred", "ours")


def paper(pairs: str, model: str, *flags: str) -> configs.TrainConfig:
    files = [f"--config={PAPER / name}.yaml" for name in (pairs, model)]
    return configs.parse(configs.TrainConfig, [*files, "--model.path=folder", *flags])


def leaves(values: dict, above: str = "") -> dict[str, typing.Any]:
    found = {}
    for key, value in values.items():
        name = f"{above}{key}"
        found |= leaves(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


def test_the_files_of_the_paper_are_these():
    assert sorted(file.stem for file in PAPER.glob("*.yaml")) == sorted(MODELS + SETS_OF_PAIRS)


@pytest.mark.parametrize("pairs", SETS_OF_PAIRS)
@pytest.mark.parametrize("model", MODELS)
def test_every_model_goes_with_every_data_set(pairs, model):
    """All of what both files say, nothing of it lost to the other one; with LoRA too."""
    got = paper(pairs, model)
    for name in (pairs, model):
        for key, value in leaves(yaml.safe_load((PAPER / f"{name}.yaml").read_text(encoding="utf-8"))).items():
            if key != "model.path":
                want = tuple(value) if isinstance(value, list) else value
                assert configs.get(got, key) == want, (name, key)
    assert (got.model.path, got.loop.iterations, got.sft.epochs) == ("folder", 3, 1)
    (flags,) = re.findall(r"^#   lora      the same with (--.+)$", (PAPER / f"{model}.yaml").read_text("utf-8"), re.M)
    with_lora = paper(pairs, model, *flags.split())
    assert with_lora.lora.rank == 16 and with_lora.optimizer.learning_rate >= 10 * got.optimizer.learning_rate


@pytest.mark.parametrize("name", MODELS + SETS_OF_PAIRS)
def test_every_value_has_its_label(name):
    """On its line: published, inferred or ours."""
    text = (PAPER / f"{name}.yaml").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if re.match(r" *[\w.]+: \S", line)]
    bare = [line for line in lines if not re.search(rf" # (?:{'|'.join(LABELS)})\b", line)]
    assert not bare
    assert len(lines) == len(leaves(yaml.safe_load(text)))  # a value to a line


@pytest.mark.parametrize("pairs", SETS_OF_PAIRS)
def test_what_the_paper_does_is_the_same_on_each_data_set_and_in_sera_yaml(pairs):
    general = leaves(yaml.safe_load((ROOT / "configs" / "sera.yaml").read_text(encoding="utf-8")))
    own = leaves(yaml.safe_load((PAPER / f"{pairs}.yaml").read_text(encoding="utf-8")))
    method = ("loop.", "loss.", "reward.", "select.", "bootstrap.", "optimizer.")
    of_the_data = {"bootstrap.max_new_tokens"}
    shared = {key for key in own.keys() & general.keys() if key.startswith(method)} - of_the_data
    assert len(shared) > 15 and {key: own[key] for key in shared} == {key: general[key] for key in shared}
    got = paper(pairs, "phi-2")
    assert got.bootstrap.max_new_tokens <= got.data.max_length - got.data.max_prompt_length


SLICES = re.compile(r"^#   slices    (full|lora)  v4 (\S+)  v5e (\S+)  v5p (\S+)  v6e (\S+)$", re.M)


@pytest.mark.parametrize("model", MODELS)
def test_a_model_says_where_it_fits_and_how_large_it_is(model):
    text = (PAPER / f"{model}.yaml").read_text(encoding="utf-8")
    found = SLICES.findall(text)
    assert [line[0] for line in found] == ["full", "lora"]
    assert all(re.fullmatch(r"\?|none|(?:\d+x)?\d+x\d+", place) for line in found for place in line[1:])
    weights = int(re.search(r": ([\d,]+) weights$", text, re.M)[1].replace(",", ""))
    assert re.search(r"(\d+\.\d) GB on each", text)[1] == f"{16 * weights / 8 / 1e9:.1f}"
    folder = ROOT / "configs" / "models" / model
    if not folder.is_dir():
        pytest.skip(f"no {folder.relative_to(ROOT)}: the weights are not counted")
    arch = hf.read_arch(folder)
    assert sum(leaf.size for leaf in jax.tree.leaves(decoder.abstract(arch))) == weights


@pytest.mark.slow
@pytest.mark.skipif(
    chips.importlib.util.find_spec("libtpu") is None,
    reason="compiles for a TPU: needs libtpu (pip install 'sera_jax[tpu]')",
)
def test_the_cheapest_model_fits_where_its_file_says():
    """And, since nothing is smaller than one chip, on no smaller one."""
    text = (PAPER / "pythia-410m.yaml").read_text(encoding="utf-8")
    place = SLICES.findall(text)[0][2]
    flags = [f"--model.path={ROOT / 'configs' / 'models' / 'pythia-410m'}", "--optimizer.microbatch_rows=1"]
    own = door.CompileCheckConfig(f"v5e:{place}", only=("update",), traffic="none", search=False)
    assert place == "1x1" and door.check(paper("ultrafeedback", "pythia-410m", *flags), own).fit


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def hh(*texts: str) -> str:
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {text}" for i, text in enumerate(texts))


POST = {"id": "t3_1", "subreddit": "pets", "title": "A dog", "post": "the dog runs", "site": None, "article": None}
ROWS = {
    "ultrafeedback": {
        "prompt": "the dog", "prompt_id": "0", "messages": turns("the dog", "runs"), "score_chosen": 8.0,
        "score_rejected": 6.5, "chosen": turns("the dog", "runs"), "rejected": turns("the dog", "sits"),
    },
    "hh": {"chosen": hh("the dog", "runs", "and", "sits"), "rejected": hh("the dog", "runs", "and", "is")},
    "tldr": {
        "info": POST, "summaries": [{"text": " dog sits", "policy": "a"}, {"text": " dog runs", "policy": "b"}],
        "choice": 1, "worker": "w", "batch": "batch3", "split": "train", "extra": {"confidence": 5},
    },
    "tldr as trl has it": {
        "prompt": "SUBREDDIT: r/pets\n\nTITLE: A dog\n\nPOST: the dog runs\n\nTL;DR:", "chosen": " dog runs",
        "rejected": " dog sits",
    },
}  # fmt: skip
CHAT = {"prompt": "the cat", "prompt_id": "1", "messages": turns("the cat", "sits", "and", "runs")}


@pytest.mark.parametrize("rows", ROWS)
def test_data_in_the_published_form_is_read(rows, tiny, tmp_path, capsys, monkeypatch):
    """Rows with the columns of each data set, by the config's own keys, to tokens: the check of the door itself."""
    monkeypatch.chdir(ROOT)  # the chat template is given from there
    pairs, texts = tmp_path / "pairs.jsonl", tmp_path / "texts.jsonl"
    pairs.write_text(json.dumps(ROWS[rows]) + "\n")
    texts.write_text(json.dumps(CHAT) + "\n")
    name = rows.split()[0]
    flags = [f"--config={PAPER / name}.yaml", f"--config={PAPER / 'pythia-410m.yaml'}", "--data.check=true"]
    flags += [f"--model.path={tiny / 'model'}", f"--run.dir={tmp_path / 'run'}", f"--data.pairs=[{pairs}]"]
    flags += [f"--sft.data=[{texts}]"] if name == "ultrafeedback" else []
    loop.main(flags)
    said = capsys.readouterr().out
    form = {"ultrafeedback": "conversational", "hh": "hh", "tldr": "tldr"}.get(rows, "explicit")
    assert re.search(rf"1 pairs of 1 rows, format {form}", said), said
    if name == "ultrafeedback":
        assert re.search("1 texts of 1 rows, format messages", said), said


@pytest.mark.parametrize("name", ["gpt_neox_20b", "phi2", "mistral_v1", "llama2"])
def test_the_chat_template_of_models_that_have_none(shared_data, name):
    """BOS once where the tokeniser puts one, the words of a transcript, EOS at the ends of responses."""
    tokenizer = data.load_tokenizer(str(shared_data / "tokenizers" / name), str(PAPER / "chat.jinja"))
    end = tokenizer.eos_token_id
    pair = Pair("x", tuple(turns("the dog ", "runs", "and")), "sits", "is")
    (tree,), _ = data.tokenise_pairs([pair], tokenizer, [end], max_length=99, max_prompt_length=50)
    bos = [] if data.bos_id(tokenizer) is None else [tokenizer.bos_token_id]
    assert bool(bos) == (name in ("mistral_v1", "llama2"))
    prompt, chosen, rejected = (list(map(int, ids)) for ids in (tree.prompt, *tree.branches))
    assert prompt[: len(bos)] == bos and (not bos or bos[0] not in prompt[1:])
    # A space after a special token is a habit of Llama's tokenisers.
    told = lambda ids: tokenizer.decode(ids).replace(tokenizer.eos_token, "|").replace("| ", "|")
    assert told(prompt[len(bos) :]) == "\n\nHuman: the dog\n\nAssistant: runs|\n\nHuman: and\n\nAssistant:"
    assert [told(prompt + ids).split("Assistant:")[-1] for ids in (chosen, rejected)] == [" sits|", " is|"]
    assert [ids.count(end) for ids in (prompt, chosen, rejected)] == [1, 1, 1]
