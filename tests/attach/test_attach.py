"""codd attach from the command line to a coupling that generates: tiny, real files, killed in every stage."""

import hashlib
import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from codd_ppl import CouplingLayer, Sampler
from codd_ppl.attach import AttachSettings, FeatureCache, attach, open_source
from codd_ppl.attach.cached_module import CachedModule
from codd_ppl.cli import main
from codd_ppl.denoisers import BidirectionalTransformer
from codd_ppl.denoisers.pretrained import PretrainedDenoiser
from codd_ppl.errors import CoddError, ConfigError, DataError
from codd_ppl.model_folder import save_model
from codd_ppl.potentials.fit import Fit

pytest.importorskip("transformers")

SMALL: dict[str, Any] = {"states": 4, "length": 4, "epochs": 2.0, "batch_size": 16, "held_out": 0.2}
SMALL |= {"blocks": 24, "timing": 0.0, "examples": 300, "updates": 6, "top_k": 5, "reduced": 8}


def settings(backbone: Path, data: Path, out: Path, **more: Any) -> AttachSettings:
    return AttachSettings(str(backbone), [str(data)], out, **{**SMALL, **more})


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def digest(folder: Path) -> str:
    return hashlib.sha256(repr(sorted(files(folder).items())).encode()).hexdigest()


def test_the_first_stage_never_loads_the_network(
    backbone: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was loaded")

    monkeypatch.setattr(PretrainedDenoiser, "from_pretrained", loaded)
    coupling = attach(settings(backbone, texts, tmp_path / "c", blocks=0))
    assert sorted(files(tmp_path / "c")) == ["coupling.json", "coupling.safetensors"]
    config = json.loads((tmp_path / "c" / "coupling.json").read_text())
    assert config["backbone"] == str(backbone) and config["vocab_size"] == coupling.vocab_size == 12
    with pytest.raises(AssertionError, match="loaded"):
        attach(settings(backbone, texts, tmp_path / "c"))


OFTEN = [pytest.mark.slow, pytest.mark.ci]


@pytest.mark.parametrize(
    "how",
    [
        {"pool": True},
        pytest.param({"combine": "product", "sharpen": 0.8}, marks=OFTEN),
        pytest.param({"topology": "mixture"}, marks=OFTEN),
    ],
)
def test_the_report_has_the_model_and_what_it_must_beat(
    backbone: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: dict[str, Any]
) -> None:
    before = digest(backbone)
    attach(settings(backbone, texts, tmp_path / "c", timing=0.1, **how), "codd attach ..")
    assert digest(backbone) == before
    record = json.loads((tmp_path / "c" / "results.json").read_text())
    names = ["factorised", "coupled", "marginals alone", "prior alone", "sharpened 0.8"]
    assert list(record["models"]) == names and record["command"] == "codd attach .."
    assert record["text"]["blocks"] == 24
    bits = {name: row["nelbo"]["1"]["bits_per_token"] for name, row in record["models"].items()}
    assert bits["coupled"] < bits["factorised"]
    shown = capsys.readouterr().out
    assert "coupled: change in %" in shown and "the factorised model makes" in shown


def test_answers_are_written_after_their_prompts(backbone: Path, answers: Path, tmp_path: Path) -> None:
    given = {"prompt_fields": ["question"], "answer_field": "answer"}
    attach(settings(backbone, answers, tmp_path / "c", context=8, **given))
    record = json.loads((tmp_path / "c" / "results.json").read_text())
    assert record["text"]["context"] == 8
    with pytest.raises(ConfigError, match="--context 61 and --length 4: expected at most 64"):
        attach(settings(backbone, answers, tmp_path / "d", context=61, **given))
    assert not (tmp_path / "d").exists() and not (tmp_path / "d.work").exists()


@pytest.mark.parametrize("reduced", [8, pytest.param(0, marks=OFTEN)])
def test_a_contextual_coupling_reads_the_network_s_states(
    backbone: Path, texts: Path, tmp_path: Path, reduced: int
) -> None:
    attach(settings(backbone, texts, tmp_path / "c", contextual=True, pool=True, reduced=reduced))
    network = PretrainedDenoiser.from_pretrained(backbone)
    coupling = CouplingLayer.from_pretrained(
        tmp_path / "c", backbone=str(backbone), tokenizer=network.tokenizer
    )
    assert coupling.hidden_size == 16
    moved = [p for n, p in coupling.named_parameters() if "evidence_heads" in n and n.endswith("2.weight")]
    assert moved and all(float(p.detach().abs().max()) > 0 for p in moved)  # heads start at zero
    drawn = Sampler(network, coupling, steps=2).generate(torch.full((3, 4), network.mask_token_id))
    assert bool((drawn.tokens != network.mask_token_id).all())


@pytest.mark.parametrize(
    ("where", "name", "calls"),
    [
        (Fit, "update", 7),
        (FeatureCache, "_features", 1),
        (CachedModule, "training_step", 4),
    ],
    ids=["prior", "features", "training"],
)
@pytest.mark.slow
@pytest.mark.ci
def test_killed_in_the_middle_it_ends_the_same(
    backbone: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: Any,
    name: str,
    calls: int,
) -> None:
    asked = {"contextual": True, "blocks": 0, "weights": "float32"}
    monkeypatch.setattr("codd_ppl.attach.contextual.KEPT", 2)
    attach(settings(backbone, texts, tmp_path / "whole", **asked))
    real, done = getattr(where, name), []

    def killed(self: Any, *arguments: Any) -> Any:
        if len(done) == calls:
            raise RuntimeError("killed")
        done.append(1)
        return real(self, *arguments)

    (tmp_path / "part.work").mkdir()
    (tmp_path / "part.work" / "mine.txt").write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr("codd_ppl.attach.run.WRITTEN", 0.0)
        patch.setattr(where, name, killed)
        with pytest.raises(RuntimeError, match="killed"):
            attach(settings(backbone, texts, tmp_path / "part", **asked))
    assert not (tmp_path / "part").exists()
    left = files(tmp_path / "part.work")
    attach(settings(backbone, texts, tmp_path / "part", **asked))
    one, other = (
        CouplingLayer.from_pretrained(tmp_path / folder).state_dict() for folder in ("whole", "part")
    )
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=0, atol=0, msg=key)
    kept = files(tmp_path / "part.work")
    assert kept["mine.txt"] == b"mine" and set(left) <= set(kept)


