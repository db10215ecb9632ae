"""Pairs of a prompt and a completion through run_clm_dpsm.py: what is scored, what is generated, what is refused."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpsm_hf.data.completions import CompletionCollator, CompletionFormat, prepare_completions, split_row
from dpsm_hf.data.python_text import load_python_docstrings
from dpsm_hf.data.tokenizer import train_bpe_tokenizer
from dpsm_hf.tasks.language_modelling import LanguageModelling
from tests.tasks.clm_run import argv

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n{% endfor %}" \
    "{% if add_generation_prompt %}<assistant>{% endif %}"  # fmt: skip
PAIRS = {
    "dataset_name": "python-docstrings", "prompt_column": "document", "completion_column": "summary",
    "prompt_template": "{prompt}\nIn short: ", "block_size": 320,
}  # fmt: skip


@pytest.fixture(scope="module")
def pairs() -> Dataset:
    return load_python_docstrings()["validation"].select(range(60))


@pytest.fixture(scope="module")
def tokenizer(pairs: Dataset) -> Any:
    return train_bpe_tokenizer([*pairs["document"], *pairs["summary"]], 400)


def test_a_row_is_the_prompt_and_the_completion_and_only_that_has_labels(
    pairs: Dataset, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    texts = pairs.add_item({**pairs[0], "summary": "  "}).add_item({**pairs[0], "document": None})
    how = CompletionFormat("document", "summary", template="Text {a}: {prompt}\nIn short:")
    with caplog.at_level(logging.WARNING):
        rows = prepare_completions(texts, tokenizer, how, 400, split="train")
    assert 0 < len(rows) < len(texts)
    assert f"{len(texts) - len(rows)} of {len(texts)} pairs of the train split are left out" in caplog.text
    wanted = {(f"Text {{a}}: {p['document'] or ''}\nIn short:", p["summary"]) for p in texts}
    for row in rows:
        prompt, completion = split_row(row)
        assert row["labels"] == [-100] * len(prompt) + completion and prompt + completion == row["input_ids"]
        assert len(row["input_ids"]) <= 400 and completion[-1] == tokenizer.eos_token_id
        assert (tokenizer.decode(prompt), tokenizer.decode(completion[:-1])) in wanted
    batch = CompletionCollator(3)([rows[0], rows[1]])
    width = batch["labels"].shape[1]
    assert width % 8 == 0 and width - 8 < max(len(rows[i]["input_ids"]) for i in (0, 1)) <= width
    padded = batch["attention_mask"] == 0
    assert (batch["input_ids"][padded] == 3).all() and (batch["labels"][padded] == -100).all()


def test_a_chat_template_writes_both_messages(pairs: Dataset, tokenizer: Any) -> None:
    tokenizer.chat_template = CHAT
    how = CompletionFormat("document", "summary", chat=True)
    row = prepare_completions(pairs, tokenizer, how, 900, split="train")[0]
    prompt, completion = map(tokenizer.decode, split_row(row))
    assert prompt == f"<user>{pairs[0]['document']}</user>\n<assistant>"
    assert completion == f"{pairs[0]['summary']}</assistant>\n"
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="cannot be told where the completion starts; leave the option out"):
        prepare_completions(pairs, tokenizer, how, 400, split="train")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="--use_chat_template needs a tokenizer with a chat template"):
        prepare_completions(pairs, tokenizer, how, 400, split="train")


def test_white_space_that_joins_the_end_of_the_prompt(pairs: Dataset, tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}\n{% endfor %}" + (
        "{% if add_generation_prompt %}<assistant>\n{% endif %}"
    )
    how = CompletionFormat("document", "summary", chat=True)
    asked, answer = how.tokens("hi", "    indented code", tokenizer)
    plain, _ = how.tokens("hi", "code", tokenizer)
    assert asked == plain and tokenizer.decode(answer) == "    indented code\n"
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "    indented code"}], return_dict=False
    )
    assert whole[: len(asked)] != asked, "this tokenizer joins them, or the test says nothing"


@pytest.mark.parametrize("marks", [False, True])
def test_the_end_token_of_a_prompt_is_dropped_only_where_the_tokenizer_put_it(marks: bool, tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    end, first = tokenizer.eos_token_id, tokenizer.bos_token_id
    if marks:  # as T5's does
        tokenizer._tokenizer.post_processor = TemplateProcessing(
            single=f"$A {tokenizer.eos_token}", special_tokens=[(tokenizer.eos_token, end)]
        )
    how = CompletionFormat("document", "summary")
    plain = tokenizer("hi", add_special_tokens=False)["input_ids"]
    assert how.tokens("hi", "you", tokenizer)[0] == plain
    asked, answer = how.tokens(f"hi{tokenizer.eos_token}", "you", tokenizer)
    assert asked == [*plain, end]
    # an empty prompt: something has to stand before what is scored
    asked, answer = how.tokens("", "you", tokenizer)
    assert asked == [end if first is None else first] and answer[-1] == end


def test_a_run_scores_completions_alone(tmp_path: Path) -> None:
    """The script's perplexity is that of the saved model, token by token over the completions."""
    options = {
        **PAIRS,
        "do_train": True,
        "do_eval": True,
        "max_steps": 3,
        "continuation_rouge": 5,
        "sample_outputs": 2,
    }
    metrics = LanguageModelling.main(argv(tmp_path, **options))
    folder = tmp_path / "out"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    how = CompletionFormat("document", "summary", PAIRS["prompt_template"])
    rows = prepare_completions(load_python_docstrings()["validation"], tokenizer, how, 320, split="validation")
    total, count = 0.0, 0
    for row in rows.select(range(12)):
        prompt, completion = split_row(row)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, len(prompt) - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(completion), reduction="sum"))
        count += len(completion)
    assert metrics["eval_nll"] == pytest.approx(total / count, rel=1e-5) and metrics["eval_tokens"] == count
    assert {"eval_rouge1", "eval_rougeL", "eval_rougeLsum"} <= metrics.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"completion_column": None}, "--prompt_column document needs --completion_column too"),
        ({"completion_column": "document"}, "are both 'document': a prompt cannot be its own completion"),
        ({"completion_column": "sumary"}, r"--completion_column 'sumary' is not a column .* Did you mean 'summary'\?"),
        ({"prompt_template": "in short: "}, r"--prompt_template 'in short: ' has no \{prompt\}"),
        ({"lowercase": True}, "--lowercase has no effect on rows of --prompt_column and --completion_column"),
        ({"prompt_column": None, "completion_column": None}, "--prompt_template needs --prompt_column and --comp"),
        ({"block_size": 4}, "No pair of the train split fits into --block_size 4 tokens"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        LanguageModelling.main(argv(tmp_path, **{**PAIRS, "do_train": True, "max_steps": 1, **options}))
