"""Models in lm_eval: local tasks through its own evaluator and command, on tiny random networks; no network access."""

import itertools
import json
import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from codd_ppl import CouplingLayer, topologies
from codd_ppl.cli import main
from codd_ppl.denoisers import BidirectionalTransformer
from codd_ppl.errors import CoddError, ConfigError, DataError, TokenError
from codd_ppl.model_folder import save_model
from codd_ppl.sampling import BlockSampler, Sampler

lm_eval = pytest.importorskip("lm_eval")
transformers = pytest.importorskip("transformers")
lm_eval_tasks = pytest.importorskip("lm_eval.tasks")
harness = pytest.importorskip("codd_ppl.evaluation.harness")

WORDS = ["[PAD]", "[UNK]", "[MASK]", "the", "cat", "sat", "on", "mat", "dog", "log"]
VOCAB, MASK, SITES, LENGTH = len(WORDS), 2, 4, 24
Make = Callable[..., Any]
TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}the{% endif %}"
)


def words() -> Tokenizer:
    found = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    return found


def save_backbone(where: Path, seed: int = 0, template: str | None = None, **settings: Any) -> Path:
    """A tiny random BERT whose predictions are far from uniform, and its tokenizer."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        pad_token_id=0,
        max_position_embeddings=LENGTH,
        initializer_range=1.0,
        **sizes,
        **settings,
    )
    transformers.BertForMaskedLM(config).save_pretrained(where)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words(), pad_token="[PAD]", mask_token="[MASK]", unk_token="[UNK]"
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(where)
    return where


def random_coupling(vocab: int = VOCAB) -> CouplingLayer:
    layer = CouplingLayer(topologies.hidden_markov(SITES, vocab, 3), vocab)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter))
    return layer.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone, and a coupling for it."""
    where = tmp_path_factory.mktemp("models")
    save_backbone(where / "backbone", template=TEMPLATE)
    random_coupling().save_pretrained(where / "coupling", backbone="a/name", tokenizer=words())
    return where


@pytest.fixture(autouse=True)
def logs(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm_eval's command keeps its messages from the root logger, where pytest listens, and adds a handler."""
    monkeypatch.setattr(logging.getLogger("lm_eval"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("lm_eval"), "handlers", [])


@pytest.fixture
def make(folders: Path) -> Make:
    def make(**arguments: Any) -> Any:
        given = {
            "backbone": folders / "backbone",
            "coupling": folders / "coupling",
            "max_gen_toks": 8,
            "steps": 4,
            "likelihood_draws": 4,
        }
        return harness.CoDDHarness(**given | arguments)

    return make


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=one) for one in arguments]


GREEDY: dict[str, Any] = {"until": [], "do_sample": False, "temperature": 0.0}


# --- through lm_eval ----------------------------------------------------------------------------------


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with a task of each kind, and its data."""
    where = tmp_path / "tasks"
    where.mkdir()
    lines = [
        {
            "question": "the cat sat",
            "answer": "on the mat",
            "choices": ["on the mat", "the", "dog"],
            "gold": 0,
        },
        {"question": "the dog", "answer": "sat", "choices": ["sat on", "log", "the cat"], "gold": 1},
        {"question": "on the log", "answer": "the cat sat", "choices": ["the", "cat"], "gold": 1},
    ]
    (where / "data.jsonl").write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    common = f"""
dataset_path: json
dataset_kwargs:
  data_files: {{test: {where / "data.jsonl"}}}
  cache_dir: {tmp_path / "cache"}
test_split: test
metadata: {{version: 1.0}}
"""
    texts = """
task: tiny_texts
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["dog"], max_gen_toks: 6, do_sample: false, temperature: 0.0, num_beams: 1}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
    choices = """
task: tiny_choices
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
    rolling = """
