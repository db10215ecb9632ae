"""What counts as a credential, and that none is left in values, texts and log lines."""

from __future__ import annotations

import dataclasses
import logging

import pytest

from dpsm_hf.runtime.secrets import HIDDEN, HideSecrets, hidden, is_secret_name, is_secret_value, without_secrets
from dpsm_hf.tasks import TASKS, get_task

HUB = "hf_" + "aBcDeFgHiJ" * 3
SECRET_NAMES = """token hub_token HF_TOKEN HUGGING_FACE_HUB_TOKEN hf-token my_token authToken use_auth_token
    api_key apiKey apikey key password db_password DB_PASSWD secret client_secret access_key secret_access_key
    AWS_SECRET_ACCESS_KEY AWS_ACCESS_KEY_ID private_key wandb_api_key WANDB_API_KEY credentials auth
    Authorization passphrase"""
OTHER_NAMES = """tokenizer_name tokenizer pad_token pad_token_id eos_token max_tokens max_new_tokens chunk_tokens
    tokens add_eos_token token_accuracy forced_bos_token decoder_start_token_id image_token_id sort_key
    text_key key_dim num_key_value_heads keys monkey author seed
    include_num_input_tokens_seen user_token_id secretary hidden_size"""


@pytest.mark.parametrize("name", SECRET_NAMES.split())
def test_names_of_credentials(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize("name", OTHER_NAMES.split())
def test_names_of_other_things(name: str) -> None:
    assert not is_secret_name(name)


def test_of_the_scripts_arguments_only_the_tokens_are_credentials() -> None:
    kinds = [kind for task in TASKS for kind in get_task(task).argument_classes()]
    names = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    assert {name for name in names if is_secret_name(name)} == {"token", "hub_token"}


@pytest.mark.parametrize(
    "text",
    [
        HUB,
        f"https://huggingface.co/x?token={HUB}",
        "ghp_" + "a1B2" * 9,
        "sk-proj-" + "a1B2" * 9,
        "AKIA" + "A1B2" * 4,
        "https://me:pass@example.org/data.json",
        "-----BEGIN RSA PRIVATE KEY-----",
        "${HF_TOKEN}",
        "$WANDB_API_KEY",
        "${HF_TOKEN:-none}",
    ],
)
def test_values_of_credentials(text: str) -> None:
    assert is_secret_value(text)


@pytest.mark.parametrize(
    "text",
    ["hf_model", "gpt2", "https://example.org/a:b@c", "${DATA}", "0123456789abcdef0123456789abcdef01234567",
     "task-list", "n_embd=32,n_layer=1", "hf-internal-testing/tiny-random-gpt2", "user@example.org", "sk-learn"],
)  # fmt: skip
def test_values_of_other_things(text: str) -> None:
    assert not is_secret_value(text) and hidden(text) == text


def test_what_the_environment_holds_is_hidden_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 2)
    monkeypatch.setenv("INNOCENT", HUB)
    monkeypatch.setenv("MY_PASSWORD", "short")
    assert hidden("key 0123456789abcdef0123456789abcdef, short") == f"key {HIDDEN}, short"
    assert is_secret_value("${INNOCENT}") and not is_secret_value("short")


def test_values_of_any_depth_lose_their_credentials() -> None:
    given = {
        "a": [{"hub_token": "abc", "pad_token": "<pad>"}, HUB],
        "token": True,
        "api_key": None,
        "n": 1,
        "key": ["x"],
    }
    expected = {"a": [{"hub_token": HIDDEN, "pad_token": "<pad>"}, HIDDEN], "token": True, "api_key": None, "n": 1,
                "key": [HIDDEN]}  # fmt: skip
    assert without_secrets(given) == expected


def test_log_lines_lose_their_credentials() -> None:
    heard = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    handler = Keep()
    handler.addFilter(HideSecrets(["open sesame", None]))
    logger = logging.getLogger("tests.secrets")
    logger.addHandler(handler)
    try:
        logger.warning("with %s and %s: %d", HUB, "open sesame", 3)
        logger.warning("100%% of %s", "it")
    finally:
        logger.removeHandler(handler)
    assert heard == [f"with {HIDDEN} and {HIDDEN}: 3", "100% of it"]


def test_the_working_directory_is_no_credential(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell keeps it as PWD, so that every absolute path below it would be one."""
    monkeypatch.setenv("PWD", "/home/somebody/project")
    monkeypatch.setenv("DB_PWD", "correct-horse-battery")
    for path in ("/home/somebody/project/train.txt", "$PWD/train.txt"):
        assert not is_secret_value(path)
    assert without_secrets("saved to /home/somebody/project/out") == "saved to /home/somebody/project/out"
    assert is_secret_name("pwd") and is_secret_value("correct-horse-battery")