def test_ctrl_c_in_training_says_how_to_go_on(
    backbone: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(CachedModule, "training_step", stopped)
    words = (
        f"attach --backbone {backbone} --data {texts} --out {tmp_path / 'c'} --states 4 --length 4 --blocks 0"
    )
    before = signal.getsignal(signal.SIGINT)
    try:  # Lightning ignores further ones while it shuts down
        assert main([*words.split(), "--contextual", "--examples", "300", "--top-k", "5"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "the same command goes on with" in capsys.readouterr().err and not (tmp_path / "c").exists()


def test_heads_trained_in_another_way_are_not_taken(backbone: Path, texts: Path, tmp_path: Path) -> None:
    found = []
    for how in ({}, {"pool": True}, {"combine": "product"}, {"updates": 3}):
        attach(settings(backbone, texts, tmp_path / "c", contextual=True, blocks=0, **how))
        found.append({path.name for path in (tmp_path / "c.work").iterdir()})
    assert [len(folders) for folders in found] == [4, 5, 6, 7]  # tokens, prior, features, and one for each


def test_the_command_line(
    backbone: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (
        f"attach --backbone {backbone} --data {texts} --out {tmp_path / 'c'} --states 4 --length 4 --blocks 8"
    )
    assert main([*words.split(), "--timing", "0", "--held-out", "0.2"]) == 0
    record = json.loads((tmp_path / "c" / "results.json").read_text())
    assert record["command"].startswith(f"codd attach --backbone {backbone}")
    assert main([*words.split(), "--topology", "ring"]) == 2
    assert "--topology: expected one of hidden_markov" in capsys.readouterr().err


def test_a_model_folder_of_this_library(backbone: Path, texts: Path, tmp_path: Path) -> None:
    tokenizer = open_source(str(backbone)).tokenizer
    denoiser = BidirectionalTransformer(12, hidden_size=8, layers=1, heads=2)
    coupling = CouplingLayer.from_pretrained(_independent(tmp_path / "i"))
    save_model(tmp_path / "net", denoiser, coupling, tokenizer)
    with pytest.raises(ConfigError, match="the token that ends a text"):
        attach(
            settings(
                tmp_path / "net", _lines(tmp_path), tmp_path / "c", answer_field="text", plain_prompts=True
            )
        )
    attach(settings(tmp_path / "net", texts, tmp_path / "c"))
    assert (tmp_path / "c" / "results.json").exists()


def _independent(path: Path) -> Path:
    from codd_ppl import topologies

    return CouplingLayer(topologies.independent(4, 12), 12).save_pretrained(path)


def _lines(tmp_path: Path) -> Path:
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(json.dumps({"text": "a b c d"}) for _ in range(40)))
    return path


def test_what_can_be_wrong(
    backbone: Path, texts: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    save = request.getfixturevalue("make_backbone")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    cases: list[tuple[type[CoddError], str, AttachSettings]] = [
        (DataError, "expected text in", settings(backbone, empty, tmp_path / "c")),
        (DataError, "found nothing at", settings(backbone, tmp_path / "no.txt", tmp_path / "c")),
        (DataError, "expected a masked model", settings(tmp_path / "no", texts, tmp_path / "c")),
        (ConfigError, "mask_token_id", settings(save(tmp_path / "m", mask=False), texts, tmp_path / "c")),
        (ConfigError, "ids below 9", settings(save(tmp_path / "v", size=9), texts, tmp_path / "c")),
        (ConfigError, "no model folder", settings(backbone, texts, texts)),
    ]
    for kind, words, given in cases:
        with pytest.raises(kind, match=words):
            attach(given)
    for wrong, words in [
        ({"states": 0}, "--states"),
        ({"held_out": 0.0}, "--valid-data"),
        ({"combine": "product", "pool": True}, "--pool and --candidates"),
        ({"prompt_fields": ["q"]}, "--answer-field"),
        ({"messages_field": "m", "answer_field": "a"}, "found both"),
        ({"sharpen": 0.0}, "--sharpen"),
    ]:
        with pytest.raises(ConfigError, match=re.escape(words)):
            settings(backbone, texts, tmp_path / "c", **wrong)
    network = PretrainedDenoiser.from_pretrained(backbone)
    with pytest.raises(
        CoddError, match="expected at most 64 tokens, the positions of BertForMaskedLM, found 65"
    ):
        network(torch.full((1, 65), 4))
    with pytest.raises(ConfigError, match="chat template"):
        attach(
            settings(save(tmp_path / "t", chat=False), _lines(tmp_path), tmp_path / "c", answer_field="text")
        )


@pytest.fixture(scope="session")
def attached(backbone: Path, answers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("attached") / "c"
    given = {"prompt_fields": ["question"], "answer_field": "answer", "blocks": 0}
    attach(settings(backbone, answers, out, **given))
    return out


def test_the_coupling_generates_with_its_backbone(
    backbone: Path, attached: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", str(attached), "--prompt", "a b c", "--length", "6", "--samples", "3", "--jsonl"]
    assert main(words) == 0
    plain = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(plain) == 3 and all(line["prompt"] == "a b c" for line in plain)
    assert main([*words, "--chat", "--backbone", str(backbone)]) == 0
    chats = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(line["prompt"] == "u a b c " for line in chats)  # the test's template
    assert main([*words, "--windows"]) == 0
    capsys.readouterr()
    (tmp_path / "prompts.txt").write_text("d e\n")
    asked = [
        "generate",
        str(attached),
        "--prompt-file",
        str(tmp_path / "prompts.txt"),
        "--chat",
        "--samples",
        "1",
    ]
    assert main([*asked, "--jsonl"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "u d e "


def test_the_coupling_is_evaluated_with_its_backbone(
    backbone: Path, attached: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "results.json"
    words = ["evaluate", str(attached), str(texts), "--blocks", "8", "--also", f"again={attached}"]
    assert main([*words, "--output", str(record)]) == 0
    models = json.loads(record.read_text())["models"]
    assert list(models) == ["factorised", "coupled", "again"]  # one network for both
    assert models["coupled"]["nelbo"] == models["again"]["nelbo"]
    assert main(["bench", "decoding", str(attached), "--batch-size", "1", "--repeats", "1"]) == 0


def test_models_that_don_t_go_together(
    attached: Path, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    save = request.getfixturevalue("make_backbone")
    larger = save(tmp_path / "larger", size=20)
    assert main(["generate", str(attached), "--backbone", str(larger)]) == 2
    assert "expected a network with the coupling's 12 tokens" in capsys.readouterr().err
    from codd_ppl.data import demo_model_path

    assert main(["generate", str(demo_model_path()), "--backbone", str(larger)]) == 2
    assert "has a network of its own" in capsys.readouterr().err
    assert main(["generate", str(demo_model_path()), "--prompt", "a", "--chat"]) == 2
    assert "without a chat template" in capsys.readouterr().err
    nameless = CouplingLayer.from_pretrained(attached).save_pretrained(tmp_path / "nameless")
    assert main(["generate", str(nameless)]) == 2
    assert "give --backbone" in capsys.readouterr().err