task: tiny_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{answer}}"
metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
"""
    for name, text in (("texts", texts), ("choices", choices), ("rolling", rolling)):
        (where / f"{name}.yaml").write_text(text + common, encoding="utf-8")
    return where


def test_lm_eval_runs_tasks_of_every_kind(folders: Path, tasks: Path) -> None:
    results = lm_eval.simple_evaluate(
        model="codd",
        model_args=f"backbone={folders / 'backbone'},coupling={folders / 'coupling'},steps=4,max_gen_toks=8,"
        "likelihood_steps=2,likelihood_draws=4",
        tasks=["tiny_texts", "tiny_choices", "tiny_rolling"],
        batch_size=2,
        device="cpu",
        task_manager=lm_eval_tasks.TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    found = results["results"]
    assert found["tiny_texts"]["exact_match,none"] in (0.0, 1 / 3, 2 / 3, 1.0)
    assert found["tiny_choices"]["acc,none"] in (0.0, 1 / 3, 2 / 3, 1.0)
    assert found["tiny_rolling"]["word_perplexity,none"] > 1
    for sample in results["samples"]["tiny_texts"]:
        (text,) = sample["resps"][0]
        assert "dog" not in text and len(text.split()) <= 6
    likelihoods = [resp[0] for sample in results["samples"]["tiny_choices"] for resp in sample["resps"]]
    assert len(likelihoods) == 8 and all(float(score) < 0 for score, _ in likelihoods)


def test_lm_eval_applies_the_chat_template(make: Make, tasks: Path) -> None:
    results = lm_eval.simple_evaluate(
        model=make(),
        tasks=["tiny_texts"],
        task_manager=lm_eval_tasks.TaskManager(include_path=str(tasks), include_defaults=False),
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    asked = {sample["arguments"][0][0] for sample in results["samples"]["tiny_texts"]}
    assert asked == {"the cat sat the", "the dog the", "on the log the"}


def test_the_command(
    folders: Path,
    tasks: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`codd harness` is lm_eval with one more model; it asks for cuda:0 by itself, which falls back to the CPU."""
    quick = partial(lm_eval_tasks.TaskManager, include_defaults=False)  # reading all of its tasks takes 20 s
    monkeypatch.setattr(lm_eval_tasks, "TaskManager", quick)
    arguments = f"backbone={folders / 'backbone'},coupling={folders / 'coupling'},steps=4,block_length=2,max_gen_toks=8"
    words = ["harness", "--model", "codd", "--tasks", "tiny_choices", "--include_path", str(tasks)]
    words += ["--batch_size", "2", "--output_path", str(tmp_path / "out"), "--model_args"]
    assert main([*words, arguments]) == 0
    assert "tiny_choices" in capsys.readouterr().out
    (written,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(written.read_text(encoding="utf-8"))["results"]["tiny_choices"]["acc,none"] >= 0
    assert main([*words, "backbone=/nowhere"]) == 2
    assert "codd: /nowhere: expected a masked model" in capsys.readouterr().err


def test_without_lm_eval(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == "lm_eval" or name.startswith("lm_eval.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "codd_ppl.evaluation.harness")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["harness", "--help"]) == 2
    assert 'pip install "codd-ppl[eval,hf]"' in capsys.readouterr().err


# --- texts --------------------------------------------------------------------------------------------


def test_texts_are_those_of_the_block_sampler(make: Make) -> None:
    """Greedy: the mode in every step, blocks of two tokens with one step each; settings of the model say so."""
    lm = make(block_length=2)
    prompt = lm.tok_encode("the cat sat")
    sampler = Sampler(lm.model.denoiser, lm.model.coupling, "low_confidence", steps=1, drawing="mode")
    template = torch.tensor(prompt + [MASK] * 8)
    tokens = BlockSampler(sampler, 2).generate([template]).tokens[0][3:].tolist()
    expected = " ".join(WORDS[token] for token in tokens if token not in (0, 1))
    assert lm.generate_until(requests(("the cat sat", GREEDY))) == [expected]
    assert lm.generate_until(requests(("the cat sat", {}))) == [expected]  # greedy is the default
    assert make(block_length=2, drawing="mode").generate_until(
        requests(("the cat sat", {"do_sample": True}))
    ) == [expected]


def test_results_come_in_the_order_of_the_requests(make: Make) -> None:
    contexts = ["the cat sat on the mat", "the", "dog log cat", "", "on the log", "the dog", "log"]
    asked = [(context, {**GREEDY, "max_gen_toks": 3 + i % 2}) for i, context in enumerate(contexts)]
    alone = [make().generate_until(requests(one))[0] for one in asked]
    assert len(set(alone)) > 3
    for size in (1, 2, 8):
        assert make(batch_size=size).generate_until(requests(*asked)) == alone
        assert make(batch_size=str(size)).generate_until(requests(*asked[::-1])) == alone[::-1]


def test_texts_end_before_a_stop(make: Make) -> None:
    lm = make(max_gen_toks=16, steps=16)
    whole = lm.generate_until(requests(("the cat", GREEDY)))[0]
    stop = whole.split()[4]
    for until in (stop, [stop], [stop, "nothing like it", ""]):
        text = lm.generate_until(requests(("the cat", {**GREEDY, "until": until})))[0]
        assert text == whole[: whole.index(stop)]
    assert lm.generate_until(requests(("the cat", {**GREEDY, "until": None})))[0] == whole


def test_texts_end_before_the_end_of_text_token(make: Make, tmp_path: Path) -> None:
    whole = make(max_gen_toks=16, steps=16).generate_until(requests(("the cat", GREEDY)))[0]
    word = whole.split()[4]
    ends = save_backbone(tmp_path / "ends", eos_token_id=WORDS.index(word))
    lm = make(max_gen_toks=16, steps=16, backbone=ends)
    text = lm.generate_until(requests(("the cat", GREEDY)))[0]
    assert text == " ".join(whole.split()[: whole.split().index(word)])
    assert lm.eot_token_id == WORDS.index(word)


def test_a_task_may_sample(make: Make) -> None:
    asked = requests(*[("the cat", {"do_sample": True, "temperature": 2.0, "max_gen_toks": 8})] * 6)
    texts = [make(seed=seed, batch_size=3).generate_until(asked) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2] and len(set(texts[0])) > 3
    cold = [("the cat", {"do_sample": True, "temperature": 1e-4, "max_gen_toks": 8})] * 6
    assert len(set(make(drawing="joint").generate_until(requests(*cold)))) < len(set(texts[0]))
    top = [("the cat", {"do_sample": True, "top_k": 1, "max_gen_toks": 8})] * 6
    alone = make(factorised=True).generate_until(requests(*top))
    assert len(set(alone)) == 1
    forced = make(temperature=0).generate_until(asked)
    assert set(forced) == {make().generate_until(requests(("the cat", GREEDY)))[0]}


def test_a_task_asks_for_another_length_at_the_same_rate(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """Four steps for eight tokens in blocks of two: one step a block, however many blocks a task wants."""
    with caplog.at_level(logging.INFO, logger="lm_eval.codd_ppl"):
        for length, calls in ((8, "4.0"), (4, "2.0"), (12, "6.0")):
            make(block_length=2).generate_until(
                requests(("the cat sat on the", {**GREEDY, "max_new_tokens": length}))
            )
            assert f"1 texts, {calls} network calls for each" in caplog.messages


def test_settings_that_have_no_meaning_are_named_once(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    lm = make()
    for _ in range(2):
        lm.generate_until(requests(("the", {**GREEDY, "num_beams": 1, "repetition_penalty": 1.1})))
    said = [text for text in caplog.messages if "without a meaning" in text]
    assert said == ["generation settings without a meaning here: num_beams, repetition_penalty"]


def test_the_network_reads_so_many_tokens(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    long = " ".join(["the cat sat on"] * 8)  # 32 tokens, for a network of 24
    lm = make(max_gen_toks=4, steps=1)
    assert lm.max_length == LENGTH
    found = lm.generate_until(requests((long, GREEDY)))
    assert "1 of 1 texts are longer than max_length=24, up to 36 tokens" in caplog.text
    cut = " ".join(long.split()[-(LENGTH - SITES) :])
    assert found == lm.generate_until(requests((cut, GREEDY)))
    cut = " ".join(long.split()[-(LENGTH - 2) :])
    (score, _), (same, _) = lm.loglikelihood(requests((long, " the dog"), (cut, " the dog")))
    assert score == pytest.approx(same, abs=1e-5)
    with pytest.raises(ConfigError, match="at least the 4 tokens of a window, found 3"):
        make(max_length=3)
    lookahead = make(lookahead="true", max_length=10)
    assert len(lookahead.generate_until(requests((long, {**GREEDY, "max_gen_toks": 6})))) == 1
    with pytest.raises(ConfigError, match="and the 8 right of it that lookahead shows, found 10"):
        lookahead.generate_until(requests((long, GREEDY)))


# --- likelihoods --------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["", "the cat", "the cat sat on the"])
@pytest.mark.parametrize("factorised", [False, True])
def test_one_step_likelihoods_against_enumeration(make: Make, context: str, factorised: bool) -> None:
    """All continuations of two tokens: those of the coupled law, which add up to one."""
    lm = make(likelihood_steps=1, batch_size=50, factorised=factorised)
    ids = lm.tok_encode(context)
    pairs = [pair for pair in itertools.product(range(VOCAB), repeat=2) if MASK not in pair]
    found = lm._loglikelihood_tokens([(("", ""), ids, list(pair)) for pair in pairs])
    scores = torch.tensor([score for score, _ in found], dtype=torch.float64)
    assert float(scores.exp().sum()) == pytest.approx(1.0, abs=1e-5)
    assert sum(greedy for _, greedy in found) == 1
    if len(ids) >= 2:  # the window ends where the continuation does
        model, mask = lm.model, [MASK, MASK]
        with torch.no_grad():
            output = model.denoiser(torch.tensor([ids + mask]))
            begin = len(ids) - 2
            dist = model.coupling(
                output.logits[:, begin:],
                hidden=output.hidden[:, begin:],
                tokens=torch.tensor([ids[begin:] + mask]),
                known=torch.tensor([[True, True, False, False]]),
            )
            every = torch.tensor([[ids[begin:] + list(pair)] for pair in pairs])
            assert scores.tolist() == pytest.approx(dist.log_prob(every)[:, 0].tolist(), abs=1e-4)
            if factorised:
                logs = output.logits[0, len(ids) :].log_softmax(-1)
                direct = [float(logs[0, a] + logs[1, b]) for a, b in pairs]
                assert scores.tolist() == pytest.approx(direct, abs=1e-4)


def test_greedy_is_what_one_step_in_mode_drawing_writes(make: Make) -> None:
    lm = make(max_gen_toks=4, steps=1)
    for context in ("", "the cat sat on"):
        text = lm.generate_until(requests((context, GREEDY)))[0]
        if len(lm.tok_encode(text)) == 4:  # nothing was left out as a special token
            scores = lm.loglikelihood(requests((context, f" {text}"), (context, f" {text} log")))
            assert scores[0][1] and scores[0][0] > scores[1][0]


def test_likelihoods_come_in_the_order_of_the_requests(make: Make) -> None:
    asked = [
        ("the cat", " sat"),
        ("", "the dog sat on"),
        ("the", ""),
        ("on the log", " the cat sat on the mat"),
    ]
    asked += [("the cat ", "sat"), ("the", " dog on"), ("the cat", " mat")]
    for steps in (1, 3):
        alone = [make(likelihood_steps=steps).loglikelihood(requests(one))[0] for one in asked]
        assert alone[2] == (0.0, True) and alone[4] == alone[0] != alone[6]
        for size in (1, 2, 16):
            lm = make(likelihood_steps=steps, batch_size=size)
            found = lm.loglikelihood(requests(*asked))
            assert [s for s, _ in found] == pytest.approx([s for s, _ in alone], abs=1e-4)
            assert [g for _, g in found] == [g for _, g in alone]


def test_rolling_likelihoods_go_block_by_block(make: Make) -> None:
    lm = make(likelihood_steps=1)
    text = "the cat sat on the mat on the dog"
    parts = [
        ("", "the cat sat on"),
        ("the cat sat on", " the mat on the"),
        ("the cat sat on the mat on the", " dog"),
    ]
    (whole, nothing) = lm.loglikelihood_rolling(requests((text,), ("",)))
    assert whole == pytest.approx(sum(score for score, _ in lm.loglikelihood(requests(*parts))), abs=1e-4)
    assert nothing == 0.0


def test_answers_reach_the_cache_of_lm_eval(make: Make) -> None:
    lm = make()
    told: list[tuple[Any, ...]] = []
    lm.set_cache_hook(SimpleNamespace(add_partial=lambda *answer: told.append(answer)))
    text = lm.generate_until(requests(("the", GREEDY)))[0]
    score = lm.loglikelihood(requests(("the", " cat")))[0]
    rolling = lm.loglikelihood_rolling(requests(("the cat",)))[0]
    assert told == [
        ("generate_until", ("the", GREEDY), text),
        ("loglikelihood", ("the", " cat"), score),
        ("loglikelihood_rolling", ("the cat",), rolling),
    ]


# --- what is loaded -----------------------------------------------------------------------------------


def test_a_model_folder_brings_its_own_coupling(make: Make, tmp_path: Path) -> None:
    torch.manual_seed(3)
    network = BidirectionalTransformer(VOCAB, hidden_size=16, layers=1, heads=2)
    folder = save_model(tmp_path / "model", network, random_coupling(), words())
    given = {"backbone": folder, "coupling": None, "likelihood_steps": 1}
    coupled, alone = make(**given), make(**given, factorised="True")
    assert coupled.model.block_length == alone.model.block_length == SITES
    scores = [lm.loglikelihood(requests(("the cat", " sat on")))[0][0] for lm in (coupled, alone)]
    assert scores[0] != pytest.approx(scores[1], abs=1e-3)
    assert coupled.max_length is None and coupled.tokenizer_name == str(folder).replace("/", "__")
    with pytest.raises(ConfigError, match="dtype: expected for networks of transformers only"):
        make(**given, dtype="float16")
    with pytest.raises(ConfigError, match="expected a tokenizer with a chat template, found none"):
        coupled.apply_chat_template([{"role": "user", "content": "the cat"}])
    save_model(tmp_path / "silent", network, random_coupling())
    with pytest.raises(DataError, match="expected a network with its tokenizer"):
        make(backbone=tmp_path / "silent", coupling=None)


def test_a_network_alone_is_factorised(make: Make) -> None:
    lm = make(coupling=None, max_gen_toks=64, steps=8)
    assert lm.model.block_length == LENGTH and not lm.model.coupling.graph.factors and lm.writer.steps == 3
    given = make(coupling=None, block_length="6", max_gen_toks=12, steps="4")
    assert given.model.coupling.sites == 6 and given.writer.steps == 2


def test_a_tied_coupling_reaches_as_far_as_a_block(make: Make) -> None:
    lm = make(block_length=8, likelihood_steps=1)
    assert lm.model.coupling.sites == 8 and lm.writer.steps == 4
    free = CouplingLayer(topologies.hidden_markov(SITES, VOCAB, 3), VOCAB)
    assert free.sites < lm.model.coupling.sites


def test_chat_templates(make: Make) -> None:
    lm = make()
    chat = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    assert lm.apply_chat_template(chat) == "the cat sat the"
    assert lm.apply_chat_template(chat, add_generation_prompt=False) == "the cat sat"
    assert lm.chat_template(True) == TEMPLATE and "/" not in lm.tokenizer_name


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        ({"backbone": None}, ConfigError, "found no backbone"),
        ({"temprature": 1}, ConfigError, "found unknown: temprature"),
        (
            {"steps": 3},
            ConfigError,
            r"a multiple of max_gen_toks / block_length = 8 / 4.*found 3, 1\.50 for each",
        ),
        ({"steps": 1}, ConfigError, r"found 1, 0\.50 for each"),
        ({"steps": "many"}, ConfigError, "steps: expected a whole number of at least 1, found 'many'"),
        ({"batch_size": "auto"}, ConfigError, "batch_size: expected a whole number"),
        ({"factorised": "perhaps"}, ConfigError, "factorised: expected true or false"),
        ({"temperature": -1}, ConfigError, "temperature: expected a number of at least 0"),
        ({"temperature": 0, "drawing": "joint"}, ConfigError, "temperature: 0 says drawing=mode"),
        ({"unmasking": "best"}, ConfigError, "unmasking: expected one of"),
        ({"drawing": "best"}, ConfigError, "drawing: expected one of"),
        ({"device": "nowhere"}, ConfigError, "device nowhere: expected a device of this machine"),
        ({"backbone": "/nowhere"}, DataError, "expected a masked model of transformers"),
        ({"coupling": "/nowhere"}, DataError, "expected a coupling written by save_pretrained"),
    ],
)
def test_arguments_that_cannot_be_meant(
    make: Make, arguments: dict[str, Any], kind: type[CoddError], said: str
) -> None:
    with pytest.raises(kind, match=said):
        make(**arguments)


def test_a_coupling_of_another_vocabulary(make: Make, tmp_path: Path) -> None:
    other = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS[::-1])}, unk_token="[UNK]"))
    random_coupling().save_pretrained(tmp_path / "other", tokenizer=other)
    with pytest.raises(ConfigError, match="expected the vocabulary that this coupling was made for"):
        make(coupling=tmp_path / "other")


def test_the_mask_is_no_text(make: Make) -> None:
    lm = make()
    for ask in (
        lambda: lm.generate_until(requests(("the [MASK] sat", GREEDY))),
        lambda: lm.loglikelihood(requests(("the", " [MASK]"))),
        lambda: lm.loglikelihood_rolling(requests(("[MASK]",))),
    ):
        with pytest.raises(TokenError, match=r"without the mask token, found '\[MASK\]' at token"):
            ask()
    with pytest.raises(ConfigError, match="until: expected strings"):
        lm.generate_until(requests(("the", {"until": [3]})))
