"""Values of options from files, command lines and Python: what is taken, and what is said of the rest."""

import json
import math
from pathlib import Path

import pytest

from dpsm_hf import DPSMConfig, DPSMSeq2SeqConfig
from dpsm_hf.tasks import get_task

MODEL = {"model_type": "gpt2", "tokenizer_name": "train-bpe", "dataset_name": "python-docs", "use_cpu": True}


@pytest.fixture(params=["language-modelling", "summarization"])
def task(request):
    return get_task(request.param)


def settings(folder: Path, text: str, suffix: str = "yaml", **values) -> str:
    """Write a file whose first lines are what every run needs, and `text` from line 6 on."""
    path = folder / f"settings.{suffix}"
    values = {**MODEL, "output_dir": str(folder / "out"), **values}
    if suffix == "json":
        lines = [f"{json.dumps(name)}: {json.dumps(value)}," for name, value in values.items()]
        path.write_text("{" + "\n".join([*lines, text]) + "}")
    else:
        path.write_text("\n".join([*(f"{name}: {json.dumps(value)}" for name, value in values.items()), text]) + "\n")
    return str(path)


def line(folder: Path, *words: str) -> list[str]:
    return [*(f"--{name}={value}" for name, value in MODEL.items()), "--output_dir", str(folder / "out"), *words]


# ---- what is taken --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", ["'false'", "false", "no", "'no'", "'0'", "Off"])
def test_a_quoted_false_is_false(task, tmp_path, written):
    args = task.parse([settings(tmp_path, f"fit_temperature: {written}\ndo_train: {written}")]).training_args
    assert args.fit_temperature is False and args.do_train is False


@pytest.mark.parametrize("written", ["'true'", "on", "yes", "True", "'1'"])
def test_a_quoted_true_is_true(task, tmp_path, written):
    assert task.parse([settings(tmp_path, f"do_train: {written}")]).training_args.do_train is True


def test_quoted_booleans_in_json(task, tmp_path):
    parsed = task.parse([settings(tmp_path, '"fit_temperature": "false", "do_train": "true"', "json")])
    assert parsed.training_args.fit_temperature is False and parsed.training_args.do_train is True


def test_bare_words_of_yaml_are_texts_where_texts_belong(task, tmp_path):
    text = "save_strategy: no\neval_strategy: no\nfused_head: off\nrun_name: 007\nmodel_revision: 1e5"
    parsed = task.parse([settings(tmp_path, text)])
    training = parsed.training_args
    assert (training.save_strategy.value, training.eval_strategy.value, training.fused_head) == ("no", "no", "off")
    assert (training.run_name, parsed.model_args.model_revision) == ("007", "1e5")


def test_leading_zeros_and_colons_mean_what_they_do_in_yaml_1_2(task, tmp_path):
    parsed = task.parse([settings(tmp_path, "max_steps: 010\nseed: -0\nrun_name: 12:30\nlearning_rate: 1_0")])
    training = parsed.training_args
    assert (training.max_steps, training.seed, training.run_name) == (10, 0, "12:30")


def test_report_to_null_reports_nowhere(task, tmp_path):
    assert task.parse([settings(tmp_path, "report_to: null")]).training_args.report_to in ([], ["none"])


def test_numbers_as_files_and_people_write_them(task, tmp_path):
    text = "learning_rate: 5e-5\nmax_steps: '10'\nseed: 3.0\nweight_decay: '1e-2'\ncalibration_bins: 20\nalpha_hold: 5"
    training = task.parse([settings(tmp_path, text)]).training_args
    assert (training.learning_rate, training.max_steps, training.seed) == (5e-5, 10, 3)
    assert (training.weight_decay, training.calibration_bins, training.alpha_hold) == (0.01, 20, 5.0)
    assert type(training.max_steps) is type(training.seed) is int


