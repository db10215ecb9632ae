"""Arguments from files, checkpoints, fresh configurations."""

import json
from dataclasses import dataclass, field

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, TrainingArguments

from dpsm_hf.data.tokenizer import train_bpe_tokenizer
from dpsm_hf.tasks.checkpoints import detect_checkpoint, last_complete_checkpoint
from dpsm_hf.tasks.command_line import parse_script_arguments
from dpsm_hf.tasks.model_building import build_config_from_scratch, check_block_size, parse_config_overrides


@dataclass
class Options:
    name: str | None = None
    flag: bool = False
    rate: float = 0.5
    size: int | None = field(default=None, metadata={"help": "A size."})
    kind: str = field(default="a", metadata={"choices": ["a", "b"]})


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe_tokenizer(["Return the sum of all the numbers in the list."] * 3, 290)


def test_command_line(tmp_path):
    options, training = parse_script_arguments(
        (Options, TrainingArguments), ["--name", "x", "--flag", "--rate", "1e-3", "--output_dir", str(tmp_path)]
    )
    assert (options.name, options.flag, options.rate, options.size) == ("x", True, 1e-3, None)
    assert training.output_dir == str(tmp_path)


@pytest.mark.parametrize("suffix", ["json", "yaml", "yml"])
def test_files_equal_the_command_line(tmp_path, suffix):
    path = tmp_path / f"settings.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps({"name": "12", "rate": "5e-5", "size": 3, "learning_rate": 1e-4, "use_cpu": True}))
    else:
        path.write_text("name: '12'\nrate: 5e-5\nsize: 3\nlearning_rate: 1e-4\nuse_cpu: true\n")
    options, training = parse_script_arguments((Options, TrainingArguments), [str(path)])
    assert options == Options(name="12", rate=5e-5, size=3)
    assert training.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("naem: x", "naem is unknown; did you mean name?"),
        ("warmup_ratio: 0.1", "warmup_ratio is gone.*warmup_steps"),
        ("kind: c", "kind = 'c'.*not one of a, b"),
        ("rate: fast", "rate = 'fast'.*should be a number"),
        ("- a\n- b", "mapping of argument names"),
        ("a: [", "not valid YAML"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path, content, message):
    path = tmp_path / "settings.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        parse_script_arguments((Options,), [str(path)])


def test_broken_json_and_missing_file(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        parse_script_arguments((Options,), [str(tmp_path / "a.json")])
    with pytest.raises(FileNotFoundError, match="b.yaml"):
        parse_script_arguments((Options,), [str(tmp_path / "b.yaml")])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--overwrite_output_dir"], "overwrite_output_dir is gone from transformers 5.*resume_from_checkpoint none"),
        (["--evaluation_strategy=epoch"], "write --eval_strategy"),
        (["--torch_dtype", "auto"], "write --dtype"),
        (["--nmae", "x"], "nmae is unknown; did you mean name"),
        (["settings.toml"], "settings.toml is unknown"),
    ],
)
def test_unknown_arguments_say_what_to_write(argv, message):
    with pytest.raises(ValueError, match=message):
        parse_script_arguments((Options,), argv)


def make_checkpoint(folder, step, state='{"global_step": STEP}'):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    save_file({"weight": torch.zeros(1)}, path / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"step": step}, path / name)
    if state is not None:
        (path / "trainer_state.json").write_text(state.replace("STEP", str(step)))
    return str(path)


def arguments(folder, **options):
    return TrainingArguments(output_dir=str(folder), use_cpu=True, **{"do_train": True, **options})


def test_the_newest_complete_checkpoint_is_continued(tmp_path, caplog):
    assert detect_checkpoint(arguments(tmp_path)) is None
    make_checkpoint(tmp_path, 5)
    ten = make_checkpoint(tmp_path, 10)
    make_checkpoint(tmp_path, 12, state=None)
    make_checkpoint(tmp_path, 15, state='{"global_st')
    make_checkpoint(tmp_path, 16, state='{"global_step": 10}')  # of another step
    (tmp_path / "checkpoint-99").write_text("a file")
    assert detect_checkpoint(arguments(tmp_path)) == ten
    assert "continues from there" in caplog.text and "checkpoint-15 is incomplete" in caplog.text
    assert last_complete_checkpoint(tmp_path / "nowhere") is None
    assert detect_checkpoint(arguments(tmp_path, do_train=False)) is None


