"""The model arguments that both scripts have: where model, configuration and tokenizer come from."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ModelSource:
    """Where model, configuration and tokenizer come from; the names are those of the Hugging Face examples."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Model to fine-tune: a hub name or a folder. Leave it out to train from scratch."},
    )
    model_type: str | None = field(
        default=None,
        metadata={"help": "Type of a model to train from scratch: gpt2, llama, opt ...; bart, t5, pegasus, mbart ..."},
    )
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": "Changes to --model_type's configuration, for instance n_embd=128,n_layer=4 or d_model=128."
        },
    )
    config_name: str | None = field(
        default=None, metadata={"help": "Configuration (hub name or folder), where it is not the model's own."}
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={
            "help": "Tokenizer (hub name or folder), where it is not the model's own; train-bpe trains a byte-level "
            "BPE on the train split (dpsm_hf)."
        },
    )
    tokenizer_vocab_size: int | None = field(
        default=None, metadata={"help": "dpsm_hf: vocabulary size of --tokenizer_name train-bpe (4096)."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Folder for downloads from the hub."})
    use_fast_tokenizer: bool = field(
        default=True, metadata={"help": "Ask for the tokenizer that is backed by the tokenizers library."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the hub."})
    token: str | None = field(
        default=None, metadata={"help": "Hub token for private files; by default that of `hf auth login`."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code that comes with a model. Only for code you have read."}
    )