def test_null_leaves_out_what_can_be_left_out(task, tmp_path):
    parsed = task.parse([settings(tmp_path, "run_name: null\nmax_train_samples: ~\nalpha_start:")])
    assert parsed.training_args.alpha_start is None and parsed.data_args.max_train_samples is None


def test_lists_and_keys_with_values(task, tmp_path):
    text = "label_names: labels\ninclude_for_metrics: [loss]\nlr_scheduler_type: cosine_with_restarts\n"
    training = task.parse([settings(tmp_path, text + "lr_scheduler_kwargs: {num_cycles: 2}")]).training_args
    assert (training.label_names, training.include_for_metrics) == (["labels"], ["loss"])
    words = line(tmp_path, "--lr_scheduler_kwargs", '{"num_cycles": 2}')
    assert training.lr_scheduler_kwargs == task.parse(words).training_args.lr_scheduler_kwargs == {"num_cycles": 2}


def test_clipping_at_infinity_measures_the_norm(task, tmp_path):
    assert task.parse(line(tmp_path, "--max_grad_norm", "inf")).training_args.max_grad_norm == math.inf


@pytest.mark.parametrize("suffix", ["yaml", "yml", "json"])
@pytest.mark.parametrize("form", [("--config",), ()])
def test_a_file_beside_options_that_override_it(task, tmp_path, suffix, form):
    text = '"max_steps": 3, "seed": 5' if suffix == "json" else "max_steps: 3\nseed: 5"
    path = settings(tmp_path, text, suffix)
    words = [*form, path, "--max_steps", "7", "--do_train"]
    for order in (words, [*words[len(form) + 1 :], *form, path] if form else words):
        training = task.parse(order).training_args
        assert (training.max_steps, training.seed, training.do_train) == (7, 5, True)
    equals = task.parse([f"--config={path}"]).training_args
    assert (equals.max_steps, equals.seed, equals.do_train) == (3, 5, False)


def test_later_files_override_earlier_ones(task, tmp_path):
    one = settings(tmp_path, "max_steps: 3\nseed: 5")
    (tmp_path / "two.yaml").write_text("max_steps: 4\n")
    training = task.parse(["--config", one, "--config", str(tmp_path / "two.yaml")]).training_args
    assert (training.max_steps, training.seed) == (4, 5)


def test_an_option_of_true_false_or_neither_stands_alone(tmp_path):
    task = get_task("language-modelling")
    for words, wanted in (
        (["--add_eos_between_documents"], True),
        (["--add_eos_between_documents", "false"], False),
        (["--add_eos_between_documents=no", "--lowercase"], False),
        ([], None),
    ):
        assert task.parse(line(tmp_path, *words)).data_args.add_eos_between_documents is wanted
    data = task.parse(line(tmp_path, "--lowercase", "--no_keep_linebreaks", "--drop-empty-lines")).data_args
    assert data.lowercase is True and data.keep_linebreaks is False and data.drop_empty_lines is True


