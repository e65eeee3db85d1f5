"""Conversion changes nothing: loss, gradients, generation, on every supported decoder; all others are refused by name."""

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import fathom.hf as hf
from fathom.cli import main
from fathom.errors import UserError
from fathom.hf.convert import ARCHITECTURES, REFUSED, stream_for
from fathom.hf.difference import difference, keep_float64
from fathom.models.config import ResidualConfig
from tests.hf.networks import SETTINGS, checkpoint_layers, network, tokens

BLOCK = ResidualConfig(num_blocks=2)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def set_epsilon(model: PreTrainedModel, eps: float) -> None:
    for module in model.modules():
        for name in ("variance_epsilon", "eps"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, eps)


def test_every_architecture_is_tested() -> None:
    assert {name.split("-")[0] for name in SETTINGS} == ARCHITECTURES.keys()


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(
    "rule", [BLOCK, ResidualConfig(block_size=3), ResidualConfig(rule="full")], ids=["2", "3", "full"]
)
def test_loss_and_gradients_are_the_originals_at_its_own_epsilon(name: str, rule: ResidualConfig) -> None:
    if name == "gpt_neox" and rule.block_size:
        rule = ResidualConfig(block_size=2)  # a parallel block is one sublayer
    original = network(name, torch.float64)
    found = difference(original, hf.convert(original, rule), tokens())
    assert found.dtype == "float64" and found.loss < 1e-12 and found.gradient < 1e-11


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_neox"])
def test_and_with_epsilon_zero(name: str) -> None:
    original = network(name, torch.float64)
    converted = hf.convert(original, BLOCK)
    for model in (original, converted):
        set_epsilon(model, 0.0)
    found = difference(original, converted, tokens())
    assert found.loss < 1e-12 and found.gradient < 1e-11


def test_without_its_epsilons_the_gradients_would_differ() -> None:
    """The norms' n² matters, and this comparison sees it."""
    original = network("llama", torch.float64)
    converted = hf.convert(original, BLOCK)
    set_epsilon(original, 1e-3)
    set_epsilon(converted, 1e-3)
    assert difference(original, converted, tokens()).gradient > 1e-6


def test_queries_are_seen_by_the_comparison() -> None:
    original = network("llama", torch.float64)
    converted = hf.convert(original, BLOCK)
    torch.nn.init.normal_(converted.stream.query, std=0.1)
    assert difference(original, converted, tokens()).loss > 1e-4


def test_queries_get_gradients_and_the_original_stays_as_it_is() -> None:
    original = network("gpt2")
    before = original(tokens()).logits
    converted = hf.convert(original, BLOCK)
    converted(tokens(), labels=tokens()).loss.backward()
    assert converted.stream.query.grad[1:].abs().amax(-1).gt(0).all()
    with torch.no_grad():
        converted.stream.query.normal_(std=0.5)
    assert torch.equal(original(tokens()).logits, before)
    assert not torch.allclose(converted(tokens()).logits, before)
    shared = {id(parameter) for parameter in original.parameters()}
    assert {id(parameter) for parameter in converted.network.parameters()} == shared


def test_converting_never_initialises_what_it_is_given() -> None:
    original = network("llama")
    for module in original.modules():  # Transformers' own mark, which a model need not carry
        vars(module).pop("_is_hf_initialized", None)
    before = copy.deepcopy(original.state_dict())
    hf.convert(original, BLOCK)
    assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())


@pytest.mark.parametrize("name", SETTINGS)
def test_greedy_generation_is_the_originals(name: str) -> None:
    original = network(name)
    converted = hf.convert(original, BLOCK)
    prompt = tokens(2, 12)
    prompt[1, :5] = 0
    mask = torch.ones_like(prompt)
    mask[1, :5] = 0
    for settings in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
        made = [
            model.generate(
                prompt,
                attention_mask=mask,
                max_new_tokens=8,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                **settings,
            )
            for model in (original, converted)
        ]
        assert torch.equal(made[0], made[1]), settings


def trained(name: str) -> hf.ConvertedForCausalLM:
    """A conversion that has moved on from its original."""
    converted = hf.convert(network(name), BLOCK)
    with torch.no_grad():
        converted.stream.query.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
        converted.stream.key_gain.normal_(1, 0.1, generator=torch.Generator().manual_seed(1))
    return converted


@pytest.mark.parametrize("name", SETTINGS)
def test_a_conversion_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    converted = trained(name)
    converted.save_pretrained(tmp_path, max_shard_size="60KB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is hf.ConvertedForCausalLM
    for key, parameter in converted.named_parameters():
        assert torch.equal(loaded.get_parameter(key), parameter), key
    assert torch.equal(loaded(tokens()).logits, converted(tokens()).logits)
    one, other = (model.generate(tokens(), max_new_tokens=5, do_sample=False) for model in (loaded, converted))
    assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "gpt_neox"])