def test_resume_from_checkpoint_words(tmp_path):
    five, _ = make_checkpoint(tmp_path, 5), make_checkpoint(tmp_path, 10)
    assert detect_checkpoint(arguments(tmp_path, resume_from_checkpoint=five)) == five
    assert detect_checkpoint(arguments(tmp_path, resume_from_checkpoint="none")) is None
    assert detect_checkpoint(arguments(tmp_path, resume_from_checkpoint="True")).endswith("-10")
    with pytest.raises(ValueError, match="no such folder"):
        detect_checkpoint(arguments(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-7")))
    half = make_checkpoint(tmp_path, 20, state=None)
    with pytest.raises(ValueError, match="not a complete"):
        detect_checkpoint(arguments(tmp_path, resume_from_checkpoint=half))
    with pytest.raises(ValueError, match="no complete checkpoint in"):
        detect_checkpoint(arguments(tmp_path / "empty", resume_from_checkpoint="last"))


@pytest.mark.parametrize(
    ("model_type", "overrides", "maker"),
    [
        ("gpt2", "n_embd=16,n_layer=1,n_head=2", AutoModelForCausalLM),
        (
            "llama",
            "hidden_size=16,intermediate_size=32,num_hidden_layers=1,num_attention_heads=2",
            AutoModelForCausalLM,
        ),
        (
            "bart",
            "d_model=16,encoder_layers=1,decoder_layers=1,encoder_ffn_dim=16,decoder_ffn_dim=16",
            AutoModelForSeq2SeqLM,
        ),
        ("pegasus", "d_model=16,encoder_layers=1,decoder_layers=1", AutoModelForSeq2SeqLM),
        ("t5", "d_model=16,num_layers=1,num_heads=2,d_ff=16,d_kv=8", AutoModelForSeq2SeqLM),
    ],
)
def test_fresh_configurations_fit_the_tokenizer_and_run(tokenizer, model_type, overrides, maker):
    config = build_config_from_scratch(model_type, overrides, tokenizer)
    assert config.vocab_size == len(tokenizer)
    assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    if config.is_encoder_decoder:
        assert config.decoder_start_token_id == (2 if model_type == "bart" else 1)
    model = maker.from_config(config)
    batch = tokenizer(["Return the sum."], return_tensors="pt", return_token_type_ids=False)
    assert model(**batch, labels=batch["input_ids"]).loss.isfinite()


def test_derived_values_follow_the_overrides(tokenizer):
    """update_from_string would leave Llama with 32 key-value heads for 2 heads."""
    config = build_config_from_scratch("llama", "num_attention_heads=2,hidden_size=16", tokenizer)
    assert config.num_key_value_heads == 2


def test_what_is_overridden_stays(tokenizer):
    config = build_config_from_scratch(
        "gpt2", "vocab_size=512,eos_token_id=7,n_inner=24,resid_pdrop=0,scale_attn_weights=no", tokenizer
    )
    assert (config.vocab_size, config.eos_token_id, config.bos_token_id) == (512, 7, 0)
    assert (config.n_inner, config.resid_pdrop, config.scale_attn_weights) == (24, 0.0, False)


def test_positions_and_block_size(tokenizer):
    assert build_config_from_scratch("gpt2", None, tokenizer, block_size=2048).n_positions == 2048
    assert build_config_from_scratch("gpt2", None, tokenizer, block_size=64).n_positions == 1024
    assert build_config_from_scratch("gpt2", "n_positions=64", tokenizer, block_size=64).n_positions == 64
    for name in ("n_positions", "max_position_embeddings"):
        with pytest.raises(ValueError, match=r"block_size 128.*64 positions.*n_positions=128"):
            build_config_from_scratch("gpt2", f"{name}=64", tokenizer, block_size=128)


def test_rotary_positions_only_warn(tokenizer, caplog):
    config = build_config_from_scratch("llama", "max_position_embeddings=64", tokenizer)
    check_block_size(config, 128)
    assert "128 exceeds the 64 positions" in caplog.text


@pytest.mark.parametrize(
    ("model_type", "overrides", "message"),
    [
        (None, None, "--model_type"),
        ("gtp2", None, "'gtp2'.*gpt2"),
        ("gpt2", "n_embed=16", "no 'n_embed'.*n_embd"),
        ("gpt2", "n_embd", "'n_embd' should be name=value"),
        ("gpt2", "n_embd=big", "n_embd='big' should be of type int"),
        ("gpt2", "scale_attn_weights=maybe", "true or false"),
        ("gpt2", "vocab_size=10", "vocab_size=10 is smaller than the tokenizer's"),
    ],
)
def test_bad_overrides(tokenizer, model_type, overrides, message):
    with pytest.raises(ValueError, match=message):
        build_config_from_scratch(model_type, overrides, tokenizer)


def test_overrides_keep_upstreams_types():
    from transformers import GPT2Config

    default = GPT2Config()
    text = "n_embd=10,resid_pdrop=0.2,scale_attn_weights=false,summary_type=cls_index"
    default.update_from_string(text)
    for name, value in parse_config_overrides(text, GPT2Config()).items():
        assert getattr(default, name) == value and type(getattr(default, name)) is type(value)