def test_help_shows_defaults_and_the_settings_file(task, capsys):
    with pytest.raises(SystemExit):
        task.parse(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--config FILE" in shown and "(default: 5e-05)" in shown and "{no,steps,epoch}" in shown
    assert "object at" not in shown


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alpha_end: null", r"alpha_end = null in .*settings.yaml:6 should be a number; leave it out"),
        ("max_train_samples: [1]", r"max_train_samples = \[1\] in .*:6 should be a whole number"),
        ("max_train_samples: 12:30", r"max_train_samples = '12:30' in .*:6 should be a whole number"),
        ("report_to: 3", r"report_to = 3 in .*settings.yaml:6 "),
        ("report_to: [wandbb]", r"report_to = \['wandbb'\] in .*:6 has 'wandbb', which is not one of all, none, "),
        ("debug: foo", r"--debug: .*foo"),
        ("max_train_samples: 1.5", r"max_train_samples = 1.5 in .*:6 should be a whole number"),
        ("max_train_samples: yes", r"max_train_samples = yes in .*:6 should be a whole number"),
        ("\nlearning_rate: nan", r"learning_rate = 'nan' in .*:7 should be a number that is finite"),
        ("learning_rate: inf", r"learning_rate = 'inf' in .*:6 should be a number that is finite"),
        ("learning_rate: .inf", r"settings.yaml:6: learning_rate: .inf is no number"),
        ("learning_rate: {a: 1}", r"learning_rate = \{'a': 1\} in .*:6 should be a number"),
        ("do_train: maybe", r"do_train = 'maybe' in .*:6 should be true or false"),
        ("do_train: 2", r"do_train = 2 in .*:6 should be true or false"),
        ("do_train: null", r"do_train = null in .*:6 should be true or false"),
        ("do_train: [true]", r"do_train = .* in .*:6 should be true or false"),
        ("save_strategy: maybe", r"save_strategy = 'maybe' in .*:6 should be no or steps or epoch or best"),
        ("save_strategy: null", r"save_strategy = null in .*:6 should be no or steps"),
        ("fused_head: no", r"fused_head = no in .*:6 should be auto or on or off"),
        ("model_revision: null", r"model_revision = null in .*:6 should be text"),
        ("run_name: [a]", r"run_name = \['a'\] in .*:6 should be text"),
        ("lr_scheduler_kwargs: '{\"a\"'", r"lr_scheduler_kwargs = .* in .*:6 should be keys with values as JSON"),
        ("fsdp_config: 5", r"fsdp_config = .* in .*:6 should be"),
        ("fsdp_config: five", r"fsdp_config = .* in .*:6 should be keys with values as JSON, or the path of a JSON"),
        ("lr_scheduler_kwargs: twice", r"lr_scheduler_kwargs = .* in .*:6 should be keys with values as JSON"),
        ("liger_kernel_config: {rope: maybe}", r"liger_kernel_config = .* in .*:6 should be keys with values"),
        ("per_device_train_batch_size: 0", r"per_device_train_batch_size = 0 in .*:6 should be at least 1"),
        ("learning_rate: -1", r"learning_rate = -1 in .*:6 should be at least 0"),
        ("seed: 1\nseed: 2", r"settings.yaml:7: seed: this key was given in line 6 already"),
        ("1: 2", r"settings.yaml:6: the key 1 is no text"),
        ("seed: !!python/name:os.system", r"settings.yaml:6: seed: the tag"),
        ("seed: !!bool x", r"settings.yaml:6: seed: 'x' is no bool"),
        ("accelerator_config: {split_batches: 'false'}", r"accelerator_config = .* in .* has the text 'false' inside"),
        ("lr_scheduler_kwargs: {a: [{b: 'No'}]}", r"lr_scheduler_kwargs = .* in .*:6 has the text 'No' inside"),
        ("token: [hf_abcdefghijklmnopqrstuvwxyz]", r"^token = \*\*\* in .*:6 should be text"),
        ("seed: [1", "not valid YAML.*settings.yaml:"),
    ],
)  # fmt: skip
def test_mistakes_in_yaml_name_option_line_value_and_what_belongs_there(task, tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        task.parse([settings(tmp_path, text)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('"alpha_end": null', r"alpha_end = null in .*settings.json:6 should be a number"),
        ('"learning_rate": NaN', r"learning_rate = nan in .*:6 should be a number that is finite"),
        ('"learning_rate": Infinity', r"learning_rate = inf in .*:6 should be a number that is finite"),
        ('"seed": true', r"seed = True in .*:6 should be a whole number"),
        ('"run_name": false', r"run_name = False in .*:6 should be text"),
        ('"seed": 1, "seed": 2', r"seed is given twice, as 1 and 2"),
        ('"seed": ' + "[" * 10**5, "not valid JSON"),
        ('"seed": 1,', "not valid JSON"),
    ],
)
def test_mistakes_in_json(task, tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        task.parse([settings(tmp_path, text, "json")])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stop_at_step", "nan"], r"--stop_at_step nan: this should be a number that is finite"),
        (["--stop_at_step", "inf"], r"--stop_at_step inf: this should be a number that is finite"),
        (["--stop_at_step", "1.5"], r"--stop_at_step 1.5 must be a whole number of steps"),
        (["--max_steps", "1.5"], r"--max_steps 1.5: this should be a whole number"),
        (["--max_train_samples=ten"], r"--max_train_samples ten: this should be a whole number"),
        (["--do_train", "maybe"], r"--do_train maybe: this should be true or false"),
        (["--lr_scheduler_kwargs", "{"], r"--lr_scheduler_kwargs {: this should be keys with values as JSON"),
        (["--gradient_accumulation_steps", "0"], r"--gradient_accumulation_steps 0: this should be at least 1"),
        (["--adam_beta1", "NaN"], r"--adam_beta1 NaN: this should be a number that is finite"),
    ],
)
def test_mistakes_on_the_command_line(task, tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        task.parse(line(tmp_path, *words))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--accelerator_config", "nowhere.json"], "--accelerator_config: .*nowhere.json"),
        (["--deepspeed", "nowhere.json"], "--deepspeed: "),
        (["--accelerator_config", '{"split_batchez": true}'], "--accelerator_config: .*split_batchez"),
    ],
)
def test_what_transformers_refuses_without_the_option_names_it(task, tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        task.parse(line(tmp_path, *words))


def test_settings_files_that_are_none(task, tmp_path):
    (tmp_path / "latin.yaml").write_bytes("run_name: schön".encode("latin-1"))
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "a.toml").write_text("a = 1")
    (tmp_path / "empty.yaml").write_text("")
    for name, message in (
        ("latin.yaml", "latin.yaml' is not UTF-8"),
        ("folder.yaml", "folder.yaml' is a folder"),
        ("missing.yaml", "missing.yaml' does not exist"),
        ("a.toml", "a.toml' must end in .json, .yaml, .yml"),
        ("empty.yaml", "empty.yaml.*mapping of argument names"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            task.parse(["--config", str(tmp_path / name)])


@pytest.mark.parametrize("config", [DPSMConfig, DPSMSeq2SeqConfig])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"focal_gamma": None}, "focal_gamma=None should be a number"),
        ({"alpha_warmup_steps": None}, "alpha_warmup_steps=None should be a number"),
        ({"alpha_end": math.nan}, "alpha_end=nan should be a number that is finite"),
        ({"alpha_end": [1.0]}, r"alpha_end=\[1.0\] should be a number"),
        ({"chunk_tokens": math.nan}, "chunk_tokens=nan should be a whole number"),
        ({"chunk_tokens": True}, "chunk_tokens=True should be a whole number"),
        ({"calibration_bins": 1.5}, "calibration_bins=1.5 should be a whole number"),
        ({"calibration_bins": None}, "calibration_bins=None should be a whole number"),
        ({"classwise_tokens": 0.5}, "classwise_tokens=0.5 should be a whole number"),
        ({"fit_temperature": "maybe"}, "fit_temperature='maybe' should be true or false"),
        ({"scoring_rule": None}, "scoring_rule=None should be text"),
        ({"alpha_schedule": 3}, "alpha_schedule=3 should be text"),
    ],
)
def test_the_constructor_refuses_other_kinds_of_values(tmp_path, config, options, message):
    with pytest.raises(ValueError, match=message):
        config(output_dir=str(tmp_path), use_cpu=True, **options)


def test_the_constructor_converts_as_the_scripts_do(tmp_path):
    args = DPSMConfig(
        output_dir=str(tmp_path), use_cpu=True, fit_temperature="false", alpha_end="5e-1", chunk_tokens=64.0
    )
    assert args.fit_temperature is False and args.alpha_end == 0.5 and type(args.chunk_tokens) is int