def test_a_cache_changes_nothing_once_queries_have_moved(name: str) -> None:
    converted = trained(name)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    one, other = (converted.generate(tokens(1, 9), use_cache=cache, **settings) for cache in (True, False))
    assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_checkpointing_keeps_the_gradients(name: str) -> None:
    plain = trained(name).train()
    saved = copy.deepcopy(plain)
    checkpoint_layers(saved)
    for model in (plain, saved):
        model(tokens(), labels=tokens(), use_cache=False).loss.backward()
    for one, other in zip(plain.parameters(), saved.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="use_reentrant"):
        checkpoint_layers(saved, use_reentrant=True)


def test_autocast_keeps_the_stream_in_float32() -> None:
    original = network("llama")
    converted = hf.convert(original, BLOCK)
    with torch.autocast("cpu", torch.bfloat16):
        losses = [float(model(tokens(), labels=tokens()).loss.detach()) for model in (original, converted)]
    assert abs(losses[0] - losses[1]) < 0.01


def test_hidden_states_are_the_means_that_attention_reads() -> None:
    """At zero queries: the original's hidden states, divided by the number of sources."""
    original = network("llama", torch.float64)
    converted = hf.convert(original, BLOCK)
    with keep_float64():
        expected = original(tokens(), output_hidden_states=True).hidden_states
        got = converted(tokens(), output_hidden_states=True).hidden_states
    counts = [max(1, len(converted.stream.source_names(site))) for site in (0, 2, 4)] + [1]
    for one, other, count in zip(expected, got, counts, strict=True):
        torch.testing.assert_close(other * count, one)
    assert converted(tokens()).hidden_states is None


@pytest.mark.parametrize("kind", [*REFUSED, "bert"])
def test_what_a_conversion_would_change_is_refused_by_name(kind: str) -> None:
    with pytest.raises(UserError, match=f"^{kind} cannot be converted: "):
        stream_for(AutoConfig.for_model(kind), BLOCK)


@pytest.mark.parametrize(
    "rule", [ResidualConfig(rule="rezero"), ResidualConfig(rule="delta"), ResidualConfig(query="input")]
)
def test_a_rule_that_does_not_start_as_the_original_is_refused(rule: ResidualConfig) -> None:
    with pytest.raises(UserError, match=f"residual.rule {rule.rule}"):
        hf.convert(network("llama"), rule)


def test_blocks_that_do_not_fit_are_named() -> None:
    with pytest.raises(UserError, match="num_blocks is 7: it must be between 1 and the 6 sublayers"):
        hf.convert(network("llama"), ResidualConfig(num_blocks=7))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    network("llama").save_pretrained(tmp_path / "original", max_shard_size="20KB")
    return tmp_path / "original"


def test_the_command_measures_tells_and_writes(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "converted"
    assert main(["convert", str(checkpoint), str(out), "--num-blocks", "2", "--tokens", "30", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["differences"]
    assert [each["dtype"] for each in found] == ["float64", "bfloat16"]
    assert found[0]["loss_difference"] < 1e-12 and found[0]["gradient"] < 1e-11
    assert found[1]["loss_difference"] < 0.05
    loaded, original = (AutoModelForCausalLM.from_pretrained(folder) for folder in (out, checkpoint))
    torch.testing.assert_close(loaded(tokens()).logits, original(tokens()).logits)
    assert loaded.stream.query.eq(0).all() and loaded.config.residual["num_blocks"] == 2
    assert str(tmp_path) not in (out / "config.json").read_text() + (out / "README.md").read_text()
    assert "float64" in (out / "README.md").read_text()


def test_bad_checkpoints_are_one_line_and_leave_nothing(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "converted"

    def refused(*said: str, args: tuple[str, ...] = ()) -> None:
        assert main(["convert", str(checkpoint), str(out), *args]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        for words in said:
            assert words in error
        assert sorted(path.name for path in tmp_path.iterdir()) == ["original"]

    refused("num_blocks is 99", args=("--num-blocks", "99"))
    refused("text.txt cannot be read", args=("--text", str(tmp_path / "text.txt")))
    shard = sorted(checkpoint.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    refused(shard.name)
    shard.unlink()
    refused(shard.name)
    shard.write_bytes(whole)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"num_attention_heads": 5}))
    refused("config.json", "attention heads")
    (checkpoint / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    refused("its weights lack model.layers.3")
    (checkpoint / "config.json").write_text("{")
    refused("config.json")
    (checkpoint / "config.json").unlink()
    refused("has no config.json")
